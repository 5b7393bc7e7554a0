# SPDX-License-Identifier: Apache-2.0
# Commits, checkpoints, failure and close: everything that orders writes against flushes. docs/internals/durability.md numbers the rules.
#
# Offers: close_step, commit_maybe, fail, handle_durable, handle_flush, handle_journal_write, handle_map_flush, handle_map_write
# Needs: changes: change_count, change_index, change_kind, change_set_bytes, change_set_clear, change_set_resize, committed_value,
#   entry_value, uncommitted_count; copy: base_release, lazy_commit_wanted, promote_all; log: log_committed, log_durability, log_failed,
#   log_is_half_full, log_switch_areas; memory: ensure, list_take, op_issue, out_of_memory; request: done_push, fail_waiters,
#   retry_waiters; results: handle_op; slots: discards_begin; starved: cancel_starved; write: count_drained, retired_check


cdef bint commit_wanted(Engine e) noexcept nogil:
    cdef bint changed = change_count(&e.changes.running) > 0
    if e.commit.flush_next.head != NULL or lazy_commit_wanted(e):
        return True
    if not changed:
        return False
    return (e.commit.due or e.waiting.journal.head != NULL or change_set_bytes(&e.changes.running) >= e.changes.commit_bytes
            or log_is_half_full(e) or (e.waiting.slot.head != NULL and e.slots.retired != NULL))


cdef int commit_maybe(Engine e) except -1 nogil:
    if e.commit.state != COMMIT_IDLE or e.failure.error_number or e.mode.read_only or not commit_wanted(e):
        return 0
    if BUG(Bug.FLUSH_WAITS_FOR_DISCARDS) and e.discards.count:
        return 0
    return commit_begin(e)


cdef int commit_begin(Engine e) except -1 nogil:
    """The running changes become the committing ones; then flush. Requests that ask for a flush from here on share the next commit."""
    cdef ChangeSet old
    cdef Change *c
    cdef uint64_t i, index, count
    cdef uint32_t kind
    ensure(change_count(&e.changes.committing) == 0, "two commits at once")
    ensure(e.commit.flush_now.head == NULL, "two groups of flushes at once")
    e.commit.flush_now = e.commit.flush_next
    e.commit.flush_next.head = NULL
    e.commit.flush_next.tail = NULL
    e.commit.due = False
    if lazy_commit_wanted(e):
        promote_all(e)
    count = change_count(&e.changes.running)
    e.journal.new_hash = e.journal.map_hash
    if count:
        old = e.changes.committing
        e.changes.committing = e.changes.running
        e.changes.running = old
        e.commit.begun += 1
        for i in range(e.changes.committing.mask + 1):
            c = &e.changes.committing.cells[i]
            if c.key == 0:
                continue
            kind = change_kind(c)
            index = change_index(c)
            c.committing = entry_value(e, kind, index)
            e.journal.new_hash ^= entry_hash(e.disk.uuid_seed, kind, index, c.committed)
            e.journal.new_hash ^= entry_hash(e.disk.uuid_seed, kind, index, c.committing)
        log_switch_areas(e)
    e.commit.state = COMMIT_FLUSHING
    if BUG(Bug.JOURNAL_BEFORE_FLUSH):
        handle_flush(e, 0)
    else:
        op_issue(e, PURPOSE_FLUSH, OP_FLUSH, TARGET_STORAGE, 0, 0, NULL, False)
    if count and e.waiting.journal.head != NULL:
        retry_waiters(e, &e.waiting.journal)
    return 0


cdef int flushes_done(Engine e) except -1 nogil:
    cdef Request *r = list_take(&e.commit.flush_now)
    cdef Request *following
    while r != NULL:
        following = r.next
        done_push(e, r)
        r = following
    return 0


