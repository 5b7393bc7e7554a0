# SPDX-License-Identifier: Apache-2.0
"""Bitmap and table: arrays to and from the pages of cells that hold them, and what must be true of them (FORMAT.md sections 5 and 7).

Pure: the caller reads and writes the pages. A bitmap is ``uint64[bitmap_words]``, a table is ``uint32[chunks]`` or None in the raw layout:
any memory of that shape, an `Items` or an array of numpy's. Imports no numpy: a server that is idle must not hold it.
"""

from __future__ import annotations

import array
from enum import IntEnum
from typing import Any

from fvd import _core
from fvd.errors import Corrupt, InvalidArgument
from fvd.format.geometry import CELL_BYTES, CELLS_PER_PAGE, ENTRIES_PER_CELL, PAGE_BYTES, WORDS_PER_CELL, Geometry, Layout, ceil_div
from fvd.format.records import Record

Bitmap = Any  # Items("Q"), or uint64 of numpy's
Table = Any  # Items("I"), or uint32
Bytes = memoryview

EMPTY = 0xFFFFFFFF

CELL = Record(
    ("cell_checksum", "<u4"),
    ("cell_kind", "<u2"),
    ("cell_reserved", "<u2"),
    ("cell_index", "<u8"),
    ("cell_payload", "V496"),
)


class MapKind(IntEnum):
    """Which of the two maps a cell belongs to."""

    BITMAP = 1
    TABLE = 2


def _check_layout() -> None:
    header = {name: place for name, place in CELL.places.items() if name != "cell_payload"}
    if header != _core.CELL_HEADER_LAYOUT or CELL.itemsize != CELL_BYTES:
        raise ImportError(f"cells differ between fvd.format and fvd._core: {header} and {_core.CELL_HEADER_LAYOUT}")
    mine = {
        "PAGE_BYTES": PAGE_BYTES,
        "CELL_BYTES": CELL_BYTES,
        "CELLS_PER_PAGE": CELLS_PER_PAGE,
        "WORDS_PER_CELL": WORDS_PER_CELL,
        "ENTRIES_PER_CELL": ENTRIES_PER_CELL,
        "KIND_BITMAP": MapKind.BITMAP,
        "KIND_TABLE": MapKind.TABLE,
        "EMPTY": EMPTY,
    }
    for name, value in mine.items():
        if _core.CONSTANTS[name] != value:
            raise ImportError(f"{name} is {value} in fvd.format and {_core.CONSTANTS[name]} in fvd._core")


_check_layout()


class Items(array.array):  # type: ignore[type-arg]
    """A map in memory."""

    def copy(self) -> Items:
        return Items(self.typecode, self)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        """For numpy, without a copy unless it is asked for."""
        import numpy as np

        shared = np.frombuffer(self, np.uint64 if self.typecode == "Q" else np.uint32)
        return shared.astype(dtype or shared.dtype, copy=bool(copy))


def empty_bitmap(geometry: Geometry) -> Items:
    return zeros(geometry.bitmap_words)


def empty_table(geometry: Geometry) -> Items | None:
    """None in the raw layout."""
    return None if geometry.layout == Layout.RAW else Items("I", array.array("I", [EMPTY]) * geometry.chunks)


def zeros(count: int) -> Items:
    """So many words."""
    return Items("Q", array.array("Q", [0]) * count)


def map_offset_bytes(geometry: Geometry, kind: MapKind) -> int:
    return geometry.bitmap_offset_bytes if kind == MapKind.BITMAP else geometry.table_offset_bytes


def map_pages(geometry: Geometry, kind: MapKind) -> int:
    return geometry.bitmap_pages if kind == MapKind.BITMAP else geometry.table_pages


def check_items(geometry: Geometry, kind: MapKind, items: Bitmap | Table | None) -> None:
    """Raises InvalidArgument unless `items` has the shape and type of this map of this disk."""
    count, size_bytes = (geometry.bitmap_words, 8) if kind == MapKind.BITMAP else (geometry.table_entries, 4)
    view = None if items is None else memoryview(items)
    if view is None or view.shape != (count,) or view.itemsize != size_bytes or view.format not in ("Q", "L", "I"):
        given = "nothing" if view is None else f"{view.shape} of format {view.format}"
        raise InvalidArgument(f"a {MapKind(kind).name.lower()} of this disk is {count} items of {size_bytes} bytes, not {given}")


