# SPDX-License-Identifier: Apache-2.0
# Which free slot a chunk gets. Any will do for correctness; where it lies decides how far a head travels, and how many requests of a
# guest that reads in sequence stay in sequence on the device.

cdef enum:
    # How far a chunk looks for a mapped one below it: over a block group of ext4, 128 MiB, and more. Not above it: a file system writes
    # upwards, and what lies above is often another group's beginning. Traces of guests showed 1.06 of raw's travel so, 1.25 with both.
    NEIGHBOURS = 256
    BEGUN_NEIGHBOURS = 8        # and for those that have a slot but are not mapped yet: a guest that writes in sequence, many at once
    NEARBY_SLOTS = 1 << 16      # how far from its wish: 8 KiB of the map of slots, each way


cdef inline uint64_t slots_at_hand(Engine e) noexcept nogil:
    """Slots that can be handed out now: the free ones, and those that wait for a discard."""
    return e.free_count + e.to_discard_count


cdef uint64_t slot_append(Engine e, uint64_t *among, bint value) noexcept nogil:
    """Placement `append`: the next one upwards whose bit has this value, from the start again at the end; or the capacity."""
    cdef uint64_t slot = bits_find(among, e.slot_cursor, e.capacity, value)
    return slot if slot < e.capacity else bits_find(among, 0, e.capacity, value)


cdef inline uint32_t slot_held(Engine e, uint64_t chunk, bint begun) noexcept nogil:
    """Its slot, with `begun` also one that is not yet in the table; or EMPTY."""
    cdef uint32_t slot = e.table[chunk]
    cdef Busy *b
    if slot == EMPTY and begun:
        b = busy_find(e, chunk)
        if b != NULL and b.reserved:
            slot = b.slot
    return slot


cdef uint64_t slot_goal(Engine e, uint64_t chunk) noexcept nogil:
    """Where a raw layout would have it after the nearest chunk below it that has a slot; with none nearby, as far into the present storage
    as the chunk is into the disk."""
    cdef uint64_t distance
    cdef uint32_t slot
    for distance in range(1, min(<uint64_t>NEIGHBOURS, chunk) + 1):
        slot = slot_held(e, chunk - distance, e.busy_count and distance <= BEGUN_NEIGHBOURS)
        if slot != EMPTY:
            return min(slot + distance, e.capacity - 1)
    # Both are below 2^28: the product fits.
    return chunk * e.capacity / e.chunks


cdef uint64_t slot_spread(Engine e, uint64_t chunk, uint64_t *among, bint value) noexcept nogil:
    """Placement `spread`: the slot with this bit that is nearest to the wish; with none nearby, as `append`."""
    cdef uint64_t wish = slot_goal(e, chunk)
    cdef uint64_t end = min(wish + NEARBY_SLOTS, e.capacity)
    cdef uint64_t first = wish - NEARBY_SLOTS if wish > NEARBY_SLOTS else 0
    cdef uint64_t above = bits_find(among, wish, end, value)
    cdef uint64_t below
    if above == wish:
        return wish
    if above < end and above - wish < wish - first:
        first = wish - (above - wish) + 1   # below it only what is nearer counts
    below = bits_find_last(among, first, wish, value)
    if below < wish:
        return below
    return above if above < end else slot_append(e, among, value)


cdef uint32_t slot_take(Engine e, uint64_t chunk) noexcept nogil:
    """Reserve a slot for a chunk in memory, or EMPTY. With none free, one that waits for its discard, which it then does without
    (R37: nobody waits for a discard that has not begun)."""
    cdef uint64_t slot
    cdef bint waits = e.free_count == 0
    cdef uint64_t *among = e.to_discard if waits else e.used
    if slots_at_hand(e) == 0:
        return EMPTY
    slot = slot_spread(e, chunk, among, waits) if e.spread else slot_append(e, among, waits)
    if slot >= e.capacity:
        return EMPTY
    if not waits:
        bits_fill(e.used, slot, slot + 1, True)
        e.free_count -= 1
    elif not BUG(Bug.DISCARD_OF_A_TAKEN_SLOT):
        # R32: nobody discards it under its data.
        bits_fill(e.to_discard, slot, slot + 1, False)
        e.to_discard_count -= 1
    e.slot_cursor = slot + 1
    if e.slot_cursor >= e.capacity:
        e.slot_cursor = 0
    if slots_at_hand(e) < e.wake_below_slots and e.capacity < e.chunks:
        e.want |= Want.GROWTH
    return <uint32_t>slot


