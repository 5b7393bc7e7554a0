# SPDX-License-Identifier: Apache-2.0
"""The transmission phase without I/O: how requests are judged, that fragmentation does not matter, that no bytes break it."""

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbd_client import REQUEST_MAGIC, NbdError, request

from fvd.errors import InvalidArgument
from fvd.export import _nbd as nbd
from fvd.export._nbd import Closed, Command, NeedData, Transmission

MIB = 1 << 20
READ, WRITE, FLUSH, TRIM = nbd.COMMAND_READ, nbd.COMMAND_WRITE, nbd.COMMAND_FLUSH, nbd.COMMAND_TRIM
CACHE, ZEROES, STATUS = nbd.COMMAND_CACHE, nbd.COMMAND_WRITE_ZEROES, nbd.COMMAND_BLOCK_STATUS


def feed(data: bytes, transmission: Transmission, step: int = 0) -> list[Command | Closed]:
    events: list[Command | Closed] = []
    for piece in [data[i : i + (step or len(data))] for i in range(0, len(data), step or len(data) or 1)]:
        transmission.receive_data(piece)
        while not isinstance(event := transmission.next_event(), NeedData):
            events.append(event)
            if isinstance(event, Closed):
                return events
    return events


def verdict(command: int, offset: int, length: int, flags: int = 0, **limits: object) -> int:
    """The error with which a request is refused, or 0. A write's data do not follow."""
    options = {"size_bytes": 64 * MIB, "structured": True, "allocation": True, **limits}
    transmission = Transmission(**options)  # type: ignore[arg-type]
    transmission.receive_data(request(command, offset, length, flags=flags))
    event = transmission.next_event()
    return event.error if isinstance(event, Command) else 0


@pytest.mark.parametrize("command", [READ, TRIM, CACHE, ZEROES, STATUS])
@pytest.mark.parametrize("flags", [0, nbd.COMMAND_FLAG_FUA])
def test_good_requests(command: int, flags: int) -> None:
    for offset, length in ((0, 1), (0, 32 * MIB), (64 * MIB - 1, 1), (12345, 54321)):
        assert verdict(command, offset, length, flags) == 0
    assert verdict(FLUSH, 0, 0, flags) == 0


@pytest.mark.parametrize("command", [READ, WRITE, TRIM, CACHE, ZEROES, STATUS])
def test_bounds(command: int) -> None:
    beyond = NbdError.ENOSPC if command in (WRITE, ZEROES) else NbdError.EINVAL
    for offset, length in ((64 * MIB, 1), (64 * MIB - 1, 2), (2**64 - 1, 1), (2**64 - 1, 2**31), (2**63, 4096)):
        assert verdict(command, offset, length) == beyond
    assert verdict(command, 0, 0) == NbdError.EINVAL


def test_size_of_data() -> None:
    assert verdict(READ, 0, 32 * MIB) == verdict(WRITE, 0, 32 * MIB) == 0
    assert verdict(READ, 0, 32 * MIB + 1) == verdict(WRITE, 0, 32 * MIB + 1) == NbdError.EINVAL
    for command in (TRIM, CACHE, ZEROES, STATUS):  # these carry no data
        assert verdict(command, 0, 64 * MIB) == 0


@pytest.mark.parametrize("command", [READ, TRIM, CACHE, ZEROES, STATUS])
def test_alignment(command: int) -> None:
    assert verdict(command, 4096, 8192, minimum_block_bytes=4096) == 0
    assert verdict(command, 4096, 512, minimum_block_bytes=4096) == NbdError.EINVAL
    assert verdict(command, 512, 4096, minimum_block_bytes=4096) == NbdError.EINVAL


