# SPDX-License-Identifier: Apache-2.0
"""Every moment at which the power could have been cut.

dm-log-writes logs what reaches the storage of a disk under a verified load, on the real machine. Replayed here to any point, the log is the
storage as a crash may leave it, without all that was not flushed by then. Leaving a single write out of a log was found in 25 of 25 tries.
"""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from log_writes import Flag, entries
from machines import REAL, machine, require_machine
from verified_load import STORAGE_BYTES, VIRTUAL_BYTES, Expected, Moments, values

import fvd

BATCHES = 60
LOADS = [("none", 1), ("writeback", 2), ("unsafe", 3)]

pytestmark = [pytest.mark.release_only, pytest.mark.slow]


@pytest.fixture(scope="module")
def loads(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """All loads in one guest: a folder for each."""
    require_machine()
    folder = tmp_path_factory.mktemp("log-writes")
    with machine(folder, disks=2) as real:
        real.run(REAL / "log_writes_load.py", folder, *(str(word) for cache, seed in LOADS for word in (cache, seed, BATCHES)))
    yield folder
    shutil.rmtree(folder)


def look(image: Path, expected: Expected, where: str, *, recover: bool) -> None:
    """The storage as it is in this file: whole, and all that was promised is there. `recover` opens it to write, which replays for good."""
    volume = f"file:{image}"
    report = fvd.check(volume)
    assert not report.errors, f"{where}: {report}"
    with fvd.open(volume, read_only=not recover) as disk:
        expected.verify(values(disk.pread(0, VIRTUAL_BYTES)), where)
    if recover:
        report = fvd.check(volume)
        assert report.clean and not report.errors, f"{where}, after recovery: {report}"


def replay(load: Path, folder: Path) -> tuple[int, int]:
    """Looks at each mark, with a recovery, and at each flush and FUA write between. Returns how many; AssertionError at the first loss."""
    moments: Moments = pickle.loads((load / "moments").read_bytes())
    image, copy = folder / "storage.img", folder / "copy.img"
    with image.open("xb") as file:
        file.truncate(STORAGE_BYTES)
    marks = between = 0
    mark: int | None = None
    fd = os.open(image, os.O_RDWR)
    try:
        for index, entry in enumerate(entries(load / "log")):
            entry.replay(fd)
            if entry.mark.isdigit():
                mark = int(entry.mark)
                shutil.copyfile(image, copy)
                look(copy, moments.promised[mark], f"at mark {mark}, entry {index}", recover=True)
                marks += 1
            elif mark is not None and entry.flags & (Flag.FLUSH | Flag.FUA):
                look(image, moments.under_way[mark], f"after mark {mark}, entry {index}", recover=False)
                between += 1
    finally:
        os.close(fd)
    return marks, between


@pytest.mark.parametrize(("cache", "seed"), LOADS[:-1])
def test_what_was_promised_survives_every_power_cut(cache: str, seed: int, loads: Path, tmp_path: Path) -> None:
    marks, between = replay(loads / f"{cache}-{seed}", tmp_path)
    assert marks == BATCHES + 1
    assert between > BATCHES, "the storage was flushed less than the guest asked for"


def test_a_missing_flush_is_found(loads: Path, tmp_path: Path) -> None:
    """The same of a disk that ignores flushes fails: data that were lost are seen."""
    cache, seed = LOADS[-1]
    with pytest.raises(AssertionError, match="sectors are wrong"):
        replay(loads / f"{cache}-{seed}", tmp_path)
