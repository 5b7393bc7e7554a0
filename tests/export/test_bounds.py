# SPDX-License-Identifier: Apache-2.0
"""What clients can make the server hold: never more than the stated limit, and never so much that others get nothing."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from itertools import cycle

import pytest
from nbd_client import Client, meta_context, option, request
from nbd_running import MIB, Disks, Running
from strangers import STRANGERS, eventually, send_some, watched

from fvd.export import _nbd as nbd
from fvd.export import handshake as hs
from fvd.export.server import Limits

READ, WRITE, STATUS = nbd.COMMAND_READ, nbd.COMMAND_WRITE, nbd.COMMAND_BLOCK_STATUS
TOTAL = 128 * MIB
SMALL_CONSTANT = 24 * MIB  # receive buffers, the requests themselves, Python's own

Serve = Callable[..., Running]


# --- Memory: every case fills what it can, from several users -----------------------------------------------------------------


def large_reads(client: Client) -> None:
    send_some(client, request(READ, 0, 32 * MIB) * 2)


def half_a_large_write(client: Client) -> None:
    send_some(client, request(WRITE, 0, 32 * MIB) + bytes(31 * MIB), seconds=0.3)


def small_reads(client: Client) -> None:
    send_some(client, b"".join(request(READ, 4096 * i, 4096) for i in range(6000)))


def reads_of_all_sizes(client: Client) -> None:
    send_some(client, b"".join(request(READ, 0, 4096 << i % 12) for i in range(600)))


def writes_whose_answers_are_not_taken(client: Client) -> None:
    for i in range(40):
        send_some(client, request(WRITE, i * 65536, 65536) + bytes(65536))
    send_some(client, request(WRITE, 0, MIB) + bytes(MIB - 1))


def block_status(client: Client) -> None:
    send_some(client, request(STATUS, 0, 64 * MIB) * 3000)


@pytest.mark.parametrize(
    ("fill", "clients"),
    [
        (large_reads, 64),
        (half_a_large_write, 10),
        (small_reads, 24),
        (reads_of_all_sizes, 64),
        (writes_whose_answers_are_not_taken, 24),
        (block_status, 24),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_memory_is_bounded(fill: Callable[[Client], None], clients: int) -> None:
    with watched(total_inflight_bytes=TOTAL) as server:
        users = cycle((0, *STRANGERS))
        for _ in range(clients):
            fill(server.client(next(users), structured=True, allocation=True))
        time.sleep(0.3)
        assert server.grown_bytes() <= TOTAL + SMALL_CONSTANT
        # A newcomer is served at once all the same.
        began = time.monotonic()
        assert server.client(STRANGERS[0]).call(READ, 0, 65536).error == 0
        assert time.monotonic() - began < 2


def test_memory_is_bounded_by_the_default(disks: Disks) -> None:
    """64 connections, as a stranger would have them, each with 32 MiB that it does not take, and 64 that send 31 of 32 MiB."""
    with watched() as server:
        users = cycle((0, *STRANGERS))
        for _ in range(64):
            large_reads(server.client(next(users)))
        for _ in range(8):
            half_a_large_write(server.client(next(users)))
        time.sleep(0.3)
        assert 256 * MIB <= server.grown_bytes() <= (512 + 24) * MIB


def test_what_is_given_back_is_given_back_to_the_system() -> None:
    """Buffers of one size are no use to the next: they must not stay beside those of another. Holes of every size are left on the way."""
    with watched(total_inflight_bytes=TOTAL) as server:
        for size in (4096, 65536, 16384, MIB, 32768, 131072, 8192):
            clients = [server.client(user) for user in (0, *STRANGERS) for _ in range(3)]
            for client in clients:
                send_some(client, b"".join(request(READ, 0, size) for _ in range(TOTAL // 8 // (size + 8192))), 0.05)
            assert server.grown_bytes() <= TOTAL + SMALL_CONSTANT
            for client in clients[:-2]:  # the last two stay, in between what the others leave
                client.socket.close()
        for client in server.clients:
            client.socket.close()
        eventually(lambda: server.memory_bytes() - server.before_bytes <= (64 + 24) * MIB)


def test_options_without_end_cost_nothing_for_long() -> None:
    with watched(total_inflight_bytes=TOTAL) as server:
        clients = [Client(server.address) for _ in range(64)]
        for client in clients:
            client.greet()
            send_some(client, option(hs.OPT_STRUCTURED_REPLY), 0.05)
            many = meta_context(hs.OPT_LIST_META_CONTEXT, "", [f"{i:04x}" for i in range(1500)])
            send_some(client, many * 20 + option(hs.OPT_GO, bytes(16 << 10)) * 20 + option(77, bytes(40000)), 0.02)
        assert server.client().call(READ, 0, 4096).error == 0
        assert server.grown_bytes() <= SMALL_CONSTANT
        for client in clients:
            client.socket.close()


def test_so_many_options_are_enough(serve: Serve) -> None:
    client = serve().connect()
    client.greet()
    send_some(client, option(99) * (hs.OPTIONS_MAX + 1), 2)
    for _ in range(hs.OPTIONS_MAX):
        client.receive(20)
    assert client.ended()


# --- Shares: what one holds leaves memory to the next ---------------------------------------------------------------------------


def filled(running: Running) -> None:
    """They have got what they can."""
    before = -1
    while (now := running.counters()["inflight_bytes"]) != before:
        before = now
        time.sleep(0.2)
    assert now >= 100 * MIB


def test_deep_queues_of_some_leave_memory_to_a_large_request(serve: Serve) -> None:
    """All of one user. None of the four takes a reply: what they hold they hold."""
    running = serve(limits=Limits(connections=64))
    for _ in range(4):
        slow = running.client()
        send_some(slow, b"".join(request(READ, 0, 65536) for _ in range(1500)))
    filled(running)
    good = running.client()
    began = time.monotonic()
    assert len(good.call(READ, 0, 32 * MIB).data) == 32 * MIB
    assert time.monotonic() - began < 5
    for _ in range(50):
        assert good.call(READ, 0, MIB).error == 0


def test_what_one_user_holds_leaves_half_to_the_next() -> None:
    with watched() as server:
        for _ in range(32):
            large_reads(server.client(STRANGERS[0]))
        began = time.monotonic()
        good = server.client(STRANGERS[1])
        cookies = [good.begin(READ, 0, 32 * MIB) for _ in range(2)]
        assert all(len(good.take(cookie).data) == 32 * MIB for cookie in cookies)
        assert time.monotonic() - began < 5


def test_a_large_request_gets_its_turn_among_many_small_ones(serve: Serve) -> None:
    """Eight clients with deep queues, which are emptied: memory is always in use, and never much of it free."""
    running = serve(limits=Limits(total_inflight_bytes=96 * MIB, connections=64))
    stop = threading.Event()

    def flood(client: Client) -> None:
        with contextlib.suppress(OSError, EOFError):
            waiting = [client.begin(READ, 0, MIB) for _ in range(16)]
            while not stop.is_set():
                client.take(waiting.pop(0))
                waiting.append(client.begin(READ, 0, MIB))

    threads = [threading.Thread(target=flood, args=(running.client(),)) for _ in range(8)]
    for thread in threads:
        thread.start()
    try:
        good = running.client()
        for _ in range(3):
            began = time.monotonic()
            assert len(good.call(READ, 0, 32 * MIB).data) == 32 * MIB
            assert time.monotonic() - began < 10
    finally:
        stop.set()
        for client in running.clients:
            client.socket.close()
        for thread in threads:
            thread.join()


def test_a_request_larger_than_the_limit_has_it_to_itself(serve: Serve) -> None:
    """A small limit delays; it never stops anybody for ever."""
    running = serve(limits=Limits(total_inflight_bytes=4 * MIB))
    client = running.client()
    for _ in range(3):
        assert len(client.call(READ, 0, 32 * MIB).data) == 32 * MIB
    cookies = [client.begin(READ, 0, MIB) for _ in range(8)]
    assert all(len(client.take(cookie).data) == MIB for cookie in cookies)
