# SPDX-License-Identifier: Apache-2.0
# Writes, write-zeroes and trim. docs/internals/durability.md numbers the rules that the comments name (R1, R2, ...).


cdef int jobs_conflict(Busy *b, uint64_t first, uint64_t last) noexcept nogil:
    cdef Job *j = b.jobs
    if b.exclusive or b.wanted:
        return True
    while j != NULL:
        if j.first_block < last and first < j.end_block:
            return True
        j = j.next
    return False


cdef inline int wait_for(Request *r, RequestList *where) noexcept nogil:
    list_push(where, r)
    return 0


cdef inline int give_up(Request *r, int32_t error) noexcept nogil:
    """The rest of the request is not done."""
    r.error = error
    r.cursor = r.end
    return 1


cdef int write_step(Engine e, Request *r, uint64_t stop) except -1 nogil:
    """Hand on the next piece of a write, not beyond `stop`. Returns 0 when the request waits in a list instead."""
    cdef uint64_t start = r.cursor
    cdef uint64_t chunk = start >> e.chunk_shift
    cdef uint64_t chunk_start = chunk << e.chunk_shift
    cdef uint64_t end = min(stop, chunk_start + (<uint64_t>1 << e.chunk_shift))
    cdef uint64_t first, last, run
    cdef uint32_t slot = slot_of(e, chunk)
    cdef Busy *b = busy_find(e, chunk) if e.busy_count else NULL
    cdef uint8_t *buffer
    cdef bint present, durable = False
    if r.buffer == NULL:
        end = min(end, (start | (ZEROS_BYTES - 1)) + 1)
        buffer = e.zeros
    else:
        buffer = r.buffer + (start - r.start)
    first = start >> e.block_shift
    last = ((end - 1) >> e.block_shift) + 1
    present = slot != EMPTY and bit_get(e.bitmap, first)
    if slot != EMPTY:
        run = bits_find(e.bitmap, first, last, not present)
        if run < last:
            last = run
            end = run << e.block_shift
    # R7: one writer to a block that is being allocated, copied up or read-modified-written.
    if b != NULL and jobs_conflict(b, first, last) and not BUG(Bug.TWO_WRITERS_OF_A_BLOCK):
        return wait_for(r, &b.waiters)
    if not present:
        return allocate_begin(e, r, chunk, slot, b, start, end, first, last)
    if e.failed_errno and r.flags & FLAG_FUA:
        return give_up(r, -EIO)
    if e.soft.words + e.soft.entries:
        guest_hardens(e, chunk, first, last)
    if ((start | end | <uint64_t><uintptr_t>buffer) & e.align_mask) != 0:
        return modify_begin(e, r, chunk, slot, start, end)
    if r.flags & FLAG_FUA:
        # R9: durable data is enough only when the mapping is durable already. R29: else, and where storage may run out, a flush follows.
        if e.durable_writes and (is_committed(e, chunk, first, last) or BUG(Bug.FUA_WITHOUT_COMMIT)):
            durable = True
        else:
            r.needs_commit = not BUG(Bug.FUA_WITHOUT_FLUSH)
    issue_plain(e, r, OP_WRITE, e.data_offset + (<uint64_t>slot << e.chunk_shift) + (start - chunk_start), end - start, buffer, durable)
    r.cursor = end
    return 1


# --- jobs ---------------------------------------------------------------------------------------------------------

cdef Job *job_new(Engine e, Request *r, Busy *b, uint8_t kind, uint64_t first, uint64_t last) except NULL nogil:
    cdef Job *j = <Job *>calloc(1, sizeof(Job))
    if j == NULL:
        out_of_memory()
    j.kind = kind
    j.request = r
    j.busy = b
    j.first_block = first
    j.end_block = last
    j.next = b.jobs
    b.jobs = j
    if r != NULL:
        r.pending += 1
    return j


