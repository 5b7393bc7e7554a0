# SPDX-License-Identifier: Apache-2.0
"""Kernels shared by the compiled layers: checksums, bit runs, map hash, cells, journal pages.

Pure memory: whole batches in and out, result codes instead of exceptions inside nogil code. Knows neither files nor time nor any other
module of the project; FORMAT.md is its specification. The Python entry points check every range before they touch a pointer, because a
release is built without bounds checks.
"""

import sys

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

include "_core.kernels.pxi"

cdef enum:
    JOURNAL_MAGIC = 0x4A445646          # "FVDJ", read as u32
    JOURNAL_HEADER_BYTES = 64
    JOURNAL_CHECKSUM_OFFSET = 4
    CELL_PAYLOAD_BYTES = 496
    UUID_BYTES = 16
    WORDS_PER_PAGE = 496                # CELLS_PER_PAGE * WORDS_PER_CELL
    ENTRIES_PER_PAGE = 992              # CELLS_PER_PAGE * ENTRIES_PER_CELL

cdef packed struct CellHeader:          # FORMAT.md section 5
    uint32_t cell_checksum
    uint16_t cell_kind
    uint16_t cell_reserved
    uint64_t cell_index

cdef uint8_t[CELL_PAYLOAD_BYTES] ZEROS
cdef uint8_t[CELL_PAYLOAD_BYTES] ONES


# Checksums.

cdef uint32_t crc32c(uint32_t crc, const void *data, size_t size) noexcept nogil:
    if fvd_crc_accelerated:
        return ~fvd_crc_x86(~crc, <const uint8_t *>data, size)
    return ~fvd_crc_portable(~crc, <const uint8_t *>data, size)


cdef uint32_t checksum(uint32_t uuid_crc, uint64_t position_bytes, const void *data, size_t size, size_t checksum_offset) noexcept nogil:
    cdef uint32_t zero = 0
    cdef const uint8_t *bytes_ = <const uint8_t *>data
    cdef uint32_t crc = crc32c(uuid_crc, &position_bytes, 8)
    if checksum_offset:
        crc = crc32c(crc, bytes_, checksum_offset)
    crc = crc32c(crc, &zero, 4)
    return crc32c(crc, bytes_ + checksum_offset + 4, size - checksum_offset - 4)


# Map hash.

cdef inline uint64_t mix(uint64_t x) noexcept nogil:
    x += 0x9E3779B97F4A7C15ULL
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ULL
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBULL
    return x ^ (x >> 31)


cdef uint64_t entry_hash(uint64_t seed, uint32_t kind, uint64_t index, uint64_t value) noexcept nogil:
    if value == (0 if kind == KIND_BITMAP else EMPTY):
        return 0
    return mix(mix(seed ^ (<uint64_t>kind << 56) ^ index) ^ value)


# Bit runs.

cdef bint bits_all(const uint64_t *words, uint64_t first, uint64_t end) noexcept nogil:
    return bits_find(words, first, end, False) == end


cdef bint bits_none(const uint64_t *words, uint64_t first, uint64_t end) noexcept nogil:
    return bits_find(words, first, end, True) == end


cdef uint64_t bits_find(const uint64_t *words, uint64_t first, uint64_t end, bint value) noexcept nogil:
    cdef uint64_t skipped = 0 if value else ALL_ONES
    cdef uint64_t index, end_index, word, bit
    if first >= end:
        return end
    index = first >> 6
    end_index = ((end - 1) >> 6) + 1
    word = (words[index] ^ skipped) & (ALL_ONES << (first & 63))
    if word == 0:
        index = fvd_skip_words(words, index + 1, end_index, skipped)
        if index >= end_index:
            return end
        word = words[index] ^ skipped
    bit = (index << 6) + <uint64_t>fvd_lowest_bit(word)
    return bit if bit < end else end


cdef uint64_t bits_find_last(const uint64_t *words, uint64_t first, uint64_t end, bint value) noexcept nogil:
    cdef uint64_t skipped = 0 if value else ALL_ONES
    cdef uint64_t index, word, bit
    if first >= end:
        return end
    index = (end - 1) >> 6
    word = (words[index] ^ skipped) & (ALL_ONES >> (63 - ((end - 1) & 63)))
    while word == 0:
        if index == first >> 6:
            return end
        index -= 1
        word = words[index] ^ skipped
    bit = (index << 6) + <uint64_t>fvd_highest_bit(word)
    return bit if bit >= first else end


