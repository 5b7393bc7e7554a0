# SPDX-License-Identifier: Apache-2.0
# Writes, write-zeroes and trim. docs/internals/durability.md numbers the rules that the comments name (R1, R2, ...).
#
# Offers: change_bytes, count_drained, fail_rest, has_journal_space, job_continue, job_new, job_write, retired_check, write_step,
#   zero_fill, zero_step
# Needs: changes: change_count, change_set_bytes, is_committed, map_bits, map_slot, slot_of; commit: commit_maybe; copy: copy_end,
#   copy_map, copy_save, promote_entry, promote_for_write; log: log_has_space; memory: active_find, active_free, active_get, bounce_give,
#   bounce_take, ensure, list_push, op_issue, op_list, out_of_memory; request: issue_plain, request_release, retry_waiters; slots:
#   discard_later, discards_begin, slot_give, slot_offset, slot_take, slots_at_hand


cdef int jobs_conflict(ActiveChunk *active, uint64_t first, uint64_t last) noexcept nogil:
    cdef Job *j = active.jobs
    if active.exclusive or active.wanted:
        return True
    while j != NULL:
        if j.first_block < last and first < j.end_block:
            return True
        j = j.next
    return False


cdef inline int wait_for(Request *r, RequestList *where) noexcept nogil:
    list_push(where, r)
    return STEP_WAITS


cdef int wait_for_commit(Engine e, Request *r) except -1 nogil:
    """The next commit is full, or the log: it begins, and the request goes on when it has."""
    list_push(&e.waiting.journal, r)
    commit_maybe(e)
    return STEP_WAITS


cdef inline int fail_rest(Request *r, int32_t error) noexcept nogil:
    """The rest of the request is not done."""
    r.error = error
    r.cursor = r.end
    return STEP_DONE


cdef int write_step(Engine e, Request *r, uint64_t stop) except -1 nogil:
    """Hand on the next piece of a write, not beyond `stop`. Or STEP_WAITS: the request waits in a list."""
    cdef uint64_t start = r.cursor
    cdef uint64_t chunk = start >> e.disk.chunk_shift
    cdef uint64_t chunk_start = chunk << e.disk.chunk_shift
    cdef uint64_t end = min(stop, chunk_start + (<uint64_t>1 << e.disk.chunk_shift))
    cdef uint64_t first, last, run
    cdef uint32_t slot = slot_of(e, chunk)
    cdef ActiveChunk *active = active_find(e, chunk) if e.active_chunks.count else NULL
    cdef uint8_t *buffer
    cdef bint present, durable = False
    if r.buffer == NULL:
        end = min(end, (start | (ZEROS_BYTES - 1)) + 1)
        buffer = e.pools.zeros
    else:
        buffer = r.buffer + (start - r.start)
    first = start >> e.disk.block_shift
    last = ((end - 1) >> e.disk.block_shift) + 1
    present = slot != EMPTY and bit_get(e.maps.bitmap, first)
    if slot != EMPTY:
        run = bits_find(e.maps.bitmap, first, last, not present)
        if run < last:
            last = run
            end = run << e.disk.block_shift
    # R7: one writer to a block that is being allocated, copied up or read-modified-written.
    if active != NULL and jobs_conflict(active, first, last) and not BUG(Bug.TWO_WRITERS_OF_A_BLOCK):
        return wait_for(r, &active.waiters)
    if not present:
        return allocate_begin(e, r, active, end)
    if e.failure.error_number and r.flags & FLAG_FUA:
        return fail_rest(r, -EIO)
    if change_count(&e.changes.lazy):
        promote_for_write(e, chunk, first, last)
    if ((start | end | <uint64_t><uintptr_t>buffer) & e.disk.align_mask) != 0:
        return modify_begin(e, r, chunk, slot, start, end)
    if r.flags & FLAG_FUA:
        # R9: durable data is enough only when the mapping is durable already. R29: else, and where storage may run out, a flush follows.
        if e.mode.durable_writes and (is_committed(e, chunk, first, last) or BUG(Bug.FUA_WITHOUT_COMMIT)):
            durable = True
        else:
            r.needs_commit = not BUG(Bug.FUA_WITHOUT_FLUSH)
    issue_plain(e, r, OP_WRITE, slot_offset(e, slot) + (start - chunk_start), end - start, buffer, durable)
    r.cursor = end
    return STEP_DONE


