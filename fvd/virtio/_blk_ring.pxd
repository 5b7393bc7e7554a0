# SPDX-License-Identifier: Apache-2.0
"""One ring of a virtio block device: requests of a guest's driver in, their ends out. See _blk_ring.pyx."""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

from fvd.engine._backend cimport Backend
from fvd.virtio._guest_memory cimport GuestMemory, Shared

cdef enum:
    RING_MAX = 1024             # entries; what QEMU allows
    PIECES_MAX = 2048           # of a chain: each entry of it, cut where regions of memory meet
    PARTS_MAX = 16384           # under way; nothing more is taken then. What 128 requests of Linux, of 126 segments each, come to

# What a chain's pieces are, once translated: both as long as what lies side by side.
cdef struct Piece:
    uint8_t *at
    uint64_t length_bytes

cdef struct Bounce:             # data that cannot go straight: a buffer of ours, and where it belongs
    uint8_t *data
    uint64_t length_bytes
    uint32_t count
    Piece pieces[1]             # `count` of them

cdef struct Chain:              # one request, by the number of its first entry
    Bounce *bounce
    uint8_t *status             # where the guest reads how it ended
    uint64_t written_bytes      # into the guest's memory, for the used element
    uint32_t pending            # parts in the backend
    int32_t error               # the first one's
    uint32_t following          # the next head that was taken again after a death; NONE
    uint8_t kind                # RequestKind, or REQUEST_KINDS for what needs no backend
    uint8_t busy

cdef struct Counts:             # of one export, over all of its clients
    uint64_t reads, writes, flushes, trims, zeroes
    uint64_t errors
    uint64_t read_bytes
    uint64_t written_bytes

cdef enum Taken:                # what `take` has left
    TAKEN_FAILED = -1
    TAKEN_ALL = 0
    TAKEN_SOME = 1              # there are more
    TAKEN_NO_MEMORY = 2         # more, for which there is memory when some of those under way have ended

cdef class BlkRing:
    # --- Where it lies ------------------------------------------------------------------------------------------
    cdef readonly uint32_t size
    cdef GuestMemory memory
    cdef uint8_t *descriptors
    cdef uint8_t *available
    cdef uint8_t *used
    cdef uint64_t used_guest_address    # for the log of a migration
    cdef bint logs_used
    cdef Shared inflight_memory
    cdef uint8_t *inflight              # this ring's part of it; NULL: nobody keeps it
    # --- What was agreed upon ------------------------------------------------------------------------------------
    cdef bint has_event_index, has_indirect, is_durable, is_read_only
    cdef uint64_t sectors
    cdef uint8_t[20] serial
    # --- Where it stands -----------------------------------------------------------------------------------------
    cdef readonly uint16_t next_available       # the next entry to be taken
    cdef readonly uint16_t next_used            # the next one to be published
    cdef uint16_t published                     # the index that the guest sees
    cdef uint16_t told                          # ... when it was last told by a call
    cdef bint calls_due                         # nothing is known of the time before: call once, even if nothing has ended since
    cdef uint16_t *batch                        # the heads of used elements, by their place
    cdef uint64_t counter
    cdef Chain *chains                          # by head
    cdef readonly uint32_t busy                 # chains taken and not answered
    cdef uint32_t again                         # head of the chains that a dead server left, in their order; NONE
    cdef uint64_t bounced_bytes
    cdef bint leaves                            # what ends with ESHUTDOWN stays in flight, for the next server
    cdef bint silent                            # nothing is published any more
    cdef const char *fault                      # what the front end or its guest broke; NULL: nothing
    cdef Counts *counts                         # whoever serves several rings has them counted together
    cdef Counts own_counts
    cdef readonly uint64_t parts                # handed to the backend, ever
    cdef uint64_t open_parts                    # of these, not ended
    cdef Piece *pieces
    cdef uint32_t out_count, in_count           # pieces[:out_count] to read, pieces[out_count:][:in_count] to fill
    # --- What a loop uses ----------------------------------------------------------------------------------------
    # Takes about as many requests, of as many bytes in all, and hands them to the backend.
    cdef Taken take(self, Backend backend, uint64_t cookie, uint32_t chains, uint64_t bytes) except? TAKEN_FAILED nogil
    cdef Taken not_now(self) noexcept nogil
    # Whether memory of it was taken away under us.
    cdef bint is_torn(self) noexcept nogil
    # A part of the chain with this head has ended.
    cdef int part_ended(self, uint32_t head, int32_t error) except -1 nogil
    # Shows the guest what has ended. Returns whether it wants to be called.
    cdef bint publish(self) noexcept nogil
    # Asks the guest to kick for its next request. Returns whether there is one already.
    cdef bint ask_for_kick(self) noexcept nogil
