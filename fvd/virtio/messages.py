# SPDX-License-Identifier: Apache-2.0
"""The messages of vhost-user without I/O: bytes and descriptors in, a typed message out; and replies. Knows neither sockets nor rings.

As QEMU's docs/interop/vhost-user.rst specifies them. Numbers are of the host's order there; fvd runs on little-endian hosts.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from typing import NamedTuple

HEADER = struct.Struct("<III")
PAYLOAD_BYTES_MAX = 4096
DESCRIPTORS_MAX = 8
CONFIG_BYTES_MAX = 256
QUEUES_MAX = 64

_VERSION = 1
_VERSION_MASK = 3
_REPLY = 4
_NEED_REPLY = 8


class Ask(IntEnum):
    """What a front end asks."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SET_BACKEND_REQ_FD = 21
    GET_CONFIG = 24
    SET_CONFIG = 25
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    RESET_DEVICE = 34
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40


class Feature(IntFlag):
    """Of virtio, of its block device, and of vhost."""

    SEG_MAX = 1 << 2
    READ_ONLY = 1 << 5
    BLK_SIZE = 1 << 6
    FLUSH = 1 << 9
    TOPOLOGY = 1 << 10
    MQ = 1 << 12
    DISCARD = 1 << 13
    WRITE_ZEROES = 1 << 14
    LOG_ALL = 1 << 26
    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    PROTOCOL_FEATURES = 1 << 30
    VERSION_1 = 1 << 32


