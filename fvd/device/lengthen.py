# SPDX-License-Identifier: Apache-2.0
"""A descriptor of its own for whoever makes storage larger in a thread of its own: asks the size, lengthens files. Knows no disk format."""

from __future__ import annotations

import os
import threading

from fvd._lifetime import between_forks, keep
from fvd.device.node import Node, descriptor_size_bytes, typed_errors
from fvd.device.stack import free_bytes_of
from fvd.errors import DeviceError


class Lengthener:
    """A second descriptor of an open node. Closing the disk while a call hangs must not hand the call's descriptor to another file."""

    def __init__(self, node: Node) -> None:
        self.path = node.path
        with typed_errors("duplicating the descriptor of", node.path), between_forks:
            self._fd = os.dup(node.fd)  # R35: the same open file, and no child inherits it
        self._lock = threading.Lock()  # guards the two below; never held across a system call that can block
        self._busy = 0
        self._closed = False
        keep(self, lambda mine: (-1 if mine._closed and not mine._busy else mine._fd,))

    def size_bytes(self) -> int:
        """The size now. Raises DeviceError."""
        with self, typed_errors("asking the size of", self.path):
            return descriptor_size_bytes(self._fd)

    def free_bytes(self) -> int:
        """What the file system that holds the file has left for us. Raises DeviceError."""
        with self, typed_errors("asking the free space of", self.path):
            return free_bytes_of(os.fstatvfs(self._fd))

    def lengthen(self, size_bytes: int) -> None:
        """A sparse file is at least `size_bytes` long when this returns, and no byte of it has changed. Not durable before its next flush.

        Raises NoSpace, PermissionDenied, DeviceError.
        """
        with self, typed_errors(f"growing (to {size_bytes} bytes)", self.path):
            if descriptor_size_bytes(self._fd) >= size_bytes:
                return
            # Not ftruncate: a call that hung, and goes on when the disk has long been opened by another process and has grown,
            # would cut it off. This can only lengthen. It allocates the block of the last byte and leaves the rest sparse.
            # R28: no fsync. This descriptor shares the disk's open file, and would take the report of a page that the kernel lost; the
            # flush of the commit that first names a slot there makes the size durable too.
            os.posix_fallocate(self._fd, size_bytes - 1, 1)

    def close(self) -> None:
        """No more calls; the descriptor goes when one that is still running has ended. Again is fine."""
        with self._lock:
            last, self._closed = not self._closed and not self._busy, True
            if last:
                os.close(self._fd)

    def __enter__(self) -> None:
        with self._lock:
            if self._closed:
                raise DeviceError(f"{self.path} has been closed")
            self._busy += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._busy -= 1
            if self._closed and not self._busy:
                os.close(self._fd)
