# SPDX-License-Identifier: Apache-2.0
"""A guest whose requests go through a ring: it writes descriptors into its own memory, in any shape that a driver may choose, and finds
there how they ended. Its memory and the record of what is in flight outlive whoever serves it. It knows neither the oracle nor the device.
"""

import os

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from fvd.engine._backend cimport Backend
from fvd.engine._engine cimport Engine
from fvd.engine._engine_backend cimport EngineBackend
from fvd.sim._rng cimport Rng
from fvd.virtio._blk_ring cimport BlkRing
from fvd.virtio._guest_memory cimport GuestMemory, Shared

from fvd.sim._oracle import Violation
from fvd.virtio._blk_ring import inflight_bytes

cdef enum:
    SECTOR = 512
    PER_PLACE = 4               # entries of the ring that a request may use itself; longer ones use a table of their own
    RING = PLACES * PER_PLACE
    PIECES = 20                 # of a request's data, at most
    TABLE_BYTES = 512
    AVAILABLE = 16 * RING
    USED = AVAILABLE + 1024
    TABLES = USED + 2048
    HEADS = TABLES + PLACES * TABLE_BYTES       # header, ranges and status of each request
    HEAD_BYTES = 64
    STATUS = 48
    DATA = 1 << 16
    DATA_BYTES = 40 << 10       # of each request: its data, with gaps
    LARGEST = 64                # sectors
    MEMORY_BYTES = DATA + PLACES * DATA_BYTES
    WRITABLE = 2
    NEXT = 1
    INDIRECT = 4
    NOT_ANSWERED = 0xEE

# As the player names them.
cdef enum:
    KIND_READ = 0
    KIND_WRITE = 1
    KIND_FLUSH = 2
    KIND_TRIM = 3
    KIND_ZERO = 4

cdef uint32_t TYPES[5]
TYPES[:] = [0, 1, 4, 11, 13]


cdef class Dead(Backend):
    """Takes requests, and dies before it does anything for them."""

    cdef int submit(self, uint32_t kind, uint32_t flags, uint64_t offset_bytes, uint64_t length_bytes, uint8_t *buffer,
                    uint64_t cookie) except -1 nogil:
        return 0


