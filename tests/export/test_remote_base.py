# SPDX-License-Identifier: Apache-2.0
"""The server over a real engine whose base is behind NBD."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from nbd_base import Nbdkit, OddServer, until
from nbd_client import NbdError
from nbd_running import MIB, Disks, Running

from fvd.device._remote import Remote
from fvd.errors import Conflict, NotFound
from fvd.export import _nbd as nbd

READ, WRITE, FLUSH = nbd.COMMAND_READ, nbd.COMMAND_WRITE, nbd.COMMAND_FLUSH
SIZE = 32 * MIB
BASE = random.Random(3).randbytes(SIZE // 2)


class Served:
    """A disk of 32 MiB over a base of 16 MiB at `uri`, served."""

    def __init__(self, disks: Disks, uri: str, blocking: bool, **options: float) -> None:
        self.remote = Remote(uri=uri, name="vol", **options)  # type: ignore[arg-type]
        self.remote.open()
        engine, storage = disks.engine(SIZE, 40, base_size_bytes=self.remote.size_bytes)
        self.engine = engine
        self.running: Running = disks.serve(SIZE, backend=engine, storage=storage, force_blocking=blocking, remote=self.remote)


@pytest.fixture(params=["io_uring", "blocking"])
def blocking(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "blocking")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "base.img"
    path.write_bytes(BASE)
    return path


@pytest.fixture
def base(tmp_path: Path, image: Path, request: pytest.FixtureRequest) -> Iterator[Nbdkit]:
    server = Nbdkit(tmp_path, "--filter=delay", "file", image, f"rdelay={getattr(request, 'param', 0)}")
    yield server
    server.kill()


def test_guests_read_through_it(disks: Disks, base: Nbdkit, blocking: bool) -> None:
    served = Served(disks, base.uri, blocking)
    clients = [served.running.client() for _ in range(3)]
    image = bytearray(BASE + bytes(SIZE - len(BASE)))
    rng = random.Random(4)
    for _ in range(150):
        size = rng.choice([512, 100, 4096, 65536, 65537, 1_500_000])
        offset = rng.randrange(SIZE - size)
        if rng.random() < 0.4:
            data = rng.randbytes(size)
            image[offset : offset + size] = data
            assert rng.choice(clients).call(WRITE, offset, data=data).error == 0
        else:
            assert rng.choice(clients).call(READ, offset, size).data == image[offset : offset + size]
    ranges = [(rng.randrange(SIZE - 4 * MIB), 4 * MIB) for _ in range(16)]
    begun = [(clients[i % 3], clients[i % 3].begin(READ, offset, size)) for i, (offset, size) in enumerate(ranges)]
    for (client, cookie), (offset, size) in zip(begun, ranges, strict=True):
        assert client.take(cookie).data == image[offset : offset + size]
    served.running.server.close_export("")
    served.remote.close()
    assert served.engine.clean and served.engine.leaks() == {}


def test_it_goes_and_comes_back(disks: Disks, base: Nbdkit, blocking: bool) -> None:
    served = Served(disks, base.uri, blocking)
    client = served.running.client()
    assert client.call(READ, 0, 4096).data == BASE[:4096]
    assert client.call(WRITE, MIB, data=b"x" * 65536).error == 0
    base.kill()
    assert client.call(READ, MIB, 65536).data == b"x" * 65536  # what is here needs no base
    assert client.call(FLUSH).error == 0
    base.start()
    until(lambda: client.call(READ, 2 * MIB, 4096).data == BASE[2 * MIB : 2 * MIB + 4096])
    served.running.close()
    served.remote.close()


def test_a_request_that_is_passed_over(disks: Disks, tmp_path: Path, blocking: bool) -> None:
    """Others that came later are answered all the time: the connection is given up all the same."""
    odd = OddServer(tmp_path, "skips", 16 * MIB)
    served = Served(disks, odd.uri, blocking, timeout_seconds=3.0)
    client, other = served.running.client(), served.running.client()
    client.begin(READ, 0, 4096)
    begun = time.monotonic()
    while odd.accepted == 1 and time.monotonic() - begun < 5:
        assert other.call(READ, 8 * MIB, 4096).error in (0, NbdError.EIO)
        time.sleep(0.02)
    assert 0.9 < time.monotonic() - begun < 2.5
    served.running.close()
    served.remote.close()
    odd.close()


def test_release(disks: Disks, base: Nbdkit, blocking: bool) -> None:
    served = Served(disks, base.uri, blocking)
    client = served.running.client()
    assert client.call(READ, 0, 4096).data == BASE[:4096]
    with pytest.raises(NotFound, match="'other'"):
        served.running.server.release_base("other")
    served.running.server.release_base("")
    served.remote.close()
    assert client.call(WRITE, MIB, data=b"x" * 65536).error == 0
    assert client.call(READ, MIB, 65536).data == b"x" * 65536


@pytest.mark.parametrize("base", [1], indirect=True)
def test_release_of_what_is_in_use(disks: Disks, base: Nbdkit, blocking: bool) -> None:
    served = Served(disks, base.uri, blocking)
    client = served.running.client()
    read = client.begin(READ, 0, 4096)
    until(lambda: served.running.counters("")["open_requests"] == 1)
    with pytest.raises(Conflict, match="in flight"):
        served.running.server.release_base("")
    assert client.take(read).data == BASE[:4096]
    served.running.server.release_base("")


def test_many_disks_with_remote_bases(disks: Disks, base: Nbdkit, blocking: bool) -> None:
    """One loop, a connection each; each may be closed without the others."""
    server = disks.server(force_blocking=blocking)
    folder = disks.folder
    remotes = []
    for i in range(6):
        disks.folder = folder / str(i)  # a storage of its own
        disks.folder.mkdir()
        remote = Remote(uri=base.uri, name=f"vol{i}")
        remote.open()
        engine, storage = disks.engine(SIZE, 4, base_size_bytes=remote.size_bytes)
        server.add_export(f"disk{i}", engine, storage_fd=storage, size_bytes=SIZE, remote=remote)
        remotes.append(remote)
    running = disks.start(server)
    clients = [running.client(f"disk{i}") for i in range(6)]
    for _ in range(10):
        cookies = [client.begin(READ, i * MIB, 100_000) for i, client in enumerate(clients)]
        for i, (client, cookie) in enumerate(zip(clients, cookies, strict=True)):
            assert client.take(cookie).data == BASE[i * MIB : i * MIB + 100_000]
    for i in (0, 3):
        server.close_export(f"disk{i}")
        remotes[i].close()
    for i in (1, 2, 4, 5):
        assert clients[i].call(READ, i, 1000).data == BASE[i : i + 1000]
    running.close()
    for remote in remotes:
        remote.close()


def test_the_engine_knows_what_time_it_is(disks: Disks, blocking: bool) -> None:
    """At each request's begin and end, not only at each tick of a quarter of a second."""
    engine, storage = disks.engine(SIZE, 4)
    if not hasattr(engine, "copy_counters"):
        pytest.skip("this engine does not tell its clock")
    client = disks.serve(SIZE, backend=engine, storage=storage, force_blocking=blocking).client()
    lags = []
    for i in range(8):
        time.sleep(0.04 + 0.01 * i)
        before = time.monotonic_ns()
        assert client.call(READ, 0, 4096).error == 0
        lags.append(before - engine.copy_counters()["guest_last_ns"])
    assert sorted(lags)[4] < 2_000_000
