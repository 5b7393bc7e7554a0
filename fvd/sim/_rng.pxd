# SPDX-License-Identifier: Apache-2.0
"""Numbers from a seed, for compiled callers."""

from libc.stdint cimport uint64_t

cdef class Rng:
    cdef uint64_t a, b, c, d
    cdef void seed(self, uint64_t first, uint64_t second, uint64_t third) noexcept nogil
    cdef uint64_t raw(self) noexcept nogil
    cdef uint64_t below(self, uint64_t bound) noexcept nogil            # 0 <= n < bound; bound 0: 0
    cdef uint64_t between(self, uint64_t low, uint64_t high) noexcept nogil   # low <= n <= high
    cdef bint chance(self, double share) noexcept nogil
