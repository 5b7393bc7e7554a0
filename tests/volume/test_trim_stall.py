# SPDX-License-Identifier: Apache-2.0
"""Reads beside a trim of many chunks, on a real file: what follows from the trim is bounded, and no read waits for long."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from disks import MIB, driven, make

CHUNK_BYTES = 64 * 1024
CHUNKS = 1024


def longest_read(path: Path, *, discard: bool) -> tuple[float, dict[str, int]]:
    """Seconds of the longest 4 KiB read while every chunk but the last is trimmed and discarded, and what the engine counted."""
    path.unlink(missing_ok=True)
    size = CHUNKS * CHUNK_BYTES
    make(
        path,
        virtual_size_bytes=size,
        chunk_size_bytes=CHUNK_BYTES,
        block_size_bytes=4096,
        journal_size_bytes=MIB,
        grow_step_bytes=128 * MIB,
    )
    with driven(path, discard=discard) as driver:
        for chunk in range(CHUNKS):
            driver.pwrite(chunk * CHUNK_BYTES, b"x" * 4096)
        driver.flush()
        took: list[float] = []
        ending = threading.Event()

        def read() -> None:
            while not ending.is_set():
                begun = time.monotonic()
                driver.pread(size - CHUNK_BYTES, 4096)
                took.append(time.monotonic() - begun)
                time.sleep(0.002)

        reader = threading.Thread(target=read)
        reader.start()
        driver.trim(0, size - CHUNK_BYTES)
        driver.flush()
        deadline = time.monotonic() + 60
        while driver.call(lambda: driver.volume.engine.free_slots) < CHUNKS - 1:
            assert time.monotonic() < deadline, "discards do not end"
            time.sleep(0.01)
        time.sleep(0.2)
        ending.set()
        reader.join()
        return max(took), driver.call(driver.volume.engine.statistics)


def test_discards_of_a_long_trim_are_few_at_once(tmp_path: Path) -> None:
    _, counts = longest_read(tmp_path / "disk", discard=True)
    assert 1 <= counts["most_discards_in_flight"] <= 8 and counts["discards"] <= CHUNKS - 1


@pytest.mark.slow
@pytest.mark.release_only
@pytest.mark.alone
def test_no_read_waits_for_what_was_trimmed(tmp_path: Path) -> None:
    """A generous bound beside the measured one (bench/run.py trims): a machine under test has other work."""
    ratios = []
    for _ in range(3):
        with_discards, _ = longest_read(tmp_path / "disk", discard=True)
        without, counts = longest_read(tmp_path / "disk", discard=False)
        assert counts["discards"] == 0
        ratios.append(with_discards / without)
    assert sorted(ratios)[1] <= 15 or with_discards < 0.25, ratios
