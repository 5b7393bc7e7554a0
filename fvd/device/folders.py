# SPDX-License-Identifier: Apache-2.0
"""Where a path leads, and what is done with names there: in a folder that is held open, so that nobody can swap it meanwhile.

Root works for others in folders of theirs, and whoever may write in a folder can put anything under any name in it, at any moment. So a
path is walked once, part by part, to a descriptor of the last folder; files are made, linked, renamed and removed relative to that, and no
link that lies there is followed. A link that a stranger has made leads root only to what is that stranger's own: he could put that in the
link's place just as well. Knows no disk format.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from dataclasses import dataclass, field
from types import TracebackType

from fvd._lifetime import keep
from fvd.device.failures import reported
from fvd.device.stack import stack_of
from fvd.errors import Conflict, PermissionDenied, Unsupported

_LINKS_MAX = 40  # as the kernel
_TRIES = 8
_LOOK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True)
class _Led:
    """A stranger's link, until it is known where it leads."""

    owner: int
    link: str


@dataclass
class Place:
    """A name in a folder that is open; there may be nothing of that name. `path`: as it was asked for, for people."""

    path: str
    folder: int
    name: str
    led: tuple[_Led, ...] = ()  # the strangers' links that lead to this very name
    by_kernel: bool = False  # a link of /proc, which only the kernel can follow
    _gone: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        keep(self, lambda place: (-1 if place._gone else place.folder,))

    def __enter__(self) -> Place:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Again is fine."""
        if not self._gone:
            self._gone = True
            os.close(self.folder)

    def status(self, name: str | None = None) -> os.stat_result | None:
        """Of what has this name here (None: the place's own), itself and not what it leads to; None: nothing has. Raises OSError."""
        try:
            return os.stat(self.name if name is None else name, dir_fd=self.folder, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def open(self, flags: int, name: str | None = None, mode: int = 0) -> int:
        """A descriptor of what has this name here. A link, and what a stranger's link may not lead to, is refused. Raises OSError."""
        if name is not None:
            return _open_at(name, flags | os.O_NOFOLLOW, mode, self.folder)
        fd = _open_at(self.name, flags if self.by_kernel else flags | os.O_NOFOLLOW, mode, self.folder)
        try:
            for led in self.led:
                _check_led(led, os.fstat(fd), self.path)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def create(self, name: str, mode: int) -> int:
        """A descriptor of a new, empty file of this name. Raises FileExistsError, whatever has the name, and OSError."""
        return _open_at(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode, self.folder)

    def open_file(self, flags: int, name: str) -> int:
        """As `open`, of a regular file and nothing else. Raises Unsupported, OSError."""
        fd = self.open(flags | os.O_NONBLOCK, name)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise Unsupported(f"{self.path} is no regular file; name a file")
        return fd

    def write(self, content: bytes, mode: int, *, by: str) -> None:
        """A file with this content has the place's name, durably and at once, in place of what had it. `by`: its name until then.

        Raises OSError, Conflict.
        """
        self.remove(by)  # of a dead process that used the name
        fd = self.create(by, mode)
        with os.fdopen(fd, "wb") as file:
            try:
                file.write(content)
                file.flush()
                sync_descriptor(fd, self.path)
                self.rename(fd, by)
            except BaseException:
                self.remove(by, only=fd)
                raise
        self.sync()

    def make_folder(self, mode: int) -> None:
        """A new folder of the place's name. Raises FileExistsError, whatever has the name, PermissionDenied, OSError."""
        self.check_folder()
        os.mkdir(self.name, mode, dir_fd=self.folder)

    def check_folder(self) -> None:
        """Raises PermissionDenied where a stranger's link leads into a folder that is not his: nothing is made or replaced there."""
        for led in self.led:
            _check_led(led, os.fstat(self.folder), self.path)

    def link(self, fd: int, name: str) -> None:
        """The open file gets the place's name too; `name` is what it has already. Raises FileExistsError, OSError."""
        # By the descriptor: what has the old name by now may be another's.
        source = f"/proc/self/fd/{fd}"
        if os.path.exists(source):  # noqa: PTH110 - a link of /proc
            os.link(source, self.name, dst_dir_fd=self.folder, follow_symlinks=True)
        else:
            os.link(name, self.name, src_dir_fd=self.folder, dst_dir_fd=self.folder, follow_symlinks=False)
            self._check_is(fd, self.name)

    def rename(self, fd: int, name: str) -> None:
        """The open file, which has this name, gets the place's in its stead, whatever has that now. Raises OSError, Conflict."""
        self._check_is(fd, name)
        os.rename(name, self.name, src_dir_fd=self.folder, dst_dir_fd=self.folder)
        self._check_is(fd, self.name)

    def remove(self, name: str | None = None, *, only: os.stat_result | int | None = None) -> bool:
        """Takes the name away, durably; absent is fine. `only`: if it is the name of this open or known file. False: it is another's,
        and stays. Raises OSError."""
        wanted = self.name if name is None else name
        status = self.status(wanted)
        if status is None:
            return True
        if only is not None and not os.path.samestat(status, os.fstat(only) if isinstance(only, int) else only):
            return False
        with contextlib.suppress(FileNotFoundError):
            os.unlink(wanted, dir_fd=self.folder)
        self.sync()
        return True

    def sync(self) -> None:
        """What was made, renamed and removed here is durable. Raises OSError."""
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.folder)
        try:
            sync_descriptor(fd, self.path)
        finally:
            os.close(fd)

    def _check_is(self, fd: int, name: str) -> None:
        status = self.status(name)
        if status is None or not os.path.samestat(status, os.fstat(fd)):
            raise Conflict(f"{self.path}: somebody else changes what is made there; keep others out of that folder, and try again")


def reach(path: str | os.PathLike[str]) -> Place:
    """Where the path leads: the folder, open, and the name in it of what is there or would be. Raises OSError, PermissionDenied."""
    return _walk(os.fspath(path))


def open_path(path: str | os.PathLike[str], flags: int) -> int:
    """As os.open of what is there, except that root is led by no stranger's link to what is not that stranger's."""
    if os.geteuid() != 0:
        return os.open(path, flags | os.O_CLOEXEC)
    for last in (*[False] * (_TRIES - 1), True):
        try:
            with reach(path) as place:
                return place.open(flags)
        except OSError as error:
            if error.errno != errno.ELOOP or last:  # it has become a link since it was reached
                raise
    raise AssertionError


def sync_descriptor(fd: int, path: str) -> None:
    """An fsync, of which everything hears that lies on the same device when it fails. Raises OSError."""
    with reported(lambda: stack_of(os.fstat(fd)).devices, path):
        os.fsync(fd)


# --- The walk ----------------------------------------------------------------------------------------------------------------------


def _walk(path: str) -> Place:
    is_root, links = os.geteuid() == 0, 0
    # What is still to be walked, the next at the end; below the parts of a stranger's link, whose it is.
    ahead: list[str | _Led] = [*reversed(_parts(path))]
    folder = os.open("/" if path.startswith("/") else ".", _LOOK | os.O_DIRECTORY)
    try:
        while ahead:
            part = ahead.pop()
            if isinstance(part, _Led):
                _check_led(part, os.fstat(folder), path)
                continue
            led = tuple(more for more in ahead if isinstance(more, _Led))
            is_last = len(led) == len(ahead)
            try:
                fd = _look(part, folder, is_last)
            except FileNotFoundError:
                if is_last:
                    return Place(path, folder, part, led)
                raise
            try:
                status = os.fstat(fd)
                if stat.S_ISLNK(status.st_mode):
                    links += 1
                    if links > _LINKS_MAX:
                        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                    if is_root and status.st_uid != 0:
                        ahead.append(_Led(status.st_uid, part))
                    if _is_of_proc(status):
                        if is_last:
                            return Place(path, folder, part, tuple(more for more in ahead if isinstance(more, _Led)), by_kernel=True)
                        beyond = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder)
                    else:
                        text = os.readlink("", dir_fd=fd)
                        ahead += reversed(_parts(text))
                        beyond = os.open("/", _LOOK | os.O_DIRECTORY) if text.startswith("/") else os.dup(folder)
                    os.close(folder)
                    folder = beyond
                elif is_last:
                    return Place(path, folder, part, led)
                else:
                    folder, fd = fd, folder
            finally:
                os.close(fd)
        return Place(path, folder, ".")
    except BaseException:
        os.close(folder)
        raise