# --- jobs ---------------------------------------------------------------------------------------------------------

cdef Job *job_new(Engine e, Request *r, ActiveChunk *active, uint8_t kind, uint64_t first, uint64_t last) except NULL nogil:
    cdef Job *j = <Job *>calloc(1, sizeof(Job))
    if j == NULL:
        out_of_memory()
    j.kind = kind
    j.request = r
    j.active = active
    j.first_block = first
    j.end_block = last
    j.next = active.jobs
    active.jobs = j
    if r != NULL:
        r.pending += 1
    return j


cdef inline uint64_t change_bytes(uint64_t first, uint64_t last) noexcept nogil:
    return (((last - 1) >> 6) - (first >> 6) + 1) * WORD_RECORD_BYTES + ENTRY_RECORD_BYTES


cdef inline bint has_journal_space(Engine e, uint64_t need) noexcept nogil:
    """Whether the next commit, and the log of what is pending, can still take these changes."""
    cdef uint64_t noted = change_set_bytes(&e.changes.running) + change_set_bytes(&e.changes.lazy)
    return noted + e.changes.reserved_bytes + need <= e.changes.limit_bytes and log_has_space(e, need)


cdef int no_slot(Engine e, Request *r) except -1 nogil:
    if e.slots.capacity < e.disk.chunks:
        e.want |= Want.GROWTH
    if e.close.request != NULL:
        return fail_rest(r, -ESHUTDOWN)       # nobody waits for growth any more, and the close waits for this request
    # A slot that is about to be free is worth waiting for.
    if (e.mode.fail_when_full and e.slots.retired == NULL and e.discards.count == 0
            and (e.slots.exhausted or e.slots.capacity >= e.disk.chunks)):
        return fail_rest(r, -ENOSPC)
    e.count.waited_for_space += 1
    list_push(&e.waiting.slot, r)
    commit_maybe(e)     # a freed slot becomes usable once its free is durable
    return STEP_WAITS


cdef int read_from_base(Engine e, Job *j, uint64_t start, uint64_t end) except -1 nogil:
    """Fill [start, end) of the job's bounce buffer from the base, never reading past its end (R12)."""
    cdef Op *op
    cdef uint64_t limit = end if end < e.disk.base_size or BUG(Bug.READ_BEYOND_THE_BASE) else e.disk.base_size
    if start >= limit:
        return 0
    op = op_issue(e, PURPOSE_JOB, OP_READ, TARGET_BASE, start, limit - start,
                  j.bounce + (start - (j.first_block << e.disk.block_shift)), False)
    op.job = j
    j.pending += 1
    return 0


cdef struct Allocation:         # what a job will write of absent blocks
    uint64_t start              # [start, end): what the guest writes
    uint64_t end
    uint64_t first              # [first, last): its blocks
    uint64_t last
    uint8_t *buffer             # of `start`
    bint whole                  # it writes whole blocks, from a buffer that the device can use
    bint narrow                 # what the guest writes is enough: the rest of its blocks is known to be zeros, or will be (R18)
    bint zeroes_slot            # will be: the device zeroes the slot first


cdef int plan_allocation(Engine e, Request *r, ActiveChunk *active, uint64_t end, Allocation *plan) except -1 nogil:
    """What to write for [the request's cursor, end), or as much of it as one job takes. Changes nothing but `plan`."""
    cdef uint64_t chunk = r.cursor >> e.disk.chunk_shift
    cdef uint64_t run_start, run_end
    cdef uint32_t slot = slot_of(e, chunk)
    cdef bint long_run
    plan.start = r.cursor
    plan.end = end
    plan.first = plan.start >> e.disk.block_shift
    plan.last = ((end - 1) >> e.disk.block_shift) + 1
    plan.buffer = e.pools.zeros if r.buffer == NULL else r.buffer + (plan.start - r.start)
    plan.zeroes_slot = False
    run_start = plan.first << e.disk.block_shift
    run_end = plan.last << e.disk.block_shift
    long_run = plan.last - plan.first > 1 and run_end - run_start > UNCUT_BYTES
    plan.narrow = (e.slots.zeroed != NULL and (plan.start != run_start or end != run_end)
                   and ((plan.start | end | <uint64_t><uintptr_t>plan.buffer) & e.disk.align_mask) == 0)
    if plan.narrow:
        if bit_get(e.slots.zeroed, chunk):
            ensure(slot != EMPTY, "a chunk without a slot is known to be zeros")
        elif e.slots.zero_new and e.slots.zeroing < ZEROING_MAX and slot == EMPTY and active == NULL and not long_run:
            plan.zeroes_slot = True
        else:
            plan.narrow = False
    # Only the edge blocks of a long run need a bounce buffer: cut them off, the middle goes without a copy. A short run is copied: that
    # costs less than two more device writes.
    if (long_run and not plan.narrow
            and (<uint64_t><uintptr_t>plan.buffer & e.disk.align_mask) == (plan.start & e.disk.align_mask)):
        if plan.start != run_start:
            plan.last = plan.first + 1
        elif end != run_end:
            plan.last -= 1
        run_end = plan.last << e.disk.block_shift
        plan.end = min(end, run_end)
    plan.whole = plan.start == run_start and plan.end == run_end and (<uint64_t><uintptr_t>plan.buffer & e.disk.align_mask) == 0
    return 0


