# SPDX-License-Identifier: Apache-2.0
"""One disk's life on the simulated device: random requests, faults, growth, crashes, kills, closes and reopens, judged at every turn.

Everything follows from one seed. Provision, recovery, check and the engine are the production code, unmodified.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Any

import numpy as np

from fvd.disk.engine_factory import engine_on
from fvd.disk.loading import LoadedDisk, covers_base
from fvd.disk.pending import FoundLog
from fvd.disk.provision import write_disk
from fvd.disk.recovery import recover_disk
from fvd.engine._engine import ExtentState, Want
from fvd.errors import DeviceError, NotFound
from fvd.format import maps, pending
from fvd.format.pending import LogIdentity
from fvd.format.superblock import BaseReference, Superblock
from fvd.inspect.check import check_node
from fvd.modes import DIRECT_CACHE_MODES
from fvd.sim._base import base_content
from fvd.sim._device import SimulatedDevice
from fvd.sim._oracle import SECTOR_BYTES, Oracle, Violation
from fvd.sim._player import READ, TRIM, WRITE, ZERO, Player
from fvd.sim._ring_guest import RingGuest
from fvd.sim._rng import Rng
from fvd.sim.agenda import SECOND_NS
from fvd.sim.copies import TICK_NS, Copies
from fvd.sim.corners import draw_corner
from fvd.sim.device_node import Budget, DeviceNode, PowerFailure, VolatileNode
from fvd.sim.growing import REST_SECONDS_MAX, Place
from fvd.sim.metadata import Metadata
from fvd.sim.shape import (
    Shape,
    draw,
    draw_bounds,
    draw_copying,
    draw_durable,
    draw_growth,
    draw_log,
    draw_placement,
    draw_ring,
    draw_weather,
    draw_zeroing,
)
from fvd.storage.policy import guest_reserve_bytes
from fvd.volume.name import VolumeName, parse_name

FOREIGN = b"\xf0FOREIGN"  # what the storage held before it was ours: must never be seen
SHAPE, EVENTS, ROUNDS, REQUESTS, COPYING, PLACEMENT, ZEROING, GROWTH, STORAGE, STEERING = range(1, 11)  # streams of a seed
WEATHER = 40
LOG, DURABLE = 20, 21
BOUNDS, RING = 37, 38
CORNER, ENDING, TAKEN = 30, 31, 32
_VAST_BYTES = 1 << 30
SAMPLED = True  # whoever serves a disk through a page cache has a second open file that hears what the first is not told
NAME: VolumeName = parse_name("file:/simulated")


class LogInMemory:
    """The memory of a log (`fvd.disk.pending.LogMemory`)."""

    def __init__(self, size_bytes: int) -> None:
        self.buffer = memoryview(bytearray(size_bytes))

    def close(self) -> None:
        pass


def shape_of(seed: int) -> Shape:
    """The shape of a seed's world."""
    corner = draw_corner(Rng(seed, CORNER))
    shape = corner or draw(Rng(seed, SHAPE))
    draw_placement(shape, Rng(seed, PLACEMENT))
    if corner is None:
        draw_copying(shape, Rng(seed, COPYING))
        draw_zeroing(shape, Rng(seed, ZEROING))
        draw_growth(shape, Rng(seed, GROWTH))
        draw_weather(shape, Rng(seed, WEATHER))
        draw_durable(shape, Rng(seed, DURABLE))
        draw_ring(shape, Rng(seed, RING))
    draw_log(shape, Rng(seed, LOG))
    draw_bounds(shape, Rng(seed, BOUNDS))
    return shape


