# SPDX-License-Identifier: Apache-2.0
"""The journal: commits to and from ring pages, and what an opened ring says about the maps (FORMAT.md section 6).

Pure: the caller reads and writes the ring. A ring may hold anything; reading it raises only Corrupt, and walks are bounded by its pages.
"""

from __future__ import annotations

import array
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fvd import _core
from fvd.errors import Corrupt, InvalidArgument
from fvd.format.geometry import PAGE_BYTES, Geometry
from fvd.format.maps import Bitmap, Bytes, MapKind, Table, check_items
from fvd.format.records import Record

Records = Any  # an array of numpy's

PAGE_MAGIC = b"FVDJ"
HEADER_BYTES = 64
RECORDS_BYTES = PAGE_BYTES - HEADER_BYTES
FLAG_CLEAN = 1
PARTS_MAX = 0xFFFF
# A counter that only ever counts pages cannot come near this; what does was not written by a disk, and must not overflow one.
SEQUENCE_END = 1 << 63

PAGE_HEADER = Record(
    ("page_magic", "<u4"),
    ("page_checksum", "<u4"),
    ("sequence", "<u8"),
    ("previous", "<u8"),
    ("tail", "<u8"),
    ("map_hash", "<u8"),
    ("part", "<u2"),
    ("parts", "<u2"),
    ("word_count", "<u2"),
    ("entry_count", "<u2"),
    ("flags", "<u4"),
    ("page_reserved", "V12"),
)
WORD_RECORD = Record(("word_index", "<u4"), ("word_value", "<u8"))
ENTRY_RECORD = Record(("entry_index", "<u4"), ("entry_value", "<u4"))
_HEADER = struct.Struct("<8xQQQQHHHHI12x")
_SEQUENCE_WORD = 1
_SAME_IN_ALL_PARTS = ("previous", "tail", "map_hash", "parts", "flags")


def _check_layout() -> None:
    header = PAGE_HEADER.places
    if header != _core.JOURNAL_HEADER_LAYOUT or PAGE_HEADER.itemsize != HEADER_BYTES:
        raise ImportError(f"page headers differ between fvd.format and fvd._core: {header} and {_core.JOURNAL_HEADER_LAYOUT}")
    mine = {
        "JOURNAL_MAGIC": int.from_bytes(PAGE_MAGIC, "little"),
        "JOURNAL_HEADER_BYTES": HEADER_BYTES,
        "JOURNAL_RECORDS_BYTES": RECORDS_BYTES,
        "WORD_RECORD_BYTES": WORD_RECORD.itemsize,
        "ENTRY_RECORD_BYTES": ENTRY_RECORD.itemsize,
        "JOURNAL_FLAG_CLEAN": FLAG_CLEAN,
    }
    for name, value in mine.items():
        if _core.CONSTANTS[name] != value:
            raise ImportError(f"{name} is {value} in fvd.format and {_core.CONSTANTS[name]} in fvd._core")


_check_layout()


class _Header(NamedTuple):
    """What a page's header says: PAGE_HEADER without what only the scan needs."""

    sequence: int
    previous: int
    tail: int
    map_hash: int
    part: int
    parts: int
    word_count: int
    entry_count: int
    flags: int


@dataclass(frozen=True, slots=True)
class JournalState:
    """What a replayed ring says about how to go on."""

    next_sequence: int
    """The first number that a writer may use; it skips to the next lap where a commit would not fit before the end of the ring."""
    previous: int
    """First sequence of the last complete commit: what the next commit names as its predecessor."""
    tail: int
    map_hash: int
    clean: bool
    dropped_commit: bool
    """Whether a commit was found that had never been finished."""
    commits_replayed: int
    records_replayed: int


@dataclass(frozen=True, slots=True)
class Commit:
    """One commit as found in a ring, for people to look at. Records of an incomplete commit are those of the pages that are valid."""

    sequence: int
    parts: int
    previous: int
    tail: int
    map_hash: int
    clean: bool
    complete: bool
    words: Records
    entries: Records


