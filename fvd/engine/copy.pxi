# SPDX-License-Identifier: Apache-2.0
# Copies from the base, and the changes that a crash may take back (docs/base.md). A copy reads whole blocks of the base into a buffer
# of its own, answers the guest reads that wait for them, and then saves what is still absent. It never waits for a lock, a slot or
# journal space.
#
# Offers: base_release, cancel_base_waiters, copy_begin, copy_end, copy_find, copy_map, copy_save, handle_base_result, handle_copy_read,
#   lazy_commit_wanted, lower_base_absent, promote_all, promote_entries_of, promote_entry, promote_for_write, read_through_copy,
#   record_base_read, retry_base_reads, split_by_cookie
# Needs: changes: change_count, change_find, change_index, change_insert, change_key, change_kind, change_set_bytes, change_set_clear,
#   change_set_resize, note_change, slot_of; commit: commit_maybe; log: log_is_full_of_lazy, log_touch; memory: active_find, active_get,
#   ensure, list_push, list_take, op_issue, out_of_memory; request: advance, fail_waiters, request_fail, request_release, retry_waiters;
#   slots: slot_offset, slot_take, slots_at_hand; write: change_bytes, has_journal_space, job_continue, job_new, job_write, zero_fill


# --- lazy changes -------------------------------------------------------------------------------------------------

cdef inline bint lazy_commit_wanted(Engine e) noexcept nogil:
    """Whether the next commit takes the lazy changes along."""
    if change_count(&e.changes.lazy) == 0:
        return False
    return (e.changes.lazy_due or e.close.request != NULL or e.waiting.journal.head != NULL
            or 4 * change_set_bytes(&e.changes.lazy) >= e.changes.limit_bytes or log_is_full_of_lazy(e))


cdef int note_lazy_change(Engine e, uint32_t kind, uint64_t index, uint64_t value) except -1 nogil:
    """As note_change, for a change that no flush has to commit. Part of a running one if there is one."""
    cdef uint64_t key = change_key(kind, index)
    if change_find(&e.changes.running, key) != NULL:
        if not BUG(Bug.COPY_NOT_LOGGED):
            log_touch(e, key)       # R22: a copy, too, changes what is pending
        return 0
    if change_find(&e.changes.lazy, key) != NULL:
        return 0
    if change_count(&e.changes.lazy) == 0:
        e.changes.lazy_since_ns = e.now_ns
    return change_insert(&e.changes.lazy, kind, index, value)


cdef int promote_all(Engine e) except -1 nogil:
    """All of them: they are committed now."""
    cdef uint64_t i
    cdef Change *c
    if change_count(&e.changes.running) == 0:
        e.changes.running_since_ns = e.now_ns
    for i in range(e.changes.lazy.mask + 1):
        c = &e.changes.lazy.cells[i]
        if c.key:
            if not BUG(Bug.PROMOTED_NOT_LOGGED):
                log_touch(e, c.key)     # R22
            change_insert(&e.changes.running, change_kind(c), change_index(c), c.committed)
    change_set_clear(&e.changes.lazy)
    if e.changes.lazy.mask > 4095:
        change_set_resize(&e.changes.lazy, 64)
    e.changes.lazy_due = False
    return 0


cdef inline int promote_entry(Engine e, uint64_t chunk) except -1 nogil:
    if not e.disk.raw and change_find(&e.changes.lazy, change_key(KIND_TABLE, chunk)) != NULL:
        note_change(e, KIND_TABLE, chunk, e.maps.table[chunk])
    return 0


cdef int promote_entries_of(Engine e, uint64_t word) except -1 nogil:
    """R15: the bits of a chunk never reach the journal without its slot."""
    cdef uint64_t first = word << 6
    cdef uint64_t end = min(first + 64, e.disk.blocks)
    cdef uint64_t chunk
    if e.disk.raw or BUG(Bug.PROMOTED_WORD_WITHOUT_ENTRIES):
        return 0
    for chunk in range(first / e.disk.blocks_per_chunk, (end - 1) / e.disk.blocks_per_chunk + 1):
        promote_entry(e, chunk)
    return 0


