# SPDX-License-Identifier: Apache-2.0
"""Kernels on memory, as Python sees them. Arrays are C-contiguous; a range or shape that does not fit raises ValueError.

Bit ranges are half-open: [first, end). A UUID is 16 bytes. Offsets and positions are byte offsets in the storage.
"""

from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

_Words = Buffer | npt.NDArray[np.uint64]
_Entries = Buffer | npt.NDArray[np.uint32]
_Raw = Buffer | npt.NDArray[np.uint8]
_Bytes = Buffer | npt.NDArray[np.uint8]
_Items = Buffer | npt.NDArray[Any]

ACCELERATED: bool
"""Whether crc32c uses the processor's instruction on this machine."""
CONSTANTS: dict[str, int]
"""The format's constants as the kernels were built with them."""
JOURNAL_HEADER_LAYOUT: dict[str, tuple[int, int]]
"""Field name -> (offset, size) of the kernels' struct JournalHeader."""
CELL_HEADER_LAYOUT: dict[str, tuple[int, int]]
"""Field name -> (offset, size) of the kernels' struct CellHeader."""

class Bug(IntEnum):
    """Seeded bugs (docs/internals/durability.md), which the checked build has."""

    JOURNAL_BEFORE_FLUSH = 1
    CHANGE_BEFORE_ITS_DATA = 2
    CHECKPOINT_OF_PENDING_VALUES = 3
    TAIL_BEFORE_CHECKPOINT_FLUSH = 4
    SLOT_FREED_BEFORE_COMMIT = 5
    SLOT_FREED_BESIDE_ITS_TRANSFERS = 6
    NO_PADDING = 7
    FLUSH_ANSWERED_BEFORE_JOURNAL = 8
    TWO_WRITERS_OF_A_BLOCK = 9
    FUA_WITHOUT_COMMIT = 10
    FAILURES_IGNORED = 11
    READ_BEYOND_THE_BASE = 12
    NEW_SLOT_WITHOUT_ZEROS = 13
    MODIFY_BESIDE_WRITES = 14
    TRIM_BESIDE_WRITES = 15
    JOURNAL_OVER_ITS_TAIL = 16
    JOURNAL_WRITE_NOT_DURABLE = 17
    PAGE_CHECKSUM_IGNORED = 18
    CELL_CHECKSUM_IGNORED = 19
    INDEX_IN_SECTORS = 20
    RECORDS_BEYOND_THE_PAGE = 21
    PAGE_NOT_CLEARED = 22
    MAP_WRITE_ERROR_IGNORED = 23
    COPY_LAZY_UNDER_A_WRITE = 24
    PROMOTED_WORD_WITHOUT_ENTRIES = 25
    LAZY_COUNTS_AS_COMMITTED = 26
    COPY_OVER_NEWER_DATA = 27
    COPY_INTO_A_DIRTY_SLOT = 28
    COPY_BEFORE_ITS_DATA = 29
    ENTRY_LAZY_UNDER_A_WRITE = 30
    NARROW_WRITE_BEFORE_ZEROING = 31
    ZEROED_AFTER_A_TRIM = 32
    ZEROED_AFTER_A_FAILED_WRITE = 33
    FAILED_ZEROING_BELIEVED = 34
    DISCARDS_WITHOUT_BOUND = 35
    SLOT_FREED_BEFORE_ITS_DISCARD = 36
    DISCARD_ACROSS_USED_SLOTS = 37
    DISCARD_OF_A_TAKEN_SLOT = 38
    COPIES_TAKE_THE_RESERVE = 39
    PAUSED_REQUEST_FORGOTTEN = 40
    DURABLE_END_WITHOUT_BARRIER = 41
    FAILED_DURABLE_WRITE_FORGIVEN = 42
    FAILED_DURABLE_JOB_FORGIVEN = 43
    BARRIER_ONE_TOO_EARLY = 44
    FAILURE_BESIDE_US_IGNORED = 45
    SAMPLER_NOT_ASKED = 46
    FUA_WITHOUT_FLUSH = 47
    COPY_NOT_LOGGED = 48
    ANSWER_BEFORE_LOG = 49
    LOG_CLEARED_BEFORE_COMMIT = 50
    LAST_RECORD_NOT_PUBLISHED = 51
    PROMOTED_NOT_LOGGED = 52
    SECOND_CHANGE_NOT_LOGGED = 53
    FULL_LOG_IGNORED = 54
    READ_AFTER_FAILURE = 55
    FLUSH_WAITS_FOR_DISCARDS = 56
    RESERVE_FORGOTTEN_WHEN_FULL = 57
    BASE_RELEASED_BEFORE_COMMIT = 58
    COMMITTING_ENTRY_COUNTS_AS_COMMITTED = 59
    RUNNING_BEFORE_COMMITTING = 60
    JOURNAL_WAITERS_FORGOTTEN = 61
    ONE_WORD_PROMOTED = 62
    TRIM_SHARES_ITS_CHUNK = 63
    FAILED_DISCARD_KEEPS_ITS_SLOT = 64
    ANSWERED_WHEN_STOPPED = 65
    HANDED_OUT_WHEN_STOPPED = 66
    STARVED_WRITE_NOT_TRIED = 67
    STARVED_WRITE_ANSWERED = 68
    ANSWER_BEFORE_LAST_PART = 69
    TAKEN_BEFORE_IN_FLIGHT = 70
    IN_FLIGHT_ENDED_BEFORE_USED = 71

