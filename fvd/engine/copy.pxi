# SPDX-License-Identifier: Apache-2.0
# Copies from the base, and the changes that a crash may take back (docs/base.md). A copy reads whole blocks of the base into a buffer
# of its own, answers the guest reads that wait for them, and then saves what is still absent. It never waits for a lock, a slot or
# journal room.


# --- soft changes -------------------------------------------------------------------------------------------------

cdef inline bint soft_wanted(Engine e) noexcept nogil:
    """Whether the next commit takes the soft changes along."""
    if changes(&e.soft) == 0:
        return False
    return (e.soft_due or e.closing != NULL or e.wait_journal.head != NULL or 4 * delta_bytes(&e.soft) >= e.limit_bytes
            or log_is_full_of_soft(e))


cdef int soft_note(Engine e, uint32_t kind, uint64_t index, uint64_t value) except -1 nogil:
    """As delta_note, for a change that no flush has to commit. Part of a hard one if there is one."""
    cdef uint64_t key = change_key(kind, index)
    if delta_find(&e.open, key) != NULL:
        if not BUG(Bug.COPY_NOT_LOGGED):
            log_touch(e, key)       # R22: a copy, too, changes what is pending
        return 0
    if delta_find(&e.soft, key) != NULL:
        return 0
    if changes(&e.soft) == 0:
        e.soft_since_ns = e.now_ns
    return delta_insert(&e.soft, kind, index, value)


cdef int soft_harden(Engine e) except -1 nogil:
    """All of them: they are committed now."""
    cdef uint64_t i
    cdef Change *c
    if changes(&e.open) == 0:
        e.open_since_ns = e.now_ns
    for i in range(e.soft.mask + 1):
        c = &e.soft.cells[i]
        if c.key:
            if not BUG(Bug.HARDENED_NOT_LOGGED):
                log_touch(e, c.key)     # R22
            delta_insert(&e.open, <uint32_t>((c.key - 1) >> 56), (c.key - 1) & 0xFFFFFFFFFFFFFFULL, c.committed)
    delta_clear(&e.soft)
    if e.soft.mask > 4095:
        delta_resize(&e.soft, 64)
    e.soft_due = False
    return 0


cdef inline int entry_harden(Engine e, uint64_t chunk) except -1 nogil:
    if not e.raw and delta_find(&e.soft, change_key(KIND_TABLE, chunk)) != NULL:
        delta_note(e, KIND_TABLE, chunk, e.table[chunk])
    return 0


cdef int word_hardened(Engine e, uint64_t word) except -1 nogil:
    """R15: the bits of a chunk never reach the journal without its slot."""
    cdef uint64_t first = word << 6
    cdef uint64_t end = min(first + 64, e.blocks)
    cdef uint64_t chunk
    if e.raw or BUG(Bug.HARD_WORD_WITHOUT_ENTRIES):
        return 0
    for chunk in range(first / e.blocks_per_chunk, (end - 1) / e.blocks_per_chunk + 1):
        entry_harden(e, chunk)
    return 0


cdef int guest_hardens(Engine e, uint64_t chunk, uint64_t first, uint64_t last) except -1 nogil:
    """R14: the guest writes to these blocks. Were their mapping lost, the base would show again."""
    cdef uint64_t word, mask
    cdef Change *c
    if BUG(Bug.COPY_SOFT_UNDER_A_WRITE):
        return 0
    entry_harden(e, chunk)
    for word in range(first >> 6, ((last - 1) >> 6) + 1):
        c = delta_find(&e.soft, change_key(KIND_BITMAP, word))
        if c == NULL:
            if BUG(Bug.ONE_WORD_HARDENED):
                break
            continue
        mask = ~<uint64_t>0
        if word == first >> 6:
            mask &= ~<uint64_t>0 << (first & 63)
        if word == (last - 1) >> 6:
            mask &= ~<uint64_t>0 >> (63 - ((last - 1) & 63))
        if ~c.committed & mask:         # others of the word may stay soft
            delta_note(e, KIND_BITMAP, word, e.bitmap[word])
        if BUG(Bug.ONE_WORD_HARDENED):
            break
    return 0


