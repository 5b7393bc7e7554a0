# SPDX-License-Identifier: Apache-2.0
"""What lies below a node: each kind of it on a made-up sysfs, and what this machine has."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from loops import loop_device, sparse

from fvd.device.node import open_node
from fvd.device.stack import Stack, stack_of

DISK, PARTITION, LINEAR, THIN, POOL, DATA, VDO, VDO_POOL, LOOP, ABOVE_LOOP, RAID, OTHER = (os.makedev(200, minor) for minor in range(12))


def number(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"


class Sysfs:
    """A folder with what sysfs says of block devices."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        (folder / "dev/block").mkdir(parents=True)
        (folder / "devices").mkdir()

    def device(self, device: int, *, below: int | None = None, uuid: str = "", backing: str = "", slaves: tuple[int, ...] = ()) -> None:
        """`below`: the disk that it is a partition of."""
        parent = self.path / "devices" / ("" if below is None else number(below).replace(":", "-"))
        folder = parent / number(device).replace(":", "-")
        folder.mkdir()
        (folder / "dev").write_text(number(device) + "\n")
        (self.path / "dev/block" / number(device)).symlink_to(folder)
        if below is not None:
            (folder / "partition").write_text("1\n")
        for name, text in (("dm/uuid", uuid), ("loop/backing_file", backing)):
            if text:
                (folder / name).parent.mkdir()
                (folder / name).write_text(text + "\n")
        (folder / "slaves").mkdir()
        for index, slave in enumerate(slaves):
            (folder / "slaves" / f"s{index}").symlink_to(self.path / "dev/block" / number(slave))

    def stack(self, mode: int, device: int) -> Stack:
        values = list(os.stat_result(range(10)))
        values[0] = mode
        values[2] = device
        return stack_of(os.stat_result(values, {"st_rdev": device}), str(self.path))


@pytest.fixture
def sysfs(tmp_path: Path) -> Sysfs:
    made = Sysfs(tmp_path / "sys")
    made.device(DISK)
    made.device(OTHER)
    made.device(PARTITION, below=DISK)
    made.device(LINEAR, uuid="LVM-aaaabbbb", slaves=(PARTITION, OTHER))
    made.device(DATA, uuid="LVM-aaaacccc-tdata", slaves=(PARTITION,))
    made.device(POOL, uuid="LVM-aaaadddd-tpool", slaves=(DATA,))
    made.device(THIN, uuid="LVM-aaaaeeee", slaves=(POOL,))
    made.device(VDO_POOL, uuid="LVM-aaaaffff-vpool", slaves=(OTHER,))
    made.device(VDO, uuid="LVM-aaaagggg", slaves=(VDO_POOL,))
    made.device(RAID, slaves=(DISK, OTHER))
    return made


@pytest.mark.parametrize(
    ("device", "devices", "may_fill"),
    [
        (DISK, {DISK}, False),
        (PARTITION, {PARTITION, DISK}, False),
        (LINEAR, {LINEAR, PARTITION, DISK, OTHER}, False),
        (RAID, {RAID, DISK, OTHER}, False),
        (THIN, {THIN, POOL, DATA, PARTITION, DISK}, True),
        (VDO, {VDO, VDO_POOL, OTHER}, True),
        (os.makedev(201, 0), {os.makedev(201, 0)}, False),
    ],
    ids=["disk", "partition", "linear volume", "RAID", "thin volume", "VDO volume", "unknown to sysfs"],
)
def test_block_devices(sysfs: Sysfs, device: int, devices: set[int], may_fill: bool) -> None:
    assert sysfs.stack(stat.S_IFBLK, device) == Stack(frozenset(devices), may_fill)


def test_regular_file(sysfs: Sysfs) -> None:
    """It may be sparse; its failures are those of its file system's device and of what lies below that."""
    assert sysfs.stack(stat.S_IFREG, LINEAR) == Stack(frozenset({LINEAR, PARTITION, DISK, OTHER}), True)


def test_loop_device(sysfs: Sysfs, tmp_path: Path) -> None:
    """Its file may be sparse, and lies on something itself; so it is for what lies on the loop device."""
    file = sparse(tmp_path / "image", 4096)
    sysfs.device(LOOP, backing=str(file))
    sysfs.device(ABOVE_LOOP, uuid="LVM-aaaahhhh", slaves=(LOOP,))
    below = file.stat().st_dev
    assert sysfs.stack(stat.S_IFBLK, LOOP) == Stack(frozenset({LOOP, below}), True)
    assert sysfs.stack(stat.S_IFBLK, ABOVE_LOOP) == Stack(frozenset({ABOVE_LOOP, LOOP, below}), True)


def test_loop_device_whose_file_is_gone(sysfs: Sysfs) -> None:
    sysfs.device(LOOP, backing="/gone (deleted)")
    assert sysfs.stack(stat.S_IFBLK, LOOP) == Stack(frozenset({LOOP}), True)


def test_this_machine(tmp_path: Path) -> None:
    file = sparse(tmp_path / "image", 1 << 20)
    with open_node(file) as node:
        assert file.stat().st_dev in node.stack().devices and node.stack().may_fill
    with loop_device(file) as device, open_node(device) as node:
        assert {Path(device).stat().st_rdev, file.stat().st_dev} <= node.stack().devices and node.stack().may_fill
