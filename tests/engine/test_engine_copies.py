# SPDX-License-Identifier: Apache-2.0
"""Copies from the base: what they cost, whom they may hold up, what a crash leaves of them, and how a failing base is met."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from fvd.engine._engine import Want
from fvd.format.geometry import Layout
from fvd.sim._device import BASE, FLUSH, READ, STORAGE, WRITE, Operation
from fvd.sim.stage import SECTORS_PER_BLOCK, SECTORS_PER_CHUNK, Stage

MIB = 1 << 20
BLOCK = SECTORS_PER_BLOCK
BLOCK_BYTES = 512 * BLOCK
SECOND = 1_000_000_000
# Of the simulated base the second block of every six is zeros (fvd/sim/_base.pxd).
ZERO_BLOCK = 1


def copying(**changes: Any) -> Stage:
    stage = Stage(base_bytes=MIB, **changes)
    stage.engine.copy_on_read = True
    return stage


def prefetching(*extents: tuple[int, int], slots: int = 8, **changes: Any) -> Stage:
    stage = Stage(base_bytes=MIB, **changes)
    stage.engine.prefetch_idle_ns = 0
    stage.engine.prefetch_depth = slots
    stage.engine.prefetch_plan(list(extents or [(0, MIB)]))
    return stage


def of_base(op: Operation) -> bool:
    return op.target == BASE


def saving(op: Operation) -> bool:
    return op.target == STORAGE and op.kind == WRITE


# --- copy-on-read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [Layout.COMPACT, Layout.RAW])
def test_a_read_is_answered_before_its_copy_is_saved_and_the_next_one_is_local(layout: Layout) -> None:
    stage = copying(layout=layout)
    read = stage.submit("read", 8, 8)
    (op,) = stage.pending()
    assert of_base(op) and (op.offset_bytes, op.length_bytes) == (0, BLOCK_BYTES)
    stage.finish(op)
    assert read not in stage.in_flight
    (save,) = stage.pending()
    assert saving(save) and save.length_bytes == BLOCK_BYTES
    stage.now("read", 0, BLOCK)  # from the copy's buffer while it is saved
    assert stage.counts()["base_reads"] == 1
    stage.finish_all()
    stage.now("read", 0, BLOCK)
    assert stage.counts()["base_reads"] == 1 and stage.counts()["device_reads"] == 1
    stage.settle()


def test_copies_write_no_metadata_for_the_guest() -> None:
    stage = copying()
    for block in range(15):
        stage.now("read", block * BLOCK, 8)
        stage.now("flush")
    counts = stage.counts()
    assert counts["journal_writes"] == counts["map_writes"] == 0
    assert stage.engine.copy_counters()["lazy_changes"] > 0
    stage.crash()
    assert stage.engine.present_blocks == 0  # a crash costs reads of the base, and no more


def test_copies_are_committed_after_a_while_and_at_close() -> None:
    stage = copying()
    stage.now("read", 0, 8)
    stage.device.advance(29 * SECOND)
    stage.finish_all()
    assert stage.counts()["journal_writes"] == 0
    stage.device.advance(2 * SECOND)
    stage.finish_all()
    assert stage.counts()["journal_writes"] == 1
    stage.engine.copy_on_read = True
    stage.now("read", 5 * BLOCK, 8)
    stage.close()
    assert stage.engine.present_blocks == 2


def test_a_guest_write_to_a_copied_block_is_in_its_next_flush() -> None:
    stage = copying()
    stage.now("read", 0, 8)
    stage.now("write", 0, 8)
    stage.now("flush")
    assert stage.counts()["journal_writes"] == 1
    stage.crash()  # judged by the oracle
    stage.engine.copy_on_read = True
    stage.now("read", 4 * BLOCK, 8)
    stage.now("write", 4 * BLOCK, 8, fua=True)
    stage.crash()


def test_a_guest_write_beside_copied_blocks_leaves_them_soft() -> None:
    stage = copying()
    stage.now("write", 3 * BLOCK, BLOCK)
    stage.now("flush")
    stage.now("read", 0, 8)  # the same chunk and the same word
    before = stage.counts()["journal_writes"]
    stage.now("write", 3 * BLOCK, 8)
    stage.now("flush")
    assert stage.counts()["journal_writes"] == before


def test_a_guest_write_does_not_wait_for_a_base_read_and_wins() -> None:
    stage = copying()
    read = stage.submit("read", 0, 8)
    (op,) = stage.pending()
    write = stage.submit("write", 0, BLOCK)
    stage.finish_all(but=of_base)
    assert write not in stage.in_flight and read in stage.in_flight
    stage.finish(op)
    assert stage.pending(saving) == []  # what it read is old by now
    stage.now("read", 0, BLOCK)
    stage.settle()


def test_a_guest_write_to_other_blocks_waits_for_no_copy() -> None:
    stage = copying()
    stage.submit("read", 0, 8)
    stage.finish(*stage.pending())
    (save,) = stage.pending(saving)
    write = stage.submit("write", 2 * BLOCK, BLOCK)
    stage.finish_all(but=lambda op: op is save)
    assert write not in stage.in_flight
    overlapping = stage.submit("write", 8, 8)
    stage.finish_all(but=lambda op: op is save)
    assert overlapping in stage.in_flight
    stage.finish_all()
    stage.settle()


def test_a_chunk_with_zeros_holds_a_guest_write_up_no_longer_than_its_zeros_take() -> None:
    stage = copying()
    stage.now("zero", 2 * BLOCK, BLOCK)  # by its bits
    stage.submit("read", 0, 8)
    stage.finish(*stage.pending(of_base))
    (fill,) = stage.pending(saving)
    assert fill.length_bytes == BLOCK_BYTES  # the zeros only
    write = stage.submit("write", 3 * BLOCK, BLOCK)
    assert len(stage.pending()) == 1
    stage.finish(fill)
    (save,) = stage.pending(lambda op: op.offset_bytes % (1 << 18) == 0 and saving(op))
    stage.finish_all(but=lambda op: op is save)
    assert write not in stage.in_flight
    stage.settle()


def test_zeros_of_the_base_take_no_storage() -> None:
    stage = copying()
    stage.now("read", ZERO_BLOCK * BLOCK, BLOCK)
    assert stage.engine.used_slots_count == 0 and stage.engine.copy_counters()["zero_bytes"] == BLOCK_BYTES
    stage.now("read", ZERO_BLOCK * BLOCK, BLOCK)
    assert stage.counts()["base_reads"] == 1


def test_reads_of_one_block_share_one_base_read() -> None:
    stage = copying()
    for sector in range(0, BLOCK, 8):
        stage.submit("read", sector, 8)
    (op,) = stage.pending()
    stage.finish(op)
    assert not stage.in_flight
    stage.settle()


def test_buffers_are_capped_and_reads_go_on() -> None:
    stage = copying(copy_limit_bytes=2 * BLOCK_BYTES)
    for block in (0, 2, 3, 4):
        stage.submit("read", block * BLOCK, 8)
    lengths = [op.length_bytes for op in stage.pending()]
    assert lengths == [BLOCK_BYTES, BLOCK_BYTES, 4096, 4096]
    stage.finish_all()
    assert not stage.in_flight and stage.engine.present_blocks == 2


def test_a_full_storage_ends_copies_and_nothing_else() -> None:
    stage = copying(storage_chunks=1, on_full="error")
    stage.set_exhausted(True)
    stage.now("read", 0, 8)
    stage.now("read", SECTORS_PER_CHUNK, 8)
    stage.now("read", 2 * SECTORS_PER_CHUNK, 8)
    assert stage.engine.present_blocks == 1
    stage.now("write", 8, 8)
    stage.settle()


def test_half_of_the_low_water_mark_is_the_guests() -> None:
    stage = prefetching(storage_chunks=3, low_water_chunks=4)
    stage.finish_all()
    assert stage.engine.free_slots == 2 and stage.engine.want & Want.GROWTH and stage.engine.copy_counters()["no_slot_copies"] > 0
    stage.grow()
    stage.device.advance(SECOND)
    stage.finish_all()
    assert stage.engine.base_remaining_bytes == 0


def test_off_means_off() -> None:
    stage = Stage(base_bytes=MIB)
    stage.now("read", 0, 8)
    assert stage.engine.present_blocks == 0 and [op.kind for op in stage.pending()] == []
    stage.engine.copy_on_read = True
    stage.now("read", 0, 8)
    assert stage.engine.present_blocks == 1


# --- prefetching --------------------------------------------------------------------------------------------------


def test_the_plan_is_copied_in_its_order() -> None:
    stage = prefetching((3 * BLOCK_BYTES, BLOCK_BYTES), (9 * BLOCK_BYTES, 1), (0, MIB), slots=1)
    offsets = []
    while ops := stage.pending():
        offsets += [op.offset_bytes for op in ops if of_base(op)]
        stage.finish(*ops)
    assert offsets[:3] == [3 * BLOCK_BYTES, 9 * BLOCK_BYTES, 0]
    assert stage.engine.base_remaining_bytes == 0 and not stage.engine.prefetching
    stage.settle()


def test_no_copy_begins_while_the_guest_is_at_work() -> None:
    stage = prefetching(slots=1)
    stage.engine.prefetch_idle_ns = 20_000_000
    stage.device.advance(SECOND)
    write = stage.submit("write", 0, BLOCK)
    stage.device.advance(SECOND)
    assert not any(of_base(op) for op in stage.pending())
    stage.finish_all()
    assert write not in stage.in_flight
    stage.device.advance(19_000_000)
    assert stage.pending() == []
    stage.device.advance(2_000_000)
    (op,) = stage.pending()
    assert of_base(op)


def test_slots_and_rate_are_kept() -> None:
    stage = prefetching(slots=3)
    assert len(stage.pending(of_base)) == 3
    stage = prefetching(slots=8)
    stage.engine.prefetch_rate_bytes = MIB
    stage.device.advance(10 * SECOND)
    taken = []
    for _ in range(8):
        taken.append(sum(op.length_bytes for op in stage.pending(of_base)))
        stage.finish_all()
        stage.device.advance(SECOND // 4)
    assert taken[0] <= MIB // 4 + (1 << 18) and 0 < sum(taken) <= 2.5 * MIB


def test_the_end_is_committed_and_the_base_released_at_the_cost_of_few_metadata_writes() -> None:
    stage = prefetching()
    stage.finish_all()
    assert stage.engine.base_released and stage.engine.want & Want.BASE
    assert stage.counts()["journal_writes"] == 1 and stage.engine.copy_counters()["lazy_changes"] == 0
    stage.crash()
    assert stage.engine.base_released and stage.engine.base_remaining_bytes == 0
    stage.now("read", 0, 2048)
    assert stage.counts()["base_reads"] == 0


def test_a_base_is_released_only_when_that_is_durable() -> None:
    stage = prefetching()
    stage.finish_all(but=lambda op: op.kind == FLUSH)
    assert stage.engine.base_remaining_bytes == 0 and not stage.engine.base_released
    stage.finish_all()
    assert stage.engine.base_released


def test_a_guest_that_writes_everything_needs_no_base_either() -> None:
    stage = Stage(base_bytes=MIB)
    stage.now("write", 0, 2048)
    assert not stage.engine.base_released
    stage.now("flush")
    assert stage.engine.base_released


def test_after_a_crash_it_goes_on_where_it_was() -> None:
    stage = prefetching((0, MIB // 2))
    stage.finish_all()
    stage.engine.commit_soon()
    stage.finish_all()
    stage.crash()
    assert stage.engine.base_remaining_bytes == MIB // 2
    stage.engine.prefetch_idle_ns, stage.engine.prefetch_depth = 0, 8
    stage.engine.prefetch_plan([(0, MIB)])
    assert min(op.offset_bytes for op in stage.pending(of_base)) == MIB // 2
    stage.finish_all()
    assert stage.engine.base_released


def test_what_is_given_up_is_looked_for_again() -> None:
    stage = prefetching(slots=1)
    (op,) = stage.pending()
    stage.player.errors_expected = True
    stage.device.fault = lambda op: -errno.EIO if op.target == STORAGE and op.kind == WRITE and op.length_bytes > 4096 else 0
    stage.finish(op)
    stage.finish_all()
    assert stage.engine.present_blocks < 16 and stage.engine.prefetching
    stage.device.fault = None
    for _ in range(8):
        stage.device.advance(SECOND)
        stage.finish_all()
    assert stage.engine.base_released


# --- a base that fails ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copy_on_read", [True, False])
def test_a_failed_base_read_is_tried_again_in_time(copy_on_read: bool) -> None:
    stage = Stage(base_bytes=MIB, base_timeout_ns=2 * SECOND)
    stage.engine.copy_on_read = copy_on_read
    stage.device.fault = lambda op: -errno.EIO if of_base(op) else 0
    read = stage.submit("read", 0, 8)
    partial = stage.submit("write", 4 * BLOCK, 8)
    stage.finish_all()
    assert {read, partial} <= set(stage.in_flight) and stage.engine.base_failing and stage.engine.want & Want.BASE
    stage.now("write", 8 * BLOCK, BLOCK)  # needs no base
    stage.now("read", 8 * BLOCK, BLOCK)
    stage.now("flush")
    stage.device.fault = None
    stage.device.advance(SECOND)
    stage.finish_all()
    assert not stage.in_flight and not stage.engine.base_failing
    stage.settle()


@pytest.mark.parametrize("copy_on_read", [True, False])
def test_a_base_that_stays_away_fails_the_request_and_only_it(copy_on_read: bool) -> None:
    log: list[str] = []
    stage = Stage(base_bytes=MIB, base_timeout_ns=2 * SECOND, log=log)
    stage.engine.copy_on_read = copy_on_read
    stage.player.errors_expected = True
    stage.device.fault = lambda op: -errno.EIO if of_base(op) else 0
    read = stage.submit("read", 0, 8)
    for _ in range(7):
        stage.finish_all()
        assert read in stage.in_flight
        stage.device.advance(SECOND // 4)
    later = stage.submit("read", 8, 8)  # it may join what the first one waits for, and has its own time
    stage.finish_all()
    stage.device.advance(SECOND // 2)
    stage.finish_all()
    assert read not in stage.in_flight and later in stage.in_flight
    assert any(line.endswith(f"read {-errno.EIO}") for line in log)
    stage.device.fault = None
    stage.device.advance(SECOND)
    stage.finish_all()
    assert later not in stage.in_flight
    stage.settle()


def test_prefetching_asks_a_failing_base_once_a_second() -> None:
    stage = prefetching()
    stage.device.advance(10 * SECOND)
    stage.device.fault = lambda op: -errno.EIO if of_base(op) else 0
    stage.finish_all()
    before = stage.counts()["base_reads"]
    for _ in range(40):
        stage.device.advance(SECOND // 4)
        stage.finish_all()
    assert 5 <= stage.counts()["base_reads"] - before <= 15
    stage.device.fault = None
    for _ in range(8):
        stage.device.advance(SECOND)
        stage.finish_all()
    assert stage.engine.base_released and not stage.engine.base_failing


@pytest.mark.parametrize("copy_on_read", [True, False])
def test_what_waits_for_the_base_can_be_ended(copy_on_read: bool) -> None:
    """A server that stops, or whose client has gone, does not wait as long as a guest would."""
    log: list[str] = []
    stage = Stage(base_bytes=MIB, base_timeout_ns=1000 * SECOND, log=log)
    stage.engine.copy_on_read = copy_on_read
    stage.device.fault = lambda op: -errno.EIO if of_base(op) else 0
    stage.player.cancelled = True
    stage.submit("read", 0, 8)
    stage.submit("read", 8, 8)
    stage.submit("write", 4 * BLOCK, 8)
    stage.finish_all()
    assert stage.engine.waits_for_clock
    assert stage.engine.cancel_all_waiting(errno.ESHUTDOWN) == 3
    stage.finish_all()
    assert not stage.in_flight and sum(line.endswith(str(-errno.ESHUTDOWN)) for line in log) == 3
    assert stage.engine.leaks() == {}
    stage.device.fault = None
    stage.settle()


def test_close_does_not_wait_for_a_base_that_fails() -> None:
    stage = Stage(base_bytes=MIB, base_timeout_ns=1000 * SECOND)
    stage.player.errors_expected = True
    stage.device.fault = lambda op: -errno.EIO if of_base(op) else 0
    read = stage.submit("read", 0, 8)
    stage.finish_all()
    stage.begin_close()
    stage.finish_all()
    assert read not in stage.in_flight and not stage.in_flight


# --- the profile ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copy_on_read", [True, False])
def test_what_guests_read_from_the_base_is_remembered_in_order(copy_on_read: bool) -> None:
    stage = Stage(base_bytes=MIB)
    stage.engine.copy_on_read = copy_on_read
    stage.now("read", 5 * BLOCK, 8)
    stage.now("read", 5 * BLOCK + 8, 8)
    stage.now("read", 0, BLOCK)
    found = stage.engine.read_profile()
    assert found[0][0] == 5 * BLOCK_BYTES and found[-1] == (0, BLOCK_BYTES)
    stage.now("write", 8 * BLOCK, BLOCK)
    stage.now("read", 8 * BLOCK, BLOCK)
    assert stage.engine.read_profile() == found


def test_prefetching_is_in_no_profile() -> None:
    stage = prefetching()
    stage.finish_all()
    assert stage.engine.read_profile() == []


def test_reads_of_storage_are_of_no_interest_to_the_base() -> None:
    stage = copying()
    stage.now("read", 0, 8)
    assert [op.kind for op in stage.pending() if op.kind == READ] == []
