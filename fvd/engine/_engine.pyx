# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""The engine: turns guest requests into device operations, and keeps the durability contract of docs/internals/durability.md.

One disk, one engine, one thread, no locks. A batch of requests and completions goes in, a batch of device operations and finished requests
comes out; the device, the clock and growth are whoever drives it. It may not know files, sockets, time or threads, and in steady state
makes no Python object. Its parts: memory.pxi (pools), changes.pxi (the maps and what differs from storage), log.pxi (the log of what is
pending), slots.pxi (which slot a chunk gets), starved.pxi (no space below the storage), request.pxi (requests, reads), write.pxi (writes,
trim, drains), copy.pxi (copies from the base, lazy changes), prefetch.pxi (what to copy next), commit.pxi (flush, journal, checkpoint,
failure, close), results.pxi (who hears how an operation ended), extents.pxi (block status), lifetime.pxi (beginning and end).
"""

from libc.errno cimport EDQUOT, EINVAL, EIO, ENOSPC, ENOSYS, EOPNOTSUPP, EROFS, ESHUTDOWN
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcmp, memcpy, memset
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, mmap, munmap


from fvd.errors import Corrupt, InvalidArgument, quoted
from fvd.format.geometry import Placement
from fvd.format.pending import HEADER as LOG_HEADER, RECORD as LOG_RECORD
from fvd.modes import CACHE_MODES, ON_FULL, UNSAFE_CACHE_MODES, WRITE_THROUGH_CACHE_MODES

from fvd cimport _core
from fvd._aligned cimport aligned
from fvd._core cimport (
    BUG, Bug, CELL_BYTES, CELLS_PER_PAGE, EMPTY, ENTRIES_PER_CELL, ENTRY_RECORD_BYTES, HAS_BUGS, JOURNAL_FLAG_CLEAN, JOURNAL_RECORDS_BYTES,
    KIND_BITMAP, KIND_TABLE, PAGE_BYTES, WORD_RECORD_BYTES, WORDS_PER_CELL, JournalHeader, JournalPages, JournalSeal, bit_get, bits_all,
    bits_count, bits_fill, bits_find, bits_find_last, bits_none, cell_seal, crc32c, entry_hash, journal_append, journal_seal,
)
from fvd.device.op cimport OP_DISCARD, OP_FLUSH, OP_READ, OP_WRITE, OP_ZERO, TARGET_BASE, TARGET_STORAGE, DeviceOp

cdef enum OpPurpose:            # what a completion means
    PURPOSE_PLAIN                  # guest buffer to storage, or storage or base to guest buffer
    PURPOSE_BOUNCED_READ              # unaligned read through a bounce buffer
    PURPOSE_JOB
    PURPOSE_COPY_READ              # base to the buffer of a copy
    PURPOSE_FLUSH
    PURPOSE_JOURNAL
    PURPOSE_MAP
    PURPOSE_MAP_FLUSH
    PURPOSE_DISCARD

cdef enum Step:                 # what came of handing on a part of a request
    STEP_WAITS                  # the request is in a list, and goes on from there
    STEP_DONE
    STEP_DIRECT                 # of a read: no copy has it; from the base to the guest's buffer

cdef enum JobKind:
    JOB_ALLOCATE
    JOB_MODIFY
    JOB_PUNCH
    JOB_SAVE                    # part of a copy to its slot
    JOB_FILL                    # zeros to the slot of a chunk whose blocks were zeros by their bits

cdef enum CopyPhase:
    COPY_READING
    COPY_SAVING

cdef enum Phase:
    PHASE_DRAIN
    PHASE_ZERO                  # the device zeroes the whole slot of a new chunk
    PHASE_READ
    PHASE_WRITE

cdef enum CommitState:
    COMMIT_IDLE
    COMMIT_FLUSHING             # the device flush that precedes the journal write
    COMMIT_WAITS_FOR_RING       # for space in the ring
    COMMIT_WRITING

cdef enum CheckpointState:
    CHECKPOINT_IDLE
    CHECKPOINT_WRITING
    CHECKPOINT_FLUSHING

cdef enum StarvedState:
    STARVED_WAITS = 1
    STARVED_TRIED

cdef enum ClosePhase:
    CLOSE_WAITING
    CLOSE_COMMITTING
    CLOSE_CHECKPOINT
    CLOSE_RECORD
    CLOSE_DISCARDS

cdef enum:
    BUCKETS = 4096
    ZEROS_BYTES = 1 << 20
    SPARE_BOUNCE_BYTES = 1 << 16
    SPARE_BOUNCES = 64
    UNCUT_BYTES = 1 << 18
    ZEROING_MAX = 32               # each holds a thread of the kernel's, and memory if it fails
    DISCARDING_MAX = 8             # of a disk at once: whoever waits behind discards waits for no more of them
    DISCARD_BYTES = 32 << 20        # of one discard, or one slot
    FIRST_DISCARD_BYTES = 1         # of all in flight, before anything is known of the device: one slot
    WINDOW = 32                     # of 1 MiB of zeros each: as much as the greatest write of NBD clients
    PUNCHED_MAX = 4096             # chunks that one request makes absent before others have their turn
    BOUNCE_BYTES_MAX = 64 << 20
    STAGINGS = 4
    STAGING_PAGES = 64
    COPY_BUCKETS = 256
    COPIES_BYTES_MAX = 8 << 20
    COPY_BYTES_MAX = 1 << 20       # of one copy
    READS_REMEMBERED = 1 << 20

cdef uint64_t COMMIT_AFTER_NS = 5000000000ULL       # pending changes are committed after this long at the latest
cdef uint64_t LAZY_COMMIT_AFTER_NS = 30000000000ULL  # those that a crash may take back
cdef uint64_t RETRY_AFTER_NS = 250000000ULL
cdef uint64_t STARVED_AFTER_NS = 1000000000ULL      # one write so often asks whether there is space below the storage
cdef uint64_t STEER_AFTER_NS = 200000000ULL         # loops tick every 250 ms: not each second tick
cdef uint64_t SLOW_DISCARD_NS = 10000000ULL         # longer than a read should wait for one
cdef uint64_t CLOSE_DISCARDS_NS = 5000000000ULL      # a close begins no discard after this long, and
cdef uint64_t CLOSE_SLOW_NS = 250000000ULL          # goes on soon after: nobody reads any more, but somebody waits
cdef uint64_t PROBE_AFTER_NS = 1000000000ULL        # one copy so often asks a base that fails

include "memory.pxi"
include "changes.pxi"
include "log.pxi"
include "slots.pxi"
include "starved.pxi"
include "request.pxi"
include "write.pxi"
include "copy.pxi"
include "prefetch.pxi"
include "commit.pxi"
include "results.pxi"
include "extents.pxi"
include "lifetime.pxi"


SEEDED_BUGS = bool(HAS_BUGS)


def seed_bug(int number):
    if not HAS_BUGS:
        raise RuntimeError("this build contains no seeded bugs")
    _core.seeded_bug = number


cdef class Engine:
    """See _engine.pyi: what Python may use of it is described there, and what a compiled driver may use, in _engine.pxd."""

    def __init__(self, geometry, *, bytes uuid, bitmap, table, used_slots, journal_state, dirty_bitmap_pages, dirty_table_pages,
                 storage_size_bytes, base_size_bytes=None, align_bytes=512, read_only=False, cache_mode="none", on_full="wait",
                 wake_below_bytes=0, guest_reserve_bytes=0, discard=True, zero_chunks=False, bounce_limit_bytes=BOUNCE_BYTES_MAX,
                 copy_on_read=False, copy_limit_bytes=COPIES_BYTES_MAX, base_timeout_ns=30_000_000_000,
                 discards_max=DISCARDING_MAX, discard_bytes=DISCARD_BYTES, first_discard_bytes=FIRST_DISCARD_BYTES,
                 request_window=WINDOW, commit_limit_bytes=None, pending_log=None, durable_writes=True):
        if len(uuid) != 16 or align_bytes not in (512, 4096):
            raise InvalidArgument("a UUID of 16 bytes and logical blocks of 512 or 4096 bytes are needed")
        if discards_max < 1 or request_window < 1:
            raise InvalidArgument("a disk needs at least one discard, and a request one operation, at a time")
        set_disk(self, geometry, uuid, base_size_bytes, align_bytes)
        set_mode(self, cache_mode, on_full, read_only)
        self.mode.durable_writes = durable_writes
        self.mode.discard = discard
        self.mode.window = request_window
        self.discards.count_max = discards_max
        self.discards.each_max = max(1, discard_bytes >> self.disk.chunk_shift)
        self.discards.slots_max = max(1, first_discard_bytes >> self.disk.chunk_shift)
        self.pools.bounce_limit = bounce_limit_bytes
        set_maps(self, bitmap, table, used_slots)
        set_base(self, copy_on_read, copy_limit_bytes, base_timeout_ns)
        set_journal(self, journal_state, commit_limit_bytes)
        allocate_memory(self)
        if zero_chunks and not self.disk.raw and not self.disk.has_base and not read_only:
            self.slots.zero_new = True
            self.slots.zeroed = <uint64_t *>zeroed_memory(self.disk.chunks // 64 + 1, 8)
        self.checkpoint.dirty_pages += set_bits(self.checkpoint.dirty_bitmap, dirty_bitmap_pages)
        if dirty_table_pages is not None:
            self.checkpoint.dirty_pages += set_bits(self.checkpoint.dirty_table, dirty_table_pages)
        self.slots.wake_below = -(-wake_below_bytes // geometry.chunk_size_bytes)
        self.slots.reserve = -(-guest_reserve_bytes // geometry.chunk_size_bytes)
        resize_storage(self, storage_size_bytes)
        if pending_log is not None and not read_only:
            log_attach(self, pending_log)

    def __dealloc__(self):
        free_memory(self)

    # --- what a driver calls ------------------------------------------------------------------------------------

    cdef int submit(self, uint32_t kind, uint32_t flags, uint64_t offset_bytes, uint64_t length_bytes, uint8_t *buffer,
                    uint64_t cookie) except -1 nogil:
        cdef Request *r = request_new(self)
        r.cookie = cookie
        r.kind = kind
        r.start = r.cursor = offset_bytes
        r.end = offset_bytes + length_bytes
        r.buffer = buffer
        r.flags = flags
        r.pending = 1
        r.begun_ns = self.prefetch.guest_last_ns = self.now_ns
        r.met_prefetch = self.prefetch.count != 0
        if self.close.request != NULL or self.close.done:
            return request_fail(self, r, -ESHUTDOWN)
        if self.failure.stopped and kind != REQUEST_CLOSE:
            r.end = r.start
            return request_fail(self, r, -EIO)
        if kind == REQUEST_FLUSH:
            self.count.flushes += 1
            r.start = r.cursor = r.end = 0
            if self.failure.error_number and not BUG(Bug.FAILURES_IGNORED):
                return request_fail(self, r, -EIO)
            if self.mode.unsafe or self.mode.read_only:
                return request_release(self, r)
            # What an earlier life has acknowledged this flush makes durable too: also when this one has written nothing yet.
            r.needs_commit = 1
            return request_release(self, r)
        if kind == REQUEST_CLOSE:
            r.start = r.cursor = r.end = 0
            self.close.request = r
            fail_waiters(self, &self.waiting.slot, -ESHUTDOWN)
            cancel_starved(self, 0, 0, -ESHUTDOWN)
            retry_base_reads(self)
            return close_step(self)
        if kind > REQUEST_ZERO:
            return request_fail(self, r, -EINVAL)
        if offset_bytes > self.disk.virtual_size or length_bytes > self.disk.virtual_size - offset_bytes:
            r.end = r.start
            return request_fail(self, r, -ENOSPC if kind == REQUEST_WRITE or kind == REQUEST_ZERO else -EINVAL)
        if buffer == NULL and length_bytes and (kind == REQUEST_READ or kind == REQUEST_WRITE):
            return request_fail(self, r, -EINVAL)
        if kind == REQUEST_READ:
            self.count.reads += 1
            r.flags = 0
            return advance(self, r)
        if self.mode.read_only:
            return request_fail(self, r, -EROFS)
        if kind == REQUEST_WRITE:
            self.count.writes += 1
        else:
            self.count.trims += 1
            r.buffer = NULL
        if self.mode.unsafe:
            r.flags &= ~<uint32_t>FLAG_FUA
        elif self.mode.write_through:
            r.flags |= FLAG_FUA
        if r.flags & FLAG_FUA and kind != REQUEST_WRITE:
            r.needs_commit = 1      # even where there is nothing to change, an earlier change may still be pending
        return advance(self, r)

    cdef int complete(self, uint64_t token, int64_t result) except -1 nogil:
        cdef uint32_t index = <uint32_t>(token & 0xFFFFFFFFULL)
        cdef Op *record
        cdef Op op
        cdef int32_t error = <int32_t>result if result < 0 else 0
        ensure(index < self.pools.op_total, "completion of an unknown operation")
        record = &self.pools.slabs[index >> 8][index & 255]
        ensure(record.busy and record.generation == token >> 32, "completion of an operation that is not in flight")
        if record.is_write and record.buffer != NULL:
            if is_full(error) and hold_if_full(self, record):   # R40
                if not BUG(Bug.STARVED_WRITE_ANSWERED):
                    return 0
                cancel_starved(self, 0, 0, 0)
                return 0
            if self.starved.below_full:
                handle_starved(self, record, error)
        if record.listed:
            op_unlist(self, record)
        record.busy = 0
        self.inflight_ops -= 1
        if record.durable:
            handle_durable(self, record, error)
        else:
            op = record[0]
            record.next = self.pools.free_ops
            self.pools.free_ops = record
            if op.watched:
                count_drained(self, &op)   # first: a drain that what follows begins has not counted it
            if op.target == TARGET_BASE:
                self.base.inflight -= 1
                if handle_base_result(self, &op, error):
                    return 0
                base_release(self)
            handle_op(self, &op, error)
        if self.failure.stopped:
            refuse_ops(self)
        if self.close.request != NULL:
            return close_step(self)
        if self.prefetch.plan_count and self.prefetch.count < self.prefetch.depth:
            return prefetch_pump(self)
        return 0

    cdef int tick(self, uint64_t now_ns) except -1 nogil:
        self.now_ns = now_ns
        if self.failure.stopped:
            return 0
        if self.base.retries != NULL and now_ns - self.base.retry_ns >= RETRY_AFTER_NS:
            retry_base_reads(self)
        # R40
        if self.starved.first != NULL and now_ns - self.starved.tried_ns >= STARVED_AFTER_NS and not BUG(Bug.STARVED_WRITE_NOT_TRIED):
            retry_starved(self, False)
        if change_count(&self.changes.lazy) and not self.changes.lazy_due and now_ns - self.changes.lazy_since_ns > LAZY_COMMIT_AFTER_NS:
            self.changes.lazy_due = True
            commit_maybe(self)
        if self.prefetch.plan_count:
            if now_ns - self.prefetch.steer_ns >= STEER_AFTER_NS:
                self.prefetch.steer_ns = now_ns
                self.want |= Want.STEER
            prefetch_pump(self)
        if (change_count(&self.changes.running) and not self.commit.due and self.commit.state == COMMIT_IDLE
                and now_ns - self.changes.running_since_ns > COMMIT_AFTER_NS):
            self.commit.due = True
            return commit_maybe(self)
        return 0

    cdef int cancel_waiting(self, uint64_t mask, uint64_t value, int32_t error) except -1 nogil:
        cdef RequestList cancelled
        cdef int count
        cancelled.head = cancelled.tail = NULL
        count = split_by_cookie(&self.waiting.slot, &cancelled, mask, value)
        fail_waiters(self, &cancelled, error)
        count += cancel_starved(self, mask, value, error)
        return count + cancel_base_waiters(self, mask, value, error)

    cdef uint64_t waiting_bytes(self, uint64_t mask, uint64_t value) noexcept nogil:
        cdef Request *r = self.waiting.slot.head
        cdef uint64_t total = 0
        while r != NULL:
            if (r.cookie & mask) == value and r.buffer != NULL:
                total += r.end - r.start
            r = r.next
        return total + starved_bytes(self, mask, value)

    cdef int extents(self, uint64_t offset_bytes, uint64_t length_bytes, Extent *out, int capacity) except -1 nogil:
        return extents_of(self, offset_bytes, length_bytes, out, capacity)

    # --- what Python calls --------------------------------------------------------------------------------------

    def set_storage_size(self, uint64_t size_bytes):
        if size_bytes != self.disk.storage_size:
            self.slots.exhausted = False
        resize_storage(self, size_bytes)
        retry_waiters(self, &self.waiting.slot)

    def set_exhausted(self, bint exhausted):
        self.slots.exhausted = exhausted
        retry_waiters(self, &self.waiting.slot)

    def cancel_all_waiting(self, int error_number):
        return self.cancel_waiting(0, 0, -error_number)

    def note_failed_flush(self, int error_number):
        if error_number <= 0:
            raise InvalidArgument(f"errno {error_number}: it must be positive")
        # R30: it may have taken a report that was due here.
        if not BUG(Bug.FAILURE_BESIDE_US_IGNORED):
            fail(self, -error_number)

    def stop(self):
        cdef uint32_t i
        cdef uint32_t wanted = self.want
        if self.failure.stopped or self.close.done:
            return
        self.failure.stopped = True     # R39
        self.prefetch_plan([])
        for i in range(self.done_count):
            if self.done[i].error == 0:
                self.done[i].error = -EIO
        fail(self, -EIO)
        self.want = wanted      # who stops it knows; and nothing grows for it any more
        cancel_starved(self, 0, 0, -EIO)
        fail_waiters(self, &self.waiting.bounce, -EIO)
        self.base.timeout_ns = 0
        retry_base_reads(self)
        refuse_ops(self)

    def commit_soon(self):
        self.commit.due = True
        self.changes.lazy_due = change_count(&self.changes.lazy) > 0
        commit_maybe(self)

    def snapshot_maps(self):
        return self.bitmap_array.copy(), None if self.table_array is None else self.table_array.copy()

    @property
    def failed_errno(self):
        return self.failure.error_number

    @property
    def flush_failed_errno(self):
        return self.failure.flush_error_number

    @property
    def stopped(self):
        return self.failure.stopped

    @property
    def storage_below_full(self):
        return self.starved.below_full

    @property
    def starved_count(self):
        return self.starved.count

    @property
    def base_failing(self):
        return self.base.failing

    @property
    def base_released(self):
        return self.base.released

    @property
    def copy_on_read(self):
        return self.copies.on_read

    @copy_on_read.setter
    def copy_on_read(self, bint wanted):
        self.copies.on_read = wanted

    @property
    def prefetch_depth(self):
        return self.prefetch.depth

    @prefetch_depth.setter
    def prefetch_depth(self, uint32_t depth):
        self.prefetch.depth = depth

    @property
    def prefetch_rate_bytes(self):
        return self.prefetch.rate_bytes

    @prefetch_rate_bytes.setter
    def prefetch_rate_bytes(self, uint64_t rate_bytes):
        self.prefetch.rate_bytes = rate_bytes

    @property
    def prefetch_idle_ns(self):
        return self.prefetch.idle_ns

    @prefetch_idle_ns.setter
    def prefetch_idle_ns(self, uint64_t idle_ns):
        self.prefetch.idle_ns = idle_ns

    @property
    def free_slots(self):
        return slots_at_hand(self)

    @property
    def align_bytes(self):
        return self.disk.align_mask + 1

    def expect_enospc(self):
        self.mode.durable_writes = False

    @property
    def capacity_slots(self):
        return self.slots.capacity

    @property
    def used_slots_count(self):
        return self.disk.chunks if self.disk.raw else bits_count(self.slots.used, 0, self.disk.chunks)

    @property
    def lost_slots(self):
        cdef int64_t lost = 0
        cdef Drain *d = self.slots.retired
        cdef ActiveChunk *active
        if self.disk.raw:
            return 0
        lost = <int64_t>bits_count(self.slots.used, 0, self.disk.chunks) - <int64_t>self.slots.mapped
        lost -= <int64_t>(self.discards.waiting_count + self.discards.slots)
        while d != NULL:
            lost -= 1
            d = d.next
        for i in range(BUCKETS):
            active = self.active_chunks.buckets[i]
            while active != NULL:
                lost -= active.reserved
                active = active.next
        return lost

    @property
    def mapped_chunks(self):
        return self.slots.mapped

    @property
    def present_blocks(self):
        return bits_count(self.maps.bitmap, 0, self.disk.blocks)

    @property
    def waiting_writes(self):
        cdef Request *r = self.waiting.slot.head
        count = 0
        while r != NULL:
            count += 1
            r = r.next
        return count

    @property
    def storage_size_bytes(self):
        return self.disk.storage_size

    @property
    def guest_reserve_bytes(self):
        return self.slots.reserve << self.disk.chunk_shift

    @property
    def wake_below_bytes(self):
        return self.slots.wake_below << self.disk.chunk_shift

    @wake_below_bytes.setter
    def wake_below_bytes(self, uint64_t size_bytes):
        self.slots.wake_below = (size_bytes >> self.disk.chunk_shift) + (size_bytes & ((<uint64_t>1 << self.disk.chunk_shift) - 1) != 0)
        ask_for_growth(self)

    @property
    def clean(self):
        return self.journal.clean

    @property
    def closed_cleanly(self):
        return self.close.done and self.journal.clean and self.failure.error_number == 0

    def forget_log(self):
        self.log.header = NULL
        self.log_buffer = None

    def adopt_changes(self, const uint64_t[::1] keys, const uint64_t[::1] values):
        cdef Py_ssize_t i
        cdef uint32_t kind
        cdef uint64_t index
        if self.mode.read_only or self.open_requests or uncommitted_count(self):
            raise InvalidArgument("changes are adopted by an engine that is writable and has done nothing yet")
        for i in range(keys.shape[0]):
            kind = entry_kind(keys[i])
            index = entry_index(keys[i])
            if not ((kind == KIND_BITMAP and index < self.disk.words)
                    or (kind == KIND_TABLE and not self.disk.raw and index < self.disk.chunks)):
                raise InvalidArgument(f"the maps have no entry of kind {kind} and number {index}")
            if kind == KIND_BITMAP:
                note_change(self, kind, index, self.maps.bitmap[index])
                self.maps.bitmap[index] = values[i]
            else:
                note_change(self, kind, index, self.maps.table[index])
                self.maps.table[index] = <uint32_t>values[i]
        if change_set_bytes(&self.changes.running) > self.changes.limit_bytes:
            raise Corrupt("the changes are more than one commit can take")

    @property
    def pending_changes(self):
        return pending_count(self)

    # --- copies from the base -----------------------------------------------------------------------------------

    def prefetch_plan(self, extents):
        cdef uint64_t i, count = len(extents)
        cdef Run *plan = NULL
        if count and (self.mode.read_only or not self.disk.has_base):
            raise InvalidArgument("only a writable disk over a base can be prefetched")
        if count:
            plan = <Run *>calloc(count, sizeof(Run))
            if plan == NULL:
                raise MemoryError("fvd engine")
        try:
            for i in range(count):
                start, length = extents[i]
                end = min(max(start, 0) + max(length, 0), self.disk.base_size)
                if start >= 0 and start < end:
                    plan[i].first = start >> self.disk.block_shift
                    plan[i].end = ((end - 1) >> self.disk.block_shift) + 1
        except BaseException:
            free(plan)
            raise
        free(self.prefetch.plan)
        self.prefetch.plan = plan
        self.prefetch.plan_count = count
        self.prefetch.plan_at = 0
        self.prefetch.plan_cursor = plan[0].first if count else 0
        self.prefetch.plan_again = False
        self.want &= ~<uint32_t>Want.STEER

    @property
    def prefetching(self):
        if self.prefetch.count > 0:
            return True
        if self.base.absent == 0 or self.prefetch.plan_count == 0:
            return False
        return self.prefetch.plan_at < self.prefetch.plan_count or self.prefetch.plan_again

    @property
    def base_remaining_bytes(self):
        if self.base.absent == 0:
            return 0
        total = self.base.absent << self.disk.block_shift
        if not bit_get(self.maps.bitmap, self.base.blocks - 1):
            total -= (self.base.blocks << self.disk.block_shift) - self.disk.base_size
        return total

    @property
    def waits_for_clock(self):
        return self.base.retries != NULL or self.starved.first != NULL

    def read_profile(self):
        cdef uint64_t i
        return [(self.profile.runs[i].first, self.profile.runs[i].end - self.profile.runs[i].first) for i in range(self.profile.count)]

    def copy_counters(self):
        return {
            "now_ns": self.now_ns, "guest_last_ns": self.prefetch.guest_last_ns,
            "guest_quiet_requests": self.count.quiet_requests, "guest_quiet_latency_ns": self.count.quiet_ns,
            "guest_busy_requests": self.count.busy_requests, "guest_busy_latency_ns": self.count.busy_ns,
            "base_reads": self.count.prefetch_reads, "base_read_bytes": self.count.prefetch_read_bytes,
            "base_service_ns": self.count.base_service_ns, "base_latency_ns": self.count.base_latency_ns,
            "copy_writes": self.count.copy_writes, "copy_write_bytes": self.count.copy_write_bytes,
            "copy_service_ns": self.count.copy_service_ns, "copy_latency_ns": self.count.copy_latency_ns,
            "prefetched_bytes": self.count.prefetched_bytes, "copied_bytes": self.count.copied_bytes, "zero_bytes": self.count.zero_bytes,
            "dropped_bytes": self.count.dropped_bytes, "no_slot_copies": self.count.no_slot_copies,
            "lazy_changes": change_count(&self.changes.lazy),
        }

    def statistics(self):
        return {
            "reads": self.count.reads, "writes": self.count.writes, "flushes": self.count.flushes, "trims": self.count.trims,
            "device_reads": self.count.device_reads, "device_writes": self.count.device_writes,
            "device_flushes": self.count.device_flushes, "base_reads": self.count.base_reads,
            "commits": self.count.commits, "journal_writes": self.count.journal_writes, "checkpoints": self.count.checkpoints,
            "map_writes": self.count.map_writes, "allocations": self.count.allocations, "waited_for_space": self.count.waited_for_space,
            "zeroed_chunks": self.count.zeroed_chunks, "discards": self.count.discards, "most_discards_in_flight": self.discards.count_peak,
        }

    def leaks(self):
        held = {
            "operations": self.inflight_ops, "requests": self.open_requests, "active_chunks": self.active_chunks.count,
            "bounce_bytes": self.pools.bounce_used, "reserved_journal_bytes": self.changes.reserved_bytes,
            "drains": int(self.flight.drains != NULL),
            "copies": self.copies.count, "copy_bytes": self.copies.bytes, "retries": int(self.base.retries != NULL),
            "held": self.durable.held_count,
            "starved": self.starved.count,
            "discards": 0 if self.close.done else self.discards.waiting_count,    # a close begins those only that do not take long
        }
        return {name: count for name, count in held.items() if count}

    # --- the same interface for a driver in Python: the simulated device and the tests ------------------------------

    def submit_request(self, uint32_t kind, uint64_t offset_bytes, uint64_t length_bytes, uintptr_t buffer_address, uint64_t cookie,
                       uint32_t flags=0):
        self.submit(kind, flags, offset_bytes, length_bytes, <uint8_t *>buffer_address, cookie)

    def complete_operation(self, uint64_t token, int64_t result):
        self.complete(token, result)

    def advance_clock(self, uint64_t now_ns):
        self.tick(now_ns)

    def take_operations(self):
        cdef uint32_t i
        taken = []
        for i in range(self.op_count):
            op = self.ops[i]
            taken.append((op.token, op.kind, op.target, op.offset_bytes, op.length_bytes, <uintptr_t>op.buffer, bool(op.durable)))
        self.op_count = 0
        return taken

    def take_done(self):
        cdef uint32_t i
        taken = []
        for i in range(self.done_count):
            taken.append((self.done[i].cookie, self.done[i].error))
        self.done_count = 0
        return taken

    def list_extents(self, uint64_t offset_bytes, uint64_t length_bytes):
        cdef Extent out[256]
        cdef uint64_t at = offset_bytes
        cdef uint64_t stop = min(offset_bytes + length_bytes, self.disk.virtual_size)
        cdef int count, i
        runs = []
        while at < stop:
            count = self.extents(at, stop - at, out, 256)
            for i in range(count):
                at += out[i].length_bytes
                if runs and runs[len(runs) - 1][1] == out[i].state:
                    length, _ = runs.pop()
                    runs.append((length + out[i].length_bytes, out[i].state))
                else:
                    runs.append((out[i].length_bytes, out[i].state))
        return runs
