# SPDX-License-Identifier: Apache-2.0
"""A guest whose requests go through a ring in its own memory, for compiled callers."""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

from fvd.engine._engine_backend cimport EngineBackend
from fvd.sim._rng cimport Rng
from fvd.virtio._blk_ring cimport BlkRing
from fvd.virtio._guest_memory cimport GuestMemory, Shared

cdef enum:
    PLACES = 32                 # requests at once

cdef struct Place:              # one request of the guest, by its head
    uint32_t slot               # the player's number
    uint8_t kind                # the player's
    uint8_t active
    uint32_t count              # pieces of its data
    uint64_t[24] at             # in the guest's memory
    uint64_t[24] length

cdef class RingGuest:
    cdef object file
    cdef GuestMemory memory
    cdef Shared window          # the same memory, as the guest sees it
    cdef Shared inflight
    cdef BlkRing ring
    cdef EngineBackend backend
    cdef Rng rng
    cdef Place[PLACES] places
    cdef uint16_t available, seen
    cdef object geometry        # sectors
    # Whether such a request can be made now.
    cdef bint fits(self, int kind, uint64_t sectors, bint fua) noexcept nogil
    cdef int put(self, int kind, uint64_t first_sector, uint64_t sectors, bint no_hole, const uint8_t *data, uint32_t slot) except -1
    cdef int chain(self, uint32_t place, uint32_t entries, uint64_t *addresses, uint32_t *lengths, uint16_t *flags) except -1
    cdef int take(self) except -1
    # The next request that the device has answered: its place; -1: none. Data that were read are put into `data` by `fetch`.
    cdef int next_answer(self) except -2
    cdef int32_t error_of(self, int place) noexcept nogil
    cdef int fetch(self, int place, uint8_t *data) except -1
