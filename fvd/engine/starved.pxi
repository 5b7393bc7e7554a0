# SPDX-License-Identifier: Apache-2.0
# Guests' writes for which there is no space below the storage: in the file system of a file or of a loop device's file, in a pool. With
# on_full="wait" they wait here, as those that find no slot do elsewhere: the operation stays under way for everything that looks for it.
#
# Offers: cancel_starved, handle_starved, hold_if_full, is_full, retry_starved, starved_bytes
# Needs: memory: out_of_memory


cdef inline bint is_full(int32_t error) noexcept nogil:
    return error == -ENOSPC or error == -EDQUOT


cdef inline Request *starved_request(Op *op) noexcept nogil:
    """Who waits for it; NULL: nobody, it is of a copy, which is dropped."""
    if op.purpose == PURPOSE_PLAIN:
        return op.request
    return op.job.request if op.purpose == PURPOSE_JOB else NULL


cdef bint hold_if_full(Engine e, Op *op) noexcept nogil:
    """A guest's write has found no space. True: it is held, and tried again."""
    if starved_request(op) == NULL:
        return False
    if not e.starved.below_full:
        e.starved.below_full = True
        e.want |= Want.STORAGE_BELOW
    if e.mode.fail_when_full or op.durable or e.starved.giving_up or e.failure.error_number or e.close.request != NULL:
        return False
    if op.starved == 0:
        e.starved.count += 1
    if e.starved.first == NULL:
        e.starved.tried_ns = e.now_ns
        e.starved.first = op
    else:
        e.starved.last.newer = op
    e.starved.last = op
    op.newer = NULL
    op.starved = STARVED_WAITS
    return True


cdef int handle_starved(Engine e, Op *op, int32_t error) except -1 nogil:
    """While there is no space a write of data ends otherwise."""
    cdef bint tried = op.starved != 0
    if tried:
        op.starved = 0
        e.starved.count -= 1
    # An overwrite needs no space, and shows nothing.
    if error or starved_request(op) == NULL or not (tried or op.purpose == PURPOSE_JOB):
        return 0
    if e.starved.first != NULL:
        retry_starved(e, True)
    if e.starved.count == 0:
        e.starved.below_full = False
        e.want |= Want.STORAGE_BELOW
    return 0


cdef int retry_starved(Engine e, bint all_of_them) except -1 nogil:
    """The oldest is handed out again, or all that wait: what they are to write is where it was."""
    cdef Op *op
    cdef DeviceOp *out
    e.starved.tried_ns = e.now_ns
    while e.starved.first != NULL:
        op = e.starved.first
        e.starved.first = op.newer
        op.newer = NULL
        op.starved = STARVED_TRIED
        if e.op_count == e.pools.op_capacity:
            out = <DeviceOp *>realloc(e.ops, 2 * e.pools.op_capacity * sizeof(DeviceOp))
            if out == NULL:
                out_of_memory()
            e.ops = out
            e.pools.op_capacity *= 2
        out = &e.ops[e.op_count]
        out.token = (<uint64_t>op.generation << 32) | op.index
        out.offset_bytes = op.offset_bytes
        out.length_bytes = op.length_bytes
        out.buffer = op.buffer
        out.kind = OP_WRITE
        out.target = TARGET_STORAGE
        out.durable = False
        e.op_count += 1
        if not all_of_them:
            return 0
    return 0


cdef uint64_t starved_bytes(Engine e, uint64_t mask, uint64_t value) noexcept nogil:
    """Of those that wait, of such requests."""
    cdef Op *op = e.starved.first
    cdef uint64_t total = 0
    while op != NULL:
        if (starved_request(op).cookie & mask) == value:
            total += op.length_bytes
        op = op.newer
    return total


cdef int cancel_starved(Engine e, uint64_t mask, uint64_t value, int32_t error) except -1 nogil:
    """Those of such requests that wait end with an error. Returns how many."""
    cdef Op *op = e.starved.first
    cdef Op *following
    cdef Op *kept = NULL
    cdef Op *cancelled = NULL
    cdef int count = 0
    cdef bint before = e.starved.giving_up
    e.starved.first = NULL
    while op != NULL:
        following = op.newer
        op.newer = NULL
        if (starved_request(op).cookie & mask) == value:
            op.newer = cancelled
            cancelled = op
        elif kept == NULL:
            e.starved.first = kept = op
        else:
            kept.newer = op
            kept = op
        op = following
    e.starved.last = kept
    e.starved.giving_up = True
    while cancelled != NULL:
        following = cancelled.newer
        cancelled.newer = NULL
        e.complete((<uint64_t>cancelled.generation << 32) | cancelled.index, error)
        count += 1
        cancelled = following
    e.starved.giving_up = before
    return count
