# SPDX-License-Identifier: Apache-2.0
"""Geometry: limits hold exactly at their edges, and derived sizes agree with each other for every allowed disk."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fvd.errors import InvalidArgument
from fvd.format.geometry import BLOCKS_MAX, CHUNKS_MAX, Geometry, Layout, Placement

pytestmark = pytest.mark.pure

GIB = 1 << 30


@pytest.mark.parametrize(
    "good",
    [
        {"virtual_size_bytes": 4096},
        {"virtual_size_bytes": 4096 + 512},
        {"virtual_size_bytes": GIB, "block_size_bytes": 4096},
        {"virtual_size_bytes": GIB, "block_size_bytes": 1 << 20},
        {"virtual_size_bytes": GIB, "chunk_size_bytes": 65536},
        {"virtual_size_bytes": GIB, "chunk_size_bytes": 1 << 28},
        {"virtual_size_bytes": GIB, "journal_size_bytes": 65536},
        {"virtual_size_bytes": GIB, "journal_size_bytes": 65536 + 4096},
        {"virtual_size_bytes": GIB, "journal_size_bytes": GIB},
        {"virtual_size_bytes": GIB, "grow_step_bytes": 1 << 20},
        {"virtual_size_bytes": CHUNKS_MAX * 65536, "chunk_size_bytes": 65536},
        {"virtual_size_bytes": BLOCKS_MAX * 4096, "block_size_bytes": 4096},
    ],
)
def test_edges_inside(good: dict[str, Any]) -> None:
    Geometry(**good)


@pytest.mark.parametrize(
    "bad, said",
    [
        ({"virtual_size_bytes": 0}, "at least 4096"),
        ({"virtual_size_bytes": -4096}, "at least 4096"),
        ({"virtual_size_bytes": 3584}, "at least 4096"),
        ({"virtual_size_bytes": GIB + 1}, "multiple of 512"),
        ({"virtual_size_bytes": GIB, "block_size_bytes": 2048}, "from 4096 to 1048576"),
        ({"virtual_size_bytes": GIB, "block_size_bytes": 2 << 20, "chunk_size_bytes": 2 << 20}, "from 4096 to 1048576"),
        ({"virtual_size_bytes": GIB, "block_size_bytes": 65535}, "power of two"),
        ({"virtual_size_bytes": GIB, "chunk_size_bytes": 32768}, "from 65536 to 268435456"),
        ({"virtual_size_bytes": GIB, "chunk_size_bytes": 1 << 29}, "from 65536 to 268435456"),
        ({"virtual_size_bytes": GIB, "chunk_size_bytes": 65536, "block_size_bytes": 131072}, "smaller than block size"),
        ({"virtual_size_bytes": GIB, "journal_size_bytes": 61440}, "from 65536 to 1073741824"),
        ({"virtual_size_bytes": GIB, "journal_size_bytes": GIB + 4096}, "from 65536 to 1073741824"),
        ({"virtual_size_bytes": GIB, "journal_size_bytes": 65536 + 512}, "multiple of 4096"),
        ({"virtual_size_bytes": GIB, "grow_step_bytes": (1 << 20) - 65536}, "at least the chunk size"),
        ({"virtual_size_bytes": GIB, "grow_step_bytes": (1 << 20) + 4096}, "multiple of 65536"),
        ({"virtual_size_bytes": GIB, "grow_step_bytes": 1 << 64}, "grow step"),
        ({"virtual_size_bytes": CHUNKS_MAX * 65536 + 512, "chunk_size_bytes": 65536}, "at most 268435456"),
        ({"virtual_size_bytes": BLOCKS_MAX * 4096 + 512, "block_size_bytes": 4096}, "at most 8589934592"),
        ({"virtual_size_bytes": GIB, "layout": 2}, "does not exist"),
        ({"virtual_size_bytes": GIB, "placement": 2}, "does not exist"),
    ],
)
def test_edges_outside(bad: dict[str, int], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        Geometry(**bad)  # type: ignore[arg-type]


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    block = 1 << draw(st.integers(12, 20))
    chunk = 1 << draw(st.integers(max(16, block.bit_length() - 1), 28))
    largest = min(BLOCKS_MAX * block, CHUNKS_MAX * chunk)
    sectors = draw(st.integers(8, 1 << 12) | st.integers(8, largest // 512))
    return Geometry(
        sectors * 512,
        block,
        chunk,
        draw(st.integers(16, 1 << 18)) * 4096,
        chunk + draw(st.integers(0, 1000)) * 65536,
        draw(st.sampled_from(Layout)),
        Placement.APPEND,
    )


@given(geometries(), st.integers(0, 1 << 60))
def test_derived_sizes_agree(g: Geometry, storage_size_bytes: int) -> None:
    assert (g.blocks - 1) * g.block_size_bytes < g.virtual_size_bytes <= g.blocks * g.block_size_bytes
    assert (g.chunks - 1) * g.chunk_size_bytes < g.virtual_size_bytes <= g.chunks * g.chunk_size_bytes
    assert g.blocks <= g.bitmap_words * 64 < g.blocks + 64
    assert g.bitmap_words <= g.bitmap_cells * 62 and g.bitmap_cells * 512 <= g.bitmap_size_bytes
    assert g.bitmap_offset_bytes == g.journal_offset_bytes + g.journal_size_bytes
    if g.layout == Layout.RAW:
        assert g.table_cells == g.table_offset_bytes == g.table_size_bytes == g.table_entries == 0
    else:
        assert g.table_offset_bytes == g.bitmap_offset_bytes + g.bitmap_size_bytes
        assert g.chunks <= g.table_cells * 124 and g.table_cells * 512 <= g.table_size_bytes
    end = g.bitmap_offset_bytes + g.bitmap_size_bytes + g.table_size_bytes
    assert g.data_offset_bytes % (1 << 20) == 0 and end <= g.data_offset_bytes < end + (1 << 20)
    assert g.metadata_size_bytes == g.data_offset_bytes
    slots = g.slots_in(storage_size_bytes)
    assert 0 <= slots <= g.chunks
    assert slots == 0 or g.slot_offset_bytes(slots) <= storage_size_bytes
    assert slots == g.chunks or g.slot_offset_bytes(slots + 1) > storage_size_bytes
    assert g.slots_in(g.max_storage_size_bytes) == g.chunks and g.slots_in(g.max_storage_size_bytes - 1) == g.chunks - 1
