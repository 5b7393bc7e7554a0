# SPDX-License-Identifier: Apache-2.0
"""Which build is tested, and what every test may ask for.

FVD_TEST_BUILD=release (default) is the tree itself; checked is the copy in build/checked, compiled with bounds checks and assertions.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILD = os.environ.get("FVD_TEST_BUILD", "release")
TREES = {"release": ROOT, "checked": ROOT / "build" / "checked"}
if BUILD not in TREES:
    raise SystemExit(f"FVD_TEST_BUILD={BUILD}: choose {' or '.join(TREES)}")
TREE = TREES[BUILD]

# For this process and for every command that a test starts.
sys.path.insert(0, str(TREE))
os.environ["PYTHONPATH"] = os.pathsep.join([str(TREE), *filter(None, [os.environ.get("PYTHONPATH")])])

# A job in the background of a script (nohup, some CI) begins with SIGINT ignored, and so would every command that a test interrupts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


MARKERS = {
    "slow": "takes long; left out of the checked build's run and of make test-quick",
    "release_only": "about speed, the sources or the tools; says nothing about the checked build",
    "pure": "about what is pure Python; make test runs it in the release build, make test-long in both",
    "checked_once": "plays on the simulated disk; make test runs it in the checked build, make test-long in both",
    "alone": "measures time or memory; runs with nothing beside it, after everything else",
    "long": "only in make test-long",
}


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        if "checked_once" in marks and marks & {"slow", "release_only", "pure"}:
            raise pytest.UsageError(f"{item.nodeid}: checked_once beside slow, release_only or pure: make test would run it nowhere")


def pytest_report_header() -> str:
    import fvd

    where = Path(fvd.__file__).resolve().parent.parent
    if where != TREE:
        raise pytest.UsageError(f"FVD_TEST_BUILD={BUILD} tests {TREE}, but fvd was imported from {where}")
    return f"fvd: {BUILD} build in {where}"


@pytest.fixture(autouse=True)
def runtime_dir(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Control sockets of a test meet those of no other test and of no disk that really runs here."""
    path = tmp_path_factory.mktemp("run", numbered=True)
    path.chmod(0o700)
    monkeypatch.setenv("FVD_RUNTIME_DIR", str(path))
    return path


@pytest.fixture(autouse=True)
def pending_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The logs of a test's disks: in memory, and gone with the test."""
    above = Path(tempfile.mkdtemp(prefix="fvd-test-", dir="/dev/shm"))
    path = above / "pending"
    monkeypatch.setenv("FVD_PENDING_DIR", str(path))
    yield path
    shutil.rmtree(above, ignore_errors=True)
