# SPDX-License-Identifier: Apache-2.0
"""Who uses a logical volume on this host, across processes: the last one out switches it off. Locks only; knows no command of lvm.

A lock file for each volume, with locks of the open file (OFD), so the kernel gives them back when a process dies and nobody is counted for
ever. Byte 0: users hold it for reading, who switches off for writing. Byte 1: held by who is arriving, one after the other, so that the
first of several has put the volume right before the second uses it. Byte 2: held by those who found it active and leave it so.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path

from fvd._lifetime import between_forks, keep
from fvd.errors import PermissionDenied

# Below /run, which is root's: in /run/lock anybody may make a folder, and hold its locks for ever.
LOCK_FOLDER = Path("/run/fvd/lvm")
_MODE = 0o600
_F_OFD_GETLK, _F_OFD_SETLK, _F_OFD_SETLKW = 36, 37, 38
_USING, _ARRIVING, _KEEPING = 0, 1, 2
_FLOCK = struct.Struct("=hhxxxxqqixxxx")  # struct flock on 64-bit Linux: type, whence, start, length, pid


class Share:
    """One use of a volume, from `take` to `close`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        keep(self, lambda share: (share._fd,))

    def arrive(self) -> None:
        """Waits while somebody arrives or switches the volume off."""
        fcntl.fcntl(self._fd, _F_OFD_SETLKW, _lock(fcntl.F_WRLCK, _ARRIVING))
        fcntl.fcntl(self._fd, _F_OFD_SETLKW, _lock(fcntl.F_RDLCK))

    def arrived(self) -> None:
        """The volume is right and can be used: the next one may come."""
        fcntl.fcntl(self._fd, _F_OFD_SETLK, _lock(fcntl.F_UNLCK, _ARRIVING))

    def is_alone(self) -> bool:
        """Whether nobody else on this host uses the volume now. Between `take` and `arrived` nobody can begin to."""
        answer = fcntl.fcntl(self._fd, _F_OFD_GETLK, _lock(fcntl.F_WRLCK))
        return bool(_FLOCK.unpack(answer)[0] == fcntl.F_UNLCK)

    def keep(self) -> None:
        """Says, as long as it is held, that the volume was active before fvd came."""
        fcntl.fcntl(self._fd, _F_OFD_SETLK, _lock(fcntl.F_RDLCK, _KEEPING))

    def is_kept(self) -> bool:
        """Whether somebody who uses the volume says so."""
        answer = fcntl.fcntl(self._fd, _F_OFD_GETLK, _lock(fcntl.F_WRLCK, _KEEPING))
        return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)

    def close_as_last(self) -> bool:
        """Gives the use up. True: nobody else uses the volume, and nobody can begin to until `close` is called."""
        # Given up first: of two who leave at the same moment, each would otherwise find the other there.
        fcntl.fcntl(self._fd, _F_OFD_SETLK, _lock(fcntl.F_UNLCK))
        try:
            fcntl.fcntl(self._fd, _F_OFD_SETLK, _lock(fcntl.F_WRLCK))
        except OSError as error:
            self.close()
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        return True

    def close(self) -> None:
        """Again is fine."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            # Not by closing alone: a child that this process has forked meanwhile has a copy of the descriptor.
            fcntl.fcntl(fd, _F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0))
            os.close(fd)


def take(group: str, name: str, folder: Path | None = None) -> Share:
    """Begins a use; waits while somebody arrives or switches the volume off. Raises PermissionDenied."""
    folder = folder or LOCK_FOLDER
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # No name contains a colon: the pair is unique. Lock files stay: removing one would split its users.
        with between_forks:
            share = Share(os.open(folder / f"{group}:{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, _MODE))
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise PermissionDenied(f"{folder} may not be written by you; logical volumes need root") from error
        raise
    try:
        share.arrive()
    except BaseException:
        share.close()
        raise
    return share


def _lock(kind: int, byte: int = _USING) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)
