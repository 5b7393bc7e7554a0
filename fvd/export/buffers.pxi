# SPDX-License-Identifier: Apache-2.0
# Buffers for the data of requests, of 4 KiB << class, each with a page before it for a reply's head. Part of _server.pyx; knows no request.
#
# What is given back is kept for the next one, up to POOLED_BYTES; beyond it the memory itself goes back to the system at once. A
# general allocator cannot promise that: buffers of many sizes, asked for and given back in an order that a stranger chooses, leave
# holes in it that nothing fits into, and 8 KiB at a page's border take 12 there. So small buffers are cut from spans, each for one class,
# whose addresses are kept and whose pages are not; large ones are mappings of their own.
#
# Offers: class_of, free_bytes_of, pool_discard, pool_end, pool_fresh, pool_give, pool_trim, pool_warm
# Needs: nothing

cdef extern from *:
    """
    #include <sys/mman.h>

    #ifdef __SANITIZE_ADDRESS__
    #define FVD_ADDRESS_SANITIZER 1
    #elif defined(__has_feature)
    #if __has_feature(address_sanitizer)
    #define FVD_ADDRESS_SANITIZER 1
    #endif
    #endif

    #ifdef FVD_ADDRESS_SANITIZER
    /* Each buffer by itself, so that a byte beyond its end is seen. */
    enum { FVD_SPAN_CLASSES = 0 };
    static void *fvd_map(size_t size_bytes, int span) {
        (void)span;
        return aligned_alloc(4096, size_bytes);
    }
    static void fvd_unmap(void *memory, size_t size_bytes) {
        (void)size_bytes;
        free(memory);
    }
    #else
    enum { FVD_SPAN_CLASSES = 5 };
    static void *fvd_map(size_t size_bytes, int span) {
        void *memory = mmap(NULL, size_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED)
            return NULL;
        if (span)
            madvise(memory, size_bytes, MADV_NOHUGEPAGE);   /* a huge page would keep what single buffers gave back */
        return memory;
    }
    static void fvd_unmap(void *memory, size_t size_bytes) {
        munmap(memory, size_bytes);
    }
    #endif
    """
    const int FVD_SPAN_CLASSES
    void *fvd_map(size_t size_bytes, int span) noexcept nogil
    void fvd_unmap(void *memory, size_t size_bytes) noexcept nogil
    int madvise(void *memory, size_t size_bytes, int advice) noexcept nogil
    const int MADV_DONTNEED

cdef enum:
    CLASSES = 14                    # up to 32 MiB
    SPAN_CLASSES = 5                # up to 64 KiB; at least FVD_SPAN_CLASSES
    SPAN_BYTES = 1 << 20
    POOLED_BYTES = 64 << 20

cdef struct Cut:                    # the spans of one class
    uint8_t *fresh                  # what of the last span was never used ...
    uint32_t fresh_count            # ... and how many buffers that is
    uint8_t **cold                  # buffers without pages; its capacity is all that were ever cut
    uint32_t cold_count
    uint32_t cut_count

cdef struct Pool:
    uint8_t *warm[CLASSES]          # each buffer's first word is the next one
    uint64_t warm_bytes             # with the pages before them
    Cut[SPAN_CLASSES] cuts
    uint8_t **spans
    uint32_t span_count
    uint32_t span_capacity


cdef inline uint8_t class_of(uint64_t size_bytes) noexcept nogil:
    cdef uint8_t kind = 0
    while <uint64_t>PAGE << kind < size_bytes:
        kind += 1
    return kind


cdef inline uint64_t size_of(uint8_t kind) noexcept nogil:
    return PAGE + (<uint64_t>PAGE << kind)


cdef inline uint64_t free_bytes_of(uint64_t size_bytes) noexcept nogil:
    """Of the buffer for so much data; 0 for none."""
    return <uint64_t>PAGE << class_of(size_bytes) if size_bytes else 0


