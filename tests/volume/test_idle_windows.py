# SPDX-License-Identifier: Apache-2.0
"""Prefetching beside a guest that is active for ten seconds and idle for ten, on a virtual clock.

The real engine, steering and plan, over a base of limited bandwidth with a delay and a local disk, both modelled. What the figures of
docs/base.md promise is asserted here.
"""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field

import numpy as np
import pytest

from fvd.base.copying import Copying
from fvd.base.options import PrefetchOptions
from fvd.engine._engine import Engine
from fvd.format.geometry import Geometry
from fvd.format.journal import JournalState
from fvd.format.maps import empty_bitmap, empty_table
from fvd.sim.bytewise import Memory

MIB = 1 << 20
GIB = 1 << 30
SECOND = 1_000_000_000
READ, WRITE = 0, 1
TURN_NS = 250_000_000  # a loop with nothing to do still turns so often
RATE_BYTES = 100 * MIB
DELAY_NS = 5_000_000
ACTIVE_NS = IDLE_NS = 10 * SECOND
WINDOWS = 3
LOCAL_BYTES = GIB  # the beginning of the disk, which is there already
BASE_BYTES = 8 * GIB


@dataclass
class Pipe:
    """Serves one after the other at a rate; answers a delay later."""

    rate_bytes: int
    delay_ns: int
    free_ns: int = 0
    moved_bytes: int = 0

    def ends_ns(self, now_ns: int, length_bytes: int) -> int:
        self.free_ns = max(self.free_ns, now_ns) + length_bytes * SECOND // self.rate_bytes
        self.moved_bytes += length_bytes
        return self.free_ns + self.delay_ns


