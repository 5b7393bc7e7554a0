# SPDX-License-Identifier: Apache-2.0
"""fvd.storage.sized: storages keep their promises, which docs/growth.md lists. The LVM storage will have to pass the first tests too."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from loops import loop_device, mounted, run, sparse

from fvd.device import lengthen as lengthen_module
from fvd.device.node import open_node
from fvd.errors import DeviceError, NoSpace, Unsupported
from fvd.storage.interfaces import Pool, Storage
from fvd.storage.sized import FileStorage, FixedStorage

MIB = 1 << 20


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return sparse(tmp_path / "file", 16 * MIB)


def test_a_file_grows_and_keeps_every_byte(file: Path) -> None:
    file.write_bytes(b"x" * 16 * MIB)
    with open_node(file) as node:
        storage: Storage = FileStorage(node)
        storage.grow_to(100 * MIB)
        assert storage.size_bytes() == node.size_bytes() == 100 * MIB
        assert all(node.pread(0, 16 * MIB))
        assert not any(node.pread(16 * MIB, 84 * MIB))
        assert file.stat().st_blocks * 512 < 17 * MIB  # still sparse
        storage.close()


def test_never_shorter(file: Path) -> None:
    with open_node(file) as node:
        storage = FileStorage(node)
        storage.grow_to(MIB)
        assert storage.size_bytes() == 16 * MIB
        storage.close()


def test_a_step_that_was_overtaken_does_not_cut_the_file_off(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step hangs; meanwhile the disk is closed, and another process opens it and lets it grow. The late call must do nothing."""
    real, begun, go_on = os.posix_fallocate, threading.Event(), threading.Event()

    def hang(fd: int, offset: int, length: int) -> None:
        begun.set()
        assert go_on.wait(10)
        real(fd, offset, length)

    monkeypatch.setattr(lengthen_module.os, "posix_fallocate", hang)
    node = open_node(file)
    storage = FileStorage(node)
    thread = threading.Thread(target=storage.grow_to, args=(20 * MIB,))
    thread.start()
    assert begun.wait(10)
    storage.close()
    node.close()
    os.truncate(file, 40 * MIB)
    with file.open("r+b") as data:
        data.seek(20 * MIB - 10)
        data.write(b"y" * 20)
    go_on.set()
    thread.join()
    assert file.stat().st_size == 40 * MIB
    assert file.read_bytes()[20 * MIB - 10 : 20 * MIB + 10] == b"y" * 20
    with pytest.raises(DeviceError, match="closed"):
        storage.size_bytes()


def test_descriptors_are_given_back(file: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with open_node(file) as node:
        for kind in (FileStorage, FixedStorage):
            storage = kind(node)
            storage.size_bytes()
            storage.close()
            storage.close()
    assert len(os.listdir("/proc/self/fd")) <= before  # noqa: PTH208


def test_a_file_system_without_space(tmp_path: Path) -> None:
    with mounted("tmpfs", tmp_path / "small", "-t", "tmpfs", "-o", "size=8m") as folder:
        file = sparse(folder / "file", MIB)
        with open_node(file) as node:
            storage = FileStorage(node)
            with pytest.raises(NoSpace, match="free some space"):
                storage.grow_to(20 * MIB)
            assert 8 * MIB <= storage.size_bytes() <= 9 * MIB  # what was to be had
            node.pwrite(0, b"x" * node.size_bytes() if node.size_bytes() < 8 * MIB else b"x" * (8 * MIB - 64 * 1024))
            size = storage.size_bytes()
            with pytest.raises(NoSpace):
                storage.grow_to(20 * MIB)
            assert storage.size_bytes() - size <= 64 * 1024
            pool = storage.pool()
            assert pool is not None and pool.free_bytes <= 64 * 1024
            storage.close()


def test_a_device_of_fixed_size(file: Path) -> None:
    with loop_device(file) as device, open_node(device) as node:
        storage = FixedStorage(node)
        assert not storage.can_grow and storage.size_bytes() == 16 * MIB
        storage.grow_to(16 * MIB)
        with pytest.raises(Unsupported, match="enlarge the device"):
            storage.grow_to(17 * MIB)
        os.truncate(file, 20 * MIB)
        run("losetup", "--set-capacity", device)
        storage.grow_to(17 * MIB)
        assert storage.size_bytes() == 20 * MIB
        storage.close()


def test_what_growth_is_taken_from(file: Path) -> None:
    with open_node(file) as node:
        storage = FileStorage(node)
        found = os.statvfs(file)
        pool = storage.pool()
        assert isinstance(pool, Pool) and pool.name == f"the file system of {file}"
        assert pool.free_bytes == pytest.approx(found.f_bavail * found.f_frsize, rel=0.1)  # others use it too
        fixed = FixedStorage(node)
        assert fixed.pool() is None
        for kind in (storage, fixed):
            assert isinstance(kind, Storage) and not kind.notifies_space and kind.last_suspend_seconds is None
            kind.close()
        with pytest.raises(DeviceError, match="closed"):
            storage.pool()
