# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""The simulated base: another value in every sector, so that a wrong offset is seen, and some zeros. Computed, not stored: of any size."""

from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcpy

cdef enum:
    SECTOR_BYTES = 512


def base_content(uint64_t base_size, uint64_t offset_bytes, uint64_t length_bytes):
    data = bytearray(length_bytes)
    cdef uint8_t[::1] view = data
    if length_bytes:
        fill_from_base(&view[0], offset_bytes, length_bytes)
    del view
    return bytes(data[: max(0, <object>base_size - offset_bytes)])


cdef void fill_from_base(uint8_t *out, uint64_t offset_bytes, uint64_t length_bytes) noexcept nogil:
    cdef uint64_t at = offset_bytes, end = offset_bytes + length_bytes, value, word
    while at < end:
        value = base_stamp(at // SECTOR_BYTES)
        if at % 8 == 0 and end - at >= 8:
            memcpy(out, &value, 8)
            out += 8
            at += 8
        else:
            word = value >> (8 * (at % 8))
            out[0] = <uint8_t>word
            out += 1
            at += 1
