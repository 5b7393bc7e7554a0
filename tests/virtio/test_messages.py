# SPDX-License-Identifier: Apache-2.0
"""vhost-user's messages: each is decoded as QEMU's specification lays it out, and what does not fit is refused with MessageError only."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fvd.virtio import messages
from fvd.virtio.messages import Ask, InflightArea, Message, MessageError, Region, RingAddresses

pytestmark = pytest.mark.pure

REGIONS = tuple(Region(0x1000 * place, 0x1000, 0x7000_0000_0000 + 0x1000 * place, 4096 * place) for place in range(8))


def table(*regions: Region) -> bytes:
    return struct.pack("<II", len(regions), 0) + b"".join(struct.pack("<QQQQ", *region) for region in regions)


U64 = struct.pack("<Q", 0x1_2345_6789)
STATE = struct.pack("<II", 3, 77)
# The payload of each message, how many descriptors come with it, and what it means.
GOOD: dict[Ask, tuple[bytes, int, dict[str, object]]] = {
    Ask.GET_FEATURES: (b"", 0, {}),
    Ask.SET_FEATURES: (U64, 0, {"value": 0x1_2345_6789}),
    Ask.SET_OWNER: (b"", 0, {}),
    Ask.RESET_OWNER: (b"", 0, {}),
    Ask.SET_MEM_TABLE: (table(*REGIONS), 8, {"regions": REGIONS}),
    Ask.SET_LOG_BASE: (struct.pack("<QQ", 4096, 8192), 1, {"area": InflightArea(4096, 8192, 0, 0)}),
    Ask.SET_LOG_FD: (b"", 1, {}),
    Ask.SET_VRING_NUM: (STATE, 0, {"index": 3, "value": 77}),
    Ask.SET_VRING_ADDR: (struct.pack("<IIQQQQ", 2, 1, 10, 20, 30, 40), 0, {"index": 2, "addresses": RingAddresses(10, 30, 20, 40)}),
    Ask.SET_VRING_BASE: (STATE, 0, {"index": 3, "value": 77}),
    Ask.GET_VRING_BASE: (STATE, 0, {"index": 3, "value": 77}),
    Ask.SET_VRING_KICK: (struct.pack("<Q", 5), 1, {"index": 5}),
    Ask.SET_VRING_CALL: (struct.pack("<Q", 0x105), 0, {"index": 5, "value": 0x100}),
    Ask.SET_VRING_ERR: (struct.pack("<Q", 0xFF), 1, {"index": 0xFF}),
    Ask.GET_PROTOCOL_FEATURES: (b"", 0, {}),
    Ask.SET_PROTOCOL_FEATURES: (U64, 0, {"value": 0x1_2345_6789}),
    Ask.GET_QUEUE_NUM: (b"", 0, {}),
    Ask.SET_VRING_ENABLE: (STATE, 0, {"index": 3, "value": 77}),
    Ask.SET_BACKEND_REQ_FD: (b"", 1, {}),
    Ask.GET_CONFIG: (struct.pack("<III", 4, 60, 0) + bytes(60), 0, {"index": 4, "value": 60, "data": bytes(60)}),
    Ask.SET_CONFIG: (struct.pack("<III", 32, 1, 0) + b"x", 0, {"index": 32, "value": 1, "data": b"x"}),
    Ask.GET_INFLIGHT_FD: (struct.pack("<QQHH", 1, 2, 3, 4), 0, {"area": InflightArea(1, 2, 3, 4)}),
    Ask.SET_INFLIGHT_FD: (struct.pack("<QQHHI", 1, 2, 3, 4, 0), 1, {"area": InflightArea(1, 2, 3, 4)}),  # padded, as a C structure is
    Ask.RESET_DEVICE: (b"", 0, {}),
    Ask.GET_MAX_MEM_SLOTS: (b"", 0, {}),
    Ask.ADD_MEM_REG: (bytes(8) + table(REGIONS[1])[8:], 1, {"regions": (REGIONS[1],)}),
    Ask.REM_MEM_REG: (bytes(8) + table(REGIONS[1])[8:], 0, {"regions": (REGIONS[1],)}),
    Ask.SET_STATUS: (U64, 0, {"value": 0x1_2345_6789}),
    Ask.GET_STATUS: (b"", 0, {}),
}


@pytest.mark.parametrize("ask", Ask)
def test_each_message_is_decoded(ask: Ask) -> None:
    payload, count, meaning = GOOD[ask]
    descriptors = tuple(range(10, 10 + count))
    for flags, needs_reply in ((1, False), (9, True)):
        assert messages.decode_header(struct.pack("<III", ask, flags, len(payload))) == (ask, flags, len(payload))
        wanted = Message(ask, needs_reply, descriptors, **meaning)  # type: ignore[arg-type]
        assert messages.decode(ask, flags, payload, descriptors) == wanted


@pytest.mark.parametrize("ask", Ask)
def test_each_message_with_another_size_or_number_of_descriptors_is_refused(ask: Ask) -> None:
    payload, count, _ = GOOD[ask]
    for descriptors in {0, 1, 2, 7, 8, 9} - {count}:
        if ask is not Ask.REM_MEM_REG:  # some front ends send the region's once more
            with pytest.raises(MessageError, match=f"{ask.name} has {descriptors} descriptors, not {count}"):
                messages.decode(ask, 1, payload, list(range(descriptors)))
    if payload:
        shorter = payload[:10] if ask in (Ask.GET_CONFIG, Ask.SET_CONFIG, Ask.SET_INFLIGHT_FD) else payload[:-1]
        with pytest.raises(MessageError, match="bytes"):
            messages.decode(ask, 1, shorter, [10] * count)


def test_a_descriptor_that_the_message_says_is_not_there() -> None:
    for ask in (Ask.SET_VRING_KICK, Ask.SET_VRING_CALL, Ask.SET_VRING_ERR):
        with pytest.raises(MessageError, match="has 1 descriptors, not 0"):
            messages.decode(ask, 1, struct.pack("<Q", 0x100), [3])
        with pytest.raises(MessageError, match="has 0 descriptors, not 1"):
            messages.decode(ask, 1, struct.pack("<Q", 0), [])


def test_a_memory_table_of_more_regions_than_descriptors_can_come() -> None:
    for count, payload in ((9, table(*REGIONS, REGIONS[0])), (2**32 - 1, table(*REGIONS)), (2, table(REGIONS[0]))):
        with pytest.raises(MessageError, match=f"SET_MEM_TABLE of {count} regions"):
            messages.decode(Ask.SET_MEM_TABLE, 1, struct.pack("<I", count) + payload[4:], [3] * 8)


@pytest.mark.parametrize(
    ("flags", "size", "why"),
    [(0, 0, "version 0"), (2, 0, "version 2"), (3, 0, "version 3"), (5, 0, "a reply"), (1, 4097, "4097 bytes"), (1, 2**32 - 1, "bytes")],
)
def test_headers_that_are_none(flags: int, size: int, why: str) -> None:
    with pytest.raises(MessageError, match=why):
        messages.decode_header(struct.pack("<III", Ask.GET_FEATURES, flags, size))


@pytest.mark.parametrize("number", [0, 19, 20, 23, 26, 41, 2**32 - 1])
def test_messages_that_are_not_known(number: int) -> None:
    with pytest.raises(MessageError, match="not known"):
        messages.decode(number, 1, b"", [])


@given(header=st.binary(min_size=12, max_size=12), payload=st.binary(max_size=300), descriptors=st.integers(0, 9))
def test_any_bytes_are_a_message_or_an_error(header: bytes, payload: bytes, descriptors: int) -> None:
    try:
        number, flags, _ = messages.decode_header(header)
        messages.decode(number, flags, payload, list(range(descriptors)))
    except MessageError:
        pass


@given(ask=st.sampled_from(Ask), payload=st.binary(max_size=300), cut=st.integers(0, 300), descriptors=st.integers(0, 9))
def test_known_messages_with_any_payload(ask: Ask, payload: bytes, cut: int, descriptors: int) -> None:
    for content in (payload, GOOD[ask][0][:cut] + payload):
        try:
            message = messages.decode(ask, 9, content, list(range(descriptors)))
        except MessageError:
            continue
        assert message.ask is ask and message.needs_reply and message.descriptors == tuple(range(descriptors))


def test_replies() -> None:
    assert messages.encode_u64(Ask.GET_FEATURES, 7) == struct.pack("<IIIQ", 1, 5, 8, 7)
    assert messages.encode_base(2, 65535) == struct.pack("<IIIII", 11, 5, 8, 2, 65535)
    assert messages.encode_inflight(InflightArea(64, 0, 1, 2)) == struct.pack("<IIIQQHH", 31, 5, 20, 64, 0, 1, 2)


@given(offset=st.integers(0, 2**32 - 1) | st.integers(0, 300), size=st.integers(0, 2**32 - 1) | st.integers(0, 300))
def test_a_part_of_the_configuration(offset: int, size: int) -> None:
    config = bytes(range(1, 61))
    reply = messages.encode_config(config, offset, size)
    if offset + size > 256:
        assert reply == struct.pack("<III", 24, 5, 0)
    else:
        assert reply == struct.pack("<IIIIII", 24, 5, 12 + size, offset, size, 0) + (config + bytes(196))[offset : offset + size]


def test_what_is_offered() -> None:
    """What qemu and Linux name; nothing else may be offered by mistake."""
    bits = {bit for bit in range(64) if messages.FEATURES >> bit & 1}
    assert bits == {2, 6, 9, 10, 12, 13, 14, 26, 28, 29, 30, 32}
    assert {bit for bit in range(64) if messages.PROTOCOL_FEATURES >> bit & 1} == {0, 1, 3, 5, 9, 12, 13, 15, 16}
