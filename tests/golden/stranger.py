# SPDX-License-Identifier: Apache-2.0
"""A second reader of fvd disks, written from FORMAT.md alone: plain Python, no fvd, no numpy, its own CRC table.

It proves that the document is enough. It is slow, and refuses damage with one exception type.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

EMPTY = 0xFFFFFFFF
MASK = (1 << 64) - 1


class Refused(Exception):
    """The storage holds no disk that FORMAT.md allows."""


def _crc_table() -> list[int]:
    table = []
    for i in range(256):
        for _ in range(8):
            i = (i >> 1) ^ (0x82F63B78 if i & 1 else 0)
        table.append(i)
    return table


CRC_TABLE = _crc_table()


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ CRC_TABLE[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF


def u(data: bytes, offset: int, size: int) -> int:
    return int.from_bytes(data[offset : offset + size], "little")


def check(what: str, uuid: bytes, position: int, structure: bytes, field: int) -> None:
    zeroed = structure[:field] + bytes(4) + structure[field + 4 :]
    if u(structure, field, 4) != crc32c(uuid + struct.pack("<Q", position) + zeroed):
        raise Refused(f"{what}: checksum")


def up(value: int, unit: int) -> int:
    return (value + unit - 1) // unit


@dataclass
class Disk:
    uuid: bytes
    generation: int
    virtual_size: int
    block_size: int
    chunk_size: int
    data_offset: int
    raw: bool
    base_locator: str
    base_size: int
    words: list[int]
    table: list[int]
    clean: bool
    dropped: bool
    last_commit: int
    next_sequence: int

    def read(self, storage: bytes, base: bytes = b"") -> bytes:
        """Everything that the guest sees."""
        out = []
        for block in range(up(self.virtual_size, self.block_size)):
            begin = block * self.block_size
            size = min(self.block_size, self.virtual_size - begin)
            if self.words[block // 64] >> block % 64 & 1:
                slot = self.table[begin // self.chunk_size]
                place = self.data_offset + slot * self.chunk_size + begin % self.chunk_size
                data = bytes(size) if slot == EMPTY else storage[place : place + size]
            else:
                data = base[begin : begin + size]
            out.append(data.ljust(size, b"\0"))
        return b"".join(out)


def read_superblock(storage: bytes) -> bytes:
    best, best_generation, magic_seen = None, -1, False
    for slot, place in ((0, 0), (1, 524288)):
        page = storage[place : place + 4096]
        if page[:8] != bytes.fromhex("46564449534B0D0A"):
            continue
        magic_seen = True
        try:
            check("superblock", page[24:40], place, page, 8)
        except Refused:
            continue
        if u(page, 16, 8) % 2 == slot and u(page, 16, 8) > best_generation:
            best, best_generation = page, u(page, 16, 8)
    if best is None:
        raise Refused("every superblock is damaged" if magic_seen else "no fvd disk")
    if u(best, 12, 4) != 1 or u(best, 48, 8) != 0:
        raise Refused("version or incompatible features")
    return best


def read_cells(storage: bytes, uuid: bytes, offset: int, size: int, kind: int, count: int) -> list[int]:
    per_cell, width, initial = (62, 8, 0) if kind == 1 else (124, 4, EMPTY)
    items: list[int] = []
    for index in range(size // 512):
        place = offset + 512 * index
        cell = storage[place : place + 512]
        check(f"cell {index} of map {kind}", uuid, place, cell, 0)
        if (u(cell, 4, 2), u(cell, 6, 2), u(cell, 8, 8)) != (kind, 0, index):
            raise Refused(f"cell {index} of map {kind}: header")
        items += [u(cell, 16 + i * width, width) for i in range(per_cell)]
    if any(item != initial for item in items[count:]):
        raise Refused(f"map {kind} goes on past its end")
    return items[:count]


def mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & MASK
    return x ^ x >> 31


def map_hash(uuid: bytes, words: list[int], table: list[int]) -> int:
    seed, total = u(uuid, 0, 8), 0
    for kind, initial, items in ((1, 0, words), (2, EMPTY, table)):
        for index, value in enumerate(items):
            if value != initial:
                total ^= mix(mix(seed ^ kind << 56 ^ index) ^ value)
    return total


class Ring:
    def __init__(self, storage: bytes, uuid: bytes, offset: int, size: int) -> None:
        self.count = size // 4096
        self.pages: dict[int, bytes] = {}
        for position in range(self.count):
            place = offset + position * 4096
            page = storage[place : place + 4096]
            sequence, part, parts, words, entries = u(page, 8, 8), u(page, 40, 2), u(page, 42, 2), u(page, 44, 2), u(page, 46, 2)
            if page[:4] != bytes.fromhex("4656444A") or sequence % self.count != position:
                continue
            if part >= parts or part >= sequence or 12 * words + 8 * entries > 4032:
                continue
            try:
                check("journal page", uuid, place, page, 4)
            except Refused:
                continue
            self.pages[sequence] = page
        if not self.pages or max(self.pages) >= 1 << 63:
            raise Refused("journal: no valid page, or an impossible one")

    def commit(self, first: int, parts: int) -> list[bytes] | None:
        """The pages of a commit, or None if it was not finished."""
        if first % self.count + parts > self.count:
            raise Refused("journal: a commit crosses the end of the ring")
        found = [(i, self.pages[first + i]) for i in range(parts) if first + i in self.pages]
        for i, page in found:
            if (
                u(page, 40, 2) != i
                or page[16:40] + page[42:44] + page[48:52] != found[0][1][16:40] + found[0][1][42:44] + found[0][1][48:52]
            ):
                raise Refused("journal: pages of one commit contradict each other")
        return [page for _, page in found] if len(found) == parts else None

    def commit_before(self, first: int, follower: int) -> list[bytes]:
        page = self.pages.get(first)
        if page is None or first >= follower or u(page, 40, 2) != 0 or first + u(page, 42, 2) > follower:
            raise Refused("journal: a predecessor is missing")
        pages = self.commit(first, u(page, 42, 2))
        if pages is None:
            raise Refused("journal: a predecessor is incomplete")
        return pages


@dataclass
class Shape:
    """Where FORMAT.md section 4 puts things, from the superblock's parameters; the derived fields must agree."""

    raw: bool
    virtual_size: int
    block_size: int
    chunk_size: int
    journal_size: int

    def __post_init__(self) -> None:
        self.blocks, self.chunks = up(self.virtual_size, self.block_size), up(self.virtual_size, self.chunk_size)
        self.word_count, self.entry_count = up(self.blocks, 64), 0 if self.raw else self.chunks
        self.bitmap_offset = 1048576 + self.journal_size
        self.bitmap_size = up(up(self.word_count, 62), 8) * 4096
        self.table_offset = 0 if self.raw else self.bitmap_offset + self.bitmap_size
        self.table_size = up(up(self.entry_count, 124), 8) * 4096
        self.data_offset = up(self.bitmap_offset + self.bitmap_size + self.table_size, 1048576) * 1048576

    def derived(self) -> bytes:
        return struct.pack(
            "<8Q",
            1048576,
            self.journal_size,
            self.bitmap_offset,
            self.bitmap_size,
            self.table_offset,
            self.table_size,
            self.data_offset,
            self.data_offset + self.chunks * self.chunk_size,
        )


