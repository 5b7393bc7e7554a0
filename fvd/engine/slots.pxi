# SPDX-License-Identifier: Apache-2.0
# Which free slot a chunk gets. Any will do for correctness; where it lies decides how far a head travels, and how many requests of a
# guest that reads in sequence stay in sequence on the device.
#
# Offers: ask_for_growth, discard_later, discards_begin, handle_discard, resize_storage, slot_give, slot_offset, slot_take, slots_at_hand
# Needs: memory: active_find, ensure, op_issue, out_of_memory; request: retry_waiters

cdef enum:
    # How far a chunk looks for a mapped one below it: over a block group of ext4, 128 MiB, and more. Not above it: a file system writes
    # upwards, and what lies above is often another group's beginning. Traces of guests showed 1.06 of raw's travel so, 1.25 with both.
    NEIGHBOURS = 256
    BEGUN_NEIGHBOURS = 8        # and for those that have a slot but are not mapped yet: a guest that writes in sequence, many at once
    NEARBY_SLOTS = 1 << 16      # how far from its goal: 8 KiB of the map of slots, each way


cdef inline uint64_t slot_offset(Engine e, uint64_t slot) noexcept nogil:
    """Where it begins on storage, in bytes."""
    return e.disk.data_offset + (slot << e.disk.chunk_shift)


cdef inline uint64_t slots_at_hand(Engine e) noexcept nogil:
    """Slots that can be handed out now: the free ones, and those that wait for a discard."""
    return e.slots.free_count + e.discards.waiting_count


cdef uint64_t slot_append(Engine e, uint64_t *among, bint value) noexcept nogil:
    """Placement `append`: the next one upwards whose bit has this value, from the start again at the end; or the capacity."""
    cdef uint64_t slot = bits_find(among, e.slots.cursor, e.slots.capacity, value)
    return slot if slot < e.slots.capacity else bits_find(among, 0, e.slots.capacity, value)


cdef inline uint32_t slot_held(Engine e, uint64_t chunk, bint begun) noexcept nogil:
    """Its slot, with `begun` also one that is not yet in the table; or EMPTY."""
    cdef uint32_t slot = e.maps.table[chunk]
    cdef ActiveChunk *active
    if slot == EMPTY and begun:
        active = active_find(e, chunk)
        if active != NULL and active.reserved:
            slot = active.slot
    return slot


cdef uint64_t slot_goal(Engine e, uint64_t chunk) noexcept nogil:
    """Where a raw layout would have it after the nearest chunk below it that has a slot; with none nearby, as far into the present storage
    as the chunk is into the disk."""
    cdef uint64_t distance
    cdef uint32_t slot
    for distance in range(1, min(<uint64_t>NEIGHBOURS, chunk) + 1):
        slot = slot_held(e, chunk - distance, e.active_chunks.count and distance <= BEGUN_NEIGHBOURS)
        if slot != EMPTY:
            return min(slot + distance, e.slots.capacity - 1)
    # Both are below 2^28: the product fits.
    return chunk * e.slots.capacity / e.disk.chunks


cdef uint64_t slot_spread(Engine e, uint64_t chunk, uint64_t *among, bint value) noexcept nogil:
    """Placement `spread`: the slot with this bit that is nearest to the goal; with none nearby, as `append`."""
    cdef uint64_t goal = slot_goal(e, chunk)
    cdef uint64_t end = min(goal + NEARBY_SLOTS, e.slots.capacity)
    cdef uint64_t first = goal - NEARBY_SLOTS if goal > NEARBY_SLOTS else 0
    cdef uint64_t above = bits_find(among, goal, end, value)
    cdef uint64_t below
    if above == goal:
        return goal
    if above < end and above - goal < goal - first:
        first = goal - (above - goal) + 1   # below it only what is nearer counts
    below = bits_find_last(among, first, goal, value)
    if below < goal:
        return below
    return above if above < end else slot_append(e, among, value)


cdef uint32_t slot_take(Engine e, uint64_t chunk) noexcept nogil:
    """Reserve a slot for a chunk in memory, or EMPTY. With none free, one that waits for its discard, which it then does without
    (R37: nobody waits for a discard that has not begun)."""
    cdef uint64_t slot
    cdef bint waits = e.slots.free_count == 0
    cdef uint64_t *among = e.discards.waiting if waits else e.slots.used
    if slots_at_hand(e) == 0:
        return EMPTY
    slot = slot_spread(e, chunk, among, waits) if e.disk.spread else slot_append(e, among, waits)
    if slot >= e.slots.capacity:
        return EMPTY
    if not waits:
        bits_fill(e.slots.used, slot, slot + 1, True)
        e.slots.free_count -= 1
    elif not BUG(Bug.DISCARD_OF_A_TAKEN_SLOT):
        # R32: nobody discards it under its data.
        bits_fill(e.discards.waiting, slot, slot + 1, False)
        e.discards.waiting_count -= 1
    e.slots.cursor = slot + 1
    if e.slots.cursor >= e.slots.capacity:
        e.slots.cursor = 0
    ask_for_growth(e)
    return <uint32_t>slot


cdef int slots_give(Engine e, uint64_t first, uint64_t end) except -1 nogil:
    """[first, end) are free."""
    ensure(bits_all(e.slots.used, first, end), "a free slot was freed")
    bits_fill(e.slots.used, first, end, False)
    if first < e.slots.capacity:
        e.slots.free_count += min(end, e.slots.capacity) - first
    return 0


