# SPDX-License-Identifier: Apache-2.0
"""NBD's handshake without I/O: bytes from the client in, bytes to it and a decision out.

Fixed newstyle with the options of docs/nbd.md. Hostile bytes cost a bounded amount of memory and end in Rejected, never in an
exception. May not know sockets, engines or clocks. Protocol: github.com/NetworkBlockDevice/nbd doc/proto.md.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto

from fvd.export._nbd import ALLOCATION_CONTEXT, PAYLOAD_BYTES_MAX

GREETING_MAGIC = 0x4E42444D41474943
OPTION_MAGIC = 0x49484156454F5054
OPTION_REPLY_MAGIC = 0x0003E889045565A9

FLAG_FIXED_NEWSTYLE = 1
FLAG_NO_ZEROES = 2

OPT_EXPORT_NAME = 1
OPT_ABORT = 2
OPT_LIST = 3
OPT_INFO = 6
OPT_GO = 7
OPT_STRUCTURED_REPLY = 8
OPT_LIST_META_CONTEXT = 9
OPT_SET_META_CONTEXT = 10

REP_ACK = 1
REP_SERVER = 2
REP_INFO = 3
REP_META_CONTEXT = 4
REP_ERR_UNSUP = 0x80000001
REP_ERR_INVALID = 0x80000003
REP_ERR_UNKNOWN = 0x80000006
REP_ERR_TOO_BIG = 0x80000009

INFO_EXPORT = 0
INFO_NAME = 1
INFO_DESCRIPTION = 2
INFO_BLOCK_SIZE = 3

EXPORT_HAS_FLAGS = 1 << 0
EXPORT_READ_ONLY = 1 << 1
EXPORT_SEND_FLUSH = 1 << 2
EXPORT_SEND_FUA = 1 << 3
EXPORT_SEND_TRIM = 1 << 5
EXPORT_SEND_WRITE_ZEROES = 1 << 6
EXPORT_SEND_DF = 1 << 7
EXPORT_CAN_MULTI_CONN = 1 << 8
EXPORT_SEND_CACHE = 1 << 10

NAME_BYTES_MAX = 4096  # the protocol's bound on any string
OPTION_BYTES_MAX = 16 << 10  # larger options are skipped unread: TOO_BIG
OPTIONS_MAX = 1000  # of one client, which is then disconnected; a careful one asks for ten
ALLOCATION = "base:allocation"

_CLIENT_FLAGS = struct.Struct(">I")
_OPTION_HEADER = struct.Struct(">QII")
_REPLY_HEADER = struct.Struct(">QIII")
_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")
_INFO_EXPORT = struct.Struct(">HQH")
_INFO_BLOCK_SIZE = struct.Struct(">HIII")


@dataclass(frozen=True)
class Export:
    """What a client may learn of an export. `number` is the server's."""

    name: str
    number: int
    size_bytes: int
    read_only: bool = False
    minimum_block_bytes: int = 1
    preferred_block_bytes: int = 4096
    description: str = ""

    def flags(self, structured: bool) -> int:
        """The transmission flags."""
        flags = EXPORT_HAS_FLAGS | EXPORT_SEND_FLUSH | EXPORT_SEND_FUA | EXPORT_CAN_MULTI_CONN | EXPORT_SEND_CACHE
        flags |= EXPORT_READ_ONLY if self.read_only else EXPORT_SEND_TRIM | EXPORT_SEND_WRITE_ZEROES
        return flags | EXPORT_SEND_DF if structured else flags


@dataclass(frozen=True)
class NeedData:
    """Everything so far is taken; feed more."""


@dataclass(frozen=True)
class Send:
    """Bytes for the client. Ask for the next event only when they are on their way: what a client can make us say is bounded so."""

    data: bytes


@dataclass(frozen=True)
class Start:
    """The handshake is over: transmission of `export` begins, with the bytes in `received` first."""

    export: Export
    structured: bool
    allocation: bool
    received: bytes


@dataclass(frozen=True)
class Rejected:
    """The connection is to be closed."""

    reason: str


Event = NeedData | Send | Start | Rejected


class State(Enum):
    FLAGS = auto()  # the client's flags come next
    OPTION = auto()  # an option's header
    DATA = auto()  # that option's data
    SKIP = auto()  # the data of an option that is too big
    STARTED = auto()
    CLOSED = auto()