cdef class RingGuest:

    def __init__(self, sectors, Rng rng not None):
        self.rng = rng
        self.geometry = sectors
        self.file = os.fdopen(os.memfd_create("guest"), "r+b")
        os.ftruncate(self.file.fileno(), MEMORY_BYTES + inflight_bytes(RING))
        self.window = Shared(self.file.fileno(), MEMORY_BYTES + inflight_bytes(RING))
        self.inflight = self.window

    def attach(self, Engine engine not None):
        """A server takes it up: the first one, or the next after one that has died."""
        self.memory = GuestMemory()
        self.memory.add(self.file.fileno(), 0, 1 << 32, MEMORY_BYTES, 0)
        self.ring = BlkRing(RING, sectors=self.geometry, is_read_only=False, serial=b"simulated")
        self.backend = EngineBackend(engine)
        self.ring.begin(self.memory, 1 << 32, (1 << 32) + AVAILABLE, (1 << 32) + USED, next_available=0, has_event_index=True,
                        has_indirect=True, is_durable=False, inflight=self.inflight, inflight_offset_bytes=MEMORY_BYTES)
        self.take()

    def die(self):
        """The server that it has dies, at one of the moments that its requests know."""
        cdef Dead dead = Dead()
        cdef uint8_t[1 << 13] before
        cdef uint64_t size = inflight_bytes(RING)
        cdef uint64_t moment = self.rng.below(3)
        if moment == 0:         # it has taken what there is, and begun nothing of it
            self.ring.take(dead, 0, 64, 1 << 30)
        elif moment == 1:       # it has shown what has ended, and not said so in the record
            memcpy(before, self.window.memory + MEMORY_BYTES, size)
            self.ring.publish()
            memcpy(self.window.memory + MEMORY_BYTES, before, size)
        self.ring.silent = True
        self.ring = None

    def unanswered(self):
        """The player's numbers of its requests that have no answer, by place."""
        return {place: self.places[place].slot for place in range(PLACES) if self.places[place].active}

    def rename(self, int place, uint32_t slot):
        """The player that follows has a number of its own for it."""
        self.places[place].slot = slot

    cdef bint fits(self, int kind, uint64_t sectors, bint fua) noexcept nogil:
        cdef uint32_t place
        if fua or kind > KIND_ZERO or ((kind == KIND_READ or kind == KIND_WRITE) and not 0 < sectors <= LARGEST):
            return False
        for place in range(PLACES):
            if not self.places[place].active:
                return True
        return False

    cdef int put(self, int kind, uint64_t first_sector, uint64_t sectors, bint no_hole, const uint8_t *data, uint32_t slot) except -1:
        cdef uint8_t *memory = self.window.memory
        cdef uint32_t place = 0, entries = 0, at_head
        cdef uint64_t head, at, done = 0, piece, left
        cdef uint64_t[PIECES + 4] addresses
        cdef uint32_t[PIECES + 4] lengths
        cdef uint16_t[PIECES + 4] flags
        cdef Place *it
        while self.places[place].active:
            place += 1
        it = &self.places[place]
        memset(it, 0, sizeof(Place))
        it.active = 1
        it.slot = slot
        it.kind = <uint8_t>kind
        head = HEADS + place * HEAD_BYTES
        memset(memory + head, 0, HEAD_BYTES)
        (<uint32_t *>(memory + head))[0] = TYPES[kind]
        (<uint64_t *>(memory + head + 8))[0] = first_sector if kind <= KIND_WRITE else 0
        memory[head + STATUS] = NOT_ANSWERED
        at_head = 16
        if kind == KIND_TRIM or kind == KIND_ZERO:
            (<uint64_t *>(memory + head + 16))[0] = first_sector
            (<uint32_t *>(memory + head + 24))[0] = <uint32_t>sectors
            (<uint32_t *>(memory + head + 28))[0] = 1 if kind == KIND_ZERO and not no_hole else 0
            at_head = 32
        # The header lies in one piece, in two, or together with what follows it.
        piece = self.rng.between(1, at_head) if self.rng.chance(0.2) else at_head
        addresses[0], lengths[0], flags[0] = head, <uint32_t>piece, 0
        entries = 1
        if piece < at_head:
            addresses[1], lengths[1], flags[1] = head + piece, <uint32_t>(at_head - piece), 0
            entries = 2
        at = DATA + place * DATA_BYTES
        left = sectors * SECTOR if kind == KIND_READ or kind == KIND_WRITE else 0
        while left:
            piece = left
            if it.count < PIECES - 1 and left > SECTOR and self.rng.chance(0.6):
                piece = self.rng.between(1, left // SECTOR) * SECTOR
                if self.rng.chance(0.05):
                    piece -= self.rng.between(1, 511)       # what is no whole sector goes through a buffer
            it.at[it.count], it.length[it.count] = at, piece
            it.count += 1
            if kind == KIND_WRITE:
                memcpy(memory + at, data + done, piece)
            else:
                memset(memory + at, 0xEE, piece)
            addresses[entries], lengths[entries] = at, <uint32_t>piece
            flags[entries] = WRITABLE if kind == KIND_READ else 0
            entries += 1
            at += piece
            if self.rng.chance(0.5) and at + 512 + left <= DATA + (place + 1) * DATA_BYTES:
                at += 512       # else it touches the next one, and both are one
            done += piece
            left -= piece
        addresses[entries], lengths[entries], flags[entries] = head + STATUS, 1, WRITABLE
        entries += 1
        self.chain(place, entries, addresses, lengths, flags)
        (<uint16_t *>(memory + AVAILABLE + 4))[self.available % RING] = <uint16_t>(place * PER_PLACE)
        self.available += 1
        (<uint16_t *>(memory + AVAILABLE))[1] = self.available
        return 0

    cdef int chain(self, uint32_t place, uint32_t entries, uint64_t *addresses, uint32_t *lengths, uint16_t *flags) except -1:
        """Writes the entries into the ring itself, or into a table that one entry of the ring names."""
        cdef uint8_t *memory = self.window.memory
        cdef uint64_t table = 16 * place * PER_PLACE
        cdef uint32_t first = place * PER_PLACE, i
        if entries > PER_PLACE or self.rng.chance(0.5):
            entry(memory + table, TABLES + place * TABLE_BYTES, 16 * entries, INDIRECT, 0)
            table = TABLES + place * TABLE_BYTES
            first = 0
        for i in range(entries):
            entry(memory + table + 16 * i, addresses[i], lengths[i], flags[i] | (NEXT if i + 1 < entries else 0), <uint16_t>(first + i + 1))
        return 0

    cdef int take(self) except -1:
        """The device looks at the ring."""
        self.ring.take(self.backend, <uint64_t>1 << 63, 64, 1 << 30)
        if self.ring.fault != NULL:
            raise Violation(f"a guest that keeps to the rules is given up: {self.ring.fault.decode()}")
        return 0

    cdef int next_answer(self) except -2:
        cdef uint8_t *memory = self.window.memory
        cdef uint32_t head
        cdef Place *place
        if self.seen == (<uint16_t *>(memory + USED))[1]:
            return -1
        head = (<uint32_t *>(memory + USED + 4))[2 * (self.seen % RING)]
        self.seen += 1
        place = &self.places[head // PER_PLACE]
        if head >= RING or head % PER_PLACE or not place.active:
            raise Violation(f"the device answers what the guest has not asked for: head {head}")
        if memory[HEADS + head // PER_PLACE * HEAD_BYTES + STATUS] == NOT_ANSWERED:
            raise Violation(f"head {head} is answered without a status")
        return <int>(head // PER_PLACE)

    cdef int32_t error_of(self, int place) noexcept nogil:
        return self.ring.chains[place * PER_PLACE].error

    cdef int fetch(self, int place, uint8_t *data) except -1:
        """Returns the status; data that were read are in `data`."""
        cdef Place *it = &self.places[place]
        cdef uint8_t *memory = self.window.memory
        cdef uint64_t done = 0
        cdef uint32_t i
        if it.kind == KIND_READ:
            for i in range(it.count):
                memcpy(data + done, memory + it.at[i], it.length[i])
                done += it.length[i]
        it.active = 0
        return memory[HEADS + place * HEAD_BYTES + STATUS]


cdef inline void entry(uint8_t *where, uint64_t address, uint32_t length, uint16_t flags, uint16_t following) noexcept nogil:
    (<uint64_t *>where)[0] = address
    (<uint32_t *>(where + 8))[0] = length
    (<uint16_t *>(where + 12))[0] = flags
    (<uint16_t *>(where + 14))[0] = following
