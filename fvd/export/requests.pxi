# SPDX-License-Identifier: Apache-2.0
# Requests: what NBD asks becomes a request to a backend, and what that answers becomes a reply. It knows no socket.
#
# Offers: begin_request, reply_to_done, submit_write
# Needs: connections: list_push; payloads: free_record, give_payload, new_record, record_of, release_payload;
#   rings: ring_part_ended

cdef int begin_request(NbdLoop loop, Connection *connection, const Request *request) except -1 nogil:
    cdef RequestRecord *record = new_record(loop, connection)
    cdef Export *export = connection.export
    cdef uint32_t flags = FLAG_FUA if request.flags & COMMAND_FLAG_FUA else 0
    cdef uint64_t length = request.length_bytes
    loop.last_request_ns = loop.now_ns
    connection.begun_total += 1
    record.request = request[0]
    if request.error:
        return reply_error(loop, record, request.error)
    if request.command == COMMAND_READ:
        export.counts.reads += 1
        if not give_payload(loop, record, length):
            return finish_request(loop, record, -ENOMEM, 0)
        return submit_request(loop, record, REQUEST_READ, 0, record.payload)
    if request.command == COMMAND_WRITE:
        export.counts.writes += 1
        connection.large = length >= LARGE_BYTES
        if not give_payload(loop, record, length):
            wire_step(&connection.wire, ON_NO_MEMORY)
            return finish_request(loop, record, -ENOMEM, 0)
        connection.filling = record
        return 0
    if request.command == COMMAND_FLUSH:
        export.counts.flushes += 1
        return submit_request(loop, record, REQUEST_FLUSH, 0, NULL)
    if request.command == COMMAND_TRIM:
        export.counts.trims += 1
        return submit_request(loop, record, REQUEST_TRIM, flags, NULL)
    if request.command == COMMAND_WRITE_ZEROES:
        export.counts.zeroes += 1
        return submit_request(loop, record, REQUEST_ZERO, flags | (FLAG_NO_HOLE if request.flags & COMMAND_FLAG_NO_HOLE else 0), NULL)
    if request.command == COMMAND_BLOCK_STATUS:
        export.block_statuses += 1
        return reply_status(loop, record)
    export.caches += 1
    return finish_request(loop, record, 0, 0)      # COMMAND_CACHE is a hint that we do not take


cdef int submit_write(NbdLoop loop, Connection *connection) except -1 nogil:
    cdef RequestRecord *record = connection.filling
    connection.filling = NULL
    connection.export.counts.written_bytes += record.request.length_bytes
    return submit_request(loop, record, REQUEST_WRITE, FLAG_FUA if record.request.flags & COMMAND_FLAG_FUA else 0, record.payload)


cdef int submit_request(NbdLoop loop, RequestRecord *record, uint32_t kind, uint32_t flags, uint8_t *buffer) except -1 nogil:
    cdef Export *export = record.connection.export
    if not export.live or export.closing:
        return finish_request(loop, record, -ESHUTDOWN, 0)
    export.open_requests += 1
    touch(loop, export)
    return (<Backend>export.backend).submit(kind, flags, record.request.offset_bytes, record.request.length_bytes, buffer,
                                            <uint64_t>record.connection.number << 32 | record.number)


cdef int reply_status(NbdLoop loop, RequestRecord *record) except -1 nogil:
    cdef Export *export = record.connection.export
    cdef int capacity = 1 if record.request.flags & COMMAND_FLAG_REQ_ONE else STATUS_EXTENTS
    cdef int i, count, kept = 0
    cdef uint32_t flags, last_flags = 0
    cdef uint64_t last_bytes = 0
    if not export.live or export.closing:
        return finish_request(loop, record, -ESHUTDOWN, 0)
    count = (<Backend>export.backend).extents(record.request.offset_bytes, record.request.length_bytes, loop.scratch, capacity)
    if count <= 0:
        return finish_request(loop, record, -EIO, 0)
    if not give_payload(loop, record, STATUS_HEAD_BYTES + STATUS_EXTENT_BYTES * count):
        return finish_request(loop, record, -ENOMEM, 0)
    for i in range(count):
        flags = STATUS_HOLE | STATUS_ZERO if loop.scratch[i].state == EXTENT_ZERO else 0
        if kept and flags == last_flags:
            last_bytes += loop.scratch[i].length_bytes      # engine extents that differ may look the same to NBD
        else:
            last_bytes = loop.scratch[i].length_bytes
            kept += 1
        last_flags = flags
        put_status_extent(record.payload + STATUS_HEAD_BYTES + STATUS_EXTENT_BYTES * (kept - 1), <uint32_t>last_bytes, flags)
    put_status_head(record.payload, record.request.cookie, kept)
    return reply(loop, record, record.payload, STATUS_HEAD_BYTES + STATUS_EXTENT_BYTES * kept)


