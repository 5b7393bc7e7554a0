# SPDX-License-Identifier: Apache-2.0
"""A base behind NBD: the operation queue's loop reads from it through libnbd's asynchronous calls; a connection that ends is made again.

One helper thread per remote does what blocks (names, connecting, negotiation, ending a server of our own); requests never leave the
loop's thread, and make no Python object. It knows NBD exports and commands that serve one; it may not know the engine, the format, or
what a base is for.
"""

import errno as errors
import logging
import os
import random
import shlex
import shutil
import threading

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EINVAL, EIO, ENOMEM, ENOTCONN, ESHUTDOWN, ETIMEDOUT
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy, strcmp, strncpy

from fvd.device._queue cimport WRITABLE_SHIFT, Queue
from fvd.device.clock cimport monotonic_ns
from fvd.device.libnbd cimport (
    LIBNBD_AIO_DIRECTION_READ, LIBNBD_AIO_DIRECTION_WRITE, LIBNBD_ALLOW_TRANSPORT_TCP, LIBNBD_ALLOW_TRANSPORT_UNIX,
    LIBNBD_CONTEXT_BASE_ALLOCATION, LIBNBD_SIZE_MAXIMUM, LIBNBD_SIZE_MINIMUM, LIBNBD_STATE_ZERO, LIBNBD_STRICT_ALIGN,
    nbd_add_meta_context, nbd_aio_block_status, nbd_aio_command_completed, nbd_aio_connect_systemd_socket_activation,
    nbd_aio_connect_uri, nbd_aio_disconnect, nbd_aio_get_direction, nbd_aio_get_fd, nbd_aio_is_closed, nbd_aio_is_dead,
    nbd_aio_is_processing, nbd_aio_is_ready, nbd_aio_notify_read, nbd_aio_notify_write, nbd_aio_pread, nbd_can_meta_context, nbd_close,
    nbd_completion_callback, nbd_create, nbd_extent_callback, nbd_get_block_size, nbd_get_errno, nbd_get_error, nbd_get_size,
    nbd_get_strict_mode, nbd_handle, nbd_kill_subprocess, nbd_poll, nbd_set_strict_mode, nbd_set_uri_allow_local_file,
    nbd_set_uri_allow_transports, nbd_supports_tls,
)
from fvd.device.op cimport OP_READ, DeviceOp

