# SPDX-License-Identifier: Apache-2.0
"""Kernels shared by the compiled layers: checksums, bit runs, map hash, cells, journal pages.

Pure memory: whole batches in and out, result codes instead of exceptions inside nogil code. Knows neither files nor time nor any other
module of the project; FORMAT.md is its specification. The Python entry points check every range before they touch a pointer, because a
release is built without bounds checks.
"""

import sys

import numpy as np

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

cdef extern from *:
    """
    #include <stddef.h>
    #include <stdint.h>
    #include <string.h>
    #if defined(__x86_64__) && defined(__GNUC__)
    #include <immintrin.h>
    #define FVD_X86 1
    #else
    #define FVD_X86 0
    #endif

    #define FVD_CRC_POLYNOMIAL 0x82F63B78u   /* Castagnoli, reflected */

    /* Bytes of one of three interleaved streams: the CRC instruction takes three cycles but starts every cycle. 3 * 1360 + 8 = 4088 is a
       page after its 8 bytes of magic and checksum; 3 * 160 + 8 = 488 is most of a cell. */
    #define FVD_LONG_STREAM 1360
    #define FVD_SHORT_STREAM 160

    static uint32_t fvd_crc_table[8][256];
    static uint64_t fvd_crc_long[2], fvd_crc_short[2];
    static int fvd_crc_accelerated, fvd_popcnt_accelerated;

    static uint64_t fvd_load64(const uint8_t *p) { uint64_t v; memcpy(&v, p, 8); return v; }

    /* x^n modulo the polynomial, reflected. */
    static uint32_t fvd_crc_power(unsigned n) {
        uint32_t v = 0x80000000u;
        while (n--) v = (v >> 1) ^ ((v & 1) ? FVD_CRC_POLYNOMIAL : 0);
        return v;
    }

    static void fvd_kernels_init(void) {
        for (int i = 0; i < 256; i++) {
            uint32_t v = (uint32_t)i;
            for (int bit = 0; bit < 8; bit++) v = (v >> 1) ^ ((v & 1) ? FVD_CRC_POLYNOMIAL : 0);
            fvd_crc_table[0][i] = v;
        }
        for (int k = 1; k < 8; k++)
            for (int i = 0; i < 256; i++) {
                uint32_t v = fvd_crc_table[k - 1][i];
                fvd_crc_table[k][i] = (v >> 8) ^ fvd_crc_table[0][v & 255];
            }
        /* To move a CRC past n bytes is to multiply it by x^(8n); a reflected carry-less product is one bit short, and reducing it by the
           CRC instruction multiplies by x^32 more: hence 8n - 33. The 8 is the word that the product is XORed into. */
        fvd_crc_long[0] = fvd_crc_power((2 * FVD_LONG_STREAM + 8) * 8 - 33);
        fvd_crc_long[1] = fvd_crc_power((FVD_LONG_STREAM + 8) * 8 - 33);
        fvd_crc_short[0] = fvd_crc_power((2 * FVD_SHORT_STREAM + 8) * 8 - 33);
        fvd_crc_short[1] = fvd_crc_power((FVD_SHORT_STREAM + 8) * 8 - 33);
    #if FVD_X86
        __builtin_cpu_init();
        fvd_crc_accelerated = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("pclmul");
        fvd_popcnt_accelerated = __builtin_cpu_supports("popcnt") != 0;
    #endif
    }

    /* Both CRC kernels work on the inverted register; the caller inverts. */
    static uint32_t fvd_crc_portable(uint32_t state, const uint8_t *p, size_t n) {
        for (; n >= 8; n -= 8, p += 8) {
            uint64_t v = fvd_load64(p) ^ state;
            state = fvd_crc_table[7][v & 255] ^ fvd_crc_table[6][(v >> 8) & 255] ^ fvd_crc_table[5][(v >> 16) & 255]
                  ^ fvd_crc_table[4][(v >> 24) & 255] ^ fvd_crc_table[3][(v >> 32) & 255] ^ fvd_crc_table[2][(v >> 40) & 255]
                  ^ fvd_crc_table[1][(v >> 48) & 255] ^ fvd_crc_table[0][v >> 56];
        }
        while (n--) state = (state >> 8) ^ fvd_crc_table[0][(state ^ *p++) & 255];
        return state;
    }

    #if FVD_X86
    __attribute__((target("sse4.2,pclmul"), always_inline))
    static inline uint64_t fvd_crc_streams(uint64_t a, const uint8_t *p, size_t stream, const uint64_t *shift) {
        uint64_t b = 0, c = 0;
        for (size_t i = 0; i < stream; i += 8) {
            a = _mm_crc32_u64(a, fvd_load64(p + i));
            b = _mm_crc32_u64(b, fvd_load64(p + stream + i));
            c = _mm_crc32_u64(c, fvd_load64(p + 2 * stream + i));
        }
        __m128i moved = _mm_xor_si128(
            _mm_clmulepi64_si128(_mm_cvtsi64_si128((long long)a), _mm_cvtsi64_si128((long long)shift[0]), 0),
            _mm_clmulepi64_si128(_mm_cvtsi64_si128((long long)b), _mm_cvtsi64_si128((long long)shift[1]), 0));
        return _mm_crc32_u64(c, fvd_load64(p + 3 * stream) ^ (uint64_t)_mm_cvtsi128_si64(moved));
    }

    __attribute__((target("sse4.2,pclmul")))
    static uint32_t fvd_crc_x86(uint32_t state, const uint8_t *p, size_t n) {
        uint64_t a = state;
        for (; n >= 3 * FVD_LONG_STREAM + 8; n -= 3 * FVD_LONG_STREAM + 8, p += 3 * FVD_LONG_STREAM + 8)
            a = fvd_crc_streams(a, p, FVD_LONG_STREAM, fvd_crc_long);
        for (; n >= 3 * FVD_SHORT_STREAM + 8; n -= 3 * FVD_SHORT_STREAM + 8, p += 3 * FVD_SHORT_STREAM + 8)
            a = fvd_crc_streams(a, p, FVD_SHORT_STREAM, fvd_crc_short);
        for (; n >= 8; n -= 8, p += 8) a = _mm_crc32_u64(a, fvd_load64(p));
        while (n--) a = _mm_crc32_u8((uint32_t)a, *p++);
        return (uint32_t)a;
    }

    __attribute__((target("popcnt")))
    static uint64_t fvd_count_popcnt(const uint64_t *w, size_t n) {
        uint64_t a = 0, b = 0, c = 0, d = 0;
        for (; n >= 4; n -= 4, w += 4) {
            a += (uint64_t)__builtin_popcountll(w[0]);
            b += (uint64_t)__builtin_popcountll(w[1]);
            c += (uint64_t)__builtin_popcountll(w[2]);
            d += (uint64_t)__builtin_popcountll(w[3]);
        }
        while (n--) a += (uint64_t)__builtin_popcountll(*w++);
        return a + b + c + d;
    }
    #else
    static uint32_t fvd_crc_x86(uint32_t state, const uint8_t *p, size_t n) { return fvd_crc_portable(state, p, n); }
    #endif

    static uint64_t fvd_count_words(const uint64_t *w, size_t n) {
    #if FVD_X86
        if (fvd_popcnt_accelerated) return fvd_count_popcnt(w, n);
    #endif
        uint64_t total = 0;
        while (n--) total += (uint64_t)__builtin_popcountll(*w++);
        return total;
    }

    /* First index in [i, n) whose word is not `pattern`, or n. Eight words at a time, so that the compiler uses vectors. */
    static size_t fvd_skip_words(const uint64_t *w, size_t i, size_t n, uint64_t pattern) {
        for (; i + 8 <= n; i += 8) {
            uint64_t different = 0;
            for (int k = 0; k < 8; k++) different |= w[i + k] ^ pattern;
            if (different) break;
        }
        while (i < n && w[i] == pattern) i++;
        return i;
    }

    #define FVD_ALL_ONES UINT64_C(0xFFFFFFFFFFFFFFFF)
    static int fvd_lowest_bit(uint64_t v) { return __builtin_ctzll(v); }
    static int fvd_highest_bit(uint64_t v) { return 63 - __builtin_clzll(v); }
    static int fvd_popcount(uint64_t v) { return __builtin_popcountll(v); }
    """
    const uint64_t ALL_ONES "FVD_ALL_ONES"
    int fvd_crc_accelerated
    void fvd_kernels_init() noexcept nogil
    uint32_t fvd_crc_portable(uint32_t state, const uint8_t *p, size_t n) noexcept nogil
    uint32_t fvd_crc_x86(uint32_t state, const uint8_t *p, size_t n) noexcept nogil
    uint64_t fvd_count_words(const uint64_t *w, size_t n) noexcept nogil
    size_t fvd_skip_words(const uint64_t *w, size_t i, size_t n, uint64_t pattern) noexcept nogil
    int fvd_lowest_bit(uint64_t v) noexcept nogil
    int fvd_highest_bit(uint64_t v) noexcept nogil
    int fvd_popcount(uint64_t v) noexcept nogil

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


