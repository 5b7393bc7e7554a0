# SPDX-License-Identifier: Apache-2.0
"""A small NBD server in this process that tells one lie of its choice, for tests that must notice. It can be "killed": then all that is not
durable is gone."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import struct
import threading
from pathlib import Path

READ, WRITE, DISCONNECT, FLUSH, TRIM, ZEROES = 0, 1, 2, 3, 4, 6
FUA = 1
_GREETING = struct.pack(">QQH", 0x4E42444D41474943, 0x49484156454F5054, 1)
_OPTION, _REPLY, _REQUEST, _SIMPLE = 0x49484156454F5054, 0x3E889045565A9, 0x25609513, 0x67446698
_GO, _ACK, _INFO, _UNSUPPORTED = 7, 1, 3, 0x80000001
_FLAGS = 1 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 8  # all the above, and several connections
EVERY = 40  # so often it lies, where a lie is about one request

LIES = (
    "drops a write",
    "writes half of it",
    "writes to the next sector",
    "writes it later",
    "shows what was there before",
    "shows another sector",
    "zeroes a sector too many",
    "leaves a sector unzeroed",
    "trims to garbage",
    "fails a write",
    "hangs up",
    "says nothing",
)
LIES_AFTER_KILL = ("ignores flushes", "ignores FUA", "loses the oldest flush")


class LyingServer:
    """`lie` is one of the above, or nothing."""

    def __init__(self, path: Path, size_bytes: int, lie: str = "") -> None:
        self.uri = f"nbd+unix:///?socket={path}"
        self.lie = lie
        self.data = bytearray(size_bytes)  # what reads show
        self.medium = bytearray(size_bytes)  # what a kill leaves
        self.before = bytearray(size_bytes)  # what was there some time ago
        self.late: tuple[int, bytes] | None = None
        self.writes = self.reads = self.flushes = 0
        self.lives = 1
        self.lock = threading.Lock()
        self.sockets: list[socket.socket] = []
        server = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                server.sockets.append(self.request)
                with contextlib.suppress(ConnectionError, EOFError):
                    server.serve(self.request)

        self._listener = socketserver.ThreadingUnixStreamServer(str(path), Handler)
        self._listener.daemon_threads = True
        self._thread = threading.Thread(target=lambda: self._listener.serve_forever(0.01))
        self._thread.start()

    def __enter__(self) -> LyingServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.hang_up()
        self._listener.shutdown()
        self._listener.server_close()
        self._thread.join()

    def hang_up(self) -> None:
        for each in self.sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self.sockets.clear()

    def kill(self) -> None:
        """Serves again at once, with what is durable."""
        with self.lock:
            self.lives += 1
            self.hang_up()
            self.data[:] = self.medium

    # --- The protocol ---

    def serve(self, client: socket.socket) -> None:
        life = self.lives

        def take(count: int) -> bytes:
            data = bytearray()
            while len(data) < count:
                part = client.recv(count - len(data))
                if not part:
                    raise EOFError
                data += part
            return bytes(data)

        client.sendall(_GREETING)
        take(4)
        option = 0
        while option != _GO:
            _, option, length = struct.unpack(">QII", take(16))
            take(length)
            if option == _GO:
                export = struct.pack(">HQH", 0, len(self.data), _FLAGS)
                client.sendall(struct.pack(">QIII", _REPLY, option, _INFO, len(export)) + export)
            client.sendall(struct.pack(">QIII", _REPLY, option, _ACK if option == _GO else _UNSUPPORTED, 0))
        while True:
            magic, flags, command, cookie, offset, length = struct.unpack(">IHHQQI", take(28))
            assert magic == _REQUEST
            if command == DISCONNECT:
                return
            data = take(length) if command == WRITE else b""
            with self.lock:
                if life != self.lives:  # it had been received before the kill
                    return
                answer = self.answer(command, flags, offset, length, data)
            if answer is not None:
                error, shown = answer
                client.sendall(struct.pack(">IIQ", _SIMPLE, error, cookie) + shown)

    # --- The disk ---

    def answer(self, command: int, flags: int, offset: int, length: int, data: bytes) -> tuple[int, bytes] | None:
        """The error and the data; None: no answer, ever."""
        if command == READ:
            return 0, self.read(offset, length)
        if command == FLUSH:
            self.flushes += 1
            if self.lie != "ignores flushes" and not (self.lie == "loses the oldest flush" and self.flushes % 3 == 1):
                self.medium[:] = self.data
            return 0, b""
        if self.late is not None and self.writes % EVERY == EVERY // 2:
            (at, old), self.late = self.late, None
            self.data[at : at + len(old)] = old
        self.writes += 1
        if self.writes % (4 * EVERY) == 0:
            self.before[:] = self.data
        lie = self.lie if self.writes % EVERY == 0 else ""
        if lie == "says nothing":
            return None
        if lie == "hangs up":
            raise EOFError
        if lie == "fails a write":
            return 5, b""
        if command == WRITE:
            if lie == "writes half of it":
                data = data[: len(data) // 1024 * 512]
            elif lie == "writes to the next sector":
                offset = min(offset + 512, len(self.data) - len(data))
            elif lie == "writes it later":
                self.late, data = (offset, data), b""
            elif lie == "drops a write":
                data = b""
        else:
            # Of the other kind of request there are fewer: it lies about each.
            filling = b"\xaa" if command == TRIM and self.lie == "trims to garbage" else b"\0"
            if command == ZEROES and self.lie == "zeroes a sector too many":
                length = min(length + 512, len(self.data) - offset)
            if command == ZEROES and self.lie == "leaves a sector unzeroed":
                length -= 512
            data = filling * length
        self.data[offset : offset + len(data)] = data
        if flags & FUA and self.lie != "ignores FUA":
            self.medium[offset : offset + len(data)] = data
        return 0, b""

    def read(self, offset: int, length: int) -> bytes:
        self.reads += 1
        if self.reads % EVERY == 0:
            if self.lie == "shows what was there before":
                return bytes(self.before[offset : offset + length])
            if self.lie == "shows another sector":
                offset = max(0, offset - 512)
        return bytes(self.data[offset : offset + length])