cdef int handle_flush(Engine e, int32_t error) except -1 nogil:
    if error and not BUG(Bug.FAILURES_IGNORED):
        return fail(e, error)
    if e.failure.error_number:
        return fail(e, e.failure.error_number)
    if change_count(&e.changes.committing) == 0:
        e.commit.state = COMMIT_IDLE
        flushes_done(e)
        return commit_next(e)
    if BUG(Bug.FLUSH_ANSWERED_BEFORE_JOURNAL):
        flushes_done(e)
    e.commit.state = COMMIT_WAITS_FOR_RING
    return journal_commit(e)


cdef int commit_next(Engine e) except -1 nogil:
    commit_maybe(e)
    checkpoint_maybe(e)
    return close_step(e)


# --- the journal --------------------------------------------------------------------------------------------------

cdef inline uint32_t record_index(Engine e, uint32_t kind, uint64_t index) noexcept nogil:
    """What a record names its word or entry by."""
    cdef uint32_t sector_shift = (e.disk.block_shift + 6 if kind == KIND_BITMAP else e.disk.chunk_shift) - 9
    if BUG(Bug.INDEX_IN_SECTORS):
        return <uint32_t>(index << sector_shift) >> sector_shift   # as if places were counted in sectors of 32 bits
    return <uint32_t>index


cdef uint32_t journal_records(Engine e) except 0 nogil:
    """Lay the committing changes out in the journal's buffer; returns the number of pages. Headers come when the sequence is known."""
    cdef JournalPages pages
    cdef uint32_t kind
    cdef uint64_t i
    cdef Change *c
    pages.out = e.journal.buffer
    pages.pages_max = <uint32_t>e.journal.commit_pages_max
    pages.pages = pages.used_bytes = 0
    for kind in range(KIND_BITMAP, KIND_TABLE + 1):
        for i in range(e.changes.committing.mask + 1):
            c = &e.changes.committing.cells[i]
            if c.key and change_kind(c) == kind:
                ensure(journal_append(&pages, kind, record_index(e, kind, change_index(c)), c.committing),
                       "a commit is larger than its reserve")
    return pages.pages


cdef int journal_commit(Engine e) except -1 nogil:
    """Write the committing changes, or wait for the checkpoint that frees space."""
    cdef uint32_t pages = journal_records(e)
    cdef uint64_t at = e.journal.next_sequence % e.disk.journal_pages
    cdef uint64_t sequence = e.journal.next_sequence
    if at + pages > e.disk.journal_pages:
        sequence += e.disk.journal_pages - at
    # R4: nothing from the durable tail on is overwritten, and one page stays for the commit that moves the tail.
    if sequence + pages + 1 - e.journal.durable_tail <= e.disk.journal_pages or BUG(Bug.JOURNAL_OVER_ITS_TAIL):
        return journal_write(e, sequence, pages, 0)
    if oldest_sequence(e) != e.journal.durable_tail:
        memset(e.journal.buffer, 0, PAGE_BYTES)
        return journal_write(e, e.journal.next_sequence, 1, 0)
    return checkpoint_begin(e)


cdef int journal_write(Engine e, uint64_t sequence, uint32_t pages, uint32_t flags) except -1 nogil:
    cdef JournalSeal seal
    cdef uint64_t position = e.disk.journal_offset + (sequence % e.disk.journal_pages) * PAGE_BYTES
    ensure(e.commit.state == COMMIT_IDLE or e.commit.state == COMMIT_WAITS_FOR_RING, "two journal writes at once")
    ensure(sequence % e.disk.journal_pages + pages <= e.disk.journal_pages, "a commit across the end of the ring")
    ensure(sequence + pages - e.journal.durable_tail <= e.disk.journal_pages or BUG(Bug.JOURNAL_OVER_ITS_TAIL),
           "the journal would overwrite its tail")
    e.journal.clean = False
    if e.journal.tail == 0:
        e.journal.tail = sequence
    # What this commit changes is not in a checkpoint that is under way.
    if e.checkpoint.state != CHECKPOINT_IDLE and e.checkpoint.tail_after == 0:
        e.checkpoint.tail_after = sequence
    e.journal.write_sequence = sequence
    e.journal.write_pages = pages
    e.journal.write_tail = e.journal.tail
    e.journal.write_flags = flags
    e.commit.state = COMMIT_WRITING
    seal.uuid_crc = e.disk.uuid_crc
    seal.journal_offset_bytes = e.disk.journal_offset
    seal.ring_pages = e.disk.journal_pages
    seal.sequence = sequence
    seal.previous = e.journal.previous
    seal.tail = e.journal.tail
    seal.map_hash = e.journal.new_hash if is_commit_record(<JournalHeader *>e.journal.buffer) else e.journal.map_hash
    seal.flags = flags
    journal_seal(e.journal.buffer, pages, &seal)
    e.count.journal_writes += 1
    op_issue(e, PURPOSE_JOURNAL, OP_WRITE, TARGET_STORAGE, position, pages * PAGE_BYTES, e.journal.buffer,
             not BUG(Bug.JOURNAL_WRITE_NOT_DURABLE))
    return 0


