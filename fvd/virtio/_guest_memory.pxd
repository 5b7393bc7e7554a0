# SPDX-License-Identifier: Apache-2.0
"""A guest's memory as a front end has handed it over: which addresses there are, and where they are mapped here."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef enum:
    REGIONS_MAX = 64

cdef class Shared:
    """A stranger's memory, mapped from its beginning as long as this lives: a load or store beyond its end finds zeros of ours."""
    cdef uint8_t *memory
    cdef readonly uint64_t size_bytes
    cdef uint32_t watched
    cdef void unmap(self) noexcept
    cdef bint is_torn(self) noexcept nogil

cdef struct Region:
    uint64_t guest_address      # as the guest's driver names it, in descriptors
    uint64_t user_address       # as the front end names it, for where a ring lies
    uint64_t size_bytes
    uint8_t *host               # where it is here
    uint32_t watched            # as its Shared says

cdef class GuestMemory:
    cdef Region[REGIONS_MAX] regions
    cdef readonly uint32_t count
    cdef uint32_t last                  # region that was asked for last
    cdef list mapped                    # the Shared of each region
    cdef uint8_t *log                   # migration: a bit for each page that was written to; NULL: nobody counts
    cdef uint64_t log_bytes             # that may be written
    cdef Shared log_memory
    # Where guest addresses [address, address + *length) are here; *length is cut to what lies side by side. NULL: not its memory.
    cdef uint8_t *at_guest(self, uint64_t address, uint64_t *length) noexcept nogil
    # Where the front end's addresses [address, address + length) are, in one region. NULL: not its memory.
    cdef uint8_t *at_user(self, uint64_t address, uint64_t length) noexcept nogil
    cdef void note_written(self, const uint8_t *host, uint64_t length) noexcept nogil
    cdef void note_written_at(self, uint64_t guest_address, uint64_t length) noexcept nogil
    # Whether any of it was cut short under us: what was read of it since is zeros of ours.
    cdef bint is_torn(self) noexcept nogil
