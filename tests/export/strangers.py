# SPDX-License-Identifier: Apache-2.0
"""Clients of several users, and a server process that is watched while they do their worst."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from nbd_client import TIMEOUT_SECONDS, Client

STRANGERS = (4001, 4002, 4003, 4004)
SERVER = Path(__file__).resolve().parent / "bounded_server.py"


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@contextlib.contextmanager
def as_user(uid: int) -> Iterator[None]:
    """The kernel notes who connects when he does."""
    if os.geteuid() != 0:
        pytest.skip("only root can connect as somebody else; CI is root")
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


@contextlib.contextmanager
def open_folder() -> Iterator[Path]:
    """One that everybody may enter: a test's own folder is not."""
    with tempfile.TemporaryDirectory(prefix="fvd-test-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


class Watched:
    """The process of bounded_server.py."""

    def __init__(self, folder: Path, **limits: float) -> None:
        self.address = str(folder / "socket")
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(SERVER), self.address, json.dumps(limits)], stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self.process.stdout is not None and self.process.stdout.readline() == "ready\n", self.log.read_text()
        eventually(lambda: Path(self.address).exists())
        self.clients: list[Client] = []
        with self.client() as first:  # what the first one needs is there from now on
            first.socket.shutdown(socket.SHUT_WR)
            assert first.ended()  # and its place is free
        self.before_bytes = self.memory_bytes()

    def client(self, uid: int = 0, **options: Any) -> Client:
        with as_user(uid) if uid else contextlib.nullcontext():
            client = Client(self.address)
        self.clients.append(client)
        return client.start(**options)

    def memory_bytes(self, what: str = "VmRSS") -> int:
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(what):
                return int(line.split()[1]) << 10
        raise AssertionError(what)

    def grown_bytes(self) -> int:
        """The most that it ever held, beyond what it had at first."""
        return self.memory_bytes("VmHWM") - self.before_bytes

    def close(self) -> str:
        """Its log."""
        for client in self.clients:
            client.socket.close()
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(TIMEOUT_SECONDS) == 0, self.log.read_text()
        self.process.stdout.close()  # type: ignore[union-attr]
        return self.log.read_text()


@contextlib.contextmanager
def watched(**limits: float) -> Iterator[Watched]:
    with open_folder() as folder:
        server = Watched(folder, **limits)
        try:
            yield server
        finally:
            if server.process.poll() is None:
                server.close()


def send_some(client: Client, data: bytes, seconds: float = 0.15) -> None:
    """As much as the server takes: it may have stopped reading, or have enough of us."""
    client.socket.settimeout(seconds)
    with contextlib.suppress(TimeoutError, BrokenPipeError, ConnectionResetError):
        client.socket.sendall(data)
    client.socket.settimeout(TIMEOUT_SECONDS)


def is_ended(client: Client) -> bool:
    """Whether the server has hung up; what it sent before is taken."""
    client.socket.settimeout(0)
    try:
        while client.socket.recv(1 << 20):
            pass
    except BlockingIOError:
        return False
    except (ConnectionResetError, BrokenPipeError):
        return True
    finally:
        with contextlib.suppress(OSError):
            client.socket.settimeout(TIMEOUT_SECONDS)
    return True


def hung_up(client: Client) -> bool:
    """... without taking anything: the kernel says so of a socket whose other end is closed."""
    import select

    poll = select.poll()
    poll.register(client.socket, select.POLLRDHUP)
    return bool(poll.poll(0))


def connects(address: str) -> bool:
    with socket.socket(socket.AF_UNIX) as one:
        return one.connect_ex(address) == 0
