# SPDX-License-Identifier: Apache-2.0
"""Growth in a world: storage whose steps take time, fail, lie and hang; somebody outside; the real Allocator between them and the engine.

Judged at every turn: what the storage is asked for, what the engine is told, what events tell. Knows neither requests nor the oracle.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from fvd.engine._engine import Want
from fvd.errors import DeviceError, FvdError, NoSpace, Timeout, Unsupported
from fvd.format.geometry import Geometry
from fvd.sim._device import SimulatedDevice
from fvd.sim._oracle import Violation
from fvd.sim._player import Player
from fvd.sim._rng import Rng
from fvd.sim.agenda import NEVER, SECOND_NS, Agenda, Workers
from fvd.sim.shape import Growth
from fvd.storage.allocator import Allocator
from fvd.storage.interfaces import Pool
from fvd.storage.policy import GrowthEvent, check_low_water, default_low_water_bytes, limit_size_bytes

UNIT_BYTES = 4096
# How long a write may have to wait once there is space, from the last step that brought some: the rest of a second, and a step of one. A
# group that is full is asked again after 8 s at the latest when it tells of free space.
WAIT_SECONDS_MAX, ASK_SECONDS_MAX = 6.0, 14.0
REST_SECONDS_MAX = 45.0  # while none waits, or after another failure where the group tells of free space: the rest is at most 30 s
PLENTY_BYTES = 1 << 40


class SimulatedStorage:
    """The storage of one life, as the allocator has it. Where it lies is the place's."""

    last_suspend_seconds: float | None = None

    def __init__(self, place: Place) -> None:
        self._place = place
        self.can_grow = place.shape.place != "fixed"
        self.notifies_space = place.shape.place == "group"
        self.closed = False
        self.target: int | None = None  # of the step that is under way
        self.helpless = False  # the last step did not bring what it was to bring, as far as can be seen
        self.began_ns = 0
        self.refused = False  # the last step found no space
        self.told = True  # the allocator knows how the last step has ended
        self._reached: int | None = None  # the target of the last step, when it has ended
        self._seconds = 0.001  # of the next step where each takes longer than the one before

    def size_bytes(self) -> int:
        return self._place.workers.wait(self._begin_look)

    def grow_to(self, size_bytes: int) -> None:
        self._place.workers.wait(lambda: self._begin_step(size_bytes))

    def pool(self) -> Pool | None:
        return self._place.workers.wait(self._begin_question)

    def close(self) -> None:
        self.closed = True

    def is_slow(self) -> bool:
        """Whether a step has taken longer than the allocator waits for one, as far as it knows."""
        place = self._place
        return not self.told and (place.now_ns - self.began_ns) / SECOND_NS >= place.shape.timeout_seconds

    def _begin_look(self) -> tuple[float | None, Callable[[], int]]:
        rng, trouble = self._place.rng, self._place.trouble

        def end() -> int:
            size = self._place.device.size_bytes
            fails = rng.random() < trouble * 0.2
            self.helpless |= self._reached is not None and (fails or size < self._reached)
            if fails:
                raise DeviceError("the size cannot be read")
            return size

        return 0.0 if rng.random() < 0.7 else self._place.moment(), end

    def _begin_question(self) -> tuple[float | None, Callable[[], Pool | None]]:
        place = self._place
        pick = place.rng.random()

        def end() -> Pool | None:
            if place.shape.place == "fixed" or pick < place.trouble * 0.1:
                return None
            if pick < place.trouble * 0.3:
                raise Timeout("the group does not say what it has left")
            return Pool("vg0" if self.notifies_space else "the file system", place.free_bytes)

        if pick > 1.0 - place.trouble * 0.1:
            return None, end
        return 0.0 if pick < 0.7 else place.moment(), end

    def _begin_step(self, target: int) -> tuple[float | None, Callable[[], None]]:
        place, rng, have = self._place, self._place.rng, self._place.device.size_bytes
        if self.target is not None:
            place.find(f"a step to {target} begins beside one to {self.target}")
        if target > limit_size_bytes(place.geometry):
            place.find(f"a step to {target} bytes is more than the disk can use")
        if self.closed:
            return 0.0, lambda: _fail(DeviceError("the storage has been closed"))
        self.target, self.began_ns, self.told, self.helpless, self._reached = target, place.now_ns, False, False, None
        place.say(f"a step to {target} begins")
        seconds: float | None = self._pace()
        error: FvdError | None = None
        reached = max(have, target)
        left_bytes = 0
        if not self.can_grow:
            reached = have
            if have < target:
                error = Unsupported("nobody here can enlarge it")
        elif reached - have > place.free_bytes:
            left_bytes = place.free_bytes if place.stubborn else 0
            reached = have + (place.free_bytes - left_bytes) // UNIT_BYTES * UNIT_BYTES
            error = NoSpace("there is no more")
        if self.can_grow and rng.random() < place.trouble:
            failure: FvdError = rng.choice((NoSpace("full"), Timeout("no answer"), DeviceError("it broke"), DeviceError("it broke too")))
            pick = rng.randint(0, 9)
            if pick < 3:
                reached, error = have, failure
            elif pick < 5:
                reached, error = have + rng.randint(0, (reached - have) // UNIT_BYTES) * UNIT_BYTES, failure
            elif pick < 6:
                error = failure  # and it has worked
            elif pick < 7:
                reached, error = have, None  # and it says that it has
            elif pick < 9:
                seconds = rng.choice((0.5, 5.0, 40.0, 100.0))
            else:
                seconds = None
        if isinstance(error, NoSpace) and self.notifies_space:
            error.left_bytes = left_bytes
        if reached > have:
            took = place.moment() if seconds is None else seconds * rng.random()
            if took == 0:
                place.enlarge(reached)
            else:
                place.agenda.later(took, lambda: place.enlarge(reached), outside=True)

        def end() -> None:
            if not self.closed:
                place.enlarge(reached)
            place.device.keep_size()
            self.target, self._reached = None, target
            self.helpless = self.helpless or place.device.size_bytes < target
            self.refused = isinstance(error, NoSpace) and place.device.size_bytes < target
            self.last_suspend_seconds = rng.choice((None, 0.0, 0.05))
            place.say(f"the step to {target} ends: {error or 'no error'}, {place.device.size_bytes} bytes")
            if error is not None:
                raise error

        return seconds, end

    def _pace(self) -> float:
        place = self._place
        if place.healed:
            return place.rng.random()
        if place.shape.pace == "fast":
            return place.rng.choice((0.0, 0.0002, 0.002))
        if place.shape.pace == "slow":
            return float(place.rng.choice((0.001, 0.01, 0.1, 1.0)) * (0.5 + place.rng.random()))
        self._seconds *= 1.0 + place.rng.random()
        return min(self._seconds, 50.0)


class WatchedEngine:
    """The engine as the allocator has it: what it is told must be so."""

    def __init__(self, engine: Any, storage: SimulatedStorage, player: Player, device: SimulatedDevice) -> None:
        self._engine, self._storage, self._player, self._device = engine, storage, player, device

    @property
    def want(self) -> int:
        return int(self._engine.want)

    @want.setter
    def want(self, wants: int) -> None:
        self._engine.want = wants

    @property
    def wake_below_bytes(self) -> int:
        return int(self._engine.wake_below_bytes)

    @wake_below_bytes.setter
    def wake_below_bytes(self, size_bytes: int) -> None:
        self._engine.wake_below_bytes = size_bytes

    @property
    def storage_below_full(self) -> bool:
        return bool(self._engine.storage_below_full)

    @property
    def starved_count(self) -> int:
        return int(self._engine.starved_count)

    @property
    def free_slots(self) -> int:
        return int(self._engine.free_slots)

    def set_storage_size(self, size_bytes: int) -> None:
        if size_bytes > self._device.size_bytes:
            raise Violation(f"the engine is told of {size_bytes} bytes, and the storage has {self._device.size_bytes}")
        if size_bytes < self._engine.storage_size_bytes:
            raise Violation(f"the engine is told that its storage has shrunk to {size_bytes} bytes")
        if size_bytes != self._engine.storage_size_bytes:
            self._player.end_exhaustion()
        self._engine.set_storage_size(size_bytes)

    def set_exhausted(self, exhausted: bool) -> None:
        if exhausted and not self._storage.helpless and not self._storage.is_slow():
            raise Violation("the engine is told that there is no growing, though the last step has worked")
        self._player.exhausted = exhausted and self._player.fails_when_full
        self._engine.set_exhausted(exhausted)


class EventJudge:
    """What the events of one life tell must make sense, in their order."""

    def __init__(self, place: Place, storage: SimulatedStorage, engine: Any) -> None:
        self._place, self._storage, self._engine = place, storage, engine
        self._started = self._running = self._slow = False
        self._failure = ""
        self._full_at: int | None = None

    def hear(self, event: GrowthEvent) -> None:
        self._place.say(f"event {event.kind}: {event.storage_size_bytes} bytes, {event.free_bytes} free {event.message}")
        wrong = self._judge(event)
        if wrong:
            self._place.find(f"the event {event.kind} {wrong}: {event}")

    def _judge(self, event: GrowthEvent) -> str:
        size, geometry = event.storage_size_bytes, self._place.geometry
        if size != self._engine.storage_size_bytes:
            return f"tells another size than the engine has ({self._engine.storage_size_bytes})"
        if not 0 <= event.free_bytes <= geometry.slots_in(size) * geometry.chunk_size_bytes:
            return "tells of free space that cannot be"
        if event.seconds < 0 or event.target_bytes < 0 or (event.group_free_bytes or 0) < 0:
            return "has a negative figure"
        if event.kind == "extend_started":
            if self._running:
                return "comes while a step runs"
            self._running = self._started = True
        elif event.kind in ("extend_done", "extend_failed"):
            if self._storage.can_grow and not self._started:
                return "comes without a start"
            self._running = self._slow = False
            self._storage.told = True
            if event.kind == "extend_done":
                if size < event.target_bytes:
                    return "comes before the size is there"
                self._started, self._failure = False, ""
            elif not event.message or event.message == self._failure:
                return "tells the same again"
            else:
                self._failure = event.message
        elif event.kind == "extend_slow":
            if self._slow or event.seconds < self._place.shape.timeout_seconds:
                return "comes too early, or again"
            self._slow, self._failure = True, event.message
        elif event.kind == "group_full":
            if self._full_at == size:
                return "comes again without growth"
            self._full_at = size
        elif event.kind == "storage_error":
            return "comes though the device is there"
        return ""


class Place:
    """Where a world's storage lies, through all its lives."""

    def __init__(
        self, device: SimulatedDevice, geometry: Geometry, shape: Growth, rng: Rng, filler: bytes, say: Callable[[str], None]
    ) -> None:
        self.device, self.geometry, self.shape, self.rng, self.filler, self.say = device, geometry, shape, rng, filler, say
        self.agenda = Agenda(lambda: device.now_ns, self._changed)
        self.workers = Workers(self.agenda)
        self.free_bytes = shape.free_steps * geometry.grow_step_bytes
        self.stubborn = rng.random() < 0.3  # what it has left is of no use
        self.healed = False
        self.violations: list[str] = []
        self._player: Player | None = None
        self.low_water_bytes = check_low_water(
            geometry, shape.low_water_chunks * geometry.chunk_size_bytes or default_low_water_bytes(geometry)
        )

    @property
    def now_ns(self) -> int:
        return self.device.now_ns

    @property
    def trouble(self) -> float:
        return 0.0 if self.healed else self.shape.trouble

    def find(self, what: str) -> None:
        """Raised as soon as the allocator, which takes any exception of its storage for a failure, has no part in it."""
        self.violations.append(what)

    def moment(self) -> float:
        """Seconds, mostly few of them."""
        return 0.2 * self.rng.random() if self.healed else float(self.rng.choice((0.0001, 0.003, 0.1, 1.0)) * self.rng.random())

    def enlarge(self, size_bytes: int) -> None:
        """At least so large, as far as there is a device."""
        size_bytes = min(size_bytes, self.device.capacity_bytes)
        if size_bytes <= self.device.size_bytes:
            return
        self.free_bytes = max(0, self.free_bytes - (size_bytes - self.device.size_bytes))
        self.device.grow(size_bytes, self.filler)
        if self.shape.place != "file":
            self.device.keep_size()
        self.say(f"the device has {size_bytes} bytes")

    def _changed(self, next_ns: int) -> None:
        if self._player is not None:
            self._player.due_ns = next_ns

    # --- a life -------------------------------------------------------------------------------------------------------

    def begin_life(self, engine: Any, player: Player, storage_size_bytes: int) -> None:
        """An allocator for this engine, at work from now on."""
        self.healed = False
        self.engine, self._player = engine, player
        self.storage = SimulatedStorage(self)
        self.judge = EventJudge(self, self.storage, engine)
        self.futures: list[Future[int]] = []
        self.allocator = Allocator(
            self.storage,
            self.geometry,
            storage_size_bytes=storage_size_bytes,
            low_water_bytes=self.low_water_bytes,
            on_event=self.judge.hear,
            clock=lambda: self.device.now_ns / SECOND_NS,
            executor=self.workers.execute,
            timer=self.agenda.later,
            extend_timeout_seconds=self.shape.timeout_seconds,
        )
        self._changed(self.agenda.next_ns)
        self.allocator.attach(WatchedEngine(engine, self.storage, player, self.device), self.workers.post)

    def end_life(self, *, power: bool) -> None:
        """The process is gone, if there was one. What it has begun outside may go on while there is power."""
        if self._player is None:
            return
        self._player = None
        self.workers.end_process()
        self.agenda.end_process(lambda: power and self.rng.random() < 0.5)

    def close(self) -> None:
        """As a volume is closed. Steps that are under way end, and nobody hears of it."""
        engine, size = self.engine, self.engine.storage_size_bytes
        self.allocator.close()
        self.workers.finish()
        while self.agenda.next_ns == 0:
            self.agenda.run_next()
        if engine.storage_size_bytes != size:
            self.find("the storage of a closed disk grows under its engine")
        if not all(future.done() for future in self.futures):
            self.find("a disk is closed, and who asked for more storage still waits")
        self.end_life(power=False)
        self.raise_found()

    def begin_round(self) -> None:
        """What was repaired so that all could end breaks again."""
        if self.healed:
            self.healed = False
            self.free_bytes = self.shape.free_steps * self.geometry.grow_step_bytes

    def attend(self) -> None:
        """One thing that the engine wants, or that is due."""
        if self.engine.want & Want.GROWTH:
            self.allocator.on_want(self.engine)
        else:
            self.agenda.run_next()
        self.raise_found()

    def raise_found(self) -> None:
        if self.violations:
            raise Violation("; ".join(self.violations))

    # --- what others do -----------------------------------------------------------------------------------------------

    def disturb(self, rng: Rng) -> None:
        """An administrator, or another disk of the group."""
        pick = rng.random()
        step = self.geometry.grow_step_bytes
        if pick < 0.3:
            self.free_bytes += rng.randint(0, 4 * step) // UNIT_BYTES * UNIT_BYTES
            self.stubborn = self.stubborn and rng.random() < 0.5
            self.say(f"there is space for {self.free_bytes} bytes")
            if self.shape.place == "group" and rng.random() < 0.9:
                self.allocator.on_space_freed()
        elif pick < 0.4:
            self.free_bytes = rng.randint(0, self.free_bytes // UNIT_BYTES) * UNIT_BYTES
        elif pick < 0.55:
            self.enlarge(self.device.size_bytes + rng.choice((UNIT_BYTES, step // 2 // UNIT_BYTES * UNIT_BYTES, step)))
            if rng.random() < 0.7:
                self.allocator.resized()
        elif pick < 0.65:
            self.allocator.poke()
        elif pick < 0.75:
            rng.choice((self.allocator.on_space_freed, self.allocator.resized))()
        elif pick < 0.9:
            self.futures.append(self.allocator.extend_now(rng.choice((None, UNIT_BYTES, step, 3 * step + UNIT_BYTES))))
        self.raise_found()

    def heal(self) -> None:
        """From now on there is space, and every step ends and works."""
        if self.healed:
            return
        self.say("there is space, and steps work")
        self.healed, self.stubborn = True, False
        self.free_bytes = PLENTY_BYTES
        if self.shape.place == "fixed":
            self.enlarge(self.geometry.max_storage_size_bytes)
        self.workers.hurry(self.rng.random)
        if self.shape.place == "group":
            self.allocator.on_space_freed()
        self.progress_ns, self.progress_size = self.now_ns, self.engine.storage_size_bytes

    def go_on(self, longest_seconds: float) -> None:
        """Time passes until something is to be done about growth. Raises Violation if that has been too long since there is space."""
        self.heal()
        size = self.engine.storage_size_bytes
        if size != self.progress_size:
            self.progress_ns, self.progress_size = self.now_ns, size
        next_ns = self.agenda.next_ns
        if next_ns == NEVER:
            raise Violation(f"{self.engine.waiting_writes} writes wait for space, and nobody does anything about it")
        seconds = (max(next_ns, self.now_ns) - self.progress_ns) / SECOND_NS
        if seconds > longest_seconds:
            raise Violation(f"{self.engine.waiting_writes} writes wait for space, and after {seconds:.1f} s nobody has used what there is")
        if next_ns > self.now_ns:
            self.device.advance(next_ns - self.now_ns)

    def wait_for_space(self) -> None:
        """Time passes while writes wait."""
        if not self.storage.notifies_space:
            self.go_on(WAIT_SECONDS_MAX)
        else:
            self.go_on(ASK_SECONDS_MAX if self.storage.refused else REST_SECONDS_MAX)

    @property
    def satisfied(self) -> bool:
        """Whether nobody needs more storage than there is."""
        free_bytes = self.engine.free_slots * self.geometry.chunk_size_bytes
        enough = free_bytes >= self.low_water_bytes or self.engine.capacity_slots >= self.geometry.chunks
        return (enough or self.device.size_bytes == self.device.capacity_bytes) and all(future.done() for future in self.futures)

    def check(self) -> None:
        """At a moment when nothing is posted and no want of the engine is open."""
        free_bytes = self.engine.free_slots * self.geometry.chunk_size_bytes
        short = self.engine.waiting_writes or free_bytes < self.low_water_bytes
        if short and self.engine.storage_size_bytes < self.geometry.max_storage_size_bytes and self.agenda.next_ns == NEVER:
            raise Violation(f"{self.engine.waiting_writes} writes wait and {free_bytes} bytes are free, and nothing is done about it")
        for name, value in self.allocator.figures().items():
            if isinstance(value, int | float) and value < 0:
                raise Violation(f"{name} is {value}")
        self.raise_found()


def _fail(error: FvdError) -> None:
    raise error