cdef bint claim_slot(Engine e, uint64_t chunk, ActiveChunk **active, bint *fresh) except -1 nogil:
    """A job may join its chunk: in the slot that the chunk has, or in one that is reserved for it now (`fresh`). False: there is none."""
    cdef uint32_t slot = slot_of(e, chunk)
    fresh[0] = False
    if active[0] != NULL:
        ensure(slot != EMPTY or active[0].reserved, "an unmapped chunk is active without a slot")
        return True
    if slot == EMPTY:
        slot = slot_take(e, chunk)
        if slot == EMPTY:
            return False
        fresh[0] = True
    active[0] = active_get(e, chunk)
    active[0].slot = slot
    active[0].reserved = fresh[0]
    return True


cdef int allocate_begin(Engine e, Request *r, ActiveChunk *active, uint64_t end) except -1 nogil:
    """Absent blocks from the request's cursor on: write whole blocks, the rest of them from the base or zeros, and map them when that is
    done."""
    cdef Allocation plan
    cdef uint64_t need, run_bytes
    cdef bint fresh
    if e.failure.error_number:
        return fail_rest(r, -EIO)
    plan_allocation(e, r, active, end, &plan)
    need = change_bytes(plan.first, plan.last)
    if not has_journal_space(e, need):
        return wait_for_commit(e, r)
    run_bytes = (plan.last - plan.first) << e.disk.block_shift
    if not plan.whole and not plan.narrow and e.pools.bounce_used and e.pools.bounce_used + run_bytes > e.pools.bounce_limit:
        return wait_for(r, &e.waiting.bounce)
    if not claim_slot(e, r.cursor >> e.disk.chunk_shift, &active, &fresh):
        return no_slot(e, r)
    start_allocation(e, r, active, fresh, &plan, need)
    return STEP_DONE


cdef int start_allocation(Engine e, Request *r, ActiveChunk *active, bint fresh, Allocation *plan, uint64_t need) except -1 nogil:
    """The job of an allocation, and its first operations."""
    cdef uint64_t chunk_first = active.chunk * e.disk.blocks_per_chunk
    cdef uint64_t chunk_end = min(chunk_first + e.disk.blocks_per_chunk, e.disk.blocks)
    cdef Job *j = job_new(e, r, active, JOB_ALLOCATE, plan.first, plan.last)
    e.count.allocations += 1
    j.guest_start = plan.start
    j.guest_end = plan.end
    j.reserved_bytes = need
    e.changes.reserved_bytes += need
    j.device_offset = slot_offset(e, active.slot) + ((plan.first - chunk_first) << e.disk.block_shift)
    j.device_length = (plan.last - plan.first) << e.disk.block_shift
    # R8: over a base an EMPTY chunk may hold blocks that read as zeros; they must be zeros in the slot before it is mapped.
    # Also those that this job writes itself: another job of the chunk may end first, and map the slot before they are there.
    if fresh and e.disk.has_base and not BUG(Bug.NEW_SLOT_WITHOUT_ZEROS) and not bits_none(e.maps.bitmap, chunk_first, chunk_end):
        active.exclusive = 1
    r.touched_device = 1
    r.cursor = plan.end
    if plan.zeroes_slot:
        return zero_slot(e, j)
    if plan.narrow:
        job_narrow(e, j)
    elif plan.whole:
        j.data = plan.buffer
    else:
        job_pad(e, j)
        if e.disk.has_base:
            read_edges(e, j)
    j.phase = PHASE_READ
    if BUG(Bug.CHANGE_BEFORE_ITS_DATA):
        allocate_map(e, j)
    if j.pending == 0:
        job_continue(e, j)
    return 0


