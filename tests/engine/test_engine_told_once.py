# SPDX-License-Identifier: Apache-2.0
"""What the engine makes of failures from outside, and what its log says of durability operations (R24, R26, R30)."""

from __future__ import annotations

import errno

import pytest

from fvd.errors import InvalidArgument
from fvd.format import pending
from fvd.sim._device import FLUSH
from fvd.sim.stage import SECTORS_PER_BLOCK, Stage


def under_way(stage: Stage) -> int:
    """Flushes and durable writes that the next process must take for unheard, were this one killed now."""
    assert stage.log_memory is not None
    return pending.read(stage.log_memory.buffer, stage.geometry, stage._log_identity()).durability_ops


def two_durable_writes() -> Stage:
    stage = Stage()
    stage.now("write", 0, 2 * SECTORS_PER_BLOCK)
    stage.now("flush")
    for number in range(2):
        stage.submit("write", number * SECTORS_PER_BLOCK, 8, fua=True)
    return stage


def test_log_counts_what_nobody_may_have_heard() -> None:
    """One whose end is held back counts until it is answered: it rests on the other's."""
    stage = two_durable_writes()
    one, other = stage.pending()
    assert under_way(stage) == 2
    stage.finish(one)
    assert under_way(stage) == 2 and len(stage.in_flight) == 2
    stage.finish(other)
    assert under_way(stage) == 0 and not stage.in_flight
    stage.submit("flush")
    assert under_way(stage) == 1
    stage.finish_all()
    assert under_way(stage) == 0
    stage.settle()


def test_log_says_that_a_durable_write_failed() -> None:
    stage = two_durable_writes()
    stage.player.errors_expected = True
    one, other = stage.pending()
    stage.effect(one)
    one.result = -errno.ENOSPC
    stage.finish(other)
    stage.finish(one)
    assert stage.log_memory is not None
    found = pending.read(stage.log_memory.buffer, stage.geometry, stage._log_identity())
    assert found.failed_errno == errno.ENOSPC and found.durability_ops == 0
    assert stage.engine.failed_errno == stage.engine.flush_failed_errno == errno.ENOSPC


@pytest.mark.parametrize("number", [0, -errno.EIO])
def test_a_failure_has_an_errno(number: int) -> None:
    stage = Stage()
    with pytest.raises(InvalidArgument):
        stage.engine.note_failed_flush(number)
    assert stage.engine.failed_errno == 0


def test_failure_from_outside_is_not_the_disks_own() -> None:
    """Whoever tells the others of it does so once: not each disk that has heard."""
    stage = two_durable_writes()
    stage.player.errors_expected = True
    one, other = stage.pending()
    stage.finish(one)
    stage.engine.note_failed_flush(errno.EIO)
    assert not [kind for kind in stage.in_flight.values() if kind == "flush"] and stage.engine.failed_errno == errno.EIO
    stage.finish(other)
    assert not stage.in_flight and stage.engine.flush_failed_errno == 0 and not stage.engine.leaks()
    stage.device.fault = lambda op: -errno.EIO if op.kind == FLUSH else 0
    stage.now("flush")
    assert stage.engine.flush_failed_errno == 0  # none was issued
