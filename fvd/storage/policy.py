# SPDX-License-Identifier: Apache-2.0
"""When storage grows, and to what size: pure decisions. Knows no threads, no clock (times come as arguments), no storage and no engine.

`GrowthPolicy` is told what happened (the engine wants room, a step ended, time passed) and answers with what to do. `allocator.py` does it.

The low-water mark is what growth must begin at so that no write waits: the rate of first writes times the time that a step takes. Both are
learned, so the mark rises above its base on disks that are written fast or grow slowly, and falls back to it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from fvd.errors import FvdError, InvalidArgument, NoSpace, Timeout
from fvd.format.geometry import Geometry, Layout, ceil_div
from fvd.units import format_size

EXTEND_TIMEOUT_SECONDS = 30.0
RETRY_SECONDS = 1.0  # while writes wait
RETRY_SECONDS_MAX = 30.0  # while the reserve still holds, or whoever makes room says so
ASK_SECONDS_MAX = 8.0  # between two questions about a full group whose changes are told and bring no room
FORCED_TRY_SECONDS = 300.0  # what a group shows as free may become usable without becoming more (pvchange --allocatable)

FIRST_STEP_SECONDS = 1.5  # what a step is taken to need before one was seen; users of others report 0.8 to 6 s
MARK_SAFETY = 3.0  # with it each step may take twice as long as the longest before it, and not one is outrun: see `steps_at_once`
MARK_STEPS_MAX = 8  # one hang on a fast disk must not take a whole group for it
RECENT_STEPS = 8  # whose longest counts: a step that was slow once is forgotten
LOOKS_PER_STEP = 16  # how often the rate is looked at while a grow step is filled
RATE_WINDOW_SECONDS = 0.25  # shorter ones would take a queue that is let go at once for a rate
RATE_SHORT_WINDOW_SECONDS = 0.05  # but where room runs out there is no more to be seen
RATE_HALF_LIFE_SECONDS = 600.0  # one burst does not keep an idle disk's mark high for ever
GROUP_LOW_STEPS = 4
STORAGE_FULL_SECONDS = 300.0  # a device that is full by turns is told of as often as this


def initial_size_bytes(geometry: Geometry) -> int:
    """Storage at provision: whole grow steps that hold the metadata and one chunk, never more than the disk can use; all of it if raw."""
    if geometry.layout is Layout.RAW:
        return geometry.max_storage_size_bytes
    least = geometry.data_offset_bytes + geometry.chunk_size_bytes
    steps = ceil_div(least, geometry.grow_step_bytes)
    return min(steps * geometry.grow_step_bytes, geometry.max_storage_size_bytes)


def least_size_bytes(geometry: Geometry) -> int:
    """The smallest storage of fixed size that makes a disk: everything if raw, else metadata and one chunk."""
    if geometry.layout is Layout.RAW:
        return geometry.max_storage_size_bytes
    return geometry.data_offset_bytes + geometry.chunk_size_bytes


def limit_size_bytes(geometry: Geometry) -> int:
    """What fvd never asks storage to exceed: the most that the disk can use, rounded up to a grow step."""
    return ceil_div(geometry.max_storage_size_bytes, geometry.grow_step_bytes) * geometry.grow_step_bytes


def next_size_bytes(geometry: Geometry, size_bytes: int, steps: int = 1) -> int:
    """The size to ask for when storage of `size_bytes` should grow by `steps`: a multiple of the grow step, whatever was done by hand."""
    step = geometry.grow_step_bytes
    return min((size_bytes // step + steps) * step, geometry.max_storage_size_bytes)


def default_low_water_bytes(geometry: Geometry) -> int:
    """Half a grow step, at least one chunk."""
    return max(geometry.grow_step_bytes // 2, geometry.chunk_size_bytes)


def check_low_water(geometry: Geometry, low_water_bytes: int) -> int:
    """Returns a low-water mark in bytes that is fit for use. Raises InvalidArgument."""
    if low_water_bytes < geometry.chunk_size_bytes:
        raise InvalidArgument(
            f"the low-water mark {format_size(low_water_bytes)} is less than one chunk ({format_size(geometry.chunk_size_bytes)}): "
            "growth would begin only when writes wait already"
        )
    return min(low_water_bytes, geometry.max_storage_size_bytes)


def guest_reserve_bytes(geometry: Geometry, low_water_bytes: int) -> int:
    """What copies from the base leave to the guest: half of the low-water mark in whole chunks, and less than the mark, so that growth
    begins before copies stop. With a mark of one chunk there is nothing to share."""
    chunk = geometry.chunk_size_bytes
    return min(ceil_div(low_water_bytes, 2 * chunk), ceil_div(low_water_bytes, chunk) - 1) * chunk


EventKind = Literal[
    "low_water", "extend_started", "extend_done", "extend_failed", "extend_slow", "group_low", "group_full", "storage_full", "storage_error"
]


@dataclass(frozen=True)
class GrowthEvent:
    """Something about growth that an administrator or agent wants to know."""

    kind: EventKind
    storage_size_bytes: int
    free_bytes: int  # in free slots
    target_bytes: int = 0
    seconds: float = 0.0  # what the step has taken so far
    suspend_seconds: float | None = None  # how long device-mapper held the device still during the step; None: nobody could tell
    group: str = ""  # what the storage takes its growth from: a volume group, a file system
    group_free_bytes: int | None = None
    message: str = ""


# --- What to do --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """Begin a step in the background."""

    target_bytes: int


@dataclass(frozen=True)
class Look:
    """Read the storage's size again in the background: a step hangs, and may have worked all the same."""


