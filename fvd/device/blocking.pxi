# SPDX-License-Identifier: Apache-2.0
# The queue where the kernel refuses io_uring: blocking calls, and epoll for sockets. What both queues share is in _queue.pyx.
#
# Offers: BlockingQueue
# Needs: _queue: Queue, transfer_result, discard_result, is_sampled, ask_sampler

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
        timeout_ns = self.poll_timeout(timeout_ns)
        if timeout_ns > 0:
            timeout_ms = <int>((timeout_ns + 999999) // 1000000)
            until = monotonic_ns() + spin_ns
            while spin_ns > 0 and count == 0 and monotonic_ns() < until:
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
        return self.poll_sources()

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
