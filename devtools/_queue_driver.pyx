# SPDX-License-Identifier: Apache-2.0
"""An operation queue driven from Python, a call at a time. It knows queues and descriptors; it may not know the engine or the format."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from fvd._aligned cimport aligned
from fvd.device._queue cimport EVENT_OP, EVENT_READABLE, EVENT_WRITABLE, Queue, Source, open_queue
from fvd.device.op cimport OP_DISCARD, OP_FLUSH, OP_READ, OP_WRITE, OP_ZERO, TARGET_BASE, TARGET_STORAGE, DeviceOp


cdef class QueueDriver:
    """A queue of one thread: a batch of operations on a disk, or readiness of sockets."""

    cdef readonly Queue queue

    def __init__(self, *, force_blocking=False, entries=1024):
        self.queue = open_queue(force_blocking, entries)

    def attach(self, int storage_fd, int base_fd=-1, Source remote=None, uint32_t disk=0, int sampler_fd=-1):
        self.queue.attach(disk, storage_fd, base_fd, remote, sampler_fd)

    def release_base(self, uint32_t disk=0):
        self.queue.release_base(disk)

    def detach(self, uint32_t disk=0):
        self.queue.detach(disk)

    def run(self, batch, disks=None, meanwhile=None):
        """Run operations together. Each is ("read" or "read_base" or "discard" or "zero", offset, length), ("write" or "write_durable",
        offset, data) or ("flush",). Returns (result, data) in the same order: 0 or a negative errno, and what was read. `disks`: whose each
        is, instead of disk 0. `meanwhile()` is called when all have been started."""
        cdef uint32_t i, count = len(batch), ended = 0
        cdef uint64_t capacity = 0
        cdef DeviceOp *ops = <DeviceOp *>calloc(count + 1, sizeof(DeviceOp))
        cdef uint8_t *buffers = NULL
        kinds = {"read": OP_READ, "read_base": OP_READ, "write": OP_WRITE, "write_durable": OP_WRITE, "flush": OP_FLUSH,
                 "discard": OP_DISCARD, "zero": OP_ZERO}
        results = [0] * count
        try:
            for i in range(count):
                op = batch[i]
                name = op[0]
                ops[i].token = i
                ops[i].kind = kinds[name]
                ops[i].target = TARGET_BASE if name == "read_base" else TARGET_STORAGE
                ops[i].durable = name == "write_durable"
                if ops[i].kind != OP_FLUSH:
                    ops[i].offset_bytes = op[1]
                    ops[i].length_bytes = len(op[2]) if ops[i].kind == OP_WRITE else op[2]
                if ops[i].kind == OP_READ or ops[i].kind == OP_WRITE:
                    ops[i].buffer = <uint8_t *>capacity         # where it will be
                    capacity += (ops[i].length_bytes + 4095) & ~<uint64_t>4095
            buffers = <uint8_t *>aligned(capacity + 4096)
            if buffers == NULL:
                raise MemoryError
            for i in range(count):
                ops[i].buffer = buffers + <uint64_t>ops[i].buffer
                if ops[i].kind == OP_WRITE:
                    memcpy(ops[i].buffer, <const uint8_t *><bytes>batch[i][2], ops[i].length_bytes)
            if disks is None:
                with nogil:
                    self.queue.start(0, ops, count)
            else:
                for i in range(count):
                    self.queue.start(disks[i], &ops[i], 1)
            if meanwhile is not None:
                meanwhile()
            while ended < count:
                with nogil:
                    self.queue.turn(1000000000, 0)
                for i in range(self.queue.event_count):
                    if self.queue.events[i].kind == EVENT_OP:
                        results[self.queue.events[i].key] = self.queue.events[i].result
                        ended += 1
                self.queue.event_count = 0
            return [
                (results[i], ops[i].buffer[: ops[i].length_bytes] if ops[i].kind == OP_READ else b"")
                for i in range(count)
            ]
        finally:
            free(buffers)
            free(ops)

    def watch(self, int fd, uint64_t key):
        return self.queue.watch(fd, key)

    def want_write(self, uint32_t handle):
        self.queue.want_write(handle)

    def unwatch(self, uint32_t handle):
        self.queue.unwatch(handle)

    def turn(self, double timeout_seconds, double spin_seconds=0):
        """One turn: ("readable" or "writable", key, poll mask or negative errno) each."""
        cdef int64_t timeout_ns = <int64_t>(timeout_seconds * 1e9), spin_ns = <int64_t>(spin_seconds * 1e9)
        cdef uint32_t i
        with nogil:
            self.queue.turn(timeout_ns, spin_ns)
        names = {EVENT_READABLE: "readable", EVENT_WRITABLE: "writable"}
        events = []
        for i in range(self.queue.event_count):
            if self.queue.events[i].kind not in names:
                raise RuntimeError("an operation ended that nobody started")
            events.append((names[self.queue.events[i].kind], self.queue.events[i].key, self.queue.events[i].result))
        self.queue.event_count = 0
        return events

    def close(self):
        self.queue.close()
