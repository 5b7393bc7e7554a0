# SPDX-License-Identifier: Apache-2.0
# What requests hold: a record each, a buffer for data, and the account of both for each connection, peer and the server. It knows no
# request's meaning.
#
# Offers: beyond, free_record, give_payload, new_record, record_of, release_payload, share
# Needs: buffers: class_of, pool_fresh, pool_give, pool_trim, pool_warm

cdef struct RequestRecord:          # one request of a client
    uint8_t head[36]                # the whole reply, when it carries no data
    uint8_t *out                    # the reply, while it waits to be sent
    uint64_t out_bytes
    RequestRecord *next             # in the connection's replies, or in the free list
    Connection *connection
    uint8_t *payload
    uint64_t data_bytes
    Request request
    uint32_t number
    uint8_t payload_class


cdef uint64_t share(uint64_t cost, uint64_t waiting, uint64_t data) noexcept nogil:
    """How much of `cost` belongs to the waiting ones of so many bytes of data: a small write costs more than its bytes."""
    if waiting == 0 or data == 0:
        return 0
    return cost if waiting >= data else <uint64_t>(<double>cost * <double>waiting / <double>data)


cdef inline uint64_t beyond(uint64_t held, uint64_t bound) noexcept nogil:
    return held - bound if held > bound else 0


cdef RequestRecord *record_of(NbdLoop loop, uint32_t number) noexcept nogil:
    return &loop.slabs[number // RECORDS_PER_SLAB][number % RECORDS_PER_SLAB]


cdef RequestRecord *new_record(NbdLoop loop, Connection *connection) except NULL nogil:
    cdef RequestRecord **grown
    cdef RequestRecord *slab
    cdef int i
    if loop.free_records == NULL:
        grown = <RequestRecord **>realloc(loop.slabs, (loop.slab_count + 1) * sizeof(RequestRecord *))
        if grown != NULL:
            loop.slabs = grown
        slab = <RequestRecord *>calloc(RECORDS_PER_SLAB, sizeof(RequestRecord))
        if grown == NULL or slab == NULL:
            with gil:
                raise MemoryError
        loop.slabs[loop.slab_count] = slab
        for i in range(RECORDS_PER_SLAB):
            slab[i].number = loop.slab_count * RECORDS_PER_SLAB + i
            slab[i].next = loop.free_records
            loop.free_records = &slab[i]
        loop.slab_count += 1
    cdef RequestRecord *record = loop.free_records
    loop.free_records = record.next
    record.connection = connection
    record.payload = NULL
    record.payload_class = NO_CLASS
    record.data_bytes = 0
    connection.records += 1
    charge(loop, connection, PAGE)       # requests without data count too: a flood of flushes is bounded
    return record


cdef inline void charge(NbdLoop loop, Connection *connection, int64_t bytes) noexcept nogil:
    """A connection holds so much more memory, or less."""
    cdef uint64_t over = beyond(connection.inflight_bytes, loop.share_cap)
    connection.inflight_bytes += <uint64_t>bytes
    loop.inflight_bytes += <uint64_t>bytes
    over = beyond(connection.inflight_bytes, loop.share_cap) - over
    connection.peer.over_bytes += over
    loop.over_bytes += over


cdef bint give_payload(NbdLoop loop, RequestRecord *record, uint64_t size_bytes) noexcept nogil:
    """A page-aligned buffer with a page before it for the reply's head. False: no memory."""
    cdef uint8_t kind = class_of(size_bytes)
    cdef uint64_t capacity = <uint64_t>PAGE << kind
    cdef uint8_t *payload = pool_warm(&loop.pool, kind)
    if payload == NULL:
        # What is kept for later counts too.
        if loop.pool.warm_bytes + loop.inflight_bytes + capacity > loop.total_cap:
            pool_trim(&loop.pool, beyond(loop.total_cap, loop.inflight_bytes + capacity))
        payload = pool_fresh(&loop.pool, kind)
        if payload == NULL:
            return False
    record.payload = payload
    record.payload_class = kind
    record.data_bytes = size_bytes
    record.connection.data_bytes += size_bytes
    loop.data_bytes += size_bytes
    charge(loop, record.connection, <int64_t>capacity)
    return True


cdef void release_payload(NbdLoop loop, RequestRecord *record) noexcept nogil:
    """As soon as the reply needs it no longer: it may be long until that is taken."""
    cdef uint64_t capacity
    if record.payload == NULL:
        return
    capacity = <uint64_t>PAGE << record.payload_class
    pool_give(&loop.pool, record.payload, record.payload_class)
    record.payload = NULL
    record.connection.data_bytes -= record.data_bytes
    loop.data_bytes -= record.data_bytes
    record.data_bytes = 0
    charge(loop, record.connection, -<int64_t>capacity)


cdef void free_record(NbdLoop loop, RequestRecord *record) noexcept nogil:
    release_payload(loop, record)
    loop.freed = True
    record.connection.records -= 1
    charge(loop, record.connection, -PAGE)
    record.next = loop.free_records
    loop.free_records = record