cdef uint64_t bits_count(const uint64_t *words, uint64_t first, uint64_t end) noexcept nogil:
    cdef uint64_t index, last, first_mask, last_mask
    if first >= end:
        return 0
    index = first >> 6
    last = (end - 1) >> 6
    first_mask = ALL_ONES << (first & 63)
    last_mask = ALL_ONES >> (63 - ((end - 1) & 63))
    if index == last:
        return <uint64_t>fvd_popcount(words[index] & first_mask & last_mask)
    return (<uint64_t>fvd_popcount(words[index] & first_mask) + <uint64_t>fvd_popcount(words[last] & last_mask)
            + fvd_count_words(words + index + 1, last - index - 1))


cdef void bits_fill(uint64_t *words, uint64_t first, uint64_t end, bint value) noexcept nogil:
    cdef uint64_t index, last, first_mask, last_mask
    if first >= end:
        return
    index = first >> 6
    last = (end - 1) >> 6
    first_mask = ALL_ONES << (first & 63)
    last_mask = ALL_ONES >> (63 - ((end - 1) & 63))
    if index == last:
        first_mask &= last_mask
    else:
        memset(words + index + 1, 0xFF if value else 0, <size_t>(last - index - 1) * 8)
        words[last] = words[last] | last_mask if value else words[last] & ~last_mask
    words[index] = words[index] | first_mask if value else words[index] & ~first_mask


# Cells and journal pages.

cdef inline uint32_t items_per_cell(uint32_t kind) noexcept nogil:
    return WORDS_PER_CELL if kind == KIND_BITMAP else ENTRIES_PER_CELL


cdef inline uint32_t item_bytes(uint32_t kind) noexcept nogil:
    return 8 if kind == KIND_BITMAP else 4


cdef inline uint32_t used_items(uint32_t kind, uint64_t cell_index, uint64_t item_count) noexcept nogil:
    """How many items of a map of `item_count` lie in this cell."""
    cdef uint32_t per_cell = items_per_cell(kind)
    cdef uint64_t first = cell_index * per_cell
    if first >= item_count:
        return 0
    return <uint32_t>(item_count - first) if item_count - first < per_cell else per_cell


cdef void cell_seal(uint8_t *cell, uint32_t uuid_crc, uint64_t position_bytes, uint32_t kind, uint64_t cell_index,
                    const void *items, uint32_t used) noexcept nogil:
    cdef CellHeader *header = <CellHeader *>cell
    cdef uint32_t used_bytes = used * item_bytes(kind)
    header.cell_kind = <uint16_t>kind
    header.cell_reserved = 0
    header.cell_index = cell_index
    if used_bytes:
        memcpy(cell + sizeof(CellHeader), items, used_bytes)
    memset(cell + sizeof(CellHeader) + used_bytes, 0 if kind == KIND_BITMAP else 0xFF, CELL_PAYLOAD_BYTES - used_bytes)
    header.cell_checksum = checksum(uuid_crc, position_bytes, cell, CELL_BYTES, 0)


cdef bint cell_valid(const uint8_t *cell, uint32_t uuid_crc, uint64_t position_bytes, uint32_t kind, uint64_t cell_index,
                     uint32_t used) noexcept nogil:
    cdef const CellHeader *header = <const CellHeader *>cell
    cdef uint32_t used_bytes = used * item_bytes(kind)
    if header.cell_kind != kind or header.cell_reserved != 0 or header.cell_index != cell_index:
        return False
    if header.cell_checksum != checksum(uuid_crc, position_bytes, cell, CELL_BYTES, 0) and not BUG(Bug.CELL_CHECKSUM_IGNORED):
        return False
    return memcmp(cell + sizeof(CellHeader) + used_bytes, &ZEROS[0] if kind == KIND_BITMAP else &ONES[0],
                  CELL_PAYLOAD_BYTES - used_bytes) == 0


include "_core.journal.pxi"


# Entry points for Python. `crc32c` and `checksum` are named in the .pxd for C callers, so their Python faces are bound at the end.

cdef inline uint32_t uuid_crc_of(const uint8_t[::1] uuid) except? 0:
    if uuid.shape[0] != UUID_BYTES:
        raise ValueError(f"a UUID has {UUID_BYTES} bytes, not {uuid.shape[0]}")
    return crc32c(0, &uuid[0], UUID_BYTES)