@dataclass
class Commits:
    """The commits to apply, the newest first, and what the last one says."""

    pages: list[list[bytes]]
    last: int
    next_sequence: int
    dropped: bool  # an incomplete one after it

    @property
    def expected_hash(self) -> int:
        return u(self.pages[0][0], 32, 8)

    @property
    def clean(self) -> bool:
        return bool(u(self.pages[0][0], 48, 4) & 1)


def walk(ring: Ring) -> Commits:
    """From the last complete commit back to the one that it names as the tail."""
    newest = max(ring.pages)
    first = newest - u(ring.pages[newest], 40, 2)
    parts = u(ring.pages[newest], 42, 2)
    next_sequence = first + parts
    pages = ring.commit(first, parts)
    dropped = pages is None
    if pages is None:
        before = u(ring.pages[newest], 16, 8)
        pages = ring.commit_before(before, first)
        first = before
    last, tail = first, u(pages[0], 24, 8)
    commits = Commits([pages], last, next_sequence, dropped)
    while first != tail:
        before = u(pages[0], 16, 8)
        if first < tail:
            raise Refused("journal: the walk misses the tail")
        pages = ring.commit_before(before, first)
        first = before
        commits.pages.append(pages)
    if next_sequence - tail > ring.count:
        raise Refused("journal: fuller than its ring")
    return commits


def replay(commits: Commits, words: list[int], table: list[int], shape: Shape) -> None:
    """Oldest first, into the maps."""
    for page in [page for commit in reversed(commits.pages) for page in commit]:
        place = 64
        for _ in range(u(page, 44, 2)):
            if u(page, place, 4) >= shape.word_count:
                raise Refused("journal: word index")
            words[u(page, place, 4)] = u(page, place + 4, 8)
            place += 12
        for _ in range(u(page, 46, 2)):
            if u(page, place, 4) >= shape.entry_count:
                raise Refused("journal: entry index")
            table[u(page, place, 4)] = u(page, place + 4, 4)
            place += 8


def open_disk(storage: bytes) -> Disk:
    sb = read_superblock(storage)
    uuid = sb[24:40]
    shape = Shape(sb[152] == 1, u(sb, 64, 8), u(sb, 72, 4), u(sb, 76, 4), u(sb, 96, 8))
    if sb[88:152] != shape.derived():
        raise Refused("superblock: derived fields")

    words = read_cells(storage, uuid, shape.bitmap_offset, shape.bitmap_size, 1, shape.word_count)
    table = [] if shape.raw else read_cells(storage, uuid, shape.table_offset, shape.table_size, 2, shape.chunks)
    commits = walk(Ring(storage, uuid, 1048576, shape.journal_size))
    replay(commits, words, table, shape)
    if map_hash(uuid, words, table) != commits.expected_hash:
        raise Refused("the maps do not have the hash of the last commit")

    if shape.blocks % 64 and words[-1] >> shape.blocks % 64:
        raise Refused("bits past the last block")
    used = [slot for slot in table if slot != EMPTY]
    if len(set(used)) != len(used) or any(slot >= shape.chunks for slot in used):
        raise Refused("slots")
    return Disk(
        uuid=uuid,
        generation=u(sb, 16, 8),
        virtual_size=shape.virtual_size,
        block_size=shape.block_size,
        chunk_size=shape.chunk_size,
        data_offset=shape.data_offset,
        raw=shape.raw,
        base_locator=sb[512 : 512 + u(sb, 156, 4)].decode(),
        base_size=u(sb, 160, 8),
        words=words,
        table=list(range(shape.chunks)) if shape.raw else table,
        clean=commits.clean,
        dropped=commits.dropped,
        last_commit=commits.last,
        next_sequence=commits.next_sequence,
    )
