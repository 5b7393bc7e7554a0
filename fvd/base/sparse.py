# SPDX-License-Identifier: Apache-2.0
"""Which blocks of a new disk are zeros because there is nothing in its base: bits without data, so that no read ever goes there.

Arithmetic on extents and bitmaps (FORMAT.md section 8). Knows neither how the extents were found nor where the bitmap goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from fvd import _core
from fvd.format.geometry import Geometry, ceil_div
from fvd.format.maps import Bitmap, empty_bitmap

Punch = Callable[[int, int], bool]
"""(offset_bytes, length_bytes) of the storage -> whether it reads as zeros now without having been written."""


def zero_blocks(geometry: Geometry, base_size_bytes: int, extents: Iterable[tuple[int, int]]) -> Bitmap:
    """The blocks that lie in the base's zero `extents` (offset_bytes, length_bytes; as a server may tell them) as a whole. What a block has
    beyond the base's end counts as zeros; blocks wholly beyond it have bit 0."""
    bitmap = empty_bitmap(geometry)
    block_bytes = geometry.block_size_bytes
    reach_bytes = min(base_size_bytes, geometry.virtual_size_bytes)
    for start_bytes, end_bytes in _joined(extents, reach_bytes):
        first = ceil_div(start_bytes, block_bytes)
        end = ceil_div(end_bytes, block_bytes) if end_bytes == reach_bytes else end_bytes // block_bytes
        if first < end:
            _core.bitmap_fill(bitmap, first, end, True)
    return bitmap


def _joined(extents: Iterable[tuple[int, int]], reach_bytes: int) -> Iterator[tuple[int, int]]:
    """[start, end) of the extents below `reach_bytes`, those that touch made one: a block may begin in one and end in the next."""
    start_bytes = end_bytes = 0
    for offset_bytes, length_bytes in extents:
        low_bytes, high_bytes = max(offset_bytes, 0), min(offset_bytes + length_bytes, reach_bytes)
        if low_bytes >= high_bytes:
            continue
        if start_bytes <= low_bytes <= end_bytes:
            end_bytes = max(end_bytes, high_bytes)
            continue
        if start_bytes < end_bytes:
            yield start_bytes, end_bytes
        start_bytes, end_bytes = low_bytes, high_bytes
    if start_bytes < end_bytes:
        yield start_bytes, end_bytes


def punch_places(geometry: Geometry, zeros: Bitmap, punch: Punch) -> Bitmap:
    """The raw layout: makes the places of these blocks zeros. Returns those of which that could be done; nothing is asked for again once
    the storage has said that it cannot. Raises as `punch`."""
    done = empty_bitmap(geometry)
    for first, end in runs(zeros, geometry.blocks):
        offset_bytes = geometry.data_offset_bytes + first * geometry.block_size_bytes
        if not punch(offset_bytes, (end - first) * geometry.block_size_bytes):
            break
        _core.bitmap_fill(done, first, end, True)
    return done


def runs(bitmap: Bitmap, blocks: int) -> Iterator[tuple[int, int]]:
    """[first, end) of each run of bits that are 1."""
    at = 0
    while at < blocks:
        bounds, value = _core.bitmap_runs(bitmap, at, blocks)
        places = bounds.tolist()
        yield from zip(places[not value :: 2], places[1 + (not value) :: 2], strict=False)
        at = places[-1]
