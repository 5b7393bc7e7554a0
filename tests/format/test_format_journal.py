# SPDX-License-Identifier: Apache-2.0
"""What an opened ring means: every rule of FORMAT.md section 6, and every way in which a ring can be damaged."""

from __future__ import annotations

import contextlib
import dataclasses
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fvd import _core
from fvd.errors import Corrupt, FvdError, InvalidArgument
from fvd.format import journal, maps
from fvd.format.geometry import Geometry, Layout
from fvd.format.journal import JournalState
from fvd.format.maps import EMPTY

UUID = bytes(range(16))
OTHER_UUID = bytes(range(1, 17))
# 400 words, 1600 chunks, a ring of 16 pages; a page holds 336 words or 504 entries.
G = Geometry(100 << 20, 4096, 65536, 65536, 65536)
RAW = dataclasses.replace(G, layout=Layout.RAW)
P = G.journal_pages


class Disk:
    """Writes a ring like an engine, and keeps what the maps must be after every commit."""

    def __init__(self, geometry: Geometry = G, uuid: bytes = UUID) -> None:
        self.g, self.uuid = geometry, uuid
        self.ring = bytearray(geometry.journal_size_bytes)
        self.bitmap, self.table = maps.empty_bitmap(geometry), maps.empty_table(geometry)
        self.stored = (self.bitmap.copy(), None if self.table is None else self.table.copy())
        self.sequence, self.previous, self.tail = 2, 1, 1
        self.put(1, journal.first_page(geometry, uuid))
        self.hashes = {1: 0}

    def put(self, sequence: int, pages: bytes) -> None:
        place = journal.page_offset_bytes(self.g, sequence) - self.g.journal_offset_bytes
        self.ring[place : place + len(pages)] = pages

    def hash(self) -> int:
        return maps.map_hash(self.uuid, self.bitmap, self.table)

    def commit(
        self,
        words: int = 1,
        entries: int = 0,
        *,
        keep: tuple[int, ...] | None = None,
        clean: bool = False,
        advance: bool = False,
        **forged: int,
    ) -> int:
        """A commit of so many fresh values. `keep`: a crash lets only these parts arrive, and nothing of it counts."""
        before = (self.bitmap.copy(), None if self.table is None else self.table.copy())
        word_records = [((self.sequence + i) % 400, self.sequence * 1000 + i + 1) for i in range(words)]
        entry_records = [((self.sequence + i) % 1600, (self.sequence * 7 + i) % 1600) for i in range(entries)]
        for index, value in word_records:
            self.bitmap[index] = value
        for index, value in entry_records:
            assert self.table is not None
            self.table[index] = value
        parts = journal.parts_needed(words, entries)
        sequence = journal.fit_sequence(self.g, self.sequence, parts)
        fields = {"previous": self.previous, "tail": sequence if advance else self.tail, "map_hash": self.hash()} | forged
        pages = journal.encode_commit(
            self.g, self.uuid, sequence=sequence, words=word_records, entries=entry_records, clean=clean, **fields
        ).tobytes()
        for part in range(parts) if keep is None else keep:
            self.put(sequence + part, pages[part * 4096 : (part + 1) * 4096])
        self.sequence = sequence + parts
        if keep is None:
            self.previous, self.tail, self.hashes[sequence] = sequence, fields["tail"], self.hash()
        else:
            self.bitmap, self.table = before
        return sequence

    def checkpoint(self) -> None:
        self.stored = (self.bitmap.copy(), None if self.table is None else self.table.copy())

    def open(self) -> tuple[JournalState, bytearray, bytearray]:
        bitmap, table = self.stored[0].copy(), None if self.stored[1] is None else self.stored[1].copy()
        state, dirty_bitmap, dirty_table = journal.replay(self.g, self.uuid, bytes(self.ring), bitmap, table)
        self.opened = (bitmap, table)
        return state, dirty_bitmap, dirty_table

    def check(self, **expected: object) -> JournalState:
        state, dirty_bitmap, dirty_table = self.open()
        assert np.array_equal(self.opened[0], self.bitmap)
        if self.table is None:
            assert self.opened[1] is None and len(dirty_table) == 0
        else:
            assert self.opened[1] is not None and np.array_equal(self.opened[1], self.table)
            changed = np.flatnonzero(np.asarray(self.table) != self.stored[1]) // 992
            assert np.frombuffer(dirty_table, np.bool_)[changed].all()
        assert np.frombuffer(dirty_bitmap, np.bool_)[np.flatnonzero(np.asarray(self.bitmap) != self.stored[0]) // 496].all()
        assert state.next_sequence == self.sequence
        assert state.previous == self.previous
        assert state.tail == self.tail
        assert state.map_hash == self.hash()
        assert state.dropped_commit == expected.pop("dropped_commit", False)
        for name, value in expected.items():
            assert getattr(state, name) == value, name
        return state

    def page(self, sequence: int) -> bytes:
        place = sequence % P * 4096
        return bytes(self.ring[place : place + 4096])

    def forge(self, sequence: int, offset: int, form: str, value: int) -> None:
        """Change a field of a page and give it the right checksum: a writer that is wrong or hostile."""
        page = bytearray(self.page(sequence))
        struct.pack_into(form, page, offset, value)
        place = self.g.journal_offset_bytes + sequence % P * 4096
        page[4:8] = struct.pack("<I", _core.checksum(self.uuid, place, page, 4))
        self.ring[sequence % P * 4096 : sequence % P * 4096 + 4096] = page

    def refuses(self, said: str) -> None:
        with pytest.raises(Corrupt, match=said):
            self.open()


def test_a_new_disk() -> None:
    disk = Disk()
    assert journal.page_offset_bytes(G, 1) == G.journal_offset_bytes + 4096
    disk.check(clean=True, next_sequence=2, previous=1, tail=1, map_hash=0, commits_replayed=1, records_replayed=0)


def test_commits_are_applied_oldest_first() -> None:
    disk = Disk()
    for _ in range(4):
        disk.commit(words=3, entries=2)
    state = disk.check(clean=False, commits_replayed=5, records_replayed=20)
    assert state.previous == 5
    # The same word again and again: the last value counts.
    disk.sequence = 406 + P * 100
    assert disk.sequence % P + 1 <= P


def test_commits_of_many_pages() -> None:
    disk = Disk()
    disk.commit(words=336, entries=504)
    disk.commit(words=400, entries=1600)
    disk.check(commits_replayed=3, records_replayed=336 + 504 + 2000)


def test_the_raw_layout_has_no_entries() -> None:
    disk = Disk(RAW)
    disk.commit(words=5)
    disk.check()
    with pytest.raises(InvalidArgument, match="entry 0 is past the end of a table of 0"):
        journal.encode_commit(RAW, UUID, sequence=3, previous=2, tail=1, map_hash=0, words=(), entries=[(0, 1)])


def test_an_open_maps_that_are_ahead() -> None:
    """A checkpoint that was under way wrote newer values than the tail: replay still ends at the last commit."""
    disk = Disk()
    for _ in range(3):
        disk.commit(words=400, entries=3)
    disk.checkpoint()
    disk.check(commits_replayed=4)


def test_laps_and_tails() -> None:
    disk = Disk()
    for i in range(100):
        disk.commit(words=1 + i % 3 * 200, entries=i % 5)
        if i % 3 == 2:
            disk.checkpoint()
            disk.commit(words=0, advance=True, clean=i % 2 == 0)
            disk.check(commits_replayed=1, clean=i % 2 == 0)
        else:
            disk.check()
    assert disk.sequence > 8 * P


def test_a_commit_never_crosses_the_end_of_the_ring() -> None:
    disk = Disk()
    while disk.sequence % P != P - 1:
        disk.commit()
    disk.checkpoint()
    disk.commit(words=0, advance=True)
    assert disk.sequence == P
    for _ in range(P - 1):
        disk.commit()
    disk.checkpoint()
    skipped = disk.sequence
    assert skipped % P == P - 1
    assert disk.commit(words=400, advance=True) == skipped + 1
    disk.check()
    with pytest.raises(InvalidArgument, match="does not fit at sequence 15"):
        journal.encode_commit(G, UUID, sequence=15, previous=1, tail=1, map_hash=0, words=[(0, 0)] * 337, entries=())
    with pytest.raises(InvalidArgument, match="does not fit"):
        journal.encode_commit(G, UUID, sequence=16, previous=1, tail=1, map_hash=0, words=[(0, 0)] * (336 * 16 + 1), entries=())


@pytest.mark.parametrize("keep", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (4,), (0, 1, 2, 3), (1, 2, 3, 4)])
def test_an_unfinished_commit_is_dropped_and_its_numbers_are_used_up(keep: tuple[int, ...]) -> None:
    disk = Disk()
    disk.commit(words=2, entries=1)
    first = disk.commit(words=400, entries=1600, keep=keep)
    state = disk.check(dropped_commit=True)
    assert state.next_sequence == first + 5
    # The next writer goes on, crashes as well, and the next one after it succeeds.
    second = disk.commit(words=400, keep=(0,))
    assert disk.check(dropped_commit=True).next_sequence == second + 2
    disk.commit(words=7)
    disk.check()


