# SPDX-License-Identifier: Apache-2.0
"""What lies below a file or block device, as sysfs tells: whose failed flush is also its own, and whether it may run out of space.

Knows no disk format. What sysfs does not tell (the devices of a btrfs, a network's storage) is not known here.
"""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

# Device-mapper volumes that take their blocks from a pool when they are first written.
_POOL_SUFFIXES = ("-tpool", "-vpool")


@dataclass(frozen=True)
class Stack:
    """What a node lies on."""

    devices: frozenset[int]  # device numbers, its own and its file system's too; file systems without a device have a number as well
    may_fill: bool  # a write to it may find no space: it takes its blocks from something that it shares
    short_bytes: int = 0  # of what a file in it has no blocks for yet: what its file system could not give it now


def stack_of(status: os.stat_result, sysfs: str = "/sys", free_bytes: int | None = None) -> Stack:
    """Of a regular file or block device, from its stat result. `free_bytes`: what a file's file system has left, if that is known. Never
    raises: what cannot be read is left out."""
    is_block = stat.S_ISBLK(status.st_mode)
    # A regular file's blocks are its file system's until it writes them: sparse, or shared, or on a file system that never overwrites.
    may_fill = not is_block
    short_bytes = 0 if is_block or free_bytes is None else _short(status, free_bytes)
    devices: set[int] = set()
    waiting = [status.st_rdev if is_block else status.st_dev]
    while waiting:
        number = waiting.pop()
        if number in devices:
            continue
        devices.add(number)
        folder = Path(f"{sysfs}/dev/block/{os.major(number)}:{os.minor(number)}")
        if _text(folder / "dm" / "uuid").endswith(_POOL_SUFFIXES):
            may_fill = True
        if (folder / "partition").exists():
            waiting += _numbers(folder.resolve().parent / "dev")
        for slave in _listed(folder / "slaves"):
            waiting += _numbers(folder / "slaves" / slave / "dev")
        backing = _text(folder / "loop" / "backing_file")
        if backing:
            may_fill = True
            with contextlib.suppress(OSError):  # deleted, or in another mount namespace
                below = Path(backing).stat()
                waiting.append(below.st_rdev if stat.S_ISBLK(below.st_mode) else below.st_dev)
                if stat.S_ISREG(below.st_mode):
                    short_bytes = max(short_bytes, _short(below, free_bytes_of(os.statvfs(backing))))
    return Stack(frozenset(devices), may_fill, short_bytes)


def free_bytes_of(file_system: os.statvfs_result) -> int:
    """What a file system has left for us."""
    return file_system.f_bavail * file_system.f_frsize


def _short(status: os.stat_result, free_bytes: int) -> int:
    return max(0, status.st_size - status.st_blocks * 512 - free_bytes)


def _numbers(path: Path) -> list[int]:
    major, _, minor = _text(path).partition(":")
    return [os.makedev(int(major), int(minor))] if major.isdigit() and minor.isdigit() else []


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="surrogateescape").removesuffix("\n")
    except OSError:
        return ""


def _listed(path: Path) -> list[str]:
    try:
        return sorted(os.listdir(path))  # noqa: PTH208 - names are all that is wanted
    except OSError:
        return []
