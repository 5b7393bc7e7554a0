# SPDX-License-Identifier: Apache-2.0
"""The compiled fields of the in-process driver. See _disk_thread.pyx."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

from fvd.device._queue cimport Queue
from fvd.engine._engine cimport Engine

cdef extern from "<semaphore.h>" nogil:
    ctypedef struct sem_t:
        pass

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <errno.h>
    #include <semaphore.h>
    #include <sys/eventfd.h>
    #include <time.h>
    #include <unistd.h>
    /* 0 or an errno; without a limit if it is negative. */
    static inline int fvd_disk_thread_wait(sem_t *semaphore, long limit_ns) {
        struct timespec until;
        if (limit_ns < 0)
            return sem_wait(semaphore) == 0 ? 0 : errno;
        clock_gettime(CLOCK_MONOTONIC, &until);
        until.tv_nsec += limit_ns;
        if (until.tv_nsec >= 1000000000) {
            until.tv_nsec -= 1000000000;
            until.tv_sec++;
        }
        return sem_clockwait(semaphore, CLOCK_MONOTONIC, &until) == 0 ? 0 : errno;
    }
    static inline void fvd_disk_thread_wake(int fd) { uint64_t one = 1; if (write(fd, &one, 8) < 0) {} }
    static inline void fvd_disk_thread_woken(int fd) { uint64_t count; if (read(fd, &count, 8) < 0) {} }
    """
    int fvd_disk_thread_wait(sem_t *semaphore, long limit_ns) noexcept nogil
    void fvd_disk_thread_wake(int fd) noexcept nogil
    void fvd_disk_thread_woken(int fd) noexcept nogil

cdef struct Call:               # one request of a caller, from the moment it is queued until both sides have let go of it
    uint64_t offset_bytes
    uint64_t length_bytes
    uint8_t *buffer             # page-aligned; the call's own: a caller that was interrupted must not pull it away from under the device
    Call *next                  # in the inbox
    Call *newer                 # among the calls that the engine has
    Call *older
    uint32_t kind
    uint32_t flags
    int32_t error
    uint8_t abandoned           # the caller is gone: whoever finishes the call frees it
    uint8_t finished
    uint8_t unwanted            # the caller has been interrupted: it must not wait for storage or its base any longer
    sem_t done

cdef class DiskThread:
    cdef readonly object volume
    cdef Engine engine
    cdef Queue queue
    cdef object __weakref__
    cdef object thread, posted, opened, failure, close_lock, on_failure
    cdef pthread_mutex_t lock   # guards inbox_*, closing, dead, unwanted, Call.abandoned, Call.finished and Call.unwanted
    cdef Call *inbox_first
    cdef Call *inbox_last
    cdef Call *calls            # those that the engine has; only the loop touches it
    cdef uint32_t unwanted      # calls that are
    cdef int wake_fd
    cdef int process            # in which it was made: a child after fork has neither its thread nor its descriptors
    cdef bint closing, dead, has_posted, stop
    cdef bint has_copying       # volume.copying was there when we last looked
    cdef readonly str queue_kind
    cdef bint force_blocking

    cdef void enqueue(self, Call *call) noexcept nogil
    cdef void finish(self, Call *call, int32_t error) noexcept nogil
    cdef void abandon(self, Call *call) noexcept nogil
    cdef void stop_waiting(self, Call *call) noexcept nogil
    cdef int end_unwanted(self) except -1 nogil
    cdef int loop(self) except -1 nogil
    cdef int turn_once(self) except -1 nogil
    cdef int hand_over(self) except -1 nogil
    cdef bint has_more(self) noexcept nogil
    cdef int wait(self, int64_t limit_ns) except -1 nogil
    cdef int take_inbox(self) except -1 nogil
    cdef int handle_wants(self) except -1 with gil
    cdef int run_posted(self) except -1
    cdef int32_t request(self, uint32_t kind, uint32_t flags, uint64_t offset_bytes, uint64_t length_bytes, const uint8_t *source,
                         uint8_t *target) except? 1
    cdef int fill(self, uint64_t at, uint8_t *target, uint64_t length) except -1