def crc32c(data: _Raw, crc: int = 0) -> int:
    """CRC32C of bytes, continuing from `crc`: crc32c(b, crc32c(a)) == crc32c(a + b)."""

def crc32c_portable(data: _Raw, crc: int = 0) -> int:
    """As crc32c, without the processor's instruction: the fallback of other machines, callable everywhere for its tests."""

def checksum(uuid: bytes, position_bytes: int, data: _Raw, checksum_offset: int) -> int:
    """FORMAT.md section 3 of the structure in `data`, whose own 4-byte checksum field lies at `checksum_offset`."""

def bitmap_count(bitmap: _Words, first: int, end: int) -> int:
    """How many bits are 1."""

def bitmap_find(bitmap: _Words, first: int, end: int, value: bool) -> int:
    """The first bit that equals `value`, or `end`."""

def bitmap_find_last(bitmap: _Words, first: int, end: int, value: bool) -> int:
    """The last bit that equals `value`, or `end`."""

def bitmap_all(bitmap: _Words, first: int, end: int) -> bool:
    """Whether every bit is 1 (an empty range: True)."""

def bitmap_none(bitmap: _Words, first: int, end: int) -> bool:
    """Whether every bit is 0 (an empty range: True)."""

def bitmap_fill(bitmap: _Words, first: int, end: int, value: bool) -> None:
    """Set every bit to `value`."""

def bitmap_runs(bitmap: _Words, first: int, end: int, limit: int = 65536) -> tuple[npt.NDArray[np.uint64], bool]:
    """Runs of equal bits as ``(bounds, value)``: run i is [bounds[i], bounds[i + 1]) and has the value ``value ^ (i & 1)``.

    At most `limit` runs: where bounds[-1] < end, go on from there. An empty range has one bound and no run.
    """

class Lookup:
    """Where a disk's bytes are, asked one request at a time. Holds the maps' buffers, so that a call costs no buffer request;
    it sees later changes of the arrays."""

    def __init__(self, bitmap: _Words, table: _Entries | None, block_size_bytes: int, chunk_size_bytes: int) -> None:
        """`table` is None in the raw layout."""

    def find(self, offset_bytes: int, length_bytes: int) -> tuple[int, bool, int]:
        """``(run_bytes, present, slot)``: the first `run_bytes` (1 to `length_bytes`) of the range lie in one chunk and are all present or
        all absent; `slot` is the chunk's slot, or -1 where it is EMPTY. Ask again from offset + run_bytes for the rest.
        The end of the maps is known to a whole word of 64 blocks only."""

def cells_encode(kind: int, items: _Items, uuid: bytes, map_offset_bytes: int, first_page: int, page_count: int, out: _Bytes) -> None:
    """Seal pages [first_page, first_page + page_count) of a map into `out` (page_count * 4096 bytes).

    `items` is the whole map: uint64 words for kind 1, uint32 entries for kind 2. Cells past its end get initial content.
    """

def cells_decode(kind: int, raw: _Raw, items_out: _Items, uuid: bytes, map_offset_bytes: int, first_page: int = 0) -> int:
    """Verify the whole pages in `raw`, which begin with page `first_page` of the map, and copy their items to their place in `items_out`.

    Returns the index of the first cell whose checksum, kind, reserved field, index or items past the map's end are wrong, or -1.
    """

def map_hash(uuid: bytes, bitmap: _Words, table: _Entries | None) -> int:
    """FORMAT.md section 7 over whole maps; `table` is None in the raw layout."""

def table_slots(table: _Entries, limit_slots: int, used_out: _Words) -> int:
    """Set the bit of every slot in use in `used_out`, which the caller zeroed.

    Returns the index of the first chunk whose slot is used twice or not below `limit_slots`, or -1.
    """

def mapped_chunks(bitmap: _Words, table: _Entries | None, blocks_per_chunk: int, blocks: int) -> int:
    """How many chunks have a slot; without a table, how many have a present block."""

def empty_chunk_with_bits(bitmap: _Words, table: _Entries, blocks_per_chunk: int, blocks: int) -> int:
    """Index of the first EMPTY chunk that has a 1-bit below bit `blocks`, or -1."""

def journal_scan(ring: _Raw, uuid: bytes, journal_offset_bytes: int, headers_out: _Bytes) -> int:
    """Copy the header of every valid page to its row of `headers_out` (pages x 64), zeros for the others. Returns how many are valid.

    No valid page has sequence 0.
    """

def journal_apply(
    ring: _Raw, positions: _Words, bitmap: _Words, table: _Entries | None, dirty_bitmap_pages: _Bytes, dirty_table_pages: _Bytes
) -> int:
    """Apply the records of the pages at these ring positions, in order, and set the byte of every map page that they touch.

    Returns -1, or the index in `positions` of the first page that names a word or entry outside the maps; neither it nor the
    pages after it are applied. Trusts the headers only as far as bounds: scan the ring first.
    """

def journal_parts(words: int, entries: int) -> int:
    """Pages that a commit of so many records takes (at least one)."""

def journal_encode(
    words: _Bytes,
    entries: _Bytes,
    uuid: bytes,
    journal_offset_bytes: int,
    ring_pages: int,
    sequence: int,
    previous: int,
    tail: int,
    map_hash_after: int,
    flags: int,
    out: _Bytes,
) -> None:
    """Build the sealed pages of one commit into `out` (journal_parts * 4096 bytes): all word records (12 packed bytes each), then all
    entry records (8 packed bytes each)."""
