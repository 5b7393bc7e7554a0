# SPDX-License-Identifier: Apache-2.0
# Whether there is memory for a client's next request, among all that hold some. It knows how much, not what for.
#
# Offers: admit
# Needs: buffers: free_bytes_of; payloads: beyond, share

cdef enum Admission:
    ADMITTED = 0
    NO_MEMORY = 1
    CONNECTION_WAITS = 2            # too much of its connection waits for storage
    ALL_WAIT = 3                    # ... of all


cdef bint admit(NbdLoop loop, Connection *connection) except -1 nogil:
    """Whether the request whose header is there may be taken. What all hold together stays within total_cap:

    1. What is within a connection's share is always taken: nobody is shut out.
    2. What all have beyond their shares stays within common_cap.
    3. Of that, a peer gets at most as much as it leaves, and a connection of it at most as much as it leaves of that. There, who holds
       nothing goes on for longer than who holds something, and a large request needs no more free space than a small one. So
       deep queues of one leave enough for the next, however slowly they are emptied, and small requests do not keep out large ones.

    Writes that wait for storage have caps of their own: those of a full disk must not stop the reads and flushes behind them. Where they
    are beyond one, they end here with ENOSPC."""
    cdef Admission verdict
    if connection.inflight_bytes < loop.easy_cap and loop.inflight_bytes <= loop.easy_total:
        return True
    if connection.state != CONNECTION_OPEN:
        return True
    if connection.end - connection.begin < REQUEST_BYTES:
        return True             # nothing to refuse yet
    verdict = judge_memory(loop, connection)
    if verdict == ADMITTED:
        return True
    refuse_waiting(loop, connection, verdict)
    connection.waiting_turn = loop.waiting_turn = 0     # more may wait since these were counted
    verdict = judge_memory(loop, connection)
    refuse_waiting(loop, connection, verdict)
    return verdict == ADMITTED


cdef int refuse_waiting(NbdLoop loop, Connection *connection, Admission verdict) except -1 nogil:
    """What waits for storage has reached its cap: it ends with ENOSPC."""
    cdef uint32_t i
    if verdict == CONNECTION_WAITS:
        touch(loop, connection.export)
        (<Backend>connection.export.backend).cancel_waiting(CONNECTION_MASK, <uint64_t>connection.number << 32, -ENOSPC)
        connection.waiting_turn = 0
    elif verdict == ALL_WAIT:
        for i in range(loop.export_count):
            if loop.exports[i].live:
                touch(loop, loop.exports[i])
                (<Backend>loop.exports[i].backend).cancel_waiting(0, 0, -ENOSPC)
        loop.waiting_turn = 0
    return 0


cdef Admission judge_memory(NbdLoop loop, Connection *connection) noexcept nogil:
    """The rules of `admit`; changes nothing."""
    cdef uint64_t mine = connection.inflight_bytes
    cdef uint64_t value = <uint64_t>connection.number << 32
    cdef Peer *peer = connection.peer
    cdef uint64_t over = beyond(mine, loop.share_cap)
    cdef uint64_t cost, waiting, more, left, peer_holds
    cdef uint32_t i
    cost = PAGE + free_bytes_of(request_capacity(connection.buffer + connection.begin, STATUS_BYTES))
    if connection.waiting_turn != loop.turn_count:
        connection.waiting_turn = loop.turn_count
        connection.waiting = (<Backend>connection.export.backend).waiting_bytes(CONNECTION_MASK, value)
    waiting = share(mine, connection.waiting, connection.data_bytes)
    if waiting > loop.waiting_cap:
        return CONNECTION_WAITS
    if mine - waiting >= loop.connection_cap:
        return NO_MEMORY
    more = beyond(mine + cost, loop.share_cap) - over
    if more == 0:
        return ADMITTED
    mine -= waiting
    if loop.waiting_turn != loop.turn_count:
        loop.waiting_turn = loop.turn_count
        loop.waiting = 0
        for i in range(loop.export_count):
            if loop.exports[i].live:
                loop.waiting += (<Backend>loop.exports[i].backend).waiting_bytes(0, 0)
    waiting = share(loop.inflight_bytes, loop.waiting, loop.data_bytes)
    if waiting > loop.all_waiting_cap:
        return ALL_WAIT
    over = beyond(mine, loop.share_cap)
    more = min(more, loop.common_cap)       # one that is larger has it all to itself
    if loop.over_bytes + more <= loop.common_cap:
        left = loop.common_cap - loop.over_bytes
        # What waits is counted above, and here for nobody, so that it stops nobody.
        peer_holds = beyond(peer.over_bytes, waiting)
        if (mine + cost <= loop.share_cap or peer_holds == 0
                or left >= peer_holds + (2 * more + over + 3 * loop.reserve_cap if over else 2 * loop.reserve_cap)):
            return ADMITTED
    return NO_MEMORY
