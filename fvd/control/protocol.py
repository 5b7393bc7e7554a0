# SPDX-License-Identifier: Apache-2.0
"""The messages of a control socket: one JSON object a line, with a schema version. Pure: bytes in, messages out; no sockets.

Request: ``{"schema_version": 1, "verb": "info", "arguments": {}}``. Answer: ``{"schema_version": 1, "result": ...}`` or
``{"schema_version": 1, "error": {"kind": "no_space", "message": "..."}}``. A connection carries any number of them, in order.

A streaming verb (``events``) has the rest of its connection to itself. After its answer come lines with ``"event": {...}``; with
``"heartbeat": true`` when there is nothing to tell; and with ``"end": true`` before a clean end: a connection that ends without it was cut.
Lines of other kinds may be added, and are to be passed over.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from fvd.errors import FvdError, InvalidArgument, printable, quoted

SCHEMA_VERSION = 1
REQUEST_BYTES_MAX = 64 << 10
STREAM_LINE_BYTES_MAX = 1 << 20
# The map of the largest disk is the largest answer; its sender shortens it long before this.
ANSWER_BYTES_MAX = 64 << 20


@dataclass(frozen=True)
class Request:
    """What is asked of a served disk."""

    verb: str
    arguments: dict[str, Any] = field(default_factory=dict)


class ProtocolError(FvdError):
    """The peer does not speak this protocol, or another version of it."""

    kind = "protocol"


class ServerGone(FvdError):
    """Nobody answers at the control socket: the process that served the disk has ended."""

    kind = "server_gone"


def _known_errors(base: type[FvdError]) -> dict[str, type[FvdError]]:
    errors = {base.kind: base}
    for sub in base.__subclasses__():
        errors |= _known_errors(sub)
    return errors


def error_from(kind: str, message: str) -> FvdError:
    """The exception that the other side raised; FvdError itself where this version does not know the kind."""
    return _known_errors(FvdError).get(kind, FvdError)(message)


def encode_request(request: Request) -> bytes:
    return _line({"verb": request.verb, "arguments": request.arguments})


def encode_result(result: Any) -> bytes:
    return _line({"result": result})


def encode_event(event: Any) -> bytes:
    return _line({"event": event})


def encode_heartbeat() -> bytes:
    return _line({"heartbeat": True})


def encode_end() -> bytes:
    return _line({"end": True})


def encode_error(error: Exception) -> bytes:
    """An error nobody planned for is passed on too, by name, so that the asker is not left guessing."""
    if isinstance(error, FvdError):
        return _line({"error": {"kind": error.kind, "message": str(error)}})
    return _line({"error": {"kind": FvdError.kind, "message": f"internal error: {type(error).__name__}: {error}"}})


def decode_request(line: bytes) -> Request:
    message = _object(line)
    verb, arguments = message.get("verb"), message.get("arguments", {})
    if not isinstance(verb, str) or not isinstance(arguments, dict):
        raise ProtocolError('a request needs a "verb" (a string) and may have "arguments" (an object)')
    return Request(verb, arguments)


def decode_answer(line: bytes, *, strange: bool = False) -> Any:
    """The result, or the error raised. `strange`: a stranger says it; his text gets no control characters to a terminal."""
    message = _object(line)
    if strange:
        message = _printable(message)
    if "result" in message:
        return message["result"]
    error = message.get("error")
    if not isinstance(error, dict):
        raise ProtocolError('an answer needs a "result" or an "error"')
    raise error_from(str(error.get("kind")), str(error.get("message")))


@dataclass(frozen=True)
class Streamed:
    """A line of a stream after its answer: something that happened, the end, or a sign of life (neither)."""

    event: dict[str, Any] | None = None
    end: bool = False


def decode_streamed(line: bytes, *, strange: bool = False) -> Streamed:
    """`strange`: as in `decode_answer`."""
    message = _object(line)
    if strange:
        message = _printable(message)
    event = message.get("event")
    if event is not None and not isinstance(event, dict):
        raise ProtocolError("an event must be a JSON object")
    return Streamed(event, message.get("end") is True)


class Lines:
    """Bytes as they arrive, to whole lines; refuses a line longer than ``limit_bytes`` before storing more of it."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._held = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        if b"\n" not in data:
            self._refuse_long(len(self._held) + len(data))
            self._held += data
            return []
        *lines, rest = (bytes(self._held) + data).split(b"\n")
        for line in (*lines, rest):
            self._refuse_long(len(line))
        self._held = bytearray(rest)
        return [line for line in lines if line.strip()]

    def _refuse_long(self, length_bytes: int) -> None:
        if length_bytes > self._limit_bytes:
            raise ProtocolError(f"a message is longer than {self._limit_bytes} bytes")


_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def check_arguments(arguments: dict[str, Any], allowed: dict[str, type]) -> dict[str, Any]:
    """The arguments, if each is known and of its type; a float may be written as an integer, as JSON has only numbers."""
    for name, value in arguments.items():
        if name not in allowed:
            raise InvalidArgument(f"unknown argument {quoted(name)}; known are: {', '.join(sorted(allowed)) or 'none'}")
        kinds = (int, float) if allowed[name] is float else allowed[name]
        if not isinstance(value, kinds) or isinstance(value, bool) != (allowed[name] is bool):
            raise InvalidArgument(f"argument {quoted(name)} must be {_KINDS[allowed[name]]}")
    return arguments


def _printable(value: Any) -> Any:
    """The same with each control character replaced, in names too. As deep as JSON was read."""
    if isinstance(value, str):
        return printable(value, "\ufffd")
    if isinstance(value, list):
        return [_printable(each) for each in value]
    if isinstance(value, dict):
        return {_printable(name): _printable(each) for name, each in value.items()}
    return value


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps({"schema_version": SCHEMA_VERSION, **message}, separators=(",", ":")).encode() + b"\n"


def _object(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"not a line of JSON: {error}") from None
    if not isinstance(message, dict):
        raise ProtocolError("a message must be a JSON object")
    version = message.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise ProtocolError(f"schema version {quoted(version)} is not known; this is version {SCHEMA_VERSION}")
    return message
