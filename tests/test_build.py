# SPDX-License-Identifier: Apache-2.0
"""setup.py: what it builds when; on a machine that lacks something it says what to install, and no compiler complains."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.pure


def build(folder: Path, compiler: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-W", "ignore", "setup.py", "-q", "build_ext", f"--build-lib={folder}", f"--build-temp={folder}"]
    environment = {**os.environ, "CC": str(compiler), "FVD_BUILD": "release", "FVD_ONLY": "fvd.sim._base"}
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_a_missing_header_is_a_package_to_install(tmp_path: Path) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-E*) ;; *) echo "the compiler was asked" >&2; exit 1 ;; esac\n! grep -q libnbd\n')
    compiler.chmod(0o755)
    done = build(tmp_path, compiler)
    assert done.returncode != 0 and done.stderr.endswith("apt-get install libnbd-dev\n"), done.stderr
    assert "the compiler was asked" not in done.stderr and "Traceback" not in done.stderr


def test_without_a_compiler_all_is_named(tmp_path: Path) -> None:
    done = build(tmp_path, tmp_path / "none")
    assert done.returncode != 0
    assert done.stderr.endswith("apt-get install gcc libc6-dev python3-dev liburing-dev libnbd-dev\n"), done.stderr


# What setup.py would build, without building it.
NAMES = """
import runpy, setuptools, Cython.Build
Cython.Build.cythonize = lambda extensions, **options: extensions
setuptools.setup = lambda **options: print(*(extension.name for extension in options["ext_modules"]))
runpy.run_path("setup.py")
"""


@pytest.mark.parametrize("value", [None, "0", "1"])
def test_devtools_are_built_where_they_are_asked_for(value: str | None) -> None:
    environment = {name: text for name, text in os.environ.items() if not name.startswith("FVD_")}
    if value is not None:
        environment["FVD_DEVTOOLS"] = value
    done = subprocess.run([sys.executable, "-c", NAMES], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    names = done.stdout.split()
    assert "fvd.export._server" in names
    assert ("devtools._queue_driver" in names) is (value == "1")
    assert {name.split(".")[0] for name in names} == ({"fvd", "devtools"} if value == "1" else {"fvd"})
