# SPDX-License-Identifier: Apache-2.0
"""What serves requests for an export: the engine's compiled interface, so that what brings them can be measured without an engine."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

from fvd.device.op cimport DeviceOp
from fvd.engine._engine cimport Done, Extent


cdef class Backend:
    # As fvd/engine/_engine.pxd says of Engine's members of the same names.
    cdef int submit(self, uint32_t kind, uint32_t flags, uint64_t offset_bytes, uint64_t length_bytes, uint8_t *buffer,
                    uint64_t cookie) except -1 nogil
    cdef int complete(self, uint64_t token, int64_t result) except -1 nogil
    cdef void clock(self, uint64_t now_ns) noexcept nogil      # Engine.now_ns: set before what a turn begins or ends
    cdef int tick(self, uint64_t now_ns) except -1 nogil
    cdef int cancel_waiting(self, uint64_t mask, uint64_t value, int32_t error) except -1 nogil
    cdef uint64_t waiting_bytes(self, uint64_t mask, uint64_t value) noexcept nogil
    cdef void give_up_base(self) noexcept nogil     # reads of a base that fails are tried no more: nobody waits for them
    cdef int extents(self, uint64_t offset_bytes, uint64_t length_bytes, Extent *out, int capacity) except -1 nogil
    # Hand over what is there and forget it; the arrays are valid until the next call of submit, complete, tick or cancel_waiting.
    cdef uint32_t take_ops(self, DeviceOp **ops) noexcept nogil
    cdef uint32_t take_done(self, Done **done) noexcept nogil
    cdef uint32_t wants(self) noexcept nogil
