# SPDX-License-Identifier: Apache-2.0
"""The bytes of a file by which QEMU's programs tell each other what they do with it: a base of ours may be one of theirs too.

QEMU (block/file-posix.c) has a few permissions. Who uses one locks a byte from 100 on, who suffers no other to use it a byte from 200 on,
always with shared locks; then it looks whether another one has the opposite byte. So any lock of ours on a byte means something to it, and
a lock on the whole file that nobody else may even read it. Knows no owners and no formats.
"""

from __future__ import annotations

import fcntl
import os
import struct

_F_OFD_GETLK = 36
_F_OFD_SETLK = 37
_FLOCK = struct.Struct("=hhxxxxqqixxxx")  # struct flock on 64-bit Linux: type, whence, start, length, pid
_USED = 100
_DENIED = 200
_END = 300
_CONSISTENT_READ, _WRITE, _RESIZE = 0, 1, 3


def lock_as_reader(fd: int) -> None:
    """Shared locks: on all that is not QEMU's, which refuse writers of ours, and those of a QEMU that reads and suffers no writer.
    Raises OSError; then none of them is held."""
    try:
        for start, length in (
            (0, _USED),
            (_USED + _CONSISTENT_READ, 1),
            (_DENIED + _WRITE, 1),
            (_DENIED + _RESIZE, 1),
            (_END, 0),  # to whatever it grows
        ):
            fcntl.fcntl(fd, _F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, start, length, 0))
    except OSError:
        fcntl.fcntl(fd, _F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0))
        raise


def is_written(fd: int) -> bool:
    """Whether a program of QEMU's writes to the open file, or makes it such that nobody may read it. Raises OSError."""
    return any(_is_locked(fd, byte) for byte in (_USED + _WRITE, _USED + _RESIZE, _DENIED + _CONSISTENT_READ))


def _is_locked(fd: int, byte: int) -> bool:
    """Whether another open file has any lock there."""
    answer = fcntl.fcntl(fd, _F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    kind: int = _FLOCK.unpack(answer)[0]
    return kind != fcntl.F_UNLCK
