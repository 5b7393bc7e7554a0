# SPDX-License-Identifier: Apache-2.0
"""A logical volume as the base of a disk: its blocks come to the disk, and the volume may go. Real lvm2 and device-mapper."""

from __future__ import annotations

import time
from random import Random
from typing import Any

import pytest
from real_devices import MIB, Group, run, settle

import fvd
from fvd.modes import LAYOUTS

SIZE = 24 * MIB


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_volume_as_the_base(group: Group, layout: Any) -> None:
    image = bytearray(Random(8).randbytes(4 * MIB) + bytes(8 * MIB) + Random(9).randbytes(4 * MIB))
    run("lvcreate", "--yes", "-Wn", "-L", f"{len(image)}b", "-n", "golden", group.name)
    settle()
    golden = group.path("golden")
    with open(golden, "r+b", buffering=0) as device:  # noqa: PTH123
        device.write(image)
    volume = f"{group.name}/vm1"
    fvd.provision(volume, SIZE, base=golden, base_format="raw", layout=layout, copy_on_read=True, journal_size="1M", grow_step="8M")
    shown = image + bytes(SIZE - len(image))
    with fvd.open(volume, prefetch=False) as disk:
        assert disk.pread(MIB, 2 * MIB) == shown[MIB : 3 * MIB]
        disk.pwrite(5 * MIB + 512, b"mine")
        shown[5 * MIB + 512 : 5 * MIB + 516] = b"mine"
        assert 0 < disk.prefetch_status().copied_bytes < len(image)
    with fvd.open(volume, prefetch=fvd.PrefetchOptions(delay_s=0)) as disk:
        until = time.monotonic() + 60
        while not disk.info().base_released:
            assert time.monotonic() < until, disk.prefetch_status()
            time.sleep(0.1)
        run("lvremove", "--yes", f"{group.name}/golden")  # nobody holds it
        assert disk.pread(0, SIZE) == shown
    with fvd.open(volume) as disk:
        assert disk.pread(0, SIZE) == shown
        assert disk.info().base_released
    assert fvd.remove(volume)
