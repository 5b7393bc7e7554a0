# SPDX-License-Identifier: Apache-2.0
# Requests: how one advances, how it ends, and what reads do. A request is handed on piece by piece from its cursor; each piece becomes
# device operations or a job, and a piece that must wait leaves the whole request in one list, from which it goes on later.
#
# Offers: advance, done_push, fail_waiters, issue_plain, request_fail, request_release, retry_waiters
# Needs: changes: mapped_durably, slot_of; commit: commit_maybe; copy: read_through_copy, record_base_read; log: log_publish; memory:
#   bounce_take, ensure, list_push, list_take, op_issue, op_list, out_of_memory; slots: slot_offset; write: fail_rest, write_step,
#   zero_step


cdef int done_push(Engine e, Request *r) except -1 nogil:
    cdef Done *out
    if not BUG(Bug.ANSWER_BEFORE_LOG):
        log_publish(e)
    if e.failure.stopped and r.error == 0 and r.kind != REQUEST_CLOSE and not BUG(Bug.ANSWERED_WHEN_STOPPED):
        r.error = -EIO      # R39: also what was read or written before it was stopped
    if e.done_count == e.pools.done_capacity:
        out = <Done *>realloc(e.done, 2 * e.pools.done_capacity * sizeof(Done))
        if out == NULL:
            out_of_memory()
        e.done = out
        e.pools.done_capacity *= 2
    out = &e.done[e.done_count]
    out.cookie = r.cookie
    out.error = r.error
    out.flags = DONE_ALL_ZERO if r.kind == REQUEST_READ and not r.touched_device else 0
    e.done_count += 1
    e.open_requests -= 1
    e.prefetch.guest_last_ns = e.now_ns
    if r.kind == REQUEST_READ or r.kind == REQUEST_WRITE:
        if r.met_prefetch or e.prefetch.count:
            e.count.busy_requests += 1
            e.count.busy_ns += e.now_ns - r.begun_ns
        else:
            e.count.quiet_requests += 1
            e.count.quiet_ns += e.now_ns - r.begun_ns
    r.next = e.pools.free_requests
    e.pools.free_requests = r
    return 0


cdef int request_release(Engine e, Request *r) except -1 nogil:
    """One thing less to wait for."""
    r.pending -= 1
    if r.paused:
        # R34: half of it has ended, so that what follows can be joined.
        if r.pending > 1 + e.mode.window // 2 or BUG(Bug.PAUSED_REQUEST_FORGOTTEN):
            return 0
        r.paused = 0
        if r.error:
            r.cursor = r.end    # no more of what fails
        return advance(e, r)
    if r.pending:
        return 0
    # R10: a durable write that was under way when a flush failed may have been lost from the page cache with that flush, which took the
    # only error that the kernel gives.
    if r.flags & FLAG_FUA and e.failure.error_number and r.error == 0 and not BUG(Bug.FAILURES_IGNORED):
        r.error = -EIO
    if r.needs_commit and r.error == 0:
        r.needs_commit = 0
        if e.failure.error_number:
            r.error = -EIO
        else:
            list_push(&e.commit.flush_next, r)
            return commit_maybe(e)
    return done_push(e, r)


cdef int request_fail(Engine e, Request *r, int32_t error) except -1 nogil:
    """End a request that waits in no list any more."""
    if r.error == 0:
        r.error = error
    r.cursor = r.end
    return request_release(e, r)


cdef int fail_waiters(Engine e, RequestList *where, int32_t error) except -1 nogil:
    cdef Request *r = list_take(where)
    cdef Request *following
    while r != NULL:
        following = r.next
        request_fail(e, r, error)
        r = following
    return 0


cdef int advance(Engine e, Request *r) except -1 nogil:
    cdef int going
    while r.cursor < r.end:
        # R34: however long it is, it takes no more of the device at once.
        if r.pending > e.mode.window:
            r.paused = 1
            return 0
        if r.kind == REQUEST_READ:
            going = read_step(e, r)
        elif r.kind == REQUEST_WRITE:
            going = write_step(e, r, r.end)
        else:
            going = zero_step(e, r)
        if going == STEP_WAITS:
            return 0
    return request_release(e, r)


cdef int retry_waiters(Engine e, RequestList *where) except -1 nogil:
    """Let every waiting request try again, oldest first; those that must still wait return to a list."""
    cdef Request *r = list_take(where)
    cdef Request *following
    while r != NULL:
        following = r.next
        advance(e, r)
        r = following
    return 0


# --- plain reads and writes ---------------------------------------------------------------------------------------

