# SPDX-License-Identifier: Apache-2.0
"""The server over a real engine: holes, block status, full storage, growth, proper close."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable

import pytest
from nbd_client import TIMEOUT_SECONDS, NbdError, request
from nbd_running import MIB, Disks, Running

from fvd.engine._engine import Engine, Want
from fvd.export import _nbd as nbd
from fvd.export.server import Limits

READ, WRITE, FLUSH, TRIM = nbd.COMMAND_READ, nbd.COMMAND_WRITE, nbd.COMMAND_FLUSH, nbd.COMMAND_TRIM
ZEROES, STATUS = nbd.COMMAND_WRITE_ZEROES, nbd.COMMAND_BLOCK_STATUS
FUA, NO_HOLE, REQ_ONE = nbd.COMMAND_FLAG_FUA, nbd.COMMAND_FLAG_NO_HOLE, nbd.COMMAND_FLAG_REQ_ONE
SIZE = 64 * MIB


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class Full(Running):
    """A disk of 64 MiB on storage of two slots of 1 MiB, both taken."""

    engine: Engine
    storage: int
    wants: list[int]

    def grow(self, chunks: int) -> None:
        size = self.engine.storage_size_bytes + chunks * MIB
        os.ftruncate(self.storage, size)
        self.server.call(lambda: self.engine.set_storage_size(size))

    def waiting(self) -> int:
        return self.server.call(lambda: self.engine.waiting_writes)


@pytest.fixture
def full(disks: Disks, request: pytest.FixtureRequest) -> Full:
    wants: list[int] = []
    engine, storage = disks.engine(SIZE, 2)
    running = disks.serve(SIZE, backend=engine, storage=storage, on_want=wants.append, limits=getattr(request, "param", None))
    running.__class__ = Full
    assert isinstance(running, Full)
    running.engine, running.storage, running.wants = engine, storage, wants
    client = running.client()
    assert [client.call(WRITE, i * MIB, data=bytes([i + 1]) * MIB).error for i in range(2)] == [0, 0]
    client.send(request_disconnect())
    return running


def request_disconnect() -> bytes:
    return request(nbd.COMMAND_DISCONNECT)


@pytest.mark.parametrize("force_blocking", [False, True])
def test_data_survive_close_and_look_right(disks: Disks, force_blocking: bool) -> None:
    engine, storage = disks.engine(SIZE, 64)
    running = disks.serve(SIZE, backend=engine, storage=storage, force_blocking=force_blocking)
    client = running.client(structured=True, allocation=True)
    rng = random.Random(1)
    image = bytearray(SIZE)
    for i in range(400):
        size = rng.choice([512, 4096, 100, 65536, 65537, 1_500_000])
        offset = rng.randrange(SIZE // 2 - size) // 512 * 512
        if i % 10 == 9:
            kind = rng.choice([ZEROES, TRIM, FLUSH])
            if kind == FLUSH:
                assert client.call(FLUSH).error == 0
            else:
                image[offset : offset + size] = bytes(size)
                assert client.call(ZEROES, offset, size, flags=rng.choice([0, FUA, NO_HOLE])).error == 0
            continue
        data = rng.randbytes(size)
        image[offset : offset + size] = data
        assert client.call(WRITE, offset, data=data, flags=rng.choice([0, 0, FUA])).error == 0
    assert client.call(READ, 0, SIZE // 2).data == image[: SIZE // 2]
    status = client.call(STATUS, 0, SIZE)
    assert sum(length for length, _ in status.extents) == SIZE and status.extents[-1][1] == nbd.STATUS_HOLE | nbd.STATUS_ZERO
    assert all(one[1] != other[1] for one, other in zip(status.extents, status.extents[1:], strict=False))
    offset = 0
    for length, flags in status.extents:
        if flags:
            assert not any(image[offset : offset + length])
        offset += length
    assert client.call(STATUS, SIZE - MIB, MIB, flags=REQ_ONE).extents == [(MIB, 3)]
    assert client.call(READ, SIZE - MIB, MIB).hole
    running.server.close_export("")
    assert client.ended() and engine.clean and engine.leaks() == {}


def test_a_write_that_waits_stops_nothing_else(full: Full) -> None:
    client = full.client()
    waits = client.begin(WRITE, 10 * MIB, data=bytes(65536))
    eventually(lambda: full.waiting() == 1)
    assert client.call(WRITE, MIB, data=b"x" * 4096).error == 0
    assert client.call(READ, MIB, 4096).data == b"x" * 4096
    assert client.call(FLUSH).error == 0
    assert waits not in client.replies
    assert full.wants == [Want.GROWTH]
    full.grow(1)
    assert client.take(waits).error == 0


@pytest.mark.parametrize("full", [Limits(connection_inflight_bytes=2 * MIB, connection_waiting_bytes=8 * MIB)], indirect=True)
@pytest.mark.parametrize(("size", "count"), [(65536, 70), (512, 600)])
def test_waiting_writes_have_a_cap_of_their_own(full: Full, size: int, count: int) -> None:
    """More than may be under way waits, and reads go on; more than may wait ends with ENOSPC."""
    client, other = full.client(), full.client()
    waits = [client.begin(WRITE, (10 + i % 50) * MIB, data=bytes(size)) for i in range(count)]
    eventually(lambda: full.waiting() == count)
    others = other.begin(WRITE, 9 * MIB, data=bytes(65536))
    assert full.counters()["inflight_bytes"] > 4 * MIB
    assert client.call(READ, 0, MIB).data == b"\1" * MIB
    assert client.call(FLUSH).error == 0
    assert not client.replies
    more = [client.begin(WRITE, (10 + i % 50) * MIB, data=bytes(size)) for i in range(count + 100)]
    assert [client.take(cookie).error for cookie in waits] == [NbdError.ENOSPC] * count
    assert full.counters()["inflight_bytes"] <= 11 * MIB
    full.grow(60)
    assert {client.take(cookie).error for cookie in more} <= {0, NbdError.ENOSPC}
    assert other.take(others).error == 0


@pytest.mark.parametrize("full", [Limits(total_inflight_bytes=16 * MIB)], indirect=True)
def test_what_waits_in_total_is_bounded(full: Full) -> None:
    clients = [full.client() for _ in range(4)]
    waits = [(client, client.begin(WRITE, (10 + i) * MIB, data=bytes(65536))) for i in range(12) for client in clients]
    eventually(lambda: full.waiting() == len(waits))
    assert clients[0].call(READ, 0, MIB).data == b"\1" * MIB  # what waits does not count as under way
    for i in range(60):
        waits += [(client, client.begin(WRITE, (10 + i) * MIB, data=bytes(65536))) for client in clients]
    assert clients[0].call(FLUSH).error == 0
    full.grow(60)
    errors = [client.take(cookie).error for client, cookie in waits]
    assert set(errors) == {0, NbdError.ENOSPC}


@pytest.mark.parametrize("goodbye", [True, False])
def test_a_client_that_leaves_takes_its_waiting_writes_along(full: Full, goodbye: bool) -> None:
    client, stays = full.client(), full.client()
    for i in range(20):
        client.begin(WRITE, (10 + i) * MIB, data=bytes(65536))
    waits = stays.begin(WRITE, 40 * MIB, data=bytes(4096))
    eventually(lambda: full.waiting() == 21)
    if goodbye:
        client.send(request_disconnect())
        assert [client.take(i).error for i in range(1, 21)] == [NbdError.ESHUTDOWN] * 20
        assert client.ended()
    else:
        client.socket.close()
    eventually(lambda: full.waiting() == 1 and full.counters()["connections"] == 1)
    full.grow(1)
    assert stays.take(waits).error == 0


def test_stop_leaves_what_waits_to_the_next_server(full: Full) -> None:
    """No answer, and above all no error: a guest would see it. A client that reconnects sends the write again."""
    client = full.client()
    client.begin(WRITE, 10 * MIB, data=bytes(65536))
    eventually(lambda: full.waiting() == 1)
    full.server.stop(TIMEOUT_SECONDS)
    assert client.ended()


def test_growth_is_asked_for_again(full: Full) -> None:
    """on_want is called once for what has not been cleared, and again after Python cleared it."""
    client = full.client()
    first = client.begin(WRITE, 10 * MIB, data=bytes(4096))
    eventually(lambda: full.wants == [Want.GROWTH])
    time.sleep(0.6)
    assert full.wants == [Want.GROWTH]

    def clear() -> None:
        full.engine.want = 0

    full.server.call(clear)
    full.grow(1)
    assert client.take(first).error == 0
    client.begin(WRITE, 20 * MIB, data=bytes(4096))
    eventually(lambda: len(full.wants) == 2)
