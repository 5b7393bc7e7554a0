# SPDX-License-Identifier: Apache-2.0
"""Guests' writes for which what the storage lies on has no space: with on_full="wait" they wait and go on, at whatever moment."""

from __future__ import annotations

import errno
import random

import pytest
from test_engine_stop import CLOSE, FLUSH, FUA, KIB, READ, TRIM, WRITE, WRITE_ZEROES, Workbench, bench

from fvd.engine._engine import Want

SECOND = 1_000_000_000


def starve(it: Workbench, error: int = -errno.ENOSPC) -> None:
    """Everything that is under way now finds no space."""
    for _ in range(len(it.operations)):
        it.complete(0, error)
    it.take()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
def test_a_write_waits_and_goes_on(error: int) -> None:
    it = bench(base_size_bytes=None, copy_on_read=False)
    engine = it.engine
    for block in range(3):
        it.submit(WRITE, block * 64 * KIB, 64 * KIB)
    it.take()
    engine.advance_clock(SECOND)
    engine.want = 0
    starve(it, -error)
    assert engine.storage_below_full and engine.starved_count == 3 and engine.want & Want.STORAGE_BELOW and not it.answered
    engine.want = 0
    engine.advance_clock(2 * SECOND - 1)
    it.take()
    assert not it.operations
    engine.advance_clock(2 * SECOND)
    it.take()
    assert len(it.operations) == 1, "one asks"
    starve(it)
    engine.advance_clock(3 * SECOND)
    it.take()
    it.complete(0)
    it.take()
    assert len(it.operations) == 2 and it.answered == [(2, 0)] and engine.storage_below_full, "there is space: the others follow"
    while it.operations:
        it.complete(0)
        it.take()
    assert (
        not it.open
        and not engine.storage_below_full
        and engine.starved_count == 0
        and engine.want & Want.STORAGE_BELOW
        and engine.leaks() == {}
    )


def test_it_fails_where_that_was_asked_for() -> None:
    it = bench(base_size_bytes=None, copy_on_read=False, on_full="error")
    it.submit(WRITE, 0, 64 * KIB)
    it.take()
    starve(it)
    assert it.answered == [(1, -errno.ENOSPC)] and it.engine.storage_below_full and it.engine.want & Want.STORAGE_BELOW
    it.submit(WRITE, 0, 64 * KIB)
    it.take()
    it.complete(0)
    it.take()
    assert not it.engine.storage_below_full


def test_reads_and_overwrites_go_on() -> None:
    it = bench(base_size_bytes=None, copy_on_read=False)
    it.submit(WRITE, 0, 64 * KIB)
    it.take()
    it.complete(0)
    it.submit(WRITE, 128 * KIB, 64 * KIB)
    it.take()
    starve(it)
    for kind in (READ, WRITE):
        it.submit(kind, 0, 64 * KIB)
        it.take()
        it.complete(0)
        it.take()
    assert [error for _, error in it.answered] == [0, 0, 0] and it.engine.storage_below_full and it.engine.starved_count == 1


def test_a_copy_says_nothing_of_space() -> None:
    """Its slot may have its blocks already."""
    it = bench(on_full="error")
    it.submit(WRITE, 0, 64 * KIB)
    it.take()
    starve(it)
    it.engine.want = 0
    it.submit(READ, 128 * KIB, 64 * KIB)
    it.take()
    while it.operations:  # from the base, and into the disk
        it.complete(0)
        it.take()
    assert it.engine.present_blocks == 1
    assert it.engine.storage_below_full and not it.engine.want & Want.STORAGE_BELOW


@pytest.mark.parametrize(("how", "error"), [("close", errno.ESHUTDOWN), ("cancel", errno.ENOSPC), ("stop", errno.EIO), ("fail", errno.EIO)])
def test_what_waits_ends(how: str, error: int) -> None:
    it = bench(base_size_bytes=None, copy_on_read=False)
    it.submit(WRITE, 0, 64 * KIB)
    it.submit(WRITE, 64 * KIB, 64 * KIB)
    it.take()
    starve(it)
    if how == "close":
        it.submit(CLOSE, 0, 0)
    elif how == "cancel":
        assert it.engine.cancel_all_waiting(errno.ENOSPC) == 2
    elif how == "stop":
        it.engine.stop()
    else:
        it.engine.note_failed_flush(errno.EIO)
    it.take()
    assert dict(it.answered)[1] == dict(it.answered)[2] == -error and it.engine.starved_count == 0


@pytest.mark.parametrize("seed", range(40))
def test_nothing_is_forgotten(seed: int) -> None:
    """Full and not full by turns, beside everything else: each request ends well in the end."""
    rng = random.Random(seed)
    it = bench(zero_chunks=seed % 2 == 0, durable_writes=False)
    engine = it.engine
    clock, full = 0, False
    kinds: dict[int, str] = {}

    def turn() -> None:
        nonlocal clock, full
        full = not full if rng.random() < 0.1 else full
        if it.operations:
            at = rng.randrange(len(it.operations))
            token = it.operations[at]
            it.complete(at, -errno.ENOSPC if full and kinds[token] == "write" else 0)
        engine.advance_clock(clock := clock + 300_000_000)
        engine.set_storage_size(engine.storage_size_bytes)
        take()

    def take() -> None:
        for token, kind, target, offset, *_ in engine.take_operations():
            it.operations.append(token)
            kinds[token] = "write" if kind == 1 and target == 0 and offset >= it.data_offset else "other"
        for cookie, error in engine.take_done():
            it.open.remove(cookie)
            it.answered.append((cookie, error))

    for _ in range(150):
        if len(it.open) < 10 and rng.random() < 0.5:
            kind = rng.choice((READ, WRITE, WRITE, WRITE, TRIM, WRITE_ZEROES, FLUSH))
            offset = 0 if kind == FLUSH else rng.randrange(0, 256 * KIB, 512)
            length = 0 if kind == FLUSH else rng.choice((512, 4096, 64 * KIB, 200 * KIB))
            it.submit(kind, offset, length, FUA if kind == WRITE and rng.random() < 0.2 else 0)
        turn()
    for _ in range(2000):
        full = False
        turn()
        if not it.open and not it.operations:
            break
    failed = [(cookie, error) for cookie, error in it.answered if error]
    assert not it.open and engine.leaks() == {} and not engine.storage_below_full
    assert not engine.failed_errno and not failed
