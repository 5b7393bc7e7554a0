# SPDX-License-Identifier: Apache-2.0
# What is where, for block status. Changes nothing.
#
# Offers: extents_of
# Needs: changes: slot_of


cdef int extents_of(Engine e, uint64_t offset_bytes, uint64_t length_bytes, Extent *out, int capacity) except -1 nogil:
    cdef uint64_t at = offset_bytes
    cdef uint64_t stop = min(offset_bytes + length_bytes, e.disk.virtual_size)
    cdef uint64_t end, chunk, first, last, run
    cdef uint32_t slot, state
    cdef bint present
    cdef int count = 0
    if offset_bytes > e.disk.virtual_size:
        return 0
    while at < stop:
        chunk = at >> e.disk.chunk_shift
        end = min(stop, (chunk + 1) << e.disk.chunk_shift)
        slot = slot_of(e, chunk)
        first = at >> e.disk.block_shift
        last = ((end - 1) >> e.disk.block_shift) + 1
        present = bit_get(e.maps.bitmap, first)
        run = bits_find(e.maps.bitmap, first, last, not present)
        if run < last:
            end = run << e.disk.block_shift
        if present:
            state = EXTENT_DATA if slot != EMPTY else EXTENT_ZERO
        elif at < e.disk.base_size:
            state = EXTENT_BASE
            end = min(end, e.disk.base_size)
        else:
            state = EXTENT_ZERO
        if count and out[count - 1].state == state:
            out[count - 1].length_bytes += end - at
        else:
            if count == capacity:
                break
            out[count].length_bytes = end - at
            out[count].state = state
            out[count].reserved = 0
            count += 1
        at = end
    return count
