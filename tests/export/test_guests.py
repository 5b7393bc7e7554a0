# SPDX-License-Identifier: Apache-2.0
"""Guests over vhost-user against a real server: what stops a ring waits for what is under way, and nothing else does; nothing is left over.

Most tests serve a file or a held-back device through the pass-through backend, so that they say when the device answers.
"""

from __future__ import annotations

import os
import select
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from guest_model import DISCARD, FLUSH, GET_ID, IN, IOERR, OK, OUT, WRITE_ZEROES, Memory, ranges
from held_back import HeldBack, held_back_device
from nbd_client import Client
from nbd_running import Disks, Running
from vhost_client import FEATURES, PROTOCOL, FrontEnd, Refused

from devtools._passthrough import PassThrough
from fvd.export._nbd import COMMAND_READ, COMMAND_WRITE
from fvd.export.server import NbdServer, Unix
from fvd.virtio.messages import Ask, Feature, Protocol

pytestmark = pytest.mark.release_only

MIB = 1 << 20
PATIENCE_SECONDS = 20
A_MOMENT_SECONDS = 0.15  # in which what must not happen would
ALL = Protocol.RESET_DEVICE | Protocol.STATUS | Protocol.CONFIGURE_MEM_SLOTS | Protocol.INFLIGHT_SHMFD | Protocol.LOG_SHMFD | PROTOCOL


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def mappings() -> int:
    """Of guests' memory, in this process: the server is in it too."""
    with Path("/proc/self/maps").open() as maps:
        return sum("memfd:guest" in line or "memfd:fvd-in-flight" in line for line in maps)


def descriptors() -> set[int]:
    return {int(path.name) for path in Path("/proc/self/fd").iterdir()}


def read(client: Client, offset_bytes: int, length: int) -> bytes:
    reply = client.call(COMMAND_READ, offset_bytes, length)
    assert reply.error == 0
    return reply.data


class Port:
    """A server of one disk, and its socket for guests."""

    def __init__(self, running: Running, path: Path) -> None:
        self.running, self.path = running, path
        self._front_ends: list[FrontEnd] = []

    @property
    def server(self) -> NbdServer:
        return self.running.server

    def front_end(self, memory: Memory | None = None) -> FrontEnd:
        self._front_ends.append(FrontEnd(self.path, memory=memory))
        return self._front_ends[-1]

    def guest(self, *, rings: int = 1, features: int = FEATURES, protocol: int = PROTOCOL, memory: Memory | None = None) -> FrontEnd:
        return self.front_end(memory).begin(rings=rings, features=features, protocol=protocol)

    def close(self) -> None:
        for front_end in self._front_ends:
            front_end.close()


def add_port(disks: Disks, running: Running, name: str = "", queues: int = 4) -> Port:
    path = disks.folder / f"guest-{name}.sock"
    running.server.add_guest_port(name, Unix(str(path)), queues)
    return Port(running, path)


@pytest.fixture
def port(disks: Disks) -> Iterator[Port]:
    port = add_port(disks, disks.serve())
    yield port
    port.close()


@pytest.fixture
def engine_port(disks: Disks) -> Iterator[Port]:
    """Of a real disk."""
    engine, storage = disks.engine(64 * MIB, 32)
    port = add_port(disks, disks.serve(64 * MIB, backend=engine, storage=storage))
    yield port
    port.close()


@pytest.fixture
def held(disks: Disks, tmp_path: Path) -> Iterator[tuple[Port, HeldBack]]:
    """A device that answers when it is told to."""
    with held_back_device(tmp_path / "held", 16 * MIB) as device:
        storage = os.open(device.device, os.O_RDWR | os.O_DIRECT)
        port = add_port(disks, disks.serve(16 * MIB, storage=storage))
        try:
            yield port, device
        finally:
            device.let_pass()
            device.release()
            port.close()
            disks.running.pop().close()  # before the device goes
            os.close(storage)


