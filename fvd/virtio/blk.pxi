# SPDX-License-Identifier: Apache-2.0
# Requests of a virtio block device (virtio 1.2, 5.2.6): a chain becomes parts for a backend, and their ends become a status. It knows
# neither where rings lie nor who serves them.
#
# Offers: begin_chain, part_done
# Needs: inflight: note_taken; vring: put_used

cdef extern from *:
    """
    #include <endian.h>
    #include <stdint.h>

    struct fvd_request_head { uint32_t type, reserved; uint64_t sector; };
    struct fvd_request_range { uint64_t sector; uint32_t sectors, flags; };
    """
    cdef struct fvd_request_head:
        uint32_t type
        uint32_t reserved
        uint64_t sector
    cdef struct fvd_request_range:
        uint64_t sector
        uint32_t sectors
        uint32_t flags
    uint32_t le32toh(uint32_t value) noexcept nogil
    uint64_t le64toh(uint64_t value) noexcept nogil

cdef enum:                          # virtio's
    TYPE_IN = 0
    TYPE_OUT = 1
    TYPE_FLUSH = 4
    TYPE_GET_ID = 8
    TYPE_DISCARD = 11
    TYPE_WRITE_ZEROES = 13
    STATUS_OK = 0
    STATUS_ERROR = 1
    STATUS_UNSUPPORTED = 2
    RANGE_UNMAP = 1
    ID_BYTES = 20

cdef enum:
    SECTOR_BYTES = 512
    HEAD_BYTES = 16
    RANGE_BYTES = 16
    RANGES_MAX = 64                 # of a discard or write-zeroes: as the configuration says
    REQUEST_KINDS = 5               # of a chain that needs no backend
    BOUNCED_MAX = 32 << 20          # of one request
    BOUNCED_TOTAL_MAX = 64 << 20    # of all of a ring
    UNSUPPORTED = -1000             # no errno


cdef inline uint64_t bytes_of(const Piece *pieces, uint32_t count) noexcept nogil:
    cdef uint64_t total = 0
    cdef uint32_t i
    for i in range(count):
        total += pieces[i].length_bytes
    return total


cdef uint64_t move(Piece *pieces, uint32_t count, uint8_t *data, uint64_t length, bint fill) noexcept nogil:
    """Copies between pieces, from their beginning, and `data`. Returns how many bytes there were."""
    cdef uint64_t done = 0, part
    cdef uint32_t i
    for i in range(count):
        part = min(pieces[i].length_bytes, length - done)
        if fill:
            memcpy(pieces[i].at, data + done, part)
        else:
            memcpy(data + done, pieces[i].at, part)
        done += part
        if done == length:
            break
    return done


cdef void note_pieces(BlkRing r, const Piece *pieces, uint32_t count) noexcept nogil:
    """For the log of a migration: they have been written to."""
    cdef uint32_t i
    for i in range(count):
        r.memory.note_written(pieces[i].at, pieces[i].length_bytes)


cdef void skip(Piece **pieces, uint32_t *count, uint64_t length) noexcept nogil:
    """The first `length` bytes of the pieces have been used; there are so many."""
    while length:
        if pieces[0].length_bytes > length:
            pieces[0].at += length
            pieces[0].length_bytes -= length
            return
        length -= pieces[0].length_bytes
        pieces[0] += 1
        count[0] -= 1


cdef inline void count(Counts *counts, uint8_t kind) noexcept nogil:
    if kind == REQUEST_READ:
        counts.reads += 1
    elif kind == REQUEST_WRITE:
        counts.writes += 1
    elif kind == REQUEST_FLUSH:
        counts.flushes += 1
    elif kind == REQUEST_TRIM:
        counts.trims += 1
    elif kind == REQUEST_ZERO:
        counts.zeroes += 1


