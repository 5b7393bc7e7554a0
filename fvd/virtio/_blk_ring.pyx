# SPDX-License-Identifier: Apache-2.0
"""One ring of a virtio block device: takes what the guest's driver makes available, has a backend do it, and shows the guest how it ended.

Guest and front end are strangers: all that is read of their memory is copied once and judged on the copy (vring.pxi). What breaks the
protocol is told in `fault`, and the ring takes nothing more. It knows neither sockets nor how a backend works, nor who calls it.
"""

from libc.errno cimport EIO, ESHUTDOWN
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy

from fvd._aligned cimport aligned
from fvd._core cimport BUG, Bug
from fvd.engine._backend cimport Backend
from fvd.engine._engine cimport FLAG_FUA, FLAG_NO_HOLE, REQUEST_FLUSH, REQUEST_READ, REQUEST_TRIM, REQUEST_WRITE, REQUEST_ZERO
from fvd.virtio._guest_memory cimport GuestMemory, Shared

from fvd.errors import InvalidArgument, OutOfMemory

cdef enum:
    NONE = 0xFFFFFFFF

include "vring.pxi"
include "inflight.pxi"
include "blk.pxi"


cdef class BlkRing:
    """A ring of `size` entries, from `begin` on."""

    def __cinit__(self, uint32_t size, *, sectors, is_read_only, serial):
        if not 1 <= size <= RING_MAX or size & (size - 1):
            raise InvalidArgument(f"a ring of {size} entries: a power of two up to {RING_MAX} is needed")
        self.size = size
        self.sectors = sectors
        self.is_read_only = is_read_only
        padded = serial[:ID_BYTES].ljust(ID_BYTES, b"\0")
        memcpy(self.serial, <const uint8_t *>padded, ID_BYTES)
        self.again = NONE
        self.chains = <Chain *>calloc(size, sizeof(Chain))
        self.pieces = <Piece *>malloc(PIECES_MAX * sizeof(Piece))
        self.batch = <uint16_t *>calloc(size, sizeof(uint16_t))
        if self.chains == NULL or self.pieces == NULL or self.batch == NULL:
            raise OutOfMemory("no memory for a guest's ring")
        self.counts = &self.own_counts

    def __dealloc__(self):
        if self.busy:
            return                  # not drained: the device may still write to the buffers
        free(self.chains)
        free(self.pieces)
        free(self.batch)

    def begin(self, GuestMemory memory not None, descriptors_address, available_address, used_address, *, next_available,
              used_guest_address=None, has_event_index, has_indirect, is_durable, Shared inflight=None, inflight_offset_bytes=0):
        """Where it lies, by the front end's addresses, and what was agreed upon. `next_available`: the index to go on from; with memory of
        requests in flight, what that says counts. `is_durable`: every write is durable when it ends. Raises InvalidArgument."""
        if self.busy:
            raise RuntimeError("a ring is begun when nothing is under way in it")
        if descriptors_address % 16 or available_address % 2 or used_address % 4:
            raise InvalidArgument("a part of a ring is not aligned")
        self.descriptors = memory.at_user(descriptors_address, ENTRY_BYTES * <uint64_t>self.size)
        self.available = memory.at_user(available_address, 6 + 2 * <uint64_t>self.size)
        self.used = memory.at_user(used_address, 6 + 8 * <uint64_t>self.size)
        if self.descriptors == NULL or self.available == NULL or self.used == NULL:
            raise InvalidArgument("a ring does not lie in the guest's memory")
        if <size_t>self.descriptors % 8 or <size_t>self.available % 2 or <size_t>self.used % 4:
            raise InvalidArgument("a part of a ring is not aligned in its file")
        self.memory = memory
        self.logs_used = used_guest_address is not None
        self.used_guest_address = used_guest_address or 0
        self.has_event_index = has_event_index
        self.has_indirect = has_indirect
        self.is_durable = is_durable
        self.next_available = next_available
        self.next_used = self.published = self.told = fvd_load16(self.used + 2)
        self.calls_due = True
        self.leaves = self.silent = False
        self.fault = NULL
        self.again = NONE
        self.inflight = NULL
        self.inflight_memory = inflight
        if inflight is not None:
            if inflight_offset_bytes + inflight_bytes(self.size) > inflight.size_bytes:
                raise InvalidArgument("the memory of requests in flight is too small for this ring")
            self.inflight = inflight.memory + <uint64_t>inflight_offset_bytes
            recover(self)

    @property
    def why(self):
        """What the front end or its guest has broken; None: nothing."""
        return None if self.fault == NULL else self.fault.decode()

    cdef Taken take(self, Backend backend, uint64_t cookie, uint32_t chains, uint64_t bytes) except? TAKEN_FAILED nogil:
        cdef uint64_t moved = 0, total = 0
        cdef uint16_t head, ready
        if self.fault != NULL or self.leaves:
            return TAKEN_ALL
        while self.again != NONE and not self.leaves:      # in the order in which they were taken first
            if chains == 0 or total >= bytes:
                return TAKEN_SOME
            if self.open_parts >= PARTS_MAX:
                return TAKEN_NO_MEMORY
            head = <uint16_t>self.again
            if not collect(self, head) or not begin_chain(self, backend, cookie, head, &moved):
                return self.not_now()
            self.again = self.chains[head].following
            chains -= 1
            total += moved
        ready = guest_index(self)
        if <uint16_t>(ready - self.next_available) > self.size:
            break_off(self, b"more chains are available than the ring has entries")
            return TAKEN_ALL
        while self.next_available != ready:
            if chains == 0 or total >= bytes:
                return TAKEN_SOME
            if self.open_parts >= PARTS_MAX:
                return TAKEN_NO_MEMORY
            head = guest_head(self, self.next_available)
            if not collect(self, head) or not begin_chain(self, backend, cookie, head, &moved):
                return self.not_now()
            self.next_available += 1
            chains -= 1
            total += moved
        return TAKEN_ALL

    cdef Taken not_now(self) noexcept nogil:
        return TAKEN_ALL if self.fault != NULL else TAKEN_NO_MEMORY if self.busy else TAKEN_SOME

    cdef int part_ended(self, uint32_t head, int32_t error) except -1 nogil:
        self.open_parts -= 1
        return part_done(self, head, error)

    cdef bint publish(self) noexcept nogil:
        """Statuses and used elements first, then the index, then what is in flight no longer."""
        cdef uint16_t first = self.published, count = <uint16_t>(self.next_used - self.published)
        if self.silent or not (count or self.calls_due):
            return False
        if count:
            tell_used_index(self)
            if self.inflight != NULL:
                note_published(self, first, count)
            if self.logs_used:
                self.memory.note_written_at(self.used_guest_address, 4 + 8 * <uint64_t>self.size)
        return guest_asks_for_call(self)

    cdef bint ask_for_kick(self) noexcept nogil:
        return request_kick(self)

    cdef bint is_torn(self) noexcept nogil:
        if not self.memory.is_torn() and (self.inflight == NULL or not self.inflight_memory.is_torn()):
            return False
        self.fault = b"the guest's memory was taken away"
        return True