cdef int zero_slot(Engine e, Job *j) except -1 nogil:
    """The first of its chunk, and alone in it: the others wait until the slot is zeros and this one has mapped it."""
    cdef Op *op
    j.active.exclusive = 1
    e.slots.zeroing += 1
    j.phase = PHASE_ZERO
    op = op_issue(e, PURPOSE_JOB, OP_ZERO, TARGET_STORAGE, slot_offset(e, j.active.slot), <uint64_t>1 << e.disk.chunk_shift, NULL, False)
    op.job = j
    j.pending += 1
    op_list(e, op, True)
    if BUG(Bug.NARROW_WRITE_BEFORE_ZEROING):
        e.slots.zeroing -= 1
        job_narrow(e, j)
        j.phase = PHASE_WRITE
        job_write(e, j, False)
    return 0


cdef int read_edges(Engine e, Job *j) except -1 nogil:
    """What the guest does not write of its first and last block, where the base shows."""
    cdef uint64_t run_start = j.first_block << e.disk.block_shift
    cdef uint64_t run_end = j.end_block << e.disk.block_shift
    if j.guest_start > run_start and not bit_get(e.maps.bitmap, j.first_block):
        read_from_base(e, j, run_start, j.guest_start)
    if j.guest_end < run_end and not bit_get(e.maps.bitmap, j.end_block - 1):
        read_from_base(e, j, j.guest_end, run_end)
    return 0


cdef void job_narrow(Engine e, Job *j) noexcept nogil:
    """Of its blocks only what the guest writes is written."""
    cdef Request *r = j.request
    j.data = e.pools.zeros if r.buffer == NULL else r.buffer + (j.guest_start - r.start)
    j.device_offset += j.guest_start - (j.first_block << e.disk.block_shift)
    j.device_length = j.guest_end - j.guest_start


cdef int job_pad(Engine e, Job *j) except -1 nogil:
    """Its blocks are written whole: a bounce buffer with zeros around what the guest writes."""
    cdef Request *r = j.request
    cdef uint64_t head_bytes = j.guest_start - (j.first_block << e.disk.block_shift)
    cdef uint64_t guest_bytes = j.guest_end - j.guest_start
    j.bounce_bytes = j.device_length
    j.bounce = bounce_take(e, j.bounce_bytes)
    j.data = j.bounce
    if not BUG(Bug.NO_PADDING):
        # R3: what the guest did not write is never what the storage held before.
        memset(j.bounce, 0, head_bytes)
        memset(j.bounce + head_bytes + guest_bytes, 0, j.device_length - head_bytes - guest_bytes)
    if r.buffer == NULL:
        memset(j.bounce + head_bytes, 0, guest_bytes)
    else:
        memcpy(j.bounce + head_bytes, r.buffer + (j.guest_start - r.start), guest_bytes)
    return 0


cdef int handle_zeroing(Engine e, Job *j) except -1 nogil:
    """The device has zeroed the slot of a new chunk, or has refused: then its blocks are written whole, as on any other device."""
    cdef uint64_t chunk = j.active.chunk
    e.slots.zeroing -= 1
    if j.error and not BUG(Bug.FAILED_ZEROING_BELIEVED):
        # Not by this device. Any other failure may be this slot's own.
        if j.error == -EOPNOTSUPP or j.error == -ENOSYS or j.error == -EINVAL:
            e.slots.zero_new = False
        j.error = 0
        return job_pad(e, j)
    j.error = 0
    e.count.zeroed_chunks += 1
    bits_fill(e.slots.zeroed, chunk, chunk + 1, True)
    job_narrow(e, j)
    return 0


