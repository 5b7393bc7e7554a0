# SPDX-License-Identifier: Apache-2.0
"""fvd.base.sparse: zeros of a base become bits, block by block; and of a raw disk only where its storage has been made zeros."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fvd.base.sparse import punch_places, runs, zero_blocks
from fvd.errors import DeviceError
from fvd.format.geometry import Geometry, Layout

BLOCK = 4096
GEOMETRY = Geometry(virtual_size_bytes=200 * BLOCK + 512, block_size_bytes=BLOCK, chunk_size_bytes=16 * BLOCK, journal_size_bytes=65536)


def bits(bitmap: np.ndarray) -> list[int]:
    return np.flatnonzero(np.unpackbits(np.asarray(bitmap).view(np.uint8), bitorder="little")).tolist()


@pytest.mark.parametrize(
    ("base_bytes", "extents", "expected"),
    [
        (10 * BLOCK, [], []),
        (10 * BLOCK, [(0, 10 * BLOCK)], list(range(10))),
        (10 * BLOCK, [(1, 3 * BLOCK)], [1, 2]),
        (10 * BLOCK, [(BLOCK, BLOCK - 1)], []),
        (10 * BLOCK, [(BLOCK, 512), (BLOCK + 512, BLOCK - 512)], [1]),
        (10 * BLOCK, [(BLOCK, 512), (BLOCK + 1024, BLOCK)], []),
        # The base ends inside a block: what is behind it is zeros.
        (9 * BLOCK + 100, [(8 * BLOCK, BLOCK + 100)], [8, 9]),
        (9 * BLOCK + 100, [(8 * BLOCK, BLOCK + 99)], [8]),
        (9 * BLOCK + 100, [(9 * BLOCK + 1, 99)], []),
        (100, [(0, 100)], [0]),
        # The disk ends before its base, inside a block.
        (1 << 30, [(199 * BLOCK, 1 << 29)], [199, 200]),
        (1 << 30, [(199 * BLOCK, BLOCK + 511)], [199]),
        (1 << 30, [(201 * BLOCK, 1 << 20)], []),
        # What a server may tell.
        (10 * BLOCK, [(0, 0), (5 * BLOCK, -BLOCK), (-BLOCK, 2 * BLOCK), (1 << 70, 1 << 70)], [0]),
        (10 * BLOCK, [(5 * BLOCK, BLOCK), (2 * BLOCK, BLOCK), (2 * BLOCK, 2 * BLOCK)], [2, 3, 5]),
        (10 * BLOCK, [(0, 1 << 80)], list(range(10))),
    ],
)
def test_which_blocks_are_zeros(base_bytes: int, extents: list[tuple[int, int]], expected: list[int]) -> None:
    assert bits(zero_blocks(GEOMETRY, base_bytes, extents)) == expected


SECTOR = 512
SMALL = Geometry(virtual_size_bytes=70 * BLOCK + 1024, block_size_bytes=BLOCK, chunk_size_bytes=16 * BLOCK, journal_size_bytes=65536)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 640), max_size=12), st.integers(1, 640), st.randoms(use_true_random=False))
def test_a_block_is_zeros_if_and_only_if_all_of_it_is(cuts: list[int], base_sectors: int, rng: object) -> None:
    """Against sectors, one by one."""
    places = sorted({*cuts, 0, base_sectors})
    extents = [
        (low * SECTOR, (high - low) * SECTOR)
        for low, high in itertools.pairwise(places)
        if rng.random() < 0.7  # type: ignore[attr-defined]
    ]
    data = np.zeros(1024, np.bool_)
    data[:base_sectors] = True
    for offset, length in extents:
        data[offset // SECTOR : (offset + length) // SECTOR] = False
    data[SMALL.virtual_size_bytes // SECTOR :] = False
    reach = -(-min(base_sectors * SECTOR, SMALL.virtual_size_bytes) // BLOCK)
    expected = [block for block in range(reach) if not data[block * 8 : block * 8 + 8].any()]
    touched = bits(zero_blocks(SMALL, base_sectors * SECTOR, extents))
    assert touched == expected


RAW = Geometry(
    virtual_size_bytes=200 * BLOCK, block_size_bytes=BLOCK, chunk_size_bytes=16 * BLOCK, journal_size_bytes=65536, layout=Layout.RAW
)


def some(*blocks: int) -> np.ndarray:
    return np.asarray(zero_blocks(RAW, 1 << 30, [(block * BLOCK, BLOCK) for block in blocks]))


def test_runs() -> None:
    for blocks in ([], [0], [199], list(range(200)), [0, 1, 5, 63, 64, 65, 130, 199], list(range(0, 200, 2)), list(range(1, 200, 2))):
        found = list(runs(some(*blocks), RAW.blocks))
        assert [block for first, end in found for block in range(first, end)] == blocks
        assert all(one[1] < two[0] for one, two in itertools.pairwise(found))


def test_runs_beyond_what_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from fvd import _core

    real = _core.bitmap_runs
    monkeypatch.setattr(_core, "bitmap_runs", lambda bitmap, first, end: real(bitmap, first, end, 3))
    blocks = list(range(0, 200, 3))
    assert [first for first, _ in runs(some(*blocks), RAW.blocks)] == blocks
    assert [first for first, _ in runs(some(*blocks[1:]), RAW.blocks)] == blocks[1:]


def test_places_are_made_zeros() -> None:
    asked: list[tuple[int, int]] = []
    done = punch_places(RAW, some(3, 4, 9), lambda offset, length: not asked.append((offset, length)))
    assert asked == [(RAW.data_offset_bytes + 3 * BLOCK, 2 * BLOCK), (RAW.data_offset_bytes + 9 * BLOCK, BLOCK)]
    assert bits(done) == [3, 4, 9]


def test_storage_that_cannot_is_asked_once() -> None:
    asked: list[int] = []

    def punch(offset: int, length: int) -> bool:
        asked.append(offset)
        return len(asked) < 2

    assert bits(punch_places(RAW, some(3, 9, 11), punch)) == [3]
    assert len(asked) == 2


def test_storage_that_fails() -> None:
    def punch(offset: int, length: int) -> bool:
        raise DeviceError("broken")

    with pytest.raises(DeviceError):
        punch_places(RAW, some(1), punch)
