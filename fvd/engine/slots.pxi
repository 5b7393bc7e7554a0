# Which free slot a chunk gets. Any will do for correctness; where it lies decides how far a head travels, and how many requests of a
# guest that reads in sequence stay in sequence on the device.

cdef enum:
    # How far a chunk looks for a mapped one below it: over a block group of ext4, 128 MiB, and more. Not above it: a file system writes
    # upwards, and what lies above is often another group's beginning. Traces of guests showed 1.06 of raw's travel so, 1.25 with both.
    NEIGHBOURS = 256
    BEGUN_NEIGHBOURS = 8        # and for those that have a slot but are not mapped yet: a guest that writes in sequence, many at once
    NEARBY_SLOTS = 1 << 16      # how far from its wish: 8 KiB of the map of slots, each way


cdef uint64_t slot_append(Engine e) noexcept nogil:
    """Placement `append`: the next free one upwards, from the start again at the end; or the capacity."""
    cdef uint64_t slot = bits_find(e.used, e.slot_cursor, e.capacity, False)
    return slot if slot < e.capacity else bits_find(e.used, 0, e.capacity, False)


cdef inline uint32_t slot_held(Engine e, uint64_t chunk, bint begun) noexcept nogil:
    """Its slot, with `begun` also one that is not yet in the table; or EMPTY."""
    cdef uint32_t slot = e.table[chunk]
    cdef Busy *b
    if slot == EMPTY and begun:
        b = busy_find(e, chunk)
        if b != NULL and b.reserved:
            slot = b.slot
    return slot


cdef uint64_t slot_wish(Engine e, uint64_t chunk) noexcept nogil:
    """Where a raw layout would have it after the nearest chunk below it that has a slot; with none nearby, as far into the present storage
    as the chunk is into the disk."""
    cdef uint64_t distance
    cdef uint32_t slot
    for distance in range(1, min(<uint64_t> NEIGHBOURS, chunk) + 1):
        slot = slot_held(e, chunk - distance, e.busy_count and distance <= BEGUN_NEIGHBOURS)
        if slot != EMPTY:
            return min(slot + distance, e.capacity - 1)
    # Both are below 2^28: the product fits.
    return chunk * e.capacity / e.chunks


cdef uint64_t slot_spread(Engine e, uint64_t chunk) noexcept nogil:
    """Placement `spread`: the free slot that is nearest to the wish; with none nearby, as `append`."""
    cdef uint64_t wish = slot_wish(e, chunk)
    cdef uint64_t end = min(wish + NEARBY_SLOTS, e.capacity)
    cdef uint64_t first = wish - NEARBY_SLOTS if wish > NEARBY_SLOTS else 0
    cdef uint64_t above = bits_find(e.used, wish, end, False)
    cdef uint64_t below
    if above == wish:
        return wish
    if above < end and above - wish < wish - first:
        first = wish - (above - wish) + 1   # below it only what is nearer counts
    below = bits_find_last(e.used, first, wish, False)
    if below < wish:
        return below
    return above if above < end else slot_append(e)


cdef uint32_t slot_take(Engine e, uint64_t chunk) noexcept nogil:
    """Reserve a free slot for a chunk in memory, or EMPTY."""
    cdef uint64_t slot
    if e.free_count == 0:
        return EMPTY
    slot = slot_spread(e, chunk) if e.spread else slot_append(e)
    if slot >= e.capacity:
        return EMPTY
    bits_fill(e.used, slot, slot + 1, True)
    e.free_count -= 1
    e.slot_cursor = slot + 1
    if e.slot_cursor >= e.capacity:
        e.slot_cursor = 0
    if e.free_count < e.wake_below_slots and e.capacity < e.chunks:
        e.want |= WANT_GROWTH
    return <uint32_t> slot


cdef int slot_give(Engine e, uint32_t slot) except -1 nogil:
    ensure(bit_get(e.used, slot), "a free slot was freed")
    bits_fill(e.used, slot, <uint64_t> slot + 1, False)
    if slot < e.capacity:
        e.free_count += 1
    return 0
