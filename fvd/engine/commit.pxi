# SPDX-License-Identifier: Apache-2.0
# Commits, checkpoints, failure and close: everything that orders writes against flushes. docs/internals/durability.md numbers the rules.


cdef bint commit_wanted(Engine e) noexcept nogil:
    cdef bint changed = e.open.words + e.open.entries > 0
    if e.flush_next.head != NULL or soft_wanted(e):
        return True
    if not changed:
        return False
    return (e.commit_due or e.wait_journal.head != NULL or delta_bytes(&e.open) >= e.commit_bytes or log_is_half_full(e)
            or (e.wait_slot.head != NULL and e.retired != NULL))


cdef int commit_maybe(Engine e) except -1 nogil:
    if e.commit_state != COMMIT_IDLE or e.failed_errno or e.read_only or not commit_wanted(e):
        return 0
    if BUG(Bug.FLUSH_WAITS_FOR_DISCARDS) and e.discarding:
        return 0
    return commit_begin(e)


cdef int commit_begin(Engine e) except -1 nogil:
    """Freeze what is pending, then flush. Requests that ask for a flush from here on share the next commit."""
    cdef Delta old
    cdef Change *c
    cdef uint64_t i, index, count
    cdef uint32_t kind
    ensure(e.frozen.words + e.frozen.entries == 0, "two commits at once")
    ensure(e.flush_now.head == NULL, "two groups of flushes at once")
    e.flush_now = e.flush_next
    e.flush_next.head = NULL
    e.flush_next.tail = NULL
    e.commit_due = False
    if soft_wanted(e):
        soft_harden(e)
    count = e.open.words + e.open.entries
    e.new_hash = e.map_hash
    if count:
        old = e.frozen
        e.frozen = e.open
        e.open = old
        e.commits += 1
        for i in range(e.frozen.mask + 1):
            c = &e.frozen.cells[i]
            if c.key == 0:
                continue
            kind = <uint32_t>((c.key - 1) >> 56)
            index = (c.key - 1) & 0xFFFFFFFFFFFFFFULL
            c.frozen = e.bitmap[index] if kind == KIND_BITMAP else e.table[index]
            e.new_hash ^= entry_hash(e.uuid_seed, kind, index, c.committed) ^ entry_hash(e.uuid_seed, kind, index, c.frozen)
        log_freeze(e)
    e.commit_state = COMMIT_FLUSHING
    if BUG(Bug.JOURNAL_BEFORE_FLUSH):
        commit_flushed(e, 0)
    else:
        op_issue(e, WHAT_FLUSH, OP_FLUSH, TARGET_STORAGE, 0, 0, NULL, False)
    if count and e.wait_journal.head != NULL:
        list_walk(e, &e.wait_journal)
    return 0


cdef int flushes_done(Engine e) except -1 nogil:
    cdef Request *r = list_take(&e.flush_now)
    cdef Request *following
    while r != NULL:
        following = r.next
        done_push(e, r)
        r = following
    return 0


cdef int commit_flushed(Engine e, int32_t error) except -1 nogil:
    if error and not BUG(Bug.FAILURES_IGNORED):
        return fail(e, error)
    if e.failed_errno:
        return fail(e, e.failed_errno)
    if e.frozen.words + e.frozen.entries == 0:
        e.commit_state = COMMIT_IDLE
        flushes_done(e)
        return commit_next(e)
    if BUG(Bug.FLUSH_ANSWERED_BEFORE_JOURNAL):
        flushes_done(e)
    e.commit_state = COMMIT_WAITS_FOR_RING
    return journal_commit(e)


cdef int commit_next(Engine e) except -1 nogil:
    commit_maybe(e)
    checkpoint_maybe(e)
    return close_step(e)


# --- the journal --------------------------------------------------------------------------------------------------

