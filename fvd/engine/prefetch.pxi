# SPDX-License-Identifier: Apache-2.0
# Prefetching: copies of what nobody has asked for yet, along the plan, while the guest is quiet. How many at once and how fast is said from
# outside (fvd.base.steering); when, is decided here, for a guest that comes back must not wait for somebody to notice.

cdef enum:
    RATE_BURST_NS = 250000000       # of the rate that may be used at once after a pause
    PREFETCH_MAX = 16              # copies at once, each with a buffer of 1 MiB or one block, whatever is asked for


cdef bint prefetch_may_begin(Engine e) noexcept nogil:
    cdef double burst, fresh
    if e.prefetch_count >= min(e.prefetch_depth, PREFETCH_MAX) or e.closing != NULL or e.closed or e.failed_errno or e.base_absent == 0:
        return False
    if e.now_ns < e.no_slot_until_ns:
        return False
    if e.prefetch_idle_ns and (e.open_requests or e.now_ns - e.guest_last_ns < e.prefetch_idle_ns):
        return False
    if e.base_failing:
        # One asks whether it is back.
        if e.prefetch_count or e.now_ns - e.probe_ns < PROBE_AFTER_NS:
            return False
        e.probe_ns = e.now_ns
    if e.prefetch_rate_bytes:
        # In floating point: time by rate may be more than any integer holds.
        burst = <double>(e.prefetch_rate_bytes / (1000000000 / RATE_BURST_NS) + 1)
        fresh = <double>(e.now_ns - e.rate_ns) * <double>e.prefetch_rate_bytes / 1e9
        e.rate_tokens = <int64_t>min(<double>e.rate_tokens + fresh, burst)
        e.rate_ns = e.now_ns
        return e.rate_tokens > 0
    return True


cdef bint prefetch_next(Engine e, Run *run) except -1 nogil:
    """The next run of absent blocks of the plan, of one chunk and in no copy."""
    cdef uint64_t end, chunk, limit
    cdef Copy *c
    while e.plan_at < e.plan_count:
        end = min(e.plan[e.plan_at].end, e.base_blocks)
        if e.plan_cursor < end:
            e.plan_cursor = bits_find(e.bitmap, e.plan_cursor, end, False)
        if e.plan_cursor >= end:
            e.plan_at += 1
            if e.plan_at < e.plan_count:
                e.plan_cursor = e.plan[e.plan_at].first
            continue
        run.first = e.plan_cursor
        chunk = run.first / e.blocks_per_chunk
        limit = min(end, (chunk + 1) * e.blocks_per_chunk)
        limit = min(limit, run.first + e.copy_most_blocks)
        c = copy_find(e, chunk, run.first, &limit)
        if c != NULL:
            e.plan_again = True     # it may yet be given up
            e.plan_cursor = c.end_block
            continue
        run.end = bits_find(e.bitmap, run.first, limit, True)
        e.plan_cursor = run.end
        return True
    return False


cdef int prefetch_pump(Engine e) except -1 nogil:
    """Begin as many copies as may be."""
    cdef Run run
    while prefetch_may_begin(e):
        if not prefetch_next(e, &run):
            # What was given up is looked for again, but not in a hurry.
            if not e.plan_again or e.prefetch_count or e.now_ns - e.pass_ns < RETRY_AFTER_NS:
                return 0
            e.plan_again = False
            e.pass_ns = e.now_ns
            e.plan_at = 0
            e.plan_cursor = e.plan[0].first
            continue
        copy_begin(e, run.first / e.blocks_per_chunk, run.first, run.end, True)
        if e.prefetch_rate_bytes:
            e.rate_tokens -= <int64_t>((run.end - run.first) << e.block_shift)
    return 0
