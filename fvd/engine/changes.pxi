# SPDX-License-Identifier: Apache-2.0
# What differs from storage: three sets of changes, and the two maps, every change of which goes through here.
#
# An entry is a word of the bitmap or an entry of the table, named by kind << 56 | index. Its change is in at most one of two sets, running
# (in no commit yet) and lazy (a crash may take it back: copy.pxi), and in the committing one (of the commit under way); each remembers the
# committed value. A key is an entry's name plus 1: 0 is a free cell.
#
# Offers: change_count, change_find, change_index, change_insert, change_key, change_kind, change_set_bytes, change_set_clear,
#   change_set_resize, committed_value, entry_index, entry_kind, entry_value, is_committed, map_bits, map_slot, mapped_durably,
#   note_change, pending_count, slot_of, uncommitted_count
# Needs: copy: lower_base_absent, promote_entries_of; log: log_touch; memory: ensure, out_of_memory

cdef inline uint32_t entry_kind(uint64_t entry) noexcept nogil:
    return <uint32_t>(entry >> 56)


cdef inline uint64_t entry_index(uint64_t entry) noexcept nogil:
    return entry & 0xFFFFFFFFFFFFFFULL


cdef inline uint64_t change_key(uint32_t kind, uint64_t index) noexcept nogil:
    return ((<uint64_t>kind << 56) | index) + 1


cdef inline uint32_t change_kind(Change *c) noexcept nogil:
    return entry_kind(c.key - 1)


cdef inline uint64_t change_index(Change *c) noexcept nogil:
    return entry_index(c.key - 1)


cdef inline uint64_t entry_value(Engine e, uint32_t kind, uint64_t index) noexcept nogil:
    """As the guest sees it now."""
    return e.maps.bitmap[index] if kind == KIND_BITMAP else e.maps.table[index]


cdef inline uint64_t scatter(uint64_t key) noexcept nogil:
    key *= 0x9E3779B97F4A7C15ULL
    return key ^ (key >> 29)


cdef inline uint64_t change_count(ChangeSet *changed) noexcept nogil:
    return changed.words + changed.entries


cdef inline uint64_t change_set_bytes(ChangeSet *changed) noexcept nogil:
    return changed.words * WORD_RECORD_BYTES + changed.entries * ENTRY_RECORD_BYTES


cdef inline uint64_t pending_count(Engine e) noexcept nogil:
    """Of the changes that a flush makes durable."""
    return change_count(&e.changes.running) + change_count(&e.changes.committing)


cdef inline uint64_t uncommitted_count(Engine e) noexcept nogil:
    return pending_count(e) + change_count(&e.changes.lazy)


cdef inline Change *change_find(ChangeSet *changed, uint64_t key) noexcept nogil:
    cdef uint64_t at
    if change_count(changed) == 0:
        return NULL
    at = scatter(key) & changed.mask
    while changed.cells[at].key != 0:
        if changed.cells[at].key == key:
            return &changed.cells[at]
        at = (at + 1) & changed.mask
    return NULL


cdef int change_set_resize(ChangeSet *changed, uint64_t capacity) except -1 nogil:
    cdef Change *old = changed.cells
    cdef uint64_t i, at, old_capacity = changed.mask + 1
    cdef Change *cells = <Change *>calloc(capacity, sizeof(Change))
    if cells == NULL:
        out_of_memory()
    if old != NULL:
        for i in range(old_capacity):
            if old[i].key:
                at = scatter(old[i].key) & (capacity - 1)
                while cells[at].key:
                    at = (at + 1) & (capacity - 1)
                cells[at] = old[i]
        free(old)
    changed.cells = cells
    changed.mask = capacity - 1
    return 0


cdef void change_set_clear(ChangeSet *changed) noexcept nogil:
    memset(changed.cells, 0, (changed.mask + 1) * sizeof(Change))
    changed.words = 0
    changed.entries = 0


cdef void change_remove(ChangeSet *changed, Change *c) noexcept nogil:
    """Linear probing: those behind it that could not be found any more move up."""
    cdef uint64_t hole = c - changed.cells
    cdef uint64_t at = hole, home
    if change_kind(c) == KIND_BITMAP:
        changed.words -= 1
    else:
        changed.entries -= 1
    while True:
        at = (at + 1) & changed.mask
        if changed.cells[at].key == 0:
            break
        home = scatter(changed.cells[at].key) & changed.mask
        if ((at - home) & changed.mask) >= ((at - hole) & changed.mask):
            changed.cells[hole] = changed.cells[at]
            hole = at
    changed.cells[hole].key = 0