cdef inline uint32_t record_index(Engine e, uint32_t kind, uint64_t index) noexcept nogil:
    """What a record names its word or entry by."""
    cdef uint32_t sector_shift = (e.block_shift + 6 if kind == KIND_BITMAP else e.chunk_shift) - 9
    if BUG(Bug.INDEX_IN_SECTORS):
        return <uint32_t>(index << sector_shift) >> sector_shift   # as if places were counted in sectors of 32 bits
    return <uint32_t>index


cdef uint32_t journal_records(Engine e) except 0 nogil:
    """Lay the frozen changes out in journal_buffer; returns the number of pages. Headers come when the sequence is known."""
    cdef uint32_t pages = 0, used = JOURNAL_RECORDS_BYTES
    cdef uint32_t pass_kind, size
    cdef uint64_t i
    cdef Change *c
    cdef uint8_t *page = e.journal_buffer
    cdef JournalHeader *header = NULL
    for pass_kind in range(KIND_BITMAP, KIND_TABLE + 1):
        size = WORD_RECORD_BYTES if pass_kind == KIND_BITMAP else ENTRY_RECORD_BYTES
        for i in range(e.frozen.mask + 1):
            c = &e.frozen.cells[i]
            if c.key == 0 or (c.key - 1) >> 56 != pass_kind:
                continue
            if used + size > JOURNAL_RECORDS_BYTES:
                ensure(pages < e.max_commit_pages, "a commit is larger than its reserve")
                page = e.journal_buffer + pages * PAGE_BYTES
                memset(page, 0, sizeof(JournalHeader) if BUG(Bug.PAGE_NOT_CLEARED) else PAGE_BYTES)
                header = <JournalHeader *>page
                pages += 1
                used = 0
            put_u32(page + sizeof(JournalHeader) + used, record_index(e, pass_kind, (c.key - 1) & 0xFFFFFFFFFFFFFFULL))
            if pass_kind == KIND_BITMAP:
                put_u64(page + sizeof(JournalHeader) + used + 4, c.frozen)
                header.word_count += 1
            else:
                put_u32(page + sizeof(JournalHeader) + used + 4, <uint32_t>c.frozen)
                header.entry_count += 1
            used += size
    return pages


cdef int journal_commit(Engine e) except -1 nogil:
    """Write the frozen changes, or wait for the checkpoint that makes room."""
    cdef uint32_t pages = journal_records(e)
    cdef uint64_t at = e.next_sequence % e.journal_pages
    cdef uint64_t sequence = e.next_sequence
    if at + pages > e.journal_pages:
        sequence += e.journal_pages - at
    # R4: nothing from the durable tail on is overwritten, and one page stays for the commit that moves the tail.
    if sequence + pages + 1 - e.durable_tail <= e.journal_pages or BUG(Bug.JOURNAL_OVER_ITS_TAIL):
        return journal_write(e, sequence, pages, 0)
    if (e.tail if e.tail else e.next_sequence) != e.durable_tail:
        memset(e.journal_buffer, 0, PAGE_BYTES)
        return journal_write(e, e.next_sequence, 1, 0)
    return checkpoint_begin(e)


