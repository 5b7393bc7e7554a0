# SPDX-License-Identifier: Apache-2.0
"""NBD's transmission phase without I/O: request headers in, validated requests out, reply heads out; all of it in C speed.

The one place that judges a request, and the one table of what may follow what. The handshake is handshake.py. May not know sockets,
engines, or what a request does. Protocol: github.com/NetworkBlockDevice/nbd doc/proto.md.
"""

from libc.errno cimport (EACCES, EDQUOT, EFBIG, EINVAL, ENOMEM, ENOSPC, EOPNOTSUPP, EOVERFLOW, EPERM, EROFS, ESHUTDOWN)
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from typing import NamedTuple

from fvd.errors import InvalidArgument

cdef extern from *:
    """
    #include <endian.h>
    """
    uint16_t htobe16(uint16_t value) noexcept nogil
    uint32_t htobe32(uint32_t value) noexcept nogil
    uint64_t htobe64(uint64_t value) noexcept nogil
    uint16_t be16toh(uint16_t value) noexcept nogil
    uint32_t be32toh(uint32_t value) noexcept nogil
    uint64_t be64toh(uint64_t value) noexcept nogil

cdef enum:
    REQUEST_MAGIC = 0x25609513
    SIMPLE_REPLY_MAGIC = 0x67446698
    STRUCTURED_REPLY_MAGIC = 0x668E33EF
    CHUNK_DONE = 1
    CHUNK_OFFSET_DATA = 1
    CHUNK_OFFSET_HOLE = 2
    CHUNK_BLOCK_STATUS = 5
    CHUNK_ERROR = 0x8001

cdef enum:
    NBD_EPERM = 1
    NBD_EIO = 5
    NBD_ENOMEM = 12
    NBD_EINVAL = 22
    NBD_ENOSPC = 28
    NBD_EOVERFLOW = 75
    NBD_ENOTSUP = 95
    NBD_ESHUTDOWN = 108

cdef enum:
    STATES = 4
    EVENTS = 8

# What may follow what. Anything absent closes the connection.
TRANSITIONS = {
    (WIRE_HEADER, ON_REQUEST): WIRE_HEADER,
    (WIRE_HEADER, ON_WRITE): WIRE_PAYLOAD,
    (WIRE_HEADER, ON_REFUSED_WRITE): WIRE_SKIP,
    (WIRE_PAYLOAD, ON_PAYLOAD_END): WIRE_HEADER,
    (WIRE_PAYLOAD, ON_NO_MEMORY): WIRE_SKIP,
    (WIRE_SKIP, ON_PAYLOAD_END): WIRE_HEADER,
}

cdef uint8_t[STATES][EVENTS] table
for _state in range(STATES):
    for _event in range(EVENTS):
        table[_state][_event] = TRANSITIONS.get((_state, _event), WIRE_CLOSED)

# Flags that a command may carry. FUA must be accepted on all of them; FAST_ZERO is not offered.
cdef uint16_t[8] allowed_flags
for _command in range(8):
    allowed_flags[_command] = COMMAND_FLAG_FUA | {
        COMMAND_READ: COMMAND_FLAG_DF,
        COMMAND_WRITE_ZEROES: COMMAND_FLAG_NO_HOLE,
        COMMAND_BLOCK_STATUS: COMMAND_FLAG_REQ_ONE,
    }.get(_command, 0)


cdef int wire_step(Wire *wire, uint32_t event) noexcept nogil:
    wire.state = table[wire.state][event]
    return 0


cdef uint32_t judge(const Limits *limits, const Request *request) noexcept nogil:
    """The NBD error with which a request is refused, or 0. Nothing behind this checks a request again."""
    cdef uint64_t offset = request.offset_bytes, length = request.length_bytes
    cdef uint32_t command = request.command
    cdef bint changes = command == COMMAND_WRITE or command == COMMAND_TRIM or command == COMMAND_WRITE_ZEROES
    if command > COMMAND_BLOCK_STATUS or request.flags & ~allowed_flags[command]:
        return NBD_EINVAL
    if request.flags & COMMAND_FLAG_DF and not limits.structured:
        return NBD_EINVAL
    if command == COMMAND_FLUSH:
        return NBD_EINVAL if offset or length else 0
    if changes and limits.read_only:
        return NBD_EPERM
    if command == COMMAND_BLOCK_STATUS and not limits.allocation:
        return NBD_EINVAL
    if length == 0 or (offset | length) & (limits.minimum_block_bytes - 1):
        return NBD_EINVAL
    if length > limits.size_bytes or offset > limits.size_bytes - length:
        return NBD_ENOSPC if command == COMMAND_WRITE or command == COMMAND_WRITE_ZEROES else NBD_EINVAL
    if length > PAYLOAD_BYTES_MAX and (command == COMMAND_READ or command == COMMAND_WRITE):
        return NBD_EINVAL
    return 0


