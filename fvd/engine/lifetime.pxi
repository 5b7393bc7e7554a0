# SPDX-License-Identifier: Apache-2.0
# An engine's beginning and end: from what was loaded of a disk to the engine's fields, the memory that it has from the start, and giving
# back all of it. No request and no operation is known here.
#
# Offers: allocate_memory, free_memory, set_base, set_bits, set_disk, set_journal, set_maps, set_mode, zeroed_memory
# Needs: changes: change_set_resize; memory: out_of_memory; write: change_bytes


cdef void *zeroed_memory(size_t count, size_t item_bytes) except NULL:
    cdef void *memory = calloc(count, item_bytes)
    if memory == NULL:
        out_of_memory()
    return memory


cdef void *untouched_memory(size_t size_bytes) except NULL:
    """Zeros that are only read: they take no memory."""
    cdef void *memory = mmap(NULL, size_bytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if memory == MAP_FAILED:
        out_of_memory()
    return memory


cdef void *aligned_memory(size_t size_bytes) except NULL:
    cdef void *memory = aligned(size_bytes)
    if memory == NULL:
        out_of_memory()
    return memory


cdef uint64_t set_bits(uint64_t *bits, where) except? 0:
    """Those whose element of an array is not zero. Returns how many."""
    cdef uint64_t count = 0
    cdef const uint8_t[::1] flags = memoryview(where).cast("B")
    cdef Py_ssize_t bit
    for bit in range(flags.shape[0]):
        if flags[bit]:
            bits_fill(bits, bit, bit + 1, True)
            count += 1
    return count


cdef int set_disk(Engine e, geometry, bytes uuid, base_size_bytes, uint64_t align_bytes) except -1:
    cdef const uint8_t[::1] uuid_view = uuid
    e.disk.virtual_size = geometry.virtual_size_bytes
    e.disk.has_base = base_size_bytes is not None
    e.disk.base_size = min(base_size_bytes, e.disk.virtual_size) if e.disk.has_base else 0
    e.disk.raw = geometry.table_cells == 0
    e.disk.spread = geometry.placement == Placement.SPREAD and not e.disk.raw
    e.disk.blocks = geometry.blocks
    e.disk.chunks = geometry.chunks
    e.disk.blocks_per_chunk = geometry.blocks_per_chunk
    e.disk.words = geometry.bitmap_words
    e.disk.block_shift = geometry.block_size_bytes.bit_length() - 1
    e.disk.chunk_shift = geometry.chunk_size_bytes.bit_length() - 1
    e.disk.data_offset = geometry.data_offset_bytes
    e.disk.bitmap_offset = geometry.bitmap_offset_bytes
    e.disk.table_offset = geometry.table_offset_bytes
    e.disk.journal_offset = geometry.journal_offset_bytes
    e.disk.journal_pages = geometry.journal_size_bytes // PAGE_BYTES
    e.disk.bitmap_pages = geometry.bitmap_size_bytes // PAGE_BYTES
    e.disk.table_pages = geometry.table_size_bytes // PAGE_BYTES
    e.disk.align_mask = align_bytes - 1
    e.disk.uuid_crc = crc32c(0, &uuid_view[0], 16)
    e.disk.uuid_seed = int.from_bytes(uuid[:8], "little")
    return 0


cdef int set_mode(Engine e, cache_mode, on_full, bint read_only) except -1:
    if cache_mode not in CACHE_MODES:
        raise InvalidArgument(f"cache mode {quoted(cache_mode)}: choose one of {', '.join(CACHE_MODES)}")
    if on_full not in ON_FULL:
        raise InvalidArgument(f"on_full {quoted(on_full)}: choose one of {', '.join(ON_FULL)}")
    e.mode.read_only = read_only
    e.mode.unsafe = cache_mode in UNSAFE_CACHE_MODES
    e.mode.write_through = cache_mode in WRITE_THROUGH_CACHE_MODES
    e.mode.fail_when_full = on_full == "error"
    return 0


cdef int set_maps(Engine e, bitmap, table, used_slots) except -1:
    cdef uint64_t[::1] words = bitmap
    cdef uint64_t[::1] used = used_slots
    cdef uint32_t[::1] entries
    if <uint64_t>words.shape[0] != e.disk.words or <uint64_t>used.shape[0] * 64 < e.disk.chunks:
        raise InvalidArgument("the bitmap does not fit the geometry")
    e.bitmap_array, e.used_array, e.table_array = bitmap, used_slots, table
    e.maps.bitmap = &words[0]
    e.slots.used = &used[0]
    e.maps.table = NULL
    if not e.disk.raw:
        entries = table
        if <uint64_t>entries.shape[0] != e.disk.chunks:
            raise InvalidArgument("the table does not fit the geometry")
        e.maps.table = &entries[0]
    e.slots.mapped = e.disk.chunks if e.disk.raw else bits_count(e.slots.used, 0, e.disk.chunks)
    return 0


cdef int set_base(Engine e, bint copy_on_read, uint64_t copy_limit_bytes, uint64_t timeout_ns) except -1:
    e.copies.on_read = copy_on_read and e.disk.has_base and not e.mode.read_only
    e.copies.bytes_max = copy_limit_bytes
    e.copies.blocks_max = max(1, COPY_BYTES_MAX >> e.disk.block_shift)
    e.base.timeout_ns = timeout_ns
    e.base.blocks = ((e.disk.base_size - 1) >> e.disk.block_shift) + 1 if e.disk.base_size else 0
    e.base.absent = e.base.blocks - bits_count(e.maps.bitmap, 0, e.base.blocks)
    e.base.released = e.disk.has_base and e.base.absent == 0
    e.prefetch.idle_ns = 20_000_000
    return 0


cdef int set_journal(Engine e, state, commit_limit_bytes) except -1:
    e.journal.next_sequence = state.next_sequence
    e.journal.previous = state.previous
    e.journal.tail = state.tail
    e.journal.durable_tail = e.journal.tail
    e.journal.map_hash = state.map_hash
    e.journal.clean = state.clean
    if e.journal.next_sequence - e.journal.durable_tail > e.disk.journal_pages:
        raise Corrupt("the journal is fuller than its ring")
    e.journal.commit_pages_max = max(1, min(e.disk.journal_pages // 4, 4096))
    e.changes.limit_bytes = e.journal.commit_pages_max * (JOURNAL_RECORDS_BYTES - WORD_RECORD_BYTES)
    e.changes.commit_bytes = max(e.disk.journal_pages // 16, 1) * JOURNAL_RECORDS_BYTES // 2
    if commit_limit_bytes is not None:
        e.changes.limit_bytes = min(e.changes.limit_bytes, commit_limit_bytes)
    if change_bytes(0, e.disk.blocks_per_chunk + 63) > e.changes.limit_bytes:
        raise InvalidArgument("a commit of one whole chunk does not fit in its limit, or in a quarter of the journal")
    return 0


cdef int allocate_memory(Engine e) except -1:
    e.ops = <DeviceOp *>zeroed_memory(256, sizeof(DeviceOp))
    e.done = <Done *>zeroed_memory(256, sizeof(Done))
    e.pools.op_capacity = e.pools.done_capacity = 256
    e.pools.spare_bounces = <uint8_t **>zeroed_memory(SPARE_BOUNCES, sizeof(uint8_t *))
    e.pools.zeros = <uint8_t *>untouched_memory(ZEROS_BYTES)
    e.active_chunks.buckets = <ActiveChunk **>zeroed_memory(BUCKETS, sizeof(ActiveChunk *))
    e.copies.buckets = <Copy **>zeroed_memory(COPY_BUCKETS, sizeof(Copy *))
    e.journal.buffer = <uint8_t *>aligned_memory(e.journal.commit_pages_max * PAGE_BYTES)
    e.checkpoint.dirty_bitmap = <uint64_t *>zeroed_memory(e.disk.bitmap_pages // 64 + 1, 8)
    e.checkpoint.dirty_table = <uint64_t *>zeroed_memory(e.disk.table_pages // 64 + 1, 8)
    change_set_resize(&e.changes.running, 1024)
    change_set_resize(&e.changes.committing, 1024)
    change_set_resize(&e.changes.lazy, 64)
    return 0


# --- the end ------------------------------------------------------------------------------------------------------

cdef void free_memory(Engine e) noexcept:
    """Also of an engine whose beginning failed half-way: what it does not have is NULL."""
    cdef uint32_t i
    for i in range(e.pools.op_total // 256):
        free(e.pools.slabs[i])
    for i in range(e.pools.spare_count):
        free(e.pools.spare_bounces[i])
    for i in range(STAGINGS):
        free(e.checkpoint.staging[i].buffer)
    free_copies(e)
    free_active_chunks(e)
    free_drains(e.flight.drains)
    free_drains(e.slots.retired)
    free_requests(e.pools.free_requests)
    free(e.ops)
    free(e.done)
    free(e.pools.slabs)
    free(e.pools.spare_bounces)
    if e.pools.zeros != NULL:
        munmap(e.pools.zeros, ZEROS_BYTES)
    free(e.slots.zeroed)
    free(e.discards.waiting)
    free(e.journal.buffer)
    free(e.checkpoint.dirty_bitmap)
    free(e.checkpoint.dirty_table)
    free(e.changes.running.cells)
    free(e.changes.committing.cells)
    free(e.changes.lazy.cells)
    free(e.prefetch.plan)
    free(e.profile.runs)


cdef void free_copies(Engine e) noexcept:
    cdef uint32_t i
    cdef Copy *copy
    cdef Retry *again
    if e.copies.buckets != NULL:
        for i in range(COPY_BUCKETS):
            while e.copies.buckets[i] != NULL:
                copy = e.copies.buckets[i]
                e.copies.buckets[i] = copy.next
                free(copy.buffer)
                free(copy)
    free(e.copies.buckets)
    while e.base.retries != NULL:
        again = e.base.retries
        e.base.retries = again.next
        free(again)


cdef void free_active_chunks(Engine e) noexcept:
    cdef uint32_t i
    cdef ActiveChunk *active
    cdef Job *j
    if e.active_chunks.buckets != NULL:
        for i in range(BUCKETS):
            while e.active_chunks.buckets[i] != NULL:
                active = e.active_chunks.buckets[i]
                e.active_chunks.buckets[i] = active.next
                while active.jobs != NULL:
                    j = active.jobs
                    active.jobs = j.next
                    free(j.bounce)
                    free(j)
                free(active)
    free(e.active_chunks.buckets)


cdef void free_drains(Drain *first) noexcept:
    cdef Drain *d
    while first != NULL:
        d = first
        first = d.next
        free(d)


cdef void free_requests(Request *first) noexcept:
    cdef Request *r
    while first != NULL:
        r = first
        first = r.next
        free(r)
