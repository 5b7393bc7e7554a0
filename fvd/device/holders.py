# SPDX-License-Identifier: Apache-2.0
"""Who has a file or device open: living processes, dying ones, and the kernel alone, as /proc and /sys show it. Claims nothing.

A process that was killed is not gone before its last operation has: it stands in the kernel, its descriptors still open, with the signal
pending or on its way out. Its first thread may be a zombie then while another one, in `io_uring_cancel`, waits for the ring's workers: such
descriptors are found only below that thread. Operations that need no thread (direct transfers) outlive the process altogether.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fvd.device.node import Identity, identity_of

_SIGKILL_BIT = 1 << 8
# Flags in /proc/PID/stat (linux/sched.h). Leaving: PF_EXITING, PF_POSTCOREDUMP (set at the beginning of the exit, 5.16) and PF_DUMPCORE.
_LEAVING_FLAGS = 0x4 | 0x8 | 0x200
_WORKER_FLAGS = 0x10 | 0x4000  # PF_IO_WORKER, PF_USER_WORKER: threads of the kernel's, which live as long as the process
_HARD_LOCKS = ("OFDLCK", "POSIX")  # the locks that refuse ours; not flock's, which udev takes to probe a device


@dataclass(frozen=True)
class Holder:
    """A process that has the file open."""

    title: str
    ours: bool  # this process itself
    ending: bool  # it was killed, or is leaving by itself: what it had under way ends it
    locks: bool  # a lock of its stands in the way of others
    writes: bool  # it may write
    stuck: bool  # it waits in the kernel for a device, and no signal wakes it


@dataclass(frozen=True)
class Holders:
    """What could be seen."""

    holders: list[Holder]
    complete: bool  # every process here could be looked into: whoever is not among them is none


def holders_of(identity: Identity, ours: set[int]) -> Holders:
    """The processes that have `identity` open, but for our own descriptors `ours`."""
    by_title: dict[str, Holder] = {}
    complete = os.geteuid() == 0  # a hidden /proc (hidepid) looks complete to others
    for process in sorted(list_folder(Path("/proc"))):
        if not process.name.isdigit():
            continue
        entries, seen = _descriptors(process)
        complete = complete and seen
        mine = int(process.name) == os.getpid()
        for entry in entries:
            if (mine and int(entry.name) in ours) or not has_identity(str(entry), identity):
                continue
            holder = _holder(process, entry, mine)
            known = by_title.get(holder.title, holder)
            by_title[holder.title] = Holder(
                holder.title, mine, holder.ending, known.locks or holder.locks, known.writes or holder.writes, holder.stuck
            )
    return Holders(list(by_title.values()), complete)


def kernel_is_at_work(fd: int) -> bool:
    """Whether the kernel has operations under way on the device of an open file, or holds them back: device-mapper's, suspended.

    False where that cannot be told: a file system without a device of its own (NFS, FUSE, tmpfs, overlay).
    """
    for number in _devices(fd):
        folder = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
        if any(word != "0" for word in read_text(folder / "inflight").split()) or read_text(folder / "dm" / "suspended").strip() == "1":
            return True
    return False


# --- Processes ---------------------------------------------------------------------------------------------------------------------


def _descriptors(process: Path) -> tuple[list[Path], bool]:
    """Its open descriptors, and whether they could be seen. A zombie has none, but its threads may."""
    try:
        entries = list((process / "fd").iterdir())
    except PermissionError:
        return [], False
    except OSError:
        return [], True
    if not entries:
        entries = [entry for thread in list_folder(process / "task") for entry in list_folder(thread / "fd")]
    return entries, True


def _holder(process: Path, entry: Path, mine: bool) -> Holder:
    details = read_text(entry.parent.parent / "fdinfo" / entry.name).splitlines()
    flags = next((int(line.split()[1], 8) for line in details if line.startswith("flags:")), os.O_RDWR)
    states = [_state(thread)[0] for thread in list_folder(process / "task")]
    return Holder(
        title="this process" if mine else f"process {process.name} ({read_text(process / 'comm').strip()})",
        ours=mine,
        ending=not mine and is_ending(process),
        locks=any(line.startswith("lock:") and any(kind in line.split() for kind in _HARD_LOCKS) for line in details),
        writes=flags & os.O_ACCMODE != os.O_RDONLY,
        stuck="D" in states,
    )


def is_ending(process: Path) -> bool:
    """Whether the process of a folder in /proc will end as soon as the kernel lets it: killed, dumping its memory, leaving, or a zombie."""
    status = read_text(process / "status")
    if not status:
        return True  # it has gone meanwhile: what it held is looked for again
    if _killed(status, "ShdPnd:") or "\nCoreDumping:\t1" in status:
        return True
    living = False
    for thread in list_folder(process / "task"):
        # Whoever kills one thread in this way kills them all (or it is exec, after which our descriptors are closed). The thread that has
        # taken its signal is on its way; the others show it.
        if _killed(read_text(thread / "status"), "SigPnd:"):
            return True
        state, flags = _state(thread)
        living = living or not (state in "ZX" or flags & (_LEAVING_FLAGS | _WORKER_FLAGS))
    return not living


def _killed(status: str, name: str) -> bool:
    for line in status.splitlines():
        if line.startswith(name):
            return bool(int(line.split()[1], 16) & _SIGKILL_BIT)
    return False


def _state(thread: Path) -> tuple[str, int]:
    """State and flags of one thread; one that is gone is dead."""
    _, parenthesis, rest = read_text(thread / "stat").rpartition(")")  # the name before it may hold anything
    fields = rest.split()
    return (fields[0], int(fields[6])) if parenthesis and len(fields) > 6 else ("X", 0)


# --- Devices -----------------------------------------------------------------------------------------------------------------------


def _devices(fd: int) -> Iterator[int]:
    """The block device behind a descriptor, or that of its file system."""
    status = os.fstat(fd)
    if stat.S_ISBLK(status.st_mode):
        yield status.st_rdev
    elif os.major(status.st_dev):
        yield status.st_dev
    else:  # btrfs numbers its files as if they were on no device: the mount tells
        details = read_text(Path(f"/proc/self/fdinfo/{fd}")).split()
        mount = details[details.index("mnt_id:") + 1] if "mnt_id:" in details else ""
        for line in read_text(Path("/proc/self/mountinfo")).splitlines():
            fields = line.split()
            if fields[0] == mount and fields[-2].startswith("/dev/"):
                with contextlib.suppress(OSError):
                    yield Path(fields[-2]).stat().st_rdev


# --- Reading what the kernel shows -------------------------------------------------------------------------------------------------


def has_identity(path: str, identity: Identity) -> bool:
    """Whether a path leads to that file or device."""
    try:
        return identity_of(Path(path).stat()) == identity
    except (OSError, ValueError):
        return False


def list_folder(folder: Path) -> list[Path]:
    """What is in a folder; nothing where it cannot be read."""
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def read_text(path: Path) -> str:
    """A small file; empty where it cannot be read."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return path.read_text()
    return ""
