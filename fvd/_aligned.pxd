# SPDX-License-Identifier: Apache-2.0
"""Memory that direct I/O takes: it begins at a multiple of 4096 bytes, and `free` gives it back."""

cdef extern from *:
    """
    #ifndef FVD_ALIGNED
    #define FVD_ALIGNED
    #include <stdlib.h>
    static inline void *fvd_aligned(size_t size_bytes) {
        void *memory = NULL;
        return posix_memalign(&memory, 4096, size_bytes) ? NULL : memory;
    }
    #endif
    """
    void *aligned "fvd_aligned"(size_t size_bytes) noexcept nogil