cdef int base_covered(Engine e, uint64_t first, uint64_t end) except -1 nogil:
    """Blocks that are about to be present: the base is needed for so many less."""
    cdef uint64_t stop = min(end, e.base_blocks)
    if first >= stop:
        return 0
    e.base_absent -= (stop - first) - bits_count(e.bitmap, first, stop)
    if e.base_absent == 0:
        # The last of them is in the next commit, which takes everything along.
        e.soft_due = True
        e.release_after = e.commits + 1
        if BUG(Bug.BASE_RELEASED_BEFORE_COMMIT):
            base_release(e)
    return 0


cdef void base_release(Engine e) noexcept nogil:
    """R36: every block is here for good, and nothing that was asked of the base before is still to come: nobody will ask it again."""
    cdef bint durable = e.durable_commits >= e.release_after or BUG(Bug.BASE_RELEASED_BEFORE_COMMIT)
    if e.release_after and durable and e.base_inflight == 0 and e.retries == NULL:
        e.release_after = 0
        e.base_released = True
        e.want |= Want.BASE


# --- the base's answers -------------------------------------------------------------------------------------------

cdef int read_noted(Engine e, Request *r, uint64_t start, uint64_t end) except -1 nogil:
    """A guest needs this of the base: part of the profile. Once, though it waits for a copy in between."""
    cdef Run *grown
    start = max(start, r.noted_bytes)
    if start >= end:
        return 0
    r.noted_bytes = end
    if e.reads_count and e.reads[e.reads_count - 1].end == start:
        e.reads[e.reads_count - 1].end = end
        return 0
    if e.reads_count == READS_REMEMBERED:
        return 0
    if e.reads_count == e.reads_capacity:
        grown = <Run *>realloc(e.reads, max(256, 2 * e.reads_capacity) * sizeof(Run))
        if grown == NULL:
            out_of_memory()
        e.reads = grown
        e.reads_capacity = max(256, 2 * e.reads_capacity)
    e.reads[e.reads_count].first = start
    e.reads[e.reads_count].end = end
    e.reads_count += 1
    return 0


cdef bint base_tried(Engine e, Op *op, int32_t error) except -1 nogil:
    """A base read has ended. True: it failed, and is tried again later."""
    cdef uint64_t begun_ns
    cdef Retry *again
    if error == 0:
        if e.base_failing and e.retries == NULL:
            e.base_failing = False
            e.want |= Want.BASE
        return False
    if not e.base_failing:
        e.base_failing = True
        e.want |= Want.BASE
    if op.what == WHAT_COPY_READ:
        if op.copy.waiters.head == NULL:
            return False            # nobody asked for it
        begun_ns = op.copy.waiters.head.begun_ns      # the first to give up: the others ask again
    else:
        begun_ns = op.request.begun_ns if op.what == WHAT_PLAIN else op.job.request.begun_ns
    if e.closing != NULL or e.now_ns - begun_ns >= e.base_timeout_ns:
        return False
    again = <Retry *>calloc(1, sizeof(Retry))
    if again == NULL:
        out_of_memory()
    again.request = op.request
    again.job = op.job
    again.copy = op.copy
    again.buffer = op.buffer
    again.offset_bytes = op.offset_bytes
    again.length_bytes = op.length_bytes
    again.what = op.what
    if e.retries == NULL:
        e.retry_ns = e.now_ns
    again.next = e.retries
    e.retries = again
    return True


cdef int retries_run(Engine e) except -1 nogil:
    cdef Retry *again = e.retries
    cdef Retry *following
    cdef Op *op
    e.retries = NULL
    while again != NULL:
        op = op_issue(e, again.what, OP_READ, TARGET_BASE, again.offset_bytes, again.length_bytes, again.buffer, False)
        op.request = again.request
        op.job = again.job
        op.copy = again.copy
        following = again.next
        free(again)
        again = following
    return 0