cdef inline int check_range(const uint64_t[::1] bitmap, uint64_t first, uint64_t end) except -1:
    if first > end or end > <uint64_t>bitmap.shape[0] * 64:
        raise ValueError(f"bits [{first}, {end}) are not inside a bitmap of {bitmap.shape[0]} words")
    return 0


cdef inline int check_kind(uint32_t kind) except -1:
    if kind != KIND_BITMAP and kind != KIND_TABLE:
        raise ValueError(f"map kind {kind} does not exist")
    return 0


def _crc32c(const uint8_t[::1] data not None, uint32_t crc=0):
    cdef uint32_t result = crc
    if data.shape[0]:
        with nogil:
            result = crc32c(crc, &data[0], <size_t>data.shape[0])
    return result


def crc32c_portable(const uint8_t[::1] data not None, uint32_t crc=0):
    cdef uint32_t result = crc
    if data.shape[0]:
        with nogil:
            result = ~fvd_crc_portable(~crc, &data[0], <size_t>data.shape[0])
    return result


def _checksum(const uint8_t[::1] uuid not None, uint64_t position_bytes, const uint8_t[::1] data not None, size_t checksum_offset):
    cdef uint32_t result
    cdef uint32_t uuid_crc = uuid_crc_of(uuid)
    cdef size_t size = <size_t>data.shape[0]
    if size < 4 or checksum_offset > size - 4:
        raise ValueError(f"no checksum field at {checksum_offset} of {size} bytes")
    with nogil:
        result = checksum(uuid_crc, position_bytes, &data[0], size, checksum_offset)
    return result


def bitmap_count(const uint64_t[::1] bitmap not None, uint64_t first, uint64_t end):
    cdef uint64_t result = 0
    check_range(bitmap, first, end)
    if first < end:
        with nogil:
            result = bits_count(&bitmap[0], first, end)
    return result


def bitmap_find(const uint64_t[::1] bitmap not None, uint64_t first, uint64_t end, bint value):
    cdef uint64_t result = end
    check_range(bitmap, first, end)
    if first < end:
        with nogil:
            result = bits_find(&bitmap[0], first, end, value)
    return result


def bitmap_find_last(const uint64_t[::1] bitmap not None, uint64_t first, uint64_t end, bint value):
    cdef uint64_t result = end
    check_range(bitmap, first, end)
    if first < end:
        with nogil:
            result = bits_find_last(&bitmap[0], first, end, value)
    return result


def bitmap_all(const uint64_t[::1] bitmap not None, uint64_t first, uint64_t end):
    cdef bint result = True
    check_range(bitmap, first, end)
    if first < end:
        with nogil:
            result = bits_all(&bitmap[0], first, end)
    return result


def bitmap_none(const uint64_t[::1] bitmap not None, uint64_t first, uint64_t end):
    cdef bint result = True
    check_range(bitmap, first, end)
    if first < end:
        with nogil:
            result = bits_none(&bitmap[0], first, end)
    return result


def bitmap_fill(uint64_t[::1] bitmap not None, uint64_t first, uint64_t end, bint value):
    check_range(bitmap, first, end)
    if first < end:
        with nogil:
            bits_fill(&bitmap[0], first, end, value)


cdef uint64_t find_runs(const uint64_t *words, uint64_t first, uint64_t end, uint64_t limit, uint64_t *bounds) noexcept nogil:
    """Fills bounds[0..n] and returns n, at most `limit` (>= 1); needs first < end."""
    cdef uint64_t index = first >> 6
    cdef uint64_t end_index = ((end - 1) >> 6) + 1
    cdef uint64_t last_value = (words[index] >> (first & 63)) & 1
    cdef uint64_t changes = (words[index] ^ ((words[index] << 1) | last_value)) & (ALL_ONES << (first & 63))
    cdef uint64_t count = 0
    cdef uint64_t bit
    if first & 63:
        # The shift brought in the bit before `first`, which does not count as a change.
        changes &= ~(<uint64_t>1 << (first & 63))
    bounds[0] = first
    while True:
        while changes:
            bit = (index << 6) + <uint64_t>fvd_lowest_bit(changes)
            if bit >= end:
                break
            count += 1
            bounds[count] = bit
            if count == limit:
                return count
            changes &= changes - 1
        last_value = words[index] >> 63
        index = fvd_skip_words(words, index + 1, end_index, ALL_ONES if last_value else 0)
        if index >= end_index:
            break
        changes = words[index] ^ ((words[index] << 1) | last_value)
    count += 1
    bounds[count] = end
    return count