@dataclass(frozen=True)
class AskPool:
    """Ask what the group has left, then call `pool_told`: a step was refused for want of room, and only room is worth another."""


@dataclass(frozen=True)
class UseSize:
    """Give the engine its new size, then tell the policy what is free now (`room`)."""

    size_bytes: int


@dataclass(frozen=True)
class Answer:
    """`extend` requests end: with an error, or (None) with the size that there is now."""

    error: FvdError | None


@dataclass(frozen=True)
class Exhausted:
    """Tell the engine that there is no growing now: with on_full=error, writes that wait for a slot fail. A new size takes it back."""


@dataclass(frozen=True)
class WakeAt:
    """Call `tick` at this time; replaces an earlier one."""

    when: float


Action = Start | Look | AskPool | UseSize | Answer | Exhausted | WakeAt | GrowthEvent


@dataclass
class _Step:
    target_bytes: int
    started_at: float
    reported_slow: bool = False
    on_space_freed: bool = False  # while it ran: it may have looked before


class WriteRate:
    """How fast first writes take room, learned from what is free at each look: the fastest window, halved with each half-life.

    Only while there is room: writes that wait say how fast storage grows, and not how fast they would be.
    """

    def __init__(self) -> None:
        self._window_began: float | None = None  # None: writes wait, or nothing has been seen yet
        self._free_bytes = 0
        self._taken_bytes = 0
        self._fastest = 0.0
        self._fastest_at = 0.0

    def look(self, now: float, free_bytes: int) -> None:
        """`free_bytes` are free now. Room that was freed meanwhile is no writing."""
        if self._window_began is None:
            if free_bytes:
                self._window_began, self._free_bytes, self._taken_bytes = now, free_bytes, 0
            return
        self._taken_bytes += max(0, self._free_bytes - free_bytes)
        self._free_bytes = free_bytes
        seconds = now - self._window_began
        if seconds >= (RATE_WINDOW_SECONDS if free_bytes else RATE_SHORT_WINDOW_SECONDS):
            rate = self._taken_bytes / seconds
            if rate >= self.at(now):
                self._fastest, self._fastest_at = rate, now
            self._window_began, self._taken_bytes = now, 0
        if free_bytes == 0:
            self._window_began = None

    def added(self, free_bytes: int) -> None:
        """Storage has grown by this much."""
        self._free_bytes += free_bytes

    def at(self, now: float) -> float:
        """Bytes a second that are to be expected."""
        return float(self._fastest * 0.5 ** ((now - self._fastest_at) / RATE_HALF_LIFE_SECONDS))


