# SPDX-License-Identifier: Apache-2.0
"""What one request may have under way at once (R34), and how long the engine works for it before others have their turn."""

from __future__ import annotations

import errno
import time
from typing import Any

import numpy as np
import pytest

from fvd.sim._device import BASE, FLUSH, READ, WRITE, Operation
from fvd.sim.stage import SECTORS_PER_BLOCK, SECTORS_PER_CHUNK, Stage

CHUNK_BYTES = SECTORS_PER_CHUNK * 512
CHUNKS = 16


def stage_of(chunks: int = CHUNKS, **changes: Any) -> Stage:
    return Stage(virtual_size_bytes=chunks * CHUNK_BYTES, **changes)


def most_under_way(stage: Stage, *request: object, which: int = WRITE, **flags: bool) -> int:
    """The greatest number of its operations in flight, one ending after another, the newest first."""
    cookie = stage.submit(*request, **flags)  # type: ignore[arg-type]
    most = 0
    while pending := stage.pending():
        most = max(most, sum(op.kind == which for op in pending))
        stage.finish(pending[-1])
    assert cookie not in stage.in_flight
    return most


def test_zeros_are_written_a_window_at_a_time() -> None:
    stage = stage_of(request_window=4)
    assert most_under_way(stage, "zero", 0, CHUNKS * SECTORS_PER_CHUNK, no_hole=True) == 4
    assert stage.counts()["device_writes"] >= CHUNKS and stage.engine.present_blocks == CHUNKS * 4
    stage.now("read", 0, CHUNKS * SECTORS_PER_CHUNK)
    stage.settle()


def test_the_window_of_a_real_disk() -> None:
    stage = stage_of(128)
    assert most_under_way(stage, "zero", 0, 128 * SECTORS_PER_CHUNK, no_hole=True) == 32
    stage.settle()


