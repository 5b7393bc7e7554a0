# SPDX-License-Identifier: Apache-2.0
"""What changes with a device's size: its blocks, whether it may be written, what it lies on. It is told before it hurts."""

from __future__ import annotations

from pathlib import Path

import pytest

from disks import MIB, make, start
from fvd.device.node import Node
from fvd.device.stack import Stack
from fvd.errors import DeviceError


@pytest.mark.parametrize(
    ("what", "why"),
    [("block_bytes_now", "grown onto a device with blocks of 64.0 KiB"), ("is_read_only_now", "read-only since it grew")],
)
def test_what_cannot_go_on_stops_before_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, why: str) -> None:
    path = tmp_path / "disk.img"
    make(path)
    driver = start(path)
    driver.pwrite(0, b"x")
    monkeypatch.setattr(Node, what, lambda node: 64 << 10 if what == "block_bytes_now" else True)
    assert driver.volume.allocator is not None
    driver.volume.allocator.extend_now().exception(20)
    with pytest.raises(DeviceError, match=f"{why}.*The disk has stopped"):
        driver.pread(0, 4096)
    assert driver.volume.engine.storage_size_bytes == 16 * MIB
    with pytest.raises(DeviceError):
        driver.close()


def test_storage_that_may_run_out_of_space_since(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Then a durable write is a write and a flush (R29)."""
    path = tmp_path / "disk.img"
    make(path)
    may_fill = False
    monkeypatch.setattr(Node, "stack", lambda node: Stack(frozenset(), may_fill))
    with start(path) as driver:
        driver.pwrite(0, b"x", fua=True)

        def durable(offset: int) -> int:
            before = driver.volume.engine.statistics()["device_flushes"]
            driver.pwrite(offset, b"y", fua=True)
            return driver.volume.engine.statistics()["device_flushes"] - before

        assert durable(0) == 0
        may_fill = True
        assert driver.volume.allocator is not None
        assert driver.volume.allocator.extend_now().result(20) == 32 * MIB
        assert durable(0) == 1 and "may run out of space" in caplog.text
