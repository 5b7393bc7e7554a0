# SPDX-License-Identifier: Apache-2.0
"""The compiled interface of operation queues: device operations in, completions and socket readiness out. See _queue.pyx."""

from cpython.ref cimport PyObject
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from fvd.device.op cimport DeviceOp

cdef enum EventKind:
    EVENT_OP = 0            # an operation ended: key is its token
    EVENT_READABLE = 1      # edge: read until it would block; result is the poll mask, or a negative errno
    EVENT_WRITABLE = 2      # once per want_write

cdef struct Event:
    uint64_t key
    int64_t result          # of an operation: 0 or a negative errno
    uint32_t disk           # of an operation
    uint32_t kind           # EventKind

cdef struct Disk:
    int storage_fd
    int base_fd
    PyObject *source        # a Source: base operations go there; borrowed from Queue.attached; NULL: to base_fd
    uint64_t base_inflight  # operations of the base that have not ended
    uint32_t discard        # how storage discards: see DiscardHow
    int sampler_fd          # an open file of its own that hears every page's failure, whoever was told of it (R28); -1: none
    uint64_t asked_at       # the batch of completions at which it was asked last
    int64_t sampled         # and what it said

cdef struct Watch:
    uint64_t key
    PyObject *source        # the Source whose watch it is: told by Source.noted, not by an event; borrowed; NULL: the driver's
    int fd                  # -1: free
    uint32_t generation     # tells late answers to an earlier watch from those to this one
    uint8_t wants_write     # blocking queue: EPOLLOUT is armed

cdef class Queue    # forward

cdef class Source:
    """A base that is no descriptor, as the queue sees it. Its operations end through Queue.source_ended, in the queue's thread."""
    cdef uint32_t noted                 # what rang since turn() looked: keys of its watches, shifted left by WRITABLE_SHIFT for writable
    cdef void note(self, uint32_t what) noexcept nogil
    cdef int attach(self, Queue queue, uint32_t disk) except -1
    # Everything that has not ended ends with an error.
    cdef int detach(self) except -1
    cdef int start(self, const DeviceOp *op) except -1 nogil
    # Called when something rang, and every SUPERVISE_NS at the latest while operations are in flight.
    cdef int turn(self, int64_t now_ns) except -1 nogil

cdef enum:
    WRITABLE_SHIFT = 8

cdef class Queue:
    cdef object __weakref__
    # --- What a driver uses -------------------------------------------------------------------------------------
    cdef readonly str kind              # "io_uring" or "blocking"
    cdef readonly str notice            # why it is not io_uring; empty when it is
    cdef Event *events                  # out: the driver takes them all and sets event_count = 0
    cdef uint32_t event_count
    cdef readonly uint64_t inflight     # operations started whose end turn() has not reported
    cdef readonly bint interrupted      # the last turn() was cut short by a signal
    # Descriptors stay the caller's, and must outlive what was started on them.
    # `source`: None, or a Source for the base instead of base_fd. `sampler_fd`: asked before each good end of a flush or durable write.
    cdef int attach(self, uint32_t disk, int storage_fd, int base_fd, Source source=*, int sampler_fd=*) except -1
    cdef int detach(self, uint32_t disk) except -1
    # The disk needs its base no longer. Raises RuntimeError, and changes nothing, while operations of the base are in flight.
    cdef int release_base(self, uint32_t disk) except -1
    cdef int start(self, uint32_t disk, const DeviceOp *ops, uint32_t count) except -1 nogil
    # Returns a handle for the two below. Unwatch before closing the descriptor.
    cdef int watch(self, int fd, uint64_t key) except -1 nogil
    cdef int want_write(self, uint32_t handle) except -1 nogil
    cdef int unwatch(self, uint32_t handle) except -1 nogil
    # Hands everything started to the kernel and takes what ended: at once if something has, else after spinning up to spin_ns, else
    # sleeping up to timeout_ns. May return with no events.
    cdef int turn(self, int64_t timeout_ns, int64_t spin_ns) except -1 nogil
    # Waits for the operations in flight; nothing may be started afterwards.
    cpdef int close(self) except -1
    # --- Shared by both implementations -------------------------------------------------------------------------
    cdef uint32_t event_capacity
    cdef Disk *disks
    cdef uint32_t disk_capacity
    cdef Watch *watches
    cdef uint32_t watch_capacity
    cdef int add_event(self, uint32_t kind, uint64_t key, int64_t result, uint32_t disk) except -1 nogil
    cdef int new_watch(self, int fd, uint64_t key) except -1 nogil
    cdef int tell(self, Watch *watch, uint32_t kind, int64_t result) except -1 nogil
    # --- Sources ------------------------------------------------------------------------------------------------
    cdef list attached                  # of Source, which `sources` borrows
    cdef PyObject **sources
    cdef uint32_t source_count, source_capacity
    cdef uint64_t source_inflight       # of `inflight`
    cdef bint source_ready
    cdef int64_t next_look_ns
    cdef int watch_for(self, Source source, int fd, uint64_t key) except -1
    cdef int source_ended(self, uint32_t disk, uint64_t token, int64_t result) except -1 nogil
    cdef int start_at_source(self, uint32_t disk, const DeviceOp *op) except -1 nogil
    cdef int64_t poll_timeout(self, int64_t timeout_ns) noexcept nogil
    cdef int poll_sources(self) except -1 nogil
    cdef int drop_source(self, Source source) except -1
    cdef int drop_sources(self) except -1

cpdef Queue open_queue(bint force_blocking=*, uint32_t entries=*)