cdef inline uint64_t change_bytes(uint64_t first, uint64_t last) noexcept nogil:
    return (((last - 1) >> 6) - (first >> 6) + 1) * WORD_RECORD_BYTES + ENTRY_RECORD_BYTES


cdef inline bint has_room(Engine e, uint64_t need) noexcept nogil:
    """Whether the next commit, and the log of what is pending, can still take these changes."""
    return delta_bytes(&e.open) + delta_bytes(&e.soft) + e.reserved_bytes + need <= e.limit_bytes and log_has_room(e, need)


cdef int no_slot(Engine e, Request *r) except -1 nogil:
    if e.capacity < e.chunks:
        e.want |= Want.GROWTH
    if e.closing != NULL:
        return give_up(r, -ESHUTDOWN)       # nobody waits for growth any more, and the close waits for this request
    # A slot that is about to be free is worth waiting for.
    if e.fail_when_full and e.retired == NULL and e.discarding == 0 and (e.exhausted or e.capacity >= e.chunks):
        return give_up(r, -ENOSPC)
    e.stat_waited += 1
    list_push(&e.wait_slot, r)
    commit_maybe(e)     # a freed slot becomes usable once its free is durable
    return 0


cdef int base_read(Engine e, Job *j, uint64_t start, uint64_t end) except -1 nogil:
    """Fill [start, end) of the job's bounce buffer from the base, never reading past its end (R12)."""
    cdef Op *op
    cdef uint64_t limit = end if end < e.base_size or BUG(Bug.READ_BEYOND_THE_BASE) else e.base_size
    if start >= limit:
        return 0
    op = op_issue(e, WHAT_JOB, OP_READ, TARGET_BASE, start, limit - start, j.bounce + (start - (j.first_block << e.block_shift)), False)
    op.job = j
    j.pending += 1
    return 0


