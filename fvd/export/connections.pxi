# SPDX-License-Identifier: Apache-2.0
# Connections: what each may do, what moves it, in which lists it is, whose it is. It knows no request but as a record that refers to it.
#
# Offers: cancel_waiting_requests, close_connection, end_if_stalled, find_peer, free_dead, list_push, list_take, move_connection,
#   note_readable
# Needs: payloads: free_record
#
# state       reads   answers   what moves it                                                            to
# OPEN        yes     yes       CLIENT_ENDS: goodbye, the end of its stream, or what is no request       ENDING
#                               SERVER_ENDS: as that, but what this cuts short gets no answer            ENDING
#                               CONNECTION_BREAKS: its socket fails, it stalls, it is dropped            DEAD
# ENDING      no      yes       ALL_ANSWERED: nothing of it is under way any more                        DEAD
#                               CONNECTION_BREAKS: as above, or LINGER_NS are over                       DEAD
# DEAD        no      no        has no socket; free_dead frees it when the engine has ended its requests
#
# Whoever leaves OPEN gets an error for what waits for storage or its base; whoever becomes DEAD gets nothing any more.

cdef int64_t LINGER_NS = 10000000000    # a client that hung up or said goodbye has this long to take the rest of its replies
cdef uint64_t CONNECTION_MASK = <uint64_t>0xFFFFFFFF << 32

cdef enum ConnectionState:
    CONNECTION_OPEN = 0
    CONNECTION_ENDING = 1
    CONNECTION_DEAD = 2
    CONNECTION_STATES = 3

cdef enum ConnectionEvent:
    CLIENT_ENDS = 0
    SERVER_ENDS = 1
    ALL_ANSWERED = 2
    CONNECTION_BREAKS = 3
    CONNECTION_EVENTS = 4

# Anything absent leaves it as it is.
TRANSITIONS = {
    (CONNECTION_OPEN, CLIENT_ENDS): CONNECTION_ENDING,
    (CONNECTION_OPEN, SERVER_ENDS): CONNECTION_ENDING,
    (CONNECTION_OPEN, CONNECTION_BREAKS): CONNECTION_DEAD,
    (CONNECTION_ENDING, ALL_ANSWERED): CONNECTION_DEAD,
    (CONNECTION_ENDING, CONNECTION_BREAKS): CONNECTION_DEAD,
}

cdef uint8_t[CONNECTION_STATES][CONNECTION_EVENTS] transitions
for _state in range(CONNECTION_STATES):
    for _event in range(CONNECTION_EVENTS):
        transitions[_state][_event] = TRANSITIONS.get((_state, _event), _state)

cdef enum InputState:
    INPUT_EMPTY = 0                 # nothing to read until an edge says so
    INPUT_READY = 1                 # may hold bytes; a short read empties it
    INPUT_ENDING = 2                # may hold bytes, and its end: only the end of the stream, or EAGAIN, means empty

cdef enum:                          # lists
    LIST_READY = 0                  # may have bytes to read
    LIST_PAUSED = 1                 # has, but is at a cap
    LIST_SEND = 2                   # has replies to send
    LIST_DYING = 3
    LISTS = 4

cdef enum:                          # why the loop disconnected a client
    ENDING_GARBAGE = 0              # it sent what is no request
    ENDING_HALF_SENT = 1            # the rest of a request did not come
    ENDING_NOT_TAKEN = 2            # it took no replies
    ENDINGS = 3

cdef struct Peer:                   # whoever has connections: a user of this host, or an address
    uint32_t kind                   # server.py's; with the value, who it is
    uint64_t value
    uint32_t connections
    uint64_t over_bytes             # of all of them: what each holds beyond its share
    Peer *next

cdef struct Connection:
    uint32_t number
    int fd
    uint32_t watch
    uint8_t state                   # ConnectionState
    uint8_t input                   # InputState
    uint8_t blocked                 # the socket takes no more for now
    uint8_t large                   # the last write was
    uint8_t handed_over             # what the server's end cuts short gets no answer, so that its client sends it to the next one
    uint8_t listed[LISTS]
    Connection *next[LISTS]
    Export *export
    Peer *peer
    Limits limits
    Wire wire
    uint8_t *buffer
    uint32_t begin                  # received and not parsed: buffer[begin:end]
    uint32_t end
    RequestRecord *filling          # a write whose data is arriving
    RequestRecord *first_reply
    RequestRecord *last_reply
    uint64_t sent                   # bytes of first_reply already sent
    uint64_t inflight_bytes         # cost of its records
    uint64_t data_bytes             # of them, what clients asked to move
    uint32_t records
    int64_t deadline_ns             # when ending
    uint64_t received_total, sent_total, begun_total    # bytes, bytes, requests
    uint64_t received_mark, sent_mark, begun_mark       # ... when it last was seen to get on
    int64_t half_sent_ns            # for so long it has not got on with a request
    int64_t not_taken_ns            # ... with its replies
    uint64_t waiting_turn           # when `waiting` was found
    uint64_t waiting


cdef Peer *find_peer(NbdLoop loop, uint32_t kind, uint64_t value) noexcept:
    cdef Peer *peer = loop.peers
    while peer != NULL and (peer.kind != kind or peer.value != value):
        peer = peer.next
    return peer