cdef void take_header(Wire *wire, const Limits *limits, const uint8_t *data, Request *request) noexcept nogil:
    """Parse REQUEST_BYTES bytes. Afterwards wire.state says what follows: WIRE_CLOSED: there is no request."""
    cdef uint32_t magic, length
    cdef uint16_t flags, command
    cdef uint64_t cookie, offset
    memcpy(&magic, data, 4)
    memcpy(&flags, data + 4, 2)
    memcpy(&command, data + 6, 2)
    memcpy(&cookie, data + 8, 8)
    memcpy(&offset, data + 16, 8)
    memcpy(&length, data + 24, 4)
    request.flags = be16toh(flags)
    request.command = be16toh(command)
    request.cookie = be64toh(cookie)
    request.offset_bytes = be64toh(offset)
    request.length_bytes = be32toh(length)
    request.error = 0
    if be32toh(magic) != REQUEST_MAGIC:
        wire_step(wire, ON_GARBAGE)
        return
    if request.command == COMMAND_DISCONNECT:
        wire_step(wire, ON_DISCONNECT)
        return
    request.error = judge(limits, request)
    if request.command != COMMAND_WRITE or request.length_bytes == 0:
        wire_step(wire, ON_REQUEST)
        return
    wire.left = request.length_bytes
    wire_step(wire, ON_REFUSED_WRITE if request.error else ON_WRITE)


cdef uint64_t request_capacity(const uint8_t *data, uint64_t status_bytes) noexcept nogil:
    """For a header that has not been taken: how many bytes its data, or its reply's, will need at most."""
    cdef uint32_t length
    cdef uint16_t command
    memcpy(&command, data + 6, 2)
    memcpy(&length, data + 24, 4)
    command = be16toh(command)
    length = be32toh(length)
    if command == COMMAND_READ or command == COMMAND_WRITE:
        return length if length <= PAYLOAD_BYTES_MAX else 0     # more is refused
    return status_bytes if command == COMMAND_BLOCK_STATUS else 0


cdef int take_data(Wire *wire, uint32_t size_bytes) noexcept nogil:
    wire.left -= size_bytes
    if wire.left:
        return 0
    wire_step(wire, ON_PAYLOAD_END)
    return 1


cdef uint32_t nbd_error(int64_t result) noexcept nogil:
    cdef int64_t error = -result
    if result == 0:
        return 0
    if error == EPERM or error == EACCES or error == EROFS:
        return NBD_EPERM
    if error == ENOSPC or error == EDQUOT or error == EFBIG:
        return NBD_ENOSPC
    if error == ENOMEM:
        return NBD_ENOMEM
    if error == EINVAL:
        return NBD_EINVAL
    if error == EOVERFLOW:
        return NBD_EOVERFLOW
    if error == EOPNOTSUPP:
        return NBD_ENOTSUP
    if error == ESHUTDOWN:
        return NBD_ESHUTDOWN
    return NBD_EIO


cdef inline void put16(uint8_t *out, uint16_t value) noexcept nogil:
    value = htobe16(value)
    memcpy(out, &value, 2)


cdef inline void put32(uint8_t *out, uint32_t value) noexcept nogil:
    value = htobe32(value)
    memcpy(out, &value, 4)


cdef inline void put64(uint8_t *out, uint64_t value) noexcept nogil:
    value = htobe64(value)
    memcpy(out, &value, 8)


cdef void put_simple(uint8_t *out, uint64_t cookie, uint32_t error) noexcept nogil:
    put32(out, SIMPLE_REPLY_MAGIC)
    put32(out + 4, error)
    put64(out + 8, cookie)


cdef inline void put_chunk(uint8_t *out, uint16_t kind, uint64_t cookie, uint32_t length_bytes) noexcept nogil:
    """A structured reply in one chunk: always the last of its reply."""
    put32(out, STRUCTURED_REPLY_MAGIC)
    put16(out + 4, CHUNK_DONE)
    put16(out + 6, kind)
    put64(out + 8, cookie)
    put32(out + 16, length_bytes)


cdef void put_data_head(uint8_t *out, uint64_t cookie, uint64_t offset_bytes, uint32_t length_bytes) noexcept nogil:
    put_chunk(out, CHUNK_OFFSET_DATA, cookie, 8 + length_bytes)
    put64(out + 20, offset_bytes)


cdef void put_hole(uint8_t *out, uint64_t cookie, uint64_t offset_bytes, uint32_t length_bytes) noexcept nogil:
    put_chunk(out, CHUNK_OFFSET_HOLE, cookie, 12)
    put64(out + 20, offset_bytes)
    put32(out + 28, length_bytes)


cdef void put_error(uint8_t *out, uint64_t cookie, uint32_t error) noexcept nogil:
    put_chunk(out, CHUNK_ERROR, cookie, 6)
    put32(out + 20, error)
    put16(out + 24, 0)


