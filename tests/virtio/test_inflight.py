# SPDX-License-Identifier: Apache-2.0
"""Requests in flight when a server dies: the next one takes again what was taken and not answered, in its order, and nothing else."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from guest_model import FLUSH, IN, OK, OUT, Memory
from ring_running import Running, inflight_of, map_memory, new_ring, ring_running

from devtools._ring_driver import RingDriver
from fvd.errors import InvalidArgument
from fvd.virtio._blk_ring import inflight_bytes
from fvd.virtio._guest_memory import Shared

SIZE = 8
# As vhost-user lays it out ("Inflight I/O tracking", split virtqueue): struct QueueRegionSplit, then struct DescStateSplit for each entry.
REGION = struct.Struct("<QHHHH")  # features, version, desc_num, last_batch_head, used_idx
STATE = struct.Struct("<B5xHQ")  # inflight, next, counter


@dataclass
class Area:
    """What the front end keeps."""

    fd: int
    shared: Shared

    def region(self) -> tuple[int, ...]:
        return REGION.unpack(os.pread(self.fd, REGION.size, 0))

    def states(self) -> list[tuple[int, int, int]]:
        return [STATE.unpack(os.pread(self.fd, STATE.size, 16 + 16 * place)) for place in range(SIZE)]

    def taken(self) -> set[int]:
        return {head for head, (is_taken, _, _) in enumerate(self.states()) if is_taken}

    def put_used(self, index: int) -> None:
        os.pwrite(self.fd, struct.pack("<H", index), 14)


@contextmanager
def served(index: int = 0) -> Iterator[tuple[Running, Area]]:
    fd, shared = inflight_of(SIZE)
    try:
        with ring_running(SIZE, index=index, inflight=shared) as running:
            running.driver.publish()
            yield running, Area(fd, shared)
    finally:
        os.close(fd)


def next_server(running: Running, area: Area) -> Running:
    """The process has gone, and with it all that was under way; memory and disk are as they were."""
    mapped = map_memory(running.memory)
    fresh = Running(running.memory, mapped, running.guest, RingDriver(new_ring(SIZE), running.disk), running.disk)
    fresh.begin(index=12345, inflight=Shared(area.fd, inflight_bytes(SIZE)))  # in-flight memory counts, not what is said
    return fresh


def test_the_layout_is_the_specifications() -> None:
    with served() as (running, area):
        assert area.region() == (0, 1, SIZE, 0, 0)
        first, _, _ = running.request(OUT, 0, bytes(512))
        second, _, _ = running.request(OUT, 1, bytes(512))
        running.driver.take()
        assert [state for state in area.states() if state[0]] == [(1, 0, 0), (1, 0, 1)] and area.taken() == {first, second}
        running.driver.end(1)
        assert area.region()[3] == second and area.taken() == {first, second}
        running.driver.publish()
        assert area.taken() == {first} and area.region()[4] == 1
        assert inflight_bytes(SIZE) % 64 == 0 and inflight_bytes(SIZE) >= REGION.size + SIZE * STATE.size


@pytest.mark.parametrize("index", [0, 2**16 - 1])
@pytest.mark.parametrize("state", ["available", "taken", "in part", "ended", "published", "half published"])
def test_a_death_in_each_state(state: str, index: int) -> None:
    with served(index) as (running, area):
        running.disk[:1024] = b"a" * 512 + b"b" * 512
        before = running.guest.used_index
        head, data, status = running.request(IN, 0, into=1024)
        if state != "available":
            running.driver.take()
        if state in ("ended", "published", "half published"):
            running.driver.end()
        if state in ("published", "half published"):
            running.driver.publish()
        if state == "half published":  # the used index is seen, and the entries are as before
            os.pwrite(area.fd, b"\1", 16 + 16 * head)
            area.put_used(before)
        if state == "ended":
            running.memory.write(status, b"\xff")
        fresh = next_server(running, area)
        fresh.driver.take()
        again = 0 if state in ("published", "half published") else 1
        assert len(fresh.driver.waiting) == again
        fresh.driver.end_all()
        assert fresh.driver.publish()
        assert running.guest.take_used() == [(head, 1025)]
        assert fresh.status(status) == OK and running.memory.read(data, 1024) == b"a" * 512 + b"b" * 512
        assert not area.taken() and area.region()[4] == running.guest.used_index
        assert fresh.request(FLUSH) and len(fresh.finish()) == 1
        fresh.mapped.close()


def test_they_are_taken_again_in_their_order_and_before_new_ones() -> None:
    with served() as (running, area):
        for sector in (5, 3, 4, 1):
            running.request(FLUSH if sector == 4 else OUT, sector, b"" if sector == 4 else bytes([sector]) * 512, indirect=True)
        running.driver.take(3)
        running.driver.end(1)  # the one of sector 3
        running.driver.publish()
        fresh = next_server(running, area)
        fresh.driver.take()
        assert [(kind, offset // 512) for kind, _, _, offset, _ in fresh.driver.waiting] == [("write", 5), ("flush", 0), ("write", 1)]
        # And once more, after a second death
        last = next_server(fresh, area)
        last.driver.take()
        assert [offset // 512 for kind, _, _, offset, _ in last.driver.waiting if kind == "write"] == [5, 1]
        for each in (fresh, last):
            each.driver.end_all()
            each.mapped.close()


def test_what_a_stop_gives_back_is_taken_again() -> None:
    """A request that waits for storage is not answered when its ring stops: it stays in flight."""
    with served() as (running, area):
        first, _, _ = running.request(OUT, 0, bytes(512))
        second, _, _ = running.request(OUT, 1, bytes(512))
        running.driver.take()
        running.driver.stop()
        running.driver.end(0, -errno.ESHUTDOWN)
        running.driver.end()
        running.driver.publish()
        assert running.ring.busy == 0 and [head for head, _ in running.guest.take_used()] == [second] and area.taken() == {first}
        running.begin(inflight=area.shared)
        running.driver.take()
        assert len(running.driver.waiting) == 1
        running.driver.end()
        running.driver.publish()
        assert [head for head, _ in running.guest.take_used()] == [first]


def test_a_front_end_that_has_gone_is_told_nothing() -> None:
    with served() as (running, area):
        head, _, status = running.request(IN, 0, into=1536)
        running.disk[:1536] = b"z" * 1536
        running.driver.take()
        running.driver.stop(silently=True)
        running.driver.end()
        assert not running.driver.publish()
        assert running.status(status) == 0xFF and running.guest.used_index == 0 and area.taken() == {head}


def test_damaged_memory_is_refused_or_served_within_bounds() -> None:
    """Each byte of it with another value: typed, or a ring that works within its guest's memory. Nothing else."""
    verdicts = set()
    with served() as (running, area):
        running.request(OUT, 1, b"1" * 512)
        running.request(IN, 2, into=512)
        running.driver.take()
        running.driver.end()
        running.driver.publish()
        good = os.pread(area.fd, 16 + 16 * SIZE, 0)
        used = running.memory.read(running.guest.used, 6 + 8 * SIZE)
        for at in range(len(good)):
            for value in {0, 1, 7, 8, 0xFF, good[at] ^ 1} - {good[at]}:
                os.pwrite(area.fd, good[:at] + bytes([value]) + good[at + 1 :], 0)
                running.memory.write(running.guest.used, used)
                try:
                    fresh = next_server(running, area)
                except InvalidArgument as error:
                    verdicts.add(str(error))
                    continue
                for _ in range(3):
                    fresh.driver.take()
                    fresh.driver.end_all()
                    fresh.driver.publish()
                assert fresh.ring.busy == 0
                verdicts.add(fresh.ring.why or "served")
                fresh.mapped.close()
        running.memory.write(running.guest.used, used)
    assert {
        "served",
        "a request has no whole header",
        "more chains are available than the ring has entries",
        "the memory of requests in flight is of another version, or of rings of another size",
        "the memory of requests in flight belongs to another ring",
    } <= verdicts


def test_memory_that_names_entries_outside_is_refused() -> None:
    with served() as (running, area):
        running.request(FLUSH)
        running.request(FLUSH)
        running.finish()
        area.put_used(0)
        os.pwrite(area.fd, struct.pack("<H", SIZE), 12)
        with pytest.raises(InvalidArgument, match="names an entry outside"):
            next_server(running, area)


def test_memory_of_another_ring_size_or_too_small_is_refused() -> None:
    fd, shared = inflight_of(1)
    memory = Memory()
    try:
        with ring_running(1024, memory=memory) as running, pytest.raises(InvalidArgument, match="too small"):
            running.begin(inflight=shared)
        os.pwrite(fd, struct.pack("<HH", 1, 4), 8)
        with ring_running(2, memory=memory) as running, pytest.raises(InvalidArgument, match="another size"):
            running.begin(inflight=shared)
    finally:
        memory.close()
        os.close(fd)