cdef int base_cancel(Engine e, uint64_t mask, uint64_t value, int32_t error) except -1 nogil:
    """Requests that wait for the base, and for no operation that may still touch their buffer, end. Returns how many."""
    cdef RequestList doomed
    cdef Retry *again = e.retries
    cdef Retry *following
    cdef Copy *c
    cdef Request *r
    cdef uint32_t i
    cdef int count = 0
    doomed.head = doomed.tail = NULL
    if e.copy_count:
        for i in range(COPY_BUCKETS):
            c = e.copies[i]
            while c != NULL:
                count += list_part(&c.waiters, &doomed, mask, value)
                c = c.next
    e.retries = NULL
    while again != NULL:
        following = again.next
        r = again.request if again.what == WHAT_PLAIN else NULL if again.what == WHAT_COPY_READ else again.job.request
        if again.what == WHAT_COPY_READ and again.copy.waiters.head == NULL:
            copy_read(e, again.copy, error)     # nobody wants it any more
        elif r != NULL and (r.cookie & mask) == value:
            count += 1
            if again.what == WHAT_JOB:
                again.job.pending -= 1
                again.job.error = error
                if again.job.pending == 0:
                    job_continue(e, again.job)
            else:
                if r.error == 0:
                    r.error = error
                request_release(e, r)
        else:
            again.next = e.retries
            e.retries = again
            again = following
            continue
        free(again)
        again = following
    list_fail(e, &doomed, error)
    base_release(e)
    return count


cdef int list_part(RequestList *where, RequestList *doomed, uint64_t mask, uint64_t value) noexcept nogil:
    """Moves the requests whose (cookie & mask) == value from one list to the other. Returns how many."""
    cdef Request *r = list_take(where)
    cdef Request *following
    cdef int count = 0
    while r != NULL:
        following = r.next
        if (r.cookie & mask) == value:
            list_push(doomed, r)
            count += 1
        else:
            list_push(where, r)
        r = following
    return count


# --- a copy's life ------------------------------------------------------------------------------------------------

cdef inline Copy *copy_find(Engine e, uint64_t chunk, uint64_t block, uint64_t *limit) noexcept nogil:
    """The copy that holds a block; else NULL, and `limit` is lowered to where the next copy of the chunk begins."""
    cdef Copy *c = e.copies[chunk & (COPY_BUCKETS - 1)]
    cdef Copy *found = NULL
    while c != NULL:
        if c.first_block <= block < c.end_block:
            found = c
        elif block < c.first_block < limit[0]:
            limit[0] = c.first_block
        c = c.next
    return found


cdef inline bint slot_for_copy(Engine e, uint64_t chunk) noexcept nogil:
    """R33: whether a copy finds, or may take, a slot for its chunk. Some are the guest's, whether or not the storage can grow."""
    if slot_of(e, chunk) != EMPTY:
        return True
    # Where every chunk has its place nobody takes another's.
    if e.capacity >= e.chunks or BUG(Bug.COPIES_TAKE_THE_RESERVE) or BUG(Bug.RESERVE_FORGOTTEN_WHEN_FULL) and e.exhausted:
        return slots_at_hand(e) > 0
    return slots_at_hand(e) > e.reserve_slots


cdef inline void no_slot_for_copy(Engine e) noexcept nogil:
    """What was read has been read in vain: prefetching reads no more before something may have changed."""
    e.stat_no_slot += 1
    e.no_slot_until_ns = e.now_ns + RETRY_AFTER_NS