class Protocol(IntFlag):
    """Features of the protocol."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    REPLY_ACK = 1 << 3
    BACKEND_REQ = 1 << 5
    CONFIG = 1 << 9
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16


FEATURES = (
    Feature.SEG_MAX
    | Feature.BLK_SIZE
    | Feature.FLUSH
    | Feature.TOPOLOGY
    | Feature.MQ
    | Feature.DISCARD
    | Feature.WRITE_ZEROES
    | Feature.LOG_ALL
    | Feature.INDIRECT_DESC
    | Feature.EVENT_IDX
    | Feature.PROTOCOL_FEATURES
    | Feature.VERSION_1
)
PROTOCOL_FEATURES = Protocol(sum(Protocol))


class MessageError(Exception):
    """What came is no message of the protocol."""


class Region(NamedTuple):
    """A region of memory, as a front end describes it."""

    guest_address: int
    size_bytes: int
    user_address: int
    file_offset_bytes: int


class RingAddresses(NamedTuple):
    """Where a ring lies, by the front end's addresses; `log_address` is the guest's, of the used ring; None: it is not logged."""

    descriptors: int
    available: int
    used: int
    log_address: int | None


class InflightArea(NamedTuple):
    """The memory of requests in flight."""

    size_bytes: int
    offset_bytes: int
    queues: int
    ring_size: int


@dataclass(frozen=True)
class Message:
    """One message. What a kind of it does not have stays as it is here. `descriptors` belong to whoever takes the message."""

    ask: Ask
    needs_reply: bool
    descriptors: tuple[int, ...] = ()
    value: int = 0
    index: int = 0
    regions: tuple[Region, ...] = ()
    addresses: RingAddresses | None = None
    area: InflightArea | None = None
    data: bytes = field(default=b"", repr=False)


_U64 = struct.Struct("<Q")
_STATE = struct.Struct("<II")
_ADDRESSES = struct.Struct("<IIQQQQ")
_REGION = struct.Struct("<QQQQ")
_REGIONS = struct.Struct("<II")
_LOG = struct.Struct("<QQ")
_CONFIG = struct.Struct("<III")
_INFLIGHT = struct.Struct("<QQHH")
_ONE_REGION = struct.Struct("<Q32s")

_PLAIN = {
    Ask.GET_FEATURES,
    Ask.SET_OWNER,
    Ask.RESET_OWNER,
    Ask.SET_LOG_FD,
    Ask.GET_PROTOCOL_FEATURES,
    Ask.GET_QUEUE_NUM,
    Ask.SET_BACKEND_REQ_FD,
    Ask.RESET_DEVICE,
    Ask.GET_MAX_MEM_SLOTS,
    Ask.GET_STATUS,
}
_VALUES = {Ask.SET_FEATURES, Ask.SET_PROTOCOL_FEATURES, Ask.SET_STATUS}
_STATES = {Ask.SET_VRING_NUM, Ask.SET_VRING_BASE, Ask.GET_VRING_BASE, Ask.SET_VRING_ENABLE}
_FILES = {Ask.SET_VRING_KICK, Ask.SET_VRING_CALL, Ask.SET_VRING_ERR}
_RING_INDEX = 0xFF
_NO_DESCRIPTOR = 1 << 8
_FLAG_LOG = 1
# How many descriptors come with a message. Those of rings: one, unless the message says that there is none.
_DESCRIPTORS = {
    Ask.SET_LOG_BASE: 1,
    Ask.SET_LOG_FD: 1,
    Ask.SET_BACKEND_REQ_FD: 1,
    Ask.SET_INFLIGHT_FD: 1,
    Ask.ADD_MEM_REG: 1,
}


def decode_header(header: bytes) -> tuple[int, int, int]:
    """(number of the message, flags, bytes that follow). Raises MessageError."""
    number, flags, size = HEADER.unpack(header)
    if flags & _VERSION_MASK != _VERSION:
        raise MessageError(f"a message of version {flags & _VERSION_MASK}")
    if flags & _REPLY:
        raise MessageError("a reply to what was not asked")
    if size > PAYLOAD_BYTES_MAX:
        raise MessageError(f"a message of {size} bytes")
    return number, flags, size


def decode(number: int, flags: int, payload: bytes, descriptors: Sequence[int]) -> Message:
    """The message. Raises MessageError: unknown, of a wrong size, or with another number of descriptors than it needs."""
    try:
        ask = Ask(number)
    except ValueError:
        raise MessageError(f"message {number} is not known here") from None
    try:
        message = _decode(ask, bool(flags & _NEED_REPLY), payload, tuple(descriptors))
    except struct.error:
        raise MessageError(f"{ask.name} has {len(payload)} bytes") from None
    if ask in _FILES:
        wanted = 0 if message.value else 1
    elif ask is Ask.SET_MEM_TABLE:
        wanted = len(message.regions)
    elif ask is Ask.REM_MEM_REG:
        wanted = len(descriptors)  # some front ends send the region's once more
    else:
        wanted = _DESCRIPTORS.get(ask, 0)
    if len(descriptors) != wanted:
        raise MessageError(f"{ask.name} has {len(descriptors)} descriptors, not {wanted}")
    return message


def _decode(ask: Ask, needs_reply: bool, payload: bytes, descriptors: tuple[int, ...]) -> Message:
    if ask in _PLAIN:
        return Message(ask, needs_reply, descriptors)
    if ask in _VALUES:
        return Message(ask, needs_reply, descriptors, value=_U64.unpack(payload)[0])
    if ask in _STATES:
        index, value = _STATE.unpack(payload)
        return Message(ask, needs_reply, descriptors, index=index, value=value)
    if ask in _FILES:
        (word,) = _U64.unpack(payload)
        return Message(ask, needs_reply, descriptors, index=word & _RING_INDEX, value=word & _NO_DESCRIPTOR)
    if ask is Ask.SET_VRING_ADDR:
        index, ring_flags, where, used, available, log = _ADDRESSES.unpack(payload)
        addresses = RingAddresses(where, available, used, log if ring_flags & _FLAG_LOG else None)
        return Message(ask, needs_reply, descriptors, index=index, addresses=addresses)
    if ask is Ask.SET_MEM_TABLE:
        return Message(ask, needs_reply, descriptors, regions=_decode_regions(payload))
    if ask in (Ask.ADD_MEM_REG, Ask.REM_MEM_REG):
        _, region = _ONE_REGION.unpack(payload)
        return Message(ask, needs_reply, descriptors, regions=(Region(*_REGION.unpack(region)),))
    if ask is Ask.SET_LOG_BASE:
        size_bytes, offset_bytes = _LOG.unpack(payload)
        return Message(ask, needs_reply, descriptors, area=InflightArea(size_bytes, offset_bytes, 0, 0))
    if ask in (Ask.GET_INFLIGHT_FD, Ask.SET_INFLIGHT_FD):
        area = InflightArea(*_INFLIGHT.unpack(payload[: _INFLIGHT.size]))
        padding_bytes = len(payload) - _INFLIGHT.size if ask is Ask.GET_INFLIGHT_FD else 0
        return Message(ask, needs_reply, descriptors, value=padding_bytes, area=area)
    assert ask in (Ask.GET_CONFIG, Ask.SET_CONFIG)
    offset_bytes, size_bytes, _ = _CONFIG.unpack(payload[: _CONFIG.size])
    return Message(ask, needs_reply, descriptors, index=offset_bytes, value=size_bytes, data=payload[_CONFIG.size :])


def _decode_regions(payload: bytes) -> tuple[Region, ...]:
    count, _ = _REGIONS.unpack(payload[: _REGIONS.size])
    table = payload[_REGIONS.size :]
    if count > DESCRIPTORS_MAX or len(table) < count * _REGION.size:
        raise MessageError(f"SET_MEM_TABLE of {count} regions has {len(payload)} bytes")
    return tuple(Region(*_REGION.unpack_from(table, place * _REGION.size)) for place in range(count))


def encode_reply(ask: Ask, payload: bytes) -> bytes:
    return HEADER.pack(ask, _VERSION | _REPLY, len(payload)) + payload


def encode_u64(ask: Ask, value: int) -> bytes:
    """A reply of one number; of 0 or 1 to a message that has no reply of its own: done, or not."""
    return encode_reply(ask, _U64.pack(value))


def encode_base(index: int, next_available: int) -> bytes:
    return encode_reply(Ask.GET_VRING_BASE, _STATE.pack(index, next_available))


def encode_inflight(area: InflightArea, padding_bytes: int = 0) -> bytes:
    """Padded as the question was: QEMU's is, by 4 bytes, and it takes no other answer."""
    return encode_reply(Ask.GET_INFLIGHT_FD, _INFLIGHT.pack(*area) + bytes(padding_bytes))


def encode_config(config: bytes, offset_bytes: int, size_bytes: int) -> bytes:
    """That part of the device's configuration; zeros behind its end. An empty one is the protocol's refusal."""
    if size_bytes > CONFIG_BYTES_MAX or offset_bytes + size_bytes > CONFIG_BYTES_MAX:
        return encode_reply(Ask.GET_CONFIG, b"")
    part = config.ljust(CONFIG_BYTES_MAX, b"\0")[offset_bytes : offset_bytes + size_bytes]
    return encode_reply(Ask.GET_CONFIG, _CONFIG.pack(offset_bytes, size_bytes, 0) + part)