cdef int allocate_begin(Engine e, Request *r, uint64_t chunk, uint32_t slot, Busy *b, uint64_t start, uint64_t end,
                        uint64_t first, uint64_t last) except -1 nogil:
    """Absent blocks: write whole blocks, the rest of them from the base or zeros, and map them when that is done."""
    cdef uint64_t run_start, run_end, need
    cdef uint64_t chunk_first = chunk * e.blocks_per_chunk
    cdef uint64_t chunk_end = min(chunk_first + e.blocks_per_chunk, e.blocks)
    cdef uint8_t *buffer = e.zeros if r.buffer == NULL else r.buffer + (start - r.start)
    cdef bint whole, long_run, alone, zeroing = False, fresh = False
    cdef Op *op
    cdef Job *j
    if e.failed_errno:
        return give_up(r, -EIO)
    run_start = first << e.block_shift
    run_end = last << e.block_shift
    long_run = last - first > 1 and run_end - run_start > UNCUT_BYTES
    # R18: what the guest writes is enough where the rest of its blocks is known to be zeros, or will be.
    alone = (e.zeroed != NULL and (start != run_start or end != run_end)
             and ((start | end | <uint64_t><uintptr_t>buffer) & e.align_mask) == 0)
    if alone:
        if bit_get(e.zeroed, chunk):
            ensure(slot != EMPTY, "a chunk without a slot is known to be zeros")
        elif e.zero_chunks and e.zeroing < ZEROING_MAX and slot == EMPTY and b == NULL and not long_run:
            zeroing = True
        else:
            alone = False
    # Only the edge blocks of a long run need a bounce buffer: cut them off, the middle goes without a copy. A short run is copied: that
    # costs less than two more device writes.
    if (long_run and not alone
            and (<uint64_t><uintptr_t>buffer & e.align_mask) == (start & e.align_mask)):
        if start != run_start:
            last = first + 1
        elif end != run_end:
            last -= 1
        run_end = last << e.block_shift
        end = min(end, run_end)
    whole = start == run_start and end == run_end and (<uint64_t><uintptr_t>buffer & e.align_mask) == 0
    need = change_bytes(first, last)
    if not has_room(e, need):
        list_push(&e.wait_journal, r)
        commit_maybe(e)
        return 0
    if not whole and not alone and e.bounce_used and e.bounce_used + (run_end - run_start) > e.bounce_limit:
        return wait_for(r, &e.wait_bounce)
    if slot == EMPTY:
        if b != NULL:
            ensure(b.reserved, "an unmapped chunk is busy without a slot")
            slot = b.slot
        else:
            slot = slot_take(e, chunk)
            if slot == EMPTY:
                return no_slot(e, r)
            b = busy_get(e, chunk)
            b.slot = slot
            b.reserved = 1
            fresh = True
    elif b == NULL:
        b = busy_get(e, chunk)
        b.slot = slot
    e.stat_allocations += 1
    j = job_new(e, r, b, JOB_ALLOCATE, first, last)
    j.guest_start = start
    j.guest_end = end
    j.reserved_bytes = need
    e.reserved_bytes += need
    j.device_offset = e.data_offset + (<uint64_t>slot << e.chunk_shift) + (run_start - (chunk << e.chunk_shift))
    j.device_length = run_end - run_start
    # R8: over a base an EMPTY chunk may hold blocks that read as zeros; they must be zeros in the slot before it is mapped.
    # Also those that this job writes itself: another job of the chunk may end first, and map the slot before they are there.
    if fresh and e.has_base and not BUG(Bug.NEW_SLOT_WITHOUT_ZEROS) and not bits_none(e.bitmap, chunk_first, chunk_end):
        b.exclusive = 1
    r.touched_device = 1
    r.cursor = end
    if zeroing:
        # The first of its chunk, and alone in it: the others wait until the slot is zeros and this one has mapped it.
        b.exclusive = 1
        e.zeroing += 1
        j.phase = PHASE_ZERO
        op = op_issue(e, WHAT_JOB, OP_ZERO, TARGET_STORAGE, e.data_offset + (<uint64_t>slot << e.chunk_shift),
                      <uint64_t>1 << e.chunk_shift, NULL, False)
        op.job = j
        j.pending += 1
        op_list(e, op, True)
        if BUG(Bug.NARROW_WRITE_BEFORE_ZEROING):
            e.zeroing -= 1
            job_narrow(e, j)
            j.phase = PHASE_WRITE
            job_write(e, j, False)
        return 1
    if alone:
        job_narrow(e, j)
    elif whole:
        j.data = buffer
    else:
        job_pad(e, j)
        if e.has_base:
            if start > run_start and not bit_get(e.bitmap, first):
                base_read(e, j, run_start, start)
            if end < run_end and not bit_get(e.bitmap, last - 1):
                base_read(e, j, end, run_end)
    j.phase = PHASE_READ
    if BUG(Bug.CHANGE_BEFORE_ITS_DATA):
        allocate_map(e, j)
    if j.pending == 0:
        job_continue(e, j)
    return 1


cdef void job_narrow(Engine e, Job *j) noexcept nogil:
    """Of its blocks only what the guest writes is written."""
    cdef Request *r = j.request
    j.data = e.zeros if r.buffer == NULL else r.buffer + (j.guest_start - r.start)
    j.device_offset += j.guest_start - (j.first_block << e.block_shift)
    j.device_length = j.guest_end - j.guest_start


cdef int job_pad(Engine e, Job *j) except -1 nogil:
    """Its blocks are written whole: a bounce buffer with zeros around what the guest writes."""
    cdef Request *r = j.request
    cdef uint64_t head_bytes = j.guest_start - (j.first_block << e.block_shift)
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


