# SPDX-License-Identifier: Apache-2.0
"""What an administrator sees: info, map, check and dump, of closed and of open disks; none of them writes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import sparse

from disks import MIB, crash, driven, make, start, volume
from fvd.disk.view import View, look
from fvd.errors import InUse, InvalidArgument, NotFound
from fvd.format.geometry import Geometry, Layout
from fvd.format.locator import BaseFormat
from fvd.format.maps import EMPTY
from fvd.format.superblock import SLOT_OFFSETS_BYTES, BaseReference, Superblock
from fvd.inspect import map as map_module
from fvd.inspect.check import check
from fvd.inspect.dump import dump
from fvd.inspect.info import info
from fvd.inspect.map import MapExtent, extents, map_volume
from fvd.volume.name import parse_name

BLOCK = 64 * 1024


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "disk.img"


@pytest.fixture(autouse=True)
def nothing_is_written(request: pytest.FixtureRequest, path: Path) -> Iterator[None]:
    yield
    untouched = request.node.stash.get(CONTENTS, None)
    if untouched is not None:
        assert path.read_bytes() == untouched


CONTENTS: pytest.StashKey[bytes] = pytest.StashKey()


def freeze(request: pytest.FixtureRequest, path: Path) -> None:
    request.node.stash[CONTENTS] = path.read_bytes()


# --- info --------------------------------------------------------------------------------------------------------


def test_info_of_a_new_disk(path: Path, request: pytest.FixtureRequest) -> None:
    made = make(path)
    freeze(request, path)
    found = info(volume(path))
    assert json.loads(json.dumps(found)) == found
    expected = {
        "schema_version": 1,
        "volume": volume(path),
        "generation": 2,
        "virtual_size": 64 * MIB,
        "mapped_bytes": 0,
        "present_bytes": 0,
        "storage_size": 16 * MIB,
        "metadata_size": 2 * MIB,
        "max_storage_size": 66 * MIB,
        "storage_limit": 80 * MIB,
        "free_bytes": 14 * MIB,
        "low_water_bytes": 8 * MIB,
        "can_grow": True,
        "block_size": BLOCK,
        "chunk_size": MIB,
        "journal_size": BLOCK,
        "grow_step": 16 * MIB,
        "layout": "compact",
        "placement": "append",
        "base": None,
        "clean": True,
        "open": False,
    }
    assert {key: found[key] for key in expected} == expected
    assert found["uuid"].replace("-", "") == made.superblock.uuid.hex()
    assert found["created_seconds"] == made.superblock.created_seconds


def test_info_of_an_open_disk(path: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.write_bytes(b"x" * (MIB + 1))
    make(path, base=base, prefetch=True)
    with driven(path, low_water_bytes=2 * MIB) as driver:
        driver.pwrite(0, b"x" * BLOCK * 3)
        driver.pwrite(10 * MIB, b"x")
        found = driver.call(lambda: info(driver.volume))
        with pytest.raises(InUse):
            info(volume(path))
    assert json.loads(json.dumps(found)) == found
    assert (found["mapped_bytes"], found["present_bytes"], found["free_bytes"]) == (2 * MIB, 4 * BLOCK, 12 * MIB)
    assert found["base"] == {
        "path": str(base),
        "uri": None,
        "size": MIB + 1,
        "format": "raw",
        "copy_on_read": False,
        "prefetch": True,
        "released": False,
    }
    assert (found["clean"], found["open"], found["low_water_bytes"]) == (False, True, 2 * MIB)
    assert found["growth"]["low_water"] == 2 * MIB and found["statistics"]["writes"] == 2
    closed = info(volume(path))
    assert closed["clean"] and closed["mapped_bytes"] == 2 * MIB


def test_info_of_a_base(path: Path) -> None:
    """Without opening it: what its name and format are called, and whether it is still needed."""
    geometry = Geometry(virtual_size_bytes=MIB, journal_size_bytes=65536)
    for reference, shown in (
        (BaseReference("ssh://host/x", MIB, BaseFormat.REMOTE_RAW), ("ssh://host/x", "ssh://host/x", "raw")),
        (BaseReference("nbd://host", MIB, BaseFormat.NBD), ("nbd://host", "nbd://host", "nbd")),
        (BaseReference("/a/b", MIB, BaseFormat.QCOW2), ("/a/b", None, "qcow2")),
    ):
        for words, released in ((0, False), (0x7FFF, False), (0xFFFF, True)):
            bitmap = np.array([words], np.uint64)
            view = View(parse_name("file:/d"), Superblock(geometry, bytes(16), 2, reference, 0), MIB, bitmap, None, clean=True, open=False)
            base = info(view)["base"]
            assert (base["path"], base["uri"], base["format"], base["released"]) == (*shown, released)


def test_info_of_a_raw_disk(path: Path) -> None:
    make(path, layout=Layout.RAW)
    with driven(path) as driver:
        driver.pwrite(10 * MIB, b"x" * 3 * BLOCK)
    found = info(volume(path))
    assert (found["mapped_bytes"], found["free_bytes"], found["low_water_bytes"]) == (3 * BLOCK, 0, 0)


def test_info_of_a_disk_that_was_not_closed(path: Path, request: pytest.FixtureRequest) -> None:
    make(path)
    driver = start(path)
    driver.pwrite(0, b"x" * BLOCK, fua=True)
    crash(driver)
    freeze(request, path)
    found = info(volume(path))
    assert not found["clean"] and found["mapped_bytes"] == MIB


def test_info_of_what_is_no_disk(path: Path) -> None:
    with pytest.raises(NotFound):
        info(volume(path))


@pytest.mark.parametrize("block", [4096, 16384, 65536, 1 << 20])
def test_mapped_chunks_of_a_raw_disk(block: int) -> None:
    geometry = Geometry(virtual_size_bytes=77 * MIB, block_size_bytes=block, layout=Layout.RAW, grow_step_bytes=16 * MIB)
    bits = np.zeros(geometry.bitmap_words * 64, np.uint8)
    per_chunk = geometry.blocks_per_chunk
    for chunk in (0, 3, 50, 76):
        bits[chunk * per_chunk + per_chunk // 2] = 1
    bitmap = np.packbits(bits, bitorder="little").view(np.uint64)
    superblock = Superblock(geometry, bytes(16), 2, None, 0)
    assert View(parse_name("file:/x"), superblock, 1 << 30, bitmap, None, True, False).mapped_chunks == 4


# --- map ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [False, True])
def test_check_of_a_disk_that_needs_its_base_no_more(path: Path, tmp_path: Path, missing: bool) -> None:
    base = sparse(tmp_path / "base", MIB)
    if not missing:
        base.write_bytes(b"x" * MIB)
    make(path, base=base)
    base.unlink()
    report = check(volume(path))
    assert report.base_released == missing
    assert report.errors == [] if missing else "base is missing" in report.errors[0]


def test_map_of_a_disk_over_a_base(path: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.write_bytes(b"x" * (3 * MIB + 1000))
    make(path, base=base)
    with driven(path) as driver:
        driver.pwrite(MIB, b"x" * 2 * BLOCK)
        driver.pwrite(5 * MIB, b"x" * MIB)
        driver.pwrite(6 * MIB, b"x" * BLOCK)
        driver.trim(0, MIB)
        here = driver.call(lambda: map_volume(driver.volume))
    found = map_volume(volume(path))
    assert found == here
    assert found["extents"] == [
        {"start": 0, "length": MIB, "state": "zero", "storage_offset": None},
        {"start": MIB, "length": 2 * BLOCK, "state": "data", "storage_offset": 2 * MIB},
        {"start": MIB + 2 * BLOCK, "length": 2 * MIB + 1000 - 2 * BLOCK, "state": "base", "storage_offset": None},
        {"start": 3 * MIB + 1000, "length": 2 * MIB - 1000, "state": "zero", "storage_offset": None},
        {"start": 5 * MIB, "length": MIB + BLOCK, "state": "data", "storage_offset": 3 * MIB},
        {"start": 6 * MIB + BLOCK, "length": 58 * MIB - BLOCK, "state": "zero", "storage_offset": None},
    ]
    assert json.loads(json.dumps(found)) == found


def test_map_of_a_part(path: Path) -> None:
    make(path)
    with driven(path) as driver:
        driver.pwrite(MIB, b"x" * MIB)
    found = map_volume(volume(path), MIB + 100, MIB)
    assert [(extent["start"], extent["length"], extent["storage_offset"]) for extent in found["extents"]] == [
        (MIB + 100, MIB - 100, 2 * MIB + 100),
        (2 * MIB, 100, None),
    ]
    assert map_volume(volume(path), 5, 0)["extents"] == []
    for offset, length in ((-1, 5), (64 * MIB, 1), (0, 64 * MIB + 1)):
        with pytest.raises(InvalidArgument):
            map_volume(volume(path), offset, length)


@st.composite
def views(draw: st.DrawFn) -> View:
    raw = draw(st.booleans())
    geometry = Geometry(
        virtual_size_bytes=draw(st.integers(8, 3000)) * 512,
        block_size_bytes=4096 << draw(st.integers(0, 4)),
        chunk_size_bytes=65536,
        grow_step_bytes=65536,
        layout=Layout.RAW if raw else Layout.COMPACT,
    )
    base = draw(st.one_of(st.none(), st.integers(1, 4000 * 512).map(lambda size: BaseReference("/base", size))))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    bits = np.zeros(geometry.bitmap_words * 64, np.uint8)
    bits[: geometry.blocks] = rng.random(geometry.blocks) < draw(st.sampled_from([0.02, 0.5, 0.98]))
    table = None
    if not raw:
        table = rng.permutation(geometry.chunks).astype(np.uint32)
        if draw(st.booleans()):
            table.sort()
        table[rng.random(geometry.chunks) < 0.3] = EMPTY
    superblock = Superblock(geometry, bytes(16), 2, base, 0)
    return View(parse_name("file:/x"), superblock, 1 << 30, np.packbits(bits, bitorder="little").view(np.uint64), table, True, False)


def state_of_byte(view: View, at: int) -> tuple[str, int | None]:
    """What FORMAT.md says of one byte."""
    geometry = view.geometry
    block, chunk = at // geometry.block_size_bytes, at // geometry.chunk_size_bytes
    slot = chunk if view.table is None else int(view.table[chunk])
    if int(view.bitmap[block // 64]) >> (block % 64) & 1:
        return ("zero", None) if slot == EMPTY else ("data", geometry.slot_offset_bytes(slot) + at % geometry.chunk_size_bytes)
    base = view.superblock.base
    return ("base", None) if base is not None and at < base.size_bytes else ("zero", None)


@settings(max_examples=150, deadline=None)
@given(view=views(), start=st.integers(0, 1 << 20), length=st.integers(0, 1 << 20), window=st.sampled_from([64, 128, 1 << 22]))
def test_extents_agree_with_the_format_byte_by_byte(view: View, start: int, length: int, window: int) -> None:
    size = view.geometry.virtual_size_bytes
    start = min(start, size)
    length = min(length, size - start)
    usual, map_module.WINDOW_BLOCKS = map_module.WINDOW_BLOCKS, window
    try:
        found = list(extents(view, start, length))
    finally:
        map_module.WINDOW_BLOCKS = usual
    at = start
    before: MapExtent | None = None
    for extent in found:
        assert extent.start == at and extent.length > 0
        for place in {at, at + extent.length // 2, at + extent.length - 1}:
            state, offset = state_of_byte(view, place)
            assert extent.state == state
            assert offset == (None if extent.storage_offset is None else extent.storage_offset + place - at)
        if before is not None and before.state == extent.state:
            assert before.storage_offset is not None and before.storage_offset + before.length != extent.storage_offset
        at += extent.length
        before = extent
    assert at == start + length


def test_a_map_of_a_large_empty_disk_is_quick_and_small() -> None:
    geometry = Geometry(virtual_size_bytes=8 << 40)
    superblock = Superblock(geometry, bytes(16), 2, None, 0)
    table = np.full(geometry.chunks, EMPTY, np.uint32)
    view = View(parse_name("file:/x"), superblock, 1 << 30, np.zeros(geometry.bitmap_words, np.uint64), table, True, False)
    assert list(extents(view)) == [MapExtent(0, 8 << 40, "zero")]


def test_a_view_is_a_copy(path: Path) -> None:
    make(path)
    with driven(path) as driver:
        view = driver.call(lambda: look(driver.volume))
        driver.pwrite(0, b"x" * BLOCK)
        assert not any(view.bitmap)


# --- check -------------------------------------------------------------------------------------------------------


def spoil(path: Path, offset: int, data: bytes = b"rot") -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_a_whole_disk(path: Path, request: pytest.FixtureRequest) -> None:
    make(path)
    with driven(path) as driver:
        driver.pwrite(0, b"x" * 3 * MIB)
        open_report = driver.call(lambda: check(driver.volume))
    assert open_report.errors == [] and open_report.mapped_chunks == 3 and not open_report.clean
    freeze(request, path)
    told: list[tuple[int, int]] = []
    report = check(volume(path), progress=lambda done, total: told.append((done, total)))
    assert (report.errors, report.warnings, report.clean) == ([], [], True)
    assert (report.mapped_chunks, report.mapped_bytes) == (3, 3 * MIB)
    assert told[-1][0] == told[-1][1]


def test_every_damage_is_named(path: Path, request: pytest.FixtureRequest) -> None:
    geometry = make(path).superblock.geometry
    spoil(path, SLOT_OFFSETS_BYTES[1] + 300)
    spoil(path, geometry.bitmap_offset_bytes + 20)
    spoil(path, geometry.table_offset_bytes + 20)
    freeze(request, path)
    report = check(volume(path))
    assert len(report.warnings) == 1 and "superblock slot 1" in report.warnings[0]
    assert any("bitmap cell 0" in error for error in report.errors)
    assert any("table cell 0" in error for error in report.errors)


def test_a_lost_region_does_not_fill_the_screen(path: Path) -> None:
    geometry = make(path, virtual_size_bytes=1 << 37).superblock.geometry
    for page in range(50):
        spoil(path, geometry.table_offset_bytes + page * 4096 + 100)
    report = check(volume(path))
    assert len([error for error in report.errors if "table" in error]) == 21
    assert any("30 more pages" in error for error in report.errors)


@pytest.mark.parametrize("what", ["journal", "truncated", "superblocks", "base"])
def test_other_damage(path: Path, tmp_path: Path, what: str) -> None:
    base = tmp_path / "base"
    base.write_bytes(b"x" * MIB)
    make(path, base=base)
    if what == "journal":
        spoil(path, MIB + 4096 + 60)
    elif what == "truncated":
        os.truncate(path, MIB + 100_000)
    elif what == "superblocks":
        for offset in SLOT_OFFSETS_BYTES:
            spoil(path, offset + 300)
    else:
        os.truncate(base, 5)
    report = check(volume(path))
    assert len(report.errors) == 1
    assert {"journal": "journal", "truncated": "cut off", "superblocks": "checksum", "base": "has 5 bytes"}[what] in report.errors[0]


def test_a_disk_that_was_not_closed_is_whole(path: Path, request: pytest.FixtureRequest) -> None:
    make(path)
    driver = start(path)
    driver.pwrite(0, b"x" * BLOCK, fua=True)
    crash(driver)
    freeze(request, path)
    report = check(volume(path))
    assert report.errors == [] and not report.clean and report.commits_replayed > 0


def test_check_of_what_is_no_disk(path: Path) -> None:
    sparse(path, 16 * MIB)
    with pytest.raises(NotFound):
        check(volume(path))


# --- dump --------------------------------------------------------------------------------------------------------


def test_dump(path: Path, request: pytest.FixtureRequest) -> None:
    made = make(path)
    with driven(path) as driver:
        driver.pwrite(5 * MIB, b"x" * BLOCK)
    freeze(request, path)
    found: dict[str, Any] = dump(volume(path))
    assert json.loads(json.dumps(found)) == found
    first = found["superblocks"][0]
    assert first["valid"] and first["generation"] == 4 and first["uuid"].replace("-", "") == made.superblock.uuid.hex()
    assert first["virtual_size_bytes"] == 64 * MIB
    assert found["journal"][0]["sequence"] == 1 and found["journal"][-1]["clean"]
    assert [cell["items"] for cell in found["table_cells"]] == [[[5, 0]]]
    assert [cell["items"] for cell in found["bitmap_cells"]] == [[[1, "0x0000000000010000"]]]


def test_dump_shows_damage(path: Path) -> None:
    geometry = make(path).superblock.geometry
    spoil(path, SLOT_OFFSETS_BYTES[0] + 300)
    spoil(path, geometry.bitmap_offset_bytes + 30)
    found = dump(volume(path))
    assert not found["superblocks"][0]["valid"] and "checksum" in found["superblocks"][0]["problem"]
    assert "bitmap cell 0" in found["bitmap_cells"][0]["problem"]
    spoil(path, SLOT_OFFSETS_BYTES[1] + 300)
    assert "checksum" in dump(volume(path))["error"]


def test_dump_of_an_open_disk_is_refused(path: Path) -> None:
    make(path)
    with driven(path), pytest.raises(InUse):
        dump(volume(path))
