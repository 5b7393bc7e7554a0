# SPDX-License-Identifier: Apache-2.0
"""The engine's compiled interface: requests and completions in, device operations and finished requests out.

See docs/internals/engine.md."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from fvd.device.op cimport DeviceOp

cdef enum RequestKind:
    REQUEST_READ = 0
    REQUEST_WRITE = 1
    REQUEST_FLUSH = 2
    REQUEST_TRIM = 3
    REQUEST_ZERO = 4
    REQUEST_CLOSE = 5       # commit, checkpoint, clean record; nothing may be submitted afterwards

cdef enum RequestFlag:
    FLAG_FUA = 1
    FLAG_NO_HOLE = 2        # write-zeroes must allocate

cdef enum DoneFlag:
    DONE_ALL_ZERO = 1       # a read that touched no device: the whole buffer is zeros (and was zeroed)

cpdef enum Want:            # what the engine asks of its Python side; see Engine.want
    GROWTH = 1          # free slots are fewer than were asked for, or writes wait for a slot
    EVENT = 2           # something to report (sticky error)
    STEER = 4           # a quarter of a second has passed, and there is a plan to prefetch
    BASE = 8            # the base began or ceased to fail, or is needed no longer
    ROOM = 16           # what the storage lies on has no room for a guest's write, or has some again

cdef enum ExtentState:      # block status
    EXTENT_DATA = 0
    EXTENT_BASE = 1         # read from the base
    EXTENT_ZERO = 2         # reads as zeros, occupies nothing

cdef struct Done:
    uint64_t cookie
    int32_t error           # 0 or a negative errno
    uint32_t flags          # DoneFlag

cdef struct Extent:
    uint64_t length_bytes
    uint32_t state          # ExtentState
    uint32_t reserved

# --- Private to the engine: here only because a compiled class must declare its fields --------------------------------

cdef struct Job                 # forward
cdef struct Busy                # forward
cdef struct Copy                # forward

cdef struct Request:            # one guest request
    uint64_t cookie
    uint64_t start              # [start, end) in guest bytes
    uint64_t end
    uint64_t cursor             # everything before it has been handed on
    uint8_t *buffer             # of `start`; NULL: zeros (write-zeroes)
    Request *next               # in whichever list holds it
    uint32_t kind
    uint32_t flags
    uint32_t pending            # operations and jobs under way, plus one while it walks, waits or is paused
    int32_t error
    uint64_t noted_bytes        # a read: everything before it is in the profile, where it is the base's
    uint64_t begun_ns
    uint8_t needs_commit        # FUA that one durable write cannot give
    uint8_t touched_device
    uint8_t met_prefetch        # prefetching was under way when it began
    uint8_t paused              # it has as much under way as it may, and walks on when half of it has ended
    uint32_t punched            # chunks that it has made absent since it last let others go on

cdef struct RequestList:
    Request *head
    Request *tail

cdef struct Op:                 # one device operation handed out
    Request *request
    Job *job
    Copy *copy
    Op *previous                # in-flight list of storage reads and writes
    Op *next                    # there, or among those whose end is held back
    Op *older                   # durability operations in flight, in order of issue
    Op *newer
    uint8_t *bounce             # owned
    uint8_t *buffer             # what the device fills or writes
    uint8_t *copy_to            # unaligned read: where the guest wants it
    uint64_t copy_skip
    uint64_t copy_bytes
    uint64_t offset_bytes
    uint64_t length_bytes
    uint64_t number             # order of issue; of one that is held back: the newest operation that must have ended well first
    uint64_t begun_ns           # of a discard
    uint32_t index
    uint32_t generation
    uint32_t slot               # the first of a discard
    uint8_t what                # What
    uint8_t target              # OpTarget
    uint8_t is_write
    uint8_t listed
    uint8_t watched             # a Drain counts it
    uint8_t busy                # handed out and not completed
    uint8_t durable             # a durability operation: a flush or a durable write
    uint8_t starved             # a guest's write that found no room below the storage: Starved

cdef struct Drain:              # waits for the storage operations that were in flight in a range when it began
    uint64_t first_byte
    uint64_t end_byte
    uint64_t number             # operations issued before this count
    uint64_t remaining
    uint64_t commit             # a retired slot: the commit that must be durable first
    Job *job                    # who waits: a job, or
    uint32_t slot               # a retired slot
    uint8_t writes_only
    Drain *next

cdef struct Job:                # a run of blocks being allocated, read-modified-written, saved, or waiting to be trimmed
    Request *request            # NULL: of a copy
    Copy *copy
    Busy *busy
    Job *next                   # in its chunk
    uint64_t first_block        # locked: [first_block, end_block)
    uint64_t end_block
    uint64_t guest_start        # [guest_start, guest_end): what the guest writes of it
    uint64_t guest_end
    uint64_t device_offset      # what will be written
    uint64_t device_length
    uint8_t *data
    uint8_t *bounce             # owned; NULL when the guest's own buffer is written
    uint64_t bounce_bytes
    uint64_t reserved_bytes     # journal room kept for its changes
    uint32_t pending
    int32_t error
    uint8_t kind                # JobKind
    uint8_t phase

cdef struct Copy:               # a run of absent blocks of one chunk on its way from the base
    Copy *next                  # in its bucket
    uint64_t first_block        # [first_block, end_block)
    uint64_t end_block
    uint8_t *buffer             # owned
    uint64_t buffer_bytes
    uint64_t begun_ns
    RequestList waiters         # guest reads of these blocks
    uint32_t depth              # reads, then writes, of prefetching that were under way when this one began
    uint32_t pending            # jobs that save parts of it
    uint8_t phase               # CopyPhase
    uint8_t prefetch

cdef struct Retry:              # a base read that failed and is tried again
    Retry *next
    Request *request
    Job *job
    Copy *copy
    uint8_t *buffer
    uint64_t offset_bytes
    uint64_t length_bytes
    uint8_t what

cdef struct Run:                # of blocks: [first, end)
    uint64_t first
    uint64_t end

cdef struct Busy:               # a chunk in which jobs are under way
    uint64_t chunk
    uint32_t slot
    uint8_t reserved            # `slot` is reserved, not yet in the table
    uint8_t exclusive           # a trim waits, or zeros are written before the slot may be mapped: nobody else may join
    uint8_t wanted              # a trim or write-zeroes waits for all jobs to end: no new one may begin before it
    Job *jobs
    RequestList waiters
    Busy *next

cdef struct Change:             # an entry that differs from what is committed
    uint64_t key                # kind << 56 | index, plus 1; 0: free cell
    uint64_t committed          # its committed value
    uint64_t frozen             # the value being committed

cdef struct Delta:              # open-addressing hash of changes
    Change *cells
    uint64_t mask
    uint64_t words
    uint64_t entries

cdef struct LogRecord:          # of the pending log: an entry's value as it is now
    uint64_t key                # kind << 56 | index
    uint64_t value

cdef struct LogArea:
    uint64_t base_hash          # of the maps on which its changes build
    uint64_t count              # records that count
    uint64_t[6] reserved

cdef struct LogHeader:          # fvd/format/pending.py says what it means; asserted at import
    uint8_t[64] name
    uint64_t generation
    uint64_t capacity           # records in each area
    uint8_t[432] identity
    uint64_t epoch              # area `epoch % 2` holds what is open, the other what is frozen
    uint32_t failed_errno
    uint32_t acknowledged
    uint64_t failed_ns
    uint64_t durability_ops     # flushes and durable writes under way
    uint64_t[4] reserved
    LogArea[2] areas

cdef struct Staging:            # one checkpoint write in flight
    uint8_t *buffer
    uint8_t busy

cdef class Engine:
    # --- What a driver uses -------------------------------------------------------------------------------------
    cdef DeviceOp *ops              # out: operations to start; the driver takes them all and sets op_count = 0.
    cdef uint32_t op_count          # submit/complete/tick may reallocate these arrays: re-read the pointers after each call
    cdef Done *done                 # out: finished requests, in the order in which they finished
    cdef uint32_t done_count
    cdef public uint32_t want       # Want bits; cleared by Python when it has acted
    cdef readonly uint32_t inflight_ops   # device operations handed out and not yet completed
    cdef readonly uint32_t open_requests  # requests submitted and not yet done
    # The buffer must stay valid until the request is done, and be aligned to align_bytes when the request is aligned.
    # Never fails for reasons of the disk: errors come as Done. Raises only on a broken invariant.
    cdef int submit(self, uint32_t kind, uint32_t flags, uint64_t offset_bytes, uint64_t length_bytes, uint8_t *buffer,
                    uint64_t cookie) except -1 nogil
    cdef int complete(self, uint64_t token, int64_t result) except -1 nogil
    cdef int tick(self, uint64_t now_ns) except -1 nogil
    # Requests that wait for a slot (full storage) or for the next attempt to read the base, and whose (cookie & mask) == value, end with
    # `error` (a negative errno); returns how many.
    cdef int cancel_waiting(self, uint64_t mask, uint64_t value, int32_t error) except -1 nogil
    cdef uint64_t waiting_bytes(self, uint64_t mask, uint64_t value) noexcept nogil   # bytes of such requests
    # Fills at most `room` extents for [offset, offset+length); returns how many. Adjacent extents differ in state.
    cdef int extents(self, uint64_t offset_bytes, uint64_t length_bytes, Extent *out, int capacity) except -1 nogil

    # --- Private ------------------------------------------------------------------------------------------------
    # geometry
    cdef uint64_t virtual_size, base_size, storage_size, blocks, chunks, blocks_per_chunk, align_mask
    cdef uint64_t data_offset, bitmap_offset, table_offset, journal_offset, journal_pages, words, bitmap_pages, table_pages
    cdef uint32_t block_shift, chunk_shift, uuid_crc
    cdef uint64_t uuid_seed
    cdef bint raw, spread, has_base, read_only, unsafe, write_through, durable_writes, fail_when_full, discard
    # maps: what the guest sees now; `open` and `frozen` know what differs from storage
    cdef object bitmap_array, table_array, used_array
    cdef uint64_t *bitmap
    cdef uint32_t *table
    cdef Delta open
    cdef Delta frozen
    cdef Delta soft                 # changes that a crash may take back: see R14 to R16
    cdef uint64_t soft_since_ns
    cdef bint soft_due
    cdef uint64_t reserved_bytes, limit_bytes, commit_bytes
    cdef uint64_t open_since_ns
    cdef uint64_t now_ns            # a driver may set it before it completes and submits: latencies are measured by it
    # slots
    cdef uint64_t *used
    cdef uint64_t *zeroed           # by chunk: every block that is absent is zeros in its slot (R18); NULL: never asked for
    cdef bint zero_chunks           # chunks that are new are zeroed by the device
    cdef uint32_t zeroing           # of them now
    cdef uint64_t capacity, free_count, slot_cursor, mapped_slots
    cdef uint64_t wake_below_slots  # fewer are free: Want.GROWTH; whoever grows the storage moves it
    cdef uint64_t reserve_slots     # those that copies leave to the guest
    cdef bint exhausted
    cdef readonly bint no_room      # what the storage lies on had none for the last guest's write that needed some
    cdef Op *starved                # writes that found none and wait, oldest first (linked by `newer`)
    cdef Op *last_starved
    cdef readonly uint32_t starved_count    # those, and those of them that are being tried again
    cdef uint64_t starved_ns
    cdef bint giving_up
    cdef uint64_t *to_discard       # slots that wait for a discard: in `used`, and of no chunk; NULL: there never was one
    cdef uint64_t to_discard_count, discard_cursor, discards_until_ns
    cdef uint64_t discard_slots     # of one discard, at most
    cdef uint64_t discard_slots_max      # slots that may be in discards at once: as many as end in time
    cdef uint64_t discarding_slots, discard_cut
    cdef uint32_t discarding        # discards in flight: when one has ended its slots are free
    cdef uint32_t most_discarding, discarding_most
    cdef uint32_t window            # operations and jobs that one request may have under way
    cdef Drain *retired
    # the log of what is pending (log.pxi)
    cdef object log_buffer
    cdef LogHeader *log             # NULL: there is none
    cdef LogRecord *log_records     # of the area that is open
    cdef uint64_t log_next          # records there; those from the area's count on are not published yet
    # pools and lists
    cdef uint32_t op_capacity, done_capacity, op_total
    cdef Op **slabs
    cdef Op *free_ops
    cdef Op *inflight
    cdef uint64_t op_number
    cdef Request *free_requests
    cdef Drain *drains
    cdef Busy **buckets
    cdef uint32_t busy_count
    cdef RequestList wait_slot, wait_journal, wait_bounce
    cdef uint64_t bounce_used, bounce_limit
    cdef uint8_t *zeros
    cdef uint8_t **spare_bounces
    cdef uint32_t spare_count
    # copies from the base
    cdef public bint copy_on_read
    cdef readonly bint base_failing
    cdef readonly bint base_released
    cdef uint64_t base_blocks, base_absent, release_after, base_timeout_ns, retry_ns
    cdef uint64_t copy_bytes, copy_limit, copy_most_blocks
    cdef uint32_t copy_count
    cdef uint32_t base_inflight     # reads of it handed out and not completed
    cdef Copy **copies              # by chunk
    cdef Retry *retries
    # prefetching
    cdef public uint32_t prefetch_depth
    cdef public uint64_t prefetch_rate_bytes, prefetch_idle_ns
    cdef Run *plan
    cdef uint64_t plan_count, plan_at, plan_cursor
    cdef bint plan_again            # something of it was given up: once more from the start
    cdef uint32_t prefetch_count, prefetch_reading, prefetch_saving
    cdef uint64_t guest_last_ns, steer_ns, probe_ns, rate_ns, pass_ns, no_slot_until_ns
    cdef int64_t rate_tokens
    cdef Run *reads                 # what guests read from the base, in bytes, in order
    cdef uint64_t reads_count, reads_capacity
    # commit
    cdef uint8_t commit_state
    cdef RequestList flush_next, flush_now
    cdef uint64_t next_sequence, previous, tail, durable_tail, tail_after, map_hash, new_hash, commits, durable_commits
    cdef uint64_t write_sequence, write_pages, write_tail
    cdef uint32_t write_flags
    cdef uint8_t *journal_buffer
    cdef uint64_t max_commit_pages
    cdef readonly int failed_errno
    cdef readonly bint stopped      # its storage is somebody else's: nothing more of it is read or written, and every request fails
    cdef bint refusing              # what it had for the storage is being refused
    cdef readonly int flush_failed_errno    # of the first durability operation that this disk's own device failed
    cdef Op *oldest_durable         # durability operations in flight
    cdef Op *newest_durable
    cdef Op *held                   # those that have ended well, and whose end does not count yet (R26); oldest first
    cdef Op *last_held
    cdef uint32_t held_count
    cdef bint clean_on_storage
    # checkpoint
    cdef uint8_t checkpoint_state
    cdef uint64_t *dirty_bitmap
    cdef uint64_t *dirty_table
    cdef uint64_t dirty_pages, sweep, checkpoint_after
    cdef Staging staging[4]
    cdef uint32_t staging_busy
    # close
    cdef Request *closing
    cdef bint closed
    cdef uint8_t close_phase
    cdef bint commit_due
    # counters
    cdef uint64_t stat_reads, stat_writes, stat_flushes, stat_trims, stat_device_reads, stat_device_writes, stat_device_flushes
    cdef uint64_t stat_commits, stat_checkpoints, stat_allocations, stat_waited, stat_base_reads, stat_journal_writes, stat_map_writes
    cdef uint64_t stat_zeroed, stat_discards
    cdef uint64_t stat_quiet_requests, stat_quiet_ns, stat_busy_requests, stat_busy_ns, stat_prefetch_reads, stat_prefetch_read_bytes
    cdef uint64_t stat_base_service_ns, stat_copy_writes, stat_copy_write_bytes, stat_copy_service_ns, stat_prefetched_bytes
    cdef uint64_t stat_base_latency_ns, stat_copy_latency_ns, stat_copied_bytes, stat_zero_bytes, stat_dropped_bytes, stat_no_slot
