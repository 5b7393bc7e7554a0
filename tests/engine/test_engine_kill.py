"""Rule R13: the server is killed while a commit is readable but not durable, starts again, and then power fails.

The flush itself is in fvd.volume.recovery; here the same history is played with it and without it.
"""

from __future__ import annotations

import pytest

from fvd.sim._device import WRITE
from fvd.sim._oracle import Violation
from fvd.sim.stage import Stage
from fvd.volume import recovery


def kill_restart_write_power_cut() -> None:
    stage = Stage()
    stage.now("write", 0, 8)
    stage.submit("flush")
    stage.finish_all(but=lambda op: op.kind == WRITE)
    (journal,) = stage.pending()
    stage.effect(journal)  # visible to reads, not durable: now kill -9
    stage.kill()
    stage.now("write", 0, 8, fua=True)
    image = bytearray(stage.image)
    for offset, contents in stage.device.volatile():
        image[offset : offset + len(contents[0])] = contents[0]  # power fails: nothing volatile survives
    stage.device.put_back(image)
    stage.player.abandon()
    stage.open()
    stage.oracle.check_after_crash(stage.read_all())


def test_with_the_flush_nothing_is_lost() -> None:
    kill_restart_write_power_cut()


def test_without_it_a_durable_write_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "make_durable", lambda node: None)
    with pytest.raises(Violation):
        kill_restart_write_power_cut()