cdef Copy *copy_begin(Engine e, uint64_t chunk, uint64_t first, uint64_t end, bint prefetch) except NULL nogil:
    """Start reading absent blocks, of one chunk and in no other copy."""
    cdef Copy *c = <Copy *>calloc(1, sizeof(Copy))
    cdef uint64_t start = first << e.block_shift
    cdef uint64_t stop = min(end << e.block_shift, e.base_size)
    cdef Op *op
    if c == NULL:
        out_of_memory()
    c.first_block = first
    c.end_block = end
    c.buffer_bytes = (end - first) << e.block_shift
    c.buffer = <uint8_t *>aligned(c.buffer_bytes)
    if c.buffer == NULL:
        free(c)
        out_of_memory()
        return NULL
    memset(c.buffer + (stop - start), 0, c.buffer_bytes - (stop - start))
    c.begun_ns = e.now_ns
    c.prefetch = prefetch
    c.next = e.copies[chunk & (COPY_BUCKETS - 1)]
    e.copies[chunk & (COPY_BUCKETS - 1)] = c
    e.copy_count += 1
    if prefetch:
        e.prefetch_count += 1
        e.prefetch_reading += 1
        c.depth = e.prefetch_reading
    else:
        e.copy_bytes += c.buffer_bytes
    op = op_issue(e, WHAT_COPY_READ, OP_READ, TARGET_BASE, start, stop - start, c.buffer, False)
    op.copy = c
    return c


cdef int copy_end(Engine e, Copy *c) except -1 nogil:
    cdef Copy **link = &e.copies[(c.first_block / e.blocks_per_chunk) & (COPY_BUCKETS - 1)]
    ensure(c.waiters.head == NULL and c.pending == 0, "a copy ended under its users")
    while link[0] != c:
        link = &link[0].next
    link[0] = c.next
    e.copy_count -= 1
    if c.prefetch:
        e.prefetch_count -= 1
        if c.phase == COPY_SAVING and c.depth:
            e.prefetch_saving -= 1
    else:
        e.copy_bytes -= c.buffer_bytes
    free(c.buffer)
    free(c)
    return 0


cdef int copy_read(Engine e, Copy *c, int32_t error) except -1 nogil:
    """The base's blocks have come, or will not: first those who wait for them, then the saving."""
    cdef RequestList waiters = c.waiters
    cdef Request *r
    cdef Request *following
    c.waiters.head = NULL
    c.waiters.tail = NULL
    if c.prefetch:
        e.prefetch_reading -= 1
    if error:
        if c.prefetch:
            e.plan_again = True
        e.stat_dropped_bytes += c.buffer_bytes
        copy_end(e, c)
        r = waiters.head
        while r != NULL:
            following = r.next
            if e.closing != NULL or e.now_ns - r.begun_ns >= e.base_timeout_ns:
                request_fail(e, r, -EIO)
            else:
                walk(e, r)          # it joined later than the copy began, and has time left
            r = following
        return 0
    if c.prefetch:
        e.stat_prefetch_reads += 1
        e.stat_prefetch_read_bytes += c.buffer_bytes
        e.stat_base_latency_ns += e.now_ns - c.begun_ns
        e.stat_base_service_ns += (e.now_ns - c.begun_ns) / c.depth
    c.phase = COPY_SAVING
    c.depth = 0
    list_walk(e, &waiters)
    return copy_save(e, c)


cdef int read_through_copy(Engine e, Request *r, uint64_t chunk, uint32_t slot, uint64_t start, uint64_t *end) except -1 nogil:
    """An absent piece of a read: from a copy that has it, or by a new one. 0: it waits; 1: done; 2: read [start, end) without."""
    cdef uint64_t first = start >> e.block_shift
    cdef uint64_t limit = ((end[0] - 1) >> e.block_shift) + 1
    cdef uint64_t stop
    cdef Copy *c
    limit = min(limit, e.base_blocks)
    c = copy_find(e, chunk, first, &limit) if e.copy_count else NULL
    if c == NULL:
        stop = min(end[0], limit << e.block_shift)
        limit = min(limit, first + e.copy_most_blocks)
        if (not e.copy_on_read or e.read_only or e.closing != NULL or e.failed_errno or not slot_for_copy(e, chunk)
                or (e.copy_bytes and e.copy_bytes + ((limit - first) << e.block_shift) > e.copy_limit)):
            end[0] = stop           # what follows may be in a copy
            return 2
        read_noted(e, r, start, min(end[0], limit << e.block_shift))
        c = copy_begin(e, chunk, first, limit, False)
        list_push(&c.waiters, r)
        return 0
    stop = min(end[0], c.end_block << e.block_shift)
    read_noted(e, r, start, stop)
    if c.phase == COPY_READING:
        list_push(&c.waiters, r)
        return 0
    memcpy(r.buffer + (start - r.start), c.buffer + (start - (c.first_block << e.block_shift)), stop - start)
    r.touched_device = 1
    r.cursor = stop
    return 1