cdef int change_insert(ChangeSet *changed, uint32_t kind, uint64_t index, uint64_t committed) except -1 nogil:
    """A key that is not in it."""
    cdef uint64_t key = change_key(kind, index)
    cdef uint64_t at
    if 2 * (change_count(changed) + 1) > changed.mask:
        change_set_resize(changed, 2 * (changed.mask + 1))
    at = scatter(key) & changed.mask
    while changed.cells[at].key:
        at = (at + 1) & changed.mask
    changed.cells[at].key = key
    changed.cells[at].committed = committed
    if kind == KIND_BITMAP:
        changed.words += 1
    else:
        changed.entries += 1
    return 0


cdef int note_change(Engine e, uint32_t kind, uint64_t index, uint64_t value) except -1 nogil:
    """Remember the value that an entry had before its first change since the last commit began. A lazy one is promoted."""
    cdef uint64_t key = change_key(kind, index)
    cdef Change *c
    if change_find(&e.changes.running, key) != NULL:
        if not BUG(Bug.SECOND_CHANGE_NOT_LOGGED):
            log_touch(e, key)       # R22: a second change of what is pending
        return 0
    log_touch(e, key)
    c = change_find(&e.changes.lazy, key)
    if c != NULL:
        value = c.committed
        change_remove(&e.changes.lazy, c)
    if change_count(&e.changes.running) == 0:
        e.changes.running_since_ns = e.now_ns
    change_insert(&e.changes.running, kind, index, value)
    if kind == KIND_BITMAP and e.changes.lazy.entries:
        promote_entries_of(e, index)
    return 0


cdef inline uint64_t committed_value(Engine e, uint32_t kind, uint64_t index, uint64_t now) noexcept nogil:
    """The committed value of an entry whose value now is `now`."""
    cdef uint64_t key = change_key(kind, index)
    cdef Change *c = change_find(&e.changes.running if BUG(Bug.RUNNING_BEFORE_COMMITTING) else &e.changes.committing, key)
    if c == NULL:
        c = change_find(&e.changes.committing if BUG(Bug.RUNNING_BEFORE_COMMITTING) else &e.changes.running, key)
    if c == NULL and not BUG(Bug.LAZY_COUNTS_AS_COMMITTED):
        c = change_find(&e.changes.lazy, key)        # R16
    return now if c == NULL else c.committed


# --- the two maps -------------------------------------------------------------------------------------------------

cdef inline uint32_t slot_of(Engine e, uint64_t chunk) noexcept nogil:
    return <uint32_t>chunk if e.disk.raw else e.maps.table[chunk]


cdef int map_bits(Engine e, uint64_t first, uint64_t end, bint value) except -1 nogil:
    """Change presence bits, remembering what was committed."""
    cdef uint64_t word
    if e.base.absent:
        lower_base_absent(e, first, end)
    for word in range(first >> 6, ((end - 1) >> 6) + 1):
        note_change(e, KIND_BITMAP, word, e.maps.bitmap[word])
    bits_fill(e.maps.bitmap, first, end, value)
    return 0


cdef int map_slot(Engine e, uint64_t chunk, uint32_t slot) except -1 nogil:
    ensure(not e.disk.raw, "table change in the raw layout")
    note_change(e, KIND_TABLE, chunk, e.maps.table[chunk])
    e.maps.table[chunk] = slot
    return 0


cdef bint is_committed(Engine e, uint64_t chunk, uint64_t first, uint64_t end) noexcept nogil:
    """Whether the mapping of these blocks is durable already."""
    cdef uint64_t word
    if pending_count(e) == 0:
        return True
    if change_find(&e.changes.running, change_key(KIND_TABLE, chunk)) != NULL:
        return False
    if change_find(&e.changes.committing, change_key(KIND_TABLE, chunk)) != NULL and not BUG(Bug.COMMITTING_ENTRY_COUNTS_AS_COMMITTED):
        return False
    for word in range(first >> 6, ((end - 1) >> 6) + 1):
        if change_find(&e.changes.running, change_key(KIND_BITMAP, word)) != NULL:
            return False
        if change_find(&e.changes.committing, change_key(KIND_BITMAP, word)) != NULL:
            return False
    return True


cdef bint mapped_durably(Engine e, uint64_t chunk, uint32_t slot, uint64_t first, uint64_t end) noexcept nogil:
    """R38: whether the commits that are durable map these blocks, which are present, to this slot. If not, what was written there may have
    been lost with the flush or write-back that failed, and the slot shows what it held before it was this chunk's."""
    cdef uint64_t block = first, stop
    if uncommitted_count(e) == 0:
        return True
    if not e.disk.raw and committed_value(e, KIND_TABLE, chunk, slot) != slot:
        return False
    while block < end:
        stop = min(end, (block | 63) + 1)
        if ~committed_value(e, KIND_BITMAP, block >> 6, e.maps.bitmap[block >> 6]) & bits_mask(block, stop):
            return False
        block = stop
    return True


cdef inline uint64_t bits_mask(uint64_t first, uint64_t end) noexcept nogil:
    """The bits of blocks [first, end) in their word, which is one."""
    return (~<uint64_t>0 >> (64 - (end - first))) << (first & 63)