cdef int slot_zeroed(Engine e, Job *j) except -1 nogil:
    """The device has zeroed the slot of a new chunk, or has refused: then its blocks are written whole, as on any other device."""
    cdef uint64_t chunk = j.busy.chunk
    e.zeroing -= 1
    if j.error and not BUG(Bug.FAILED_ZEROING_BELIEVED):
        # Not by this device. Any other failure may be this slot's own.
        if j.error == -EOPNOTSUPP or j.error == -ENOSYS or j.error == -EINVAL:
            e.zero_chunks = False
        j.error = 0
        return job_pad(e, j)
    j.error = 0
    e.stat_zeroed += 1
    bits_fill(e.zeroed, chunk, chunk + 1, True)
    job_narrow(e, j)
    return 0


cdef int zero_fill(Engine e, Job *j) except -1 nogil:
    """Write zeros to the blocks of the chunk that read as zeros and that this job does not write."""
    cdef uint64_t block = j.busy.chunk * e.blocks_per_chunk
    cdef uint64_t chunk_start = block
    cdef uint64_t chunk_end = min(block + e.blocks_per_chunk, e.blocks)
    cdef uint64_t run, step
    cdef Op *op
    while True:
        block = bits_find(e.bitmap, block, chunk_end, True)
        if block >= chunk_end:
            return 0
        run = bits_find(e.bitmap, block, chunk_end, False)
        if block >= j.first_block and block < j.end_block:
            block = j.end_block
            continue
        if block < j.first_block and run > j.first_block:
            run = j.first_block
        step = min(run - block, ZEROS_BYTES >> e.block_shift)
        op = op_issue(e, WHAT_JOB, OP_WRITE, TARGET_STORAGE,
                      e.data_offset + (<uint64_t>j.busy.slot << e.chunk_shift) + ((block - chunk_start) << e.block_shift),
                      step << e.block_shift, e.zeros, False)
        op.job = j
        j.pending += 1
        op_list(e, op, True)
        block += step


cdef int modify_begin(Engine e, Request *r, uint64_t chunk, uint32_t slot, uint64_t start, uint64_t end) except -1 nogil:
    """Present blocks, but not whole logical blocks of the device: serialized read-modify-write."""
    cdef uint64_t slot_offset = e.data_offset + (<uint64_t>slot << e.chunk_shift) - (chunk << e.chunk_shift)
    cdef uint8_t *buffer
    cdef uint64_t low, high
    cdef Busy *b
    cdef Job *j
    end = min(end, (start | (ZEROS_BYTES - 1)) + 1)
    low = start & ~e.align_mask
    high = (end + e.align_mask) & ~e.align_mask
    if e.bounce_used and e.bounce_used + (high - low) > e.bounce_limit:
        return wait_for(r, &e.wait_bounce)
    b = busy_get(e, chunk)
    b.slot = slot
    j = job_new(e, r, b, JOB_MODIFY, start >> e.block_shift, ((end - 1) >> e.block_shift) + 1)
    j.guest_start = start
    j.guest_end = end
    j.device_offset = slot_offset + low
    j.device_length = high - low
    j.bounce_bytes = high - low
    j.bounce = bounce_take(e, j.bounce_bytes)
    j.data = j.bounce
    j.phase = PHASE_DRAIN
    r.touched_device = 1
    r.cursor = end
    # R7: an earlier overwrite of a neighbouring sector part must not be undone by what is read here.
    if BUG(Bug.MODIFY_BESIDE_WRITES) or drain_begin(e, &e.drains, slot_offset + low, slot_offset + high, True, j, 0) == 0:
        job_continue(e, j)
    return 1


cdef int modify_read(Engine e, Job *j) except -1 nogil:
    """Read the device blocks that the guest covers only in part."""
    cdef uint64_t unit = e.align_mask + 1
    cdef uint64_t head = j.guest_start & e.align_mask
    cdef uint64_t tail = j.guest_end & e.align_mask
    cdef Op *op
    if head:
        op = op_issue(e, WHAT_JOB, OP_READ, TARGET_STORAGE, j.device_offset, unit, j.bounce, False)
        op.job = j
        j.pending += 1
        op_list(e, op, False)
    if tail and not (head and j.device_length == unit):
        op = op_issue(e, WHAT_JOB, OP_READ, TARGET_STORAGE, j.device_offset + j.device_length - unit, unit,
                      j.bounce + j.device_length - unit, False)
        op.job = j
        j.pending += 1
        op_list(e, op, False)
    return 0


