# SPDX-License-Identifier: Apache-2.0
"""An engine behind the serving loop's interface: every call goes straight through."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

from fvd.device.op cimport DeviceOp
from fvd.engine._backend cimport Backend
from fvd.engine._engine cimport Done, Engine, Extent


cdef class EngineBackend(Backend):
    def __init__(self, Engine engine not None):
        self.engine = engine

    cdef int submit(self, uint32_t kind, uint32_t flags, uint64_t offset_bytes, uint64_t length_bytes, uint8_t *buffer,
                    uint64_t cookie) except -1 nogil:
        return self.engine.submit(kind, flags, offset_bytes, length_bytes, buffer, cookie)

    cdef int complete(self, uint64_t token, int64_t result) except -1 nogil:
        return self.engine.complete(token, result)

    cdef void clock(self, uint64_t now_ns) noexcept nogil:
        self.engine.now_ns = now_ns

    cdef int tick(self, uint64_t now_ns) except -1 nogil:
        return self.engine.tick(now_ns)

    cdef int cancel_waiting(self, uint64_t mask, uint64_t value, int32_t error) except -1 nogil:
        return self.engine.cancel_waiting(mask, value, error)

    cdef uint64_t waiting_bytes(self, uint64_t mask, uint64_t value) noexcept nogil:
        return self.engine.waiting_bytes(mask, value)

    cdef void give_up_base(self) noexcept nogil:
        self.engine.base.timeout_ns = 0

    cdef int extents(self, uint64_t offset_bytes, uint64_t length_bytes, Extent *out, int capacity) except -1 nogil:
        return self.engine.extents(offset_bytes, length_bytes, out, capacity)

    cdef uint32_t take_ops(self, DeviceOp **ops) noexcept nogil:
        cdef uint32_t count = self.engine.op_count
        ops[0] = self.engine.ops
        self.engine.op_count = 0
        return count

    cdef uint32_t take_done(self, Done **done) noexcept nogil:
        cdef uint32_t count = self.engine.done_count
        done[0] = self.engine.done
        self.engine.done_count = 0
        return count

    cdef uint32_t wants(self) noexcept nogil:
        return self.engine.want