def encode_pages(geometry: Geometry, kind: MapKind, items: Bitmap | Table, uuid: bytes, first_page: int, page_count: int) -> Bytes:
    """Pages [first_page, first_page + page_count) of a map, to be written at its offset + 4096 * first_page."""
    check_items(geometry, kind, items)
    if first_page < 0 or page_count < 0 or first_page + page_count > map_pages(geometry, kind):
        raise InvalidArgument(f"pages {first_page} to {first_page + page_count} of a map of {map_pages(geometry, kind)}")
    out = memoryview(bytearray(page_count * PAGE_BYTES))
    _core.cells_encode(kind, items, uuid, map_offset_bytes(geometry, kind), first_page, page_count, out)
    return out


def decode_pages(geometry: Geometry, kind: MapKind, raw: Any, uuid: bytes, items: Bitmap | Table, first_page: int) -> None:
    """Read some whole pages into their place in `items`: a large map is read piece by piece. Raises Corrupt, naming the cell."""
    check_items(geometry, kind, items)
    if len(raw) % PAGE_BYTES or first_page < 0 or first_page + len(raw) // PAGE_BYTES > map_pages(geometry, kind):
        raise InvalidArgument(f"{len(raw)} bytes from page {first_page} are not inside a map of {map_pages(geometry, kind)} pages")
    bad = _core.cells_decode(kind, raw, items, uuid, map_offset_bytes(geometry, kind), first_page)
    if bad >= 0:
        where_bytes = map_offset_bytes(geometry, kind) + bad * CELL_BYTES
        raise Corrupt(f"{MapKind(kind).name.lower()} cell {bad} at byte {where_bytes} is damaged or does not belong there")


def decode_bitmap(geometry: Geometry, raw: Any, uuid: bytes) -> Bitmap:
    """The whole bitmap region to an array. Raises Corrupt."""
    if len(raw) != geometry.bitmap_size_bytes:
        raise InvalidArgument(f"the bitmap has {geometry.bitmap_size_bytes} bytes, not {len(raw)}")
    bitmap = empty_bitmap(geometry)
    decode_pages(geometry, MapKind.BITMAP, raw, uuid, bitmap, 0)
    return bitmap


def decode_table(geometry: Geometry, raw: Any, uuid: bytes) -> Table | None:
    """The whole table region to an array; None in the raw layout. Raises Corrupt."""
    if len(raw) != geometry.table_size_bytes:
        raise InvalidArgument(f"the table has {geometry.table_size_bytes} bytes, not {len(raw)}")
    table = empty_table(geometry)
    if table is not None:
        decode_pages(geometry, MapKind.TABLE, raw, uuid, table, 0)
    return table


def map_hash(uuid: bytes, bitmap: Bitmap, table: Table | None) -> int:
    """The hash that every commit carries (section 7); 0 for maps without content."""
    return _core.map_hash(uuid, bitmap, table)


def check_maps(geometry: Geometry, bitmap: Bitmap, table: Table | None, has_base: bool) -> Bitmap:
    """What must be true of complete maps. Returns the slots in use: bit s of ``uint64[ceil(chunks / 64)]``. Raises Corrupt."""
    check_items(geometry, MapKind.BITMAP, bitmap)
    past = _core.bitmap_find(bitmap, geometry.blocks, geometry.bitmap_words * 64, True)
    if past < geometry.bitmap_words * 64:
        raise Corrupt(f"the bitmap marks block {past}, but the disk has {geometry.blocks} blocks")
    used = zeros(ceil_div(geometry.chunks, 64))
    if table is None:
        if geometry.layout != Layout.RAW:
            raise InvalidArgument("the compact layout needs a table")
        _core.bitmap_fill(used, 0, geometry.chunks, True)
        return used
    check_items(geometry, MapKind.TABLE, table)
    bad = _core.table_slots(table, geometry.chunks, used)
    if bad >= 0:
        slot = int(table[bad])
        problem = "another chunk has it too" if slot < geometry.chunks else f"the disk has {geometry.chunks} slots at most"
        raise Corrupt(f"the table puts chunk {bad} in slot {slot}, but {problem}")
    if not has_base:
        bad = _core.empty_chunk_with_bits(bitmap, table, geometry.blocks_per_chunk, geometry.blocks)
        if bad >= 0:
            raise Corrupt(f"chunk {bad} has no slot, but the bitmap marks blocks of it as present")
    return used