def page_offset_bytes(geometry: Geometry, sequence: int) -> int:
    """Where in the storage the page of this sequence lies."""
    return geometry.journal_offset_bytes + sequence % geometry.journal_pages * PAGE_BYTES


def parts_needed(word_count: int, entry_count: int) -> int:
    """Pages that a commit of so many records takes."""
    return _core.journal_parts(word_count, entry_count)


def fit_sequence(geometry: Geometry, next_sequence: int, parts: int) -> int:
    """The first sequence from `next_sequence` on at which so many pages do not cross the end of the ring."""
    left = geometry.journal_pages - next_sequence % geometry.journal_pages
    return next_sequence if parts <= left else next_sequence + left


def _as_records(records: Records | Sequence[tuple[int, int]], record: Record) -> Records:
    import numpy as np

    # numpy takes a tuple for one record, a list for many.
    return np.ascontiguousarray(records if isinstance(records, np.ndarray) else list(records), record.dtype)


def encode_commit(
    geometry: Geometry,
    uuid: bytes,
    *,
    sequence: int,
    previous: int,
    tail: int,
    map_hash: int,
    words: Records | Sequence[tuple[int, int]],
    entries: Records | Sequence[tuple[int, int]],
    clean: bool = False,
) -> Bytes:
    """The pages of one commit, to be written in one piece at ``page_offset_bytes(geometry, sequence)``. Raises InvalidArgument.

    `words` and `entries` are arrays of WORD_RECORD and ENTRY_RECORD, or pairs (index, value).
    """
    words = _as_records(words, WORD_RECORD)
    entries = _as_records(entries, ENTRY_RECORD)
    parts = parts_needed(len(words), len(entries))
    if parts > PARTS_MAX or fit_sequence(geometry, sequence, parts) != sequence or parts > geometry.journal_pages:
        raise InvalidArgument(f"a commit of {parts} pages does not fit at sequence {sequence} of a ring of {geometry.journal_pages} pages")
    if not 1 <= sequence < SEQUENCE_END or not 0 <= previous < sequence or not 1 <= tail <= sequence:
        raise InvalidArgument(f"sequence {sequence}, previous {previous} and tail {tail} contradict each other")
    if len(words) and int(words["word_index"].max()) >= geometry.bitmap_words:
        raise InvalidArgument(f"word {words['word_index'].max()} is past the end of a bitmap of {geometry.bitmap_words} words")
    if len(entries) and int(entries["entry_index"].max()) >= geometry.table_entries:
        raise InvalidArgument(f"entry {entries['entry_index'].max()} is past the end of a table of {geometry.table_entries} entries")
    out = memoryview(bytearray(parts * PAGE_BYTES))
    _core.journal_encode(
        words.view("u1"),
        entries.view("u1"),
        uuid,
        geometry.journal_offset_bytes,
        geometry.journal_pages,
        sequence,
        previous,
        tail,
        map_hash,
        FLAG_CLEAN if clean else 0,
        out,
    )
    return out


def first_page(geometry: Geometry, uuid: bytes, map_hash: int = 0) -> bytes:
    """The only page of a new disk's ring: sequence 1, so its place is ``page_offset_bytes(geometry, 1)``, the ring's second page.

    `map_hash` is that of the maps as they are written at provision; 0: they are empty.
    """
    return encode_commit(geometry, uuid, sequence=1, previous=0, tail=1, map_hash=map_hash, words=(), entries=(), clean=True).tobytes()


def _as_ring(geometry: Geometry, ring: Any) -> Bytes:
    if len(ring) != geometry.journal_size_bytes:
        raise InvalidArgument(f"the ring has {geometry.journal_size_bytes} bytes, not {len(ring)}")
    return memoryview(ring).cast("B")


