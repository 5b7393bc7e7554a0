"""One owner: nobody else writes a volume while we have it, and we touch none that somebody else has. Knows nothing of the disk format.

What protects what:

- Every claim holds an OFD lock on the file or device node. A writer's transfers go through the claim's own open file (`descriptor`):
  the kernel keeps that open until the last operation of a killed process has ended, and the claim with it. So no write of a dead
  owner can land under a new one; who comes meanwhile waits a moment.
  A WRITER's is exclusive; a READER's is shared, so that several read-only opens coexist, but none beside a writer, whose metadata moves.
  The lock belongs to the inode: a second path to it (symbolic or hard link) meets the same lock. QEMU's own image locks lie in its range.
- A WRITER of a block device also holds it open with O_EXCL: the kernel then refuses mounts, swap, device-mapper and md, and other writers
  that came by another device node. A READER asks for O_EXCL only for a moment, to learn whether somebody holds the device.
- A loop device also claims the file behind it, and a file with a loop device attached is refused: they are the same bytes.
- BASE is for the image under a disk: shared like a READER, but a read-only mount of it does no harm.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import fcntl
import os
import re
import stat
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from fvd.device.node import Identity, Node, check_kind, identity_of, typed_error, typed_errors
from fvd.errors import InUse, PermissionDenied, Unsupported

_F_OFD_SETLK = 37
_FLOCK = struct.Struct("=hhxxxxqqixxxx")  # struct flock on 64-bit Linux: type, whence, start, length, pid
_READER_RETRIES = 50
_GHOST_SECONDS = 5.0  # how long a killed process's operations may keep its claim before we call it in use


class Ownership(enum.Enum):
    """What the claimant will do."""

    WRITER = "writer"
    READER = "reader"
    BASE = "base"


class Claim:
    """Ownership of one file or device until `close` or the end of the process."""

    def __init__(self, path: str, ownership: Ownership, identity: Identity, fds: list[int], descriptor: int) -> None:
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
        fds, self._fds = self._fds, []
        for fd in fds:
            os.close(fd)


def claim(path: str | os.PathLike[str], ownership: Ownership = Ownership.WRITER) -> Claim:
    """Claims a regular file or block device. Waits for no process, and at most 5 s for what a killed one left under way in the kernel.

    Raises InUse (naming the mount, holder or process where it can be known), NotFound, PermissionDenied, Unsupported.
    """
    name = os.fspath(path)
    deadline = time.monotonic() + _GHOST_SECONDS
    while True:
        try:
            return _claim_now(name, ownership)
        except _NobodyKnown:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.01)


class _NobodyKnown(InUse):
    """Locked, by no process that can be seen: perhaps by the operations of one that was killed."""


def _claim_now(name: str, ownership: Ownership) -> Claim:
    with typed_errors("opening", name):
        check_kind(name, Path(name).stat())  # before the open, which does things to a pipe or a tape
    fds: list[int] = []
    try:
        fds.append(_open(name, ownership))
        status = os.fstat(fds[0])
        check_kind(name, status)
        identity = identity_of(status)
        descriptor = fds[0]
        _lock_owner(fds[0], name, ownership)
        if stat.S_ISBLK(status.st_mode):
            if ownership is Ownership.BASE:
                _refuse_writable_mount(name, status.st_rdev)
            else:
                fds += _take_device(name, set(fds), ownership, status.st_rdev)
            descriptor = fds[-1]
            fds += _lock_loop_backing(name, ownership, status.st_rdev)
        else:
            _refuse_file_users(name, ownership, identity)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return Claim(name, ownership, identity, fds, descriptor)


# --- Locks -------------------------------------------------------------------------------------------------------------------------


def _open(name: str, ownership: Ownership, extra: int = 0, *, refusal: int = 0) -> int:
    """Opens for the claim. An OSError with the number `refusal` is left to the caller; others become typed."""
    writer = ownership is Ownership.WRITER
    try:
        # O_NONBLOCK: should the name be a pipe, do not wait for its other end.
        return os.open(name, (os.O_RDWR if writer else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK | extra)
    except OSError as error:
        if refusal and error.errno == refusal:
            raise
        if writer and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) and Path(name).is_block_device() and os.access(name, os.W_OK):
            raise PermissionDenied(f"{name} is a read-only device; open it read-only, or make it writable (blockdev --setrw)") from error
        raise typed_error(error, "opening", name) from error


def _lock_owner(fd: int, name: str, ownership: Ownership) -> None:
    kind = fcntl.F_WRLCK if ownership is Ownership.WRITER else fcntl.F_RDLCK
    try:
        fcntl.fcntl(fd, _F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))  # length 0: the whole of it, to whatever it grows
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise _in_use(name, _users(identity_of(os.fstat(fd)), {fd})) from error
        if ownership is Ownership.BASE and error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            return  # a golden image on a file system without locks: nobody could be refused there, nor is anything of ours at stake
        reason = os.strerror(error.errno or 0)
        raise Unsupported(f"{name}: its file system has no file locks ({reason}), so a second writer cannot be refused") from error


def _take_device(name: str, ours: set[int], ownership: Ownership, number: int) -> list[int]:
    """Opens a device with O_EXCL: for a writer to keep, for a reader only to learn that nobody holds it."""
    for last in (*[False] * _READER_RETRIES, True):
        try:
            fd = _open(name, ownership, os.O_EXCL, refusal=errno.EBUSY)
        except OSError as error:
            holders = _holders(number)
            # Another reader's momentary O_EXCL looks the same as an owner; it is gone in microseconds.
            if last or holders or ownership is Ownership.WRITER:
                raise _in_use(name, holders or _users(("block", number, 0), ours)) from error
            time.sleep(0.002)
            continue
        if ownership is Ownership.WRITER:
            return [fd]
        os.close(fd)
        break
    return []


def _lock_loop_backing(name: str, ownership: Ownership, number: int) -> list[int]:
    """The lock on the file behind a loop device, if `number` is one and its file can be reached from here."""
    backing = _loop_backing(Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}"))
    if backing is None:
        return []
    try:
        fd = os.open(backing, (os.O_RDWR if ownership is Ownership.WRITER else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
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
    if any(_has_identity(path, identity) for path in _swap_paths()):
        raise InUse(f"{name} is in use: as swap; take it out first (swapoff {name})")


def _refuse_writable_mount(name: str, number: int) -> None:
    for where, writable in _mounts(number):
        if writable:
            raise InUse(f"{name} is mounted writable on {where}: a base must not change; unmount it, or mount it read-only")


# --- Who it is ---------------------------------------------------------------------------------------------------------------------


def _in_use(name: str, users: list[str]) -> InUse:
    if not users:
        return _NobodyKnown(f"{name} is in use: another process has it open, which only root can name; it must be closed first")
    return InUse(f"{name} is in use: {', '.join(users)}; it must be closed or unmounted first")


def _holders(number: int) -> list[str]:
    """What the kernel holds of a block device, its partitions included: mounts, swap, devices built on it."""
    found = []
    for device in _with_partitions(number):
        found += [f"mounted on {where}" for where, _ in _mounts(device)]
        if any(_has_identity(path, ("block", device, 0)) for path in _swap_paths()):
            found.append("swap")
        for holder in sorted(_listdir(Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/holders"))):
            title = _read(holder / "dm" / "name").strip()
            found.append(f"held by {holder.name}{f' ({title})' if title else ''}")
    return found


def _with_partitions(number: int) -> list[int]:
    folder = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    found = [number]
    for part in _listdir(folder):
        if (part / "partition").exists():
            major, _, minor = _read(part / "dev").strip().partition(":")
            if major.isdigit() and minor.isdigit():
                found.append(os.makedev(int(major), int(minor)))
    return found


def _mounts(number: int) -> Iterator[tuple[str, bool]]:
    """Mount points of a device, and whether the file system is writable."""
    wanted = f"{os.major(number)}:{os.minor(number)}"
    for line in _read(Path("/proc/self/mountinfo")).splitlines():
        fields = line.split()
        source, options = fields[-2], fields[-1]
        # btrfs and others report a device number of their own: their source tells.
        if fields[2] == wanted or (source.startswith("/dev/") and _has_identity(_unescape(source), ("block", number, 0))):
            yield _unescape(fields[4]), "rw" in options.split(",")


def _swap_paths() -> list[str]:
    return [_unescape(line.split()[0]) for line in _read(Path("/proc/swaps")).splitlines()[1:] if line.split()]


def _loops_over(identity: Identity) -> list[str]:
    """Loop devices whose file is `identity`."""
    found = []
    for folder in Path("/sys/block").glob("loop*"):
        backing = _loop_backing(folder)
        if backing is not None and _has_identity(backing, identity):
            found.append(f"/dev/{folder.name}")
    return found


def _loop_backing(folder: Path) -> str | None:
    """The path behind a loop device or one of its partitions, from its folder in /sys."""
    text = _read(folder / "loop" / "backing_file") or _read(folder.resolve().parent / "loop" / "backing_file")
    return text.removesuffix("\n") or None


def _users(identity: Identity, ours: set[int]) -> list[str]:
    """Processes that hold a lock on `identity`, or failing that have it open, as far as /proc lets us see. Only for messages."""
    lockers: list[str] = []
    openers: list[str] = []
    for process in sorted(_listdir(Path("/proc"))):
        if not process.name.isdigit():
            continue
        mine = int(process.name) == os.getpid()
        for entry in _listdir(process / "fd"):
            if (mine and int(entry.name) in ours) or not _has_identity(str(entry), identity):
                continue
            title = "this process" if mine else f"process {process.name} ({_read(process / 'comm').strip()})"
            (lockers if "\nlock:" in _read(process / "fdinfo" / entry.name) else openers).append(f"open in {title}")
    return list(dict.fromkeys(lockers or openers))


def _has_identity(path: str, identity: Identity) -> bool:
    try:
        return identity_of(Path(path).stat()) == identity
    except (OSError, ValueError):
        return False


def _listdir(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _read(path: Path) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return path.read_text()
    return ""


def _unescape(field: str) -> str:
    """mountinfo and swaps write blanks as octal."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), field)
