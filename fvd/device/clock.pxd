# SPDX-License-Identifier: Apache-2.0
"""The one clock of the compiled loops: nanoseconds that only go on. Who measures and who waits reads it here; nobody goes by wall time."""

from libc.stdint cimport int64_t

cdef extern from *:
    """
    #ifndef FVD_CLOCK
    #define FVD_CLOCK
    #include <stdint.h>
    #include <time.h>
    static inline int64_t fvd_monotonic_ns(void) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
    }
    #endif
    """
    int64_t monotonic_ns "fvd_monotonic_ns"() noexcept nogil
