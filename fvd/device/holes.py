# SPDX-License-Identifier: Apache-2.0
"""Holes of files and devices: where they are in one that is read, and how they are made in one that is written. Knows nothing of disks."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from fvd.device.node import Node, _fallocate, typed_error, typed_errors

_FALLOC_KEEP_SIZE = 1
_FALLOC_PUNCH_HOLE = 2
_NOT_SUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENOTTY)


def find_holes(node: Node) -> Iterator[tuple[int, int]]:
    """(offset_bytes, length_bytes) of what the file system says is zeros without being stored, in order. Where it does not tell (devices,
    many network file systems) there are none. Raises DeviceError."""
    end_bytes = node.size_bytes()
    at_bytes = 0
    while at_bytes < end_bytes:
        hole_bytes = _seek(node, at_bytes, os.SEEK_HOLE, end_bytes)
        if hole_bytes is None or hole_bytes >= end_bytes:
            return
        data_bytes = _seek(node, hole_bytes, os.SEEK_DATA, end_bytes)
        if data_bytes is None:
            return
        yield hole_bytes, min(data_bytes, end_bytes) - hole_bytes
        at_bytes = data_bytes


def _seek(node: Node, offset_bytes: int, how: int, end_bytes: int) -> int | None:
    """Where it begins; `end_bytes` where there is none any more; None: not told."""
    try:
        return os.lseek(node.fd, offset_bytes, how)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return end_bytes
        if error.errno in _NOT_SUPPORTED:
            return None
        raise typed_error(error, "looking for holes in", node.path) from error


def punch_hole(node: Node, offset_bytes: int, length_bytes: int) -> bool:
    """Has the range made zeros without writing them, durable after a flush. False: this storage cannot, and nothing has been done.

    Raises DeviceError and, as `Node.pwrite`, PermissionDenied.
    """
    with typed_errors("making a hole in", node.path):
        try:
            _fallocate(node.fd, _FALLOC_PUNCH_HOLE | _FALLOC_KEEP_SIZE, offset_bytes, length_bytes)
        except OSError as error:
            if error.errno in _NOT_SUPPORTED:
                return False
            raise
    return True
