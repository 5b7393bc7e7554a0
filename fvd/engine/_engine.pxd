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
    STORAGE_BELOW = 16  # what the storage lies on has no space for a guest's write, or has some again

cpdef enum ExtentState:     # block status
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
cdef struct ActiveChunk         # forward
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
    uint32_t pending            # operations and jobs under way, plus one while it advances, waits or is paused
    int32_t error
    uint64_t noted_bytes        # a read: everything before it is in the profile, where it is the base's
    uint64_t begun_ns
    uint8_t needs_commit        # FUA that one durable write cannot give
    uint8_t touched_device
    uint8_t met_prefetch        # prefetching was under way when it began
    uint8_t paused              # it has as much under way as it may, and goes on when half of it has ended
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
    uint8_t purpose             # OpPurpose
    uint8_t target              # OpTarget
    uint8_t is_write
    uint8_t listed
    uint8_t watched             # a Drain counts it
    uint8_t busy                # handed out and not completed
    uint8_t durable             # a durability operation: a flush or a durable write
    uint8_t starved             # a guest's write that found no space below the storage: StarvedState

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
    ActiveChunk *active
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
    uint64_t reserved_bytes     # journal space kept for its changes
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
    uint8_t purpose

cdef struct Run:                # of blocks: [first, end)
    uint64_t first
    uint64_t end

cdef struct ActiveChunk:        # a chunk in which jobs are under way
    uint64_t chunk
    uint32_t slot
    uint8_t reserved            # `slot` is reserved, not yet in the table
    uint8_t exclusive           # a trim waits, or zeros are written before the slot may be mapped: nobody else may join
    uint8_t wanted              # a trim or write-zeroes waits for all jobs to end: no new one may begin before it
    Job *jobs
    RequestList waiters
    ActiveChunk *next

cdef struct Change:             # an entry that differs from what is committed
    uint64_t key                # kind << 56 | index, plus 1; 0: free cell
    uint64_t committed          # its committed value
    uint64_t committing         # the value being committed

cdef struct ChangeSet:          # open-addressing hash of changes
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
    uint64_t epoch              # area `epoch % 2` holds the running changes, the other the committing ones
    uint32_t failed_errno
    uint32_t acknowledged
    uint64_t failed_ns
    uint64_t durability_ops     # flushes and durable writes under way
    uint64_t[4] reserved
    LogArea[2] areas

cdef struct Staging:            # one checkpoint write in flight
    uint8_t *buffer
    uint8_t busy

# What the engine keeps, by concern. Its counters are all since it was made.

cdef struct Disk:               # what was provisioned, and the storage that it has now
    uint64_t virtual_size
    uint64_t base_size
    uint64_t storage_size
    uint64_t blocks
    uint64_t chunks
    uint64_t blocks_per_chunk
    uint64_t words              # of the bitmap
    uint64_t align_mask
    uint64_t data_offset
    uint64_t bitmap_offset
    uint64_t table_offset
    uint64_t journal_offset
    uint64_t journal_pages
    uint64_t bitmap_pages
    uint64_t table_pages
    uint64_t uuid_seed
    uint32_t uuid_crc
    uint32_t block_shift
    uint32_t chunk_shift
    bint raw
    bint spread
    bint has_base

cdef struct Mode:               # how it was opened
    bint read_only
    bint unsafe
    bint write_through
    bint durable_writes         # a guest's durable write may be one operation (R29)
    bint fail_when_full
    bint discard
    uint32_t window             # operations and jobs that one request may have under way

cdef struct Maps:               # what the guest sees now; the changes know what differs from storage
    uint64_t *bitmap
    uint32_t *table             # NULL in the raw layout

cdef struct Changes:
    ChangeSet running           # in no commit yet
    ChangeSet committing        # in the commit under way
    ChangeSet lazy              # changes that a crash may take back: see R14 to R16
    uint64_t running_since_ns
    uint64_t lazy_since_ns
    bint lazy_due
    uint64_t reserved_bytes     # of the next commit, for jobs under way
    uint64_t limit_bytes        # of one commit
    uint64_t commit_bytes       # so many make a commit due

cdef struct Slots:
    uint64_t *used
    uint64_t *zeroed            # by chunk: every block that is absent is zeros in its slot (R18); NULL: never asked for
    bint zero_new               # chunks that are new are zeroed by the device
    uint32_t zeroing            # of them now
    uint64_t capacity
    uint64_t free_count
    uint64_t cursor
    uint64_t mapped
    uint64_t wake_below         # fewer are free: Want.GROWTH; whoever grows the storage moves it
    uint64_t reserve            # those that copies leave to the guest
    bint exhausted
    Drain *retired              # of no chunk any more, and not free yet

cdef struct Starved:            # writes that found no space below the storage
    bint below_full             # the last guest's write that needed some found none
    bint giving_up
    Op *first                   # they wait, oldest first (linked by `newer`)
    Op *last
    uint32_t count              # those, and those of them that are being tried again
    uint64_t tried_ns

cdef struct Discards:
    uint64_t *waiting           # slots that wait for a discard: in `used`, and of no chunk; NULL: there never was one
    uint64_t waiting_count
    uint64_t cursor
    uint64_t until_ns
    uint64_t each_max           # slots of one discard
    uint64_t slots_max          # slots that may be in discards at once: as many as end in time
    uint64_t slots              # in flight: when one has ended its slots are free
    uint64_t cut                # operations up to this number have been judged slow already
    uint32_t count
    uint32_t count_max
    uint32_t count_peak

cdef struct Log:                # of what is pending (log.pxi)
    LogHeader *header           # NULL: there is none
    LogRecord *records          # of the running changes' area
    uint64_t next               # records there; those from the area's count on are not published yet

