# SPDX-License-Identifier: Apache-2.0
"""Rule R13: the server is killed while a commit is readable but not durable, or on its way though it has failed, starts again, and then
power fails.

The flush itself is in fvd.disk.recovery; here the same histories are played with it and without it, or with what was read before it.
"""

from __future__ import annotations

import errno

import pytest

from fvd.disk import recovery
from fvd.disk.loading import LoadedDisk, load_disk
from fvd.disk.pending import FoundLog
from fvd.errors import Corrupt
from fvd.sim import world
from fvd.sim._device import WRITE
from fvd.sim._oracle import Violation
from fvd.sim.stage import SECTORS_PER_CHUNK, Stage


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


def failed_commit_lands_before_the_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit that gave chunk 0 its slot has failed, and reaches the device while the next server opens the disk, which gives the slot
    to chunk 1. Power fails before that is committed."""
    stage = Stage(storage_chunks=1)
    stage.now("write", 0, 8)
    stage.player.errors_expected = True
    stage.submit("flush")
    stage.finish_all(but=lambda op: op.kind == WRITE)
    (journal,) = stage.pending()
    start, page = journal.offset_bytes, journal.content
    before = bytes(stage.image[start : start + len(page)])
    stage.effect(journal)
    stage.image[start : start + len(page)] = before  # nothing of it is there yet
    journal.result = -errno.EIO
    stage.finish(journal)
    flush = recovery.make_durable

    def late(node: recovery.RecoverablePages) -> None:
        stage.image[start : start + len(page)] = page
        flush(node)

    monkeypatch.setattr(recovery, "make_durable", late)
    stage.kill()
    monkeypatch.setattr(recovery, "make_durable", flush)
    stage.submit("write", SECTORS_PER_CHUNK, 8)
    stage.finish_all()
    stage.device.flush_everything()
    stage.crash()


def test_what_lands_before_the_flush_is_seen_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    failed_commit_lands_before_the_flush(monkeypatch)


def test_what_was_read_before_the_flush_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    def believing(node: recovery.RecoverablePages, *, read_only: bool, pending_log: FoundLog | None) -> LoadedDisk:
        before = load_disk(node)
        recovery.recover_disk(node, read_only=read_only, pending_log=pending_log)
        return before

    monkeypatch.setattr(world, "recover_disk", believing)
    with pytest.raises((Violation, Corrupt)):
        failed_commit_lands_before_the_flush(monkeypatch)
