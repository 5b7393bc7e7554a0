# SPDX-License-Identifier: Apache-2.0
"""Drives one open disk inside this process: reads and writes of any thread become requests of the engine, without NBD.

One thread owns the engine and its operation queue, for both belong to one thread; callers hand it their requests and sleep without the GIL.
It may not know sockets, protocols, or how the disk was opened.
"""

import collections
import logging
import operator
import os
import threading
from concurrent.futures import Future

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EINTR, EINVAL, EIO, ENOSPC, EROFS, ESHUTDOWN
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from fvd._aligned cimport aligned
from fvd._lifetime cimport asked_to_stop, is_work, process
from fvd.device._queue cimport EVENT_OP, open_queue
from fvd.device.clock cimport monotonic_ns
from fvd.engine._engine cimport (
    FLAG_FUA, FLAG_NO_HOLE, REQUEST_CLOSE, REQUEST_FLUSH, REQUEST_READ, REQUEST_TRIM, REQUEST_WRITE, REQUEST_ZERO, Want,
)

from fvd._lifetime import Interrupted, between_forks, keep, never_wait
from fvd.errors import DeviceError, Forked, InvalidArgument, NoSpace, OutOfMemory, ReadOnly, quoted

cdef extern from "<errno.h>" nogil:
    const int ECANCELED

cdef extern from "<semaphore.h>" nogil:
    int sem_init(sem_t *, int, unsigned int)
    int sem_destroy(sem_t *)
    int sem_post(sem_t *)

cdef extern from "<pthread.h>" nogil:
    int pthread_mutex_init(pthread_mutex_t *, const void *)
    int pthread_mutex_lock(pthread_mutex_t *)
    int pthread_mutex_unlock(pthread_mutex_t *)
    int pthread_mutex_destroy(pthread_mutex_t *)

cdef enum:
    PIECE_BYTES = 4 << 20           # a longer transfer goes in pieces: it bounds the copy that each caller holds
    PIECE_RANGE_BYTES = 1 << 30     # of trim and zero, which have no buffer
    TICK_NS = 1000000000            # a quiet disk still commits what is pending
    COPYING_TICK_NS = 250000000     # copying is steered this often
    LOOK_NS = 50000000              # so often work that is waiting looks whether it is still wanted

_WAKE_KEY = 0xFFFFFFFFFFFFFFFF
log = logging.getLogger(__name__)


