# SPDX-License-Identifier: Apache-2.0
"""The compiled fields of a remote base. See _remote.pyx."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from fvd.device._queue cimport Queue, Source
from fvd.device.libnbd cimport nbd_handle

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass

cdef struct Line                # forward
cdef struct Operation           # forward

cdef struct Piece:              # one NBD read
    Operation *operation
    Piece *next                 # in the free list
    Piece *chain                # all of the line's
    uint8_t *bounce             # owned; NULL: read straight into the operation's buffer
    uint8_t *target
    uint64_t skip               # bytes of the bounce buffer before what was asked for
    uint64_t length_bytes

cdef struct Operation:          # a DeviceOp that has not ended
    Line *line
    Operation *older            # under way, by when they began
    Operation *newer
    Operation *next             # among those that have ended, or in the free list
    Operation *chain            # all of the line's
    uint64_t token
    int64_t begun_ns
    uint32_t pieces             # under way, plus one while they are being issued
    int error                   # errno

cdef struct Line:               # a connection. One thread at a time has it: the helper makes it, the loop uses it, the helper ends it
    nbd_handle *handle
    int fd                      # a duplicate of its socket, for poll and the queue's watch: libnbd closes its own whenever it likes
    int socket_fd               # libnbd's own, for a child after fork
    uint32_t watch
    uint8_t given_up            # libnbd is not called any more, but to close
    uint8_t write_wanted
    uint8_t idle                # nothing was under way when it was given up: it may say goodbye
    uint8_t tells_zeros
    uint64_t size_bytes
    uint64_t minimum_bytes      # what requests are aligned to
    uint64_t maximum_bytes
    int64_t heard_ns            # when the server last sent a byte
    int64_t answered_begun_ns   # when the youngest operation that was answered had begun
    uint64_t answered
    Operation *oldest
    Operation *newest
    Operation *ended
    Operation *free_operations
    Operation *operations
    Piece *free_pieces
    Piece *pieces
    Line *next
    char[200] reason            # why it was given up; empty: because we wanted to

cdef struct Extents:            # answers to one block status request
    uint32_t *entries           # pairs of length and flags
    size_t count
    size_t capacity
    uint8_t no_memory

cdef class Remote(Source):
    cdef readonly str uri
    cdef readonly list command
    cdef readonly str name
    cdef readonly double timeout_seconds
    cdef readonly uint64_t size_bytes       # of the export; 0 before open()
    cdef object notes                       # a Counted
    cdef readonly str trouble               # why there is no connection; empty: there is one, or none was lost
    cdef object __weakref__
    cdef object helper, opened, failure, random, prepare
    cdef int inherited
    cdef bint was_open, closed
    # The loop's.
    cdef Queue queue
    cdef uint32_t disk, wake_watch
    cdef Line *line
    cdef unsigned long owner                # the loop's thread
    cdef int64_t limit_ns
    # Shared with the helper, under the lock.
    cdef pthread_mutex_t lock
    cdef Line *fresh                        # made and not taken by the loop yet
    cdef Line *dying                        # to be ended by the helper
    cdef bint wanted, stop
    cdef int loop_fd                        # eventfds: rung for the loop, for the helper
    cdef int helper_fd
    cdef Extents extents

    cdef int submit(self, Line *line, uint64_t token, uint64_t offset_bytes, uint64_t length_bytes, uint8_t *buffer) except -1 nogil
    cdef int settle(self) except -1 nogil
    cdef int pump(self) except -1 nogil
    cdef int give_up(self, int error, const char *reason, bint again) except -1 nogil
    cdef int take_fresh(self) except -1 nogil
    cdef bint is_overdue(self, int64_t now_ns) noexcept nogil
    cdef Line *connect(self) except NULL
    cdef int bury(self) except -1
    cdef bint rest(self, double seconds) except -1
    cdef int wait(self, Line *line, int64_t cookie, int64_t until_ns) except -1
    cdef int put_away(self) except -1
    cdef Line *unattached(self) except NULL