# --- What a guest does --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["port", "engine_port"])
def test_a_guest_and_an_nbd_client_see_one_disk(backend: str, request: pytest.FixtureRequest) -> None:
    port: Port = request.getfixturevalue(backend)
    guest, client = port.guest(rings=4), port.running.client()
    for ring in range(4):
        data = os.urandom(8192)
        guest.do(OUT, 128 * ring + 1, data, ring=ring)
        assert read(client, 65536 * ring + 512, 8192) == data
        assert client.call(COMMAND_WRITE, 65536 * ring + 512, data=data[::-1]).error == 0
        assert guest.do(IN, 128 * ring + 1, into=8192, ring=3 - ring) == data[::-1]
        guest.do(FLUSH, ring=ring)
    guest.do(WRITE_ZEROES, 0, ranges((0, 512, 0)))
    assert read(client, 0, 262144) == bytes(262144)
    guest.do(DISCARD, 0, ranges((0, 64 * MIB // 512, 0)))
    assert guest.do(GET_ID, into=20) == bytes(20)
    counters = port.running.counters("")
    assert (counters["rings"], counters["trims"]) == (4, 1)
    assert port.server.guest_count("") == port.server.counters()["guests"] == 1


def test_what_the_device_is_like(port: Port) -> None:
    guest = port.front_end()
    assert guest.number(Ask.GET_QUEUE_NUM) == 4 and guest.number(Ask.GET_MAX_MEM_SLOTS) == 64
    config = guest.ask(Ask.GET_CONFIG, struct.pack("<III", 0, 60, 0) + bytes(60))
    assert len(config) == 72 and struct.unpack_from("<Q", config, 12) == (64 * MIB // 512,)
    guest.agree(FEATURES, ALL)
    assert guest.tell(Ask.SET_CONFIG, struct.pack("<III", 32, 1, 0) + b"\0") == 1
    assert guest.tell(Ask.SET_STATUS, struct.pack("<Q", 15)) == 0 and guest.number(Ask.GET_STATUS) == 15


def test_messages_come_in_pieces(port: Port) -> None:
    guest = port.front_end()
    for byte in struct.pack("<III", Ask.SET_FEATURES, 1, 8) + struct.pack("<Q", FEATURES) + struct.pack("<III", Ask.GET_FEATURES, 1, 0):
        guest.socket.send(bytes([byte]))
        time.sleep(0.001)
    assert guest.receive()[0] == Ask.GET_FEATURES
    guest.socket.send(struct.pack("<III", Ask.GET_QUEUE_NUM, 1, 0) * 100)  # and many in one
    assert [guest.receive()[0] for _ in range(100)] == [Ask.GET_QUEUE_NUM] * 100


def test_memory_comes_slot_by_slot(port: Port) -> None:
    guest = port.front_end()
    guest.agree(FEATURES, ALL)
    rows = [struct.pack("<QQQQQ", 0, address, size, user, offset) for address, user, size, offset in guest.memory.regions]
    for row in rows:
        assert guest.tell(Ask.ADD_MEM_REG, row, [guest.memory.fd]) == 0
    assert guest.tell(Ask.ADD_MEM_REG, rows[0], [guest.memory.fd]) == 1  # it is there already
    guest.add_ring()
    guest.do(OUT, 0, b"x" * 512)
    before = mappings()
    assert guest.tell(Ask.REM_MEM_REG, rows[3]) == 0 and mappings() == before - 1
    assert guest.tell(Ask.REM_MEM_REG, rows[2], [guest.memory.fd]) == 0 and mappings() == before - 2
    assert guest.do(IN, 0, into=512) == b"x" * 512
    guest.send(Ask.REM_MEM_REG, rows[3])
    assert guest.is_gone()


def test_several_disks_and_front_ends(disks: Disks) -> None:
    running = disks.serve(name="a")
    running.server.add_export("b", PassThrough(), storage_fd=disks.file(MIB, "b"), size_bytes=MIB)
    ports = [add_port(disks, running, name) for name in ("a", "b")]
    guests = [port.guest() for port in ports for _ in range(2)]
    for number, guest in enumerate(guests):
        guest.do(OUT, number, bytes([number + 1]) * 512)
    for number, guest in enumerate(guests):
        first = number // 2 * 2
        assert guest.do(IN, first, into=1024) == bytes([first + 1]) * 512 + bytes([first + 2]) * 512
    running.server.close_export("b")
    assert guests[2].is_gone() and guests[3].is_gone()
    guests[0].do(FLUSH)
    for port in ports:
        port.close()


def test_a_guest_without_flush_writes_through(disks: Disks) -> None:
    """Each of its writes is durable when it ends: the journal has what names its block."""
    engine, storage = disks.engine(64 * MIB, 32, cache_mode="writeback")
    port = add_port(disks, disks.serve(64 * MIB, backend=engine, storage=storage))
    metadata_bytes = os.fstat(storage).st_size - 32 * MIB
    for features, through in ((FEATURES, False), (FEATURES & ~Feature.FLUSH, True)):
        guest = port.guest(features=features)
        for kind, place in ((OUT, 0), (WRITE_ZEROES, 1)) if through else ((OUT, 2),):
            before = os.pread(storage, metadata_bytes, 0)
            sector = (4 * through + place) * MIB // 512
            guest.do(kind, sector, os.urandom(4096) if kind == OUT else ranges((sector, 8, 0)))
            assert (os.pread(storage, metadata_bytes, 0) != before) is through
    port.close()


# --- Order and rest -----------------------------------------------------------------------------------------------------------


STOPS: dict[str, Callable[[FrontEnd], Ask]] = {}


def stop(function: Callable[[FrontEnd], Ask]) -> Callable[[FrontEnd], Ask]:
    STOPS[function.__name__] = function
    return function


@stop
def get_vring_base(guest: FrontEnd) -> Ask:
    guest.send(Ask.GET_VRING_BASE, struct.pack("<II", 0, 0))
    return Ask.GET_VRING_BASE


@stop
def set_mem_table(guest: FrontEnd) -> Ask:
    guest.send(Ask.SET_MEM_TABLE, guest.table(), [guest.memory.fd] * 4, 9)
    return Ask.SET_MEM_TABLE


@stop
def rem_mem_reg(guest: FrontEnd) -> Ask:
    address, user, size, offset = guest.memory.regions[3]
    guest.send(Ask.REM_MEM_REG, struct.pack("<QQQQQ", 0, address, size, user, offset), flags=9)
    return Ask.REM_MEM_REG


@stop
def reset_device(guest: FrontEnd) -> Ask:
    guest.send(Ask.RESET_DEVICE, flags=9)
    return Ask.RESET_DEVICE


@stop
def set_status_0(guest: FrontEnd) -> Ask:
    guest.send(Ask.SET_STATUS, struct.pack("<Q", 0), flags=9)
    return Ask.SET_STATUS


@stop
def disable(guest: FrontEnd) -> Ask:
    guest.send(Ask.SET_VRING_ENABLE, struct.pack("<II", 0, 0), flags=9)
    return Ask.SET_VRING_ENABLE


@stop
def another_size(guest: FrontEnd) -> Ask:
    guest.send(Ask.SET_VRING_NUM, struct.pack("<II", 0, 32), flags=9)
    return Ask.SET_VRING_NUM


@stop
def another_log(guest: FrontEnd) -> Ask:
    guest.send(Ask.SET_LOG_BASE, struct.pack("<QQ", 4096, 0), [guest.memory.fd])
    return Ask.SET_LOG_BASE


@pytest.mark.parametrize("way", STOPS)
def test_what_stops_a_ring_is_answered_when_nothing_is_under_way(held: tuple[Port, HeldBack], way: str) -> None:
    port, device = held
    guest, other = port.guest(protocol=ALL), port.guest()
    mapped = mappings()
    device.hold()
    requests = [guest.request(OUT, 64 * number, bytes([number + 1]) * 4096) for number in range(3)]
    until(lambda: device.held() == 3)
    ask = STOPS[way](guest)
    _, _, late_status = guest.request(OUT, 8, b"9" * 512)  # nothing more is taken
    assert not guest.is_answered(A_MOMENT_SECONDS)
    assert mappings() == mapped + (4 if way == "set_mem_table" else 0), "nothing is unmapped before"
    assert not guest.rings[0].take_used()
    assert other.do(IN, 800, into=512) == bytes(512)  # another front end does not wait
    device.let_pass()
    device.release()
    answered, content, _ = guest.receive()
    assert answered == ask
    assert sorted(head for head, _ in guest.rings[0].take_used())[:3] == sorted(head for head, _, _ in requests)  # told before
    assert [guest.memory.read(status, 1)[0] for _, _, status in requests] == [OK] * 3
    if way == "get_vring_base":
        assert content == struct.pack("<II", 0, 3)
    assert mappings() == mapped + {"rem_mem_reg": -1, "another_log": 1}.get(way, 0)
    if way in ("set_mem_table", "rem_mem_reg", "another_log"):  # it goes on by itself
        until(lambda: guest.rings[0].used_index == 4)
        assert guest.memory.read(late_status, 1)[0] == OK
        guest.rings[0].take_used()
    elif way == "disable":
        assert guest.tell(Ask.SET_VRING_ENABLE, struct.pack("<II", 0, 1)) == 0
        guest.wait_used()
    elif way != "another_size":
        guest.start_ring(0)
        guest.wait_used()
    if way != "another_size":
        assert guest.memory.read(late_status, 1)[0] == OK
        assert guest.do(IN, 0, into=512) == b"\1" * 512


@pytest.mark.parametrize("ends", ["closes", "lies"])
def test_a_front_end_that_goes_leaves_its_memory_when_nothing_is_under_way(held: tuple[Port, HeldBack], ends: str) -> None:
    port, device = held
    before, fds = mappings(), len(descriptors())
    guest = port.guest()
    client = port.running.client()
    device.hold_reads()
    requests = [guest.request(IN, 64 * number, into=4096) for number in range(3)]
    until(lambda: device.held() == 3)
    mapped = mappings()
    if ends == "closes":
        guest.socket.close()
        until(lambda: port.server.guest_count("") == 0)
    else:
        guest.send(99)
        assert guest.is_gone()
    time.sleep(A_MOMENT_SECONDS)
    assert mappings() == mapped
    device.let_pass()
    device.release()
    until(lambda: mappings() == mapped - 4)
    assert guest.rings[0].used_index == 0 and {guest.memory.read(status, 1) for _, _, status in requests} == {b"\xff"}
    assert read(client, 0, 512) == bytes(512)
    client.socket.close()
    guest.close()
    until(lambda: (mappings(), len(descriptors())) == (before, fds))


def test_no_more_front_ends_than_there_may_be_hold_what_is_under_way(held: tuple[Port, HeldBack]) -> None:
    port, device = held
    device.hold_reads()
    for number in range(8):
        guest = port.guest()
        guest.request(IN, 64 * number, into=512)
        until(lambda wanted=number + 1: device.held() == wanted)  # type: ignore[misc]
        guest.socket.close()
        until(lambda: port.server.guest_count("") == 0)
    with pytest.raises(Refused):
        port.front_end().number(Ask.GET_FEATURES)
    device.let_pass()
    device.release()
    until(lambda: mappings() == 9)  # the guests' own
    port.guest().do(IN, 0, into=512)


def test_a_server_that_stops_answers_what_is_under_way(held: tuple[Port, HeldBack]) -> None:
    port, device = held
    guest = port.guest()
    device.hold()
    _, _, status = guest.request(OUT, 0, b"x" * 512)
    until(lambda: device.held() == 1)
    stopping = threading.Thread(target=port.server.stop)
    stopping.start()
    time.sleep(A_MOMENT_SECONDS)
    assert stopping.is_alive()
    device.let_pass()
    device.release()
    stopping.join(PATIENCE_SECONDS)
    assert guest.is_gone() and guest.memory.read(status, 1)[0] == OK and len(guest.rings[0].take_used()) == 1
    assert mappings() == 1


def test_writes_that_wait_for_storage_do_not_keep_a_ring(disks: Disks) -> None:
    """A guest that is stopped must not wait for an administrator: they stay in flight, or fail where nobody keeps that."""
    engine, storage = disks.engine(64 * MIB, 1)
    port = add_port(disks, disks.serve(64 * MIB, backend=engine, storage=storage))
    guest = port.guest()
    guest.do(OUT, 0, bytes(512))
    _, _, status = guest.request(OUT, 4 * MIB // 512, b"y" * 512)
    time.sleep(A_MOMENT_SECONDS)
    assert not guest.rings[0].take_used()
    assert guest.ask(Ask.GET_VRING_BASE, struct.pack("<II", 0, 0)) == struct.pack("<II", 0, 2)
    assert guest.memory.read(status, 1)[0] == IOERR
    port.close()


def test_nothing_is_left_over(port: Port) -> None:
    """Of messages with descriptors, good and bad, of tables that are replaced, and of front ends that come and go."""

    def life(number: int) -> None:
        guest = port.guest(protocol=ALL, rings=2)
        guest.do(OUT, 0, bytes(512))
        assert guest.share_memory() == 0
        guest.send(Ask.GET_INFLIGHT_FD, struct.pack("<QQHH", 0, 0, 2, 64))
        _, area, (fd,) = guest.receive()
        for _ in range(3):
            assert guest.tell(Ask.SET_INFLIGHT_FD, area, [fd]) == 0
            guest.tell(Ask.SET_LOG_FD, b"", [guest.calls[0]])
            guest.tell(Ask.SET_BACKEND_REQ_FD, b"", [guest.calls[0]])
            guest.tell(Ask.SET_VRING_ERR, struct.pack("<Q", 0), [guest.calls[0]])
            guest.tell(Ask.SET_VRING_CALL, struct.pack("<Q", 1), [guest.calls[0]])
            guest.tell(Ask.SET_VRING_KICK, struct.pack("<Q", 1), [guest.kicks[1]])
        os.close(fd)
        guest.do(IN, 0, into=512)
        if number % 3 == 1:
            guest.send(Ask.SET_OWNER, b"", [guest.memory.fd] * 3)
        elif number % 3 == 2:
            guest.socket.send(struct.pack("<III", Ask.SET_MEM_TABLE, 1, 8)[:7])
            guest.send(0, b"", [guest.memory.fd])
        guest.close()
        until(lambda: port.server.guest_count("") == 0 and port.running.counters("")["rings"] == 0)

    life(0)
    before = mappings(), descriptors()
    for number in range(1, 10):
        life(number)
    until(lambda: (mappings(), descriptors()) == before)


def test_a_guest_is_called_by_another_descriptor_from_then_on(port: Port) -> None:
    guest = port.guest()
    guest.do(FLUSH)
    fresh = os.eventfd(0, os.EFD_NONBLOCK)
    guest.tell(Ask.SET_VRING_CALL, struct.pack("<Q", 0), [fresh])
    assert select.select([fresh], [], [], PATIENCE_SECONDS)[0], "what it may have missed in between"
    os.close(guest.calls[0])
    guest.calls[0] = fresh
    guest.do(FLUSH)
    guest.tell(Ask.SET_VRING_CALL, struct.pack("<Q", 0x100))
    guest.request(FLUSH)
    until(lambda: guest.rings[0].used_index == 3)
