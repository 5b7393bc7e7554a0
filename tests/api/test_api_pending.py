# SPDX-License-Identifier: Apache-2.0
"""Writes that may be gone, for programs: the event, the fields of `info`, what is refused, and `acknowledge` by every way there is."""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import fvd
import fvd.aio
from fvd.api.types import info_from_json
from fvd.device.node import open_node
from fvd.format.superblock import LossReason, LossRecord, Superblock
from fvd.volume.superblocks import read_superblock, write_superblock

MIB = 1 << 20
SECONDS = 1_700_000_000


def superblock(volume: str) -> Superblock:
    with open_node(volume.removeprefix("file:"), read_only=True) as node:
        return read_superblock(node)


@pytest.fixture
def volume(tmp_path: Path) -> str:
    """A disk that was closed cleanly, of which writes may be gone."""
    name = f"file:{tmp_path / 'vm1.img'}"
    fvd.provision(name, "256M", grow_step="16M", journal_size="1M")
    with open_node(tmp_path / "vm1.img") as node:
        loss = LossRecord(SECONDS, LossReason.FLUSH_FAILED)
        write_superblock(node, read_superblock(node).renewed(log=None, loss=loss))
    return name


def killed_without_its_log(volume: str, pending_dir: Path, tmp_path: Path) -> None:
    """The disk as a killed server left it, and its log gone."""
    image, saved = Path(volume.removeprefix("file:")), tmp_path / "saved"
    with fvd.open(volume) as disk:
        disk.pwrite(0, b"A" * 4096)
        saved.write_bytes(image.read_bytes())
    image.write_bytes(saved.read_bytes())
    assert not list(pending_dir.iterdir())


@pytest.mark.parametrize("way", ["open", "serve"])
def test_every_open_tells_it_until_it_was_seen(volume: str, tmp_path: Path, way: str, caplog: pytest.LogCaptureFixture) -> None:
    heard: list[fvd.Event] = []

    def opened() -> fvd.Disk | fvd.Served:
        return fvd.open(volume, on_event=heard.append) if way == "open" else fvd.serve(volume, socket=tmp_path / "s", on_event=heard.append)

    for _ in range(2):
        with opened() as disk:
            loss = disk.info().possible_loss
            assert loss is not None and (loss.seconds, loss.reason) == (SECONDS, "flush_failed")
            remembered = disk.events(history=True)
        expected = [*(["served"] if way == "serve" else []), "possible_loss", "closed"]
        assert [event.kind for event in heard] == expected
        assert [event.kind for event in remembered] == expected
        assert heard[-2].message == loss.message and heard[-2].number == len(expected) - 1
        heard.clear()
    assert [record.levelno for record in caplog.records if "possible loss" in record.message] == [logging.WARNING] * 2
    with opened() as disk:
        assert disk.acknowledge() and not disk.acknowledge()
        assert disk.info().possible_loss is None
    heard.clear()
    with opened() as disk:
        assert disk.info().possible_loss is None
    assert "possible_loss" not in [event.kind for event in heard] and superblock(volume).loss is None


def test_a_closed_disk(volume: str) -> None:
    found = fvd.info(volume)
    assert found.possible_loss is not None and found.possible_loss.reason == "flush_failed" and found.clean and not found.left_open
    assert fvd.acknowledge(volume) and not fvd.acknowledge(volume)
    assert fvd.info(volume).possible_loss is None


def test_a_served_one_is_asked(volume: str, tmp_path: Path) -> None:
    with fvd.serve(volume, socket=tmp_path / "vm.sock") as served:
        assert fvd.acknowledge(volume) and not fvd.acknowledge(volume) and not served.acknowledge(volume)
        with pytest.raises(fvd.NotFound):
            served.acknowledge("file:/elsewhere")
        found = fvd.info(volume)
        assert found.possible_loss is None and found.pending_log is not None and Path(found.pending_log).exists()
    assert superblock(volume).loss is None


def test_read_only_it_can_be_seen_and_not_acknowledged(volume: str) -> None:
    heard: list[fvd.Event] = []
    with fvd.open(volume, read_only=True, on_event=heard.append) as disk:
        with pytest.raises(fvd.ReadOnly):
            disk.acknowledge()
        assert disk.info().possible_loss is not None and disk.info().pending_log is None
    assert [event.kind for event in heard] == ["possible_loss", "closed"]
    assert fvd.acknowledge(volume)
    with fvd.open(volume, read_only=True) as disk:
        assert not disk.acknowledge()


def test_a_missing_log_is_refused_unless_asked(volume: str, tmp_path: Path, pending_dir: Path) -> None:
    fvd.acknowledge(volume)
    killed_without_its_log(volume, pending_dir, tmp_path)
    found = fvd.info(volume)
    assert found.left_open and found.pending_changes == 0 and found.possible_loss is not None and found.notices
    for action in (lambda: fvd.open(volume), lambda: fvd.serve(volume, socket=tmp_path / "s"), lambda: fvd.acknowledge(volume)):
        with pytest.raises(fvd.Conflict):
            action()
    with fvd.serve(volume, socket=tmp_path / "s", discard_pending=True) as served:
        loss = served.info().possible_loss
        assert loss is not None and loss.reason == "log_missing" and served.acknowledge()
    killed_without_its_log(volume, pending_dir, tmp_path)
    with fvd.open(volume, discard_pending=True) as disk:
        assert disk.info().possible_loss is not None


def test_asyncio(volume: str, tmp_path: Path, pending_dir: Path) -> None:
    async def work() -> None:
        async with fvd.aio.serve(volume, socket=tmp_path / "s") as served:
            assert await served.acknowledge() and not await served.acknowledge(volume)
        assert not await fvd.aio.acknowledge(volume)
        killed_without_its_log(volume, pending_dir, tmp_path)
        with pytest.raises(fvd.Conflict):
            await fvd.aio.open(volume)
        async with fvd.aio.open(volume, discard_pending=True) as disk:
            assert await disk.acknowledge() and not await disk.acknowledge()

    asyncio.run(work())


def test_info_of_another_version(volume: str) -> None:
    """One that knows nothing of it, and one that knows more."""
    now = asdict(fvd.info(volume))
    new = ("possible_loss", "pending_log", "left_open", "pending_changes", "notices")
    older = info_from_json({name: value for name, value in now.items() if name not in new})
    assert older.possible_loss is None and older.notices == [] and older == replace(fvd.info(volume), possible_loss=None)
    found = info_from_json({**now, "possible_loss": {"seconds": 5, "reason": "moonlight", "message": "m", "more": 1}})
    assert found.possible_loss == fvd.PossibleLoss(5, "moonlight", "m")
    assert json.loads(json.dumps(asdict(found)))["possible_loss"] == {"seconds": 5, "reason": "moonlight", "message": "m"}
