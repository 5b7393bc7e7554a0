# SPDX-License-Identifier: Apache-2.0
"""Metadata that rots, is lost, is forged or was written to the wrong place: what a disk may then show, and what it must refuse."""

from __future__ import annotations

import struct

from fvd._core import checksum
from fvd.errors import FvdError
from fvd.format.geometry import CELL_BYTES, PAGE_BYTES
from fvd.format.journal import PAGE_MAGIC, RECORDS_BYTES, WORD_RECORD
from fvd.inspect.check import check_node
from fvd.sim._oracle import Violation
from fvd.sim.world import NAME, World

_JOURNAL_COUNTS = struct.Struct("<HHI")  # word_count, entry_count, flags; at byte 44 of a page
_JOURNAL_SEQUENCE = struct.Struct("<4s4xQ")  # magic, sequence; at its beginning


def rot(world: World) -> int:
    """Power fails, and what it left is opened with a piece of metadata damaged; once more with another, and so on. Every damage is
    undone, and the disk goes on from what was there. Returns how many there were."""
    world.cut_power()
    damages = world.rng.randint(1, 6)
    for _ in range(damages):
        _Damage(world).happen()
    world.reopen()
    return damages


class _Damage:
    """One damage to a disk that is closed."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._before: dict[int, bytes] = {}  # pages that were touched, as they were

    def happen(self) -> None:
        """Damage, judge, and undo."""
        kinds = (self._rot_superblock, self._rot_map, self._rot_map, self._rot_journal, self._rot_journal, self._misdirect)
        self.world.rng.choice(kinds)()
        for offset, content in self._before.items():
            self.world.image[offset : offset + PAGE_BYTES] = content

    def _replace(self, offset: int, content: bytes | bytearray) -> None:
        """Another content for a page; `_before` keeps the one that it had first."""
        self._before.setdefault(offset, bytes(self.world.image[offset : offset + PAGE_BYTES]))
        self.world.image[offset : offset + PAGE_BYTES] = content

    def _flip(self, page: int, within: int = PAGE_BYTES) -> int:
        """Flip one bit of a page, rather near the beginning of a piece of `within` bytes: most of the rest is empty. Returns where."""
        content = bytearray(self.world.image[page * PAGE_BYTES : (page + 1) * PAGE_BYTES])
        at = self.world.rng.randint(0, PAGE_BYTES // within - 1 >> self.world.rng.randint(0, 3)) * within
        at += self.world.rng.randint(0, within - 1 >> self.world.rng.randint(0, 5))
        content[at] ^= 1 << self.world.rng.randint(0, 7)
        self._replace(page * PAGE_BYTES, content)
        self.world.say(f"a bit flips at {page * PAGE_BYTES + at}")
        return page * PAGE_BYTES + at

    def _open_damaged(self) -> bytearray | None:
        """What a disk with damaged metadata shows; None: it refuses to open, as it may."""
        try:
            self.world.open()
        except FvdError as error:
            self.world.say(f"refused: {error}")
            return None
        return self.world.read_all()

    def _judge_damaged(self) -> None:
        """Open and show what is allowed, or refuse."""
        shown = self._open_damaged()
        if shown is not None:
            self.world.oracle.check_after_crash(shown)

    def _rot_superblock(self) -> None:
        self._flip(self.world.rng.choice((0, 128)))
        self._judge_damaged()

    def _rot_map(self) -> None:
        """No bit of a map may change unnoticed, and `check` says where."""
        geometry = self.world.geometry
        start = geometry.bitmap_offset_bytes
        pages = (geometry.bitmap_size_bytes + geometry.table_size_bytes) // PAGE_BYTES
        at = self._flip(start // PAGE_BYTES + self.world.rng.randint(0, pages - 1), CELL_BYTES)
        if self._open_damaged() is not None:
            raise Violation(f"the disk opens though a bit of a map is wrong at byte {at}")
        cell = at // CELL_BYTES * CELL_BYTES
        errors = check_node(self.world.node(), NAME).errors
        if not any(f" at byte {cell} " in error for error in errors):
            raise Violation(f"check does not name the damaged cell at byte {cell}: {'; '.join(errors)}")

    def _rot_journal(self) -> None:
        """A page of the ring that is not valid is ignored: the disk is what it is without it."""
        geometry, rng = self.world.geometry, self.world.rng
        start = geometry.journal_offset_bytes // PAGE_BYTES
        sequences: list[tuple[int, int]] = []
        for page in range(start, start + geometry.journal_pages):
            magic, sequence = _JOURNAL_SEQUENCE.unpack_from(self.world.image, page * PAGE_BYTES)
            if magic == PAGE_MAGIC:
                sequences.append((sequence, page))
        page = max(sequences)[1] if rng.random() < 0.5 else rng.choice(sequences)[1]
        if rng.random() < 0.5:
            self._flip(page)
        else:
            self._forge_counts(page)
        shown = self._open_damaged()
        self._replace(page * PAGE_BYTES, bytes(PAGE_BYTES))
        if shown != self._open_damaged():
            raise Violation(f"the damaged journal page at byte {page * PAGE_BYTES} is not ignored")

    def _forge_counts(self, page: int) -> None:
        """More records than a page can have, under a checksum that holds."""
        offset = page * PAGE_BYTES
        content = bytearray(self.world.image[offset : offset + PAGE_BYTES])
        words, entries, flags = _JOURNAL_COUNTS.unpack_from(content, 44)
        words = self.world.rng.randint(RECORDS_BYTES // WORD_RECORD.itemsize + 1, 0xFFFF >> self.world.rng.randint(0, 7))
        _JOURNAL_COUNTS.pack_into(content, 44, words, entries, flags)
        content[4:8] = checksum(self.world.superblock.uuid, offset, content, 4).to_bytes(4, "little")
        self._replace(offset, content)
        self.world.say(f"the journal page at {offset} claims {words} words")

    def _misdirect(self) -> None:
        """A write of metadata was lost, or went to another place."""
        geometry, rng = self.world.geometry, self.world.rng
        if not self.world.metadata.overwritten:
            return
        offset = rng.choice(sorted(self.world.metadata.overwritten))
        content = bytes(self.world.image[offset : offset + PAGE_BYTES])
        self._replace(offset, self.world.metadata.overwritten[offset])
        if rng.random() < 0.5:
            last = geometry.data_offset_bytes // PAGE_BYTES - 1
            self._replace(rng.randint(geometry.journal_offset_bytes // PAGE_BYTES, last) * PAGE_BYTES, content)
        self.world.say(f"metadata was not written where it should: {sorted(self._before)}")
        if any(geometry.journal_offset_bytes <= place < geometry.bitmap_offset_bytes for place in self._before):
            self._open_damaged()  # a last commit that is lost looks like one that was never finished: FORMAT.md's one exception
        else:
            self._judge_damaged()