cdef inline bint is_commit_record(JournalHeader *header) noexcept nogil:
    return header.word_count or header.entry_count


cdef int handle_journal_write(Engine e, int32_t error) except -1 nogil:
    cdef bint was_commit
    if error and not BUG(Bug.FAILURES_IGNORED):
        return fail(e, error)
    if e.failure.error_number:
        return fail(e, e.failure.error_number)
    was_commit = is_commit_record(<JournalHeader *>e.journal.buffer)
    e.journal.previous = e.journal.write_sequence
    e.journal.next_sequence = e.journal.write_sequence + e.journal.write_pages
    e.journal.durable_tail = e.journal.write_tail
    if e.journal.write_flags & JOURNAL_FLAG_CLEAN:
        e.journal.clean = True
        e.commit.state = COMMIT_IDLE
        return close_step(e)
    if not was_commit:
        e.commit.state = COMMIT_WAITS_FOR_RING       # it only moved the tail
        return journal_commit(e)
    e.journal.map_hash = e.journal.new_hash
    e.commit.durable = e.commit.begun
    e.count.commits += 1
    mark_dirty(e)
    log_committed(e)
    change_set_clear(&e.changes.committing)
    if e.changes.committing.mask > 4095:
        change_set_resize(&e.changes.committing, 1024)      # a burst must not make every later commit walk a large table
    e.commit.state = COMMIT_IDLE
    base_release(e)
    flushes_done(e)
    retired_check(e)
    if e.waiting.slot.head != NULL:
        retry_waiters(e, &e.waiting.slot)
    return commit_next(e)


# --- checkpoint ---------------------------------------------------------------------------------------------------

cdef int mark_dirty(Engine e) except -1 nogil:
    """The pages of the maps that hold what was just committed."""
    cdef uint64_t i, page, index
    cdef uint64_t *dirty
    cdef Change *c
    for i in range(e.changes.committing.mask + 1):
        c = &e.changes.committing.cells[i]
        if c.key == 0:
            continue
        index = change_index(c)
        if change_kind(c) == KIND_BITMAP:
            page = index / (WORDS_PER_CELL * CELLS_PER_PAGE)
            dirty = e.checkpoint.dirty_bitmap
        else:
            page = index / (ENTRIES_PER_CELL * CELLS_PER_PAGE)
            dirty = e.checkpoint.dirty_table
        if not bit_get(dirty, page):
            bits_fill(dirty, page, page + 1, True)
            e.checkpoint.dirty_pages += 1
    return 0


cdef inline uint64_t oldest_sequence(Engine e) noexcept nogil:
    """Of the journal pages that recovery needs."""
    return e.journal.tail if e.journal.tail else e.journal.next_sequence


cdef int checkpoint_maybe(Engine e) except -1 nogil:
    cdef uint64_t used = e.journal.next_sequence - oldest_sequence(e)
    if e.checkpoint.state == CHECKPOINT_IDLE and not e.failure.error_number and used > e.disk.journal_pages / 2:
        return checkpoint_begin(e)
    return 0


