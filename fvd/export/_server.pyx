# SPDX-License-Identifier: Apache-2.0
"""The serving loop: one thread moves requests between NBD connections, engines and the device queue, with no Python object per request.

A turn: take what the device finished, answer, read what clients sent, submit, hand new operations to the queue. It returns to Python
(server.py) for what is not a request: new connections, control calls, an engine that wants something, signals. May not know the
handshake, the format, or where sockets come from.
"""

from cpython.exc cimport PyErr_CheckSignals
from cpython.ref cimport PyObject
from libc.errno cimport EAGAIN, EINTR, EIO, ENOMEM, ENOSPC, ESHUTDOWN, errno
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy, memmove, memset

from fvd.device._queue cimport EVENT_OP, EVENT_READABLE, Event, Queue, Source, open_queue
from fvd.device.op cimport DeviceOp
from fvd.engine._engine cimport (DONE_ALL_ZERO, EXTENT_ZERO, FLAG_FUA, FLAG_NO_HOLE, REQUEST_CLOSE, REQUEST_FLUSH, REQUEST_READ,
                                 REQUEST_TRIM, REQUEST_WRITE, REQUEST_ZERO, Done, Extent)
from fvd.export._nbd cimport (COMMAND_BLOCK_STATUS, COMMAND_CACHE, COMMAND_FLAG_FUA, COMMAND_FLAG_NO_HOLE, COMMAND_FLAG_REQ_ONE,
                              COMMAND_DISCONNECT, COMMAND_FLUSH, COMMAND_READ, COMMAND_TRIM, COMMAND_WRITE, COMMAND_WRITE_ZEROES,
                              DATA_HEAD_BYTES, ERROR_CHUNK_BYTES, HOLE_CHUNK_BYTES, ON_END, ON_NO_MEMORY, REQUEST_BYTES, SIMPLE_HEAD_BYTES,
                              STATUS_EXTENT_BYTES, STATUS_HEAD_BYTES, STATUS_HOLE, STATUS_ZERO, WIRE_CLOSED, WIRE_HEADER, WIRE_PAYLOAD,
                              Limits, Request, Wire, nbd_error, put_data_head, put_error, put_hole, put_simple, put_status_extent,
                              put_status_head, request_capacity, take_data, take_header, wire_step)

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <poll.h>
    #include <stdlib.h>
    #include <sys/socket.h>
    #include <sys/uio.h>
    #include <time.h>
    #include <unistd.h>

    static inline int64_t fvd_monotonic_ns(void) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
    }
    """
    int64_t fvd_monotonic_ns() noexcept nogil
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
    SLOTS_PER_SLAB = 256
    INTERNAL = 0xFFFFFFFF           # connection number in the cookies of the loop's own requests
    ALL = -1                        # instead of an export's number
    WATCH_CONNECTION = 0            # in the upper half of a watch's key; the lower is its number
    WATCH_PYTHON = 1                # ... or a descriptor

include "buffers.pxi"

cdef int64_t TICK_NS = 250000000
cdef int64_t LINGER_NS = 10000000000    # a client that hung up or said goodbye has this long to take the rest of its replies
cdef uint64_t CONNECTION_MASK = <uint64_t>0xFFFFFFFF << 32

cdef enum ConnectionState:
    CONNECTION_OPEN = 0
    CONNECTION_ENDING = 1           # reads nothing more; answers what is under way
    CONNECTION_DEAD = 2             # no socket; waits for the engine to be done with its buffers

cdef enum:                          # lists
    LIST_READY = 0                  # may have bytes to read
    LIST_PAUSED = 1                 # has, but is at a cap
    LIST_SEND = 2                   # has replies to send
    LIST_DYING = 3
    LISTS = 4

cdef enum Verdict:
    NEEDS_BYTES = 0
    PAUSED = 1
    SHARE_USED = 2
    CLOSED = 3

cdef enum Attention:                # why the loop returns to Python
    ATTENTION_FDS = 1
    ATTENTION_WANT = 2
    ATTENTION_TICK = 4

cdef enum:                          # why the loop disconnected a client
    ENDING_GARBAGE = 0              # it sent what is no request
    ENDING_HALF_SENT = 1            # the rest of a request did not come
    ENDING_NOT_TAKEN = 2            # it took no replies
    ENDINGS = 3

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
    uint64_t commands[8]            # by NBD command
    uint64_t errors
    uint64_t read_bytes
    uint64_t written_bytes

cdef struct Connection              # forward

cdef struct Peer:                   # whoever has connections: a user of this host, or an address
    uint32_t kind                   # server.py's; with the value, who it is
    uint64_t value
    uint32_t connections
    uint64_t over_bytes             # of all of them: what each holds beyond its share
    Peer *next

cdef struct Slot:                   # one request of a client
    uint8_t head[36]                # the whole reply, when it carries no data
    uint8_t *out                    # the reply, while it waits to be sent
    uint64_t out_bytes
    Slot *next                      # in the connection's replies, or in the free list
    Connection *connection
    uint8_t *payload
    uint64_t data_bytes
    Request request
    uint32_t number
    uint8_t payload_class

cdef struct Connection:
    uint32_t number
    int fd
    uint32_t watch
    uint8_t state                   # ConnectionState
    uint8_t readable                # the socket may hold bytes: set by an edge, cleared when it is empty
    uint8_t hung_up                 # ... or its end: a short read does not mean empty
    uint8_t blocked                 # the socket takes no more for now
    uint8_t large                   # the last write was
    uint8_t unanswered              # what the server's end cuts short gets no answer, so that its client sends it to the next one
    uint8_t listed[LISTS]
    Connection *next[LISTS]
    Export *export
    Peer *peer
    Limits limits
    Wire wire
    uint8_t *buffer
    uint32_t begin                  # received and not parsed: buffer[begin:end]
    uint32_t end
    Slot *filling                   # a write whose data is arriving
    Slot *first_reply
    Slot *last_reply
    uint64_t sent                   # bytes of first_reply already sent
    uint64_t inflight_bytes         # cost of its slots
    uint64_t data_bytes             # of them, what clients asked to move
    uint32_t slots
    int64_t deadline_ns             # when ending
    uint64_t received_total, sent_total, begun_total    # bytes, bytes, requests
    uint64_t received_mark, sent_mark, begun_mark       # ... when it last was seen to get on
    int64_t half_sent_ns            # for so long it has not got on with a request
    int64_t not_taken_ns            # ... with its replies
    uint64_t waiting_turn           # when `waiting` was found
    uint64_t waiting


cdef uint64_t share(uint64_t cost, uint64_t waiting, uint64_t data) noexcept nogil:
    """How much of `cost` belongs to the waiting ones of so many bytes of data: a small write costs more than its bytes."""
    if waiting == 0 or data == 0:
        return 0
    return cost if waiting >= data else <uint64_t>(<double>cost * <double>waiting / <double>data)


cdef inline uint64_t beyond(uint64_t held, uint64_t bound) noexcept nogil:
    return held - bound if held > bound else 0


cdef class Backend:
    """What the loop needs of a disk."""

    cdef int submit(self, uint32_t kind, uint32_t flags, uint64_t offset_bytes, uint64_t length_bytes, uint8_t *buffer,
                    uint64_t cookie) except -1 nogil:
        with gil:
            raise NotImplementedError

    cdef int complete(self, uint64_t token, int64_t result) except -1 nogil:
        with gil:
            raise NotImplementedError

    cdef void clock(self, uint64_t now_ns) noexcept nogil:
        """What time it is, before anything else is asked in a turn."""

    cdef int tick(self, uint64_t now_ns) except -1 nogil:
        return 0

    cdef int cancel_waiting(self, uint64_t mask, uint64_t value, int32_t error) except -1 nogil:
        return 0

    cdef uint64_t waiting_bytes(self, uint64_t mask, uint64_t value) noexcept nogil:
        return 0

    cdef void give_up_base(self) noexcept nogil:
        """Nobody waits any longer for reads of a base that fails."""

    cdef int extents(self, uint64_t offset_bytes, uint64_t length_bytes, Extent *out, int capacity) except -1 nogil:
        out[0].length_bytes = length_bytes
        out[0].state = 0
        return 1

    cdef uint32_t take_ops(self, DeviceOp **ops) noexcept nogil:
        return 0

    cdef uint32_t take_done(self, Done **done) noexcept nogil:
        return 0

    cdef uint32_t wants(self) noexcept nogil:
        return 0


cdef class NbdLoop:
    """The loop's state. Everything but the constructor belongs to the thread that called open()."""

    cdef readonly Queue queue
    # Memory. What is held is within total_cap: each connection's share (connections * share_cap <= total_cap - common_cap), and what is
    # beyond the shares, over_bytes, within common_cap. See may_read.
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
    cdef Connection *first[LISTS]
    cdef Connection *last[LISTS]
    cdef Slot **slabs
    cdef uint32_t slab_count
    cdef Slot *free_slots
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
        # Up to this much in all, no rule of may_read refuses anything, whoever holds it.
        self.easy_total = max(0, common - 2 * <int>LARGEST_COST - 3 * reserve) // 3
        self.stall_ns = stall_ns
        self.busy_poll_ns = busy_poll_us * 1000
        self.force_blocking = force_blocking
        self.backends = []
        self.watches = {}

    def __dealloc__(self):
        cdef uint32_t i, j
        cdef Peer *peer
        if self.queue is not None:
            return                  # not closed: the device may still write to the buffers
        for i in range(self.slab_count):
            for j in range(SLOTS_PER_SLAB):
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
        free(self.slabs)
        free(self.exports)
        free(self.connections)
        free(self.scratch)
        free(self.ready_fds)

    # --- Set-up and Python's side -------------------------------------------------------------------------------

    def open(self):
        """Create the queue, in the thread that will call turns()."""
        self.queue = open_queue(self.force_blocking)
        self.scratch = <Extent *>malloc(STATUS_EXTENTS * sizeof(Extent))
        if self.scratch == NULL:
            raise MemoryError
        self.now_ns = fvd_monotonic_ns()

    def close(self):
        """Drop every connection and wait for the device operations under way."""
        cdef uint32_t i
        if self.queue is None:
            return
        for i in range(self.connection_capacity):
            if self.connections[i] != NULL and self.connections[i].state != CONNECTION_DEAD:
                self.hang_up(self.connections[i])
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
        if export.live or export.connections:
            raise RuntimeError("the export is in use")
        with nogil:
            while export.open_ops or export.touched:
                self.turn(TICK_NS)
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
        cdef Peer *peer = self.find_peer(peer_kind, peer_value)
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
        connection.readable = 1
        self.push(LIST_READY, connection)
        connection.export.connections += 1
        self.connections[number] = connection
        self.connection_count += 1
        self.accepted += 1
        return number

    cdef Peer *find_peer(self, uint32_t kind, uint64_t value) noexcept:
        cdef Peer *peer = self.peers
        while peer != NULL and (peer.kind != kind or peer.value != value):
            peer = peer.next
        return peer

    def peer_connections(self):
        """How many connections each peer has: by (kind, value)."""
        cdef Peer *peer = self.peers
        found = {}
        while peer != NULL:
            found[peer.kind, peer.value] = peer.connections
            peer = peer.next
        return found

    def take_endings(self):
        """On how many clients the loop has hung up since the last call: (sent no request, half a request, took no replies)."""
        cdef int i
        endings = tuple([self.endings[i] for i in range(ENDINGS)])
        for i in range(ENDINGS):
            self.endings[i] = 0
        return endings

    def turns(self, int64_t at_most_ns=-1):
        """Serve until Python has something to do, or for so long. Returns the watched descriptors that became ready."""
        cdef uint32_t number
        cdef int64_t until_ns
        with nogil:
            self.now_ns = fvd_monotonic_ns()            # Python may have taken its time
            until_ns = self.now_ns + at_most_ns
            for number in range(self.export_count):     # Python may have changed something in an engine
                if self.exports[number].live:
                    self.touch(self.exports[number])
                    self.exports[number].reported &= (<Backend>self.exports[number].backend).wants()
            if at_most_ns < 0:
                while not self.attention:
                    self.turn(TICK_NS)
            else:
                self.turn(min(TICK_NS, at_most_ns))
                while not self.attention and self.now_ns < until_ns:
                    self.turn(min(TICK_NS, until_ns - self.now_ns))
        PyErr_CheckSignals()
        self.attention = 0
        ready = [self.ready_fds[i] for i in range(self.ready_count)]
        self.ready_count = 0
        return ready

    def take_wants(self):
        """(export number, Want bits) of every export that wants something it has not said before."""
        cdef uint32_t i, wants
        cdef Export *export
        found = []
        for i in range(self.export_count):
            export = self.exports[i]
            wants = (<Backend>export.backend).wants() if export.live else 0
            if wants & ~export.reported:
                found.append((i, wants))
            export.reported = wants
        return found

    def drain(self, int64_t timeout_ns, int64_t export=ALL):
        """Read nothing more from the clients (of one export, or all), answer what is under way, hang up. Writes that wait for
        storage get no answer: a client that reconnects sends them again, and its guest sees no error. Clients that do not take their
        replies in time are dropped, and those whose requests wait for a base that fails: neither get they an answer."""
        cdef uint32_t i
        cdef int64_t until = fvd_monotonic_ns() + timeout_ns
        cdef Connection *connection
        for i in range(self.connection_capacity):
            connection = self.connections[i]
            if connection != NULL and connection.state == CONNECTION_OPEN and export in (ALL, connection.export.number):
                connection.unanswered = 1
                with nogil:
                    self.end(connection)
        while self.count_connections(export):
            if fvd_monotonic_ns() > until:
                self.drop_all(export)
                for i in range(self.export_count):
                    if self.exports[i].live and export in (ALL, i):
                        (<Backend>self.exports[i].backend).give_up_base()
                until = fvd_monotonic_ns() + timeout_ns
            with nogil:
                self.turn(TICK_NS // 10)
            PyErr_CheckSignals()

    def request(self, uint32_t export, bint close=False):
        """Flush an export, or close it: nothing may be asked of it afterwards. Returns 0 or a negative errno."""
        cdef Export *it = self.exports[export]
        if not it.live or it.closing:
            return 0
        it.answered = 0
        it.closing = close
        self.now_ns = fvd_monotonic_ns()
        with nogil:
            self.touch(it)
            (<Backend>it.backend).submit(REQUEST_CLOSE if close else REQUEST_FLUSH, 0, 0, 0, NULL, <uint64_t>INTERNAL << 32 | export)
            while not it.answered:
                self.turn(TICK_NS)
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
                self.drop(connection)

    def counters(self):
        cdef Export *export
        exports = []
        for i in range(self.export_count):
            export = self.exports[i]
            exports.append({
                "reads": export.commands[COMMAND_READ],
                "writes": export.commands[COMMAND_WRITE],
                "flushes": export.commands[COMMAND_FLUSH],
                "trims": export.commands[COMMAND_TRIM],
                "write_zeroes": export.commands[COMMAND_WRITE_ZEROES],
                "caches": export.commands[COMMAND_CACHE],
                "block_statuses": export.commands[COMMAND_BLOCK_STATUS],
                "errors": export.errors,
                "read_bytes": export.read_bytes,
                "written_bytes": export.written_bytes,
                "open_requests": export.open_requests,
                "connections": export.connections,
            })
        return {
            "connections": self.connection_count,
            "connections_total": self.accepted,
            "inflight_bytes": self.inflight_bytes,
            "pooled_bytes": self.pool.warm_bytes,
            "turns": self.turn_count,
            "exports": exports,
        }

    cdef uint32_t count_connections(self, int64_t export) noexcept:
        return self.connection_count if export == ALL else self.exports[export].connections

    # --- A turn -------------------------------------------------------------------------------------------------

    cdef int turn(self, int64_t timeout_ns) except -1 nogil:
        cdef Connection *connection
        cdef Connection *next
        cdef Export *export
        cdef int64_t spin_ns = 0
        if self.first[LIST_READY] != NULL or self.touched != NULL or (self.freed and self.first[LIST_PAUSED] != NULL):
            timeout_ns = 0
        if self.busy_poll_ns and self.now_ns - self.last_request_ns < 10 * self.busy_poll_ns:
            spin_ns = self.busy_poll_ns
        self.queue.turn(timeout_ns, spin_ns)
        self.turn_count += 1
        self.now_ns = fvd_monotonic_ns()
        if self.queue.interrupted:
            self.attention |= ATTENTION_TICK

        self.take_events()
        export = self.touched
        while export != NULL:
            self.answer(export)
            export = export.next_touched
        self.send_all()

        self.freed = False
        connection = self.take(LIST_PAUSED)
        while connection != NULL:
            next = connection.next[LIST_PAUSED]
            connection.listed[LIST_PAUSED] = 0
            self.push(LIST_READY if self.may_read(connection) else LIST_PAUSED, connection)
            connection = next
        connection = self.take(LIST_READY)
        while connection != NULL:
            next = connection.next[LIST_READY]
            connection.listed[LIST_READY] = 0
            if connection.state == CONNECTION_OPEN:
                self.receive(connection)
            connection = next

        if self.now_ns >= self.next_tick_ns:
            self.next_tick_ns = self.now_ns + TICK_NS
            self.tick_all()
        export = self.touched
        while export != NULL:
            self.settle(export)
            export = export.next_touched
        self.touched = NULL
        self.send_all()
        self.bury()
        return 0

    cdef int take_events(self) except -1 nogil:
        cdef uint32_t i, number
        cdef Event *event
        cdef Connection *connection
        for i in range(self.queue.event_count):
            event = &self.queue.events[i]
            if event.kind == EVENT_OP:
                self.touch(self.exports[event.disk])
                self.exports[event.disk].open_ops -= 1
                (<Backend>self.exports[event.disk].backend).complete(event.key, event.result)
                continue
            number = <uint32_t>event.key
            if event.key >> 32 == WATCH_PYTHON:
                self.note_ready(<int>number)
                continue
            connection = self.connections[number]
            if event.kind == EVENT_READABLE:
                connection.readable = 1
                if event.result < 0 or event.result & (POLLHUP | POLLERR | POLLRDHUP):
                    connection.hung_up = 1
                self.push(LIST_READY, connection)
            else:
                connection.blocked = 0
                self.push(LIST_SEND, connection)
        self.queue.event_count = 0
        return 0

    cdef int note_ready(self, int fd) except -1 nogil:
        cdef uint32_t i, capacity = max(16, 2 * self.ready_capacity)
        cdef int *grown
        self.attention |= ATTENTION_FDS
        for i in range(self.ready_count):
            if self.ready_fds[i] == fd:
                return 0
        if self.ready_count == self.ready_capacity:
            grown = <int *>realloc(self.ready_fds, capacity * sizeof(int))
            if grown == NULL:
                with gil:
                    raise MemoryError
            self.ready_fds = grown
            self.ready_capacity = capacity
        self.ready_fds[self.ready_count] = fd
        self.ready_count += 1
        return 0

    cdef void touch(self, Export *export) noexcept nogil:
        """Comes before every call of a backend that may begin or end something."""
        if export.clock_ns != self.now_ns:
            export.clock_ns = self.now_ns
            (<Backend>export.backend).clock(<uint64_t>self.now_ns)
        if not export.touched:
            export.touched = 1
            export.next_touched = self.touched
            self.touched = export

    cdef int tick_all(self) except -1 nogil:
        cdef uint32_t i
        cdef Connection *connection
        # A server that was stopped itself, or had other work, takes its clients to have been quiet for a moment only.
        cdef int64_t passed_ns = min(self.now_ns - self.last_tick_ns, 2 * TICK_NS)
        self.last_tick_ns = self.now_ns
        self.attention |= ATTENTION_TICK
        for i in range(self.export_count):
            if self.exports[i].live:
                self.touch(self.exports[i])
        for i in range(self.connection_capacity):
            connection = self.connections[i]
            if connection == NULL:
                continue
            if connection.state == CONNECTION_OPEN:
                self.judge(connection, passed_ns)
            elif connection.state == CONNECTION_ENDING and self.now_ns > connection.deadline_ns:
                self.drop(connection)
            else:
                self.cancel(connection)         # what has begun to wait since
        return 0

    cdef int judge(self, Connection *connection, int64_t passed_ns) except -1 nogil:
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
        if max(connection.half_sent_ns, connection.not_taken_ns) <= self.stall_ns:
            return 0
        self.endings[ENDING_HALF_SENT if connection.half_sent_ns > self.stall_ns else ENDING_NOT_TAKEN] += 1
        return self.drop(connection)

    cdef int answer(self, Export *export) except -1 nogil:
        """Make replies of what the engine finished."""
        cdef Done *done = NULL
        cdef uint32_t i, count = (<Backend>export.backend).take_done(&done)
        for i in range(count):
            if done[i].cookie >> 32 == INTERNAL:
                export.answered = 1
                export.answer = done[i].error
                continue
            export.open_requests -= 1
            self.finish(self.slot(<uint32_t>done[i].cookie), done[i].error, done[i].flags)
        return 0

    cdef int settle(self, Export *export) except -1 nogil:
        """The engine's tick; then everything it has for the device and for the clients."""
        cdef DeviceOp *ops = NULL
        cdef uint32_t count, wants
        if export.live:
            (<Backend>export.backend).tick(<uint64_t>self.now_ns)
        self.answer(export)
        count = (<Backend>export.backend).take_ops(&ops)
        if count:
            export.open_ops += count
            self.queue.start(export.number, ops, count)
        export.touched = 0
        wants = (<Backend>export.backend).wants()
        if wants & ~export.reported:
            self.attention |= ATTENTION_WANT
        export.reported &= wants
        return 0

    # --- Reading ------------------------------------------------------------------------------------------------

    cdef bint may_read(self, Connection *connection) except -1 nogil:
        """Whether the request whose header is there may be taken. What all hold together stays within total_cap:

        1. What is within a connection's share is always taken: nobody is shut out.
        2. What all have beyond their shares stays within common_cap.
        3. Of that, a peer gets at most as much as it leaves, and a connection of it at most as much as it leaves of that. There, who holds
           nothing goes on for longer than who holds something, and is asked for no more room for a large request than for a small one. So
           deep queues of one leave enough for the next, however slowly they are emptied, and small requests do not keep out large ones.

        Writes that wait for storage have caps of their own: those of a full disk must not stop the reads and flushes behind them."""
        if connection.inflight_bytes < self.easy_cap and self.inflight_bytes <= self.easy_total:
            return True
        if connection.state != CONNECTION_OPEN:
            return True
        if connection.end - connection.begin < REQUEST_BYTES:
            return True             # nothing to refuse yet
        if self.has_room(connection):
            return True
        connection.waiting_turn = self.waiting_turn = 0     # more may wait since these were counted
        return self.has_room(connection)

    cdef bint has_room(self, Connection *connection) except -1 nogil:
        cdef uint64_t mine = connection.inflight_bytes
        cdef uint64_t value = <uint64_t>connection.number << 32
        cdef Peer *peer = connection.peer
        cdef uint64_t over = beyond(mine, self.share_cap)
        cdef uint64_t cost, waiting, more, left, peer_holds
        cdef uint32_t i
        cost = PAGE + free_bytes_of(request_capacity(connection.buffer + connection.begin, STATUS_BYTES))
        if connection.waiting_turn != self.turn_count:
            connection.waiting_turn = self.turn_count
            connection.waiting = (<Backend>connection.export.backend).waiting_bytes(CONNECTION_MASK, value)
        waiting = share(mine, connection.waiting, connection.data_bytes)
        if waiting > self.waiting_cap:
            self.touch(connection.export)
            (<Backend>connection.export.backend).cancel_waiting(CONNECTION_MASK, value, -ENOSPC)
            connection.waiting_turn = 0
            return False
        if mine - waiting >= self.connection_cap:
            return False
        more = beyond(mine + cost, self.share_cap) - over
        if more == 0:
            return True
        mine -= waiting
        if self.waiting_turn != self.turn_count:
            self.waiting_turn = self.turn_count
            self.waiting = 0
            for i in range(self.export_count):
                if self.exports[i].live:
                    self.waiting += (<Backend>self.exports[i].backend).waiting_bytes(0, 0)
        waiting = share(self.inflight_bytes, self.waiting, self.data_bytes)
        if waiting > self.all_waiting_cap:
            for i in range(self.export_count):
                if self.exports[i].live:
                    self.touch(self.exports[i])
                    (<Backend>self.exports[i].backend).cancel_waiting(0, 0, -ENOSPC)
            self.waiting_turn = 0
            return False
        over = beyond(mine, self.share_cap)
        more = min(more, self.common_cap)       # one that is larger has it all to itself
        if self.over_bytes + more <= self.common_cap:
            left = self.common_cap - self.over_bytes
            # What waits is counted above, and here for nobody, so that it stops nobody.
            peer_holds = beyond(peer.over_bytes, waiting)
            return (mine + cost <= self.share_cap or peer_holds == 0
                    or left >= peer_holds + (2 * more + over + 3 * self.reserve_cap if over else 2 * self.reserve_cap))
        return False

    cdef int receive(self, Connection *connection) except -1 nogil:
        """Take what a connection sent, up to its share of this turn."""
        cdef uint32_t requests = REQUESTS_PER_TURN
        cdef int64_t capacity = BYTES_PER_TURN, count
        cdef int verdict
        while True:
            verdict = self.parse(connection, &requests)
            if verdict == CLOSED:
                return self.end(connection)
            if verdict == PAUSED:
                self.push(LIST_PAUSED, connection)
                return 0
            if verdict == SHARE_USED or (capacity <= 0 and connection.readable):
                self.push(LIST_READY, connection)
                return 0
            if not connection.readable:
                return 0
            count = self.fill(connection)
            if count < 0:
                return self.drop(connection)
            capacity -= count

    cdef int64_t fill(self, Connection *connection) except? -1 nogil:
        """Receive once: the rest of a write's data straight into its buffer, what follows into the receive buffer. Returns how many
        bytes; negative: the connection is broken."""
        cdef iovec[2] parts
        cdef msghdr message
        cdef Slot *slot = connection.filling
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
            parts[0].iov_base = slot.payload + (slot.request.length_bytes - direct)
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
            connection.readable = 0
            return 0
        if count == 0:
            wire_step(&connection.wire, ON_END)
            return 0
        if count < <ssize_t>(direct + capacity - connection.end) and not connection.hung_up:
            connection.readable = 0
        connection.received_total += <uint64_t>count
        direct = <uint32_t>min(<uint64_t>count, <uint64_t>direct)
        connection.end += <uint32_t>count - direct
        if direct and take_data(&connection.wire, direct):
            self.submit_write(connection)
        return count

    cdef int parse(self, Connection *connection, uint32_t *requests) except -1 nogil:
        """Turn received bytes into requests. Returns a Verdict."""
        cdef Wire *wire = &connection.wire
        cdef Slot *slot
        cdef Request request
        cdef uint32_t size
        while True:
            size = connection.end - connection.begin
            if wire.state == WIRE_HEADER:
                if size < REQUEST_BYTES:
                    return NEEDS_BYTES
                if requests[0] == 0:
                    return SHARE_USED
                if not self.may_read(connection):
                    return PAUSED
                take_header(wire, &connection.limits, connection.buffer + connection.begin, &request)
                connection.begin += REQUEST_BYTES
                if wire.state != WIRE_CLOSED:
                    requests[0] -= 1
                    self.begin(connection, &request)
                elif request.command != COMMAND_DISCONNECT:
                    self.endings[ENDING_GARBAGE] += 1
                    self.attention |= ATTENTION_TICK
                continue
            if wire.state == WIRE_CLOSED:
                return CLOSED
            if size == 0:
                return NEEDS_BYTES
            size = min(size, wire.left)
            slot = connection.filling
            if wire.state == WIRE_PAYLOAD:
                memcpy(slot.payload + (slot.request.length_bytes - wire.left), connection.buffer + connection.begin, size)
            connection.begin += size
            if take_data(wire, size) and slot != NULL:
                self.submit_write(connection)

    # --- Requests -----------------------------------------------------------------------------------------------

    cdef int begin(self, Connection *connection, const Request *request) except -1 nogil:
        cdef Slot *slot = self.new_slot(connection)
        cdef Export *export = connection.export
        cdef uint32_t flags = FLAG_FUA if request.flags & COMMAND_FLAG_FUA else 0
        cdef uint64_t length = request.length_bytes
        self.last_request_ns = self.now_ns
        connection.begun_total += 1
        slot.request = request[0]
        if request.error:
            return self.reply_error(slot, request.error)
        export.commands[request.command] += 1
        if request.command == COMMAND_READ:
            if not self.give_payload(slot, length):
                return self.finish(slot, -ENOMEM, 0)
            return self.submit(slot, REQUEST_READ, 0, slot.payload)
        if request.command == COMMAND_WRITE:
            connection.large = length >= LARGE_BYTES
            if not self.give_payload(slot, length):
                wire_step(&connection.wire, ON_NO_MEMORY)
                return self.finish(slot, -ENOMEM, 0)
            connection.filling = slot
            return 0
        if request.command == COMMAND_FLUSH:
            return self.submit(slot, REQUEST_FLUSH, 0, NULL)
        if request.command == COMMAND_TRIM:
            return self.submit(slot, REQUEST_TRIM, flags, NULL)
        if request.command == COMMAND_WRITE_ZEROES:
            return self.submit(slot, REQUEST_ZERO, flags | (FLAG_NO_HOLE if request.flags & COMMAND_FLAG_NO_HOLE else 0), NULL)
        if request.command == COMMAND_BLOCK_STATUS:
            return self.status(slot)
        return self.finish(slot, 0, 0)      # COMMAND_CACHE is a hint that we do not take

    cdef int submit_write(self, Connection *connection) except -1 nogil:
        cdef Slot *slot = connection.filling
        connection.filling = NULL
        connection.export.written_bytes += slot.request.length_bytes
        return self.submit(slot, REQUEST_WRITE, FLAG_FUA if slot.request.flags & COMMAND_FLAG_FUA else 0, slot.payload)

    cdef int submit(self, Slot *slot, uint32_t kind, uint32_t flags, uint8_t *buffer) except -1 nogil:
        cdef Export *export = slot.connection.export
        if not export.live or export.closing:
            return self.finish(slot, -ESHUTDOWN, 0)
        export.open_requests += 1
        self.touch(export)
        return (<Backend>export.backend).submit(kind, flags, slot.request.offset_bytes, slot.request.length_bytes, buffer,
                                                <uint64_t>slot.connection.number << 32 | slot.number)

    cdef int status(self, Slot *slot) except -1 nogil:
        cdef Export *export = slot.connection.export
        cdef int capacity = 1 if slot.request.flags & COMMAND_FLAG_REQ_ONE else STATUS_EXTENTS
        cdef int i, count, kept = 0
        cdef uint32_t flags, last_flags = 0
        cdef uint64_t last_bytes = 0
        if not export.live or export.closing:
            return self.finish(slot, -ESHUTDOWN, 0)
        count = (<Backend>export.backend).extents(slot.request.offset_bytes, slot.request.length_bytes, self.scratch, capacity)
        if count <= 0:
            return self.finish(slot, -EIO, 0)
        if not self.give_payload(slot, STATUS_HEAD_BYTES + STATUS_EXTENT_BYTES * count):
            return self.finish(slot, -ENOMEM, 0)
        for i in range(count):
            flags = STATUS_HOLE | STATUS_ZERO if self.scratch[i].state == EXTENT_ZERO else 0
            if kept and flags == last_flags:
                last_bytes += self.scratch[i].length_bytes      # engine extents that differ may look the same to NBD
            else:
                last_bytes = self.scratch[i].length_bytes
                kept += 1
            last_flags = flags
            put_status_extent(slot.payload + STATUS_HEAD_BYTES + STATUS_EXTENT_BYTES * (kept - 1), <uint32_t>last_bytes, flags)
        put_status_head(slot.payload, slot.request.cookie, kept)
        return self.reply(slot, slot.payload, STATUS_HEAD_BYTES + STATUS_EXTENT_BYTES * kept)

    cdef int finish(self, Slot *slot, int32_t result, uint32_t flags) except -1 nogil:
        """A request ended: make its reply."""
        cdef Connection *connection = slot.connection
        cdef Request *request = &slot.request
        cdef uint64_t length = request.length_bytes
        if result == -ESHUTDOWN and connection.unanswered:
            self.free_slot(slot)
            if connection.state != CONNECTION_DEAD:
                self.push(LIST_SEND, connection)    # it may have been the last
            return 0
        if result:
            return self.reply_error(slot, nbd_error(result))
        if request.command != COMMAND_READ:
            self.release_payload(slot)
            put_simple(slot.head, request.cookie, 0)
            return self.reply(slot, slot.head, SIMPLE_HEAD_BYTES)
        connection.export.read_bytes += length
        if not connection.limits.structured:
            put_simple(slot.payload - SIMPLE_HEAD_BYTES, request.cookie, 0)
            return self.reply(slot, slot.payload - SIMPLE_HEAD_BYTES, SIMPLE_HEAD_BYTES + length)
        if flags & DONE_ALL_ZERO:
            self.release_payload(slot)
            put_hole(slot.head, request.cookie, request.offset_bytes, request.length_bytes)
            return self.reply(slot, slot.head, HOLE_CHUNK_BYTES)
        put_data_head(slot.payload - DATA_HEAD_BYTES, request.cookie, request.offset_bytes, request.length_bytes)
        return self.reply(slot, slot.payload - DATA_HEAD_BYTES, DATA_HEAD_BYTES + length)

    cdef int reply_error(self, Slot *slot, uint32_t error) except -1 nogil:
        slot.connection.export.errors += 1
        self.release_payload(slot)
        if slot.connection.limits.structured:
            put_error(slot.head, slot.request.cookie, error)
            return self.reply(slot, slot.head, ERROR_CHUNK_BYTES)
        put_simple(slot.head, slot.request.cookie, error)
        return self.reply(slot, slot.head, SIMPLE_HEAD_BYTES)

    cdef int reply(self, Slot *slot, uint8_t *out, uint64_t out_bytes) except -1 nogil:
        cdef Connection *connection = slot.connection
        if connection.state == CONNECTION_DEAD:
            self.free_slot(slot)
            return 0
        slot.out = out
        slot.out_bytes = out_bytes
        slot.next = NULL
        if connection.last_reply == NULL:
            connection.first_reply = slot
        else:
            connection.last_reply.next = slot
        connection.last_reply = slot
        self.push(LIST_SEND, connection)
        return 0

    # --- Sending ------------------------------------------------------------------------------------------------

    cdef int send_all(self) except -1 nogil:
        cdef Connection *connection = self.take(LIST_SEND)
        cdef Connection *next
        while connection != NULL:
            next = connection.next[LIST_SEND]
            connection.listed[LIST_SEND] = 0
            if connection.state != CONNECTION_DEAD and not connection.blocked:
                self.send(connection)
            connection = next
        return 0

    cdef int send(self, Connection *connection) except -1 nogil:
        cdef iovec[REPLIES_PER_SEND] parts
        cdef msghdr message
        cdef Slot *slot
        cdef uint64_t skip, asked
        cdef ssize_t count
        memset(&message, 0, sizeof(message))
        message.msg_iov = parts
        while connection.first_reply != NULL:
            slot = connection.first_reply
            skip = connection.sent
            asked = 0
            message.msg_iovlen = 0
            while slot != NULL and message.msg_iovlen < REPLIES_PER_SEND:
                parts[message.msg_iovlen].iov_base = slot.out + skip
                parts[message.msg_iovlen].iov_len = slot.out_bytes - skip
                asked += slot.out_bytes - skip
                skip = 0
                message.msg_iovlen += 1
                slot = slot.next
            count = sendmsg(connection.fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL)
            if count < 0:
                if errno == EINTR:
                    continue
                if errno != EAGAIN:
                    return self.drop(connection)
                count = 0
            connection.sent += <uint64_t>count
            connection.sent_total += <uint64_t>count
            while connection.first_reply != NULL and connection.sent >= connection.first_reply.out_bytes:
                slot = connection.first_reply
                connection.sent -= slot.out_bytes
                connection.first_reply = slot.next
                self.free_slot(slot)
            if <uint64_t>count < asked:
                connection.blocked = 1
                return self.queue.want_write(connection.watch)
        connection.last_reply = NULL
        if connection.state == CONNECTION_ENDING and connection.slots == 0:
            return self.drop(connection)
        return 0

    # --- The end of a connection --------------------------------------------------------------------------------

    cdef int end(self, Connection *connection) except -1 nogil:
        """Take nothing more from it; it closes when everything under way has been answered."""
        connection.state = CONNECTION_ENDING
        connection.deadline_ns = self.now_ns + LINGER_NS
        if connection.filling != NULL:
            self.free_slot(connection.filling)
            connection.filling = NULL
        if connection.slots == 0:
            return self.drop(connection)
        return self.cancel(connection)

    cdef int cancel(self, Connection *connection) except -1 nogil:
        if not connection.export.live:
            return 0
        self.touch(connection.export)
        return (<Backend>connection.export.backend).cancel_waiting(CONNECTION_MASK, <uint64_t>connection.number << 32, -ESHUTDOWN)

    cdef int drop(self, Connection *connection) except -1 nogil:
        """Hang up now. Requests in the engine keep their buffers until it is done with them."""
        self.hang_up(connection)
        return self.cancel(connection)

    cdef int hang_up(self, Connection *connection) except -1 nogil:
        cdef Slot *slot
        connection.state = CONNECTION_DEAD
        shutdown(connection.fd, SHUT_RDWR)      # the peer learns now: the kernel's poll holds on to the socket a little longer
        self.queue.unwatch(connection.watch)
        c_close(connection.fd)
        connection.fd = -1
        if connection.filling != NULL:
            self.free_slot(connection.filling)
            connection.filling = NULL
        while connection.first_reply != NULL:
            slot = connection.first_reply
            connection.first_reply = slot.next
            self.free_slot(slot)
        connection.last_reply = NULL
        self.push(LIST_DYING, connection)
        return 0

    cdef void forget_peer(self, Peer *peer) noexcept nogil:
        cdef Peer **link = &self.peers
        peer.connections -= 1
        if peer.connections:
            return
        while link[0] != peer:
            link = &link[0].next
        link[0] = peer.next
        free(peer)

    cdef void bury(self) noexcept nogil:
        """Free the dead connections that nothing refers to any more."""
        cdef Connection *connection = self.take(LIST_DYING)
        cdef Connection *next
        while connection != NULL:
            next = connection.next[LIST_DYING]
            connection.listed[LIST_DYING] = 0
            if connection.slots or connection.listed[LIST_READY] or connection.listed[LIST_PAUSED] or connection.listed[LIST_SEND]:
                self.push(LIST_DYING, connection)
            else:
                self.connections[connection.number] = NULL
                self.connection_count -= 1
                connection.export.connections -= 1
                self.forget_peer(connection.peer)
                free(connection.buffer)
                free(connection)
            connection = next

    # --- Lists, slots, buffers ----------------------------------------------------------------------------------

    cdef void push(self, uint32_t name, Connection *connection) noexcept nogil:
        if connection.listed[name]:
            return
        connection.listed[name] = 1
        connection.next[name] = NULL
        if self.first[name] == NULL:
            self.first[name] = connection
        else:
            self.last[name].next[name] = connection
        self.last[name] = connection

    cdef Connection *take(self, uint32_t name) noexcept nogil:
        """The whole list, which is empty afterwards. Its members stay marked until the caller unmarks them, one by one."""
        cdef Connection *connection = self.first[name]
        self.first[name] = NULL
        return connection

    cdef Slot *slot(self, uint32_t number) noexcept nogil:
        return &self.slabs[number // SLOTS_PER_SLAB][number % SLOTS_PER_SLAB]

    cdef Slot *new_slot(self, Connection *connection) except NULL nogil:
        cdef Slot **grown
        cdef Slot *slab
        cdef int i
        if self.free_slots == NULL:
            grown = <Slot **>realloc(self.slabs, (self.slab_count + 1) * sizeof(Slot *))
            if grown != NULL:
                self.slabs = grown
            slab = <Slot *>calloc(SLOTS_PER_SLAB, sizeof(Slot))
            if grown == NULL or slab == NULL:
                with gil:
                    raise MemoryError
            self.slabs[self.slab_count] = slab
            for i in range(SLOTS_PER_SLAB):
                slab[i].number = self.slab_count * SLOTS_PER_SLAB + i
                slab[i].next = self.free_slots
                self.free_slots = &slab[i]
            self.slab_count += 1
        cdef Slot *slot = self.free_slots
        self.free_slots = slot.next
        slot.connection = connection
        slot.payload = NULL
        slot.payload_class = NO_CLASS
        slot.data_bytes = 0
        connection.slots += 1
        self.charge(connection, PAGE)       # requests without data count too: a flood of flushes is bounded
        return slot

    cdef inline void charge(self, Connection *connection, int64_t bytes) noexcept nogil:
        """A connection holds so much more memory, or less."""
        cdef uint64_t over = beyond(connection.inflight_bytes, self.share_cap)
        connection.inflight_bytes += <uint64_t>bytes
        self.inflight_bytes += <uint64_t>bytes
        over = beyond(connection.inflight_bytes, self.share_cap) - over
        connection.peer.over_bytes += over
        self.over_bytes += over

    cdef bint give_payload(self, Slot *slot, uint64_t size_bytes) noexcept nogil:
        """A page-aligned buffer with a page before it for the reply's head. False: no memory."""
        cdef uint8_t kind = class_of(size_bytes)
        cdef uint64_t capacity = <uint64_t>PAGE << kind
        cdef uint8_t *payload = pool_warm(&self.pool, kind)
        if payload == NULL:
            # What is kept for later counts too.
            if self.pool.warm_bytes + self.inflight_bytes + capacity > self.total_cap:
                pool_trim(&self.pool, beyond(self.total_cap, self.inflight_bytes + capacity))
            payload = pool_fresh(&self.pool, kind)
            if payload == NULL:
                return False
        slot.payload = payload
        slot.payload_class = kind
        slot.data_bytes = size_bytes
        slot.connection.data_bytes += size_bytes
        self.data_bytes += size_bytes
        self.charge(slot.connection, <int64_t>capacity)
        return True

    cdef void release_payload(self, Slot *slot) noexcept nogil:
        """As soon as the reply needs it no longer: it may be long until that is taken."""
        cdef uint64_t capacity
        if slot.payload == NULL:
            return
        capacity = <uint64_t>PAGE << slot.payload_class
        pool_give(&self.pool, slot.payload, slot.payload_class)
        slot.payload = NULL
        slot.connection.data_bytes -= slot.data_bytes
        self.data_bytes -= slot.data_bytes
        slot.data_bytes = 0
        self.charge(slot.connection, -<int64_t>capacity)

    cdef void free_slot(self, Slot *slot) noexcept nogil:
        self.release_payload(slot)
        self.freed = True
        slot.connection.slots -= 1
        self.charge(slot.connection, -PAGE)
        slot.next = self.free_slots
        self.free_slots = slot
