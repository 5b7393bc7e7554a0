# SPDX-License-Identifier: Apache-2.0
"""Sockets that listen: a Unix socket made in a folder that others may write in, TCP, and sockets that somebody else has made. Knows no NBD.

A Unix socket gets its name only when it listens and has its owner and mode: whoever waits for the name is not refused. It is made in a
folder that only we may enter, reached through descriptors: no step goes through a name that somebody else can swap. A name is never taken
from a living server.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import grp
import os
import socket
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fvd._lifetime import keep
from fvd.errors import Conflict, InUse, InvalidArgument, NotFound, PermissionDenied

Socket = socket.socket

_BACKLOG = 1024  # who floods it must not be all that is in it
_SOCKET_PATH_BYTES = 107
_TRIES = 5
_LOCK_SECONDS = 2.0
_RENAME_NOREPLACE = 1  # linux/fs.h
_OLD = ".old"  # in the private folder: what is being taken away


@dataclass(frozen=True)
class Unix:
    """Listen on a Unix socket; `group` is a name or a number."""

    path: str
    mode: int = 0o600
    group: str | int | None = None

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True)
class Tcp:
    """Listen on TCP; port 0 takes a free one."""

    host: str = "127.0.0.1"
    port: int = 10809

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Given:
    """Sockets that listen already: a service manager's, whose names stay its own."""

    sockets: tuple[socket.socket, ...]


@dataclass(frozen=True)
class Nowhere:
    """No NBD: guests come in by vhost-user only."""


Listen = Unix | Tcp | Given | Nowhere


class BoundName:
    """The name of our Unix socket, until `remove`. Remembers its folder, whatever that is called by then."""

    def __init__(self, folder: int, name: str, identity: tuple[int, int]) -> None:
        self._folder = folder
        self._name = name
        self._identity = identity
        keep(self, lambda bound: (bound._folder,))

    def remove(self) -> None:
        """Takes the name away if it is ours still; again is fine."""
        folder, self._folder = self._folder, -1
        if folder < 0:
            return
        try:
            with contextlib.suppress(OSError):
                if _identity(folder, self._name) == self._identity:  # not another server's by now
                    os.unlink(self._name, dir_fd=folder)
        finally:
            os.close(folder)


def open_listener(listen: Unix | Tcp) -> tuple[socket.socket, BoundName | None]:
    """A socket that listens, and the name of a Unix one. Raises InUse, NotFound, PermissionDenied, Conflict, InvalidArgument."""
    try:
        return _listen_unix(listen) if isinstance(listen, Unix) else (_listen_tcp(listen), None)
    except PermissionError as error:
        raise PermissionDenied(f"listening on {listen}: {error.strerror}") from error
    except FileNotFoundError as error:
        raise NotFound(f"listening on {listen}: {error.strerror}") from error
    except socket.gaierror as error:
        raise InvalidArgument(f"listening on {listen}: {error.strerror}") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InUse(f"listening on {listen}: the address is in use") from error
        raise InvalidArgument(f"listening on {listen}: {os.strerror(error.errno or 0)}") from error


def unix_path(one: socket.socket) -> str | None:
    """Where it listens; None: it is no Unix socket with a name in a file system."""
    address = one.getsockname()
    return address if one.family == socket.AF_UNIX and isinstance(address, str) and address else None


def guest_sockets(path: str | os.PathLike[str], names: Sequence[str]) -> dict[str, str]:
    """By export name: where its guests come in. Raises InvalidArgument: several exports, and no folder."""
    place = Path(path).absolute()
    if place.is_dir():
        return {name: str(place / f"{name.replace('/', '-')}.sock") for name in names}
    if len(names) > 1:
        raise InvalidArgument(f"{path} is no folder; with several volumes, each has its socket in one")
    return {names[0]: str(place)}


def check_given(given: Given) -> None:
    """Raises InvalidArgument for a socket that takes no connections."""
    if not given.sockets:
        raise InvalidArgument("no socket was given to listen on")
    for one in given.sockets:
        try:
            listens = one.type == socket.SOCK_STREAM and one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError:
            listens = False
        if not listens or one.family not in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6):
            raise InvalidArgument(
                f"descriptor {one.fileno()} is no stream socket that listens; a .socket unit needs ListenStream= and Accept=no"
            )
        one.setblocking(False)


