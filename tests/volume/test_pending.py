# SPDX-License-Identifier: Apache-2.0
"""The pending log in a disk's life: what a dead server had acknowledged is there at the next open, or the open says why it is not."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from disks import MIB, crash, driven, make, start, volume
from fvd.device import surviving
from fvd.device.node import Node, open_node
from fvd.disk import opening, pending, recovery
from fvd.disk.opening import open_volume
from fvd.errors import Conflict, DeviceError
from fvd.format import pending as layout
from fvd.format.geometry import Layout
from fvd.format.maps import map_hash
from fvd.format.superblock import SLOT_OFFSETS_BYTES, LossReason, Superblock, encode
from fvd.inspect.check import check
from fvd.inspect.info import info
from fvd.modes import CACHE_MODES
from fvd.volume.superblocks import read_superblock

A, B, C = (letter * 4096 for letter in (b"A", b"B", b"C"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "disk.img"


def superblock(path: Path) -> Superblock:
    with open_node(path, read_only=True) as node:
        return read_superblock(node)


def logs(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.exists() else []  # noqa: PTH208


def left_log(folder: Path) -> surviving.SurvivingMemory:
    """The only log that there is."""
    (name,) = logs(folder)
    return surviving.find(folder / name)


def log_of_one_write(path: Path, folder: Path) -> tuple[surviving.SurvivingMemory, Any]:
    """What a server that was killed after one write has left, and its header."""
    make(path)
    driver = start(path)
    driver.pwrite(0, A)
    crash(driver)
    memory = left_log(folder)
    return memory, np.frombuffer(memory.buffer, layout.HEADER, 1)


def written_and_killed(path: Path, **options: Any) -> None:
    """A: written and flushed; B: written; a chunk trimmed; the server dies."""
    driver = start(path, **options)
    driver.pwrite(0, A)
    driver.pwrite(4 * MIB, A * 256)
    driver.flush()
    driver.pwrite(MIB, B)
    driver.pwrite(8192, C)
    driver.trim(4 * MIB, MIB)
    crash(driver)


def shows_everything(path: Path, **options: Any) -> None:
    with driven(path, **options) as driver:
        assert driver.pread(0, 4096) == A and driver.pread(MIB, 4096) == B and driver.pread(8192, 4096) == C
        assert driver.pread(4 * MIB, MIB) == bytes(MIB)


@pytest.mark.parametrize("layout_of_disk", Layout)
@pytest.mark.parametrize("cache", CACHE_MODES)
def test_what_was_acknowledged_survives_the_process(path: Path, pending_dir: Path, cache: str, layout_of_disk: Layout) -> None:
    make(path, layout=layout_of_disk)
    written_and_killed(path, cache=cache)
    assert len(logs(pending_dir)) == 1
    with driven(path, read_only=True) as driver:
        assert driver.pread(MIB, 4096) == B and driver.pread(8192, 4096) == C, "a read-only open replays in memory"
    assert len(logs(pending_dir)) == 1, "and removes nothing"
    shows_everything(path, cache=cache)
    assert logs(pending_dir) == [] and superblock(path).log is None, "a clean close leaves nothing"
    assert check(volume(path)).errors == []


def test_a_disk_over_a_base_keeps_its_writes_and_trims(path: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.write_bytes(os.urandom(8 * MIB))
    make(path, base=base, block_size_bytes=4096)
    driver = start(path)
    driver.pwrite(100, b"mine")
    driver.trim(2 * MIB, MIB)
    driver.pwrite(3 * MIB, A)
    crash(driver)
    raw = base.read_bytes()
    with driven(path) as driver:
        assert driver.pread(0, 4096) == raw[:100] + b"mine" + raw[104:4096]
        assert driver.pread(2 * MIB, MIB) == bytes(MIB), "a trimmed chunk never shows the base again"
        assert driver.pread(3 * MIB, 8192) == A + raw[3 * MIB + 4096 : 3 * MIB + 8192]


def test_deaths_in_a_row_and_then_a_power_failure(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(path)
    for number in range(5):
        driver = start(path)
        for earlier in range(number):
            assert driver.pread(earlier * MIB, 4096) == bytes([65 + earlier]) * 4096
        driver.pwrite(number * MIB, bytes([65 + number]) * 4096)
        crash(driver)
    driver = start(path)
    driver.flush()  # covers what earlier servers had acknowledged
    crash(driver)
    monkeypatch.setattr(surviving, "boot_id", lambda: b"after the crash!")
    with driven(path) as driver:
        assert "restarted" in driver.volume.notices[0] and driver.volume.loss is None
        assert [driver.pread(number * MIB, 1) for number in range(5)] == [b"A", b"B", b"C", b"D", b"E"]


def test_info_and_check_show_what_the_next_open_will(path: Path) -> None:
    make(path)
    written_and_killed(path)
    told = info(volume(path))
    assert told["mapped_bytes"] == 2 * MIB and told["clean"] is False and told["possible_loss"] is None
    report = check(volume(path))
    assert report.errors == [] and not report.clean and any("the next open commits them" in warning for warning in report.warnings)


# --- A log that cannot be used --------------------------------------------------------------------------------------------------------


def test_a_missing_log_is_refused_unless_somebody_wants_to_do_without(path: Path, pending_dir: Path) -> None:
    make(path)
    written_and_killed(path)
    (name,) = logs(pending_dir)
    (pending_dir / name).unlink()
    before = path.read_bytes()
    with pytest.raises(Conflict, match="--discard-pending") as refused:
        open_volume(volume(path))
    assert str(pending_dir / name) in str(refused.value)
    assert path.read_bytes() == before
    with driven(path, read_only=True) as driver:
        assert "may be gone" in driver.volume.notices[0] and driver.pread(0, 4096) == A
    with driven(path, discard_pending=True) as driver:
        assert driver.volume.loss is not None and driver.volume.loss.reason is LossReason.LOG_MISSING
        assert driver.pread(0, 4096) == A and driver.pread(MIB, 4096) == bytes(4096), "as it was flushed"
    told = info(volume(path))["possible_loss"]
    assert told["reason"] == "log_missing" and "may be gone" in told["message"]
    with driven(path) as driver:
        assert driver.volume.loss is not None, "until somebody says that it was seen"
        assert driver.call(driver.volume.acknowledge_loss)
    with driven(path) as driver:
        assert driver.volume.loss is None and not driver.call(driver.volume.acknowledge_loss)


def test_an_acknowledgement_outlives_the_server(path: Path, pending_dir: Path) -> None:
    make(path)
    written_and_killed(path)
    shutil.rmtree(pending_dir)
    driver = start(path, discard_pending=True)
    driver.call(driver.volume.acknowledge_loss)
    crash(driver)
    with driven(path) as driver:
        assert driver.volume.loss is None


def test_a_copy_does_not_take_the_log_of_the_original(path: Path, tmp_path: Path, pending_dir: Path) -> None:
    make(path)
    written_and_killed(path)
    copy = tmp_path / "copy.img"
    shutil.copy(path, copy)
    with pytest.raises(Conflict, match="may be a copy"):
        open_volume(volume(copy))
    with driven(copy, discard_pending=True) as driver:
        assert driver.pread(MIB, 4096) == bytes(4096)
    shows_everything(path)


def test_a_renamed_disk_keeps_its_log(path: Path) -> None:
    make(path)
    written_and_killed(path)
    moved = path.with_name("moved.img")
    path.rename(moved)
    shows_everything(moved)


def test_an_open_by_an_older_version_ends_the_log(path: Path, pending_dir: Path) -> None:
    """It clears the mark that it does not know, and raises the generation."""
    make(path)
    written_and_killed(path)
    found = superblock(path)
    older = replace(found, generation=found.generation + 1, autoclear_features=0, log=None)
    with open_node(path) as node:
        node.pwrite(SLOT_OFFSETS_BYTES[older.slot], encode(older))
    with driven(path) as driver:
        assert driver.pread(MIB, 4096) == bytes(4096)
        assert len(logs(pending_dir)) == 1, "the earlier log has gone"


def test_a_log_of_another_generation_is_not_believed(path: Path) -> None:
    """R21."""
    make(path)
    written_and_killed(path)
    found = superblock(path)
    later = replace(found, generation=found.generation + 1)
    with open_node(path) as node:
        node.pwrite(SLOT_OFFSETS_BYTES[later.slot], encode(later))
    with pytest.raises(Conflict, match="of another time"):
        open_volume(volume(path))


def test_a_log_that_does_not_build_on_the_maps_is_not_believed(path: Path, pending_dir: Path) -> None:
    memory, header = log_of_one_write(path, pending_dir)
    header["areas"]["base_hash"] ^= np.uint64(1)
    del header
    memory.close()
    before = path.read_bytes()
    with pytest.raises(Conflict, match="does not build on"):
        open_volume(volume(path))
    assert path.read_bytes() == before


def test_another_host_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(path)
    written_and_killed(path)
    monkeypatch.setattr(surviving, "host_id", lambda: b"another machine!")
    with driven(path) as driver:
        assert "on another host" in driver.volume.notices[0] and "fvd" in driver.volume.notices[0]
        assert driver.pread(0, 4096) == A and driver.pread(MIB, 4096) == bytes(4096)


def test_without_memory_the_disk_works_and_says_what_is_not_covered(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(path)
    monkeypatch.setenv("FVD_PENDING_DIR", str(tmp_path / "on-disk"))
    driver = start(path)
    (notice,) = driver.volume.notices
    assert "not in memory" in notice and "writethrough and directsync" in notice and "\n" not in notice
    driver.pwrite(0, A)
    crash(driver)
    with driven(path) as driver:
        assert "had no log" in driver.volume.notices[0]
        assert driver.pread(0, 4096) in (A, bytes(4096))


# --- Failed flushes -------------------------------------------------------------------------------------------------------------------


def test_a_log_that_says_that_a_flush_failed_is_never_applied(path: Path, pending_dir: Path) -> None:
    """R24."""
    make(path)
    written_and_killed(path)
    memory = left_log(pending_dir)
    layout.mark_failed(memory.buffer, errno.EIO, 1)
    memory.close()
    with driven(path) as driver:
        assert driver.volume.loss is not None and driver.volume.loss.reason is LossReason.FLUSH_FAILED
        assert driver.pread(0, 4096) == A and driver.pread(MIB, 4096) == bytes(4096)


def test_the_flush_of_an_open_that_fails_is_noted_before_it_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(path)
    written_and_killed(path)
    flush = Node.flush

    def fail(node: Node) -> None:
        raise DeviceError("the medium has gone")

    monkeypatch.setattr(Node, "flush", fail)
    with pytest.raises(DeviceError):
        open_volume(volume(path))
    monkeypatch.setattr(Node, "flush", flush)
    with driven(path) as driver:  # the kernel tells such an error once: this flush succeeds
        assert driver.volume.loss is not None and driver.volume.loss.reason is LossReason.FLUSH_FAILED
        assert driver.pread(MIB, 4096) == bytes(4096), "what a lost write was to fill is not shown"


# --- Deaths of the open itself --------------------------------------------------------------------------------------------------------


class Dead(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("victim", [(recovery, "_commit"), (opening, "write_superblock"), (pending, "make"), (layout, "mark_committed")])
@pytest.mark.parametrize("after", [False, True])
def test_a_death_in_the_open_loses_nothing(path: Path, victim: tuple[Any, str], after: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    make(path)
    written_and_killed(path)
    module, name = victim
    real = getattr(module, name)

    def dies(*arguments: Any, **named: Any) -> None:
        if after:
            real(*arguments, **named)
        raise Dead

    with monkeypatch.context() as patch:
        patch.setattr(module, name, dies)
        with pytest.raises(Dead):
            open_volume(volume(path))
    shows_everything(path)


def test_the_committing_part_comes_first(path: Path, pending_dir: Path) -> None:
    """A commit that its server's death interrupted, and what came after it."""
    memory, header = log_of_one_write(path, pending_dir)
    geometry = superblock(path).geometry
    found = layout.read(memory.buffer, geometry, _identity(path))
    bitmap, table = layout_maps(path)
    found.running.apply(bitmap, table)
    epoch_now = int(header["epoch"][0])
    other = 1 - epoch_now % 2
    header["areas"]["base_hash"][0, other] = map_hash(superblock(path).uuid, bitmap, table)
    records = np.frombuffer(memory.buffer, layout.RECORD, offset=layout.HEADER_BYTES + other * int(header["capacity"][0]) * 16)
    records[0]["key"], records[0]["value"] = 1 << 56, 1 | 1 << 16
    records[1]["key"], records[1]["value"] = 2 << 56 | 1, 9
    header["areas"]["count"][0, other] = 2
    header["epoch"] = epoch_now + 1
    del header, records
    memory.close()
    with driven(path) as driver:
        assert driver.pread(0, 4096) == A
        _, table_now = driver.call(driver.volume.engine.snapshot_maps)
        assert table_now is not None and table_now[1] == 9