cdef int journal_write(Engine e, uint64_t sequence, uint32_t pages, uint32_t flags) except -1 nogil:
    cdef JournalHeader *header
    cdef uint64_t position = e.journal_offset + (sequence % e.journal_pages) * PAGE_BYTES
    cdef uint32_t i
    ensure(e.commit_state == COMMIT_IDLE or e.commit_state == COMMIT_WAITS_FOR_RING, "two journal writes at once")
    ensure(sequence % e.journal_pages + pages <= e.journal_pages, "a commit across the end of the ring")
    ensure(sequence + pages - e.durable_tail <= e.journal_pages or BUG(Bug.JOURNAL_OVER_ITS_TAIL), "the journal would overwrite its tail")
    e.clean_on_storage = False
    if e.tail == 0:
        e.tail = sequence
    # What this commit changes is not in a checkpoint that is under way.
    if e.checkpoint_state != CHECKPOINT_IDLE and e.tail_after == 0:
        e.tail_after = sequence
    e.write_sequence = sequence
    e.write_pages = pages
    e.write_tail = e.tail
    e.write_flags = flags
    e.commit_state = COMMIT_WRITING
    for i in range(pages):
        header = <JournalHeader *>(e.journal_buffer + i * PAGE_BYTES)
        header.sequence = sequence + i
        header.previous = e.previous
        header.tail = e.tail
        header.map_hash = e.new_hash if is_commit_record(header) else e.map_hash
        header.part = <uint16_t>i
        header.parts = <uint16_t>pages
        header.flags = flags
        journal_seal(e.journal_buffer + i * PAGE_BYTES, e.uuid_crc, position + i * PAGE_BYTES)
    e.stat_journal_writes += 1
    op_issue(e, WHAT_JOURNAL, OP_WRITE, TARGET_STORAGE, position, pages * PAGE_BYTES, e.journal_buffer,
             not BUG(Bug.JOURNAL_WRITE_NOT_DURABLE))
    return 0


cdef inline bint is_commit_record(JournalHeader *header) noexcept nogil:
    return header.word_count or header.entry_count


cdef int journal_written(Engine e, int32_t error) except -1 nogil:
    cdef bint was_commit
    if error and not BUG(Bug.FAILURES_IGNORED):
        return fail(e, error)
    if e.failed_errno:
        return fail(e, e.failed_errno)
    was_commit = is_commit_record(<JournalHeader *>e.journal_buffer)
    e.previous = e.write_sequence
    e.next_sequence = e.write_sequence + e.write_pages
    e.durable_tail = e.write_tail
    if e.write_flags & JOURNAL_FLAG_CLEAN:
        e.clean_on_storage = True
        e.commit_state = COMMIT_IDLE
        return close_step(e)
    if not was_commit:
        e.commit_state = COMMIT_WAITS_FOR_RING       # it only moved the tail
        return journal_commit(e)
    e.map_hash = e.new_hash
    e.durable_commits = e.commits
    e.stat_commits += 1
    mark_dirty(e)
    log_committed(e)
    delta_clear(&e.frozen)
    if e.frozen.mask > 4095:
        delta_resize(&e.frozen, 1024)      # a burst must not make every later commit walk a large table
    e.commit_state = COMMIT_IDLE
    base_release(e)
    flushes_done(e)
    retired_check(e)
    if e.wait_slot.head != NULL:
        list_walk(e, &e.wait_slot)
    return commit_next(e)


cdef inline void put_u32(uint8_t *to, uint32_t value) noexcept nogil:
    memcpy(to, &value, 4)


cdef inline void put_u64(uint8_t *to, uint64_t value) noexcept nogil:
    memcpy(to, &value, 8)


# --- checkpoint ---------------------------------------------------------------------------------------------------

cdef int mark_dirty(Engine e) except -1 nogil:
    """The pages of the maps that hold what was just committed."""
    cdef uint64_t i, page, index
    cdef uint64_t *dirty
    cdef Change *c
    for i in range(e.frozen.mask + 1):
        c = &e.frozen.cells[i]
        if c.key == 0:
            continue
        index = (c.key - 1) & 0xFFFFFFFFFFFFFFULL
        if (c.key - 1) >> 56 == KIND_BITMAP:
            page = index / (WORDS_PER_CELL * CELLS_PER_PAGE)
            dirty = e.dirty_bitmap
        else:
            page = index / (ENTRIES_PER_CELL * CELLS_PER_PAGE)
            dirty = e.dirty_table
        if not bit_get(dirty, page):
            bits_fill(dirty, page, page + 1, True)
            e.dirty_pages += 1
    return 0


cdef int checkpoint_maybe(Engine e) except -1 nogil:
    cdef uint64_t tail = e.tail if e.tail else e.next_sequence
    if e.checkpoint_state == CHECKPOINT_IDLE and not e.failed_errno and e.next_sequence - tail > e.journal_pages / 2:
        return checkpoint_begin(e)
    return 0


