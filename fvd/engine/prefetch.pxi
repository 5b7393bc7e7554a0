# SPDX-License-Identifier: Apache-2.0
# Prefetching: copies of what nobody has asked for yet, along the plan, while the guest is quiet. How many at once and how fast is said from
# outside (fvd.base.steering); when, is decided here, for a guest that comes back must not wait for somebody to notice.
#
# Offers: prefetch_pump
# Needs: copy: copy_begin, copy_find

cdef enum:
    RATE_BURST_NS = 250000000       # of the rate that may be used at once after a pause
    PREFETCH_MAX = 16              # copies at once, each with a buffer of 1 MiB or one block, whatever is asked for


cdef bint prefetch_may_begin(Engine e) noexcept nogil:
    cdef double burst, fresh
    if e.prefetch.count >= min(e.prefetch.depth, PREFETCH_MAX) or e.base.absent == 0:
        return False
    if e.close.request != NULL or e.close.done or e.failure.error_number:
        return False
    if e.now_ns < e.prefetch.no_slot_until_ns:
        return False
    if e.prefetch.idle_ns and (e.open_requests or e.now_ns - e.prefetch.guest_last_ns < e.prefetch.idle_ns):
        return False
    if e.base.failing:
        # One asks whether it is back.
        if e.prefetch.count or e.now_ns - e.prefetch.probe_ns < PROBE_AFTER_NS:
            return False
        e.prefetch.probe_ns = e.now_ns
    if e.prefetch.rate_bytes:
        # In floating point: time by rate may be more than any integer holds.
        burst = <double>(e.prefetch.rate_bytes / (1000000000 / RATE_BURST_NS) + 1)
        fresh = <double>(e.now_ns - e.prefetch.rate_ns) * <double>e.prefetch.rate_bytes / 1e9
        e.prefetch.rate_tokens = <int64_t>min(<double>e.prefetch.rate_tokens + fresh, burst)
        e.prefetch.rate_ns = e.now_ns
        return e.prefetch.rate_tokens > 0
    return True


cdef bint prefetch_next(Engine e, Run *run) except -1 nogil:
    """The next run of absent blocks of the plan, of one chunk and in no copy."""
    cdef uint64_t end, chunk, limit
    cdef Copy *c
    while e.prefetch.plan_at < e.prefetch.plan_count:
        end = min(e.prefetch.plan[e.prefetch.plan_at].end, e.base.blocks)
        if e.prefetch.plan_cursor < end:
            e.prefetch.plan_cursor = bits_find(e.maps.bitmap, e.prefetch.plan_cursor, end, False)
        if e.prefetch.plan_cursor >= end:
            e.prefetch.plan_at += 1
            if e.prefetch.plan_at < e.prefetch.plan_count:
                e.prefetch.plan_cursor = e.prefetch.plan[e.prefetch.plan_at].first
            continue
        run.first = e.prefetch.plan_cursor
        chunk = run.first / e.disk.blocks_per_chunk
        limit = min(end, (chunk + 1) * e.disk.blocks_per_chunk)
        limit = min(limit, run.first + e.copies.blocks_max)
        c = copy_find(e, chunk, run.first, &limit)
        if c != NULL:
            e.prefetch.plan_again = True     # it may yet be given up
            e.prefetch.plan_cursor = c.end_block
            continue
        run.end = bits_find(e.maps.bitmap, run.first, limit, True)
        e.prefetch.plan_cursor = run.end
        return True
    return False


cdef int prefetch_pump(Engine e) except -1 nogil:
    """Begin as many copies as may be."""
    cdef Run run
    while prefetch_may_begin(e):
        if not prefetch_next(e, &run):
            # What was given up is looked for again, but not in a hurry.
            if not e.prefetch.plan_again or e.prefetch.count or e.now_ns - e.prefetch.pass_ns < RETRY_AFTER_NS:
                return 0
            e.prefetch.plan_again = False
            e.prefetch.pass_ns = e.now_ns
            e.prefetch.plan_at = 0
            e.prefetch.plan_cursor = e.prefetch.plan[0].first
            continue
        copy_begin(e, run.first / e.disk.blocks_per_chunk, run.first, run.end, True)
        if e.prefetch.rate_bytes:
            e.prefetch.rate_tokens -= <int64_t>((run.end - run.first) << e.disk.block_shift)
    return 0
