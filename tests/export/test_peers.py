# SPDX-License-Identifier: Apache-2.0
"""Who takes all the places, and who still finds one: by user on Unix sockets, by address on TCP. Clients that vanish without a word."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable

import pytest
from nbd_client import Client
from nbd_running import MIB, Disks, Running
from strangers import STRANGERS, as_user, connects, eventually, open_folder, watched

from fvd.export import _nbd as nbd
from fvd.export import peers
from fvd.export.server import Limits, Tcp, Unix

READ = nbd.COMMAND_READ
TCP_REPAIR = 19

Serve = Callable[..., Running]


def refused(make: Callable[[], Client]) -> bool:
    """Turned away before a word."""
    client = make()
    try:
        return client.ended()
    finally:
        client.socket.close()


def test_one_user_cannot_lock_everybody_out() -> None:
    with watched(connections=32, peer_connections=10) as server:
        clients = [server.client(STRANGERS[0]) for _ in range(10)]
        with as_user(STRANGERS[0]):
            assert refused(lambda: Client(server.address))
        others = [server.client(uid) for uid in (STRANGERS[1], 0)]
        assert all(client.call(READ, 0, 4096).error == 0 for client in (*clients, *others))
        clients[0].socket.close()
        eventually(lambda: is_served(STRANGERS[0], server.address))
        log = server.close()
        assert f"turned a client away: user {STRANGERS[0]} has 10 connections, which is all that one may have" in log


def is_served(uid: int, address: str) -> bool:
    with as_user(uid):
        return not refused(lambda: Client(address))


def test_places_are_kept_for_root_and_the_owner() -> None:
    with watched(connections=32, kept_connections=8, peer_connections=10) as server:
        clients = [server.client(uid) for uid in STRANGERS[:3] for _ in range(8)]
        with as_user(STRANGERS[3]):
            assert refused(lambda: Client(server.address))
        clients += [server.client() for _ in range(8)]
        assert refused(lambda: Client(server.address))
        assert all(client.call(READ, 0, 4096).error == 0 for client in clients)
        log = server.close()
        assert "24 are connected, and 8 places are kept for root and this server's owner" in log
        assert "32 are connected, which is all that may be" in log


def test_handshakes_count_too() -> None:
    """Of who says nothing at all."""
    with watched(peer_connections=3) as server:
        with as_user(STRANGERS[0]):
            silent = [Client(server.address) for _ in range(3)]
            assert all(client.receive(18) for client in silent)
            assert refused(lambda: Client(server.address))
        assert server.client().call(READ, 0, 4096).error == 0
        for client in silent:
            client.socket.close()


def test_who_owns_the_server_has_a_place(disks: Disks) -> None:
    """Whoever that is: not only root."""
    owner, stranger = STRANGERS[:2]
    storage = disks.file(MIB)
    with open_folder() as folder:
        os.chown(folder, owner, owner)
        with as_user(owner):
            limits = Limits(connections=4, kept_connections=2, peer_connections=1)
            running = disks.serve(listen=Unix(str(folder / "s"), 0o666), limits=limits, storage=storage, size_bytes=MIB)
            assert all(running.client().call(READ, 0, 4096).error == 0 for _ in range(2))
        with as_user(stranger):
            assert running.client().call(READ, 0, 4096).error == 0
            assert refused(running.connect)
        with as_user(owner):
            assert running.client().call(READ, 0, 4096).error == 0
        running.close()


class From(Client):
    """Connects from an address of one's own."""

    def __init__(self, host: str, address: tuple[str, int]) -> None:
        connect = socket.socket.connect
        try:
            socket.socket.connect = lambda one, to: (one.bind((host, 0)), connect(one, to))[1]  # type: ignore[method-assign]
            super().__init__(address)
        finally:
            socket.socket.connect = connect  # type: ignore[method-assign]


def test_one_address_cannot_lock_everybody_out(disks: Disks) -> None:
    running = disks.serve(listen=Tcp(port=0), limits=Limits(peer_connections=5))
    assert isinstance(running.address, tuple)
    clients = [From("127.0.0.2", running.address).start() for _ in range(5)]
    running.clients += clients
    assert refused(lambda: From("127.0.0.2", running.address))  # type: ignore[arg-type]
    other = From("127.0.0.3", running.address).start()
    running.clients.append(other)
    assert all(client.call(READ, 0, 4096).error == 0 for client in (*clients, other))


@pytest.mark.parametrize(
    ("one", "another", "same"),
    [
        ("10.0.0.1", "10.0.0.2", False),
        ("10.0.0.1", "::ffff:10.0.0.1", True),
        ("2001:db8::1", "2001:db8::ffff:2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%lo", "fe80::2%lo", False),
        ("::1", "127.0.0.1", False),
    ],
)
def test_which_addresses_are_one_peer(one: str, another: str, same: bool) -> None:
    assert (peers.peer_of_address(one).key == peers.peer_of_address(another).key) == same


