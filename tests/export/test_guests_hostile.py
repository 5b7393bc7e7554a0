# SPDX-License-Identifier: Apache-2.0
"""Front ends and guests that mean harm, against a real server: theirs is the connection that ends. Another front end and an NBD client of
the same disk go on, and so does whoever comes later."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from guest_model import FLUSH, IN, OUT, WRITE_ZEROES, Memory, ranges
from nbd_running import Disks
from test_guests import ALL, MIB, Port, add_port, descriptors, mappings, read, until
from vhost_client import FrontEnd, Refused

from fvd.export._nbd import COMMAND_FLUSH, COMMAND_WRITE
from fvd.virtio.messages import Ask

pytestmark = pytest.mark.release_only

TOP = 2**64


@pytest.fixture(params=["io_uring", "blocking"])
def port(request: pytest.FixtureRequest, disks: Disks) -> Iterator[Port]:
    engine, storage = disks.engine(64 * MIB, 64)
    port = add_port(disks, disks.serve(64 * MIB, backend=engine, storage=storage, force_blocking=request.param == "blocking"))
    yield port
    port.close()


def others_go_on(port: Port, bystander: FrontEnd) -> None:
    """One that was there, one that comes now, and a client of NBD: they read and write, and what they flush is kept."""
    client = port.running.client()
    data = os.urandom(4096)
    bystander.do(OUT, 60 * MIB // 512, data)
    bystander.do(FLUSH)
    assert read(client, 60 * MIB, 4096) == data
    assert client.call(COMMAND_WRITE, 61 * MIB, data=data).error == 0 and client.call(COMMAND_FLUSH).error == 0
    later = port.guest()
    assert later.do(IN, 61 * MIB // 512, into=4096) == data
    later.close()
    client.socket.close()


# --- Messages -----------------------------------------------------------------------------------------------------------------


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def region(guest: FrontEnd, *, at: int = 0, user: int = 0, size: int = 4096, offset: int = 0) -> bytes:
    return struct.pack("<QQQQQ", 0, at, size, user, offset)


LIES: list[tuple[str, Callable[[FrontEnd], None]]] = [
    ("features", lambda guest: guest.send(Ask.SET_FEATURES, u64(1 << 63))),
    ("protocol", lambda guest: guest.send(Ask.SET_PROTOCOL_FEATURES, u64(1 << 2))),
    ("unknown", lambda guest: guest.send(77)),
    ("version", lambda guest: guest.send(Ask.GET_FEATURES, flags=2)),
    ("reply", lambda guest: guest.send(Ask.GET_FEATURES, flags=5)),
    ("long", lambda guest: guest.send(Ask.SET_OWNER, bytes(5000))),
    ("ring", lambda guest: guest.send(Ask.SET_VRING_NUM, struct.pack("<II", 4, 8))),
    ("kick of no ring", lambda guest: guest.send(Ask.SET_VRING_KICK, u64(200), [guest.kicks[0]])),
    ("no kick", lambda guest: guest.send(Ask.SET_VRING_KICK, u64(0x100))),
    ("kick by a file", lambda guest: guest.send(Ask.SET_VRING_KICK, u64(0), [guest.memory.fd])),
    ("call by a file", lambda guest: guest.send(Ask.SET_VRING_CALL, u64(0), [guest.memory.fd])),
    ("kick by a socket", lambda guest: guest.send(Ask.SET_VRING_KICK, u64(0), [guest.socket.fileno()])),
    ("error by a file", lambda guest: guest.send(Ask.SET_VRING_ERR, u64(0), [guest.memory.fd])),
    ("no descriptors", lambda guest: guest.send(Ask.SET_MEM_TABLE, guest.table())),
    ("many descriptors", lambda guest: guest.send(Ask.SET_OWNER, b"", [guest.memory.fd] * 9)),
    ("very many descriptors", lambda guest: guest.send(Ask.SET_OWNER, b"", [guest.memory.fd] * 100)),
    ("size 3", lambda guest: ring_of(guest, 3)),
    ("size 2048", lambda guest: ring_of(guest, 2048)),
    ("size 2**32-1", lambda guest: ring_of(guest, 2**32 - 1)),
    ("ring elsewhere", lambda guest: guest.send(Ask.SET_VRING_ADDR, struct.pack("<IIQQQQ", 0, 0, 0, 0, 0, 0))),
    ("ring at the top", lambda guest: guest.send(Ask.SET_VRING_ADDR, struct.pack("<IIQQQQ", 0, 0, TOP - 16, TOP - 4, TOP - 2, 0))),
    ("memory gone", lambda guest: guest.send(Ask.SET_MEM_TABLE, struct.pack("<II", 0, 0))),
    ("region wraps", lambda guest: guest.send(Ask.ADD_MEM_REG, region(guest, at=TOP - 1), [guest.memory.fd])),
    ("region of all", lambda guest: guest.send(Ask.ADD_MEM_REG, region(guest, size=TOP - 1), [guest.memory.fd])),
    ("region beyond its file", lambda guest: guest.send(Ask.ADD_MEM_REG, region(guest, offset=1 << 40), [guest.memory.fd])),
    ("region of nothing", lambda guest: guest.send(Ask.ADD_MEM_REG, region(guest, size=0), [guest.memory.fd])),
    ("region of no memory", lambda guest: guest.send(Ask.ADD_MEM_REG, region(guest), [guest.kicks[0]])),
    ("no such region", lambda guest: guest.send(Ask.REM_MEM_REG, region(guest))),
    ("area of many", lambda guest: guest.send(Ask.GET_INFLIGHT_FD, struct.pack("<QQHH", 0, 0, 65535, 8))),
    ("area of long rings", lambda guest: guest.send(Ask.GET_INFLIGHT_FD, struct.pack("<QQHH", 0, 0, 1, 65535))),
    ("area wraps", lambda guest: area_of(guest, 2**63, 2**64 - 8)),
    ("area at an odd place", lambda guest: area_of(guest, 4096, 4)),
    ("area too small", lambda guest: area_of(guest, 64, 0)),
    ("area beyond its file", lambda guest: area_of(guest, 4096, 1 << 50)),
    ("log wraps", lambda guest: guest.send(Ask.SET_LOG_BASE, struct.pack("<QQ", TOP - 1, TOP - 1), [guest.memory.fd])),
    ("log of no memory", lambda guest: guest.send(Ask.SET_LOG_BASE, struct.pack("<QQ", 64, 0), [guest.kicks[0]])),
]


def ring_of(guest: FrontEnd, size: int) -> None:
    guest.send(Ask.SET_VRING_NUM, struct.pack("<II", 0, size))


def area_of(guest: FrontEnd, size_bytes: int, offset_bytes: int) -> None:
    guest.send(Ask.SET_INFLIGHT_FD, struct.pack("<QQHH", size_bytes, offset_bytes, 1, 64), [guest.memory.fd])


def test_a_lie_ends_the_connection_and_nothing_else(port: Port) -> None:
    bystander = port.guest()
    before = mappings(), len(descriptors())
    for name, lie in LIES:
        guest = port.guest(protocol=ALL)
        with suppress(Refused):
            lie(guest)
        if name == "memory gone":  # a guest without memory has no rings that run
            guest.request(FLUSH)
            guest.socket.shutdown(socket.SHUT_WR)
        assert guest.is_gone(), name
        guest.close()
        until(lambda: (mappings(), len(descriptors())) == before)  # eight that are on their way out would keep the next one out
    others_go_on(port, bystander)


# --- Memory -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["first writes", "writes", "odd writes", "reads", "zeroes"])
def test_memory_that_shrinks_under_requests(port: Port, kind: str) -> None:
    """The device answers EFAULT, our own loads and stores find zeros: that is the front end's fault, and not the disk's."""
    bystander = port.guest()
    bystander.do(OUT, 0, os.urandom(MIB // 4))
    bystander.do(FLUSH)
    before = mappings()
    for number in range(12):
        memory = Memory(1, 8 * MIB)
        guest = port.guest(memory=memory)
        for request in range(24):
            sector = (request * 64 if kind in ("writes", "reads") else (2 + number * 4) * MIB // 512 + request * 64) + (
                kind == "odd writes"
            )
            if kind == "reads":
                guest.request(IN, sector % 256, into=32 << 10)
            elif kind == "zeroes":
                guest.request(WRITE_ZEROES, sector, ranges((sector, 16, 0)))
            else:
                guest.request(OUT, sector % 256 if kind == "writes" else sector, b"x" * (32 << 10))
            if request == number * 2:
                os.ftruncate(memory.fd, 0 if number % 2 else 4 * MIB)
                break
        with suppress(OSError):
            os.eventfd_write(guest.kicks[0], 1)
        guest.socket.close()
        memory.close()
        until(lambda: mappings() == before)
    until(lambda: port.server.guest_count("") == 1)
    others_go_on(port, bystander)


def test_memory_of_a_front_end_that_shrinks_ends_it_at_its_next_kick(port: Port) -> None:
    bystander, guest = port.guest(), port.guest()
    guest.do(FLUSH)
    os.ftruncate(guest.memory.fd, 0)
    os.eventfd_write(guest.kicks[0], 1)
    assert guest.is_gone()
    others_go_on(port, bystander)


def test_a_broken_ring_is_told_by_its_descriptor_for_errors(port: Port) -> None:
    bystander, guest = port.guest(), port.guest()
    told = os.eventfd(0, os.EFD_NONBLOCK)
    full = os.eventfd(0, 0)
    guest.tell(Ask.SET_VRING_ERR, u64(0), [told])
    guest.rings[0].jump(1000)
    os.eventfd_write(guest.kicks[0], 1)
    assert guest.is_gone() and os.eventfd_read(told) == 1
    guest = port.guest()
    guest.tell(Ask.SET_VRING_ERR, u64(0), [full])
    os.eventfd_write(full, 2**64 - 2)  # to write to it would block
    guest.rings[0].jump(1000)
    os.eventfd_write(guest.kicks[0], 1)
    assert guest.is_gone()
    os.close(told)
    os.close(full)
    others_go_on(port, bystander)


# --- Much of it ---------------------------------------------------------------------------------------------------------------


def test_a_front_end_that_does_not_read_its_replies_is_given_up(port: Port) -> None:
    bystander, guest = port.guest(), port.front_end()
    guest.socket.setblocking(False)
    deadline = time.monotonic() + 20
    with suppress(ConnectionError):
        while time.monotonic() < deadline:
            with suppress(BlockingIOError):
                guest.socket.send(struct.pack("<III", Ask.GET_FEATURES, 1, 0) * 100)
    assert time.monotonic() < deadline
    others_go_on(port, bystander)


def test_more_connections_than_may_be(port: Port) -> None:
    bystander = port.guest()
    sockets = [socket.socket(socket.AF_UNIX) for _ in range(60)]
    for number, each in enumerate(sockets):
        each.settimeout(20)
        each.connect(str(port.path))
        if number < 7:
            each.send(struct.pack("<III", Ask.GET_FEATURES, 1, 0)[:5])  # half a message, and no more
    for each in sockets[7:]:
        with suppress(ConnectionError):
            assert each.recv(1) == b""
    assert port.server.guest_count("") == 8
    bystander.do(FLUSH)
    for each in sockets:
        each.close()
    until(lambda: port.server.guest_count("") == 1)
    others_go_on(port, bystander)


def test_a_guest_that_kicks_without_end_leaves_others_their_time(port: Port) -> None:
    bystander, guest = port.guest(), port.guest()
    began = time.monotonic()
    while time.monotonic() - began < 0.5:
        for _ in range(100):
            os.eventfd_write(guest.kicks[0], 1)
        bystander.do(OUT, 8, bytes(4096))
    others_go_on(port, bystander)


def test_a_server_that_has_no_descriptors_left_lets_guests_in_later(port: Port) -> None:
    import resource

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    waiting = socket.socket(socket.AF_UNIX)
    waiting.settimeout(20)
    spare = [os.dup(0) for _ in range(8)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(descriptors()), limit[1]))
    filled = []
    try:
        with suppress(OSError):
            while True:
                filled.append(os.dup(0))
        waiting.connect(str(port.path))
        time.sleep(0.2)
        assert port.server.guest_count("") == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        for fd in (*filled, *spare):
            os.close(fd)
    waiting.send(struct.pack("<III", Ask.GET_QUEUE_NUM, 1, 0))
    assert len(waiting.recv(20, socket.MSG_WAITALL)) == 20
    waiting.close()
