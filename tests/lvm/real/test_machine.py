# SPDX-License-Identifier: Apache-2.0
"""That the machine is what the tests of this folder take it for: real device-mapper, lvm2 and udev."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from real_devices import GIB, MIB, Group, Pool, linear, mapped, run, settle, size_bytes


def test_a_group_can_be_made_grown_and_extended(make_group: Callable[..., Group], spare_device: str) -> None:
    group = make_group(size=2 * GIB)
    run("lvcreate", "--yes", "--size", "1g", "--name", "a", group.name)
    settle()
    assert Path(group.path("a")).is_block_device(), "udev has made no link"
    run("lvextend", "--size", "1500m", f"{group.name}/a")
    assert size_bytes(group.path("a")) == 1500 * MIB
    before = group.free_bytes()
    group.extend(spare_device, GIB)
    assert group.free_bytes() > before
    row = group.volume("a")
    assert row is not None and int(row["lv_size"]) == 1500 * MIB


def test_a_disk_comes_back_empty(pool: Pool) -> None:
    with pool.disk() as first:
        Path(first).write_bytes(b"x" * 4096)
    with pool.disk() as again:
        assert again == first
        with Path(again).open("rb") as file:
            assert file.read(4096) == bytes(4096)


def test_a_mapped_device_is_a_part_of_a_disk(whole_disk: str) -> None:
    with mapped(linear(whole_disk, 8 * MIB, start_bytes=MIB)) as device:
        assert size_bytes(device.path) == 8 * MIB