def _scan(geometry: Geometry, uuid: bytes, ring: Bytes) -> bytearray:
    """Headers of the valid pages by ring position; the others are all zero."""
    headers = bytearray(geometry.journal_pages * HEADER_BYTES)
    rows = memoryview(headers).cast("B", shape=[geometry.journal_pages, HEADER_BYTES])
    _core.journal_scan(ring, uuid, geometry.journal_offset_bytes, rows)
    return headers


class _Headers:
    """The headers of a ring, each read when it is asked for."""

    def __init__(self, raw: bytearray) -> None:
        self._raw = raw
        self._count = len(raw) // HEADER_BYTES

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, position: int) -> _Header:
        return _Header(*_HEADER.unpack_from(self._raw, position * HEADER_BYTES))

    def sequences(self) -> Sequence[int]:
        """By position; 0: no valid page."""
        numbers = memoryview(self._raw).cast("Q")
        return numbers[_SEQUENCE_WORD :: HEADER_BYTES // 8].tolist()


def _read_commit(headers: _Headers, first: int, parts: int) -> tuple[_Header, bool]:
    """The header of the first valid page of the commit [first, first + parts), and whether the commit is complete. Raises Corrupt."""
    position = first % len(headers)
    if position + parts > len(headers):
        raise Corrupt(f"journal: the commit at {first} has {parts} pages, which cross the end of a ring of {len(headers)}")
    pages = [(number, headers[position + number]) for number in range(parts)]
    mine = [(number, page) for number, page in pages if page.sequence == first + number]
    if any(page.part != number for number, page in mine):
        raise Corrupt(f"journal: a page among the {parts} of the commit at {first} says that it is of another commit")
    _, header = mine[0]
    for name in _SAME_IN_ALL_PARTS:
        if any(getattr(page, name) != getattr(header, name) for _, page in mine):
            raise Corrupt(f"journal: the pages of the commit at {first} differ in {name}")
    if header.parts != parts:
        raise Corrupt(f"journal: the commit at {first} has {header.parts} pages, not {parts}")
    return header, len(mine) == parts


def _complete_commit(headers: _Headers, first: int, follower: int) -> _Header:
    """The header of the commit that begins at `first`, named by the commit at `follower`. Raises Corrupt unless it is complete."""
    named = f"journal: the commit at {follower} follows the one at {first}, but"
    page = headers[first % len(headers)]
    if not 1 <= first < follower or page.sequence != first or page.part != 0:
        raise Corrupt(f"{named} no commit begins there")
    header, complete = _read_commit(headers, first, page.parts)
    if not complete:
        raise Corrupt(f"{named} that is not complete")
    if first + page.parts > follower:
        raise Corrupt(f"{named} that reaches past its follower")
    return header


def _walk(headers: _Headers, last: int, header: _Header) -> list[tuple[int, int]]:
    """(first sequence, parts) of the commits to apply, oldest first. Bounded: sequences fall, and each needs its own ring position."""
    tail = header.tail
    if not 1 <= tail <= last:
        raise Corrupt(f"journal: the last commit, at {last}, names the tail {tail}")
    commits = [(last, header.parts)]
    first = last
    while first != tail:
        previous = header.previous
        if previous < tail:
            raise Corrupt(f"journal: no commit begins at the tail {tail}; the walk back from {last} comes from {first} to {previous}")
        header = _complete_commit(headers, previous, first)
        first = previous
        commits.append((first, header.parts))
    commits.reverse()
    return commits


def replay(geometry: Geometry, uuid: bytes, ring: Any, bitmap: Bitmap, table: Table | None) -> tuple[JournalState, bytearray, bytearray]:
    """Bring the maps read from storage up to the last complete commit, in place. Raises Corrupt; the maps are then of no use.

    Also returns which pages of the bitmap and of the table the replay touched, one byte for each: those that storage may not have yet.
    """
    check_items(geometry, MapKind.BITMAP, bitmap)
    if table is not None or geometry.table_entries:
        check_items(geometry, MapKind.TABLE, table)
    pages = _as_ring(geometry, ring)
    headers = _Headers(_scan(geometry, uuid, pages))
    sequences = headers.sequences()
    highest = max(sequences)
    newest = headers[sequences.index(highest)]
    if highest == 0:
        raise Corrupt(f"journal: none of its {len(headers)} pages is valid")
    if highest >= SEQUENCE_END:
        raise Corrupt(f"journal: sequence {highest} cannot have been reached")
    newest_first, newest_parts = highest - newest.part, newest.parts
    header, complete = _read_commit(headers, newest_first, newest_parts)
    last = newest_first
    if not complete:
        last = header.previous
        header = _complete_commit(headers, last, newest_first)
    commits = _walk(headers, last, header)
    # A writer keeps its numbers within one lap of the tail: what claims more would leave the next one no space, not even to say so.
    if newest_first + newest_parts - commits[0][0] > len(headers):
        raise Corrupt(f"journal: sequence {highest} is more than a ring of {len(headers)} pages past the tail {commits[0][0]}")

    positions = array.array("Q", [first % len(headers) + number for first, parts in commits for number in range(parts)])
    dirty_bitmap_pages, dirty_table_pages = bytearray(geometry.bitmap_pages), bytearray(geometry.table_pages)
    bad = _core.journal_apply(pages, positions, bitmap, table, dirty_bitmap_pages, dirty_table_pages)
    if bad >= 0:
        sequence = headers[positions[bad]].sequence
        raise Corrupt(f"journal: page {sequence} changes a word or entry that the maps do not have")
    found_hash, wanted_hash = _core.map_hash(uuid, bitmap, table), header.map_hash
    if found_hash != wanted_hash:
        raise Corrupt(
            f"the maps have hash {found_hash:#018x} after the commit at {last}, which says {wanted_hash:#018x}: "
            "a write of a bitmap or table page was lost, or a map was changed from outside"
        )
    state = JournalState(
        next_sequence=newest_first + newest_parts,
        previous=last,
        tail=header.tail,
        map_hash=wanted_hash,
        clean=bool(header.flags & FLAG_CLEAN),
        dropped_commit=not complete,
        commits_replayed=len(commits),
        records_replayed=sum(headers[position].word_count + headers[position].entry_count for position in positions),
    )
    return state, dirty_bitmap_pages, dirty_table_pages


def iter_commits(geometry: Geometry, uuid: bytes, ring: Any) -> Iterator[Commit]:
    """Every commit of which a valid page is in the ring, by sequence, old and unfinished ones too. Judges nothing: it is for looking."""
    import numpy as np

    pages = np.frombuffer(_as_ring(geometry, ring), np.uint8).reshape(-1, PAGE_BYTES)
    raw = _scan(geometry, uuid, _as_ring(geometry, ring))
    headers = np.frombuffer(raw, PAGE_HEADER)
    positions = np.flatnonzero(headers["sequence"])
    positions = positions[np.argsort(headers["sequence"][positions])]
    firsts = headers["sequence"][positions] - headers["part"][positions]
    for group in np.split(positions, np.flatnonzero(firsts[1:] != firsts[:-1]) + 1):
        if len(group) == 0:
            continue
        header = headers[group[0]]
        first = int(header["sequence"]) - int(header["part"])
        words, entries = [], []
        for position in group:
            split = HEADER_BYTES + int(headers[position]["word_count"]) * WORD_RECORD.itemsize
            end = split + int(headers[position]["entry_count"]) * ENTRY_RECORD.itemsize
            words.append(pages[position, HEADER_BYTES:split].view(WORD_RECORD))
            entries.append(pages[position, split:end].view(ENTRY_RECORD))
        try:
            complete = _read_commit(_Headers(raw), first, int(header["parts"]))[1]
        except Corrupt:
            complete = False
        yield Commit(
            sequence=first,
            parts=int(header["parts"]),
            previous=int(header["previous"]),
            tail=int(header["tail"]),
            map_hash=int(header["map_hash"]),
            clean=bool(int(header["flags"]) & FLAG_CLEAN),
            complete=complete,
            words=np.concatenate(words),
            entries=np.concatenate(entries),
        )