cdef int checkpoint_begin(Engine e) except -1 nogil:
    if e.checkpoint.state != CHECKPOINT_IDLE or e.failure.error_number:
        return 0
    e.count.checkpoints += 1
    e.checkpoint.sweep = 0
    # A commit that is being written is not committed yet: it stays in the journal. While a checkpoint begins no earlier than at half the
    # ring, none is (docs/internals/simulation.md).
    e.checkpoint.tail_after = e.journal.write_sequence if e.commit.state == COMMIT_WRITING else 0
    e.checkpoint.state = CHECKPOINT_WRITING
    return checkpoint_step(e)


cdef int map_page(Engine e, uint8_t *page, uint32_t kind, uint64_t number) except -1 nogil:
    """Encode one page of a map from committed values only (R11)."""
    cdef uint64_t words[62]
    cdef uint32_t entries[124]
    cdef uint64_t cell, index, total, count, i, position
    cdef bint overlay = not BUG(Bug.CHECKPOINT_OF_PENDING_VALUES) and uncommitted_count(e) > 0
    memset(page, 0, PAGE_BYTES)
    for cell in range(number * CELLS_PER_PAGE, (number + 1) * CELLS_PER_PAGE):
        position = (e.disk.bitmap_offset if kind == KIND_BITMAP else e.disk.table_offset) + cell * CELL_BYTES
        count = 0
        if kind == KIND_BITMAP:
            index = cell * WORDS_PER_CELL
            total = e.disk.words
            if index < total:
                count = min(total - index, <uint64_t>WORDS_PER_CELL)
            for i in range(count):
                words[i] = e.maps.bitmap[index + i]
                if overlay:
                    words[i] = committed_value(e, kind, index + i, words[i])
            cell_seal(page + (cell & 7) * CELL_BYTES, e.disk.uuid_crc, position, kind, cell, words, <uint32_t>count)
        else:
            index = cell * ENTRIES_PER_CELL
            total = e.disk.chunks
            if index < total:
                count = min(total - index, <uint64_t>ENTRIES_PER_CELL)
            for i in range(count):
                entries[i] = e.maps.table[index + i]
                if overlay:
                    entries[i] = <uint32_t>committed_value(e, kind, index + i, entries[i])
                ensure(entries[i] == EMPTY or entries[i] < e.disk.chunks, "a table entry beyond the greatest slot")
            cell_seal(page + (cell & 7) * CELL_BYTES, e.disk.uuid_crc, position, kind, cell, entries, <uint32_t>count)
    return 0


cdef int checkpoint_step(Engine e) except -1 nogil:
    """Write the next dirty pages, a few runs at a time; after the last, flush."""
    cdef uint64_t pages = e.disk.bitmap_pages + e.disk.table_pages
    cdef uint64_t page, run, limit, offset
    cdef uint64_t *dirty
    cdef uint32_t kind, i
    cdef Staging *s
    cdef Op *op
    while e.checkpoint.sweep < pages and e.checkpoint.staging_busy < STAGINGS and not e.failure.error_number:
        if e.checkpoint.sweep < e.disk.bitmap_pages:
            kind = KIND_BITMAP
            dirty = e.checkpoint.dirty_bitmap
            page = bits_find(dirty, e.checkpoint.sweep, e.disk.bitmap_pages, True)
            if page == e.disk.bitmap_pages:
                e.checkpoint.sweep = e.disk.bitmap_pages
                continue
            limit = e.disk.bitmap_pages
            offset = e.disk.bitmap_offset
        else:
            kind = KIND_TABLE
            dirty = e.checkpoint.dirty_table
            page = bits_find(dirty, e.checkpoint.sweep - e.disk.bitmap_pages, e.disk.table_pages, True)
            if page == e.disk.table_pages:
                e.checkpoint.sweep = pages
                continue
            limit = e.disk.table_pages
            offset = e.disk.table_offset
        run = bits_find(dirty, page, min(limit, page + STAGING_PAGES), False)
        s = NULL
        for i in range(STAGINGS):
            if not e.checkpoint.staging[i].busy:
                s = &e.checkpoint.staging[i]
                break
        ensure(s != NULL, "no staging buffer")
        if s.buffer == NULL:
            s.buffer = <uint8_t *>aligned(STAGING_PAGES * PAGE_BYTES)
            if s.buffer == NULL:
                out_of_memory()
        for i in range(<uint32_t>(run - page)):
            map_page(e, s.buffer + i * PAGE_BYTES, kind, page + i)
        bits_fill(dirty, page, run, False)
        e.checkpoint.dirty_pages -= run - page
        s.busy = 1
        e.checkpoint.staging_busy += 1
        e.count.map_writes += 1
        op = op_issue(e, PURPOSE_MAP, OP_WRITE, TARGET_STORAGE, offset + page * PAGE_BYTES, (run - page) * PAGE_BYTES, s.buffer, False)
        op.slot = <uint32_t>(s - &e.checkpoint.staging[0])
        e.checkpoint.sweep = run if kind == KIND_BITMAP else e.disk.bitmap_pages + run
    if e.checkpoint.sweep >= pages and e.checkpoint.staging_busy == 0 and e.checkpoint.state == CHECKPOINT_WRITING:
        e.checkpoint.state = CHECKPOINT_FLUSHING
        if BUG(Bug.TAIL_BEFORE_CHECKPOINT_FLUSH):
            return handle_map_flush(e, 0)
        op_issue(e, PURPOSE_MAP_FLUSH, OP_FLUSH, TARGET_STORAGE, 0, 0, NULL, False)
    return 0


