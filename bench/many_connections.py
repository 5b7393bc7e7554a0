"""A client of many NBD connections in one thread: `many_connections.py SOCKET PATTERN --size BYTES --depth N EXPORT...`, until SIGTERM.

On each connection `depth` requests of 4 KiB at random places are always under way. One thread waits for all of them, so what waking a
client's threads costs a server is the same however many connections there are. It speaks NBD itself: simple replies, nothing optional.
"""

from __future__ import annotations

import argparse
import os
import random
import select
import signal
import socket
import struct

BLOCK_BYTES = 4096
MAGIC, OPTION_MAGIC = b"NBDMAGIC", b"IHAVEOPT"
OPTION_EXPORT_NAME = 1
FIXED_NO_ZEROES = 3  # both of the handshake's client flags
REQUEST = struct.Struct(">IHHQQI")
REQUEST_MAGIC = 0x25609513
REPLY = struct.Struct(">IIQ")
REPLY_MAGIC = 0x67446698
COMMANDS = {"randread": 0, "randwrite": 1}
RECEIVE_BYTES = 256 << 10
PREPARED = 4096  # headers of a connection's requests, sent over and over again in this order


class Connection:
    """One connection, with its requests prepared."""

    def __init__(self, path: str, export: str, pattern: str, size_bytes: int, seed: int) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        if self._read(8) != MAGIC or self._read(8) != OPTION_MAGIC:
            raise SystemExit(f"{path} is no NBD server")
        self._read(2)
        name = export.encode()
        self.socket.sendall(struct.pack(">I", FIXED_NO_ZEROES) + OPTION_MAGIC + struct.pack(">II", OPTION_EXPORT_NAME, len(name)) + name)
        [served_bytes, _] = struct.unpack(">QH", self._read(10))
        if served_bytes < size_bytes:
            raise SystemExit(f"{export} has {served_bytes} bytes, not {size_bytes}")
        self.socket.setblocking(False)
        dice = random.Random(seed)
        self._data = dice.randbytes(BLOCK_BYTES) if pattern == "randwrite" else b""
        self._reply_bytes = REPLY.size + (0 if self._data else BLOCK_BYTES)
        places = [dice.randrange(size_bytes // BLOCK_BYTES) * BLOCK_BYTES for _ in range(PREPARED)]
        self._requests = [REQUEST.pack(REQUEST_MAGIC, 0, COMMANDS[pattern], 0, place, BLOCK_BYTES) for place in places]
        self._next = 0
        self._received = bytearray(RECEIVE_BYTES)
        self._have_bytes = 0
        self._unsent = b""

    def _read(self, length: int) -> bytes:
        data = self.socket.recv(length, socket.MSG_WAITALL)
        if len(data) < length:
            raise SystemExit("the server hung up")
        return data

    def ask(self, count: int) -> None:
        """`count` more requests."""
        requests: list[bytes] = []
        for _ in range(count):
            requests += (self._requests[self._next], self._data)
            self._next = (self._next + 1) % PREPARED
        self._unsent += b"".join(requests)
        self.send()

    def send(self) -> None:
        """What the socket takes of what was not sent yet."""
        if self._unsent:
            try:
                sent = self.socket.send(self._unsent)
            except BlockingIOError:
                return
            self._unsent = self._unsent[sent:]

    @property
    def blocked(self) -> bool:
        return bool(self._unsent)

    def answered(self) -> int:
        """Takes what has arrived: how many requests have been answered."""
        try:
            count = self.socket.recv_into(memoryview(self._received)[self._have_bytes :])
        except BlockingIOError:
            return 0
        if count == 0:
            raise SystemExit("the server hung up")
        have, size = self._have_bytes + count, self._reply_bytes
        whole = have // size
        for number in range(whole):
            magic, error, _ = REPLY.unpack_from(self._received, number * size)
            if magic != REPLY_MAGIC or error:
                raise SystemExit(f"error {error} from the server")
        rest = have - whole * size
        self._received[:rest] = self._received[whole * size : have]
        self._have_bytes = rest
        return whole


def run(connections: list[Connection], depth: int) -> None:
    poll = select.epoll()
    by_descriptor = {connection.socket.fileno(): connection for connection in connections}
    for connection in connections:
        poll.register(connection.socket, select.EPOLLIN)
        connection.ask(depth)
    waiting = {number for number, connection in by_descriptor.items() if connection.blocked}
    for number in waiting:
        poll.modify(number, select.EPOLLIN | select.EPOLLOUT)
    while True:
        for number, events in poll.poll():
            connection = by_descriptor[number]
            if events & select.EPOLLOUT:
                connection.send()
            if events & ~select.EPOLLOUT and (done := connection.answered()):
                connection.ask(done)
            if connection.blocked != (number in waiting):
                waiting ^= {number}
                poll.modify(number, select.EPOLLIN | (select.EPOLLOUT if connection.blocked else 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("socket")
    parser.add_argument("pattern", choices=COMMANDS)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--depth", type=int, required=True)
    parser.add_argument("exports", nargs="+")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    connections = [Connection(options.socket, export, options.pattern, options.size, at) for at, export in enumerate(options.exports)]
    run(connections, options.depth)


if __name__ == "__main__":
    main()