# What may follow what; each state's handler may only go where this says.
TRANSITIONS: Mapping[State, frozenset[State]] = {
    State.FLAGS: frozenset({State.OPTION, State.CLOSED}),
    State.OPTION: frozenset({State.DATA, State.SKIP, State.CLOSED}),
    State.DATA: frozenset({State.OPTION, State.STARTED, State.CLOSED}),
    State.SKIP: frozenset({State.OPTION, State.CLOSED}),
    State.STARTED: frozenset(),
    State.CLOSED: frozenset(),
}


class _Invalid(Exception):
    """The option's data do not parse."""


class _Reader:
    """Takes fields from an option's data."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def take(self, size: int) -> bytes:
        if size > len(self._data) - self._position:
            raise _Invalid("shorter than its own fields say")
        self._position += size
        return self._data[self._position - size : self._position]

    def u16(self) -> int:
        (value,) = _U16.unpack(self.take(2))
        return int(value)

    def u32(self) -> int:
        (value,) = _U32.unpack(self.take(4))
        return int(value)

    def string(self) -> str:
        return _text(self.take(self.u32()))

    def end(self) -> None:
        if self._position != len(self._data):
            raise _Invalid("longer than its fields")


def _text(data: bytes) -> str:
    if len(data) > NAME_BYTES_MAX or 0 in data:
        raise _Invalid("a string that is too long or contains NUL")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise _Invalid("a string that is not UTF-8") from None


class Handshake:
    """The server's side of one handshake. First send greeting(); then receive_data() and next_event() in turn."""

    def __init__(self, exports: Mapping[str, Export]) -> None:
        self._exports = exports  # the owner's, by name: it may change at any time
        self._state = State.FLAGS
        self._buffer = bytearray()
        self._options = 0
        self._option = 0
        self._length = 0
        self._no_zeroes = False
        self._structured = False
        self._allocation_for: Export | None = None
        self._reason = ""
        self._start: Start | None = None

    @staticmethod
    def greeting() -> bytes:
        return struct.pack(">QQH", GREETING_MAGIC, OPTION_MAGIC, FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES)

    def receive_data(self, data: bytes) -> None:
        """Take bytes from the client; b"" means that it hung up."""
        if not data:
            self._close("the client hung up")
        elif self._state is not State.CLOSED:
            self._buffer += data

    def next_event(self) -> Event:
        while True:
            if self._state is State.CLOSED:
                self._buffer.clear()
                return Rejected(self._reason)
            if self._state is State.STARTED:
                if self._start is None:
                    raise AssertionError("started without an export")
                return Start(self._start.export, self._start.structured, self._start.allocation, bytes(self._buffer))
            if self._state is State.SKIP:
                skipped = min(self._length, len(self._buffer))
                del self._buffer[:skipped]
                self._length -= skipped
                if self._length:
                    return NeedData()
                self._go(State.OPTION)
                return Send(self._reply(REP_ERR_TOO_BIG, b"the option is too long"))
            size = {State.FLAGS: _CLIENT_FLAGS.size, State.OPTION: _OPTION_HEADER.size, State.DATA: self._length}[self._state]
            if len(self._buffer) < size:
                return NeedData()
            data = bytes(self._buffer[:size])
            del self._buffer[:size]
            if self._state is State.FLAGS:
                self._take_flags(data)
            elif self._state is State.OPTION:
                self._take_option(data)
            elif answer := self._take_data(data):
                return Send(answer)

    def _go(self, state: State) -> None:
        if state not in TRANSITIONS[self._state]:
            raise AssertionError(f"{self._state} -> {state}")
        self._state = state

    def _close(self, reason: str) -> None:
        if self._state is not State.CLOSED:
            self._state, self._reason = State.CLOSED, reason

    def _take_flags(self, data: bytes) -> None:
        (flags,) = _CLIENT_FLAGS.unpack(data)
        if flags & ~(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES):
            self._close(f"unknown client flags {flags:#x}")
            return
        self._no_zeroes = bool(flags & FLAG_NO_ZEROES)
        self._go(State.OPTION)

    def _take_option(self, data: bytes) -> None:
        magic, self._option, self._length = _OPTION_HEADER.unpack(data)
        self._options += 1
        if magic != OPTION_MAGIC:
            self._close("no option where one was due")
        elif self._options > OPTIONS_MAX:
            self._close(f"more than {OPTIONS_MAX} options")
        elif self._length <= OPTION_BYTES_MAX:
            self._go(State.DATA)
        elif self._option == OPT_EXPORT_NAME:
            self._close("an export name of impossible length")
        else:
            self._go(State.SKIP)

    def _take_data(self, data: bytes) -> bytes:
        handler = {
            OPT_EXPORT_NAME: self._export_name,
            OPT_ABORT: self._abort,
            OPT_LIST: self._list,
            OPT_INFO: self._info,
            OPT_GO: self._info,
            OPT_STRUCTURED_REPLY: self._structured_reply,
            OPT_LIST_META_CONTEXT: self._meta_context,
            OPT_SET_META_CONTEXT: self._meta_context,
        }.get(self._option)
        if handler is None:
            answer = self._reply(REP_ERR_UNSUP)
        else:
            try:
                answer = handler(data)
            except _Invalid as error:
                answer = self._reply(REP_ERR_INVALID, str(error).encode())
        if self._state is State.DATA:
            self._go(State.OPTION)
        return answer

    # --- Options ----------------------------------------------------------------------------------------------------

    def _find(self, name: str) -> Export | None:
        """The empty name means the only export, when there is exactly one."""
        if not name and "" not in self._exports and len(self._exports) == 1:
            return next(iter(self._exports.values()))
        return self._exports.get(name)

    def _begin(self, export: Export) -> None:
        self._start = Start(export, self._structured, self._allocation_for is not None and self._allocation_for == export, b"")
        self._go(State.STARTED)

    def _export_name(self, data: bytes) -> bytes:
        try:
            export = self._find(_text(data))
        except _Invalid:
            export = None
        if export is None:
            self._close("no such export")
            return b""
        self._begin(export)
        zeroes = 0 if self._no_zeroes else 124
        return struct.pack(">QH", export.size_bytes, export.flags(self._structured)) + bytes(zeroes)

    def _abort(self, data: bytes) -> bytes:
        self._close("the client aborted")
        return self._reply(REP_ACK)

    def _list(self, data: bytes) -> bytes:
        _Reader(data).end()
        answer = []
        for export in list(self._exports.values()):
            name = export.name.encode()
            answer.append(self._reply(REP_SERVER, _U32.pack(len(name)) + name + export.description.encode()))
        answer.append(self._reply(REP_ACK))
        return b"".join(answer)

    def _info(self, data: bytes) -> bytes:
        reader = _Reader(data)
        name = reader.string()
        wanted = {reader.u16() for _ in range(reader.u16())}
        reader.end()
        export = self._find(name)
        if export is None:
            return self._reply(REP_ERR_UNKNOWN, b"there is no export of this name")
        infos = [_INFO_EXPORT.pack(INFO_EXPORT, export.size_bytes, export.flags(self._structured))]
        if INFO_NAME in wanted:
            infos.append(_U16.pack(INFO_NAME) + export.name.encode())
        if INFO_DESCRIPTION in wanted and export.description:
            infos.append(_U16.pack(INFO_DESCRIPTION) + export.description.encode())
        if INFO_BLOCK_SIZE in wanted or export.minimum_block_bytes > 1:
            sizes = (export.minimum_block_bytes, export.preferred_block_bytes, PAYLOAD_BYTES_MAX)
            infos.append(_INFO_BLOCK_SIZE.pack(INFO_BLOCK_SIZE, *sizes))
        answer = b"".join(self._reply(REP_INFO, info) for info in infos) + self._reply(REP_ACK)
        if self._option == OPT_GO:
            self._begin(export)
        return answer

    def _structured_reply(self, data: bytes) -> bytes:
        _Reader(data).end()
        self._structured = True
        return self._reply(REP_ACK)

    def _meta_context(self, data: bytes) -> bytes:
        selecting = self._option == OPT_SET_META_CONTEXT
        if selecting:
            self._allocation_for = None  # even when this one fails
        if not self._structured:
            raise _Invalid("structured replies come first")
        reader = _Reader(data)
        name = reader.string()
        queries = {reader.string() for _ in range(min(reader.u32(), OPTION_BYTES_MAX))}
        reader.end()
        export = self._find(name)
        if export is None:
            return self._reply(REP_ERR_UNKNOWN, b"there is no export of this name")
        answer = b""
        if ALLOCATION in queries or (not selecting and (not queries or "base:" in queries)):
            answer = self._reply(REP_META_CONTEXT, _U32.pack(ALLOCATION_CONTEXT if selecting else 0) + ALLOCATION.encode())
            if selecting:
                self._allocation_for = export
        return answer + self._reply(REP_ACK)

    def _reply(self, kind: int, data: bytes = b"") -> bytes:
        return _REPLY_HEADER.pack(OPTION_REPLY_MAGIC, self._option, kind, len(data)) + data
