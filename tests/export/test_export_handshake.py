# SPDX-License-Identifier: Apache-2.0
"""The handshake without I/O: what it answers, that the fragmentation of its input does not matter, that no bytes break it."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbd_client import go, meta_context, option

from fvd.export import handshake as hs
from fvd.export.handshake import Event, Export, Handshake, NeedData, Rejected, Send, Start

FLAGS = struct.pack(">I", hs.FLAG_FIXED_NEWSTYLE | hs.FLAG_NO_ZEROES)
ONE = {"disk": Export("disk", 0, 1 << 30, description="a disk")}
TWO = {"a": Export("a", 0, 1 << 20), "b": Export("b", 1, 1 << 21, read_only=True, minimum_block_bytes=512, preferred_block_bytes=65536)}


def feed(data: bytes, exports: dict[str, Export] = ONE, step: int = 0) -> list[Event]:
    """Every event until it needs more than there is; adjacent Sends joined."""
    handshake = Handshake(exports)
    events: list[Event] = []
    for piece in [data[i : i + (step or len(data))] for i in range(0, len(data), step or len(data) or 1)]:
        handshake.receive_data(piece)
        while not isinstance(event := handshake.next_event(), NeedData):
            if isinstance(event, Send) and events and isinstance(events[-1], Send):
                events[-1] = Send(events[-1].data + event.data)
            else:
                events.append(event)
            if isinstance(event, (Start, Rejected)):
                return events
    return events


def replies(data: bytes, exports: dict[str, Export] = ONE) -> list[tuple[int, int, bytes]]:
    """(option, type, data) of every reply to what follows the client's flags."""
    found = []
    said = b"".join(event.data for event in feed(FLAGS + data, exports) if isinstance(event, Send))
    while said:
        magic, number, kind, length = struct.unpack_from(">QIII", said)
        assert magic == hs.OPTION_REPLY_MAGIC
        found.append((number, kind, said[20 : 20 + length]))
        said = said[20 + length :]
    return found


def start(data: bytes, exports: dict[str, Export] = ONE) -> Start:
    event = feed(FLAGS + data, exports)[-1]
    assert isinstance(event, Start)
    return event


def kinds(data: bytes, exports: dict[str, Export] = ONE) -> list[int]:
    return [kind for _, kind, _ in replies(data, exports)]


def test_export_name() -> None:
    flags = ONE["disk"].flags(structured=False)
    reply = struct.pack(">QH", 1 << 30, flags)
    assert feed(FLAGS + option(hs.OPT_EXPORT_NAME, b"disk") + b"rest") == [Send(reply), Start(ONE["disk"], False, False, b"rest")]
    assert feed(struct.pack(">I", 1) + option(hs.OPT_EXPORT_NAME, b"disk"))[0] == Send(reply + bytes(124))
    for bad in (b"none", b"\xff", b"d\0", bytes(5000)):
        assert isinstance(feed(FLAGS + option(hs.OPT_EXPORT_NAME, bad))[-1], Rejected)


def test_the_empty_name_is_the_only_export() -> None:
    assert start(go("")).export is ONE["disk"]
    assert kinds(go(""), TWO) == [hs.REP_ERR_UNKNOWN]
    assert start(go("b"), TWO).export is TWO["b"]
    named = {**TWO, "": Export("", 2, 0)}
    assert start(go(""), named).export is named[""]
    assert kinds(go(""), {}) == [hs.REP_ERR_UNKNOWN]


def test_flags() -> None:
    writable = hs.EXPORT_SEND_TRIM | hs.EXPORT_SEND_WRITE_ZEROES
    both = hs.EXPORT_HAS_FLAGS | hs.EXPORT_SEND_FLUSH | hs.EXPORT_SEND_FUA | hs.EXPORT_CAN_MULTI_CONN | hs.EXPORT_SEND_CACHE
    assert TWO["a"].flags(False) == both | writable
    assert TWO["a"].flags(True) == both | writable | hs.EXPORT_SEND_DF
    assert TWO["b"].flags(False) == both | hs.EXPORT_READ_ONLY