cdef int zero_fill(Engine e, Job *j) except -1 nogil:
    """Write zeros to the blocks of the chunk that read as zeros and that this job does not write."""
    cdef uint64_t block = j.active.chunk * e.disk.blocks_per_chunk
    cdef uint64_t chunk_start = block
    cdef uint64_t chunk_end = min(block + e.disk.blocks_per_chunk, e.disk.blocks)
    cdef uint64_t run, step
    cdef Op *op
    while True:
        block = bits_find(e.maps.bitmap, block, chunk_end, True)
        if block >= chunk_end:
            return 0
        run = bits_find(e.maps.bitmap, block, chunk_end, False)
        if block >= j.first_block and block < j.end_block:
            block = j.end_block
            continue
        if block < j.first_block and run > j.first_block:
            run = j.first_block
        step = min(run - block, ZEROS_BYTES >> e.disk.block_shift)
        op = op_issue(e, PURPOSE_JOB, OP_WRITE, TARGET_STORAGE,
                      slot_offset(e, j.active.slot) + ((block - chunk_start) << e.disk.block_shift),
                      step << e.disk.block_shift, e.pools.zeros, False)
        op.job = j
        j.pending += 1
        op_list(e, op, True)
        block += step


cdef int modify_begin(Engine e, Request *r, uint64_t chunk, uint32_t slot, uint64_t start, uint64_t end) except -1 nogil:
    """Present blocks, but not whole logical blocks of the device: serialized read-modify-write."""
    cdef uint64_t shift = slot_offset(e, slot) - (chunk << e.disk.chunk_shift)
    cdef uint8_t *buffer
    cdef uint64_t low, high
    cdef ActiveChunk *active
    cdef Job *j
    end = min(end, (start | (ZEROS_BYTES - 1)) + 1)
    low = start & ~e.disk.align_mask
    high = (end + e.disk.align_mask) & ~e.disk.align_mask
    if e.pools.bounce_used and e.pools.bounce_used + (high - low) > e.pools.bounce_limit:
        return wait_for(r, &e.waiting.bounce)
    active = active_get(e, chunk)
    active.slot = slot
    j = job_new(e, r, active, JOB_MODIFY, start >> e.disk.block_shift, ((end - 1) >> e.disk.block_shift) + 1)
    j.guest_start = start
    j.guest_end = end
    j.device_offset = shift + low
    j.device_length = high - low
    j.bounce_bytes = high - low
    j.bounce = bounce_take(e, j.bounce_bytes)
    j.data = j.bounce
    j.phase = PHASE_DRAIN
    r.touched_device = 1
    r.cursor = end
    # R7: an earlier overwrite of a neighbouring sector part must not be undone by what is read here.
    if BUG(Bug.MODIFY_BESIDE_WRITES) or drain_begin(e, &e.flight.drains, shift + low, shift + high, True, j, 0) == 0:
        job_continue(e, j)
    return STEP_DONE


cdef int modify_read(Engine e, Job *j) except -1 nogil:
    """Read the device blocks that the guest covers only in part."""
    cdef uint64_t unit = e.disk.align_mask + 1
    cdef uint64_t head = j.guest_start & e.disk.align_mask
    cdef uint64_t tail = j.guest_end & e.disk.align_mask
    cdef Op *op
    if head:
        op = op_issue(e, PURPOSE_JOB, OP_READ, TARGET_STORAGE, j.device_offset, unit, j.bounce, False)
        op.job = j
        j.pending += 1
        op_list(e, op, False)
    if tail and not (head and j.device_length == unit):
        op = op_issue(e, PURPOSE_JOB, OP_READ, TARGET_STORAGE, j.device_offset + j.device_length - unit, unit,
                      j.bounce + j.device_length - unit, False)
        op.job = j
        j.pending += 1
        op_list(e, op, False)
    return 0


cdef int job_write(Engine e, Job *j, bint durable) except -1 nogil:
    cdef Op *op = op_issue(e, PURPOSE_JOB, OP_WRITE, TARGET_STORAGE, j.device_offset, j.device_length, j.data, durable)
    op.job = j
    j.pending += 1
    op_list(e, op, True)
    return 0