cdef bint begin_chain(BlkRing r, Backend backend, uint64_t cookie, uint16_t head, uint64_t *moved) except? -1 nogil:
    """Takes a request that has been collected. False: it is none (r.fault), or there is no memory for it now (no fault)."""
    cdef Piece *out = r.pieces
    cdef Piece *into = r.pieces + r.out_count
    cdef uint32_t out_count = r.out_count, in_count = r.in_count
    cdef Chain *chain = &r.chains[head]
    cdef fvd_request_head request
    cdef uint64_t length = 0
    if chain.busy:
        return break_off(r, b"a chain was made available again before it was answered")
    if move(out, out_count, <uint8_t *>&request, HEAD_BYTES, False) != HEAD_BYTES:
        return break_off(r, b"a request has no whole header")
    if in_count == 0:
        return break_off(r, b"a request has no place for its status")
    skip(&out, &out_count, HEAD_BYTES)
    into[in_count - 1].length_bytes -= 1
    chain.status = into[in_count - 1].at + into[in_count - 1].length_bytes
    if into[in_count - 1].length_bytes == 0:
        in_count -= 1
    chain.error = 0
    chain.pending = 1
    chain.written_bytes = 1
    chain.kind = REQUEST_KINDS
    chain.bounce = NULL
    request.type = le32toh(request.type)
    request.sector = le64toh(request.sector)
    moved[0] = 0
    if request.type == TYPE_IN or request.type == TYPE_OUT:
        if request.type == TYPE_OUT:
            into, in_count = out, out_count
        length = bytes_of(into, in_count)
        if not prepare_data(r, chain, into, in_count, length):
            return False
        moved[0] = length
    chain.busy = 1
    r.busy += 1
    note_taken(r, head)
    if request.type == TYPE_IN or request.type == TYPE_OUT:
        begin_transfer(r, backend, cookie | head, chain, request.type == TYPE_OUT, request.sector, into, in_count, length)
    elif request.type == TYPE_FLUSH:
        chain.kind = REQUEST_FLUSH
        begin_part(r, backend, cookie | head, chain, 0, 0, 0, NULL)
    elif request.type == TYPE_DISCARD or request.type == TYPE_WRITE_ZEROES:
        begin_ranges(r, backend, cookie | head, chain, request.type == TYPE_WRITE_ZEROES, out, out_count)
    elif request.type == TYPE_GET_ID:
        chain.written_bytes += move(into, in_count, r.serial, ID_BYTES, True)
        note_pieces(r, into, in_count)
    else:
        chain.error = UNSUPPORTED
    count(r.counts, chain.kind)
    part_done(r, head, 0)
    return True


cdef bint prepare_data(BlkRing r, Chain *chain, Piece *pieces, uint32_t count, uint64_t length) noexcept nogil:
    """Data in pieces of whole sectors goes straight to and from the guest's memory; other data through a buffer. False: not now."""
    cdef uint64_t odd = 0
    cdef uint32_t i
    cdef Bounce *bounce
    for i in range(count):
        odd |= pieces[i].length_bytes
    if length & (SECTOR_BYTES - 1) or length > BOUNCED_MAX:
        odd = 0                 # is refused later
    odd &= SECTOR_BYTES - 1
    if not odd and r.memory.log == NULL:
        return True
    if odd and r.bounced_bytes and r.bounced_bytes + length > BOUNCED_TOTAL_MAX:
        return False
    bounce = <Bounce *>malloc(sizeof(Bounce) + count * sizeof(Piece))
    if bounce == NULL:
        return False
    bounce.data = NULL          # only where the data is, for the log of a migration
    if odd:
        bounce.data = <uint8_t *>aligned(length)
    if odd and bounce.data == NULL:
        free(bounce)
        return False
    bounce.length_bytes = length
    bounce.count = count
    memcpy(bounce.pieces, pieces, count * sizeof(Piece))
    if odd:
        r.bounced_bytes += length
    chain.bounce = bounce
    return True


cdef int begin_transfer(BlkRing r, Backend backend, uint64_t cookie, Chain *chain, bint write, uint64_t sector, Piece *pieces,
                        uint32_t count, uint64_t length) except -1 nogil:
    cdef uint32_t i, flags = FLAG_FUA if write and r.is_durable else 0
    cdef uint64_t offset = sector * SECTOR_BYTES
    chain.kind = REQUEST_WRITE if write else REQUEST_READ
    if length & (SECTOR_BYTES - 1) or sector > r.sectors or length // SECTOR_BYTES > r.sectors - sector or (write and r.is_read_only):
        chain.error = -EIO
        return 0
    if write:
        r.counts.written_bytes += length
    else:
        r.counts.read_bytes += length
        chain.written_bytes += length
    if chain.bounce != NULL and chain.bounce.data != NULL:
        if write:
            move(pieces, count, chain.bounce.data, length, False)
        return begin_part(r, backend, cookie, chain, flags, offset, length, chain.bounce.data)
    for i in range(count):
        if pieces[i].length_bytes & (SECTOR_BYTES - 1):
            chain.error = -EIO              # larger than what goes through a buffer
            return 0
        begin_part(r, backend, cookie, chain, flags, offset, pieces[i].length_bytes, pieces[i].at)
        offset += pieces[i].length_bytes
    return 0


