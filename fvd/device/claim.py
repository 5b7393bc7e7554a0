# SPDX-License-Identifier: Apache-2.0
"""One owner: nobody else writes a volume while we have it, and we touch none that somebody else has. Knows nothing of the disk format.

What protects what:

- Every claim holds an OFD lock on the file or device node. A writer's transfers go through the claim's own open file (`descriptor`):
  the kernel keeps that open until the last operation of a killed process has ended, and the claim with it. So no write of a dead
  owner can land under a new one (rule R35 of docs/internals/durability.md); who comes meanwhile waits as long as that takes.
  A WRITER's is exclusive; a READER's is shared, so that several read-only opens coexist, but none beside a writer, whose metadata moves.
  The lock belongs to the inode: a second path to it (symbolic or hard link) meets the same lock. QEMU's own image locks lie in its range.
- A WRITER of a block device also holds it open with O_EXCL: the kernel then refuses mounts, swap, device-mapper and md, and other writers
  that came by another device node. A READER asks for O_EXCL only for a moment, to learn whether somebody holds the device.
- A loop device also claims the file behind it, and a file with a loop device attached is refused: they are the same bytes.
- BASE is for the image under a disk: shared like a READER, but a read-only mount of it does no harm, and QEMU may read it too. Its lock
  leaves out the bytes by which QEMU's programs tell each other what they do, and is one of these there (`qemu_locks.py`).
"""

from __future__ import annotations

import enum
import errno
import fcntl
import logging
import os
import re
import stat
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from fvd._lifetime import Descriptors, between_forks, checkpoint
from fvd.device.folders import open_path
from fvd.device.holders import Holder, has_identity, holders_of, kernel_is_at_work, list_folder, read_text
from fvd.device.node import Identity, Node, check_kind, identity_of, typed_error, typed_errors
from fvd.device.qemu_locks import is_written, lock_as_reader
from fvd.errors import InUse, PermissionDenied, Unsupported

_F_OFD_SETLK = 37
_FLOCK = struct.Struct("=hhxxxxqqixxxx")  # struct flock on 64-bit Linux: type, whence, start, length, pid
_READER_RETRIES = 50
_GHOST_SECONDS = 5.0  # how long a claim that nobody can be seen to hold is waited for while nothing is under way
_TELL_SECONDS = 3.0  # whoever waits longer is told what for
_FIRST_PAUSE_SECONDS = 0.01
_PAUSE_SECONDS_MAX = 0.2

log = logging.getLogger(__name__)


class Ownership(enum.Enum):
    """What the claimant will do."""

    WRITER = "writer"
    READER = "reader"
    BASE = "base"


class Claim:
    """Ownership of one file or device until `close` or the end of the process."""

    def __init__(self, path: str, ownership: Ownership, identity: Identity, fds: Descriptors, descriptor: int) -> None:
        self.path = path
        self.ownership = ownership
        self.identity = identity
        self.descriptor = descriptor  # the open file that holds the claim: for `open_node(sharing=...)`
        self._fds = fds

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def check_covers(self, node: Node) -> None:
        """Raises InUse when `node` is not what was claimed: the name was given to something else in between."""
        if node.identity != self.identity:
            raise InUse(f"{self.path} was replaced while it was being opened; try again")

    def close(self) -> None:
        """Gives the volume up; again is fine."""
        self._fds.close()


