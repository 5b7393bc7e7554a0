# SPDX-License-Identifier: Apache-2.0
# The queue over io_uring. It knows the ring and its versions; what both queues share is in _queue.pyx.
#
# Offers: UringQueue
# Needs: _queue: Queue, transfer_result, discard_result, is_sampled, ask_sampler

def _let_go_of_ring(UringQueue queue):
    """In a child after fork, which has no mapping of the ring (io_uring_ring_dontfork): liburing must not look at it again."""
    was_open, queue.opened = queue.opened, False
    return (queue.ring.ring_fd if was_open else -1,)


cdef enum:
    JOINED_MAX = 128        # operations that are one for the kernel
    JOINED_BYTES = 1 << 20  # of all of them
    SINGLE_BYTES = 64 << 10  # as large as that, an operation goes by itself

cdef struct Pending:
    DeviceOp op
    uint64_t moved          # bytes of it already transferred
    uint32_t disk
    uint32_t next_free
    uint32_t joined         # the operation behind it on the device, which goes with it; NONE
    uint32_t count          # of the first of them: how many; 1: it goes by itself
    uint64_t joined_bytes   # ... and all of their bytes
    iovec *parts            # ... and where those are; JOINED_MAX of them, kept for the next


cdef class UringQueue(Queue):
    """One io_uring_enter per turn, more for a long batch; sockets by multishot poll. What the kernel's queue cannot take at once
    overflows into ours."""

    cdef io_uring ring
    cdef bint opened
    cdef Pending *pending
    cdef uint32_t pending_capacity
    cdef uint32_t first_free
    cdef io_uring_sqe *overflow         # prepared entries that the submission queue could not take, in order
    cdef uint32_t overflow_capacity
    cdef uint32_t overflow_count
    cdef uint32_t polls                 # poll requests in the kernel
    cdef uint64_t batch                 # of completions that were taken together, from 1
    cdef readonly uint64_t joined_total  # operations that went with another one

    def __cinit__(self):
        self.kind = "io_uring"
        self.first_free = NONE

    def __dealloc__(self):
        cdef uint32_t number
        if self.opened:                 # the owner did not close(): whatever is in flight still writes to its buffers, so they must leak
            io_uring_queue_exit(&self.ring)
        for number in range(self.pending_capacity):
            free(self.pending[number].parts)
        free(self.pending)
        free(self.overflow)

    cdef int open(self, uint32_t entries) except? -1:
        """0, or the negative errno with which the kernel refuses."""
        cdef io_uring_params params
        cdef int result = -EINVAL
        cdef uint32_t flags
        cdef unsigned[2] workers = [WORKERS_MAX, 0]
        cdef uint32_t flags_6_1 = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_TASKRUN_FLAG    # of Linux 6.1
        cdef uint32_t flags_5_19 = IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG
        for flags in (flags_6_1 | IORING_SETUP_COOP_TASKRUN, flags_5_19, 0):
            memset(&params, 0, sizeof(params))
            params.flags = flags | IORING_SETUP_CQSIZE
            params.cq_entries = 4 * entries
            result = io_uring_queue_init_params(entries, &self.ring, &params)
            if result != -EINVAL:
                break
        if result < 0:
            return result
        cdef uint32_t needed = IORING_FEAT_NODROP | IORING_FEAT_EXT_ARG | IORING_FEAT_RSRC_TAGS     # the last: 5.13, as multishot poll
        if params.features & needed != needed:
            io_uring_queue_exit(&self.ring)
            return -ENOSYS
        io_uring_ring_dontfork(&self.ring)
        # Flushes and zeroings run in threads of the kernel's, which all disks share: those of a device that hangs must leave some for the
        # others'. The kernel's own limit is four for each processor. Where it is refused (before 5.15) that stays.
        io_uring_register_iowq_max_workers(&self.ring, workers)
        io_uring_register_ring_fd(&self.ring)   # spares a descriptor lookup per turn; harmless where it is refused
        self.opened = True
        keep(self, _let_go_of_ring)
        return 0

    cdef io_uring_sqe *entry(self, uint64_t owner, uint64_t number) except NULL nogil:
        """An entry for one request; filled in before the next call. The caller's io_uring_prep_* leaves user_data alone."""
        cdef io_uring_sqe *sqe = NULL
        cdef io_uring_sqe *grown
        cdef uint32_t capacity = max(64, 2 * self.overflow_capacity)
        if self.overflow_count == 0:
            sqe = io_uring_get_sqe(&self.ring)
            if sqe == NULL:
                io_uring_submit(&self.ring)     # a refusal shows as no entry
                sqe = io_uring_get_sqe(&self.ring)
        if sqe == NULL:
            if self.overflow_count == self.overflow_capacity:
                grown = <io_uring_sqe *>realloc(self.overflow, capacity * sizeof(io_uring_sqe))
                if grown == NULL:
                    with gil:
                        raise MemoryError
                self.overflow = grown
                self.overflow_capacity = capacity
            sqe = &self.overflow[self.overflow_count]
            self.overflow_count += 1
        sqe.user_data = owner << 62 | number
        return sqe

    cdef void drain_overflow(self) noexcept nogil:
        """Move what overflowed into the submission queue, as far as it has entries."""
        cdef uint32_t taken = 0
        cdef io_uring_sqe *sqe
        while taken < self.overflow_count:
            sqe = io_uring_get_sqe(&self.ring)
            if sqe == NULL:
                if io_uring_submit(&self.ring) <= 0:
                    break
                continue
            memcpy(sqe, &self.overflow[taken], sizeof(io_uring_sqe))
            taken += 1
        self.overflow_count -= taken
        memmove(self.overflow, self.overflow + taken, self.overflow_count * sizeof(io_uring_sqe))

    cdef int start(self, uint32_t disk, const DeviceOp *ops, uint32_t count) except -1 nogil:
        cdef uint32_t i, number, capacity
        cdef uint32_t first = NONE, last = NONE     # those that are joined, and not issued yet
        cdef Pending *grown
        for i in range(count):
            if ops[i].target == TARGET_BASE:
                if self.disks[disk].source != NULL:
                    self.start_at_source(disk, &ops[i])
                    continue
                self.disks[disk].base_inflight += 1
            if self.first_free == NONE:
                capacity = max(256, 2 * self.pending_capacity)
                grown = <Pending *>realloc(self.pending, capacity * sizeof(Pending))
                if grown == NULL:
                    with gil:
                        raise MemoryError
                self.pending = grown
                for number in range(self.pending_capacity, capacity):
                    grown[number].next_free = number + 1
                    grown[number].parts = NULL
                grown[capacity - 1].next_free = NONE
                self.first_free = self.pending_capacity
                self.pending_capacity = capacity
            number = self.first_free
            self.first_free = self.pending[number].next_free
            self.pending[number].op = ops[i]
            self.pending[number].moved = 0
            self.pending[number].disk = disk
            self.pending[number].count = 1
            self.pending[number].joined_bytes = ops[i].length_bytes
            self.inflight += 1
            if first == NONE or not self.join(first, last, number):
                if first != NONE:
                    self.issue_now(first)
                first = number
            last = number
        return 0 if first == NONE else self.issue_now(first)

    cdef int issue_now(self, uint32_t number) except -1 nogil:
        self.issue(number)
        if self.overflow_count == 0 and io_uring_sq_ready(&self.ring) >= SUBMIT_AT_ONCE:
            io_uring_submit(&self.ring)     # a refusal is the turn's to see
        return 0

    cdef int issue(self, uint32_t number) except -1 nogil:
        """Put an operation, or what is left of it, into the ring."""
        cdef Pending *pending = &self.pending[number]
        if pending.count > 1:
            return self.issue_joined(pending, number)
        cdef DeviceOp *op = &pending.op
        cdef Disk *disk = &self.disks[pending.disk]
        cdef int fd = disk.base_fd if op.target == TARGET_BASE else disk.storage_fd
        cdef uint64_t offset = op.offset_bytes + pending.moved
        cdef unsigned length = <unsigned>min(op.length_bytes - pending.moved, <uint64_t>TRANSFER_BYTES)
        if op.kind == OP_DISCARD and disk.discard == DISCARD_NOTHING:
            return self.finish(number, 0)
        cdef io_uring_sqe *sqe = self.entry(OWNER_OP, number)
        if op.kind == OP_READ:
            io_uring_prep_rw(IORING_OP_READ, sqe, fd, op.buffer + pending.moved, length, offset)
        elif op.kind == OP_WRITE:
            io_uring_prep_rw(IORING_OP_WRITE, sqe, fd, op.buffer + pending.moved, length, offset)
            if op.durable:
                sqe.rw_flags = RWF_DSYNC
        elif op.kind == OP_FLUSH:
            io_uring_prep_fsync(sqe, fd, IORING_FSYNC_DATASYNC)
        elif op.kind == OP_ZERO:
            io_uring_prep_fallocate(sqe, fd, ZERO_HOW, op.offset_bytes, op.length_bytes)
        elif disk.discard == DISCARD_PUNCH:
            io_uring_prep_fallocate(sqe, fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, op.offset_bytes, op.length_bytes)
        else:
            io_uring_prep_rw(IORING_OP_URING_CMD, sqe, fd, NULL, 0, 0)
            sqe.cmd_op = FVD_URING_CMD_DISCARD
            sqe.addr = op.offset_bytes
            sqe.addr3 = op.length_bytes
        return 0

    cdef int issue_joined(self, Pending *pending, uint32_t number) except -1 nogil:
        """Operations side by side on the device whose buffers lie apart: one for the kernel."""
        cdef io_uring_sqe *sqe = self.entry(OWNER_OP, number)
        cdef uint32_t i
        for i in range(pending.count):
            pending.parts[i].iov_base = self.pending[number].op.buffer
            pending.parts[i].iov_len = self.pending[number].op.length_bytes
            number = self.pending[number].joined
        io_uring_prep_rw(IORING_OP_READV if pending.op.kind == OP_READ else IORING_OP_WRITEV, sqe, self.disks[pending.disk].storage_fd,
                         pending.parts, pending.count, pending.op.offset_bytes)
        if pending.op.durable:
            sqe.rw_flags = RWF_DSYNC
        return 0

    cdef bint join(self, uint32_t first, uint32_t last, uint32_t number) noexcept nogil:
        """Whether the operation `number` goes with those that begin with `first` and end with `last`; then it is one of them."""
        cdef Pending *leader = &self.pending[first]
        cdef DeviceOp *before = &self.pending[last].op
        cdef DeviceOp *op = &self.pending[number].op
        if (op.kind != before.kind or op.target != before.target or op.durable != before.durable or op.kind > OP_WRITE
                or op.target != TARGET_STORAGE or before.offset_bytes + before.length_bytes != op.offset_bytes
                or before.length_bytes >= SINGLE_BYTES or op.length_bytes >= SINGLE_BYTES
                or leader.count == JOINED_MAX or leader.joined_bytes + op.length_bytes > JOINED_BYTES):
            return False
        if leader.parts == NULL:
            leader.parts = <iovec *>malloc(JOINED_MAX * sizeof(iovec))
            if leader.parts == NULL:
                return False
        self.pending[last].joined = number
        leader.count += 1
        leader.joined_bytes += op.length_bytes
        self.joined_total += 1
        return True

    cdef int joined_ended(self, uint32_t number, int64_t result) except -1 nogil:
        """All of them have ended as one. A short transfer and a failure say nothing of a single one, so each is done by itself; but what
        failed to be durable is everybody's failure: the kernel may have told it for the only time."""
        cdef Pending *pending = &self.pending[number]
        cdef uint32_t following, left = pending.count
        cdef bint again = (result < 0 and not pending.op.durable) or (result >= 0 and <uint64_t>result < pending.joined_bytes)
        if not again:
            result = min(result, <int64_t>0)
            if result == 0 and is_sampled(&self.disks[pending.disk], &pending.op):
                result = self.sampled(&self.disks[pending.disk])
        pending.count = 1
        while left:
            following = self.pending[number].joined
            if again:
                self.issue(number)
            else:
                self.finish(number, result)
            number = following
            left -= 1
        return 0

    cdef int ended(self, uint32_t number, int64_t result) except -1 nogil:
        """The kernel's answer to an operation: continue a short transfer, or finish."""
        cdef Pending *pending = &self.pending[number]
        cdef DeviceOp *op = &pending.op
        if result == -EINTR or result == -EAGAIN:
            return self.issue(number)
        if pending.count > 1:
            return self.joined_ended(number, result)
        if op.kind == OP_READ or op.kind == OP_WRITE:
            if result > 0:
                pending.moved += <uint64_t>result
                if pending.moved < op.length_bytes:
                    return self.issue(number)
            result = transfer_result(op.kind, pending.moved, op.length_bytes, result)
        elif op.kind == OP_DISCARD:
            result = discard_result(&self.disks[pending.disk], result)
        if result == 0 and is_sampled(&self.disks[pending.disk], op):
            result = self.sampled(&self.disks[pending.disk])
        return self.finish(number, result)

    cdef int64_t sampled(self, Disk *disk) noexcept nogil:
        """One question serves all of a batch: they had ended before it."""
        if disk.asked_at != self.batch:
            disk.asked_at = self.batch
            disk.sampled = ask_sampler(disk)
        return disk.sampled

    cdef int finish(self, uint32_t number, int64_t result) except -1 nogil:
        cdef Pending *pending = &self.pending[number]
        self.add_event(EVENT_OP, pending.op.token, result, pending.disk)
        if pending.op.target == TARGET_BASE:
            self.disks[pending.disk].base_inflight -= 1
        pending.next_free = self.first_free
        self.first_free = number
        self.inflight -= 1
        return 0

    cdef int poll(self, uint32_t handle, uint64_t owner) except -1 nogil:
        cdef Watch *watch = &self.watches[handle]
        cdef io_uring_sqe *sqe = self.entry(owner, <uint64_t>watch.generation << 32 | handle)
        if owner == OWNER_READ_WATCH:
            io_uring_prep_poll_multishot(sqe, watch.fd, POLLIN | POLLRDHUP)
        else:
            io_uring_prep_poll_add(sqe, watch.fd, POLLOUT)
        self.polls += 1
        return 0

    cdef int watch(self, int fd, uint64_t key) except -1 nogil:
        cdef int handle = self.new_watch(fd, key)
        self.poll(<uint32_t>handle, OWNER_READ_WATCH)
        return handle

    cdef int want_write(self, uint32_t handle) except -1 nogil:
        if not self.watches[handle].wants_write:
            self.watches[handle].wants_write = 1
            self.poll(handle, OWNER_WRITE_WATCH)
        return 0

    cdef int unwatch(self, uint32_t handle) except -1 nogil:
        cdef Watch *watch = &self.watches[handle]
        cdef uint64_t number = <uint64_t>watch.generation << 32 | handle
        # Not POLL_REMOVE: it fails with EALREADY on a poll that is just firing, which then holds on to the socket.
        io_uring_prep_cancel64(self.entry(OWNER_NOBODY, 0), <uint64_t>OWNER_READ_WATCH << 62 | number, 0)
        if watch.wants_write:
            io_uring_prep_cancel64(self.entry(OWNER_NOBODY, 0), <uint64_t>OWNER_WRITE_WATCH << 62 | number, 0)
        watch.fd = -1
        return 0

    cdef int polled(self, uint64_t owner, uint64_t number, int32_t result, uint32_t flags) except -1 nogil:
        cdef uint32_t handle = <uint32_t>number
        cdef uint32_t generation = <uint32_t>(number >> 32) & 0xFFFFFF
        cdef bint more = (flags & IORING_CQE_F_MORE) != 0
        cdef Watch *watch = &self.watches[handle]
        if not more:
            self.polls -= 1
        if watch.fd < 0 or watch.generation != generation:
            return 0
        if owner == OWNER_WRITE_WATCH:
            watch.wants_write = 0
            return self.tell(watch, EVENT_WRITABLE, result)
        self.tell(watch, EVENT_READABLE, result)
        if not more and (result >= 0 or result == -ECANCELED):      # the kernel drops a multishot when its queue overflows
            return self.poll(handle, OWNER_READ_WATCH)
        return 0

    cdef int turn(self, int64_t timeout_ns, int64_t spin_ns) except -1 nogil:
        cdef int result
        cdef io_uring_cqe *first = NULL
        cdef kernel_timespec wait
        cdef int64_t until
        self.interrupted = False
        timeout_ns = self.poll_timeout(timeout_ns)
        if self.overflow_count:
            self.drain_overflow()
        cdef bint ready = self.event_count != 0 or io_uring_cq_ready(&self.ring) != 0
        if not ready and timeout_ns > 0 and spin_ns > 0:
            result = io_uring_submit_and_get_events(&self.ring)
            self.check(result)
            until = monotonic_ns() + spin_ns
            while not io_uring_cq_ready(&self.ring) and monotonic_ns() < until:
                if fvd_ring_flags(&self.ring) & IORING_SQ_TASKRUN:
                    io_uring_get_events(&self.ring)
                else:
                    fvd_relax()
            ready = io_uring_cq_ready(&self.ring) != 0
        if ready or timeout_ns <= 0:
            result = io_uring_submit_and_get_events(&self.ring)
        else:
            wait.tv_sec = timeout_ns // 1000000000
            wait.tv_nsec = timeout_ns % 1000000000
            result = io_uring_submit_and_wait_timeout(&self.ring, &first, 1, &wait, NULL)
        self.check(result)
        self.reap()
        return self.poll_sources()

    cdef int reap(self) except -1 nogil:
        cdef io_uring_cq *cq = &self.ring.cq
        cdef io_uring_cqe *cqe
        cdef unsigned count, i
        cdef uint64_t owner, number
        while True:
            count = io_uring_cq_ready(&self.ring)
            self.batch += 1
            for i in range(count):
                cqe = &cq.cqes[(cq.khead[0] + i) & cq.ring_mask]
                owner = cqe.user_data >> 62
                number = cqe.user_data & ((<uint64_t>1 << 62) - 1)
                if owner == OWNER_OP:
                    self.ended(<uint32_t>number, cqe.res)
                elif owner != OWNER_NOBODY:
                    self.polled(owner, number, cqe.res, cqe.flags)
            io_uring_cq_advance(&self.ring, count)
            if not fvd_ring_flags(&self.ring) & IORING_SQ_CQ_OVERFLOW:
                return 0
            io_uring_get_events(&self.ring)     # moves what overflowed into the queue

    cdef int check(self, int result) except -1 nogil:
        """EBUSY and EAGAIN clear up once completions have been taken; a lost completion (EBADR) never does."""
        if result >= 0 or result == -ETIME or result == -EBUSY or result == -EAGAIN:
            return 0
        if result == -EINTR:
            self.interrupted = True
            return 0
        with gil:
            raise DeviceError(f"io_uring_enter: {os.strerror(-result)}")

    cpdef int close(self) except -1:
        """Cancel the watches and wait for the operations: an exiting ring is torn down asynchronously, and would keep the sockets bound."""
        cdef uint32_t handle
        cdef int64_t until_ns = monotonic_ns() + 1000000000
        if not self.opened:
            return 0
        self.drop_sources()
        with nogil:
            for handle in range(self.watch_capacity):
                if self.watches[handle].fd >= 0:
                    self.unwatch(handle)
            while self.inflight or self.overflow_count or (self.polls and monotonic_ns() < until_ns):
                self.turn(100000000, 0)
                self.event_count = 0
            self.turn(0, 0)
            io_uring_queue_exit(&self.ring)
        self.opened = False
        return 0
