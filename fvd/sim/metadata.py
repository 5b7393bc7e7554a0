# SPDX-License-Identifier: Apache-2.0
"""What every write of metadata must look like: decoded as it passes, and held against what was committed. It may not know the engine."""

from __future__ import annotations

import numpy as np

from fvd.disk.loading import LoadedDisk
from fvd.format.geometry import CELLS_PER_PAGE, ENTRIES_PER_CELL, PAGE_BYTES, SECTOR_BYTES, WORDS_PER_CELL
from fvd.format.journal import ENTRY_RECORD, HEADER_BYTES, PAGE_HEADER, WORD_RECORD
from fvd.format.maps import EMPTY, Bitmap, MapKind, Table, decode_pages, empty_bitmap, empty_table, map_offset_bytes
from fvd.format.superblock import Superblock
from fvd.sim._device import Operation
from fvd.sim._oracle import Violation


class Metadata:
    """`remembering`: what pages held before their last write is kept."""

    def __init__(self, image: memoryview, superblock: Superblock, *, remembering: bool) -> None:
        self._image = image  # and not the device, which has us inspect: a circle would keep the images of many worlds in memory
        self._geometry = superblock.geometry
        self._uuid = superblock.uuid
        self._remembering = remembering
        self.overwritten: dict[int, bytes] = {}  # page's offset -> what it held before its last write
        self._durable_tail = 0  # of the last commit that has ended
        self._committed: dict[MapKind, Bitmap | Table | None] = {}  # the maps with every commit that has ended
        # operation -> what it commits once it has ended, and the sequence of its page
        self._records: dict[int, list[tuple[MapKind, int, int, int]]] = {}
        self._before: dict[tuple[MapKind, int], tuple[int, int]] = {}  # what the last commit changed: the value before, and its sequence
        self._behind: dict[tuple[MapKind, int], int] = {}  # what a map page lacks of the commit with this sequence

    def begin(self, disk: LoadedDisk) -> None:
        """A life begins with this, whose arrays the engine takes."""
        self._durable_tail = disk.journal_state.tail
        self._records, self._before, self._behind = {}, {}, {}
        self._committed = {MapKind.BITMAP: np.array(disk.bitmap), MapKind.TABLE: None if disk.table is None else np.array(disk.table)}

    def announce(self, operation: Operation) -> None:
        """Metadata is handed to the device. A map page holds what is committed at this moment, and nothing else (R11)."""
        if operation.offset_bytes >= self._geometry.bitmap_offset_bytes:
            self._map(operation.offset_bytes, operation.content, operation)

    def conclude(self, operation: Operation) -> None:
        """A journal write has ended well: what it holds is committed."""
        for kind, index, value, sequence in self._records.pop(operation.number, ()):
            items = self._committed[kind]
            if items is None:
                raise Violation(f"a commit for a map that this disk does not have: {operation}")
            self._before[kind, index] = int(items[index]), sequence
            items[index] = value

    def mapped(self, first_sector: int, sectors: int) -> None:
        """A write of these was acknowledged as durable: what is committed maps all of it (R9)."""
        geometry = self._geometry
        start, end = first_sector * SECTOR_BYTES, (first_sector + sectors) * SECTOR_BYTES
        bitmap, table = self._committed[MapKind.BITMAP], self._committed[MapKind.TABLE]
        for block in range(start // geometry.block_size_bytes, (end - 1) // geometry.block_size_bytes + 1):
            if bitmap is not None and not int(bitmap[block >> 6]) >> (block & 63) & 1:
                raise Violation(f"a durable write at sector {first_sector} was acknowledged, and no commit holds its block {block}")
        for chunk in range(start // geometry.chunk_size_bytes, (end - 1) // geometry.chunk_size_bytes + 1):
            if table is not None and table[chunk] == EMPTY:
                raise Violation(f"a durable write at sector {first_sector} was acknowledged, and no commit maps its chunk {chunk}")

    def inspect(self, operation: Operation) -> None:
        """Decodes metadata as it passes: it must be valid where it lies, with zeros where the format has nothing."""
        content = operation.content
        geometry = self._geometry
        offset = operation.offset_bytes
        if offset % PAGE_BYTES or len(content) % PAGE_BYTES:
            raise Violation(f"metadata is not written in pages: {operation}")
        if self._remembering:
            for start in range(0, len(content), PAGE_BYTES):
                self.overwritten[offset + start] = bytes(self._image[offset + start : offset + start + PAGE_BYTES])
        if offset < geometry.journal_offset_bytes:
            raise Violation(f"a superblock is overwritten: {operation}")
        if offset < geometry.bitmap_offset_bytes:
            if offset + len(content) > geometry.journal_offset_bytes + geometry.journal_size_bytes:
                raise Violation(f"a commit crosses the end of the ring: {operation}")
            for start in range(0, len(content), PAGE_BYTES):
                self._commit(content[start : start + PAGE_BYTES], operation)

    def _commit(self, page: bytes, operation: Operation) -> None:
        """One page of it. Nothing that replay may still need is overwritten (R4)."""
        header = np.frombuffer(page, PAGE_HEADER, 1)[0]
        words_end = HEADER_BYTES + int(header["word_count"]) * WORD_RECORD.itemsize
        entries_end = words_end + int(header["entry_count"]) * ENTRY_RECORD.itemsize
        if entries_end > PAGE_BYTES or any(bytes(header["page_reserved"])) or page[entries_end:].strip(b"\0"):
            raise Violation(f"a journal page has bytes that the format does not: {operation}")
        if int(header["sequence"]) - self._geometry.journal_pages >= self._durable_tail:
            raise Violation(f"a commit overwrites one that replay needs: {operation}, tail {self._durable_tail}")
        if int(header["part"]) == int(header["parts"]) - 1:
            self._durable_tail = int(header["tail"])  # before the next commit begins
            if lost := [item for item, sequence in self._behind.items() if sequence < self._durable_tail]:
                kind, index = lost[0]
                raise Violation(f"the tail passes the commit of {kind.name.lower()} {index}, which no checkpoint has written: {operation}")
        for kind, records in (
            (MapKind.BITMAP, np.frombuffer(page[HEADER_BYTES:words_end], WORD_RECORD)),
            (MapKind.TABLE, np.frombuffer(page[words_end:entries_end], ENTRY_RECORD)),
        ):
            for index, value in records.tolist():
                self._records.setdefault(operation.number, []).append((kind, index, value, int(header["sequence"])))

    def _map(self, offset: int, content: bytes, operation: Operation) -> None:
        geometry = self._geometry
        kind = MapKind.TABLE if geometry.table_entries and offset >= geometry.table_offset_bytes else MapKind.BITMAP
        items = empty_table(geometry) if kind is MapKind.TABLE else empty_bitmap(geometry)
        committed = self._committed[kind]
        if items is None or committed is None:
            raise Violation(f"a write to a map that this disk does not have: {operation}")
        first_page = (offset - map_offset_bytes(geometry, kind)) // PAGE_BYTES
        decode_pages(geometry, kind, np.frombuffer(content, np.uint8), self._uuid, items, first_page)
        per_page = CELLS_PER_PAGE * (ENTRIES_PER_CELL if kind is MapKind.TABLE else WORDS_PER_CELL)
        first, end = first_page * per_page, (first_page + len(content) // PAGE_BYTES) * per_page
        others = (np.flatnonzero(np.asarray(items)[first:end] != committed[first:end]) + first).tolist()
        for index in others:
            # A commit that has ended in the device may still be held back in the engine (R26): then its page goes without it, and the
            # journal must keep it.
            before, sequence = self._before.get((kind, index), (None, 0))
            if int(items[index]) != before:
                raise Violation(f"a checkpoint writes what is not committed, {kind.name.lower()} {index}: {operation}")
            self._behind[kind, index] = sequence
        if self._behind:
            current = [item for item in self._behind if item[0] is kind and first <= item[1] < end and item[1] not in set(others)]
            for item in current:
                del self._behind[item]
