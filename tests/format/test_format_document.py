# SPDX-License-Identifier: Apache-2.0
"""FORMAT.md and the code say the same: every table of the document is parsed and compared."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fvd import _core
from fvd.errors import InvalidArgument
from fvd.format import geometry, journal, maps, superblock
from fvd.format.geometry import Geometry, Layout
from fvd.format.locator import NBD_SCHEMES, QEMU_SCHEMES, BaseFormat
from fvd.format.records import Record

FORMAT = Path(geometry.__file__).resolve().parent.parent / "FORMAT.md"
TEXT = FORMAT.read_text()

Row = dict[str, str]


def tables(section: int) -> list[list[Row]]:
    body = re.search(rf"^## {section}\. .*?(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert body is not None
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", body.group(), re.MULTILINE):
        lines = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in block.splitlines()]
        found.append([dict(zip(lines[0], line, strict=True)) for line in lines[2:]])
    return found


def fields(table: list[Row]) -> list[tuple[str, int, int]]:
    return [(row["field"], int(row["offset"]), int(row["size"])) for row in table]


def of_dtype(record: Record) -> list[tuple[str, int, int]]:
    """As numpy has it, which must be what the record itself reads and writes."""
    declared: Any = record.fields
    assert record.places == {name: (declared[name][1], declared[name][0].itemsize) for name in record.names}
    return [(name, *record.places[name]) for name in record.names]


def test_superblock_fields() -> None:
    table, _ = tables(4)
    assert fields(table) == of_dtype(superblock.SUPERBLOCK)
    assert superblock.SUPERBLOCK.itemsize == 4096
    magic = re.search(r"`((?:[0-9A-F]{2} ?){8})`", table[0]["meaning"])
    assert magic is not None and bytes.fromhex(magic.group(1)) == superblock.MAGIC
    assert int(table[2]["meaning"]) == superblock.VERSION


def test_enums_of_the_superblock() -> None:
    meaning = {row["field"]: row["meaning"] for row in tables(4)[0]}
    assert meaning["layout"] == ", ".join(f"{m.value} {m.name.lower()}" for m in Layout)
    assert meaning["placement"] == ", ".join(f"{m.value} {m.name.lower()}" for m in geometry.Placement)
    assert meaning["base_format"] == ", ".join(f"{m.value} {m.name.lower()}" for m in BaseFormat)
    assert meaning["compatible_features"].startswith(f"{superblock.COPY_ON_READ} copy_on_read, {superblock.PREFETCH} prefetch;")


def test_locators_of_each_format() -> None:
    """Each row names its schemes, or says that it is about paths; the code takes these and no others."""
    _, table = tables(4)
    seen = []
    for row in table:
        first, _, last = row["base_format"].partition(" to ")
        schemes = set(re.findall(r"`([a-z+]+)`", row["base_locator"]))
        for number in range(int(first), int(last or first) + 1):
            seen.append(number)
            accepted = {
                scheme for scheme in (*NBD_SCHEMES, *QEMU_SCHEMES, "json", "file", "nbd+tcp") if accepts(SAMPLE_URIS[scheme], number)
            }
            assert accepted == schemes, row
            assert accepts("/a/path", number) == row["base_locator"].startswith("the path")
    assert seen == [m.value for m in BaseFormat if m is not BaseFormat.NONE]


SAMPLE_URIS = {
    scheme: f"{scheme}:///x?socket=/s" if scheme.endswith("+unix") else f"{scheme}:pool/image" if scheme == "rbd" else f"{scheme}://host/x"
    for scheme in (*NBD_SCHEMES, *QEMU_SCHEMES, "json", "file", "nbd+tcp")
}


def accepts(text: str, number: int) -> bool:
    try:
        superblock.BaseReference(text, 1, BaseFormat(number))
    except InvalidArgument:
        return False
    return True


def test_cell_fields() -> None:
    (table,) = tables(5)
    assert fields(table) == of_dtype(maps.CELL)
    kinds = re.findall(r"(\d) (\w+)", table[1]["meaning"])
    assert [(int(number), name) for number, name in kinds] == [(m.value, m.name.lower()) for m in maps.MapKind]
    words, entries = re.findall(r"(\d+) (?:words|entries)", table[4]["meaning"])
    assert (int(words), int(entries)) == (geometry.WORDS_PER_CELL, geometry.ENTRIES_PER_CELL)
    assert "`0xFFFFFFFF` (EMPTY)" in TEXT and maps.EMPTY == 0xFFFFFFFF


def test_journal_fields() -> None:
    header, word, entry = tables(6)
    named = fields(header)
    assert named[:-1] == of_dtype(journal.PAGE_HEADER)
    assert named[-1] == ("records", journal.HEADER_BYTES, journal.RECORDS_BYTES)
    assert fields(word) == of_dtype(journal.WORD_RECORD)
    assert fields(entry) == of_dtype(journal.ENTRY_RECORD)
    magic = re.search(r"`((?:[0-9A-F]{2} ?){4})`", header[0]["meaning"])
    assert magic is not None and bytes.fromhex(magic.group(1)) == journal.PAGE_MAGIC
    assert header[10]["meaning"].startswith(f"{journal.FLAG_CLEAN}: clean")


def test_kernels_share_the_layout() -> None:
    assert list(_core.JOURNAL_HEADER_LAYOUT.items()) == [(n, (o, s)) for n, o, s in of_dtype(journal.PAGE_HEADER)]
    assert list(_core.CELL_HEADER_LAYOUT.items()) == [(n, (o, s)) for n, o, s in of_dtype(maps.CELL)[:-1]]


@pytest.mark.parametrize("module, name", [(maps, "CELL"), (journal, "PAGE_HEADER")])
def test_swapped_names_refuse_the_import(module: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two fields of one size, swapped, have the same layout: only their names tell."""
    entries = getattr(module, name).dtype.descr
    swapped = {"cell_kind": "cell_reserved", "cell_reserved": "cell_kind", "previous": "tail", "tail": "previous"}
    monkeypatch.setattr(module, name, Record(*((swapped.get(n, n), t.replace("|", "")) for n, t in entries)))
    with pytest.raises(ImportError):
        module._check_layout()


