# SPDX-License-Identifier: Apache-2.0
"""Build the golden images: `PYTHONPATH=. python tests/golden/make.py` rewrites tests/golden/*.img.xz and expected.json.

Uses only fvd.format, so that an image is what the format code of its day wrote. Run it only together with a change of FORMAT.md:
images that no longer match mean that disks in the field can no longer be read.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from fvd.format import journal, maps
from fvd.format.geometry import KIB, MIB, PAGE_BYTES, Geometry, Layout
from fvd.format.maps import EMPTY, MapKind
from fvd.format.superblock import SLOT_OFFSETS_BYTES, BaseReference, Superblock, encode

HERE = Path(__file__).resolve().parent
BASE_SIZE_BYTES = 300_000
GARBAGE = 0xDD
"""What the storage held before: must never be seen by a guest."""


def base_bytes() -> bytes:
    """The base image, smaller than the disk and no multiple of a block."""
    return bytes(i * 7 % 251 for i in range(BASE_SIZE_BYTES))


def block_bytes(size: int, block: int, version: int) -> bytes:
    return bytes([1 + (block * 31 + version * 101) % 250]) * size


class Image:
    """A disk on paper: its storage, the maps in memory, and what a guest must see."""

    def __init__(self, number: int, geometry: Geometry, base: BaseReference | None = None) -> None:
        self.geometry = geometry
        self.uuid = hashlib.sha256(f"fvd golden image {number}".encode()).digest()[:16]
        self.bitmap = maps.empty_bitmap(geometry)
        self.table = maps.empty_table(geometry)
        self.storage = bytearray(geometry.data_offset_bytes)
        self.guest = bytearray(geometry.virtual_size_bytes)
        self.base = base
        if base is not None:
            self.guest[: base.size_bytes] = base_bytes()
        for generation in (1, 2):
            superblock = Superblock(geometry, self.uuid, generation, base, created_seconds=1_700_000_000)
            self.put(SLOT_OFFSETS_BYTES[superblock.slot], encode(superblock))
        self.sequence, self.previous, self.tail = 2, 1, 1
        self.dropped = False
        self.clean = True
        self.put(journal.page_offset_bytes(geometry, 1), journal.first_page(geometry, self.uuid))
        self.checkpoint()
        self._words: set[int] = set()
        self._entries: set[int] = set()

    def put(self, offset_bytes: int, data: bytes) -> None:
        end_bytes = offset_bytes + len(data)
        if end_bytes > len(self.storage):
            self.storage += bytes([GARBAGE]) * (end_bytes - len(self.storage))
        self.storage[offset_bytes:end_bytes] = data

    def write(self, block: int, version: int = 0, slot: int | None = None) -> None:
        geometry = self.geometry
        chunk = block // geometry.blocks_per_chunk
        if self.table is not None and self.table[chunk] == EMPTY:
            used = maps.check_maps(geometry, self.bitmap, self.table, True)
            free = [s for s in range(geometry.chunks) if not int(used[s // 64]) >> s % 64 & 1]
            self.table[chunk] = free[0] if slot is None else slot
            self._entries.add(chunk)
            # Bits that are 1 said zeros until now; from here on they say what is in the slot.
            self.put(geometry.slot_offset_bytes(int(self.table[chunk])), self._zeros_where_marked(chunk))
        place = chunk if self.table is None else int(self.table[chunk])
        begin = block * geometry.block_size_bytes
        size = min(geometry.block_size_bytes, geometry.virtual_size_bytes - begin)
        slot_end = geometry.slot_offset_bytes(place + 1)
        self.put(slot_end, b"")
        data = block_bytes(size, block, version)
        self.put(geometry.slot_offset_bytes(place) + begin % geometry.chunk_size_bytes, data)
        self.guest[begin : begin + size] = data
        self._set_bit(block, 1)

    def _zeros_where_marked(self, chunk: int) -> bytes:
        geometry = self.geometry
        marked = [int(self.bitmap[b // 64]) >> b % 64 & 1 for b in range(chunk * geometry.blocks_per_chunk, geometry.blocks)]
        size = geometry.block_size_bytes
        return b"".join(bytes(size) if bit else bytes([GARBAGE]) * size for bit in marked[: geometry.blocks_per_chunk])

    def _set_bit(self, block: int, value: int) -> None:
        word, bit = block // 64, np.uint64(1 << block % 64)
        self.bitmap[word] = self.bitmap[word] | bit if value else self.bitmap[word] & ~bit
        self._words.add(word)

    def zero_chunk(self, chunk: int) -> None:
        """Over a base: EMPTY, with all bits 1."""
        assert self.table is not None
        geometry = self.geometry
        self.table[chunk] = EMPTY
        self._entries.add(chunk)
        for block in range(chunk * geometry.blocks_per_chunk, min((chunk + 1) * geometry.blocks_per_chunk, geometry.blocks)):
            self._set_bit(block, 1)
        begin = chunk * geometry.chunk_size_bytes
        end = min(begin + geometry.chunk_size_bytes, geometry.virtual_size_bytes)
        self.guest[begin:end] = bytes(end - begin)

    def commit(self, clean: bool = False, keep_pages: Iterable[int] | None = None, tail: int | None = None) -> None:
        """Write what changed as one commit; with `keep_pages`, only those of its pages reach the storage: a crash."""
        geometry = self.geometry
        words = [(i, int(self.bitmap[i])) for i in sorted(self._words)]
        entries = [] if self.table is None else [(i, int(self.table[i])) for i in sorted(self._entries)]
        parts = journal.parts_needed(len(words), len(entries))
        sequence = journal.fit_sequence(geometry, self.sequence, parts)
        self.tail = self.tail if tail is None else (sequence if tail == 0 else tail)
        pages = journal.encode_commit(
            geometry,
            self.uuid,
            sequence=sequence,
            previous=self.previous,
            tail=self.tail,
            map_hash=maps.map_hash(self.uuid, self.bitmap, self.table),
            words=words,
            entries=entries,
            clean=clean,
        ).tobytes()
        for part in range(parts):
            if keep_pages is None or part in keep_pages:
                self.put(journal.page_offset_bytes(geometry, sequence + part), pages[part * PAGE_BYTES : (part + 1) * PAGE_BYTES])
        self.sequence = sequence + parts
        self.dropped = keep_pages is not None
        if not self.dropped:
            self.previous, self.clean = sequence, clean
        self._words, self._entries = set(), set()

    def checkpoint(self, bitmap_bytes: int | None = None) -> None:
        """Write the maps; with `bitmap_bytes`, only so much of the bitmap's first page: a torn write."""
        geometry = self.geometry
        cells = maps.encode_pages(geometry, MapKind.BITMAP, self.bitmap, self.uuid, 0, geometry.bitmap_pages).tobytes()
        self.put(geometry.bitmap_offset_bytes, cells[:bitmap_bytes])
        if self.table is not None:
            cells = maps.encode_pages(geometry, MapKind.TABLE, self.table, self.uuid, 0, geometry.table_pages).tobytes()
            self.put(geometry.table_offset_bytes, cells)

    def expected(self) -> dict[str, object]:
        storage = bytes(self.storage)
        return {
            "storage_sha256": hashlib.sha256(storage).hexdigest(),
            "storage_size_bytes": len(storage),
            "guest_sha256": hashlib.sha256(self.guest).hexdigest(),
            "uuid": self.uuid.hex(),
            "base": None if self.base is None else self.base.locator,
            "next_sequence": self.sequence,
            "last_commit": self.previous,
            "dropped": self.dropped,
            "clean": self.clean,
        }