cdef int promote_for_write(Engine e, uint64_t chunk, uint64_t first, uint64_t last) except -1 nogil:
    """R14: the guest writes to these blocks. Were their mapping lost, the base would show again."""
    cdef uint64_t word, mask
    cdef Change *c
    if BUG(Bug.COPY_LAZY_UNDER_A_WRITE):
        return 0
    promote_entry(e, chunk)
    for word in range(first >> 6, ((last - 1) >> 6) + 1):
        c = change_find(&e.changes.lazy, change_key(KIND_BITMAP, word))
        if c == NULL:
            if BUG(Bug.ONE_WORD_PROMOTED):
                break
            continue
        mask = ~<uint64_t>0
        if word == first >> 6:
            mask &= ~<uint64_t>0 << (first & 63)
        if word == (last - 1) >> 6:
            mask &= ~<uint64_t>0 >> (63 - ((last - 1) & 63))
        if ~c.committed & mask:         # others of the word may stay lazy
            note_change(e, KIND_BITMAP, word, e.maps.bitmap[word])
        if BUG(Bug.ONE_WORD_PROMOTED):
            break
    return 0


cdef int lower_base_absent(Engine e, uint64_t first, uint64_t end) except -1 nogil:
    """Blocks that are about to be present: the base is needed for so many less."""
    cdef uint64_t stop = min(end, e.base.blocks)
    if first >= stop:
        return 0
    e.base.absent -= (stop - first) - bits_count(e.maps.bitmap, first, stop)
    if e.base.absent == 0:
        # The last of them is in the next commit, which takes everything along.
        e.changes.lazy_due = True
        e.base.release_after = e.commit.begun + 1
        if BUG(Bug.BASE_RELEASED_BEFORE_COMMIT):
            base_release(e)
    return 0


cdef void base_release(Engine e) noexcept nogil:
    """R36: every block is here for good, and nothing that was asked of the base before is still to come: nobody will ask it again."""
    cdef bint durable = e.commit.durable >= e.base.release_after or BUG(Bug.BASE_RELEASED_BEFORE_COMMIT)
    if e.base.release_after and durable and e.base.inflight == 0 and e.base.retries == NULL:
        e.base.release_after = 0
        e.base.released = True
        e.want |= Want.BASE


# --- the base's answers -------------------------------------------------------------------------------------------

cdef int record_base_read(Engine e, Request *r, uint64_t start, uint64_t end) except -1 nogil:
    """A guest needs this of the base: part of the profile. Once, though it waits for a copy in between."""
    cdef Run *grown
    start = max(start, r.noted_bytes)
    if start >= end:
        return 0
    r.noted_bytes = end
    if e.profile.count and e.profile.runs[e.profile.count - 1].end == start:
        e.profile.runs[e.profile.count - 1].end = end
        return 0
    if e.profile.count == READS_REMEMBERED:
        return 0
    if e.profile.count == e.profile.capacity:
        grown = <Run *>realloc(e.profile.runs, max(256, 2 * e.profile.capacity) * sizeof(Run))
        if grown == NULL:
            out_of_memory()
        e.profile.runs = grown
        e.profile.capacity = max(256, 2 * e.profile.capacity)
    e.profile.runs[e.profile.count].first = start
    e.profile.runs[e.profile.count].end = end
    e.profile.count += 1
    return 0


cdef bint handle_base_result(Engine e, Op *op, int32_t error) except -1 nogil:
    """A base read has ended. True: it failed, and is tried again later."""
    cdef uint64_t begun_ns
    cdef Retry *again
    if error == 0:
        if e.base.failing and e.base.retries == NULL:
            e.base.failing = False
            e.want |= Want.BASE
        return False
    if not e.base.failing:
        e.base.failing = True
        e.want |= Want.BASE
    if op.purpose == PURPOSE_COPY_READ:
        if op.copy.waiters.head == NULL:
            return False            # nobody asked for it
        begun_ns = op.copy.waiters.head.begun_ns      # the first to give up: the others ask again
    else:
        begun_ns = op.request.begun_ns if op.purpose == PURPOSE_PLAIN else op.job.request.begun_ns
    if e.close.request != NULL or e.now_ns - begun_ns >= e.base.timeout_ns:
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
    again.purpose = op.purpose
    if e.base.retries == NULL:
        e.base.retry_ns = e.now_ns
    again.next = e.base.retries
    e.base.retries = again
    return True


