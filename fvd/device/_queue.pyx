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
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy, memmove, memset

from fvd._core cimport BUG, Bug
from fvd.device.clock cimport monotonic_ns
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
    static inline int fvd_is_block_device(int fd) {
        struct stat status;
        return fstat(fd, &status) < 0 ? -1 : S_ISBLK(status.st_mode);
    }
    """
    const int ECANCELED
    const uint32_t FVD_URING_CMD_DISCARD
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
    const int IORING_OP_READ, IORING_OP_WRITE, IORING_OP_READV, IORING_OP_WRITEV, IORING_OP_URING_CMD
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
            self.source_ready = True
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

    cdef int64_t poll_timeout(self, int64_t timeout_ns) noexcept nogil:
        """How long turn() may sleep."""
        if self.event_count or self.source_ready:
            return 0
        return min(timeout_ns, SUPERVISE_NS) if self.source_inflight else timeout_ns

    cdef int poll_sources(self) except -1 nogil:
        """Let the sources take what rang for them; theirs are the last events of a turn."""
        cdef uint32_t i
        cdef int64_t now_ns
        if self.source_count == 0:
            self.source_ready = False
            return 0
        now_ns = monotonic_ns()
        if not self.source_ready and now_ns < self.next_look_ns:
            return 0
        self.source_ready = False
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
        self.source_ready = True
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


include "uring.pxi"
include "blocking.pxi"


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
