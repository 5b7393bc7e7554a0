# SPDX-License-Identifier: Apache-2.0
"""What an idle server holds: its memory, of a disk of 100 GiB, and the modules that it must do without."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from fvd_commands import Done, Server

pytestmark = pytest.mark.release_only

# What is its own; how much of the interpreter and the C library it shares depends on who else runs here.
OWN_KIB_MAX = 16 << 10
# Each costs from 0.2 MiB (shutil) to 14 (numpy).
HEAVY = {
    "numpy",
    "pyudev",
    "asyncio",
    "ssl",
    "_hashlib",
    "random",
    "tempfile",
    "http.client",
    "email",
    "xml",
    "multiprocessing",
    "difflib",
    "pickle",
}
HEAVY |= {"fvd.api.attach", "fvd.api.listing", "fvd.api.host_device", "fvd.lvm.commands", "fvd.inspect.map", "fvd.sim", "fvd.cli.torture"}
# Says at its end what it has imported.
REPORT = """
import atexit, sys
atexit.register(lambda: print(*sys.modules, file=sys.stderr))
from fvd.cli.main import main
sys.exit(main())
"""


def own_kib(pid: int) -> int:
    """Of a process and its children."""
    own = re.search(r"^Pss_Anon: +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    assert own is not None
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(own[1]) + sum(own_kib(int(child)) for child in children)


@pytest.fixture
def volume(fvd_lv: Callable[..., Done]) -> str:
    fvd_lv("provision", "file:vm1.img", "--size", "100G")
    return "file:vm1.img"


def test_its_memory(
    volume: str,
    fvd_lv: Callable[..., Done],
    serving: Callable[..., AbstractContextManager[Server]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    # As an installation is: compiled before. The first server compiles.
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path / "compiled"))
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    with serving(volume):
        fvd_lv("info", volume)
    with serving(volume) as server:
        before = own_kib(server.process.pid)
        fvd_lv("info", volume)
        after = own_kib(server.process.pid)
    assert before <= OWN_KIB_MAX, f"{before} KiB"
    assert after <= before + 1024, f"{after - before} KiB more when it has told how full the disk is"


def test_what_it_does_without(volume: str, workdir: Path) -> None:
    server = subprocess.Popen(
        [sys.executable, "-c", REPORT, "serve", volume, "--socket", "vm.sock"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert server.stdout is not None and server.stdout.readline()
    server.terminate()
    _, modules = server.communicate(timeout=60)
    assert "fvd.export.server" in modules.split()
    assert sorted(HEAVY & set(modules.split())) == []
