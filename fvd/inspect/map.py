# SPDX-License-Identifier: Apache-2.0
"""Which part of a disk is where: extents in the order of the virtual disk. Works on arrays, in windows that bound its memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from fvd.disk.view import Target, View, look
from fvd.errors import InvalidArgument
from fvd.format.maps import EMPTY
from fvd.modes import ExtentState

SCHEMA_VERSION = 1
WINDOW_BLOCKS = 1 << 22  # bounds memory; a multiple of every possible blocks per chunk, and of 64

_NAMES: tuple[ExtentState, ...] = get_args(ExtentState)
_DATA, _BASE, _ZERO = range(len(_NAMES))


@dataclass(frozen=True)
class MapExtent:
    """A part of the virtual disk in one state, and of one piece in the storage. Bytes."""

    start: int
    length: int
    state: ExtentState  # data: in this disk; base: read from the base; zero: reads as zeros
    storage_offset: int | None = None  # where data lies


def extents(view: View, offset_bytes: int = 0, length_bytes: int | None = None) -> Iterator[MapExtent]:
    """The extents of a part of the disk, without gaps; neighbours differ in state or do not touch in the storage.

    Raises InvalidArgument for a range that is not in the disk.
    """
    geometry = view.geometry
    size = geometry.virtual_size_bytes
    end_bytes = size if length_bytes is None else offset_bytes + length_bytes
    if not 0 <= offset_bytes <= end_bytes <= size:
        raise InvalidArgument(f"{view.name} has {size} bytes; {offset_bytes} to {end_bytes} is not in it")
    block = geometry.block_size_bytes
    pending: MapExtent | None = None
    first = offset_bytes // block
    last = -(-end_bytes // block) if end_bytes > offset_bytes else first
    while first < last:
        window_end = min(last, (first // WINDOW_BLOCKS + 1) * WINDOW_BLOCKS)
        for extent in _window(view, first, window_end):
            start, stop = max(extent.start, offset_bytes), min(extent.start + extent.length, end_bytes)
            for piece in _at_base_end(view, start, stop, extent):
                if pending is None:
                    pending = piece
                elif _continues(pending, piece):
                    pending = MapExtent(pending.start, pending.length + piece.length, pending.state, pending.storage_offset)
                else:
                    yield pending
                    pending = piece
        first = window_end
    if pending is not None:
        yield pending


def map_volume(target: Target, offset_bytes: int = 0, length_bytes: int | None = None) -> dict[str, Any]:
    """The map as plain values with stable keys. Of an open volume: call it in its loop's thread. Raises as `look` and `extents`."""
    view = look(target)
    geometry = view.geometry
    reported = [
        {"start": extent.start, "length": extent.length, "state": extent.state, "storage_offset": extent.storage_offset}
        for extent in extents(view, offset_bytes, length_bytes)
    ]
    return {
        "schema_version": SCHEMA_VERSION,
        "volume": str(view.name),
        "offset": offset_bytes,
        "length": geometry.virtual_size_bytes - offset_bytes if length_bytes is None else length_bytes,
        "chunk_size": geometry.chunk_size_bytes,
        "data_offset": geometry.data_offset_bytes,
        "storage_size": view.storage_size_bytes,
        "extents": reported,
    }


def slots_of(view: View, first_chunk: int, end_chunk: int) -> npt.NDArray[np.int64]:
    """The slot of each chunk; -1: none."""
    if view.table is None:
        return np.arange(first_chunk, end_chunk, dtype=np.int64)
    slots = np.asarray(view.table)[first_chunk:end_chunk].astype(np.int64)
    slots[slots == EMPTY] = -1
    return slots


def _window(view: View, first: int, end: int) -> Iterator[MapExtent]:
    """Extents of whole blocks; those that begin before the base's end and are not present are all base."""
    geometry = view.geometry
    block, per_chunk = geometry.block_size_bytes, geometry.blocks_per_chunk
    base_bytes = view.superblock.base.size_bytes if view.superblock.base else 0
    words = np.asarray(view.bitmap)[first // 64 : -(-end // 64)]
    if not words.any():  # most of a large disk, as a rule; what slots its chunks have does not matter then
        middle = min(max(-(-base_bytes // block), first), end)
        for start, stop, kind in ((first, middle, _BASE), (middle, end, _ZERO)):
            if start < stop:
                yield MapExtent(start * block, (stop - start) * block, _NAMES[kind])
        return
    present = np.unpackbits(words.view(np.uint8), bitorder="little")[first % 64 : first % 64 + end - first].astype(np.bool_)
    blocks = np.arange(first, end, dtype=np.int64)
    first_chunk = first // per_chunk
    slot = slots_of(view, first_chunk, (end - 1) // per_chunk + 1)[blocks // per_chunk - first_chunk]
    state = np.where(present, np.where(slot >= 0, _DATA, _ZERO), np.where(blocks * block < base_bytes, _BASE, _ZERO))
    place = np.where(state == _DATA, slot * per_chunk + blocks % per_chunk, -1)
    breaks = np.flatnonzero((state[1:] != state[:-1]) | ((state[1:] == _DATA) & (place[1:] != place[:-1] + 1))) + 1
    starts = np.concatenate([[0], breaks])
    stops = np.concatenate([breaks, [end - first]])
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        kind = int(state[start])
        offset = geometry.data_offset_bytes + int(place[start]) * block if kind == _DATA else None
        yield MapExtent((first + start) * block, (stop - start) * block, _NAMES[kind], offset)


def _at_base_end(view: View, start: int, stop: int, whole: MapExtent) -> Iterator[MapExtent]:
    """The part [start, stop) of an extent, cut where the base ends inside its last block."""
    if whole.storage_offset is not None:
        yield MapExtent(start, stop - start, whole.state, whole.storage_offset + start - whole.start)
        return
    base_end = view.superblock.base.size_bytes if view.superblock.base else 0
    if whole.state == "base" and start < base_end < stop:
        yield MapExtent(start, base_end - start, "base")
        yield MapExtent(base_end, stop - base_end, "zero")
    else:
        yield MapExtent(start, stop - start, "zero" if whole.state == "base" and start >= base_end else whole.state)


def _continues(one: MapExtent, two: MapExtent) -> bool:
    if one.state != two.state:
        return False
    return one.storage_offset is None or two.storage_offset is None or one.storage_offset + one.length == two.storage_offset
