# SPDX-License-Identifier: Apache-2.0
"""Maps to pages and back; what storage can do to a page; what must be true of complete maps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fvd.errors import Corrupt, FvdError, InvalidArgument
from fvd.format import maps
from fvd.format.geometry import Geometry, Layout
from fvd.format.maps import EMPTY, Bitmap, Bytes, MapKind, Table

UUID = bytes(range(50, 66))
# 200 MiB: 800 words in 13 cells and 2 pages; 3200 entries in 26 cells and 4 pages.
G = Geometry(200 << 20, 4096, 65536, 65536, 65536)
RAW = Geometry(200 << 20, 4096, 65536, 65536, 65536, Layout.RAW)


def filled() -> tuple[Bitmap, Table]:
    rng = np.random.default_rng(7)
    bitmap = rng.integers(0, 2**64, G.bitmap_words, np.uint64)
    table = rng.permutation(G.chunks).astype(np.uint32)
    return bitmap, table


def regions() -> tuple[Bytes, Bytes]:
    bitmap, table = filled()
    return (
        maps.encode_pages(G, MapKind.BITMAP, bitmap, UUID, 0, G.bitmap_pages),
        maps.encode_pages(G, MapKind.TABLE, table, UUID, 0, G.table_pages),
    )


def test_empty_maps() -> None:
    bitmap, table = maps.empty_bitmap(G), maps.empty_table(G)
    assert table is not None and (np.asarray(table) == EMPTY).all() and len(table) == G.chunks
    assert not np.any(bitmap) and len(bitmap) == G.bitmap_words
    assert maps.map_hash(UUID, bitmap, table) == 0
    assert maps.empty_table(RAW) is None
    assert maps.decode_table(RAW, b"", UUID) is None


def test_round_trip_whole_and_in_pieces() -> None:
    bitmap, table = filled()
    raw_bitmap, raw_table = regions()
    assert np.array_equal(maps.decode_bitmap(G, raw_bitmap, UUID), bitmap)
    decoded = maps.decode_table(G, raw_table.tobytes(), UUID)
    assert decoded is not None and np.array_equal(decoded, table)
    pieces = maps.empty_table(G)
    assert pieces is not None
    for page in reversed(range(G.table_pages)):
        piece = maps.encode_pages(G, MapKind.TABLE, table, UUID, page, 1)
        assert piece.tobytes() == raw_table[page * 4096 : (page + 1) * 4096].tobytes()
        maps.decode_pages(G, MapKind.TABLE, piece, UUID, pieces, page)
    assert np.array_equal(pieces, table)


def test_rot_anywhere_names_the_cell() -> None:
    raw, _ = regions()
    for byte in range(0, len(raw), 37):
        damaged = bytearray(raw)
        damaged[byte] ^= 1 << byte % 8
        with pytest.raises(Corrupt, match=f"bitmap cell {byte // 512} at byte {G.bitmap_offset_bytes + byte // 512 * 512} "):
            maps.decode_bitmap(G, damaged, UUID)


def test_torn_page_is_a_mix_of_valid_cells() -> None:
    old, new = maps.encode_pages(G, MapKind.BITMAP, maps.empty_bitmap(G), UUID, 0, 1), regions()[0][:4096]
    for cut in range(512, 4096, 512):
        mixed = np.concatenate([new[:cut], old[cut:]])
        into = maps.empty_bitmap(G)
        maps.decode_pages(G, MapKind.BITMAP, mixed, UUID, into, 0)
        words = cut // 512 * 62
        assert np.array_equal(into[:words], filled()[0][:words]) and not np.any(into[words:])


def test_a_cell_torn_inside_is_damage() -> None:
    old, new = maps.encode_pages(G, MapKind.BITMAP, maps.empty_bitmap(G), UUID, 0, 1), regions()[0][:4096]
    with pytest.raises(Corrupt, match="cell 3 "):
        maps.decode_pages(G, MapKind.BITMAP, np.concatenate([new[: 3 * 512 + 256], old[3 * 512 + 256 :]]), UUID, maps.empty_bitmap(G), 0)


def test_misplaced_pages() -> None:
    _, raw = regions()
    swapped = np.concatenate([raw[4096:8192], raw[:4096], raw[8192:]])
    with pytest.raises(Corrupt, match="table cell 0 "):
        maps.decode_table(G, swapped, UUID)
    stale = bytearray(raw)
    stale[8192:12288] = raw[4096:8192]
    with pytest.raises(Corrupt, match="table cell 16 "):
        maps.decode_table(G, stale, UUID)


def test_another_disks_cells_and_zeros() -> None:
    raw, _ = regions()
    with pytest.raises(Corrupt, match="cell 0 "):
        maps.decode_bitmap(G, raw, UUID[::-1])
    with pytest.raises(Corrupt, match="cell 0 "):
        maps.decode_bitmap(G, bytes(len(raw)), UUID)


@given(st.integers(0, 8191), st.binary(min_size=1, max_size=600))
def test_arbitrary_bytes(offset: int, data: bytes) -> None:
    raw = regions()[0]
    piece = data[: len(raw) - offset]
    raw[offset : offset + len(piece)] = piece
    same = raw.tobytes() == regions()[0].tobytes()
    try:
        assert np.array_equal(maps.decode_bitmap(G, raw, UUID), filled()[0]) and same
    except FvdError:
        assert not same


def used_slots(used: Bitmap) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(np.asarray(used).view(np.uint8), bitorder="little")).tolist())


def test_used_slots() -> None:
    bitmap, table = maps.empty_bitmap(G), maps.empty_table(G)
    assert table is not None
    table[5], table[9], table[0] = 3, 0, G.chunks - 1
    bitmap[1] = 1 << 16
    used = maps.check_maps(G, bitmap, table, False)
    assert used.itemsize == 8 and len(used) == G.chunks // 64
    assert used_slots(used) == {3, 0, G.chunks - 1}
    assert used_slots(maps.check_maps(RAW, bitmap, None, False)) == set(range(RAW.chunks))


@pytest.mark.parametrize(
    "slots, said", [((4, 4), "chunk 8 in slot 4, but another"), ((4, G.chunks), "slots at most"), ((4, EMPTY - 1), "slots at most")]
)
def test_bad_slots(slots: tuple[int, int], said: str) -> None:
    bitmap, table = maps.empty_bitmap(G), maps.empty_table(G)
    assert table is not None
    table[2], table[8] = slots
    with pytest.raises(Corrupt, match=said):
        maps.check_maps(G, bitmap, table, True)


def test_empty_chunk_with_bits_needs_a_base() -> None:
    bitmap, table = maps.empty_bitmap(G), maps.empty_table(G)
    bitmap[0] = 1 << 47
    maps.check_maps(G, bitmap, table, True)
    with pytest.raises(Corrupt, match="chunk 2 has no slot"):
        maps.check_maps(G, bitmap, table, False)
    assert table is not None
    table[2] = 0
    maps.check_maps(G, bitmap, table, False)


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("blocks", [1, 63, 64, 65, 127])
def test_bits_past_the_last_block(layout: Layout, blocks: int) -> None:
    g = Geometry(blocks * 4096, 4096, 65536, 65536, 65536, layout)
    for bit in range(blocks, g.bitmap_words * 64):
        bitmap = maps.empty_bitmap(g)
        bitmap[bit // 64] = 1 << bit % 64
        with pytest.raises(Corrupt, match=f"block {bit}, but the disk has {blocks}"):
            maps.check_maps(g, bitmap, maps.empty_table(g), True)


@given(st.lists(st.sampled_from([EMPTY]) | st.integers(0, 20), min_size=16, max_size=16), st.integers(0, 2**64 - 1), st.booleans())
@settings(max_examples=200)
def test_check_maps_against_the_document(entries: list[int], word: int, has_base: bool) -> None:
    g = Geometry(1 << 20, 65536, 65536, 65536, 65536)
    table, bitmap = np.array(entries, np.uint32), np.array([word], np.uint64)
    slots = [slot for slot in entries if slot != EMPTY]
    fine = len(set(slots)) == len(slots) and all(slot < 16 for slot in slots) and word < 1 << 16
    fine = fine and (has_base or all(slot != EMPTY or not word >> chunk & 1 for chunk, slot in enumerate(entries)))
    if fine:
        assert used_slots(maps.check_maps(g, bitmap, table, has_base)) == set(slots)
    else:
        with pytest.raises(Corrupt):
            maps.check_maps(g, bitmap, table, has_base)


def test_wrong_shapes() -> None:
    bitmap, table = filled()
    for call in (
        lambda: maps.encode_pages(G, MapKind.BITMAP, bitmap[1:], UUID, 0, 1),
        lambda: maps.encode_pages(G, MapKind.BITMAP, table, UUID, 0, 1),
        lambda: maps.encode_pages(G, MapKind.BITMAP, bitmap, UUID, 1, 2),
        lambda: maps.encode_pages(G, MapKind.BITMAP, bitmap, UUID, -1, 1),
        lambda: maps.decode_bitmap(G, bytes(4096), UUID),
        lambda: maps.decode_table(G, bytes(4096), UUID),
        lambda: maps.decode_pages(G, MapKind.BITMAP, bytes(100), UUID, bitmap, 0),
        lambda: maps.decode_pages(G, MapKind.BITMAP, bytes(4096), UUID, bitmap, 2),
        lambda: maps.check_maps(G, bitmap, None, True),
        lambda: maps.check_maps(G, bitmap, table[1:], True),
    ):
        with pytest.raises(InvalidArgument):
            call()