def test_a_commit_of_which_nothing_arrived_never_was() -> None:
    disk = Disk()
    disk.commit()
    before = disk.sequence
    disk.commit(words=400, keep=())
    disk.sequence = before
    disk.check()


@pytest.mark.parametrize("cut", range(512, 4096, 512))
def test_a_torn_page_is_no_page(cut: int) -> None:
    disk = Disk()
    for _ in range(P + 3):
        disk.commit(words=300, advance=True)
        disk.checkpoint()
    old = disk.page(disk.sequence)
    assert old[:4] == b"FVDJ", "a page of an earlier lap lies where the next one goes"
    first = disk.commit(words=400, keep=(0, 1))
    new = disk.page(first)
    disk.ring[first % P * 4096 : first % P * 4096 + 4096] = new[:cut] + old[cut:]
    disk.check(dropped_commit=True)
    disk.ring[first % P * 4096 : first % P * 4096 + 4096] = old[:cut] + new[cut:]
    disk.check(dropped_commit=True)


def test_the_last_commit_torn_in_its_only_page() -> None:
    disk = Disk()
    disk.commit()
    before = disk.sequence
    first = disk.commit(words=300, keep=(0,))
    disk.ring[first % P * 4096 + 2048 : first % P * 4096 + 4096] = bytes(2048)
    disk.sequence = before
    disk.check()


