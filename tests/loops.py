# SPDX-License-Identifier: Apache-2.0
"""Real loop devices and mounts for tests. Where they are not permitted the test is skipped, and the reason is in pytest's summary."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def run(*command: str | Path) -> str:
    """Output of a command that is expected to work."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        raise AssertionError(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
    return done.stdout.strip()


def sparse(path: Path, size_bytes: int) -> Path:
    """A file of zeros."""
    with path.open("xb") as file:
        file.truncate(size_bytes)
    return path


@contextmanager
def loop_device(path: Path, *options: str) -> Iterator[str]:
    """A loop device over a file, with further losetup options."""
    try:
        device = run("losetup", "--find", "--show", *options, path)
    except (AssertionError, FileNotFoundError) as error:
        pytest.skip(f"no loop devices here: {error}")
    try:
        yield device
    finally:
        run("losetup", "--detach", device)
        # It goes when its last user has closed it, and somebody may just be looking at all devices.
        backing = Path("/sys/block", Path(device).name, "loop/backing_file")
        deadline = time.monotonic() + 20
        while backing.exists() and str(path.resolve()) in backing.read_text() and time.monotonic() < deadline:
            time.sleep(0.01)


@contextmanager
def mounted(device: str, folder: Path, *options: str) -> Iterator[Path]:
    """A mounted file system."""
    folder.mkdir(exist_ok=True)
    try:
        run("mount", *options, device, folder)
    except (AssertionError, FileNotFoundError) as error:
        pytest.skip(f"mounting is not permitted here: {error}")
    try:
        yield folder
    finally:
        run("umount", folder)