def test_info_says_what_was_asked_for() -> None:
    everything = go("b", (hs.INFO_NAME, hs.INFO_DESCRIPTION, hs.INFO_BLOCK_SIZE, 77), hs.OPT_INFO)
    assert replies(everything, TWO) == [
        (hs.OPT_INFO, hs.REP_INFO, struct.pack(">HQH", hs.INFO_EXPORT, 1 << 21, TWO["b"].flags(False))),
        (hs.OPT_INFO, hs.REP_INFO, struct.pack(">H", hs.INFO_NAME) + b"b"),
        (hs.OPT_INFO, hs.REP_INFO, struct.pack(">HIII", hs.INFO_BLOCK_SIZE, 512, 65536, 32 << 20)),
        (hs.OPT_INFO, hs.REP_ACK, b""),
    ]
    assert [data[:2] for _, _, data in replies(go("", (hs.INFO_DESCRIPTION,), hs.OPT_INFO))] == [b"\0\0", b"\0\2", b""]
    assert kinds(go("", (), hs.OPT_INFO)) == [hs.REP_INFO, hs.REP_ACK]
    # Constraints other than the defaults are told unasked.
    assert [data[:2] for _, _, data in replies(go("b", (), hs.OPT_INFO), TWO)] == [b"\0\0", b"\0\3", b""]


def test_list() -> None:
    assert replies(option(hs.OPT_LIST)) == [(3, hs.REP_SERVER, b"\0\0\0\4diska disk"), (3, hs.REP_ACK, b"")]
    assert kinds(option(hs.OPT_LIST), TWO) == [hs.REP_SERVER, hs.REP_SERVER, hs.REP_ACK]
    assert kinds(option(hs.OPT_LIST, b"x")) == [hs.REP_ERR_INVALID]


def test_abort() -> None:
    assert [type(event) for event in feed(FLAGS + option(hs.OPT_ABORT, b"so there"))] == [Send, Rejected]


def test_unknown_options_are_refused_and_the_handshake_goes_on() -> None:
    unknown = option(5) + option(11, b"x" * 100) + option(0xFFFFFFFF)
    assert kinds(unknown + go())[:3] == [hs.REP_ERR_UNSUP] * 3
    assert start(unknown + go())


def test_options_that_are_too_long_are_skipped() -> None:
    long = option(hs.OPT_LIST, bytes(hs.OPTION_BYTES_MAX + 1))
    assert kinds(long + option(hs.OPT_LIST)) == [hs.REP_ERR_TOO_BIG, hs.REP_SERVER, hs.REP_ACK]
    handshake = Handshake(ONE)
    handshake.receive_data(FLAGS + struct.pack(">QII", hs.OPTION_MAGIC, hs.OPT_LIST, 0xFFFFFFFF))
    for _ in range(100):
        assert handshake.next_event() == NeedData()
        handshake.receive_data(bytes(65536))
    assert handshake.next_event() == NeedData() and len(handshake._buffer) == 0


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0\1",
        struct.pack(">I", 5) + b"disk\0\0",
        struct.pack(">I", 4) + b"disk",
        struct.pack(">I", 4) + b"disk\0\2\0\0",
        struct.pack(">I", 4) + b"disk\0\0x",
        struct.pack(">I", 4) + b"di\0k\0\0",
        struct.pack(">I", 4) + b"\xff\xfe\xfd\xfc\0\0",
        struct.pack(">I", 0xFFFFFFFF) + b"disk\0\0",
        struct.pack(">I", 4097) + b"d" * 4097 + b"\0\0",
    ],
)
def test_malformed_info(data: bytes) -> None:
    assert kinds(option(hs.OPT_INFO, data)) == [hs.REP_ERR_INVALID]
    assert kinds(option(hs.OPT_GO, data) + go())[:2] == [hs.REP_ERR_INVALID, hs.REP_INFO]


def test_structured_replies_and_contexts() -> None:
    structured = option(hs.OPT_STRUCTURED_REPLY)
    set_it = meta_context(hs.OPT_SET_META_CONTEXT, "disk", ["base:allocation", "x-other:thing"])
    assert start(go()).structured is False
    assert start(structured + go()).structured is True
    assert kinds(option(hs.OPT_STRUCTURED_REPLY, b"x")) == [hs.REP_ERR_INVALID]
    assert kinds(set_it) == [hs.REP_ERR_INVALID]  # before structured replies
    assert replies(structured + set_it)[1:] == [
        (10, hs.REP_META_CONTEXT, b"\0\0\0\1base:allocation"),
        (10, hs.REP_ACK, b""),
    ]
    assert start(structured + set_it + go()).allocation is True
    assert start(structured + set_it + go("disk")).allocation is True  # the same export by its other name
    assert start(structured + go()).allocation is False
    # The last one counts, even when it fails.
    assert start(structured + set_it + meta_context(hs.OPT_SET_META_CONTEXT, "disk", ["base:"]) + go()).allocation is False
    assert start(structured + set_it + option(hs.OPT_SET_META_CONTEXT, b"?") + go()).allocation is False


