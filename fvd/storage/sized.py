# SPDX-License-Identifier: Apache-2.0
"""Storage that has a size and little else: a sparse file in place of a logical volume, and a block device of fixed size.

Only sizes are spoken of here. Knows neither engine nor format; docs/growth.md says what an implementation of `interfaces.Storage` promises.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

from fvd.device.lengthen import Lengthener
from fvd.device.node import Node
from fvd.errors import DeviceError, NoSpace, Unsupported
from fvd.storage.interfaces import Pool
from fvd.units import format_size

_FILE_UNIT_BYTES = 64 << 10


class Ends:
    """The ground of storage that has nothing but a size: it must not become smaller than what is used of it."""

    def __init__(self, size_bytes: Callable[[], int], path: str) -> None:
        self._size_bytes = size_bytes
        self._path = path
        self._looking = threading.Lock()  # guards the rest
        self._held_bytes = self._most_bytes = 0
        self._on_moved: Callable[[str], None] | None = None
        self._why = ""

    def hold(self, size_bytes: int, most_bytes: int, on_moved: Callable[[str], None]) -> None:
        self._most_bytes, self._held_bytes, self._on_moved = most_bytes, min(size_bytes, most_bytes), on_moved
        self.look()

    def seen(self, size_bytes: int) -> None:
        """It has this size, or had it a moment ago. Raises DeviceError if it cannot be looked at again."""
        with self._looking:
            if size_bytes < self._held_bytes:
                size_bytes = self._size_bytes()  # a step of our own may have ended since it was read
            if size_bytes >= self._held_bytes:
                self._held_bytes = min(size_bytes, self._most_bytes)
                return
            told, self._on_moved = self._on_moved, None
            if told is None:
                return
            self._why = (
                f"{self._path} has been made smaller by somebody else while it was in use: {format_size(size_bytes)}, where it had "
                f"{format_size(self._held_bytes)}"
            )
        told(self._why)

    def check(self) -> None:
        """Raises DeviceError if it has been smaller: nothing is done to it any more."""
        if self._why:
            raise DeviceError(self._why)

    def look(self) -> None:
        with contextlib.suppress(DeviceError):  # it is closed, or gone, and that is told otherwise
            self.seen(self._size_bytes())


class FileStorage:
    """A sparse file in place of a logical volume: it grows by the same steps, and takes space on its file system only where written."""

    can_grow = True
    notifies_space = False
    last_suspend_seconds: float | None = None

    def __init__(self, node: Node) -> None:
        self._file = Lengthener(node)
        self._ends = Ends(self._file.size_bytes, node.path)
        self.hold, self.look = self._ends.hold, self._ends.look

    def size_bytes(self) -> int:
        size_bytes = self._file.size_bytes()
        self._ends.seen(size_bytes)
        return size_bytes

    def grow_to(self, size_bytes: int) -> None:
        have = self.size_bytes()
        self._ends.check()
        if size_bytes <= have:
            return
        # Space that the file system does not have would be found missing only by the guest's writes, as I/O errors: take what is
        # there, and let the writes wait for the rest. A sparse file reserves nothing, so this bounds the damage and is no promise.
        free_bytes = self._file.free_bytes()
        target = min(size_bytes, have + free_bytes // _FILE_UNIT_BYTES * _FILE_UNIT_BYTES)
        if target > have:
            self._file.lengthen(target)
        if target < size_bytes:
            raise NoSpace(
                f"{self._file.path}: its file system has {format_size(free_bytes)} left, and "
                f"{format_size(size_bytes - have)} more were wanted; free some space there and writes go on by themselves"
            )

    def pool(self) -> Pool | None:
        return Pool(f"the file system of {self._file.path}", self._file.free_bytes())

    def close(self) -> None:
        self._file.close()


class FixedStorage:
    """A block device: fvd cannot make it larger. Somebody else can, and then the new size is used."""

    can_grow = False
    notifies_space = False
    last_suspend_seconds: float | None = None

    def __init__(self, node: Node) -> None:
        self._device = Lengthener(node)
        self._ends = Ends(self._device.size_bytes, node.path)
        self.hold, self.look = self._ends.hold, self._ends.look

    def size_bytes(self) -> int:
        size_bytes = self._device.size_bytes()
        self._ends.seen(size_bytes)
        return size_bytes

    def grow_to(self, size_bytes: int) -> None:
        have = self.size_bytes()
        self._ends.check()
        if have < size_bytes:
            raise Unsupported(
                f"{self._device.path} holds {format_size(have)}, and fvd cannot enlarge it; enlarge the device, and the new size is used"
            )

    def pool(self) -> Pool | None:
        return None

    def close(self) -> None:
        self._device.close()
