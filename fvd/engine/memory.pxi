# SPDX-License-Identifier: Apache-2.0
# Pools and buffers, and the chunks in which something is under way. Exhaustion of memory raises MemoryError.
#
# Offers: active_find, active_free, active_get, bounce_give, bounce_take, ensure, list_push, list_take, op_issue, op_list, op_unlist,
#   out_of_memory, request_new
# Needs: log: log_durability


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
    cdef Request *r = e.pools.free_requests
    if r == NULL:
        r = <Request *>calloc(1, sizeof(Request))
        if r == NULL:
            out_of_memory()
    else:
        e.pools.free_requests = r.next
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
    e.pools.bounce_used += size_bytes
    if size_bytes <= SPARE_BOUNCE_BYTES and e.pools.spare_count:
        e.pools.spare_count -= 1
        return e.pools.spare_bounces[e.pools.spare_count]
    buffer = <uint8_t *>aligned(size_bytes if size_bytes > SPARE_BOUNCE_BYTES else SPARE_BOUNCE_BYTES)
    if buffer == NULL:
        out_of_memory()
    return buffer


cdef void bounce_give(Engine e, uint8_t *buffer, uint64_t size_bytes) noexcept nogil:
    e.pools.bounce_used -= size_bytes
    if size_bytes <= SPARE_BOUNCE_BYTES and e.pools.spare_count < SPARE_BOUNCES:
        e.pools.spare_bounces[e.pools.spare_count] = buffer
        e.pools.spare_count += 1
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
    slabs = <Op **>realloc(e.pools.slabs, (e.pools.op_total / 256 + 1) * sizeof(Op *))
    if slabs == NULL:
        free(slab)
        out_of_memory()
    e.pools.slabs = slabs
    slabs[e.pools.op_total / 256] = slab
    for i in range(256):
        slab[i].index = e.pools.op_total + i
        slab[i].next = e.pools.free_ops
        e.pools.free_ops = &slab[i]
    e.pools.op_total += 256
    return 0


cdef Op *op_issue(Engine e, uint8_t purpose, uint8_t kind, uint8_t target, uint64_t offset_bytes, uint64_t length_bytes,
                  uint8_t *buffer, bint durable) except NULL nogil:
    """Put one operation on the outgoing batch and return its record."""
    cdef Op *op
    cdef DeviceOp *out
    cdef uint32_t generation, index
    if e.pools.free_ops == NULL:
        ops_grow(e)
    if e.op_count == e.pools.op_capacity:
        out = <DeviceOp *>realloc(e.ops, 2 * e.pools.op_capacity * sizeof(DeviceOp))
        if out == NULL:
            out_of_memory()
        e.ops = out
        e.pools.op_capacity *= 2
    op = e.pools.free_ops
    e.pools.free_ops = op.next
    generation = op.generation
    index = op.index
    memset(op, 0, sizeof(Op))
    op.index = index
    op.generation = generation + 1
    op.busy = 1
    op.purpose = purpose
    op.target = target
    op.buffer = buffer
    op.offset_bytes = offset_bytes
    op.length_bytes = length_bytes
    e.flight.number += 1
    op.number = e.flight.number
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
        op.older = e.durable.newest
        if op.older != NULL:
            op.older.newer = op
        else:
            e.durable.oldest = op
        e.durable.newest = op
        log_durability(e, 1)
    if target == TARGET_STORAGE and (kind == OP_WRITE or kind == OP_ZERO):
        e.count.device_writes += kind == OP_WRITE
        # Just before writing: nothing may leave the regions it belongs to.
        ensure(length_bytes > 0 and ((offset_bytes | length_bytes) & e.disk.align_mask) == 0, "unaligned device write")
        ensure(offset_bytes + length_bytes <= e.disk.storage_size, "write past the end of storage")
        ensure((offset_bytes >= e.disk.data_offset) == (purpose != PURPOSE_JOURNAL and purpose != PURPOSE_MAP), "write in a foreign region")
    elif kind == OP_READ:
        if target == TARGET_BASE:
            e.count.base_reads += 1
            e.base.inflight += 1
        else:
            e.count.device_reads += 1
    elif kind == OP_FLUSH:
        e.count.device_flushes += 1
    return op


cdef inline void op_list(Engine e, Op *op, bint is_write) noexcept nogil:
    """Guest data in flight on storage: drains look for it."""
    op.is_write = is_write
    op.listed = 1
    op.previous = NULL
    op.next = e.flight.first
    if e.flight.first != NULL:
        e.flight.first.previous = op
    e.flight.first = op


cdef inline void op_unlist(Engine e, Op *op) noexcept nogil:
    if op.previous != NULL:
        op.previous.next = op.next
    else:
        e.flight.first = op.next
    if op.next != NULL:
        op.next.previous = op.previous
    op.listed = 0


# --- chunks with something under way ------------------------------------------------------------------------------

cdef inline ActiveChunk *active_find(Engine e, uint64_t chunk) noexcept nogil:
    cdef ActiveChunk *active = e.active_chunks.buckets[chunk & (BUCKETS - 1)]
    while active != NULL and active.chunk != chunk:
        active = active.next
    return active


cdef ActiveChunk *active_get(Engine e, uint64_t chunk) except NULL nogil:
    cdef ActiveChunk *active = active_find(e, chunk)
    if active == NULL:
        active = <ActiveChunk *>calloc(1, sizeof(ActiveChunk))
        if active == NULL:
            out_of_memory()
        active.chunk = chunk
        active.slot = EMPTY
        active.next = e.active_chunks.buckets[chunk & (BUCKETS - 1)]
        e.active_chunks.buckets[chunk & (BUCKETS - 1)] = active
        e.active_chunks.count += 1
    return active


cdef void active_free(Engine e, ActiveChunk *active) noexcept nogil:
    cdef ActiveChunk **link = &e.active_chunks.buckets[active.chunk & (BUCKETS - 1)]
    while link[0] != active:
        link = &link[0].next
    link[0] = active.next
    e.active_chunks.count -= 1
    free(active)