cdef class DiskThread:
    """An open volume and the thread that drives it. Made by `drive`; owns the volume and closes it."""

    def __cinit__(self, volume, bint force_blocking=False, on_failure=None):
        pthread_mutex_init(&self.lock, NULL)
        self.volume = volume
        self.engine = volume.engine
        self.force_blocking = force_blocking
        self.on_failure = on_failure
        self.posted = collections.deque()
        self.opened = threading.Event()
        self.close_lock = threading.Lock()
        self.failure = None
        self.queue_kind = ""
        self.wake_fd = -1
        self.process = process()

    def __dealloc__(self):
        if self.wake_fd >= 0:
            os.close(self.wake_fd)
        pthread_mutex_destroy(&self.lock)

    def start(self):
        """Starts the thread. Raises what opening its queue raises. Called once, by `drive`."""
        with between_forks:
            self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            keep(self, _descriptors)
        # A daemon: a caller that forgot to close must still be able to end its process. The journal makes up for it.
        self.thread = threading.Thread(target=self._run, name=f"fvd {self.volume.name}", daemon=True)
        self.thread.start()
        self.opened.wait()
        if self.failure is not None:
            self.thread.join()
            raise self.failure

    # --- What callers use, from any thread ----------------------------------------------------------------------------------------

    @property
    def closed(self):
        return self.closing

    def pread(self, offset_bytes, length_bytes):
        """`length_bytes` from `offset_bytes` of the disk. Raises InvalidArgument (not in the disk), OutOfMemory, DeviceError."""
        cdef uint64_t at = natural(offset_bytes, "offset"), length = natural(length_bytes, "length")
        self.check_range(at, length)
        try:
            data = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>length)     # nobody else sees it before it is full
        except (MemoryError, OverflowError) as error:
            raise OutOfMemory(f"{self.volume.name}: no memory for {length} bytes at once; read less at a time") from error
        self.fill(at, <uint8_t *>PyBytes_AS_STRING(data), length)
        return data

    def pread_into(self, offset_bytes, buffer):
        """Fills a writable buffer from `offset_bytes`; returns its length in bytes. Raises InvalidArgument, DeviceError."""
        cdef Py_buffer view
        cdef uint64_t at = natural(offset_bytes, "offset")
        take_buffer(buffer, &view, PyBUF_WRITABLE)
        try:
            self.check_range(at, <uint64_t>view.len)
            self.fill(at, <uint8_t *>view.buf, <uint64_t>view.len)
            return view.len
        finally:
            PyBuffer_Release(&view)

    cdef int fill(self, uint64_t at, uint8_t *target, uint64_t length) except -1:
        cdef uint64_t done = 0, piece
        while done < length:
            piece = min(length - done, <uint64_t>PIECE_BYTES)
            self.check_result(self.request(REQUEST_READ, 0, at + done, piece, NULL, target + done), "reading", at + done, piece)
            done += piece
        return 0

    def pwrite(self, offset_bytes, data, *, bint fua=False):
        """Writes all of `data` at `offset_bytes`; with `fua` it is durable on return. May wait for storage to grow.

        Raises InvalidArgument (not in the disk), NoSpace, ReadOnly, DeviceError.
        """
        cdef Py_buffer view
        cdef uint64_t at = natural(offset_bytes, "offset"), done = 0, piece
        take_buffer(data, &view, PyBUF_SIMPLE)
        try:
            self.check_range(at, <uint64_t>view.len)
            while done < <uint64_t>view.len:
                piece = min(<uint64_t>view.len - done, <uint64_t>PIECE_BYTES)
                error = self.request(REQUEST_WRITE, FLAG_FUA if fua else 0, at + done, piece, <const uint8_t *> view.buf + done, NULL)
                self.check_result(error, "writing", at + done, piece)
                done += piece
            return view.len
        finally:
            PyBuffer_Release(&view)

    def flush(self):
        """What was written before, by any thread, survives a crash when this returns. Raises DeviceError."""
        self.check_result(self.request(REQUEST_FLUSH, 0, 0, 0, NULL, NULL), "flushing", 0, 0)

    def trim(self, offset_bytes, length_bytes):
        """The range is not needed any longer: it reads as its old contents or zeros. Raises InvalidArgument, ReadOnly, DeviceError."""
        self.run_range(REQUEST_TRIM, 0, "trimming", offset_bytes, length_bytes)

    def zero(self, offset_bytes, length_bytes, *, bint no_hole=False, bint fua=False):
        """The range reads as zeros. `no_hole`: and keeps its storage. Raises InvalidArgument, NoSpace, ReadOnly, DeviceError."""
        self.run_range(REQUEST_ZERO, (FLAG_NO_HOLE if no_hole else 0) | (FLAG_FUA if fua else 0), "zeroing", offset_bytes, length_bytes)

    def post(self, call):
        """Has the loop's thread call `call()` soon. After the end of the loop nothing is called."""
        self.posted.append(call)
        self.has_posted = True
        if self.wake_fd >= 0:
            fvd_disk_thread_wake(self.wake_fd)

    def call(self, function):
        """`function()` as called in the loop's thread: for what looks at the engine (info, map, check). Its errors are raised here."""
        self.check_process()
        if threading.current_thread() is self.thread:
            return function()
        future = Future()

        def run():
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        if self.dead:
            raise self.closed_error()
        self.post(run)
        # The loop may have ended between the question above and the post: it empties the posted calls after setting `dead`.
        while not future.done():
            try:
                return future.result(timeout=0.5)
            except TimeoutError:
                if self.dead and not future.done():
                    raise self.closed_error() from None
        return future.result()

    def release_base(self):
        """The disk needs its base no longer: the caller may close it. Raises RuntimeError while something is still read from it."""
        self.call(self._release_base)

    def _release_base(self):
        self.queue.release_base(0)

    def thread_ended(self, timeout_seconds=None):
        """Waits for the thread to end, as it does after `close` and after a bug of ours. Returns whether it has."""
        self.thread.join(timeout_seconds)
        return not self.thread.is_alive()

    def close(self):
        """Commits everything, writes the clean record, ends the thread and gives the volume up. Again is fine.

        Writes that wait for storage end with an error. Raises DeviceError if the disk could not be closed cleanly; it is given up then too.
        """
        cdef int32_t error = 0
        with self.close_lock:
            if not self.closing and self.thread is not None:
                error = self.request(REQUEST_CLOSE, 0, 0, 0, NULL, NULL)
                pthread_mutex_lock(&self.lock)
                self.closing = True
                self.stop = True
                pthread_mutex_unlock(&self.lock)
                fvd_disk_thread_wake(self.wake_fd)
                self.thread.join()
            self.volume.close()
        if error and error != -ESHUTDOWN:
            self.check_result(error, "closing", 0, 0)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    # --- Between callers and the loop -------------------------------------------------------------------------------------------------

    cdef int32_t request(self, uint32_t kind, uint32_t flags, uint64_t offset_bytes, uint64_t length_bytes, const uint8_t *source,
                         uint8_t *target) except? 1:
        """One request from queue to end; the caller sleeps without the GIL. Returns 0 or a negative errno.

        An interrupted caller (a signal handler has raised, or its work is to stop) leaves what only looks or flushes at once. What changes
        the disk it waits for, or a later write might be overtaken; only not for storage that is to come. A second interruption is as good
        as a kill: the request goes on without its caller. Closing goes on to its end.
        """
        cdef Call *call
        cdef int32_t error
        cdef int missed, interruptions = 0
        cdef bint refused, works = is_work()
        cdef long limit_ns = LOOK_NS if works else -1
        self.check_process()
        if threading.current_thread() is self.thread:
            raise RuntimeError("a call made in the disk's own thread would wait for itself")
        call = <Call *>calloc(1, sizeof(Call))
        if call == NULL:
            raise MemoryError
        call.kind, call.flags, call.offset_bytes, call.length_bytes = kind, flags, offset_bytes, length_bytes
        sem_init(&call.done, 0, 0)
        if source != NULL or target != NULL:
            with nogil:
                call_take_buffer(call, source)
            if call.buffer == NULL:
                call_free(call)
                raise OutOfMemory(f"{self.volume.name}: no memory for a transfer of {length_bytes} bytes")
        with nogil:
            pthread_mutex_lock(&self.lock)
            refused = self.closing or self.dead
            if not refused:
                self.enqueue(call)
            pthread_mutex_unlock(&self.lock)
            if not refused:
                fvd_disk_thread_wake(self.wake_fd)
        if refused:
            call_free(call)
            return -ESHUTDOWN
        raised = None
        while True:
            with nogil:
                missed = fvd_disk_thread_wait(&call.done, limit_ns)
            if missed == 0:
                break
            if works:
                interruptions = asked_to_stop()
            elif missed == EINTR:
                try:
                    PyErr_CheckSignals()
                except BaseException as interruption:
                    raised = raised or interruption
                    interruptions += 1
            if interruptions == 0 or kind == REQUEST_CLOSE:
                continue
            if interruptions > 1 or kind == REQUEST_READ or kind == REQUEST_FLUSH:
                with nogil:
                    self.abandon(call)
                raise raised or Interrupted()
            with nogil:
                self.stop_waiting(call)
        error = call.error
        if error == 0 and target != NULL:
            with nogil:
                memcpy(target, call.buffer, length_bytes)
        call_free(call)
        if raised is not None:
            raise raised
        if interruptions and kind != REQUEST_CLOSE:
            raise Interrupted()
        return error

    cdef void abandon(self, Call *call) noexcept nogil:
        """The caller goes away; whoever is the last to let go of the call frees it."""
        cdef bint finished
        pthread_mutex_lock(&self.lock)
        finished = call.finished
        call.abandoned = not finished
        pthread_mutex_unlock(&self.lock)
        if finished:
            call_free(call)

    cdef void stop_waiting(self, Call *call) noexcept nogil:
        """The call is to end as soon as nothing of it is under way. Again is fine."""
        pthread_mutex_lock(&self.lock)
        if not call.finished and not call.unwanted:
            call.unwanted = True
            self.unwanted += 1
        pthread_mutex_unlock(&self.lock)
        fvd_disk_thread_wake(self.wake_fd)

    cdef void enqueue(self, Call *call) noexcept nogil:
        if self.inbox_last == NULL:
            self.inbox_first = call
        else:
            self.inbox_last.next = call
        self.inbox_last = call

    cdef void finish(self, Call *call, int32_t error) noexcept nogil:
        cdef bint abandoned
        if call.newer != NULL:
            call.newer.older = call.older
        elif self.calls == call:
            self.calls = call.older
        if call.older != NULL:
            call.older.newer = call.newer
        call.error = error
        pthread_mutex_lock(&self.lock)
        abandoned = call.abandoned
        call.finished = True
        self.unwanted -= call.unwanted
        if not abandoned:
            sem_post(&call.done)
        pthread_mutex_unlock(&self.lock)
        if abandoned:
            call_free(call)

    # --- The loop, in its own thread --------------------------------------------------------------------------------------------------

    def _run(self):
        cdef Call *call
        never_wait()
        try:
            self.queue = open_queue(self.force_blocking, 256)
            base = self.volume.base
            node = self.volume.node
            self.queue.attach(0, node.fd, -1 if base is None else base.fd, None if base is None else base.remote, node.sampler_fd)
            self.volume.detach_base = self._release_base
            self.has_copying = self.volume.copying is not None
            self.queue.watch(self.wake_fd, _WAKE_KEY)
            self.queue_kind = self.queue.kind
            if self.queue.notice:
                self.volume.notices.append(self.queue.notice)
            if self.volume.allocator is not None:
                self.volume.allocator.attach(self.engine, self.post)
            if self.volume.failing is not None:
                self.volume.failing.attach(self.post)
            if self.volume.holding is not None:
                self.volume.holding.attach(self.post)
        except BaseException as error:
            self.failure = error
            self.dead = True
            self.opened.set()
            return
        self.opened.set()
        try:
            with nogil:
                self.loop()
        except BaseException as error:      # a broken invariant of ours: nothing more may reach the disk
            self.failure = error
        if self.volume.allocator is not None:
            self.volume.allocator.close()
        try:
            self.queue.close()              # waits for what the device still has: until then the buffers are its
        except BaseException as error:
            self.failure = self.failure or error
        with nogil:
            pthread_mutex_lock(&self.lock)
            self.dead = True
            call = self.inbox_first
            self.inbox_first = self.inbox_last = NULL
            pthread_mutex_unlock(&self.lock)
            while call != NULL:
                following = call.next
                call.newer = call.older = NULL
                self.finish(call, -ESHUTDOWN)
                call = following
            while self.calls != NULL:
                self.finish(self.calls, -EIO)

    cdef int loop(self) except -1 nogil:
        # A request that has ended is open no longer, but its caller has not been told before its Done is taken.
        while not (self.stop and self.queue.inflight == 0 and self.engine.open_requests == 0 and self.engine.done_count == 0):
            self.turn_once()
        return 0

    cdef int turn_once(self) except -1 nogil:
        cdef uint32_t i
        cdef bint busy = True
        self.engine.now_ns = <uint64_t>monotonic_ns()
        self.take_inbox()
        self.engine.tick(self.engine.now_ns)
        while busy:
            self.hand_over()
            if self.engine.done_count:
                for i in range(self.engine.done_count):
                    self.finish(<Call *>self.engine.done[i].cookie, self.engine.done[i].error)
                self.engine.done_count = 0
            busy = self.has_more()
        self.wait(COPYING_TICK_NS if self.has_copying else TICK_NS)
        return 0

    cdef int hand_over(self) except -1 nogil:
        """What the engine wants of Python, and of the device."""
        if self.engine.want or self.has_posted:
            self.handle_wants()
        if self.unwanted:
            self.end_unwanted()
        if self.engine.op_count:
            self.queue.start(0, self.engine.ops, self.engine.op_count)
            self.engine.op_count = 0
        return 0

    cdef bint has_more(self) noexcept nogil:
        """Whether the turn goes on: handing over has brought more to hand over."""
        return self.engine.want != 0 or self.has_posted or self.engine.op_count != 0 or self.engine.done_count != 0

    cdef int wait(self, int64_t limit_ns) except -1 nogil:
        """Until something has ended, or somebody wakes the loop: the end of a turn."""
        cdef uint32_t i
        self.queue.turn(limit_ns, 0)
        self.engine.now_ns = <uint64_t>monotonic_ns()
        for i in range(self.queue.event_count):
            if self.queue.events[i].kind == EVENT_OP:
                self.engine.complete(self.queue.events[i].key, self.queue.events[i].result)
            else:
                fvd_disk_thread_woken(self.wake_fd)
        self.queue.event_count = 0
        return 0

    cdef int end_unwanted(self) except -1 nogil:
        """Whose callers do not wait for storage or the base any longer. Looked at again in every turn: it may come to wait only now."""
        cdef Call *call = self.calls
        while call != NULL:
            if call.unwanted:
                self.engine.cancel_waiting(0xFFFFFFFFFFFFFFFFULL, <uint64_t>call, -ECANCELED)
            call = call.older
        return 0

    cdef int take_inbox(self) except -1 nogil:
        cdef Call *call
        cdef Call *following
        pthread_mutex_lock(&self.lock)
        call = self.inbox_first
        self.inbox_first = self.inbox_last = NULL
        pthread_mutex_unlock(&self.lock)
        while call != NULL:
            following = call.next
            call.newer, call.older = NULL, self.calls
            if self.calls != NULL:
                self.calls.newer = call
            self.calls = call
            self.engine.submit(call.kind, call.flags, call.offset_bytes, call.length_bytes, call.buffer, <uint64_t>call)
            call = following
        return 0

    cdef int handle_wants(self) except -1 with gil:
        """What needs Python: growth, copying, and calls from other threads."""
        cdef uint32_t wants = self.engine.want
        self.engine.want = 0        # first: what is wanted meanwhile is another wish
        if wants & Want.GROWTH and self.volume.allocator is not None:
            self.volume.allocator.on_want(self.engine)
        if wants & Want.STORAGE_BELOW and self.volume.allocator is not None:
            self.volume.allocator.on_space(self.engine)
        if wants & Want.EVENT and self.volume.failing is not None and self.volume.failing.noticed() and self.on_failure is not None:
            self.on_failure()
        if wants & (Want.STEER | Want.BASE):
            if self.volume.copying is not None:
                try:
                    self.volume.copying.on_want(wants & (Want.STEER | Want.BASE))
                except Exception:   # the disk does without
                    log.exception("%s: copying from the base could not be steered", self.volume.name)
        result = self.run_posted()
        self.has_copying = self.volume.copying is not None
        return result

    cdef int run_posted(self) except -1:
        self.has_posted = False
        while self.posted:
            self.posted.popleft()()
        return 0

    # --- Small things -----------------------------------------------------------------------------------------------------------------

    def check_process(self):
        if self.process != process():
            raise Forked(f"{self.volume.name} was opened by the process that this one was forked from, and is that one's; open it here")

    def run_range(self, kind, flags, what, offset_bytes, length_bytes):
        cdef uint64_t at = natural(offset_bytes, "offset"), left = natural(length_bytes, "length"), piece
        self.check_range(at, left)
        while left > 0:
            piece = min(left, <uint64_t>PIECE_RANGE_BYTES)
            self.check_result(self.request(kind, flags, at, piece, NULL, NULL), what, at, piece)
            at += piece
            left -= piece

    def check_range(self, uint64_t offset_bytes, uint64_t length_bytes):
        size = self.volume.geometry.virtual_size_bytes
        if offset_bytes > size or length_bytes > size - offset_bytes:
            raise InvalidArgument(f"{self.volume.name} has {size} bytes; {length_bytes} bytes at {offset_bytes} are not in it")

    def check_result(self, int32_t error, what, offset_bytes, length_bytes):
        """Raises what a negative errno means to a caller."""
        if error == 0:
            return
        where = f"{self.volume.name}: {what}{f' {length_bytes} bytes at {offset_bytes}' if length_bytes else ''} failed"
        if error == -ENOSPC:
            raise NoSpace(f"{where}: the storage is full; add storage or free some space, and try again")
        if error == -EROFS:
            raise ReadOnly(f"{where}: the disk is open read-only")
        if error == -EINVAL:
            raise InvalidArgument(f"{where}: the range is not in the disk")
        if error == -ESHUTDOWN:
            raise self.closed_error()
        if self.volume.stopped:
            raise DeviceError(f"{where}: {self.volume.stopped}")
        if self.engine.failed_errno:
            reason = os.strerror(self.engine.failed_errno)
            raise DeviceError(f"{where}: a flush or journal write failed ({reason}), so nothing is promised any more; close and open it")
        raise DeviceError(f"{where}: {os.strerror(-error)}")

    def closed_error(self):
        if self.failure is not None:
            what = f"{type(self.failure).__name__}: {quoted(self.failure)}"
            return DeviceError(f"{self.volume.name}: its thread has ended with an error: {what}")
        return DeviceError(f"{self.volume.name} has been closed; open it again")


