# SPDX-License-Identifier: Apache-2.0
"""Copies from the base against what else may happen to a chunk at the same time."""

from __future__ import annotations

import errno

import pytest

from fvd.sim._device import BASE, FLUSH, STORAGE, WRITE, Operation
from fvd.sim.stage import SECTORS_PER_BLOCK, SECTORS_PER_CHUNK, Stage

MIB = 1 << 20
BLOCK = SECTORS_PER_BLOCK
BLOCK_BYTES = 512 * BLOCK
SECOND = 1_000_000_000


def copying() -> Stage:
    stage = Stage(base_bytes=MIB)
    stage.engine.copy_on_read = True
    return stage


def of_base(op: Operation) -> bool:
    return op.target == BASE


def saving(op: Operation) -> bool:
    return op.target == STORAGE and op.kind == WRITE


def test_the_profile_has_each_read_once() -> None:
    stage = copying()
    for block in (5, 0, 9):
        stage.submit("read", block * BLOCK, 8)
        stage.submit("read", block * BLOCK + 16, 8)
    stage.finish_all()
    assert len(stage.engine.read_profile()) == 6


def test_a_read_that_joined_a_copy_fails_in_its_own_time() -> None:
    stage = Stage(base_bytes=MIB, base_timeout_ns=2 * SECOND)
    stage.engine.copy_on_read = True
    stage.player.errors_expected = True
    stage.device.fault = lambda op: -errno.EIO if of_base(op) else 0
    stage.submit("read", 0, 8)
    stage.finish_all()
    stage.device.advance(SECOND // 4)
    stage.pending()
    later = stage.submit("read", 8, 8)
    for _ in range(8):
        stage.finish_all()
        assert later in stage.in_flight
        stage.device.advance(SECOND // 4)
    stage.finish_all()
    stage.device.advance(SECOND // 4)
    stage.finish_all()
    assert later not in stage.in_flight


def test_a_plan_that_has_been_taken_back_is_not_looked_at_again() -> None:
    stage = Stage(base_bytes=MIB)
    stage.engine.prefetch_idle_ns, stage.engine.prefetch_depth = 0, 2
    stage.engine.prefetch_plan([(0, MIB)])
    stage.device.fault = lambda op: -errno.EIO if of_base(op) else 0
    ops = stage.pending(of_base)
    stage.engine.prefetch_plan([])
    stage.finish(*ops)
    stage.finish_all()
    assert not stage.engine.prefetching


@pytest.mark.parametrize("rate", [10**17, 10**18, (1 << 64) - 1])
def test_a_rate_beyond_all_measure_is_no_limit(rate: int) -> None:
    stage = Stage(base_bytes=MIB)
    stage.engine.prefetch_idle_ns, stage.engine.prefetch_depth = 0, 2
    stage.engine.prefetch_rate_bytes = rate
    stage.device.advance(1000 * SECOND)
    stage.engine.prefetch_plan([(0, MIB)])
    stage.finish_all()
    assert stage.engine.base_released


def test_slots_beyond_all_measure_take_no_memory_without_measure() -> None:
    stage = Stage(base_bytes=64 * MIB, virtual_size_bytes=64 * MIB, storage_chunks=256)
    stage.engine.prefetch_idle_ns, stage.engine.prefetch_depth = 0, (1 << 32) - 1
    stage.engine.prefetch_plan([(0, 64 * MIB)])
    assert sum(op.length_bytes for op in stage.pending(of_base)) <= 16 * MIB


def test_a_plan_of_nonsense_leaves_the_plan_that_was() -> None:
    stage = Stage(base_bytes=MIB)
    stage.engine.prefetch_plan([(0, MIB)])
    for plan in ([(1, 2, 3)], [None], [("a", "b")], [(0.5, 1.5)], [(0,)]):
        with pytest.raises((TypeError, ValueError)):
            stage.engine.prefetch_plan(plan)
    assert stage.engine.prefetching
    stage.engine.prefetch_plan([(-1, 10), (1 << 70, 5), (0, -5), (5, 1 << 70), (MIB, 1), (0, 0)])
    stage.engine.prefetch_idle_ns, stage.engine.prefetch_depth = 0, 1
    stage.finish_all()
    assert stage.engine.base_released


def test_a_full_storage_is_no_reason_to_read_the_base_again_and_again() -> None:
    stage = Stage(base_bytes=MIB * 16, virtual_size_bytes=16 * MIB, storage_chunks=1, on_full="error")
    stage.set_exhausted(True)
    stage.engine.prefetch_idle_ns, stage.engine.prefetch_depth = 0, 2
    stage.engine.prefetch_plan([(0, 16 * MIB)])
    for _ in range(40):
        stage.device.advance(SECOND // 4)
        stage.finish_all()
    assert stage.counts()["base_reads"] < 120  # two in a quarter of a second, not a whole pass over the base
    stage.grow()
    before = stage.engine.present_blocks
    stage.pending()
    stage.finish_all()
    assert stage.engine.present_blocks > before


def test_a_close_commits_what_was_copied() -> None:
    stage = copying()
    stage.now("read", 0, 8)
    stage.close(at_once=True)
    assert stage.engine.present_blocks == 1


def test_copies_are_committed_so_long_after_the_first_of_them() -> None:
    stage = copying()
    stage.device.advance(100 * SECOND)
    stage.pending()
    stage.now("read", 0, 8)
    stage.device.advance(29 * SECOND)
    stage.finish_all()
    assert stage.counts()["journal_writes"] == 0
    stage.device.advance(2 * SECOND)
    stage.finish_all()
    assert stage.counts()["journal_writes"] == 1
    stage.now("read", 4 * BLOCK, 8)
    stage.finish_all()
    assert stage.counts()["journal_writes"] == 1  # it waits for its own time
    stage.crash()
    assert stage.engine.present_blocks == 1


def test_copies_are_committed_when_they_fill_a_quarter_of_a_commit() -> None:
    stage = Stage(base_bytes=64 * MIB, virtual_size_bytes=64 * MIB, block_size_bytes=4096, chunk_size_bytes=65536, storage_chunks=1024)
    stage.engine.prefetch_idle_ns, stage.engine.prefetch_depth = 0, 4
    stage.engine.prefetch_plan([(0, 60 * MIB)])
    stage.finish_all()
    assert stage.counts()["journal_writes"] >= 2


def test_a_guest_write_to_zeros_in_a_slot_that_a_copy_has_mapped_takes_the_slot_along() -> None:
    stage = copying()
    stage.now("zero", 2 * BLOCK, BLOCK)
    stage.now("flush")
    stage.now("read", 0, 8)  # zeros are written to a slot, and that is mapped: softly
    stage.now("write", 2 * BLOCK, 8)  # its bit is committed already, its slot is not
    stage.now("flush")
    stage.crash()


@pytest.mark.parametrize("failing", [False, True])
def test_a_base_is_not_released_under_a_read(failing: bool) -> None:
    stage = Stage(base_bytes=MIB, base_timeout_ns=60 * SECOND)
    read = stage.submit("read", 0, 8)
    (op,) = stage.pending(of_base)
    if failing:
        stage.device.fault = lambda op: -errno.EIO if of_base(op) else 0
        stage.finish(op)
    stage.submit("write", 0, MIB // 512)
    stage.finish_all(but=of_base)
    stage.submit("flush")
    stage.finish_all(but=of_base)
    assert stage.engine.base_remaining_bytes == 0 and read in stage.in_flight and not stage.engine.base_released
    stage.device.fault = None
    stage.device.advance(SECOND)
    stage.finish_all()
    assert read not in stage.in_flight and stage.engine.base_released


@pytest.mark.parametrize("prefetch", [False, True])
def test_no_block_is_in_two_copies(prefetch: bool) -> None:
    stage = copying()
    stage.submit("read", 2 * BLOCK, 8)
    (first,) = stage.pending(of_base)
    if prefetch:
        stage.engine.prefetch_idle_ns, stage.engine.prefetch_depth = 0, 8
        stage.engine.prefetch_plan([(0, 4 * BLOCK_BYTES)])
    else:
        stage.submit("read", 0, 4 * BLOCK)
    second, *rest = stage.pending(lambda op: of_base(op) and op is not first)
    assert (second.offset_bytes, second.length_bytes) == (0, 2 * BLOCK_BYTES)
    assert not rest or rest[0].offset_bytes == 3 * BLOCK_BYTES
    stage.finish_all()
    assert not stage.in_flight and stage.engine.present_blocks == 4
    stage.settle()


def test_a_base_that_ends_inside_a_block_is_copied_with_zeros_after_it() -> None:
    stage = Stage(base_bytes=MIB // 2 + 4096, block_size_bytes=1 << 16)
    stage.engine.copy_on_read = True
    stage.now("read", 0, MIB // 512 // 2)  # buffers that are used again hold something
    before = stage.engine.present_blocks
    stage.now("read", MIB // 512 // 2, 3 * BLOCK)
    assert stage.engine.present_blocks == before + 1  # and nothing beyond the base
    stage.now("read", MIB // 512 // 2, 3 * BLOCK)
    assert stage.engine.base_released or stage.engine.base_remaining_bytes == 0
    stage.close()


def test_a_disk_that_is_read_only_copies_nothing() -> None:
    stage = Stage(base_bytes=MIB)
    stage.close()
    stage.open(read_only=True)
    stage.engine.copy_on_read = True
    stage.submit("read", 0, 8)
    stage.finish(*stage.pending(of_base))
    assert stage.pending() == [] and stage.engine.present_blocks == 0
    with pytest.raises(Exception, match="writable"):
        stage.engine.prefetch_plan([(0, MIB)])


def test_a_copy_does_not_join_a_chunk_whose_zeros_are_being_written() -> None:
    stage = copying()
    stage.now("zero", 2 * BLOCK, BLOCK)
    stage.submit("read", 0, 8)
    (base,) = stage.pending(of_base)
    stage.submit("write", 3 * BLOCK, BLOCK)
    before = stage.pending(saving)
    assert len(before) == 2  # the guest's blocks, and the zeros
    stage.finish(base)
    assert stage.pending(saving) == before
    stage.finish_all()
    stage.settle()


def test_a_copy_does_not_join_a_chunk_for_which_a_trim_waits() -> None:
    stage = copying()
    stage.now("write", 0, BLOCK)
    stage.submit("read", 2 * BLOCK, 8)
    (base,) = stage.pending(of_base)
    stage.submit("write", 3 * BLOCK, BLOCK)
    trim = stage.submit("trim", 0, SECTORS_PER_CHUNK)
    before = stage.pending(saving)
    stage.finish(base)
    assert stage.pending(saving) == before
    stage.finish_all()
    assert trim not in stage.in_flight
    stage.settle()


@pytest.mark.parametrize("closing", [True, False])
def test_nothing_is_prefetched_for_a_disk_that_closes_or_has_failed(closing: bool) -> None:
    stage = Stage(base_bytes=MIB)
    stage.engine.prefetch_idle_ns = 0
    stage.player.errors_expected = True
    stage.now("write", 0, BLOCK)
    if closing:
        stage.begin_close()
    else:
        stage.device.fault = lambda op: -errno.EIO if op.kind == FLUSH else 0
        stage.now("flush")
        assert stage.engine.failed_errno
    stage.engine.prefetch_depth = 4
    stage.engine.prefetch_plan([(0, MIB)])
    for _ in range(8):
        stage.device.advance(SECOND)
        assert stage.pending(of_base) == []


def test_prefetching_comes_back_to_what_a_guests_copy_gave_up() -> None:
    stage = copying()
    stage.player.errors_expected = True
    stage.submit("read", 0, 8)
    (base,) = stage.pending(of_base)
    stage.engine.prefetch_idle_ns, stage.engine.prefetch_depth = 0, 8
    stage.engine.prefetch_plan([(0, MIB)])
    stage.finish_all(but=lambda op: op is base)
    stage.device.fault = lambda op: -errno.EIO if saving(op) else 0
    stage.finish_all()
    assert stage.engine.present_blocks == 15
    stage.device.fault = None
    for _ in range(4):
        stage.device.advance(SECOND)
        stage.finish_all()
    assert stage.engine.base_released


@pytest.mark.parametrize("at_once", [1600, 800])
def test_copies_take_no_more_journal_space_than_a_commit_has(at_once: int) -> None:
    size = 1600 << 16
    stage = Stage(base_bytes=size, virtual_size_bytes=size, block_size_bytes=4096, chunk_size_bytes=65536, storage_chunks=1600)
    stage.now("write", 8, 8)
    stage.submit("flush")
    (flush,) = stage.pending()
    stage.engine.copy_on_read = True
    for first in range(0, 1600, at_once):
        for chunk in range(first, first + at_once):
            stage.submit("read", chunk * 128, 8)
        while reads := stage.pending(of_base):
            stage.finish(*reads)
        while saves := stage.pending(saving):  # changes gather while the commit is under way
            stage.finish(*saves)
    assert stage.engine.copy_counters()["dropped_bytes"] > 0
    stage.finish(flush)
    stage.finish_all()
    stage.now("write", 512, 8)
    stage.now("flush")
    stage.engine.commit_soon()
    stage.finish_all()
    stage.crash()


@pytest.mark.parametrize("full", [True, False])
def test_what_cannot_be_kept_is_read_as_the_guest_asked(full: bool) -> None:
    stage = Stage(base_bytes=MIB, storage_chunks=1 if full else 4, on_full="error")
    stage.engine.copy_on_read = True
    stage.player.errors_expected = True
    stage.now("write", 0, 8)
    if full:
        stage.set_exhausted(True)
    else:
        stage.device.fault = lambda op: -errno.EIO if op.kind == FLUSH else 0
        stage.now("flush")
    stage.submit("read", SECTORS_PER_CHUNK, 8)
    (op,) = stage.pending(of_base)
    assert op.length_bytes == 4096