cdef int retry_base_reads(Engine e) except -1 nogil:
    cdef Retry *again = e.base.retries
    cdef Retry *following
    cdef Op *op
    e.base.retries = NULL
    while again != NULL:
        op = op_issue(e, again.purpose, OP_READ, TARGET_BASE, again.offset_bytes, again.length_bytes, again.buffer, False)
        op.request = again.request
        op.job = again.job
        op.copy = again.copy
        following = again.next
        free(again)
        again = following
    return 0


cdef int cancel_base_waiters(Engine e, uint64_t mask, uint64_t value, int32_t error) except -1 nogil:
    """Requests that wait for the base, and for no operation that may still touch their buffer, end. Returns how many."""
    cdef RequestList cancelled
    cdef Retry *again = e.base.retries
    cdef Retry *following
    cdef Copy *c
    cdef Request *r
    cdef uint32_t i
    cdef int count = 0
    cancelled.head = cancelled.tail = NULL
    if e.copies.count:
        for i in range(COPY_BUCKETS):
            c = e.copies.buckets[i]
            while c != NULL:
                count += split_by_cookie(&c.waiters, &cancelled, mask, value)
                c = c.next
    e.base.retries = NULL
    while again != NULL:
        following = again.next
        r = again.request if again.purpose == PURPOSE_PLAIN else NULL if again.purpose == PURPOSE_COPY_READ else again.job.request
        if again.purpose == PURPOSE_COPY_READ and again.copy.waiters.head == NULL:
            handle_copy_read(e, again.copy, error)     # nobody wants it any more
        elif r != NULL and (r.cookie & mask) == value:
            count += 1
            if again.purpose == PURPOSE_JOB:
                again.job.pending -= 1
                again.job.error = error
                if again.job.pending == 0:
                    job_continue(e, again.job)
            else:
                if r.error == 0:
                    r.error = error
                request_release(e, r)
        else:
            again.next = e.base.retries
            e.base.retries = again
            again = following
            continue
        free(again)
        again = following
    fail_waiters(e, &cancelled, error)
    base_release(e)
    return count


cdef int split_by_cookie(RequestList *where, RequestList *cancelled, uint64_t mask, uint64_t value) noexcept nogil:
    """Moves the requests whose (cookie & mask) == value from one list to the other. Returns how many."""
    cdef Request *r = list_take(where)
    cdef Request *following
    cdef int count = 0
    while r != NULL:
        following = r.next
        if (r.cookie & mask) == value:
            list_push(cancelled, r)
            count += 1
        else:
            list_push(where, r)
        r = following
    return count


# --- a copy's life ------------------------------------------------------------------------------------------------

cdef inline Copy *copy_find(Engine e, uint64_t chunk, uint64_t block, uint64_t *limit) noexcept nogil:
    """The copy that holds a block; else NULL, and `limit` is lowered to where the next copy of the chunk begins."""
    cdef Copy *c = e.copies.buckets[chunk & (COPY_BUCKETS - 1)]
    cdef Copy *copy = NULL
    while c != NULL:
        if c.first_block <= block < c.end_block:
            copy = c
        elif block < c.first_block < limit[0]:
            limit[0] = c.first_block
        c = c.next
    return copy


cdef inline bint slot_for_copy(Engine e, uint64_t chunk) noexcept nogil:
    """R33: whether a copy finds, or may take, a slot for its chunk. Some are the guest's, whether or not the storage can grow."""
    if slot_of(e, chunk) != EMPTY:
        return True
    # Where every chunk has its place nobody takes another's.
    if e.slots.capacity >= e.disk.chunks or BUG(Bug.COPIES_TAKE_THE_RESERVE) or BUG(Bug.RESERVE_FORGOTTEN_WHEN_FULL) and e.slots.exhausted:
        return slots_at_hand(e) > 0
    return slots_at_hand(e) > e.slots.reserve


cdef inline void no_slot_for_copy(Engine e) noexcept nogil:
    """What was read has been read in vain: prefetching reads no more before something may have changed."""
    e.count.no_slot_copies += 1
    e.prefetch.no_slot_until_ns = e.now_ns + RETRY_AFTER_NS


