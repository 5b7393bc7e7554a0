# SPDX-License-Identifier: Apache-2.0
"""What changes drawn by `make mutants` went unnoticed by: small things that the engine does, each seen from outside."""

from __future__ import annotations

import errno

from test_engine_stop import KIB, WRITE, bench

from fvd.engine._engine import Want
from fvd.format.geometry import Placement
from fvd.sim._device import FLUSH, Operation
from fvd.sim.stage import SECTORS_PER_BLOCK, SECTORS_PER_CHUNK, Stage

PAGE_BYTES = 4096
SECOND = 1_000_000_000


def test_every_page_of_the_ring_is_used() -> None:
    stage = Stage()
    geometry, written = stage.geometry, set[int]()
    announce = stage.device.announce

    def seen(operation: Operation) -> None:
        if operation.offset_bytes < geometry.bitmap_offset_bytes:
            written.add((operation.offset_bytes - geometry.journal_offset_bytes) // PAGE_BYTES)
        assert announce is not None
        announce(operation)

    stage.device.announce = seen
    for number in range(40):
        stage.now("trim" if number % 2 else "write", 0, SECTORS_PER_BLOCK)
        stage.now("flush")
    assert written == set(range(geometry.journal_pages))


def test_slots_go_upwards_across_a_growth() -> None:
    stage = Stage(storage_chunks=3, discard=False, placement=Placement.APPEND)
    for chunk in range(2):
        stage.now("write", chunk * SECTORS_PER_CHUNK, 8)
    stage.now("trim", 0, SECTORS_PER_CHUNK)
    stage.now("flush")  # slot 0 is free again, below where the next one is looked for
    stage.grow()
    stage.now("write", 3 * SECTORS_PER_CHUNK, 8)
    _, table = stage.engine.snapshot_maps()
    assert int(table[3]) == 2


def test_behind_the_last_slot_comes_the_first() -> None:
    stage = Stage(storage_chunks=2, discard=False, placement=Placement.APPEND)
    for chunk in range(2):
        stage.now("write", chunk * SECTORS_PER_CHUNK, 8)
    stage.now("trim", 0, SECTORS_PER_CHUNK)
    stage.now("flush")
    stage.grow()
    stage.now("write", 3 * SECTORS_PER_CHUNK, 8)
    _, table = stage.engine.snapshot_maps()
    assert int(table[3]) == 0


def test_a_plan_asks_for_steering_five_times_a_second() -> None:
    stage = Stage(base_bytes=1 << 20)
    engine = stage.engine
    engine.prefetch_depth = 0
    engine.prefetch_plan([(0, 1 << 20)])
    stage.device.advance(200_000_000)
    stage.player.exchange()
    assert engine.want & Want.STEER
    engine.want &= ~Want.STEER
    stage.device.advance(199_000_000)
    stage.player.exchange()
    assert not engine.want & Want.STEER
    stage.device.advance(1_000_000)
    stage.player.exchange()
    assert engine.want & Want.STEER


def test_overwrites_of_parts_of_blocks_go_on_after_a_failed_flush() -> None:
    log: list[str] = []
    stage = Stage(logical_block_bytes=4096, log=log)
    stage.now("write", 0, SECTORS_PER_BLOCK)
    stage.player.errors_expected = True
    stage.device.fault = lambda op: -errno.EIO if op.kind == FLUSH else 0
    stage.now("flush")
    stage.now("write", 1, 1)
    assert log[-1].endswith("write 0"), log[-1]


def test_reads_of_what_is_durable_go_on_after_a_failed_flush() -> None:
    """Where nothing is pending, and beside what is (R38)."""
    for pending in (False, True):
        log: list[str] = []
        stage = Stage(log=log)
        stage.now("write", 0, SECTORS_PER_BLOCK)
        stage.now("flush")
        stage.player.errors_expected = True
        stage.device.fault = lambda op: -errno.EIO if op.kind == FLUSH else 0
        stage.now("write", SECTORS_PER_CHUNK if pending else 0, SECTORS_PER_BLOCK)
        stage.now("flush")
        assert log[-1].endswith(f"flush {-errno.EIO}"), log[-1]
        stage.now("read", 0, SECTORS_PER_BLOCK)
        assert log[-1].endswith("read 0"), log[-1]
        if pending:
            stage.now("read", SECTORS_PER_CHUNK, SECTORS_PER_BLOCK)
            assert log[-1].endswith(f"read {-errno.EIO}"), log[-1]


def test_what_the_device_said_is_not_covered_by_a_failed_flush() -> None:
    """A first write that both have hit ends with its own error."""
    it = bench(base_size_bytes=None, copy_on_read=False, on_full="error")
    it.submit(WRITE, 0, 64 * KIB)
    it.take()
    it.engine.note_failed_flush(errno.EIO)
    it.complete(0, -errno.ENOSPC)
    it.take()
    assert it.answered == [(1, -errno.ENOSPC)]


def test_a_failing_base_is_asked_when_a_second_is_over() -> None:
    it = bench()
    engine = it.engine
    engine.prefetch_idle_ns, engine.prefetch_depth = 0, 1
    engine.prefetch_plan([(0, 1 << 20)])
    engine.advance_clock(10 * SECOND)
    it.take()
    for _ in range(2):  # it fails, and is asked once more
        assert len(it.operations) == 1
        it.complete(0, -errno.EIO)
        it.take()
    assert engine.base_failing and not it.operations
    engine.advance_clock(11 * SECOND - 1)
    it.take()
    assert not it.operations
    engine.advance_clock(11 * SECOND)
    it.take()
    assert len(it.operations) == 1


def test_only_a_close_closes_cleanly() -> None:
    stage = Stage()
    engine = stage.engine
    assert engine.clean and not engine.closed_cleanly
    stage.begin_close()
    stage.finish_all()
    assert engine.closed_cleanly


def test_a_plan_of_what_is_here_is_done() -> None:
    stage = Stage(base_bytes=1 << 18)
    stage.now("write", 0, SECTORS_PER_CHUNK)
    stage.engine.prefetch_plan([(0, 1 << 18)])
    assert not stage.engine.prefetching