def small(virtual_size_bytes: int = MIB, layout: Layout = Layout.COMPACT) -> Geometry:
    """Sixteen pages of journal, sixteen blocks to a chunk."""
    return Geometry(virtual_size_bytes, 4 * KIB, 64 * KIB, 64 * KIB, 64 * KIB, layout)


def empty() -> Image:
    return Image(1, small())


def mapped() -> Image:
    """Some chunks from a checkpoint, some only in the journal, slots out of order, a partial last block."""
    image = Image(2, small(MIB - 3584))
    for block in (0, 1, 17, 255):
        image.write(block)
    image.commit()
    image.checkpoint()
    image.commit(tail=0)
    image.write(40, slot=7)
    image.write(2)
    image.commit()
    image.write(2, version=1)
    return image


def base() -> Image:
    image = Image(3, small(), BaseReference("/images/größe.raw", BASE_SIZE_BYTES))
    image.write(3)
    image.write(200)
    image.commit()
    image.zero_chunk(1)
    image.zero_chunk(12)
    image.commit()
    image.checkpoint()
    image.commit(clean=True, tail=0)
    return image


def raw() -> Image:
    image = Image(4, small(layout=Layout.RAW))
    for block in (0, 5, 100, 101):
        image.write(block)
    image.commit()
    image.write(6)
    image.commit()
    return image


def _many_words(image: Image) -> None:
    """More words than one page holds, without any data: zeros over a base that is not there to be seen."""
    for chunk in range(image.geometry.chunks):
        image.zero_chunk(chunk)


def dropped() -> Image:
    """The last commit has five pages, of which two arrived: it does not count, and the numbers of all five are used up."""
    image = Image(5, small(100 * MIB), BaseReference("/images/b.raw", BASE_SIZE_BYTES))
    image.write(70)
    image.commit()
    bitmap, table, guest = image.bitmap.copy(), image.table, bytes(image.guest)
    assert table is not None
    table = table.copy()
    _many_words(image)
    image.commit(keep_pages=(0, 2))
    image.bitmap, image.table, image.guest = bitmap, table, bytearray(guest)
    return image


def wrapped() -> Image:
    """Several laps around the ring, a commit that skips the ring's end, and a tail that is not the last commit."""
    image = Image(6, small(100 * MIB), BaseReference("/images/b.raw", BASE_SIZE_BYTES))
    for i in range(43):
        image.write(i * 5, version=i)
        if i % 7 == 6:
            image.commit()
            image.checkpoint()
            image.commit(tail=0)
        else:
            image.commit()
    _many_words(image)
    image.checkpoint()
    image.commit(tail=0)
    for i in range(3):
        image.write(i, version=50 + i)
        image.commit()
    return image


def torn() -> Image:
    """A checkpoint wrote half a page of the bitmap: cells old and new side by side, which the journal completes."""
    image = Image(7, small(100 * MIB))
    for i in range(400):
        image.write(i * 64, slot=i)
    image.commit()
    image.checkpoint(bitmap_bytes=1024)
    return image


IMAGES = {f.__name__: f for f in (empty, mapped, base, raw, dropped, wrapped, torn)}


def main() -> None:
    expected = {}
    for name, build in IMAGES.items():
        image = build()
        expected[name] = image.expected()
        (HERE / f"{name}.img.xz").write_bytes(lzma.compress(bytes(image.storage), preset=9))
    (HERE / "expected.json").write_text(json.dumps(expected, indent=2) + "\n")


if __name__ == "__main__":
    main()