def _listen_tcp(listen: Tcp) -> socket.socket:
    addresses = socket.getaddrinfo(listen.host, listen.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _name, address = addresses[0]
    listener = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


# --- Unix sockets --------------------------------------------------------------------------------------------------------------


def _listen_unix(listen: Unix) -> tuple[socket.socket, BoundName]:
    path = Path(listen.path)
    if len(os.fsencode(path)) > _SOCKET_PATH_BYTES:
        raise InvalidArgument(f"the socket path {path} is longer than {_SOCKET_PATH_BYTES} bytes")
    if not path.name:
        raise InvalidArgument(f"{path} names no socket")
    group = -1 if listen.group is None else listen.group if isinstance(listen.group, int) else _group_id(listen.group)
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with _one_at_a_time(folder), _private_folder(folder) as private:
            _remove_dead(folder, path, private)
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            try:
                # What ss(8) shows of it from now on ends in its name, if that fits.
                address = f"/proc/self/fd/{private}/"
                new = path.name if len(os.fsencode(address + path.name)) <= _SOCKET_PATH_BYTES else "new"
                listener.bind(address + new)
                if group >= 0:
                    os.chown(new, -1, group, dir_fd=private)
                os.chmod(new, listen.mode, dir_fd=private)
                listener.listen(_BACKLOG)
                identity = _identity(private, new)
                try:
                    _move(private, new, folder, path.name)
                except FileExistsError:
                    raise InUse(f"another process has just begun to listen on {path}") from None
            except BaseException:
                listener.close()
                raise
        return listener, BoundName(folder, path.name, identity)
    except BaseException:
        os.close(folder)
        raise


@contextlib.contextmanager
def _one_at_a_time(folder: int) -> Iterator[None]:
    """Servers begin in one folder one after the other: a name that one takes away to look at it would seem free to the next.

    Where the folder may not be read, or its file system has no locks, they do not; who else holds the lock holds nobody up for long.
    """
    lock = -1
    with contextlib.suppress(OSError):
        lock = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder)
    try:
        deadline = time.monotonic() + _LOCK_SECONDS
        while lock >= 0 and time.monotonic() < deadline:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.002)
            except OSError:
                break
        yield
    finally:
        if lock >= 0:
            os.close(lock)


def _move(source: int, name: str, target: int, new_name: str) -> None:
    """Raises FileExistsError rather than replace anything. It is renamed, not linked: the kernel knows a socket by its inode, and on file
    systems that make one for each name (hostfs, 9p) nobody would be found under a second name."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(source, os.fsencode(name), target, os.fsencode(new_name), _RENAME_NOREPLACE) == 0:
        return
    number = ctypes.get_errno()
    if number not in (errno.EINVAL, errno.ENOSYS):
        raise OSError(number, os.strerror(number))
    os.link(name, new_name, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)
    os.unlink(name, dir_fd=source)


@contextlib.contextmanager
def _private_folder(folder: int) -> Iterator[int]:
    """A descriptor of a new folder in `folder` that nobody else may enter: what is in it has our names only. Gone at the end."""
    name = f".fvd-{os.urandom(8).hex()}"
    os.mkdir(name, 0o700, dir_fd=folder)
    private = -1
    try:
        private = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        status = os.fstat(private)
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077 or any(os.scandir(private)):
            raise PermissionError(errno.EPERM, "somebody else changes what is made there")
        yield private
    finally:
        if private >= 0:
            for left in list(os.scandir(private)):
                with contextlib.suppress(OSError):
                    os.unlink(left.name, dir_fd=private)
            os.close(private)
        with contextlib.suppress(OSError):
            os.rmdir(name, dir_fd=folder)


def _identity(folder: int, name: str) -> tuple[int, int]:
    status = os.stat(name, dir_fd=folder, follow_symlinks=False)
    return status.st_dev, status.st_ino


def _remove_dead(folder: int, path: Path, private: int) -> None:
    """Takes away the socket of a process that has ended. Anything else at the path is refused.

    It is moved into the private folder first, and looked at there: another server may have taken the name since.
    """
    for _ in range(_TRIES):
        try:
            status = os.stat(path.name, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(status.st_mode):
            raise Conflict(f"{path} exists and is no socket; choose another path")
        if _is_alive(folder, path.name):
            raise InUse(f"a process listens on {path}; choose another path, or end that one")
        try:
            if _identity(folder, path.name) != (status.st_dev, status.st_ino):
                continue
            os.rename(path.name, _OLD, src_dir_fd=folder, dst_dir_fd=private)
        except FileNotFoundError:
            continue
        # Its number alone says little: it is given to the next file once the old one has gone.
        if _identity(private, _OLD) == (status.st_dev, status.st_ino) and not _is_alive(private, _OLD):
            os.unlink(_OLD, dir_fd=private)
            return
        try:
            _move(private, _OLD, folder, path.name)  # a living server's: it gets its name back
        except FileExistsError:
            os.unlink(_OLD, dir_fd=private)
    raise InUse(f"other processes change {path} all the time; choose another path")


def _is_alive(folder: int, name: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(f"/proc/self/fd/{folder}/{name}")
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except BlockingIOError:
            pass  # its queue is full
    return True


def _group_id(name: str) -> int:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise InvalidArgument(f"there is no group called {name}") from None