cdef void journal_seal(uint8_t *page, uint32_t uuid_crc, uint64_t position_bytes) noexcept nogil:
    cdef JournalHeader *header = <JournalHeader *>page
    header.page_magic = JOURNAL_MAGIC
    header.page_checksum = checksum(uuid_crc, position_bytes, page, PAGE_BYTES, JOURNAL_CHECKSUM_OFFSET)


cdef inline uint64_t records_capacity(uint64_t position, uint64_t ring_pages) noexcept nogil:
    """Bytes that the records of the page at this ring position may take."""
    return (ring_pages - position) * PAGE_BYTES - JOURNAL_HEADER_BYTES if BUG(Bug.RECORDS_BEYOND_THE_PAGE) else JOURNAL_RECORDS_BYTES


cdef inline bint records_fit(const JournalHeader *header, uint64_t room_bytes) noexcept nogil:
    return <uint64_t>header.word_count * WORD_RECORD_BYTES + <uint64_t>header.entry_count * ENTRY_RECORD_BYTES <= room_bytes


cdef bint journal_page_valid(const uint8_t *page, uint32_t uuid_crc, uint64_t journal_offset_bytes, uint64_t position,
                             uint64_t ring_pages) noexcept nogil:
    cdef const JournalHeader *header = <const JournalHeader *>page
    if header.page_magic != JOURNAL_MAGIC or header.sequence % ring_pages != position:
        return False
    if header.part >= header.parts or header.sequence <= header.part:
        return False
    if not records_fit(header, records_capacity(position, ring_pages)):
        return False
    return BUG(Bug.PAGE_CHECKSUM_IGNORED) or header.page_checksum == checksum(
        uuid_crc, journal_offset_bytes + position * PAGE_BYTES, page, PAGE_BYTES, JOURNAL_CHECKSUM_OFFSET)


