# SPDX-License-Identifier: Apache-2.0
# The split ring (virtio 1.2, 2.7): entries are copied out of the guest's memory, judged on the copy, and translated. It knows no request.
#
# Offers: collect, guest_asks_for_call, guest_head, guest_index, put_used, request_kick, tell_used_index
# Needs: nothing
#
# A guest may write to its memory while it is read. So everything is read once, and what was judged is what is used.

cdef extern from *:
    """
    #include <endian.h>
    #include <stdint.h>
    #include <string.h>

    struct fvd_descriptor { uint64_t address; uint32_t length; uint16_t flags, next; };
    static inline uint16_t fvd_load16(const uint8_t *at) { return le16toh(__atomic_load_n((const uint16_t *)at, __ATOMIC_ACQUIRE)); }
    static inline void fvd_store16(uint8_t *at, uint16_t value) { __atomic_store_n((uint16_t *)at, htole16(value), __ATOMIC_RELEASE); }
    static inline void fvd_fence(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
    static inline struct fvd_descriptor fvd_descriptor_at(const uint8_t *table, uint32_t index) {
        struct fvd_descriptor copy;
        memcpy(&copy, table + 16 * (size_t)index, 16);
        __asm__ volatile("" : "+m"(copy));      /* no second read of the guest's memory */
        copy.address = le64toh(copy.address);
        copy.length = le32toh(copy.length);
        copy.flags = le16toh(copy.flags);
        copy.next = le16toh(copy.next);
        return copy;
    }
    static inline void fvd_put_used(uint8_t *used, uint32_t place, uint32_t head, uint32_t written) {
        uint32_t element[2] = {htole32(head), htole32(written)};
        memcpy(used + 4 + 8 * (size_t)place, element, 8);
    }
    """
    cdef struct fvd_descriptor:
        uint64_t address
        uint32_t length
        uint16_t flags, next
    uint16_t fvd_load16(const uint8_t *at) noexcept nogil
    void fvd_store16(uint8_t *at, uint16_t value) noexcept nogil
    void fvd_fence() noexcept nogil
    fvd_descriptor fvd_descriptor_at(const uint8_t *table, uint32_t index) noexcept nogil
    void fvd_put_used(uint8_t *used, uint32_t place, uint32_t head, uint32_t written) noexcept nogil

cdef enum:
    ENTRY_BYTES = 16
    FLAG_NEXT = 1
    FLAG_WRITABLE = 2
    FLAG_INDIRECT = 4
    NO_INTERRUPT = 1            # of the available ring: the guest wants no calls
    NO_NOTIFY = 1               # of the used ring: we want no kicks


cdef inline uint16_t guest_index(BlkRing r) noexcept nogil:
    """How many entries the guest has made available, modulo 2**16."""
    return fvd_load16(r.available + 2)


cdef inline uint16_t guest_head(BlkRing r, uint16_t index) noexcept nogil:
    return fvd_load16(r.available + 4 + 2 * (index & (r.size - 1)))


cdef inline bint break_off(BlkRing r, const char *fault) noexcept nogil:
    r.fault = fault
    return False


cdef bint add_entry(BlkRing r, const fvd_descriptor *entry) noexcept nogil:
    """One entry of a chain becomes pieces."""
    cdef uint64_t address = entry.address, left = entry.length, length
    cdef bint writable = (entry.flags & FLAG_WRITABLE) != 0
    cdef uint8_t *at
    cdef Piece *last
    if not writable and r.in_count:
        return break_off(r, b"a chain has entries to read behind entries to write")
    if address + left < address:
        return break_off(r, b"an entry of a chain reaches beyond all addresses")
    while left:
        length = left
        at = r.memory.at_guest(address, &length)
        if at == NULL:
            return break_off(r, b"an entry of a chain is not in the guest's memory")
        address += length
        left -= length
        last = &r.pieces[r.out_count + r.in_count - 1]
        if (r.in_count if writable else r.out_count) and last.at + last.length_bytes == at:
            last.length_bytes += length
            continue
        if r.out_count + r.in_count == PIECES_MAX:
            return break_off(r, b"a chain has too many pieces")
        last = &r.pieces[r.out_count + r.in_count]
        last.at = at
        last.length_bytes = length
        if writable:
            r.in_count += 1
        else:
            r.out_count += 1
    return True


cdef bint collect(BlkRing r, uint16_t head) noexcept nogil:
    """The chain that begins with this entry, in r.pieces. False: it is none (r.fault)."""
    cdef const uint8_t *table = r.descriptors
    cdef uint32_t entries = r.size, left = r.size, index = head
    cdef uint64_t length
    cdef bint is_indirect = False       # its table may be the ring's own: an address does not tell
    cdef fvd_descriptor entry
    r.out_count = r.in_count = 0
    if head >= r.size:
        return break_off(r, b"a chain begins outside of the ring")
    while True:
        if left == 0:
            return break_off(r, b"a chain goes in circles")
        left -= 1
        entry = fvd_descriptor_at(table, index)
        if entry.flags & FLAG_INDIRECT:
            length = entry.length
            if is_indirect or not r.has_indirect or entry.flags & FLAG_NEXT:
                return break_off(r, b"an indirect table stands where none may")
            if length == 0 or length % ENTRY_BYTES or length > PIECES_MAX * ENTRY_BYTES:
                return break_off(r, b"an indirect table has no whole entries, or too many")
            table = r.memory.at_guest(entry.address, &length)
            if table == NULL or length != entry.length:
                return break_off(r, b"an indirect table is not in one piece of the guest's memory")
            is_indirect = True
            entries = left = <uint32_t>(length // ENTRY_BYTES)
            index = 0
            continue
        if not add_entry(r, &entry):
            return False
        if not entry.flags & FLAG_NEXT:
            return True
        index = entry.next
        if index >= entries:
            return break_off(r, b"a chain leads out of its table")


cdef inline void put_used(BlkRing r, uint16_t head, uint64_t written_bytes) noexcept nogil:
    """Seen by the guest from the next `tell_used_index` on."""
    fvd_put_used(r.used, r.next_used & (r.size - 1), head, <uint32_t>min(written_bytes, <uint64_t>0xFFFFFFFF))
    r.next_used += 1


cdef inline void tell_used_index(BlkRing r) noexcept nogil:
    fvd_store16(r.used + 2, r.next_used)
    r.published = r.next_used


cdef inline bint guest_asks_for_call(BlkRing r) noexcept nogil:
    """Whether it wants to be called for what has been published since the last call."""
    cdef uint16_t wanted, told = r.told
    fvd_fence()                 # its wish is read after it can see the index
    r.told = r.published
    if r.calls_due:
        r.calls_due = False
        return True
    if not r.has_event_index:
        return not fvd_load16(r.available) & NO_INTERRUPT
    wanted = fvd_load16(r.available + 4 + 2 * r.size)
    return <uint16_t>(r.published - wanted - 1) < <uint16_t>(r.published - told)


cdef inline bint request_kick(BlkRing r) noexcept nogil:
    """The guest is to kick when it adds an entry. Returns whether it has added one before it could know."""
    if r.has_event_index:
        fvd_store16(r.used + 4 + 8 * r.size, r.next_available)
    fvd_fence()
    return guest_index(r) != r.next_available
