# SPDX-License-Identifier: Apache-2.0
"""The control messages: round trips, limits and malformed input."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fvd.control import protocol
from fvd.control.protocol import Lines, ProtocolError, Request
from fvd.errors import FvdError, InvalidArgument, NoSpace

pytestmark = pytest.mark.pure


def test_request_round_trip() -> None:
    request = Request("extend", {"by_bytes": 5 << 30})
    assert protocol.decode_request(protocol.encode_request(request)) == request


def test_every_message_is_one_line_with_a_version() -> None:
    for line in (protocol.encode_request(Request("info")), protocol.encode_result("a\nb"), protocol.encode_error(NoSpace("full\nreally"))):
        assert line.count(b"\n") == 1
        assert json.loads(line)["schema_version"] == 1


def test_an_error_arrives_as_the_same_type() -> None:
    with pytest.raises(NoSpace, match="vm1: full"):
        protocol.decode_answer(protocol.encode_error(NoSpace("vm1: full")))


def test_an_error_of_a_later_version_arrives_as_an_error() -> None:
    with pytest.raises(FvdError, match="moon"):
        protocol.decode_answer(b'{"schema_version": 1, "error": {"kind": "lunar", "message": "moon"}}')


def test_a_bug_in_a_handler_is_told() -> None:
    with pytest.raises(FvdError, match="internal error: ZeroDivisionError"):
        protocol.decode_answer(protocol.encode_error(ZeroDivisionError("x")))


@pytest.mark.parametrize(
    "line",
    [b"", b"x", b"[]", b"1", b"{}", b'{"schema_version":2,"verb":"info"}', b'{"schema_version":true,"verb":"info"}',
     b'{"schema_version":1}', b'{"schema_version":1,"verb":7}', b'{"schema_version":1,"verb":"info","arguments":[]}',
     b"[" * 100_000, b"\xff\xfe"],
)  # fmt: skip
def test_malformed_requests(line: bytes) -> None:
    with pytest.raises(ProtocolError):
        protocol.decode_request(line)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_request_or_an_error(line: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        protocol.decode_request(line)


@given(st.lists(st.binary(max_size=20).filter(lambda line: b"\n" not in line and line.strip()), max_size=5), st.data())
def test_lines_do_not_depend_on_how_bytes_arrive(lines: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(line + b"\n" for line in lines)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    reader = Lines(100)
    got = [line for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True) for line in reader.feed(stream[begin:end])]
    assert got == lines


def test_a_long_line_is_refused_before_it_is_whole() -> None:
    reader = Lines(10)
    reader.feed(b"0123456789")
    with pytest.raises(ProtocolError):
        reader.feed(b"0")
    with pytest.raises(ProtocolError):
        Lines(10).feed(b"x\n" + b"0" * 11 + b"\n")


def test_arguments_are_checked() -> None:
    assert protocol.check_arguments({"by": 5}, {"by": int}) == {"by": 5}
    for wrong in ({"bye": 5}, {"by": "5"}, {"by": True}):
        with pytest.raises(InvalidArgument):
            protocol.check_arguments(wrong, {"by": int})


def test_a_float_may_be_written_as_an_integer() -> None:
    assert protocol.check_arguments({"delay_s": 5}, {"delay_s": float}) == {"delay_s": 5}
    assert protocol.check_arguments({"delay_s": 0.5}, {"delay_s": float}) == {"delay_s": 0.5}
    for wrong in ({"delay_s": True}, {"delay_s": "5"}, {"delay_s": None}):
        with pytest.raises(InvalidArgument, match="must be a number"):
            protocol.check_arguments(wrong, {"delay_s": float})