def bitmap_runs(const uint64_t[::1] bitmap not None, uint64_t first, uint64_t end, uint64_t limit=65536):
    cdef uint64_t count
    cdef uint64_t[::1] bounds
    import numpy as np  # here, for a server that is idle must not hold it
    check_range(bitmap, first, end)
    if limit < 1:
        raise ValueError("limit must be at least 1")
    if first == end:
        return np.array([first], np.uint64), False
    edges = np.empty(min(limit, end - first) + 1, np.uint64)
    bounds = edges
    with nogil:
        count = find_runs(&bitmap[0], first, end, limit, &bounds[0])
    return edges[:count + 1].copy(), bool(bit_get(&bitmap[0], first))


cdef class Lookup:
    """Where a disk's bytes are, asked one request at a time. Holds the maps' buffers, so that a call costs no buffer request."""

    cdef const uint64_t[::1] bitmap
    cdef const uint32_t[::1] table
    cdef uint64_t block_size_bytes
    cdef uint64_t chunk_size_bytes

    def __init__(self, const uint64_t[::1] bitmap not None, const uint32_t[::1] table, uint64_t block_size_bytes,
                 uint64_t chunk_size_bytes):
        if (block_size_bytes == 0 or chunk_size_bytes < block_size_bytes or block_size_bytes & (block_size_bytes - 1)
                or chunk_size_bytes & (chunk_size_bytes - 1)):
            raise ValueError("block and chunk size must be powers of two, the chunk no smaller than the block")
        self.bitmap = bitmap
        self.table = table
        self.block_size_bytes = block_size_bytes
        self.chunk_size_bytes = chunk_size_bytes

    def find(self, uint64_t offset_bytes, uint64_t length_bytes):
        # Keeps the GIL: giving it up costs as much as the whole lookup, and a chunk bounds the walk.
        cdef uint64_t chunk, end_bytes, end_block, run_end_block, run_end_bytes
        cdef bint present
        if self.bitmap is None or length_bytes == 0 or offset_bytes + length_bytes < offset_bytes:
            raise ValueError("an empty or overflowing range")
        chunk = offset_bytes / self.chunk_size_bytes
        end_bytes = offset_bytes + length_bytes
        if (end_bytes - 1) / self.chunk_size_bytes != chunk:
            end_bytes = (chunk + 1) * self.chunk_size_bytes
        end_block = (end_bytes - 1) / self.block_size_bytes + 1
        if end_block > <uint64_t>self.bitmap.shape[0] * 64 or (self.table is not None and chunk >= <uint64_t>self.table.shape[0]):
            raise ValueError(f"bytes [{offset_bytes}, {offset_bytes + length_bytes}) are past the end of the maps")
        present = bit_get(&self.bitmap[0], offset_bytes / self.block_size_bytes)
        run_end_block = bits_find(&self.bitmap[0], offset_bytes / self.block_size_bytes, end_block, not present)
        run_end_bytes = min(run_end_block * self.block_size_bytes, end_bytes)
        if self.table is None:
            return run_end_bytes - offset_bytes, present, chunk
        return run_end_bytes - offset_bytes, present, (-1 if self.table[chunk] == EMPTY else self.table[chunk])


cdef int encode_cells(uint32_t kind, const uint8_t *items, uint64_t item_count, uint32_t uuid_crc, uint64_t map_offset_bytes,
                      uint64_t first_cell, uint64_t cell_count, uint8_t *out) noexcept nogil:
    cdef uint64_t i, cell_index
    cdef uint32_t used
    cdef const uint8_t *source
    for i in range(cell_count):
        cell_index = first_cell + i
        used = used_items(kind, cell_index, item_count)
        source = items + cell_index * items_per_cell(kind) * item_bytes(kind) if used else NULL
        cell_seal(out + i * CELL_BYTES, uuid_crc, map_offset_bytes + cell_index * CELL_BYTES, kind, cell_index, source, used)
    return 0


cdef int64_t decode_cells(uint32_t kind, const uint8_t *raw, uint64_t cell_count, uint8_t *items, uint64_t item_count,
                          uint32_t uuid_crc, uint64_t map_offset_bytes, uint64_t first_cell) noexcept nogil:
    """The index of the first bad cell, or -1. Cells before it are in `items`."""
    cdef uint64_t i, cell_index
    cdef uint32_t used
    cdef const uint8_t *cell
    for i in range(cell_count):
        cell = raw + i * CELL_BYTES
        cell_index = first_cell + i
        used = used_items(kind, cell_index, item_count)
        if not cell_valid(cell, uuid_crc, map_offset_bytes + cell_index * CELL_BYTES, kind, cell_index, used):
            return <int64_t>cell_index
        if used:
            memcpy(items + cell_index * items_per_cell(kind) * item_bytes(kind), cell + sizeof(CellHeader), used * item_bytes(kind))
    return -1


