# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""A simulated block device: an operation is submitted, takes effect and completes in separate events, whose order the rng decide.

A write takes effect (is seen by reads) at some moment before it completes, or block by block until then, and stays volatile until a flush
that was submitted after its completion completes, or until its own completion if it is durable. A crash leaves each volatile logical
block as any of the contents it had since it was last durable; writes that had not taken effect yet may have reached some of their blocks
too. See docs/internals/simulation.md.
It may not know the engine or the format: where the journal and the maps lie it is told, to name its faults by.
"""

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy, memset

import numpy as np

from libc.errno cimport EOPNOTSUPP

from fvd.device.op cimport OP_DISCARD, OP_FLUSH, OP_READ, OP_WRITE, OP_ZERO, TARGET_BASE, TARGET_STORAGE
from fvd.sim._base cimport fill_from_base
from fvd.sim._rng cimport Rng

READ, WRITE, FLUSH, DISCARD, ZERO = OP_READ, OP_WRITE, OP_FLUSH, OP_DISCARD, OP_ZERO
STORAGE, BASE = TARGET_STORAGE, TARGET_BASE
CATEGORIES = ("read", "base", "write", "journal", "map", "flush", "discard", "zeroing")
KIND_NAMES = ("read", "write", "flush", "discard", "zero")

cdef enum:
    DISCARDED = 0xDD
    GARBLED = 0xBD              # what a read that fails leaves in its buffer
    LOOK_BACK = 64              # operations that one may overtake

cdef uint64_t STUCK = <uint64_t>1 << 60
cdef uint64_t QUEUED = <uint64_t>1 << 61


include "_device_versions.pxi"


cdef class Operation:
    """One device operation on its way."""

    def __repr__(self):
        where = "" if self.kind == OP_FLUSH else f" {self.offset_bytes}+{self.length_bytes}"
        target = " of the base" if self.target == TARGET_BASE else ""
        state = f" took effect ({self.result})" if self.took_effect else ""
        return f"<{self.number}: {KIND_NAMES[self.kind]}{' durable' if self.durable else ''}{where}{target}{state}>"

    @property
    def content(self):
        return (<char *>self.buffer)[: self.length_bytes] if self.buffer != NULL else b""


cdef class SimulatedDevice:

    def __cinit__(self):
        self.newest = NULL
        self.listed = NULL
        self.touched = NULL
        self.completed_at = NULL
        self.spare = NULL

    def __init__(self, uint64_t capacity_bytes, uint32_t logical_block_bytes, Rng rng, *, base_bytes=None, regions=(0, 0, 0)):
        cdef uint8_t[::1] view
        self.rng = rng
        self.logical_block_bytes = logical_block_bytes
        self.capacity_bytes = capacity_bytes
        self.base_bytes = base_bytes
        self.base_size = 0 if base_bytes is None else base_bytes
        self.metadata_start, self.maps_start, self.data_start = regions
        self.image_array = np.zeros(capacity_bytes, np.uint8)   # of memory that nobody has touched: most of a vast one stays so
        view = self.image_array
        self.image = &view[0]
        self.newest = <Version **>calloc(capacity_bytes // logical_block_bytes + 1, sizeof(Version *))
        self.listed = <uint8_t *>calloc(capacity_bytes // logical_block_bytes + 1, 1)
        self.touched_capacity = 256
        self.touched = <uint64_t *>malloc(self.touched_capacity * 8)
        self.completed_capacity = 1024
        self.completed_at = <uint64_t *>calloc(self.completed_capacity, 8)
        if self.newest == NULL or self.listed == NULL or self.touched == NULL or self.completed_at == NULL:
            raise MemoryError("simulated device")
        self.pending = []
        self.lost = {}
        self.landing = {}
        self.queue = []
        self.zeroes = True
        self.fua = True
        self.moment = 1

    def __dealloc__(self):
        cdef uint64_t i
        cdef Version *version
        if self.touched != NULL and self.newest != NULL:
            for i in range(self.touched_count):
                give_versions(self, self.newest[self.touched[i]])
        while self.spare != NULL:
            version = self.spare
            self.spare = version.older
            free(version)
        free(self.newest)
        free(self.listed)
        free(self.touched)
        free(self.completed_at)

    @property
    def image(self):
        return memoryview(self.image_array)[: self.size_bytes]

    @property
    def volatile_blocks(self):
        cdef uint64_t i, count = 0
        for i in range(self.touched_count):
            count += self.newest[self.touched[i]] != NULL
        return count

    def grow(self, uint64_t size_bytes, bytes filler):
        if not self.size_bytes <= size_bytes <= self.capacity_bytes:
            raise ValueError(f"{size_bytes} bytes: the device has {self.size_bytes} and can have {self.capacity_bytes}")
        cdef uint64_t count = size_bytes - self.size_bytes
        if filler and count:
            pattern = np.frombuffer((filler * (65536 // len(filler) + 1))[: 65536 // len(filler) * len(filler)], np.uint8)
            whole = count // len(pattern) * len(pattern)
            tail = self.image_array[self.size_bytes : size_bytes]
            tail[:whole].reshape(-1, len(pattern))[:] = pattern
            tail[whole:] = pattern[: count - whole]
        elif count:
            self.image_array[self.size_bytes : min(size_bytes, self.used_bytes)] = 0
        self.size_bytes = size_bytes
        self.used_bytes = max(self.used_bytes, size_bytes)

    def keep_size(self):
        self.durable_size_bytes = self.size_bytes

    def set_faults(self, rates):
        cdef int i
        for i, name in enumerate(CATEGORIES):
            self.rates[i] = rates.get(name, 0.0)
        self.faulty = any(rates.values())

    def set_slow(self, shares):
        cdef int i
        for i, name in enumerate(CATEGORIES):
            self.slow[i] = shares.get(name, 0.0)

    def advance(self, uint64_t by_ns):
        """The clock moves."""
        self.now_ns += by_ns

    # --- events ---------------------------------------------------------------------------------------------------

    def submit(self, operations):
        for token, kind, target, offset, length, address, durable in operations:
            self.add(token, kind, target, offset, length, <uint8_t *><uintptr_t>address, durable)

    cdef Operation add(self, uint64_t token, int kind, int target, uint64_t offset_bytes, uint64_t length_bytes, uint8_t *buffer,
                       bint durable):
        cdef Operation op = Operation.__new__(Operation)
        self.submitted += 1
        if self.submitted >= self.completed_capacity:
            self.completed_at = <uint64_t *>realloc(self.completed_at, self.completed_capacity * 16)
            if self.completed_at == NULL:
                raise MemoryError("simulated device")
            memset(self.completed_at + self.completed_capacity, 0, self.completed_capacity * 8)
            self.completed_capacity *= 2
        op.number = self.submitted
        op.token = token
        op.kind = kind
        op.target = target
        op.offset_bytes = offset_bytes
        op.length_bytes = length_bytes
        op.buffer = buffer
        op.durable = durable
        op.submitted_at = self.moment
        op.size_at_submission = self.size_bytes
        self.hold(op)
        if self.rng.chance(self.stuck_share):
            op.held_until = STUCK
        if self.overtaking_share and self.rng.chance(self.overtaking_share):
            self.overtake(op)
        self.pending.append(op)
        self.under_way[self.category_of(op)] += 1
        if self.workers:
            self.occupy(op)
        if op.kind == OP_WRITE and op.offset_bytes < self.data_start and self.announce is not None:
            self.announce(op)
        return op

    def set_workers(self, uint32_t workers):
        self.workers = workers

    cdef int occupy(self, Operation op) except -1:
        """A flush, discard or zeroing takes a worker, or waits for one; while all of them discard, everything else is slow."""
        if op.kind == OP_READ or op.kind == OP_WRITE:
            if self.discarding >= self.workers:
                op.held_until = max(op.held_until, self.moment + self.rng.between(1, 50))
        elif self.working < self.workers:
            op.working = True
            self.working += 1
            self.discarding += op.kind == OP_DISCARD
        else:
            op.queued = True
            op.held_until = QUEUED
            self.queue.append(op)
        return 0

    cdef int release(self, Operation op) except -1:
        cdef Operation following
        if op.queued:
            self.queue.remove(op)
        if not op.working:
            return 0
        op.working = False
        self.working -= 1
        self.discarding -= op.kind == OP_DISCARD
        if self.queue:
            following = <Operation>self.queue.pop(0)
            following.queued = False
            following.working = True
            following.held_until = 0
            self.working += 1
            self.discarding += following.kind == OP_DISCARD
            self.hold(following)
        return 0

    cdef int nothing_pending(self) except -1:
        self.pending.clear()
        self.queue.clear()
        self.working = self.discarding = 0
        memset(self.under_way, 0, sizeof(self.under_way))
        return 0

    cdef void overtake(self, Operation op) noexcept:
        """What is under way where this one goes, one of them a write, takes effect after it; and it is told of after that."""
        cdef Py_ssize_t count = len(self.pending)
        cdef Py_ssize_t i
        cdef Operation other
        if op.kind == OP_FLUSH or op.target != TARGET_STORAGE:
            return
        for i in range(max(0, count - LOOK_BACK), count):
            other = <Operation>self.pending[i]
            if (not other.took_effect and other.target == TARGET_STORAGE and other.kind != OP_FLUSH
                    and (other.kind != OP_READ or op.kind != OP_READ)
                    and other.offset_bytes < op.offset_bytes + op.length_bytes
                    and op.offset_bytes < other.offset_bytes + other.length_bytes):
                other.held_until = max(other.held_until, self.moment + self.rng.between(20, 100))
                op.overtook = True

    cdef void hold(self, Operation op) noexcept:
        """Perhaps its next event is a long time off."""
        if self.rng.chance(self.slow[self.category_of(op)]):
            op.held_until = self.moment + (self.rng.between(20, 600) if not self.rng.chance(0.1) else self.rng.between(600, 3000))
        if op.took_effect and op.overtook:
            op.held_until = max(op.held_until, self.moment + self.rng.between(50, 300))

    def step(self):
        return self.event()

    cdef Operation event(self):
        cdef Py_ssize_t count = len(self.pending)
        cdef Operation op = <Operation>self.pending[self.rng.below(count)]
        cdef Operation other
        if self.weather:
            self.happen()
        if op.held_until > self.moment:
            ready = [other for other in self.pending if other.held_until <= self.moment]
            ready = (ready or [other for other in self.pending if other.held_until < STUCK]
                     or [other for other in self.pending if other.held_until < QUEUED])
            op = <Operation>ready[self.rng.below(len(ready))]
        # Mostly microseconds; now and then milliseconds.
        self.now_ns += self.rng.between(1000, 200000) if not self.rng.chance(0.01) else self.rng.between(1000000, 50000000)
        if not op.took_effect:
            if self.torn_share and op.length_bytes > self.logical_block_bytes and self.rng.chance(self.torn_share):
                op.late = self.rng.raw()
            self.begin(op)
            self.hold(op)
            return None
        self.end(op)
        return op

    def take_effect(self, Operation operation):
        self.begin(operation)

    def finish(self, Operation operation):
        self.end(operation)
        return operation

    def category(self, Operation operation):
        """One of CATEGORIES."""
        return CATEGORIES[self.category_of(operation)]

    cdef int category_of(self, Operation op) noexcept:
        if op.kind == OP_READ:
            return CATEGORY_BASE if op.target == TARGET_BASE else CATEGORY_READ
        if op.kind == OP_FLUSH:
            return CATEGORY_FLUSH
        if op.kind == OP_DISCARD:
            return CATEGORY_DISCARD
        if op.kind == OP_ZERO:
            return CATEGORY_ZERO
        if op.offset_bytes >= self.data_start:
            return CATEGORY_WRITE
        return CATEGORY_JOURNAL if op.offset_bytes < self.maps_start else CATEGORY_MAP

    cdef int begin(self, Operation op) except -1:
        cdef int32_t error = 0
        cdef uint64_t end = op.offset_bytes + op.length_bytes
        if op.took_effect:
            raise RuntimeError(f"{op} takes effect twice")
        op.took_effect = True
        self.moment += 1
        if self.faulty and self.rng.chance(self.rates[self.category_of(op)]):
            error = self.fail_with
        elif op.number == self.fail_number:
            error = self.fail_with
        elif self.fault is not None:
            error = self.fault(op)
        if op.kind == OP_ZERO and not self.zeroes:
            op.result = -EOPNOTSUPP
            return 0
        if self.told_once and (op.kind == OP_FLUSH or op.durable):
            return self.begin_durable(op, error)
        op.result = error
        if op.kind == OP_FLUSH:
            return 0
        if op.kind == OP_READ:
            if op.target == TARGET_BASE and self.base_closed:
                raise AssertionError(f"a read of a base that has been given up: {op}")
            if end > (self.size_bytes if op.target == TARGET_STORAGE else self.base_size):
                raise AssertionError(f"a read past the end: {op}")
            if error == 0:
                if op.target == TARGET_STORAGE:
                    memcpy(op.buffer, self.image + op.offset_bytes, op.length_bytes)
                else:
                    fill_from_base(op.buffer, op.offset_bytes, op.length_bytes)
            else:
                memset(op.buffer, GARBLED, op.length_bytes)
            return 0
        if op.target != TARGET_STORAGE or end > self.size_bytes:
            raise AssertionError(f"a write outside the storage: {op}")
        if (op.offset_bytes | op.length_bytes) % self.logical_block_bytes:
            raise AssertionError(f"a write that is not aligned to logical blocks: {op}")
        if op.kind == OP_WRITE and op.offset_bytes < self.data_start and self.inspect is not None:
            self.inspect(op)
        return self.put(op, 1.0 if error == 0 else self.failed_share())

    cdef double failed_share(self) noexcept:
        """Of the blocks of a write that fails: so many are written. Where they may still come, often none at first."""
        return 0.0 if self.landing_share and self.rng.chance(0.5) else 0.5

    cdef int begin_durable(self, Operation op, int32_t error) except -1:
        """A flush or a durable write takes effect, where a failure is told to one of those who ask: others' blocks may be lost with it.

        Somewhere between now and its end it asks for what there is to be told; so what it takes, it may be told of long after others."""
        cdef uint64_t block, size = self.logical_block_bytes
        if op.kind == OP_WRITE:
            if op.target != TARGET_STORAGE or op.offset_bytes + op.length_bytes > self.size_bytes:
                raise AssertionError(f"a write outside the storage: {op}")
            if op.offset_bytes < self.data_start and self.inspect is not None:
                self.inspect(op)
            if error and ((self.fua and not self.page_cache) or self.rng.chance(0.5)):
                op.by_itself = True
                op.result = error
                return self.put(op, self.failed_share())
            op.late = 0
            self.put(op, 1.0)
            if error:
                # Its blocks are seen and count as written: some of them are not.
                for block in range(op.offset_bytes // size, (op.offset_bytes + op.length_bytes) // size):
                    if self.rng.chance(0.7):
                        lose_block(self, block)
        if error:
            if op.kind == OP_FLUSH or not self.page_cache:
                self.lose_cached()
            self.report = error
            self.page_errors += self.page_cache
        if self.rng.chance(0.5):
            self.ask_for_report(op)
            if op.result == 0:
                self.make_durable(op)
        return 0

    cdef int ask_for_report(self, Operation op) except -1:
        """A flush or a durable write asks: the first is told of what was lost, whose ever it was."""
        op.asked = True
        if self.report == 0 or op.by_itself or (op.kind != OP_FLUSH and self.fua and not self.page_cache):
            return 0
        op.result = self.report
        op.took_report = True
        self.report = 0
        return 0

    cdef int ask_sampler(self, Operation op) noexcept:
        """Whoever is told that it ended well asks once more, and hears of everything that was lost in the page cache since it last did."""
        if op.result == 0 and self.sampler and self.page_errors != self.sampled:
            op.result = self.fail_with
            op.took_report = True
        self.sampled = self.page_errors
        return 0

    def ask(self):
        error, self.report = self.report, 0
        return error

    cdef int end(self, Operation op) except -1:
        if not op.took_effect:
            raise RuntimeError(f"{op} completes before it takes effect")
        self.pending.remove(op)
        self.under_way[self.category_of(op)] -= 1
        if self.workers:
            self.release(op)
        self.moment += 1
        if self.told_once and not op.by_itself and (op.kind == OP_FLUSH or op.durable):
            if not op.asked:
                self.ask_for_report(op)
            self.ask_sampler(op)
        if op.result:
            if op.kind == OP_FLUSH and self.page_cache and not op.took_report:
                self.lose_cached()
            if self.landing_share and op.kind != OP_FLUSH and op.kind != OP_READ and not op.took_report:
                self.may_land(op)
            return 0
        if op.kind == OP_WRITE and op.offset_bytes < self.maps_start and self.conclude is not None:
            self.conclude(op)
        self.catch_up(op, 1.0)
        if op.kind == OP_WRITE or op.kind == OP_ZERO:
            self.completed_at[op.number] = self.moment
        if op.durable or op.kind == OP_FLUSH:
            self.make_durable(op)
        return 0

    cdef int make_durable(self, Operation op) except -1:
        """What a flush covers, or a durable write's own blocks."""
        cdef uint64_t i, kept, block, size = self.logical_block_bytes
        if op.kind == OP_WRITE:
            for block in range(op.offset_bytes // size, (op.offset_bytes + op.length_bytes) // size):
                settle_block(self, block, op.number, 0)
            return 0
        kept = 0
        for i in range(self.touched_count):
            block = self.touched[i]
            settle_block(self, block, 0, op.submitted_at + 1)
            if self.newest[block] != NULL:
                self.touched[kept] = block
                kept += 1
            else:
                self.listed[block] = 0
        self.touched_count = kept
        self.durable_size_bytes = max(self.durable_size_bytes, op.size_at_submission)
        if self.landing:
            # What had ended when a flush began is no longer on its way when it has ended.
            self.landing = {at: item for at, item in self.landing.items() if item[2] > op.submitted_at}
        return 0

    def persist(self, Operation operation, blocks=None):
        cdef uint64_t first = operation.offset_bytes // self.logical_block_bytes
        cdef uint64_t count = operation.length_bytes // self.logical_block_bytes
        if operation.kind not in (OP_WRITE, OP_DISCARD, OP_ZERO) or not operation.took_effect:
            raise RuntimeError(f"{operation} has nothing to persist")
        self.catch_up(operation, 1.0)
        for index in range(count) if blocks is None else blocks:
            if not 0 <= index < count:
                raise RuntimeError(f"{operation} has no block {index}")
            settle_block(self, first + <uint64_t>index, operation.number, 0)

    # --- volatile blocks --------------------------------------------------------------------------------------------

    cdef int catch_up(self, Operation op, double share) except -1:
        """The blocks of an operation that had not taken effect with the others do so now: each with probability `share`."""
        cdef uint64_t size = self.logical_block_bytes
        cdef uint64_t i
        if op.late == 0 or op.result:
            return 0
        if op.kind == OP_WRITE or op.kind == OP_DISCARD or op.kind == OP_ZERO:
            self.put(op, share, True)
        elif op.kind == OP_READ and op.target == TARGET_STORAGE:
            # Of a read each block shows what it held at some moment, and not all of them at the same one.
            for i in range(op.length_bytes // size):
                if op.late >> (i & 63) & 1:
                    memcpy(op.buffer + i * size, self.image + op.offset_bytes + i * size, size)
        op.late = 0
        return 0

    cdef int put(self, Operation op, double share, bint late=False) except -1:
        """Let the blocks of a write take effect, or those that are late: each with probability `share`."""
        cdef uint64_t size = self.logical_block_bytes
        cdef uint64_t first = op.offset_bytes // size
        cdef uint64_t i
        cdef uint8_t lost[4096]
        cdef const uint8_t *content = op.buffer
        cdef uint64_t stride = size
        if op.kind == OP_DISCARD or op.kind == OP_ZERO:
            memset(lost, DISCARDED if op.kind == OP_DISCARD else 0, size)
            content = lost
            stride = 0
        for i in range(op.length_bytes // size):
            if op.late and (op.late >> (i & 63) & 1) != late:
                continue
            if share < 1.0 and not self.rng.chance(share):
                continue
            put_block(self, first + i, content + i * stride, op.number)
        return 0

    cdef int lose_cached(self) except -1:
        """Write-back, or a flush of the device's cache, failed: of what was written some blocks count as clean now, though the medium
        never gets them."""
        cdef uint64_t i, block
        for i in range(self.touched_count):
            block = self.touched[i]
            if self.newest[block] == NULL or self.completed_at[self.newest[block].number] == 0 or self.rng.chance(0.5):
                continue
            lose_block(self, block)
        return 0

    # --- what happens by itself -------------------------------------------------------------------------------------

    def set_weather(self, *, double writeback=0.0, double eviction=0.0, double landing=0.0):
        self.writeback_share, self.eviction_share, self.landing_share = writeback, eviction, landing
        self.weather = writeback > 0 or eviction > 0 or landing > 0

    cdef int happen(self) except -1:
        cdef uint64_t before = self.losses
        if self.page_cache and self.touched_count and self.rng.chance(self.writeback_share):
            self.lose_cached()
            if self.losses != before:
                self.report = self.fail_with
                self.page_errors += 1
        if self.lost and self.rng.chance(self.eviction_share):
            self.evict(0.3)
        if self.landing and self.rng.chance(self.landing_share):
            self.land(0.5)
        return 0

    def happen_at_rest(self):
        if self.lost and self.rng.chance(self.eviction_share):
            self.evict(0.3)
        if self.landing and self.rng.chance(0.3):
            self.land(0.5)

    cdef int evict(self, double share) except -1:
        """Clean pages leave the cache: what is read again is what the medium holds."""
        cdef uint64_t size = self.logical_block_bytes
        for block in [block for block in self.lost if self.rng.chance(share)]:
            if (block + 1) * size <= self.size_bytes:
                memcpy(self.image + <uint64_t>block * size, <const uint8_t *> <bytes>self.lost[block], size)
            del self.lost[block]
            self.reverted += 1
        return 0

    cdef int may_land(self, Operation op) except -1:
        """It failed; what is on its way to some of its blocks may still reach them."""
        cdef uint64_t size = self.logical_block_bytes
        cdef uint64_t i
        cdef double share = 1.0 if self.rng.chance(0.5) else 0.5
        for i in range(op.length_bytes // size):
            if share == 1.0 or self.rng.chance(share):
                content = (<char *>op.buffer)[i * size : (i + 1) * size] if op.kind == OP_WRITE else (
                    bytes((DISCARDED if op.kind == OP_DISCARD else 0,)) * size)
                self.landing[op.offset_bytes // size + i] = (content, op.number, self.moment)
        return 0

    cdef int land(self, double share) except -1:
        """Blocks of operations that had failed reach the storage; what does not come now may come later."""
        if self.rng.chance(0.5):
            share = 1.0
        for block in [block for block in self.landing if share == 1.0 or self.rng.chance(share)]:
            content, number, _ = self.landing.pop(block)
            if (block + 1) * self.logical_block_bytes <= self.size_bytes:
                put_block(self, block, <const uint8_t *> <bytes>content, number)
                self.landings += 1
        return 0

    def end_landing(self):
        self.land(0.5)
        self.landing.clear()

    cdef int revert_lost(self) except -1:
        cdef uint64_t size = self.logical_block_bytes
        for block, medium in self.lost.items():
            if (block + 1) * size <= self.size_bytes:
                memcpy(self.image + <uint64_t>block * size, <const uint8_t *> <bytes>medium, size)
        self.lost.clear()
        return 0

    def forget_cache(self):
        self.revert_lost()

    # --- ends -----------------------------------------------------------------------------------------------------

    def flush_everything(self):
        cdef uint64_t i
        for i in range(self.touched_count):
            give_versions(self, self.newest[self.touched[i]])
            self.newest[self.touched[i]] = NULL
            self.listed[self.touched[i]] = 0
        self.touched_count = 0
        self.durable_size_bytes = self.size_bytes
        self.landing.clear()

    def truncate(self, uint64_t size_bytes):
        cdef uint64_t i, block, kept = 0
        if size_bytes > self.size_bytes:
            raise ValueError(f"{size_bytes} bytes: the device has only {self.size_bytes}")
        for i in range(self.touched_count):
            block = self.touched[i]
            if block * self.logical_block_bytes < size_bytes:
                self.touched[kept] = block
                kept += 1
            else:
                give_versions(self, self.newest[block])
                self.newest[block] = NULL
                self.listed[block] = 0
        self.touched_count = kept
        self.size_bytes = size_bytes

    def volatile(self):
        cdef Operation op
        cdef Version *version
        cdef uint64_t i, block
        for op in self.pending:
            if (op.kind == OP_WRITE or (op.kind == OP_ZERO and self.zeroes)) and not op.took_effect:
                self.put(op, 1.0)
            elif op.kind == OP_WRITE or op.kind == OP_DISCARD or op.kind == OP_ZERO:
                self.catch_up(op, 1.0)
        self.nothing_pending()
        self.revert_lost()
        histories = []
        for i in range(self.touched_count):
            block = self.touched[i]
            version = self.newest[block]
            if version == NULL:
                continue
            number = version.number
            contents = []
            while version != NULL:
                contents.append((<char *>(version + 1))[: self.logical_block_bytes])
                version = version.older
            contents.reverse()
            histories.append((number, block * self.logical_block_bytes, contents))
        histories.sort(key=lambda item: item[:2])
        return [(offset, contents) for _, offset, contents in histories]

    def put_back(self, image):
        self.flush_everything()
        self.nothing_pending()
        self.lost.clear()
        self.report = 0
        memoryview(self.image_array)[: self.size_bytes] = image

    def crash(self):
        cdef Operation op
        cdef Version *version
        cdef uint64_t i, block, count
        cdef uint64_t size = self.logical_block_bytes
        cdef double keep
        for op in self.pending:
            if op.kind == OP_WRITE or op.kind == OP_DISCARD or (op.kind == OP_ZERO and self.zeroes):
                if op.took_effect:
                    self.catch_up(op, 0.5)
                else:
                    self.put(op, 0.5)
        if self.landing:
            self.land(0.5)
        keep = (0.0, 0.1, 0.5, 0.9, 1.0)[self.rng.below(5)]
        for i in range(self.touched_count):
            block = self.touched[i]
            version = self.newest[block]
            if version == NULL or self.rng.chance(keep):
                continue
            count = 0
            while version.older != NULL:
                version = version.older
                count += 1
            version = self.newest[block]
            # Any but the newest, if there is another.
            for _ in range(1 + self.rng.below(count) if count else 0):
                version = version.older
            memcpy(self.image + block * size, <uint8_t *>(version + 1), size)
        self.revert_lost()
        self.report = 0
        self.sampled = self.page_errors
        # The size of a file is volatile too; that of a logical volume is not.
        if self.size_bytes > self.durable_size_bytes and self.rng.chance(0.3):
            self.truncate(self.durable_size_bytes)
        self.flush_everything()
        self.nothing_pending()

    def kill(self):
        cdef Operation op
        cdef uint64_t number
        for op in self.pending:
            if op.took_report:
                self.report = op.result     # a limit of the model: not told to the dead alone
            if op.kind == OP_DISCARD and not op.took_effect:
                self.put(op, (0.0, 0.5, 1.0)[self.rng.below(3)])
            elif op.kind == OP_DISCARD:
                self.catch_up(op, 1.0)
            elif op.kind == OP_WRITE or (op.kind == OP_ZERO and self.zeroes):
                if op.took_effect:
                    self.catch_up(op, 1.0)
                else:
                    self.put(op, (0.0, 0.5, 1.0)[self.rng.below(3)])
                # The kernel ends it, whoever is there to see: a later flush covers it.
                self.completed_at[op.number] = self.moment
        self.nothing_pending()
        # What a failed write left is seen, and a later flush writes what is there, whoever was to hear of the failure.
        for number in range(1, self.submitted + 1):
            if self.completed_at[number] == 0:
                self.completed_at[number] = self.moment
        if self.told_once and not self.page_cache:
            self.revert_lost()      # nothing can be asked to forget a device's cache: it may not last longer than who filled it
        if self.report == 0 and self.sampled != self.page_errors:
            self.report = self.fail_with        # nor to an outsider alone
        self.sampled = self.page_errors
