"""One disk's life on the simulated device: random requests, faults, growth, crashes and reopens, judged by the oracle.

Everything follows from one seed. The engine under test is the production engine, unmodified.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

from fvd.engine._engine import Engine
from fvd.format import journal, maps
from fvd.format.geometry import Geometry, Layout
from fvd.sim.device import BASE, FLUSH, READ, WRITE, Operation, SimulatedDevice
from fvd.sim.oracle import NEVER, SECTOR_BYTES, Oracle, Violation, Write, base_image, stamped

REQUEST_READ, REQUEST_WRITE, REQUEST_FLUSH, REQUEST_TRIM, REQUEST_ZERO, REQUEST_CLOSE = range(6)
FUA, NO_HOLE = 1, 2
KIB = 1024
_PAGE = 4096
_FOREIGN = b"\xf0FOREIGN"  # what the storage held before it was ours: must never be seen
_EIO, _ENOSPC, _ESHUTDOWN = -5, -28, -108
OPERATIONS = ("read", "base", "write", "journal", "map", "flush", "discard")
STICKY = ("journal", "map", "flush")  # what fails here is remembered by the engine


class Memory:
    """A page-aligned buffer (but for `skew_bytes`) with an address."""

    def __init__(self, size_bytes: int, content: bytes | None = None, skew_bytes: int = 0) -> None:
        self._room = bytearray(size_bytes + skew_bytes + _PAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._room))
        self.address = start + -start % _PAGE + skew_bytes
        self.size_bytes = size_bytes
        if content is not None:
            ctypes.memmove(self.address, content, size_bytes)

    def content(self) -> bytes:
        return ctypes.string_at(self.address, self.size_bytes)


@dataclass(slots=True)
class Shape:
    """What one world looks like; drawn from the seed."""

    geometry: Geometry
    base_bytes: int | None
    logical_block_bytes: int
    cache_mode: str
    on_full: str
    storage_chunks: int
    kinds: dict[str, float]
    largest_sectors: int
    depth: int
    fault_rate: float
    faults: tuple[str, ...]  # which operations fail at all
    discard: bool
    slow_share: float
    stuck_share: float
    skew_share: float  # of buffers that are not aligned
    hot_sectors: int
    longest_round: int
    low_water_chunks: int
    crash_at: str  # what kind of operation a crash waits for; "": none

    @staticmethod
    def draw(dice: Random) -> Shape:
        block = dice.choice((4, 4, 4, 8, 16, 16, 64, 64, 256, 1024)) * KIB
        chunk = max(block, dice.choice((64, 64, 64, 128, 256, 1024)) * KIB)
        # On a crowded disk requests meet each other all the time; on a wide one much has never been written, committed or checkpointed.
        crowded, wide = dice.choice(((True, False), (True, False), (False, False), (False, False), (False, True)))
        virtual = dice.randint(8, 512 if crowded else 32768 if wide else 4096) * SECTOR_BYTES
        if wide:
            block, chunk = min(block, 64 * KIB), 64 * KIB
        elif dice.random() < 0.3:
            virtual = dice.randint(1, max(1, virtual // chunk)) * chunk
        layout = Layout.RAW if dice.random() < 0.2 else Layout.COMPACT
        base: int | None = None
        if dice.random() < 0.5:
            base = dice.choice((virtual, virtual // 2, virtual + 12345, dice.randint(1, virtual), dice.randint(1, virtual // 512) * 512))
        geometry = Geometry(
            virtual_size_bytes=virtual,
            block_size_bytes=block,
            chunk_size_bytes=chunk,
            journal_size_bytes=dice.choice((16, 16, 17, 23, 32)) * 4 * KIB,
            grow_step_bytes=max(chunk, 256 * KIB),
            layout=layout,
        )
        chunks = geometry.chunks
        kinds = {name: dice.choice((0.0, 1.0, 1.0, 3.0)) for name in ("read", "flush", "trim", "zero", "fua", "rewrite")}
        kinds["write"] = 3.0
        if wide:
            kinds["flush"] = 2.0
        return Shape(
            geometry=geometry,
            base_bytes=base,
            logical_block_bytes=dice.choice((512, 512, 4096)),
            cache_mode=dice.choice(("none", "none", "none", "none", "writeback", "writethrough", "directsync", "unsafe")),
            on_full=dice.choice(("wait", "error")),
            storage_chunks=chunks if layout is Layout.RAW or dice.random() < 0.4 else dice.randint(1, chunks),
            kinds=kinds,
            largest_sectors=dice.choice((8, 16) if crowded or wide else (8, 32, 128, 512)),
            depth=dice.choice((8, 16, 48) if crowded else (1, 4, 16, 48)),
            fault_rate=dice.choice((0.0, 0.0, 0.0, 0.02, 0.2)),
            faults=tuple(name for name in OPERATIONS if dice.random() < 0.4),
            discard=dice.random() < 0.5,
            slow_share=dice.choice((0.0, 0.05, 0.2, 0.2)),
            stuck_share=dice.choice((0.0, 0.0, 0.02)),
            skew_share=dice.choice((0.0, 0.1)),
            hot_sectors=0 if wide else dice.choice((0, 0, 16, 256, 1024)),
            longest_round=dice.choice((10, 40, 40, 80, 200)),
            low_water_chunks=dice.choice((0, 0, 2)),
            crash_at=dice.choice(("map", "map", "journal") if wide else ("", "", *OPERATIONS)),
        )


@dataclass(slots=True)
class Guest:
    """A guest request in flight."""

    kind: str
    memory: Memory | None
    write: Write | None = None
    first_sector: int = 0
    began: int = 0
    fua: bool = False
    growable: bool = False  # it was submitted when the storage had not its greatest size


class World:
    def __init__(self, seed: int, shape: Shape | None = None) -> None:
        self.seed = seed
        self.dice = Random(seed)
        self.shape = shape or Shape.draw(self.dice)
        geometry = self.shape.geometry
        self.geometry = geometry
        self.uuid = self.dice.randbytes(16)
        self.base = None if self.shape.base_bytes is None else base_image(self.shape.base_bytes)
        size = geometry.data_offset_bytes + self.shape.storage_chunks * geometry.chunk_size_bytes
        self.image = bytearray((_FOREIGN * (size // len(_FOREIGN) + 1))[:size])
        self._format()
        self.oracle = Oracle(geometry.virtual_size_bytes, self.base)
        self.requests_done = 0
        self.in_flight: dict[int, Guest] = {}
        self._cookies = 0
        self.device: SimulatedDevice
        self.engine: Any
        self.clock_ns = 0
        self.failed_at = NEVER
        self._awaited = ""
        self.exhausted = False  # writes may fail with ENOSPC
        self.cancelled = False  # requests may fail with ESHUTDOWN
        self.open()

    # --- the disk's life ------------------------------------------------------------------------------------------

    def _format(self) -> None:
        geometry = self.geometry
        start = geometry.journal_offset_bytes
        self.image[start : start + geometry.journal_size_bytes] = bytes(geometry.journal_size_bytes)
        position = journal.page_offset_bytes(geometry, 1)
        self.image[position : position + 4096] = journal.first_page(geometry, self.uuid)
        items: Any
        for kind, items in ((maps.MapKind.BITMAP, maps.empty_bitmap(geometry)), (maps.MapKind.TABLE, maps.empty_table(geometry))):
            if items is None:
                continue
            raw = maps.encode_pages(geometry, kind, items, self.uuid, 0, maps.map_pages(geometry, kind)).tobytes()
            offset = maps.map_offset_bytes(geometry, kind)
            self.image[offset : offset + len(raw)] = raw

    def load(self, image: bytearray) -> tuple[Any, ...]:
        """Recovery from an image: the maps, the journal's state, the dirty pages and the slots in use. Raises Corrupt."""
        geometry = self.geometry
        bitmap = maps.decode_bitmap(geometry, bytes(image[geometry.bitmap_offset_bytes :][: geometry.bitmap_size_bytes]), self.uuid)
        table = maps.decode_table(geometry, bytes(image[geometry.table_offset_bytes :][: geometry.table_size_bytes]), self.uuid)
        ring = np.frombuffer(bytes(image[geometry.journal_offset_bytes :][: geometry.journal_size_bytes]), np.uint8)
        state, dirty_bitmap, dirty_table = journal.replay(geometry, self.uuid, ring, bitmap, table)
        used = maps.check_maps(geometry, bitmap, table, self.base is not None)
        return bitmap, table, state, dirty_bitmap, dirty_table, used

    def make_engine(self, *, read_only: bool = False) -> Any:
        """An engine on what the storage holds now."""
        bitmap, table, state, dirty_bitmap, dirty_table, used = self.load(self.image)
        shape = self.shape
        return Engine(
            self.geometry,
            uuid=self.uuid,
            bitmap=bitmap,
            table=table,
            used_slots=used,
            journal_state=state,
            dirty_bitmap_pages=dirty_bitmap,
            dirty_table_pages=dirty_table,
            storage_size_bytes=len(self.image),
            base_size_bytes=shape.base_bytes,
            align_bytes=shape.logical_block_bytes,
            read_only=read_only,
            cache_mode=shape.cache_mode,
            on_full=shape.on_full,
            low_water_bytes=shape.low_water_chunks * self.geometry.chunk_size_bytes,
            discard=shape.discard,
        )

    def open(self) -> None:
        shape = self.shape
        self.engine = self.make_engine()
        self.device = SimulatedDevice(self.image, self.base, shape.logical_block_bytes, self.dice)
        self.device.fault = self._fault
        self.device.slow_share = shape.slow_share
        self.device.stuck_share = shape.stuck_share
        self.failed_at = NEVER
        self.exhausted = self.cancelled = False

    def _name(self, operation: Operation) -> str:
        if operation.kind == READ:
            return "base" if operation.target == BASE else "read"
        if operation.kind == WRITE:
            if operation.offset_bytes >= self.geometry.data_offset_bytes:
                return "write"
            return "journal" if operation.offset_bytes < self.geometry.bitmap_offset_bytes else "map"
        return "flush" if operation.kind == FLUSH else "discard"

    def _fault(self, operation: Operation) -> int:
        rate = self.shape.fault_rate
        if rate and self.dice.random() < rate:
            kind = self._name(operation)
            # Failures that are remembered end most of a world: they are rarer than the others.
            if kind in self.shape.faults and (kind not in STICKY or self.dice.random() < 0.1):
                return _EIO
        return 0

    def _note_failure(self, operation: Operation, result: int) -> None:
        """From the first flush or metadata write that failed, the oracle expects no flush to succeed."""
        if result and self._name(operation) in STICKY:
            self.failed_at = min(self.failed_at, self.oracle.tick())

    def _pump(self) -> None:
        self.device.submit(self.engine.take_operations())
        for cookie, error in self.engine.take_done():
            self._finished(self.in_flight.pop(cookie), error)

    def step(self) -> bool:
        """One device event. False when nothing is pending."""
        self._pump()
        if not self.device.pending:
            return False
        self.deliver(self.device.step())
        return True

    def deliver(self, ended: Operation | None) -> None:
        """Hand a completed operation of the device to the engine, and take what comes of it."""
        if ended is not None:
            self._note_failure(ended, ended.result)
            self.engine.complete_operation(ended.token, ended.result)
        self._pump()

    def submit(self, kind: str, first_sector: int, sectors: int, *, fua: bool = False, no_hole: bool = False) -> int:
        """Hand one request to the engine. Returns its cookie; it is in `in_flight` until it is done."""
        self._cookies += 1
        geometry = self.geometry
        guest = Guest(kind, None, first_sector=first_sector, fua=fua, growable=len(self.image) < geometry.max_storage_size_bytes)
        offset, length = first_sector * SECTOR_BYTES, sectors * SECTOR_BYTES
        number = REQUEST_FLUSH
        skew = self.dice.choice((1, 8, 512)) if self.shape.skew_share and self.dice.random() < self.shape.skew_share else 0
        flags = (FUA if fua else 0) | (NO_HOLE if no_hole else 0)
        if kind == "read":
            number = REQUEST_READ
            guest.memory = Memory(length, b"\xee" * length, skew)
            guest.began = self.oracle.tick()
        elif kind == "write":
            number = REQUEST_WRITE
            stamp, guest.write = self.oracle.begin_write(first_sector, sectors)
            guest.memory = Memory(length, stamped(stamp, first_sector, sectors), skew)
        elif kind == "zero":
            number = REQUEST_ZERO
            _, guest.write = self.oracle.begin_write(first_sector, sectors, zero=True)
        elif kind == "trim":
            number = REQUEST_TRIM
            # Without a base whole blocks are promised to read as zeros; the rest may be ignored.
            per_block = geometry.block_size_bytes // SECTOR_BYTES
            low, high = -(-first_sector // per_block) * per_block, (first_sector + sectors) // per_block * per_block
            if first_sector + sectors == self.oracle.sectors:
                high = self.oracle.sectors  # the last block is whole though it is short
            if self.base is None and low < high:
                _, guest.write = self.oracle.begin_write(low, high - low, zero=True)
            else:
                _, guest.write = self.oracle.begin_write(first_sector, sectors, zero=True, advisory=True)
        else:
            offset = length = 0
            guest.began = self.oracle.begin_flush()
        self.in_flight[self._cookies] = guest
        self.engine.submit_request(number, offset, length, guest.memory.address if guest.memory else 0, self._cookies, flags)
        return self._cookies

    def _finished(self, guest: Guest, error: int) -> None:
        self.requests_done += 1
        shape = self.shape
        expected = (
            (error == _ESHUTDOWN and self.cancelled)
            or (error == _ENOSPC and self.exhausted and guest.growable)
            or (error == _EIO and shape.fault_rate)
        )
        if error and not expected:
            raise Violation(f"{guest.kind} at sector {guest.first_sector} failed with {error}")
        if guest.kind == "read":
            if error == 0 and guest.memory is not None:
                self.oracle.check_read(guest.first_sector, guest.began, guest.memory.content())
        elif guest.kind == "flush":
            if shape.cache_mode != "unsafe":
                if error == 0 and guest.began > self.failed_at:
                    raise Violation("a flush succeeded after the device had failed one")
                self.oracle.end_flush(guest.began, error == 0)
        elif guest.kind != "close":
            durable = shape.cache_mode in ("writethrough", "directsync") or (guest.fua and shape.cache_mode != "unsafe")
            if guest.write is not None:
                self.oracle.end_write(guest.write, error == 0, durable)

    # --- random play ----------------------------------------------------------------------------------------------

    def random_request(self) -> None:
        dice = self.dice
        shape = self.shape
        total = min(self.oracle.sectors, shape.hot_sectors or self.oracle.sectors)
        kinds = shape.kinds
        kind = dice.choices(list(kinds), list(kinds.values()))[0]
        unit = shape.logical_block_bytes // SECTOR_BYTES if dice.random() < 0.6 else 1
        sectors = max(1, min(dice.randint(1, shape.largest_sectors), total))
        first = dice.randint(0, total - sectors)
        if kind == "rewrite":
            first = dice.randint(0, min(total - 1, 64))
            sectors = min(sectors, 16, total - first)
        if kind in ("trim", "zero") and dice.random() < 0.6:
            per = dice.choice((self.geometry.block_size_bytes, self.geometry.chunk_size_bytes)) // SECTOR_BYTES
            first = first // per * per
            sectors = min(per * dice.randint(1, 3), self.oracle.sectors - first)
        if unit > 1:
            first = first // unit * unit
            sectors = max(min(sectors // unit * unit or unit, total - first), 1)
        fua = kind == "fua" or (kind in ("trim", "zero", "write") and dice.random() < 0.1)
        name = "write" if kind in ("fua", "rewrite") else kind
        self.submit(name, first, sectors, fua=fua, no_hole=kind == "zero" and dice.random() < 0.3)

    def grow(self) -> None:
        """One more step of storage."""
        geometry = self.geometry
        limit = geometry.max_storage_size_bytes
        if len(self.image) < limit:
            self.device.grow(min(len(self.image) + geometry.grow_step_bytes, limit), _FOREIGN)
            self.engine.set_storage_size(len(self.image))

    def play(self, requests: int) -> None:
        """Submit and complete in random order; the caller ends it with a crash or a close."""
        dice = self.dice
        for _ in range(requests):
            if self._awaited and any(op.took_effect and self._name(op) == self._awaited for op in self.device.pending):
                break
            self.random_request()
            if dice.random() < 0.02:
                self.clock_ns += 10_000_000_000
                self.engine.advance_clock(self.clock_ns)
            if dice.random() < 0.05:
                self.grow()
            elif dice.random() < 0.05:
                self.set_exhausted(dice.random() < 0.7)
            elif dice.random() < 0.01:
                self.cancelled = True
                self.engine.cancel_all_waiting(-_ESHUTDOWN)
            elif dice.random() < 0.01:
                self.engine.commit_soon()
            while len(self.in_flight) >= dice.randint(1, self.shape.depth):
                if not self.step():
                    break

    def play_until(self, awaited: str) -> None:
        """Play, with many flushes, until such an operation has taken effect and not completed: the moment when a crash asks most."""
        kinds, self.shape.kinds = self.shape.kinds, self.shape.kinds | {"flush": 3.0}
        self._awaited = awaited
        self.play(60)
        self._awaited = ""
        self.shape.kinds = kinds

    def set_exhausted(self, exhausted: bool) -> None:
        self.exhausted |= exhausted and self.shape.on_full == "error"
        self.engine.set_exhausted(exhausted)

    def settle(self) -> None:
        """Faults stop; everything under way must end."""
        self.device.fault = None
        while True:
            while self.step():
                pass
            if not self.in_flight:
                break
            waiting = self.engine.waiting_writes
            if waiting == 0:
                raise Violation(f"{len(self.in_flight)} requests never end: {[g.kind for g in self.in_flight.values()]}")
            if len(self.image) >= self.geometry.max_storage_size_bytes:
                raise Violation("writes wait for space though the storage has its greatest size")
            self.grow()
        leaks = self.engine.leaks()
        if leaks:
            raise Violation(f"leaked: {leaks}")

    def begin_close(self) -> None:
        self._cookies += 1
        self.cancelled = True  # writes that wait for space end
        self.in_flight[self._cookies] = Guest("close", None)
        self.engine.submit_request(REQUEST_CLOSE, 0, 0, 0, self._cookies)

    def close(self, *, at_once: bool = False) -> None:
        """Close the disk and open it again; `at_once`: while requests are still under way."""
        if not at_once:
            self.settle()
        self.begin_close()
        while self.step():
            pass
        if self.in_flight:
            raise Violation(f"close never ends: {[g.kind for g in self.in_flight.values()]}")
        if leaks := self.engine.leaks():
            raise Violation(f"leaked: {leaks}")
        failed = self.engine.failed_errno
        # A closed disk is durable as a whole, whatever the cache mode.
        if not failed:
            self.oracle.end_flush(self.oracle.begin_flush(), True)
        self.image = self.device.crash()
        if not failed and not self.load(self.image)[2].clean:
            raise Violation("a closed disk is not clean")
        self._reopen()

    def crash_while_closing(self) -> None:
        self.begin_close()
        for _ in range(self.dice.randint(0, 30)):
            self.step()
        self.crash()

    def crash(self) -> None:
        self.image = self.device.crash()
        self.in_flight.clear()
        self._reopen()

    def _reopen(self) -> None:
        if self.dice.random() < 0.1:
            self._reopen_read_only()
        self.open()
        self.check_storage()
        self.oracle.settle_after_crash(self.read_all())

    def _reopen_read_only(self) -> None:
        """A read-only open shows what a writable one does, and writes nothing."""
        self.engine = self.make_engine(read_only=True)
        before = bytes(self.image)
        self.device = SimulatedDevice(self.image, self.base, self.shape.logical_block_bytes, self.dice)
        shown = self.read_all()
        if self.image != before:
            raise Violation("a read-only disk was written to")
        self.open()
        if self.read_all() != shown:
            raise Violation("read-only and writable opens show different data")

    def read_all(self) -> bytes:
        size = self.geometry.virtual_size_bytes
        memory = Memory(size, b"\xee" * size)
        fault, self.device.fault = self.device.fault, None
        self.engine.submit_request(REQUEST_READ, 0, size, memory.address, 0)
        done: list[tuple[int, int]] = []
        while not done:
            self.device.submit(self.engine.take_operations())
            ended = self.device.step() if self.device.pending else None
            if ended is not None:
                self.engine.complete_operation(ended.token, ended.result)
            done = self.engine.take_done()
        self.device.fault = fault
        if done[0][1]:
            raise Violation(f"reading the whole disk failed: {done}")
        return memory.content()

    def check_storage(self) -> None:
        """No slot is leaked: as many are in use as the table names."""
        _, table = self.engine.snapshot_maps()
        if table is not None:
            named = int((table != 0xFFFFFFFF).sum())
            if named != self.engine.used_slots_count:
                raise Violation(f"{self.engine.used_slots_count} slots in use, {named} in the table")


def run(seed: int, rounds: int = 6) -> int:
    """One world from its seed. Returns the number of guest requests. Raises Violation, or whatever the engine raises."""
    world = World(seed)
    for _ in range(rounds):
        world.play(world.dice.randint(1, world.shape.longest_round))
        ending = world.dice.random()
        if ending < 0.55:
            if world.shape.crash_at:
                world.play_until(world.shape.crash_at)
            world.crash()
        elif ending < 0.65:
            world.crash_while_closing()
        elif ending < 0.8:
            world.close()
        elif ending < 0.87:
            world.close(at_once=True)
        else:
            world.settle()
            if world.engine.failed_errno:
                world.crash()
    return world.requests_done