@dataclass
class Machine:
    """A disk, its base and its guest under one clock."""

    prefetch: bool
    looks: bool = True
    """Whether prefetching looks at what the guest does."""
    now_ns: int = 0
    events: list[tuple[int, int, str, int]] = field(default_factory=list)
    latencies_ns: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        geometry = Geometry(
            virtual_size_bytes=BASE_BYTES, block_size_bytes=64 << 10, chunk_size_bytes=MIB, journal_size_bytes=16 * MIB, grow_step_bytes=GIB
        )
        bitmap, table = np.array(empty_bitmap(geometry)), np.array(empty_table(geometry))
        bitmap[: LOCAL_BYTES // (64 << 10) // 64] = 0xFFFFFFFFFFFFFFFF
        table[: LOCAL_BYTES // MIB] = np.arange(LOCAL_BYTES // MIB, dtype=np.uint32)
        used = np.zeros(-(-geometry.chunks // 64), np.uint64)
        used[: LOCAL_BYTES // MIB // 64] = 0xFFFFFFFFFFFFFFFF
        self.engine = Engine(
            geometry,
            uuid=bytes(16),
            bitmap=bitmap,
            table=table,
            used_slots=used,
            journal_state=JournalState(
                next_sequence=2, previous=1, tail=1, map_hash=0, clean=True, dropped_commit=False, commits_replayed=0, records_replayed=0
            ),
            dirty_bitmap_pages=np.zeros(geometry.bitmap_size_bytes // 4096, np.bool_),
            dirty_table_pages=np.zeros(geometry.table_size_bytes // 4096, np.bool_),
            storage_size_bytes=geometry.max_storage_size_bytes,
            base_size_bytes=BASE_BYTES,
        )
        if not self.looks:
            self.engine.prefetch_idle_ns = 0
        self.rng = random.Random(7)
        self.base, self.disk = Pipe(RATE_BYTES, DELAY_NS), Pipe(2 * GIB, 100_000)
        self.memory = Memory(64 << 10)
        self.serial = 0
        self.begun: dict[int, int] = {}
        self.copying = Copying(
            self.engine,
            volume_name="file:model",
            virtual_size_bytes=BASE_BYTES,
            base_size_bytes=BASE_BYTES,
            base_locator="/model",
            block_size_bytes=64 << 10,
            release=lambda: None,
            clock_ns=lambda: self.now_ns,
            random=random.Random(1),
        )
        if self.prefetch:
            self.copying.start(PrefetchOptions(delay_s=0))
        self.later(TURN_NS, "turn", 0)

    def later(self, at_ns: int, what: str, key: int) -> None:
        self.serial += 1
        heapq.heappush(self.events, (at_ns, self.serial, what, key))

    def active(self) -> bool:
        return self.now_ns % (ACTIVE_NS + IDLE_NS) < ACTIVE_NS

    def request(self) -> None:
        """Mostly to what is local; a tenth reads the base anywhere."""
        self.serial += 1
        place = self.rng.randrange(BASE_BYTES // 4096) if self.rng.random() < 0.1 else self.rng.randrange(LOCAL_BYTES // 4096)
        kind = READ if place >= LOCAL_BYTES // 4096 or self.rng.random() < 0.5 else WRITE
        self.begun[self.serial] = self.now_ns
        self.engine.submit_request(kind, place * 4096, 4096, self.memory.address, self.serial)

    def settle(self) -> None:
        """Everything that follows at this moment."""
        self.engine.advance_clock(self.now_ns)
        if self.engine.want:
            self.copying.on_want(self.engine.want)
            self.engine.advance_clock(self.now_ns)
        while operations := self.engine.take_operations():
            for token, kind, target, _offset, length, _buffer, _durable in operations:
                pipe = self.base if target else self.disk
                self.later(pipe.ends_ns(self.now_ns, length if kind in (READ, WRITE) else 0), "end", token)
            self.engine.advance_clock(self.now_ns)
        for cookie, error in self.engine.take_done():
            assert error == 0
            self.latencies_ns.append(self.now_ns - self.begun.pop(cookie))
            self.later(self.now_ns + 1_000_000, "request", 0)  # the guest thinks

    def play(self, guest: bool) -> None:
        if guest:
            for _ in range(4):
                self.later(0, "request", 0)
        while self.now_ns < WINDOWS * (ACTIVE_NS + IDLE_NS):
            self.now_ns, _, what, key = heapq.heappop(self.events)
            self.engine.advance_clock(self.now_ns)
            if what == "end":
                self.engine.complete_operation(key, 0)
            elif what == "turn":
                self.later(self.now_ns + TURN_NS, "turn", 0)
            elif self.active():
                self.request()
            else:
                self.later((self.now_ns // (ACTIVE_NS + IDLE_NS) + 1) * (ACTIVE_NS + IDLE_NS), "request", 0)
            self.settle()


@pytest.fixture(scope="module")
def machines() -> tuple[Machine, Machine]:
    with_it, without = Machine(prefetch=True), Machine(prefetch=False)
    with_it.play(guest=True)
    without.play(guest=True)
    return with_it, without


def percentile_99_ns(machine: Machine) -> float:
    return float(np.percentile(machine.latencies_ns, 99))


def test_an_active_guest_hardly_notices(machines: tuple[Machine, Machine]) -> None:
    with_it, without = machines
    assert len(without.latencies_ns) > 10_000
    ratio = percentile_99_ns(with_it) / percentile_99_ns(without)
    print(f"99th percentile with prefetching / without: {ratio:.3f}")
    assert ratio <= 1.25


def test_idle_windows_are_used(machines: tuple[Machine, Machine]) -> None:
    with_it, without = machines
    share = with_it.engine.copy_counters()["base_read_bytes"] / (RATE_BYTES * WINDOWS * IDLE_NS / SECOND)
    print(f"of the base's bandwidth in idle windows: {share:.3f}")
    assert share >= 0.8
    assert without.engine.copy_counters()["base_read_bytes"] == 0


def test_the_figure_is_no_matter_of_course(machines: tuple[Machine, Machine]) -> None:
    """Were copies begun whatever the guest does, it would notice: this model can tell."""
    careless = Machine(prefetch=True, looks=False)
    careless.play(guest=True)
    ratio = percentile_99_ns(careless) / percentile_99_ns(machines[1])
    print(f"99th percentile with careless prefetching / without: {ratio:.3f}")
    assert ratio > 1.25
