# SPDX-License-Identifier: Apache-2.0
"""The seam to whatever holds a disk: a sparse file, a device of fixed size, later a logical volume. Only sizes are spoken of here.

A Storage grows and tells its size, and nothing else: what lies in it, who waits for it and when it should grow are not its business.
Knows neither engine nor format. docs/growth.md says what an implementation must promise.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from fvd.device.lengthen import Lengthener
from fvd.device.node import Node
from fvd.errors import DeviceError, NoSpace, Unsupported
from fvd.units import format_size

_FILE_UNIT_BYTES = 64 << 10


@dataclass(frozen=True)
class Pool:
    """What a storage takes its growth from."""

    name: str  # a volume group, a file system
    free_bytes: int


@runtime_checkable
class Storage(Protocol):
    """The place where one open disk lives.

    `grow_to`, `size_bytes` and `pool` are called from threads of the allocator, `grow_to` and `pool` never twice at a time, though one
    beside the other; `close` from any, also while a call hangs.
    """

    can_grow: bool  # False: only somebody else can make it larger
    tells_of_room: bool  # True: `Allocator.room_made` is called when there may be room again, so failures are repeated less and less often
    last_suspend_seconds: float | None  # how long the device stood still during the last `grow_to`; None: not known, or it never does

    def size_bytes(self) -> int:
        """The size now, asked of the open descriptor. Whatever `grow_to` reported, this is the truth. Raises DeviceError."""

    def grow_to(self, size_bytes: int) -> None:
        """Makes the storage at least `size_bytes` long, without changing a byte that it holds; never makes it shorter. The size is durable
        after the next flush of the storage at the latest, and nothing is flushed here.

        May stop half-way. Raises NoSpace (the group or file system is full), Unsupported (cannot grow), Timeout, DeviceError.
        """

    def pool(self) -> Pool | None:
        """What growth is taken from, and what it has left; None: nothing to tell. May take as long as a command. Raises FvdError."""

    def close(self) -> None:
        """No more calls. One that is still running ends by itself and changes nothing but the size."""


class Ground(Protocol):
    """A Storage that can tell whether what it holds still lies where it lay: somebody may shrink or remap it behind the disk."""

    def hold(self, size_bytes: int, most_bytes: int, on_moved: Callable[[str], None]) -> None:
        """So much of it is used from now on, and what it grows by, up to `most_bytes`. `on_moved(why)` is called, once, in whatever thread
        it is found out, when what it holds is not what it was, perhaps before this returns: a step of its own never is a reason."""

    def look(self) -> None:
        """Something has happened to it. Takes no time."""


class GroundedStorage(Storage, Ground, Protocol):
    """Both: what a provider gives for an open disk."""


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
    """A sparse file that plays the logical volume: it grows by the same steps, and takes room on its file system only where written."""

    can_grow = True
    tells_of_room = False
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
        # Room that the file system does not have would be found missing only by the guest's writes, as I/O errors: take what is
        # there, and let the writes wait for the rest. A sparse file reserves nothing, so this bounds the damage and is no promise.
        room = self._file.room_bytes()
        target = min(size_bytes, have + room // _FILE_UNIT_BYTES * _FILE_UNIT_BYTES)
        if target > have:
            self._file.lengthen(target)
        if target < size_bytes:
            raise NoSpace(
                f"{self._file.path}: its file system has {format_size(room)} left, and {format_size(size_bytes - have)} more were wanted; "
                "make room there and writes go on by themselves"
            )

    def pool(self) -> Pool | None:
        return Pool(f"the file system of {self._file.path}", self._file.room_bytes())

    def close(self) -> None:
        self._file.close()


class FixedStorage:
    """A block device: fvd cannot make it larger. Somebody else can, and then the new size is used."""

    can_grow = False
    tells_of_room = False
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