def test_read_only() -> None:
    for command in (TRIM, ZEROES):
        assert verdict(command, 0, 4096, read_only=True) == NbdError.EPERM
        assert verdict(command, 2**40, 4096, read_only=True) == NbdError.EPERM
    for command in (READ, CACHE, STATUS):
        assert verdict(command, 0, 4096, read_only=True) == 0
    assert verdict(FLUSH, 0, 0, read_only=True) == 0
    events = feed(request(WRITE, 0, 512, data=bytes(512)) + request(READ, 0, 512, cookie=2), Transmission(MIB, read_only=True))
    assert [(event.error, event.data) for event in events if isinstance(event, Command)] == [(NbdError.EPERM, b""), (0, b"")]


def test_flags() -> None:
    allowed = {
        READ: nbd.COMMAND_FLAG_DF,
        ZEROES: nbd.COMMAND_FLAG_NO_HOLE,
        STATUS: nbd.COMMAND_FLAG_REQ_ONE,
    }
    for command in (READ, FLUSH, TRIM, CACHE, ZEROES, STATUS):
        length = 0 if command == FLUSH else 4096
        for bit in range(16):
            good = 1 << bit in (nbd.COMMAND_FLAG_FUA, allowed.get(command))
            assert verdict(command, 0, length, 1 << bit) == (0 if good else NbdError.EINVAL), (command, bit)
    assert verdict(READ, 0, 4096, nbd.COMMAND_FLAG_DF, structured=False) == NbdError.EINVAL


def test_other_refusals() -> None:
    assert verdict(STATUS, 0, 4096, allocation=False) == NbdError.EINVAL
    assert verdict(FLUSH, 0, 1) == NbdError.EINVAL and verdict(FLUSH, 1, 0) == NbdError.EINVAL
    for unknown in (8, 9, 255, 65535):
        assert verdict(unknown, 0, 4096) == NbdError.EINVAL
    with pytest.raises(InvalidArgument):
        Transmission(MIB, minimum_block_bytes=3)


def test_writes_carry_their_data() -> None:
    data = bytes(range(256)) * 16
    stream = request(WRITE, 4096, len(data), data=data, cookie=7, flags=nbd.COMMAND_FLAG_FUA) + request(FLUSH, cookie=8)
    assert feed(stream, Transmission(MIB)) == [Command(WRITE, 1, 7, 4096, 4096, 0, data), Command(FLUSH, 0, 8, 0, 0, 0, b"")]


def test_the_data_of_a_refused_write_is_skipped() -> None:
    stream = request(WRITE, 2 * MIB, 4096, data=request(READ, 0, 512) * 146 + bytes(8)) + request(READ, 0, 512, cookie=9)
    events = feed(stream, Transmission(MIB))
    assert [(event.cookie, event.error) for event in events if isinstance(event, Command)] == [(1, NbdError.ENOSPC), (9, 0)]


def test_a_huge_write_is_refused_at_once_and_costs_no_memory() -> None:
    transmission = Transmission(1 << 40)
    transmission.receive_data(request(WRITE, 0, 0xFFFFFFFF))
    event = transmission.next_event()
    assert isinstance(event, Command) and event.error == NbdError.EINVAL
    for _ in range(64):
        transmission.receive_data(bytes(MIB))
        assert transmission.next_event() == NeedData()


def test_the_end() -> None:
    assert feed(request(nbd.COMMAND_DISCONNECT) + request(READ, 0, 512), Transmission(MIB)) == [Closed()]
    assert feed(bytes(28), Transmission(MIB)) == [Closed()]
    transmission = Transmission(MIB)
    transmission.receive_data(request(WRITE, 0, 512, data=bytes(100)))
    transmission.receive_data(b"")
    assert transmission.next_event() == Closed()
    transmission.receive_data(bytes(28))
    assert transmission.next_event() == Closed()


