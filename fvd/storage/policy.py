# SPDX-License-Identifier: Apache-2.0
"""When storage grows, and to what size: pure decisions. Knows no threads, no clock (times come as arguments), no storage and no engine.

`GrowthPolicy` is told what happened (less is free, a step ended, time passed) and answers with what to do. `allocator.py` does it.

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
RETRY_SECONDS_MAX = 30.0  # while the reserve still holds, or whoever frees space says so
QUERY_SECONDS_MAX = 8.0  # between two questions about a full group whose changes are told and bring no space
FORCED_TRY_SECONDS = 300.0  # what a group shows as free may become usable without becoming more (pvchange --allocatable)

FIRST_STEP_SECONDS = 1.5  # what a step is taken to need before one was seen; users of others report 0.8 to 6 s
MARK_SAFETY = 3.0  # with it each step may take twice as long as the longest before it, and not one is outrun: see `steps_at_once`
MARK_STEPS_MAX = 8  # one hang on a fast disk must not take a whole group for it
RECENT_STEPS = 8  # whose longest counts: a step that was slow once is forgotten
LOOKS_PER_STEP = 16  # how often the rate is looked at while a grow step is filled
RATE_WINDOW_SECONDS = 0.25  # shorter ones would take a queue that is let go at once for a rate
RATE_SHORT_WINDOW_SECONDS = 0.05  # but where space runs out there is no more to be seen
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
class ReadSize:
    """Read the storage's size again in the background: a step hangs, and may have worked all the same."""


@dataclass(frozen=True)
class QueryGroup:
    """Ask what the group has left, then call `on_query_answered`: a step was refused for want of space, and only space is worth another."""


@dataclass(frozen=True)
class UseSize:
    """Give the engine its new size, then tell the policy what is free now (`on_free_bytes`)."""

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


Action = Start | ReadSize | QueryGroup | UseSize | Answer | Exhausted | WakeAt | GrowthEvent


# --- The state ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Idle:
    """No step runs, and none has to wait."""


@dataclass
class Stepping:
    """A step is under way; it may hang."""

    target_bytes: int
    started_at: float
    reported_slow: bool = False
    space_freed: bool = False  # while it ran: it may have looked before


@dataclass(frozen=True)
class Backoff:
    """A step has failed. It is not tried again before `until`; later it is, as soon as it is needed and the group need not be queried."""

    until: float


@dataclass(frozen=True)
class Unasked:
    """The group was never queried."""

    asked_at: None = None


@dataclass(frozen=True)
class Querying:
    """It was asked what it has left, and has not answered. A command that hangs for ever must not be what everything waits for."""

    asked_at: float

    @property
    def ends_at(self) -> float:
        """From then on it is not waited for."""
        return self.asked_at + FORCED_TRY_SECONDS


@dataclass(frozen=True)
class Known:
    """It has answered."""

    asked_at: float


@dataclass(frozen=True)
class _Ended:
    """A step that has ended, and what it has told of itself."""

    step: Stepping
    seconds: float
    suspend_seconds: float | None
    size_before_bytes: int
    error: FvdError | None


