# SPDX-License-Identifier: Apache-2.0
"""Judges that allow what is odd and right, and still see what is wrong beside it."""

from __future__ import annotations

import pytest

from fvd.format.maps import MapKind
from fvd.sim._oracle import SECTOR_BYTES, Oracle, Violation
from fvd.sim.stage import SECTORS_PER_BLOCK, Stage
from fvd.sim.torture import play_one

pytestmark = pytest.mark.checked_once

# Worlds in which a judge once found what was right.
TOO_STRICT = {
    12000000754: "copies on a disk that has failed",
    12000002037: "a checkpoint beside a commit whose good end is held back",
    12000004735: "slots after a commit that has failed",
    12000006889: "what one failed write has left, brought back by another's that lands late",
    16000001974: "an older value, brought back by a failed write of another part of its block",
    16000108649: "a slot that a later write took, while an earlier one waited for memory",
    18000101153: "what the page cache lost, brought back by a write of another part of its block that had read it",
    21000000082: "one who opened the disk was told of a failure, and killed",
    466448788406: "slots that a request asks for bit by bit",
}


@pytest.mark.parametrize("seed", TOO_STRICT)
def test_what_is_right_is_allowed(seed: int) -> None:
    outcome, found = play_one(seed)
    assert found is None, found
    assert outcome.requests > 0


def test_a_page_that_is_behind_keeps_its_commit_in_the_journal() -> None:
    """The first word of the bitmap was written as it was before a commit, and no checkpoint writes it again: the tail may not pass."""
    stage = Stage()
    stage.now("write", 0, SECTORS_PER_BLOCK)
    stage.now("flush")
    (before, sequence) = stage.metadata._before[MapKind.BITMAP, 0]
    assert before == 0
    stage.metadata._behind[MapKind.BITMAP, 0] = sequence
    stage.metadata._map = lambda *about: None  # type: ignore[method-assign]
    with pytest.raises(Violation, match="the tail passes the commit of bitmap 0"):
        for number in range(40):
            stage.now("write" if number % 2 else "trim", 0, SECTORS_PER_BLOCK)
            stage.now("flush")


def test_a_page_that_is_written_is_behind_no_more() -> None:
    stage = Stage()
    stage.now("write", 0, SECTORS_PER_BLOCK)
    stage.now("flush")
    stage.metadata._behind[MapKind.BITMAP, 0] = stage.metadata._before[MapKind.BITMAP, 0][1]
    for number in range(40):
        stage.now("write" if number % 2 else "trim", 0, SECTORS_PER_BLOCK)
        stage.now("flush")
    assert stage.metadata._behind == {}


@pytest.mark.parametrize("lands_late", [False, True])
@pytest.mark.parametrize("succeeds", [False, True])
def test_what_a_read_settles(lands_late: bool, succeeds: bool) -> None:
    """Zeros, then a write, which a read shows: whether a later read may show zeros again."""
    oracle = Oracle(4096, None, None)
    oracle.lands_late = lands_late
    number = oracle.begin_write(0, 1)
    written = bytes(oracle.stamp(number, 0, 1))
    oracle.end_write(number, succeeds, False)
    oracle.check_read(0, oracle.begin_read(), written)
    began = oracle.begin_read()
    if lands_late and not succeeds:
        oracle.check_read(0, began, bytes(SECTOR_BYTES))
    else:
        with pytest.raises(Violation, match="a read showed zeros"):
            oracle.check_read(0, began, bytes(SECTOR_BYTES))


@pytest.mark.parametrize("since_before", [False, True])
def test_what_a_read_settles_beside_a_loss(since_before: bool) -> None:
    """The storage loses a write; a write of another part of the block, under way since before that, may have read it and bring it back."""
    oracle = Oracle(4096, None, None)
    number = oracle.begin_write(0, 1)
    written = bytes(oracle.stamp(number, 0, 1))
    oracle.end_write(number, True, False)
    other = oracle.begin_write(1, 1) if since_before else 0
    oracle.doubt()
    oracle.check_read(0, oracle.begin_read(), bytes(SECTOR_BYTES))
    if since_before:
        oracle.end_write(other, True, False)
        oracle.check_read(0, oracle.begin_read(), written)
    else:
        with pytest.raises(Violation, match="a read showed write 1"):
            oracle.check_read(0, oracle.begin_read(), written)
