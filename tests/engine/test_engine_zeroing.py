# SPDX-License-Identifier: Apache-2.0
"""New chunks that the device zeroes: what is asked of it, who waits, and when whole blocks are written all the same (R18)."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from fvd.format.geometry import Layout
from fvd.sim._device import WRITE, ZERO, Operation
from fvd.sim.stage import SECTORS_PER_BLOCK, SECTORS_PER_CHUNK, Stage

CHUNK_BYTES = SECTORS_PER_CHUNK * 512
BLOCK_BYTES = SECTORS_PER_BLOCK * 512


def seen(stage: Stage) -> list[tuple[int, int]]:
    return [(op.kind, op.length_bytes) for op in stage.pending()]


def written(stage: Stage, first: int, sectors: int) -> list[tuple[int, int]]:
    """What one write makes the device do, in order."""
    stage.submit("write", first, sectors)
    done = []
    while pending := stage.pending():
        done += [(op.kind, op.length_bytes) for op in pending]
        stage.finish(*pending)
    return done


def test_a_new_chunk_is_zeroed_once_and_then_only_the_guests_sectors_are_written() -> None:
    stage = Stage(zero_chunks=True)
    stage.submit("write", 8, 8)
    (zeroing,) = stage.pending()
    assert (zeroing.kind, zeroing.length_bytes) == (ZERO, CHUNK_BYTES)
    assert zeroing.offset_bytes == stage.geometry.data_offset_bytes
    stage.finish(zeroing)
    (write,) = stage.pending()
    assert (write.kind, write.offset_bytes - zeroing.offset_bytes, write.length_bytes) == (WRITE, 8 * 512, 8 * 512)
    stage.finish_all()
    assert written(stage, SECTORS_PER_BLOCK + 3, 2 * SECTORS_PER_BLOCK) == [(WRITE, 2 * BLOCK_BYTES)]
    assert written(stage, 32, 1) == [(WRITE, 512)]  # its block is present by now
    stage.now("flush")
    stage.now("read", 0, SECTORS_PER_CHUNK)
    assert stage.counts()["zeroed_chunks"] == 1
    stage.crash()
    stage.now("read", 0, SECTORS_PER_CHUNK)


def test_whole_blocks_need_no_zeros() -> None:
    stage = Stage(zero_chunks=True)
    assert written(stage, 0, 2 * SECTORS_PER_BLOCK) == [(WRITE, 2 * BLOCK_BYTES)]
    # The chunk is not new any more, and nobody has zeroed it.
    assert written(stage, 3 * SECTORS_PER_BLOCK, 8) == [(WRITE, BLOCK_BYTES)]
    assert stage.counts()["zeroed_chunks"] == 0


def test_a_long_write_into_zeros_is_one_operation() -> None:
    """Its edges need no bounce buffer, so they are not cut off."""
    stage = Stage(zero_chunks=True, chunk_size_bytes=1 << 20, virtual_size_bytes=1 << 21, grow_step_bytes=1 << 20)
    stage.now("write", 0, 8)
    assert written(stage, SECTORS_PER_BLOCK + 8, 6 * SECTORS_PER_BLOCK) == [(WRITE, 6 * BLOCK_BYTES)]


def test_others_of_the_chunk_wait_and_those_of_other_chunks_do_not() -> None:
    stage = Stage(zero_chunks=True)
    stage.submit("write", 8, 8)
    (zeroing,) = stage.pending()
    same = [stage.submit("write", 16, 8), stage.submit("write", 2 * SECTORS_PER_BLOCK, SECTORS_PER_BLOCK)]
    stage.submit("trim", 3 * SECTORS_PER_BLOCK, SECTORS_PER_BLOCK)
    assert stage.pending() == [zeroing]
    other = stage.submit("write", SECTORS_PER_CHUNK, 8)
    stage.finish_all(but=lambda op: op is zeroing)
    assert other not in stage.in_flight and all(cookie in stage.in_flight for cookie in same)
    stage.finish_all()
    assert not stage.in_flight
    stage.now("read", 0, 2 * SECTORS_PER_CHUNK)


def test_thirty_two_at_a_time_and_what_comes_meanwhile_is_written_whole() -> None:
    stage = Stage(zero_chunks=True, virtual_size_bytes=34 * CHUNK_BYTES, bounce_limit_bytes=BLOCK_BYTES)
    for chunk in range(33):
        stage.submit("write", chunk * SECTORS_PER_CHUNK + 8, 8)
    assert seen(stage) == [(ZERO, CHUNK_BYTES)] * 32 + [(WRITE, BLOCK_BYTES)]
    # Their failure takes memory for a block of each, not more, whatever the limit.
    stage.device.fault = lambda op: -errno.EIO if op.kind == ZERO else 0
    stage.finish(*stage.pending(lambda op: op.kind == ZERO))
    assert stage.engine.leaks()["bounce_bytes"] == 33 * BLOCK_BYTES
    stage.finish_all()
    assert written(stage, 33 * SECTORS_PER_CHUNK + 8, 8) == [(ZERO, CHUNK_BYTES), (WRITE, BLOCK_BYTES)]
    stage.now("read", 0, 34 * SECTORS_PER_CHUNK)
    assert stage.engine.leaks() == {}


def test_a_long_write_with_ragged_edges_zeroes_nothing() -> None:
    stage = Stage(zero_chunks=True, chunk_size_bytes=1 << 19, grow_step_bytes=1 << 19)
    stage.submit("write", 8, 5 * SECTORS_PER_BLOCK)
    assert {op.kind for op in stage.pending()} == {WRITE}
    stage.finish_all()
    stage.now("read", 0, 6 * SECTORS_PER_BLOCK)


def test_a_close_waits_for_it() -> None:
    stage = Stage(zero_chunks=True)
    stage.submit("write", 8, 8)
    (zeroing,) = stage.pending()
    cookie = stage.submit("close", 0, 0)
    stage.finish_all(but=lambda op: op is zeroing)
    assert cookie in stage.in_flight
    stage.finish_all()
    assert cookie not in stage.in_flight


@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.EIO])
def test_what_the_device_does_not_zero_is_written_whole(error: int) -> None:
    stage = Stage(zero_chunks=True)
    stage.device.fault = lambda op: -error if op.kind == ZERO else 0
    assert written(stage, 8, 8) == [(ZERO, CHUNK_BYTES), (WRITE, BLOCK_BYTES)]
    assert written(stage, SECTORS_PER_BLOCK, 8) == [(WRITE, BLOCK_BYTES)]
    # Only a refusal is for good.
    again = [(ZERO, CHUNK_BYTES)] if error == errno.EIO else []
    assert written(stage, SECTORS_PER_CHUNK + 8, 8) == [*again, (WRITE, BLOCK_BYTES)]
    stage.now("read", 0, 2 * SECTORS_PER_CHUNK)
    assert stage.counts()["zeroed_chunks"] == 0


def test_parts_of_logical_blocks_take_the_whole_block() -> None:
    stage = Stage(zero_chunks=True, logical_block_bytes=4096)
    assert written(stage, 8, 8) == [(ZERO, CHUNK_BYTES), (WRITE, 4096)]
    assert written(stage, SECTORS_PER_BLOCK + 1, 8) == [(WRITE, BLOCK_BYTES)]
    assert written(stage, SECTORS_PER_CHUNK + 1, 8) == [(WRITE, BLOCK_BYTES)]
    stage.now("read", 0, 2 * SECTORS_PER_CHUNK)


def test_a_trim_takes_the_note_back_until_the_chunk_is_new_again() -> None:
    stage = Stage(zero_chunks=True)
    stage.now("write", 8, 8)
    stage.now("write", SECTORS_PER_BLOCK, SECTORS_PER_BLOCK)
    stage.now("trim", SECTORS_PER_BLOCK, SECTORS_PER_BLOCK)
    assert written(stage, SECTORS_PER_BLOCK, 8) == [(WRITE, BLOCK_BYTES)]
    stage.now("trim", 0, SECTORS_PER_CHUNK)
    assert written(stage, 8, 8) == [(ZERO, CHUNK_BYTES), (WRITE, 8 * 512)]


def test_a_failed_write_takes_the_note_back() -> None:
    stage = Stage(zero_chunks=True)
    stage.now("write", 8, 8)
    stage.player.errors_expected = True

    def fail_once(op: Operation) -> int:
        stage.device.fault = None
        return -errno.EIO

    stage.device.fault = fail_once
    stage.now("write", SECTORS_PER_BLOCK, 8)
    assert written(stage, 2 * SECTORS_PER_BLOCK, 8) == [(WRITE, BLOCK_BYTES)]
    stage.now("read", 0, SECTORS_PER_CHUNK)


def test_the_note_lives_in_memory_only() -> None:
    stage = Stage(zero_chunks=True)
    stage.now("write", 8, 8)
    stage.now("flush")
    stage.crash()
    assert written(stage, SECTORS_PER_BLOCK, 8) == [(WRITE, BLOCK_BYTES)]


@pytest.mark.parametrize("changes", [{"layout": Layout.RAW}, {"base_bytes": 1 << 20}], ids=["raw layout", "base"])
def test_never_in_the_raw_layout_or_over_a_base(changes: dict[str, Any]) -> None:
    stage = Stage(zero_chunks=True, **changes)
    stage.submit("write", 8, 8)
    assert all(op.kind != ZERO for op in stage.pending())
    stage.finish_all()
    assert stage.counts()["zeroed_chunks"] == 0
