"""The engine's compiled interface: requests and completions in, device operations and finished requests out. See docs/engine.md."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from fvd.device.op cimport DeviceOp

cdef enum RequestKind:
    REQUEST_READ = 0
    REQUEST_WRITE = 1
    REQUEST_FLUSH = 2
    REQUEST_TRIM = 3
    REQUEST_ZERO = 4
    REQUEST_CLOSE = 5       # commit, checkpoint, clean record; nothing may be submitted afterwards

cdef enum RequestFlag:
    FLAG_FUA = 1
    FLAG_NO_HOLE = 2        # write-zeroes must allocate

cdef enum DoneFlag:
    DONE_ALL_ZERO = 1       # a read that touched no device: the whole buffer is zeros (and was zeroed)

cdef enum Want:             # what the engine asks of its Python side; see Engine.want
    WANT_GROWTH = 1         # free slots are below the low-water mark, or writes wait for a slot
    WANT_EVENT = 2          # something to report (sticky error)

cdef enum ExtentState:      # block status
    EXTENT_DATA = 0
    EXTENT_BASE = 1         # read from the base
    EXTENT_ZERO = 2         # reads as zeros, occupies nothing

cdef struct Done:
    uint64_t cookie
    int32_t error           # 0 or a negative errno
    uint32_t flags          # DoneFlag

cdef struct Extent:
    uint64_t length_bytes
    uint32_t state          # ExtentState
    uint32_t reserved

cdef class Engine:
    # --- What a driver uses -------------------------------------------------------------------------------------
    cdef DeviceOp *ops              # out: operations to start; the driver takes them all and sets op_count = 0.
    cdef uint32_t op_count          #   submit/complete/tick may reallocate these arrays: re-read the pointers after each call
    cdef Done *done                 # out: finished requests, in the order in which they finished
    cdef uint32_t done_count
    cdef public uint32_t want       # Want bits; cleared by Python when it has acted
    cdef readonly uint32_t inflight_ops   # device operations handed out and not yet completed
    cdef readonly uint32_t open_requests  # requests submitted and not yet done
    # The buffer must stay valid until the request is done, and be aligned to align_bytes when the request is aligned.
    # Never fails for reasons of the disk: errors come as Done. Raises only on a broken invariant.
    cdef int submit(self, uint32_t kind, uint32_t flags, uint64_t offset_bytes, uint64_t length_bytes, uint8_t *buffer,
                    uint64_t cookie) except -1 nogil
    cdef int complete(self, uint64_t token, int64_t result) except -1 nogil
    cdef int tick(self, uint64_t now_ns) except -1 nogil
    # Requests still waiting for a slot (full storage) whose (cookie & mask) == value end with `error` (a negative errno); returns how many.
    cdef int cancel_waiting(self, uint64_t mask, uint64_t value, int32_t error) except -1 nogil
    cdef uint64_t waiting_bytes(self, uint64_t mask, uint64_t value) noexcept nogil   # bytes of such requests
    # Fills at most `room` extents for [offset, offset+length); returns how many. Adjacent extents differ in state.
    cdef int extents(self, uint64_t offset_bytes, uint64_t length_bytes, Extent *out, int room) except -1 nogil