cdef int job_continue(Engine e, Job *j) except -1 nogil:
    """All operations of the job's phase have ended: the next phase."""
    cdef Request *r = j.request
    cdef uint64_t head
    cdef bint durable
    if j.phase == PHASE_ZERO:
        handle_zeroing(e, j)
        j.phase = PHASE_READ
    if j.error:
        return job_finish(e, j)
    if j.phase == PHASE_DRAIN:
        if j.kind == JOB_PUNCH:
            return job_finish(e, j)
        j.phase = PHASE_READ
        modify_read(e, j)
        if j.pending:
            return 0
    if j.phase == PHASE_READ:
        j.phase = PHASE_WRITE
        if j.kind == JOB_ALLOCATE:
            job_write(e, j, False)
            if j.active.exclusive:
                zero_fill(e, j)
            return 0
        head = j.guest_start & e.disk.align_mask
        if r.buffer == NULL:
            memset(j.bounce + head, 0, j.guest_end - j.guest_start)
        else:
            memcpy(j.bounce + head, r.buffer + (j.guest_start - r.start), j.guest_end - j.guest_start)
        durable = False
        if r.flags & FLAG_FUA:
            if e.mode.durable_writes and is_committed(e, j.active.chunk, j.first_block, j.end_block):
                durable = True
            else:
                r.needs_commit = 1      # R29
        job_write(e, j, durable)
        return 0
    return job_finish(e, j)


cdef int allocate_map(Engine e, Job *j) except -1 nogil:
    """R1: the data are written; now the change becomes pending."""
    ensure(slot_of(e, j.active.chunk) == (EMPTY if j.active.reserved else j.active.slot), "the slot of a chunk changed under a job")
    map_bits(e, j.first_block, j.end_block, True)
    if e.changes.lazy.entries and not BUG(Bug.ENTRY_LAZY_UNDER_A_WRITE):
        promote_entry(e, j.active.chunk)       # R15: a copy may have mapped the slot since the word was promoted
    if j.active.reserved:
        map_slot(e, j.active.chunk, j.active.slot)
        j.active.reserved = 0
        e.slots.mapped += 1
    return 0


cdef int job_finish(Engine e, Job *j) except -1 nogil:
    cdef ActiveChunk *active = j.active
    cdef Request *r = j.request
    cdef Job **link = &active.jobs
    cdef RequestList waiters
    cdef Copy *copy = NULL
    cdef bint filled = False
    if j.kind != JOB_MODIFY and e.failure.error_number and j.error == 0:
        j.error = -EIO      # R10: a mapping that can never be committed is not acknowledged
    if j.error == 0:
        if j.kind == JOB_ALLOCATE:
            if not BUG(Bug.CHANGE_BEFORE_ITS_DATA):
                allocate_map(e, j)
            if r.flags & FLAG_FUA:
                r.needs_commit = 1
        elif j.kind == JOB_PUNCH:
            punch_map(e, active.chunk, active.slot, j.first_block, j.end_block)
        elif j.kind != JOB_MODIFY:
            copy_map(e, j)
    elif r != NULL and r.error == 0:
        r.error = j.error
    # R18: a write that failed may have left anything in blocks that stay absent.
    if j.error and e.slots.zeroed != NULL and not BUG(Bug.ZEROED_AFTER_A_FAILED_WRITE):
        bits_fill(e.slots.zeroed, active.chunk, active.chunk + 1, False)
    e.changes.reserved_bytes -= j.reserved_bytes
    while link[0] != j:
        link = &link[0].next
    link[0] = j.next
    if j.bounce != NULL:
        bounce_give(e, j.bounce, j.bounce_bytes)
    if j.kind != JOB_MODIFY and j.kind != JOB_SAVE:
        active.exclusive = 0
    if j.kind == JOB_SAVE or j.kind == JOB_FILL:
        copy = j.copy
        filled = j.kind == JOB_FILL and j.error == 0
        copy.pending -= 1
        if j.error:
            e.count.dropped_bytes += (j.end_block - j.first_block) << e.disk.block_shift
            e.prefetch.plan_again |= copy.prefetch
    free(j)
    waiters = active.waiters
    active.waiters.head = NULL
    active.waiters.tail = NULL
    if active.jobs == NULL:
        if active.reserved:
            slot_give(e, active.slot)    # every operation on it has ended
        active_free(e, active)
    retry_waiters(e, &waiters)
    if e.waiting.bounce.head != NULL:
        retry_waiters(e, &e.waiting.bounce)
    if e.waiting.journal.head != NULL:
        retry_waiters(e, &e.waiting.journal)
    if e.waiting.slot.head != NULL and slots_at_hand(e):
        retry_waiters(e, &e.waiting.slot)
    if copy != NULL:
        if filled:
            copy_save(e, copy)      # those who waited for the chunk came first
        elif copy.pending == 0:
            copy_end(e, copy)
    else:
        request_release(e, r)
    return commit_maybe(e)


# --- trim and write-zeroes ----------------------------------------------------------------------------------------

