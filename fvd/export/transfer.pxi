# SPDX-License-Identifier: Apache-2.0
# Bytes of the clients' sockets: received and cut into requests, and replies sent. It knows neither backends nor what a request does.
#
# Offers: receive, send_all
# Needs: admission: admit; connections: list_push, list_take, move_connection; payloads: free_record; requests: begin_request,
#   submit_write

cdef enum Verdict:
    NEEDS_BYTES = 0
    PAUSED = 1
    SHARE_USED = 2
    CLOSED = 3


cdef int receive(NbdLoop loop, Connection *connection) except -1 nogil:
    """Take what a connection sent, up to its share of this turn."""
    cdef uint32_t requests = REQUESTS_PER_TURN
    cdef int64_t capacity = BYTES_PER_TURN, count
    cdef int verdict
    while True:
        verdict = parse(loop, connection, &requests)
        if verdict == CLOSED:
            return move_connection(loop, connection, CLIENT_ENDS)
        if verdict == PAUSED:
            list_push(loop, LIST_PAUSED, connection)
            return 0
        if verdict == SHARE_USED or (capacity <= 0 and connection.input != INPUT_EMPTY):
            list_push(loop, LIST_READY, connection)
            return 0
        if connection.input == INPUT_EMPTY:
            return 0
        count = fill(loop, connection)
        if count < 0:
            return move_connection(loop, connection, CONNECTION_BREAKS)
        capacity -= count


cdef int64_t fill(NbdLoop loop, Connection *connection) except? -1 nogil:
    """Receive once: the rest of a write's data straight into its buffer, what follows into the receive buffer. Returns how many
    bytes; negative: the connection is broken."""
    cdef iovec[2] parts
    cdef msghdr message
    cdef RequestRecord *record = connection.filling
    cdef uint32_t direct = 0
    cdef uint32_t capacity = HEADERS_BYTES if connection.large else RECEIVE_BYTES
    cdef ssize_t count
    if connection.begin:
        connection.end -= connection.begin
        memmove(connection.buffer, connection.buffer + connection.begin, connection.end)
        connection.begin = 0
    memset(&message, 0, sizeof(message))
    message.msg_iov = parts
    if connection.wire.state == WIRE_PAYLOAD:
        direct = connection.wire.left
        parts[0].iov_base = record.payload + (record.request.length_bytes - direct)
        parts[0].iov_len = direct
        message.msg_iovlen = 1
    parts[message.msg_iovlen].iov_base = connection.buffer + connection.end
    parts[message.msg_iovlen].iov_len = capacity - connection.end
    message.msg_iovlen += 1
    count = recvmsg(connection.fd, &message, MSG_DONTWAIT)
    if count < 0:
        if errno == EINTR:
            return 0
        if errno != EAGAIN:
            return -2
        connection.input = INPUT_EMPTY
        return 0
    if count == 0:
        wire_step(&connection.wire, ON_END)
        return 0
    if count < <ssize_t>(direct + capacity - connection.end) and connection.input == INPUT_READY:
        connection.input = INPUT_EMPTY
    connection.received_total += <uint64_t>count
    direct = <uint32_t>min(<uint64_t>count, <uint64_t>direct)
    connection.end += <uint32_t>count - direct
    if direct and take_data(&connection.wire, direct):
        submit_write(loop, connection)
    return count


cdef int parse(NbdLoop loop, Connection *connection, uint32_t *requests) except -1 nogil:
    """Turn received bytes into requests. Returns a Verdict."""
    cdef Wire *wire = &connection.wire
    cdef RequestRecord *record
    cdef Request request
    cdef uint32_t size
    while True:
        size = connection.end - connection.begin
        if wire.state == WIRE_HEADER:
            if size < REQUEST_BYTES:
                return NEEDS_BYTES
            if requests[0] == 0:
                return SHARE_USED
            if not admit(loop, connection):
                return PAUSED
            take_header(wire, &connection.limits, connection.buffer + connection.begin, &request)
            connection.begin += REQUEST_BYTES
            if wire.state != WIRE_CLOSED:
                requests[0] -= 1
                begin_request(loop, connection, &request)
            elif request.command != COMMAND_DISCONNECT:
                loop.endings[ENDING_GARBAGE] += 1
                loop.attention |= ATTENTION_TICK
            continue
        if wire.state == WIRE_CLOSED:
            return CLOSED
        if size == 0:
            return NEEDS_BYTES
        size = min(size, wire.left)
        record = connection.filling
        if wire.state == WIRE_PAYLOAD:
            memcpy(record.payload + (record.request.length_bytes - wire.left), connection.buffer + connection.begin, size)
        connection.begin += size
        if take_data(wire, size) and record != NULL:
            submit_write(loop, connection)


cdef int send_all(NbdLoop loop) except -1 nogil:
    cdef Connection *connection = list_take(loop, LIST_SEND)
    cdef Connection *next
    while connection != NULL:
        next = connection.next[LIST_SEND]
        connection.listed[LIST_SEND] = 0
        if connection.state != CONNECTION_DEAD and not connection.blocked:
            send(loop, connection)
        connection = next
    return 0


cdef int send(NbdLoop loop, Connection *connection) except -1 nogil:
    cdef iovec[REPLIES_PER_SEND] parts
    cdef msghdr message
    cdef RequestRecord *record
    cdef uint64_t skip, asked
    cdef ssize_t count
    memset(&message, 0, sizeof(message))
    message.msg_iov = parts
    while connection.first_reply != NULL:
        record = connection.first_reply
        skip = connection.sent
        asked = 0
        message.msg_iovlen = 0
        while record != NULL and message.msg_iovlen < REPLIES_PER_SEND:
            parts[message.msg_iovlen].iov_base = record.out + skip
            parts[message.msg_iovlen].iov_len = record.out_bytes - skip
            asked += record.out_bytes - skip
            skip = 0
            message.msg_iovlen += 1
            record = record.next
        count = sendmsg(connection.fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL)
        if count < 0:
            if errno == EINTR:
                continue
            if errno != EAGAIN:
                return move_connection(loop, connection, CONNECTION_BREAKS)
            count = 0
        connection.sent += <uint64_t>count
        connection.sent_total += <uint64_t>count
        while connection.first_reply != NULL and connection.sent >= connection.first_reply.out_bytes:
            record = connection.first_reply
            connection.sent -= record.out_bytes
            connection.first_reply = record.next
            free_record(loop, record)
        if <uint64_t>count < asked:
            connection.blocked = 1
            return loop.queue.want_write(connection.watch)
    connection.last_reply = NULL
    if connection.state == CONNECTION_ENDING and connection.records == 0:
        return move_connection(loop, connection, ALL_ANSWERED)
    return 0
