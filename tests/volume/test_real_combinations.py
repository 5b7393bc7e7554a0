# SPDX-License-Identifier: Apache-2.0
"""Every feature with every other, on real bases: the pairwise cover of tests/sim/test_combinations.py with files, devices, images and NBD
servers under disks in real files, and kill -9 in place of the simulated crash.

Each: 2,000 requests or more, judged byte for byte, while the disk is closed and opened again, or its server killed; then prefetching to the
end where it is on, and the same bytes without the base.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations as pairs
from pathlib import Path
from random import Random
from typing import Any, cast

import pytest
from allpairspy import AllPairs
from fvd_server import FvdServer
from nbd_base import until
from random_load import RandomLoad
from real_bases import KINDS, RealBase, contents, real_base

import fvd
from fvd.modes import CACHE_MODES, LAYOUTS
from fvd.sim.foreign import ForeignPlayer

pytest.importorskip("nbd", reason="python3-libnbd is not installed")
pytest.importorskip("fvd.device._remote", reason="libnbd is not installed")
pytestmark = [pytest.mark.release_only, pytest.mark.slow]

KIB, MIB = 1 << 10, 1 << 20
LEAST = 64
REQUESTS = 2000
THREADS = 4
ROUNDS = 5  # of a load: a reopen or a kill after each
PREFETCH_SECONDS = 60.0  # many times what the whole of a base takes

AXES: dict[str, tuple[Any, ...]] = {
    "kind": KINDS,
    "cache": CACHE_MODES,
    "block": (4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB),
    "chunk": (64 * KIB, 256 * KIB, MIB, 4 * MIB),
    "base_size": ("smaller", "equal", "larger"),
    "load": ("sequential", "threads", "killed"),
    "layout": LAYOUTS,
    "copy_on_read": (True, False),
    "prefetch": (True, False),
}


@dataclass(frozen=True)
class Combination:
    """One value of each axis."""

    kind: str
    cache: Any
    block: int
    chunk: int
    base_size: str
    load: str
    layout: Any
    copy_on_read: bool
    prefetch: bool

    def __str__(self) -> str:
        switches = [name for name in ("copy_on_read", "prefetch") if getattr(self, name)]
        sizes = f"{self.block // KIB}K-{self.chunk // KIB}K"
        return "-".join([self.kind, self.base_size, self.layout, self.cache, sizes, self.load, *switches])

    @property
    def size(self) -> int:
        """Chunks and a half, and no whole number of blocks."""
        return max(6 * MIB, 2 * self.chunk + self.chunk // 2) - 3 * 512

    @property
    def base_bytes(self) -> int:
        # What has sectors has no more and no fewer bytes than those.
        odd = 777 if self.kind in ("raw", "nbdkit") else 1024
        return {"smaller": self.size * 5 // 8 // 512 * 512 + odd, "equal": self.size, "larger": self.size + MIB - 24 * 512 + odd}[
            self.base_size
        ]

    @property
    def prefetching(self) -> fvd.PrefetchOptions | bool:
        """At once, and slow enough to be under way for as long as the load is."""
        return fvd.PrefetchOptions(delay_s=0, rate_bytes=self.size // 2) if self.prefetch else False


def possible(values: Sequence[Any]) -> bool:
    some = dict(zip(AXES, values, strict=False))
    return bool(some.get("chunk", 1 << 62) >= some.get("block", 0))


def cover() -> list[Combination]:
    """Every pair of values of two axes, and more at random up to LEAST, always the same."""
    found = [Combination(*values) for values in AllPairs([list(choices) for choices in AXES.values()], filter_func=possible)]
    rng = Random(1)
    while len(found) < LEAST:
        if possible(values := [rng.choice(choices) for choices in AXES.values()]):
            found.append(Combination(*values))
    return found


COVER = cover()


def test_the_cover_has_every_possible_pair() -> None:
    met = {(one, getattr(combination, one), other, getattr(combination, other)) for combination in COVER for one, other in pairs(AXES, 2)}
    for one, other in pairs(AXES, 2):
        for value in AXES[one]:
            for partner in AXES[other]:
                if (one, other) != ("block", "chunk") or partner >= value:
                    assert (one, value, other, partner) in met
    assert len(COVER) >= LEAST


@pytest.mark.parametrize("combination", COVER, ids=str)
def test_combination(combination: Combination, tmp_path: Path) -> None:
    seed = 1 + COVER.index(combination)
    data = contents(seed, combination.base_bytes)
    shown = data[: combination.size].ljust(combination.size, b"\0")
    with real_base(tmp_path, combination.kind, data) as base:
        volume = f"file:{tmp_path / 'disk'}"
        fvd.provision(
            volume,
            combination.size,
            base=base.name,
            base_format=cast(fvd.BaseFormat, base.format),
            truncate_base=combination.base_bytes > combination.size,
            copy_on_read=combination.copy_on_read,
            prefetch=combination.prefetch,
            layout=combination.layout,
            block_size=combination.block,
            chunk_size=combination.chunk,
            journal_size=64 * KIB,
            grow_step=max(combination.chunk, MIB),
        )
        if combination.load == "killed":
            play_killed(combination, volume, base, seed, shown, tmp_path)
        else:
            play_here(combination, volume, base, seed, shown)


# --- In this process ---------------------------------------------------------------------------------------------------------------


@contextmanager
def opened(combination: Combination, volume: str) -> Iterator[fvd.Disk]:
    """With prefetching that does not keep out of the way of the load: what meets seldom would be seldom tested."""
    with fvd.open(volume, cache=combination.cache, prefetch=combination.prefetching) as disk:
        driver = disk._thread

        def hurry() -> None:
            if driver.volume.copying is not None and combination.prefetch:
                driver.volume.copying._idle_ns = driver.volume.engine.prefetch_idle_ns = 0
                driver.volume.engine.prefetch_depth = 1

        driver.call(hurry)
        yield disk


def play_here(combination: Combination, volume: str, base: RealBase, seed: int, shown: bytes) -> None:
    load = RandomLoad(seed, shown)
    threads = THREADS if combination.load == "threads" else 1
    for number in range(ROUNDS):
        with opened(combination, volume) as disk:
            # Further with each round, so that there is something of the base left to the end.
            reach = combination.size * (number + 1) // ROUNDS
            load.play(disk, REQUESTS // ROUNDS, threads=threads, reach_bytes=reach)
        report = fvd.check(volume)
        assert report.clean and not report.errors
    assert sum(load.requests.values()) >= REQUESTS
    with fvd.open(volume, cache=combination.cache, prefetch=False) as disk:
        if combination.prefetch:
            disk.prefetch_start()
            until(lambda: disk.info().base_released, PREFETCH_SECONDS)
            assert disk.prefetch_status().state == "done"
        else:
            load.compare(disk)
    assert_at_the_end(combination, volume, base, load.compare)


def assert_at_the_end(combination: Combination, volume: str, base: RealBase, compare: Callable[[fvd.Disk], None]) -> None:
    """The disk is closed. Its base goes, and it shows what it showed, or cannot be opened where it needs it."""
    assert not fvd.check(volume).errors
    released = fvd.info(volume).base_released
    assert released or not combination.prefetch
    if not released:
        with fvd.open(volume, read_only=True) as disk:
            compare(disk)
    base.remove()
    if not released:
        # A loop device without a file is one of 0 bytes.
        with pytest.raises((fvd.NotFound, fvd.DeviceError, fvd.Conflict), match=r"base is missing|the base /|the base nbd"):
            fvd.open(volume)
        return
    for read_only in (True, False):
        with fvd.open(volume, read_only=read_only, cache=combination.cache) as disk:
            compare(disk)


# --- In one that is killed ---------------------------------------------------------------------------------------------------------


class KnowingPlayer(ForeignPlayer):
    """Knows what a disk is to show at first, and judges what a kill left by an open that writes nothing: neither makes copies."""

    def __init__(self, seed: int, shown: bytes, cache: str, look: Callable[[], bytes]) -> None:
        durable = cache in ("writethrough", "directsync")
        super().__init__(seed, depth=64, every_write_durable=durable, flush_counts=cache != "unsafe")
        self._shown: bytes | None = shown
        self._look = look

    def _read_everything(self) -> None:
        if self._shown is not None:
            self._image[:], self._shown = self._shown, None
        elif self._handles:
            super()._read_everything()
        else:
            self._image[:] = self._look()


def play_killed(combination: Combination, volume: str, base: RealBase, seed: int, shown: bytes, folder: Path) -> None:
    rng = Random(seed)

    def look() -> bytes:
        with fvd.open(volume, read_only=True) as disk:
            return disk.pread(0, disk.size)

    words = ["--cache", combination.cache]
    if combination.prefetch:
        words += ["--prefetch", "on", "--prefetch-delay", "0", "--prefetch-rate", str(combination.size // 2)]
    player = KnowingPlayer(seed, shown, combination.cache, look)
    with FvdServer(folder, volume, *words) as server, player:
        for _ in range(ROUNDS):
            player.connect(server.start())
            if combination.prefetch:
                player.play(50)
                player.drain()
                time.sleep(0.3)  # nobody asks for anything: it copies
            player.play(REQUESTS // ROUNDS)
            player.wait(rng.random() * 0.004)
            server.kill()
            player.take_last_answers()
            assert not fvd.check(volume).errors
            player.judge_after_crash()
        player.connect(server.start())
        player.verify()
        if combination.prefetch:
            fvd.prefetch_start(volume)
            until(lambda: fvd.info(volume).base_released, PREFETCH_SECONDS)
            player.verify()
        player.hang_up()
        server.stop()
    assert player.report.total_requests >= REQUESTS * 0.9  # without flushes where there are none
    assert fvd.info(volume).clean
    assert_at_the_end(combination, volume, base, lambda disk: player.compare(disk.pread(0, disk.size)))


@pytest.mark.parametrize("load", ["threads", "killed"])
def test_it_can_fail(load: str, tmp_path: Path) -> None:
    """A base with some bytes that are not what they should be is found."""
    combination = Combination("raw", "none", 64 * KIB, MIB, "equal", load, "compact", True, True)
    data = contents(1, combination.base_bytes)
    other = bytearray(data)
    for at in range(4321, len(data), 512 * KIB):  # some will be overwritten before anyone reads them
        other[at] ^= 1
    with real_base(tmp_path, "raw", bytes(other)) as base:
        volume = f"file:{tmp_path / 'disk'}"
        fvd.provision(volume, combination.size, base=base.name, base_format="raw", journal_size=64 * KIB, grow_step=MIB)
        with pytest.raises(AssertionError, match=r"not|neither|foreign"):
            if load == "killed":
                play_killed(combination, volume, base, 1, data, tmp_path)
            else:
                play_here(combination, volume, base, 1, data)
