# SPDX-License-Identifier: Apache-2.0
# Guests' rings in the serving loop, beside connections: which are looked at in a turn, when a guest is called, and how one comes to rest.
# It knows neither messages nor what a ring's requests are.
#
# Offers: add_ring, call_all, cancel_ring, drain_ring, find_ring, list_ring, note_kick, remove_ring, ring_part_ended, take_from_rings
# Needs: nothing
#
# state       takes   what moves it                                                          to
# RUNNING     yes     drain_ring: its front end or the server stops it, or it has broken     DRAINING
# DRAINING    no      nothing of it is under way any more: Python is told (pop_rested)       RESTED
# RESTED      no      its memory may go; remove_ring frees its number
#
# What waits for storage or for the base ends when a ring drains: a guest that is to be stopped must not wait for an administrator.

cdef uint64_t RING_COOKIE = <uint64_t>1 << 63
cdef uint64_t RING_MASK = <uint64_t>0xFFFFFFFF << 32

cdef enum RingState:
    RING_RUNNING = 0
    RING_DRAINING = 1
    RING_RESTED = 2

cdef struct Ring:
    PyObject *it                    # a BlkRing; borrowed from NbdLoop.ring_objects
    Export *export
    uint32_t number
    uint32_t watch
    int call_fd
    uint8_t state                   # RingState
    uint8_t listed                  # among those that are looked at in this turn
    uint8_t told                    # to Python: 1: that it has broken, 2: that it has come to rest
    uint64_t parts                  # of it in the backend, that have been counted
    Ring *next


cdef Ring *find_ring(NbdLoop loop, uint64_t number) except NULL nogil:
    if number >= loop.ring_capacity or loop.rings[number] == NULL:
        with gil:
            raise RuntimeError("there is no such ring")
    return loop.rings[number]


cdef Ring *add_ring(NbdLoop loop, object it, Export *export, int kick_fd, int call_fd) except NULL:
    cdef uint32_t number = 0, capacity
    cdef Ring **grown
    cdef Ring *ring
    while number < loop.ring_capacity and loop.rings[number] != NULL:
        number += 1
    if number == loop.ring_capacity:
        capacity = max(8, 2 * number)
        grown = <Ring **>realloc(loop.rings, capacity * sizeof(Ring *))
        if grown == NULL:
            raise MemoryError
        memset(grown + number, 0, (capacity - number) * sizeof(Ring *))
        loop.rings = grown
        loop.ring_capacity = capacity
    ring = <Ring *>calloc(1, sizeof(Ring))
    if ring == NULL:
        raise MemoryError
    ring.it = <PyObject *>it
    ring.export = export
    ring.number = number
    ring.call_fd = call_fd
    ring.parts = (<BlkRing>it).parts
    try:
        ring.watch = loop.queue.watch(kick_fd, <uint64_t>WATCH_RING << 32 | number)
    except BaseException:
        free(ring)
        raise
    (<BlkRing>it).counts = &export.counts
    loop.rings[number] = ring
    loop.ring_objects[number] = it
    export.rings += 1
    list_ring(loop, ring)           # it may have been filled before it was kicked
    return ring


cdef void list_ring(NbdLoop loop, Ring *ring) noexcept nogil:
    if ring.listed:
        return
    ring.listed = 1
    ring.next = NULL
    if loop.first_ring == NULL:
        loop.first_ring = ring
    else:
        loop.last_ring.next = ring
    loop.last_ring = ring


cdef void note_kick(NbdLoop loop, uint32_t number) noexcept nogil:
    """The descriptor is never read: each write to it wakes the loop again."""
    if number < loop.ring_capacity and loop.rings[number] != NULL:
        list_ring(loop, loop.rings[number])


