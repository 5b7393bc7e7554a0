"""Storage in memory for what provision, recovery and check do: `MemoryNode`, where everything is durable at once, and `VolatileNode`, which
counts operations, loses power after a chosen one, and knows of each logical block what a crash may leave in it.

Both have the shape of a `fvd.device.node.Node`. They may not know the engine, nor what the bytes mean.
"""

from __future__ import annotations

import numpy as np

from fvd.device.node import Bytes, Data, Identity
from fvd.errors import DeviceError, InvalidArgument

Buffer = bytearray | memoryview | Bytes
Volatile = list[tuple[int, list[bytes]]]
"""(offset in bytes, contents, oldest first) of each block of which a crash may leave any of several contents, by submission."""


class PowerFailure(Exception):
    """Power has failed: the operation under way is the last."""


class MemoryNode:
    """Reads and writes a writable buffer of the caller's. Made anew for each open, so it costs little."""

    is_block = True
    read_only = False
    notice: str | None = None
    identity: Identity = ("memory", 0, 0)

    def __init__(self, image: Buffer, *, logical_block_bytes: int = 512, direct: bool = True, path: str = "memory") -> None:
        self.path = path
        self.direct = direct
        self.logical_block_bytes = logical_block_bytes
        self._bytes: Bytes = np.frombuffer(image, np.uint8)

    def size_bytes(self) -> int:
        return self._bytes.size

    def pread(self, offset_bytes: int, length_bytes: int, /) -> Bytes:
        return self._range(offset_bytes, length_bytes).copy()

    def pread_into(self, offset_bytes: int, buffer: Bytes, /) -> None:
        buffer[:] = self._range(offset_bytes, buffer.size)

    def pwrite(self, offset_bytes: int, data: Data, /) -> None:
        content = np.frombuffer(data, np.uint8)
        self._range(offset_bytes, content.size)[:] = content

    def zero(self, offset_bytes: int, length_bytes: int, /) -> None:
        self._range(offset_bytes, length_bytes)[:] = 0

    def flush(self) -> None:
        """Nothing is volatile here."""

    def forget_cache(self) -> None:
        """There is none."""

    def _range(self, offset_bytes: int, length_bytes: int) -> Bytes:
        if offset_bytes < 0 or offset_bytes + length_bytes > self._bytes.size:
            raise DeviceError(f"{self.path} has {self._bytes.size} bytes, which {length_bytes} bytes at {offset_bytes} are not inside")
        if (offset_bytes | length_bytes) % self.logical_block_bytes:
            raise InvalidArgument(
                f"{self.path} has blocks of {self.logical_block_bytes} bytes: {length_bytes} bytes at {offset_bytes} are not aligned"
            )
        return self._bytes[offset_bytes : offset_bytes + length_bytes]


class VolatileNode(MemoryNode):
    """Keeps an image of its own. Writes, zeros, flushes and growth are operations, counted in `operations`.

    `budget`: power fails at the operation with this number, when it has taken effect; with `before`, when it has not. 0: it never fails.
    """

    def __init__(
        self, image: bytes | Buffer, *, logical_block_bytes: int = 512, direct: bool = True, budget: int = 0, before: bool = False
    ) -> None:
        super().__init__(bytearray(image), logical_block_bytes=logical_block_bytes, direct=direct)
        self.budget = budget
        self.before = before
        self.operations = 0
        self.durable_size_bytes = self._bytes.size
        """Growth, too, is there after a crash or not, until a flush."""
        self._versions: dict[int, list[bytes]] = {}  # by block; the one written last is last

    @property
    def image(self) -> bytes:
        """What reads see."""
        return self._bytes.tobytes()

    def volatile(self) -> Volatile:
        size = self.logical_block_bytes
        return [(block * size, list(contents)) for block, contents in self._versions.items()]

    def pwrite(self, offset_bytes: int, data: Data, /) -> None:
        self._begin()
        self._put(offset_bytes, np.frombuffer(data, np.uint8))
        self._end()

    def zero(self, offset_bytes: int, length_bytes: int, /) -> None:
        self._begin()
        self._put(offset_bytes, np.zeros(length_bytes, np.uint8))
        self._end()

    def flush(self) -> None:
        self._begin()
        self._versions.clear()
        self.durable_size_bytes = self._bytes.size
        self._end()

    def grow_to(self, size_bytes: int) -> None:
        """More storage at the end, holding what it held before: nothing that we know."""
        self._begin()
        self._bytes = np.append(self._bytes, np.full(size_bytes - self._bytes.size, 0xA5, np.uint8))
        self._end()

    def _begin(self) -> None:
        if self.budget and self.operations >= self.budget:
            raise PowerFailure
        self.operations += 1
        if self.before and self.operations == self.budget:
            raise PowerFailure

    def _end(self) -> None:
        if self.operations == self.budget:
            raise PowerFailure

    def _put(self, offset_bytes: int, content: Bytes) -> None:
        place = self._range(offset_bytes, content.size)
        size = self.logical_block_bytes
        # A block that is written with what it holds already is not another version.
        changed = np.flatnonzero((place != content).reshape(-1, size).any(axis=1))
        for index in changed.tolist():
            piece = slice(index * size, (index + 1) * size)
            block = offset_bytes // size + index
            contents = self._versions.pop(block, None) or [place[piece].tobytes()]
            contents.append(content[piece].tobytes())
            self._versions[block] = contents
        place[:] = content
