# SPDX-License-Identifier: Apache-2.0
"""A client that speaks NBD byte by byte, for what well-behaved clients never do. Every wait ends after TIMEOUT_SECONDS."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass, field
from enum import IntEnum

from fvd.export import handshake as hs
from fvd.export._nbd import COMMAND_READ

TIMEOUT_SECONDS = 20
REQUEST_MAGIC = 0x25609513


class NbdError(IntEnum):
    """Errors as they stand in a reply: the numbers are the protocol's, whatever the system's errno numbers are."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


def option(kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QII", hs.OPTION_MAGIC, kind, len(data)) + data


def go(name: str = "", infos: tuple[int, ...] = (), kind: int = hs.OPT_GO) -> bytes:
    data = struct.pack(">I", len(name.encode())) + name.encode() + struct.pack(f">H{len(infos)}H", len(infos), *infos)
    return option(kind, data)


def meta_context(kind: int, name: str, queries: list[str]) -> bytes:
    data = struct.pack(">I", len(name)) + name.encode() + struct.pack(">I", len(queries))
    return option(kind, data + b"".join(struct.pack(">I", len(query)) + query.encode() for query in queries))


def request(command: int, offset: int = 0, length: int = 0, *, flags: int = 0, cookie: int = 1, data: bytes = b"") -> bytes:
    return struct.pack(">IHHQQI", REQUEST_MAGIC, flags, command, cookie, offset, length) + data


@dataclass
class Reply:
    cookie: int
    error: int = 0
    data: bytes = b""
    hole: bool = False
    extents: list[tuple[int, int]] = field(default_factory=list)


class Client:
    """A raw connection. Replies come in any order: take(cookie) waits for one."""

    def __init__(self, address: str | tuple[str, int]) -> None:
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_STREAM)
        self.socket.settimeout(TIMEOUT_SECONDS)
        self.socket.connect(address)
        self.structured = False
        self.size_bytes = self.flags = 0
        self.reads: dict[int, tuple[int, int]] = {}
        self.replies: dict[int, Reply] = {}
        self.cookie = 0

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def receive(self, size: int) -> bytes:
        parts = []
        while size:
            part = self.socket.recv(min(size, 1 << 20))
            if not part:
                raise EOFError
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def ended(self) -> bool:
        """Whether the server hangs up (instead of saying anything)."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True

    # --- Handshake ---

    def greet(self, flags: int = hs.FLAG_FIXED_NEWSTYLE | hs.FLAG_NO_ZEROES) -> None:
        assert self.receive(18) == hs.Handshake.greeting()
        self.send(struct.pack(">I", flags))

    def option_replies(self, data: bytes) -> list[tuple[int, bytes]]:
        """Send an option; (type, data) of each reply to it, the last of which is final."""
        self.send(data)
        replies = []
        while True:
            magic, _option, kind, length = struct.unpack(">QIII", self.receive(20))
            assert magic == hs.OPTION_REPLY_MAGIC
            replies.append((kind, self.receive(length)))
            if kind == hs.REP_ACK or kind & 0x80000000:
                return replies

    def start(self, name: str = "", *, structured: bool = False, allocation: bool = False) -> Client:
        self.greet()
        if structured:
            assert self.option_replies(option(hs.OPT_STRUCTURED_REPLY)) == [(hs.REP_ACK, b"")]
            self.structured = True
        if allocation:
            assert len(self.option_replies(meta_context(hs.OPT_SET_META_CONTEXT, name, [hs.ALLOCATION]))) == 2
        replies = self.option_replies(go(name))
        assert replies[-1] == (hs.REP_ACK, b""), replies
        _kind, self.size_bytes, self.flags = struct.unpack(">HQH", replies[0][1])
        return self

    # --- Transmission ---

    def begin(self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, data: bytes = b"") -> int:
        self.cookie += 1
        if command == COMMAND_READ:
            self.reads[self.cookie] = offset, length
        self.send(request(command, offset, length or len(data), flags=flags, cookie=self.cookie, data=data))
        return self.cookie

    def begin_reads(self, count: int, size: int) -> list[int]:
        """So many reads, one after the other from offset 0, in one packet: the server may stop reading from us."""
        cookies = range(self.cookie + 1, self.cookie + 1 + count)
        self.cookie += count
        self.reads |= {cookie: (i * size, size) for i, cookie in enumerate(cookies)}
        self.send(b"".join(request(COMMAND_READ, i * size, size, cookie=cookie) for i, cookie in enumerate(cookies)))
        return list(cookies)

    def call(self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, data: bytes = b"") -> Reply:
        return self.take(self.begin(command, offset, length, flags=flags, data=data))

    def take(self, cookie: int) -> Reply:
        while cookie not in self.replies:
            reply = self.receive_reply()
            self.replies[reply.cookie] = reply
        return self.replies.pop(cookie)

    def receive_reply(self) -> Reply:
        (magic,) = struct.unpack(">I", self.receive(4))
        if magic == 0x67446698:
            error, cookie = struct.unpack(">IQ", self.receive(12))
            reply = Reply(cookie, error)
            if cookie in self.reads and not error:
                assert not self.structured, "a read must have a structured reply"
                reply.data = self.receive(self.reads[cookie][1])
            return reply
        assert magic == 0x668E33EF and self.structured
        flags, kind, cookie, length = struct.unpack(">HHQI", self.receive(16))
        assert flags == 1, "our replies have one chunk"
        payload = self.receive(length)
        reply = Reply(cookie)
        if kind == 1:
            (offset,) = struct.unpack_from(">Q", payload)
            reply.data = payload[8:]
            assert (offset, len(reply.data)) == self.reads[cookie]
        elif kind == 2:
            offset, size = struct.unpack(">QI", payload)
            reply.data, reply.hole = bytes(size), True
            assert (offset, size) == self.reads[cookie]
        elif kind == 5:
            assert struct.unpack_from(">I", payload) == (1,)
            reply.extents = list(struct.iter_unpack(">II", payload[4:]))
        else:
            assert kind == 0x8001 and length == 6
            reply.error, message = struct.unpack(">IH", payload)
            assert message == 0
        return reply
