# SPDX-License-Identifier: Apache-2.0
"""R39: of a stopped engine nothing is answered but errors, and nothing reaches its devices, at whatever moment it is stopped."""

from __future__ import annotations

import errno
import random
from dataclasses import dataclass

import pytest

from fvd.disk.engine_factory import engine_on
from fvd.disk.recovery import recover_disk
from fvd.engine._engine import Engine, Want
from fvd.sim._player import CLOSE, FLUSH, READ, TRIM, WRITE
from fvd.sim._player import ZERO as WRITE_ZEROES
from fvd.sim.bytewise import Memory
from fvd.sim.stage import Stage

KIB = 1 << 10
FUA = 1


@dataclass
class Workbench:
    engine: Engine
    memory: Memory
    operations: list[int]  # tokens under way
    open: set[int]  # cookies
    answered: list[tuple[int, int]]
    data_offset: int

    def take(self) -> None:
        for token, *_ in self.engine.take_operations():
            self.operations.append(token)
        for cookie, error in self.engine.take_done():
            self.open.remove(cookie)
            self.answered.append((cookie, error))

    def submit(self, kind: int, offset: int, length: int, flags: int = 0) -> None:
        cookie = len(self.open) + len(self.answered) + 1
        self.open.add(cookie)
        self.engine.submit_request(kind, offset, length, self.memory.address, cookie, flags)

    def complete(self, at: int, result: int = 0) -> None:
        self.engine.complete_operation(self.operations.pop(at), result)


def bench(**options: object) -> Workbench:
    """1 MiB over a base, of which storage holds two chunks of four."""
    stage = Stage(storage_chunks=2)
    disk = recover_disk(stage.node(), read_only=True)
    engine = engine_on(disk, **({"base_size_bytes": 1 << 20, "copy_on_read": True} | options))
    return Workbench(engine, Memory(512 * KIB), [], set(), [], stage.geometry.data_offset_bytes)


KINDS = (READ, READ, WRITE, WRITE, WRITE, TRIM, WRITE_ZEROES, FLUSH)


@pytest.mark.parametrize("seed", range(60))
def test_nothing_is_answered_and_nothing_is_done(seed: int) -> None:
    rng = random.Random(seed)
    it = bench(zero_chunks=bool(seed % 3 == 0))
    engine = it.engine
    if seed % 2:
        engine.prefetch_depth = 2
        engine.prefetch_plan([(0, 1 << 20)])
    clock = 0
    for _ in range(rng.randrange(10, 120)):
        if it.operations and rng.random() < 0.5:
            it.complete(rng.randrange(len(it.operations)), -errno.EIO if rng.random() < 0.02 else 0)
        elif len(it.open) < 12:
            kind = rng.choice(KINDS)
            offset = rng.randrange(0, (1 << 20) - 512 * KIB, 512) if kind != FLUSH else 0
            length = 0 if kind == FLUSH else rng.choice((512, 4096, 64 * KIB, 200 * KIB, 512 * KIB))
            it.submit(kind, offset, length, FUA if kind == WRITE and rng.random() < 0.3 else 0)
        clock += 300_000_000
        engine.advance_clock(clock)
        it.take()
    if rng.random() < 0.5 and it.operations:
        it.complete(0)  # whose answer is there and has not been taken
    before = len(it.answered)
    engine.stop()
    engine.stop()
    it.take()
    for _ in range(8):
        it.submit(rng.choice(KINDS), 0, 4096)
    it.take()
    still = list(it.operations)
    while it.operations:
        it.complete(rng.randrange(len(it.operations)))
        engine.advance_clock(clock := clock + 6_000_000_000)
        it.take()
        assert set(it.operations) <= set(still), "something was begun after the stop"
    assert not it.open and all(error == -errno.EIO for _, error in it.answered[before:]) and len(it.answered) >= before + 8
    assert engine.stopped and engine.failed_errno == errno.EIO and not engine.take_operations()
    assert engine.leaks() == {}
    it.submit(CLOSE, 0, 0)
    it.take()
    assert not it.open and it.answered[-1][1] == -errno.EIO and not engine.closed_cleanly


def test_writes_that_wait_for_storage_end() -> None:
    it = bench(base_size_bytes=None, copy_on_read=False)
    for chunk in range(4):
        it.submit(WRITE, chunk * 256 * KIB, 64 * KIB)
    it.take()
    while it.operations:
        it.complete(0)
        it.take()
    assert it.engine.waiting_writes == 2
    it.engine.stop()
    it.take()
    assert not it.open and it.engine.waiting_writes == 0


def test_it_does_not_say_that_a_flush_failed() -> None:
    """Who stops it tells why."""
    it = bench()
    it.engine.stop()
    assert it.engine.want & Want.EVENT == 0
