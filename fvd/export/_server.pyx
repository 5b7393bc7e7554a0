# SPDX-License-Identifier: Apache-2.0
"""The serving loop: one thread moves requests between NBD connections, guests' rings, engines and the device queue, with no Python object
per request.

A turn: take what the device finished, answer, read what clients sent, submit, hand new operations to the queue. It returns to Python
(server.py) for what is not a request: new connections, control calls, an engine that wants something, signals. May not know the
handshake, the format, or where sockets come from.

This file has the loop and what Python calls; its parts are included below: connections, what their requests hold, requests, the
sockets' bytes, and rings.
"""

from cpython.exc cimport PyErr_CheckSignals
from cpython.ref cimport PyObject
from libc.errno cimport EAGAIN, EINTR, EIO, ENOMEM, ENOSPC, ESHUTDOWN, errno
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy, memmove, memset

from fvd.device._queue cimport EVENT_OP, EVENT_READABLE, Event, Queue, Source, open_queue
from fvd.device.clock cimport monotonic_ns
from fvd.device.op cimport DeviceOp
from fvd.engine._engine cimport (DONE_ALL_ZERO, EXTENT_ZERO, FLAG_FUA, FLAG_NO_HOLE, REQUEST_CLOSE, REQUEST_FLUSH, REQUEST_READ,
                                 REQUEST_TRIM, REQUEST_WRITE, REQUEST_ZERO, Done, Extent)
from fvd.engine._backend cimport Backend
from fvd.export._nbd cimport (COMMAND_BLOCK_STATUS, COMMAND_FLAG_FUA, COMMAND_FLAG_NO_HOLE, COMMAND_FLAG_REQ_ONE,
                              COMMAND_DISCONNECT, COMMAND_FLUSH, COMMAND_READ, COMMAND_TRIM, COMMAND_WRITE, COMMAND_WRITE_ZEROES,
                              DATA_HEAD_BYTES, ERROR_CHUNK_BYTES, HOLE_CHUNK_BYTES, ON_END, ON_NO_MEMORY, REQUEST_BYTES, SIMPLE_HEAD_BYTES,
                              STATUS_EXTENT_BYTES, STATUS_HEAD_BYTES, STATUS_HOLE, STATUS_ZERO, WIRE_CLOSED, WIRE_HEADER, WIRE_PAYLOAD,
                              Limits, Request, Wire, nbd_error, put_data_head, put_error, put_hole, put_simple, put_status_extent,
                              put_status_head, request_capacity, take_data, take_header, wire_step)
