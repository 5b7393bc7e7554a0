# SPDX-License-Identifier: Apache-2.0
"""Storage that fails for a while (dm-flakey): clear errors, no flush that succeeds as if nothing had happened, and a reopen that finds
everything that had been flushed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass

import nbd
import pytest
from real_devices import SECTOR, Mapped, NbdDisk, Server, linear, mapped
from verified_load import BLOCK_BYTES, IN_FLIGHT, STORAGE_BYTES, VIRTUAL_BYTES, Disk, Expected, Kind, Operation, batches, carry_out, values

import fvd

LAST_BLOCK = VIRTUAL_BYTES // SECTOR - BLOCK_BYTES // SECTOR
ALWAYS = 1 << 20  # seconds


@dataclass
class Flaky:
    """A device whose storage fails from `fail` to `work`, and what the disk on it must hold."""

    device: Mapped
    disk: str
    expected: Expected

    @property
    def path(self) -> str:
        return self.device.path

    def fail(self, *features: str) -> None:
        """dm-flakey's down interval, without end. Features: error_writes, drop_writes; none: reads fail too."""
        self.device.replace(f"{self._target} 0 {ALWAYS} {len(features)} {' '.join(features)}")

    def work(self) -> None:
        self.device.replace(linear(self.disk, STORAGE_BYTES))

    @property
    def _target(self) -> str:
        return f"0 {STORAGE_BYTES // SECTOR} flakey {self.disk} 0"

    def load(self, disk: Disk, seed: int) -> None:
        """Verified data, all of it flushed; the last block stays as it is, never written."""
        with ThreadPoolExecutor(IN_FLIGHT) as threads:
            for batch, _ in zip(batches(seed, VIRTUAL_BYTES - BLOCK_BYTES, BLOCK_BYTES), range(10), strict=False):
                self.expected.issue(batch)
                carry_out(batch, disk, threads)
                self.expected.acknowledge(batch)
        self.flush(disk)

    def write(self, disk: Disk, number: int, first: int, count: int = 8) -> None:
        """One write, which may fail."""
        operation = Operation(number, Kind.WRITE, first, count)
        try:
            disk.pwrite(first * SECTOR, operation.data())
        except Exception:
            self.expected.failed.append(operation)
            raise
        self.expected.later.append(operation)

    def flush(self, disk: Disk) -> None:
        disk.flush()
        self.expected.flushed()

    def verify(self, disk: Disk, where: str, length_bytes: int = VIRTUAL_BYTES) -> None:
        """As much of the disk's beginning."""
        seen = self.expected.durable.copy()
        seen[: length_bytes // SECTOR] = values(disk.pread(0, length_bytes))
        self.expected.verify(seen, where)

    def verify_reopened(self) -> None:
        """Check, recovery, contents, and a disk that works again."""
        report = fvd.check(self.path)
        assert not report.errors, report
        with fvd.open(self.path) as disk:
            self.verify(disk, "after the reopen")
            self.expected = Expected.of(values(disk.pread(0, VIRTUAL_BYTES)))
            self.write(disk, 2000, LAST_BLOCK)
            self.flush(disk)
            self.verify(disk, "working again")
        report = fvd.check(self.path)
        assert report.clean and not report.errors, report


@pytest.fixture
def flaky(whole_disk: str) -> Iterator[Flaky]:
    with mapped(linear(whole_disk, STORAGE_BYTES)) as device:
        fvd.provision(device.path, VIRTUAL_BYTES, block_size=BLOCK_BYTES, chunk_size="256K", journal_size="64K", force=True)
        found = Flaky(device, whole_disk, Expected.of_empty(VIRTUAL_BYTES))
        try:
            yield found
        finally:
            found.work()


@contextmanager
def opened(flaky: Flaky) -> Iterator[fvd.Disk]:
    """A disk whose close may fail, when its storage has."""
    disk = fvd.open(flaky.path)
    try:
        yield disk
    finally:
        with suppress(fvd.DeviceError):
            disk.close()


def test_a_failed_flush_is_sticky_until_the_reopen(flaky: Flaky) -> None:
    with opened(flaky) as disk:
        flaky.load(disk, 1)
        flaky.write(disk, 1000, LAST_BLOCK)
        flaky.fail("error_writes")
        with pytest.raises(fvd.DeviceError, match="nothing is promised any more; close and open it"):
            disk.flush()
        flaky.work()
        for _ in range(2):
            with pytest.raises(fvd.DeviceError):
                disk.flush()
        with pytest.raises(fvd.DeviceError):
            operation = Operation(1001, Kind.FUA, 0, 1)
            flaky.expected.failed.append(operation)
            disk.pwrite(0, operation.data(), durable=True)
        flaky.verify(disk, "reads go on", VIRTUAL_BYTES - BLOCK_BYTES)
        with pytest.raises(fvd.DeviceError):  # its place is named by no commit, and what was written there may be lost (R38)
            disk.pread(LAST_BLOCK * SECTOR, SECTOR)
    flaky.verify_reopened()


def test_writes_fail_and_reads_go_on(flaky: Flaky) -> None:
    with opened(flaky) as disk:
        flaky.load(disk, 2)
        present = int(flaky.expected.durable.nonzero()[0][0])
        flaky.fail("error_writes")
        with pytest.raises(fvd.DeviceError, match=r"(?i)error"):  # an overwrite
            flaky.write(disk, 1000, present, 1)
        with pytest.raises(fvd.DeviceError, match=r"(?i)error"):  # a first write
            flaky.write(disk, 1001, LAST_BLOCK)
        flaky.verify(disk, "while writes fail")
        flaky.work()
        # Data that could not be written were promised to nobody: no metadata has failed, so nothing sticks.
        flaky.write(disk, 1002, present, 1)
        flaky.flush(disk)
        flaky.verify(disk, "after the window")
    flaky.verify_reopened()


def test_everything_fails(flaky: Flaky) -> None:
    with opened(flaky) as disk:
        flaky.load(disk, 3)
        present = int(flaky.expected.durable.nonzero()[0][0])
        flaky.write(disk, 1000, present, 1)
        flaky.fail()
        with pytest.raises(fvd.DeviceError, match=r"(?i)error"):
            disk.pread(present * SECTOR, SECTOR)
        with pytest.raises(fvd.DeviceError, match=r"(?i)error"):
            flaky.write(disk, 1001, present, 1)
        with pytest.raises(fvd.DeviceError):
            disk.flush()
        flaky.work()
        flaky.verify(disk, "reads work again")
    flaky.verify_reopened()


def test_a_close_that_cannot_write_says_so(flaky: Flaky) -> None:
    disk = fvd.open(flaky.path)
    flaky.load(disk, 4)
    flaky.write(disk, 1000, 0)
    flaky.fail("error_writes")
    with pytest.raises(fvd.DeviceError, match="closing failed"):
        disk.close()
    flaky.work()
    flaky.verify_reopened()


def test_an_open_and_a_check_of_failed_storage(flaky: Flaky) -> None:
    with closing(fvd.open(flaky.path)) as disk:
        flaky.load(disk, 5)
    flaky.fail()
    for verb in (fvd.open, fvd.check, fvd.info):
        with pytest.raises(fvd.DeviceError, match=flaky.device.name):
            verb(flaky.path)
    flaky.work()
    flaky.verify_reopened()


def test_nothing_written_since_a_flush_reaches_the_storage(
    flaky: Flaky, serving: Callable[..., AbstractContextManager[Server]], nbd_disk: Callable[[Server], AbstractContextManager[NbdDisk]]
) -> None:
    """What a power cut leaves at worst: writes after the last flush are dropped by the device (drop_writes), and the server is killed."""
    with serving(flaky.path) as server:
        with nbd_disk(server) as disk:
            flaky.load(disk, 6)
            flaky.fail("drop_writes")
            for number, first in enumerate(range(0, 64 * 100, 100), 1000):
                flaky.write(disk, number, first)
            server.kill()
        flaky.work()
    flaky.verify_reopened()


def test_a_served_disk_answers_with_errors_and_lives(
    flaky: Flaky, serving: Callable[..., AbstractContextManager[Server]], nbd_disk: Callable[[Server], AbstractContextManager[NbdDisk]]
) -> None:
    with serving(flaky.path) as server:
        with nbd_disk(server) as disk:
            flaky.load(disk, 7)
            present = int(flaky.expected.durable.nonzero()[0][0])
            flaky.fail()
            with pytest.raises(nbd.Error, match="Input/output error"):
                disk.pread(present * SECTOR, SECTOR)
            with pytest.raises(nbd.Error, match="Input/output error"):
                flaky.write(disk, 1000, present, 1)
            with pytest.raises(nbd.Error, match="Input/output error"):
                flaky.write(disk, 1001, LAST_BLOCK)
                disk.flush()
            flaky.work()
            flaky.verify(disk, "served, after the window")
        server.process.terminate()
        server.process.wait(60)
        assert "Traceback" not in server.said()
    flaky.verify_reopened()
