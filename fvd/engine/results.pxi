# SPDX-License-Identifier: Apache-2.0
# Where the results of device operations go: each to the part that has asked for it, by its purpose.
#
# Offers: handle_op, refuse_ops
# Needs: commit: commit_maybe, handle_flush, handle_journal_write, handle_map_flush, handle_map_write; copy: handle_copy_read; memory:
#   bounce_give; request: request_release, retry_waiters; slots: handle_discard; write: job_continue


cdef int handle_op(Engine e, Op *op, int32_t error) except -1 nogil:
    """An operation has ended, and its end counts."""
    if op.purpose == PURPOSE_PLAIN:
        if error and op.request.error == 0:
            op.request.error = error
        return request_release(e, op.request)
    if op.purpose == PURPOSE_JOB:
        op.job.pending -= 1
        if error and op.job.error == 0:
            op.job.error = error
        return job_continue(e, op.job) if op.job.pending == 0 else 0
    if op.purpose == PURPOSE_COPY_READ:
        return handle_copy_read(e, op.copy, error)
    if op.purpose == PURPOSE_BOUNCED_READ:
        if error == 0:
            memcpy(op.copy_to, op.bounce + op.copy_skip, op.copy_bytes)
        elif op.request.error == 0:
            op.request.error = error
        bounce_give(e, op.bounce, op.length_bytes)
        request_release(e, op.request)
        return retry_waiters(e, &e.waiting.bounce) if e.waiting.bounce.head != NULL else 0
    if op.purpose == PURPOSE_FLUSH:
        return handle_flush(e, error)
    if op.purpose == PURPOSE_JOURNAL:
        return handle_journal_write(e, error)
    if op.purpose == PURPOSE_MAP:
        return handle_map_write(e, op.slot, error)
    if op.purpose == PURPOSE_MAP_FLUSH:
        return handle_map_flush(e, error)
    handle_discard(e, op, error)
    return commit_maybe(e) if BUG(Bug.FLUSH_WAITS_FOR_DISCARDS) else 0


cdef int refuse_ops(Engine e) except -1 nogil:
    """R39: of what a stopped engine has for its devices nothing reaches them: it fails here. Those that failed may have wanted more."""
    cdef DeviceOp op
    if e.failure.refusing or BUG(Bug.HANDED_OUT_WHEN_STOPPED):
        return 0
    e.failure.refusing = True
    while e.op_count:
        e.op_count -= 1
        op = e.ops[e.op_count]
        e.complete(op.token, -EIO)
    e.failure.refusing = False
    return 0
