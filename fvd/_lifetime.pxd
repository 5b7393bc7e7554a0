# SPDX-License-Identifier: Apache-2.0
"""What compiled modules ask of _lifetime.pyx."""

cdef extern from "<semaphore.h>" nogil:
    ctypedef struct sem_t:
        pass

cdef class Work:
    cdef object function, result, error, errand
    cdef sem_t done             # posted when it has ended, or has an errand for its caller
    cdef sem_t answered         # posted when the errand has been run
    cdef readonly int asked     # how often it has been asked to stop
    cdef int heard              # ... and how often it has heard of it
    cdef readonly bint ended
    cdef bint waited_for        # its caller waits, and runs errands

    cdef int begin(self, str name) except -1
    cdef object wait(self)
    cdef bint wait_for(self, double seconds) noexcept
    cdef object conclude(self)

# Which process this is, counted in forks: what was opened in another one is not ours.
cdef int process() noexcept nogil
# How often the work of this thread has been asked to stop; 0 where it is nobody's work.
cdef int asked_to_stop() noexcept nogil
# Whether this thread does somebody's work.
cdef bint is_work() noexcept nogil
