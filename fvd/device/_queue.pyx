# SPDX-License-Identifier: Apache-2.0
"""Operation queues: run device operations and watch sockets, through io_uring or, where the kernel refuses that, blocking calls and epoll.

A queue belongs to the thread that opened it. It finishes short transfers itself and answers 0 or a negative errno. It knows
descriptors, bytes, and sources (a base that is no descriptor: see _remote.pyx); it may not know the engine, the format, or what a
watched socket speaks.
"""

import os

from cpython.ref cimport PyObject
from libc.errno cimport (EAGAIN, EBUSY, EINTR, EINVAL, EIO, ENOMEM, ENOSPC, ENOSYS, ENOTTY, EOPNOTSUPP, EPERM, ETIME, errno)
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memmove, memset

from fvd._core cimport BUG, Bug
from fvd.device.op cimport OP_DISCARD, OP_FLUSH, OP_READ, OP_WRITE, OP_ZERO, TARGET_BASE, TARGET_STORAGE, DeviceOp

from fvd._lifetime import keep
from fvd.errors import DeviceError

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <errno.h>
    #include <fcntl.h>
    #include <linux/falloc.h>
    #include <linux/fs.h>
    #include <poll.h>
    #include <stdlib.h>
    #include <sys/epoll.h>
    #include <sys/ioctl.h>
    #include <sys/stat.h>
    #include <sys/uio.h>
    #include <time.h>
    #include <unistd.h>
    #include <liburing.h>

    /* Linux 6.12's block-device command; liburing 2.3 lacks the constant. */
    #define FVD_URING_CMD_DISCARD _IO(0x12, 0)

    static inline unsigned fvd_ring_flags(struct io_uring *ring) { return IO_URING_READ_ONCE(*ring->sq.kflags); }
    static inline void fvd_relax(void) {
    #if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
    #endif
    }
    static inline int64_t fvd_now_ns(void) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
    }
    static inline int fvd_is_block_device(int fd) {
        struct stat status;
        return fstat(fd, &status) < 0 ? -1 : S_ISBLK(status.st_mode);
    }
    """
    const int ECANCELED
    const uint32_t FVD_URING_CMD_DISCARD
    int64_t fvd_now_ns() noexcept nogil
    void fvd_relax() noexcept nogil
    int fvd_is_block_device(int fd) noexcept nogil

    ctypedef long ssize_t
    ctypedef long long off_t
    cdef struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t preadv2(int fd, const iovec *parts, int count, off_t offset, int flags) nogil
    ssize_t pwritev2(int fd, const iovec *parts, int count, off_t offset, int flags) nogil
    int fdatasync(int fd) nogil
    int sync_file_range(int fd, off_t offset, off_t size, unsigned flags) nogil
    const unsigned SYNC_FILE_RANGE_WAIT_BEFORE
    int fallocate(int fd, int mode, off_t offset, off_t size) nogil
    int ioctl(int fd, unsigned long request, ...) nogil
    int c_close "close"(int fd) nogil
    const int RWF_DSYNC, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_KEEP_SIZE
    const unsigned long BLKDISCARD
    const unsigned POLLIN, POLLOUT, POLLRDHUP

    const uint32_t EPOLLIN, EPOLLOUT, EPOLLRDHUP, EPOLLET, EPOLLERR, EPOLLHUP
    const int EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_MOD, EPOLL_CTL_DEL
    ctypedef union epoll_data_t:
        uint64_t u64
    cdef struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_create1(int flags) nogil
    int epoll_ctl(int epoll_fd, int op, int fd, epoll_event *event) nogil
    int epoll_wait(int epoll_fd, epoll_event *events, int count, int timeout_ms) nogil

    ctypedef struct kernel_timespec "struct __kernel_timespec":
        int64_t tv_sec
        long long tv_nsec
    cdef struct io_uring_sqe:
        uint8_t opcode
        uint32_t rw_flags
        uint64_t addr
        uint64_t addr3
        uint32_t cmd_op
        uint64_t user_data
    cdef struct io_uring_cqe:
        uint64_t user_data
        int32_t res
        uint32_t flags
    cdef struct io_uring_params:
        uint32_t flags
        uint32_t features
        uint32_t cq_entries
    cdef struct io_uring_cq:
        unsigned ring_mask
        unsigned *khead
        unsigned *ktail
        io_uring_cqe *cqes
    cdef struct io_uring:
        io_uring_cq cq
        int ring_fd
    int io_uring_queue_init_params(unsigned entries, io_uring *ring, io_uring_params *params) nogil
    void io_uring_queue_exit(io_uring *ring) nogil
    int io_uring_register_ring_fd(io_uring *ring) nogil
    int io_uring_ring_dontfork(io_uring *ring) nogil
    int io_uring_register_iowq_max_workers(io_uring *ring, unsigned *bounded_and_unbounded) nogil
    io_uring_sqe *io_uring_get_sqe(io_uring *ring) nogil
    int io_uring_submit(io_uring *ring) nogil
    int io_uring_get_events(io_uring *ring) nogil
    int io_uring_submit_and_get_events(io_uring *ring) nogil
    int io_uring_submit_and_wait_timeout(io_uring *ring, io_uring_cqe **cqe, unsigned count, kernel_timespec *timeout, void *mask) nogil
    unsigned io_uring_cq_ready(const io_uring *ring) nogil
    unsigned io_uring_sq_ready(const io_uring *ring) nogil
    void io_uring_cq_advance(io_uring *ring, unsigned count) nogil
    unsigned fvd_ring_flags(io_uring *ring) nogil
    void io_uring_prep_rw(int op, io_uring_sqe *sqe, int fd, const void *address, unsigned length, uint64_t offset) nogil
    void io_uring_prep_fsync(io_uring_sqe *sqe, int fd, unsigned flags) nogil
    void io_uring_prep_fallocate(io_uring_sqe *sqe, int fd, int mode, uint64_t offset, uint64_t size) nogil
    void io_uring_prep_poll_add(io_uring_sqe *sqe, int fd, unsigned mask) nogil
    void io_uring_prep_poll_multishot(io_uring_sqe *sqe, int fd, unsigned mask) nogil
    void io_uring_prep_cancel64(io_uring_sqe *sqe, uint64_t user_data, int flags) nogil
    const int IORING_OP_READ, IORING_OP_WRITE, IORING_OP_URING_CMD
    const unsigned IORING_FSYNC_DATASYNC, IORING_CQE_F_MORE, IORING_SQ_CQ_OVERFLOW, IORING_SQ_TASKRUN
    const unsigned IORING_SETUP_CQSIZE, IORING_SETUP_COOP_TASKRUN, IORING_SETUP_TASKRUN_FLAG
    const unsigned IORING_SETUP_SINGLE_ISSUER, IORING_SETUP_DEFER_TASKRUN
    const unsigned IORING_FEAT_NODROP, IORING_FEAT_EXT_ARG, IORING_FEAT_RSRC_TAGS

cdef enum DiscardHow:
    DISCARD_NOTHING = 0     # refused once, or nothing to discard on: advisory, so doing nothing is a success
    DISCARD_PUNCH = 1       # regular file: a hole, same size
    DISCARD_DEVICE = 2      # block device

# On a block device: zeros by its own means, which may unmap, or EOPNOTSUPP; never by writing (BLKDEV_ZERO_NOFALLBACK in block/fops.c).
cdef int ZERO_HOW = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE

cdef off_t NOWHERE = <off_t>1 << 62

cdef int64_t SUPERVISE_NS = 100000000       # so often a source with operations in flight looks whether one is overdue

cdef enum:
    TRANSFER_BYTES = 1 << 30        # the kernel moves at most 2 GiB - 4 KiB at once
    NONE = 0xFFFFFFFF
    WORKERS_MAX = 1024
    # Of a long batch the device gets the first while the others are being handed over: it idled until the last one else. In process at
    # depth 32, against all at once: reads 1.21, writes 1.42 times as many a second, 0.96 and 0.84 of the CPU; with 4 no better.
    SUBMIT_AT_ONCE = 8

# What a completion belongs to: bits 62-63 of user_data.
cdef enum Owner:
    OWNER_OP = 0
    OWNER_READ_WATCH = 1
    OWNER_WRITE_WATCH = 2
    OWNER_NOBODY = 3


cdef class Source:
    """What the queue needs of a base that is no descriptor."""

    cdef void note(self, uint32_t what) noexcept nogil:
        self.noted |= what

    cdef int attach(self, Queue queue, uint32_t disk) except -1:
        raise NotImplementedError

    cdef int detach(self) except -1:
        raise NotImplementedError

    cdef int start(self, const DeviceOp *op) except -1 nogil:
        with gil:
            raise NotImplementedError

    cdef int turn(self, int64_t now_ns) except -1 nogil:
        return 0


cdef class Queue:
    """Base: the tables that both implementations share."""

    def __cinit__(self):
        self.kind = self.notice = ""
        self.attached = []

    def __dealloc__(self):
        free(self.events)
        free(self.disks)
        free(self.watches)
        free(self.sources)

    cdef int attach(self, uint32_t disk, int storage_fd, int base_fd, Source source=None, int sampler_fd=-1) except -1:
        cdef Disk *grown
        cdef uint32_t capacity = max(disk + 1, 2 * self.disk_capacity)
        if disk >= self.disk_capacity:
            grown = <Disk *>realloc(self.disks, capacity * sizeof(Disk))
            if grown == NULL:
                raise MemoryError
            self.disks = grown
            self.disk_capacity = capacity
        cdef int block_device = fvd_is_block_device(storage_fd)
        if block_device < 0:
            raise OSError(errno, os.strerror(errno))
        self.disks[disk].storage_fd = storage_fd
        self.disks[disk].base_fd = base_fd
        self.disks[disk].sampler_fd = sampler_fd
        self.disks[disk].asked_at = 0
        self.disks[disk].discard = DISCARD_DEVICE if block_device else DISCARD_PUNCH
        self.disks[disk].source = NULL
        self.disks[disk].base_inflight = 0
        cdef PyObject **more
        if source is not None:
            if self.source_count == self.source_capacity:
                more = <PyObject **>realloc(self.sources, (self.source_capacity + 16) * sizeof(PyObject *))
                if more == NULL:
                    raise MemoryError
                self.sources = more
                self.source_capacity += 16
            source.attach(self, disk)
            self.attached.append(source)
            self.sources[self.source_count] = self.disks[disk].source = <PyObject *>source
            self.source_count += 1
            self.source_rang = True
        return 0

    cdef int detach(self, uint32_t disk) except -1:
        self.release_base(disk)
        self.disks[disk].storage_fd = self.disks[disk].sampler_fd = -1
        return 0

    cdef int release_base(self, uint32_t disk) except -1:
        if disk >= self.disk_capacity:
            raise RuntimeError(f"disk {disk} is not attached")
        if self.disks[disk].base_inflight:
            raise RuntimeError(f"disk {disk}: {self.disks[disk].base_inflight} operations of its base are in flight")
        if self.disks[disk].source != NULL:
            self.drop_source(<Source>self.disks[disk].source)
            self.disks[disk].source = NULL
        self.disks[disk].base_fd = -1
        return 0

    cdef int drop_source(self, Source source) except -1:
        cdef uint32_t i
        source.detach()
        self.attached.remove(source)
        for i in range(self.source_count):
            if self.sources[i] == <PyObject *>source:
                self.source_count -= 1
                self.sources[i] = self.sources[self.source_count]
                break
        return 0

    cdef int drop_sources(self) except -1:
        """For close(): what is in flight there ends now."""
        cdef uint32_t disk
        for source in list(self.attached):
            for disk in range(self.disk_capacity):
                if self.disks[disk].source == <PyObject *>source:
                    self.disks[disk].source = NULL
            self.drop_source(source)
        return 0

    cdef int watch_for(self, Source source, int fd, uint64_t key) except -1:
        cdef int handle = self.watch(fd, key)
        self.watches[handle].source = <PyObject *>source
        return handle

    cdef int source_ended(self, uint32_t disk, uint64_t token, int64_t result) except -1 nogil:
        self.add_event(EVENT_OP, token, result, disk)
        self.disks[disk].base_inflight -= 1
        self.source_inflight -= 1
        self.inflight -= 1
        return 0

    cdef int start_at_source(self, uint32_t disk, const DeviceOp *op) except -1 nogil:
        self.disks[disk].base_inflight += 1
        self.source_inflight += 1
        self.inflight += 1
        return (<Source>self.disks[disk].source).start(op)

    cdef int64_t patience(self, int64_t timeout_ns) noexcept nogil:
        """How long turn() may sleep."""
        if self.event_count or self.source_rang:
            return 0
        return min(timeout_ns, SUPERVISE_NS) if self.source_inflight else timeout_ns

    cdef int look_at_sources(self) except -1 nogil:
        """Let the sources take what rang for them; theirs are the last events of a turn."""
        cdef uint32_t i
        cdef int64_t now_ns
        if self.source_count == 0:
            self.source_rang = False
            return 0
        now_ns = fvd_now_ns()
        if not self.source_rang and now_ns < self.next_look_ns:
            return 0
        self.source_rang = False
        self.next_look_ns = now_ns + SUPERVISE_NS
        for i in range(self.source_count):
            (<Source>self.sources[i]).turn(now_ns)
        return 0

    cdef int start(self, uint32_t disk, const DeviceOp *ops, uint32_t count) except -1 nogil:
        with gil:
            raise NotImplementedError

    cdef int watch(self, int fd, uint64_t key) except -1 nogil:
        with gil:
            raise NotImplementedError

    cdef int want_write(self, uint32_t handle) except -1 nogil:
        with gil:
            raise NotImplementedError

    cdef int unwatch(self, uint32_t handle) except -1 nogil:
        with gil:
            raise NotImplementedError

    cdef int turn(self, int64_t timeout_ns, int64_t spin_ns) except -1 nogil:
        with gil:
            raise NotImplementedError

    cpdef int close(self) except -1:
        raise NotImplementedError

    cdef int add_event(self, uint32_t kind, uint64_t key, int64_t result, uint32_t disk) except -1 nogil:
        cdef Event *grown
        cdef uint32_t capacity = max(256, 2 * self.event_capacity)
        if self.event_count == self.event_capacity:
            grown = <Event *>realloc(self.events, capacity * sizeof(Event))
            if grown == NULL:
                with gil:
                    raise MemoryError
            self.events = grown
            self.event_capacity = capacity
        cdef Event *event = &self.events[self.event_count]
        event.key = key
        event.result = result
        event.disk = disk
        event.kind = kind
        self.event_count += 1
        return 0

    cdef int new_watch(self, int fd, uint64_t key) except -1 nogil:
        cdef Watch *grown
        cdef uint32_t handle, capacity = max(16, 2 * self.watch_capacity)
        for handle in range(self.watch_capacity):
            if self.watches[handle].fd < 0:
                break
        else:
            handle = self.watch_capacity
            grown = <Watch *>realloc(self.watches, capacity * sizeof(Watch))
            if grown == NULL:
                with gil:
                    raise MemoryError
            self.watches = grown
            memset(grown + handle, 0xFF, (capacity - handle) * sizeof(Watch))   # fd = -1
            self.watch_capacity = capacity
        cdef Watch *watch = &self.watches[handle]
        watch.fd = fd
        watch.key = key
        watch.source = NULL
        watch.generation = (watch.generation + 1) & 0xFFFFFF
        watch.wants_write = 0
        return <int>handle

    cdef int tell(self, Watch *watch, uint32_t kind, int64_t result) except -1 nogil:
        if watch.source == NULL:
            return self.add_event(kind, watch.key, result, 0)
        (<Source>watch.source).note(<uint32_t>watch.key << (WRITABLE_SHIFT if kind == EVENT_WRITABLE else 0))
        self.source_rang = True
        return 0


cdef int64_t transfer_result(uint8_t kind, uint64_t moved, uint64_t length, int64_t result) noexcept nogil:
    if moved == length:
        return 0
    # Direct I/O cannot continue from an odd place, which a short transfer leaves only at the end.
    if result == 0 or (result == -EINVAL and moved):
        return -EIO if kind == OP_READ else -ENOSPC
    return result


cdef int64_t discard_result(Disk *disk, int64_t result) noexcept nogil:
    """A refusal is a success, since discards are advisory; a refusal for good is not asked for again."""
    if result == -EOPNOTSUPP or result == -ENOTTY or result == -ENOSYS or result == -EPERM:
        disk.discard = DISCARD_NOTHING
        return 0
    return 0 if result == -EINVAL else result     # EINVAL: a kernel before 6.12, or a range that is not aligned


cdef bint is_sampled(Disk *disk, const DeviceOp *op) noexcept nogil:
    """Whether the good end of this operation is one only if the sampler has heard of nothing."""
    return disk.sampler_fd >= 0 and op.target == TARGET_STORAGE and (op.kind == OP_FLUSH or op.durable) and not BUG(Bug.SAMPLER_NOT_ASKED)


cdef int64_t ask_sampler(Disk *disk) noexcept nogil:
    """R28: whether a page of this file has failed to reach the device since the sampler was opened, whoever was told. No page lies where
    it asks, so it waits for nothing."""
    return 0 if sync_file_range(disk.sampler_fd, NOWHERE, 1, SYNC_FILE_RANGE_WAIT_BEFORE) == 0 else -errno


# --- io_uring ---------------------------------------------------------------------------------------------------

def _let_go_of_ring(UringQueue queue):
    """In a child after fork, which has no mapping of the ring (io_uring_ring_dontfork): liburing must not look at it again."""
    was_open, queue.opened = queue.opened, False
    return (queue.ring.ring_fd if was_open else -1,)


cdef struct Pending:
    DeviceOp op
    uint64_t moved          # bytes of it already transferred
    uint32_t disk
    uint32_t next_free


cdef class UringQueue(Queue):
    """One io_uring_enter per turn, more for a long batch; sockets by multishot poll. What the kernel's queue cannot take at once spills
    into ours."""

    cdef io_uring ring
    cdef bint opened
    cdef Pending *pending
    cdef uint32_t pending_capacity
    cdef uint32_t first_free
    cdef io_uring_sqe *spill            # prepared entries that the submission queue had no room for, in order
    cdef uint32_t spill_capacity
    cdef uint32_t spill_count
    cdef uint32_t polls                 # poll requests in the kernel
    cdef uint64_t batch                 # of completions that were taken together, from 1

    def __cinit__(self):
        self.kind = "io_uring"
        self.first_free = NONE

    def __dealloc__(self):
        if self.opened:                 # the owner did not close(): whatever is in flight still writes to its buffers, so they must leak
            io_uring_queue_exit(&self.ring)
        free(self.pending)
        free(self.spill)

    cdef int open(self, uint32_t entries) except? -1:
        """0, or the negative errno with which the kernel refuses."""
        cdef io_uring_params params
        cdef int result = -EINVAL
        cdef uint32_t flags
        cdef unsigned[2] workers = [WORKERS_MAX, 0]
        cdef uint32_t best = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_TASKRUN_FLAG     # Linux 6.1
        cdef uint32_t fair = IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG                                  # Linux 5.19
        for flags in (best | IORING_SETUP_COOP_TASKRUN, fair, 0):
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
        """Room for one request; filled in before the next call. The caller's io_uring_prep_* leaves user_data alone."""
        cdef io_uring_sqe *sqe = NULL
        cdef io_uring_sqe *grown
        cdef uint32_t capacity = max(64, 2 * self.spill_capacity)
        if self.spill_count == 0:
            sqe = io_uring_get_sqe(&self.ring)
            if sqe == NULL:
                io_uring_submit(&self.ring)     # a refusal shows as no room
                sqe = io_uring_get_sqe(&self.ring)
        if sqe == NULL:
            if self.spill_count == self.spill_capacity:
                grown = <io_uring_sqe *>realloc(self.spill, capacity * sizeof(io_uring_sqe))
                if grown == NULL:
                    with gil:
                        raise MemoryError
                self.spill = grown
                self.spill_capacity = capacity
            sqe = &self.spill[self.spill_count]
            self.spill_count += 1
        sqe.user_data = owner << 62 | number
        return sqe

    cdef void unspill(self) noexcept nogil:
        cdef uint32_t taken = 0
        cdef io_uring_sqe *sqe
        while taken < self.spill_count:
            sqe = io_uring_get_sqe(&self.ring)
            if sqe == NULL:
                if io_uring_submit(&self.ring) <= 0:
                    break
                continue
            memcpy(sqe, &self.spill[taken], sizeof(io_uring_sqe))
            taken += 1
        self.spill_count -= taken
        memmove(self.spill, self.spill + taken, self.spill_count * sizeof(io_uring_sqe))

    cdef int start(self, uint32_t disk, const DeviceOp *ops, uint32_t count) except -1 nogil:
        cdef uint32_t i, number, capacity
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
                grown[capacity - 1].next_free = NONE
                self.first_free = self.pending_capacity
                self.pending_capacity = capacity
            number = self.first_free
            self.first_free = self.pending[number].next_free
            self.pending[number].op = ops[i]
            self.pending[number].moved = 0
            self.pending[number].disk = disk
            self.inflight += 1
            self.issue(number)
            if self.spill_count == 0 and io_uring_sq_ready(&self.ring) >= SUBMIT_AT_ONCE:
                io_uring_submit(&self.ring)     # a refusal is the turn's to see
        return 0

    cdef int issue(self, uint32_t number) except -1 nogil:
        """Put an operation, or what is left of it, into the ring."""
        cdef Pending *pending = &self.pending[number]
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

    cdef int ended(self, uint32_t number, int64_t result) except -1 nogil:
        """The kernel's answer to an operation: continue a short transfer, or finish."""
        cdef Pending *pending = &self.pending[number]
        cdef DeviceOp *op = &pending.op
        if result == -EINTR or result == -EAGAIN:
            return self.issue(number)
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
        timeout_ns = self.patience(timeout_ns)
        if self.spill_count:
            self.unspill()
        cdef bint ready = self.event_count != 0 or io_uring_cq_ready(&self.ring) != 0
        if not ready and timeout_ns > 0 and spin_ns > 0:
            result = io_uring_submit_and_get_events(&self.ring)
            self.check(result)
            until = fvd_now_ns() + spin_ns
            while not io_uring_cq_ready(&self.ring) and fvd_now_ns() < until:
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
        return self.look_at_sources()

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
        cdef int64_t patience = fvd_now_ns() + 1000000000
        if not self.opened:
            return 0
        self.drop_sources()
        with nogil:
            for handle in range(self.watch_capacity):
                if self.watches[handle].fd >= 0:
                    self.unwatch(handle)
            while self.inflight or self.spill_count or (self.polls and fvd_now_ns() < patience):
                self.turn(100000000, 0)
                self.event_count = 0
            self.turn(0, 0)
            io_uring_queue_exit(&self.ring)
        self.opened = False
        return 0