def test_peers_by_name() -> None:
    names = ("10.0.0.1", "2001:db8::/64", "fe80::2")
    assert tuple(map(str, map(peers.peer_of_address, ("10.0.0.1", "2001:db8::5", "fe80::2")))) == names
    assert str(peers.Peer(peers.USER, 0)) == "user root (0)"
    assert all(not peers.is_privileged(peers.peer_of_address(text).key, 0) for text in ("0.0.0.0", "::"))


# --- What they make the server do and say --------------------------------------------------------------------------------------


def test_refused_clients_cost_a_few_lines(tmp_path: object) -> None:
    """As many as want to: a handful of lines and a count, and the disk is served meanwhile."""
    with watched(connections=4) as server:
        clients = [server.client() for _ in range(4)]
        tried = 0
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            tried += connects(server.address)
            if tried % 50 == 0:
                assert clients[0].call(READ, 0, 4096).error == 0
        assert tried >= 200
        for client in clients:
            client.socket.close()
        log = server.close()
        lines = [line for line in log.splitlines() if "turned a client away" in line]
        assert 2 <= len(lines) <= 6 and "more like it" in lines[-1]


def test_bad_handshakes_cost_a_few_lines() -> None:
    with watched() as server:
        for i in range(80):
            with Client(server.address) as client:
                client.greet(1 << 20 if i % 2 else 3)
                with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                    client.send(b"GET / HTTP/1.0\r\n\r\n")
                    assert client.ended()
        log = server.close()
        lines = [line for line in log.splitlines() if "handshake" in line]
        assert 2 <= len(lines) <= 6 and "more like it" in lines[-1]


def test_clients_that_send_no_requests_cost_a_few_lines() -> None:
    with watched() as server:
        for _ in range(60):
            client = server.client()
            client.send(bytes(28))
            assert client.ended()
        log = server.close()
        assert 2 <= sum("what is no request" in line for line in log.splitlines()) <= 6


def test_coming_and_going_does_not_take_the_disk_its_time(serve: Serve) -> None:
    """Who connects and leaves as fast as possible is let in so many times a second."""
    running = serve()
    good = running.client()
    address = str(running.address)
    stop = threading.Event()

    def come_and_go() -> None:
        while not stop.is_set():
            connects(address)

    before = running.counters()
    threads = [threading.Thread(target=come_and_go) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        began = time.monotonic()
        while time.monotonic() - began < 1.0:
            assert good.call(READ, 0, 4096).error == 0
        latecomer = None
        while latecomer is None:  # the queue may be full just then
            assert time.monotonic() - began < 1.0 + 5
            with contextlib.suppress(BlockingIOError):
                latecomer = running.client()
        assert latecomer.call(READ, 0, 4096).error == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert before["turned_away"] == running.counters()["turned_away"] == 0


# --- Clients that vanish without a word -----------------------------------------------------------------------------------------


def test_keepalive_is_set_for_minutes() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as client:
        accepted, _ = listener.accept()
        with accepted:
            peers.tune(accepted, 0)

            def asked(level: int, name: int) -> int:
                return accepted.getsockopt(level, name)

            assert asked(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            idle, interval, count = (
                asked(socket.IPPROTO_TCP, name) for name in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            )
            assert 30 <= idle + interval * count <= 180
            assert asked(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 1000 * (idle + interval * count)
        client.close()


def test_a_client_that_vanished_is_ended(disks: Disks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its socket is closed without a packet; nothing was under way. Nobody would ever have told."""
    if os.geteuid() != 0:
        pytest.skip("only root can close a socket without a packet; CI is root")
    monkeypatch.setattr(peers, "_KEEPALIVE_IDLE_SECONDS", 1)
    monkeypatch.setattr(peers, "_KEEPALIVE_INTERVAL_SECONDS", 1)
    running = disks.serve(listen=Tcp(port=0))
    gone, stays = running.client(), running.client()
    try:
        gone.socket.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    except OSError as error:
        pytest.skip(f"this kernel cannot (TCP_REPAIR: {error.strerror})")
    gone.socket.close()
    eventually(lambda: running.counters()["connections"] == 1)
    assert stays.call(READ, 0, 4096).error == 0


def test_what_the_kernel_keeps_for_many_is_bounded() -> None:
    """A megabyte of sent replies for each of the first connections; the system's default for the others."""
    sizes = []
    for connections in (0, 1000):
        one, other = socket.socketpair()
        with one, other:
            peers.tune(one, connections)
            sizes.append(one.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF))
    assert sizes[0] >= sizes[1]
    if os.geteuid() == 0:
        assert sizes[0] >= 1 << 20


def test_the_user_is_the_kernels_word(disks: Disks) -> None:
    with open_folder() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "s"))
        (folder / "s").chmod(0o666)
        listener.listen()
        with as_user(STRANGERS[2]), socket.socket(socket.AF_UNIX) as client:
            client.connect(str(folder / "s"))
        accepted, _ = listener.accept()
        with accepted:
            assert peers.peer_of(accepted) == peers.Peer(peers.USER, STRANGERS[2])
