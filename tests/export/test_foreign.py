# SPDX-License-Identifier: Apache-2.0
"""The random tester for NBD servers: it finds every kind of lie, and nothing wrong with servers that tell none."""

from __future__ import annotations

import importlib
import itertools
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from lying_server import LIES, LIES_AFTER_KILL, LyingServer
from nbd_running import Disks

from fvd.errors import DeviceError, InvalidArgument, NotFound, ReadOnly, Unsupported
from fvd.sim import foreign
from fvd.sim._oracle import Violation
from fvd.sim.foreign import ForeignPlayer, HungUp, stream, torture_uri
from fvd.sim.qemu_nbd import torture_qemu

pytest.importorskip("nbd", reason="python3-libnbd is not installed")
pytestmark = pytest.mark.release_only

MIB = 1 << 20
SIZE = 4 * MIB


def test_a_seed_is_a_stream_of_requests() -> None:
    first = list(itertools.islice(stream(7, 8192, 64), 1000))
    assert first == list(itertools.islice(stream(7, 8192, 64), 1000))
    assert first != list(itertools.islice(stream(8, 8192, 64), 1000))
    for request in first:
        assert request.first_sector >= 0 < request.sectors and request.first_sector + request.sectors <= 8192
    for sectors, unit in ((1, 1), (8, 8), (136, 8), (3, 1)):
        for request in itertools.islice(stream(1, sectors, 4, unit), 300):
            assert request.first_sector % unit == request.sectors % unit == 0 < request.sectors
            assert request.first_sector + request.sectors <= sectors


# --- Those that lie ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lie", LIES)
def test_every_lie_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: str) -> None:
    monkeypatch.setattr(foreign, "ANSWER_SECONDS", 2)
    with LyingServer(tmp_path / "socket", SIZE, lie) as server, pytest.raises(Violation, match=r"seed 5, after \d+ requests"):
        torture_uri(server.uri, seed=5, requests=20_000, depth=16)


def rounds_with_kills(server: LyingServer, seed: int, rounds: int) -> ForeignPlayer:
    with ForeignPlayer(seed, depth=16) as player:
        for number in range(rounds):
            player.connect(server.uri)
            if number:
                player.judge_after_crash()
            player.play(60)
            server.kill()
            player.take_last_answers()
        return player


@pytest.mark.parametrize("lie", LIES_AFTER_KILL)
def test_every_broken_promise_is_found(tmp_path: Path, lie: str) -> None:
    with LyingServer(tmp_path / "socket", SIZE, lie) as server, pytest.raises(Violation, match="after the crash"):
        rounds_with_kills(server, 6, 100)


def test_the_honest_one_passes(tmp_path: Path) -> None:
    with LyingServer(tmp_path / "socket", SIZE) as server:
        report = torture_uri(server.uri, seed=5, requests=3000, depth=64)
        assert report.connections == 4 and report.most_in_flight == 64 and report.total_requests == 3000
        assert rounds_with_kills(server, 6, 30).report.kills == 30


# --- Those that do not -------------------------------------------------------------------------------------------------------


def test_fvd_over_any_content(disks: Disks, capsys: pytest.CaptureFixture[str]) -> None:
    """Twice with the same seed: what the first run left is not taken for the second one's."""
    rng = random.Random(1)
    engine, storage = disks.engine(16 * MIB, 16)
    running = disks.serve(16 * MIB, backend=engine, storage=storage)
    nbd = importlib.import_module("nbd")
    handle = nbd.NBD()
    handle.connect_uri(running.uri())
    handle.pwrite(rng.randbytes(MIB), 512 * 1001)
    handle.pwrite(b"same " * 200_000, 8 * MIB + 77)
    handle.shutdown()
    for _ in range(2):
        report = torture_uri(running.uri(), seed=3, requests=4000, depth=256)
        with capsys.disabled():
            print(f"\n  {report}")
    assert report.most_in_flight > 100


@pytest.mark.slow
@pytest.mark.parametrize("base", [False, True], ids=["alone", "base"])
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_qemu_nbd(tmp_path: Path, capsys: pytest.CaptureFixture[str], image_format: str, base: bool) -> None:
    """The qcow2 of QEMU 7.2 does not keep its promises when zeroes and trims meet writes: that is not what is tested here."""
    gentle = image_format != "raw"
    report = torture_qemu(image_format, seed=2, requests=3000, rounds=8, size_bytes=16 * MIB, base=base, directory=tmp_path, gentle=gentle)
    assert report.rounds == 8 and report.kills
    with capsys.disabled():
        print(f"\n  {image_format}: {report}")


# --- What cannot be tested ---------------------------------------------------------------------------------------------------


def test_refusals(tmp_path: Path, disks: Disks, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"seed": 1, "requests": 1, "rounds": 1, "size_bytes": MIB, "base": False, "directory": tmp_path}
    with pytest.raises(DeviceError, match="cannot connect"):
        torture_uri(f"nbd+unix:///?socket={tmp_path}/nobody", seed=1, requests=1, depth=1)
    with pytest.raises(ReadOnly, match="read-only"):
        torture_uri(disks.serve(MIB, read_only=True).uri(), seed=1, requests=1, depth=1)
    with pytest.raises(InvalidArgument, match="at least 1"):
        torture_uri("nbd://localhost", seed=1, requests=1, depth=0)
    with pytest.raises(InvalidArgument, match="have no base"):
        torture_qemu("vdi", **options | {"base": True})
    with pytest.raises(InvalidArgument, match="shorter path"):
        torture_qemu("raw", **options | {"directory": tmp_path / ("x" * 100)})
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(NotFound, match="qemu-utils"):
        torture_qemu("raw", **options)
    monkeypatch.setattr(importlib, "import_module", lambda name: importlib.__import__("no such module"))
    with pytest.raises(Unsupported, match="python3-libnbd"):
        torture_uri("nbd://localhost", seed=1, requests=1, depth=1)


def test_a_server_that_dies_is_told(tmp_path: Path) -> None:
    with LyingServer(tmp_path / "socket", SIZE) as server, ForeignPlayer(1) as player:
        player.connect(server.uri)
        server.hang_up()
        with pytest.raises(HungUp, match="the server hung up"):
            player.play(100)
            player.drain()