def test_replies() -> None:
    assert nbd.simple_reply(5, NbdError.ENOSPC) == struct.pack(">IIQ", 0x67446698, NbdError.ENOSPC, 5)
    assert nbd.simple_reply(2**64 - 1, data=b"abc").endswith(b"\xff" * 8 + b"abc")
    head = struct.Struct(">IHHQI")
    assert nbd.data_reply(5, 4096, b"data") == head.pack(0x668E33EF, 1, 1, 5, 12) + struct.pack(">Q", 4096) + b"data"
    assert nbd.hole_reply(5, 4096, 512) == head.pack(0x668E33EF, 1, 2, 5, 12) + struct.pack(">QI", 4096, 512)
    assert nbd.error_reply(5, NbdError.ENOSPC) == head.pack(0x668E33EF, 1, 0x8001, 5, 6) + struct.pack(">IH", NbdError.ENOSPC, 0)
    assert nbd.status_reply(5, [(512, 3), (4096, 0)]) == head.pack(0x668E33EF, 1, 5, 5, 20) + struct.pack(">5I", 1, 512, 3, 4096, 0)


def test_errors() -> None:
    expected = {getattr(errno, name): NbdError[name] for name in ("EPERM", "EIO", "ENOMEM", "EINVAL", "ENOSPC", "EOVERFLOW", "ESHUTDOWN")}
    expected |= {errno.EDQUOT: NbdError.ENOSPC, errno.EFBIG: NbdError.ENOSPC, errno.EACCES: NbdError.EPERM, errno.EROFS: NbdError.EPERM}
    expected |= {errno.EOPNOTSUPP: NbdError.ENOTSUP, errno.ENODEV: NbdError.EIO}
    assert {number: nbd.error_of_errno(number) for number in (*expected, 0)} == expected | {0: 0}


def test_the_table_is_total_and_closes_for_good() -> None:
    assert {state for state, _ in nbd.TRANSITIONS} == {0, 1, 2} and set(nbd.TRANSITIONS.values()) == {0, 1, 2}


LENGTHS = st.sampled_from([0, 1, 100, 512, 4096, 5000])
REQUESTS = st.one_of(
    st.builds(
        lambda command, offset, length, flags, cookie: request(
            command,
            offset,
            length,
            flags=flags,
            cookie=cookie,
            data=bytes(length % 251 for _ in range(length)) if command == WRITE else b"",
        ),
        st.integers(0, 9),
        st.sampled_from([0, 512, 4096, MIB - 512, MIB, 2**63, 2**64 - 1]),
        LENGTHS,
        st.sampled_from([0, 0, 1, 2, 4, 8, 0x8000]),
        st.integers(0, 2**64 - 1),
    ),
    st.binary(max_size=30),
)
LIMITS = st.fixed_dictionaries(
    {
        "size_bytes": st.sampled_from([0, 4096, MIB, 2**63 - 512]),
        "minimum_block_bytes": st.sampled_from([1, 512]),
        "read_only": st.booleans(),
        "structured": st.booleans(),
        "allocation": st.booleans(),
    }
)


@settings(max_examples=300, deadline=None)
@given(st.lists(REQUESTS, max_size=12).map(b"".join), LIMITS, st.integers(2, 60))
def test_fragmentation_does_not_matter(data: bytes, limits: dict[str, int], step: int) -> None:
    whole = feed(data, Transmission(**limits))  # type: ignore[arg-type]
    assert whole == feed(data, Transmission(**limits), step)  # type: ignore[arg-type]
    assert whole == feed(data, Transmission(**limits), 1)  # type: ignore[arg-type]


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=28), LIMITS, st.booleans())
def test_no_header_breaks_it(data: bytes, limits: dict[str, int], magic: bool) -> None:
    """Whatever is let through lies inside the disk and is no larger than a payload may be."""
    header = (struct.pack(">I", REQUEST_MAGIC) if magic else data[:4]) + data[4:]
    for event in feed(header, Transmission(**limits)):  # type: ignore[arg-type]
        if isinstance(event, Command) and not event.error:
            assert event.command in range(8)
            assert event.offset_bytes + event.length_bytes <= limits["size_bytes"]
            assert event.length_bytes <= 32 * MIB or event.command not in (READ, WRITE)
            assert not (limits["read_only"] and event.command in (WRITE, TRIM, ZEROES))