def claim(path: str | os.PathLike[str], ownership: Ownership = Ownership.WRITER, *, opened: int | None = None) -> Claim:
    """Claims a regular file or block device. Waits for no living process. `opened`: what is open already, whatever has the name now.

    For a dying one that holds it, and for what the kernel still does for a dead one, it waits as long as these take, and logs it after a
    few seconds; where neither can be seen, 5 s. An interruption leaves nothing behind.
    Raises InUse (naming the mount, holder or process where it can be known), NotFound, PermissionDenied, Unsupported.
    """
    name = os.fspath(path)
    began = time.monotonic()
    waited_seconds, pause_seconds, told = 0.0, _FIRST_PAUSE_SECONDS, False
    quiet_since = None  # the last look at which nobody was seen and nothing was under way
    while True:
        try:
            return _claim_now(name, ownership, opened)
        except _Leaving as leaving:
            now = time.monotonic()
            # Only time in which nothing is under way counts: what else the device does must not make us wait for a hidden owner for ever.
            waited_seconds += 0.0 if quiet_since is None else now - quiet_since
            quiet_since = None if leaving.is_certain else now
            if not leaving.is_certain and waited_seconds >= _GHOST_SECONDS:
                raise
            if now - began >= _TELL_SECONDS and not told:
                told = True
                log.warning("%s: waiting for %s", name, leaving.awaited)
        time.sleep(pause_seconds)
        checkpoint()
        pause_seconds = min(pause_seconds * 1.1, _PAUSE_SECONDS_MAX)


class _Leaving(InUse):
    """Held by nobody who lives, as far as can be seen: perhaps by a process that is being killed, or by the operations of a dead one."""

    def __init__(self, message: str, awaited: str, is_certain: bool) -> None:
        super().__init__(message)
        self.awaited = awaited  # for people
        self.is_certain = is_certain  # there is something that ends by itself, or never


def _claim_now(name: str, ownership: Ownership, opened: int | None = None) -> Claim:
    if opened is None:
        with typed_errors("opening", name):
            check_kind(name, Path(name).stat())  # before the open, which does things to a pipe or a tape
    fds = Descriptors()
    try:
        with between_forks:
            fds.append(_open(name, ownership) if opened is None else fcntl.fcntl(opened, fcntl.F_DUPFD_CLOEXEC, 0))
        status = os.fstat(fds[0])
        check_kind(name, status)
        identity = identity_of(status)
        descriptor = fds[0]
        _lock_owner(fds[0], name, ownership)
        if stat.S_ISBLK(status.st_mode):
            if ownership is Ownership.BASE:
                _refuse_writable_mount(name, status.st_rdev)
            else:
                with between_forks:
                    fds += _take_device(name, fds[0], ownership, status.st_rdev)
            descriptor = fds[-1]
            with between_forks:
                fds += _lock_loop_backing(name, ownership, status.st_rdev)
        else:
            _refuse_file_users(name, ownership, identity)
    except BaseException:
        fds.close()
        raise
    return Claim(name, ownership, identity, fds, descriptor)


# --- Locks -------------------------------------------------------------------------------------------------------------------------


def _open(name: str, ownership: Ownership, extra: int = 0, *, refusal: int = 0) -> int:
    """Opens for the claim. An OSError with the number `refusal` is left to the caller; others become typed."""
    writer = ownership is Ownership.WRITER
    try:
        # O_NONBLOCK: should the name be a pipe, do not wait for its other end.
        return open_path(name, (os.O_RDWR if writer else os.O_RDONLY) | os.O_NONBLOCK | extra)
    except OSError as error:
        if refusal and error.errno == refusal:
            raise
        if writer and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) and Path(name).is_block_device() and os.access(name, os.W_OK):
            raise PermissionDenied(f"{name} is a read-only device; open it read-only, or make it writable (blockdev --setrw)") from error
        raise typed_error(error, "opening", name) from error


def _lock_owner(fd: int, name: str, ownership: Ownership) -> None:
    kind = fcntl.F_WRLCK if ownership is Ownership.WRITER else fcntl.F_RDLCK
    try:
        if ownership is Ownership.BASE:
            lock_as_reader(fd)
            if is_written(fd):
                raise _locked(name, fd, writers=True)
        else:
            fcntl.fcntl(fd, _F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))  # length 0: the whole of it, to whatever it grows
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise _locked(name, fd) from error
        if ownership is Ownership.BASE and error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            return  # a golden image on a file system without locks: nobody could be refused there, nor is anything of ours at stake
        reason = os.strerror(error.errno or 0)
        raise Unsupported(f"{name}: its file system has no file locks ({reason}), so a second writer cannot be refused") from error