cdef int checkpoint_begin(Engine e) except -1 nogil:
    if e.checkpoint_state != CHECKPOINT_IDLE or e.failed_errno:
        return 0
    e.stat_checkpoints += 1
    e.sweep = 0
    # A commit that is being written is not committed yet: it stays in the journal. While a checkpoint begins no earlier than at half the
    # ring, none is (docs/internals/simulation.md).
    e.tail_after = e.write_sequence if e.commit_state == COMMIT_WRITING else 0
    e.checkpoint_state = CHECKPOINT_WRITING
    return checkpoint_step(e)


cdef int map_page(Engine e, uint8_t *page, uint32_t kind, uint64_t number) except -1 nogil:
    """Encode one page of a map from committed values only (R11)."""
    cdef uint64_t words[62]
    cdef uint32_t entries[124]
    cdef uint64_t cell, index, total, count, i, position
    cdef bint overlay = not BUG(Bug.CHECKPOINT_OF_PENDING_VALUES) and changes(&e.open) + changes(&e.frozen) + changes(&e.soft) > 0
    memset(page, 0, PAGE_BYTES)
    for cell in range(number * CELLS_PER_PAGE, (number + 1) * CELLS_PER_PAGE):
        position = (e.bitmap_offset if kind == KIND_BITMAP else e.table_offset) + cell * CELL_BYTES
        count = 0
        if kind == KIND_BITMAP:
            index = cell * WORDS_PER_CELL
            total = e.words
            if index < total:
                count = min(total - index, <uint64_t>WORDS_PER_CELL)
            for i in range(count):
                words[i] = e.bitmap[index + i]
                if overlay:
                    words[i] = committed_value(e, kind, index + i, words[i])
            cell_seal(page + (cell & 7) * CELL_BYTES, e.uuid_crc, position, kind, cell, words, <uint32_t>count)
        else:
            index = cell * ENTRIES_PER_CELL
            total = e.chunks
            if index < total:
                count = min(total - index, <uint64_t>ENTRIES_PER_CELL)
            for i in range(count):
                entries[i] = e.table[index + i]
                if overlay:
                    entries[i] = <uint32_t>committed_value(e, kind, index + i, entries[i])
                ensure(entries[i] == EMPTY or entries[i] < e.chunks, "a table entry beyond the greatest slot")
            cell_seal(page + (cell & 7) * CELL_BYTES, e.uuid_crc, position, kind, cell, entries, <uint32_t>count)
    return 0


cdef int checkpoint_step(Engine e) except -1 nogil:
    """Write the next dirty pages, a few runs at a time; after the last, flush."""
    cdef uint64_t pages = e.bitmap_pages + e.table_pages
    cdef uint64_t page, run, limit, offset
    cdef uint64_t *dirty
    cdef uint32_t kind, i
    cdef Staging *s
    cdef Op *op
    while e.sweep < pages and e.staging_busy < STAGINGS and not e.failed_errno:
        if e.sweep < e.bitmap_pages:
            kind = KIND_BITMAP
            dirty = e.dirty_bitmap
            page = bits_find(dirty, e.sweep, e.bitmap_pages, True)
            if page == e.bitmap_pages:
                e.sweep = e.bitmap_pages
                continue
            limit = e.bitmap_pages
            offset = e.bitmap_offset
        else:
            kind = KIND_TABLE
            dirty = e.dirty_table
            page = bits_find(dirty, e.sweep - e.bitmap_pages, e.table_pages, True)
            if page == e.table_pages:
                e.sweep = pages
                continue
            limit = e.table_pages
            offset = e.table_offset
        run = bits_find(dirty, page, min(limit, page + STAGING_PAGES), False)
        s = NULL
        for i in range(STAGINGS):
            if not e.staging[i].busy:
                s = &e.staging[i]
                break
        ensure(s != NULL, "no staging buffer")
        if s.buffer == NULL:
            s.buffer = <uint8_t *>aligned(STAGING_PAGES * PAGE_BYTES)
            if s.buffer == NULL:
                out_of_memory()
        for i in range(<uint32_t>(run - page)):
            map_page(e, s.buffer + i * PAGE_BYTES, kind, page + i)
        bits_fill(dirty, page, run, False)
        e.dirty_pages -= run - page
        s.busy = 1
        e.staging_busy += 1
        e.stat_map_writes += 1
        op = op_issue(e, WHAT_MAP, OP_WRITE, TARGET_STORAGE, offset + page * PAGE_BYTES, (run - page) * PAGE_BYTES, s.buffer, False)
        op.slot = <uint32_t>(s - &e.staging[0])
        e.sweep = run if kind == KIND_BITMAP else e.bitmap_pages + run
    if e.sweep >= pages and e.staging_busy == 0 and e.checkpoint_state == CHECKPOINT_WRITING:
        e.checkpoint_state = CHECKPOINT_FLUSHING
        if BUG(Bug.TAIL_BEFORE_CHECKPOINT_FLUSH):
            return checkpoint_end(e, 0)
        op_issue(e, WHAT_MAP_FLUSH, OP_FLUSH, TARGET_STORAGE, 0, 0, NULL, False)
    return 0


