# SPDX-License-Identifier: Apache-2.0
# Pools and buffers. Everything here is memory only; exhaustion of memory raises MemoryError.


cdef extern from *:
    """
    #include <stdlib.h>
    #include <string.h>
    static void *fvd_aligned(size_t size) { void *p = NULL; return posix_memalign(&p, 4096, size) ? NULL : p; }
    """
    void *aligned "fvd_aligned"(size_t size) nogil


cdef int broken(const char *what) except -1 nogil:
    """An invariant of ours does not hold: stop before anything more is written. Survives python -O."""
    with gil:
        raise RuntimeError("fvd engine invariant broken: " + what.decode())


cdef inline int ensure(bint holds, const char *what) except -1 nogil:
    if not holds:
        broken(what)
    return 0


cdef int out_of_memory() except -1 nogil:
    with gil:
        raise MemoryError("fvd engine")


# --- requests -----------------------------------------------------------------------------------------------------

cdef Request *request_new(Engine e) except NULL nogil:
    cdef Request *r = e.free_requests
    if r == NULL:
        r = <Request *>calloc(1, sizeof(Request))
        if r == NULL:
            out_of_memory()
    else:
        e.free_requests = r.next
        memset(r, 0, sizeof(Request))
    e.open_requests += 1
    return r


cdef inline void list_push(RequestList *where, Request *r) noexcept nogil:
    r.next = NULL
    if where.tail == NULL:
        where.head = r
    else:
        where.tail.next = r
    where.tail = r


cdef inline Request *list_take(RequestList *where) noexcept nogil:
    """The whole list, leaving it empty."""
    cdef Request *head = where.head
    where.head = NULL
    where.tail = NULL
    return head


# --- bounce buffers -----------------------------------------------------------------------------------------------

cdef uint8_t *bounce_take(Engine e, uint64_t size_bytes) except NULL nogil:
    cdef uint8_t *buffer
    e.bounce_used += size_bytes
    if size_bytes <= SPARE_BOUNCE_BYTES and e.spare_count:
        e.spare_count -= 1
        return e.spare_bounces[e.spare_count]
    buffer = <uint8_t *>aligned(size_bytes if size_bytes > SPARE_BOUNCE_BYTES else SPARE_BOUNCE_BYTES)
    if buffer == NULL:
        out_of_memory()
    return buffer


cdef void bounce_give(Engine e, uint8_t *buffer, uint64_t size_bytes) noexcept nogil:
    e.bounce_used -= size_bytes
    if size_bytes <= SPARE_BOUNCE_BYTES and e.spare_count < SPARE_BOUNCES:
        e.spare_bounces[e.spare_count] = buffer
        e.spare_count += 1
    else:
        free(buffer)


# --- device operations --------------------------------------------------------------------------------------------

cdef int ops_grow(Engine e) except -1 nogil:
    """One more slab of 256 operation records. Records never move: drains and jobs point at them."""
    cdef Op *slab = <Op *>calloc(256, sizeof(Op))
    cdef Op **slabs
    cdef uint32_t i
    if slab == NULL:
        out_of_memory()
    slabs = <Op **>realloc(e.slabs, (e.op_total / 256 + 1) * sizeof(Op *))
    if slabs == NULL:
        free(slab)
        out_of_memory()
    e.slabs = slabs
    slabs[e.op_total / 256] = slab
    for i in range(256):
        slab[i].index = e.op_total + i
        slab[i].next = e.free_ops
        e.free_ops = &slab[i]
    e.op_total += 256
    return 0


cdef Op *op_issue(Engine e, uint8_t what, uint8_t kind, uint8_t target, uint64_t offset_bytes, uint64_t length_bytes,
                  uint8_t *buffer, bint durable) except NULL nogil:
    """Put one operation on the outgoing batch and return its record."""
    cdef Op *op
    cdef DeviceOp *out
    cdef uint32_t generation, index
    if e.free_ops == NULL:
        ops_grow(e)
    if e.op_count == e.op_capacity:
        out = <DeviceOp *>realloc(e.ops, 2 * e.op_capacity * sizeof(DeviceOp))
        if out == NULL:
            out_of_memory()
        e.ops = out
        e.op_capacity *= 2
    op = e.free_ops
    e.free_ops = op.next
    generation = op.generation
    index = op.index
    memset(op, 0, sizeof(Op))
    op.index = index
    op.generation = generation + 1
    op.busy = 1
    op.what = what
    op.target = target
    op.buffer = buffer
    op.offset_bytes = offset_bytes
    op.length_bytes = length_bytes
    e.op_number += 1
    op.number = e.op_number
    out = &e.ops[e.op_count]
    out.token = (<uint64_t>op.generation << 32) | op.index
    out.offset_bytes = offset_bytes
    out.length_bytes = length_bytes
    out.buffer = buffer
    out.kind = kind
    out.target = target
    out.durable = durable
    e.op_count += 1
    e.inflight_ops += 1
    if durable or kind == OP_FLUSH:
        op.durable = 1
        op.older = e.newest_durable
        if op.older != NULL:
            op.older.newer = op
        else:
            e.oldest_durable = op
        e.newest_durable = op
        log_durability(e, 1)
    if target == TARGET_STORAGE and (kind == OP_WRITE or kind == OP_ZERO):
        e.stat_device_writes += kind == OP_WRITE
        # Just before writing: nothing may leave the regions it belongs to.
        ensure(length_bytes > 0 and ((offset_bytes | length_bytes) & e.align_mask) == 0, "unaligned device write")
        ensure(offset_bytes + length_bytes <= e.storage_size, "write past the end of storage")
        ensure((offset_bytes >= e.data_offset) == (what != WHAT_JOURNAL and what != WHAT_MAP), "write in a foreign region")
    elif kind == OP_READ:
        if target == TARGET_BASE:
            e.stat_base_reads += 1
            e.base_inflight += 1
        else:
            e.stat_device_reads += 1
    elif kind == OP_FLUSH:
        e.stat_device_flushes += 1
    return op