cdef inline int slot_give(Engine e, uint32_t slot) except -1 nogil:
    return slots_give(e, slot, <uint64_t>slot + 1)


cdef inline void ask_for_growth(Engine e) noexcept nogil:
    """Where fewer slots are free than whoever grows the storage wants to hear of."""
    if slots_at_hand(e) < e.slots.wake_below and e.slots.capacity < e.disk.chunks and not e.disk.raw and not e.mode.read_only:
        e.want |= Want.GROWTH


cdef int resize_storage(Engine e, uint64_t size_bytes) except -1:
    cdef uint64_t capacity = 0
    if size_bytes > e.disk.data_offset:
        capacity = min((size_bytes - e.disk.data_offset) >> e.disk.chunk_shift, e.disk.chunks)
    if e.disk.raw and capacity < e.disk.chunks:
        raise Corrupt("the storage is smaller than a raw disk needs")
    if not e.disk.raw and bits_find(e.slots.used, capacity, e.disk.chunks, True) < e.disk.chunks:
        raise Corrupt("the storage is smaller than a chunk that is in use needs")
    e.disk.storage_size = size_bytes
    e.prefetch.no_slot_until_ns = 0
    e.slots.capacity = capacity
    e.slots.free_count = 0 if e.disk.raw else capacity - bits_count(e.slots.used, 0, capacity)
    if e.slots.cursor >= capacity:
        e.slots.cursor = 0
    ask_for_growth(e)
    return 0


# --- discards -----------------------------------------------------------------------------------------------------
#
# A discard tells the device that nothing is to be kept in a slot. It is advice: slots wait for theirs in a bitmap, few discards are in
# flight at once, neighbours share one, and who needs a slot takes it before its discard. How many slots are in discards at once is learned
# from how long these take: reads wait for them, on files for each extent that becomes a hole.

cdef int discard_later(Engine e, uint32_t slot) except -1 nogil:
    """A slot whose free is durable and that nothing touches. It stays in `used`."""
    if e.discards.waiting == NULL:
        e.discards.waiting = <uint64_t *>calloc(e.disk.chunks // 64 + 1, 8)
        if e.discards.waiting == NULL:
            out_of_memory()
    bits_fill(e.discards.waiting, slot, <uint64_t>slot + 1, True)
    e.discards.waiting_count += 1
    return slot_give(e, slot) if BUG(Bug.SLOT_FREED_BEFORE_ITS_DISCARD) else 0


cdef int discards_begin(Engine e) except -1 nogil:
    """R31: as many as may be, each of neighbours that all wait."""
    cdef uint64_t first, end, most
    cdef Op *op
    if e.close.request != NULL and (e.close.phase != CLOSE_DISCARDS or e.now_ns >= e.discards.until_ns):
        return 0
    while e.discards.waiting_count and (BUG(Bug.DISCARDS_WITHOUT_BOUND)
                                        or e.discards.count < e.discards.count_max and e.discards.slots < e.discards.slots_max):
        most = min(e.discards.each_max, max(e.discards.slots_max, e.discards.slots + 1) - e.discards.slots)
        first = bits_find(e.discards.waiting, e.discards.cursor, e.disk.chunks, True)
        if first == e.disk.chunks:
            first = bits_find(e.discards.waiting, 0, e.disk.chunks, True)
        end = min(first + most, e.disk.chunks)
        # R32: what lies between two that wait is somebody's.
        end = min(end, e.slots.capacity) if BUG(Bug.DISCARD_ACROSS_USED_SLOTS) else bits_find(e.discards.waiting, first, end, False)
        e.discards.waiting_count -= bits_count(e.discards.waiting, first, end)
        bits_fill(e.discards.waiting, first, end, False)
        e.discards.cursor = end
        op = op_issue(e, PURPOSE_DISCARD, OP_DISCARD, TARGET_STORAGE, slot_offset(e, first),
                      (end - first) << e.disk.chunk_shift, NULL, False)
        op.slot = <uint32_t>first
        op.begun_ns = e.now_ns
        e.discards.slots += end - first
        e.count.discards += 1
        e.discards.count += 1
        e.discards.count_peak = max(e.discards.count_peak, e.discards.count)
    return 0


cdef int handle_discard(Engine e, Op *op, int32_t error) except -1 nogil:
    """Its slots are free, also if it failed."""
    cdef uint64_t slots = op.length_bytes >> e.disk.chunk_shift
    cdef uint64_t took_ns = e.now_ns - op.begun_ns
    cdef uint64_t slow_ns = SLOW_DISCARD_NS if e.close.request == NULL else CLOSE_SLOW_NS
    e.discards.count -= 1
    e.discards.slots -= slots
    if took_ns <= slow_ns / 2:
        e.discards.slots_max = min(e.discards.slots_max + slots, e.discards.count_max * e.discards.each_max)
    elif took_ns > slow_ns and op.number > e.discards.cut:
        # As many as would have ended in time; once for all that are under way.
        e.discards.slots_max = max(<uint64_t>(<double>e.discards.slots_max * <double>slow_ns / <double>took_ns), 1)
        e.discards.cut = e.flight.number
    if not BUG(Bug.SLOT_FREED_BEFORE_ITS_DISCARD) and not (error and BUG(Bug.FAILED_DISCARD_KEEPS_ITS_SLOT)):
        slots_give(e, op.slot, op.slot + slots)
    if e.waiting.slot.head != NULL:
        retry_waiters(e, &e.waiting.slot)
    return discards_begin(e)