class World:
    """`events` chooses another order of events for the same requests."""

    def __init__(self, seed: int, shape: Shape | None = None, *, events: int = 0, log: list[str] | None = None) -> None:
        self.seed = seed
        self.log = log
        self.shape = shape or shape_of(seed)
        self.rng = Rng(seed, EVENTS, events)
        geometry = self.geometry = self.shape.geometry
        initial_bytes = geometry.data_offset_bytes + self.shape.storage_chunks * geometry.chunk_size_bytes
        self.greatest_bytes = min(geometry.max_storage_size_bytes, initial_bytes + _VAST_BYTES) + self.shape.surplus_bytes
        whole = initial_bytes >= geometry.max_storage_size_bytes
        initial_bytes += self.shape.surplus_bytes if whole else self.shape.surplus_bytes % geometry.chunk_size_bytes
        self.device = SimulatedDevice(
            self.greatest_bytes,
            self.shape.logical_block_bytes,
            self.rng,
            base_bytes=self.shape.base_bytes,
            regions=(geometry.journal_offset_bytes, geometry.bitmap_offset_bytes, geometry.data_offset_bytes),
        )
        self.device.zeroes = self.shape.device_zeroes
        self.filler = FOREIGN if self.shape.windows is None else b""
        self.device.grow(initial_bytes, self.filler)
        base = None if self.shape.base_bytes is None else BaseReference("/base", self.shape.base_bytes)
        self.superblock = Superblock(geometry, self.rng.randbytes(16), 2, base, 0)
        write_disk(self.node(), self.superblock)
        self.oracle = Oracle(geometry.virtual_size_bytes, self.shape.base_bytes, self.shape.windows)
        self.requests_before = 0
        self.log_memory: LogInMemory | None = None  # outlives a killed process, not a power failure
        self.log_generation = 0
        self.killed = False  # the life before ended so
        self.metadata = Metadata(self.device.image, self.superblock, remembering=self.shape.rot)
        self._watch_metadata()
        self.device.page_cache = self.shape.cache_mode not in DIRECT_CACHE_MODES
        growth = self.shape.allocator
        self.place: Place | None = None
        """Where the storage grows by the real allocator; None: `grow` does it."""
        if growth is not None:
            self.place = Place(self.device, geometry, growth, Rng(seed, STORAGE, events), self.filler, self.say)
        self.copies: Copies | None = None
        """Where the real steering makes the copies; None: the rng do."""
        if self.shape.steered and self.shape.base_bytes is not None:
            self.copies = Copies(self.device, geometry, self.shape.base_bytes, Rng(seed, STEERING, events), self.say)
        self.device.told_once, self.device.fua, self.device.sampler = self.shape.told_once, self.shape.fua, SAMPLED
        self.engine: Any
        self.player: Player
        self.ring: RingGuest | None = None
        """The guest whose requests go through a ring in its memory."""
        self._ring_rng = Rng(seed, RING, events)
        self.open()
        self._begin_ring()

    def _watch_metadata(self) -> None:
        self.device.announce, self.device.inspect = self.metadata.announce, self.metadata.inspect
        self.device.conclude = self.metadata.conclude

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
        return DeviceNode(self.device, direct=self.shape.cache_mode in DIRECT_CACHE_MODES)

    def make_engine(self, *, read_only: bool = False) -> Any:
        """An engine on what the storage holds now, recovered as an open does. Raises FvdError."""
        disk: LoadedDisk = recover_disk(self.node(), read_only=read_only, pending_log=self.found_log())
        if not read_only and not disk.journal_state.clean and self.device.volatile_blocks:
            raise Violation("a writable open goes on from what a crash may still take back (R13)")
        # A base that is not needed is not opened.
        self.device.base_closed = covers_base(disk.superblock, disk.bitmap)
        if self.copies is not None and self.copies.gone and not self.device.base_closed:
            raise NotFound("the disk needs its base again, which had been given up")
        self.metadata.begin(disk)
        shape, geometry = self.shape, self.geometry
        if self.place is None:
            mark_bytes = shape.low_water_chunks * geometry.chunk_size_bytes
            reserve_bytes = mark_bytes // 2
        else:
            mark_bytes = self.place.low_water_bytes
            reserve_bytes = guest_reserve_bytes(geometry, mark_bytes)
        return engine_on(
            disk,
            base_size_bytes=shape.base_bytes,
            align_bytes=shape.logical_block_bytes,
            read_only=read_only,
            cache_mode=shape.cache_mode,
            on_full=shape.on_full,
            wake_below_bytes=mark_bytes,
            guest_reserve_bytes=reserve_bytes,
            discard=shape.discard,
            zero_chunks=shape.zero_chunks,
            bounce_limit_bytes=shape.bounce_limit_bytes,
            copy_on_read=shape.copy_on_read or (shape.copying and not read_only and self.rng.random() < 0.7),
            copy_limit_bytes=shape.copy_limit_bytes,
            base_timeout_ns=shape.base_timeout_ns,
            pending_log=None if read_only else self.begin_log(disk),
            discards_max=shape.discards_max,
            discard_bytes=shape.discard_bytes,
            first_discard_bytes=shape.first_discard_bytes,
            request_window=shape.request_window,
            commit_limit_bytes=shape.commit_limit_bytes,
            durable_writes=shape.durable_writes,
        )

    def found_log(self) -> FoundLog | None:
        """What the process before has left of the log of its pending changes."""
        if self.log_memory is None:
            return None
        return FoundLog(self.log_memory, pending.read(self.log_memory.buffer, self.geometry, self._log_identity()))

    def begin_log(self, disk: LoadedDisk) -> memoryview | None:
        """A writable open's log: what was there before is believed no more."""
        self.log_generation += 1
        if not self.shape.log:
            return None
        capacity = pending.capacity_min(self.geometry) if self.shape.short_log else pending.capacity_for(self.geometry)
        self.log_memory = LogInMemory(pending.size_bytes(capacity))
        pending.lay_out(self.log_memory.buffer, capacity, self._log_identity(), disk.journal_state.map_hash)
        return self.log_memory.buffer

    def _log_identity(self) -> LogIdentity:
        return LogIdentity(self.superblock.uuid, self.log_generation, bytes(16), bytes(16), "the simulated disk")

    def open(self, *, read_only: bool = False) -> None:
        """A new life. Faults come with `start_faults`."""
        if self.place is not None:
            self.place.end_life(power=False)
        engine = self.make_engine(read_only=read_only)
        if hasattr(self, "player"):
            self.requests_before += self.player.requests_done
        self.device.fault = None
        self.device.set_faults(self.shape.advice)
        self.device.fail_number = 0
        self.device.fail_with = self.shape.fail_with
        self.device.set_slow(self.shape.slow)
        self.device.set_weather(eviction=self.shape.eviction_share, landing=self.shape.landing_share)
        self.device.set_workers(self.shape.workers)
        self.device.stuck_share = self.shape.stuck_share
        self.device.torn_share = self.shape.torn_share
        self.device.overtaking_share = self.shape.overtaking_share
        self.engine = engine
        self.player = Player(
            self.engine,
            self.device,
            self.oracle,
            self.rng,
            geometry=self.geometry,
            base_bytes=self.shape.base_bytes,
            cache_mode=self.shape.cache_mode,
        )
        self.player.log = self.log
        self.player.discards_max, self.player.discard_bytes = self.shape.discards_max, self.shape.discard_bytes
        self.player.mapped = self.metadata.mapped
        self.player.fails_when_full = self.shape.on_full == "error"
        self.player.attend = self._attend
        if self.copies is not None:
            self.copies.end_life()
            if not read_only and not self.device.base_closed:
                self.player.attended |= Want.STEER | Want.BASE
                self.copies.begin_life(engine)
        if self.place is not None and not read_only:
            self.player.attended |= Want.GROWTH
            self.place.begin_life(engine, self.player, engine.storage_size_bytes)
        if self.copies is not None:
            return
        if self.shape.copying and not read_only and self.rng.random() < 0.8:
            self._steer_copies(self.rng)
        if self.shape.eager and not read_only:
            engine.prefetch_idle_ns, engine.prefetch_depth, engine.prefetch_rate_bytes = 0, 8, 0
            engine.prefetch_plan([(first * SECTOR_BYTES, count * SECTOR_BYTES) for first, count in self.shape.areas])
        if self.shape.prefetch and self.shape.base_bytes is not None and not read_only:
            engine.prefetch_idle_ns, engine.prefetch_depth = 0, 4
            engine.prefetch_plan([(0, self.shape.base_bytes)])

    def start_faults(self, rates: Mapping[str, float], *, one: bool = False) -> None:
        """From now on operations fail: by rate, and one that is chosen now."""
        self.device.fail_with = self.shape.fail_with
        self.device.set_faults({**rates, **self.shape.advice})
        if one:
            self.device.fail_number = self.device.submitted + self.rng.randint(1, 200)
        shape = self.shape
        self.device.set_weather(writeback=shape.writeback_share, eviction=shape.eviction_share, landing=shape.landing_share)
        self.player.errors_expected = True

    def stop_faults(self) -> None:
        self.device.set_faults({})
        self.device.set_weather(eviction=self.shape.eviction_share, landing=self.shape.landing_share)
        self.device.fault = None
        self.device.fail_number = 0

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

    def _attend(self) -> None:
        """What the engine wants of a driver's Python side, one thing at a time."""
        if self.copies is not None and self.engine.want & self.player.attended & (Want.STEER | Want.BASE):
            self.copies.attend()
        elif self.place is not None:
            self.place.attend()

    def grow(self) -> bool:
        """One more step of storage. False when there is no more."""
        limit = self.greatest_bytes
        if self.device.size_bytes >= limit:
            return False
        self.device.grow(min(self.device.size_bytes + self.geometry.grow_step_bytes, limit), self.filler)
        self.engine.want &= ~Want.GROWTH
        self.engine.set_storage_size(self.device.size_bytes)
        self.say(f"storage grows to {self.device.size_bytes}")
        return True

    def set_exhausted(self, exhausted: bool) -> None:
        self.player.exhausted |= exhausted and self.shape.on_full == "error"
        self.engine.set_exhausted(exhausted)
        self.say("storage cannot grow" if exhausted else "storage can grow again")

    def on_side(self, rng: Rng) -> None:
        """What happens beside requests: time, growth, an impatient administrator."""
        pick = rng.random()
        if pick < 0.15:
            self.device.advance(10_000_000_000)
            self.say("ten seconds pass")
        elif pick < 0.35 and (self.place is not None or self.copies is not None):
            self.pass_time(rng.choice((0.003, 0.3, 2.0, 30.0)), rng)
        elif pick < 0.85 and self.place is not None:
            self.place.disturb(rng)
            self.player.exchange()
            self.place.check()
        elif pick < 0.5:
            if self.shape.growth == "ready" or (self.shape.growth == "late" and rng.random() < 0.2):
                self.grow()
        elif pick < 0.85:
            self.set_exhausted(rng.random() < 0.7)
        elif pick < 0.92:
            self.player.cancelled = True
            self.say("writes that wait for storage are cancelled")
            self.engine.cancel_all_waiting(errno.ESHUTDOWN)
        else:
            self.engine.commit_soon()
        if self.shape.copying and rng.random() < 0.3:
            if self.copies is None:
                self._steer_copies(rng)
            else:
                self.copies.disturb(rng)
        if self.shape.outsider and rng.random() < 0.3 and (error := self.device.ask()):
            self.say(f"somebody else is told of what was lost: {error}")

    def pass_time(self, seconds: float, rng: Rng) -> None:
        """So much of it, and what is planned comes at its time."""
        end_ns = self.device.now_ns + round(seconds * SECOND_NS)
        self.say(f"{seconds} s pass")
        while True:
            next_ns = self.device.now_ns + TICK_NS if self.copies is not None else end_ns + 1
            if self.place is not None:
                next_ns = min(next_ns, self.place.agenda.next_ns)
            if next_ns > end_ns:
                break
            self.device.advance(max(0, next_ns - self.device.now_ns))
            self.player.exchange()
            for _ in range(rng.randint(0, 3)):
                self.player.step()
        self.device.advance(max(0, end_ns - self.device.now_ns))
        self.player.exchange()

    def _steer_copies(self, rng: Rng) -> None:
        """Somebody switches copy-on-read, or wants something of the base prefetched, or no longer."""
        engine = self.engine
        pick = rng.random()
        if pick < 0.2:
            engine.copy_on_read = not engine.copy_on_read
            self.say(f"copy-on-read is {'on' if engine.copy_on_read else 'off'}")
        elif pick < 0.3:
            engine.prefetch_plan([])
            self.say("prefetching ends")
        else:
            engine.prefetch_idle_ns = rng.choice((0, 0, 0, 1_000_000, 20_000_000))
            engine.prefetch_depth = rng.choice((0, 1, 2, 8))
            engine.prefetch_rate_bytes = rng.choice((0, 0, 0, 100_000, 10_000_000))
            plan = []
            whole = rng.random() < 0.4
            for first, count in self.shape.areas:
                start = 0 if whole else rng.randint(0, count - 1)
                plan.append(((first + start) * SECTOR_BYTES, (count if whole else rng.randint(1, count - start)) * SECTOR_BYTES))
            engine.prefetch_plan(plan)
            self.say(f"prefetch {plan} with {engine.prefetch_depth} slots")

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
            if self.place is not None:
                if not self.place.healed and self.rng.random() < 0.5:
                    self.pass_time(40.0, self.rng)  # the longest rest between two steps has begun
                else:
                    self.place.wait_for_space()
            elif not self.grow():
                raise Violation("writes wait for space though the storage has its greatest size")
        if self.place is not None and self.rng.random() < 0.3:
            self._settle_growth(self.place)
        if self.copies is not None and not self.engine.failed_errno and self.shape.windows is None and self.rng.random() < 0.5:
            self.finish_copies(self.copies)
        self._check_leaks()
        self._check_wants()
        if not self.engine.failed_errno and self.rng.random() < 0.5:
            self.engine.commit_soon()  # slots that were trimmed are free only then
            player.drain()
            if not self.engine.failed_errno:  # its flush may be the one that hears of a page that was lost
                self._check_slots()

    def _settle_growth(self, place: Place) -> None:
        """There is space, and time: in the end nobody wants more storage than there is."""
        place.heal()
        while not place.satisfied:
            place.go_on(REST_SECONDS_MAX)
            self.player.drain()
        place.check()

    def finish_copies(self, copies: Copies) -> None:
        """The guest is quiet until all of the base has been copied, and is given up."""
        grows = self.place is not None or self.shape.growth != "never"
        if self.place is not None:
            self.place.heal()

        def tick() -> None:
            self.device.advance(TICK_NS)
            self.player.drain()
            if self.place is None and grows and self.engine.want & Want.GROWTH:
                self.grow()

        copies.finish(tick, grows=grows)

    def _check_wants(self) -> None:
        """Whoever grows the storage and tells of failures does so only when asked."""
        engine = self.engine
        if engine.failed_errno and not engine.want & Want.EVENT:
            raise Violation("the engine has failed and does not say so")
        if self.place is not None:
            self.place.check()
            return
        free_bytes = engine.free_slots * self.geometry.chunk_size_bytes
        short = engine.waiting_writes or free_bytes < engine.wake_below_bytes
        if short and self.geometry.table_entries and engine.capacity_slots < self.geometry.chunks and not engine.want & Want.GROWTH:
            raise Violation(f"{engine.waiting_writes} writes wait, {engine.free_slots} slots are free, and no growth is asked for")

    def _check_slots(self) -> None:
        """With nothing under way and nothing pending: slots in use are those that the table names."""
        engine = self.engine
        _, table = engine.snapshot_maps()
        if table is None:
            return
        self.check_lost_slots()
        named = int(np.count_nonzero(np.asarray(table) != maps.EMPTY))
        if named != engine.used_slots_count or engine.capacity_slots - named != engine.free_slots:
            raise Violation(
                f"{engine.used_slots_count} slots in use and {engine.free_slots} of {engine.capacity_slots} free, {named} in the table"
            )

    def check_lost_slots(self) -> None:
        """Whatever is under way."""
        if lost := self.engine.lost_slots:
            raise Violation(f"{lost} slots are in use, and nothing knows of them")

    def _check_leaks(self) -> None:
        self.check_lost_slots()
        if leaks := self.engine.leaks():
            raise Violation(f"leaked: {leaks}")
        most = self.engine.statistics()["most_discards_in_flight"]
        if most > self.shape.discards_max:
            raise Violation(f"{most} discards were in flight at once, {self.shape.discards_max} may be (R31)")

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
        if self.place is not None:
            self.place.close()
        failed = self.engine.failed_errno
        if not failed:
            # A closed disk is durable as a whole, whatever the cache mode.
            self.oracle.end_flush(self.oracle.begin_flush(), True)
        self.say("closed; power fails")
        self.log_memory = None
        self.device.crash()
        if not failed and not recover_disk(self.node(), read_only=True).journal_state.clean:
            raise Violation("a closed disk is not clean")
        self.reopen()

    def stop_disk(self, rng: Rng) -> None:
        """Its storage has become somebody else's: the engine is stopped in the midst of it all, and goes on being asked (R39)."""
        self.say("the disk is stopped")
        player = self.player
        player.show_answers()
        player.attended = 0
        player.stopped = True
        self.engine.stop()
        player.exchange()
        for _ in range(rng.randint(0, 20)):
            kind = rng.choice(("read", "write", "flush", "trim", "zero"))
            first, count = rng.choice(self.shape.areas)
            unit = self.geometry.block_size_bytes // SECTOR_BYTES
            first, count = (0, 0) if kind == "flush" else (first // unit * unit, min(count, unit))
            self.submit(kind, first, count)
            player.exchange()
            self.step()
        self.stop_faults()
        player.drain()
        if player.in_flight_count:
            raise Violation(f"requests of a disk that was stopped never end: {sorted(set(self.in_flight.values()))}")
        self._check_leaks()
        if rng.random() < 0.5:
            self.crash()
        else:
            self.kill()

    def crash_while_closing(self) -> None:
        self.begin_close()
        for _ in range(self.rng.randint(0, 30)):
            self.step()
        self.crash()

    def crash(self) -> None:
        """Power fails; the disk is opened again."""
        self.cut_power()
        self.reopen()

    def cut_power(self) -> None:
        self.say("power fails")
        self.log_memory = None
        if self.place is not None:
            self.place.end_life(power=False)
        self.device.crash()
        self.player.abandon()

    def kill(self) -> None:
        """The process dies, another one opens the disk, dies while it does so, and so on.

        With a log everything acknowledged is there, and the client sends again what was not answered. Without one, or if blocks were lost,
        what was acknowledged and not flushed is as it is seen now, or lost later.
        """
        self.killed = True
        self.say("the process is killed")
        whole = self.log_memory is not None and not self.engine.failed_errno and not self.device.lost and not self.device.report
        unanswered = self.player.unanswered() if whole and self.shape.resends else []
        self.stop_faults()
        if self.place is not None:
            self.place.end_life(power=True)
        self.device.kill()
        ring, in_ring = self.ring, self.player.in_ring()
        if ring is not None:
            ring.die()
        self.player.abandon()
        lives, refused = self._die_while_opening()
        whole = whole and not refused
        if not lives:
            self.oracle.outlive_kill(sent_again=self.shape.resends) if whole else self.oracle.survive_kill()
            self.log_memory = None
            self.say("power fails")
            self.device.crash()
            self.reopen()
            return
        try:
            self.open()
        except DeviceError as error:
            # What was lost since anybody asked is told to the first open; the second finds what is left.
            self.say(f"refused: {error}")
            whole = False
            self.open()
        self.oracle.outlive_kill(sent_again=self.shape.resends) if whole else self.oracle.survive_kill()
        self.device.end_landing()
        self.check()
        shown = self.read_all()
        if whole:
            self._judge_as_read(shown)
            self.player.send_again(unanswered)
        else:
            self.oracle.adopt_after_kill(shown)
        self._check_extents(shown)
        if whole and ring is not None and self.shape.resends:
            self.ring = ring
            self.player.take_up_ring(ring, in_ring)
        else:
            self._begin_ring()

    def _die_while_opening(self) -> tuple[bool, bool]:
        """Some who open the disk are killed at it, after any of their operations. Whether power is on afterwards; and whether one was
        refused: it was told of what was lost since anybody had asked, and the next one finds what is left."""
        refused = False
        for _ in range(self.rng.randint(0, self.shape.deaths) if self.shape.deaths else 0):
            # Recovery goes on from commits that nobody has looked at.
            self.device.inspect = self.device.announce = self.device.conclude = None
            try:
                budget = Budget(self.rng.randint(1, 8))
                recover_disk(VolatileNode(self.device, budget, direct=self.node().direct), read_only=False, pending_log=self.found_log())
            except PowerFailure:
                self.say("the next one is killed while it opens the disk")
            except DeviceError as error:
                self.say(f"refused: {error}")
                refused = True
            finally:
                self._watch_metadata()
            if self.rng.random() < 0.2:
                return False, refused
            self.device.kill()
        return True, refused

    def _judge_as_read(self, shown: bytearray) -> None:
        """Everything acknowledged is seen, as by a read that begins now."""
        at = 0
        for first, count in self.shape.windows or [(0, self.shape.sectors)]:
            self.oracle.check_read(first, self.oracle.begin_read(), bytes(shown[at : at + count * SECTOR_BYTES]))
            at += count * SECTOR_BYTES

    def _begin_ring(self) -> None:
        """A guest that begins with an empty ring, where there is one."""
        self.ring = RingGuest(self.shape.sectors, self._ring_rng) if self.shape.ring else None
        if self.ring is not None:
            self.player.use_ring(self.ring)

    def reopen(self) -> None:
        """Open after a crash: judge everything, and go on from there."""
        if self.rng.random() < 0.1:
            self._open_read_only()
        self.open()
        self.check()
        shown = self.read_all()
        self.oracle.settle_after_crash(shown)
        self._check_extents(shown)
        self._check_refusals(
            {WRITE: errno.ENOSPC, ZERO: errno.ENOSPC, TRIM: errno.EINVAL, READ: errno.EINVAL}, self.geometry.virtual_size_bytes - 512
        )
        self._begin_ring()

    def _open_read_only(self) -> None:
        """A read-only open shows what a writable one does, and writes nothing."""
        before = np.array(self.image)
        self.open(read_only=True)
        shown = self.read_all()
        self._check_refusals({WRITE: errno.EROFS, ZERO: errno.EROFS, TRIM: errno.EROFS}, 0)
        if not np.array_equal(self.image, before):
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
                if state == ExtentState.EXTENT_ZERO and part.any():
                    raise Violation(f"block status calls {length} bytes at {start} zeros, and they are not")
                if state == ExtentState.EXTENT_BASE and self.device.base_closed:
                    raise Violation(f"block status calls {length} bytes at {start} those of a base that is not needed")
                if state == ExtentState.EXTENT_BASE:
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
        report = check_node(self.node(), NAME)
        if report.errors:
            raise Violation(f"check: {'; '.join(report.errors)}")
        self._check_slots()