cdef int begin_ranges(BlkRing r, Backend backend, uint64_t cookie, Chain *chain, bint zeroes, Piece *pieces,
                      uint32_t count) except -1 nogil:
    """All ranges are judged before the first is begun."""
    cdef fvd_request_range[RANGES_MAX] ranges
    cdef uint64_t length = bytes_of(pieces, count)
    cdef uint32_t i, flags
    chain.kind = REQUEST_ZERO if zeroes else REQUEST_TRIM
    if r.is_read_only or length == 0 or length % RANGE_BYTES or length > RANGES_MAX * RANGE_BYTES:
        chain.error = -EIO
        return 0
    move(pieces, count, <uint8_t *>ranges, length, False)
    count = <uint32_t>(length // RANGE_BYTES)
    for i in range(count):
        ranges[i].sector = le64toh(ranges[i].sector)
        ranges[i].sectors = le32toh(ranges[i].sectors)
        ranges[i].flags = le32toh(ranges[i].flags)
        if ranges[i].flags & ~<uint32_t>(RANGE_UNMAP if zeroes else 0):
            chain.error = UNSUPPORTED
            return 0
        if ranges[i].sector > r.sectors or ranges[i].sectors > r.sectors - ranges[i].sector:
            chain.error = -EIO
            return 0
    for i in range(count):
        flags = FLAG_FUA if r.is_durable else 0
        if zeroes and not ranges[i].flags & RANGE_UNMAP:
            flags |= FLAG_NO_HOLE
        if ranges[i].sectors:
            begin_part(r, backend, cookie, chain, flags, ranges[i].sector * SECTOR_BYTES, <uint64_t>ranges[i].sectors * SECTOR_BYTES, NULL)
    return 0


cdef inline int begin_part(BlkRing r, Backend backend, uint64_t cookie, Chain *chain, uint32_t flags, uint64_t offset, uint64_t length,
                           uint8_t *at) except -1 nogil:
    chain.pending += 1
    r.parts += 1
    r.open_parts += 1
    return backend.submit(chain.kind, flags, offset, length, at, cookie)


cdef int part_done(BlkRing r, uint32_t head, int32_t error) except -1 nogil:
    """R41: how a request ended is told when the last of its parts has ended."""
    cdef Chain *chain = &r.chains[head]
    if error and chain.error == 0:
        chain.error = error
    chain.pending -= 1
    if chain.pending == 0 or (chain.error == 0 and BUG(Bug.ANSWER_BEFORE_LAST_PART)):
        end_chain(r, <uint16_t>head, chain)
    return 0


cdef void end_chain(BlkRing r, uint16_t head, Chain *chain) noexcept nogil:
    cdef Bounce *bounce = chain.bounce
    if not chain.busy:
        return
    if bounce != NULL:
        if bounce.data != NULL and chain.kind == REQUEST_READ and chain.error == 0 and not r.silent:
            move(bounce.pieces, bounce.count, bounce.data, bounce.length_bytes, True)
        if chain.kind == REQUEST_READ and r.memory.log != NULL:
            note_pieces(r, bounce.pieces, bounce.count)
        if bounce.data != NULL:
            r.bounced_bytes -= bounce.length_bytes
        free(bounce.data)
        free(bounce)
        chain.bounce = NULL
    chain.busy = 0
    r.busy -= 1
    if r.silent or (r.leaves and chain.error == -ESHUTDOWN and r.inflight != NULL):
        return                      # it stays in flight: whoever serves the ring next takes it again
    if chain.error:
        r.counts.errors += 1
    chain.status[0] = STATUS_OK if chain.error == 0 else STATUS_UNSUPPORTED if chain.error == UNSUPPORTED else STATUS_ERROR
    r.memory.note_written(chain.status, 1)
    r.batch[r.next_used & (r.size - 1)] = head
    put_used(r, head, chain.written_bytes)
    if r.inflight != NULL:
        fvd_entry_ended(r.inflight, head)
        if BUG(Bug.IN_FLIGHT_ENDED_BEFORE_USED):
            fvd_entry_free(r.inflight, head)