cdef void forget_peer(NbdLoop loop, Peer *peer) noexcept nogil:
    cdef Peer **link = &loop.peers
    peer.connections -= 1
    if peer.connections:
        return
    while link[0] != peer:
        link = &link[0].next
    link[0] = peer.next
    free(peer)


cdef void list_push(NbdLoop loop, uint32_t name, Connection *connection) noexcept nogil:
    """`name`: LIST_*. A connection is in it once."""
    if connection.listed[name]:
        return
    connection.listed[name] = 1
    connection.next[name] = NULL
    if loop.first[name] == NULL:
        loop.first[name] = connection
    else:
        loop.last[name].next[name] = connection
    loop.last[name] = connection


cdef Connection *list_take(NbdLoop loop, uint32_t name) noexcept nogil:
    """The whole list, which is empty afterwards. Its members stay marked until the caller unmarks them, one by one."""
    cdef Connection *connection = loop.first[name]
    loop.first[name] = NULL
    return connection


cdef int end_if_stalled(NbdLoop loop, Connection *connection, int64_t passed_ns) except -1 nogil:
    """Hang up on a client that has stalled: in the middle of a request, or with replies to take. One that asks for nothing has not."""
    cdef uint32_t held = connection.end - connection.begin
    cdef bint half = connection.wire.state != WIRE_HEADER or 0 < held < REQUEST_BYTES
    if (not half or connection.listed[LIST_PAUSED] or connection.begun_total != connection.begun_mark
            or connection.received_total - connection.received_mark >= STALL_BYTES):
        connection.begun_mark = connection.begun_total
        connection.received_mark = connection.received_total
        connection.half_sent_ns = 0
    else:
        connection.half_sent_ns += passed_ns
    # With less taken than that, its replies must have come to an end: one after the other would keep what it holds for ever.
    if not connection.blocked or connection.sent_total - connection.sent_mark >= STALL_BYTES:
        connection.sent_mark = connection.sent_total
        connection.not_taken_ns = 0
    else:
        connection.not_taken_ns += passed_ns
    if max(connection.half_sent_ns, connection.not_taken_ns) <= loop.stall_ns:
        return 0
    loop.endings[ENDING_HALF_SENT if connection.half_sent_ns > loop.stall_ns else ENDING_NOT_TAKEN] += 1
    return move_connection(loop, connection, CONNECTION_BREAKS)


cdef inline void note_readable(Connection *connection, int64_t result) noexcept nogil:
    """An edge of the socket. `result`: its poll mask, or a negative errno."""
    if result < 0 or result & (POLLHUP | POLLERR | POLLRDHUP):
        connection.input = INPUT_ENDING
    elif connection.input == INPUT_EMPTY:
        connection.input = INPUT_READY


cdef int move_connection(NbdLoop loop, Connection *connection, uint32_t event) except -1 nogil:
    """What happened to it, and all that follows from that: see TRANSITIONS."""
    cdef uint8_t state = transitions[connection.state][event]
    if state == connection.state:
        return 0
    connection.state = state
    if state == CONNECTION_DEAD:
        close_connection(loop, connection)
        return cancel_waiting_requests(loop, connection)
    connection.handed_over = event == SERVER_ENDS
    connection.deadline_ns = loop.now_ns + LINGER_NS
    if connection.filling != NULL:
        free_record(loop, connection.filling)
        connection.filling = NULL
    if connection.records == 0:
        return move_connection(loop, connection, ALL_ANSWERED)
    return cancel_waiting_requests(loop, connection)


cdef int cancel_waiting_requests(NbdLoop loop, Connection *connection) except -1 nogil:
    """Those that wait for storage or the base end with ESHUTDOWN."""
    if not connection.export.live:
        return 0
    touch(loop, connection.export)
    return (<Backend>connection.export.backend).cancel_waiting(CONNECTION_MASK, <uint64_t>connection.number << 32, -ESHUTDOWN)


cdef int close_connection(NbdLoop loop, Connection *connection) except -1 nogil:
    """What it was sent and did not take is forgotten; what is in the engine keeps its buffers until the engine is done with them."""
    cdef RequestRecord *record
    connection.state = CONNECTION_DEAD
    shutdown(connection.fd, SHUT_RDWR)      # the peer learns now: the kernel's poll holds on to the socket a little longer
    loop.queue.unwatch(connection.watch)
    c_close(connection.fd)
    connection.fd = -1
    if connection.filling != NULL:
        free_record(loop, connection.filling)
        connection.filling = NULL
    while connection.first_reply != NULL:
        record = connection.first_reply
        connection.first_reply = record.next
        free_record(loop, record)
    connection.last_reply = NULL
    list_push(loop, LIST_DYING, connection)
    return 0


cdef void free_dead(NbdLoop loop) noexcept nogil:
    """Free the dead connections that nothing refers to any more."""
    cdef Connection *connection = list_take(loop, LIST_DYING)
    cdef Connection *next
    while connection != NULL:
        next = connection.next[LIST_DYING]
        connection.listed[LIST_DYING] = 0
        if connection.records or connection.listed[LIST_READY] or connection.listed[LIST_PAUSED] or connection.listed[LIST_SEND]:
            list_push(loop, LIST_DYING, connection)
        else:
            loop.connections[connection.number] = NULL
            loop.connection_count -= 1
            connection.export.connections -= 1
            forget_peer(loop, connection.peer)
            free(connection.buffer)
            free(connection)
        connection = next
