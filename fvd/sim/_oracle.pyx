# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""What the durability contract allows each sector of the guest's disk to hold, computed by none of the engine's code.

Every write stamps every sector with its own number and place, and the base holds another value in every sector, so a wrong offset, a lost
write and a resurrected one are all seen. It may not know the engine, the format or the device.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcmp, memcpy, memset

import numpy as np

from fvd.sim._base import base_content

from fvd.sim._base cimport base_stamp

SECTOR_BYTES = 512
NEVER = <uint64_t>1 << 62

cdef enum:
    SECTOR = 512
    STAMP_SHIFT = 40            # a sector's number fits below, the write's above
    PRUNE_AT = 24

cdef int64_t TORN = -1, ODD = -2
cdef uint64_t OPEN = <uint64_t>1 << 62
# Numbers from here on would look like the base.
cdef uint32_t WRITES_MAX = 0xBA5E0


class Violation(AssertionError):
    """The disk showed something that the contract does not allow, or did something that it must not do."""


def unstamp(word):
    if word // 2**44 == 0xBA5E:
        return 0, word % 2**44 - 1
    number, place = word // 2**40, word % 2**40 - 1     # not by STAMP_SHIFT: a power of a C integer is no integer
    return (number, place) if 0 < number < WRITES_MAX and 0 <= place < 2**36 else None


cdef void *larger(void *items, size_t bytes) except NULL:
    cdef void *moved = realloc(items, bytes)
    if moved == NULL:
        raise MemoryError("oracle")
    return moved