cdef int issue_plain(Engine e, Request *r, uint8_t kind, uint64_t offset_bytes, uint64_t length_bytes, uint8_t *buffer,
                     bint durable) except -1 nogil:
    """Guest buffer to storage or back without a copy; joins the previous operation of this request when they touch."""
    cdef DeviceOp *last
    cdef Op *op
    cdef uint32_t index
    r.touched_device = 1
    if e.op_count:
        last = &e.ops[e.op_count - 1]
        index = <uint32_t>(last.token & 0xFFFFFFFFULL)
        op = &e.pools.slabs[index >> 8][index & 255]
        if (op.purpose == PURPOSE_PLAIN and op.number == e.flight.number and op.request == r and last.target == TARGET_STORAGE
                and last.kind == kind and last.durable == durable and last.offset_bytes + last.length_bytes == offset_bytes
                and last.buffer + last.length_bytes == buffer):
            ensure(offset_bytes + length_bytes <= e.disk.storage_size, "write past the end of storage")
            last.length_bytes += length_bytes
            op.length_bytes += length_bytes
            return 0
    op = op_issue(e, PURPOSE_PLAIN, kind, TARGET_STORAGE, offset_bytes, length_bytes, buffer, durable)
    op.request = r
    r.pending += 1
    op_list(e, op, kind == OP_WRITE)
    return 0


cdef int read_absent(Engine e, Request *r, uint64_t start, uint64_t end, bint zeros) except -1 nogil:
    """Blocks that are not here: from the base as far as it reaches (R12), zeros beyond."""
    cdef uint64_t base_end = start
    cdef uint8_t *buffer = r.buffer + (start - r.start)
    cdef Op *op
    if e.disk.has_base and not zeros and start < e.disk.base_size:
        record_base_read(e, r, start, end)
        base_end = end if end < e.disk.base_size or BUG(Bug.READ_BEYOND_THE_BASE) else e.disk.base_size
        r.touched_device = 1
        op = op_issue(e, PURPOSE_PLAIN, OP_READ, TARGET_BASE, start, base_end - start, buffer, False)
        op.request = r
        r.pending += 1
    if base_end < end:
        memset(buffer + (base_end - start), 0, end - base_end)
    return 0


cdef int read_step(Engine e, Request *r) except -1 nogil:
    cdef uint64_t start = r.cursor
    cdef uint64_t chunk = start >> e.disk.chunk_shift
    cdef uint64_t chunk_start = chunk << e.disk.chunk_shift
    cdef uint64_t end = min(r.end, chunk_start + (<uint64_t>1 << e.disk.chunk_shift))
    cdef uint64_t first = start >> e.disk.block_shift
    cdef uint64_t last = ((end - 1) >> e.disk.block_shift) + 1
    cdef uint32_t slot = slot_of(e, chunk)
    cdef bint present = bit_get(e.maps.bitmap, first)
    cdef uint64_t run = bits_find(e.maps.bitmap, first, last, not present)
    cdef uint64_t device_offset, low, high
    cdef uint8_t *buffer = r.buffer + (start - r.start)
    cdef int going
    cdef Op *op
    if run < last:
        end = run << e.disk.block_shift
    if not present and start < e.disk.base_size and (e.copies.count or e.copies.on_read):
        going = read_through_copy(e, r, chunk, slot, start, &end)
        if going != STEP_DIRECT:
            return going
    r.cursor = end
    if not present or slot == EMPTY:
        read_absent(e, r, start, end, present)
        return STEP_DONE
    last = ((end - 1) >> e.disk.block_shift) + 1
    if e.failure.error_number and not mapped_durably(e, chunk, slot, first, last) and not BUG(Bug.READ_AFTER_FAILURE):
        return fail_rest(r, -EIO)       # R38
    device_offset = slot_offset(e, slot) + (start - chunk_start)
    if ((start | end | <uint64_t><uintptr_t>buffer) & e.disk.align_mask) == 0:
        issue_plain(e, r, OP_READ, device_offset, end - start, buffer, False)
        return STEP_DONE
    low = device_offset & ~e.disk.align_mask
    high = (device_offset + (end - start) + e.disk.align_mask) & ~e.disk.align_mask
    r.touched_device = 1
    op = op_issue(e, PURPOSE_BOUNCED_READ, OP_READ, TARGET_STORAGE, low, high - low, NULL, False)
    op.bounce = bounce_take(e, high - low)
    e.ops[e.op_count - 1].buffer = op.bounce
    op.copy_to = buffer
    op.copy_skip = device_offset - low
    op.copy_bytes = end - start
    op.request = r
    r.pending += 1
    op_list(e, op, False)
    return STEP_DONE