cdef inline uint8_t *pool_warm(Pool *pool, uint8_t kind) noexcept nogil:
    """One that was kept, or NULL."""
    cdef uint8_t *payload = pool.warm[kind]
    if payload != NULL:
        pool.warm[kind] = (<uint8_t **>payload)[0]
        pool.warm_bytes -= size_of(kind)
    return payload


cdef uint8_t *pool_fresh(Pool *pool, uint8_t kind) noexcept nogil:
    """Another one. NULL: no memory."""
    cdef uint64_t size = size_of(kind)
    cdef uint8_t *memory
    cdef Cut *cut
    if kind >= FVD_SPAN_CLASSES:
        memory = <uint8_t *>fvd_map(size, 0)
        return memory + PAGE if memory != NULL else NULL
    cut = &pool.cuts[kind]
    if cut.cold_count:
        cut.cold_count -= 1
        return cut.cold[cut.cold_count]
    if cut.fresh_count == 0 and not pool_new_span(pool, cut, <uint32_t>(SPAN_BYTES // size)):
        return NULL
    memory = cut.fresh
    cut.fresh += size
    cut.fresh_count -= 1
    return memory + PAGE


cdef bint pool_new_span(Pool *pool, Cut *cut, uint32_t count) noexcept nogil:
    cdef uint32_t capacity = max(<uint32_t>16, 2 * pool.span_capacity)
    cdef uint8_t **grown
    cdef uint8_t *memory
    if pool.span_count == pool.span_capacity:
        grown = <uint8_t **>realloc(pool.spans, capacity * sizeof(uint8_t *))
        if grown == NULL:
            return False
        pool.spans = grown
        pool.span_capacity = capacity
    grown = <uint8_t **>realloc(cut.cold, (cut.cut_count + count) * sizeof(uint8_t *))
    if grown == NULL:
        return False
    cut.cold = grown
    memory = <uint8_t *>fvd_map(SPAN_BYTES, 1)
    if memory == NULL:
        return False
    pool.spans[pool.span_count] = memory
    pool.span_count += 1
    cut.cut_count += count
    cut.fresh = memory
    cut.fresh_count = count
    return True


cdef inline void pool_give(Pool *pool, uint8_t *payload, uint8_t kind) noexcept nogil:
    cdef uint64_t size = size_of(kind)
    if pool.warm_bytes + size > POOLED_BYTES:
        pool_discard(pool, payload, kind)
        return
    (<uint8_t **>payload)[0] = pool.warm[kind]
    pool.warm[kind] = payload
    pool.warm_bytes += size


cdef void pool_discard(Pool *pool, uint8_t *payload, uint8_t kind) noexcept nogil:
    """Its memory goes back to the system."""
    cdef uint64_t size = size_of(kind)
    if kind >= FVD_SPAN_CLASSES:
        fvd_unmap(payload - PAGE, size)
        return
    madvise(payload - PAGE, size, MADV_DONTNEED)
    pool.cuts[kind].cold[pool.cuts[kind].cold_count] = payload
    pool.cuts[kind].cold_count += 1


cdef void pool_trim(Pool *pool, uint64_t keep_bytes) noexcept nogil:
    """Keep no more than that of what nobody uses; the largest go first."""
    cdef int kind = CLASSES - 1
    while kind >= 0 and pool.warm_bytes > keep_bytes:
        if pool.warm[kind] == NULL:
            kind -= 1
        else:
            pool_discard(pool, pool_warm(pool, kind), kind)


cdef void pool_end(Pool *pool) noexcept nogil:
    """Everything goes, what is still in use from spans too."""
    cdef uint32_t i
    pool_trim(pool, 0)
    for i in range(pool.span_count):
        fvd_unmap(pool.spans[i], SPAN_BYTES)
    for i in range(SPAN_CLASSES):
        free(pool.cuts[i].cold)
    free(pool.spans)
    memset(pool, 0, sizeof(Pool))
