# SPDX-License-Identifier: Apache-2.0
"""Small real disks for the tests of this folder, and what is done to them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fvd.device.failures import FlushFailure
from fvd.disk._disk_thread import DiskThread, drive
from fvd.disk.opening import open_volume
from fvd.disk.provision import ProvisionedDisk, provision

MIB = 1 << 20
SMALL: dict[str, Any] = {"virtual_size_bytes": 64 * MIB, "journal_size_bytes": 64 * 1024, "grow_step_bytes": 16 * MIB}


def make(path: Path | str, **changes: Any) -> ProvisionedDisk:
    """Provisions a disk of 64 MiB with 2 MiB of metadata that grows by 16 MiB."""
    return provision(volume(path), **(SMALL | changes))


def volume(path: Path | str) -> str:
    return str(path) if str(path).startswith("/dev/loop") else f"file:{path}"


def start(path: Path | str, *, blocking: bool = False, **options: Any) -> DiskThread:
    """The disk, open and driven."""
    return drive(open_volume(volume(path), **options), force_blocking=blocking)


@contextmanager
def driven(path: Path | str, *, blocking: bool = False, **options: Any) -> Iterator[DiskThread]:
    """The disk, open and driven; closed properly at the end."""
    with start(path, blocking=blocking, **options) as driver:
        yield driver


def crash(driver: DiskThread) -> None:
    """What a killed process leaves: nothing more is written. The thread ends, for this process goes on."""

    def fail() -> None:
        raise RuntimeError("crashed by the test")

    driver.post(fail)
    driver.thread_ended(10)
    driver.volume.close()


def failure_of(driver: DiskThread) -> FlushFailure | None:
    """The failed flush that a disk which is open for writing knows of."""
    assert driver.volume.failing is not None
    return driver.volume.failing.failure


def place_of(driver: DiskThread, chunk: int) -> int:
    """Where a chunk that has a slot begins on storage, in bytes."""
    geometry = driver.volume.geometry
    _, table = driver.call(driver.volume.engine.snapshot_maps)
    assert table is not None
    return geometry.data_offset_bytes + int(table[chunk]) * geometry.chunk_size_bytes