cdef int job_write(Engine e, Job *j, bint durable) except -1 nogil:
    cdef Op *op = op_issue(e, WHAT_JOB, OP_WRITE, TARGET_STORAGE, j.device_offset, j.device_length, j.data, durable)
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
        slot_zeroed(e, j)
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
            if j.busy.exclusive:
                zero_fill(e, j)
            return 0
        head = j.guest_start & e.align_mask
        if r.buffer == NULL:
            memset(j.bounce + head, 0, j.guest_end - j.guest_start)
        else:
            memcpy(j.bounce + head, r.buffer + (j.guest_start - r.start), j.guest_end - j.guest_start)
        durable = False
        if r.flags & FLAG_FUA:
            if e.durable_writes and is_committed(e, j.busy.chunk, j.first_block, j.end_block):
                durable = True
            else:
                r.needs_commit = 1      # R29
        job_write(e, j, durable)
        return 0
    return job_finish(e, j)


cdef int allocate_map(Engine e, Job *j) except -1 nogil:
    """R1: the data are written; now the change becomes pending."""
    ensure(slot_of(e, j.busy.chunk) == (EMPTY if j.busy.reserved else j.busy.slot), "the slot of a chunk changed under a job")
    map_bits(e, j.first_block, j.end_block, True)
    if e.soft.entries and not BUG(Bug.ENTRY_SOFT_UNDER_A_WRITE):
        entry_harden(e, j.busy.chunk)       # R15: a copy may have mapped the slot since the word became hard
    if j.busy.reserved:
        map_slot(e, j.busy.chunk, j.busy.slot)
        j.busy.reserved = 0
        e.mapped_slots += 1
    return 0


