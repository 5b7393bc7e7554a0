# SPDX-License-Identifier: Apache-2.0
"""Servers of bases for the tests: nbdkit with any plugin and filters, and a small one of our own that behaves oddly on purpose."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

MIB = 1 << 20


def until(what: Callable[[], object], seconds: float = 15.0) -> None:
    """Waits for something that another thread or process does."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def sparse_image(path: Path, size: int, pieces: list[tuple[int, bytes]]) -> bytes:
    """A file of zeros, holes where possible, with these pieces in it; its contents."""
    image = bytearray(size)
    with path.open("wb") as file:
        file.truncate(size)
        for at, data in pieces:
            file.seek(at)
            file.write(data)
            image[at : at + len(data)] = data
    return bytes(image)


class Nbdkit:
    """An nbdkit on a Unix socket, with arguments of choice; can be stopped, killed and started again."""

    def __init__(self, folder: Path, *arguments: str | Path, tls: bool = False) -> None:
        if shutil.which("nbdkit") is None:
            pytest.skip("no nbdkit")
        self.socket = folder / "nbdkit"
        self.arguments = [str(argument) for argument in arguments]
        self.uri = f"nbd{'s' if tls else ''}+unix:///?socket={self.socket}"
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        self.socket.unlink(missing_ok=True)
        ready = self.socket.with_suffix(".pid")  # written when it listens
        ready.unlink(missing_ok=True)
        # --exit-with-parent: whatever becomes of the test, it does not stay behind.
        self.process = subprocess.Popen(
            ["nbdkit", "--exit-with-parent", "-f", "-P", str(ready), "-U", str(self.socket), *self.arguments], stderr=subprocess.DEVNULL
        )
        until(ready.exists)

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait(10)
            self.process = None


class OddServer:
    """An NBD server in this process; simple replies. `size` bytes of zeros, and one oddity:

    "skips": never answers reads of offset 0. "babbles": answers them with what is no reply. "drips": sends a byte of their answer
    each tenth of a second. "hoards": answers nothing before it has HOARD reads. "mute": accepts and says nothing.
    """

    HOARD = 20_000

    def __init__(self, folder: Path, oddity: str, size: int = MIB) -> None:
        self.oddity, self.size = oddity, size
        self.path = folder / "odd"
        self.uri = f"nbd+unix:///?socket={self.path}"
        self.accepted = 0
        self.hoarded: list[bytes] = []
        self.sockets: list[socket.socket] = []
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.path))
        self.listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for one in (self.listener, *self.sockets):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                self.accepted += 1
                self.sockets.append(client)
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError, struct.error):
            if self.oddity != "mute":
                self._negotiate(client)
                while self._answer(client):
                    pass

    def _take(self, client: socket.socket, count: int) -> bytes:
        data = b""
        while len(data) < count and (more := client.recv(count - len(data))):
            data += more
        return data

    def _negotiate(self, client: socket.socket) -> None:
        client.sendall(struct.pack(">QQH", 0x4E42444D41474943, 0x49484156454F5054, 3))
        self._take(client, 4)
        while True:
            _magic, option, length = struct.unpack(">QII", self._take(client, 16))
            self._take(client, length)
            if option != 7:  # GO
                client.sendall(struct.pack(">QIII", 0x3E889045565A9, option, 0x80000001, 0))
                continue
            info = struct.pack(">HQH", 0, self.size, 3)
            client.sendall(struct.pack(">QIII", 0x3E889045565A9, option, 3, len(info)) + info)
            client.sendall(struct.pack(">QIII", 0x3E889045565A9, option, 1, 0))
            return

    def _answer(self, client: socket.socket) -> bool:
        _magic, _flags, kind, cookie, offset, length = struct.unpack(">IHHQQI", self._take(client, 28))
        if kind != 0:
            return False
        if offset == 0 and self.oddity == "skips":
            return True
        if offset == 0 and self.oddity == "babbles":
            client.sendall(b"no reply at all " * 8)
            return True
        reply = struct.pack(">IIQ", 0x67446698, 0, cookie) + bytes(length)
        if offset == 0 and self.oddity == "drips":
            for i in range(len(reply)):
                client.sendall(reply[i : i + 1])
                time.sleep(0.1)
            return True
        if self.oddity == "hoards":
            self.hoarded.append(reply)
            if len(self.hoarded) < self.HOARD:
                return True
            reply = b"".join(self.hoarded)
        client.sendall(reply)
        return True


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def children(pid: int | None = None) -> list[int]:
    """Processes that this one (or `pid`) has started, and that run."""
    parent = pid or os.getpid()
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rsplit(")", 1)[1].split()
            if int(fields[1]) == parent and fields[0] != "Z":
                found.append(int(path.parent.name))
    return found


def command_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    return ""
