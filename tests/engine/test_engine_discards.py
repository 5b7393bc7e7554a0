# SPDX-License-Identifier: Apache-2.0
"""Discards: few at once, neighbours together, and nobody who needs a slot waits for them (R31, R32)."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from fvd.sim._device import DISCARD, WRITE, Operation
from fvd.sim.stage import SECTORS_PER_BLOCK, SECTORS_PER_CHUNK, Stage

CHUNK_BYTES = SECTORS_PER_CHUNK * 512


def discarding(op: Operation) -> bool:
    return op.kind == DISCARD


def places(stage: Stage) -> list[tuple[int, int]]:
    """[(first slot, slots)] of the discards in flight, by slot."""
    start = stage.geometry.data_offset_bytes
    return sorted(((op.offset_bytes - start) // CHUNK_BYTES, op.length_bytes // CHUNK_BYTES) for op in stage.pending(discarding))


def filled(chunks: int, **changes: Any) -> Stage:
    """A disk with a block in each chunk, chunk k in slot k, all committed."""
    stage = Stage(virtual_size_bytes=chunks * CHUNK_BYTES, discard=True, **changes)
    for chunk in range(chunks):
        stage.now("write", chunk * SECTORS_PER_CHUNK, 8)
    stage.now("flush")
    return stage


def trimmed(stage: Stage, *chunks: int) -> None:
    """These chunks are trimmed and that is durable; discards stay in flight."""
    for chunk in chunks:
        stage.submit("trim", chunk * SECTORS_PER_CHUNK, SECTORS_PER_CHUNK)
    stage.submit("flush")
    stage.finish_all(but=discarding)


def test_a_trim_of_many_chunks_becomes_few_discards_of_neighbours() -> None:
    stage = filled(64)
    stage.submit("trim", 0, 63 * SECTORS_PER_CHUNK)
    stage.finish_all(but=discarding)
    assert places(stage) == []  # nothing before the free is durable
    stage.submit("flush")
    stage.finish_all(but=discarding)
    assert places(stage) == [(0, 63)]
    stage.finish_all()
    assert stage.counts()["discards"] == 1 and stage.engine.free_slots == 63
    stage.settle()


MS = 1_000_000


def ended_after(stage: Stage, milliseconds: int) -> list[int]:
    """The oldest discard ends after so long. Returns how many slots are in those in flight then."""
    stage.device.advance(milliseconds * MS)
    stage.pending()
    stage.finish(stage.pending(discarding)[0])
    return [slots for _, slots in places(stage)]


def test_how_many_slots_are_in_discards_is_learned_from_how_long_these_take() -> None:
    stage = filled(64, first_discard_bytes=2 * CHUNK_BYTES, discard_bytes=8 * CHUNK_BYTES)
    trimmed(stage, *range(63))
    assert places(stage) == [(0, 2)]
    assert ended_after(stage, 5) == [4]  # quickly: twice as many
    assert ended_after(stage, 1) == [8]
    assert ended_after(stage, 1) == [8, 8]
    assert ended_after(stage, 7) == [8, 8]  # in time: as many
    assert ended_after(stage, 20) == [8]  # of 16 five would have ended within 10 of 27 ms
    assert ended_after(stage, 1) == [5]  # late too, but under way when the other ended
    assert ended_after(stage, 20) == [2]
    assert ended_after(stage, 100) == [1]
    assert ended_after(stage, 100) == [1]  # one there always is
    assert ended_after(stage, 1) == [2]
    stage.settle()


def test_a_discard_is_no_longer_than_it_may_be_and_at_least_one_slot() -> None:
    stage = filled(16, discard_bytes=3 * CHUNK_BYTES)
    trimmed(stage, *range(10))
    assert places(stage) == [(0, 3), (3, 3), (6, 3), (9, 1)]
    stage.settle()
    stage = filled(4, discard_bytes=1)
    trimmed(stage, 0, 1)
    assert places(stage) == [(0, 1), (1, 1)]


def test_eight_are_in_flight_and_the_next_begins_when_one_has_ended() -> None:
    stage = filled(64)
    trimmed(stage, *range(0, 64, 2))
    assert places(stage) == [(slot, 1) for slot in range(0, 16, 2)]
    assert stage.engine.free_slots == 32 - 8  # those that wait can be had at once
    stage.finish(stage.pending(discarding)[3])
    assert places(stage) == [(slot, 1) for slot in (0, 2, 4, 8, 10, 12, 14, 16)]
    assert stage.engine.free_slots == 24
    most = 0
    while pending := stage.pending(discarding):
        most = max(most, len(pending))
        stage.finish(pending[-1])
    assert most == 8 and stage.counts()["most_discards_in_flight"] == 8 and stage.counts()["discards"] == 32
    stage.settle()


def test_what_is_trimmed_later_is_joined_with_what_still_waits() -> None:
    stage = filled(16, discards_max=1)
    trimmed(stage, 8)
    trimmed(stage, 3, 5)
    trimmed(stage, 4)
    assert places(stage) == [(8, 1)]
    stage.finish(*stage.pending())
    assert places(stage) == [(3, 3)]
    stage.settle()


def test_neighbours_that_are_in_use_are_left_alone() -> None:
    stage = filled(8, discards_max=1)
    trimmed(stage, 0)
    trimmed(stage, 2, 3, 5)
    stage.finish(*stage.pending(discarding))
    assert places(stage) == [(2, 2)]
    stage.finish_all()
    stage.now("read", 0, 8 * SECTORS_PER_CHUNK)
    stage.settle()


@pytest.mark.parametrize("placement", [0, 1])
def test_who_needs_a_slot_takes_one_that_waits_and_it_is_not_discarded_any_more(placement: int) -> None:
    stage = filled(8, discards_max=1, placement=placement, discard_bytes=1)
    trimmed(stage, 0, 2, 4)
    assert places(stage) == [(0, 1)]
    stage.submit("write", 2 * SECTORS_PER_CHUNK, SECTORS_PER_CHUNK)
    stage.submit("write", 4 * SECTORS_PER_CHUNK, SECTORS_PER_CHUNK)
    stage.finish_all(but=discarding)
    assert list(stage.in_flight.values()) == [] and stage.counts()["waited_for_space"] == 0
    stage.finish_all()
    assert stage.counts()["discards"] == 1
    stage.now("read", 0, 8 * SECTORS_PER_CHUNK)
    stage.settle()


def test_free_slots_are_taken_first() -> None:
    stage = filled(8, discards_max=1, discard_bytes=1)
    trimmed(stage, 0, 2)
    stage.finish(*stage.pending(discarding))
    stage.submit("write", 0, 8)
    stage.finish_all(but=discarding)
    assert places(stage) == [(2, 1)] and stage.engine.free_slots == 0
    stage.settle()


def test_writes_that_wait_are_served_before_anything_is_discarded() -> None:
    stage = Stage(virtual_size_bytes=4 * CHUNK_BYTES, storage_chunks=2, discard=True)
    stage.now("write", 0, 8)
    stage.now("write", SECTORS_PER_CHUNK, 8)
    first = stage.submit("write", 2 * SECTORS_PER_CHUNK, 8)
    second = stage.submit("write", 3 * SECTORS_PER_CHUNK, 8)
    assert stage.engine.waiting_writes == 2
    trimmed(stage, 0, 1)
    assert first not in stage.in_flight and second not in stage.in_flight and stage.counts()["discards"] == 0
    stage.settle()


def test_a_write_waits_for_discards_only_when_all_that_is_free_is_in_them() -> None:
    stage = filled(2, on_full="error")
    trimmed(stage, 0)
    write = stage.submit("write", 0, 8)
    stage.finish_all(but=discarding)
    assert write in stage.in_flight  # it is not a full storage
    stage.finish(*stage.pending(discarding))
    stage.finish_all()
    assert write not in stage.in_flight
    stage.settle()


def test_a_discard_that_fails_frees_its_slots_all_the_same() -> None:
    stage = filled(4)
    stage.device.fault = lambda op: -errno.EIO if op.kind == DISCARD else 0
    trimmed(stage, 0, 1)
    stage.finish_all()
    assert stage.engine.free_slots == 2 and stage.engine.failed_errno == 0
    stage.settle()


def test_without_discards_slots_are_free_at_once() -> None:
    stage = Stage(virtual_size_bytes=4 * CHUNK_BYTES)
    stage.now("write", 0, 8)
    trimmed(stage, 0)
    assert stage.pending() == [] and stage.engine.free_slots == 4 and stage.counts()["discards"] == 0


def test_slots_that_wait_are_space_for_copies_and_no_reason_to_grow() -> None:
    stage = Stage(virtual_size_bytes=8 * CHUNK_BYTES, storage_chunks=4, discard=True, discards_max=1, discard_bytes=1, low_water_chunks=2)
    for chunk in range(4):
        stage.now("write", chunk * SECTORS_PER_CHUNK, 8)
    stage.now("flush")
    trimmed(stage, 0, 1, 2, 3)
    stage.engine.want = 0
    assert stage.engine.free_slots == 3
    stage.submit("write", 0, 8)  # leaves two: the mark
    assert stage.engine.free_slots == 2 and stage.engine.want == 0
    stage.submit("write", SECTORS_PER_CHUNK, 8)
    assert stage.engine.free_slots == 1 and stage.engine.want == 1
    stage.settle()


# --- the end of a disk --------------------------------------------------------------------------------------------


def close(stage: Stage) -> int:
    stage.begin_close()
    (cookie,) = stage.in_flight
    return cookie


def test_a_close_gives_back_what_was_trimmed_just_before() -> None:
    stage = filled(16)
    stage.now("trim", 0, 15 * SECTORS_PER_CHUNK)
    cookie = close(stage)
    stage.finish_all(but=discarding)
    assert cookie in stage.in_flight and places(stage) == [(0, 15)] and stage.engine.clean
    stage.finish_all()
    assert cookie not in stage.in_flight and stage.engine.leaks() == {}


def test_a_close_begins_no_discard_before_everything_is_on_storage_and_none_after_five_seconds() -> None:
    stage = filled(32, discards_max=1, discard_bytes=1)
    trimmed(stage, *range(0, 32, 2))
    cookie = close(stage)
    (first,) = stage.pending()
    stage.finish(first)
    seen = [op.kind for op in stage.pending()]
    assert seen == [WRITE] or DISCARD not in seen  # the commit or checkpoint goes first
    stage.finish_all(but=discarding)
    assert stage.engine.clean and len(places(stage)) == 1
    stage.finish(*stage.pending(discarding))
    assert len(places(stage)) == 1
    stage.device.advance(5_000_000_000)
    stage.engine.advance_clock(stage.device.now_ns)
    stage.finish(*stage.pending(discarding))
    assert stage.pending() == [] and cookie not in stage.in_flight and stage.engine.leaks() == {}
    assert stage.counts()["discards"] == 3


def test_a_disk_that_has_failed_closes_without_discards() -> None:
    stage = filled(8, discards_max=1, discard_bytes=1)
    trimmed(stage, 0, 2, 4)
    stage.player.errors_expected = True
    stage.device.fault = lambda op: -errno.EIO if op.kind == WRITE and op.durable else 0
    stage.submit("trim", 6 * SECTORS_PER_CHUNK, SECTORS_PER_CHUNK)
    stage.submit("flush")
    stage.finish_all(but=discarding)
    assert stage.engine.failed_errno
    close(stage)
    stage.finish(*stage.pending(discarding))
    assert stage.pending() == [] and not stage.in_flight


def test_a_crash_with_slots_that_wait_loses_nothing() -> None:
    stage = filled(8, discards_max=1)
    trimmed(stage, 0, 2, 4)
    stage.now("read", SECTORS_PER_CHUNK, SECTORS_PER_BLOCK)
    stage.crash()
    assert stage.engine.free_slots == 3  # the table says so; nobody discards them any more