cdef inline uint32_t record_index(const uint8_t *record) noexcept nogil:
    cdef uint32_t index
    memcpy(&index, record, 4)
    return index


cdef bint journal_page_in_range(const uint8_t *page, uint64_t room_bytes, uint64_t words, uint64_t entries) noexcept nogil:
    cdef const JournalHeader *header = <const JournalHeader *>page
    cdef const uint8_t *record = page + JOURNAL_HEADER_BYTES
    cdef uint32_t _i
    if not records_fit(header, room_bytes):
        return False
    for _i in range(header.word_count):
        if record_index(record) >= words:
            return False
        record += WORD_RECORD_BYTES
    for _i in range(header.entry_count):
        if record_index(record) >= entries:
            return False
        record += ENTRY_RECORD_BYTES
    return True


cdef void journal_page_apply(const uint8_t *page, uint64_t *words, uint32_t *entries, uint8_t *dirty_words,
                             uint8_t *dirty_entries) noexcept nogil:
    """The caller has checked the page with journal_page_in_range."""
    cdef const JournalHeader *header = <const JournalHeader *>page
    cdef const uint8_t *record = page + JOURNAL_HEADER_BYTES
    cdef uint32_t _i, index
    for _i in range(header.word_count):
        index = record_index(record)
        memcpy(&words[index], record + 4, 8)
        dirty_words[index / WORDS_PER_PAGE] = 1
        record += WORD_RECORD_BYTES
    for _i in range(header.entry_count):
        index = record_index(record)
        memcpy(&entries[index], record + 4, 4)
        dirty_entries[index / ENTRIES_PER_PAGE] = 1
        record += ENTRY_RECORD_BYTES


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
    """As crc32c, without the processor's instruction: the fallback of other machines, callable everywhere for its tests."""
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
    """How many bits of [first, end) are 1."""
    cdef uint64_t result = 0
    check_range(bitmap, first, end)
    if first < end:
        with nogil:
            result = bits_count(&bitmap[0], first, end)
    return result