cdef int handle_map_write(Engine e, uint32_t staging, int32_t error) except -1 nogil:
    e.checkpoint.staging[staging].busy = 0
    e.checkpoint.staging_busy -= 1
    if error and not BUG(Bug.MAP_WRITE_ERROR_IGNORED):
        return fail(e, error)
    return checkpoint_step(e)


cdef int handle_map_flush(Engine e, int32_t error) except -1 nogil:
    if error:
        return fail(e, error)
    if e.failure.error_number:
        return 0
    e.checkpoint.state = CHECKPOINT_IDLE
    e.journal.tail = e.checkpoint.tail_after       # R4: only now; 0 means the next commit is the oldest that matters
    if e.commit.state == COMMIT_WAITS_FOR_RING:
        return journal_commit(e)
    return commit_next(e)


# --- durability operations: flushes and durable writes ----------------------------------------------------------------

cdef int handle_durable(Engine e, Op *record, int32_t error) except -1 nogil:
    """R26: the kernel tells a failure once, to whichever durability operation asks first. So the good end of one is believed when every
    other that was in flight at that moment has ended well too: one of them may fail, with the report that was due here."""
    cdef uint64_t barrier
    if record.older != NULL:
        record.older.newer = record.newer
    else:
        e.durable.oldest = record.newer
    if record.newer != NULL:
        record.newer.older = record.older
    else:
        e.durable.newest = record.older
    if record.watched:
        record.watched = 0
        count_drained(e, record)       # what it wrote lies where it will, whether or not its end counts yet
    if error and not BUG(Bug.FAILURES_IGNORED):
        # R27: whoever issued it. The failure of a durable write of a guest may be another write's lost page, or the device's lost cache.
        if not (BUG(Bug.FAILED_DURABLE_WRITE_FORGIVEN) and record.purpose == PURPOSE_PLAIN
                or BUG(Bug.FAILED_DURABLE_JOB_FORGIVEN) and record.purpose == PURPOSE_JOB):
            flush_failed(e, error)
            error = -EIO            # not ENOSPC: more space would not help
    barrier = 0 if e.durable.newest == NULL or BUG(Bug.DURABLE_END_WITHOUT_BARRIER) else e.durable.newest.number
    held_release(e)
    if error == 0 and e.failure.error_number and not BUG(Bug.FAILURES_IGNORED):
        error = -EIO
    if error or barrier == 0:
        return finish_durable(e, record, error)
    record.number = barrier
    record.next = NULL
    if e.durable.held == NULL:
        e.durable.held = record
    else:
        e.durable.last_held.next = record
    e.durable.last_held = record
    e.durable.held_count += 1
    return 0


