# SPDX-License-Identifier: Apache-2.0
"""The simulated base, for compiled callers."""

from libc.stdint cimport uint8_t, uint64_t

cdef inline uint64_t base_stamp(uint64_t sector) noexcept nogil:
    """What the base holds in every word of a sector: another value in each, and zeros here and there, in regions of 64 KiB and of 16 KiB.
    Writes of the guest stay below it: see unstamp in _oracle.pyx."""
    if (sector >> 7) % 6 == 1 or ((sector >> 5) * 0x9E3779B97F4A7C15ULL) >> 61 == 3:
        return 0
    return (<uint64_t>0xBA5E << 44) + sector + 1

cdef void fill_from_base(uint8_t *out, uint64_t offset_bytes, uint64_t length_bytes) noexcept nogil
