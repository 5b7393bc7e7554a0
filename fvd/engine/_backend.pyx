# SPDX-License-Identifier: Apache-2.0
"""What serves requests for an export, as those who bring them see it: an engine (_engine_backend.pyx), or nothing but a device, to measure
what lies above it. It knows neither NBD nor rings."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

from fvd.device.op cimport DeviceOp
from fvd.engine._engine cimport Done, Extent


cdef class Backend:
    """What the loop needs of a disk."""

    cdef int submit(self, uint32_t kind, uint32_t flags, uint64_t offset_bytes, uint64_t length_bytes, uint8_t *buffer,
                    uint64_t cookie) except -1 nogil:
        with gil:
            raise NotImplementedError

    cdef int complete(self, uint64_t token, int64_t result) except -1 nogil:
        with gil:
            raise NotImplementedError

    cdef void clock(self, uint64_t now_ns) noexcept nogil:
        """What time it is, before anything else is asked in a turn."""

    cdef int tick(self, uint64_t now_ns) except -1 nogil:
        return 0

    cdef int cancel_waiting(self, uint64_t mask, uint64_t value, int32_t error) except -1 nogil:
        return 0

    cdef uint64_t waiting_bytes(self, uint64_t mask, uint64_t value) noexcept nogil:
        return 0

    cdef void give_up_base(self) noexcept nogil:
        """Nobody waits any longer for reads of a base that fails."""

    cdef int extents(self, uint64_t offset_bytes, uint64_t length_bytes, Extent *out, int capacity) except -1 nogil:
        out[0].length_bytes = length_bytes
        out[0].state = 0
        return 1

    cdef uint32_t take_ops(self, DeviceOp **ops) noexcept nogil:
        return 0

    cdef uint32_t take_done(self, Done **done) noexcept nogil:
        return 0

    cdef uint32_t wants(self) noexcept nogil:
        return 0