def three_commits() -> Disk:
    disk = Disk()
    for _ in range(3):
        disk.commit(words=400, entries=5)
    return disk


def test_rot_before_the_last_commit_is_damage() -> None:
    for sequence in range(1, 6):
        for byte in (0, 5, 8, 20, 39, 50, 60, 64, 1000, 4095):
            disk = three_commits()
            assert disk.previous == 6
            disk.ring[sequence * 4096 + byte] ^= 4
            disk.refuses(r"journal: the commit at \d follows the one at \d, but (that is not complete|no commit begins there)")


def test_every_single_bit_of_a_page_counts() -> None:
    disk = Disk()
    disk.commit(words=2, entries=2)
    disk.commit()
    start = 2 * 4096
    for bit in range(0, 4096 * 8):
        disk.ring[start + bit // 8] ^= 1 << bit % 8
        with pytest.raises(Corrupt):
            disk.open()
        disk.ring[start + bit // 8] ^= 1 << bit % 8
    disk.check()


def test_rot_of_the_last_commit_looks_unfinished_unless_a_checkpoint_knew_it() -> None:
    disk = three_commits()
    disk.ring[7 * 4096 + 99] ^= 1
    assert disk.open()[0].dropped_commit
    disk.checkpoint()
    disk.refuses("the maps have hash")


def test_a_ring_of_zeros_or_of_another_disk() -> None:
    disk = Disk()
    disk.ring[:] = bytes(len(disk.ring))
    disk.refuses("none of its 16 pages is valid")
    other = Disk(uuid=OTHER_UUID)
    other.commit()
    other.uuid = UUID
    other.refuses("none of its 16 pages is valid")


def test_records_of_an_earlier_disk_never_replay() -> None:
    """The same volume, used before: its ring was full of commits with higher numbers."""
    earlier = Disk(uuid=OTHER_UUID)
    for _ in range(40):
        earlier.commit(words=5, advance=True)
    disk = Disk()
    for position in range(2, P):
        disk.ring[position * 4096 : (position + 1) * 4096] = earlier.ring[position * 4096 : (position + 1) * 4096]
    disk.check(commits_replayed=1)
    disk.commit()
    disk.check(commits_replayed=2)


def test_swapped_pages() -> None:
    disk = three_commits()
    a, b = disk.page(2), disk.page(3)
    disk.ring[2 * 4096 : 4 * 4096] = b + a
    disk.refuses("no commit begins there")
    disk = three_commits()
    a, b = disk.page(6), disk.page(7)
    disk.ring[6 * 4096 : 8 * 4096] = b + a
    assert disk.open()[0].previous == 4, "neither page of the last commit is where it belongs: the commit never was"


def test_a_lost_checkpoint_page_is_found_by_the_hash() -> None:
    disk = Disk()
    disk.commit(words=400, entries=1600)
    lost = maps.encode_pages(G, maps.MapKind.TABLE, disk.stored[1], UUID, 1, 1)  # type: ignore[arg-type]
    disk.checkpoint()
    disk.commit(words=0, advance=True, clean=True)
    disk.check()
    region = maps.encode_pages(G, maps.MapKind.TABLE, disk.table, UUID, 0, G.table_pages)  # type: ignore[arg-type]
    region[4096:8192] = lost
    table = maps.decode_table(G, region, UUID)
    assert table is not None, "every cell is valid by itself"
    disk.stored = (disk.stored[0], table)
    disk.refuses("a write of a bitmap or table page was lost")


def test_the_hash_covers_every_bit_of_the_maps() -> None:
    disk = Disk()
    disk.commit(words=400, entries=50)
    disk.checkpoint()
    disk.commit(words=0, advance=True)
    good = disk.stored
    for index in (0, 61, 399):
        disk.stored = (good[0].copy(), good[1])
        disk.stored[0][index] ^= np.uint64(1 << index % 64)
        disk.refuses("the maps have hash")
    for index, slot in ((0, EMPTY), (1599, 3)):
        disk.stored = (good[0], None if good[1] is None else good[1].copy())
        disk.stored[1][index] = slot  # type: ignore[index]
        if good[1] is not None and good[1][index] != slot:
            disk.refuses("the maps have hash")


# Offsets of the page header's fields.
SEQUENCE, PREVIOUS, TAIL, MAP_HASH, PART, PARTS, WORDS, ENTRIES, FLAGS = 8, 16, 24, 32, 40, 42, 44, 46, 48


@pytest.mark.parametrize(
    "changes, said",
    [
        ([(6, PREVIOUS, "<Q", 0)], "differ in previous"),
        ([(6, TAIL, "<Q", 2)], "differ in tail"),
        ([(6, MAP_HASH, "<Q", 2)], "differ in map_hash"),
        ([(7, PARTS, "<H", 3)], "differ in parts"),
        ([(6, FLAGS, "<I", 1)], "differ in flags"),
        ([(s, PREVIOUS, "<Q", 0) for s in (6, 7)], "no commit begins at the tail 1"),
        ([(s, PREVIOUS, "<Q", 6) for s in (6, 7)], "no commit begins there"),
        ([(s, PREVIOUS, "<Q", 7) for s in (6, 7)], "no commit begins there"),
        ([(s, PREVIOUS, "<Q", 5) for s in (6, 7)], "no commit begins there"),
        ([(s, PREVIOUS, "<Q", 2**64 - 1) for s in (6, 7)], "no commit begins there"),
        ([(s, PREVIOUS, "<Q", 3) for s in (4, 5)], "no commit begins there"),
        ([(s, PREVIOUS, "<Q", 4) for s in (4, 5)], "no commit begins there"),
        ([(s, PREVIOUS, "<Q", 6) for s in (4, 5)], "no commit begins there"),
        ([(s, TAIL, "<Q", 3) for s in (6, 7)], "no commit begins at the tail 3"),
        ([(s, TAIL, "<Q", 0) for s in (6, 7)], "names the tail 0"),
        ([(s, TAIL, "<Q", 7) for s in (6, 7)], "names the tail 7"),
        ([(s, TAIL, "<Q", 2**64 - 1) for s in (6, 7)], "names the tail"),
        ([(s, MAP_HASH, "<Q", 5) for s in (6, 7)], "says 0x0000000000000005"),
        ([(s, PARTS, "<H", 65535) for s in (6, 7)], "cross the end of a ring of 16"),
        ([(s, PARTS, "<H", 3) for s in (4, 5)], "of another commit|reaches past"),
        ([(5, PARTS, "<H", 2), (4, PARTS, "<H", 1)], "the maps have hash"),
        ([(7, PART, "<H", 0), (7, PARTS, "<H", 1)], "the maps have hash"),
        ([(6, PART, "<H", 1)], "of another commit"),
        ([(6, 64, "<I", 400)], "page 6 changes a word or entry that the maps do not have"),
        ([(6, 64, "<I", 2**32 - 1)], "page 6 changes"),
        ([(7, 64 + 64 * 12, "<I", 1600)], "page 7 changes"),
    ],
)
def test_hostile_fields(changes: list[tuple[int, int, str, int]], said: str) -> None:
    disk = three_commits()
    for change in changes:
        disk.forge(*change)
    disk.refuses(said)


def test_more_parts_than_were_written_is_an_unfinished_commit() -> None:
    disk = three_commits()
    for sequence in (6, 7):
        disk.forge(sequence, PARTS, "<H", 3)
    state = disk.open()[0]
    assert (state.dropped_commit, state.previous, state.next_sequence) == (True, 4, 9)
    assert state.map_hash == disk.hashes[4]


def test_an_unfinished_commit_needs_a_whole_predecessor() -> None:
    disk = three_commits()
    disk.commit(words=400, keep=(1,))
    disk.ring[6 * 4096 + 70] ^= 1
    disk.refuses("the commit at 8 follows the one at 6, but no commit begins there")
    disk = three_commits()
    disk.commit(words=400, keep=(1,))
    disk.ring[7 * 4096 + 70] ^= 1
    disk.refuses("the commit at 8 follows the one at 6, but that is not complete")
    disk = Disk()
    disk.commit(words=400, keep=(1,), previous=0)
    disk.refuses("the commit at 2 follows the one at 0, but no commit begins there")


def test_a_sequence_that_no_disk_can_have_reached() -> None:
    for highest in (2**63 + 4, 2**64 - 12):
        disk = Disk()
        disk.commit()
        page = bytearray(disk.page(2))
        page[SEQUENCE : SEQUENCE + 8] = struct.pack("<Q", highest)
        place = highest % P * 4096
        page[4:8] = struct.pack("<I", _core.checksum(UUID, G.journal_offset_bytes + place, page, 4))
        disk.ring[place : place + 4096] = page
        disk.refuses("cannot have been reached")


@pytest.mark.parametrize(("lap", "fits"), [(0, True), (1, False), (1000, False)])
def test_the_newest_commit_lies_within_one_lap_of_the_tail(lap: int, fits: bool) -> None:
    """A writer that went on from there would have no page that it may write to: such a disk could be checked, and not be opened."""
    disk = Disk()
    disk.commit()
    disk.sequence += lap * P
    disk.commit(words=400, keep=(0,))
    if fits:
        disk.check(dropped_commit=True)
    else:
        with pytest.raises(Corrupt, match="past the tail 1"):
            disk.open()


def test_arguments_that_contradict_each_other() -> None:
    good = {"sequence": 5, "previous": 4, "tail": 2, "map_hash": 0, "words": (), "entries": ()}
    journal.encode_commit(G, UUID, **good)  # type: ignore[arg-type]
    for change in (
        {"sequence": 0},
        {"sequence": 2**63},
        {"previous": 5},
        {"previous": -1},
        {"tail": 0},
        {"tail": 6},
        {"words": [(400, 1)]},
        {"entries": [(1600, 1)]},
    ):
        with pytest.raises(InvalidArgument):
            journal.encode_commit(G, UUID, **(good | change))  # type: ignore[arg-type]
    for ring, bitmap, table in (
        (bytes(4096), maps.empty_bitmap(G), maps.empty_table(G)),
        (bytes(65536), maps.empty_bitmap(G)[1:], maps.empty_table(G)),
        (bytes(65536), maps.empty_bitmap(G), None),
    ):
        with pytest.raises(InvalidArgument):
            journal.replay(G, UUID, ring, bitmap, table)


def test_iter_commits_shows_old_unfinished_and_current() -> None:
    disk = Disk()
    for _ in range(P):
        disk.commit(words=2, entries=1, advance=True)
        disk.checkpoint()
    dropped = disk.commit(words=400, entries=1600, keep=(0, 3))
    seen = list(journal.iter_commits(G, UUID, bytes(disk.ring)))
    assert [c.sequence for c in seen] == sorted(c.sequence for c in seen)
    last = seen[-1]
    assert (last.sequence, last.parts, last.complete, last.previous) == (dropped, 5, False, disk.previous)
    assert len(last.words) == 336 and len(last.entries) == 504
    others = seen[:-1]
    assert all(c.complete and len(c.words) == 2 and len(c.entries) == 1 for c in others)
    assert others[-1].sequence == disk.previous and others[-1].words.dtype == journal.WORD_RECORD
    assert others[-1].words["word_value"].tolist() == [disk.previous * 1000 + 1, disk.previous * 1000 + 2]
    assert list(journal.iter_commits(G, UUID, bytes(65536))) == []


def consume(disk: Disk) -> None:
    with contextlib.suppress(Corrupt):
        disk.open()
    list(journal.iter_commits(disk.g, disk.uuid, bytes(disk.ring)))


FIELD = st.sampled_from(
    [
        (SEQUENCE, "<Q"),
        (PREVIOUS, "<Q"),
        (TAIL, "<Q"),
        (MAP_HASH, "<Q"),
        (PART, "<H"),
        (PARTS, "<H"),
        (WORDS, "<H"),
        (ENTRIES, "<H"),
        (64, "<I"),
    ]
)
VALUE = st.integers(0, 40) | st.sampled_from([336, 337, 399, 400, 504, 0xFFFE, 0xFFFF, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1])


@given(st.lists(st.tuples(st.integers(0, P - 1), FIELD, VALUE), min_size=1, max_size=12))
@settings(max_examples=400, deadline=None)
def test_fuzz_fields_with_valid_checksums(changes: list[tuple[int, tuple[int, str], int]]) -> None:
    """A ring full of pages, fields changed at will and sealed again: a state or Corrupt, always soon."""
    disk = Disk()
    for i in range(P + 4):
        disk.commit(words=1 if i % 4 else 340, advance=i % 3 == 0)
        disk.checkpoint()
    for position, (offset, form), value in changes:
        disk.forge(position, offset, form, value % (1 << 8 * struct.calcsize(form)))
    consume(disk)


@given(st.lists(st.tuples(st.integers(0, 65535), st.binary(min_size=1, max_size=5000)), min_size=1, max_size=4))
@settings(max_examples=150, deadline=None)
def test_fuzz_bytes(patches: list[tuple[int, bytes]]) -> None:
    disk = three_commits()
    for offset, data in patches:
        disk.ring[offset : offset + len(data)] = data
    disk.ring = disk.ring[:65536]
    consume(disk)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_history_of_commits_crashes_and_checkpoints(data: st.DataObject) -> None:
    disk = Disk()
    dropped = False
    for _ in range(data.draw(st.integers(1, 30))):
        what = data.draw(st.sampled_from(["commit", "commit", "crash", "checkpoint"]))
        words, entries = data.draw(st.sampled_from([(0, 0), (1, 0), (336, 0), (337, 0), (0, 505), (400, 600)]))
        parts = journal.parts_needed(words, entries)
        # As a writer must: one page stays free for the commit that moves the tail, and no page that the tail needs is written over.
        if what == "checkpoint" or journal.fit_sequence(G, disk.sequence, parts) + parts + 1 - disk.tail > P:
            if disk.sequence + 1 - disk.tail > P:
                return
            disk.checkpoint()
            disk.commit(words=0, advance=True, clean=True)
            dropped = False
        elif what == "crash":
            arrived = data.draw(st.sets(st.integers(0, parts - 1), max_size=parts - 1))
            before = disk.sequence
            disk.commit(words, entries, keep=tuple(sorted(arrived)))
            if arrived:
                dropped = True
            else:
                disk.sequence = before
        else:
            disk.commit(words, entries)
            dropped = False
        disk.check(dropped_commit=dropped)


def test_only_fvd_errors_leave_this_module() -> None:
    assert issubclass(Corrupt, FvdError) and issubclass(InvalidArgument, FvdError)