class GrowthPolicy:
    """The state of growth of one open disk. Not safe from threads: it lives in the thread of the disk's loop.

    One step runs at a time, also when it hangs: two extensions of one volume at once would each believe in a size that is not so.
    """

    def __init__(
        self,
        geometry: Geometry,
        *,
        storage_size_bytes: int,
        low_water_bytes: int,
        can_grow: bool = True,
        notifies_space: bool = False,
        adaptive: bool = True,
        group_low_bytes: int | None = None,
        extend_timeout_seconds: float = EXTEND_TIMEOUT_SECONDS,
    ) -> None:
        """`notifies_space`: `on_space_freed` comes when there may be room again, so failures need not be repeated every second. `adaptive`:
        the mark may rise above `low_water_bytes`. `group_low_bytes`: below this the group is reported as low (default: 4 grow steps)."""
        self._geometry = geometry
        self._can_grow = can_grow
        self._notifies_space = notifies_space
        self._adaptive = adaptive and can_grow
        self._timeout = extend_timeout_seconds
        self.storage_size_bytes = storage_size_bytes
        self.base_low_water_bytes = low_water_bytes
        self.free_bytes = 0
        self.last_failure: str | None = None
        self.last_extend_seconds: float | None = None
        self.longest_extend_seconds: float | None = None
        self.last_suspend_seconds: float | None = None
        self.longest_suspend_seconds: float | None = None
        self.steps_done = 0
        self.group = ""
        self.group_free_bytes: int | None = None
        self._group_low_bytes = GROUP_LOW_STEPS * geometry.grow_step_bytes if group_low_bytes is None else group_low_bytes
        self._group_low_reported = False
        self._group_full_reported = False
        self._group_refused = False  # the last step found no room
        self._refused_with_bytes: int | None = None  # what the group had left then, which may be of no use; None: not known
        self._asking = False
        self._asked_pool_at: float | None = None
        self._ask_rest = RETRY_SECONDS
        self._storage_full_at: float | None = None
        self._rate = WriteRate()
        self._recent_seconds: tuple[float, ...] = ()
        self._step: _Step | None = None
        self._begun_at: float | None = None  # the last step, also after its end
        self._asked_bytes = 0  # what `extend` asks for; 0: nothing
        self._retry_at: float | None = None
        self._failures = 0  # in a row
        self._low_reported = False
        self._looking = False
        self._look_again = False
        self._mark_bytes = low_water_bytes  # at the last look

    @property
    def extending(self) -> bool:
        """Whether a step is under way (it may hang)."""
        return self._step is not None

    @property
    def full(self) -> bool:
        """Whether storage holds all that the disk can ever use."""
        return self.storage_size_bytes >= self._geometry.max_storage_size_bytes

    @property
    def look_below_bytes(self) -> int:
        """Call `room` as soon as less than this is free: a step has to begin, or the rate of writes is to be looked at."""
        geometry = self._geometry
        below = max(0, self.free_bytes - max(geometry.grow_step_bytes // LOOKS_PER_STEP, geometry.chunk_size_bytes))
        # While a step runs or rests nothing else can begin; its end looks again.
        nothing_can_begin = self._step is not None or self._retry_at is not None or self._asking
        return below if nothing_can_begin else max(below, self._mark_bytes)

    def write_rate(self, now: float) -> float:
        """First writes, in bytes a second, that are to be expected by what was seen."""
        return self._rate.at(now)

    def low_water_at(self, now: float) -> int:
        """The mark: a step begins when less than this is free."""
        needed = min(self._needed_bytes(now), MARK_STEPS_MAX * self._geometry.grow_step_bytes)
        return min(max(self.base_low_water_bytes, needed), self._geometry.max_storage_size_bytes)

    def steps_at_once(self, now: float) -> int:
        """How many grow steps to ask for, so that what a step needs is left when they are there, after the longest time to be expected:
        that steps have become slower is known only then, and the next needs it."""
        missing_bytes = 2 * self._needed_bytes(now) - self.free_bytes
        if not self._recent_seconds:
            return 1  # no more than one on a mere guess
        return max(1, min(ceil_div(missing_bytes, self._geometry.grow_step_bytes), MARK_STEPS_MAX))

    def reserve_bytes_per_second(self, now: float) -> int | None:
        """The rate of first writes that never waits if steps take as long as the longest so far; None: there was none."""
        if not self.longest_extend_seconds:
            return None
        return int(self.low_water_at(now) / self.longest_extend_seconds)

    def room(self, now: float, free_bytes: int) -> list[Action]:
        """The engine has `free_bytes` in free slots: begin a step if that is too little and none runs or rests after a failure."""
        self._see(now, free_bytes)
        if free_bytes >= self._mark_bytes or self.full:
            self._low_reported = False
            self._retry_at = None
            return self._ask(now)
        if self._step is not None:
            return []
        if self._retry_at is not None:
            if free_bytes == 0 and not self._notifies_space and self._retry_at > now + RETRY_SECONDS:
                self._retry_at = now + RETRY_SECONDS  # the reserve has run out meanwhile
            if now < self._retry_at:
                return [WakeAt(self._retry_at)]
        if self._must_ask(now):
            self._asking = True
            self._asked_pool_at = now
            return [AskPool(), WakeAt(now + FORCED_TRY_SECONDS)]
        if (until := self._asking_until(now)) is not None:
            return [WakeAt(until)]  # again: a step that somebody asked for meanwhile has set the alarm to a time of its own
        return self._try(now)

    def _try(self, now: float) -> list[Action]:
        actions: list[Action] = []
        if not self._low_reported:
            self._low_reported = True
            actions.append(self._event("low_water"))
        target = next_size_bytes(self._geometry, self.storage_size_bytes, self.steps_at_once(now))
        return actions + self._begin(now, max(target, self._asked_bytes))

    def extend(self, now: float, by_bytes: int) -> list[Action]:
        """Somebody asks for more storage, at most to what the disk can use. Ends with an `Answer`."""
        wanted = min(self.storage_size_bytes + by_bytes, self._geometry.max_storage_size_bytes)
        self._asked_bytes = max(self._asked_bytes, wanted)
        return self._ask(now)

    def poke(self, now: float, free_bytes: int) -> list[Action]:
        """Somebody says that something has changed outside (room was made, storage was added): do not rest any longer."""
        self._retry_at = None
        if self._step is not None:
            return self._look()
        if free_bytes >= self.low_water_at(now) or self.full:
            self._see(now, free_bytes)
            return self._look()
        return self.room(now, free_bytes)

    def on_space_freed(self, now: float, free_bytes: int) -> list[Action]:
        """There may be room again. A step that rests is tried now, or a second after the last one began: changes come in swarms, as each
        disk that grows is a change of the group to all the others."""
        if self._step is not None:
            self._step.on_space_freed = True
            return []
        if self._retry_at is None or (self._notifies_space and not self._group_refused):
            return []
        earliest = now if self._begun_at is None else self._begun_at + RETRY_SECONDS
        if self._asked_pool_at is not None:
            earliest = max(earliest, self._asked_pool_at + self._ask_rest)
        self._retry_at = min(self._retry_at, max(now, earliest))
        return self.room(now, free_bytes)

    def _must_ask(self, now: float) -> bool:
        """A step that a group refused is not simply tried again where somebody tells of room: lvextend opens the physical volumes for
        writing even when it fails, which is a change that udev tells every other disk of the group that rests."""
        if not self._notifies_space or not self._group_refused or self._asking_until(now) or self._begun_at is None:
            return False
        return now < self._begun_at + FORCED_TRY_SECONDS

    def _asking_until(self, now: float) -> float | None:
        """Until when an answer is awaited; None: it is not. A command that hangs for ever must not be what everything waits for."""
        if not self._asking or self._asked_pool_at is None:
            return None
        until = self._asked_pool_at + FORCED_TRY_SECONDS
        return until if now < until else None

    def pool_told(self, now: float, group: str | None, group_free_bytes: int | None, free_bytes: int) -> list[Action]:
        """The answer to `AskPool`; None: nobody could tell, so it is tried."""
        self._asking = False
        refused_with = self._refused_with_bytes or 0
        actions = self.pooled(group, group_free_bytes)
        if self._step is not None:
            return actions
        self._see(now, free_bytes)
        if free_bytes >= self._mark_bytes or self.full:
            return actions + self.room(now, free_bytes)
        if group_free_bytes is None or group_free_bytes > refused_with:
            return actions + self._try(now)
        self._ask_rest = min(2 * self._ask_rest, ASK_SECONDS_MAX)
        self._failures += 1
        self._retry_at = now + min(RETRY_SECONDS * 2 ** min(self._failures - 1, 10), RETRY_SECONDS_MAX)
        return [*actions, WakeAt(self._retry_at)]

    def resized(self) -> list[Action]:
        """The storage has changed its size, somebody says."""
        self._look_again = self._looking  # that look may have come before the change
        return self._look()

    def removed(self, message: str) -> list[Action]:
        """The storage has gone."""
        return [self._event("storage_error", message=message)]

    def below(self, now: float, no_room: bool, waits: bool) -> list[Action]:
        """What the storage lies on has no room for a guest's write, though the storage is there; or it has some again."""
        if not no_room or (self._storage_full_at is not None and now < self._storage_full_at + STORAGE_FULL_SECONDS):
            return []
        self._storage_full_at = now
        what = "wait, and go on by themselves when there is some" if waits else "fail"
        message = (
            f"what the storage lies on (a file system, a pool) has no room left, though {format_size(self.free_bytes)} of the storage are "
            f"taken by no chunk: writes that need room there {what}. Make room there"
        )
        return [replace(self._event("storage_full", message=message), free_bytes=0)]

    def tick(self, now: float, free_bytes: int) -> list[Action]:
        """Time has passed."""
        step = self._step
        if step is None:
            return self.room(now, free_bytes)
        self._see(now, free_bytes)
        seconds = now - step.started_at
        if seconds < self._timeout:
            return [WakeAt(step.started_at + self._timeout)]
        actions: list[Action] = []
        if not step.reported_slow:
            step.reported_slow = True
            message = (
                f"growing to {format_size(step.target_bytes)} has taken {seconds:.0f} s and has not ended; its result is used when it comes"
            )
            self.last_failure = message
            actions += [self._event("extend_slow", target_bytes=step.target_bytes, seconds=seconds, message=message), Exhausted()]
            if self._asked_bytes:
                self._asked_bytes = 0
                actions.append(Answer(Timeout(message)))
        return [*actions, *self._look(), WakeAt(now + RETRY_SECONDS)]

    def looked(self, size_bytes: int | None) -> list[Action]:
        """The size that a `Look` found; None: it could not be read."""
        self._looking = False
        actions = self._adopt(size_bytes)
        if self._look_again:
            self._look_again = False
            actions += self._look()
        return actions

    def ended(
        self, now: float, size_bytes: int | None, error: FvdError | None, free_bytes: int, suspend_seconds: float | None = None
    ) -> list[Action]:
        """The step has ended. `size_bytes`, read from the storage afterwards (None: it could not be), counts for more than the error.

        `suspend_seconds`: how long the device stood still meanwhile; None: nobody knows.
        """
        self._see(now, free_bytes)
        step, self._step = self._step, None
        if step is None:
            raise AssertionError("a growth step ended that was never begun")
        seconds = now - step.started_at
        if suspend_seconds is not None:
            self.last_suspend_seconds = suspend_seconds
            self.longest_suspend_seconds = max(suspend_seconds, self.longest_suspend_seconds or 0.0)
        before = self.storage_size_bytes
        actions = self._adopt(size_bytes)
        size = self.storage_size_bytes
        if size > before or size >= step.target_bytes:
            self.steps_done += 1
            self.last_extend_seconds = seconds
            self.longest_extend_seconds = max(seconds, self.longest_extend_seconds or 0.0)
            # Longer than the timeout is a fault, and no measure of the next step.
            self._recent_seconds = (*self._recent_seconds, min(seconds, self._timeout))[-RECENT_STEPS:]
        self._group_refused = isinstance(error, NoSpace) and size < step.target_bytes
        self._refused_with_bytes = error.left_bytes if isinstance(error, NoSpace) else None
        self._ask_rest = RETRY_SECONDS
        if size > before and not self._group_refused:
            self._group_full_reported = False  # growth is the proof of room; what a group shows as free may be of no use
        if size >= step.target_bytes:
            self._failures = 0
            self._retry_at = None
            self._low_reported = False
            self.last_failure = None
            message = f"the step reported an error, but the storage has grown: {error}" if error else ""
            actions.append(
                self._event(
                    "extend_done", target_bytes=step.target_bytes, seconds=seconds, suspend_seconds=suspend_seconds, message=message
                )
            )
            actions += self._ask(now)
            # Where a look has found the size before, no `UseSize` follows that would ask again; and writes may wait.
            return actions if size > before else actions + self.room(now, self.free_bytes)
        if error is None:
            error = NoSpace(
                f"storage was to grow to {format_size(step.target_bytes)} and has {format_size(size)}, though no error was reported"
            )
        # A device of fixed size that has not been enlarged is no failure worth repeating in the log; it is looked at again all the same.
        self._failures += 1
        if size > before:
            self._failures = 1
        rest = min(RETRY_SECONDS * 2 ** min(self._failures - 1, 10), RETRY_SECONDS_MAX)
        if (step.on_space_freed and self._group_refused) or (self.free_bytes == 0 and not self._notifies_space):
            rest = RETRY_SECONDS
        self._retry_at = now + rest
        if str(error) != self.last_failure:
            self.last_failure = str(error)
            actions.append(
                self._event(
                    "extend_failed", target_bytes=step.target_bytes, seconds=seconds, suspend_seconds=suspend_seconds, message=str(error)
                )
            )
        actions.append(Exhausted())
        if self._asked_bytes:
            satisfied = size >= self._asked_bytes
            self._asked_bytes = 0
            actions.append(Answer(None if satisfied else error))
        return [*actions, WakeAt(self._retry_at)]

    def pooled(self, group: str | None, group_free_bytes: int | None) -> list[Action]:
        """What the group has left, asked after a step has ended; None: nobody could tell."""
        self.group = group or self.group
        self.group_free_bytes = group_free_bytes
        actions: list[Action] = []
        name = self.group or "the group"
        full = self._group_refused
        if group_free_bytes is not None:
            full = full or group_free_bytes < self._geometry.chunk_size_bytes
            low = group_free_bytes < self._group_low_bytes
            if low and not self._group_low_reported:
                actions.append(self._event("group_low", message=f"{name} has {format_size(group_free_bytes)} left"))
            self._group_low_reported = low
        if full and not self._group_full_reported:
            self._group_full_reported = True
            actions.append(self._event("group_full", message=f"{name} has no room for another growth step"))
        return actions

    def _see(self, now: float, free_bytes: int) -> None:
        """Takes in what is free now."""
        self.free_bytes = free_bytes
        self._rate.look(now, free_bytes)
        self._mark_bytes = self.low_water_at(now)

    def _needed_bytes(self, now: float) -> int:
        """What first writes may take while a step is under way, by what was seen; 0: no more than the base is known to be needed."""
        if not self._adaptive:
            return 0
        if not self._recent_seconds:
            # The rate is known, the step is not: that is worth beginning early, but not several steps that nobody may need.
            return min(int(self._rate.at(now) * FIRST_STEP_SECONDS * MARK_SAFETY), self._geometry.grow_step_bytes)
        return int(self._rate.at(now) * max(self._recent_seconds) * MARK_SAFETY)

    def _ask(self, now: float) -> list[Action]:
        """What `extend` requests need now."""
        if not self._asked_bytes or self._step is not None:
            return []
        if self.storage_size_bytes >= self._asked_bytes:
            self._asked_bytes = 0
            return [Answer(None)]
        return self._begin(now, self._asked_bytes)

    def _begin(self, now: float, target_bytes: int) -> list[Action]:
        if target_bytes > limit_size_bytes(self._geometry):
            raise AssertionError(f"growth to {target_bytes} bytes is beyond the limit {limit_size_bytes(self._geometry)} of this disk")
        self._step = _Step(target_bytes, now)
        self._begun_at = now
        actions: list[Action] = [Start(target_bytes), WakeAt(now + self._timeout)]
        if self._can_grow and not self._failures:  # a step that is tried again and again is told of once, like its failure
            actions.insert(0, self._event("extend_started", target_bytes=target_bytes))
        return actions

    def _look(self) -> list[Action]:
        if self._looking:
            return []
        self._looking = True
        return [Look()]

    def _adopt(self, size_bytes: int | None) -> list[Action]:
        """Storage never shrinks under a disk that goes on: where it has, the disk stops (`holding.py`)."""
        if size_bytes is None or size_bytes <= self.storage_size_bytes:
            return []
        geometry = self._geometry
        added = (geometry.slots_in(size_bytes) - geometry.slots_in(self.storage_size_bytes)) * geometry.chunk_size_bytes
        self.free_bytes += added
        self._rate.added(added)
        self.storage_size_bytes = size_bytes
        return [UseSize(size_bytes)]

    def _event(
        self, kind: EventKind, *, target_bytes: int = 0, seconds: float = 0.0, suspend_seconds: float | None = None, message: str = ""
    ) -> GrowthEvent:
        return GrowthEvent(
            kind,
            self.storage_size_bytes,
            self.free_bytes,
            target_bytes=target_bytes,
            seconds=seconds,
            suspend_seconds=suspend_seconds,
            group=self.group,
            group_free_bytes=self.group_free_bytes,
            message=message,
        )
