"""When storage grows, and to what size: pure decisions. Knows no threads, no clock (times come as arguments), no storage and no engine.

`GrowthPolicy` is told what happened (the engine wants room, a step ended, time passed) and answers with what to do. `allocator.py` does it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fvd.errors import FvdError, InvalidArgument, NoSpace, Timeout
from fvd.format.geometry import Geometry, Layout, ceil_div
from fvd.units import format_size

EXTEND_TIMEOUT_SECONDS = 30.0
RETRY_SECONDS = 1.0  # while writes wait
RETRY_LONGEST_SECONDS = 30.0  # while the reserve still holds


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


def next_size_bytes(geometry: Geometry, size_bytes: int) -> int:
    """The size to ask for when storage of `size_bytes` should grow by a step: the next multiple of it, whatever was done by hand."""
    step = geometry.grow_step_bytes
    return min((size_bytes // step + 1) * step, geometry.max_storage_size_bytes)


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


EventKind = Literal["low_water", "extend_started", "extend_done", "extend_failed", "extend_slow"]


@dataclass(frozen=True)
class GrowthEvent:
    """Something about growth that an administrator or agent wants to know."""

    kind: EventKind
    storage_size_bytes: int
    free_bytes: int  # in free slots
    target_bytes: int = 0
    seconds: float = 0.0  # what the step has taken so far
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


Action = Start | Look | UseSize | Answer | Exhausted | WakeAt | GrowthEvent


@dataclass
class _Step:
    target_bytes: int
    started_at: float
    reported_slow: bool = False


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
        extend_timeout_seconds: float = EXTEND_TIMEOUT_SECONDS,
    ) -> None:
        self._geometry = geometry
        self._can_grow = can_grow
        self._timeout = extend_timeout_seconds
        self.storage_size_bytes = storage_size_bytes
        self.low_water_bytes = low_water_bytes
        self.free_bytes = 0
        self.last_failure: str | None = None
        self.last_extend_seconds: float | None = None
        self.longest_extend_seconds: float | None = None
        self.steps_done = 0
        self._step: _Step | None = None
        self._asked_bytes = 0  # what `extend` asks for; 0: nothing
        self._retry_at: float | None = None
        self._failures = 0  # in a row
        self._low_reported = False
        self._looking = False

    @property
    def extending(self) -> bool:
        """Whether a step is under way (it may hang)."""
        return self._step is not None

    @property
    def full(self) -> bool:
        """Whether storage holds all that the disk can ever use."""
        return self.storage_size_bytes >= self._geometry.max_storage_size_bytes

    def room(self, now: float, free_bytes: int) -> list[Action]:
        """The engine has `free_bytes` in free slots: begin a step if that is too little and none runs or rests after a failure."""
        self.free_bytes = free_bytes
        if free_bytes >= self.low_water_bytes or self.full:
            self._low_reported = False
            self._retry_at = None
            return self._ask(now)
        if self._step is not None:
            return []
        if self._retry_at is not None:
            if free_bytes == 0 and self._retry_at > now + RETRY_SECONDS:
                self._retry_at = now + RETRY_SECONDS  # the reserve has run out meanwhile
            if now < self._retry_at:
                return [WakeAt(self._retry_at)]
        actions: list[Action] = []
        if not self._low_reported:
            self._low_reported = True
            actions.append(self._event("low_water"))
        return actions + self._begin(now, max(next_size_bytes(self._geometry, self.storage_size_bytes), self._asked_bytes))

    def extend(self, now: float, by_bytes: int) -> list[Action]:
        """Somebody asks for more storage, at most to what the disk can use. Ends with an `Answer`."""
        wanted = min(self.storage_size_bytes + by_bytes, self._geometry.max_storage_size_bytes)
        self._asked_bytes = max(self._asked_bytes, wanted)
        return self._ask(now)

    def poke(self, now: float, free_bytes: int) -> list[Action]:
        """Something changed outside (room was made, storage was added): do not rest any longer."""
        self._retry_at = None
        if self._step is not None:
            return self._look()
        if free_bytes >= self.low_water_bytes or self.full:
            self.free_bytes = free_bytes
            return self._look()
        return self.room(now, free_bytes)

    def tick(self, now: float, free_bytes: int) -> list[Action]:
        """Time has passed."""
        step = self._step
        if step is None:
            return self.room(now, free_bytes)
        self.free_bytes = free_bytes
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
        return self._adopt(size_bytes)

    def ended(self, now: float, size_bytes: int | None, error: FvdError | None, free_bytes: int) -> list[Action]:
        """The step has ended. `size_bytes`, read from the storage afterwards (None: it could not be), counts for more than the error."""
        self.free_bytes = free_bytes
        step, self._step = self._step, None
        if step is None:
            raise AssertionError("a growth step ended that was never begun")
        seconds = now - step.started_at
        before = self.storage_size_bytes
        actions = self._adopt(size_bytes)
        size = self.storage_size_bytes
        if size > before or size >= step.target_bytes:
            self.steps_done += 1
            self.last_extend_seconds = seconds
            self.longest_extend_seconds = max(seconds, self.longest_extend_seconds or 0.0)
        if size >= step.target_bytes:
            self._failures = 0
            self._retry_at = None
            self._low_reported = False
            self.last_failure = None
            message = f"the step reported an error, but the storage has grown: {error}" if error else ""
            actions.append(self._event("extend_done", target_bytes=step.target_bytes, seconds=seconds, message=message))
            return actions + self._ask(now)
        if error is None:
            error = NoSpace(
                f"storage was to grow to {format_size(step.target_bytes)} and has {format_size(size)}, though no error was reported"
            )
        # A device of fixed size that has not been enlarged is no failure worth repeating in the log; it is looked at again all the same.
        self._failures += 1
        if size > before:
            self._failures = 1
        rest = RETRY_SECONDS if self.free_bytes == 0 else min(RETRY_SECONDS * 2 ** min(self._failures - 1, 10), RETRY_LONGEST_SECONDS)
        self._retry_at = now + rest
        if str(error) != self.last_failure:
            self.last_failure = str(error)
            actions.append(self._event("extend_failed", target_bytes=step.target_bytes, seconds=seconds, message=str(error)))
        actions.append(Exhausted())
        if self._asked_bytes:
            satisfied = size >= self._asked_bytes
            self._asked_bytes = 0
            actions.append(Answer(None if satisfied else error))
        return [*actions, WakeAt(self._retry_at)]

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
        actions: list[Action] = [Start(target_bytes), WakeAt(now + self._timeout)]
        if self._can_grow:
            actions.insert(0, self._event("extend_started", target_bytes=target_bytes))
        return actions

    def _look(self) -> list[Action]:
        if self._looking:
            return []
        self._looking = True
        return [Look()]

    def _adopt(self, size_bytes: int | None) -> list[Action]:
        """Storage never shrinks under an open disk: a smaller size is a lie, or a disaster that the next write will report."""
        if size_bytes is None or size_bytes <= self.storage_size_bytes:
            return []
        geometry = self._geometry
        self.free_bytes += (geometry.slots_in(size_bytes) - geometry.slots_in(self.storage_size_bytes)) * geometry.chunk_size_bytes
        self.storage_size_bytes = size_bytes
        return [UseSize(size_bytes)]

    def _event(self, kind: EventKind, *, target_bytes: int = 0, seconds: float = 0.0, message: str = "") -> GrowthEvent:
        return GrowthEvent(kind, self.storage_size_bytes, self.free_bytes, target_bytes, seconds, message)