cdef Copy *copy_begin(Engine e, uint64_t chunk, uint64_t first, uint64_t end, bint prefetch) except NULL nogil:
    """Start reading absent blocks, of one chunk and in no other copy."""
    cdef Copy *c = <Copy *>calloc(1, sizeof(Copy))
    cdef uint64_t start = first << e.disk.block_shift
    cdef uint64_t stop = min(end << e.disk.block_shift, e.disk.base_size)
    cdef Op *op
    if c == NULL:
        out_of_memory()
    c.first_block = first
    c.end_block = end
    c.buffer_bytes = (end - first) << e.disk.block_shift
    c.buffer = <uint8_t *>aligned(c.buffer_bytes)
    if c.buffer == NULL:
        free(c)
        out_of_memory()
        return NULL             # it has raised; without this gcc sees a use after free
    memset(c.buffer + (stop - start), 0, c.buffer_bytes - (stop - start))
    c.begun_ns = e.now_ns
    c.prefetch = prefetch
    c.next = e.copies.buckets[chunk & (COPY_BUCKETS - 1)]
    e.copies.buckets[chunk & (COPY_BUCKETS - 1)] = c
    e.copies.count += 1
    if prefetch:
        e.prefetch.count += 1
        e.prefetch.reading += 1
        c.depth = e.prefetch.reading
    else:
        e.copies.bytes += c.buffer_bytes
    op = op_issue(e, PURPOSE_COPY_READ, OP_READ, TARGET_BASE, start, stop - start, c.buffer, False)
    op.copy = c
    return c


cdef int copy_end(Engine e, Copy *c) except -1 nogil:
    cdef Copy **link = &e.copies.buckets[(c.first_block / e.disk.blocks_per_chunk) & (COPY_BUCKETS - 1)]
    ensure(c.waiters.head == NULL and c.pending == 0, "a copy ended under its users")
    while link[0] != c:
        link = &link[0].next
    link[0] = c.next
    e.copies.count -= 1
    if c.prefetch:
        e.prefetch.count -= 1
        if c.phase == COPY_SAVING and c.depth:
            e.prefetch.saving -= 1
    else:
        e.copies.bytes -= c.buffer_bytes
    free(c.buffer)
    free(c)
    return 0


cdef int handle_copy_read(Engine e, Copy *c, int32_t error) except -1 nogil:
    """The base's blocks have come, or will not: first those who wait for them, then the saving."""
    cdef RequestList waiters = c.waiters
    cdef Request *r
    cdef Request *following
    c.waiters.head = NULL
    c.waiters.tail = NULL
    if c.prefetch:
        e.prefetch.reading -= 1
    if error:
        if c.prefetch:
            e.prefetch.plan_again = True
        e.count.dropped_bytes += c.buffer_bytes
        copy_end(e, c)
        r = waiters.head
        while r != NULL:
            following = r.next
            if e.close.request != NULL or e.now_ns - r.begun_ns >= e.base.timeout_ns:
                request_fail(e, r, -EIO)
            else:
                advance(e, r)          # it joined later than the copy began, and has time left
            r = following
        return 0
    if c.prefetch:
        e.count.prefetch_reads += 1
        e.count.prefetch_read_bytes += c.buffer_bytes
        e.count.base_latency_ns += e.now_ns - c.begun_ns
        e.count.base_service_ns += (e.now_ns - c.begun_ns) / c.depth
    c.phase = COPY_SAVING
    c.depth = 0
    retry_waiters(e, &waiters)
    return copy_save(e, c)


