# SPDX-License-Identifier: Apache-2.0
"""Bit kernels against lists of bits."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fvd import _core

Words = npt.NDArray[np.uint64]

ONES = 2**64 - 1
# Whole words of one value are the interesting case of every skipping loop.
WORD = st.sampled_from([0, 0, ONES, ONES, 1, 1 << 63, 0x5555555555555555]) | st.integers(0, ONES)


@st.composite
def ranges(draw: st.DrawFn) -> tuple[Words, int, int]:
    words = np.array(draw(st.lists(WORD, min_size=1, max_size=40)), np.uint64)
    edge = st.integers(0, len(words) * 64) | st.integers(0, len(words)).map(lambda i: i * 64)
    first, end = sorted((draw(edge), draw(edge)))
    return words, first, end


def bits_of(words: Words) -> list[int]:
    return list(np.unpackbits(words.view(np.uint8), bitorder="little"))


@given(ranges())
def test_count_all_none(sample: tuple[Words, int, int]) -> None:
    words, first, end = sample
    bits = bits_of(words)[first:end]
    assert _core.bitmap_count(words, first, end) == int(np.count_nonzero(bits))
    assert _core.bitmap_all(words, first, end) == all(bits)
    assert _core.bitmap_none(words, first, end) == (not any(bits))


@given(ranges(), st.booleans())
def test_find(sample: tuple[Words, int, int], value: bool) -> None:
    words, first, end = sample
    bits = bits_of(words)
    assert _core.bitmap_find(words, first, end, value) == next((i for i in range(first, end) if bits[i] == value), end)
    assert _core.bitmap_find_last(words, first, end, value) == next((i for i in reversed(range(first, end)) if bits[i] == value), end)


@given(ranges(), st.booleans())
def test_fill(sample: tuple[Words, int, int], value: bool) -> None:
    words, first, end = sample
    bits = bits_of(words)
    bits[first:end] = [int(value)] * (end - first)
    _core.bitmap_fill(words, first, end, value)
    assert bits_of(words) == bits


@given(ranges(), st.integers(1, 8) | st.just(65536))
def test_runs(sample: tuple[Words, int, int], limit: int) -> None:
    words, first, end = sample
    groups = [(value, len(list(group))) for value, group in itertools.groupby(bits_of(words)[first:end])]
    found: list[tuple[int, int]] = []
    at = first
    while at < end:
        bounds, value = _core.bitmap_runs(words, at, end, limit)
        assert bounds[0] == at and 2 <= len(bounds) <= limit + 1
        found += [(value ^ (i & 1), int(bounds[i + 1] - bounds[i])) for i in range(len(bounds) - 1)]
        at = int(bounds[-1])
    assert found == groups


def test_runs_of_nothing() -> None:
    bounds, value = _core.bitmap_runs(np.zeros(1, np.uint64), 7, 7)
    assert bounds.tolist() == [7] and value is False


@pytest.mark.parametrize("first, end", [(0, 129), (129, 129), (5, 4)])
def test_ranges_outside_the_bitmap(first: int, end: int) -> None:
    words = np.zeros(2, np.uint64)
    for call in (_core.bitmap_count, _core.bitmap_all, _core.bitmap_none, _core.bitmap_runs):
        with pytest.raises(ValueError):
            call(words, first, end)
    with pytest.raises(ValueError):
        _core.bitmap_find(words, first, end, True)
    with pytest.raises(ValueError):
        _core.bitmap_fill(words, first, end, True)
    with pytest.raises(ValueError):
        _core.bitmap_runs(words, 0, 128, 0)


BLOCK, CHUNK = 4096, 65536


def naive_lookup(words: Words, table: list[int] | None, offset: int, length: int) -> tuple[int, bool, int]:
    bits = bits_of(words)
    end = min(offset + length, (offset // CHUNK + 1) * CHUNK)
    present = bits[offset // BLOCK]
    at = offset
    while at < end and bits[at // BLOCK] == present:
        at = min((at // BLOCK + 1) * BLOCK, end)
    chunk = offset // CHUNK
    slot = chunk if table is None else (-1 if table[chunk] == 0xFFFFFFFF else table[chunk])
    return at - offset, bool(present), slot


@given(st.lists(WORD, min_size=1, max_size=4), st.booleans(), st.data())
def test_lookup(words: list[int], raw: bool, draw: st.DataObject) -> None:
    bitmap = np.array(words, np.uint64)
    size = len(words) * 64 * BLOCK
    entries = draw.draw(st.lists(st.sampled_from([0xFFFFFFFF, 3, 2**31]), min_size=size // CHUNK, max_size=size // CHUNK))
    table = None if raw else np.array(entries, np.uint32)
    offset = draw.draw(st.integers(0, size - 1))
    length = draw.draw(st.integers(1, size - offset))
    found = _core.Lookup(bitmap, table, BLOCK, CHUNK).find(offset, length)
    assert found == naive_lookup(bitmap, None if raw else entries, offset, length)


def test_lookup_refuses_what_is_outside() -> None:
    bitmap, table = np.zeros(1, np.uint64), np.zeros(4, np.uint32)
    lookup = _core.Lookup(bitmap, table, BLOCK, CHUNK)
    assert lookup.find(64 * BLOCK - 1, 1) == (1, False, 0)
    for offset, length in ((0, 0), (64 * BLOCK, 1), (2**64 - 1, 1), (2**64 - 1, 2)):
        with pytest.raises(ValueError):
            lookup.find(offset, length)
    with pytest.raises(ValueError):
        _core.Lookup(bitmap, table[:3], BLOCK, CHUNK).find(3 * CHUNK, 1)
    for block, chunk in ((0, CHUNK), (4096, 2048), (4097, CHUNK), (4096, 65537)):
        with pytest.raises(ValueError):
            _core.Lookup(bitmap, table, block, chunk)


def test_lookup_sees_later_changes() -> None:
    bitmap = np.zeros(1, np.uint64)
    lookup = _core.Lookup(bitmap, None, BLOCK, CHUNK)
    bitmap[0] = 1
    assert lookup.find(0, CHUNK) == (BLOCK, True, 0)


@given(st.lists(st.sampled_from([0xFFFFFFFF]) | st.integers(0, 70), max_size=30), st.integers(0, 64))
def test_table_slots(entries: list[int], limit: int) -> None:
    used = np.zeros(1, np.uint64)
    seen: set[int] = set()
    expected = -1
    for chunk, slot in enumerate(entries):
        if slot == 0xFFFFFFFF:
            continue
        if slot in seen or slot >= limit:
            expected = chunk
            break
        seen.add(slot)
    assert _core.table_slots(np.array(entries, np.uint32), limit, used) == expected
    assert int(used[0]) == sum(1 << slot for slot in seen)


def test_table_slots_needs_capacity() -> None:
    with pytest.raises(ValueError):
        _core.table_slots(np.zeros(1, np.uint32), 65, np.zeros(1, np.uint64))


@given(st.lists(WORD, min_size=1, max_size=3), st.integers(1, 40), st.data())
def test_empty_chunk_with_bits(words: list[int], per_chunk: int, draw: st.DataObject) -> None:
    bitmap = np.array(words, np.uint64)
    blocks = draw.draw(st.integers(0, len(words) * 64))
    table = draw.draw(st.lists(st.sampled_from([0xFFFFFFFF, 1]), max_size=50))
    bits = bits_of(bitmap)[:blocks]
    bad = (c for c, slot in enumerate(table) if slot == 0xFFFFFFFF and any(bits[c * per_chunk : (c + 1) * per_chunk]))
    assert _core.empty_chunk_with_bits(bitmap, np.array(table, np.uint32), per_chunk, blocks) == next(bad, -1)


def test_empty_chunk_with_bits_refuses_nonsense() -> None:
    bitmap, table = np.zeros(1, np.uint64), np.zeros(1, np.uint32)
    for per_chunk, blocks in ((0, 1), (1, 65)):
        with pytest.raises(ValueError):
            _core.empty_chunk_with_bits(bitmap, table, per_chunk, blocks)


def test_views_must_fit() -> None:
    with pytest.raises(ValueError):
        _core.bitmap_count(np.zeros(4, np.uint32), 0, 1)
    with pytest.raises(ValueError):
        _core.bitmap_count(np.zeros(8, np.uint64)[::2], 0, 1)
    with pytest.raises(TypeError):
        _core.bitmap_count(None, 0, 0)  # type: ignore[arg-type]