cdef inline void op_list(Engine e, Op *op, bint is_write) noexcept nogil:
    """Guest data in flight on storage: drains look for it."""
    op.is_write = is_write
    op.listed = 1
    op.previous = NULL
    op.next = e.inflight
    if e.inflight != NULL:
        e.inflight.previous = op
    e.inflight = op


cdef inline void op_unlist(Engine e, Op *op) noexcept nogil:
    if op.previous != NULL:
        op.previous.next = op.next
    else:
        e.inflight = op.next
    if op.next != NULL:
        op.next.previous = op.previous
    op.listed = 0


# --- chunks with something under way ------------------------------------------------------------------------------

cdef inline Busy *busy_find(Engine e, uint64_t chunk) noexcept nogil:
    cdef Busy *b = e.buckets[chunk & (BUCKETS - 1)]
    while b != NULL and b.chunk != chunk:
        b = b.next
    return b


cdef Busy *busy_get(Engine e, uint64_t chunk) except NULL nogil:
    cdef Busy *b = busy_find(e, chunk)
    if b == NULL:
        b = <Busy *>calloc(1, sizeof(Busy))
        if b == NULL:
            out_of_memory()
        b.chunk = chunk
        b.slot = EMPTY
        b.next = e.buckets[chunk & (BUCKETS - 1)]
        e.buckets[chunk & (BUCKETS - 1)] = b
        e.busy_count += 1
    return b


cdef void busy_free(Engine e, Busy *b) noexcept nogil:
    cdef Busy **link = &e.buckets[b.chunk & (BUCKETS - 1)]
    while link[0] != b:
        link = &link[0].next
    link[0] = b.next
    e.busy_count -= 1
    free(b)


# --- changes ------------------------------------------------------------------------------------------------------

cdef inline uint64_t change_key(uint32_t kind, uint64_t index) noexcept nogil:
    return ((<uint64_t>kind << 56) | index) + 1


cdef inline uint64_t scatter(uint64_t key) noexcept nogil:
    key *= 0x9E3779B97F4A7C15ULL
    return key ^ (key >> 29)


cdef inline Change *delta_find(Delta *d, uint64_t key) noexcept nogil:
    cdef uint64_t at
    if d.words + d.entries == 0:
        return NULL
    at = scatter(key) & d.mask
    while d.cells[at].key != 0:
        if d.cells[at].key == key:
            return &d.cells[at]
        at = (at + 1) & d.mask
    return NULL


cdef int delta_resize(Delta *d, uint64_t capacity) except -1 nogil:
    cdef Change *old = d.cells
    cdef uint64_t i, at, old_capacity = d.mask + 1
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
    d.cells = cells
    d.mask = capacity - 1
    return 0


cdef void delta_clear(Delta *d) noexcept nogil:
    memset(d.cells, 0, (d.mask + 1) * sizeof(Change))
    d.words = 0
    d.entries = 0


cdef void delta_remove(Delta *d, Change *c) noexcept nogil:
    """Linear probing: those behind it that could not be found any more move up."""
    cdef uint64_t hole = c - d.cells
    cdef uint64_t at = hole, home
    if (c.key - 1) >> 56 == KIND_BITMAP:
        d.words -= 1
    else:
        d.entries -= 1
    while True:
        at = (at + 1) & d.mask
        if d.cells[at].key == 0:
            break
        home = scatter(d.cells[at].key) & d.mask
        if ((at - home) & d.mask) >= ((at - hole) & d.mask):
            d.cells[hole] = d.cells[at]
            hole = at
    d.cells[hole].key = 0


cdef int delta_insert(Delta *d, uint32_t kind, uint64_t index, uint64_t committed) except -1 nogil:
    """A key that is not in it."""
    cdef uint64_t key = change_key(kind, index)
    cdef uint64_t at
    if 2 * (d.words + d.entries + 1) > d.mask:
        delta_resize(d, 2 * (d.mask + 1))
    at = scatter(key) & d.mask
    while d.cells[at].key:
        at = (at + 1) & d.mask
    d.cells[at].key = key
    d.cells[at].committed = committed
    if kind == KIND_BITMAP:
        d.words += 1
    else:
        d.entries += 1
    return 0