cdef int checkpoint_wrote(Engine e, uint32_t staging, int32_t error) except -1 nogil:
    e.staging[staging].busy = 0
    e.staging_busy -= 1
    if error and not BUG(Bug.MAP_WRITE_ERROR_IGNORED):
        return fail(e, error)
    return checkpoint_step(e)


cdef int checkpoint_end(Engine e, int32_t error) except -1 nogil:
    if error:
        return fail(e, error)
    if e.failed_errno:
        return 0
    e.checkpoint_state = CHECKPOINT_IDLE
    e.tail = e.tail_after       # R4: only now; 0 means the next commit is the oldest that matters
    if e.commit_state == COMMIT_WAITS_FOR_RING:
        return journal_commit(e)
    return commit_next(e)


# --- durability operations: flushes and durable writes ----------------------------------------------------------------

cdef int durable_ended(Engine e, Op *record, int32_t error) except -1 nogil:
    """R26: the kernel tells a failure once, to whichever durability operation asks first. So the good end of one is believed when every
    other that was in flight at that moment has ended well too: one of them may fail, with the report that was due here."""
    cdef uint64_t barrier
    if record.older != NULL:
        record.older.newer = record.newer
    else:
        e.oldest_durable = record.newer
    if record.newer != NULL:
        record.newer.older = record.older
    else:
        e.newest_durable = record.older
    if record.watched:
        record.watched = 0
        drain_note(e, record)       # what it wrote lies where it will, whether or not its end counts yet
    if error and not BUG(Bug.FAILURES_IGNORED):
        # R27: whoever issued it. The failure of a durable write of a guest may be another write's lost page, or the device's lost cache.
        if not (BUG(Bug.FAILED_DURABLE_WRITE_FORGIVEN) and record.what == WHAT_PLAIN
                or BUG(Bug.FAILED_DURABLE_JOB_FORGIVEN) and record.what == WHAT_JOB):
            flush_failed(e, error)
            error = -EIO            # not ENOSPC: more space would not help
    barrier = 0 if e.newest_durable == NULL or BUG(Bug.DURABLE_END_WITHOUT_BARRIER) else e.newest_durable.number
    held_release(e)
    if error == 0 and e.failed_errno and not BUG(Bug.FAILURES_IGNORED):
        error = -EIO
    if error or barrier == 0:
        return record_ended(e, record, error)
    record.number = barrier
    record.next = NULL
    if e.held == NULL:
        e.held = record
    else:
        e.last_held.next = record
    e.last_held = record
    e.held_count += 1
    return 0


