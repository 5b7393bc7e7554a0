# SPDX-License-Identifier: Apache-2.0
"""Memory that outlives this process but not this boot: files in a tmpfs, in a folder that nobody else may write to.

Links are never followed and owners are checked, for the names lie where other users can see them. Knows nothing of what is kept there.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from fvd._lifetime import keep
from fvd.device.folders import reach
from fvd.device.node import Node
from fvd.digest import sha256
from fvd.errors import FvdError, NotFound, PermissionDenied, Unsupported

_MEMORY_SYSTEMS = ("tmpfs", "ramfs")
_SUBFOLDER = "pending"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class SurvivingMemory:
    """One such file, mapped, until `close`; its contents stay until `remove`."""

    def __init__(self, path: Path, mapping: mmap.mmap) -> None:
        self.path = path
        self.buffer = memoryview(mapping)
        self._mapping = mapping
        keep(self, SurvivingMemory._descriptors)

    def _descriptors(self) -> list[int]:
        """That of the mapping, which it does not tell."""
        if self._mapping.closed:
            return []
        names = (str(self.path), f"{self.path} (deleted)")
        return [int(fd) for fd in os.listdir("/proc/self/fd") if _link("/proc/self/fd/" + fd) in names]  # noqa: PTH208

    def close(self) -> None:
        """Unmaps it, unless somebody still looks at it: then it goes with them. Again is fine."""
        with contextlib.suppress(BufferError):
            self.buffer.release()
            self._mapping.close()

    def remove(self) -> None:
        """The name goes, and with the last mapping the memory. Again is fine, and so is a folder that is not ours to change."""
        with contextlib.suppress(OSError, FvdError), _folder(self.path.parent, _owners_of(self.path.parent)) as folder:
            os.unlink(self.path.name, dir_fd=folder)


def _link(path: str) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(path)  # noqa: PTH115
    return ""


def make(name: str, size_bytes: int) -> SurvivingMemory:
    """New memory of this size, zeroed, in place of what had the name: allocated, so that a write never meets a full tmpfs (SIGBUS).

    Raises Unsupported: there is no such memory here, or no space in it.
    """
    path = _first_memory_folder() / name
    try:
        with _folder(path.parent) as folder:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder)
            fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
            try:
                os.posix_fallocate(fd, 0, size_bytes)
                return SurvivingMemory(path, mmap.mmap(fd, size_bytes))
            except BaseException:
                os.unlink(name, dir_fd=folder)
                raise
            finally:
                os.close(fd)
    except OSError as error:
        raise Unsupported(f"{path}: no {size_bytes} bytes of memory could be had there: {error.strerror or error}") from error


def find(path: str | os.PathLike[str]) -> SurvivingMemory:
    """What is kept under this name, if it lies in a folder where `make` puts it for one of this host's users, and is that user's.

    Raises NotFound; PermissionDenied: it is another user's, or not to be trusted.
    """
    wanted = Path(path)
    owners = _owners_of(wanted.parent)
    if not owners:
        raise NotFound(f"{wanted}: no memory of fvd's is kept in such a place")
    try:
        with _folder(wanted.parent, owners) as folder:
            fd = os.open(wanted.name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
            try:
                status = os.fstat(fd)
                if not stat.S_ISREG(status.st_mode) or status.st_uid not in owners or status.st_mode & 0o022:
                    raise PermissionDenied(f"{wanted}: is not a file that only its owner may change; nothing of it is believed")
                if status.st_size == 0:
                    raise NotFound(f"{wanted}: is empty")
                return SurvivingMemory(wanted, mmap.mmap(fd, status.st_size))
            finally:
                os.close(fd)
    except FileNotFoundError as error:
        raise NotFound(f"{wanted}: is not there") from error
    except FvdError:
        raise
    except OSError as error:
        raise PermissionDenied(f"{wanted}: cannot be read: {error.strerror or error}") from error


def kept(prefix: str) -> list[Path]:
    """The names that begin so, in the folder where `make` would put them now."""
    try:
        folder = _first_memory_folder()
        return sorted(folder / name for name in os.listdir(folder) if name.startswith(prefix))  # noqa: PTH208
    except (OSError, FvdError):
        return []


def boot_id() -> bytes:
    """16 bytes that are another after each start of the kernel. Zeros where the kernel does not tell."""
    with contextlib.suppress(OSError, ValueError):
        return bytes.fromhex(Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", ""))
    return bytes(16)


def host_id() -> bytes:
    """16 bytes that name this host and are of no use to anybody else: a hash of its machine-id, or of its name."""
    text = ""
    with contextlib.suppress(OSError):
        text = Path("/etc/machine-id").read_text().strip()
    return sha256(b"fvd" + (text or os.uname().nodename).encode())[:16]


def lasting_place(node: Node) -> str:
    """What an open node is, through renames, other device numbers and detaching, as far as the kernel tells: for the same boot."""
    kind, major_minor, inode = node.identity
    if kind == "file":
        return f"file {major_minor:x} {inode:x}"
    folder = Path(f"/sys/dev/block/{os.major(major_minor)}:{os.minor(major_minor)}")
    if uuid := _read(folder / "dm" / "uuid"):
        return f"dm {uuid}"
    if backing := _read(folder / "loop" / "backing_file"):
        with contextlib.suppress(OSError):
            status = Path(backing).stat()
            return f"loop {status.st_dev:x} {status.st_ino:x} {_read(folder / 'loop' / 'offset')}"
    return f"device {os.major(major_minor)} {os.minor(major_minor)} {_read(folder / 'diskseq')}"


# --- Folders ------------------------------------------------------------------------------------------------------------------------


def _candidates(uid: int) -> list[Path]:
    """Where a user's may be, best first. /dev/shm is last: systemd empties it of a user's files when the last unit of theirs stops."""
    folders = [Path("/run/fvd")] if uid == 0 else [Path(f"/run/user/{uid}/fvd")]
    if uid == os.getuid() and uid != 0 and (session := os.environ.get("XDG_RUNTIME_DIR")):
        folders.insert(0, Path(session) / "fvd")
    return [folder / _SUBFOLDER for folder in (*folders, Path(f"/dev/shm/fvd-{uid}"))]


def _named() -> Path | None:
    """$FVD_PENDING_DIR: another place, for tests and for those who know better; it must be in memory too."""
    text = os.environ.get("FVD_PENDING_DIR")
    return Path(text) if text else None


def _owners_of(folder: Path) -> set[int]:
    """Whose memory may be in this folder: the user whose name it carries, and root. None: it is no such folder."""
    if folder == _named():
        return {os.getuid(), 0}
    for part in folder.parts:
        uid_text = part.removeprefix("fvd-")
        if uid_text.isascii() and uid_text.isdigit() and folder in _candidates(int(uid_text)):
            return {int(uid_text), 0}
    return {os.getuid(), 0} if folder in _candidates(os.getuid()) or folder in _candidates(0) else set()


def _first_memory_folder() -> Path:
    """Raises Unsupported, saying why each cannot be used."""
    named = _named()
    problems = []
    for folder in [named] if named is not None else _candidates(os.getuid()):
        try:
            _make_folder(folder)
            with _folder(folder):
                return folder
        except (OSError, FvdError) as error:
            problems.append(str(error) if isinstance(error, FvdError) else f"{folder}: {error.strerror or error}")
    raise Unsupported("; ".join(problems))


def _make_folder(folder: Path) -> None:
    """This folder and the one above it, for this user alone; what lies above must be in memory already."""
    standing = folder
    while not standing.exists():
        standing = standing.parent
    if (system := _file_system_of(standing)) not in _MEMORY_SYSTEMS:
        raise Unsupported(f"{folder}: lies on {system}, not in memory")
    with reach(folder.parent) as place:
        with contextlib.suppress(FileExistsError):
            place.make_folder(0o700)
        above = place.open(_FOLDER, place.name)
    try:
        _check_owner(folder, above, {os.getuid()})  # before anything is made in it
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder.name, 0o700, dir_fd=above)
    finally:
        os.close(above)


@contextlib.contextmanager
def _folder(folder: Path, owners: set[int] | None = None) -> Iterator[int]:
    """A descriptor of a folder that is its owner's alone, reached by no link of its own or of the one above. Raises OSError, FvdError."""
    trusted = owners or {os.getuid()}
    above = os.open(folder.parent, _FOLDER)
    try:
        fd = os.open(folder.name, _FOLDER, dir_fd=above)
        try:
            _check_owner(folder, above, trusted)
            _check_owner(folder, fd, trusted, inner=True)
            if _file_system_of(f"/proc/self/fd/{fd}") not in _MEMORY_SYSTEMS:
                raise Unsupported(f"{folder}: does not lie in memory")
            yield fd
        finally:
            os.close(fd)
    finally:
        os.close(above)


def _check_owner(folder: Path, fd: int, trusted: set[int], *, inner: bool = False) -> None:
    status = os.fstat(fd)
    if not inner and status.st_mode & stat.S_ISVTX and status.st_uid == 0:
        return  # a folder for everybody, in which nobody may rename what is another's
    if status.st_uid not in trusted | {0} or status.st_mode & 0o022:
        raise PermissionDenied(f"{folder}: must be a folder of its owner's that nobody else may write to")


def _file_system_of(path: str | os.PathLike[str]) -> str:
    """The type of the file system that a path lies on, as the mount table names it."""
    number = Path(path).stat().st_dev
    wanted = f"{os.major(number)}:{os.minor(number)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if before.split()[2] == wanted:
            return after.split()[0]
    return "an unknown file system"


def _read(path: Path) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return path.read_text().strip()
    return ""
