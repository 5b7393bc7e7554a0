# SPDX-License-Identifier: Apache-2.0
"""Figures that the design counts on, with a margin for a noisy machine: the report of each failure is its measured figure."""

from __future__ import annotations

import timeit
from collections.abc import Callable

import numpy as np
import pytest

from fvd import _core

pytestmark = [pytest.mark.release_only, pytest.mark.slow, pytest.mark.alone]


def best(call: Callable[[], object], number: int) -> float:
    return min(timeit.repeat(call, number=number, repeat=7)) / number


@pytest.mark.skipif(not _core.ACCELERATED, reason="this processor has no CRC instruction")
def test_crc_of_pages() -> None:
    pages = np.random.default_rng(1).integers(0, 256, 1 << 16, dtype=np.uint8)
    gigabytes = len(pages) / best(lambda: _core.crc32c(pages), 200) / 1e9
    assert gigabytes > 8, f"{gigabytes:.1f} GB/s"


def test_scans_run_at_memory_speed() -> None:
    words = np.zeros(1 << 23, np.uint64)
    words[:] = 0
    words[::4096] = 6
    copy = np.empty_like(words)
    # A copy moves every byte twice.
    memory = best(lambda: np.copyto(copy, words), 1) / 2
    assert best(lambda: _core.bitmap_count(words, 0, len(words) * 64), 1) < 3 * memory
    assert best(lambda: _core.bitmap_runs(words, 0, len(words) * 64), 1) < 3 * memory


def test_lookup_against_numpy() -> None:
    bitmap, table = np.full(400, 2**64 - 1, np.uint64), np.arange(1600, dtype=np.uint32)
    find = _core.Lookup(bitmap, table, 65536, 1 << 20).find

    def with_numpy(offset: int, length: int) -> tuple[int, bool, int]:
        chunk = offset >> 20
        end = min(offset + length, (chunk + 1) << 20)
        first_block, end_block = offset >> 16, (end - 1 >> 16) + 1
        bits = np.unpackbits(bitmap[first_block >> 6 : (end_block + 63) >> 6].view(np.uint8), bitorder="little")
        bits = bits[first_block & 63 : (first_block & 63) + end_block - first_block]
        different = np.flatnonzero(bits != bits[0])
        run_end = first_block + int(different[0]) if len(different) else end_block
        return min(run_end << 16, end) - offset, bool(bits[0]), int(table[chunk])

    assert find(12345 << 12, 4096) == with_numpy(12345 << 12, 4096)
    ratio = best(lambda: with_numpy(12345 << 12, 4096), 2000) / best(lambda: find(12345 << 12, 4096), 20000)
    assert ratio > 20, f"only {ratio:.0f} times as fast"