cdef int record_ended(Engine e, Op *record, int32_t error) except -1 nogil:
    cdef Op op = record[0]
    record.next = e.free_ops
    e.free_ops = record
    log_durability(e, -1)       # R24: when its failure has been noted
    return op_ended(e, &op, error)


cdef Op *held_take(Engine e) noexcept nogil:
    cdef Op *record = e.held
    e.held = record.next
    e.held_count -= 1
    return record


cdef int held_release(Engine e) except -1 nogil:
    """Those count now behind which nothing is in flight any more. Barriers rise along the list: each only waits for older operations."""
    while e.held != NULL and (e.oldest_durable == NULL or e.oldest_durable.number > e.held.number
                              or (BUG(Bug.BARRIER_ONE_TOO_EARLY) and e.oldest_durable.number == e.held.number)):
        record_ended(e, held_take(e), 0)
    return 0


cdef int flush_failed(Engine e, int32_t error) except -1 nogil:
    """A durability operation of this disk's own has failed."""
    if e.flush_failed_errno == 0:
        e.flush_failed_errno = -error
        e.want |= Want.EVENT
    return fail(e, error)


# --- failure and close --------------------------------------------------------------------------------------------

cdef int fail(Engine e, int32_t error) except -1 nogil:
    """R10: after a failed flush or metadata write nothing that needs durability succeeds until the disk is opened again."""
    if e.failed_errno == 0:
        e.failed_errno = -error if error < 0 else error
        log_failed(e)
        e.want |= Want.EVENT
    while e.held != NULL:
        record_ended(e, held_take(e), -EIO)     # R26: this failure may have taken their reports
    list_fail_done(e, &e.flush_now)
    list_fail_done(e, &e.flush_next)
    if not BUG(Bug.JOURNAL_WAITERS_FORGOTTEN):
        list_fail(e, &e.wait_journal, -EIO)
    list_fail(e, &e.wait_slot, -EIO)
    starved_end(e, 0, 0, -EIO)
    return close_step(e)


cdef int list_fail_done(Engine e, RequestList *where) except -1 nogil:
    cdef Request *r = list_take(where)
    cdef Request *following
    while r != NULL:
        following = r.next
        r.error = -EIO
        done_push(e, r)
        r = following
    return 0


cdef int close_step(Engine e) except -1 nogil:
    """Commit, checkpoint, clean record: one after the other, once nothing else is under way."""
    if e.closing == NULL or e.open_requests > 1 or e.inflight_ops:
        return 0
    if e.failed_errno:
        e.closing.error = -EIO
        return close_end(e)
    if e.read_only:
        return close_end(e)
    if e.commit_state != COMMIT_IDLE or e.checkpoint_state != CHECKPOINT_IDLE:
        return 0
    if e.close_phase == CLOSE_WAITING:
        e.close_phase = CLOSE_COMMITTING
        return commit_begin(e)
    if e.close_phase == CLOSE_COMMITTING:
        if e.clean_on_storage:
            return close_discards(e)
        e.close_phase = CLOSE_CHECKPOINT
        return checkpoint_begin(e)
    if e.close_phase == CLOSE_CHECKPOINT:
        ensure(e.dirty_pages == 0, "dirty pages after the last checkpoint")
        e.close_phase = CLOSE_RECORD
        memset(e.journal_buffer, 0, PAGE_BYTES)
        return journal_write(e, e.next_sequence, 1, JOURNAL_FLAG_CLEAN)
    if e.close_phase == CLOSE_RECORD:
        return close_discards(e)
    return close_end(e)


cdef int close_discards(Engine e) except -1 nogil:
    """Everything is on storage. Slots that still wait for a discard get theirs now, those that do not take long."""
    e.close_phase = CLOSE_DISCARDS
    e.discards_until_ns = e.now_ns + CLOSE_DISCARDS_NS
    discards_begin(e)
    return 0 if e.inflight_ops else close_end(e)


cdef int close_end(Engine e) except -1 nogil:
    cdef Request *r = e.closing
    e.closing = NULL
    e.closed = True
    return done_push(e, r)