# --- saving -------------------------------------------------------------------------------------------------------

cdef inline bint all_zeros(Engine e, const uint8_t *data, uint64_t length_bytes) noexcept nogil:
    cdef uint64_t step
    while length_bytes:
        step = min(length_bytes, <uint64_t>4096)
        if memcmp(data, e.zeros, step):
            return False
        data += step
        length_bytes -= step
    return True


cdef uint64_t unlocked_until(Busy *b, uint64_t first, uint64_t end, uint64_t *skip) noexcept nogil:
    """Where the first lock in [first, end) begins, or `end`. If `first` itself is locked: `first`, and `skip` is where that lock ends."""
    cdef Job *j = b.jobs if b != NULL else NULL
    skip[0] = first
    while j != NULL:
        if j.first_block <= first < j.end_block:
            skip[0] = j.end_block
            return first
        if first < j.first_block < end:
            end = j.first_block
        j = j.next
    return end


cdef int copy_save(Engine e, Copy *c) except -1 nogil:
    """R17: whatever has become present meanwhile, or is being written, is newer than what was read. Ends the copy if nothing is left."""
    cdef uint64_t chunk = c.first_block / e.blocks_per_chunk
    cdef uint64_t at = c.first_block
    cdef uint64_t end, skip
    cdef int saved
    if c.prefetch and c.depth == 0:
        e.prefetch_saving += 1
        c.depth = e.prefetch_saving
        c.begun_ns = e.now_ns
    while at < c.end_block:
        end = c.end_block
        if not BUG(Bug.COPY_OVER_NEWER_DATA):
            at = bits_find(e.bitmap, at, c.end_block, False)
            if at == c.end_block:
                break
            end = unlocked_until(busy_find(e, chunk), at, bits_find(e.bitmap, at, c.end_block, True), &skip)
            if end == at:
                at = skip
                continue
        saved = copy_save_run(e, c, chunk, at, end)
        if saved == 0:
            e.stat_dropped_bytes += (end - at) << e.block_shift
            if c.prefetch:
                e.plan_again = True
        elif saved == 2:
            return 0                # its chunk gets a slot first
        at = end
    if c.pending == 0:
        return copy_end(e, c)
    return 0