def _take_device(name: str, ours: int, ownership: Ownership, number: int) -> list[int]:
    """Opens a device with O_EXCL: for a writer to keep, for a reader only to learn that nobody holds it."""
    for last in (*[False] * _READER_RETRIES, True):
        try:
            fd = _open(name, ownership, os.O_EXCL, refusal=errno.EBUSY)
        except OSError as error:
            holders = _holders(number)
            # Another reader's momentary O_EXCL looks the same as an owner; it is gone in microseconds.
            if holders:
                raise InUse(_refusal(name, holders)) from error
            if last or ownership is Ownership.WRITER:
                raise _held(name, ours, number) from error
            time.sleep(0.002)
            continue
        if ownership is Ownership.WRITER:
            return [fd]
        os.close(fd)
        break
    return []


def _lock_loop_backing(name: str, ownership: Ownership, number: int) -> list[int]:
    """The lock on the file behind a loop device, if `number` is one and its file can be reached from here."""
    backing = loop_backing(number)
    if backing is None:
        return []
    try:
        fd = open_path(backing, (os.O_RDWR if ownership is Ownership.WRITER else os.O_RDONLY) | os.O_NONBLOCK)
    except (OSError, PermissionDenied):
        return []  # deleted, in another mount namespace, or not ours to open: the device's own claim must do
    try:
        _lock_owner(fd, f"{backing}, the file behind {name},", ownership)
    except Unsupported:
        os.close(fd)
        return []
    except BaseException:
        os.close(fd)
        raise
    return [fd]


def _refuse_file_users(name: str, ownership: Ownership, identity: Identity) -> None:
    """Raises InUse when the kernel uses the file as a loop device or as swap."""
    for device in _loops_over(identity):
        if ownership is not Ownership.BASE:
            raise InUse(f"{name} is in use: attached to {device}; detach it (losetup -d {device}), or name {device} as the volume")
        for number in _with_partitions(Path(device).stat().st_rdev):
            _refuse_writable_mount(f"{name}, attached to {device},", number)
    if any(has_identity(path, identity) for path in _swap_paths()):
        raise InUse(f"{name} is in use: as swap; take it out first (swapoff {name})")


def _refuse_writable_mount(name: str, number: int) -> None:
    for where, writable in _mounts(number):
        if writable:
            raise InUse(f"{name} is mounted writable on {where}: a base must not change; unmount it, or mount it read-only")


# --- Who it is ---------------------------------------------------------------------------------------------------------------------


def _refusal(name: str, users: list[str]) -> str:
    if not users:
        return f"{name} is in use: another process has it open, which only root can name; it must be closed first"
    return f"{name} is in use: {', '.join(users)}; it must be closed or unmounted first"


def _locked(name: str, fd: int, *, writers: bool = False) -> InUse:
    """Why the lock on the open file `fd` was refused. `writers`: it was not, but a program of QEMU's writes to a base."""
    seen = holders_of(identity_of(os.fstat(fd)), {fd})
    lockers = [holder for holder in seen.holders if holder.locks and (holder.writes or not writers)]
    living = [holder for holder in lockers if not holder.ending]
    if living and writers:
        who = ", ".join(_titles(living))
        return InUse(f"{name} is in use: another program writes to it, and a base must not change: {who}; end it first")
    if living:
        return InUse(_refusal(name, _titles(living)))
    return _leaving(name, fd, lockers, seen.holders, seen.complete)


