# SPDX-License-Identifier: Apache-2.0
# The log of what is pending: changes of the maps that are in no commit yet, kept in memory that outlives this process
# (docs/internals/durability.md, "When the server dies"). Each change of a pending entry appends a record {key, value}; one store publishes
# all records of a call before anybody can see that a request has ended. Two areas: the running changes' and the committing ones'. It knows
# neither files nor who reads it.
#
# Offers: log_attach, log_committed, log_durability, log_failed, log_has_space, log_is_full_of_lazy, log_is_half_full, log_publish,
#   log_switch_areas, log_touch
# Needs: changes: change_set_bytes, entry_index, entry_kind, entry_value; memory: ensure; write: change_bytes

cdef extern from *:
    """
    #define FVD_PUBLISH(where, value) __atomic_store_n(&(where), (value), __ATOMIC_RELEASE)
    """
    void publish "FVD_PUBLISH"(uint64_t where, uint64_t value) nogil
    void publish32 "FVD_PUBLISH"(uint32_t where, uint32_t value) nogil


cdef inline LogArea *log_area(Engine e) noexcept nogil:
    """Of the running changes."""
    return &e.log.header.areas[e.log.header.epoch & 1]


cdef inline LogRecord *log_records_of(LogHeader *log, uint64_t epoch) noexcept nogil:
    return <LogRecord *>(<uint8_t *>log + PAGE_BYTES) + (epoch & 1) * log.capacity


cdef int log_attach(Engine e, uint8_t[::1] buffer) except -1:
    """Begin a log that fvd.format.pending has laid out, empty, for the maps as they are now."""
    cdef LogHeader *log = <LogHeader *>&buffer[0]
    if <uint64_t>buffer.shape[0] < PAGE_BYTES or log.capacity == 0 or (
            <uint64_t>buffer.shape[0] < PAGE_BYTES + 2 * log.capacity * sizeof(LogRecord)) or <uint64_t><uintptr_t>log & 7:
        raise InvalidArgument("the log of pending changes does not have the size that it says")
    if log.areas[0].count or log.areas[1].count or log.areas[log.epoch & 1].base_hash != e.journal.map_hash:
        raise InvalidArgument("the log of pending changes is not an empty one of these maps")
    # A whole chunk's change must fit twice: once for what is held back while the log is half full.
    if not 2 * change_bytes(0, e.disk.blocks_per_chunk + 63) <= log.capacity * ENTRY_RECORD_BYTES:
        raise InvalidArgument("the changes of one whole chunk do not fit in the log of pending changes")
    e.log_buffer = buffer
    e.log.header = log
    e.log.records = log_records_of(log, log.epoch)
    e.log.next = 0
    return 0


cdef inline int log_touch(Engine e, uint64_t key) except -1 nogil:
    """R19, R22: an entry that is pending changes, or becomes pending; its value is taken when the log is published."""
    if e.log.header == NULL:
        return 0
    ensure(e.log.next < e.log.header.capacity, "the log of pending changes is fuller than its reserve")
    e.log.records[e.log.next].key = key - 1
    e.log.next += 1
    return 0


cdef inline bint log_has_space(Engine e, uint64_t need) noexcept nogil:
    """R25: whether the area can take these changes beside all that may still come. No record is of less than 8 bytes of a commit, and one
    job notes no entry more than twice as often as it reserves for."""
    return e.log.header == NULL or BUG(Bug.FULL_LOG_IGNORED) or (
        ENTRY_RECORD_BYTES * e.log.next + 2 * (change_set_bytes(&e.changes.lazy) + e.changes.reserved_bytes + need)
        <= ENTRY_RECORD_BYTES * e.log.header.capacity)


cdef inline bint log_is_half_full(Engine e) noexcept nogil:
    return e.log.header != NULL and 2 * e.log.next >= e.log.header.capacity


cdef inline bint log_is_full_of_lazy(Engine e) noexcept nogil:
    """Whether the copies' changes, which come into the log when they are committed, take too much of what it could take."""
    return e.log.header != NULL and 8 * change_set_bytes(&e.changes.lazy) >= ENTRY_RECORD_BYTES * e.log.header.capacity


cdef int log_publish(Engine e) except -1 nogil:
    """R19: one store makes everything visible that was noted since the last; before anybody is told that a request has ended."""
    cdef LogArea *area
    cdef LogRecord *r
    cdef uint64_t i
    if e.log.header == NULL:
        return 0
    area = log_area(e)
    if area.count == e.log.next:
        return 0
    for i in range(area.count, e.log.next):
        r = &e.log.records[i]
        r.value = entry_value(e, entry_kind(r.key), entry_index(r.key))
    publish(area.count, e.log.next - (1 if BUG(Bug.LAST_RECORD_NOT_PUBLISHED) else 0))
    return 0


cdef int log_switch_areas(Engine e) except -1 nogil:
    """A commit begins: what was running is committing, and what comes builds on its result."""
    cdef LogArea *other
    if e.log.header == NULL:
        return 0
    log_publish(e)
    other = &e.log.header.areas[(e.log.header.epoch + 1) & 1]
    ensure(other.count == 0 or BUG(Bug.LAST_RECORD_NOT_PUBLISHED), "the log of the commit before is still there")
    other.count = 0
    publish(other.base_hash, e.journal.new_hash)
    publish(e.log.header.epoch, e.log.header.epoch + 1)
    e.log.records = log_records_of(e.log.header, e.log.header.epoch)
    e.log.next = 0
    if BUG(Bug.LOG_CLEARED_BEFORE_COMMIT):
        log_committed(e)
    return 0


cdef int log_committed(Engine e) except -1 nogil:
    """R20: the committing changes are durable, and only now they leave the log."""
    if e.log.header != NULL:
        publish(e.log.header.areas[(e.log.header.epoch + 1) & 1].count, 0)
    return 0


cdef int log_failed(Engine e) except -1 nogil:
    """R24: nothing of this log will ever be applied; it says so before the error is told."""
    if e.log.header != NULL:
        e.log.header.failed_ns = e.now_ns
        publish32(e.log.header.failed_errno, <uint32_t>e.failure.error_number)
    return 0


cdef inline void log_durability(Engine e, int64_t change) noexcept nogil:
    """Flushes and durable writes under way: how one ends that a death interrupts, nobody hears."""
    if e.log.header != NULL:
        publish(e.log.header.durability_ops, e.log.header.durability_ops + <uint64_t>change)


def _check_log_layout():
    places = LOG_HEADER.places
    cdef LogHeader h
    cdef LogRecord r
    mine = {
        "generation": <char *>&h.generation - <char *>&h, "capacity": <char *>&h.capacity - <char *>&h,
        "epoch": <char *>&h.epoch - <char *>&h, "failed_errno": <char *>&h.failed_errno - <char *>&h,
        "acknowledged": <char *>&h.acknowledged - <char *>&h, "failed_ns": <char *>&h.failed_ns - <char *>&h,
        "durability_ops": <char *>&h.durability_ops - <char *>&h, "areas": <char *>&h.areas[0] - <char *>&h,
    }
    theirs = {name: places[name][0] for name in mine}
    if mine != theirs or LOG_RECORD.itemsize != sizeof(r) or places["areas"][1] != sizeof(h.areas):
        raise ImportError(f"the log of pending changes differs between fvd.format and fvd.engine: {theirs} and {mine}")


_check_log_layout()