class WriteRate:
    """How fast first writes take space, learned from what is free at each look: the fastest window, halved with each half-life.

    Only while there is space: writes that wait say how fast storage grows, and not how fast they would be.
    """

    def __init__(self) -> None:
        self._window_began: float | None = None  # None: writes wait, or nothing has been seen yet
        self._free_bytes = 0
        self._taken_bytes = 0
        self._fastest = 0.0
        self._fastest_at = 0.0

    def look(self, now: float, free_bytes: int) -> None:
        """`free_bytes` are free now. Space that was freed meanwhile is no writing."""
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

    | state | event | next |
    |---|---|---|
    | Idle | less than the mark is free, or somebody asks for more | Stepping |
    | Stepping | it has ended, and the storage is as large as it was to be | Idle, or Stepping if that is not enough |
    | Stepping | it has ended, and the storage is not | Backoff, longer with each failure in a row |
    | Stepping | it takes longer than the timeout | Stepping: reported, and the size is read every second |
    | Backoff | its time is over and less than the mark is free | Stepping, or still Backoff while the group is queried |
    | Backoff | space was freed outside | Backoff, for a shorter time |
    | Backoff | enough is free again, or `poke` | Idle |
    | Backoff | somebody asks for more | Stepping |

    Beside it, where others tell of space and the group has refused the last step (`notifies_space`), stands what is known of the group:

    | query | event | next |
    |---|---|---|
    | Unasked, Known | a step would be tried again, the last one began less than FORCED_TRY_SECONDS ago | Querying |
    | Querying | the group has more than it refused with, or cannot tell | Known, and Stepping |
    | Querying | it has not | Known, and Backoff |
    | Querying | no answer for FORCED_TRY_SECONDS | Querying, and a step is tried beside it |
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
        """`notifies_space`: `on_space_freed` comes when there may be space again, so failures need no retry every second. `adaptive`:
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
        self._group_refused = False  # the last step found no space
        self._refused_with_bytes: int | None = None  # what the group had left then, which may be of no use; None: not known
        self._query: Unasked | Querying | Known = Unasked()
        self._query_rest_seconds = RETRY_SECONDS  # at least so long from one query to the next
        self._storage_full_at: float | None = None
        self._rate = WriteRate()
        self._recent_seconds: tuple[float, ...] = ()
        self._state: Idle | Stepping | Backoff = Idle()
        self._begun_at: float | None = None  # the last step, also after its end
        self.requested_bytes = 0  # the size that `extend` has asked for; 0: none
        self._failures = 0  # in a row
        self._low_reported = False
        self._reading = False  # the size is being read
        self._read_again = False
        self._mark_bytes = low_water_bytes  # at the last look
        self._seen_at = 0.0  # and when that was

    @property
    def extending(self) -> bool:
        """Whether a step is under way (it may hang)."""
        return isinstance(self._state, Stepping)

    @property
    def full(self) -> bool:
        """Whether storage holds all that the disk can ever use."""
        return self.storage_size_bytes >= self._geometry.max_storage_size_bytes

    @property
    def look_below_bytes(self) -> int:
        """Call `on_free_bytes` as soon as less than this is free: a step has to begin, or the rate of writes is to be looked at."""
        geometry = self._geometry
        below = max(0, self.free_bytes - max(geometry.grow_step_bytes // LOOKS_PER_STEP, geometry.chunk_size_bytes))
        # While a step runs or rests nothing else can begin; its end looks again.
        something_can_begin = isinstance(self._state, Idle) and not self._query_alarm(self._seen_at)
        return max(below, self._mark_bytes) if something_can_begin else below

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

    def on_free_bytes(self, now: float, free_bytes: int) -> list[Action]:
        """The engine has `free_bytes` in free slots: begin a step if that is too little and none runs or rests after a failure."""
        self._see(now, free_bytes)
        if free_bytes >= self._mark_bytes or self.full:
            self._low_reported = False
            self._end_backoff()
            # The query keeps its alarm: with less free than the mark nobody may begin before it has ended.
            return self._begin_requested(now) or self._query_alarm(now)
        if isinstance(self._state, Stepping):
            return []
        if isinstance(self._state, Backoff):
            if free_bytes == 0 and not self._notifies_space and self._state.until > now + RETRY_SECONDS:
                self._state = Backoff(now + RETRY_SECONDS)  # the reserve has run out meanwhile
            if now < self._state.until:
                return [WakeAt(self._state.until)]
        if self._must_query(now):
            query = self._query = Querying(now)
            return [QueryGroup(), WakeAt(query.ends_at)]
        if alarm := self._query_alarm(now):
            return alarm  # again: a step that somebody asked for meanwhile has set the alarm to a time of its own
        return self._begin_needed(now)

    def extend(self, now: float, by_bytes: int) -> list[Action]:
        """Somebody asks for more storage, at most to what the disk can use. Ends with an `Answer`."""
        wanted = min(self.storage_size_bytes + by_bytes, self._geometry.max_storage_size_bytes)
        self.requested_bytes = max(self.requested_bytes, wanted)
        return self._begin_requested(now)

    def poke(self, now: float, free_bytes: int) -> list[Action]:
        """Somebody says that something has changed outside (space was freed, storage was added): do not rest any longer."""
        self._end_backoff()
        if isinstance(self._state, Stepping):
            return self._read_size()
        if free_bytes >= self.low_water_at(now) or self.full:
            self._see(now, free_bytes)
            return self._read_size()
        return self.on_free_bytes(now, free_bytes)

    def on_space_freed(self, now: float, free_bytes: int) -> list[Action]:
        """The group may have space again. A step that rests is tried now, or a second after the last one began: changes come in swarms, as
        each disk that grows is a change of the group to all the others."""
        if isinstance(self._state, Stepping):
            self._state.space_freed = True
            return []
        if not isinstance(self._state, Backoff) or (self._notifies_space and not self._group_refused):
            return []
        earliest = now if self._begun_at is None else self._begun_at + RETRY_SECONDS
        if self._query.asked_at is not None:
            earliest = max(earliest, self._query.asked_at + self._query_rest_seconds)
        self._state = Backoff(min(self._state.until, max(now, earliest)))
        return self.on_free_bytes(now, free_bytes)

    def on_query_answered(self, now: float, group: str | None, group_free_bytes: int | None, free_bytes: int) -> list[Action]:
        """The answer to `QueryGroup`; None: nobody could tell, so it is tried."""
        if isinstance(self._query, Querying):
            self._query = Known(self._query.asked_at)
        refused_with = self._refused_with_bytes or 0
        actions = self.on_group_report(group, group_free_bytes)
        if isinstance(self._state, Stepping):
            return actions
        self._see(now, free_bytes)
        if free_bytes >= self._mark_bytes or self.full:
            return actions + self.on_free_bytes(now, free_bytes)
        if group_free_bytes is None or group_free_bytes > refused_with:
            return actions + self._begin_needed(now)
        self._query_rest_seconds = min(2 * self._query_rest_seconds, QUERY_SECONDS_MAX)
        self._failures += 1
        return [*actions, self._back_off(now, self._backoff_seconds())]

    def on_device_resized(self) -> list[Action]:
        """The storage has changed its size, somebody says."""
        self._read_again = self._reading  # that one may have come before the change
        return self._read_size()

    def on_device_removed(self, message: str) -> list[Action]:
        """The storage has gone."""
        return [self._event("storage_error", message=message)]

    def on_space_below(self, now: float, storage_below_full: bool, waits: bool) -> list[Action]:
        """What the storage lies on has no space for a guest's write, though the storage is there; or it has some again."""
        if not storage_below_full or (self._storage_full_at is not None and now < self._storage_full_at + STORAGE_FULL_SECONDS):
            return []
        self._storage_full_at = now
        what = "wait, and go on by themselves when there is some" if waits else "fail"
        message = (
            f"what the storage lies on (a file system, a pool) has no space left, though {format_size(self.free_bytes)} of the storage are "
            f"taken by no chunk: writes that need space there {what}. Free some space there"
        )
        return [replace(self._event("storage_full", message=message), free_bytes=0)]

    def tick(self, now: float, free_bytes: int) -> list[Action]:
        """Time has passed."""
        step = self._state
        if not isinstance(step, Stepping):
            return self.on_free_bytes(now, free_bytes)
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
            if self.requested_bytes:
                self.requested_bytes = 0
                actions.append(Answer(Timeout(message)))
        return [*actions, *self._read_size(), WakeAt(now + RETRY_SECONDS)]

    def on_size_read(self, size_bytes: int | None) -> list[Action]:
        """The answer to `ReadSize`; None: it could not be read."""
        self._reading = False
        actions = self._adopt(size_bytes)
        if self._read_again:
            self._read_again = False
            actions += self._read_size()
        return actions

    def on_step_ended(
        self, now: float, size_bytes: int | None, error: FvdError | None, free_bytes: int, suspend_seconds: float | None = None
    ) -> list[Action]:
        """The step has ended. `size_bytes`, read from the storage afterwards (None: it could not be), counts for more than the error.

        `suspend_seconds`: how long the device was suspended meanwhile; None: unknown.
        """
        self._see(now, free_bytes)
        step, self._state = self._state, Idle()
        if not isinstance(step, Stepping):
            raise AssertionError("a growth step ended that was never begun")
        ended = _Ended(step, now - step.started_at, suspend_seconds, self.storage_size_bytes, error)
        actions = self._adopt(size_bytes)
        size = self.storage_size_bytes
        self._learn(ended)
        self._group_refused = isinstance(error, NoSpace) and size < step.target_bytes
        self._refused_with_bytes = error.left_bytes if isinstance(error, NoSpace) else None
        self._query_rest_seconds = RETRY_SECONDS
        if size > ended.size_before_bytes and not self._group_refused:
            self._group_full_reported = False  # growth is the proof of space; what a group shows as free may be of no use
        return actions + (self._succeed(now, ended) if size >= step.target_bytes else self._fail(now, ended))

    def _learn(self, ended: _Ended) -> None:
        """What the step says of those to come."""
        if ended.suspend_seconds is not None:
            self.last_suspend_seconds = ended.suspend_seconds
            self.longest_suspend_seconds = max(ended.suspend_seconds, self.longest_suspend_seconds or 0.0)
        if self.storage_size_bytes > ended.size_before_bytes or self.storage_size_bytes >= ended.step.target_bytes:
            self.steps_done += 1
            self.last_extend_seconds = ended.seconds
            self.longest_extend_seconds = max(ended.seconds, self.longest_extend_seconds or 0.0)
            # Longer than the timeout is a fault, and no measure of the next step.
            self._recent_seconds = (*self._recent_seconds, min(ended.seconds, self._timeout))[-RECENT_STEPS:]

    def _succeed(self, now: float, ended: _Ended) -> list[Action]:
        self._failures = 0
        self._low_reported = False
        self.last_failure = None
        message = f"the step reported an error, but the storage has grown: {ended.error}" if ended.error else ""
        actions: list[Action] = [self._step_event("extend_done", ended, message), *self._begin_requested(now)]
        # Where a read has found the size before, no `UseSize` follows that would ask again; and writes may wait.
        grown = self.storage_size_bytes > ended.size_before_bytes
        return actions if grown else actions + self.on_free_bytes(now, self.free_bytes)

    def _fail(self, now: float, ended: _Ended) -> list[Action]:
        size, target_bytes = self.storage_size_bytes, ended.step.target_bytes
        error = ended.error
        if error is None:
            error = NoSpace(f"storage was to grow to {format_size(target_bytes)} and has {format_size(size)}, though no error was reported")
        # A device of fixed size that has not been enlarged is no failure worth repeating in the log; it is looked at again all the same.
        self._failures = 1 if size > ended.size_before_bytes else self._failures + 1
        rest = self._backoff_seconds()
        if (ended.step.space_freed and self._group_refused) or (self.free_bytes == 0 and not self._notifies_space):
            rest = RETRY_SECONDS
        wake = self._back_off(now, rest)
        actions: list[Action] = []
        if str(error) != self.last_failure:
            self.last_failure = str(error)
            actions.append(self._step_event("extend_failed", ended, str(error)))
        actions.append(Exhausted())
        if self.requested_bytes:
            satisfied = size >= self.requested_bytes
            self.requested_bytes = 0
            actions.append(Answer(None if satisfied else error))
        return [*actions, wake]

    def on_group_report(self, group: str | None, group_free_bytes: int | None) -> list[Action]:
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
            actions.append(self._event("group_full", message=f"{name} has no space for another growth step"))
        return actions

    def _query_alarm(self, now: float) -> list[Action]:
        """While an answer is awaited: when that is to end."""
        return [WakeAt(self._query.ends_at)] if isinstance(self._query, Querying) and now < self._query.ends_at else []

    def _see(self, now: float, free_bytes: int) -> None:
        """Takes in what is free now."""
        self._seen_at = now
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

    def _must_query(self, now: float) -> bool:
        """A step that a group refused is not simply tried again where somebody tells of space: lvextend opens the physical volumes for
        writing even when it fails, which is a change that udev tells every other disk of the group that rests."""
        if self._query_alarm(now) or not self._notifies_space or not self._group_refused or self._begun_at is None:
            return False
        return now < self._begun_at + FORCED_TRY_SECONDS

    def _backoff_seconds(self) -> float:
        return min(RETRY_SECONDS * float(2 ** min(self._failures - 1, 10)), RETRY_SECONDS_MAX)

    def _back_off(self, now: float, seconds: float) -> WakeAt:
        self._state = Backoff(now + seconds)
        return WakeAt(now + seconds)

    def _end_backoff(self) -> None:
        if isinstance(self._state, Backoff):
            self._state = Idle()

    def _begin_requested(self, now: float) -> list[Action]:
        """What `extend` requests need now."""
        if not self.requested_bytes or isinstance(self._state, Stepping):
            return []
        if self.storage_size_bytes >= self.requested_bytes:
            self.requested_bytes = 0
            return [Answer(None)]
        return self._begin(now, self.requested_bytes)

    def _begin_needed(self, now: float) -> list[Action]:
        """What first writes need, and `extend` requests too."""
        actions: list[Action] = []
        if not self._low_reported:
            self._low_reported = True
            actions.append(self._event("low_water"))
        target = next_size_bytes(self._geometry, self.storage_size_bytes, self.steps_at_once(now))
        return actions + self._begin(now, max(target, self.requested_bytes))

    def _begin(self, now: float, target_bytes: int) -> list[Action]:
        if target_bytes > limit_size_bytes(self._geometry):
            raise AssertionError(f"growth to {target_bytes} bytes is beyond the limit {limit_size_bytes(self._geometry)} of this disk")
        self._state = Stepping(target_bytes, now)
        self._begun_at = now
        actions: list[Action] = [Start(target_bytes), WakeAt(now + self._timeout)]
        # A step that is tried again and again is told of once, like its failure.
        if self._can_grow and (not self._failures or self.last_failure is None):
            actions.insert(0, self._event("extend_started", target_bytes=target_bytes))
        return actions

    def _read_size(self) -> list[Action]:
        """One read at a time."""
        if self._reading:
            return []
        self._reading = True
        return [ReadSize()]

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

    def _step_event(self, kind: EventKind, ended: _Ended, message: str) -> GrowthEvent:
        return self._event(
            kind,
            target_bytes=ended.step.target_bytes,
            seconds=ended.seconds,
            suspend_seconds=ended.suspend_seconds,
            message=message,
        )

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
