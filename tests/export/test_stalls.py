# SPDX-License-Identifier: Apache-2.0
"""A client that stalls in the middle of something is disconnected after a stated time; one that asks for nothing never is."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest
from nbd_client import request
from nbd_running import MIB, Disks, Running
from strangers import eventually, hung_up, is_ended, send_some, watched

from fvd.export import _nbd as nbd
from fvd.export.server import Limits

READ, WRITE, FLUSH = nbd.COMMAND_READ, nbd.COMMAND_WRITE, nbd.COMMAND_FLUSH
STALL_SECONDS = 0.5
STALLED = (1.0, 4.0)  # the loop looks four times a second

Serve = Callable[..., Running]


def ends_in_time(condition: Callable[[], bool]) -> bool:
    began = time.monotonic()
    eventually(condition)
    return time.monotonic() - began < STALLED[1]


@pytest.mark.parametrize(
    "said",
    [request(WRITE, 0, MIB)[:27], request(WRITE, 0, MIB) + bytes(MIB - 1), request(WRITE, 1 << 40, MIB) + bytes(1000)],
    ids=["half a header", "half a write", "half a write that is refused"],
)
def test_half_a_request(serve: Serve, said: bytes) -> None:
    running = serve(limits=Limits(stall_seconds=STALL_SECONDS))
    client, idle = running.client(), running.client()
    assert client.call(READ, 0, 4096).error == 0
    client.send(said)
    assert not is_ended(client)
    assert ends_in_time(lambda: is_ended(client))
    assert running.counters()["inflight_bytes"] == 0
    assert idle.call(READ, 0, 4096).error == 0


def test_replies_that_are_not_taken(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    running = serve(limits=Limits(stall_seconds=STALL_SECONDS))
    client, idle = running.client(), running.client()
    send_some(client, b"".join(request(READ, 0, MIB) for _ in range(20)))
    assert not hung_up(client)
    assert ends_in_time(lambda: hung_up(client))
    eventually(lambda: running.counters()["inflight_bytes"] == 0)
    assert idle.call(READ, 0, 4096).error == 0
    eventually(lambda: "disconnected a client that had not taken its replies, for 0.5 s" in caplog.text)


def test_replies_that_are_taken_drop_by_drop(serve: Serve) -> None:
    """A few bytes now and then keep nothing for ever."""
    running = serve(limits=Limits(stall_seconds=STALL_SECONDS))
    client = running.client()
    send_some(client, b"".join(request(READ, 0, MIB) for _ in range(20)))
    deadline = time.monotonic() + STALLED[1]
    while not hung_up(client):
        assert time.monotonic() < deadline
        client.receive(500)
        time.sleep(0.05)


def test_a_write_that_comes_drop_by_drop(serve: Serve) -> None:
    running = serve(limits=Limits(stall_seconds=STALL_SECONDS))
    client = running.client()
    client.send(request(WRITE, 0, MIB))
    deadline = time.monotonic() + STALLED[1]
    while not is_ended(client):
        assert time.monotonic() < deadline
        send_some(client, b"x")
        time.sleep(0.05)


def test_slow_and_idle_clients_are_not_ended(serve: Serve) -> None:
    """One does nothing. One sends a large write, a MiB at a time. One is never between two requests: each comes in pieces. One takes its
    replies slowly. Each is slower, in all, than a stalled client is given."""
    running = serve(limits=Limits(stall_seconds=STALL_SECONDS))
    idle, large, small, taker = (running.client() for _ in range(4))
    large.send(request(WRITE, 0, 6 * MIB))
    piece = request(WRITE, 0, 4096, data=bytes(4096))
    small.send(piece[:100])
    cookies = taker.begin_reads(10, MIB)
    for i in range(6):
        large.send(bytes(MIB))
        small.send(piece[100:] + piece[:100])
        assert len(taker.take(cookies[i]).data) == MIB
        time.sleep(0.3)
    assert all(len(taker.take(cookie).data) == MIB for cookie in cookies[6:])
    small.send(piece[100:])
    assert small.receive(7 * 16)
    for client in (idle, large, small, taker):
        assert client.call(READ, 0, 4096).error == 0 if client is not large else client.receive(16)
    assert large.call(READ, 0, 4096).error == 0


def test_a_client_that_the_server_does_not_read_is_not_ended(disks: Disks) -> None:
    """Its requests wait for storage, up to what it may have; the next stands in its socket."""
    engine, storage = disks.engine(64 * MIB, 2)
    limits = Limits(stall_seconds=STALL_SECONDS, connection_inflight_bytes=MIB, connection_waiting_bytes=64 * MIB)
    running = disks.serve(64 * MIB, backend=engine, storage=storage, limits=limits)
    client = running.client()
    assert [client.call(WRITE, i * MIB, data=bytes([i + 1]) * MIB).error for i in range(2)] == [0, 0]
    cookies = [client.begin(WRITE, (10 + i) * MIB, data=bytes(65536)) for i in range(20)]
    eventually(lambda: running.server.call(lambda: engine.waiting_writes) == 20)
    time.sleep(3 * STALL_SECONDS)
    size = engine.storage_size_bytes + 30 * MIB
    os.ftruncate(storage, size)
    running.server.call(lambda: engine.set_storage_size(size))
    assert all(client.take(cookie).error == 0 for cookie in cookies)


def test_a_server_that_was_stopped_itself_blames_nobody() -> None:
    with watched(stall_seconds=STALL_SECONDS) as server:
        client = server.client()
        client.send(request(WRITE, 0, MIB, data=bytes(1000)))
        server.process.send_signal(signal.SIGSTOP)
        time.sleep(2 * STALL_SECONDS)
        server.process.send_signal(signal.SIGCONT)
        time.sleep(0.05)
        client.send(bytes(MIB - 1000))
        assert client.receive(16)
