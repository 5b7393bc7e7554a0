# SPDX-License-Identifier: Apache-2.0
"""Every byte of an open file or device becomes zero and is read back, so that who gets the storage next reads nothing of it. Knows no disk.

It goes from the end to the beginning, and what is zero already is only read: whoever is interrupted begins again and is soon where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fvd._lifetime import checkpoint
from fvd.device.holes import find_holes
from fvd.device.node import Bytes, Node, aligned_buffer
from fvd.errors import DeviceError

PIECE_BYTES = 64 << 20  # one flush, and one look at it afterwards
LOOK_BYTES = 4 << 20

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


def wipe(node: Node, last_bytes: int, progress: Progress | None = None) -> None:
    """Everything that the node stores reads as zeros afterwards, durably; its first `last_bytes` are so only when all the rest is.

    A device is asked for zeros, and written to where it cannot make them. A file, open through the page cache, is written to: what its file
    system would only note, the medium below would keep. Its holes have nothing. Raises DeviceError (also: it does not read back as zeros),
    NoSpace, PermissionDenied.
    """
    pieces = [*_pieces(node, last_bytes)]
    total_bytes = sum(length for _, length in pieces)
    buffer = aligned_buffer(LOOK_BYTES)
    zeros = aligned_buffer(0 if node.is_block else LOOK_BYTES)
    done_bytes = 0
    for offset, length in reversed(pieces):
        checkpoint()
        end = offset + length
        first = _first_that_holds_something(node, offset, end, buffer)
        if first is not None:
            if node.is_block:
                node.zero(first, end - first)
            else:
                for at in range(first, end, LOOK_BYTES):
                    node.pwrite(at, zeros[: min(LOOK_BYTES, end - at)])
            node.flush()
            if not node.direct:
                node.forget_cache()
            kept = _first_that_holds_something(node, first, end, buffer)
            if kept is not None:
                raise DeviceError(
                    f"{node.path} still has something at byte {kept} after it was wiped: its storage does not do what it is told"
                )
        done_bytes += length
        if progress is not None:
            progress(done_bytes, total_bytes)


def _pieces(node: Node, last_bytes: int) -> Iterator[tuple[int, int]]:
    """(offset_bytes, length_bytes) of what is stored, in order; none lies on both sides of `last_bytes`."""
    size_bytes = node.size_bytes()
    at = 0
    for hole, length in [*(() if node.is_block else find_holes(node)), (size_bytes, 0)]:
        while at < hole:
            end = min(hole, at + PIECE_BYTES, last_bytes if at < last_bytes else hole)
            yield at, end - at
            at = end
        at = hole + length


def _first_that_holds_something(node: Node, begin: int, end: int, buffer: Bytes) -> int | None:
    for at in range(begin, end, LOOK_BYTES):
        part = buffer[: min(LOOK_BYTES, end - at)]
        node.pread_into(at, part)
        if bytes(part).strip(b"\0"):
            return at
    return None