def cells_encode(uint32_t kind, items not None, const uint8_t[::1] uuid not None, uint64_t map_offset_bytes, uint64_t first_page,
                 uint64_t page_count, uint8_t[::1] out not None):
    cdef const uint64_t[::1] words
    cdef const uint32_t[::1] entries
    cdef const uint8_t *source = NULL
    cdef uint64_t item_count
    cdef uint32_t uuid_crc = uuid_crc_of(uuid)
    check_kind(kind)
    if <uint64_t>out.shape[0] != page_count * PAGE_BYTES or first_page >= <uint64_t>1 << 40 or page_count >= <uint64_t>1 << 40:
        raise ValueError(f"{page_count} pages need {page_count * PAGE_BYTES} bytes, not {out.shape[0]}")
    if kind == KIND_BITMAP:
        words = items
        item_count = <uint64_t>words.shape[0]
        if item_count:
            source = <const uint8_t *>&words[0]
    else:
        entries = items
        item_count = <uint64_t>entries.shape[0]
        if item_count:
            source = <const uint8_t *>&entries[0]
    if page_count:
        with nogil:
            encode_cells(kind, source, item_count, uuid_crc, map_offset_bytes, first_page * CELLS_PER_PAGE, page_count * CELLS_PER_PAGE,
                         &out[0])


def cells_decode(uint32_t kind, const uint8_t[::1] raw not None, items_out not None, const uint8_t[::1] uuid not None,
                 uint64_t map_offset_bytes, uint64_t first_page=0):
    cdef uint64_t[::1] words
    cdef uint32_t[::1] entries
    cdef uint8_t *target = NULL
    cdef uint64_t item_count
    cdef int64_t result = -1
    cdef uint32_t uuid_crc = uuid_crc_of(uuid)
    check_kind(kind)
    if raw.shape[0] % PAGE_BYTES or first_page >= <uint64_t>1 << 40:
        raise ValueError(f"{raw.shape[0]} bytes are not whole pages of a map")
    if kind == KIND_BITMAP:
        words = items_out
        item_count = <uint64_t>words.shape[0]
        if item_count:
            target = <uint8_t *>&words[0]
    else:
        entries = items_out
        item_count = <uint64_t>entries.shape[0]
        if item_count:
            target = <uint8_t *>&entries[0]
    if raw.shape[0]:
        with nogil:
            result = decode_cells(kind, &raw[0], <uint64_t>raw.shape[0] / CELL_BYTES, target, item_count, uuid_crc, map_offset_bytes,
                                  first_page * CELLS_PER_PAGE)
    return result


def map_hash(const uint8_t[::1] uuid not None, const uint64_t[::1] bitmap not None, const uint32_t[::1] table):
    cdef uint64_t seed
    cdef uint64_t result = 0
    cdef uint64_t i
    cdef uint64_t words = <uint64_t>bitmap.shape[0]
    cdef uint64_t entries = 0 if table is None else <uint64_t>table.shape[0]
    uuid_crc_of(uuid)
    memcpy(&seed, &uuid[0], 8)
    with nogil:
        for i in range(words):
            result ^= entry_hash(seed, KIND_BITMAP, i, bitmap[i])
        for i in range(entries):
            result ^= entry_hash(seed, KIND_TABLE, i, table[i])
    return result


def table_slots(const uint32_t[::1] table not None, uint64_t limit_slots, uint64_t[::1] used_out not None):
    cdef uint64_t i
    cdef uint64_t entries = <uint64_t>table.shape[0]
    cdef uint32_t slot
    cdef int64_t result = -1
    if limit_slots > <uint64_t>used_out.shape[0] * 64:
        raise ValueError(f"{limit_slots} slots do not fit in {used_out.shape[0]} words")
    with nogil:
        for i in range(entries):
            slot = table[i]
            if slot == EMPTY:
                continue
            if slot >= limit_slots or (used_out[slot >> 6] >> (slot & 63)) & 1:
                result = <int64_t>i
                break
            used_out[slot >> 6] |= <uint64_t>1 << (slot & 63)
    return result