cdef struct Pools:
    uint32_t op_capacity
    uint32_t done_capacity
    uint32_t op_total
    uint32_t spare_count
    Op **slabs
    Op *free_ops
    Request *free_requests
    uint64_t bounce_used
    uint64_t bounce_limit
    uint8_t **spare_bounces
    uint8_t *zeros

cdef struct Flight:             # storage reads and writes in flight
    Op *first
    uint64_t number             # of the newest operation of any kind
    Drain *drains               # jobs that wait for some of them

cdef struct ActiveChunks:
    ActiveChunk **buckets
    uint32_t count

cdef struct Waiting:            # requests
    RequestList slot
    RequestList journal
    RequestList bounce

cdef struct Base:
    bint failing
    bint released
    uint64_t blocks
    uint64_t absent             # of them
    uint64_t release_after      # this commit; 0: nothing to wait for
    uint64_t timeout_ns
    uint64_t retry_ns
    uint32_t inflight           # reads of it handed out and not completed
    Retry *retries

cdef struct Copies:
    bint on_read
    uint32_t count
    uint64_t bytes              # of guest reads
    uint64_t bytes_max
    uint64_t blocks_max         # of one
    Copy **buckets              # by chunk

cdef struct Prefetch:
    uint32_t depth
    uint32_t count
    uint32_t reading
    uint32_t saving
    uint64_t rate_bytes
    uint64_t idle_ns
    Run *plan
    uint64_t plan_count
    uint64_t plan_at
    uint64_t plan_cursor
    bint plan_again             # something of it was given up: once more from the start
    uint64_t guest_last_ns
    uint64_t steer_ns
    uint64_t probe_ns
    uint64_t rate_ns
    uint64_t pass_ns
    uint64_t no_slot_until_ns
    int64_t rate_tokens

cdef struct Profile:            # what guests read from the base, in bytes, in order
    Run *runs
    uint64_t count
    uint64_t capacity

cdef struct Commit:
    uint8_t state               # CommitState
    bint due
    RequestList flush_now       # answered by the commit under way
    RequestList flush_next      # and by the one after it
    uint64_t begun
    uint64_t durable

cdef struct Journal:
    uint64_t next_sequence
    uint64_t previous
    uint64_t tail               # 0: the next commit is the oldest that matters
    uint64_t durable_tail
    uint64_t map_hash
    uint64_t new_hash           # after the commit under way
    uint64_t write_sequence     # the write in flight
    uint64_t write_pages
    uint64_t write_tail
    uint32_t write_flags
    bint clean                  # it ends with a clean record
    uint8_t *buffer
    uint64_t commit_pages_max

cdef struct DurableOps:         # flushes and durable writes
    Op *oldest                  # in flight
    Op *newest
    Op *held                    # those that have ended well, and whose end does not count yet (R26); oldest first
    Op *last_held
    uint32_t held_count

cdef struct Checkpoint:
    uint8_t state               # CheckpointState
    uint64_t tail_after
    uint64_t *dirty_bitmap
    uint64_t *dirty_table
    uint64_t dirty_pages
    uint64_t sweep
    Staging staging[4]
    uint32_t staging_busy

cdef struct Failure:
    int error_number            # 0, or why nothing that needs durability succeeds any more
    int flush_error_number      # of the first durability operation that this disk's own device failed
    bint stopped                # its storage is somebody else's: nothing more of it is read or written, and every request fails
    bint refusing               # what it had for the storage is being refused

cdef struct Close:
    Request *request            # NULL: nobody has asked
    bint done
    uint8_t phase               # ClosePhase

cdef struct Counters:
    uint64_t reads
    uint64_t writes
    uint64_t flushes
    uint64_t trims
    uint64_t device_reads
    uint64_t device_writes
    uint64_t device_flushes
    uint64_t base_reads
    uint64_t commits
    uint64_t journal_writes
    uint64_t checkpoints
    uint64_t map_writes
    uint64_t allocations
    uint64_t waited_for_space
    uint64_t zeroed_chunks
    uint64_t discards
    uint64_t quiet_requests     # of guests, with no prefetching under way
    uint64_t quiet_ns
    uint64_t busy_requests
    uint64_t busy_ns
    uint64_t prefetch_reads
    uint64_t prefetch_read_bytes
    uint64_t base_service_ns
    uint64_t base_latency_ns
    uint64_t copy_writes
    uint64_t copy_write_bytes
    uint64_t copy_service_ns
    uint64_t copy_latency_ns
    uint64_t prefetched_bytes
    uint64_t copied_bytes
    uint64_t zero_bytes
    uint64_t dropped_bytes
    uint64_t no_slot_copies

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
    # Fills at most `capacity` extents for [offset, offset+length); returns how many. Adjacent extents differ in state.
    cdef int extents(self, uint64_t offset_bytes, uint64_t length_bytes, Extent *out, int capacity) except -1 nogil

    # --- Private ------------------------------------------------------------------------------------------------
    cdef uint64_t now_ns            # a driver may set it before it completes and submits: latencies are measured by it
    cdef object bitmap_array, table_array, used_array, log_buffer   # own the memory of `maps`, `slots` and `log`
    cdef Disk disk
    cdef Mode mode
    cdef Maps maps
    cdef Changes changes
    cdef Slots slots
    cdef Starved starved
    cdef Discards discards
    cdef Log log
    cdef Pools pools
    cdef Flight flight
    cdef ActiveChunks active_chunks
    cdef Waiting waiting
    cdef Base base
    cdef Copies copies
    cdef Prefetch prefetch
    cdef Profile profile
    cdef Commit commit
    cdef Journal journal
    cdef DurableOps durable
    cdef Checkpoint checkpoint
    cdef Failure failure
    cdef Close close
    cdef Counters count
