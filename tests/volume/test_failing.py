# SPDX-License-Identifier: Apache-2.0
"""Failed flushes go from disk to disk of one process (R30), each in the loop of the disk that hears."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from disks import MIB, failure_of, make, start
from fvd.device.failures import Failures, FlushFailure
from fvd.disk.failing import FailureWatch
from fvd.errors import DeviceError

HERE = frozenset({7})


class FakeEngine:
    """As much of an engine as fails."""

    failed_errno = 0
    flush_failed_errno = 0

    def fail(self, error_number: int, *, flush: bool = True) -> None:
        self.failed_errno = self.failed_errno or error_number
        if flush:
            self.flush_failed_errno = self.flush_failed_errno or error_number

    def note_failed_flush(self, error_number: int) -> None:
        self.fail(error_number, flush=False)


class Disk:
    def __init__(self, failures: Failures, name: str, devices: frozenset[int] = HERE) -> None:
        self.engine = cast(Any, FakeEngine())
        self.posted: list[Callable[[], None]] = []
        self.watch = FailureWatch(name, self.engine, lambda: devices, failures=failures, clock=lambda: 99.0)

    def run_loop(self) -> bool:
        """What the loop's thread does; whether something is news."""
        for work in self.posted:
            work()
        self.posted.clear()
        return self.watch.noticed()


@pytest.fixture
def failures() -> Failures:
    return Failures(clock=lambda: 12.0)


def test_one_tells_the_others(failures: Failures) -> None:
    one, other, elsewhere = Disk(failures, "one"), Disk(failures, "other"), Disk(failures, "elsewhere", frozenset({8}))
    for disk in (one, other, elsewhere):
        disk.watch.attach(disk.posted.append)
    one.engine.fail(errno.EIO)
    assert one.run_loop() and not one.run_loop()
    told = FlushFailure(errno.EIO, 12.0, "one")
    assert one.watch.failure == told
    assert other.engine.failed_errno == 0  # only in its own loop
    assert other.run_loop() and not other.run_loop()
    assert other.watch.failure == told and other.engine.failed_errno == errno.EIO
    assert not elsewhere.run_loop() and elsewhere.watch.failure is None
    assert not one.posted  # what it heard of was its own


def test_before_the_loop_runs(failures: Failures) -> None:
    one, other = Disk(failures, "one"), Disk(failures, "other")
    one.watch.attach(one.posted.append)
    one.engine.fail(errno.EIO)
    one.run_loop()
    assert other.engine.failed_errno == 0
    other.watch.attach(other.posted.append)
    assert other.run_loop() and other.watch.failure == FlushFailure(errno.EIO, 12.0, "one")


def test_a_map_that_could_not_be_written_is_nobody_elses(failures: Failures) -> None:
    """But a flush that fails after it is."""
    one, other = Disk(failures, "one"), Disk(failures, "other")
    for disk in (one, other):
        disk.watch.attach(disk.posted.append)
    one.engine.fail(errno.ENOSPC, flush=False)
    assert one.run_loop() and one.watch.failure == FlushFailure(errno.ENOSPC, 99.0, "one")
    assert not other.posted
    one.engine.fail(errno.EIO)
    assert not one.run_loop()  # no news of itself
    assert other.run_loop() and other.watch.failure == FlushFailure(errno.EIO, 12.0, "one")


def test_what_is_heard_is_not_told_again(failures: Failures) -> None:
    disks = [Disk(failures, name) for name in ("one", "two", "three")]
    for disk in disks:
        disk.watch.attach(disk.posted.append)
    disks[0].engine.fail(errno.EIO)
    for disk in disks:
        disk.run_loop()
    assert not any(disk.posted for disk in disks)
    assert {disk.watch.failure.source for disk in disks if disk.watch.failure} == {"one"}


def test_a_closed_disk_hears_nothing(failures: Failures) -> None:
    one, other = Disk(failures, "one"), Disk(failures, "other")
    other.watch.attach(other.posted.append)
    other.watch.close()
    one.engine.fail(errno.EIO)
    one.run_loop()
    assert not other.posted


def test_real_disks(tmp_path: Path) -> None:
    """Of one file system; one of them is told by something else than a disk."""
    paths = [tmp_path / "one", tmp_path / "other"]
    for path in paths:
        make(path)
    drivers = [start(path) for path in paths]
    for driver in drivers:
        driver.pwrite(0, b"x" * MIB)
        driver.flush()
    with pytest.raises(DeviceError):
        fail_a_flush_of(drivers[0])
    for driver in drivers:
        deadline = time.monotonic() + 10
        while failure_of(driver) is None and time.monotonic() < deadline:
            time.sleep(0.005)
        failure = failure_of(driver)
        assert failure is not None and failure.source == str(paths[0])
        with pytest.raises(DeviceError, match="Input/output error"):
            driver.flush()
        assert driver.pread(0, 1) == b"x"
        driver.pwrite(0, b"y" * 4096)  # an overwrite goes on
        with pytest.raises(DeviceError):
            driver.close()


def fail_a_flush_of(driver: Any) -> None:
    """Of the disk's node, beside its engine: as where a superblock is written while it is open."""

    def refuse(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fdatasync", refuse)
        driver.volume.node.flush()