# --- Blocking ---------------------------------------------------------------------------------------------------

def _epoll(BlockingQueue queue):
    return (queue.epoll_fd,)


cdef class BlockingQueue(Queue):
    """Where there is no io_uring: each operation runs to its end in start(); sockets through epoll, edge-triggered as multishot poll is."""

    cdef int epoll_fd

    def __cinit__(self):
        self.kind = "blocking"
        self.epoll_fd = -1

    def __dealloc__(self):
        if self.epoll_fd >= 0:
            c_close(self.epoll_fd)

    cdef int open(self) except -1:
        self.epoll_fd = epoll_create1(EPOLL_CLOEXEC)
        if self.epoll_fd < 0:
            raise OSError(errno, os.strerror(errno))
        keep(self, _epoll)
        return 0

    cdef int start(self, uint32_t disk, const DeviceOp *ops, uint32_t count) except -1 nogil:
        cdef uint32_t i
        cdef int64_t result
        for i in range(count):
            if ops[i].target == TARGET_BASE and self.disks[disk].source != NULL:
                self.start_at_source(disk, &ops[i])
                continue
            result = run_op(&self.disks[disk], &ops[i])
            if result == 0 and is_sampled(&self.disks[disk], &ops[i]):
                result = ask_sampler(&self.disks[disk])
            self.add_event(EVENT_OP, ops[i].token, result, disk)
            self.inflight += 1
        return 0

    cdef int control(self, int how, uint32_t handle) except -1 nogil:
        cdef epoll_event event
        cdef Watch *watch = &self.watches[handle]
        event.events = EPOLLIN | EPOLLRDHUP | EPOLLET | (EPOLLOUT if watch.wants_write else 0)
        event.data.u64 = <uint64_t>watch.generation << 32 | handle
        if epoll_ctl(self.epoll_fd, how, watch.fd, &event) < 0:
            with gil:
                raise OSError(errno, os.strerror(errno))
        return 0

    cdef int watch(self, int fd, uint64_t key) except -1 nogil:
        cdef int handle = self.new_watch(fd, key)
        self.control(EPOLL_CTL_ADD, <uint32_t>handle)
        return handle

    cdef int want_write(self, uint32_t handle) except -1 nogil:
        self.watches[handle].wants_write = 1
        return self.control(EPOLL_CTL_MOD, handle)

    cdef int unwatch(self, uint32_t handle) except -1 nogil:
        self.control(EPOLL_CTL_DEL, handle)
        self.watches[handle].fd = -1
        return 0

    cdef int turn(self, int64_t timeout_ns, int64_t spin_ns) except -1 nogil:
        cdef epoll_event[64] ready
        cdef int64_t until
        cdef uint32_t handle
        cdef int i, count = 0, timeout_ms = 0
        cdef Watch *watch
        self.interrupted = False
        self.inflight = self.source_inflight    # all others are in events
        timeout_ns = self.patience(timeout_ns)
        if timeout_ns > 0:
            timeout_ms = <int>((timeout_ns + 999999) // 1000000)
            until = fvd_now_ns() + spin_ns
            while spin_ns > 0 and count == 0 and fvd_now_ns() < until:
                count = epoll_wait(self.epoll_fd, ready, 64, 0)
        if count == 0:
            count = epoll_wait(self.epoll_fd, ready, 64, timeout_ms)
        if count < 0:
            self.interrupted = errno == EINTR
            if not self.interrupted:
                with gil:
                    raise OSError(errno, os.strerror(errno))
        for i in range(count):
            handle = <uint32_t>ready[i].data.u64
            watch = &self.watches[handle]
            if watch.fd < 0 or watch.generation != ready[i].data.u64 >> 32:
                continue
            if watch.wants_write and ready[i].events & (EPOLLOUT | EPOLLERR | EPOLLHUP):
                watch.wants_write = 0
                self.control(EPOLL_CTL_MOD, handle)
                self.tell(watch, EVENT_WRITABLE, ready[i].events)
            if ready[i].events & ~EPOLLOUT:
                self.tell(watch, EVENT_READABLE, ready[i].events & ~EPOLLOUT)
        return self.look_at_sources()

    cpdef int close(self) except -1:
        self.drop_sources()
        if self.epoll_fd >= 0:
            c_close(self.epoll_fd)
            self.epoll_fd = -1
        return 0


cdef int64_t run_op(Disk *disk, const DeviceOp *op) noexcept nogil:
    cdef int fd = disk.base_fd if op.target == TARGET_BASE else disk.storage_fd
    cdef uint64_t moved = 0
    cdef uint64_t[2] device_range
    cdef iovec part
    cdef int64_t result = 0
    if op.kind == OP_FLUSH:
        return 0 if fdatasync(fd) == 0 else -errno
    if op.kind == OP_DISCARD:
        if disk.discard == DISCARD_PUNCH:
            result = fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, <off_t>op.offset_bytes, <off_t>op.length_bytes)
        elif disk.discard == DISCARD_DEVICE:
            device_range[0], device_range[1] = op.offset_bytes, op.length_bytes
            result = ioctl(fd, BLKDISCARD, device_range)
        return discard_result(disk, 0 if result == 0 else -errno)
    if op.kind == OP_ZERO:
        return 0 if fallocate(fd, ZERO_HOW, <off_t>op.offset_bytes, <off_t>op.length_bytes) == 0 else -errno
    while moved < op.length_bytes:
        part.iov_base = op.buffer + moved
        part.iov_len = <size_t>min(op.length_bytes - moved, <uint64_t>TRANSFER_BYTES)
        if op.kind == OP_READ:
            result = preadv2(fd, &part, 1, <off_t>(op.offset_bytes + moved), 0)
        else:
            result = pwritev2(fd, &part, 1, <off_t>(op.offset_bytes + moved), RWF_DSYNC if op.durable else 0)
        if result < 0:
            result = -errno
            if result == -EINTR or result == -EAGAIN:
                continue
        if result <= 0:
            break
        moved += <uint64_t>result
    return transfer_result(op.kind, moved, op.length_bytes, result)


# --- Choosing ---------------------------------------------------------------------------------------------------

cpdef Queue open_queue(bint force_blocking=False, uint32_t entries=1024):
    """The best queue that this kernel allows, in and for the calling thread. FVD_QUEUE=blocking forces the blocking one."""
    cdef UringQueue uring
    cdef int refusal
    if force_blocking or os.environ.get("FVD_QUEUE") == "blocking":
        notice = "blocking I/O was asked for"
    else:
        uring = UringQueue()
        refusal = uring.open(entries)
        if refusal == 0:
            return uring
        notice = f"the kernel refuses io_uring ({refusal_reason(-refusal)}): device operations run one at a time, slower"
    cdef BlockingQueue blocking = BlockingQueue()
    blocking.open()
    blocking.notice = notice
    return blocking


def refusal_reason(error: int) -> str:
    reasons = {
        ENOSYS: "older than Linux 5.13, or filtered by seccomp",
        EPERM: "by seccomp, or the sysctl kernel.io_uring_disabled",
        ENOMEM: "the limit on locked memory, ulimit -l, is used up",
    }
    return reasons.get(error, os.strerror(error))