def mapped_chunks(const uint64_t[::1] bitmap not None, const uint32_t[::1] table, uint64_t blocks_per_chunk, uint64_t blocks):
    cdef uint64_t count = 0
    cdef uint64_t first
    cdef Py_ssize_t i
    if table is not None:
        for i in range(table.shape[0]):
            count += table[i] != EMPTY
        return count
    check_range(bitmap, 0, blocks)
    if blocks_per_chunk == 0:
        raise ValueError("a chunk has at least one block")
    for first in range(0, blocks, blocks_per_chunk):
        count += bits_count(&bitmap[0], first, min(first + blocks_per_chunk, blocks)) != 0
    return count


def empty_chunk_with_bits(const uint64_t[::1] bitmap not None, const uint32_t[::1] table not None, uint64_t blocks_per_chunk,
                          uint64_t blocks):
    cdef uint64_t chunk, bit = 0
    cdef uint64_t entries = <uint64_t>table.shape[0]
    cdef int64_t result = -1
    if blocks > <uint64_t>bitmap.shape[0] * 64 or blocks_per_chunk == 0 or blocks_per_chunk > <uint64_t>1 << 32:
        raise ValueError(f"{blocks} blocks do not fit in {bitmap.shape[0]} words")
    if blocks == 0:
        return result
    with nogil:
        # From 1-bit to 1-bit: a disk that is mostly empty is mostly skipped, a word at a time.
        while True:
            bit = bits_find(&bitmap[0], bit, blocks, True)
            chunk = bit / blocks_per_chunk
            if bit >= blocks or chunk >= entries:
                break
            if table[chunk] == EMPTY:
                result = <int64_t>chunk
                break
            bit = (chunk + 1) * blocks_per_chunk
            if bit >= blocks:
                break
    return result


cdef dict cell_header_layout():
    cdef CellHeader header
    cdef char *base = <char *>&header
    return {
        "cell_checksum": (<char *>&header.cell_checksum - base, sizeof(header.cell_checksum)),
        "cell_kind": (<char *>&header.cell_kind - base, sizeof(header.cell_kind)),
        "cell_reserved": (<char *>&header.cell_reserved - base, sizeof(header.cell_reserved)),
        "cell_index": (<char *>&header.cell_index - base, sizeof(header.cell_index)),
    }


if sys.byteorder != "little":
    raise ImportError("fvd reads its little-endian structures in place and runs on little-endian machines only")
if sizeof(JournalHeader) != JOURNAL_HEADER_BYTES or JOURNAL_HEADER_BYTES + JOURNAL_RECORDS_BYTES != PAGE_BYTES:
    raise ImportError("struct JournalHeader is not the page header of FORMAT.md")
if sizeof(CellHeader) + CELL_PAYLOAD_BYTES != CELL_BYTES:
    raise ImportError("struct CellHeader is not the cell header of FORMAT.md")

fvd_kernels_init()
memset(ZEROS, 0, sizeof(ZEROS))
memset(ONES, 0xFF, sizeof(ONES))

# What fvd.format compares its dtypes with: field name -> (offset, size).
JOURNAL_HEADER_LAYOUT = journal_header_layout()
CELL_HEADER_LAYOUT = cell_header_layout()
CONSTANTS = {
    "PAGE_BYTES": PAGE_BYTES,
    "CELL_BYTES": CELL_BYTES,
    "CELLS_PER_PAGE": CELLS_PER_PAGE,
    "WORDS_PER_CELL": WORDS_PER_CELL,
    "ENTRIES_PER_CELL": ENTRIES_PER_CELL,
    "KIND_BITMAP": KIND_BITMAP,
    "KIND_TABLE": KIND_TABLE,
    "JOURNAL_MAGIC": JOURNAL_MAGIC,
    "JOURNAL_HEADER_BYTES": JOURNAL_HEADER_BYTES,
    "JOURNAL_RECORDS_BYTES": JOURNAL_RECORDS_BYTES,
    "WORD_RECORD_BYTES": WORD_RECORD_BYTES,
    "ENTRY_RECORD_BYTES": ENTRY_RECORD_BYTES,
    "JOURNAL_FLAG_CLEAN": JOURNAL_FLAG_CLEAN,
    "EMPTY": EMPTY,
}
ACCELERATED = bool(fvd_crc_accelerated)

_crc32c.__name__ = _crc32c.__qualname__ = "crc32c"
_checksum.__name__ = _checksum.__qualname__ = "checksum"
globals().update(crc32c=_crc32c, checksum=_checksum)
