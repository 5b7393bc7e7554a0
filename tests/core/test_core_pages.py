# SPDX-License-Identifier: Apache-2.0
"""Cells and journal pages: the kernels against structures packed by hand."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fvd import _core

UUID = bytes(range(7, 23))
OFFSET = 1 << 21
EMPTY = 0xFFFFFFFF
PER_CELL = {1: (62, "<Q", 0, np.uint64), 2: (124, "<I", EMPTY, np.uint32)}


def packed_cell(kind: int, index: int, items: list[int]) -> bytes:
    per_cell, form, initial, _ = PER_CELL[kind]
    mine = items[index * per_cell : (index + 1) * per_cell]
    payload = b"".join(struct.pack(form, item) for item in mine + [initial] * (per_cell - len(mine)))
    body = struct.pack("<HHQ", kind, 0, index) + payload
    crc = _core.crc32c_portable(UUID + struct.pack("<Q", OFFSET + 512 * index) + bytes(4) + body)
    return struct.pack("<I", crc) + body


@given(st.sampled_from([1, 2]), st.integers(0, 2500), st.integers(0, 3), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_cells(kind: int, count: int, first_page: int, pages: int) -> None:
    dtype = PER_CELL[kind][3]
    items = np.random.default_rng(count).integers(0, 2**32, count, dtype=dtype)
    out = np.full(pages * 4096, 0xAA, np.uint8)
    _core.cells_encode(kind, items, UUID, OFFSET, first_page, pages, out)
    cells = range(first_page * 8, (first_page + pages) * 8)
    assert out.tobytes() == b"".join(packed_cell(kind, i, items.tolist()) for i in cells)
    back = np.full(count, 77, dtype)
    assert _core.cells_decode(kind, out, back, UUID, OFFSET, first_page) == -1
    per_cell = PER_CELL[kind][0]
    inside = slice(cells.start * per_cell, cells.stop * per_cell)
    assert np.array_equal(back[inside], items[inside])
    assert (np.delete(back, np.arange(count)[inside]) == 77).all()


def resealed(cell: bytes, index: int) -> bytes:
    crc = _core.checksum(UUID, OFFSET + 512 * index, cell, 0)
    return struct.pack("<I", crc) + cell[4:]


def test_bad_cells_are_named() -> None:
    items = np.arange(130, dtype=np.uint64)
    good = np.empty(4096, np.uint8)
    _core.cells_encode(1, items, UUID, OFFSET, 0, 1, good)
    back = np.zeros(130, np.uint64)

    def first_bad(index: int, cell: bytes, uuid: bytes = UUID) -> int:
        page = good.copy()
        page[index * 512 : (index + 1) * 512] = np.frombuffer(cell, np.uint8)
        return _core.cells_decode(1, page, back, uuid, OFFSET)

    raw = [good[i * 512 : (i + 1) * 512].tobytes() for i in range(8)]
    assert first_bad(2, raw[2]) == -1
    for bit in range(512 * 8):
        assert first_bad(2, (int.from_bytes(raw[2], "little") ^ 1 << bit).to_bytes(512, "little")) == 2
    # Intact, but not what belongs here.
    assert first_bad(5, resealed(struct.pack("<IHHQ", 0, 2, 0, 5) + raw[5][16:], 5)) == 5
    assert first_bad(5, resealed(struct.pack("<IHHQ", 0, 1, 1, 5) + raw[5][16:], 5)) == 5
    assert first_bad(5, resealed(struct.pack("<IHHQ", 0, 1, 0, 6) + raw[5][16:], 5)) == 5
    assert first_bad(5, raw[6]) == 5
    assert first_bad(2, resealed(raw[2][:-1] + b"\1", 2)) == 2, "a word past the end of the map"
    assert first_bad(7, resealed(raw[7][:-1] + b"\1", 7)) == 7, "a cell past the end of the map"
    assert first_bad(0, raw[0], bytes(16)) == 0, "another disk"
    assert _core.cells_decode(1, good, back, UUID, OFFSET + 4096) == 0, "another place"
    assert _core.cells_decode(2, good, np.zeros(9, np.uint32), UUID, OFFSET) == 0, "another map"


def test_cells_refuse_nonsense() -> None:
    words, page = np.zeros(3, np.uint64), np.zeros(4096, np.uint8)
    for kind, pages in ((0, 1), (3, 1), (1, 2), (1, 0)):
        with pytest.raises(ValueError):
            _core.cells_encode(kind, words, UUID, 0, 0, pages, page)
    with pytest.raises(ValueError):
        _core.cells_encode(1, words.astype(np.uint32), UUID, 0, 0, 1, page)
    with pytest.raises(ValueError):
        _core.cells_encode(1, words, UUID[:-1], 0, 0, 1, page)
    with pytest.raises(ValueError):
        _core.cells_decode(1, page[:512], words, UUID, 0)
    with pytest.raises(ValueError):
        _core.cells_decode(4, page, words, UUID, 0)


def encode(words: list[tuple[int, int]], entries: list[tuple[int, int]], sequence: int, ring_pages: int = 64, flags: int = 1) -> np.ndarray:
    packed_words = np.frombuffer(b"".join(struct.pack("<IQ", *w) for w in words), np.uint8)
    packed_entries = np.frombuffer(b"".join(struct.pack("<II", *e) for e in entries), np.uint8)
    out = np.empty(_core.journal_parts(len(words), len(entries)) * 4096, np.uint8)
    _core.journal_encode(packed_words, packed_entries, UUID, OFFSET, ring_pages, sequence, 3, 2, 99, flags, out)
    return out


@given(st.integers(0, 1100), st.integers(0, 1600))
@settings(max_examples=60, deadline=None)
def test_journal_round_trip(word_count: int, entry_count: int) -> None:
    words = [(i, (i * 0x9E3779B97F4A7C15) % 2**64) for i in range(word_count)]
    entries = [(i, i * 7 % 2**32) for i in range(entry_count)]
    pages = encode(words, entries, sequence=130)
    parts = len(pages) // 4096
    assert (parts - 1) * 4032 <= max(1, word_count * 12 + entry_count * 8) + 8 * parts, "no page is wasted"
    read_words, read_entries = [], []
    for part in range(parts):
        page = pages[part * 4096 : (part + 1) * 4096].tobytes()
        magic, crc, sequence, previous, tail, map_hash, p, n, w, e, flags, reserved = struct.unpack("<4sIQQQQHHHHI12s", page[:64])
        assert (magic, sequence, previous, tail, map_hash, p, n, flags) == (b"FVDJ", 130 + part, 3, 2, 99, part, parts, 1)
        position = struct.pack("<Q", OFFSET + (130 + part) % 64 * 4096)
        assert crc == _core.crc32c_portable(UUID + position + page[:4] + bytes(4) + page[8:])
        read_words += [struct.unpack_from("<IQ", page, 64 + 12 * i) for i in range(w)]
        read_entries += [struct.unpack_from("<II", page, 64 + 12 * w + 8 * i) for i in range(e)]
        assert not any(page[64 + 12 * w + 8 * e :]) and not any(reserved)
    assert read_words == words and read_entries == entries

    ring = np.zeros(64 * 4096, np.uint8)
    ring[2 * 4096 : (2 + parts) * 4096] = pages
    headers = np.full((64, 64), 0xEE, np.uint8)
    assert _core.journal_scan(ring, UUID, OFFSET, headers) == parts
    valid = np.flatnonzero(headers.any(axis=1))
    assert valid.tolist() == list(range(2, 2 + parts))
    bitmap, table = np.zeros(1100, np.uint64), np.zeros(1600, np.uint32)
    dirty_b, dirty_t = np.zeros(3, np.uint8), np.zeros(2, np.uint8)
    assert _core.journal_apply(ring, valid.astype(np.uint64), bitmap, table, dirty_b, dirty_t) == -1
    assert bitmap[:word_count].tolist() == [v for _, v in words] and not bitmap[word_count:].any()
    assert table[:entry_count].tolist() == [v for _, v in entries] and not table[entry_count:].any()
    assert dirty_b.tolist() == [int(word_count > 496 * i) for i in range(3)]
    assert dirty_t.tolist() == [int(entry_count > 992 * i) for i in range(2)]


def test_apply_stays_in_bounds() -> None:
    ring = np.zeros(16 * 4096, np.uint8)
    ring[4096:8192] = encode([(0, 5), (10, 1)], [(0, 1)], 1, 16)
    ring[8192:12288] = encode([(1, 1)], [(4, 1)], 2, 16)
    bitmap, table = np.zeros(10, np.uint64), np.zeros(4, np.uint32)
    dirty = np.zeros(1, np.uint8)
    order = np.array([2, 1], np.uint64)
    assert _core.journal_apply(ring, order[1:], bitmap, table, dirty, dirty) == 0
    assert _core.journal_apply(ring, order, bitmap, table, dirty, dirty) == 0
    assert not bitmap.any() and not table.any(), "a page with one bad record changes nothing"
    assert _core.journal_apply(ring, order, np.zeros(11, np.uint64), np.zeros(5, np.uint32), dirty, dirty) == -1
    assert _core.journal_apply(ring, order, np.zeros(11, np.uint64), None, dirty, dirty) == 0
    # A header that was never scanned claims more records than a page holds.
    ring[4096 + 44 : 4096 + 48] = 0xFF
    assert _core.journal_apply(ring, order[1:], bitmap, table, dirty, dirty) == 0
    with pytest.raises(ValueError):
        _core.journal_apply(ring, np.array([16], np.uint64), bitmap, table, dirty, dirty)
    with pytest.raises(ValueError):
        _core.journal_apply(ring, order, bitmap, table, dirty[:0], dirty)
    with pytest.raises(ValueError):
        _core.journal_apply(ring, order, bitmap, table, dirty, dirty[:0])


def test_scan_ignores_what_is_not_valid() -> None:
    headers = np.zeros((16, 64), np.uint8)

    def valid(change: dict[int, bytes], seal: bool = True, position: int = 5) -> int:
        page = bytearray(encode([(1, 1)], [], 21, 16).tobytes())
        for offset, data in change.items():
            page[offset : offset + len(data)] = data
        if seal:
            page[4:8] = struct.pack("<I", _core.checksum(UUID, OFFSET + position * 4096, page, 4))
        ring = np.zeros(16 * 4096, np.uint8)
        ring[position * 4096 : (position + 1) * 4096] = np.frombuffer(page, np.uint8)
        return _core.journal_scan(ring, UUID, OFFSET, headers)

    assert valid({}) == 1
    assert valid({0: b"FVDK"}) == 0, "magic"
    assert valid({8: struct.pack("<Q", 22)}) == 0, "sequence of another position"
    assert valid({}, position=6) == 0, "misplaced, even with a checksum for that place"
    assert valid({40: struct.pack("<HH", 1, 1)}) == 0, "part is not below parts"
    assert valid({42: struct.pack("<H", 0)}) == 0, "no parts"
    assert valid({40: struct.pack("<HH", 21, 30)}) == 0, "a commit that would begin at sequence 0"
    assert valid({40: struct.pack("<HH", 20, 30)}) == 1
    assert valid({44: struct.pack("<HH", 336, 0)}) == 1
    assert valid({44: struct.pack("<HH", 336, 1)}) == 0, "more records than fit"
    assert valid({44: struct.pack("<HH", 0xFFFF, 0xFFFF)}) == 0
    for offset in (0, 4, 9, 17, 30, 39, 48, 63, 64, 75, 100, 4095):
        assert valid({offset: b"\x5a"}, seal=False) == 0, "rot"


def test_journal_refuses_nonsense() -> None:
    with pytest.raises(ValueError):
        encode([], [], 0)
    with pytest.raises(ValueError):
        encode([(0, 0)] * 400, [], 63)
    out, none = np.zeros(4096, np.uint8), np.zeros(0, np.uint8)
    with pytest.raises(ValueError):
        _core.journal_encode(np.zeros(11, np.uint8), none, UUID, 0, 16, 1, 0, 1, 0, 0, out)
    with pytest.raises(ValueError):
        _core.journal_encode(none, none, UUID, 0, 16, 1, 0, 1, 0, 0, np.zeros(8192, np.uint8))
    with pytest.raises(ValueError):
        _core.journal_encode(none, none, UUID, 0, 0, 1, 0, 1, 0, 0, out)
    for ring, rows in ((none, 0), (out[:100], 1), (out, 2)):
        with pytest.raises(ValueError):
            _core.journal_scan(ring, UUID, 0, np.zeros((rows, 64), np.uint8))