def _held(name: str, fd: int, number: int) -> InUse:
    """Why O_EXCL was refused, when we hold the lock and no mount or mapping holds the device."""
    seen = holders_of(("block", number, 0), {fd})
    living = [holder for holder in seen.holders if not holder.ending]
    # O_EXCL cannot be seen. Whoever only reads is rather udev, which looks at each device that a writer has closed, or had it taken away by
    # a kill: it is blocked as long as the device is, and is gone in a moment otherwise.
    owners = [holder for holder in living if holder.ours or holder.writes or holder.locks]
    if owners:
        return InUse(_refusal(name, _titles(owners)))
    readers = [holder for holder in living if not holder.stuck]
    return _leaving(name, fd, [holder for holder in seen.holders if holder.ending], seen.holders, seen.complete and not readers)


def _leaving(name: str, fd: int, ending: list[Holder], holders: list[Holder], complete: bool) -> _Leaving:
    """`complete`: nobody lives who could be the holder, so that what is under way on the device may be what holds it."""
    message = _refusal(name, _titles(holders))
    if ending:
        who = ", ".join(holder.title for holder in ending)
        return _Leaving(message, f"{who}, which is ending, to let go of it", True)
    under_way = complete and kernel_is_at_work(fd)
    return _Leaving(message, "the operations that a process which is gone left under way", under_way)


def users_of(number: int) -> list[str]:
    """Who uses a block device, its partitions included: mounts, swap, devices built on it, living processes that have it open."""
    users = _holders(number)
    for device in _with_partitions(number):
        users += _titles([holder for holder in holders_of(("block", device, 0), set()).holders if not holder.ending])
    return users


def _titles(holders: list[Holder]) -> list[str]:
    return [f"open in {holder.title}" for holder in holders]


def _holders(number: int) -> list[str]:
    """What the kernel holds of a block device, its partitions included: mounts, swap, devices built on it."""
    holders = []
    for device in _with_partitions(number):
        holders += [f"mounted on {where}" for where, _ in _mounts(device)]
        if any(has_identity(path, ("block", device, 0)) for path in _swap_paths()):
            holders.append("swap")
        for holder in sorted(list_folder(Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/holders"))):
            title = read_text(holder / "dm" / "name").strip()
            holders.append(f"held by {holder.name}{f' ({title})' if title else ''}")
    return holders


def _with_partitions(number: int) -> list[int]:
    folder = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    numbers = [number]
    for part in list_folder(folder):
        if (part / "partition").exists():
            major, _, minor = read_text(part / "dev").strip().partition(":")
            if major.isdigit() and minor.isdigit():
                numbers.append(os.makedev(int(major), int(minor)))
    return numbers


def _mounts(number: int) -> Iterator[tuple[str, bool]]:
    """Mount points of a device, and whether the file system is writable."""
    wanted = f"{os.major(number)}:{os.minor(number)}"
    for line in read_text(Path("/proc/self/mountinfo")).splitlines():
        fields = line.split()
        source, options = fields[-2], fields[-1]
        # btrfs and others report a device number of their own: their source tells.
        if fields[2] == wanted or (source.startswith("/dev/") and has_identity(_unescape(source), ("block", number, 0))):
            yield _unescape(fields[4]), "rw" in options.split(",")


def _swap_paths() -> list[str]:
    return [_unescape(line.split()[0]) for line in read_text(Path("/proc/swaps")).splitlines()[1:] if line.split()]


def _loops_over(identity: Identity) -> list[str]:
    """Loop devices whose file is `identity`."""
    loops = []
    for folder in Path("/sys/block").glob("loop*"):
        backing = _loop_backing(folder)
        if backing is not None and has_identity(backing, identity):
            loops.append(f"/dev/{folder.name}")
    return loops


def loop_backing(number: int) -> str | None:
    """The path of the file behind a loop device or one of its partitions; None: it is no such device."""
    return _loop_backing(Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}"))


def _loop_backing(folder: Path) -> str | None:
    """The path behind a loop device or one of its partitions, from its folder in /sys."""
    text = read_text(folder / "loop" / "backing_file") or read_text(folder.resolve().parent / "loop" / "backing_file")
    return text.removesuffix("\n") or None


def _unescape(field: str) -> str:
    """mountinfo and swaps write blanks as octal."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), field)