cdef int ring_part_ended(NbdLoop loop, uint64_t cookie, int32_t error) except -1 nogil:
    cdef Ring *ring = loop.rings[(cookie & ~RING_COOKIE) >> 32]
    (<BlkRing>ring.it).part_ended(<uint32_t>cookie, error)
    list_ring(loop, ring)           # its guest is told, and has more, perhaps
    return 0


cdef int call_all(NbdLoop loop) except -1 nogil:
    """Shows each guest what has ended, and calls those that ask for it: once for all that a turn has ended."""
    cdef Ring *ring = loop.first_ring
    cdef uint64_t one = 1
    while ring != NULL:
        if (<BlkRing>ring.it).publish() and ring.call_fd >= 0:
            c_write(ring.call_fd, &one, sizeof(one))        # EAGAIN: it is full of calls already
        ring = ring.next
    return 0


cdef int take_from_rings(NbdLoop loop) except -1 nogil:
    """Each ring's share of a turn. One that has more stays in the list."""
    cdef Ring *ring = loop.first_ring
    cdef Ring *next
    cdef Taken taken
    loop.first_ring = NULL
    while ring != NULL:
        next = ring.next
        ring.listed = 0
        if ring.state == RING_RUNNING:
            touch(loop, ring.export)
            loop.last_request_ns = loop.now_ns
            taken = (<BlkRing>ring.it).take(<Backend>ring.export.backend, RING_COOKIE | <uint64_t>ring.number << 32, REQUESTS_PER_TURN,
                                            BYTES_PER_TURN)
            ring.export.open_requests += (<BlkRing>ring.it).parts - ring.parts
            ring.parts = (<BlkRing>ring.it).parts
            if (<BlkRing>ring.it).fault != NULL or (<BlkRing>ring.it).is_torn():
                drain_ring(loop, ring, True)
                loop.attention |= ATTENTION_RING
            elif taken == TAKEN_SOME or (<BlkRing>ring.it).next_used != (<BlkRing>ring.it).published:
                list_ring(loop, ring)
            elif taken != TAKEN_NO_MEMORY and (<BlkRing>ring.it).ask_for_kick():
                list_ring(loop, ring)
        elif ring.state == RING_DRAINING and (<BlkRing>ring.it).busy == 0:
            if (<BlkRing>ring.it).next_used != (<BlkRing>ring.it).published and not (<BlkRing>ring.it).silent:
                list_ring(loop, ring)           # its last answers are shown first
            else:
                ring.state = RING_RESTED
                loop.attention |= ATTENTION_RING
        ring = next
    return 0


cdef int drain_ring(NbdLoop loop, Ring *ring, bint silently) except -1 nogil:
    """Takes no more of it. `silently`: its guest is told of nothing that ends from now on, and finds it in flight."""
    if ring.state == RING_RUNNING:
        ring.state = RING_DRAINING
        loop.queue.unwatch(ring.watch)
    (<BlkRing>ring.it).leaves = True
    if silently:
        (<BlkRing>ring.it).silent = True
    if ring.state == RING_RESTED:
        return 0
    list_ring(loop, ring)
    return cancel_ring(loop, ring)


cdef int cancel_ring(NbdLoop loop, Ring *ring) except -1 nogil:
    """What waits for storage or the base ends with ESHUTDOWN."""
    if ring.state != RING_DRAINING or not ring.export.live:
        return 0
    touch(loop, ring.export)
    return (<Backend>ring.export.backend).cancel_waiting(RING_MASK, RING_COOKIE | <uint64_t>ring.number << 32, -ESHUTDOWN)


cdef int remove_ring(NbdLoop loop, uint32_t number) except -1:
    cdef Ring *ring = find_ring(loop, number)
    if ring.state != RING_RESTED or ring.listed:
        raise RuntimeError("a ring is removed when it has come to rest")
    (<BlkRing>ring.it).counts = &(<BlkRing>ring.it).own_counts
    ring.export.rings -= 1
    loop.rings[number] = NULL
    del loop.ring_objects[number]
    free(ring)
    return 0
