"""The simulated base, for compiled callers."""

from libc.stdint cimport uint8_t, uint64_t

cdef void fill_from_base(uint8_t *out, uint64_t offset_bytes, uint64_t length_bytes) noexcept nogil
