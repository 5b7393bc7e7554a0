# SPDX-License-Identifier: Apache-2.0
"""fvd.device.holes: holes of real files and devices, found and made; and what happens where there are none."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from loops import loop_device, sparse

from fvd.device import holes
from fvd.device.holes import find_holes, punch_hole
from fvd.device.node import open_node
from fvd.errors import DeviceError

MIB = 1 << 20


def write(path: Path, *places: int) -> None:
    with path.open("r+b") as file:
        for place in places:
            file.seek(place)
            file.write(b"x" * 65536)


def test_the_holes_of_a_file(tmp_path: Path) -> None:
    path = sparse(tmp_path / "image", 8 * MIB)
    with open_node(path, read_only=True, direct=False) as node:
        assert list(find_holes(node)) == [(0, 8 * MIB)]
    write(path, 0, 3 * MIB, 8 * MIB - 65536)
    with open_node(path, read_only=True, direct=False) as node:
        assert list(find_holes(node)) == [(65536, 3 * MIB - 65536), (3 * MIB + 65536, 5 * MIB - 131072)]
    write(path, *range(0, 8 * MIB, 65536))
    with open_node(path, read_only=True, direct=False) as node:
        assert list(find_holes(node)) == []
    path.write_bytes(b"")
    with open_node(path, read_only=True, direct=False) as node:
        assert list(find_holes(node)) == []


def test_a_hole_at_an_end_that_is_no_sector(tmp_path: Path) -> None:
    path = sparse(tmp_path / "image", MIB + 7)
    write(path, 0)
    with open_node(path, read_only=True, direct=False) as node:
        assert list(find_holes(node)) == [(65536, MIB + 7 - 65536)]


def test_a_device_tells_of_none(tmp_path: Path) -> None:
    with loop_device(sparse(tmp_path / "image", MIB)) as device, open_node(device, read_only=True, direct=False) as node:
        assert list(find_holes(node)) == []


@pytest.mark.parametrize(("number", "fine"), [(errno.EINVAL, True), (errno.EOPNOTSUPP, True), (errno.EIO, False)])
def test_a_file_system_that_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, fine: bool) -> None:
    def lseek(*_: object) -> int:
        raise OSError(number, "no")

    with open_node(sparse(tmp_path / "image", MIB), read_only=True, direct=False) as node:
        monkeypatch.setattr(os, "lseek", lseek)
        if fine:
            assert list(find_holes(node)) == []
        else:
            with pytest.raises(DeviceError, match="image"):
                list(find_holes(node))


@pytest.mark.parametrize("direct", [False, True])
def test_a_hole_is_made(tmp_path: Path, direct: bool) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"x" * 4 * MIB)
    with open_node(path, direct=direct) as node:
        assert punch_hole(node, MIB, MIB)
        assert punch_hole(node, 3 * MIB, 4 * MIB)  # beyond the end: the size stays
        node.flush()
    data = path.read_bytes()
    assert len(data) == 4 * MIB
    assert data == b"x" * MIB + bytes(MIB) + b"x" * MIB + bytes(MIB)


def test_a_hole_is_made_in_a_device(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"x" * 4 * MIB)
    with loop_device(path) as device, open_node(device) as node:
        if not punch_hole(node, MIB, MIB):
            pytest.skip("this kernel's loop devices make no holes")
        node.flush()
        assert not any(node.pread(MIB, MIB))
        assert all(node.pread(0, MIB)) and all(node.pread(2 * MIB, 2 * MIB))


@pytest.mark.parametrize(("number", "fine"), [(errno.EOPNOTSUPP, True), (errno.EINVAL, True), (errno.EIO, False)])
def test_storage_that_makes_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, fine: bool) -> None:
    def fallocate(*_: object) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(holes, "_fallocate", fallocate)
    with open_node(sparse(tmp_path / "image", MIB)) as node:
        if fine:
            assert not punch_hole(node, 0, 4096)
        else:
            with pytest.raises(DeviceError):
                punch_hole(node, 0, 4096)