cdef int zero_step(Engine e, Request *r) except -1 nogil:
    """Trim takes whole blocks only; write-zeroes takes whole blocks by changing the maps where it can, and writes zeros elsewhere."""
    cdef uint64_t start = r.cursor
    cdef uint64_t chunk = start >> e.disk.chunk_shift
    cdef uint64_t end = min(r.end, (chunk + 1) << e.disk.chunk_shift)
    cdef uint64_t block_bytes = <uint64_t>1 << e.disk.block_shift
    cdef uint64_t first = start >> e.disk.block_shift
    cdef uint64_t last = e.disk.blocks if end == e.disk.virtual_size else end >> e.disk.block_shift
    cdef uint64_t chunk_first = chunk * e.disk.blocks_per_chunk
    cdef uint64_t chunk_end = min(chunk_first + e.disk.blocks_per_chunk, e.disk.blocks)
    cdef bint whole_chunk
    if start & (block_bytes - 1) or first >= last:
        end = min(end, (start & ~(block_bytes - 1)) + block_bytes)
        if r.kind == REQUEST_TRIM or (not e.disk.has_base and not r.flags & FLAG_NO_HOLE and not bit_get(e.maps.bitmap, first)):
            r.cursor = end
            return STEP_DONE
        return write_step(e, r, end)
    end = min(end, last << e.disk.block_shift)
    whole_chunk = first == chunk_first and last == chunk_end
    if r.kind == REQUEST_TRIM:
        if e.disk.has_base and (e.disk.raw or not whole_chunk):
            r.cursor = end
            return STEP_DONE
        return punch(e, r, chunk, first, last, end)
    if r.flags & FLAG_NO_HOLE or (e.disk.has_base and (e.disk.raw or (slot_of(e, chunk) != EMPTY and not whole_chunk))):
        return write_step(e, r, end)
    return punch(e, r, chunk, first, last, end)


cdef int punch(Engine e, Request *r, uint64_t chunk, uint64_t first, uint64_t last, uint64_t end) except -1 nogil:
    """Make whole blocks read as zeros by changing the maps only."""
    cdef uint32_t slot = slot_of(e, chunk)
    cdef uint64_t need, offset
    cdef ActiveChunk *active = active_find(e, chunk)
    cdef Job *j
    if active != NULL:
        active.wanted = 1    # or a stream of writes to other blocks of the chunk could keep it waiting for ever
        return wait_for(r, &active.waiters)
    if e.disk.has_base:
        if slot == EMPTY and bits_all(e.maps.bitmap, first, last):
            r.cursor = end
            return STEP_DONE
    elif bits_none(e.maps.bitmap, first, last):
        r.cursor = end
        if e.active_chunks.count == 0 and end < r.end:
            # Nothing is here, nor on its way: on to what is.
            first = bits_find(e.maps.bitmap, last, ((r.end - 1) >> e.disk.block_shift) + 1, True)
            r.cursor = max(end, min(r.end, first << e.disk.block_shift))
        return STEP_DONE
    if e.failure.error_number:
        return fail_rest(r, -EIO)
    need = change_bytes(first, last)
    if r.punched == PUNCHED_MAX and change_count(&e.changes.running):
        # Enough for one turn, and for one commit: others come first.
        r.punched = 0
        return wait_for_commit(e, r)
    if not has_journal_space(e, need):
        return wait_for_commit(e, r)
    active = active_get(e, chunk)
    active.slot = slot
    active.exclusive = not BUG(Bug.TRIM_SHARES_ITS_CHUNK)   # a job that joined could map blocks of a slot that this one is about to free
    if e.slots.zeroed != NULL and not BUG(Bug.ZEROED_AFTER_A_TRIM):
        bits_fill(e.slots.zeroed, chunk, chunk + 1, False)    # R18: what becomes absent leaves its data in the slot
    r.punched = min(r.punched + 1, <uint32_t>PUNCHED_MAX)
    j = job_new(e, r, active, JOB_PUNCH, first, last)
    j.reserved_bytes = need
    e.changes.reserved_bytes += need
    j.phase = PHASE_DRAIN
    r.cursor = end
    if slot != EMPTY and not BUG(Bug.TRIM_BESIDE_WRITES):
        # R7: a write in flight could land after a later write to the same block, and bring trimmed data back.
        offset = slot_offset(e, slot)
        if drain_begin(e, &e.flight.drains, offset + ((first - chunk * e.disk.blocks_per_chunk) << e.disk.block_shift),
                       offset + ((last - chunk * e.disk.blocks_per_chunk) << e.disk.block_shift), True, j, 0):
            return STEP_DONE
    job_continue(e, j)
    return STEP_DONE


