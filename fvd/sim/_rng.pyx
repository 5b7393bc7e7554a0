# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""Numbers from a seed: the same ones on every machine and in every version of Python, and cheap enough to be asked at every event.

xoshiro256** by Blackman and Vigna (prng.di.unimi.it), seeded through splitmix64. It may not know what the numbers are for.
"""

from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.string cimport memcpy


cdef extern from *:
    """
    #include <stdint.h>
    static inline uint64_t fvd_scale(uint64_t raw, uint64_t bound) { return (uint64_t)(((unsigned __int128)raw * bound) >> 64); }
    """
    uint64_t scale "fvd_scale"(uint64_t raw, uint64_t bound) noexcept nogil


cdef inline uint64_t rotate(uint64_t x, int k) noexcept nogil:
    return (x << k) | (x >> (64 - k))


cdef inline uint64_t splitmix(uint64_t *state) noexcept nogil:
    cdef uint64_t z
    state[0] += <uint64_t>0x9E3779B97F4A7C15
    z = state[0]
    z = (z ^ (z >> 30)) * <uint64_t>0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * <uint64_t>0x94D049BB133111EB
    return z ^ (z >> 31)


cdef class Rng:

    def __init__(self, uint64_t first, uint64_t second=0, uint64_t third=0):
        self.seed(first, second, third)

    cdef void seed(self, uint64_t first, uint64_t second, uint64_t third) noexcept nogil:
        cdef uint64_t state = first
        state = splitmix(&state) ^ second
        state = splitmix(&state) ^ third
        self.a = splitmix(&state)
        self.b = splitmix(&state)
        self.c = splitmix(&state)
        self.d = splitmix(&state)

    cdef uint64_t raw(self) noexcept nogil:
        cdef uint64_t result = rotate(self.b * 5, 7) * 9
        cdef uint64_t t = self.b << 17
        self.c ^= self.a
        self.d ^= self.b
        self.b ^= self.c
        self.a ^= self.d
        self.c ^= t
        self.d = rotate(self.d, 45)
        return result

    cdef uint64_t below(self, uint64_t bound) noexcept nogil:
        # Not rejecting leaves a bias of bound / 2**64: nothing here could ever show it.
        return scale(self.raw(), bound)

    cdef uint64_t between(self, uint64_t low, uint64_t high) noexcept nogil:
        return low + scale(self.raw(), high - low + 1)

    cdef bint chance(self, double share) noexcept nogil:
        return share > 0 and <double>(self.raw() >> 11) * (1.0 / 9007199254740992.0) < share

    def random(self):
        return <double>(self.raw() >> 11) * (1.0 / 9007199254740992.0)

    def randint(self, int64_t low, int64_t high):
        if high < low:
            raise ValueError(f"no number from {low} to {high}")
        return low + <int64_t>scale(self.raw(), <uint64_t>(high - low) + 1)

    def choice(self, items):
        if not len(items):
            raise IndexError("nothing to choose from")
        return items[self.below(len(items))]

    def randbytes(self, int count):
        cdef bytearray data = bytearray((count // 8 + 1) * 8)
        cdef uint8_t[::1] view = data
        cdef uint64_t value
        cdef int i
        for i in range(count // 8 + 1):
            value = self.raw()
            memcpy(&view[i * 8], &value, 8)
        return bytes(data[:count])
