# SPDX-License-Identifier: Apache-2.0
"""Where tests that need device-mapper, udev and lvm2 run: a User-Mode Linux guest (scripts/uml), or this machine if it is given to them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
REAL = HERE / "real"
ROOT = HERE.parent.parent
UML = ROOT / "scripts" / "uml"
# A machine with device-mapper may be lent to the tests. They touch only what they make, on loop devices of their own.
NATIVE = os.environ.get("FVD_REAL_LVM_NATIVE") == "1"
DISKS = 4
DISK_SIZE = "64G"  # sparse
TIMEOUT_SECONDS = 900  # many times what a file takes on two idle cores


def require_machine() -> None:
    """Skips, with the reason, where there is none."""
    if NATIVE:
        if os.geteuid() != 0:
            pytest.skip("FVD_REAL_LVM_NATIVE=1 needs root")
        if subprocess.run(["dmsetup", "version"], capture_output=True, check=False).returncode:
            pytest.skip("FVD_REAL_LVM_NATIVE=1, but this machine's kernel has no device-mapper")
    else:
        require_guest()


def require_guest() -> None:
    if shutil.which("linux.uml") is None:
        pytest.skip("no machine with device-mapper: apt-get install user-mode-linux, or lend this one with FVD_REAL_LVM_NATIVE=1")


@dataclass
class Machine:
    """Runs Python on the real machine, with the folders of these tests as import path."""

    disks: list[Path]  # of a guest; a lent machine makes loop devices

    def words(self, *arguments: str | Path, timeout_seconds: float = TIMEOUT_SECONDS) -> list[str]:
        command = [sys.executable, *map(str, arguments)]
        if NATIVE:
            return command
        options = [word for disk in self.disks for word in ("--disk", f"{disk}:{DISK_SIZE}")]
        return [sys.executable, str(UML), "--timeout", f"{timeout_seconds:g}", *options, "--", *command]

    @property
    def environment(self) -> dict[str, str]:
        names = ":".join(f"/dev/ubd{'abcdefghijklmnop'[index]}" for index in range(len(self.disks)))
        path = os.pathsep.join([str(HERE), str(REAL), os.environ.get("PYTHONPATH", "")])
        return {**os.environ, "FVD_REAL_LVM": "1", "FVD_REAL_DISKS": names, "PYTHONPATH": path}

    def run(self, *arguments: str | Path, timeout_seconds: float = TIMEOUT_SECONDS) -> str:
        """The output of a Python command that is expected to work; it is shown when the test fails."""
        words = self.words(*arguments, timeout_seconds=timeout_seconds)
        ended = subprocess.run(
            words,
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_seconds + 30,  # scripts/uml is the first to end
            check=False,
        )
        output = ended.stdout.decode(errors="replace")
        print(output)
        assert ended.returncode == 0, f"{' '.join(words)} ended with {ended.returncode}; what it said is below"
        return output


@contextmanager
def machine(folder: Path, disks: int = DISKS) -> Iterator[Machine]:
    """A machine with these disks, whose files are removed at the end: they are sparse, but not empty, and pytest keeps its folders."""
    files = [] if NATIVE else [folder / f"disk{index}.img" for index in range(disks)]
    try:
        yield Machine(files)
    finally:
        for file in files:
            file.unlink(missing_ok=True)
