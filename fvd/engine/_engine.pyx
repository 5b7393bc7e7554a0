# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""The engine: turns guest requests into device operations, and keeps the durability contract of docs/internals/durability.md.

One disk, one engine, one thread, no locks. A batch of requests and completions goes in, a batch of device operations and finished requests
comes out; the device, the clock and growth are whoever drives it. It may not know files, sockets, time or threads, and in steady state
makes no Python object. Its parts: memory.pxi (pools, the pending changes), log.pxi (the log of them), slots.pxi (which slot a chunk
gets), starved.pxi (no room below the storage), request.pxi (requests, reads), write.pxi (writes, trim, drains), copy.pxi (copies from the
base, soft changes), prefetch.pxi (what to copy next), commit.pxi (flush, journal, checkpoint, failure, close).
"""

from libc.errno cimport EDQUOT, EINVAL, EIO, ENOSPC, ENOSYS, EOPNOTSUPP, EROFS, ESHUTDOWN
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcmp, memcpy, memset

import numpy as np

from fvd.errors import Corrupt, InvalidArgument, quoted
from fvd.format.geometry import Placement
from fvd.format.pending import HEADER as LOG_HEADER, RECORD as LOG_RECORD
from fvd.modes import CACHE_MODES, ON_FULL, WRITE_THROUGH_CACHE_MODES

from fvd cimport _core
from fvd._core cimport (
    BUG, Bug, CELL_BYTES, CELLS_PER_PAGE, EMPTY, ENTRIES_PER_CELL, ENTRY_RECORD_BYTES, HAS_BUGS, JOURNAL_FLAG_CLEAN, JOURNAL_RECORDS_BYTES,
    KIND_BITMAP, KIND_TABLE, PAGE_BYTES, WORD_RECORD_BYTES, WORDS_PER_CELL, JournalHeader, bit_get, bits_all, bits_count, bits_fill,
    bits_find, bits_find_last, bits_none, cell_seal, crc32c, entry_hash, journal_seal,
)
from fvd.device.op cimport OP_DISCARD, OP_FLUSH, OP_READ, OP_WRITE, OP_ZERO, TARGET_BASE, TARGET_STORAGE, DeviceOp

cdef enum What:                 # what a completion means
    WHAT_PLAIN                  # guest buffer to storage, or storage or base to guest buffer
    WHAT_READ_COPY              # unaligned read through a bounce buffer
    WHAT_JOB
    WHAT_COPY_READ              # base to the buffer of a copy
    WHAT_FLUSH
    WHAT_JOURNAL
    WHAT_MAP
    WHAT_MAP_FLUSH
    WHAT_DISCARD

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
    COMMIT_WAITS_FOR_RING                 # waiting for room in the ring
    COMMIT_WRITING

cdef enum CheckpointState:
    CHECKPOINT_IDLE
    CHECKPOINT_WRITING
    CHECKPOINT_FLUSHING

cdef enum Starved:
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
cdef uint64_t SOFT_COMMIT_AFTER_NS = 30000000000ULL  # those that a crash may take back
cdef uint64_t RETRY_AFTER_NS = 250000000ULL
cdef uint64_t STARVED_AFTER_NS = 1000000000ULL      # one write so often asks whether there is room below the storage
cdef uint64_t STEER_AFTER_NS = 200000000ULL         # loops tick every 250 ms: not each second tick
cdef uint64_t SLOW_DISCARD_NS = 10000000ULL         # longer than a read should wait for one
cdef uint64_t CLOSE_DISCARDS_NS = 5000000000ULL      # a close begins no discard after this long, and
cdef uint64_t CLOSE_SLOW_NS = 250000000ULL          # goes on soon after: nobody reads any more, but somebody waits
cdef uint64_t PROBE_AFTER_NS = 1000000000ULL        # one copy so often asks a base that fails

include "memory.pxi"
include "log.pxi"
include "slots.pxi"
include "starved.pxi"
include "request.pxi"
include "write.pxi"
include "copy.pxi"
include "prefetch.pxi"
include "commit.pxi"


def _check_log_layout():
    fields = LOG_HEADER.fields
    cdef LogHeader h
    cdef LogRecord r
    mine = {
        "generation": <char *>&h.generation - <char *>&h, "capacity": <char *>&h.capacity - <char *>&h,
        "epoch": <char *>&h.epoch - <char *>&h, "failed_errno": <char *>&h.failed_errno - <char *>&h,
        "acknowledged": <char *>&h.acknowledged - <char *>&h, "failed_ns": <char *>&h.failed_ns - <char *>&h,
        "durability_ops": <char *>&h.durability_ops - <char *>&h, "areas": <char *>&h.areas[0] - <char *>&h,
    }
    theirs = {name: fields[name][1] for name in mine}
    if mine != theirs or LOG_RECORD.itemsize != sizeof(r) or fields["areas"][0].itemsize != sizeof(h.areas):
        raise ImportError(f"the log of pending changes differs between fvd.format and fvd.engine: {theirs} and {mine}")


_check_log_layout()


cdef int op_ended(Engine e, Op *op, int32_t error) except -1 nogil:
    """An operation has ended, and its end counts."""
    if op.what == WHAT_PLAIN:
        if error and op.request.error == 0:
            op.request.error = error
        return request_release(e, op.request)
    if op.what == WHAT_JOB:
        op.job.pending -= 1
        if error and op.job.error == 0:
            op.job.error = error
        return job_continue(e, op.job) if op.job.pending == 0 else 0
    if op.what == WHAT_COPY_READ:
        return copy_read(e, op.copy, error)
    if op.what == WHAT_READ_COPY:
        if error == 0:
            memcpy(op.copy_to, op.bounce + op.copy_skip, op.copy_bytes)
        elif op.request.error == 0:
            op.request.error = error
        bounce_give(e, op.bounce, op.length_bytes)
        request_release(e, op.request)
        return list_walk(e, &e.wait_bounce) if e.wait_bounce.head != NULL else 0
    if op.what == WHAT_FLUSH:
        return commit_flushed(e, error)
    if op.what == WHAT_JOURNAL:
        return journal_written(e, error)
    if op.what == WHAT_MAP:
        return checkpoint_wrote(e, op.slot, error)
    if op.what == WHAT_MAP_FLUSH:
        return checkpoint_end(e, error)
    discard_ended(e, op, error)
    return commit_maybe(e) if BUG(Bug.FLUSH_WAITS_FOR_DISCARDS) else 0


cdef int refuse_ops(Engine e) except -1 nogil:
    """R39: of what a stopped engine has for its devices nothing reaches them: it fails here. Those that failed may have wanted more."""
    cdef DeviceOp op
    if e.refusing:
        return 0
    e.refusing = True
    while e.op_count:
        e.op_count -= 1
        op = e.ops[e.op_count]
        e.complete(op.token, -EIO)
    e.refusing = False
    return 0


SEEDED_BUGS = bool(HAS_BUGS)


def seed_bug(int number):
    """Switch one seeded bug on (of fvd._core.Bug; 0: none). Raises RuntimeError in a release build, which contains none."""
    if not HAS_BUGS:
        raise RuntimeError("this build contains no seeded bugs")
    _core.seeded_bug = number


cdef int resize_storage(Engine e, uint64_t size_bytes) except -1:
    cdef uint64_t capacity = 0
    if size_bytes > e.data_offset:
        capacity = min((size_bytes - e.data_offset) >> e.chunk_shift, e.chunks)
    if e.raw and capacity < e.chunks:
        raise Corrupt("the storage is smaller than a raw disk needs")
    if not e.raw and bits_find(e.used, capacity, e.chunks, True) < e.chunks:
        raise Corrupt("the storage is smaller than a chunk that is in use needs")
    e.storage_size = size_bytes
    e.no_slot_until_ns = 0
    e.capacity = capacity
    e.free_count = 0 if e.raw else capacity - bits_count(e.used, 0, capacity)
    if e.slot_cursor >= capacity:
        e.slot_cursor = 0
    if not e.raw and not e.read_only and slots_at_hand(e) < e.wake_below_slots and capacity < e.chunks:
        e.want |= Want.GROWTH
    return 0


cdef class Engine:

    def __cinit__(self):
        cdef int i
        for i in range(STAGINGS):
            self.staging[i].buffer = NULL

    def __init__(self, geometry, *, bytes uuid, bitmap, table, used_slots, journal_state, dirty_bitmap_pages, dirty_table_pages,
                 storage_size_bytes, base_size_bytes=None, align_bytes=512, read_only=False, cache_mode="none", on_full="wait",
                 wake_below_bytes=0, guest_reserve_bytes=0, discard=True, zero_chunks=False, bounce_limit_bytes=BOUNCE_BYTES_MAX,
                 copy_on_read=False, copy_limit_bytes=COPIES_BYTES_MAX, base_timeout_ns=30_000_000_000,
                 most_discards=DISCARDING_MAX, discard_bytes=DISCARD_BYTES, first_discard_bytes=FIRST_DISCARD_BYTES,
                 request_window=WINDOW, commit_limit_bytes=None, pending_log=None, durable_writes=True):
        """See _engine.pyi. Takes ownership of the arrays; does no I/O."""
        cdef const uint8_t[::1] uuid_view = uuid
        cdef uint64_t[::1] words, used
        cdef uint32_t[::1] entries
        if cache_mode not in CACHE_MODES:
            raise InvalidArgument(f"cache mode {quoted(cache_mode)}: choose one of {', '.join(CACHE_MODES)}")
        if on_full not in ON_FULL:
            raise InvalidArgument(f"on_full {quoted(on_full)}: choose one of {', '.join(ON_FULL)}")
        if len(uuid) != 16 or align_bytes not in (512, 4096):
            raise InvalidArgument("a UUID of 16 bytes and logical blocks of 512 or 4096 bytes are needed")
        self.virtual_size = geometry.virtual_size_bytes
        self.has_base = base_size_bytes is not None
        self.base_size = min(base_size_bytes, self.virtual_size) if self.has_base else 0
        self.raw = geometry.table_cells == 0
        self.spread = geometry.placement == Placement.SPREAD and not self.raw
        self.blocks = geometry.blocks
        self.chunks = geometry.chunks
        self.blocks_per_chunk = geometry.blocks_per_chunk
        self.words = geometry.bitmap_words
        self.block_shift = geometry.block_size_bytes.bit_length() - 1
        self.chunk_shift = geometry.chunk_size_bytes.bit_length() - 1
        self.discard_slots = max(1, discard_bytes >> self.chunk_shift)
        self.discard_slots_max = max(1, first_discard_bytes >> self.chunk_shift)
        self.data_offset = geometry.data_offset_bytes
        self.bitmap_offset = geometry.bitmap_offset_bytes
        self.table_offset = geometry.table_offset_bytes
        self.journal_offset = geometry.journal_offset_bytes
        self.journal_pages = geometry.journal_size_bytes // PAGE_BYTES
        self.bitmap_pages = geometry.bitmap_size_bytes // PAGE_BYTES
        self.table_pages = geometry.table_size_bytes // PAGE_BYTES
        self.align_mask = align_bytes - 1
        self.read_only = read_only
        self.unsafe = cache_mode == "unsafe"
        self.write_through = cache_mode in WRITE_THROUGH_CACHE_MODES
        self.durable_writes = durable_writes
        self.fail_when_full = on_full == "error"
        self.discard = discard
        if most_discards < 1 or request_window < 1:
            raise InvalidArgument("a disk needs at least one discard, and a request one operation, at a time")
        self.most_discarding = most_discards
        self.window = request_window
        self.bounce_limit = bounce_limit_bytes
        self.copy_on_read = copy_on_read and self.has_base and not read_only
        self.copy_limit = copy_limit_bytes
        self.base_timeout_ns = base_timeout_ns
        self.prefetch_idle_ns = 20_000_000
        self.uuid_crc = crc32c(0, &uuid_view[0], 16)
        self.uuid_seed = int.from_bytes(uuid[:8], "little")

        words = bitmap
        used = used_slots
        if <uint64_t>words.shape[0] != self.words or <uint64_t>used.shape[0] * 64 < self.chunks:
            raise InvalidArgument("the bitmap does not fit the geometry")
        self.bitmap_array, self.used_array, self.table_array = bitmap, used_slots, table
        self.bitmap = &words[0]
        self.used = &used[0]
        self.table = NULL
        if not self.raw:
            entries = table
            if <uint64_t>entries.shape[0] != self.chunks:
                raise InvalidArgument("the table does not fit the geometry")
            self.table = &entries[0]
        self.mapped_slots = self.chunks if self.raw else bits_count(self.used, 0, self.chunks)
        self.base_blocks = ((self.base_size - 1) >> self.block_shift) + 1 if self.base_size else 0
        self.base_absent = self.base_blocks - bits_count(self.bitmap, 0, self.base_blocks)
        self.base_released = self.has_base and self.base_absent == 0
        self.copy_most_blocks = max(1, COPY_BYTES_MAX >> self.block_shift)

        self.next_sequence = journal_state.next_sequence
        self.previous = journal_state.previous
        self.tail = journal_state.tail
        self.durable_tail = self.tail
        self.map_hash = journal_state.map_hash
        self.clean_on_storage = journal_state.clean
        if self.next_sequence - self.durable_tail > self.journal_pages:
            raise Corrupt("the journal is fuller than its ring")
        self.max_commit_pages = max(1, min(self.journal_pages // 4, 4096))
        self.limit_bytes = self.max_commit_pages * (JOURNAL_RECORDS_BYTES - WORD_RECORD_BYTES)
        self.commit_bytes = max(self.journal_pages // 16, 1) * JOURNAL_RECORDS_BYTES // 2
        if commit_limit_bytes is not None:
            self.limit_bytes = min(self.limit_bytes, commit_limit_bytes)
        if change_bytes(0, self.blocks_per_chunk + 63) > self.limit_bytes:
            raise InvalidArgument("a commit of one whole chunk does not fit in its limit, or in a quarter of the journal")

        self.ops = <DeviceOp *>calloc(256, sizeof(DeviceOp))
        self.done = <Done *>calloc(256, sizeof(Done))
        self.op_capacity = self.done_capacity = 256
        self.buckets = <Busy **>calloc(BUCKETS, sizeof(Busy *))
        self.spare_bounces = <uint8_t **>calloc(SPARE_BOUNCES, sizeof(uint8_t *))
        self.zeros = <uint8_t *>aligned(ZEROS_BYTES)
        self.zero_chunks = zero_chunks and not self.raw and not self.has_base and not read_only
        if self.zero_chunks:
            self.zeroed = <uint64_t *>calloc(self.chunks // 64 + 1, 8)
            if self.zeroed == NULL:
                raise MemoryError("fvd engine")
        self.journal_buffer = <uint8_t *>aligned(self.max_commit_pages * PAGE_BYTES)
        self.copies = <Copy **>calloc(COPY_BUCKETS, sizeof(Copy *))
        self.dirty_bitmap = <uint64_t *>calloc(self.bitmap_pages // 64 + 1, 8)
        self.dirty_table = <uint64_t *>calloc(self.table_pages // 64 + 1, 8)
        if (self.ops == NULL or self.done == NULL or self.buckets == NULL or self.spare_bounces == NULL or self.zeros == NULL
                or self.journal_buffer == NULL or self.dirty_bitmap == NULL or self.dirty_table == NULL
                or self.copies == NULL):
            raise MemoryError("fvd engine")
        memset(self.zeros, 0, ZEROS_BYTES)
        delta_resize(&self.open, 1024)
        delta_resize(&self.frozen, 1024)
        delta_resize(&self.soft, 64)
        for page in np.flatnonzero(dirty_bitmap_pages):
            bits_fill(self.dirty_bitmap, page, page + 1, True)
            self.dirty_pages += 1
        for page in np.flatnonzero(dirty_table_pages) if dirty_table_pages is not None else ():
            bits_fill(self.dirty_table, page, page + 1, True)
            self.dirty_pages += 1
        self.wake_below_slots = -(-wake_below_bytes // geometry.chunk_size_bytes)
        self.reserve_slots = -(-guest_reserve_bytes // geometry.chunk_size_bytes)
        resize_storage(self, storage_size_bytes)
        if pending_log is not None and not read_only:
            log_attach(self, pending_log)

    def __dealloc__(self):
        cdef uint32_t i
        cdef Busy *b
        cdef Job *j
        cdef Drain *d
        cdef Request *r
        cdef Copy *copy
        cdef Retry *again
        for i in range(self.op_total // 256):
            free(self.slabs[i])
        free(self.slabs)
        free(self.ops)
        free(self.done)
        for i in range(self.spare_count):
            free(self.spare_bounces[i])
        free(self.spare_bounces)
        for i in range(STAGINGS):
            free(self.staging[i].buffer)
        free(self.zeros)
        free(self.zeroed)
        free(self.to_discard)
        free(self.journal_buffer)
        free(self.dirty_bitmap)
        free(self.dirty_table)
        free(self.open.cells)
        free(self.frozen.cells)
        free(self.soft.cells)
        free(self.plan)
        free(self.reads)
        if self.copies != NULL:
            for i in range(COPY_BUCKETS):
                while self.copies[i] != NULL:
                    copy = self.copies[i]
                    self.copies[i] = copy.next
                    free(copy.buffer)
                    free(copy)
        free(self.copies)
        while self.retries != NULL:
            again = self.retries
            self.retries = again.next
            free(again)
        if self.buckets != NULL:
            for i in range(BUCKETS):
                while self.buckets[i] != NULL:
                    b = self.buckets[i]
                    self.buckets[i] = b.next
                    while b.jobs != NULL:
                        j = b.jobs
                        b.jobs = j.next
                        free(j.bounce)
                        free(j)
                    free(b)
        free(self.buckets)
        while self.drains != NULL:
            d = self.drains
            self.drains = d.next
            free(d)
        while self.retired != NULL:
            d = self.retired
            self.retired = d.next
            free(d)
        while self.free_requests != NULL:
            r = self.free_requests
            self.free_requests = r.next
            free(r)

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
        r.begun_ns = self.guest_last_ns = self.now_ns
        r.met_prefetch = self.prefetch_count != 0
        if self.closing != NULL or self.closed:
            return request_fail(self, r, -ESHUTDOWN)
        if self.stopped and kind != REQUEST_CLOSE:
            r.end = r.start
            return request_fail(self, r, -EIO)
        if kind == REQUEST_FLUSH:
            self.stat_flushes += 1
            r.start = r.cursor = r.end = 0
            if self.failed_errno and not BUG(Bug.FAILURES_IGNORED):
                return request_fail(self, r, -EIO)
            if self.unsafe or self.read_only:
                return request_release(self, r)
            # What an earlier life has acknowledged this flush makes durable too: also when this one has written nothing yet.
            r.needs_commit = 1
            return request_release(self, r)
        if kind == REQUEST_CLOSE:
            r.start = r.cursor = r.end = 0
            self.closing = r
            list_fail(self, &self.wait_slot, -ESHUTDOWN)
            starved_end(self, 0, 0, -ESHUTDOWN)
            retries_run(self)
            return close_step(self)
        if kind > REQUEST_ZERO:
            return request_fail(self, r, -EINVAL)
        if offset_bytes > self.virtual_size or length_bytes > self.virtual_size - offset_bytes:
            r.end = r.start
            return request_fail(self, r, -ENOSPC if kind == REQUEST_WRITE or kind == REQUEST_ZERO else -EINVAL)
        if buffer == NULL and length_bytes and (kind == REQUEST_READ or kind == REQUEST_WRITE):
            return request_fail(self, r, -EINVAL)
        if kind == REQUEST_READ:
            self.stat_reads += 1
            r.flags = 0
            return walk(self, r)
        if self.read_only:
            return request_fail(self, r, -EROFS)
        if kind == REQUEST_WRITE:
            self.stat_writes += 1
        else:
            self.stat_trims += 1
            r.buffer = NULL
        if self.unsafe:
            r.flags &= ~<uint32_t>FLAG_FUA
        elif self.write_through:
            r.flags |= FLAG_FUA
        if r.flags & FLAG_FUA and kind != REQUEST_WRITE:
            r.needs_commit = 1      # even where there is nothing to change, an earlier change may still be pending
        return walk(self, r)

    cdef int complete(self, uint64_t token, int64_t result) except -1 nogil:
        cdef uint32_t index = <uint32_t>(token & 0xFFFFFFFFULL)
        cdef Op *record
        cdef Op op
        cdef int32_t error = <int32_t>result if result < 0 else 0
        ensure(index < self.op_total, "completion of an unknown operation")
        record = &self.slabs[index >> 8][index & 255]
        ensure(record.busy and record.generation == token >> 32, "completion of an operation that is not in flight")
        if record.is_write and record.buffer != NULL:
            if is_full(error) and starves(self, record):
                return 0
            if self.no_room:
                starved_ended(self, record, error)
        if record.listed:
            op_unlist(self, record)
        record.busy = 0
        self.inflight_ops -= 1
        if record.durable:
            durable_ended(self, record, error)
        else:
            op = record[0]
            record.next = self.free_ops
            self.free_ops = record
            if op.watched:
                drain_note(self, &op)   # first: a drain that what follows begins has not counted it
            if op.target == TARGET_BASE:
                self.base_inflight -= 1
                if base_tried(self, &op, error):
                    return 0
                base_release(self)
            op_ended(self, &op, error)
        if self.stopped:
            refuse_ops(self)
        if self.closing != NULL:
            return close_step(self)
        if self.plan_count and self.prefetch_count < self.prefetch_depth:
            return prefetch_pump(self)
        return 0

    cdef int tick(self, uint64_t now_ns) except -1 nogil:
        self.now_ns = now_ns
        if self.stopped:
            return 0
        if self.retries != NULL and now_ns - self.retry_ns >= RETRY_AFTER_NS:
            retries_run(self)
        if self.starved != NULL and now_ns - self.starved_ns >= STARVED_AFTER_NS:
            starved_try(self, False)
        if self.soft.words + self.soft.entries and not self.soft_due and now_ns - self.soft_since_ns > SOFT_COMMIT_AFTER_NS:
            self.soft_due = True
            commit_maybe(self)
        if self.plan_count:
            if now_ns - self.steer_ns >= STEER_AFTER_NS:
                self.steer_ns = now_ns
                self.want |= Want.STEER
            prefetch_pump(self)
        if (self.open.words + self.open.entries and not self.commit_due and self.commit_state == COMMIT_IDLE
                and now_ns - self.open_since_ns > COMMIT_AFTER_NS):
            self.commit_due = True
            return commit_maybe(self)
        return 0

    cdef int cancel_waiting(self, uint64_t mask, uint64_t value, int32_t error) except -1 nogil:
        cdef RequestList doomed
        cdef int count
        doomed.head = doomed.tail = NULL
        count = list_part(&self.wait_slot, &doomed, mask, value)
        list_fail(self, &doomed, error)
        count += starved_end(self, mask, value, error)
        return count + base_cancel(self, mask, value, error)

    cdef uint64_t waiting_bytes(self, uint64_t mask, uint64_t value) noexcept nogil:
        cdef Request *r = self.wait_slot.head
        cdef uint64_t total = 0
        while r != NULL:
            if (r.cookie & mask) == value and r.buffer != NULL:
                total += r.end - r.start
            r = r.next
        return total + starved_bytes(self, mask, value)

    cdef int extents(self, uint64_t offset_bytes, uint64_t length_bytes, Extent *out, int capacity) except -1 nogil:
        cdef uint64_t at = offset_bytes
        cdef uint64_t stop = min(offset_bytes + length_bytes, self.virtual_size)
        cdef uint64_t end, chunk, first, last, run
        cdef uint32_t slot, state
        cdef bint present
        cdef int count = 0
        if offset_bytes > self.virtual_size:
            return 0
        while at < stop:
            chunk = at >> self.chunk_shift
            end = min(stop, (chunk + 1) << self.chunk_shift)
            slot = slot_of(self, chunk)
            first = at >> self.block_shift
            last = ((end - 1) >> self.block_shift) + 1
            present = bit_get(self.bitmap, first)
            run = bits_find(self.bitmap, first, last, not present)
            if run < last:
                end = run << self.block_shift
            if present:
                state = EXTENT_DATA if slot != EMPTY else EXTENT_ZERO
            elif at < self.base_size:
                state = EXTENT_BASE
                end = min(end, self.base_size)
            else:
                state = EXTENT_ZERO
            if count and out[count - 1].state == state:
                out[count - 1].length_bytes += end - at
            else:
                if count == capacity:
                    break
                out[count].length_bytes = end - at
                out[count].state = state
                out[count].reserved = 0
                count += 1
            at = end
        return count

    # --- what Python calls --------------------------------------------------------------------------------------

    def set_storage_size(self, uint64_t size_bytes):
        """The storage has this size now; writes that waited for a slot go on. Raises Corrupt if a slot in use lies beyond it."""
        if size_bytes != self.storage_size:
            self.exhausted = False
        resize_storage(self, size_bytes)
        list_walk(self, &self.wait_slot)

    def set_exhausted(self, bint exhausted):
        """Whether the storage cannot grow now. With on_full="error" the writes that wait for a slot then fail with ENOSPC."""
        self.exhausted = exhausted
        list_walk(self, &self.wait_slot)

    def cancel_all_waiting(self, int error_number):
        """End every write that waits for a slot with this errno (positive). Returns how many."""
        return self.cancel_waiting(0, 0, -error_number)

    def note_failed_flush(self, int error_number):
        """A flush beside this engine's own failed with this errno (positive), and may have taken a report that was due here (R30)."""
        if error_number <= 0:
            raise InvalidArgument(f"errno {error_number}: it must be positive")
        if not BUG(Bug.FAILURE_BESIDE_US_IGNORED):
            fail(self, -error_number)

    def stop(self):
        """See _engine.pyi."""
        cdef uint32_t i
        cdef uint32_t wanted = self.want
        if self.stopped or self.closed:
            return
        self.stopped = True     # R39
        self.prefetch_plan([])
        for i in range(self.done_count):
            if self.done[i].error == 0:
                self.done[i].error = -EIO
        fail(self, -EIO)
        self.want = wanted      # who stops it knows; and nothing grows for it any more
        starved_end(self, 0, 0, -EIO)
        list_fail(self, &self.wait_bounce, -EIO)
        self.base_timeout_ns = 0
        retries_run(self)
        refuse_ops(self)

    def commit_soon(self):
        """Commit what is pending without waiting for the timer or a flush, copies too."""
        self.commit_due = True
        self.soft_due = self.soft.words + self.soft.entries > 0
        commit_maybe(self)

    def snapshot_maps(self):
        """Copies of the bitmap and the table (None in the raw layout) as the guest sees them now."""
        return self.bitmap_array.copy(), None if self.table_array is None else self.table_array.copy()

    @property
    def free_slots(self):
        return slots_at_hand(self)

    @property
    def align_bytes(self):
        return self.align_mask + 1

    def expect_enospc(self):
        """See _engine.pyi."""
        self.durable_writes = False

    @property
    def capacity_slots(self):
        return self.capacity

    @property
    def used_slots_count(self):
        return self.chunks if self.raw else bits_count(self.used, 0, self.chunks)

    @property
    def lost_slots(self):
        """See _engine.pyi."""
        cdef int64_t lost = 0
        cdef Drain *d = self.retired
        cdef Busy *b
        if self.raw:
            return 0
        lost = <int64_t>bits_count(self.used, 0, self.chunks) - <int64_t>self.mapped_slots
        lost -= <int64_t>(self.to_discard_count + self.discarding_slots)
        while d != NULL:
            lost -= 1
            d = d.next
        for i in range(BUCKETS):
            b = self.buckets[i]
            while b != NULL:
                lost -= b.reserved
                b = b.next
        return lost

    @property
    def mapped_chunks(self):
        return self.mapped_slots

    @property
    def present_blocks(self):
        return bits_count(self.bitmap, 0, self.blocks)

    @property
    def waiting_writes(self):
        """Writes that wait for storage to grow."""
        cdef Request *r = self.wait_slot.head
        count = 0
        while r != NULL:
            count += 1
            r = r.next
        return count

    @property
    def storage_size_bytes(self):
        return self.storage_size

    @property
    def guest_reserve_bytes(self):
        """What copies leave free for the guest, where not every chunk has its place."""
        return self.reserve_slots << self.chunk_shift

    @property
    def wake_below_bytes(self):
        return self.wake_below_slots << self.chunk_shift

    @wake_below_bytes.setter
    def wake_below_bytes(self, uint64_t size_bytes):
        self.wake_below_slots = (size_bytes >> self.chunk_shift) + (size_bytes & ((<uint64_t>1 << self.chunk_shift) - 1) != 0)
        if not self.raw and not self.read_only and slots_at_hand(self) < self.wake_below_slots and self.capacity < self.chunks:
            self.want |= Want.GROWTH

    @property
    def clean(self):
        """Whether storage ends with a clean record, as after a proper close."""
        return self.clean_on_storage

    @property
    def closed_cleanly(self):
        """Whether the engine was closed and nothing of what it had is missing on storage."""
        return self.closed and self.clean_on_storage and self.failed_errno == 0

    def forget_log(self):
        """See _engine.pyi."""
        self.log = NULL
        self.log_buffer = None

    def adopt_changes(self, const uint64_t[::1] keys, const uint64_t[::1] values):
        """See _engine.pyi."""
        cdef Py_ssize_t i
        cdef uint32_t kind
        cdef uint64_t index
        if self.read_only or self.open_requests or changes(&self.open) + changes(&self.frozen) + changes(&self.soft):
            raise InvalidArgument("changes are adopted by an engine that is writable and has done nothing yet")
        for i in range(keys.shape[0]):
            kind = <uint32_t>(keys[i] >> 56)
            index = keys[i] & 0xFFFFFFFFFFFFFFULL
            if not ((kind == KIND_BITMAP and index < self.words) or (kind == KIND_TABLE and not self.raw and index < self.chunks)):
                raise InvalidArgument(f"the maps have no entry of kind {kind} and number {index}")
            if kind == KIND_BITMAP:
                delta_note(self, kind, index, self.bitmap[index])
                self.bitmap[index] = values[i]
            else:
                delta_note(self, kind, index, self.table[index])
                self.table[index] = <uint32_t>values[i]
        if delta_bytes(&self.open) > self.limit_bytes:
            raise Corrupt("the changes are more than one commit can take")

    @property
    def pending_changes(self):
        """Map entries that differ from what is committed."""
        return self.open.words + self.open.entries + self.frozen.words + self.frozen.entries

    # --- copies from the base -----------------------------------------------------------------------------------

    def prefetch_plan(self, extents):
        """What to copy from the base without being asked, in this order: [(offset_bytes, length_bytes)]; [] ends prefetching."""
        cdef uint64_t i, count = len(extents)
        cdef Run *plan = NULL
        if count and (self.read_only or not self.has_base):
            raise InvalidArgument("only a writable disk over a base can be prefetched")
        if count:
            plan = <Run *>calloc(count, sizeof(Run))
            if plan == NULL:
                raise MemoryError("fvd engine")
        try:
            for i in range(count):
                start, length = extents[i]
                end = min(max(start, 0) + max(length, 0), self.base_size)
                if start >= 0 and start < end:
                    plan[i].first = start >> self.block_shift
                    plan[i].end = ((end - 1) >> self.block_shift) + 1
        except BaseException:
            free(plan)
            raise
        free(self.plan)
        self.plan = plan
        self.plan_count = count
        self.plan_at = 0
        self.plan_cursor = plan[0].first if count else 0
        self.plan_again = False
        self.want &= ~<uint32_t>Want.STEER

    @property
    def prefetching(self):
        """Whether something of the plan is still to be copied or on its way."""
        if self.prefetch_count > 0:
            return True
        return self.base_absent > 0 and self.plan_count > 0 and (self.plan_at < self.plan_count or self.plan_again)

    @property
    def base_remaining_bytes(self):
        """What would still be read from the base."""
        if self.base_absent == 0:
            return 0
        total = self.base_absent << self.block_shift
        if not bit_get(self.bitmap, self.base_blocks - 1):
            total -= (self.base_blocks << self.block_shift) - self.base_size
        return total

    @property
    def waits_for_clock(self):
        """See _engine.pyi."""
        return self.retries != NULL or self.starved != NULL

    def read_profile(self):
        """[(offset_bytes, length_bytes)] of what guests read from the base since the engine was made, in order."""
        cdef uint64_t i
        return [(self.reads[i].first, self.reads[i].end - self.reads[i].first) for i in range(self.reads_count)]

    def copy_counters(self):
        """Counters of copies and of what they compete with, since the engine was made; `now_ns` and `guest_last_ns` are its clock."""
        return {
            "now_ns": self.now_ns, "guest_last_ns": self.guest_last_ns,
            "guest_quiet_requests": self.stat_quiet_requests, "guest_quiet_latency_ns": self.stat_quiet_ns,
            "guest_busy_requests": self.stat_busy_requests, "guest_busy_latency_ns": self.stat_busy_ns,
            "base_reads": self.stat_prefetch_reads, "base_read_bytes": self.stat_prefetch_read_bytes,
            "base_service_ns": self.stat_base_service_ns, "base_latency_ns": self.stat_base_latency_ns,
            "copy_writes": self.stat_copy_writes, "copy_write_bytes": self.stat_copy_write_bytes,
            "copy_service_ns": self.stat_copy_service_ns, "copy_latency_ns": self.stat_copy_latency_ns,
            "prefetched_bytes": self.stat_prefetched_bytes, "copied_bytes": self.stat_copied_bytes, "zero_bytes": self.stat_zero_bytes,
            "dropped_bytes": self.stat_dropped_bytes, "no_slot_copies": self.stat_no_slot,
            "soft_changes": self.soft.words + self.soft.entries,
        }

    def statistics(self):
        """Counters since the engine was made, as a dict of integers."""
        return {
            "reads": self.stat_reads, "writes": self.stat_writes, "flushes": self.stat_flushes, "trims": self.stat_trims,
            "device_reads": self.stat_device_reads, "device_writes": self.stat_device_writes,
            "device_flushes": self.stat_device_flushes, "base_reads": self.stat_base_reads,
            "commits": self.stat_commits, "journal_writes": self.stat_journal_writes, "checkpoints": self.stat_checkpoints,
            "map_writes": self.stat_map_writes, "allocations": self.stat_allocations, "waited_for_space": self.stat_waited,
            "zeroed_chunks": self.stat_zeroed, "discards": self.stat_discards, "most_discards_in_flight": self.discarding_most,
        }

    def leaks(self):
        """What is still held when nothing is in flight and no request is open: an empty dict, or a bug of ours."""
        held = {
            "operations": self.inflight_ops, "requests": self.open_requests, "busy_chunks": self.busy_count,
            "bounce_bytes": self.bounce_used, "reserved_journal_bytes": self.reserved_bytes, "drains": int(self.drains != NULL),
            "copies": self.copy_count, "copy_bytes": self.copy_bytes, "retries": int(self.retries != NULL), "held": self.held_count,
            "starved": self.starved_count,
            "discards": 0 if self.closed else self.to_discard_count,    # a close begins those only that do not take long
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
        """[(token, kind, target, offset_bytes, length_bytes, buffer_address, durable)] since the last call."""
        cdef uint32_t i
        taken = []
        for i in range(self.op_count):
            op = self.ops[i]
            taken.append((op.token, op.kind, op.target, op.offset_bytes, op.length_bytes, <uintptr_t>op.buffer, bool(op.durable)))
        self.op_count = 0
        return taken

    def take_done(self):
        """[(cookie, error)] of the requests finished since the last call; error is 0 or a negative errno."""
        cdef uint32_t i
        taken = []
        for i in range(self.done_count):
            taken.append((self.done[i].cookie, self.done[i].error))
        self.done_count = 0
        return taken

    def list_extents(self, uint64_t offset_bytes, uint64_t length_bytes):
        """[(length_bytes, state)] covering the range; state is 0 data, 1 base, 2 zero."""
        cdef Extent out[256]
        cdef uint64_t at = offset_bytes
        cdef uint64_t stop = min(offset_bytes + length_bytes, self.virtual_size)
        cdef int count, i
        found = []
        while at < stop:
            count = self.extents(at, stop - at, out, 256)
            for i in range(count):
                at += out[i].length_bytes
                if found and found[len(found) - 1][1] == out[i].state:
                    length, _ = found.pop()
                    found.append((length + out[i].length_bytes, out[i].state))
                else:
                    found.append((out[i].length_bytes, out[i].state))
        return found
