# SPDX-License-Identifier: Apache-2.0
# The in-flight memory (vhost-user, "Inflight I/O tracking"), which a front end keeps for the server after this one: which chains were taken
# and not answered, and in which order. It knows no request.
#
# Offers: inflight_bytes, note_published, note_taken, recover
# Needs: nothing
#
# What a dead server has left is believed as far as it can be checked: each head is below the ring's size, and is judged again as a fresh
# chain is before anything is done.

cdef extern from *:
    """
    #include <stdint.h>

    /* As the specification lays it out: all fields of the host's order. */
    struct fvd_entry { uint8_t taken, padding[5]; uint16_t next; uint64_t counter; };
    struct fvd_region { uint64_t features; uint16_t version, entries, last_head, used_index; struct fvd_entry entry[]; };
    #define FVD_REGION(at) ((struct fvd_region *)(at))
    static inline void fvd_entry_taken(uint8_t *at, uint32_t head, uint64_t counter) {
        FVD_REGION(at)->entry[head].counter = counter;
        __atomic_store_n(&FVD_REGION(at)->entry[head].taken, 1, __ATOMIC_RELEASE);
    }
    /* Behind those of this batch, before the used index is seen. */
    static inline void fvd_entry_ended(uint8_t *at, uint32_t head) {
        FVD_REGION(at)->entry[head].next = FVD_REGION(at)->last_head;
        __atomic_store_n(&FVD_REGION(at)->last_head, (uint16_t)head, __ATOMIC_RELEASE);
    }
    static inline uint16_t fvd_entry_next(const uint8_t *at, uint32_t head) { return FVD_REGION(at)->entry[head].next; }
    static inline void fvd_entry_free(uint8_t *at, uint32_t head) {
        __atomic_store_n(&FVD_REGION(at)->entry[head].taken, 0, __ATOMIC_RELEASE);
    }
    static inline int fvd_entry_is_taken(const uint8_t *at, uint32_t head) { return FVD_REGION(at)->entry[head].taken == 1; }
    static inline uint64_t fvd_entry_counter(const uint8_t *at, uint32_t head) { return FVD_REGION(at)->entry[head].counter; }
    static inline uint16_t fvd_region_used(const uint8_t *at) { return FVD_REGION(at)->used_index; }
    static inline void fvd_region_set_used(uint8_t *at, uint16_t index) {
        __atomic_store_n(&FVD_REGION(at)->used_index, index, __ATOMIC_RELEASE);
    }
    static inline uint16_t fvd_region_last(const uint8_t *at) { return FVD_REGION(at)->last_head; }
    static inline uint16_t fvd_region_version(const uint8_t *at) { return FVD_REGION(at)->version; }
    static inline uint16_t fvd_region_entries(const uint8_t *at) { return FVD_REGION(at)->entries; }
    static inline void fvd_region_begin(uint8_t *at, uint16_t entries) {
        FVD_REGION(at)->entries = entries;
        FVD_REGION(at)->version = 1;
    }
    """
    void fvd_entry_taken(uint8_t *at, uint32_t head, uint64_t counter) noexcept nogil
    void fvd_entry_ended(uint8_t *at, uint32_t head) noexcept nogil
    uint16_t fvd_entry_next(const uint8_t *at, uint32_t head) noexcept nogil
    void fvd_entry_free(uint8_t *at, uint32_t head) noexcept nogil
    bint fvd_entry_is_taken(const uint8_t *at, uint32_t head) noexcept nogil
    uint64_t fvd_entry_counter(const uint8_t *at, uint32_t head) noexcept nogil
    uint16_t fvd_region_used(const uint8_t *at) noexcept nogil
    void fvd_region_set_used(uint8_t *at, uint16_t index) noexcept nogil
    uint16_t fvd_region_last(const uint8_t *at) noexcept nogil
    uint16_t fvd_region_version(const uint8_t *at) noexcept nogil
    uint16_t fvd_region_entries(const uint8_t *at) noexcept nogil
    void fvd_region_begin(uint8_t *at, uint16_t entries) noexcept nogil

cdef enum:
    REGION_HEAD_BYTES = 16
    REGION_ENTRY_BYTES = 16
    REGION_ALIGN_BYTES = 64


cpdef uint64_t inflight_bytes(uint32_t size) noexcept:
    """Of one ring of so many entries."""
    cdef uint64_t bytes = REGION_HEAD_BYTES + <uint64_t>REGION_ENTRY_BYTES * size
    return (bytes + REGION_ALIGN_BYTES - 1) // REGION_ALIGN_BYTES * REGION_ALIGN_BYTES


cdef inline void note_taken(BlkRing r, uint16_t head) noexcept nogil:
    """R42: before anything is done for it."""
    if r.inflight != NULL and not BUG(Bug.TAKEN_BEFORE_IN_FLIGHT):
        fvd_entry_taken(r.inflight, head, r.counter)
        r.counter += 1


cdef inline void note_published(BlkRing r, uint16_t first, uint16_t count) noexcept nogil:
    """R42: the used index is seen: these `count` used elements are in flight no longer."""
    cdef uint16_t i, head
    for i in range(count):
        head = r.batch[<uint16_t>(first + i) & (r.size - 1)]
        fvd_entry_free(r.inflight, head)
    fvd_region_set_used(r.inflight, r.published)


cdef int recover(BlkRing r) except -1:
    """What the server before has left: r.again has the chains to be taken again, in the order in which it took them. Returns how many."""
    cdef uint16_t used = r.published
    cdef uint16_t seen = fvd_region_used(r.inflight)
    cdef uint32_t head, i
    if fvd_region_version(r.inflight) == 0 and fvd_region_entries(r.inflight) == 0:
        fvd_region_begin(r.inflight, <uint16_t>r.size)
        fvd_region_set_used(r.inflight, used)
        return 0                # a fresh one: the ring goes on from where the front end says
    if fvd_region_version(r.inflight) != 1 or fvd_region_entries(r.inflight) != r.size:
        raise InvalidArgument("the memory of requests in flight is of another version, or of rings of another size")
    # It died between the used index and the entries of that batch: they have been answered.
    if <uint16_t>(used - seen) > r.size:
        raise InvalidArgument("the memory of requests in flight belongs to another ring")
    head = fvd_region_last(r.inflight)
    for i in range(<uint16_t>(used - seen)):
        if head >= r.size:
            raise InvalidArgument("the memory of requests in flight names an entry outside of the ring")
        fvd_entry_free(r.inflight, head)
        head = fvd_entry_next(r.inflight, head)
    fvd_region_set_used(r.inflight, used)
    taken = []
    for head in range(r.size):
        if fvd_entry_is_taken(r.inflight, head):
            taken.append((fvd_entry_counter(r.inflight, head), head))
    taken.sort(reverse=True)
    r.counter = taken[0][0] + 1 if taken and taken[0][0] < 2**64 - 1 else 0
    r.again = NONE
    for _, head in taken:       # the last to be taken goes in first
        r.chains[head].following = r.again
        r.again = head
    r.next_available = <uint16_t>(used + len(taken))
    return len(taken)