cdef int job_finish(Engine e, Job *j) except -1 nogil:
    cdef Busy *b = j.busy
    cdef Request *r = j.request
    cdef Job **link = &b.jobs
    cdef RequestList waiters
    cdef Copy *copy = NULL
    cdef bint filled = False
    if j.kind != JOB_MODIFY and e.failed_errno and j.error == 0:
        j.error = -EIO      # R10: a mapping that can never be committed is not acknowledged
    if j.error == 0:
        if j.kind == JOB_ALLOCATE:
            if not BUG(Bug.CHANGE_BEFORE_ITS_DATA):
                allocate_map(e, j)
            if r.flags & FLAG_FUA:
                r.needs_commit = 1
        elif j.kind == JOB_PUNCH:
            punch_map(e, b.chunk, b.slot, j.first_block, j.end_block)
        elif j.kind != JOB_MODIFY:
            copy_map(e, j)
    elif r != NULL and r.error == 0:
        r.error = j.error
    # R18: a write that failed may have left anything in blocks that stay absent.
    if j.error and e.zeroed != NULL and not BUG(Bug.ZEROED_AFTER_A_FAILED_WRITE):
        bits_fill(e.zeroed, b.chunk, b.chunk + 1, False)
    e.reserved_bytes -= j.reserved_bytes
    while link[0] != j:
        link = &link[0].next
    link[0] = j.next
    if j.bounce != NULL:
        bounce_give(e, j.bounce, j.bounce_bytes)
    if j.kind != JOB_MODIFY and j.kind != JOB_SAVE:
        b.exclusive = 0
    if j.kind == JOB_SAVE or j.kind == JOB_FILL:
        copy = j.copy
        filled = j.kind == JOB_FILL and j.error == 0
        copy.pending -= 1
        if j.error:
            e.stat_dropped_bytes += (j.end_block - j.first_block) << e.block_shift
            e.plan_again |= copy.prefetch
    free(j)
    waiters = b.waiters
    b.waiters.head = NULL
    b.waiters.tail = NULL
    if b.jobs == NULL:
        if b.reserved:
            slot_give(e, b.slot)    # every operation on it has ended
        busy_free(e, b)
    list_walk(e, &waiters)
    if e.wait_bounce.head != NULL:
        list_walk(e, &e.wait_bounce)
    if e.wait_journal.head != NULL:
        list_walk(e, &e.wait_journal)
    if e.wait_slot.head != NULL and slots_at_hand(e):
        list_walk(e, &e.wait_slot)
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
    cdef uint64_t chunk = start >> e.chunk_shift
    cdef uint64_t end = min(r.end, (chunk + 1) << e.chunk_shift)
    cdef uint64_t block_bytes = <uint64_t>1 << e.block_shift
    cdef uint64_t first = start >> e.block_shift
    cdef uint64_t last = e.blocks if end == e.virtual_size else end >> e.block_shift
    cdef uint64_t chunk_first = chunk * e.blocks_per_chunk
    cdef uint64_t chunk_end = min(chunk_first + e.blocks_per_chunk, e.blocks)
    cdef bint whole_chunk
    if start & (block_bytes - 1) or first >= last:
        end = min(end, (start & ~(block_bytes - 1)) + block_bytes)
        if r.kind == REQUEST_TRIM or (not e.has_base and not r.flags & FLAG_NO_HOLE and not bit_get(e.bitmap, first)):
            r.cursor = end
            return 1
        return write_step(e, r, end)
    end = min(end, last << e.block_shift)
    whole_chunk = first == chunk_first and last == chunk_end
    if r.kind == REQUEST_TRIM:
        if e.has_base and (e.raw or not whole_chunk):
            r.cursor = end
            return 1
        return punch(e, r, chunk, first, last, end)
    if r.flags & FLAG_NO_HOLE or (e.has_base and (e.raw or (slot_of(e, chunk) != EMPTY and not whole_chunk))):
        return write_step(e, r, end)
    return punch(e, r, chunk, first, last, end)


cdef int punch(Engine e, Request *r, uint64_t chunk, uint64_t first, uint64_t last, uint64_t end) except -1 nogil:
    """Make whole blocks read as zeros by changing the maps only."""
    cdef uint32_t slot = slot_of(e, chunk)
    cdef uint64_t need, offset
    cdef Busy *b = busy_find(e, chunk)
    cdef Job *j
    if b != NULL:
        b.wanted = 1    # or a stream of writes to other blocks of the chunk could keep it waiting for ever
        return wait_for(r, &b.waiters)
    if e.has_base:
        if slot == EMPTY and bits_all(e.bitmap, first, last):
            r.cursor = end
            return 1
    elif bits_none(e.bitmap, first, last):
        r.cursor = end
        if e.busy_count == 0 and end < r.end:
            # Nothing is here, nor on its way: on to what is.
            first = bits_find(e.bitmap, last, ((r.end - 1) >> e.block_shift) + 1, True)
            r.cursor = max(end, min(r.end, first << e.block_shift))
        return 1
    if e.failed_errno:
        return give_up(r, -EIO)
    need = change_bytes(first, last)
    if r.punched == PUNCHED_MAX and changes(&e.open):
        # Enough for one turn, and for one commit: others come first.
        r.punched = 0
        list_push(&e.wait_journal, r)
        commit_maybe(e)
        return 0
    if not has_room(e, need):
        list_push(&e.wait_journal, r)
        commit_maybe(e)
        return 0
    b = busy_get(e, chunk)
    b.slot = slot
    b.exclusive = not BUG(Bug.TRIM_SHARES_ITS_CHUNK)   # a job that joined could map blocks of a slot that this one is about to free
    if e.zeroed != NULL and not BUG(Bug.ZEROED_AFTER_A_TRIM):
        bits_fill(e.zeroed, chunk, chunk + 1, False)    # R18: what becomes absent leaves its data in the slot
    r.punched = min(r.punched + 1, <uint32_t>PUNCHED_MAX)
    j = job_new(e, r, b, JOB_PUNCH, first, last)
    j.reserved_bytes = need
    e.reserved_bytes += need
    j.phase = PHASE_DRAIN
    r.cursor = end
    if slot != EMPTY and not BUG(Bug.TRIM_BESIDE_WRITES):
        # R7: a write in flight could land after a later write to the same block, and bring trimmed data back.
        offset = e.data_offset + (<uint64_t>slot << e.chunk_shift)
        if drain_begin(e, &e.drains, offset + ((first - chunk * e.blocks_per_chunk) << e.block_shift),
                       offset + ((last - chunk * e.blocks_per_chunk) << e.block_shift), True, j, 0):
            return 1
    job_continue(e, j)
    return 1


