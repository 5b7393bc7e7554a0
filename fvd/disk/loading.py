# SPDX-License-Identifier: Apache-2.0
"""Reads a whole disk into memory as its last commit left it: superblock, maps, journal replayed, everything checked. Writes nothing.

Opening, info, map and check all begin here, so a disk that one of them accepts is accepted by all. Knows neither engine nor base.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fvd import _core
from fvd._lifetime import checkpoint
from fvd.device.node import aligned_buffer
from fvd.errors import Corrupt, FvdError
from fvd.format.geometry import PAGE_BYTES, Geometry, ceil_div
from fvd.format.journal import JournalState, replay
from fvd.format.maps import Bitmap, MapKind, Table, check_maps, decode_pages, empty_bitmap, empty_table, map_offset_bytes, map_pages
from fvd.format.superblock import Superblock
from fvd.units import format_size
from fvd.volume.memory import enough_memory
from fvd.volume.superblocks import Pages, read_superblock

READ_BYTES = 2 << 20  # a buffer that is used again costs no page faults and stays in the processor's cache


@dataclass
class LoadedDisk:
    """A disk as its last commit left it."""

    superblock: Superblock
    storage_size_bytes: int
    bitmap: Bitmap
    table: Table | None
    used_slots: Bitmap
    journal_state: JournalState
    dirty_bitmap_pages: bytearray  # what replay changed and storage may not have yet: a byte for each page
    dirty_table_pages: bytearray

    @property
    def geometry(self) -> Geometry:
        return self.superblock.geometry


def covers_base(superblock: Superblock, bitmap: Bitmap) -> bool:
    """Whether every block that the base reaches is in the disk by this bitmap, a committed one: nothing will ever be read from the base
    then. False without a base."""
    geometry = superblock.geometry
    if superblock.base is None:
        return False
    reach_bytes = min(superblock.base.size_bytes, geometry.virtual_size_bytes)
    return _core.bitmap_all(bitmap, 0, ceil_div(reach_bytes, geometry.block_size_bytes))


def load_disk(node: Pages) -> LoadedDisk:
    """Raises NotFound (no disk), Corrupt, Unsupported, DeviceError; the message names the volume."""
    superblock = read_superblock(node)
    geometry = superblock.geometry
    size_bytes = node.size_bytes()
    with naming(node.path), enough_memory(geometry):
        check_metadata_fits(geometry, size_bytes)
        bitmap = empty_bitmap(geometry)
        read_map(node, superblock, MapKind.BITMAP, bitmap)
        table = empty_table(geometry)
        if table is not None:
            read_map(node, superblock, MapKind.TABLE, table)
        ring = node.pread(geometry.journal_offset_bytes, geometry.journal_size_bytes)
        state, dirty_bitmap, dirty_table = replay(geometry, superblock.uuid, ring, bitmap, table)
        used = check_maps(geometry, bitmap, table, superblock.base is not None)
        check_slots_fit(geometry, used, size_bytes)
    return LoadedDisk(superblock, size_bytes, bitmap, table, used, state, dirty_bitmap, dirty_table)


def read_map(node: Pages, superblock: Superblock, kind: MapKind, items: Bitmap | Table) -> None:
    """Fills `items` from storage, before replay. Raises Corrupt, naming the cell."""
    geometry = superblock.geometry
    pages = map_pages(geometry, kind)
    if pages * PAGE_BYTES <= READ_BYTES:
        decode_pages(geometry, kind, node.pread(map_offset_bytes(geometry, kind), pages * PAGE_BYTES), superblock.uuid, items, 0)
        return
    buffer = aligned_buffer(READ_BYTES)
    for first in range(0, pages, READ_BYTES // PAGE_BYTES):
        checkpoint()
        raw = buffer[: (pages - first) * PAGE_BYTES]
        node.pread_into(map_offset_bytes(geometry, kind) + first * PAGE_BYTES, raw)
        decode_pages(geometry, kind, raw, superblock.uuid, items, first)


def check_metadata_fits(geometry: Geometry, size_bytes: int) -> None:
    """Raises Corrupt if the storage ends inside the metadata."""
    if size_bytes < geometry.data_offset_bytes:
        raise Corrupt(
            f"the storage has {format_size(size_bytes)} ({size_bytes} bytes), less than the metadata of this disk "
            f"({geometry.data_offset_bytes} bytes): it has been cut off"
        )


def check_slots_fit(geometry: Geometry, used_slots: Bitmap, size_bytes: int) -> None:
    """Raises Corrupt if a chunk lies beyond the end of the storage."""
    highest = highest_slot(used_slots)
    if highest >= geometry.slots_in(size_bytes):
        needed_bytes = geometry.slot_offset_bytes(highest + 1)
        raise Corrupt(
            f"the storage has {format_size(size_bytes)} ({size_bytes} bytes), but chunks of this disk reach to byte {needed_bytes}: "
            "it has been cut off; restore its size and data"
        )


def highest_slot(used_slots: Bitmap) -> int:
    """The highest slot in use; -1: none."""
    words = memoryview(used_slots)
    last = _core.bitmap_find_last(words, 0, len(words) * 64, True)
    return -1 if last == len(words) * 64 else last


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Errors of the block name the volume at their beginning."""
    try:
        yield
    except FvdError as error:
        if str(error).startswith(path):
            raise
        raise type(error)(f"{path}: {error}") from error
