# SPDX-License-Identifier: Apache-2.0
"""The compiled interface of the NBD transmission phase: a header in, a validated request out; reply heads. See _nbd.pyx."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cpdef enum:
    PAYLOAD_BYTES_MAX = 32 << 20
    ALLOCATION_CONTEXT = 1      # our number for base:allocation

cdef enum:
    REQUEST_BYTES = 28
    SIMPLE_HEAD_BYTES = 16
    DATA_HEAD_BYTES = 28        # structured chunk header and offset; the data follows
    HOLE_CHUNK_BYTES = 32
    ERROR_CHUNK_BYTES = 26
    STATUS_HEAD_BYTES = 24      # structured chunk header and context; the extents follow
    STATUS_EXTENT_BYTES = 8

cpdef enum:                     # commands
    COMMAND_READ = 0
    COMMAND_WRITE = 1
    COMMAND_DISCONNECT = 2
    COMMAND_FLUSH = 3
    COMMAND_TRIM = 4
    COMMAND_CACHE = 5
    COMMAND_WRITE_ZEROES = 6
    COMMAND_BLOCK_STATUS = 7

cpdef enum:                     # command flags
    COMMAND_FLAG_FUA = 1
    COMMAND_FLAG_NO_HOLE = 2
    COMMAND_FLAG_DF = 4
    COMMAND_FLAG_REQ_ONE = 8

cpdef enum:                     # block status
    STATUS_HOLE = 1
    STATUS_ZERO = 2

cdef enum WireState:
    WIRE_HEADER = 0             # the next bytes are a request's header
    WIRE_PAYLOAD = 1            # `left` bytes of a write's data
    WIRE_SKIP = 2               # `left` bytes of the data of a write that was refused
    WIRE_CLOSED = 3             # nothing more is taken from this client

cdef enum WireEvent:
    ON_REQUEST = 0              # a header without data
    ON_WRITE = 1                # a header with data
    ON_REFUSED_WRITE = 2        # a header with data that will not be used
    ON_NO_MEMORY = 3            # the data cannot be stored after all
    ON_PAYLOAD_END = 4
    ON_DISCONNECT = 5           # the client says goodbye
    ON_GARBAGE = 6              # not a request
    ON_END = 7                  # the stream ended

cdef struct Limits:             # what one connection agreed on, over one export
    uint64_t size_bytes
    uint32_t minimum_block_bytes
    uint8_t read_only
    uint8_t structured
    uint8_t allocation          # base:allocation was selected

cdef struct Request:
    uint64_t cookie
    uint64_t offset_bytes
    uint32_t length_bytes
    uint32_t error              # NBD error with which to refuse it; 0: do it
    uint16_t command
    uint16_t flags

cdef struct Wire:
    uint32_t state              # WireState
    uint32_t left               # bytes that WIRE_PAYLOAD or WIRE_SKIP still take

cdef int wire_step(Wire *wire, uint32_t event) noexcept nogil
cdef void take_header(Wire *wire, const Limits *limits, const uint8_t *data, Request *request) noexcept nogil
cdef uint64_t request_capacity(const uint8_t *data, uint64_t status_bytes) noexcept nogil
cdef int take_data(Wire *wire, uint32_t size_bytes) noexcept nogil      # true when that was the last of it

cdef uint32_t nbd_error(int64_t result) noexcept nogil                  # 0 or a negative errno -> NBD's error
cdef void put_simple(uint8_t *out, uint64_t cookie, uint32_t error) noexcept nogil
cdef void put_data_head(uint8_t *out, uint64_t cookie, uint64_t offset_bytes, uint32_t length_bytes) noexcept nogil
cdef void put_hole(uint8_t *out, uint64_t cookie, uint64_t offset_bytes, uint32_t length_bytes) noexcept nogil
cdef void put_error(uint8_t *out, uint64_t cookie, uint32_t error) noexcept nogil
cdef void put_status_head(uint8_t *out, uint64_t cookie, uint32_t extents) noexcept nogil
cdef void put_status_extent(uint8_t *out, uint32_t length_bytes, uint32_t flags) noexcept nogil
