# SPDX-License-Identifier: Apache-2.0
"""The journal: commits to and from ring pages, and what an opened ring says about the maps (FORMAT.md section 6).

Pure: the caller reads and writes the ring. A ring may hold anything; reading it raises only Corrupt, and walks are bounded by its pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fvd import _core
from fvd.errors import Corrupt, InvalidArgument
from fvd.format.geometry import PAGE_BYTES, Geometry
from fvd.format.maps import Bitmap, Bytes, MapKind, Table, check_items

Records = npt.NDArray[np.void]
Headers = npt.NDArray[np.void]

PAGE_MAGIC = b"FVDJ"
HEADER_BYTES = 64
RECORDS_BYTES = PAGE_BYTES - HEADER_BYTES
FLAG_CLEAN = 1
PARTS_MAX = 0xFFFF
# A counter that only ever counts pages cannot come near this; what does was not written by a disk, and must not overflow one.
SEQUENCE_END = 1 << 63

PAGE_HEADER = np.dtype(
    [
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
    ]
)
WORD_RECORD = np.dtype([("word_index", "<u4"), ("word_value", "<u8")])
ENTRY_RECORD = np.dtype([("entry_index", "<u4"), ("entry_value", "<u4")])
_SAME_IN_ALL_PARTS = ("previous", "tail", "map_hash", "parts", "flags")


def _check_layout() -> None:
    fields: Any = PAGE_HEADER.fields
    header = {name: (fields[name][1], fields[name][0].itemsize) for name in fields}
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


def _as_records(records: Records | Sequence[tuple[int, int]], dtype: np.dtype[np.void]) -> Records:
    # numpy takes a tuple for one record, a list for many.
    return np.ascontiguousarray(records if isinstance(records, np.ndarray) else list(records), dtype)


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
    out = np.empty(parts * PAGE_BYTES, np.uint8)
    _core.journal_encode(
        words.view(np.uint8),
        entries.view(np.uint8),
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


def _as_ring(geometry: Geometry, ring: Bytes | bytes) -> Bytes:
    if len(ring) != geometry.journal_size_bytes:
        raise InvalidArgument(f"the ring has {geometry.journal_size_bytes} bytes, not {len(ring)}")
    return np.frombuffer(ring, np.uint8)


def _scan(geometry: Geometry, uuid: bytes, ring: Bytes) -> Headers:
    """Headers of the valid pages by ring position; the others are all zero."""
    headers = np.zeros(geometry.journal_pages, PAGE_HEADER)
    _core.journal_scan(ring, uuid, geometry.journal_offset_bytes, headers.view(np.uint8).reshape(-1, HEADER_BYTES))
    return headers


def _read_commit(headers: Headers, first: int, parts: int) -> tuple[np.void, bool]:
    """The header of the first valid page of the commit [first, first + parts), and whether the commit is complete. Raises Corrupt."""
    position = first % len(headers)
    if position + parts > len(headers):
        raise Corrupt(f"journal: the commit at {first} has {parts} pages, which cross the end of a ring of {len(headers)}")
    pages = headers[position : position + parts]
    numbers = np.arange(parts, dtype=np.uint64)
    present = pages["sequence"] == np.uint64(first) + numbers
    mine = pages[present]
    if np.any(mine["part"] != numbers[present]):
        raise Corrupt(f"journal: a page among the {parts} of the commit at {first} says that it is of another commit")
    for name in _SAME_IN_ALL_PARTS if len(mine) > 1 else ():
        if np.any(mine[name] != mine[0][name]):
            raise Corrupt(f"journal: the pages of the commit at {first} differ in {name}")
    if int(mine[0]["parts"]) != parts:
        raise Corrupt(f"journal: the commit at {first} has {int(mine[0]['parts'])} pages, not {parts}")
    return mine[0], bool(present.all())


def _complete_commit(headers: Headers, first: int, follower: int) -> np.void:
    """The header of the commit that begins at `first`, named by the commit at `follower`. Raises Corrupt unless it is complete."""
    named = f"journal: the commit at {follower} follows the one at {first}, but"
    page = headers[first % len(headers)]
    if not 1 <= first < follower or int(page["sequence"]) != first or int(page["part"]) != 0:
        raise Corrupt(f"{named} no commit begins there")
    header, complete = _read_commit(headers, first, int(page["parts"]))
    if not complete:
        raise Corrupt(f"{named} that is not complete")
    if first + int(page["parts"]) > follower:
        raise Corrupt(f"{named} that reaches past its follower")
    return header


def _walk(headers: Headers, last: int, header: np.void) -> list[tuple[int, int]]:
    """(first sequence, parts) of the commits to apply, oldest first. Bounded: sequences fall, and each needs its own ring position."""
    tail = int(header["tail"])
    if not 1 <= tail <= last:
        raise Corrupt(f"journal: the last commit, at {last}, names the tail {tail}")
    commits = [(last, int(header["parts"]))]
    first = last
    while first != tail:
        previous = int(header["previous"])
        if previous < tail:
            raise Corrupt(f"journal: no commit begins at the tail {tail}; the walk back from {last} comes from {first} to {previous}")
        header = _complete_commit(headers, previous, first)
        first = previous
        commits.append((first, int(header["parts"])))
    commits.reverse()
    return commits


def replay(
    geometry: Geometry, uuid: bytes, ring: Bytes | bytes, bitmap: Bitmap, table: Table | None
) -> tuple[JournalState, npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Bring the maps read from storage up to the last complete commit, in place. Raises Corrupt; the maps are then of no use.

    Also returns which pages of the bitmap and of the table the replay touched: those that storage may not have yet.
    """
    check_items(geometry, MapKind.BITMAP, bitmap)
    if table is not None or geometry.table_entries:
        check_items(geometry, MapKind.TABLE, table)
    pages = _as_ring(geometry, ring)
    headers = _scan(geometry, uuid, pages)
    newest = headers[int(np.argmax(headers["sequence"]))]
    highest = int(newest["sequence"])
    if highest == 0:
        raise Corrupt(f"journal: none of its {len(headers)} pages is valid")
    if highest >= SEQUENCE_END:
        raise Corrupt(f"journal: sequence {highest} cannot have been reached")
    newest_first, newest_parts = highest - int(newest["part"]), int(newest["parts"])
    header, complete = _read_commit(headers, newest_first, newest_parts)
    last = newest_first
    if not complete:
        last = int(header["previous"])
        header = _complete_commit(headers, last, newest_first)
    commits = _walk(headers, last, header)
    # A writer keeps its numbers within one lap of the tail: what claims more would leave the next one no space, not even to say so.
    if newest_first + newest_parts - commits[0][0] > len(headers):
        raise Corrupt(f"journal: sequence {highest} is more than a ring of {len(headers)} pages past the tail {commits[0][0]}")

    positions = np.concatenate([np.arange(parts, dtype=np.uint64) + np.uint64(first % len(headers)) for first, parts in commits])
    dirty_bitmap_pages = np.zeros(geometry.bitmap_pages, np.uint8)
    dirty_table_pages = np.zeros(geometry.table_pages, np.uint8)
    bad = _core.journal_apply(pages, positions, bitmap, table, dirty_bitmap_pages, dirty_table_pages)
    if bad >= 0:
        sequence = int(headers[int(positions[bad])]["sequence"])
        raise Corrupt(f"journal: page {sequence} changes a word or entry that the maps do not have")
    found_hash, wanted_hash = _core.map_hash(uuid, bitmap, table), int(header["map_hash"])
    if found_hash != wanted_hash:
        raise Corrupt(
            f"the maps have hash {found_hash:#018x} after the commit at {last}, which says {wanted_hash:#018x}: "
            "a write of a bitmap or table page was lost, or a map was changed from outside"
        )
    applied = headers[positions]
    state = JournalState(
        next_sequence=newest_first + newest_parts,
        previous=last,
        tail=int(header["tail"]),
        map_hash=wanted_hash,
        clean=bool(int(header["flags"]) & FLAG_CLEAN),
        dropped_commit=not complete,
        commits_replayed=len(commits),
        records_replayed=int(applied["word_count"].sum(dtype=np.int64) + applied["entry_count"].sum(dtype=np.int64)),
    )
    return state, dirty_bitmap_pages.astype(np.bool_), dirty_table_pages.astype(np.bool_)


def iter_commits(geometry: Geometry, uuid: bytes, ring: Bytes | bytes) -> Iterator[Commit]:
    """Every commit of which a valid page is in the ring, by sequence, old and unfinished ones too. Judges nothing: it is for looking."""
    pages = _as_ring(geometry, ring).reshape(-1, PAGE_BYTES)
    headers = _scan(geometry, uuid, pages.reshape(-1))
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
            complete = _read_commit(headers, first, int(header["parts"]))[1]
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
