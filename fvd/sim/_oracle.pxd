# SPDX-License-Identifier: Apache-2.0
"""The oracle, for compiled callers."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

cdef struct Write:              # what one request gives each of its sectors; times are the oracle's own counter
    int64_t value
    uint64_t began
    uint64_t ended              # acknowledged or failed; NEVER: neither yet
    uint8_t stamped             # a sector's value is `value` plus its number
    uint8_t succeeded
    uint8_t durable
    uint8_t advisory            # a trim that may be ignored: allowed, but supersedes nothing
    uint8_t doubted             # the storage lost what was not durable: a read may show what was before, until a flush promises this one

cdef struct Entry:              # a write in one sector's history
    uint32_t write
    uint32_t unused
    uint64_t outdated           # since when a read has shown, for good, that something came after
    uint64_t replaced           # the same, and that what came after had been acknowledged: a flush since then makes it the older one

cdef struct History:
    Entry *entries              # entry 0 is what the sector held when everything was last settled
    uint32_t count
    uint32_t capacity
    uint32_t prune_at

cdef struct Window:             # sectors [first, first + count) of the disk are numbers [start, start + count) here
    uint64_t first
    uint64_t count
    uint64_t start

cdef class Oracle:
    cdef readonly uint64_t sectors          # in all windows
    cdef readonly uint64_t clock
    cdef readonly uint32_t numbers          # writes so far
    cdef Window *windows
    cdef uint32_t window_count
    cdef uint8_t odd[512]
    cdef bint has_odd
    cdef uint64_t odd_sector
    cdef object settled_array
    cdef int64_t *settled
    cdef History *histories
    cdef uint64_t *touched                  # sectors with a history
    cdef uint64_t touched_count, touched_capacity
    cdef Write *writes
    cdef uint32_t write_count, write_capacity
    cdef uint32_t *unflushed
    cdef uint32_t unflushed_count, unflushed_capacity
    cdef uint64_t last_flush                # when the last flush that succeeded began
    cdef uint64_t *reads                    # when the reads under way began
    cdef uint32_t read_count, read_capacity
    cdef uint64_t doubted_at        # when the storage last showed less than before: a read that began earlier may have seen what was lost
    cdef uint32_t doubted_writes    # under way since before that: one may have read what was lost, and write it with its part of a block
    cdef uint64_t brought_back_at   # when the last of those ended
    cdef bint any_failed            # a write of this life has failed
    cdef public bint lands_late     # a write that failed may still reach the storage after a read that did not show it
    cdef bint loose_copies          # ... nor elsewhere: what was copied from the base is not durable, without any write of a guest's
    cdef uint64_t loose_sectors     # a read is not judged in chunks of so many sectors with anything in them that is not durable; 0: it is

    cdef int begin_life(self) except -1
    cdef uint64_t tick_(self) noexcept
    cdef int64_t place(self, uint64_t first_sector, uint64_t sectors) except -1
    cdef uint64_t sector_at(self, uint64_t index) noexcept
    cdef int64_t value_of(self, const uint8_t *data, uint64_t sector) noexcept
    cdef bint shows(self, uint32_t write, uint64_t index, uint64_t sector, int64_t value) noexcept
    cdef uint32_t begin(self, uint64_t first_sector, uint64_t sectors, bint zero, bint advisory) except 0
    cdef void fill(self, uint32_t write, uint64_t first_sector, uint64_t sectors, uint8_t *out) noexcept
    cdef int end(self, uint32_t write, bint succeeded, bint durable) except -1
    cdef uint64_t flush_begun(self) noexcept
    cdef void flush_ended(self, uint64_t began, bint succeeded) noexcept
    cdef uint64_t read_begun(self) except 0
    cdef void read_dropped(self, uint64_t began) noexcept
    cdef int read_ended(self, uint64_t first_sector, uint64_t sectors, uint64_t began, const uint8_t *data) except -1
    cdef bint unsettled_near(self, uint64_t sector) noexcept
    cdef int judge(self, const uint8_t *data, int64_t *out) except -1
    cdef int add(self, uint64_t index, uint32_t write) except -1
    cdef void prune(self, History *history) noexcept
    cdef object violation(self, uint64_t index, int64_t value, uint64_t floor, str when)
