# SPDX-License-Identifier: Apache-2.0
"""Disks written by an earlier version must stay readable: by the code, and by a reader made from FORMAT.md alone."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import lzma
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fvd.errors import Corrupt
from fvd.format import journal, maps, superblock
from fvd.format.maps import EMPTY

HERE = Path(__file__).resolve().parent


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"golden_{name}", HERE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


make = load("make")
stranger = load("stranger")
EXPECTED: dict[str, dict[str, Any]] = json.loads((HERE / "expected.json").read_text())
NAMES = sorted(make.IMAGES)


@cache
def image(name: str) -> bytes:
    return lzma.decompress((HERE / f"{name}.img.xz").read_bytes())


def read_with_the_code(storage: bytes, base: bytes) -> tuple[superblock.Superblock, journal.JournalState, bytes]:
    slots = [storage[o : o + 4096] for o in superblock.SLOT_OFFSETS_BYTES]
    sb = superblock.choose(slots[0], slots[1])
    g = sb.geometry
    bitmap = maps.decode_bitmap(g, storage[g.bitmap_offset_bytes :][: g.bitmap_size_bytes], sb.uuid)
    table = maps.decode_table(g, storage[g.table_offset_bytes :][: g.table_size_bytes], sb.uuid)
    ring = storage[g.journal_offset_bytes :][: g.journal_size_bytes]
    state, _, _ = journal.replay(g, sb.uuid, ring, bitmap, table)
    maps.check_maps(g, bitmap, table, sb.base is not None)
    guest = bytearray(base.ljust(g.virtual_size_bytes, b"\0")[: g.virtual_size_bytes])
    for block in range(g.blocks):
        if int(bitmap[block // 64]) >> block % 64 & 1:
            begin = block * g.block_size_bytes
            size = min(g.block_size_bytes, g.virtual_size_bytes - begin)
            chunk = begin // g.chunk_size_bytes
            slot = chunk if table is None else int(table[chunk])
            place = g.slot_offset_bytes(slot) + begin % g.chunk_size_bytes
            guest[begin : begin + size] = bytes(size) if slot == EMPTY else storage[place : place + size]
    return sb, state, bytes(guest)


def base_of(name: str) -> bytes:
    return make.base_bytes() if EXPECTED[name]["base"] else b""


def test_every_image_is_listed() -> None:
    assert sorted(EXPECTED) == NAMES == sorted(p.name.removesuffix(".img.xz") for p in HERE.glob("*.img.xz"))


@pytest.mark.parametrize("name", NAMES)
def test_the_generator_still_writes_the_same_image(name: str) -> None:
    built = make.IMAGES[name]()
    assert built.expected() == EXPECTED[name]
    assert bytes(built.storage) == image(name)


@pytest.mark.parametrize("name", NAMES)
def test_the_code_reads_it(name: str) -> None:
    expected = EXPECTED[name]
    sb, state, guest = read_with_the_code(image(name), base_of(name))
    assert sb.uuid.hex() == expected["uuid"]
    assert (sb.base.locator if sb.base else None) == expected["base"]
    assert state.next_sequence == expected["next_sequence"]
    assert state.previous == expected["last_commit"]
    assert state.dropped_commit == expected["dropped"]
    assert state.clean == expected["clean"]
    assert hashlib.sha256(guest).hexdigest() == expected["guest_sha256"]


@pytest.mark.parametrize("name", NAMES)
def test_a_stranger_reads_it(name: str) -> None:
    expected = EXPECTED[name]
    disk = stranger.open_disk(image(name))
    assert disk.uuid.hex() == expected["uuid"]
    assert (disk.base_locator or None) == expected["base"]
    assert disk.next_sequence == expected["next_sequence"]
    assert disk.last_commit == expected["last_commit"]
    assert disk.dropped == expected["dropped"]
    assert disk.clean == expected["clean"]
    assert hashlib.sha256(disk.read(image(name), base_of(name))).hexdigest() == expected["guest_sha256"]


def test_the_stranger_knows_nothing_of_fvd() -> None:
    source = (HERE / "stranger.py").read_text()
    imports = {line.split()[1] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert imports == {"__future__", "struct", "dataclasses"}


def test_what_the_images_are_for() -> None:
    """Each image really contains the case that it is named after."""
    assert EXPECTED["dropped"]["next_sequence"] == EXPECTED["dropped"]["last_commit"] + 6
    assert EXPECTED["wrapped"]["next_sequence"] > 3 * 16
    wrapped = stranger.open_disk(image("wrapped"))
    ring = stranger.Ring(image("wrapped"), wrapped.uuid, 1 << 20, 65536)
    assert any(slot == EMPTY for slot in wrapped.table)
    assert max(ring.pages) // 16 > min(ring.pages) // 16, "pages of two laps side by side"
    # The torn image is not what the maps alone say: without the ring the words past the tear are lost.
    torn = image("torn")
    sb = superblock.choose(torn[:4096], torn[524288 : 524288 + 4096])
    g = sb.geometry
    bitmap = maps.decode_bitmap(g, torn[g.bitmap_offset_bytes :][: g.bitmap_size_bytes], sb.uuid)
    assert all(bitmap[:124]) and not any(bitmap[124:])


def test_both_readers_agree_on_damage() -> None:
    """Damage to each page of metadata in turn: both read the same disk, or both refuse."""
    name = "wrapped"
    storage = image(name)
    sb = superblock.choose(storage[:4096], storage[524288 : 524288 + 4096])
    g = sb.geometry
    places = [0, 524288, *range(g.journal_offset_bytes, g.table_offset_bytes + g.table_size_bytes, 4096)]
    outcomes = set()
    for place in places:
        damaged = bytearray(storage)
        damaged[place + 100] ^= 1
        try:
            _, state, _ = read_with_the_code(bytes(damaged), b"")
            mine: object = (state.previous, state.next_sequence, state.dropped_commit)
        except Corrupt:
            mine = "refused"
        try:
            disk = stranger.open_disk(bytes(damaged))
            theirs: object = (disk.last_commit, disk.next_sequence, disk.dropped)
        except stranger.Refused:
            theirs = "refused"
        assert mine == theirs, f"byte {place + 100}"
        outcomes.add(str(mine))
    assert "refused" in outcomes and len(outcomes) >= 2