cdef int punch_map(Engine e, uint64_t chunk, uint32_t slot, uint64_t first, uint64_t last) except -1 nogil:
    cdef uint64_t chunk_first = chunk * e.blocks_per_chunk
    cdef uint64_t chunk_end = min(chunk_first + e.blocks_per_chunk, e.blocks)
    ensure(slot_of(e, chunk) == slot, "the slot of a chunk changed under a trim")
    map_bits(e, first, last, e.has_base)
    if e.raw or slot == EMPTY or (not e.has_base and not bits_none(e.bitmap, chunk_first, chunk_end)):
        return 0
    map_slot(e, chunk, EMPTY)
    e.mapped_slots -= 1
    # R5, R6: not free before the free is durable and nothing reads or writes the slot any more.
    if BUG(Bug.SLOT_FREED_BEFORE_COMMIT):
        return slot_give(e, slot)
    drain_begin(e, &e.retired, e.data_offset + (<uint64_t>slot << e.chunk_shift),
                e.data_offset + ((<uint64_t>slot + 1) << e.chunk_shift), False, NULL, slot)
    return 0


# --- waiting for operations in flight -----------------------------------------------------------------------------

cdef int drain_begin(Engine e, Drain **where, uint64_t first_byte, uint64_t end_byte, bint writes_only, Job *job,
                     uint32_t slot) except -1 nogil:
    """Count the storage operations now in flight in a range. Returns how many; a job's drain with none is not kept."""
    cdef Op *op = e.inflight
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
    d.number = e.op_number
    e.op_number += 1        # nothing joins an operation that was issued before
    d.remaining = 0 if job == NULL and BUG(Bug.SLOT_FREED_BESIDE_ITS_TRANSFERS) else count
    d.commit = e.commits + 1
    d.writes_only = writes_only
    d.job = job
    d.slot = slot
    d.next = where[0]
    where[0] = d
    return 1


cdef inline bint drain_counts(Drain *d, Op *op) noexcept nogil:
    return (op.number <= d.number and d.remaining > 0 and (op.is_write or not d.writes_only)
            and op.offset_bytes < d.end_byte and d.first_byte < op.offset_bytes + op.length_bytes)


cdef int drain_note(Engine e, Op *op) except -1 nogil:
    """A watched operation has ended."""
    cdef Drain **link = &e.drains
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
    d = e.retired
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
    cdef Drain **link = &e.retired
    cdef Drain *d
    cdef bint freed = False
    while link[0] != NULL:
        d = link[0]
        if d.remaining or d.commit > e.durable_commits:
            link = &d.next
            continue
        link[0] = d.next
        if e.discard:
            discard_later(e, d.slot)
        else:
            slot_give(e, d.slot)
        freed = True
        free(d)
    if not freed:
        return 0
    if e.wait_slot.head != NULL:
        list_walk(e, &e.wait_slot)      # first: they need no discard
    return discards_begin(e)
