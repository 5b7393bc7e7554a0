# SPDX-License-Identifier: Apache-2.0
"""Kernels shared by the compiled layers: checksums, bit runs, map hash, cells. Pure memory: no I/O, no Python objects."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    PAGE_BYTES = 4096
    CELL_BYTES = 512
    CELLS_PER_PAGE = 8
    WORDS_PER_CELL = 62
    ENTRIES_PER_CELL = 124
    KIND_BITMAP = 1
    KIND_TABLE = 2
    JOURNAL_RECORDS_BYTES = 4032
    WORD_RECORD_BYTES = 12
    ENTRY_RECORD_BYTES = 8
    JOURNAL_FLAG_CLEAN = 1

cdef extern from *:
    """
    #define FVD_EMPTY 0xFFFFFFFFu
    """
    const uint32_t EMPTY "FVD_EMPTY"

# Seeded bugs prove the tester (docs/internals/durability.md). Only the checked build has them: in a release BUG() is the constant 0, and
# what depends on it is not compiled. The switch is here for all that is compiled above it; `seed_bug` of the engine turns it.
cdef extern from *:
    """
    #ifdef FVD_SEEDED_BUGS
    #define FVD_HAS_BUGS 1
    #else
    #define FVD_HAS_BUGS 0
    #endif
    """
    bint HAS_BUGS "FVD_HAS_BUGS"

cdef int seeded_bug     # 0: none

cpdef enum Bug:     # what each takes away: docs/internals/durability.md
    JOURNAL_BEFORE_FLUSH = 1
    CHANGE_BEFORE_ITS_DATA
    CHECKPOINT_OF_PENDING_VALUES
    TAIL_BEFORE_CHECKPOINT_FLUSH
    SLOT_FREED_BEFORE_COMMIT
    SLOT_FREED_BESIDE_ITS_TRANSFERS
    NO_PADDING
    FLUSH_ANSWERED_BEFORE_JOURNAL
    TWO_WRITERS_OF_A_BLOCK
    FUA_WITHOUT_COMMIT
    FAILURES_IGNORED
    READ_BEYOND_THE_BASE
    NEW_SLOT_WITHOUT_ZEROS
    MODIFY_BESIDE_WRITES
    TRIM_BESIDE_WRITES
    JOURNAL_OVER_ITS_TAIL
    JOURNAL_WRITE_NOT_DURABLE
    PAGE_CHECKSUM_IGNORED
    CELL_CHECKSUM_IGNORED
    INDEX_IN_SECTORS
    RECORDS_BEYOND_THE_PAGE
    PAGE_NOT_CLEARED
    MAP_WRITE_ERROR_IGNORED
    COPY_LAZY_UNDER_A_WRITE
    PROMOTED_WORD_WITHOUT_ENTRIES
    LAZY_COUNTS_AS_COMMITTED
    COPY_OVER_NEWER_DATA
    COPY_INTO_A_DIRTY_SLOT
    COPY_BEFORE_ITS_DATA
    ENTRY_LAZY_UNDER_A_WRITE
    NARROW_WRITE_BEFORE_ZEROING
    ZEROED_AFTER_A_TRIM
    ZEROED_AFTER_A_FAILED_WRITE
    FAILED_ZEROING_BELIEVED
    DISCARDS_WITHOUT_BOUND
    SLOT_FREED_BEFORE_ITS_DISCARD
    DISCARD_ACROSS_USED_SLOTS
    DISCARD_OF_A_TAKEN_SLOT
    COPIES_TAKE_THE_RESERVE
    PAUSED_REQUEST_FORGOTTEN
    DURABLE_END_WITHOUT_BARRIER
    FAILED_DURABLE_WRITE_FORGIVEN
    FAILED_DURABLE_JOB_FORGIVEN
    BARRIER_ONE_TOO_EARLY
    FAILURE_BESIDE_US_IGNORED
    SAMPLER_NOT_ASKED
    FUA_WITHOUT_FLUSH
    COPY_NOT_LOGGED
    ANSWER_BEFORE_LOG
    LOG_CLEARED_BEFORE_COMMIT
    LAST_RECORD_NOT_PUBLISHED
    PROMOTED_NOT_LOGGED
    SECOND_CHANGE_NOT_LOGGED
    FULL_LOG_IGNORED
    READ_AFTER_FAILURE
    FLUSH_WAITS_FOR_DISCARDS
    RESERVE_FORGOTTEN_WHEN_FULL
    BASE_RELEASED_BEFORE_COMMIT
    COMMITTING_ENTRY_COUNTS_AS_COMMITTED
    RUNNING_BEFORE_COMMITTING
    JOURNAL_WAITERS_FORGOTTEN
    ONE_WORD_PROMOTED
    TRIM_SHARES_ITS_CHUNK
    FAILED_DISCARD_KEEPS_ITS_SLOT
    ANSWERED_WHEN_STOPPED
    HANDED_OUT_WHEN_STOPPED
    STARVED_WRITE_NOT_TRIED
    STARVED_WRITE_ANSWERED
    ANSWER_BEFORE_LAST_PART
    TAKEN_BEFORE_IN_FLIGHT
    IN_FLIGHT_ENDED_BEFORE_USED

cdef inline bint BUG(int number) noexcept nogil:
    return HAS_BUGS and seeded_bug == number

cdef packed struct JournalHeader:      # FORMAT.md section 6; asserted at import
    uint32_t page_magic
    uint32_t page_checksum
    uint64_t sequence
    uint64_t previous
    uint64_t tail
    uint64_t map_hash
    uint16_t part
    uint16_t parts
    uint16_t word_count
    uint16_t entry_count
    uint32_t flags
    uint8_t page_reserved[12]

# CRC32C of `size` bytes continuing from `crc` (0 to start); composable: crc32c(crc32c(0, a), b) == crc32c(0, a+b).
cdef uint32_t crc32c(uint32_t crc, const void *data, size_t size) noexcept nogil
# Section 3 of FORMAT.md. `checksum_offset` is where the 4-byte checksum field lies (counted as zero).
cdef uint32_t checksum(uint32_t uuid_crc, uint64_t position_bytes, const void *data, size_t size, size_t checksum_offset) noexcept nogil

# Section 7. `seed` is the first 8 bytes of the UUID. Returns 0 for an initial value (word 0, entry EMPTY).
cdef uint64_t entry_hash(uint64_t seed, uint32_t kind, uint64_t index, uint64_t value) noexcept nogil

# Bit runs on 64-bit words. All take half-open bit ranges [first, end).
cdef inline bint bit_get(const uint64_t *words, uint64_t bit) noexcept nogil:
    return (words[bit >> 6] >> (bit & 63)) & 1

cdef bint bits_all(const uint64_t *words, uint64_t first, uint64_t end) noexcept nogil      # all 1 (an empty range: true)
cdef bint bits_none(const uint64_t *words, uint64_t first, uint64_t end) noexcept nogil     # all 0
cdef uint64_t bits_find(const uint64_t *words, uint64_t first, uint64_t end, bint value) noexcept nogil  # first bit == value, or end
cdef uint64_t bits_find_last(const uint64_t *words, uint64_t first, uint64_t end, bint value) noexcept nogil  # last such bit, or end
cdef uint64_t bits_count(const uint64_t *words, uint64_t first, uint64_t end) noexcept nogil  # how many are 1
cdef void bits_fill(uint64_t *words, uint64_t first, uint64_t end, bint value) noexcept nogil

# Write one 512-byte cell at `cell`: header, `used` payload items from `items` (u64 words or u32 entries, by kind), the rest initial,
# checksum.
cdef void cell_seal(uint8_t *cell, uint32_t uuid_crc, uint64_t position_bytes, uint32_t kind, uint64_t cell_index,
                    const void *items, uint32_t used) noexcept nogil

cdef struct JournalPages:       # the pages of one commit, being laid out: begins with pages = used_bytes = 0
    uint8_t *out
    uint32_t pages_max
    uint32_t pages
    uint32_t used_bytes         # by records, in the last page

cdef struct JournalSeal:        # what the headers of its pages say, and where they will lie
    uint32_t uuid_crc
    uint32_t flags
    uint64_t journal_offset_bytes
    uint64_t ring_pages
    uint64_t sequence           # of the first page
    uint64_t previous
    uint64_t tail
    uint64_t map_hash

# Add one record to a commit: first the words of the bitmap, then the entries of the table. False: it would take more than pages_max.
cdef bint journal_append(JournalPages *commit, uint32_t kind, uint32_t index, uint64_t value) noexcept nogil
# Fill in the headers of a commit's pages, whose records are there; also of one page of zeros, which has none.
cdef void journal_seal(uint8_t *out, uint32_t pages, const JournalSeal *seal) noexcept nogil