def test_a_context_counts_for_its_export_only() -> None:
    both = option(hs.OPT_STRUCTURED_REPLY) + meta_context(hs.OPT_SET_META_CONTEXT, "a", ["base:allocation"])
    assert start(both + go("a"), TWO).allocation is True
    assert start(both + go("b"), TWO).allocation is False


@pytest.mark.parametrize(("queries", "found"), [([], 1), (["base:"], 1), (["base:allocation"], 1), (["x:y", "base:other"], 0)])
def test_list_contexts(queries: list[str], found: int) -> None:
    data = option(hs.OPT_STRUCTURED_REPLY) + meta_context(hs.OPT_LIST_META_CONTEXT, "disk", queries)
    assert kinds(data)[1:] == [hs.REP_META_CONTEXT] * found + [hs.REP_ACK]
    unknown = option(hs.OPT_STRUCTURED_REPLY) + meta_context(hs.OPT_LIST_META_CONTEXT, "none", queries)
    assert kinds(unknown)[1:] == [hs.REP_ERR_UNKNOWN]


def test_many_queries_cost_no_more_than_their_bytes() -> None:
    data = struct.pack(">I", 4) + b"disk" + struct.pack(">I", 0xFFFFFFFF)
    assert kinds(option(hs.OPT_STRUCTURED_REPLY) + option(hs.OPT_LIST_META_CONTEXT, data))[1:] == [hs.REP_ERR_INVALID]


@pytest.mark.parametrize("data", [struct.pack(">I", 4), struct.pack(">I", 0xFFFFFFFF), FLAGS + bytes(16), FLAGS + b"IHAVEOPS" + bytes(8)])
def test_no_nbd_client(data: bytes) -> None:
    assert isinstance(feed(data)[-1], Rejected)


def test_hanging_up() -> None:
    handshake = Handshake(ONE)
    handshake.receive_data(FLAGS[:2])
    handshake.receive_data(b"")
    assert isinstance(handshake.next_event(), Rejected)
    handshake.receive_data(FLAGS)
    assert isinstance(handshake.next_event(), Rejected)


OPTIONS = st.one_of(
    st.builds(option, st.integers(0, 12), st.binary(max_size=60)),
    st.builds(go, st.sampled_from(["", "a", "b", "none"]), st.lists(st.integers(0, 5), max_size=4).map(tuple), st.sampled_from([6, 7])),
    st.builds(
        meta_context,
        st.sampled_from([9, 10]),
        st.sampled_from(["a", "b", ""]),
        st.lists(st.sampled_from(["base:", hs.ALLOCATION]), max_size=3),
    ),
    st.just(option(hs.OPT_STRUCTURED_REPLY)),
    st.just(option(hs.OPT_LIST)),
    st.binary(max_size=40),
)
STREAMS = st.builds(
    lambda flags, options: flags + b"".join(options),
    st.sampled_from([FLAGS, FLAGS, b"\0\0\0\1", b""]),
    st.lists(OPTIONS, max_size=8),
)


@settings(max_examples=300, deadline=None)
@given(STREAMS, st.integers(1, 40))
def test_fragmentation_does_not_matter(data: bytes, step: int) -> None:
    whole, pieces, single = feed(data, TWO), feed(data, TWO, step), feed(data, TWO, 1)

    def comparable(events: list[Event]) -> list[object]:  # what follows the handshake arrives with Start only when fed whole
        return [("start", event.export, event.structured, event.allocation) if isinstance(event, Start) else event for event in events]

    assert comparable(whole) == comparable(pieces) == comparable(single)


@settings(max_examples=300, deadline=None)
@given(STREAMS.flatmap(lambda data: st.tuples(st.just(data), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=5))))
def test_no_bytes_break_it(case: tuple[bytes, list[tuple[int, int]]]) -> None:
    data = bytearray(case[0])
    for position, value in case[1]:
        if position < len(data):
            data[position] = value
    assert all(isinstance(event, (Send, Start, Rejected)) for event in feed(bytes(data), TWO))