@pytest.mark.parametrize("window", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", ["write", "read"])
def test_requests_in_many_pieces(kind: str, window: int) -> None:
    """Every second block is there: as many pieces as blocks."""
    stage = stage_of(request_window=window, base_bytes=CHUNKS * CHUNK_BYTES)
    for block in range(0, 4 * CHUNKS, 2):
        stage.now("write", block * SECTORS_PER_BLOCK, SECTORS_PER_BLOCK)
    which = READ if kind == "read" else WRITE
    assert most_under_way(stage, kind, 1, CHUNKS * SECTORS_PER_CHUNK - 2, which=which) == window
    stage.now("read", 0, CHUNKS * SECTORS_PER_CHUNK)
    stage.settle()


def test_it_goes_on_when_half_has_ended() -> None:
    stage = stage_of(request_window=8)
    cookie = stage.submit("zero", 0, CHUNKS * SECTORS_PER_CHUNK, no_hole=True)
    for ended in range(4):
        assert len(stage.pending()) == 8 - ended
        stage.finish(stage.pending()[0])
    assert len(stage.pending()) == 8
    stage.finish_all()
    assert cookie not in stage.in_flight


def test_others_are_served_while_one_pauses() -> None:
    stage = stage_of(request_window=2)
    stage.now("write", 0, 8)
    stage.submit("zero", SECTORS_PER_CHUNK, 8 * SECTORS_PER_CHUNK, no_hole=True)
    paused = stage.pending()
    read = stage.submit("read", 0, 8)
    write = stage.submit("write", 12 * SECTORS_PER_CHUNK, 8)
    stage.finish_all(but=lambda op: op in paused)
    assert read not in stage.in_flight and write not in stage.in_flight
    stage.settle()


def test_what_fails_is_not_gone_on_with() -> None:
    stage = stage_of(request_window=2)
    stage.player.errors_expected = True
    stage.device.fault = lambda op: -errno.EIO if op.kind == WRITE else 0
    cookie = stage.submit("zero", 0, CHUNKS * SECTORS_PER_CHUNK, no_hole=True)
    stage.finish_all()
    assert cookie not in stage.in_flight and stage.counts()["device_writes"] <= 3 and stage.engine.leaks() == {}
    stage.stop_faults()
    stage.now("read", 0, CHUNKS * SECTORS_PER_CHUNK)


def test_a_disk_that_fails_ends_it() -> None:
    stage = stage_of(request_window=2)
    stage.now("write", 0, 8)
    stage.player.errors_expected = True
    cookie = stage.submit("zero", SECTORS_PER_CHUNK, 8 * SECTORS_PER_CHUNK, no_hole=True)
    paused = stage.pending()
    stage.device.fault = lambda op: -errno.EIO if op.kind == FLUSH else 0
    stage.submit("flush")
    stage.finish_all(but=lambda op: op in paused)
    assert stage.engine.failed_errno and cookie in stage.in_flight
    stage.finish_all()
    assert cookie not in stage.in_flight and stage.engine.leaks() == {}


def test_a_close_waits_for_it() -> None:
    stage = stage_of(request_window=2)
    stage.submit("zero", 0, CHUNKS * SECTORS_PER_CHUNK, no_hole=True)
    stage.close(at_once=True)


def test_it_waits_for_storage_and_is_cancelled() -> None:
    stage = stage_of(request_window=2, storage_chunks=5)
    cookie = stage.submit("zero", 0, CHUNKS * SECTORS_PER_CHUNK, no_hole=True)
    stage.finish_all()
    assert stage.engine.waiting_writes == 1 and cookie in stage.in_flight
    stage.player.cancelled = True
    assert stage.engine.cancel_all_waiting(errno.ESHUTDOWN) == 1
    stage.finish_all()
    assert cookie not in stage.in_flight and stage.engine.leaks() == {}


def test_a_durable_request_in_many_pieces_is_committed_once() -> None:
    stage = stage_of(request_window=3)
    stage.now("zero", 0, CHUNKS * SECTORS_PER_CHUNK, no_hole=True, fua=True)
    assert stage.counts()["commits"] == 1
    stage.crash()
    assert stage.engine.present_blocks == 4 * CHUNKS


def test_copies_that_it_waits_for_and_its_own_reads() -> None:
    stage = stage_of(request_window=1, base_bytes=CHUNKS * CHUNK_BYTES)
    stage.engine.copy_on_read = True
    stage.now("write", 2 * SECTORS_PER_CHUNK, 8)
    reads = []

    def of_base(op: Operation) -> bool:
        return op.target == BASE

    cookie = stage.submit("read", 8, CHUNKS * SECTORS_PER_CHUNK - 8)
    while pending := stage.pending():
        reads.append(sum(of_base(op) for op in pending))
        stage.finish(pending[0])
    assert cookie not in stage.in_flight and max(reads) == 1
    stage.settle()


# --- turns --------------------------------------------------------------------------------------------------------

MANY = 10_000  # chunks


def large(size_bytes: int, storage_chunks: int) -> Stage:
    """A disk of which nothing is looked at."""
    return Stage(
        virtual_size_bytes=size_bytes,
        block_size_bytes=1 << 16,
        chunk_size_bytes=1 << 16,
        journal_size_bytes=8 << 20,
        storage_chunks=storage_chunks,
        windows=[(0, 8)],
    )


def test_a_long_trim_lets_others_have_their_turn() -> None:
    """It is cut at 4,096 chunks and goes on with the commit of those, so that no turn of the engine is long."""
    stage = large(MANY << 16, storage_chunks=MANY)
    engine = stage.engine
    memory = np.zeros(65536, np.uint8)

    def run_all() -> None:
        while operations := engine.take_operations():
            for operation in operations:
                engine.complete_operation(operation[0], 0)
        engine.take_done()

    for chunk in range(MANY):
        engine.submit_request(1, chunk * 65536, 65536, memory.ctypes.data, 1)
        run_all()
    engine.submit_request(2, 0, 0, 0, 2)
    run_all()
    before = engine.statistics()["commits"]
    assert engine.mapped_chunks == MANY
    engine.submit_request(3, 0, MANY * 65536, 0, 3)
    turns = []
    present = MANY
    ended: list[tuple[int, int]] = []
    while True:
        turns.append(present - engine.mapped_chunks)
        present = engine.mapped_chunks
        operations = engine.take_operations()
        if not operations:
            break
        for operation in operations:
            engine.complete_operation(operation[0], 0)
        ended += engine.take_done()
    assert ended == [(3, 0)] and engine.mapped_chunks == 0
    assert max(turns) == 2 * 4096 and engine.statistics()["commits"] - before == 2  # each turn: what a commit takes, and the same again


def test_a_trim_of_nothing_is_over_at_once() -> None:
    """A tebibyte of chunks that are not there is skipped, not walked."""
    stage = large(1 << 40, storage_chunks=1)
    begun = time.process_time()
    stage.engine.submit_request(3, 0, 1 << 40, 0, 3)
    assert stage.engine.take_done() == [(3, 0)]
    assert time.process_time() - begun < 0.1