def test_each_part_must_be_possible_whoever_looks(path: Path, pending_dir: Path) -> None:
    """A committing part that marks blocks of a chunk without a slot, and a running one that takes it back: no engine has written that."""
    make(path)
    driver = start(path)
    driver.pwrite(0, A)
    driver.flush()
    crash(driver)
    memory = left_log(pending_dir)
    header: Any = np.frombuffer(memory.buffer, layout.HEADER, 1)
    now = int(header["epoch"][0]) & 1
    bitmap, table = layout_maps(path)
    uuid = superblock(path).uuid
    word = int(bitmap[0])
    for area, value in ((1 - now, word | 1 << 40), (now, word)):
        header["areas"]["base_hash"][0, area] = map_hash(uuid, bitmap, table)
        records = np.frombuffer(memory.buffer, layout.RECORD, offset=layout.HEADER_BYTES + area * int(header["capacity"][0]) * 16)
        records[0]["key"], records[0]["value"] = 1 << 56, value
        header["areas"]["count"][0, area] = 1
        bitmap[0] = value
    del header, records
    memory.close()
    before = path.read_bytes()
    with pytest.raises(Conflict, match="has no slot"):
        open_volume(volume(path))
    assert path.read_bytes() == before
    with driven(path, read_only=True) as driver:
        assert "has no slot" in driver.volume.notices[0] and driver.pread(0, 4096) == A


def _identity(path: Path) -> layout.LogIdentity:
    found = superblock(path)
    assert found.log is not None
    with open_node(path, read_only=True) as node:
        return layout.LogIdentity(found.uuid, found.generation, found.log.boot, found.log.host, surviving.lasting_place(node))


def layout_maps(path: Path) -> tuple[Any, Any]:
    from fvd.disk.loading import load_disk

    with open_node(path, read_only=True) as node:
        disk = load_disk(node)
        return disk.bitmap, disk.table