cdef int slots_give(Engine e, uint64_t first, uint64_t end) except -1 nogil:
    """[first, end) are free."""
    ensure(bits_all(e.used, first, end), "a free slot was freed")
    bits_fill(e.used, first, end, False)
    if first < e.capacity:
        e.free_count += min(end, e.capacity) - first
    return 0


cdef inline int slot_give(Engine e, uint32_t slot) except -1 nogil:
    return slots_give(e, slot, <uint64_t>slot + 1)


# --- discards -----------------------------------------------------------------------------------------------------
#
# A discard tells the device that nothing is to be kept in a slot. It is advice: slots wait for theirs in a bitmap, few discards are in
# flight at once, neighbours share one, and who needs a slot takes it before its discard. How many slots are in discards at once is learned
# from how long these take: reads wait for them, on files for each extent that becomes a hole.

cdef int discard_later(Engine e, uint32_t slot) except -1 nogil:
    """A slot whose free is durable and that nothing touches. It stays in `used`."""
    if e.to_discard == NULL:
        e.to_discard = <uint64_t *>calloc(e.chunks // 64 + 1, 8)
        if e.to_discard == NULL:
            out_of_memory()
    bits_fill(e.to_discard, slot, <uint64_t>slot + 1, True)
    e.to_discard_count += 1
    return slot_give(e, slot) if BUG(Bug.SLOT_FREED_BEFORE_ITS_DISCARD) else 0


cdef int discards_begin(Engine e) except -1 nogil:
    """R31: as many as may be, each of neighbours that all wait."""
    cdef uint64_t first, end, most
    cdef Op *op
    if e.closing != NULL and (e.close_phase != CLOSE_DISCARDS or e.now_ns >= e.discards_until_ns):
        return 0
    while e.to_discard_count and (BUG(Bug.DISCARDS_WITHOUT_BOUND)
                                  or e.discarding < e.most_discarding and e.discarding_slots < e.discard_slots_max):
        most = min(e.discard_slots, max(e.discard_slots_max, e.discarding_slots + 1) - e.discarding_slots)
        first = bits_find(e.to_discard, e.discard_cursor, e.chunks, True)
        if first == e.chunks:
            first = bits_find(e.to_discard, 0, e.chunks, True)
        end = min(first + most, e.chunks)
        # R32: what lies between two that wait is somebody's.
        end = min(end, e.capacity) if BUG(Bug.DISCARD_ACROSS_USED_SLOTS) else bits_find(e.to_discard, first, end, False)
        e.to_discard_count -= bits_count(e.to_discard, first, end)
        bits_fill(e.to_discard, first, end, False)
        e.discard_cursor = end
        op = op_issue(e, WHAT_DISCARD, OP_DISCARD, TARGET_STORAGE, e.data_offset + (first << e.chunk_shift),
                      (end - first) << e.chunk_shift, NULL, False)
        op.slot = <uint32_t>first
        op.begun_ns = e.now_ns
        e.discarding_slots += end - first
        e.stat_discards += 1
        e.discarding += 1
        e.discarding_most = max(e.discarding_most, e.discarding)
    return 0


cdef int discard_ended(Engine e, Op *op, int32_t error) except -1 nogil:
    """Its slots are free, also if it failed."""
    cdef uint64_t slots = op.length_bytes >> e.chunk_shift
    cdef uint64_t took_ns = e.now_ns - op.begun_ns
    cdef uint64_t slow_ns = SLOW_DISCARD_NS if e.closing == NULL else CLOSE_SLOW_NS
    e.discarding -= 1
    e.discarding_slots -= slots
    if took_ns <= slow_ns / 2:
        e.discard_slots_max = min(e.discard_slots_max + slots, e.most_discarding * e.discard_slots)
    elif took_ns > slow_ns and op.number > e.discard_cut:
        # As many as would have ended in time; once for all that are under way.
        e.discard_slots_max = max(<uint64_t>(<double>e.discard_slots_max * <double>slow_ns / <double>took_ns), 1)
        e.discard_cut = e.op_number
    if not BUG(Bug.SLOT_FREED_BEFORE_ITS_DISCARD) and not (error and BUG(Bug.FAILED_DISCARD_KEEPS_ITS_SLOT)):
        slots_give(e, op.slot, op.slot + slots)
    if e.wait_slot.head != NULL:
        list_walk(e, &e.wait_slot)
    return discards_begin(e)
