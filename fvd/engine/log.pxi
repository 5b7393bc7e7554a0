# SPDX-License-Identifier: Apache-2.0
# The log of what is pending: changes of the maps that are in no commit yet, kept in memory that outlives this process
# (docs/internals/durability.md, "When the server dies"). Each change of a pending entry appends a record {key, value}; one store publishes
# all records of a call before anybody can see that a request has ended. Two areas: the open changes' and the frozen ones'. It knows neither
# files nor who reads it.

cdef extern from *:
    """
    #define FVD_PUBLISH(where, value) __atomic_store_n(&(where), (value), __ATOMIC_RELEASE)
    """
    void publish "FVD_PUBLISH"(uint64_t where, uint64_t value) nogil
    void publish32 "FVD_PUBLISH"(uint32_t where, uint32_t value) nogil


cdef inline LogArea *log_area(Engine e) noexcept nogil:
    """What is open."""
    return &e.log.areas[e.log.epoch & 1]


cdef inline LogRecord *log_records_of(LogHeader *log, uint64_t epoch) noexcept nogil:
    return <LogRecord *>(<uint8_t *>log + PAGE_BYTES) + (epoch & 1) * log.capacity


cdef int log_attach(Engine e, uint8_t[::1] buffer) except -1:
    """Begin a log that fvd.format.pending has laid out, empty, for the maps as they are now."""
    cdef LogHeader *log = <LogHeader *>&buffer[0]
    if <uint64_t>buffer.shape[0] < PAGE_BYTES or log.capacity == 0 or (
            <uint64_t>buffer.shape[0] < PAGE_BYTES + 2 * log.capacity * sizeof(LogRecord)) or <uint64_t><uintptr_t>log & 7:
        raise InvalidArgument("the log of pending changes does not have the size that it says")
    if log.areas[0].count or log.areas[1].count or log.areas[log.epoch & 1].base_hash != e.map_hash:
        raise InvalidArgument("the log of pending changes is not an empty one of these maps")
    # A whole chunk's change must fit twice: once for what is held back while the log is half full.
    if not 2 * change_bytes(0, e.blocks_per_chunk + 63) <= log.capacity * ENTRY_RECORD_BYTES:
        raise InvalidArgument("the changes of one whole chunk do not fit in the log of pending changes")
    e.log_buffer = buffer
    e.log = log
    e.log_records = log_records_of(log, log.epoch)
    e.log_next = 0
    return 0


cdef inline int log_touch(Engine e, uint64_t key) except -1 nogil:
    """R19, R22: an entry that is pending changes, or becomes pending; its value is taken when the log is published."""
    if e.log == NULL:
        return 0
    ensure(e.log_next < e.log.capacity, "the log of pending changes is fuller than its reserve")
    e.log_records[e.log_next].key = key - 1
    e.log_next += 1
    return 0


cdef inline bint log_has_room(Engine e, uint64_t need) noexcept nogil:
    """R25: whether the open area can take these changes beside all that may still come. No record is of less than 8 bytes of a commit, and
    one job notes no entry more than twice as often as it reserves for."""
    return e.log == NULL or BUG(Bug.FULL_LOG_IGNORED) or (
        ENTRY_RECORD_BYTES * e.log_next + 2 * (delta_bytes(&e.soft) + e.reserved_bytes + need) <= ENTRY_RECORD_BYTES * e.log.capacity)


cdef inline bint log_is_half_full(Engine e) noexcept nogil:
    return e.log != NULL and 2 * e.log_next >= e.log.capacity


cdef inline bint log_is_full_of_soft(Engine e) noexcept nogil:
    """Whether the copies' changes, which come into the log when they are committed, take too much of what it could take."""
    return e.log != NULL and 8 * delta_bytes(&e.soft) >= ENTRY_RECORD_BYTES * e.log.capacity


cdef int log_publish(Engine e) except -1 nogil:
    """R19: one store makes everything visible that was noted since the last; before anybody is told that a request has ended."""
    cdef LogArea *area
    cdef LogRecord *r
    cdef uint64_t i, index
    if e.log == NULL:
        return 0
    area = log_area(e)
    if area.count == e.log_next:
        return 0
    for i in range(area.count, e.log_next):
        r = &e.log_records[i]
        index = r.key & 0xFFFFFFFFFFFFFFULL
        r.value = e.bitmap[index] if r.key >> 56 == KIND_BITMAP else e.table[index]
    publish(area.count, e.log_next - (1 if BUG(Bug.LAST_RECORD_NOT_PUBLISHED) else 0))
    return 0


cdef int log_freeze(Engine e) except -1 nogil:
    """A commit begins: what was open is frozen, and what comes builds on its result."""
    cdef LogArea *other
    if e.log == NULL:
        return 0
    log_publish(e)
    other = &e.log.areas[(e.log.epoch + 1) & 1]
    ensure(other.count == 0 or BUG(Bug.LAST_RECORD_NOT_PUBLISHED), "the log of the commit before is still there")
    other.count = 0
    publish(other.base_hash, e.new_hash)
    publish(e.log.epoch, e.log.epoch + 1)
    e.log_records = log_records_of(e.log, e.log.epoch)
    e.log_next = 0
    if BUG(Bug.LOG_CLEARED_BEFORE_COMMIT):
        log_committed(e)
    return 0


cdef int log_committed(Engine e) except -1 nogil:
    """R20: the frozen changes are durable, and only now they leave the log."""
    if e.log != NULL:
        publish(e.log.areas[(e.log.epoch + 1) & 1].count, 0)
    return 0


cdef int log_failed(Engine e) except -1 nogil:
    """R24: nothing of this log will ever be applied; it says so before the error is told."""
    if e.log != NULL:
        e.log.failed_ns = e.now_ns
        publish32(e.log.failed_errno, <uint32_t>e.failed_errno)
    return 0


cdef inline void log_durability(Engine e, int64_t change) noexcept nogil:
    """Flushes and durable writes under way: how one ends that a death interrupts, nobody hears."""
    if e.log != NULL:
        publish(e.log.durability_ops, e.log.durability_ops + <uint64_t>change)