cdef int finish_request(NbdLoop loop, RequestRecord *record, int32_t result, uint32_t flags) except -1 nogil:
    """A request ended: make its reply."""
    cdef Connection *connection = record.connection
    cdef Request *request = &record.request
    cdef uint64_t length = request.length_bytes
    if result == -ESHUTDOWN and connection.handed_over:
        free_record(loop, record)
        if connection.state != CONNECTION_DEAD:
            list_push(loop, LIST_SEND, connection)    # it may have been the last
        return 0
    if result:
        return reply_error(loop, record, nbd_error(result))
    if request.command != COMMAND_READ:
        release_payload(loop, record)
        put_simple(record.head, request.cookie, 0)
        return reply(loop, record, record.head, SIMPLE_HEAD_BYTES)
    connection.export.counts.read_bytes += length
    if not connection.limits.structured:
        put_simple(record.payload - SIMPLE_HEAD_BYTES, request.cookie, 0)
        return reply(loop, record, record.payload - SIMPLE_HEAD_BYTES, SIMPLE_HEAD_BYTES + length)
    if flags & DONE_ALL_ZERO:
        release_payload(loop, record)
        put_hole(record.head, request.cookie, request.offset_bytes, request.length_bytes)
        return reply(loop, record, record.head, HOLE_CHUNK_BYTES)
    put_data_head(record.payload - DATA_HEAD_BYTES, request.cookie, request.offset_bytes, request.length_bytes)
    return reply(loop, record, record.payload - DATA_HEAD_BYTES, DATA_HEAD_BYTES + length)


cdef int reply_error(NbdLoop loop, RequestRecord *record, uint32_t error) except -1 nogil:
    record.connection.export.counts.errors += 1
    release_payload(loop, record)
    if record.connection.limits.structured:
        put_error(record.head, record.request.cookie, error)
        return reply(loop, record, record.head, ERROR_CHUNK_BYTES)
    put_simple(record.head, record.request.cookie, error)
    return reply(loop, record, record.head, SIMPLE_HEAD_BYTES)


cdef int reply(NbdLoop loop, RequestRecord *record, uint8_t *out, uint64_t out_bytes) except -1 nogil:
    cdef Connection *connection = record.connection
    if connection.state == CONNECTION_DEAD:
        free_record(loop, record)
        return 0
    record.out = out
    record.out_bytes = out_bytes
    record.next = NULL
    if connection.last_reply == NULL:
        connection.first_reply = record
    else:
        connection.last_reply.next = record
    connection.last_reply = record
    list_push(loop, LIST_SEND, connection)
    return 0


cdef int reply_to_done(NbdLoop loop, Export *export) except -1 nogil:
    """Make replies of what the engine finished."""
    cdef Done *done = NULL
    cdef uint32_t i, count = (<Backend>export.backend).take_done(&done)
    for i in range(count):
        if done[i].cookie >> 32 == INTERNAL:
            export.answered = 1
            export.answer = done[i].error
            continue
        export.open_requests -= 1
        if done[i].cookie & RING_COOKIE:
            ring_part_ended(loop, done[i].cookie, done[i].error)
            continue
        finish_request(loop, record_of(loop, <uint32_t>done[i].cookie), done[i].error, done[i].flags)
    return 0