from fvd.virtio._blk_ring cimport TAKEN_NO_MEMORY, TAKEN_SOME, BlkRing, Counts, Taken

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <poll.h>
    #include <stdlib.h>
    #include <sys/socket.h>
    #include <sys/uio.h>
    #include <unistd.h>
    """
    ctypedef long ssize_t
    cdef struct iovec:
        void *iov_base
        size_t iov_len
    cdef struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
    ssize_t recvmsg(int fd, msghdr *message, int flags) nogil
    ssize_t sendmsg(int fd, const msghdr *message, int flags) nogil
    int shutdown(int fd, int how) nogil
    int c_close "close"(int fd) nogil
    ssize_t c_write "write"(int fd, const void *data, size_t size_bytes) nogil
    const int MSG_DONTWAIT, MSG_NOSIGNAL, SHUT_RDWR
    const int64_t POLLHUP, POLLERR, POLLRDHUP

cdef enum:
    PAGE = 4096                     # payloads are aligned to it; a reply's head lies in the page before its payload
    RECEIVE_BYTES = 64 << 10
    LARGE_BYTES = 32 << 10          # after a write this large, headers are received alone and data straight into its buffer
    HEADERS_BYTES = 4 << 10
    REQUESTS_PER_TURN = 64          # of one connection: the others get their turn
    BYTES_PER_TURN = 1 << 20
    REPLIES_PER_SEND = 64
    STATUS_EXTENTS = 1024
    STATUS_BYTES = STATUS_HEAD_BYTES + STATUS_EXTENT_BYTES * STATUS_EXTENTS
    NO_CLASS = 0xFF
    LARGEST_COST = PAGE + (32 << 20)    # of one request
    STALL_BYTES = 1 << 20           # so much at least is to move in the time that a stalled client is given
    RECORDS_PER_SLAB = 256
    INTERNAL = 0xFFFFFFFF           # connection number in the cookies of the loop's own requests
    ALL = -1                        # instead of an export's number
    WATCH_CONNECTION = 0            # in the upper half of a watch's key; the lower is its number
    WATCH_PYTHON = 1                # ... or a descriptor
    WATCH_RING = 2                  # ... or a ring's number

cdef int64_t TICK_NS = 250000000

cdef enum Attention:                # why the loop returns to Python
    ATTENTION_FDS = 1
    ATTENTION_WANT = 2
    ATTENTION_TICK = 4
    ATTENTION_RING = 8

cdef struct Export:
    PyObject *backend               # a Backend; borrowed from NbdLoop.backends
    uint32_t number
    uint32_t reported               # Want bits that Python knows of
    uint64_t open_requests          # in the backend
    uint64_t open_ops               # in the queue
    uint32_t connections
    int64_t clock_ns                # what the backend was last told
    uint8_t live
    uint8_t closing                 # REQUEST_CLOSE was submitted
    uint8_t touched
    uint8_t answered                # the loop's own request ended ...
    int32_t answer                  # ... with this
    Export *next_touched
    uint32_t rings                  # guests'
    Counts counts
    uint64_t caches, block_statuses

cdef struct Connection
cdef struct RequestRecord
cdef struct Ring
cdef class NbdLoop

include "buffers.pxi"
include "connections.pxi"
include "payloads.pxi"
include "admission.pxi"
include "requests.pxi"
include "transfer.pxi"
include "rings.pxi"


cdef class NbdLoop:
    """The loop's state. Everything but the constructor belongs to the thread that called open()."""

    cdef readonly Queue queue
    # Memory. What is held is within total_cap: each connection's share (connections * share_cap <= total_cap - common_cap), and what is
    # beyond the shares, over_bytes, within common_cap. See admit.
    cdef uint64_t connection_cap, total_cap, waiting_cap, share_cap, common_cap, reserve_cap, easy_cap, easy_total, all_waiting_cap
    cdef int64_t stall_ns
    cdef int64_t busy_poll_ns
    cdef bint force_blocking
    cdef int64_t now_ns, last_request_ns, next_tick_ns, last_tick_ns
    cdef uint32_t attention
    cdef bint freed                 # memory, since the paused were asked
    cdef list backends
    cdef dict watches               # descriptor -> handle
    cdef Export **exports
    cdef uint32_t export_count
    cdef Export *touched
    cdef Connection **connections   # by number; NULL: free
    cdef uint32_t connection_capacity
    cdef readonly uint32_t connection_count
    cdef Ring **rings               # by number; NULL: free
    cdef uint32_t ring_capacity
    cdef dict ring_objects          # number -> BlkRing
    cdef Ring *first_ring           # to be looked at in this turn
    cdef Ring *last_ring
    cdef Connection *first[LISTS]
    cdef Connection *last[LISTS]
    cdef RequestRecord **slabs
    cdef uint32_t slab_count
    cdef RequestRecord *free_records
    cdef Pool pool
    cdef Peer *peers
    cdef uint64_t inflight_bytes, over_bytes, data_bytes, turn_count, accepted, waiting, waiting_turn
    cdef uint64_t[ENDINGS] endings
    cdef Extent *scratch
    cdef int *ready_fds
    cdef uint32_t ready_count, ready_capacity

    def __init__(self, *, connection_bytes, total_bytes, waiting_bytes, connections, stall_ns, busy_poll_us=0, force_blocking=False):
        self.connection_cap = connection_bytes
        self.total_cap = total_bytes
        self.waiting_cap = waiting_bytes
        common = total_bytes - total_bytes // 4
        reserve = min(<int>LARGEST_COST, common // 4)
        self.share_cap = total_bytes // 4 // connections
        self.common_cap = common
        self.reserve_cap = reserve
        self.all_waiting_cap = common // 2
        self.easy_cap = min(connection_bytes, waiting_bytes)
        # Up to this much in all, no rule of admission refuses anything, whoever holds it.
        self.easy_total = max(0, common - 2 * <int>LARGEST_COST - 3 * reserve) // 3
        self.stall_ns = stall_ns
        self.busy_poll_ns = busy_poll_us * 1000
        self.force_blocking = force_blocking
        self.backends = []
        self.ring_objects = {}
        self.watches = {}

    def __dealloc__(self):
        cdef uint32_t i, j
        cdef Peer *peer
        if self.queue is not None:
            return                  # not closed: the device may still write to the buffers
        for i in range(self.slab_count):
            for j in range(RECORDS_PER_SLAB):
                if self.slabs[i][j].payload != NULL:
                    pool_discard(&self.pool, self.slabs[i][j].payload, self.slabs[i][j].payload_class)
            free(self.slabs[i])
        pool_end(&self.pool)
        while self.peers != NULL:
            peer, self.peers = self.peers, self.peers.next
            free(peer)
        for i in range(self.export_count):
            free(self.exports[i])
        for i in range(self.connection_capacity):
            if self.connections[i] != NULL:
                free(self.connections[i].buffer)
                free(self.connections[i])
        for i in range(self.ring_capacity):
            free(self.rings[i])
        free(self.rings)
        free(self.slabs)
        free(self.exports)
        free(self.connections)
        free(self.scratch)
        free(self.ready_fds)

    def open(self):
        """Create the queue, in the thread that will call turns()."""
        self.queue = open_queue(self.force_blocking)
        self.scratch = <Extent *>malloc(STATUS_EXTENTS * sizeof(Extent))
        if self.scratch == NULL:
            raise MemoryError
        self.now_ns = monotonic_ns()

    def close(self):
        """Drop every connection and wait for the device operations under way."""
        cdef uint32_t i
        if self.queue is None:
            return
        for i in range(self.connection_capacity):
            if self.connections[i] != NULL and self.connections[i].state != CONNECTION_DEAD:
                close_connection(self, self.connections[i])
        self.queue.close()
        self.queue = None

    def descriptors(self):
        """Those of the connections, for a child after fork."""
        cdef uint32_t i
        return [self.connections[i].fd for i in range(self.connection_capacity) if self.connections[i] != NULL]

    def watch(self, int fd):
        """Have turns() report the descriptor when it becomes readable: an edge, so read until it would block."""
        self.watches[fd] = self.queue.watch(fd, <uint64_t>WATCH_PYTHON << 32 | <uint32_t>fd)

    def want_write(self, int fd):
        self.queue.want_write(self.watches[fd])

    def unwatch(self, int fd):
        self.queue.unwatch(self.watches.pop(fd))

    def add_export(self, Backend backend not None, int storage_fd, int base_fd, Source remote=None, int sampler_fd=-1):
        """Returns the export's number. `remote`: the base, instead of base_fd; `sampler_fd`: as Queue.attach."""
        cdef uint32_t number = 0
        cdef Export **grown
        cdef Export *export
        while number < self.export_count and self.exports[number].backend != NULL:
            number += 1
        self.queue.attach(number, storage_fd, base_fd, remote, sampler_fd)
        if number == self.export_count:
            grown = <Export **>realloc(self.exports, (number + 1) * sizeof(Export *))
            if grown != NULL:
                self.exports = grown
            export = <Export *>malloc(sizeof(Export))
            if grown == NULL or export == NULL:
                raise MemoryError
            self.exports[number] = export
            self.export_count += 1
            self.backends.append(None)
        export = self.exports[number]
        memset(export, 0, sizeof(Export))
        export.number = number
        export.backend = <PyObject *>backend
        export.live = 1
        self.backends[number] = backend
        return number

    def remove_export(self, uint32_t number):
        """Forget an export that was closed and has no connections, once its last operations (discards) have ended."""
        cdef Export *export = self.exports[number]
        if export.live or export.connections or export.rings:
            raise RuntimeError("the export is in use")
        with nogil:
            while export.open_ops or export.touched:
                run_turn(self, TICK_NS)
        self.queue.detach(number)
        export.backend = NULL
        self.backends[number] = None

    def release_base(self, uint32_t number):
        """The export needs its base no longer. Raises RuntimeError while operations of the base are in flight."""
        self.queue.release_base(number)

    def adopt(self, int fd, uint32_t export, uint64_t size_bytes, uint32_t minimum_block_bytes, bint read_only, bint structured,
              bint allocation, bytes received, uint32_t peer_kind, uint64_t peer_value):
        """Serve a connection whose handshake is over; the loop owns the descriptor from now on."""
        cdef uint32_t number = 0, capacity
        cdef Connection **grown
        cdef Peer *peer = find_peer(self, peer_kind, peer_value)
        if len(received) > RECEIVE_BYTES:
            raise ValueError("more bytes than a receive buffer holds")
        while number < self.connection_capacity and self.connections[number] != NULL:
            number += 1
        if number == self.connection_capacity:
            capacity = max(16, 2 * number)
            grown = <Connection **>realloc(self.connections, capacity * sizeof(Connection *))
            if grown == NULL:
                raise MemoryError
            memset(grown + number, 0, (capacity - number) * sizeof(Connection *))
            self.connections = grown
            self.connection_capacity = capacity
        cdef Connection *connection = <Connection *>calloc(1, sizeof(Connection))
        cdef uint8_t *buffer = <uint8_t *>malloc(RECEIVE_BYTES)
        cdef Peer *fresh = <Peer *>calloc(1, sizeof(Peer)) if peer == NULL else NULL
        if connection == NULL or buffer == NULL or (peer == NULL and fresh == NULL):
            free(connection)
            free(buffer)
            free(fresh)
            raise MemoryError
        connection.number = number
        connection.fd = fd
        connection.export = self.exports[export]
        connection.limits = Limits(size_bytes, minimum_block_bytes, read_only, structured, allocation)
        connection.buffer = buffer
        connection.end = len(received)
        memcpy(buffer, <const uint8_t *>received, len(received))
        try:
            connection.watch = self.queue.watch(fd, <uint64_t>WATCH_CONNECTION << 32 | number)
        except BaseException:
            free(connection)
            free(buffer)
            free(fresh)
            raise
        if peer == NULL:
            peer = fresh
            peer.kind = peer_kind
            peer.value = peer_value
            peer.next, self.peers = self.peers, peer
        peer.connections += 1
        connection.peer = peer
        connection.input = INPUT_READY
        list_push(self, LIST_READY, connection)
        connection.export.connections += 1
        self.connections[number] = connection
        self.connection_count += 1
        self.accepted += 1
        return number

    def peer_connections(self):
        """How many connections each peer has: by (kind, value)."""
        cdef Peer *peer = self.peers
        connections = {}
        while peer != NULL:
            connections[peer.kind, peer.value] = peer.connections
            peer = peer.next
        return connections

    def take_endings(self):
        """On how many clients the loop has hung up since the last call: (sent no request, half a request, took no replies)."""
        cdef int i
        endings = tuple([self.endings[i] for i in range(ENDINGS)])
        for i in range(ENDINGS):
            self.endings[i] = 0
        return endings

    def add_ring(self, BlkRing ring not None, uint32_t export, int kick_fd, int call_fd):
        """Serves a ring that has begun; its number. The descriptors stay the caller's, and must outlive it; `call_fd` -1: no calls."""
        return add_ring(self, ring, self.exports[export], kick_fd, call_fd).number

    def set_call(self, uint32_t number, int call_fd):
        """Another descriptor to call the guest by."""
        cdef Ring *ring = find_ring(self, number)
        ring.call_fd = call_fd
        (<BlkRing>ring.it).calls_due = True
        list_ring(self, ring)

    def drain_ring(self, uint32_t number, *, bint silently):
        """Takes no more of it: pop_rings tells when nothing of it is under way. Again is fine."""
        self.now_ns = monotonic_ns()
        drain_ring(self, find_ring(self, number), silently)

    def pop_rings(self):
        """The numbers of the rings that have come to rest, or have broken, since the last call."""
        cdef uint32_t i
        cdef uint8_t news
        numbers = []
        for i in range(self.ring_capacity):
            if self.rings[i] == NULL:
                continue
            news = 2 if self.rings[i].state == RING_RESTED else 1 if (<BlkRing>self.rings[i].it).fault != NULL else 0
            if news > self.rings[i].told:
                self.rings[i].told = news
                numbers.append(i)
        return numbers

    def remove_ring(self, uint32_t number):
        """Forgets a ring that has come to rest: nothing uses its memory any more."""
        remove_ring(self, number)

    def has_rested(self, uint32_t number):
        """Whether nothing of it is under way any more."""
        return find_ring(self, number).state == RING_RESTED

    def turns(self, int64_t at_most_ns=-1):
        """Serve until Python has something to do, or for so long. Returns the watched descriptors that became ready."""
        cdef uint32_t number
        cdef int64_t until_ns
        with nogil:
            self.now_ns = monotonic_ns()            # Python may have taken its time
            until_ns = self.now_ns + at_most_ns
            for number in range(self.export_count):     # Python may have changed something in an engine
                if self.exports[number].live:
                    touch(self, self.exports[number])
                    self.exports[number].reported &= (<Backend>self.exports[number].backend).wants()
            if at_most_ns < 0:
                while not self.attention:
                    run_turn(self, TICK_NS)
            else:
                run_turn(self, min(TICK_NS, at_most_ns))
                while not self.attention and self.now_ns < until_ns:
                    run_turn(self, min(TICK_NS, until_ns - self.now_ns))
        PyErr_CheckSignals()
        self.attention = 0
        ready = [self.ready_fds[i] for i in range(self.ready_count)]
        self.ready_count = 0
        return ready

    def pop_wants(self):
        """(export number, Want bits) of every export that wants something it has not said before."""
        cdef uint32_t i, wants
        cdef Export *export
        wanting = []
        for i in range(self.export_count):
            export = self.exports[i]
            wants = (<Backend>export.backend).wants() if export.live else 0
            if wants & ~export.reported:
                wanting.append((i, wants))
            export.reported = wants
        return wanting

    def drain(self, int64_t timeout_ns, int64_t export=ALL):
        """Read nothing more from the clients (of one export, or all), answer what is under way, hang up. Writes that wait for
        storage get no answer: a client that reconnects sends them again, and its guest sees no error. Clients that do not take their
        replies in time are dropped, and those whose requests wait for a base that fails: neither get they an answer."""
        cdef uint32_t i
        cdef int64_t until = monotonic_ns() + timeout_ns
        cdef Ring *ring
        cdef Connection *connection
        for i in range(self.connection_capacity):
            connection = self.connections[i]
            if connection != NULL and connection.state == CONNECTION_OPEN and export in (ALL, connection.export.number):
                with nogil:
                    move_connection(self, connection, SERVER_ENDS)
        with nogil:
            for i in range(self.ring_capacity):
                ring = self.rings[i]
                if ring != NULL and ring.state == RING_RUNNING and (export == ALL or export == ring.export.number):
                    drain_ring(self, ring, False)
        while count_connections(self, export) or self.count_rings(export):
            if monotonic_ns() > until:
                self.drop_all(export)
                for i in range(self.export_count):
                    if self.exports[i].live and export in (ALL, i):
                        (<Backend>self.exports[i].backend).give_up_base()
                until = monotonic_ns() + timeout_ns
            with nogil:
                run_turn(self, TICK_NS // 10)
            PyErr_CheckSignals()

    cdef uint32_t count_rings(self, int64_t export) noexcept:
        """Those that have not come to rest."""
        cdef uint32_t i, count = 0
        for i in range(self.ring_capacity):
            if self.rings[i] != NULL and self.rings[i].state != RING_RESTED and export in (ALL, self.rings[i].export.number):
                count += 1
        return count

    def request(self, uint32_t export, bint close=False):
        """Flush an export, or close it: nothing may be asked of it afterwards. Returns 0 or a negative errno."""
        cdef Export *it = self.exports[export]
        if not it.live or it.closing:
            return 0
        it.answered = 0
        it.closing = close
        self.now_ns = monotonic_ns()
        with nogil:
            touch(self, it)
            (<Backend>it.backend).submit(REQUEST_CLOSE if close else REQUEST_FLUSH, 0, 0, 0, NULL, <uint64_t>INTERNAL << 32 | export)
            while not it.answered:
                run_turn(self, TICK_NS)
        if close:
            it.live = 0
        return it.answer

    def drop_all(self, int64_t export=ALL):
        """Hang up on every client (of one export) at once."""
        cdef uint32_t i
        cdef Connection *connection
        for i in range(self.connection_capacity):
            connection = self.connections[i]
            if connection != NULL and connection.state != CONNECTION_DEAD and export in (ALL, connection.export.number):
                move_connection(self, connection, CONNECTION_BREAKS)
        for i in range(self.ring_capacity):
            if self.rings[i] != NULL and export in (ALL, self.rings[i].export.number):
                drain_ring(self, self.rings[i], True)

    def counters(self):
        cdef Export *export
        exports = []
        for i in range(self.export_count):
            export = self.exports[i]
            exports.append({
                "reads": export.counts.reads,
                "writes": export.counts.writes,
                "flushes": export.counts.flushes,
                "trims": export.counts.trims,
                "write_zeroes": export.counts.zeroes,
                "caches": export.caches,
                "block_statuses": export.block_statuses,
                "errors": export.counts.errors,
                "read_bytes": export.counts.read_bytes,
                "written_bytes": export.counts.written_bytes,
                "open_requests": export.open_requests,
                "connections": export.connections,
                "rings": export.rings,
            })
        return {
            "connections": self.connection_count,
            "connections_total": self.accepted,
            "inflight_bytes": self.inflight_bytes,
            "pooled_bytes": self.pool.warm_bytes,
            "turns": self.turn_count,
            "exports": exports,
        }


# --- A turn -----------------------------------------------------------------------------------------------------

cdef int run_turn(NbdLoop loop, int64_t timeout_ns) except -1 nogil:
    cdef Connection *connection
    cdef Connection *next
    cdef Export *export
    cdef int64_t spin_ns = 0
    if loop.first[LIST_READY] != NULL or loop.touched != NULL or (loop.freed and loop.first[LIST_PAUSED] != NULL):
        timeout_ns = 0
    if loop.first_ring != NULL:
        timeout_ns = 0
    if loop.busy_poll_ns and loop.now_ns - loop.last_request_ns < 10 * loop.busy_poll_ns:
        spin_ns = loop.busy_poll_ns
    loop.queue.turn(timeout_ns, spin_ns)
    loop.turn_count += 1
    loop.now_ns = monotonic_ns()
    if loop.queue.interrupted:
        loop.attention |= ATTENTION_TICK

    take_events(loop)
    export = loop.touched
    while export != NULL:
        reply_to_done(loop, export)
        export = export.next_touched
    send_all(loop)
    call_all(loop)

    loop.freed = False
    connection = list_take(loop, LIST_PAUSED)
    while connection != NULL:
        next = connection.next[LIST_PAUSED]
        connection.listed[LIST_PAUSED] = 0
        list_push(loop, LIST_READY if admit(loop, connection) else LIST_PAUSED, connection)
        connection = next
    connection = list_take(loop, LIST_READY)
    while connection != NULL:
        next = connection.next[LIST_READY]
        connection.listed[LIST_READY] = 0
        if connection.state == CONNECTION_OPEN:
            receive(loop, connection)
        connection = next

    take_from_rings(loop)
    if loop.now_ns >= loop.next_tick_ns:
        loop.next_tick_ns = loop.now_ns + TICK_NS
        tick_all(loop)
    export = loop.touched
    while export != NULL:
        settle(loop, export)
        export = export.next_touched
    loop.touched = NULL
    send_all(loop)
    call_all(loop)
    free_dead(loop)
    return 0


cdef int take_events(NbdLoop loop) except -1 nogil:
    cdef uint32_t i, number
    cdef Event *event
    cdef Connection *connection
    for i in range(loop.queue.event_count):
        event = &loop.queue.events[i]
        if event.kind == EVENT_OP:
            touch(loop, loop.exports[event.disk])
            loop.exports[event.disk].open_ops -= 1
            (<Backend>loop.exports[event.disk].backend).complete(event.key, event.result)
            continue
        number = <uint32_t>event.key
        if event.key >> 32 == WATCH_PYTHON:
            note_ready(loop, <int>number)
            continue
        if event.key >> 32 == WATCH_RING:
            note_kick(loop, number)
            continue
        connection = loop.connections[number]
        if event.kind == EVENT_READABLE:
            note_readable(connection, event.result)
            list_push(loop, LIST_READY, connection)
        else:
            connection.blocked = 0
            list_push(loop, LIST_SEND, connection)
    loop.queue.event_count = 0
    return 0


cdef int note_ready(NbdLoop loop, int fd) except -1 nogil:
    cdef uint32_t i, capacity = max(16, 2 * loop.ready_capacity)
    cdef int *grown
    loop.attention |= ATTENTION_FDS
    for i in range(loop.ready_count):
        if loop.ready_fds[i] == fd:
            return 0
    if loop.ready_count == loop.ready_capacity:
        grown = <int *>realloc(loop.ready_fds, capacity * sizeof(int))
        if grown == NULL:
            with gil:
                raise MemoryError
        loop.ready_fds = grown
        loop.ready_capacity = capacity
    loop.ready_fds[loop.ready_count] = fd
    loop.ready_count += 1
    return 0


cdef void touch(NbdLoop loop, Export *export) noexcept nogil:
    """Comes before every call of a backend that may begin or end something."""
    if export.clock_ns != loop.now_ns:
        export.clock_ns = loop.now_ns
        (<Backend>export.backend).clock(<uint64_t>loop.now_ns)
    if not export.touched:
        export.touched = 1
        export.next_touched = loop.touched
        loop.touched = export


cdef int tick_all(NbdLoop loop) except -1 nogil:
    cdef uint32_t i
    cdef Connection *connection
    # A server that was stopped itself, or had other work, takes its clients to have been quiet for a moment only.
    cdef int64_t passed_ns = min(loop.now_ns - loop.last_tick_ns, 2 * TICK_NS)
    loop.last_tick_ns = loop.now_ns
    loop.attention |= ATTENTION_TICK
    for i in range(loop.export_count):
        if loop.exports[i].live:
            touch(loop, loop.exports[i])
    for i in range(loop.connection_capacity):
        connection = loop.connections[i]
        if connection == NULL:
            continue
        if connection.state == CONNECTION_OPEN:
            end_if_stalled(loop, connection, passed_ns)
        elif connection.state == CONNECTION_ENDING and loop.now_ns > connection.deadline_ns:
            move_connection(loop, connection, CONNECTION_BREAKS)
        else:
            cancel_waiting_requests(loop, connection)         # what has begun to wait since
    for i in range(loop.ring_capacity):
        if loop.rings[i] != NULL:
            cancel_ring(loop, loop.rings[i])
    return 0


cdef int settle(NbdLoop loop, Export *export) except -1 nogil:
    """The engine's tick; then everything it has for the device and for the clients."""
    cdef DeviceOp *ops = NULL
    cdef uint32_t count, wants
    if export.live:
        (<Backend>export.backend).tick(<uint64_t>loop.now_ns)
    reply_to_done(loop, export)
    count = (<Backend>export.backend).take_ops(&ops)
    if count:
        export.open_ops += count
        loop.queue.start(export.number, ops, count)
    export.touched = 0
    wants = (<Backend>export.backend).wants()
    if wants & ~export.reported:
        loop.attention |= ATTENTION_WANT
    export.reported &= wants
    return 0


cdef uint32_t count_connections(NbdLoop loop, int64_t export) noexcept:
    return loop.connection_count if export == ALL else loop.exports[export].connections
