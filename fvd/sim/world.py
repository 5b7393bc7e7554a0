"""One disk's life on the simulated device: random requests, faults, growth, crashes, kills, closes and reopens, judged at every turn.

Everything follows from one seed. Provision, recovery, check and the engine are the production code, unmodified.
"""

from __future__ import annotations

import struct
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fvd._core import checksum
from fvd.engine._engine import Engine
from fvd.errors import FvdError
from fvd.format.geometry import CELL_BYTES, CELLS_PER_PAGE, ENTRIES_PER_CELL, PAGE_BYTES, WORDS_PER_CELL
from fvd.format.journal import ENTRY_RECORD, HEADER_BYTES, PAGE_HEADER, PAGE_MAGIC, RECORDS_BYTES, WORD_RECORD
from fvd.format.maps import Bitmap, MapKind, Table, decode_pages, empty_bitmap, empty_table, map_offset_bytes
from fvd.format.superblock import BaseReference, Superblock
from fvd.sim._base import base_content
from fvd.sim._device import CATEGORIES, Operation, SimulatedDevice
from fvd.sim._dice import Dice
from fvd.sim._oracle import SECTOR_BYTES, Oracle, Violation
from fvd.sim._player import Player
from fvd.sim.device_node import DeviceNode
from fvd.sim.shape import STICKY, Shape, draw
from fvd.volume.check import check_node
from fvd.volume.loading import LoadedDisk, recover_disk
from fvd.volume.name import VolumeName, parse_name
from fvd.volume.provision import write_disk

FOREIGN = b"\xf0FOREIGN"  # what the storage held before it was ours: must never be seen
WANT_GROWTH, WANT_EVENT = 1, 2
SHAPE, EVENTS, ROUNDS, REQUESTS = range(1, 5)  # streams of a seed
ROUNDS_OF_A_WORLD = 6
UNTIL_REQUESTS = 60
_EINVAL, _ENOSPC, _EROFS, _ESHUTDOWN = 22, 28, 30, 108
_READ, _WRITE, _TRIM, _ZERO = 0, 1, 3, 4  # RequestKind of fvd/engine/_engine.pxd
_EXTENT_BASE, _EXTENT_ZERO = 1, 2  # ExtentState
_JOURNAL_COUNTS = struct.Struct("<HHI")  # word_count, entry_count, flags; at byte 44 of a page
_JOURNAL_SEQUENCE = struct.Struct("<4s4xQ")  # magic, sequence; at its beginning
_VAST_BYTES = 1 << 30
NAME: VolumeName = parse_name("file:/simulated")


