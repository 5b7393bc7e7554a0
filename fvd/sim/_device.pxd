# SPDX-License-Identifier: Apache-2.0
"""The simulated device, for compiled callers."""

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

from fvd.sim._rng cimport Rng

cdef enum Category:             # what a fault can be asked for; CATEGORIES in _device.pyx names them
    CATEGORY_READ
    CATEGORY_BASE
    CATEGORY_WRITE
    CATEGORY_JOURNAL
    CATEGORY_MAP
    CATEGORY_FLUSH
    CATEGORY_DISCARD
    CATEGORY_ZERO
    CATEGORY_COUNT

cdef struct Version:            # a content that a logical block has had; its bytes follow
    Version *older              # NULL: this one is on the medium
    uint64_t number             # of the operation that wrote it

cdef class Operation:
    cdef readonly uint64_t number, token, offset_bytes, length_bytes
    cdef readonly int kind, target
    cdef readonly bint durable, took_effect, overtook
    cdef readonly bint took_report  # it fails by what the device was to say of others' blocks
    cdef bint by_itself             # it fails by its own data: it asks for nobody's report
    cdef bint asked                 # it has, and has not been told of yet
    cdef bint queued                # it waits for a worker
    cdef bint working               # it occupies one
    cdef public int32_t result
    cdef public uint64_t held_until
    cdef uint64_t submitted_at      # the moment: what had completed by then a flush covers
    cdef uint64_t size_at_submission    # of the storage
    cdef uint64_t late              # block i follows only when the operation completes if bit i % 64 is set
    cdef uint8_t *buffer

cdef class SimulatedDevice:
    cdef public Rng rng
    cdef public list pending
    cdef public object fault, inspect, announce, conclude
    cdef public double stuck_share, torn_share, overtaking_share
    cdef public bint page_cache, zeroes, base_closed
    cdef public uint64_t fail_number
    cdef public int32_t fail_with
    cdef readonly uint64_t size_bytes, durable_size_bytes, capacity_bytes, now_ns, submitted
    cdef uint64_t used_bytes                # the greatest size so far: beyond it the image is zero
    cdef readonly uint32_t logical_block_bytes
    cdef readonly object base_bytes
    cdef readonly dict lost         # block -> what the medium holds, of blocks that count as written, and that it never got
    # errors that are told once
    cdef public bint told_once, fua, sampler
    cdef readonly int32_t report    # of blocks that were lost: nobody has been told yet
    cdef readonly uint64_t losses, reverted, landings   # blocks that were lost, were seen to be, and came late
    cdef uint64_t page_errors, sampled
    # workers for flushes, discards and zeroing
    cdef readonly uint32_t workers
    cdef uint32_t working, discarding
    cdef list queue
    cdef uint64_t under_way[8]     # operations by category
    # what happens by itself
    cdef bint weather
    cdef double writeback_share, eviction_share, landing_share
    cdef dict landing               # block -> (content, number, moment), of failed operations that may reach the storage yet
    cdef object image_array
    cdef uint8_t *image
    cdef uint64_t base_size, metadata_start, maps_start, data_start
    cdef double rates[8]
    cdef double slow[8]
    cdef bint faulty
    cdef Version **newest           # of each logical block; NULL: what the image holds is on the medium
    cdef uint8_t *listed
    cdef uint64_t *touched
    cdef uint64_t touched_count, touched_capacity
    cdef Version *spare
    cdef uint64_t *completed_at     # by operation number; 0: not, or failed
    cdef uint64_t completed_capacity
    cdef uint64_t moment

    cdef int category_of(self, Operation op) noexcept
    cdef Operation add(self, uint64_t token, int kind, int target, uint64_t offset_bytes, uint64_t length_bytes, uint8_t *buffer,
                       bint durable)
    cdef void hold(self, Operation op) noexcept
    cdef void overtake(self, Operation op) noexcept
    cdef Operation event(self)
    cdef int begin(self, Operation op) except -1
    cdef int end(self, Operation op) except -1
    cdef int put(self, Operation op, double share, bint late=*) except -1
    cdef int catch_up(self, Operation op, double share) except -1
    cdef int lose_cached(self) except -1
    cdef double failed_share(self) noexcept
    cdef int begin_durable(self, Operation op, int32_t error) except -1
    cdef int ask_for_report(self, Operation op) except -1
    cdef int occupy(self, Operation op) except -1
    cdef int release(self, Operation op) except -1
    cdef int nothing_pending(self) except -1
    cdef int ask_sampler(self, Operation op) noexcept
    cdef int make_durable(self, Operation op) except -1
    cdef int happen(self) except -1
    cdef int evict(self, double share) except -1
    cdef int land(self, double share) except -1
    cdef int may_land(self, Operation op) except -1
    cdef int revert_lost(self) except -1