cdef int read_through_copy(Engine e, Request *r, uint64_t chunk, uint32_t slot, uint64_t start, uint64_t *end) except -1 nogil:
    """An absent piece of a read: from a copy that has it, or by a new one. STEP_DIRECT: read [start, end) without."""
    cdef uint64_t first = start >> e.disk.block_shift
    cdef uint64_t limit = ((end[0] - 1) >> e.disk.block_shift) + 1
    cdef uint64_t stop
    cdef Copy *c
    limit = min(limit, e.base.blocks)
    c = copy_find(e, chunk, first, &limit) if e.copies.count else NULL
    if c == NULL:
        stop = min(end[0], limit << e.disk.block_shift)
        limit = min(limit, first + e.copies.blocks_max)
        if (not e.copies.on_read or e.mode.read_only or e.close.request != NULL or e.failure.error_number or not slot_for_copy(e, chunk)
                or (e.copies.bytes and e.copies.bytes + ((limit - first) << e.disk.block_shift) > e.copies.bytes_max)):
            end[0] = stop           # what follows may be in a copy
            return STEP_DIRECT
        record_base_read(e, r, start, min(end[0], limit << e.disk.block_shift))
        c = copy_begin(e, chunk, first, limit, False)
        list_push(&c.waiters, r)
        return STEP_WAITS
    stop = min(end[0], c.end_block << e.disk.block_shift)
    record_base_read(e, r, start, stop)
    if c.phase == COPY_READING:
        list_push(&c.waiters, r)
        return STEP_WAITS
    memcpy(r.buffer + (start - r.start), c.buffer + (start - (c.first_block << e.disk.block_shift)), stop - start)
    r.touched_device = 1
    r.cursor = stop
    return STEP_DONE


# --- saving -------------------------------------------------------------------------------------------------------

cdef inline bint all_zeros(Engine e, const uint8_t *data, uint64_t length_bytes) noexcept nogil:
    cdef uint64_t step
    while length_bytes:
        step = min(length_bytes, <uint64_t>4096)
        if memcmp(data, e.pools.zeros, step):
            return False
        data += step
        length_bytes -= step
    return True


cdef uint64_t unlocked_until(ActiveChunk *active, uint64_t first, uint64_t end, uint64_t *skip) noexcept nogil:
    """Where the first lock in [first, end) begins, or `end`. If `first` itself is locked: `first`, and `skip` is where that lock ends."""
    cdef Job *j = active.jobs if active != NULL else NULL
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
    cdef uint64_t chunk = c.first_block / e.disk.blocks_per_chunk
    cdef uint64_t at = c.first_block
    cdef uint64_t end, skip
    cdef int saved
    if c.prefetch and c.depth == 0:
        e.prefetch.saving += 1
        c.depth = e.prefetch.saving
        c.begun_ns = e.now_ns
    while at < c.end_block:
        end = c.end_block
        if not BUG(Bug.COPY_OVER_NEWER_DATA):
            at = bits_find(e.maps.bitmap, at, c.end_block, False)
            if at == c.end_block:
                break
            end = unlocked_until(active_find(e, chunk), at, bits_find(e.maps.bitmap, at, c.end_block, True), &skip)
            if end == at:
                at = skip
                continue
        saved = copy_save_run(e, c, chunk, at, end)
        if saved == SAVE_DROPPED:
            e.count.dropped_bytes += (end - at) << e.disk.block_shift
            if c.prefetch:
                e.prefetch.plan_again = True
        elif saved == SAVE_WAITS_FOR_FILL:
            return 0
        at = end
    if c.pending == 0:
        return copy_end(e, c)
    return 0


cdef enum Saved:
    SAVE_DROPPED
    SAVE_BEGUN                  # or done
    SAVE_WAITS_FOR_FILL         # its chunk gets a slot first; after that the whole copy looks again


