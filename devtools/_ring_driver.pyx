# SPDX-License-Identifier: Apache-2.0
"""A guest's ring driven from Python, a call at a time, over a disk that is a bytearray: its parts end when, and in the order in which, the
caller says. It knows rings and what a backend is asked; it may not know sockets or the engine."""

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from fvd.engine._backend cimport Backend
from fvd.engine._engine cimport (FLAG_FUA, FLAG_NO_HOLE, REQUEST_FLUSH, REQUEST_READ, REQUEST_TRIM, REQUEST_WRITE, REQUEST_ZERO)
from fvd.virtio._blk_ring cimport BlkRing

KINDS = {REQUEST_READ: "read", REQUEST_WRITE: "write", REQUEST_FLUSH: "flush", REQUEST_TRIM: "trim", REQUEST_ZERO: "zero"}
TAKEN = {0: "all", 1: "some", 2: "no memory"}


cdef class RingDriver(Backend):
    """A ring and the backend below it. `waiting`: the parts under way, (kind, durable, no hole, offset, length) of each."""

    cdef readonly BlkRing ring
    cdef bytearray disk
    cdef list parts

    def __init__(self, BlkRing ring not None, bytearray disk not None):
        self.ring = ring
        self.disk = disk
        self.parts = []

    @property
    def waiting(self):
        return [part[:5] for part in self.parts]

    def take(self, uint32_t chains=64, uint64_t size_bytes=1 << 20):
        """What is left: "all" (has been taken), "some" or "no memory"."""
        return TAKEN[self.ring.take(self, 0, chains, size_bytes)]

    def end(self, uint32_t place=0, int32_t error=0):
        """One part that waits has ended, and has moved its data unless `error` (a negative errno)."""
        cdef uint64_t offset, length
        cdef uint8_t *here = self.disk
        cdef uint8_t *guest
        kind, _, _, offset, length, address, cookie = self.parts.pop(place)
        guest = <uint8_t *><size_t>address
        if not error:
            if kind == "read":
                memcpy(guest, here + offset, length)
            elif kind == "write":
                memcpy(here + offset, guest, length)
            elif kind in ("zero", "trim"):
                memset(here + offset, 0, length)
        self.ring.part_ended(cookie, error)

    def end_all(self):
        """All that wait have ended well, in the order in which they came."""
        for _ in range(len(self.parts)):
            self.end()

    def publish(self):
        """Shows what has ended. Whether the guest is to be called."""
        return self.ring.publish()

    def ask_for_kick(self):
        """Whether there is something to take already."""
        return self.ring.ask_for_kick()

    def stop(self, *, silently=False):
        """As a ring is that drains."""
        self.ring.leaves = True
        self.ring.silent = self.ring.silent or silently

    @property
    def torn(self):
        """Whether memory of it was taken away."""
        return self.ring.is_torn()

    cdef int submit(self, uint32_t kind, uint32_t flags, uint64_t offset_bytes, uint64_t length_bytes, uint8_t *buffer,
                    uint64_t cookie) except -1 nogil:
        with gil:
            if offset_bytes + length_bytes > <uint64_t>len(self.disk):
                raise RuntimeError("a part reaches beyond the disk")
            self.parts.append((KINDS[kind], bool(flags & FLAG_FUA), bool(flags & FLAG_NO_HOLE), offset_bytes, length_bytes, <size_t>buffer,
                               cookie))
        return 0