cdef int finish_durable(Engine e, Op *record, int32_t error) except -1 nogil:
    cdef Op op = record[0]
    record.next = e.pools.free_ops
    e.pools.free_ops = record
    log_durability(e, -1)       # R24: when its failure has been noted
    return handle_op(e, &op, error)


cdef Op *held_take(Engine e) noexcept nogil:
    cdef Op *record = e.durable.held
    e.durable.held = record.next
    e.durable.held_count -= 1
    return record


cdef int held_release(Engine e) except -1 nogil:
    """Those count now behind which nothing is in flight any more. Barriers rise along the list: each only waits for older operations."""
    while e.durable.held != NULL and (e.durable.oldest == NULL or e.durable.oldest.number > e.durable.held.number
                                      or (BUG(Bug.BARRIER_ONE_TOO_EARLY) and e.durable.oldest.number == e.durable.held.number)):
        finish_durable(e, held_take(e), 0)
    return 0


cdef int flush_failed(Engine e, int32_t error) except -1 nogil:
    """A durability operation of this disk's own has failed."""
    if e.failure.flush_error_number == 0:
        e.failure.flush_error_number = -error
        e.want |= Want.EVENT
    return fail(e, error)


# --- failure and close --------------------------------------------------------------------------------------------

cdef int fail(Engine e, int32_t error) except -1 nogil:
    """R10: after a failed flush or metadata write nothing that needs durability succeeds until the disk is opened again."""
    if e.failure.error_number == 0:
        e.failure.error_number = -error if error < 0 else error
        log_failed(e)
        e.want |= Want.EVENT
    while e.durable.held != NULL:
        finish_durable(e, held_take(e), -EIO)     # R26: this failure may have taken their reports
    fail_flush_waiters(e, &e.commit.flush_now)
    fail_flush_waiters(e, &e.commit.flush_next)
    if not BUG(Bug.JOURNAL_WAITERS_FORGOTTEN):
        fail_waiters(e, &e.waiting.journal, -EIO)
    fail_waiters(e, &e.waiting.slot, -EIO)
    cancel_starved(e, 0, 0, -EIO)
    return close_step(e)


cdef int fail_flush_waiters(Engine e, RequestList *where) except -1 nogil:
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
    if e.close.request == NULL or e.open_requests > 1 or e.inflight_ops:
        return 0
    if e.failure.error_number:
        e.close.request.error = -EIO
        return close_end(e)
    if e.mode.read_only:
        return close_end(e)
    if e.commit.state != COMMIT_IDLE or e.checkpoint.state != CHECKPOINT_IDLE:
        return 0
    if e.close.phase == CLOSE_WAITING:
        e.close.phase = CLOSE_COMMITTING
        return commit_begin(e)
    if e.close.phase == CLOSE_COMMITTING:
        if e.journal.clean:
            return close_discards(e)
        e.close.phase = CLOSE_CHECKPOINT
        return checkpoint_begin(e)
    if e.close.phase == CLOSE_CHECKPOINT:
        ensure(e.checkpoint.dirty_pages == 0, "dirty pages after the last checkpoint")
        e.close.phase = CLOSE_RECORD
        memset(e.journal.buffer, 0, PAGE_BYTES)
        return journal_write(e, e.journal.next_sequence, 1, JOURNAL_FLAG_CLEAN)
    if e.close.phase == CLOSE_RECORD:
        return close_discards(e)
    return close_end(e)


cdef int close_discards(Engine e) except -1 nogil:
    """Everything is on storage. Slots that still wait for a discard get theirs now, those that do not take long."""
    e.close.phase = CLOSE_DISCARDS
    e.discards.until_ns = e.now_ns + CLOSE_DISCARDS_NS
    discards_begin(e)
    return 0 if e.inflight_ops else close_end(e)


cdef int close_end(Engine e) except -1 nogil:
    cdef Request *r = e.close.request
    e.close.request = NULL
    e.close.done = True
    return done_push(e, r)