cdef class Oracle:

    def __cinit__(self):
        self.windows = NULL
        self.histories = NULL
        self.touched = NULL
        self.writes = NULL
        self.unflushed = NULL
        self.reads = NULL

    def __init__(self, uint64_t virtual_size_bytes, base_bytes=None, windows=None):
        cdef uint64_t base = 0 if base_bytes is None else min(base_bytes, virtual_size_bytes)
        cdef uint64_t i, index, sector
        cdef int64_t[::1] view
        places = windows or [(0, virtual_size_bytes // SECTOR)]
        self.window_count = len(places)
        self.windows = <Window *>calloc(self.window_count, sizeof(Window))
        self.touched_capacity = self.write_capacity = self.unflushed_capacity = self.read_capacity = 64
        self.touched = <uint64_t *>malloc(64 * 8)
        self.writes = <Write *>calloc(64, sizeof(Write))
        self.unflushed = <uint32_t *>malloc(64 * 4)
        self.reads = <uint64_t *>malloc(64 * 8)
        if self.windows == NULL or self.touched == NULL or self.writes == NULL or self.unflushed == NULL or self.reads == NULL:
            raise MemoryError("oracle")
        for i, (first, count) in enumerate(places):
            self.windows[i].first = first
            self.windows[i].count = count
            self.windows[i].start = self.sectors
            self.sectors += count
        self.settled_array = np.zeros(self.sectors, np.int64)
        view = self.settled_array
        self.settled = &view[0]
        self.histories = <History *>calloc(self.sectors, sizeof(History))
        if self.histories == NULL:
            raise MemoryError("oracle")
        # A base that ends inside a sector: that sector has a value of its own.
        self.has_odd = base % SECTOR != 0 and base_stamp(base // SECTOR) != 0
        self.odd_sector = base // SECTOR
        if self.has_odd:
            memset(self.odd, 0, SECTOR)
            tail = base_content(base, base // SECTOR * SECTOR, SECTOR)
            memcpy(self.odd, <const uint8_t *> tail, len(tail))
        for index in range(self.sectors):
            sector = self.sector_at(index)
            if sector < base // SECTOR:
                self.settled[index] = <int64_t>base_stamp(sector)
            elif self.has_odd and sector == self.odd_sector:
                self.settled[index] = ODD
        self.begin_life()

    def __dealloc__(self):
        cdef uint64_t i
        if self.histories != NULL:
            for i in range(self.touched_count):
                free(self.histories[self.touched[i]].entries)
        free(self.histories)
        free(self.windows)
        free(self.touched)
        free(self.writes)
        free(self.unflushed)
        free(self.reads)

    cdef int begin_life(self) except -1:
        """Forget everything but the settled values. Write 0 stands for them."""
        cdef uint64_t i
        cdef History *history
        for i in range(self.touched_count):
            history = &self.histories[self.touched[i]]
            free(history.entries)
            memset(history, 0, sizeof(History))
        self.touched_count = 0
        self.unflushed_count = self.read_count = 0
        self.last_flush = 0
        self.any_failed = False
        self.doubted_writes = 0
        memset(&self.writes[0], 0, sizeof(Write))
        self.writes[0].succeeded = self.writes[0].durable = 1
        self.write_count = 1
        return 0

    cdef uint64_t tick_(self) noexcept:
        self.clock += 1
        return self.clock

    def tick(self):
        return self.tick_()

    # --- places -----------------------------------------------------------------------------------------------------

    cdef int64_t place(self, uint64_t first_sector, uint64_t sectors) except -1:
        """The index of a range that lies in one window."""
        cdef uint32_t i
        cdef Window *window
        for i in range(self.window_count):
            window = &self.windows[i]
            if first_sector >= window.first and first_sector + sectors <= window.first + window.count:
                return <int64_t>(window.start + first_sector - window.first)
        raise ValueError(f"sectors {first_sector}+{sectors} are in no window")

    cdef uint64_t sector_at(self, uint64_t index) noexcept:
        cdef uint32_t i = 0
        while index >= self.windows[i].start + self.windows[i].count:
            i += 1
        return self.windows[i].first + index - self.windows[i].start

    cdef int64_t value_of(self, const uint8_t *data, uint64_t sector) noexcept:
        """What a sector shows: its first word if all of it is the same."""
        cdef int64_t value
        if memcmp(data, data + 8, SECTOR - 8) == 0:
            memcpy(&value, data, 8)
            return value
        # Torn, or mixed from two writes, or the end of the base.
        return ODD if self.has_odd and sector == self.odd_sector and memcmp(data, self.odd, SECTOR) == 0 else TORN

    # --- what the guest does ------------------------------------------------------------------------------------------

    cdef uint32_t begin(self, uint64_t first_sector, uint64_t sectors, bint zero, bint advisory) except 0:
        cdef int64_t index = self.place(first_sector, sectors)
        cdef uint64_t i
        cdef uint32_t number = self.write_count
        cdef Write *write
        if number == self.write_capacity:
            self.writes = <Write *>larger(self.writes, self.write_capacity * 2 * sizeof(Write))
            self.write_capacity *= 2
        self.numbers += 1
        if self.numbers >= WRITES_MAX:
            raise OverflowError("more writes than the oracle has numbers for: begin another world")
        self.write_count += 1
        write = &self.writes[number]
        memset(write, 0, sizeof(Write))
        write.value = 0 if zero else (<int64_t>self.numbers << STAMP_SHIFT) + 1
        write.stamped = not zero
        write.advisory = advisory
        write.began = self.tick_()
        write.ended = OPEN
        for i in range(sectors):
            self.add(<uint64_t>index + i, number)
        return number

    cdef int add(self, uint64_t index, uint32_t write) except -1:
        cdef History *history = &self.histories[index]
        cdef Entry *entry
        if history.count == 0:
            if self.touched_count == self.touched_capacity:
                self.touched = <uint64_t *>larger(self.touched, self.touched_capacity * 16)
                self.touched_capacity *= 2
            self.touched[self.touched_count] = index
            self.touched_count += 1
            history.entries = <Entry *>larger(NULL, 4 * sizeof(Entry))
            history.capacity = 4
            history.prune_at = PRUNE_AT
            history.entries[0].write = 0
            history.entries[0].outdated = history.entries[0].replaced = OPEN
            history.count = 1
        if history.count >= history.prune_at:
            self.prune(history)
        if history.count == history.capacity:
            history.entries = <Entry *>larger(history.entries, history.capacity * 2 * sizeof(Entry))
            history.capacity *= 2
        entry = &history.entries[history.count]
        entry.write = write
        entry.outdated = entry.replaced = OPEN
        history.count += 1
        return 0

    cdef void prune(self, History *history) noexcept:
        """Forget what can be seen no more: by a read under way, a later one, or after a crash."""
        cdef uint64_t oldest_read = self.clock + 1, floor = 0
        cdef uint32_t i, kept = 0
        cdef Write *write
        for i in range(self.read_count):
            oldest_read = min(oldest_read, self.reads[i])
        for i in range(history.count):
            write = &self.writes[history.entries[i].write]
            if write.durable and not write.advisory and write.ended < oldest_read:
                floor = max(floor, write.began)
        for i in range(history.count):
            if self.writes[history.entries[i].write].ended >= floor:
                history.entries[kept] = history.entries[i]
                kept += 1
        history.count = kept
        history.prune_at = max(<uint32_t>PRUNE_AT, kept * 2)

    cdef void fill(self, uint32_t write, uint64_t first_sector, uint64_t sectors, uint8_t *out) noexcept:
        cdef uint64_t i
        cdef int64_t value
        cdef int j
        for i in range(sectors):
            value = self.writes[write].value + (<int64_t>(first_sector + i) if self.writes[write].stamped else 0)
            for j in range(SECTOR // 8):
                (<int64_t *>out)[j] = value
            out += SECTOR

    cdef int end(self, uint32_t write, bint succeeded, bint durable) except -1:
        cdef Write *record = &self.writes[write]
        if write == 0 or write >= self.write_count or record.ended != OPEN:
            raise ValueError(f"write {write} is not under way")
        record.ended = self.tick_()
        if self.doubted_writes and record.began < self.doubted_at:
            self.doubted_writes -= 1
            self.brought_back_at = record.ended
        record.succeeded = succeeded
        record.durable = durable and succeeded
        if not succeeded:
            self.any_failed = True
        if succeeded and not durable:
            if self.unflushed_count == self.unflushed_capacity:
                self.unflushed = <uint32_t *>larger(self.unflushed, self.unflushed_capacity * 8)
                self.unflushed_capacity *= 2
            self.unflushed[self.unflushed_count] = write
            self.unflushed_count += 1
        return 0

    cdef uint64_t flush_begun(self) noexcept:
        return self.tick_()

    cdef void flush_ended(self, uint64_t began, bint succeeded) noexcept:
        cdef uint32_t i, kept = 0, write
        if not succeeded:
            return
        self.last_flush = max(self.last_flush, began)
        for i in range(self.unflushed_count):
            write = self.unflushed[i]
            if self.writes[write].ended < began:
                self.writes[write].durable = 1
            else:
                self.unflushed[kept] = write
                kept += 1
        self.unflushed_count = kept

    cdef uint64_t read_begun(self) except 0:
        if self.read_count == self.read_capacity:
            self.reads = <uint64_t *>larger(self.reads, self.read_capacity * 16)
            self.read_capacity *= 2
        self.reads[self.read_count] = self.tick_()
        self.read_count += 1
        return self.clock

    cdef void read_dropped(self, uint64_t began) noexcept:
        cdef uint32_t i
        for i in range(self.read_count):
            if self.reads[i] == began:
                self.read_count -= 1
                self.reads[i] = self.reads[self.read_count]
                return

    def begin_write(self, uint64_t first_sector, uint64_t sectors, *, bint zero=False, bint advisory=False):
        return self.begin(first_sector, sectors, zero, advisory)

    def stamp(self, uint32_t number, uint64_t first_sector, uint64_t sectors):
        if not 0 < number < self.write_count:
            raise ValueError(f"there is no write {number}")
        data = bytearray(sectors * SECTOR)
        cdef uint8_t[::1] view = data
        if sectors:
            self.fill(number, first_sector, sectors, &view[0])
        return bytes(data)

    def end_write(self, uint32_t number, bint succeeded, bint durable):
        self.end(number, succeeded, durable)

    def begin_flush(self):
        return self.flush_begun()

    def end_flush(self, uint64_t began, bint succeeded):
        self.flush_ended(began, succeeded)

    def begin_read(self):
        return self.read_begun()

    def drop_read(self, uint64_t began):
        self.read_dropped(began)

    def doubt(self):
        cdef uint64_t i
        cdef uint32_t j
        cdef History *history
        self.doubted_at = self.tick_()
        self.doubted_writes = 0
        for i in range(1, self.write_count):
            if not self.writes[i].durable:
                self.writes[i].doubted = 1
            if self.writes[i].ended == OPEN:
                self.doubted_writes += 1
        for i in range(self.touched_count):
            history = &self.histories[self.touched[i]]
            for j in range(history.count):
                history.entries[j].outdated = OPEN

    cdef bint unsettled_near(self, uint64_t sector) noexcept:
        """Whether anything in the chunk of this sector is not durable: new blocks of it may lie where anything has been."""
        if self.loose_copies:
            return True
        cdef uint64_t first = sector // self.loose_sectors * self.loose_sectors
        cdef uint64_t end = first + self.loose_sectors
        cdef uint64_t i, place
        cdef uint32_t j
        cdef History *history
        for i in range(self.touched_count):
            place = self.sector_at(self.touched[i])
            if not first <= place < end:
                continue
            history = &self.histories[self.touched[i]]
            for j in range(history.count):
                if not self.writes[history.entries[j].write].durable:
                    return True
        return False

    def outlive_kill(self, *, bint sent_again):
        cdef uint32_t i
        cdef uint64_t now = self.tick_()
        self.read_count = 0
        if not sent_again:
            self.doubted_writes = 0
            for i in range(1, self.write_count):
                if self.writes[i].ended == OPEN:
                    self.writes[i].ended = now

    def survive_kill(self):
        cdef uint64_t i
        cdef uint32_t j
        cdef uint64_t now = self.tick_()
        cdef History *history
        for i in range(1, self.write_count):
            # What was acknowledged and is not durable may be gone with the mapping that was not committed: old or new, as if it had failed.
            if self.writes[i].ended == OPEN:
                self.writes[i].ended = now
            if not self.writes[i].durable:
                self.writes[i].succeeded = 0
        for i in range(self.touched_count):
            history = &self.histories[self.touched[i]]
            for j in range(history.count):
                history.entries[j].outdated = history.entries[j].replaced = OPEN
        self.unflushed_count = self.read_count = self.doubted_writes = 0

    # --- what it may see --------------------------------------------------------------------------------------------

    cdef bint shows(self, uint32_t write, uint64_t index, uint64_t sector, int64_t value) noexcept:
        if write == 0:
            return value == self.settled[index]
        return value == self.writes[write].value + (<int64_t>sector if self.writes[write].stamped else 0)

    cdef int read_ended(self, uint64_t first_sector, uint64_t sectors, uint64_t began, const uint8_t *data) except -1:
        cdef uint64_t now, i, index, sector, floor
        cdef int64_t start = self.place(first_sector, sectors)
        cdef int64_t value
        cdef History *history
        cdef Entry *entry
        cdef Entry *only
        cdef Write *write
        cdef uint32_t j, shown
        now = self.tick_()
        self.read_dropped(began)
        for i in range(sectors):
            index = <uint64_t>start + i
            sector = first_sector + i
            value = self.value_of(data + i * SECTOR, sector)
            history = &self.histories[index]
            if history.count == 0:
                if value != self.settled[index] and not (self.loose_sectors and self.unsettled_near(sector)):
                    raise self.violation(index, value, 0, "a read showed")
                continue
            floor = 0
            for j in range(history.count):
                write = &self.writes[history.entries[j].write]
                if (write.succeeded and write.ended < began and not write.advisory and write.began > floor
                        and (write.durable or not write.doubted)):
                    floor = write.began
            shown = 0
            only = NULL
            for j in range(history.count):
                entry = &history.entries[j]
                if (self.writes[entry.write].ended >= floor and entry.outdated >= began
                        and self.shows(entry.write, index, sector, value)):
                    shown += 1
                    only = entry
            if shown == 0:
                if self.loose_sectors and self.unsettled_near(sector):
                    continue
                raise self.violation(index, value, floor, "a read showed")
            if began < self.doubted_at or began < self.brought_back_at or self.doubted_writes:
                continue
            # A write that failed, of another part of the same block, may have read before it anything that this sector held: it may land
            # yet, and brings that back, and so may one that read what it had left.
            if self.any_failed and self.lands_late:
                continue
            # What had ended before this read and was not shown came before what was: no later read may show it again.
            for j in range(history.count):
                entry = &history.entries[j]
                if self.writes[entry.write].ended >= began:
                    continue
                if entry == only if shown == 1 else self.shows(entry.write, index, sector, value):
                    continue
                if entry.outdated == OPEN:
                    entry.outdated = now
                # What had been acknowledged when it was seen to come last is what a later flush makes durable.
                if (shown == 1 and entry.replaced == OPEN and self.writes[only.write].succeeded
                        and self.writes[only.write].ended < began):
                    entry.replaced = now
        return 0

    cdef int judge(self, const uint8_t *data, int64_t *out) except -1:
        """Every sector after a crash; what each shows goes to `out` if there is one."""
        cdef uint64_t index, sector, floor
        cdef int64_t value
        cdef History *history
        cdef Write *write
        cdef uint32_t j
        cdef bint allowed
        for index in range(self.sectors):
            sector = self.sector_at(index) if self.window_count > 1 else self.windows[0].first + index
            value = self.value_of(data + index * SECTOR, sector)
            if out != NULL:
                out[index] = value
            history = &self.histories[index]
            if history.count == 0:
                if value != self.settled[index]:
                    raise self.violation(index, value, 0, "after the crash")
                continue
            floor = 0
            for j in range(history.count):
                write = &self.writes[history.entries[j].write]
                if write.durable and not write.advisory and write.began > floor:
                    floor = write.began
            allowed = False
            for j in range(history.count):
                if (self.writes[history.entries[j].write].ended >= floor and history.entries[j].replaced >= self.last_flush
                        and self.shows(history.entries[j].write, index, sector, value)):
                    allowed = True
                    break
            if not allowed:
                raise self.violation(index, value, floor, "after the crash")
        return 0

    def check_read(self, uint64_t first_sector, uint64_t began, data):
        cdef const uint8_t[::1] view = data
        if view.shape[0]:
            self.read_ended(first_sector, <uint64_t>view.shape[0] // SECTOR, began, &view[0])

    def check_after_crash(self, data):
        cdef const uint8_t[::1] view = data
        if <uint64_t>view.shape[0] != self.sectors * SECTOR:
            raise ValueError(f"{view.shape[0]} bytes are not the {self.sectors} sectors of this disk")
        self.judge(&view[0], NULL)

    def adopt_after_kill(self, data):
        cdef const uint8_t[::1] view = data
        cdef uint64_t i, index, now
        cdef int64_t value, last = 0
        cdef uint32_t number = 0
        cdef Write *write
        self.check_after_crash(data)
        now = self.tick_()
        for i in range(self.touched_count):
            index = self.touched[i]
            value = self.value_of(&view[0] + index * SECTOR, self.sector_at(index))
            if number == 0 or value != last:
                if self.write_count == self.write_capacity:
                    self.writes = <Write *>larger(self.writes, self.write_capacity * 2 * sizeof(Write))
                    self.write_capacity *= 2
                number = self.write_count
                self.write_count += 1
                write = &self.writes[number]
                memset(write, 0, sizeof(Write))
                write.value = last = value
                write.began = now
                write.ended = OPEN
                self.end(number, True, False)
            self.add(index, number)
        self.tick_()

    def settle_after_crash(self, data):
        cdef const uint8_t[::1] view = data
        cdef int64_t[::1] out
        if <uint64_t>view.shape[0] != self.sectors * SECTOR:
            raise ValueError(f"{view.shape[0]} bytes are not the {self.sectors} sectors of this disk")
        shown = np.empty(self.sectors, np.int64)
        out = shown
        self.judge(&view[0], &out[0])
        self.settled_array = shown
        self.settled = &out[0]
        self.begin_life()
        self.tick_()

    cdef object violation(self, uint64_t index, int64_t value, uint64_t floor, str when):
        cdef History *history = &self.histories[index]
        cdef Write *write
        cdef uint32_t j
        sector = self.sector_at(index)
        if history.count == 0:
            before = self.name(self.settled[index], sector)
            return Violation(f"sector {sector}: {when} {self.name(value, sector)}; unchanged since {before}")
        allowed = []
        for j in range(history.count):
            write = &self.writes[history.entries[j].write]
            if write.ended >= floor:
                shown = self.settled[index] if history.entries[j].write == 0 else write.value + (sector if write.stamped else 0)
                ended = "" if write.ended == OPEN else write.ended
                allowed.append(f"{self.name(shown, sector)} [{write.began}-{ended}{' durable' if write.durable else ''}]")
        return Violation(f"sector {sector}: {when} {self.name(value, sector)}; allowed: {', '.join(allowed)}")

    def name(self, object value, object sector):
        """A sector's value for people: write 12, base, zeros, write 3 of sector 8."""
        if value == 0:
            return "zeros"
        if value in (TORN, ODD):
            return "a mixture" if value == TORN else "the end of the base"
        stamp = unstamp(value % 2**64)
        if stamp is None or stamp[0] > self.numbers:
            return f"foreign bytes {value % 2**64:#x}"
        number, place = stamp
        what = f"write {number}" if number else "the base"
        return what if place == sector else f"{what} of sector {place}"
