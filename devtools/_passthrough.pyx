# SPDX-License-Identifier: Apache-2.0
"""A backend without an engine: every request becomes one operation at the same place. It exists to measure what the serving loop costs
by itself (bench/passthrough.py) and to test it; never serve a disk with it. Keep it tiny.
"""

from libc.errno cimport EINVAL
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc

from fvd.device.op cimport OP_DISCARD, OP_FLUSH, OP_READ, OP_WRITE, TARGET_STORAGE, DeviceOp
from fvd.engine._engine cimport FLAG_FUA, REQUEST_READ, REQUEST_TRIM, REQUEST_WRITE, REQUEST_ZERO, Done
from fvd.engine._backend cimport Backend

cdef enum:
    ZERO_BYTES = 32 << 20


cdef class PassThrough(Backend):
    """The token is the request's cookie: one operation each. Write-zeroes of more than 32 MiB are refused.

    `answer_only`: no operation at all, every request has succeeded at once. What the loop costs without a device.
    """

    cdef DeviceOp *ops
    cdef Done *done
    cdef uint32_t op_count, op_capacity, done_count, done_capacity
    cdef uint8_t *zeros
    cdef uint8_t *zeros_base
    cdef bint answer_only

    def __cinit__(self, bint answer_only=False):
        self.answer_only = answer_only
        self.zeros_base = <uint8_t *>calloc(1, ZERO_BYTES + 4096)
        if self.zeros_base == NULL:
            raise MemoryError
        self.zeros = <uint8_t *>((<uint64_t>self.zeros_base + 4095) & ~<uint64_t>4095)

    def __dealloc__(self):
        free(self.ops)
        free(self.done)
        free(self.zeros_base)

    cdef int submit(self, uint32_t kind, uint32_t flags, uint64_t offset_bytes, uint64_t length_bytes, uint8_t *buffer,
                    uint64_t cookie) except -1 nogil:
        cdef DeviceOp *op
        if kind == REQUEST_ZERO and length_bytes > ZERO_BYTES:
            return self.end(cookie, -EINVAL)
        if self.answer_only:
            return self.end(cookie, 0)
        if self.op_count == self.op_capacity:
            self.op_capacity = max(256, 2 * self.op_capacity)
            self.ops = <DeviceOp *>realloc(self.ops, self.op_capacity * sizeof(DeviceOp))
            if self.ops == NULL:
                with gil:
                    raise MemoryError
        op = &self.ops[self.op_count]
        self.op_count += 1
        op.token = cookie
        op.offset_bytes = offset_bytes
        op.length_bytes = length_bytes
        op.buffer = self.zeros if kind == REQUEST_ZERO else buffer
        op.target = TARGET_STORAGE
        op.durable = flags & FLAG_FUA
        if kind == REQUEST_READ:
            op.kind = OP_READ
        elif kind == REQUEST_WRITE or kind == REQUEST_ZERO:
            op.kind = OP_WRITE
        elif kind == REQUEST_TRIM:
            op.kind = OP_DISCARD
        else:
            op.kind = OP_FLUSH
        return 0

    cdef int complete(self, uint64_t token, int64_t result) except -1 nogil:
        return self.end(token, <int32_t>result)

    cdef int end(self, uint64_t cookie, int32_t error) except -1 nogil:
        if self.done_count == self.done_capacity:
            self.done_capacity = max(256, 2 * self.done_capacity)
            self.done = <Done *>realloc(self.done, self.done_capacity * sizeof(Done))
            if self.done == NULL:
                with gil:
                    raise MemoryError
        self.done[self.done_count] = Done(cookie, error, 0)
        self.done_count += 1
        return 0

    cdef uint32_t take_ops(self, DeviceOp **ops) noexcept nogil:
        cdef uint32_t count = self.op_count
        ops[0] = self.ops
        self.op_count = 0
        return count

    cdef uint32_t take_done(self, Done **done) noexcept nogil:
        cdef uint32_t count = self.done_count
        done[0] = self.done
        self.done_count = 0
        return count
