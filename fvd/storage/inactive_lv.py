# SPDX-License-Identifier: Apache-2.0
"""Reads a disk in a logical volume that is not active, straight from the physical volumes. Reads only; activates nothing, claims nothing.

For looking at many disks at once. Every structure's checksum is seeded with the disk's UUID and its place, so what is read while somebody
switches the volume on is an error at worst, never a wrong answer.
"""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType

from fvd.device.node import Bytes, Data, Node, aligned_buffer, open_node
from fvd.errors import DeviceError, PermissionDenied
from fvd.lvm.extents import Piece


class OfflineVolume:
    """Shaped like a `Node` that is open read-only (see `superblocks.Pages`). A context manager; offsets and lengths in whole pages."""

    def __init__(self, path: str, pieces: list[Piece]) -> None:
        self.path = path
        self._pieces = pieces
        self._nodes: dict[str, Node] = {}
        self._open = ExitStack()

    def __enter__(self) -> OfflineVolume:
        with ExitStack() as undo:
            for device in {piece.device for piece in self._pieces}:
                # Past the page cache: what it holds of a physical volume is older than what went through device-mapper.
                self._nodes[device] = undo.enter_context(open_node(device, read_only=True, direct=True))
            self._open = undo.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.close()

    def size_bytes(self) -> int:
        return self._pieces[-1].start + self._pieces[-1].length

    def pread(self, offset_bytes: int, length_bytes: int, /) -> Bytes:
        buffer = aligned_buffer(length_bytes)
        self.pread_into(offset_bytes, buffer)
        return buffer

    def pread_into(self, offset_bytes: int, buffer: Bytes, /) -> None:
        if offset_bytes < 0 or offset_bytes + len(buffer) > self.size_bytes():
            raise DeviceError(f"{self.path} ends before byte {offset_bytes + len(buffer)}")
        done = 0
        while done < len(buffer):
            at = offset_bytes + done
            piece = next(piece for piece in self._pieces if piece.start <= at < piece.start + piece.length)
            count = min(len(buffer) - done, piece.start + piece.length - at)
            self._nodes[piece.device].pread_into(piece.offset + at - piece.start, buffer[done : done + count])
            done += count

    def pwrite(self, offset_bytes: int, data: Data, /) -> None:
        raise PermissionDenied(f"{self.path} is only read here")

    def zero(self, offset_bytes: int, length_bytes: int, /) -> None:
        raise PermissionDenied(f"{self.path} is only read here")

    def flush(self) -> None:
        raise PermissionDenied(f"{self.path} is only read here")
