# SPDX-License-Identifier: Apache-2.0
"""That acknowledged writes may be gone is told until somebody has seen it: of a disk that nobody has open."""

from __future__ import annotations

from pathlib import Path

import pytest

from disks import crash, driven, make, start, volume
from fvd.device.node import open_node
from fvd.disk import acknowledging
from fvd.disk.acknowledging import acknowledge
from fvd.disk.opening import open_volume
from fvd.errors import Conflict, DeviceError, InUse, NotFound
from fvd.format.superblock import LossReason, LossRecord, Superblock
from fvd.volume.superblocks import read_superblock, write_superblock

LOSS = LossRecord(1_700_000_000, LossReason.FLUSH_UNHEARD)


def superblock(path: Path) -> Superblock:
    with open_node(path, read_only=True) as node:
        return read_superblock(node)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A disk that was closed cleanly, of which writes may be gone."""
    path = tmp_path / "disk.img"
    make(path)
    with open_node(path) as node:
        write_superblock(node, read_superblock(node).renewed(log=None, loss=LOSS))
    return path


def test_it_is_told_until_it_was_seen(path: Path) -> None:
    for _ in range(2):
        with driven(path) as driver:
            assert driver.volume.loss == LOSS, "also of an open that finds nothing new"
    generation = superblock(path).generation
    assert acknowledge(volume(path))
    assert (superblock(path).loss, superblock(path).generation) == (None, generation + 1)
    assert not acknowledge(volume(path)) and superblock(path).generation == generation + 1, "nothing is written for nothing"
    with driven(path) as driver:
        assert driver.volume.loss is None


def test_the_log_of_a_dead_server_is_not_ended_by_it(path: Path) -> None:
    """R21: another generation would end it."""
    driver = start(path)
    driver.pwrite(0, b"A" * 4096)
    crash(driver)
    before = path.read_bytes()
    with pytest.raises(Conflict, match="serve it"):
        acknowledge(volume(path))
    assert path.read_bytes() == before
    with driven(path) as driver:
        assert driver.pread(0, 1) == b"A" and driver.volume.loss == LOSS


def test_an_open_disk_is_not_touched(path: Path) -> None:
    with driven(path), pytest.raises(InUse):
        acknowledge(volume(path))
    with driven(path, read_only=True), pytest.raises(InUse):
        acknowledge(volume(path))


def test_a_write_that_fails_acknowledges_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise DeviceError("the medium has gone")

    monkeypatch.setattr(acknowledging, "write_superblock", fail)
    with pytest.raises(DeviceError):
        acknowledge(volume(path))
    assert superblock(path).loss == LOSS


def test_an_open_that_nobody_used_leaves_nothing_to_ask_about(path: Path, pending_dir: Path) -> None:
    """A server that finds its address in use has opened the disk, and drives it never."""
    open_volume(volume(path)).close()
    assert superblock(path).log is None and superblock(path).loss == LOSS and list(pending_dir.iterdir()) == []
    assert acknowledge(volume(path))
    driver = start(path)
    driver.pwrite(0, b"A" * 4096)
    crash(driver)
    open_volume(volume(path)).close()
    assert superblock(path).log is None, "what was in the log is committed"
    with driven(path) as driver:
        assert driver.pread(0, 1) == b"A"


def test_what_is_no_disk(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(bytes(1 << 20))
    for name in ("other", "absent"):
        with pytest.raises(NotFound):
            acknowledge(volume(tmp_path / name))
