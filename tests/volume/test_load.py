# SPDX-License-Identifier: Apache-2.0
"""devtools._load: a load that is made up inside the disk's own thread: counted, bounded, and ended by errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from devtools._load import LoadThread, load
from disks import MIB, make
from fvd.disk.opening import open_volume
from fvd.errors import InvalidArgument, ReadOnly
from fvd.inspect.check import check


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "disk.img"


@contextmanager
def loaded(path: Path, read_only: bool = False, blocking: bool = False) -> Iterator[LoadThread]:
    driver = load(open_volume(f"file:{path}", read_only=read_only), force_blocking=blocking)
    try:
        yield driver
    finally:
        driver.close()


@pytest.mark.parametrize("blocking", [False, True])
def test_so_many_writes_one_after_the_other(path: Path, blocking: bool) -> None:
    make(path)
    times_ns: Any = np.zeros(5, np.uint32)
    with loaded(path, blocking=blocking) as driver:
        assert driver.run(write=True, random=False, block_bytes=MIB, depth=3, requests=8, times_ns=times_ns)[0] == 8
        assert times_ns.all()
        assert driver.call(driver.volume.engine.statistics)["writes"] == 8
        data = driver.pread(0, 9 * MIB)  # calls are served again
        assert all(data[number * MIB : number * MIB + 8].strip(b"\0") for number in range(8))
        assert data[8 * MIB :] == bytes(MIB)
    assert not check(f"file:{path}").errors


def test_random_places_in_a_range_for_a_time(path: Path) -> None:
    make(path)
    with loaded(path) as driver:
        requests, seconds = driver.run(write=True, block_bytes=4096, depth=16, offset_bytes=8 * MIB, length_bytes=MIB, seconds=0.2)
        assert requests >= 16 and seconds >= 0.2
        assert driver.call(driver.volume.engine.statistics)["writes"] == requests
        assert driver.pread(0, 8 * MIB) == bytes(8 * MIB) and driver.pread(9 * MIB, MIB) == bytes(MIB)
        before = driver.call(driver.volume.engine.statistics)["reads"]
        reads, _ = driver.run(write=False, block_bytes=4096, depth=1, seconds=0.1)
        assert driver.call(driver.volume.engine.statistics)["reads"] == before + reads


def test_reads_that_no_device_answers(path: Path) -> None:
    """They end while they are begun: the loop must neither wait for the device nor lose one."""
    make(path)
    with loaded(path) as driver:
        assert driver.run(write=False, block_bytes=4096, depth=4, requests=1000)[0] == 1000


def test_what_is_no_load(path: Path) -> None:
    make(path)
    with loaded(path) as driver:
        for wrong in ({"depth": 0}, {"depth": 257}, {"block_bytes": 0}, {"offset_bytes": 64 * MIB}, {"requests": 0}):
            with pytest.raises(InvalidArgument):
                driver.run(**({"write": True, "block_bytes": 4096, "depth": 1, "requests": 1} | wrong))  # type: ignore[arg-type]


def test_an_error_ends_it(path: Path) -> None:
    make(path)
    with loaded(path, read_only=True) as driver, pytest.raises(ReadOnly):
        driver.run(write=True, block_bytes=4096, depth=4, seconds=60)
