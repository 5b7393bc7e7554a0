# SPDX-License-Identifier: Apache-2.0
"""Sizes and places of a disk's regions, all derived from a few chosen sizes (FORMAT.md sections 1 and 2).

Pure arithmetic: knows no bytes, no files and no devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from fvd.errors import InvalidArgument
from fvd.units import GIB, KIB, MIB

PAGE_BYTES = 4096
CELL_BYTES = 512
CELLS_PER_PAGE = PAGE_BYTES // CELL_BYTES
WORDS_PER_CELL = 62
ENTRIES_PER_CELL = 124
BLOCKS_PER_WORD = 64

JOURNAL_OFFSET_BYTES = MIB
DATA_ALIGNMENT_BYTES = MIB

SECTOR_BYTES = 512
VIRTUAL_SIZE_BYTES_MIN = 4 * KIB
BLOCK_SIZE_BYTES_MIN = 4 * KIB
BLOCK_SIZE_BYTES_MAX = MIB
CHUNK_SIZE_BYTES_MIN = 64 * KIB
CHUNK_SIZE_BYTES_MAX = 256 * MIB
CHUNKS_MAX = 1 << 28
BLOCKS_MAX = 1 << 33
JOURNAL_SIZE_BYTES_MIN = 64 * KIB
JOURNAL_SIZE_BYTES_MAX = GIB
GROW_STEP_UNIT_BYTES = 64 * KIB
_U64_END = 1 << 64


class Layout(IntEnum):
    """How a chunk finds its slot."""

    COMPACT = 0
    RAW = 1


class Placement(IntEnum):
    """Which free slot a new chunk gets."""

    APPEND = 0
    SPREAD = 1


def ceil_div(value: int, unit: int) -> int:
    return -(-value // unit)


def _power_of_two(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high or value & (value - 1):
        raise InvalidArgument(f"{name} is {value} bytes; it must be a power of two from {low} to {high}")


@dataclass(frozen=True, slots=True)
class Geometry:
    """The chosen sizes of a disk, validated on construction; everything else is derived. Raises InvalidArgument."""

    virtual_size_bytes: int
    block_size_bytes: int = 64 * KIB
    chunk_size_bytes: int = MIB
    journal_size_bytes: int = 16 * MIB
    grow_step_bytes: int = 5 * GIB
    layout: Layout = Layout.COMPACT
    placement: Placement = Placement.APPEND

    def __post_init__(self) -> None:
        if self.virtual_size_bytes % SECTOR_BYTES or self.virtual_size_bytes < VIRTUAL_SIZE_BYTES_MIN:
            raise InvalidArgument(
                f"virtual size is {self.virtual_size_bytes} bytes; "
                f"it must be a multiple of {SECTOR_BYTES}, at least {VIRTUAL_SIZE_BYTES_MIN}"
            )
        _power_of_two("block size", self.block_size_bytes, BLOCK_SIZE_BYTES_MIN, BLOCK_SIZE_BYTES_MAX)
        _power_of_two("chunk size", self.chunk_size_bytes, CHUNK_SIZE_BYTES_MIN, CHUNK_SIZE_BYTES_MAX)
        if self.chunk_size_bytes < self.block_size_bytes:
            raise InvalidArgument(f"chunk size {self.chunk_size_bytes} is smaller than block size {self.block_size_bytes}")
        if self.chunks > CHUNKS_MAX:
            raise InvalidArgument(
                f"virtual size {self.virtual_size_bytes} takes {self.chunks} chunks of {self.chunk_size_bytes} bytes; "
                f"at most {CHUNKS_MAX} are possible: choose a larger chunk size"
            )
        if self.blocks > BLOCKS_MAX:
            raise InvalidArgument(
                f"virtual size {self.virtual_size_bytes} takes {self.blocks} blocks of {self.block_size_bytes} bytes; "
                f"at most {BLOCKS_MAX} are possible: choose a larger block size"
            )
        if self.journal_size_bytes % PAGE_BYTES or not JOURNAL_SIZE_BYTES_MIN <= self.journal_size_bytes <= JOURNAL_SIZE_BYTES_MAX:
            raise InvalidArgument(
                f"journal size is {self.journal_size_bytes} bytes; it must be a multiple of {PAGE_BYTES} "
                f"from {JOURNAL_SIZE_BYTES_MIN} to {JOURNAL_SIZE_BYTES_MAX}"
            )
        if self.grow_step_bytes % GROW_STEP_UNIT_BYTES or not self.chunk_size_bytes <= self.grow_step_bytes < _U64_END:
            raise InvalidArgument(
                f"grow step is {self.grow_step_bytes} bytes; it must be a multiple of {GROW_STEP_UNIT_BYTES}, "
                f"at least the chunk size {self.chunk_size_bytes}"
            )
        if self.layout not in tuple(Layout) or self.placement not in tuple(Placement):
            raise InvalidArgument(f"layout {self.layout} or placement {self.placement} does not exist")

    @property
    def blocks(self) -> int:
        return ceil_div(self.virtual_size_bytes, self.block_size_bytes)

    @property
    def chunks(self) -> int:
        return ceil_div(self.virtual_size_bytes, self.chunk_size_bytes)

    @property
    def blocks_per_chunk(self) -> int:
        return self.chunk_size_bytes // self.block_size_bytes

    @property
    def journal_pages(self) -> int:
        return self.journal_size_bytes // PAGE_BYTES

    @property
    def bitmap_words(self) -> int:
        return ceil_div(self.blocks, BLOCKS_PER_WORD)

    @property
    def bitmap_cells(self) -> int:
        return ceil_div(self.bitmap_words, WORDS_PER_CELL)

    @property
    def bitmap_pages(self) -> int:
        return ceil_div(self.bitmap_cells, CELLS_PER_PAGE)

    @property
    def table_entries(self) -> int:
        """Entries of the table: one per chunk, none in the raw layout."""
        return 0 if self.layout == Layout.RAW else self.chunks

    @property
    def table_cells(self) -> int:
        return ceil_div(self.table_entries, ENTRIES_PER_CELL)

    @property
    def table_pages(self) -> int:
        return ceil_div(self.table_cells, CELLS_PER_PAGE)

    @property
    def journal_offset_bytes(self) -> int:
        return JOURNAL_OFFSET_BYTES

    @property
    def bitmap_offset_bytes(self) -> int:
        return JOURNAL_OFFSET_BYTES + self.journal_size_bytes

    @property
    def bitmap_size_bytes(self) -> int:
        return self.bitmap_pages * PAGE_BYTES

    @property
    def table_offset_bytes(self) -> int:
        """0 in the raw layout."""
        return 0 if self.layout == Layout.RAW else self.bitmap_offset_bytes + self.bitmap_size_bytes

    @property
    def table_size_bytes(self) -> int:
        return self.table_pages * PAGE_BYTES

    @property
    def data_offset_bytes(self) -> int:
        end_bytes = self.bitmap_offset_bytes + self.bitmap_size_bytes + self.table_size_bytes
        return ceil_div(end_bytes, DATA_ALIGNMENT_BYTES) * DATA_ALIGNMENT_BYTES

    @property
    def metadata_size_bytes(self) -> int:
        """Storage that a disk takes before its first slot."""
        return self.data_offset_bytes

    @property
    def max_storage_size_bytes(self) -> int:
        return self.data_offset_bytes + self.chunks * self.chunk_size_bytes

    def slots_in(self, storage_size_bytes: int) -> int:
        """Whole slots in storage of this size, never more than the disk has chunks."""
        return min(max(0, storage_size_bytes - self.data_offset_bytes) // self.chunk_size_bytes, self.chunks)

    def slot_offset_bytes(self, slot: int) -> int:
        return self.data_offset_bytes + slot * self.chunk_size_bytes
