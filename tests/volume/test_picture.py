# SPDX-License-Identifier: Apache-2.0
"""fvd.inspect.picture: fits its width, whatever the disk."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fvd.disk.view import View
from fvd.format.geometry import Geometry, Layout
from fvd.format.maps import EMPTY
from fvd.format.superblock import Superblock
from fvd.inspect.picture import draw
from fvd.volume.name import parse_name

MIB = 1 << 20


def view(chunks: int, slots: list[int], storage: int, layout: Layout = Layout.COMPACT) -> View:
    geometry = Geometry(virtual_size_bytes=chunks * MIB, journal_size_bytes=65536, grow_step_bytes=MIB, layout=layout)
    table = None
    bitmap = np.zeros(geometry.bitmap_words, np.uint64)
    if layout is Layout.COMPACT:
        table = np.full(chunks, EMPTY, np.uint32)
        table[: len(slots)] = slots
    elif slots:
        bitmap[0] = 1
    return View(parse_name("file:/x"), Superblock(geometry, bytes(16), 2, None, 0), storage, bitmap, table, True, False)


@settings(max_examples=60, deadline=None)
@given(
    chunks=st.integers(1, 500),
    used=st.integers(0, 500),
    width=st.integers(0, 200),
    ascii_only=st.booleans(),
    layout=st.sampled_from(Layout),
    seed=st.integers(0, 99),
)
def test_every_line_fits(chunks: int, used: int, width: int, ascii_only: bool, layout: Layout, seed: int) -> None:
    slots = np.random.default_rng(seed).permutation(chunks)[:used].tolist()
    lines = draw(view(chunks, slots, (2 + chunks) * MIB, layout), width, ascii_only=ascii_only)
    assert max(map(len, lines)) <= max(width, 24)
    assert len({len(line) for line in lines[5:]}) == 1
    if ascii_only:
        assert all(line.isascii() for line in lines)


def test_a_picture() -> None:
    lines = draw(view(64, list(range(32)), 50 * MIB), 40, ascii_only=True)
    assert lines[:6] == [
        "storage: 50.0 MiB of at most 66.0 MiB; o",
        "[M##################+.........         ]",
        "M metadata  . free  -+*# in use  blank: ",
        "",
        "down: the virtual disk, 64.0 MiB; across",
        "+--------------------------------------+",
    ]
    assert [row.strip("|").find("*") for row in lines[6:12]] == sorted(row.strip("|").find("*") for row in lines[6:12])
    assert all("*" not in row for row in lines[12:18])


@pytest.mark.parametrize("layout", Layout)
def test_an_empty_disk(layout: Layout) -> None:
    assert "*" not in "".join(draw(view(10, [], 3 * MIB, layout), 60, ascii_only=True)[5:])