from fvd._lifetime import between_forks, checkpoint, keep
from fvd.counted import Counted
from fvd.errors import DeviceError, InvalidArgument, NotFound, PermissionDenied, Timeout, Unsupported, quoted

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <fcntl.h>
    #include <poll.h>
    #include <stdint.h>
    #include <sys/eventfd.h>
    #include <sys/stat.h>
    #include <unistd.h>

    static inline void fvd_remote_ring(int fd) { uint64_t one = 1; if (write(fd, &one, 8) < 0) {} }
    static inline void fvd_remote_rung(int fd) { uint64_t count; if (read(fd, &count, 8) < 0) {} }
    static inline int fvd_remote_poll(int fd, int events, int timeout_ms) {
        struct pollfd one = { .fd = fd, .events = (short)events };
        return poll(&one, 1, timeout_ms) > 0 ? one.revents : 0;
    }
    static inline int fvd_remote_same_file(int one, int other) {
        struct stat a, b;
        return fstat(one, &a) == 0 && fstat(other, &b) == 0 && a.st_dev == b.st_dev && a.st_ino == b.st_ino;
    }
    static inline int fvd_remote_duplicate(int fd) { return fcntl(fd, F_DUPFD_CLOEXEC, 0); }
    """
    void fvd_remote_ring(int fd) noexcept nogil
    void fvd_remote_rung(int fd) noexcept nogil
    int fvd_remote_poll(int fd, int events, int timeout_ms) noexcept nogil
    int fvd_remote_same_file(int one, int other) noexcept nogil
    int fvd_remote_duplicate(int fd) noexcept nogil
    int c_close "close"(int fd) noexcept nogil
    const int POLLIN, POLLOUT

cdef extern from "<pthread.h>" nogil:
    int pthread_mutex_init(pthread_mutex_t *, const void *)
    int pthread_mutex_lock(pthread_mutex_t *)
    int pthread_mutex_unlock(pthread_mutex_t *)
    int pthread_mutex_destroy(pthread_mutex_t *)

cdef enum:
    BYTES_MAX = 32 << 20        # of one read, whatever the server allows: libnbd and many servers end the connection over more
    MINIMUM_BYTES = 512             # of a server that does not say what requests must be aligned to, as libnbd advises
    STATUS_BYTES = 1 << 30          # of one block status request: servers need not take 4 GiB
    REPLIES_PER_TURN = 256          # then the loop's other work has its turn, however much the server sends
    SLICE_MS = 100                  # while connecting: so often it looks whether it is still wanted
    WATCH_LINE = 1                  # keys of the queue's watches
    WATCH_WAKE = 2

cdef int SIGKILL = 9
_FIRST_DELAY_SECONDS = 0.1
_DELAY_SECONDS_MAX = 5.0
log = logging.getLogger(__name__)
_spawning = threading.Lock()    # one server's descriptor is for no other one, which may run as another user


include "remote_line.pxi"


def _descriptors(Remote remote):
    """For a child after fork: nothing of libnbd is called, whose locks a thread that is gone may hold."""
    cdef Line *line
    cdef (Line *)[3] lines
    cdef int i
    lines[0], lines[1], lines[2] = remote.line, remote.fresh, remote.dying
    fds = [remote.loop_fd, remote.helper_fd]
    for i in range(3):
        line = lines[i]
        while line != NULL:
            # libnbd closes its socket whenever it likes: the number counts as long as it is the same socket as ours.
            if line.fd >= 0:
                if fvd_remote_same_file(line.fd, line.socket_fd):
                    fds.append(line.socket_fd)
                fds.append(line.fd)
            line = line.next
    return fds


cdef class Remote(Source):
    """A read-only NBD export: at a URI, or of a server that is started for it and ends with the connection.

    open() first; then pread() and zero_extents() until it is attached to a queue; then the queue's operations. Ended by close().
    """

    def __cinit__(self):
        pthread_mutex_init(&self.lock, NULL)
        self.loop_fd = self.helper_fd = -1

    def __init__(self, *, uri=None, command=None, timeout_seconds=30.0, name="", inherited=-1, prepare=None):
        """`timeout_seconds` bounds open(), pread() and each step of zero_extents(); a connection on which an operation waits a third of it
        without an answer is given up. `name`: whose base it is, for messages. `inherited`: a descriptor above 3 that the server gets, under
        the same number; it stays the caller's. `prepare`: called before each start of the server, in a thread of its own: it returns the
        command, or raises the FvdError for which it must not be started. Raises InvalidArgument."""
        if (uri is None) == (command is None):
            raise InvalidArgument("a remote base is named by a URI or by the command of its server: give one of both")
        if command is not None and not (command and all(isinstance(word, str) and "\0" not in word for word in command)):
            raise InvalidArgument(f"{quoted(command)} is no command: give a program and its arguments")
        if uri is not None and "\0" in uri:
            raise InvalidArgument(f"{quoted(uri)} is no URI")
        if not 0 < timeout_seconds <= 1e6:
            raise InvalidArgument(f"timeout_seconds={timeout_seconds}: choose more than 0 seconds")
        self.uri = uri
        self.command = None if command is None else list(command)
        self.inherited = inherited
        self.prepare = prepare
        self.timeout_seconds = timeout_seconds
        self.limit_ns = <int64_t>(self.timeout_seconds * 1e9 / 3)
        self.name = name
        self.trouble = ""
        self.notes = Counted(log)       # whoever serves the base decides how often it goes and comes
        self.random = random.Random()

    def __dealloc__(self):
        if self.loop_fd >= 0:
            c_close(self.loop_fd)
        if self.helper_fd >= 0:
            c_close(self.helper_fd)
        free(self.extents.entries)
        pthread_mutex_destroy(&self.lock)

    # --- For Python, from any thread ----------------------------------------------------------------------------

    def open(self):
        """Connects, once; waits at most timeout_seconds. Raises NotFound (host, socket, export, program), PermissionDenied, InvalidArgument
        (the URI), Unsupported (TLS), Timeout, DeviceError; then nothing is left of it."""
        if self.was_open or self.closed:
            raise RuntimeError("a remote base is opened once")
        self.was_open = True
        with between_forks:
            self.loop_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self.helper_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            keep(self, _descriptors)
        self.opened = threading.Event()
        self.wanted = True
        # A daemon: a name server that does not answer must not keep the process. It starts the server's process, which asks the kernel to
        # be killed when the thread that started it ends: so it is this thread that does it, for it lives as long as the remote.
        self.helper = threading.Thread(target=self._help, name=f"fvd base {self.name}".rstrip(), daemon=True)
        self.helper.start()
        try:
            self._wait_until_opened()
            if self.failure is not None:
                raise self.failure
        except BaseException:
            self.failure = None
            self.close()
            raise

    def _wait_until_opened(self):
        cdef int64_t until_ns = monotonic_ns() + <int64_t>((self.timeout_seconds + 0.5) * 1e9)
        while not self.opened.wait(min(SLICE_MS / 1000, self.timeout_seconds + 0.5)):
            checkpoint()
            if monotonic_ns() > until_ns:
                raise self._timeout()

    @property
    def connected(self):
        """Whether there is a connection, as far as one knows."""
        return self.line != NULL or self.fresh != NULL

    @property
    def where(self):
        """What it reads from, for messages."""
        return self.uri if self.uri is not None else shlex.join(self.command)

    def pread(self, offset_bytes, length_bytes):
        """`length_bytes` from `offset_bytes`; waits. Only before it is attached. Raises InvalidArgument (not in the export), Timeout,
        DeviceError."""
        cdef Line *line = self.unattached()
        if offset_bytes < 0 or length_bytes < 0 or offset_bytes + length_bytes > line.size_bytes:
            raise InvalidArgument(f"{self._whose()}{line.size_bytes} bytes long: {length_bytes} bytes at {offset_bytes} are not in it")
        cdef uint64_t start = offset_bytes // line.minimum_bytes * line.minimum_bytes
        cdef uint64_t end = min(align_up(offset_bytes + length_bytes, line.minimum_bytes), line.size_bytes)
        cdef uint64_t at = start, count
        cdef int64_t cookie, until_ns = monotonic_ns() + 3 * self.limit_ns
        cdef nbd_completion_callback nobody
        nobody.callback, nobody.user_data, nobody.free = NULL, NULL, NULL
        data = PyBytes_FromStringAndSize(NULL, end - start)
        cdef char *buffer = PyBytes_AS_STRING(data)
        while at < end:
            count = min(end - at, line.maximum_bytes)
            cookie = nbd_aio_pread(line.handle, buffer + (at - start), count, at, nobody, 0)
            if cookie < 0:
                raise self._failed(f"reading {count} bytes at {at}")
            self.wait(line, cookie, until_ns)
            at += count
        return data[offset_bytes - start : offset_bytes - start + length_bytes]

    def zero_extents(self):
        """(offset_bytes, length_bytes) of what reads as zeros by the server's word, in order; nothing if it does not tell. Waits; only
        before it is attached. Raises Timeout, DeviceError."""
        cdef uint64_t at = 0
        start = end = 0
        while at < self.size_bytes:
            extents = self._status(at)
            if not extents:
                break
            for length, zero in extents:
                length = min(length, self.size_bytes - at)
                if zero and end == at and end > start:
                    end += length
                elif zero:
                    if end > start:
                        yield start, end - start
                    start, end = at, at + length
                at += length
        if end > start:
            yield start, end - start

    def close(self):
        """Ends the connection and the server that was started for it. Again is fine. If it is still attached, its operations fail from now
        on, those in flight too."""
        self.closed = True
        if self.helper is None:
            return
        pthread_mutex_lock(&self.lock)
        self.stop = True
        self.wanted = False
        pthread_mutex_unlock(&self.lock)
        if self.queue is not None and self.owner == threading.get_ident() and self.line != NULL:
            self.give_up(ENOTCONN, b"", False)
        fvd_remote_ring(self.loop_fd)
        fvd_remote_ring(self.helper_fd)
        if self.helper is not threading.current_thread():
            # Longer than that it waits for a name server, and ends afterwards.
            self.helper.join(5 if self.command is not None and self.opened.is_set() else 0.5)
        self.trouble = "it was closed"

    # --- The queue's side: in the loop's thread -----------------------------------------------------------------

    cdef int attach(self, Queue queue, uint32_t disk) except -1:
        if self.queue is not None:
            raise RuntimeError("a remote base belongs to one disk of one queue")
        if not self.was_open or self.closed:
            raise RuntimeError("a remote base is attached between open() and close()")
        self.wake_watch = queue.watch_for(self, self.loop_fd, WATCH_WAKE)
        self.queue = queue
        self.disk = disk
        self.owner = threading.get_ident()
        pthread_mutex_lock(&self.lock)
        self.wanted = self.fresh == NULL and not self.stop
        pthread_mutex_unlock(&self.lock)
        fvd_remote_ring(self.helper_fd)
        self.take_fresh()
        return 0

    cdef int detach(self) except -1:
        cdef Line *line
        if self.line != NULL:
            self.give_up(ENOTCONN, b"", False)
        pthread_mutex_lock(&self.lock)
        self.wanted = False
        line, self.fresh = self.fresh, NULL
        if line != NULL:
            line.next, self.dying = self.dying, line
        pthread_mutex_unlock(&self.lock)
        fvd_remote_ring(self.helper_fd)
        self.queue.unwatch(self.wake_watch)
        self.queue = None
        return 0

    cdef int start(self, const DeviceOp *op) except -1 nogil:
        cdef int error = 0
        if self.line == NULL:
            error = ENOTCONN
        elif op.kind != OP_READ:
            error = EINVAL
        elif op.offset_bytes > self.size_bytes or op.length_bytes > self.size_bytes - op.offset_bytes:
            error = EIO             # as at the end of a file
        if error or op.length_bytes == 0:
            return self.queue.source_ended(self.disk, op.token, -error)
        self.submit(self.line, op.token, op.offset_bytes, op.length_bytes, op.buffer)
        return self.settle()

    cdef int submit(self, Line *line, uint64_t token, uint64_t offset_bytes, uint64_t length_bytes, uint8_t *buffer) except -1 nogil:
        """Issue the reads of one operation: none above the server's maximum, all aligned to its minimum."""
        cdef Operation *operation = new_operation(line)
        cdef Piece *piece
        cdef nbd_completion_callback ended
        cdef uint64_t at = offset_bytes, end = offset_bytes + length_bytes, stop, first, last
        cdef uint8_t *into
        if operation == NULL:
            return self.queue.source_ended(self.disk, token, -ENOMEM)
        operation.token = token
        operation.begun_ns = monotonic_ns()
        operation.pieces = 1
        operation.error = 0
        operation.newer, operation.older = NULL, line.newest
        if line.newest == NULL:
            line.oldest = operation
        else:
            line.newest.newer = operation
        line.newest = operation
        while at < end and operation.error == 0:
            first = at & ~(line.minimum_bytes - 1)
            stop = min(end, first + line.maximum_bytes)
            last = min(align_up(stop, line.minimum_bytes), line.size_bytes)     # an end that is no whole block is to be had no other way
            piece = new_piece(line)
            into = buffer + (at - offset_bytes)
            if piece != NULL and (first < at or stop < last):
                piece.bounce = <uint8_t *>malloc(last - first)
                piece.target, piece.skip, piece.length_bytes = into, at - first, stop - at
                into = piece.bounce
                if into == NULL:
                    release_piece(line, piece)
                    piece = NULL
            if piece == NULL:
                operation.error = ENOMEM
                break
            piece.operation = operation
            operation.pieces += 1
            ended.callback, ended.user_data, ended.free = piece_ended, piece, NULL
            if nbd_aio_pread(line.handle, into, last - first, first, ended, 0) < 0:     # refused by libnbd: then nobody calls back
                operation.error = nbd_get_errno() or EIO
                release_piece(line, piece)
                operation.pieces -= 1
            at = stop
        piece_counted(operation)
        return 0

    cdef int settle(self) except -1 nogil:
        """After calls of libnbd: report what has ended, and see how the connection is."""
        cdef Line *line = self.line
        cdef Operation *operation
        while line.ended != NULL:
            operation = line.ended
            line.ended = operation.next
            if operation.error == 0:
                line.answered += 1
                line.answered_begun_ns = max(line.answered_begun_ns, operation.begun_ns)
            unlist(line, operation)
            # ESHUTDOWN is the server's goodbye: for the loops it means their own end.
            self.queue.source_ended(self.disk, operation.token, -ENOTCONN if operation.error == ESHUTDOWN else -operation.error)
        if nbd_aio_is_dead(line.handle) or nbd_aio_is_closed(line.handle):
            return self.give_up(ENOTCONN, b"the server ended it", True)
        if nbd_aio_get_direction(line.handle) & LIBNBD_AIO_DIRECTION_WRITE and not line.write_wanted:
            line.write_wanted = 1
            self.queue.want_write(line.watch)
        return 0

    cdef int pump(self) except -1 nogil:
        """Move libnbd along until the socket would block: the watch rings once for all that has come."""
        cdef Line *line = self.line
        cdef unsigned direction
        cdef int events, ready, result, _i
        for _i in range(REPLIES_PER_TURN):
            direction = nbd_aio_get_direction(line.handle)
            events = POLLIN if direction & LIBNBD_AIO_DIRECTION_READ else 0
            if direction & LIBNBD_AIO_DIRECTION_WRITE:
                events |= POLLOUT
            if events == 0:
                break               # dead
            ready = fvd_remote_poll(line.fd, events, 0)
            if ready == 0:
                break
            if direction & LIBNBD_AIO_DIRECTION_READ and ready & ~POLLOUT:
                line.heard_ns = monotonic_ns()
                result = nbd_aio_notify_read(line.handle)
            elif direction & LIBNBD_AIO_DIRECTION_WRITE:
                result = nbd_aio_notify_write(line.handle)
            else:
                break
            if result < 0:
                say_why(line, nbd_get_error())
                break
        else:
            self.noted |= WATCH_LINE
            self.queue.source_ready = True
        self.settle()
        if self.line == line and line.reason[0]:    # an error that libnbd survives is one that we cannot go on from
            return self.give_up(ENOTCONN, line.reason, True)
        return 0

    cdef int turn(self, int64_t now_ns) except -1 nogil:
        cdef uint32_t noted = self.noted
        self.noted = 0
        if noted & WATCH_WAKE:
            fvd_remote_rung(self.loop_fd)
            self.take_fresh()
        if self.line == NULL:
            return 0
        if self.stop:
            return self.give_up(ENOTCONN, b"", False)
        if noted & WATCH_LINE << WRITABLE_SHIFT:
            self.line.write_wanted = 0
        if noted & (WATCH_LINE | WATCH_LINE << WRITABLE_SHIFT):
            self.pump()
        if self.line != NULL and self.is_overdue(now_ns):
            self.pump()             # we may have been away ourselves
        if self.line != NULL and self.is_overdue(now_ns):
            return self.give_up(ETIMEDOUT, b"the server does not answer", True)
        return 0

    cdef bint is_overdue(self, int64_t now_ns) noexcept nogil:
        """Whether the server is silent, or has passed over the oldest operation. A slow line with much under way is neither: all that is
        ahead of an operation has to come through first."""
        cdef Line *line = self.line
        if line.oldest == NULL:
            return False
        cdef int64_t waited_ns = now_ns - line.oldest.begun_ns
        if waited_ns <= self.limit_ns:
            return False
        return (now_ns - line.heard_ns > self.limit_ns or line.answered_begun_ns > line.oldest.begun_ns + self.limit_ns // 2
                or waited_ns > 3 * self.limit_ns)

    cdef int give_up(self, int error, const char *reason, bint again) except -1 nogil:
        """End the connection for the loop: all its operations end with the error.

        libnbd has no thread: it touches their buffers in calls of notify only, of which there are none any more. The helper closes the
        handle: that may have to wait for a process."""
        cdef Line *line = self.line
        cdef Operation *operation
        self.line = NULL
        self.noted &= WATCH_WAKE
        self.queue.unwatch(line.watch)
        c_close(line.fd)
        line.fd = -1
        line.idle = line.oldest == NULL
        line.given_up = 1
        if line.reason[0] == 0:
            say_why(line, reason)
        while line.oldest != NULL:
            operation = line.oldest
            unlist(line, operation)
            self.queue.source_ended(self.disk, operation.token, -error)
        pthread_mutex_lock(&self.lock)
        line.next, self.dying = self.dying, line
        self.wanted = again and not self.stop
        pthread_mutex_unlock(&self.lock)
        fvd_remote_ring(self.helper_fd)
        return 0

    cdef int take_fresh(self) except -1 nogil:
        cdef Line *line
        pthread_mutex_lock(&self.lock)
        line = NULL if self.stop else self.fresh
        if line != NULL:
            self.fresh = NULL
        pthread_mutex_unlock(&self.lock)
        if line == NULL:
            return 0
        with gil:
            line.watch = self.queue.watch_for(self, line.fd, WATCH_LINE)
        self.line = line
        line.heard_ns = monotonic_ns()
        return self.pump()          # what came before it was watched

    # --- The helper's thread ------------------------------------------------------------------------------------

    def _help(self):
        cdef Line *line
        failures = 0
        while True:
            if self.opened.is_set() and not self.wanted and not self.stop and self.dying == NULL:
                self.rest(-1)
            failures = 0 if self.bury() else failures
            if self.stop:
                break
            if not self.wanted:
                continue
            # Within the time that a request waits, a server that is back is to be found.
            delay_s = min(_DELAY_SECONDS_MAX, self.timeout_seconds / 6, self.random.uniform(1, 2) * _FIRST_DELAY_SECONDS * 2**failures)
            if self.opened.is_set() and not self.rest(delay_s):
                continue            # rung: look again at what is wanted
            try:
                line = self.connect()
            except Exception as error:
                if not self.opened.is_set():
                    self.failure = error
                    break
                failures = min(failures + 1, 10)
                if str(error) != self.trouble and not self.stop:
                    self.trouble = str(error)
                    self.notes.warning("tried", f"{error}; it is tried again")
                continue
            failures = min(failures + 1, 10)    # until it has answered something
            if self.opened.is_set():
                self.notes.info("connected", f"{self._whose()}connected again")
            else:
                self.size_bytes = line.size_bytes
            self.trouble = ""
            pthread_mutex_lock(&self.lock)
            if self.wanted:
                self.fresh = line
            else:
                line.next, self.dying = self.dying, line
            self.wanted = False
            pthread_mutex_unlock(&self.lock)
            self.opened.set()
            fvd_remote_ring(self.loop_fd)
        # The loop gives its connection up when it is told. One that does not turn any more keeps it; our server ends all the same.
        tries_left = 40
        while self.line != NULL and tries_left:
            self.rest(0.1)
            tries_left -= 1
        line = self.line
        if line != NULL:
            nbd_kill_subprocess(line.handle, SIGKILL)   # nobody else closes a handle
        pthread_mutex_lock(&self.lock)
        line, self.fresh = self.fresh, NULL
        if line != NULL:
            line.next, self.dying = self.dying, line
        pthread_mutex_unlock(&self.lock)
        self.bury()
        self.opened.set()

    cdef bint rest(self, double seconds) except -1:
        """Sleep until rung, or so long (negative: for ever). Whether the time passed."""
        cdef int timeout_ms = -1 if seconds < 0 else <int>(seconds * 1000)
        cdef int ready
        with nogil:
            ready = fvd_remote_poll(self.helper_fd, POLLIN, timeout_ms)
            fvd_remote_rung(self.helper_fd)
        return ready == 0

    cdef int bury(self) except -1:
        """End the connections that the loop has given up. Whether one of them had been of use."""
        cdef Line *line
        cdef Line *next
        cdef bint useful = False
        pthread_mutex_lock(&self.lock)
        line, self.dying = self.dying, NULL
        pthread_mutex_unlock(&self.lock)
        while line != NULL:
            next = line.next
            if line.reason[0] and not self.stop:
                reason = (<bytes>line.reason).decode(errors="replace")
                self.trouble = reason
                self.notes.warning("lost", f"{self._whose()}lost its connection: {reason}; it is made again")
            useful = useful or line.answered != 0
            with nogil:
                if line.fd >= 0:
                    c_close(line.fd)
                if line.idle or not line.given_up:
                    nbd_aio_disconnect(line.handle, 0)
                nbd_kill_subprocess(line.handle, SIGKILL)     # nbd_close waits for the process, which may be stopped
                nbd_close(line.handle)
                free_line(line)
            line = next
        return useful

    cdef Line *connect(self) except NULL:
        """A connection that is ready, or an error that says what is wrong."""
        cdef Line *line = <Line *>calloc(1, sizeof(Line))
        if line == NULL:
            raise MemoryError
        line.fd = -1
        line.handle = nbd_create()
        if line.handle == NULL:
            free(line)
            raise MemoryError
        try:
            self._negotiate(<uint64_t>line)
        except BaseException:
            with nogil:
                if line.fd >= 0:
                    c_close(line.fd)
                nbd_kill_subprocess(line.handle, SIGKILL)
                nbd_close(line.handle)
                free_line(line)
            raise
        return line

    def _negotiate(self, uint64_t address):
        cdef Line *line = <Line *>address
        cdef nbd_handle *handle = line.handle
        cdef int64_t until_ns = monotonic_ns() + 3 * self.limit_ns, size, minimum, maximum
        cdef int result = 0
        cdef bytes uri
        cdef const char *text
        cdef char **argv
        nbd_add_meta_context(handle, LIBNBD_CONTEXT_BASE_ALLOCATION)
        nbd_set_strict_mode(handle, nbd_get_strict_mode(handle) & ~LIBNBD_STRICT_ALIGN)     # see the end of an export in submit()
        if self.uri is not None:
            if self.uri.startswith("nbds") and not nbd_supports_tls(handle):
                raise Unsupported(f"{self._whose()}not to be had: this machine's libnbd has no TLS")
            nbd_set_uri_allow_transports(handle, LIBNBD_ALLOW_TRANSPORT_TCP | LIBNBD_ALLOW_TRANSPORT_UNIX)
            nbd_set_uri_allow_local_file(handle, True)      # tls-psk-file=, tls-certificates=
            uri = os.fsencode(self.uri)
            text = uri
            with nogil:
                result = nbd_aio_connect_uri(handle, text)
        else:
            if self.prepare is not None:
                self.command = list(self.prepare())
            words = [os.fsencode(word) for word in self._full_command()]
            argv = <char **>calloc(len(words) + 1, sizeof(char *))
            if argv == NULL:
                raise MemoryError
            for i in range(len(words)):
                argv[i] = PyBytes_AS_STRING(words[i])
            with _spawning:
                try:
                    if self.inherited >= 0:
                        os.set_inheritable(self.inherited, True)
                    with nogil:
                        result = nbd_aio_connect_systemd_socket_activation(handle, argv)
                finally:
                    free(argv)
                    if self.inherited >= 0:
                        os.set_inheritable(self.inherited, False)
        while result >= 0 and not nbd_aio_is_ready(handle):
            if nbd_aio_is_dead(handle) or nbd_aio_is_closed(handle):
                raise self._refused(0, "the server ended the connection")
            if self.stop:
                raise DeviceError(f"{self._whose()}closed")
            if monotonic_ns() > until_ns:
                raise self._timeout()
            with nogil:
                result = nbd_poll(handle, SLICE_MS)
        if result < 0:
            raise self._refused(nbd_get_errno(), (<bytes>nbd_get_error()).decode(errors="replace"))
        size = nbd_get_size(handle)
        minimum = nbd_get_block_size(handle, LIBNBD_SIZE_MINIMUM) or MINIMUM_BYTES
        maximum = nbd_get_block_size(handle, LIBNBD_SIZE_MAXIMUM) or BYTES_MAX
        if size < 0 or minimum < 1 or minimum > 65536 or minimum & (minimum - 1) or maximum < minimum:
            raise DeviceError(f"{self._whose()}not understood: size {size}, blocks of {minimum} to {maximum} bytes")
        if self.opened.is_set() and <uint64_t>size != self.size_bytes:
            raise DeviceError(f"{self._whose()}{size} bytes long now and was {self.size_bytes}: it is another one; put the right one back")
        line.size_bytes = size
        line.minimum_bytes = minimum
        line.maximum_bytes = min(maximum, <int64_t>BYTES_MAX) // minimum * minimum
        line.tells_zeros = nbd_can_meta_context(handle, LIBNBD_CONTEXT_BASE_ALLOCATION) == 1
        line.socket_fd = nbd_aio_get_fd(handle)
        line.fd = fvd_remote_duplicate(line.socket_fd)
        if line.fd < 0:
            raise DeviceError(f"{self._whose()}not usable: out of file descriptors")

    def _full_command(self):
        """The server's command, in front of it two that make way for it: a session of its own, so that Ctrl-C is ours alone, and its end
        with the end of our thread, however that comes."""
        program = shutil.which(self.command[0])
        if program is None:
            raise NotFound(f"{self._whose()}served by {self.command[0]}, which is not installed here: install it")
        around = []
        if shutil.which("setsid") is not None:
            around += ["setsid"]
        if shutil.which("setpriv") is not None:
            around += ["setpriv", "--pdeathsig", "KILL"]
        return [*around, program, *self.command[1:]]

    # --- Errors, and calls that wait ----------------------------------------------------------------------------

    def _whose(self):
        return f"{f'{self.name}: ' if self.name else ''}the base {self.where} is "

    def _timeout(self):
        return Timeout(f"{self._whose()}not to be reached: no answer within {self.timeout_seconds:g} s; see whether its server runs")

    def _refused(self, error, text):
        """What a failed connect means."""
        reason = text.split(": ", 1)[1] if text.startswith("nbd_") and ": " in text else text
        what = f"{self._whose()}not to be had: {reason}"
        if self.command is not None:
            return DeviceError(f"{what}; what its server said is on the standard error")
        if error == errors.ECONNREFUSED:
            return DeviceError(f"{what}; nothing listens there: start its server")
        if error in (errors.EACCES, errors.EPERM):
            return PermissionDenied(what)
        if error in (errors.ETIMEDOUT, errors.EHOSTUNREACH, errors.ENETUNREACH):
            return Timeout(f"{what}; see whether its server is reachable")
        if error == errors.ENOENT or "getaddrinfo" in text:
            return NotFound(f"{what}; see whether the name is right and its server runs")
        if error in (errors.EINVAL, errors.ENOTSUP):
            return InvalidArgument(what)
        return DeviceError(what)

    cdef Line *unattached(self) except NULL:
        if self.queue is not None:
            raise RuntimeError("a queue reads from this base: it cannot be asked directly")
        if self.fresh == NULL:
            raise DeviceError(f"{self._whose()}not connected")
        return self.fresh

    def _failed(self, what):
        """The answer to a call of ours was an error. A connection that ended is put away."""
        error, text = nbd_get_errno(), (<bytes>nbd_get_error()).decode(errors="replace")
        cdef Line *line = self.fresh
        if line != NULL and not (nbd_aio_is_ready(line.handle) or nbd_aio_is_processing(line.handle)):
            self.put_away()
        return DeviceError(f"{self._whose()}failing: {what}: {os.strerror(error) if error else text}")

    cdef int put_away(self) except -1:
        """Give up the connection before any queue has it. The buffers of its commands are not touched afterwards: see give_up."""
        cdef Line *line
        pthread_mutex_lock(&self.lock)
        line, self.fresh = self.fresh, NULL
        if line != NULL:
            line.given_up = 1
            line.next, self.dying = self.dying, line
        pthread_mutex_unlock(&self.lock)
        fvd_remote_ring(self.helper_fd)
        return 0

    cdef int wait(self, Line *line, int64_t cookie, int64_t until_ns) except -1:
        cdef int done = 0, result
        while True:
            done = nbd_aio_command_completed(line.handle, cookie)
            if done > 0:
                return 0
            if done < 0:
                raise self._failed("a request")
            if monotonic_ns() > until_ns:
                self.put_away()
                raise self._timeout()
            with nogil:
                result = nbd_poll(line.handle, SLICE_MS)
            if result < 0:
                raise self._failed("a request")

    def _status(self, uint64_t offset_bytes):
        """[(length_bytes, whether it is zeros)] from there on; empty: the server does not tell."""
        cdef Line *line = self.unattached()
        cdef nbd_extent_callback extents
        cdef nbd_completion_callback nobody
        cdef int64_t cookie
        cdef uint64_t count = min(line.size_bytes - offset_bytes, <uint64_t>STATUS_BYTES)
        if not line.tells_zeros:
            return []
        nobody.callback, nobody.user_data, nobody.free = NULL, NULL, NULL
        extents.callback, extents.user_data, extents.free = note_extents, &self.extents, NULL
        self.extents.count = 0
        cookie = nbd_aio_block_status(line.handle, count, offset_bytes, extents, nobody, 0)
        if cookie < 0:
            raise self._failed("asking for holes")
        try:
            self.wait(line, cookie, monotonic_ns() + 3 * self.limit_ns)
        except DeviceError as error:
            if self.fresh == NULL:
                raise
            self.notes.warning("holes", f"{error}; its holes are copied as data")
            return []
        if self.extents.no_memory:
            raise MemoryError
        runs = [
            (self.extents.entries[i], (self.extents.entries[i + 1] & LIBNBD_STATE_ZERO) != 0) for i in range(0, self.extents.count - 1, 2)
        ]
        return [run for run in runs if run[0]]
