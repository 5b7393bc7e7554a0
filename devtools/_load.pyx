# SPDX-License-Identifier: Apache-2.0
"""A closed loop of requests to one open disk inside this process: so many in flight, each followed by the next, and no Python for any.

It exists to measure what the engine and the operation queue cost by themselves, without NBD and without callers that sleep
(bench/inprocess.py). It drives a disk as `_disk_thread` does, and may know no more than that.
"""

import threading

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from fvd._aligned cimport aligned
from fvd.device.clock cimport monotonic_ns
from fvd.engine._engine cimport REQUEST_READ, REQUEST_WRITE
from fvd.disk._disk_thread cimport DiskThread

from fvd.errors import InvalidArgument

cdef enum:
    DEPTH_MAX = 256                # what the driver's queue has entries for
    TICK_NS = 1000000000


cdef class LoadThread(DiskThread):
    """An open volume, driven by requests that are made up here. Made by `load`; closes the volume as a DiskThread does.

    While `run` runs, calls of other threads wait.
    """

    cdef bint running
    cdef object ended               # threading.Event
    cdef uint32_t kind, depth, free_count, stop_error
    cdef bint random
    cdef uint64_t block_bytes, blocks, first_byte, cursor, rng
    cdef uint64_t wanted, end_ns    # how many to begin at most, and until when; 0: no bound
    cdef uint64_t begun, finished, begun_ns, ended_ns
    cdef uint8_t *buffers           # one block for each request in flight
    cdef uint32_t *idle             # those that are not
    cdef uint64_t *since_ns
    cdef uint32_t *times_ns         # borrowed from the caller of `run`
    cdef uint64_t times_capacity

    def __dealloc__(self):
        self.let_go()

    cdef void let_go(self) noexcept nogil:
        free(self.buffers)
        free(self.idle)
        free(self.since_ns)
        self.buffers, self.idle, self.since_ns = NULL, NULL, NULL

    def run(self, *, bint write, uint64_t block_bytes, uint32_t depth, bint random=True, offset_bytes=0, length_bytes=None, requests=0,
            seconds=0.0, uint64_t seed=1, times_ns=None):
        """Keeps `depth` reads or writes of `block_bytes` in flight, at random blocks of a range or in sequence.

        Ends after `requests` or `seconds`, whichever is first. `times_ns`: a writable buffer of uint32, filled with how long each request
        took, in the order in which they ended, as far as there is space. Returns (requests, seconds). Raises what `pread`, `pwrite` raise.
        """
        cdef uint32_t[::1] times
        if self.running:
            raise RuntimeError("a load is under way")
        length = self.volume.geometry.virtual_size_bytes - offset_bytes if length_bytes is None else length_bytes
        self.check_range(offset_bytes, length)
        if not 0 < depth <= DEPTH_MAX or not block_bytes or length < block_bytes or not (requests or seconds):
            raise InvalidArgument(f"{depth} requests of {block_bytes} bytes in {length} bytes: no load, or one without an end")
        self.kind = REQUEST_WRITE if write else REQUEST_READ
        self.random, self.block_bytes, self.depth, self.first_byte = random, block_bytes, depth, offset_bytes
        self.blocks = length // block_bytes
        self.cursor, self.rng = 0, seed * <uint64_t>0x9E3779B97F4A7C15 | 1
        self.wanted, self.begun, self.finished, self.stop_error = requests, 0, 0, 0
        self.times_ns, self.times_capacity = NULL, 0
        if times_ns is not None and len(times_ns):
            times = times_ns
            self.times_ns, self.times_capacity = &times[0], <uint64_t>times.shape[0]
        self.buffers = <uint8_t *>aligned(depth * block_bytes)
        self.idle = <uint32_t *>calloc(depth, sizeof(uint32_t))
        self.since_ns = <uint64_t *>calloc(depth, sizeof(uint64_t))
        self.ended = threading.Event()
        try:
            if self.buffers == NULL or self.idle == NULL or self.since_ns == NULL:
                raise MemoryError
            with nogil:
                self.fill_buffers()
            self.call(lambda: self.begin(seconds))
            self.post(bool)             # the loop's next turn is now, not after its tick
            self.wait_for_the_end()
        finally:
            if self.ended.is_set() or not self.running:
                self.let_go()
        if self.stop_error:
            self.check_result(-<int32_t>self.stop_error, "writing" if write else "reading", 0, 0)
        return self.finished, (self.ended_ns - self.begun_ns) / 1e9

    def wait_for_the_end(self):
        while not self.ended.wait(0.5):
            if self.dead:
                raise self.closed_error()

    def begin(self, seconds):
        """In the loop's thread."""
        if self.engine.open_requests:
            raise RuntimeError("a load begins while other requests are under way")
        for number in range(self.depth):
            self.idle[number] = number
        self.free_count = self.depth
        self.begun_ns = <uint64_t>monotonic_ns()
        self.end_ns = self.begun_ns + <uint64_t>(seconds * 1e9) if seconds else 0
        self.running = True

    cdef void fill_buffers(self) noexcept nogil:
        """With what no layer can take for zeros."""
        cdef uint64_t *words = <uint64_t *>self.buffers
        cdef uint64_t number
        for number in range(self.depth * self.block_bytes // 8):
            words[number] = self.draw()

    cdef uint64_t draw(self) noexcept nogil:
        self.rng ^= self.rng << 13
        self.rng ^= self.rng >> 7
        self.rng ^= self.rng << 17
        return self.rng

    cdef int submit_more(self, uint64_t now_ns) except -1 nogil:
        """Begins as many requests as there are buffers for, until the end."""
        cdef uint64_t block
        cdef uint32_t number
        while self.free_count and self.stop_error == 0:
            if (self.wanted and self.begun == self.wanted) or (self.end_ns and now_ns >= self.end_ns):
                break
            if self.random:
                block = self.draw() % self.blocks
            else:
                block = self.cursor
                self.cursor = self.cursor + 1 if self.cursor + 1 < self.blocks else 0
            self.free_count -= 1
            number = self.idle[self.free_count]
            self.since_ns[number] = now_ns
            self.begun += 1
            self.engine.submit(self.kind, 0, self.first_byte + block * self.block_bytes, self.block_bytes,
                               self.buffers + number * self.block_bytes, number)
        return 0

    cdef void take_done(self, uint64_t now_ns) noexcept nogil:
        cdef uint32_t i, number
        cdef uint64_t took_ns
        for i in range(self.engine.done_count):
            number = <uint32_t>self.engine.done[i].cookie
            if self.engine.done[i].error and self.stop_error == 0:
                self.stop_error = <uint32_t>-self.engine.done[i].error
            if self.finished < self.times_capacity:
                took_ns = now_ns - self.since_ns[number]
                self.times_ns[self.finished] = <uint32_t>min(took_ns, <uint64_t>0xFFFFFFFF)
            self.finished += 1
            self.idle[self.free_count] = number
            self.free_count += 1
        self.engine.done_count = 0

    cdef int turn_once(self) except -1 nogil:
        """As the DiskThread's, with requests of our own instead of callers'."""
        cdef bint busy = True
        if not self.running:
            return DiskThread.turn_once(self)
        self.engine.now_ns = <uint64_t>monotonic_ns()
        self.submit_more(self.engine.now_ns)
        self.engine.tick(self.engine.now_ns)
        while busy:
            self.hand_over()
            if self.engine.done_count:
                self.engine.now_ns = <uint64_t>monotonic_ns()
                self.take_done(self.engine.now_ns)
                self.submit_more(self.engine.now_ns)
            busy = self.has_more()
        if self.free_count == self.depth:
            self.ended_ns = <uint64_t>monotonic_ns()
            self.running = False
            with gil:
                self.ended.set()
            return 0
        self.wait(TICK_NS)
        return 0


def load(volume, *, bint force_blocking=False):
    """Starts driving an open volume in a thread of its own, as `fvd.disk._disk_thread.drive` does; `run` puts a load on it."""
    driver = LoadThread(volume, force_blocking, None)
    driver.start()
    return driver