class World:
    """`events` chooses another order of events for the same requests."""

    def __init__(self, seed: int, shape: Shape | None = None, *, events: int = 0, log: list[str] | None = None) -> None:
        self.seed = seed
        self.log = log
        self.shape = shape or draw(Dice(seed, SHAPE))
        self.dice = Dice(seed, EVENTS, events)
        geometry = self.geometry = self.shape.geometry
        initial_bytes = geometry.data_offset_bytes + self.shape.storage_chunks * geometry.chunk_size_bytes
        self.greatest_bytes = min(geometry.max_storage_size_bytes, initial_bytes + _VAST_BYTES) + self.shape.surplus_bytes
        whole = initial_bytes >= geometry.max_storage_size_bytes
        initial_bytes += self.shape.surplus_bytes if whole else self.shape.surplus_bytes % geometry.chunk_size_bytes
        self.device = SimulatedDevice(
            self.greatest_bytes,
            self.shape.logical_block_bytes,
            self.dice,
            base_bytes=self.shape.base_bytes,
            regions=(geometry.journal_offset_bytes, geometry.bitmap_offset_bytes, geometry.data_offset_bytes),
        )
        self.filler = FOREIGN if self.shape.windows is None else b""
        self.device.grow(initial_bytes, self.filler)
        base = None if self.shape.base_bytes is None else BaseReference("/base", self.shape.base_bytes)
        self.superblock = Superblock(geometry, self.dice.randbytes(16), 2, base, 0)
        write_disk(self.node(), self.superblock)
        self.oracle = Oracle(geometry.virtual_size_bytes, self.shape.base_bytes, self.shape.windows)
        self.requests_before = 0
        self.killed = False  # the life before ended so
        self.overwritten: dict[int, bytes] = {}  # metadata pages: what they held before their last write
        self.durable_tail = 0  # of the last commit that has ended
        self.found: dict[MapKind, Bitmap | Table | None] = {}  # the maps as the disk was opened with them
        self.committed: dict[tuple[MapKind, int], set[int]] = {}  # the values in commits since then
        self.device.inspect = self._inspect
        self.device.page_cache = self.shape.cache_mode not in ("none", "directsync")
        self.engine: Any
        self.player: Player
        self.open()

    # --- opening ------------------------------------------------------------------------------------------------------

    @property
    def image(self) -> memoryview:
        return self.device.image

    @property
    def requests_done(self) -> int:
        return self.requests_before + self.player.requests_done

    def say(self, text: str) -> None:
        if self.log is not None:
            self.log.append(text)

    def node(self) -> DeviceNode:
        return DeviceNode(self.device, direct=self.shape.cache_mode in ("none", "directsync"))

    def make_engine(self, *, read_only: bool = False) -> Any:
        """An engine on what the storage holds now, recovered as an open does. Raises FvdError."""
        disk: LoadedDisk = recover_disk(self.node(), read_only=read_only)
        if not read_only and not disk.journal_state.clean and self.device.volatile_blocks:
            raise Violation("a writable open goes on from what a crash may still take back (R13)")
        shape = self.shape
        self.durable_tail = disk.journal_state.tail
        self.committed = {}
        # The engine takes the arrays. A vast disk's are not looked at.
        if shape.windows is None:
            self.found = {MapKind.BITMAP: disk.bitmap.copy(), MapKind.TABLE: None if disk.table is None else disk.table.copy()}
        return Engine(
            disk.geometry,
            uuid=disk.superblock.uuid,
            bitmap=disk.bitmap,
            table=disk.table,
            used_slots=disk.used_slots,
            journal_state=disk.journal_state,
            dirty_bitmap_pages=disk.dirty_bitmap_pages,
            dirty_table_pages=disk.dirty_table_pages,
            storage_size_bytes=self.device.size_bytes,
            base_size_bytes=shape.base_bytes,
            align_bytes=shape.logical_block_bytes,
            read_only=read_only,
            cache_mode=shape.cache_mode,
            on_full=shape.on_full,
            low_water_bytes=shape.low_water_chunks * self.geometry.chunk_size_bytes,
            discard=shape.discard,
            bounce_limit_bytes=shape.bounce_limit_bytes,
        )

    def open(self, *, read_only: bool = False) -> None:
        """A new life. Faults come with `start_faults`."""
        engine = self.make_engine(read_only=read_only)
        if hasattr(self, "player"):
            self.requests_before += self.player.requests_done
        self.device.fault = None
        self.device.set_faults({})
        self.device.fail_number = 0
        self.device.set_slow(self.shape.slow)
        self.device.stuck_share = self.shape.stuck_share
        self.device.torn_share = self.shape.torn_share
        self.device.overtaking_share = self.shape.overtaking_share
        self.engine = engine
        self.player = Player(
            self.engine,
            self.device,
            self.oracle,
            self.dice,
            geometry=self.geometry,
            base_bytes=self.shape.base_bytes,
            cache_mode=self.shape.cache_mode,
        )
        self.player.log = self.log

    def start_faults(self, rates: Mapping[str, float], *, one: bool = False) -> None:
        """From now on operations fail: by rate, and one that is chosen now."""
        self.device.fail_with = self.shape.fail_with
        self.device.set_faults(rates)
        if one:
            self.device.fail_number = self.device.submitted + self.dice.randint(1, 200)
        self.player.errors_expected = True

    def stop_faults(self) -> None:
        self.device.set_faults({})
        self.device.fault = None
        self.device.fail_number = 0

    # --- what every write of metadata must look like --------------------------------------------------------------------

    def _inspect(self, operation: Operation) -> None:
        """Decodes metadata as it passes: it must be valid where it lies, with zeros where the format has nothing."""
        content = operation.content
        geometry = self.geometry
        offset = operation.offset_bytes
        if offset % PAGE_BYTES or len(content) % PAGE_BYTES:
            raise Violation(f"metadata is not written in pages: {operation}")
        if self.shape.rot:
            for start in range(0, len(content), PAGE_BYTES):
                self.overwritten[offset + start] = bytes(self.image[offset + start : offset + start + PAGE_BYTES])
        if offset < geometry.journal_offset_bytes:
            raise Violation(f"a superblock is overwritten: {operation}")
        if offset < geometry.bitmap_offset_bytes:
            if offset + len(content) > geometry.journal_offset_bytes + geometry.journal_size_bytes:
                raise Violation(f"a commit crosses the end of the ring: {operation}")
            for start in range(0, len(content), PAGE_BYTES):
                self._inspect_commit(content[start : start + PAGE_BYTES], operation)
        elif self.shape.windows is None:
            self._inspect_map(offset, content, operation)

    def _inspect_commit(self, page: bytes, operation: Operation) -> None:
        """One page of it. Nothing that replay may still need is overwritten (R4)."""
        header = np.frombuffer(page, PAGE_HEADER, 1)[0]
        words_end = HEADER_BYTES + int(header["word_count"]) * WORD_RECORD.itemsize
        entries_end = words_end + int(header["entry_count"]) * ENTRY_RECORD.itemsize
        if entries_end > PAGE_BYTES or any(bytes(header["page_reserved"])) or page[entries_end:].strip(b"\0"):
            raise Violation(f"a journal page has bytes that the format does not: {operation}")
        if int(header["sequence"]) - self.geometry.journal_pages >= self.durable_tail:
            raise Violation(f"a commit overwrites one that replay needs: {operation}, tail {self.durable_tail}")
        if int(header["part"]) == int(header["parts"]) - 1:
            self.durable_tail = int(header["tail"])  # before the next commit begins
        for kind, records in (
            (MapKind.BITMAP, np.frombuffer(page[HEADER_BYTES:words_end], WORD_RECORD)),
            (MapKind.TABLE, np.frombuffer(page[words_end:entries_end], ENTRY_RECORD)),
        ):
            for index, value in records.tolist():
                self.committed.setdefault((kind, index), set()).add(value)

    def _inspect_map(self, offset: int, content: bytes, operation: Operation) -> None:
        """Every value in it has been in a commit (R11), or was there when the disk was opened."""
        geometry = self.geometry
        kind = MapKind.TABLE if geometry.table_entries and offset >= geometry.table_offset_bytes else MapKind.BITMAP
        items = empty_table(geometry) if kind is MapKind.TABLE else empty_bitmap(geometry)
        found = self.found[kind]
        if items is None or found is None:
            raise Violation(f"a write to a map that this disk does not have: {operation}")
        first_page = (offset - map_offset_bytes(geometry, kind)) // PAGE_BYTES
        decode_pages(geometry, kind, np.frombuffer(content, np.uint8), self.superblock.uuid, items, first_page)
        per_page = CELLS_PER_PAGE * (ENTRIES_PER_CELL if kind is MapKind.TABLE else WORDS_PER_CELL)
        first, end = first_page * per_page, (first_page + len(content) // PAGE_BYTES) * per_page
        for index in (np.flatnonzero(items[first:end] != found[first:end]) + first).tolist():
            if int(items[index]) not in self.committed.get((kind, index), ()):
                raise Violation(f"a checkpoint writes what no commit holds, {kind.name.lower()} {index}: {operation}")

    # --- while it is open ---------------------------------------------------------------------------------------------

    def submit(self, kind: str, first_sector: int = 0, sectors: int = 0, *, fua: bool = False, no_hole: bool = False) -> int:
        """Hand one request to the engine. Returns its cookie; it is in `in_flight` until it has ended."""
        return self.player.submit(kind, first_sector, sectors, fua=fua, no_hole=no_hole)

    @property
    def in_flight(self) -> dict[int, str]:
        return self.player.in_flight

    def step(self) -> bool:
        """One event of the device. False when nothing is pending."""
        return self.player.step()

    def grow(self) -> bool:
        """One more step of storage. False when there is no more."""
        limit = self.greatest_bytes
        if self.device.size_bytes >= limit:
            return False
        self.device.grow(min(self.device.size_bytes + self.geometry.grow_step_bytes, limit), self.filler)
        self.engine.want &= ~WANT_GROWTH
        self.engine.set_storage_size(self.device.size_bytes)
        self.say(f"storage grows to {self.device.size_bytes}")
        return True

    def set_exhausted(self, exhausted: bool) -> None:
        self.player.exhausted |= exhausted and self.shape.on_full == "error"
        self.engine.set_exhausted(exhausted)
        self.say("storage cannot grow" if exhausted else "storage can grow again")

    def on_side(self, dice: Dice) -> None:
        """What happens beside requests: time, growth, an impatient administrator."""
        pick = dice.random()
        if pick < 0.15:
            self.device.advance(10_000_000_000)
            self.say("ten seconds pass")
        elif pick < 0.5:
            if self.shape.growth == "ready" or (self.shape.growth == "late" and dice.random() < 0.2):
                self.grow()
        elif pick < 0.85:
            self.set_exhausted(dice.random() < 0.7)
        elif pick < 0.92:
            self.player.cancelled = True
            self.say("writes that wait for storage are cancelled")
            self.engine.cancel_all_waiting(_ESHUTDOWN)
        else:
            self.engine.commit_soon()

    def settle(self) -> None:
        """Faults stop; everything under way must end, and nothing may be left of it."""
        self.stop_faults()
        player = self.player
        while True:
            player.drain()
            if not player.in_flight_count:
                break
            if self.engine.waiting_writes and self.engine.failed_errno:
                raise Violation("writes wait for space that a disk which has failed can not use")
            if self.engine.waiting_writes == 0:
                raise Violation(f"{player.in_flight_count} requests never end: {sorted(set(player.in_flight.values()))}")
            self._check_wants()
            if not self.grow():
                raise Violation("writes wait for space though the storage has its greatest size")
        self._check_leaks()
        self._check_wants()
        if not self.engine.failed_errno and self.dice.random() < 0.5:
            self.engine.commit_soon()  # slots that were trimmed are free only then
            player.drain()
            self._check_slots()

    def _check_wants(self) -> None:
        """Whoever grows the storage and tells of failures does so only when asked."""
        engine = self.engine
        free_bytes = engine.free_slots * self.geometry.chunk_size_bytes
        short = engine.waiting_writes or free_bytes < engine.low_water_bytes
        if short and self.geometry.table_entries and engine.capacity_slots < self.geometry.chunks and not engine.want & WANT_GROWTH:
            raise Violation(f"{engine.waiting_writes} writes wait, {engine.free_slots} slots are free, and no growth is asked for")
        if engine.failed_errno and not engine.want & WANT_EVENT:
            raise Violation("the engine has failed and does not say so")

    def _check_slots(self) -> None:
        """With nothing under way and nothing pending: slots in use are those that the table names."""
        engine = self.engine
        _, table = engine.snapshot_maps()
        if table is None:
            return
        named = int(np.count_nonzero(table != 0xFFFFFFFF))
        if named != engine.used_slots_count or engine.capacity_slots - named != engine.free_slots:
            raise Violation(
                f"{engine.used_slots_count} slots in use and {engine.free_slots} of {engine.capacity_slots} free, {named} in the table"
            )

    def _check_leaks(self) -> None:
        if leaks := self.engine.leaks():
            raise Violation(f"leaked: {leaks}")

    # --- ends of a life -------------------------------------------------------------------------------------------------

    def begin_close(self) -> None:
        self.player.submit("close")

    def close(self, *, at_once: bool = False) -> None:
        """Close the disk and open it again; `at_once`: while requests are still under way."""
        if not at_once:
            self.settle()
        self.begin_close()
        self.player.drain()
        if self.player.in_flight_count:
            raise Violation(f"close never ends: {sorted(set(self.in_flight.values()))}")
        self._check_leaks()
        failed = self.engine.failed_errno
        if not failed:
            # A closed disk is durable as a whole, whatever the cache mode.
            self.oracle.end_flush(self.oracle.begin_flush(), True)
        self.say("closed; power fails")
        self.device.crash()
        if not failed and not recover_disk(self.node(), read_only=True).journal_state.clean:
            raise Violation("a closed disk is not clean")
        self.reopen()

    def crash_while_closing(self) -> None:
        self.begin_close()
        for _ in range(self.dice.randint(0, 30)):
            self.step()
        self.crash()

    def crash(self) -> None:
        """Power fails; the disk is opened again."""
        self.cut_power()
        self.reopen()

    def cut_power(self) -> None:
        self.say("power fails")
        self.device.crash()
        self.player.abandon()

    def kill(self) -> None:
        """The process dies, another one opens the disk: what was acknowledged and not flushed is as it is seen now, or lost later."""
        self.killed = True
        self.say("the process is killed")
        self.device.kill()
        self.player.abandon()
        self.oracle.survive_kill()
        self.open()
        self.check()
        shown = self.read_all()
        self.oracle.adopt_after_kill(shown)
        self._check_extents(shown)

    def reopen(self) -> None:
        """Open after a crash: judge everything, and go on from there."""
        if self.dice.random() < 0.1:
            self._open_read_only()
        self.open()
        self.check()
        shown = self.read_all()
        self.oracle.settle_after_crash(shown)
        self._check_extents(shown)
        self._check_refusals({_WRITE: _ENOSPC, _ZERO: _ENOSPC, _TRIM: _EINVAL, _READ: _EINVAL}, self.geometry.virtual_size_bytes - 512)

    def _open_read_only(self) -> None:
        """A read-only open shows what a writable one does, and writes nothing."""
        before = bytes(self.image)
        self.open(read_only=True)
        shown = self.read_all()
        self._check_refusals({_WRITE: _EROFS, _ZERO: _EROFS, _TRIM: _EROFS}, 0)
        if self.image != before:
            raise Violation("a read-only open wrote to the disk")
        self.open()
        if self.read_all() != shown:
            raise Violation("read-only and writable opens show different data")

    def _check_refusals(self, kinds: Mapping[int, int], start: int) -> None:
        """Requests for the 1024 bytes at `start` that must be refused at once: {kind: errno}."""
        memory = np.zeros(1024, np.uint8)
        for kind, error in kinds.items():
            self.engine.submit_request(kind, start, memory.size, memory.ctypes.data, kind)
            ended = self.engine.take_done()
            if ended != [(kind, -error)] or self.engine.take_operations():
                raise Violation(f"request {kind} at byte {start} is not refused: {ended}")

    def _check_extents(self, shown: bytearray) -> None:
        """What block status calls zeros or the base must be that: `shown` is what the windows show, with nothing under way."""
        view = np.frombuffer(shown, np.uint8)
        at = 0
        for first, count in self.shape.windows or [(0, self.shape.sectors)]:
            start = first * SECTOR_BYTES
            for length, state in self.engine.list_extents(start, count * SECTOR_BYTES):
                part = view[at : at + length]
                if state == _EXTENT_ZERO and part.any():
                    raise Violation(f"block status calls {length} bytes at {start} zeros, and they are not")
                if state == _EXTENT_BASE:
                    base = base_content(self.shape.base_bytes or 0, start, length)
                    if bytes(part) != base.ljust(length, b"\0"):
                        raise Violation(f"block status calls {length} bytes at {start} those of the base, and they are not")
                at += length
                start += length
            if start != (first + count) * SECTOR_BYTES:
                raise Violation(f"block status ends at byte {start}")

    def read_all(self) -> bytearray:
        """All windows of the disk, one after the other, read while nothing else happens."""
        shown = bytearray()
        for first, count in self.shape.windows or [(0, self.shape.sectors)]:
            shown += self.player.read_now(first, count)
        return shown

    def check(self) -> None:
        """What `fvd-lv check` says of the storage, and whether slots in use are those that the table names."""
        if self.dice.random() < 0.25:
            report = check_node(self.node(), NAME)
            if report.errors:
                raise Violation(f"check: {'; '.join(report.errors)}")
        self._check_slots()

    # --- damaged metadata -----------------------------------------------------------------------------------------------

    def rot(self) -> int:
        """Power fails, and what it left is opened with a piece of metadata damaged; once more with another, and so on. Every damage is
        undone, and the disk goes on from what was there. Returns how many there were."""
        self.cut_power()
        damages = self.dice.randint(1, 6)
        for _ in range(damages):
            before: dict[int, bytes] = {}
            self.dice.choice((self._rot_superblock, self._rot_map, self._rot_map, self._rot_journal, self._rot_journal, self._misdirect))(
                before
            )
            for offset, content in before.items():
                self.image[offset : offset + PAGE_BYTES] = content
        self.reopen()
        return damages

    def _replace(self, offset: int, content: bytes | bytearray, before: dict[int, bytes]) -> None:
        """Another content for a page; `before` keeps the one that it had first."""
        before.setdefault(offset, bytes(self.image[offset : offset + PAGE_BYTES]))
        self.image[offset : offset + PAGE_BYTES] = content

    def _flip(self, page: int, before: dict[int, bytes], within: int = PAGE_BYTES) -> int:
        """Flip one bit of a page, rather near the beginning of a piece of `within` bytes: most of the rest is empty. Returns where."""
        content = bytearray(self.image[page * PAGE_BYTES : (page + 1) * PAGE_BYTES])
        at = self.dice.randint(0, PAGE_BYTES // within - 1 >> self.dice.randint(0, 3)) * within
        at += self.dice.randint(0, within - 1 >> self.dice.randint(0, 5))
        content[at] ^= 1 << self.dice.randint(0, 7)
        self._replace(page * PAGE_BYTES, content, before)
        self.say(f"a bit flips at {page * PAGE_BYTES + at}")
        return page * PAGE_BYTES + at

    def _open_damaged(self) -> bytearray | None:
        """What a disk with damaged metadata shows; None: it refuses to open, as it may."""
        try:
            self.open()
        except FvdError as error:
            self.say(f"refused: {error}")
            return None
        return self.read_all()

    def _judge_damaged(self) -> None:
        """Open and show what is allowed, or refuse."""
        shown = self._open_damaged()
        if shown is not None:
            self.oracle.check_after_crash(shown)

    def _rot_superblock(self, before: dict[int, bytes]) -> None:
        self._flip(self.dice.choice((0, 128)), before)
        self._judge_damaged()

    def _rot_map(self, before: dict[int, bytes]) -> None:
        """No bit of a map may change unnoticed, and `check` says where."""
        geometry = self.geometry
        start = geometry.bitmap_offset_bytes
        pages = (geometry.bitmap_size_bytes + geometry.table_size_bytes) // PAGE_BYTES
        at = self._flip(start // PAGE_BYTES + self.dice.randint(0, pages - 1), before, CELL_BYTES)
        if self._open_damaged() is not None:
            raise Violation(f"the disk opens though a bit of a map is wrong at byte {at}")
        cell = at // CELL_BYTES * CELL_BYTES
        errors = check_node(self.node(), NAME).errors
        if not any(f" at byte {cell} " in error for error in errors):
            raise Violation(f"check does not name the damaged cell at byte {cell}: {'; '.join(errors)}")

    def _rot_journal(self, before: dict[int, bytes]) -> None:
        """A page of the ring that is not valid is ignored: the disk is what it is without it."""
        geometry, dice = self.geometry, self.dice
        start = geometry.journal_offset_bytes // PAGE_BYTES
        sequences: list[tuple[int, int]] = []
        for page in range(start, start + geometry.journal_pages):
            magic, sequence = _JOURNAL_SEQUENCE.unpack_from(self.image, page * PAGE_BYTES)
            if magic == PAGE_MAGIC:
                sequences.append((sequence, page))
        page = max(sequences)[1] if dice.random() < 0.5 else dice.choice(sequences)[1]
        if dice.random() < 0.5:
            self._flip(page, before)
        else:
            self._forge_counts(page, before)
        shown = self._open_damaged()
        self._replace(page * PAGE_BYTES, bytes(PAGE_BYTES), before)
        if shown != self._open_damaged():
            raise Violation(f"the damaged journal page at byte {page * PAGE_BYTES} is not ignored")

    def _forge_counts(self, page: int, before: dict[int, bytes]) -> None:
        """More records than a page can have, under a checksum that holds."""
        offset = page * PAGE_BYTES
        content = bytearray(self.image[offset : offset + PAGE_BYTES])
        words, entries, flags = _JOURNAL_COUNTS.unpack_from(content, 44)
        words = self.dice.randint(RECORDS_BYTES // WORD_RECORD.itemsize + 1, 0xFFFF >> self.dice.randint(0, 7))
        _JOURNAL_COUNTS.pack_into(content, 44, words, entries, flags)
        content[4:8] = checksum(self.superblock.uuid, offset, content, 4).to_bytes(4, "little")
        self._replace(offset, content, before)
        self.say(f"the journal page at {offset} claims {words} words")

    def _misdirect(self, before: dict[int, bytes]) -> None:
        """A write of metadata was lost, or went to another place."""
        geometry, dice = self.geometry, self.dice
        if not self.overwritten:
            return
        offset = dice.choice(sorted(self.overwritten))
        content = bytes(self.image[offset : offset + PAGE_BYTES])
        self._replace(offset, self.overwritten[offset], before)
        if dice.random() < 0.5:
            last = geometry.data_offset_bytes // PAGE_BYTES - 1
            self._replace(dice.randint(geometry.journal_offset_bytes // PAGE_BYTES, last) * PAGE_BYTES, content, before)
        self.say(f"metadata was not written where it should: {sorted(before)}")
        if any(geometry.journal_offset_bytes <= place < geometry.bitmap_offset_bytes for place in before):
            self._open_damaged()  # a last commit that is lost looks like one that was never finished: FORMAT.md's one exception
        else:
            self._judge_damaged()


@dataclass(slots=True)
class Outcome:
    """What one world did."""

    seed: int
    requests: int = 0
    rounds: int = 0
    crashes: int = 0
    kills: int = 0
    closes: int = 0
    damages: int = 0
    played: dict[int, int] = field(default_factory=dict)
    """Round -> requests that it was to play."""


UNTIL = 1 << 16  # from here on: the requests of a round that wait for the moment of its crash

Kept = Mapping[int, Container[int]]
"""Round -> those of its requests that are played; a round that is not named is left out whole."""


class _Others:
    """Everything that is not kept, counted from `start`."""

    def __init__(self, kept: Container[int], start: int = 0) -> None:
        self._kept, self._start = kept, start

    def __contains__(self, index: object) -> bool:
        return isinstance(index, int) and index + self._start not in self._kept


def run(seed: int, *, only: Kept | None = None, events: int = 0, log: list[str] | None = None, outcome: Outcome | None = None) -> Outcome:
    """One world from its seed. Raises Violation, or whatever the engine raises; `outcome` then says how far it came."""
    outcome = outcome or Outcome(seed)
    world = World(seed, events=events, log=log)
    try:
        for number in range(ROUNDS_OF_A_WORLD):
            if only is not None and number not in only:
                continue
            if not play_round(world, number, outcome, None if only is None else only[number]):
                break
    finally:
        outcome.requests = world.requests_done
        world.device.inspect = None  # a circle of references that would keep the images of many worlds in memory
    return outcome


def play_round(world: World, number: int, outcome: Outcome, kept: Container[int] | None = None) -> bool:
    """One round and its end. False: the world ends with it."""
    dice = Dice(world.seed, ROUNDS, number)
    shape = world.shape
    outcome.rounds += 1
    world.say(f"round {number}")
    if shape.faulty and dice.random() < 0.7:
        world.start_faults(shape.faults, one=shape.fail_one)
    # What a kill left is in danger only until the next flush.
    requests = dice.randint(1, min(shape.longest_round, 12) if world.killed and dice.random() < 0.5 else shape.longest_round)
    world.killed = False
    outcome.played[number] = requests
    _aim(world, dice)
    skip = None if kept is None else _Others(kept)
    world.player.play(requests, seed=world.seed, stream=REQUESTS << 32 | number, skip=skip, on_side=world.on_side)
    ending = dice.random()
    if ending < 0.5:
        outcome.crashes += 1
        if shape.crash_at:
            _play_until(world, shape.crash_at, number, kept)
        if shape.rot and dice.random() < 0.5:
            outcome.damages += world.rot()
        else:
            world.crash()
    elif ending < 0.6:
        outcome.crashes += 1
        world.crash_while_closing()
    elif ending < 0.7:
        outcome.kills += 1
        if shape.crash_at:
            _play_until(world, shape.crash_at, number, kept)
        world.kill()
    elif ending < 0.82:
        outcome.closes += 1
        world.close()
    elif ending < 0.89:
        outcome.closes += 1
        world.close(at_once=True)
    else:
        world.settle()
        if world.engine.failed_errno:
            outcome.crashes += 1
            world.crash()
    return True


def _aim(world: World, dice: Dice, **changes: float) -> None:
    """The load of a round: some kinds of requests are switched off, so that the others meet more often."""
    shape = world.shape
    weights = {kind: weight for kind, weight in shape.kinds.items() if dice.random() < 0.8 or kind == "write"}
    world.player.aim(
        weights=weights | changes,
        areas=shape.areas,
        largest_sectors=shape.largest_sectors,
        depth=shape.depth,
        least_depth=shape.least_depth,
        unit_sectors=shape.logical_block_bytes // SECTOR_BYTES,
        skew_share=shape.skew_share,
        side_share=0.12,
        verify_share=shape.verify_share,
    )


def _play_until(world: World, category: str, number: int, kept: Container[int] | None) -> None:
    """Play until such an operation has taken effect and not completed: the moment when a crash asks most."""
    # A flush brings a commit about, and a checkpoint; but what waits for neither may meet a crash that nothing went before.
    _aim(world, Dice(world.seed, ROUNDS, number), **({"flush": 3.0} if category in STICKY else {}))
    stream = REQUESTS << 32 | 1 << 16 | number
    skip = None if kept is None else _Others(kept, UNTIL)
    world.player.play(UNTIL_REQUESTS, seed=world.seed, stream=stream, skip=skip, on_side=world.on_side, awaited=CATEGORIES.index(category))