cdef int delta_note(Engine e, uint32_t kind, uint64_t index, uint64_t value) except -1 nogil:
    """Remember the value that an entry had before its first change since the last freeze. What was soft of it becomes hard."""
    cdef uint64_t key = change_key(kind, index)
    cdef Change *c
    if delta_find(&e.open, key) != NULL:
        if not BUG(Bug.SECOND_CHANGE_NOT_LOGGED):
            log_touch(e, key)       # R22: a second change of what is pending
        return 0
    log_touch(e, key)
    c = delta_find(&e.soft, key)
    if c != NULL:
        value = c.committed
        delta_remove(&e.soft, c)
    if e.open.words + e.open.entries == 0:
        e.open_since_ns = e.now_ns
    delta_insert(&e.open, kind, index, value)
    if kind == KIND_BITMAP and e.soft.entries:
        word_hardened(e, index)
    return 0


cdef inline uint64_t changes(Delta *d) noexcept nogil:
    return d.words + d.entries


cdef inline uint64_t delta_bytes(Delta *d) noexcept nogil:
    return d.words * WORD_RECORD_BYTES + d.entries * ENTRY_RECORD_BYTES


cdef inline uint64_t committed_value(Engine e, uint32_t kind, uint64_t index, uint64_t now) noexcept nogil:
    """The committed value of an entry whose value now is `now`."""
    cdef uint64_t key = change_key(kind, index)
    cdef Change *c = delta_find(&e.open if BUG(Bug.OPEN_BEFORE_FROZEN) else &e.frozen, key)
    if c == NULL:
        c = delta_find(&e.frozen if BUG(Bug.OPEN_BEFORE_FROZEN) else &e.open, key)
    if c == NULL and not BUG(Bug.SOFT_COUNTS_AS_COMMITTED):
        c = delta_find(&e.soft, key)        # R16
    return now if c == NULL else c.committed


# --- the two maps -------------------------------------------------------------------------------------------------

cdef inline uint32_t slot_of(Engine e, uint64_t chunk) noexcept nogil:
    return <uint32_t>chunk if e.raw else e.table[chunk]


cdef int map_bits(Engine e, uint64_t first, uint64_t end, bint value) except -1 nogil:
    """Change presence bits, remembering what was committed."""
    cdef uint64_t word
    if e.base_absent:
        base_covered(e, first, end)
    for word in range(first >> 6, ((end - 1) >> 6) + 1):
        delta_note(e, KIND_BITMAP, word, e.bitmap[word])
    bits_fill(e.bitmap, first, end, value)
    return 0


cdef int map_slot(Engine e, uint64_t chunk, uint32_t slot) except -1 nogil:
    ensure(not e.raw, "table change in the raw layout")
    delta_note(e, KIND_TABLE, chunk, e.table[chunk])
    e.table[chunk] = slot
    return 0


cdef bint is_committed(Engine e, uint64_t chunk, uint64_t first, uint64_t end) noexcept nogil:
    """Whether the mapping of these blocks is durable already."""
    cdef uint64_t word
    if e.open.words + e.open.entries + e.frozen.words + e.frozen.entries == 0:
        return True
    if delta_find(&e.open, change_key(KIND_TABLE, chunk)) != NULL:
        return False
    if delta_find(&e.frozen, change_key(KIND_TABLE, chunk)) != NULL and not BUG(Bug.FROZEN_ENTRY_COUNTS_AS_COMMITTED):
        return False
    for word in range(first >> 6, ((end - 1) >> 6) + 1):
        if delta_find(&e.open, change_key(KIND_BITMAP, word)) != NULL:
            return False
        if delta_find(&e.frozen, change_key(KIND_BITMAP, word)) != NULL:
            return False
    return True


cdef bint mapped_durably(Engine e, uint64_t chunk, uint32_t slot, uint64_t first, uint64_t end) noexcept nogil:
    """R38: whether the commits that are durable map these blocks, which are present, to this slot. If not, what was written there may have
    been lost with the flush or write-back that failed, and the slot shows what it held before it was this chunk's."""
    cdef uint64_t block = first, stop
    if changes(&e.open) + changes(&e.frozen) + changes(&e.soft) == 0:
        return True
    if not e.raw and committed_value(e, KIND_TABLE, chunk, slot) != slot:
        return False
    while block < end:
        stop = min(end, (block | 63) + 1)
        if ~committed_value(e, KIND_BITMAP, block >> 6, e.bitmap[block >> 6]) & bits_mask(block, stop):
            return False
        block = stop
    return True


cdef inline uint64_t bits_mask(uint64_t first, uint64_t end) noexcept nogil:
    """The bits of blocks [first, end) in their word, which is one."""
    return (~<uint64_t>0 >> (64 - (end - first))) << (first & 63)
