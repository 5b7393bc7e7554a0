# SPDX-License-Identifier: Apache-2.0
"""Where control sockets live: the folder, and the name of a volume's socket, the same for everyone who names that volume.

A volume is known by what it is (device and inode of a file, numbers of a block device), not by how it is written: links, relative
paths and renames all lead to the same socket. Knows nothing of what is said there.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fvd.device.folders import reach
from fvd.errors import NotFound, PermissionDenied

SUFFIX = ".sock"
LOCK_SUFFIX = ".lock"  # held by the server, beside its socket; says what it serves
STRANGERS_MAX = 256
_NAME = re.compile(rf"(dev-\d+-\d+|file-[0-9a-f]+-[0-9a-f]+){re.escape(SUFFIX)}")
_NAME_BYTES_MAX = 4200


def runtime_dir() -> Path:
    """The folder for the sockets that this user makes. $FVD_RUNTIME_DIR; root: /run/fvd; else $XDG_RUNTIME_DIR/fvd.

    Root's does not depend on $XDG_RUNTIME_DIR, so that a disk served by systemd is found from root's shell.
    """
    if named := os.environ.get("FVD_RUNTIME_DIR"):
        return Path(named)
    uid = os.getuid()
    if uid == 0:
        return Path("/run/fvd")
    if session := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(session) / "fvd"
    session_dir = Path(f"/run/user/{uid}")
    return session_dir / "fvd" if session_dir.is_dir() else Path(f"/tmp/fvd-{uid}")


def make_runtime_dir() -> Path:
    """The folder, made if need be, mode 0700. Raises PermissionDenied where it belongs to someone else or others may write there."""
    path = runtime_dir()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with reach(path) as place, suppress(FileExistsError):
            place.make_folder(0o700)
        status = path.lstat()
    except OSError as error:
        raise PermissionDenied(f"{path}: cannot make the folder for control sockets ({error.strerror}); set FVD_RUNTIME_DIR") from None
    _check_own(path, status)
    return path


def open_runtime_dir(path: Path) -> int:
    """A descriptor of that folder, as `make_runtime_dir` wants it: what it is now, whatever the path leads to later."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise PermissionDenied(f"{path}: cannot open the folder for control sockets ({error.strerror}); set FVD_RUNTIME_DIR") from None
    try:
        _check_own(path, os.fstat(fd))
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_own(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise PermissionDenied(f"{path}: must be a folder of yours that nobody else may write to; repair it or set FVD_RUNTIME_DIR")


def search_dirs() -> list[Path]:
    """The folders where sockets of served disks are looked for, this user's first. Root sees every user's."""
    own = runtime_dir()
    if os.environ.get("FVD_RUNTIME_DIR") or os.getuid() != 0:
        return [own]
    others = [*Path("/run/user").glob("*/fvd"), *Path("/tmp").glob("fvd-*")]
    return [own, *(path for path in others if _belongs_to_its_name(path))]


def _belongs_to_its_name(path: Path) -> bool:
    """/run/user/1000/fvd and /tmp/fvd-1000 count only if they are user 1000's: anyone can make a folder in /tmp."""
    uid_text = path.parent.name if path.name == "fvd" else path.name.removeprefix("fvd-")
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and uid_text == str(status.st_uid)


def socket_name(path: str | os.PathLike[str]) -> str:
    """The name of the socket of the volume whose file or device node is ``path``. Raises NotFound."""
    try:
        status = Path(path).stat()
    except OSError as error:
        raise NotFound(f"{os.fspath(path)}: {error.strerror}") from None
    if stat.S_ISBLK(status.st_mode):
        return f"dev-{os.major(status.st_rdev)}-{os.minor(status.st_rdev)}{SUFFIX}"
    return f"file-{status.st_dev:x}-{status.st_ino:x}{SUFFIX}"


def find_sockets(path: str | os.PathLike[str]) -> list[Path]:
    """Where a volume may be served, or was when its server died. A stranger's folder is looked into only for a volume that is his: what he
    puts there must not even be able to keep anyone waiting."""
    try:
        name, owner = socket_name(path), Path(path).stat().st_uid
    except (NotFound, OSError):
        return []
    own = runtime_dir()
    return [folder / name for folder in search_dirs() if (folder == own or _owner(folder) == owner) and (folder / name).is_socket()]


def all_sockets() -> list[Path]:
    """Control sockets that this user can see, dead ones included; of a stranger's folder no more than some hundred."""
    own = runtime_dir()
    return [path for folder in search_dirs() for path in _sockets_in(folder)[: None if folder == own else STRANGERS_MAX]]


def _sockets_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(f"*{SUFFIX}") if _NAME.fullmatch(path.name) and path.is_socket())


def _owner(folder: Path) -> int | None:
    try:
        return folder.lstat().st_uid
    except OSError:
        return None


def noted_volume(path: Path) -> str | None:
    """The volume's name as the server noted it beside its socket, for when it does not answer; None: it did not, or it is no such name."""
    try:
        fd = os.open(path.with_suffix(LOCK_SUFFIX), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return None
        text = os.read(fd, _NAME_BYTES_MAX).decode()
        return text if text.isprintable() and text else None
    except (OSError, UnicodeDecodeError):
        return None
    finally:
        os.close(fd)


# sun_path holds 108 bytes, the last a zero.
_ADDRESS_BYTES_MAX = 107


@contextmanager
def short_address(path: Path) -> Iterator[str]:
    """An address for bind or connect that fits into a socket address: a longer path goes through its folder's descriptor."""
    if len(os.fsencode(path)) <= _ADDRESS_BYTES_MAX:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