cdef int punch_map(Engine e, uint64_t chunk, uint32_t slot, uint64_t first, uint64_t last) except -1 nogil:
    cdef uint64_t chunk_first = chunk * e.disk.blocks_per_chunk
    cdef uint64_t chunk_end = min(chunk_first + e.disk.blocks_per_chunk, e.disk.blocks)
    ensure(slot_of(e, chunk) == slot, "the slot of a chunk changed under a trim")
    map_bits(e, first, last, e.disk.has_base)
    if e.disk.raw or slot == EMPTY or (not e.disk.has_base and not bits_none(e.maps.bitmap, chunk_first, chunk_end)):
        return 0
    map_slot(e, chunk, EMPTY)
    e.slots.mapped -= 1
    # R5, R6: not free before the free is durable and nothing reads or writes the slot any more.
    if BUG(Bug.SLOT_FREED_BEFORE_COMMIT):
        return slot_give(e, slot)
    drain_begin(e, &e.slots.retired, slot_offset(e, slot),
                slot_offset(e, <uint64_t>slot + 1), False, NULL, slot)
    return 0


# --- waiting for operations in flight -----------------------------------------------------------------------------

cdef int drain_begin(Engine e, Drain **where, uint64_t first_byte, uint64_t end_byte, bint writes_only, Job *job,
                     uint32_t slot) except -1 nogil:
    """Count the storage operations now in flight in a range. Returns how many; a job's drain with none is not kept."""
    cdef Op *op = e.flight.first
    cdef uint64_t count = 0
    cdef Drain *d
    while op != NULL:
        if op.offset_bytes < end_byte and first_byte < op.offset_bytes + op.length_bytes and (op.is_write or not writes_only):
            op.watched = 1
            count += 1
        op = op.next
    if count == 0 and job != NULL:
        return 0
    d = <Drain *>calloc(1, sizeof(Drain))
    if d == NULL:
        out_of_memory()
    d.first_byte = first_byte
    d.end_byte = end_byte
    d.number = e.flight.number
    e.flight.number += 1        # nothing joins an operation that was issued before
    d.remaining = 0 if job == NULL and BUG(Bug.SLOT_FREED_BESIDE_ITS_TRANSFERS) else count
    d.commit = e.commit.begun + 1
    d.writes_only = writes_only
    d.job = job
    d.slot = slot
    d.next = where[0]
    where[0] = d
    return 1


cdef inline bint drain_counts(Drain *d, Op *op) noexcept nogil:
    return (op.number <= d.number and d.remaining > 0 and (op.is_write or not d.writes_only)
            and op.offset_bytes < d.end_byte and d.first_byte < op.offset_bytes + op.length_bytes)


cdef int count_drained(Engine e, Op *op) except -1 nogil:
    """A watched operation has ended."""
    cdef Drain **link = &e.flight.drains
    cdef Drain *d
    cdef Drain *ready = NULL
    while link[0] != NULL:
        d = link[0]
        if drain_counts(d, op):
            d.remaining -= 1
            if d.remaining == 0:
                link[0] = d.next
                d.next = ready
                ready = d
                continue
        link = &d.next
    d = e.slots.retired
    while d != NULL:
        if drain_counts(d, op):
            d.remaining -= 1
        d = d.next
    while ready != NULL:
        d = ready
        ready = d.next
        job_continue(e, d.job)
        free(d)
    return retired_check(e)


cdef int retired_check(Engine e) except -1 nogil:
    """Slots whose free is durable and that nothing touches any more are free, or wait for their discard."""
    cdef Drain **link = &e.slots.retired
    cdef Drain *d
    cdef bint freed = False
    while link[0] != NULL:
        d = link[0]
        if d.remaining or d.commit > e.commit.durable:
            link = &d.next
            continue
        link[0] = d.next
        if e.mode.discard:
            discard_later(e, d.slot)
        else:
            slot_give(e, d.slot)
        freed = True
        free(d)
    if not freed:
        return 0
    if e.waiting.slot.head != NULL:
        retry_waiters(e, &e.waiting.slot)      # first: they need no discard
    return discards_begin(e)
