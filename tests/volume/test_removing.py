# SPDX-License-Identifier: Apache-2.0
"""fvd.disk.removing and extending: idempotent, refused while in use, and blind to what is not ours."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from loops import loop_device, mounted, run, sparse

from disks import MIB, crash, driven, make, start, volume
from fvd.device import surviving
from fvd.device.claim import claim
from fvd.device.node import open_node
from fvd.disk import removing as removing_module
from fvd.disk.extending import extend
from fvd.disk.opening import open_volume
from fvd.disk.removing import remove
from fvd.errors import Conflict, DeviceError, InUse, InvalidArgument, NoSpace, NotFound, Unsupported
from fvd.format.geometry import Layout
from fvd.format.superblock import SLOT_OFFSETS_BYTES
from fvd.volume.superblocks import wipe_superblocks


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "disk.img"


# --- remove ------------------------------------------------------------------------------------------------------


def test_a_file_is_gone(path: Path) -> None:
    make(path)
    assert remove(volume(path))
    assert not path.exists()
    assert not remove(volume(path))


@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_log_of_a_dead_server_goes_with_it(path: Path, pending_dir: Path, elsewhere: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that was made where this user would not make it; and no other disk's."""
    other = path.with_name("other.img")
    for each in (path, other):
        make(each)
        driver = start(each)
        driver.pwrite(0, b"A" * 4096)
        crash(driver)
    assert len(list(pending_dir.iterdir())) == 2
    if elsewhere:
        monkeypatch.setattr(surviving, "kept", lambda prefix: [])
    assert remove(volume(path)) and len(list(pending_dir.iterdir())) == 1
    with driven(other) as driver:
        assert driver.pread(0, 1) == b"A"


def test_a_remove_that_fails_leaves_the_log(path: Path, pending_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(path)
    driver = start(path)
    driver.pwrite(0, b"A" * 4096)
    crash(driver)

    def fail(node: object) -> None:
        raise DeviceError("the medium has gone")

    with monkeypatch.context() as patch:
        patch.setattr(removing_module, "wipe_superblocks", fail)
        with pytest.raises(DeviceError):
            remove(volume(path))
    with driven(path) as driver:
        assert driver.pread(0, 1) == b"A"


def test_a_device_holds_no_disk_afterwards(path: Path) -> None:
    with loop_device(sparse(path, 32 * MIB)) as device:
        make(device)
        assert remove(device)
        data = path.read_bytes()
        assert not any(any(data[offset : offset + 4096]) for offset in SLOT_OFFSETS_BYTES)
        with pytest.raises(NotFound):
            open_volume(device)
        assert not remove(device)
    assert not remove(volume(path.with_name("absent")))


def test_a_disk_in_use_is_not_removed(path: Path) -> None:
    make(path)
    with open_volume(volume(path)), pytest.raises(InUse):
        remove(volume(path))
    with open_volume(volume(path), read_only=True), pytest.raises(InUse):
        remove(volume(path))
    with open_volume(volume(path)):
        pass


def test_what_is_not_ours_stays(path: Path, tmp_path: Path) -> None:
    path.write_text("my diary")
    with pytest.raises(Conflict, match="not an fvd disk"):
        remove(volume(path))
    sparse(tmp_path / "zeros", 16 * MIB)
    with pytest.raises(Conflict):
        remove(volume(tmp_path / "zeros"))
    with loop_device(sparse(tmp_path / "other", 32 * MIB)) as device:
        run("mkfs.ext4", "-q", device)
        with pytest.raises(Conflict):
            remove(device)
        with mounted(device, tmp_path / "here"), pytest.raises(InUse):
            remove(device)


def test_a_damaged_disk_can_be_removed(path: Path) -> None:
    make(path)
    with path.open("r+b") as file:
        for offset in SLOT_OFFSETS_BYTES:
            file.seek(offset + 200)
            file.write(b"rot")
    assert remove(volume(path))


def test_a_remove_that_was_interrupted_can_be_run_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(path)
    with monkeypatch.context() as patch:

        def wipe_and_die(node: object) -> None:
            wipe_superblocks(node)  # type: ignore[arg-type]
            raise KeyboardInterrupt

        patch.setattr(removing_module, "wipe_superblocks", wipe_and_die)
        with pytest.raises(KeyboardInterrupt):
            remove(volume(path))
    assert path.exists()
    assert remove(volume(path))
    assert not path.exists()


def test_a_new_disk_in_place_of_a_half_removed_one(path: Path) -> None:
    make(path)
    with open_node(path) as node:
        wipe_superblocks(node)
    assert make(path).created


def test_the_remains_of_an_interrupted_provision_go_too(path: Path) -> None:
    hidden = sparse(path.with_name(".disk.img.fvd-provision"), MIB)
    assert not remove(volume(path))
    assert not hidden.exists()


# --- extend ------------------------------------------------------------------------------------------------------


def test_extend_by_a_step_and_by_a_size(path: Path) -> None:
    make(path)
    grown = extend(volume(path))
    assert (grown.storage_size_bytes, grown.added_bytes) == (32 * MIB, 16 * MIB)
    assert extend(volume(path), 3 * MIB).storage_size_bytes == path.stat().st_size == 35 * MIB
    with open_volume(volume(path)) as disk:
        assert disk.engine.free_slots == 33


def test_extend_stops_at_what_the_disk_can_use(path: Path) -> None:
    make(path)
    assert extend(volume(path), 1 << 40).storage_size_bytes == 66 * MIB
    assert extend(volume(path)).added_bytes == 0
    raw = path.with_name("raw")
    make(raw, layout=Layout.RAW)
    assert extend(volume(raw)).added_bytes == 0


def test_extend_that_is_refused(path: Path) -> None:
    with pytest.raises(NotFound):
        extend(volume(path))
    make(path)
    for by in (0, -1):
        with pytest.raises(InvalidArgument):
            extend(volume(path), by)
    with open_volume(volume(path)), pytest.raises(InUse):
        extend(volume(path))
    with claim(path), pytest.raises(InUse):
        extend(volume(path))


def test_extend_a_device(path: Path) -> None:
    with loop_device(sparse(path, 20 * MIB)) as device:
        make(device)
        with pytest.raises(Unsupported, match="enlarge the device"):
            extend(device)


def test_extend_without_space(tmp_path: Path) -> None:
    with mounted("tmpfs", tmp_path / "small", "-t", "tmpfs", "-o", "size=10m") as folder:
        make(folder / "disk")
        with pytest.raises(NoSpace):
            extend(volume(folder / "disk"), 40 * MIB)
        size = os.stat(folder / "disk").st_size  # noqa: PTH116
        assert 16 * MIB <= size < 27 * MIB
        with driven(folder / "disk") as driver:
            driver.pwrite(0, b"still works")