cdef void put_status_head(uint8_t *out, uint64_t cookie, uint32_t extents) noexcept nogil:
    put_chunk(out, CHUNK_BLOCK_STATUS, cookie, 4 + STATUS_EXTENT_BYTES * extents)
    put32(out + 20, ALLOCATION_CONTEXT)


cdef void put_status_extent(uint8_t *out, uint32_t length_bytes, uint32_t flags) noexcept nogil:
    put32(out, length_bytes)
    put32(out + 4, flags)


# --- For Python: the same parser fed with bytes, as the tests and any other driver want it --------------------------

class Command(NamedTuple):
    """A request as it arrived: `error` is the NBD error with which it must be refused, or 0; `data` of a write."""

    command: int
    flags: int
    cookie: int
    offset_bytes: int
    length_bytes: int
    error: int
    data: bytes


class NeedData(NamedTuple):
    """Everything so far is taken; feed more."""


class Closed(NamedTuple):
    """Nothing more is taken: the client disconnected, or sent what is no request."""


cdef class Transmission:
    """Bytes in by receive_data(), events out by next_event(). Holds at most one write's data beside what was fed and not yet taken."""

    cdef Wire wire
    cdef Limits limits
    cdef bytearray buffer
    cdef bytearray data
    cdef Request request

    def __init__(self, size_bytes, *, minimum_block_bytes=1, read_only=False, structured=False, allocation=False):
        if minimum_block_bytes < 1 or minimum_block_bytes & (minimum_block_bytes - 1):
            raise InvalidArgument(f"the minimum block of {minimum_block_bytes} bytes is no power of two")
        self.limits = Limits(size_bytes, minimum_block_bytes, read_only, structured, allocation)
        self.wire = Wire(WIRE_HEADER, 0)
        self.buffer = bytearray()
        self.data = bytearray()

    def receive_data(self, data):
        """Take bytes from the client; b'' means that the stream ended."""
        if not data:
            wire_step(&self.wire, ON_END)
        elif self.wire.state != WIRE_CLOSED:
            self.buffer += data

    def next_event(self):
        """A Command, NeedData or Closed."""
        cdef uint32_t size
        cdef bint last
        while True:
            if self.wire.state == WIRE_CLOSED:
                self.buffer.clear()
                self.data.clear()
                return Closed()
            if self.wire.state == WIRE_HEADER:
                if len(self.buffer) < REQUEST_BYTES:
                    return NeedData()
                take_header(&self.wire, &self.limits, self.buffer, &self.request)
                del self.buffer[:REQUEST_BYTES]
                if self.wire.state == WIRE_HEADER or self.wire.state == WIRE_SKIP:
                    return self.command(b"")
                continue
            size = min(<uint64_t>len(self.buffer), self.wire.left)
            if size == 0:
                return NeedData()
            last = self.wire.state == WIRE_PAYLOAD
            if last:
                self.data += self.buffer[:size]
            del self.buffer[:size]
            if take_data(&self.wire, size) and last:
                data = bytes(self.data)
                self.data.clear()
                return self.command(data)

    cdef object command(self, bytes data):
        return Command(self.request.command, self.request.flags, self.request.cookie, self.request.offset_bytes,
                       self.request.length_bytes, self.request.error, data)


def simple_reply(cookie, error=0, data=b""):
    cdef uint8_t[SIMPLE_HEAD_BYTES] out
    put_simple(out, cookie, error)
    return out[:SIMPLE_HEAD_BYTES] + data


def data_reply(cookie, offset_bytes, data):
    cdef uint8_t[DATA_HEAD_BYTES] out
    put_data_head(out, cookie, offset_bytes, len(data))
    return out[:DATA_HEAD_BYTES] + data


def hole_reply(cookie, offset_bytes, length_bytes):
    cdef uint8_t[HOLE_CHUNK_BYTES] out
    put_hole(out, cookie, offset_bytes, length_bytes)
    return out[:HOLE_CHUNK_BYTES]


def error_reply(cookie, error):
    cdef uint8_t[ERROR_CHUNK_BYTES] out
    put_error(out, cookie, error)
    return out[:ERROR_CHUNK_BYTES]


def status_reply(cookie, extents):
    """`extents`: (length in bytes, NBD status flags) each."""
    cdef uint8_t[STATUS_HEAD_BYTES] head
    cdef uint8_t[STATUS_EXTENT_BYTES] extent
    put_status_head(head, cookie, len(extents))
    parts = [head[:STATUS_HEAD_BYTES]]
    for length_bytes, flags in extents:
        put_status_extent(extent, length_bytes, flags)
        parts.append(extent[:STATUS_EXTENT_BYTES])
    return b"".join(parts)


def error_of_errno(errno):
    """The NBD error for a (positive) errno."""
    return nbd_error(-errno)
