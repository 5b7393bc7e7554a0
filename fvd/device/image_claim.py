"""A claim on an image that a program of QEMU's reads for us: as for any base, but beside QEMU's own locks. Knows no formats.

QEMU marks what it does with an image by locks on single bytes of it, and takes a lock of ours on one of these for another QEMU that lets
nobody else in. So these bytes are left to it: the rest of the claim refuses writers of ours, QEMU's locks refuse those of QEMU's.
"""

from __future__ import annotations

import fcntl
import os
import struct

from fvd.device.claim import Claim, Ownership, claim
from fvd.device.node import typed_errors

_F_OFD_SETLK = 37
_FLOCK = struct.Struct("=hhxxxxqqixxxx")  # struct flock on 64-bit Linux: type, whence, start, length, pid
# block/file-posix.c: permissions are bytes from 100, what others may not have are bytes from 200, one for each of a few permissions.
_QEMU_OFFSET = 100
_QEMU_BYTES = 200


def claim_image(path: str | os.PathLike[str]) -> Claim:
    """Claims an image as a base. For the moment of a system call QEMU's bytes are locked too: a program of QEMU's that begins just then
    refuses to, and can be started again. Raises as `claim`."""
    held = claim(path, Ownership.BASE)
    try:
        with typed_errors("unlocking a part of", held.path):
            fcntl.fcntl(held.descriptor, _F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, _QEMU_OFFSET, _QEMU_BYTES, 0))
    except BaseException:
        held.close()
        raise
    return held
