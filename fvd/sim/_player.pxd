# SPDX-License-Identifier: Apache-2.0
"""Requests in flight on one open disk, for compiled callers."""

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

from fvd.engine._engine cimport Engine
from fvd.sim._device cimport Operation, SimulatedDevice
from fvd.sim._rng cimport Rng
from fvd.sim._oracle cimport Oracle
from fvd.sim._ring_guest cimport RingGuest

cdef enum Kind:                 # KINDS in _player.pyx names them
    KIND_READ
    KIND_WRITE
    KIND_FLUSH
    KIND_TRIM
    KIND_ZERO
    KIND_CLOSE
    KIND_FUA                    # random play only: a write with FUA
    KIND_REWRITE                # random play only: a write near the beginning of the area
    KIND_COUNT

cdef struct Guest:              # a request in flight
    uint64_t cookie
    uint64_t first_sector
    uint64_t sectors
    uint64_t began
    uint8_t *allocation         # to be freed
    uint8_t *buffer
    uint32_t write              # the oracle's number; 0: none
    uint8_t kind
    uint8_t fua
    uint8_t no_hole
    uint8_t alone               # nothing else was in flight when it was submitted
    uint8_t growable            # it was submitted when the storage had not its greatest size, as the engine knows it
    uint8_t promised            # the guest's reserve had a slot for it
    uint32_t chunks             # slots that it may take: 0 of what takes none
    uint8_t active
    uint8_t by_ring

cdef class Player:
    cdef readonly Engine engine
    cdef readonly SimulatedDevice device
    cdef readonly Oracle oracle
    cdef readonly Rng rng
    cdef readonly RingGuest ring    # most requests go through it; None: none does
    cdef readonly uint64_t requests_done
    cdef public uint64_t failed_at  # from this moment no flush may succeed
    cdef uint64_t changes_at_failure        # pending then; there may never be more
    cdef public bint errors_expected, exhausted, fails_when_full, cancelled, has_base, promises_flush, every_write_durable
    cdef public bint stopped        # the engine has been told to: nothing may reach the device, and every request fails (R39)
    cdef public object log          # a list that is told every event, or None
    cdef public object mapped       # called with the (first sector, sectors) of a write acknowledged as durable, or None
    cdef dict holes_active, holes_ended     # chunk -> trims and write-zeroes of it in flight; when the last one of it ended
    cdef public object on_done      # called with (cookie, kind, error, data) instead of the oracle, or None
    cdef public object attend       # called when the engine wants something of `attended`, or at `due_ns` of the device's clock; or None
    cdef public uint32_t attended
    cdef public uint64_t due_ns
    cdef uint64_t reserve_left, chunks_in_flight, waited
    cdef bint promises              # to some that are under way
    cdef bint trims                 # else a trim does nothing: the raw layout over a base
    cdef readonly uint32_t in_flight_count
    cdef uint64_t reverted          # blocks that the device lost and no longer shows, when that was last looked at
    cdef bint doubts                # there have been such in this life
    # what random requests look like
    cdef public uint32_t depth, least_depth     # the queue drains to between the two after each request
    cdef uint64_t largest_sectors, unit_sectors, block_sectors, chunk_sectors, disk_sectors, most_bytes
    cdef double skew_share, verify_share, side_share
    cdef list to_verify            # (first sector, sectors) of writes that have ended
    cdef list to_send_again         # (kind, first sector, sectors, fua, no_hole, write) that the last life has not answered
    cdef uint32_t reads_in_flight
    cdef public uint64_t discards_max, discard_bytes   # in flight at once, and of each; 0: any
    cdef double weights[8]
    cdef double weight_sum
    cdef uint64_t areas[16]         # pairs (first sector, sectors) where requests fall
    cdef uint32_t area_count
    cdef Rng request_rng
    cdef Guest *guests
    cdef uint32_t capacity, free_hint
    cdef uint64_t serial, exhausted_until

    cdef uint64_t send(self, int kind, uint64_t first_sector, uint64_t sectors, bint fua, bint no_hole, uint64_t skew,
                       uint32_t again=*) except 0
    cdef uint32_t free_place(self) except? 0xFFFFFFFF
    cdef int promise(self, Guest *guest) except -1
    cdef int tell_oracle(self, Guest *guest, uint32_t again) except -1
    cdef void promises_end(self) noexcept nogil
    cdef int send_some_again(self, bint every) except -1
    cdef int pump(self) except -1
    cdef int check_progress(self) except -1
    cdef bint turn(self) except -1
    cdef int take(self, Operation op) except -1
    cdef int take_old_answers(self, RingGuest ring) except -1
    cdef int take_answers(self, bint at_once) except -1
    cdef int finished(self, uint64_t cookie, int32_t error, uint32_t flags) except -1
    cdef int check_bounds(self, Operation op) except -1
    cdef int check_waiting(self) except -1
    cdef int check_allocated(self, Guest *guest) except -1
    cdef int hole_began(self, Guest *guest) except -1
    cdef int hole_ended(self, Guest *guest) except -1
    cdef bint no_hole_beside(self, Guest *guest) except -1
    cdef int verify(self, Guest *guest) except -1
    cdef int forget(self, Guest *guest) except -1
    cdef int random_request(self) except -1
