"""Who uses a logical volume on this host, across processes: the last one out switches it off. Locks only; knows no command of lvm.

A lock file for each volume: users hold it shared. The kernel gives it back when a process dies, so nobody is counted for ever.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from fvd.errors import PermissionDenied

LOCK_FOLDER = Path("/run/lock/fvd")
_MODE = 0o600


class Share:
    """One use of a volume, from `take` to `close`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def close_as_last(self) -> bool:
        """Gives the use up. True: nobody else uses the volume, and nobody can begin to until `close` is called."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            return False
        return True

    def close(self) -> None:
        """Again is fine."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def take(group: str, name: str, folder: Path | None = None) -> Share:
    """Begins a use; waits while somebody switches the volume on or off. Raises PermissionDenied."""
    folder = folder or LOCK_FOLDER
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # No name contains a colon: the pair is unique. Lock files stay: removing one would split its users.
        fd = os.open(folder / f"{group}:{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, _MODE)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise PermissionDenied(f"{folder} may not be written by you; logical volumes need root") from error
        raise
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
    except BaseException:
        os.close(fd)
        raise
    return Share(fd)