cdef int copy_save_run(Engine e, Copy *c, uint64_t chunk, uint64_t first, uint64_t end) except -1 nogil:
    cdef uint64_t chunk_first = chunk * e.disk.blocks_per_chunk
    cdef uint64_t chunk_end = min(chunk_first + e.disk.blocks_per_chunk, e.disk.blocks)
    cdef uint8_t *data = c.buffer + ((first - c.first_block) << e.disk.block_shift)
    cdef uint64_t length_bytes = (end - first) << e.disk.block_shift
    cdef uint64_t need = change_bytes(first, end)
    cdef uint32_t slot = slot_of(e, chunk)
    cdef ActiveChunk *active = active_find(e, chunk)
    cdef Job *j
    if e.close.request != NULL or e.failure.error_number or not has_journal_space(e, need):
        return SAVE_DROPPED
    if active != NULL and (active.exclusive or active.wanted):
        return SAVE_DROPPED
    if slot == EMPTY and active == NULL and all_zeros(e, data, length_bytes):
        # Not with a job in the chunk: it may map a slot that has no zeros there.
        map_bits_lazily(e, first, end)
        e.count.zero_bytes += length_bytes
        commit_maybe(e)
        return SAVE_BEGUN
    if slot == EMPTY and active == NULL:
        if not slot_for_copy(e, chunk):
            if e.slots.capacity < e.disk.chunks:
                e.want |= Want.GROWTH
            no_slot_for_copy(e)
            return SAVE_DROPPED
        slot = slot_take(e, chunk)
        if slot == EMPTY:
            no_slot_for_copy(e)
            return SAVE_DROPPED
        active = active_get(e, chunk)
        active.slot = slot
        active.reserved = 1
        if not bits_none(e.maps.bitmap, chunk_first, chunk_end) and not BUG(Bug.COPY_INTO_A_DIRTY_SLOT):
            # R8. A job of its own: a guest's write to this chunk needs it as well, and need not wait for more.
            active.exclusive = 1
            j = save_job(e, c, active, JOB_FILL, chunk_first, chunk_first, need)
            zero_fill(e, j)
            return SAVE_WAITS_FOR_FILL
    elif active == NULL:
        active = active_get(e, chunk)
        active.slot = slot
    j = save_job(e, c, active, JOB_SAVE, first, end, need)
    j.data = data
    j.device_offset = slot_offset(e, active.slot) + ((first - chunk_first) << e.disk.block_shift)
    j.device_length = length_bytes
    job_write(e, j, False)
    if BUG(Bug.COPY_BEFORE_ITS_DATA):
        copy_map(e, j)
    return SAVE_BEGUN


cdef Job *save_job(Engine e, Copy *c, ActiveChunk *active, uint8_t kind, uint64_t first, uint64_t end, uint64_t need) except NULL nogil:
    cdef Job *j = job_new(e, NULL, active, kind, first, end)
    j.copy = c
    c.pending += 1
    j.reserved_bytes = need
    e.changes.reserved_bytes += need
    j.phase = PHASE_WRITE
    return j


cdef int map_bits_lazily(Engine e, uint64_t first, uint64_t end) except -1 nogil:
    cdef uint64_t word
    lower_base_absent(e, first, end)
    for word in range(first >> 6, ((end - 1) >> 6) + 1):
        note_lazy_change(e, KIND_BITMAP, word, e.maps.bitmap[word])
    bits_fill(e.maps.bitmap, first, end, True)
    return 0


cdef int copy_map(Engine e, Job *j) except -1 nogil:
    """R1: the copy is in its slot; now it shows. The change is lazy, unless it shares a word with a running one (R15)."""
    cdef uint64_t chunk = j.active.chunk
    cdef uint64_t word
    cdef uint64_t length_bytes = (j.end_block - j.first_block) << e.disk.block_shift
    ensure(slot_of(e, chunk) == (EMPTY if j.active.reserved else j.active.slot), "the slot of a chunk changed under a copy")
    if j.active.reserved:
        note_lazy_change(e, KIND_TABLE, chunk, e.maps.table[chunk])
        e.maps.table[chunk] = j.active.slot
        j.active.reserved = 0
        e.slots.mapped += 1
    if j.kind == JOB_FILL:
        return 0
    ensure(bits_none(e.maps.bitmap, j.first_block, j.end_block) or BUG(Bug.COPY_OVER_NEWER_DATA) or BUG(Bug.COPY_BEFORE_ITS_DATA),
           "a copy would cover what is newer")
    map_bits_lazily(e, j.first_block, j.end_block)
    for word in range(j.first_block >> 6, ((j.end_block - 1) >> 6) + 1):
        if change_find(&e.changes.running, change_key(KIND_BITMAP, word)) != NULL and not BUG(Bug.PROMOTED_WORD_WITHOUT_ENTRIES):
            promote_entry(e, chunk)
    e.count.copied_bytes += length_bytes
    if j.copy.prefetch:
        e.count.prefetched_bytes += length_bytes
        e.count.copy_writes += 1
        e.count.copy_write_bytes += length_bytes
        e.count.copy_latency_ns += e.now_ns - j.copy.begun_ns
        e.count.copy_service_ns += (e.now_ns - j.copy.begun_ns) / j.copy.depth
    return 0