cdef int copy_save_run(Engine e, Copy *c, uint64_t chunk, uint64_t first, uint64_t end) except -1 nogil:
    """0: given up; 1: under way, or done; 2: a fill is under way, after which the whole copy looks again."""
    cdef uint64_t chunk_first = chunk * e.blocks_per_chunk
    cdef uint64_t chunk_end = min(chunk_first + e.blocks_per_chunk, e.blocks)
    cdef uint8_t *data = c.buffer + ((first - c.first_block) << e.block_shift)
    cdef uint64_t length_bytes = (end - first) << e.block_shift
    cdef uint64_t need = change_bytes(first, end)
    cdef uint32_t slot = slot_of(e, chunk)
    cdef Busy *b = busy_find(e, chunk)
    cdef Job *j
    if e.closing != NULL or e.failed_errno or not has_room(e, need):
        return 0
    if b != NULL and (b.exclusive or b.wanted):
        return 0
    if slot == EMPTY and b == NULL and all_zeros(e, data, length_bytes):
        # Not with a job in the chunk: it may map a slot that has no zeros there.
        soft_bits(e, first, end)
        e.stat_zero_bytes += length_bytes
        commit_maybe(e)
        return 1
    if slot == EMPTY and b == NULL:
        if not slot_for_copy(e, chunk):
            if e.capacity < e.chunks:
                e.want |= Want.GROWTH
            no_slot_for_copy(e)
            return 0
        slot = slot_take(e, chunk)
        if slot == EMPTY:
            no_slot_for_copy(e)
            return 0
        b = busy_get(e, chunk)
        b.slot = slot
        b.reserved = 1
        if not bits_none(e.bitmap, chunk_first, chunk_end) and not BUG(Bug.COPY_INTO_A_DIRTY_SLOT):
            # R8. A job of its own: a guest's write to this chunk needs it as well, and need not wait for more.
            b.exclusive = 1
            j = save_job(e, c, b, JOB_FILL, chunk_first, chunk_first, need)
            zero_fill(e, j)
            return 2
    elif b == NULL:
        b = busy_get(e, chunk)
        b.slot = slot
    j = save_job(e, c, b, JOB_SAVE, first, end, need)
    j.data = data
    j.device_offset = e.data_offset + (<uint64_t>b.slot << e.chunk_shift) + ((first - chunk_first) << e.block_shift)
    j.device_length = length_bytes
    job_write(e, j, False)
    if BUG(Bug.COPY_BEFORE_ITS_DATA):
        copy_map(e, j)
    return 1


cdef Job *save_job(Engine e, Copy *c, Busy *b, uint8_t kind, uint64_t first, uint64_t end, uint64_t need) except NULL nogil:
    cdef Job *j = job_new(e, NULL, b, kind, first, end)
    j.copy = c
    c.pending += 1
    j.reserved_bytes = need
    e.reserved_bytes += need
    j.phase = PHASE_WRITE
    return j


cdef int soft_bits(Engine e, uint64_t first, uint64_t end) except -1 nogil:
    cdef uint64_t word
    base_covered(e, first, end)
    for word in range(first >> 6, ((end - 1) >> 6) + 1):
        soft_note(e, KIND_BITMAP, word, e.bitmap[word])
    bits_fill(e.bitmap, first, end, True)
    return 0


cdef int copy_map(Engine e, Job *j) except -1 nogil:
    """R1: the copy is in its slot; now it shows. The change is soft, unless it shares a word with a hard one (R15)."""
    cdef uint64_t chunk = j.busy.chunk
    cdef uint64_t word
    cdef uint64_t length_bytes = (j.end_block - j.first_block) << e.block_shift
    ensure(slot_of(e, chunk) == (EMPTY if j.busy.reserved else j.busy.slot), "the slot of a chunk changed under a copy")
    if j.busy.reserved:
        soft_note(e, KIND_TABLE, chunk, e.table[chunk])
        e.table[chunk] = j.busy.slot
        j.busy.reserved = 0
        e.mapped_slots += 1
    if j.kind == JOB_FILL:
        return 0
    ensure(bits_none(e.bitmap, j.first_block, j.end_block) or BUG(Bug.COPY_OVER_NEWER_DATA) or BUG(Bug.COPY_BEFORE_ITS_DATA),
           "a copy would cover what is newer")
    soft_bits(e, j.first_block, j.end_block)
    for word in range(j.first_block >> 6, ((j.end_block - 1) >> 6) + 1):
        if delta_find(&e.open, change_key(KIND_BITMAP, word)) != NULL and not BUG(Bug.HARD_WORD_WITHOUT_ENTRIES):
            entry_harden(e, chunk)
    e.stat_copied_bytes += length_bytes
    if j.copy.prefetch:
        e.stat_prefetched_bytes += length_bytes
        e.stat_copy_writes += 1
        e.stat_copy_write_bytes += length_bytes
        e.stat_copy_latency_ns += e.now_ns - j.copy.begun_ns
        e.stat_copy_service_ns += (e.now_ns - j.copy.begun_ns) / j.copy.depth
    return 0