def bitmap_find(const uint64_t[::1] bitmap not None, uint64_t first, uint64_t end, bint value):
    """The first bit of [first, end) that equals `value`, or `end`."""
    cdef uint64_t result = end
    check_range(bitmap, first, end)
    if first < end:
        with nogil:
            result = bits_find(&bitmap[0], first, end, value)
    return result


def bitmap_find_last(const uint64_t[::1] bitmap not None, uint64_t first, uint64_t end, bint value):
    """The last bit of [first, end) that equals `value`, or `end`."""
    cdef uint64_t result = end
    check_range(bitmap, first, end)
    if first < end:
        with nogil:
            result = bits_find_last(&bitmap[0], first, end, value)
    return result


def bitmap_all(const uint64_t[::1] bitmap not None, uint64_t first, uint64_t end):
    """Whether every bit of [first, end) is 1 (an empty range: True)."""
    cdef bint result = True
    check_range(bitmap, first, end)
    if first < end:
        with nogil:
            result = bits_all(&bitmap[0], first, end)
    return result


def bitmap_none(const uint64_t[::1] bitmap not None, uint64_t first, uint64_t end):
    """Whether every bit of [first, end) is 0 (an empty range: True)."""
    cdef bint result = True
    check_range(bitmap, first, end)
    if first < end:
        with nogil:
            result = bits_none(&bitmap[0], first, end)
    return result


def bitmap_fill(uint64_t[::1] bitmap not None, uint64_t first, uint64_t end, bint value):
    """Set every bit of [first, end) to `value`."""
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
    """Runs of equal bits: ``(bounds, value)``, where run i is [bounds[i], bounds[i + 1]) and has the value ``value ^ (i & 1)``."""
    cdef uint64_t count
    cdef uint64_t[::1] bounds
    check_range(bitmap, first, end)
    if limit < 1:
        raise ValueError("limit must be at least 1")
    if first == end:
        return np.array([first], np.uint64), False
    found = np.empty(min(limit, end - first) + 1, np.uint64)
    bounds = found
    with nogil:
        count = find_runs(&bitmap[0], first, end, limit, &bounds[0])
    return found[:count + 1].copy(), bool(bit_get(&bitmap[0], first))


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
        """Where the beginning of a byte range is: ``(run_bytes, present, slot)``."""
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
    """Seal pages [first_page, first_page + page_count) of a map into `out`."""
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
    """Verify the pages in `raw`, from page `first_page` of the map on, and copy their items: index of the first bad cell, or -1."""
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
    """Section 7 of FORMAT.md over whole maps; `table` is None in the raw layout."""
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
    """Set the bit of every slot in use: index of the first chunk with a slot used twice or not below `limit_slots`, or -1."""
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


def empty_chunk_with_bits(const uint64_t[::1] bitmap not None, const uint32_t[::1] table not None, uint64_t blocks_per_chunk,
                          uint64_t blocks):
    """Index of the first EMPTY chunk that has a 1-bit below `blocks`, or -1."""
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