def _look(part: str, folder: int, is_last: bool) -> int:
    """A descriptor of what has this name, be it a link: good for looking only."""
    if not is_last:
        with contextlib.suppress(NotADirectoryError):
            return os.open(part, _LOOK | os.O_DIRECTORY, dir_fd=folder)  # unlike the other, this mounts what is to be mounted when used
    return os.open(part, _LOOK, dir_fd=folder)


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".")]


def _is_of_proc(status: os.stat_result) -> bool:
    with contextlib.suppress(OSError):
        return status.st_dev == os.stat("/proc").st_dev  # noqa: PTH116
    return False


def _check_led(led: _Led, end: os.stat_result, path: str) -> None:
    if end.st_uid != led.owner:
        raise PermissionDenied(
            f"{path}: the link {led.link} in it was made by user {led.owner} and leads to what is not that user's, so root does not "
            "follow it; name what is meant itself"
        )


def _open_at(name: str, flags: int, mode: int, folder: int) -> int:
    """A pipe or a tape that was put there does not hold us up."""
    fd = os.open(name, flags | os.O_NONBLOCK | os.O_CLOEXEC, mode, dir_fd=folder)
    if not flags & os.O_NONBLOCK:
        try:
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_NONBLOCK)
        except BaseException:
            os.close(fd)
            raise
    return fd