SAMPLES = [
    Geometry(virtual, block, chunk, journal_size, 1 << 28, layout)
    for virtual, block, chunk, journal_size, layout in itertools.product(
        (4096, 1 << 20, (1 << 30) + 512, 100 << 30, 15 << 40), (4096, 65536), (65536, 1 << 20), (65536, 16 << 20), Layout
    )
    if virtual // chunk <= geometry.CHUNKS_MAX and virtual // block <= geometry.BLOCKS_MAX
]


@pytest.mark.parametrize("g", SAMPLES, ids=str)
def test_regions(g: Geometry) -> None:
    rows = {row["region"]: row for row in tables(1)[0]}
    assert [int(rows[f"superblock slot {i}"]["offset"]) for i in (0, 1)] == list(superblock.SLOT_OFFSETS_BYTES)
    assert int(rows["journal"]["offset"]) == g.journal_offset_bytes

    def ceil(value: float) -> int:
        return int(-(-value // 1))

    names = {
        "virtual_size": g.virtual_size_bytes,
        "block_size": g.block_size_bytes,
        "chunk_size": g.chunk_size_bytes,
        "data_offset_bytes": g.data_offset_bytes,
        "chunk_size_bytes": g.chunk_size_bytes,
        "journal_size_bytes": g.journal_size_bytes,
        "ceil": ceil,
    }
    for name in ("blocks", "chunks", "bitmap_words", "bitmap_cells", "table_cells", "max_storage_size_bytes"):
        formula = re.search(rf"`{name} = ([^`]+)`", TEXT)
        assert formula is not None
        names[name] = eval(formula.group(1), {}, names)
        if name == "table_cells" and g.layout == Layout.RAW:
            names[name] = 0
        assert getattr(g, name) == names[name], name
    assert eval(rows["journal"]["size"].strip("`"), {}, names) == g.journal_size_bytes
    end = g.journal_offset_bytes + g.journal_size_bytes
    assert end == g.bitmap_offset_bytes
    assert eval(rows["bitmap"]["size"].strip("`"), {}, names) == g.bitmap_size_bytes
    end += g.bitmap_size_bytes
    assert g.table_offset_bytes == (0 if g.layout == Layout.RAW else end)
    assert eval(rows["table (compact layout only)"]["size"].strip("`"), {}, names) == g.table_size_bytes
    end += g.table_size_bytes
    assert g.data_offset_bytes == -(-end // (1 << 20)) * (1 << 20)


def test_limits() -> None:
    limits = {row["limit"]: [int(n) for n in re.findall(r"\d+", row["value"])] for row in tables(2)[0]}
    assert limits["virtual size"] == [geometry.SECTOR_BYTES, geometry.VIRTUAL_SIZE_BYTES_MIN]
    assert limits["block size"] == [geometry.BLOCK_SIZE_BYTES_MIN, geometry.BLOCK_SIZE_BYTES_MAX]
    assert limits["chunk size"] == [geometry.CHUNK_SIZE_BYTES_MIN, geometry.CHUNK_SIZE_BYTES_MAX]
    assert limits["chunks"] == [geometry.CHUNKS_MAX]
    assert limits["blocks"] == [geometry.BLOCKS_MAX]
    assert limits["journal size"] == [geometry.PAGE_BYTES, geometry.JOURNAL_SIZE_BYTES_MIN, geometry.JOURNAL_SIZE_BYTES_MAX]
    assert limits["grow step"] == [geometry.GROW_STEP_UNIT_BYTES]
    assert limits["base locator"][0] == superblock.LOCATOR_BYTES_MAX


def test_hash_constants() -> None:
    """Section 7, evaluated from its own constants."""
    first, second, third = (int(c, 16) for c in re.findall(r"0x[0-9A-F]{16}", TEXT.split("## 7.")[1].split("## 8.")[0]))
    mask = (1 << 64) - 1

    def mix(x: int) -> int:
        x = x + first & mask
        x = (x ^ x >> 30) * second & mask
        x = (x ^ x >> 27) * third & mask
        return x ^ x >> 31

    uuid = bytes(range(100, 116))
    seed = int.from_bytes(uuid[:8], "little")
    bitmap, table = np.array([0, 5], np.uint64), np.array([maps.EMPTY, 9], np.uint32)
    expected = mix(mix(seed ^ 1 << 56 ^ 1) ^ 5) ^ mix(mix(seed ^ 2 << 56 ^ 1) ^ 9)
    assert maps.map_hash(uuid, bitmap, table) == expected


def example(name: str) -> tuple[int, bytes]:
    found = re.search(rf"^    {name} at storage byte (\d+), (\d+) bytes\n((?:    [0-9a-f]{{4}}  .*\n?)+)", TEXT, re.MULTILINE)
    assert found is not None
    data = bytearray(int(found.group(2)))
    for line in found.group(3).splitlines():
        offset, row = line.strip().split("  ")
        data[int(offset, 16) : int(offset, 16) + 16] = bytes.fromhex(row)
    return int(found.group(1)), bytes(data)


def test_worked_example() -> None:
    g = Geometry(8 << 20, 65536, 1 << 20, 65536, 1 << 20)
    uuid = bytes(range(16))
    place, page = example("superblock")
    assert place == superblock.SLOT_OFFSETS_BYTES[1]
    sb = superblock.decode(page, 1)
    assert sb == superblock.Superblock(g, uuid, 1, None, 1_700_000_000)
    assert superblock.encode(sb) == page

    bitmap, table = maps.empty_bitmap(g), maps.empty_table(g)
    assert table is not None
    bitmap[0], table[0] = 8, 0
    place, cell = example("cell")
    assert place == g.bitmap_offset_bytes
    assert maps.encode_pages(g, maps.MapKind.BITMAP, bitmap, uuid, 0, 1).tobytes()[:512] == cell

    place, page = example("journal page")
    map_hash = maps.map_hash(uuid, bitmap, table)
    assert place == journal.page_offset_bytes(g, 2)
    built = journal.encode_commit(g, uuid, sequence=2, previous=1, tail=1, map_hash=map_hash, words=[(0, 8)], entries=[(0, 0)])
    assert built.tobytes() == page

    stated = [int(c, 16) for c in re.findall(r"checksum 0x([0-9A-F]{8})", TEXT)]
    real = [int.from_bytes(example(n)[1][o : o + 4], "little") for n, o in (("superblock", 8), ("cell", 0), ("journal page", 4))]
    assert stated == real
    assert f"map hash 0x{map_hash:016X}" in TEXT
    assert f"its data begins at byte\n{g.data_offset_bytes})" in TEXT


def test_default_sizes_are_valid_and_limits_are_enforced() -> None:
    assert Geometry(100 << 30).chunks == 102400
    with pytest.raises(InvalidArgument):
        Geometry(100 << 30, journal_size_bytes=4096)