def journal_scan(const uint8_t[::1] ring not None, const uint8_t[::1] uuid not None, uint64_t journal_offset_bytes,
                 uint8_t[:, ::1] headers_out not None):
    """Copy the header of every valid page to its row, zeros for the others (no valid page has sequence 0): number of valid pages."""
    cdef uint64_t i
    cdef uint64_t pages = <uint64_t>ring.shape[0] / PAGE_BYTES
    cdef uint64_t valid = 0
    cdef uint32_t uuid_crc = uuid_crc_of(uuid)
    if pages == 0 or ring.shape[0] % PAGE_BYTES:
        raise ValueError(f"{ring.shape[0]} bytes are not whole pages of a ring")
    if <uint64_t>headers_out.shape[0] != pages or headers_out.shape[1] != JOURNAL_HEADER_BYTES:
        raise ValueError(f"headers_out must be {pages} rows of {JOURNAL_HEADER_BYTES} bytes")
    with nogil:
        for i in range(pages):
            if journal_page_valid(&ring[i * PAGE_BYTES], uuid_crc, journal_offset_bytes, i, pages):
                memcpy(&headers_out[i, 0], &ring[i * PAGE_BYTES], JOURNAL_HEADER_BYTES)
                valid += 1
            else:
                memset(&headers_out[i, 0], 0, JOURNAL_HEADER_BYTES)
    return valid


def journal_apply(const uint8_t[::1] ring not None, const uint64_t[::1] positions not None, uint64_t[::1] bitmap not None,
                  uint32_t[::1] table, uint8_t[::1] dirty_bitmap_pages not None, uint8_t[::1] dirty_table_pages not None):
    """Apply the records of the pages at these ring positions, in order: -1, or the index in `positions` of the first page that names
    a word or entry outside the maps; that page and those after it are not applied."""
    cdef uint64_t i
    cdef uint64_t count = <uint64_t>positions.shape[0]
    cdef uint64_t pages = <uint64_t>ring.shape[0] / PAGE_BYTES
    cdef uint64_t words = <uint64_t>bitmap.shape[0]
    cdef uint64_t entries = 0 if table is None else <uint64_t>table.shape[0]
    cdef uint64_t *word_data = &bitmap[0] if words else NULL
    cdef uint32_t *entry_data = &table[0] if entries else NULL
    cdef uint8_t *dirty_words = &dirty_bitmap_pages[0] if dirty_bitmap_pages.shape[0] else NULL
    cdef uint8_t *dirty_entries = &dirty_table_pages[0] if dirty_table_pages.shape[0] else NULL
    cdef int64_t result = -1
    if (<uint64_t>dirty_bitmap_pages.shape[0] * WORDS_PER_PAGE < words
            or <uint64_t>dirty_table_pages.shape[0] * ENTRIES_PER_PAGE < entries):
        raise ValueError("the dirty arrays need one byte per page of their map")
    for i in range(count):
        if positions[i] >= pages:
            raise ValueError(f"ring position {positions[i]} of {pages}")
    with nogil:
        for i in range(count):
            if not journal_page_in_range(&ring[positions[i] * PAGE_BYTES], records_capacity(positions[i], pages), words, entries):
                result = <int64_t>i
                break
            journal_page_apply(&ring[positions[i] * PAGE_BYTES], word_data, entry_data, dirty_words, dirty_entries)
    return result


def journal_parts(uint64_t words, uint64_t entries):
    """Pages that a commit of so many records takes (at least one)."""
    cdef uint64_t per_page_words = JOURNAL_RECORDS_BYTES / WORD_RECORD_BYTES
    cdef uint64_t per_page_entries = JOURNAL_RECORDS_BYTES / ENTRY_RECORD_BYTES
    cdef uint64_t parts = (words + per_page_words - 1) / per_page_words
    cdef uint64_t room = (parts * per_page_words - words) * WORD_RECORD_BYTES / ENTRY_RECORD_BYTES
    if entries > room:
        parts += (entries - room + per_page_entries - 1) / per_page_entries
    return parts if parts else 1