cdef void call_take_buffer(Call *call, const uint8_t *source) noexcept nogil:
    """Memory for its transfer, with what is to be written; none: `buffer` stays NULL."""
    call.buffer = <uint8_t *>aligned(call.length_bytes)
    if source != NULL and call.buffer != NULL:
        memcpy(call.buffer, source, call.length_bytes)


cdef void call_free(Call *call) noexcept nogil:
    sem_destroy(&call.done)
    free(call.buffer)
    free(call)


def _descriptors(DiskThread driver):
    return (driver.wake_fd,)


cdef uint64_t natural(value, what) except? 0xFFFFFFFFFFFFFFFF:
    """An offset or length. Neither a bool nor a float is one: whoever passes such a thing has miscounted."""
    if type(value) is not int:
        try:
            if isinstance(value, bool):
                raise TypeError
            value = operator.index(value)
        except TypeError:
            raise InvalidArgument(f"the {what} must be a whole number of bytes, and is of type {type(value).__name__}") from None
    if value < 0:
        raise InvalidArgument(f"the {what} cannot be negative: {value}")
    if value >= 1 << 64:
        raise InvalidArgument(f"the {what} {value} is beyond the end of every disk")
    return <uint64_t>value


cdef int take_buffer(data, Py_buffer *view, int how) except -1:
    try:
        PyObject_GetBuffer(data, view, how)
    except (TypeError, BufferError, ValueError):
        need = "writable memory in one piece, such as a bytearray" if how & PyBUF_WRITABLE else "bytes, or other memory in one piece"
        raise InvalidArgument(f"data of type {type(data).__name__} is not {need}") from None
    return 0


def drive(volume, *, bint force_blocking=False, on_failure=None):
    """Starts driving an open volume in a thread of its own; the driver's `close` closes the volume too.

    `on_failure()` is called in that thread, once, when a flush or metadata write has failed. It must not wait, and must not raise.
    """
    driver = DiskThread(volume, force_blocking, on_failure)
    driver.start()
    return driver
