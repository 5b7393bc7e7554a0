"""Rule R13: the server is killed while a commit is readable but not durable, starts again, and then power fails.

The flush itself is in fvd.volume.opening; here the same history is played with it and without it.
"""

from __future__ import annotations

import pytest
from stage import Stage

from fvd.sim.device import WRITE
from fvd.sim.oracle import Violation


def kill_restart_write_power_cut(flush_at_open: bool) -> None:
    stage = Stage()
    stage.now("write", 0, 8)
    stage.submit("flush", 0, 0)
    stage.finish_all(but=lambda op: op.kind == WRITE)
    (journal,) = stage.pending()
    stage.effect(journal)  # visible to reads, not durable: now kill -9
    stage.device.pending.clear()
    stage.in_flight.clear()
    if flush_at_open:
        stage.device.flush_everything()
    stage.engine = stage.make_engine()  # the new process reads what is visible
    stage.now("write", 0, 8, fua=True)
    for offset, contents in stage.device.volatile():
        stage.image[offset : offset + len(contents[0])] = contents[0]  # power fails: nothing volatile survives
    stage.open()
    stage.oracle.check_after_crash(stage.read_all())


def test_with_the_flush_nothing_is_lost() -> None:
    kill_restart_write_power_cut(flush_at_open=True)


def test_without_it_a_durable_write_is_lost() -> None:
    with pytest.raises(Violation):
        kill_restart_write_power_cut(flush_at_open=False)