def journal_encode(const uint8_t[::1] words not None, const uint8_t[::1] entries not None, const uint8_t[::1] uuid not None,
                   uint64_t journal_offset_bytes, uint64_t ring_pages, uint64_t sequence, uint64_t previous, uint64_t tail,
                   uint64_t map_hash_after, uint32_t flags, uint8_t[::1] out not None):
    """Build the sealed pages of one commit into `out`: word records first, then entry records, each as packed bytes."""
    cdef uint64_t words_left = <uint64_t>words.shape[0] / WORD_RECORD_BYTES
    cdef uint64_t entries_left = <uint64_t>entries.shape[0] / ENTRY_RECORD_BYTES
    cdef uint64_t parts = journal_parts(words_left, entries_left)
    cdef uint32_t uuid_crc = uuid_crc_of(uuid)
    cdef const uint8_t *word = &words[0] if words_left else NULL
    cdef const uint8_t *entry = &entries[0] if entries_left else NULL
    cdef uint8_t *page
    cdef JournalHeader *header
    cdef uint64_t part, take, room
    if words.shape[0] % WORD_RECORD_BYTES or entries.shape[0] % ENTRY_RECORD_BYTES:
        raise ValueError("records must be whole")
    if parts > 0xFFFF or <uint64_t>out.shape[0] != parts * PAGE_BYTES:
        raise ValueError(f"the commit takes {parts} pages; out has {out.shape[0]} bytes")
    if ring_pages == 0 or sequence == 0 or sequence + parts < sequence or sequence % ring_pages + parts > ring_pages:
        raise ValueError(f"{parts} pages from sequence {sequence} do not fit before the end of a ring of {ring_pages}")
    with nogil:
        memset(&out[0], 0, <size_t>out.shape[0])
        for part in range(parts):
            page = &out[part * PAGE_BYTES]
            header = <JournalHeader *>page
            header.sequence = sequence + part
            header.previous = previous
            header.tail = tail
            header.map_hash = map_hash_after
            header.part = <uint16_t>part
            header.parts = <uint16_t>parts
            header.flags = flags
            room = JOURNAL_RECORDS_BYTES
            take = min(words_left, room / WORD_RECORD_BYTES)
            if take:
                memcpy(page + JOURNAL_HEADER_BYTES, word, take * WORD_RECORD_BYTES)
                word += take * WORD_RECORD_BYTES
                words_left -= take
                room -= take * WORD_RECORD_BYTES
                header.word_count = <uint16_t>take
            take = min(entries_left, room / ENTRY_RECORD_BYTES)
            if take:
                memcpy(page + PAGE_BYTES - room, entry, take * ENTRY_RECORD_BYTES)
                entry += take * ENTRY_RECORD_BYTES
                entries_left -= take
                header.entry_count = <uint16_t>take
            journal_seal(page, uuid_crc, journal_offset_bytes + ((sequence + part) % ring_pages) * PAGE_BYTES)
    return None


cdef dict journal_header_layout():
    cdef JournalHeader header
    cdef char *base = <char *>&header
    return {
        "page_magic": (<char *>&header.page_magic - base, sizeof(header.page_magic)),
        "page_checksum": (<char *>&header.page_checksum - base, sizeof(header.page_checksum)),
        "sequence": (<char *>&header.sequence - base, sizeof(header.sequence)),
        "previous": (<char *>&header.previous - base, sizeof(header.previous)),
        "tail": (<char *>&header.tail - base, sizeof(header.tail)),
        "map_hash": (<char *>&header.map_hash - base, sizeof(header.map_hash)),
        "part": (<char *>&header.part - base, sizeof(header.part)),
        "parts": (<char *>&header.parts - base, sizeof(header.parts)),
        "word_count": (<char *>&header.word_count - base, sizeof(header.word_count)),
        "entry_count": (<char *>&header.entry_count - base, sizeof(header.entry_count)),
        "flags": (<char *>&header.flags - base, sizeof(header.flags)),
        "page_reserved": (<char *>&header.page_reserved - base, sizeof(header.page_reserved)),
    }


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
