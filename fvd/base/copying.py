# SPDX-License-Identifier: Apache-2.0
"""Copying of a disk's base while the disk is in use: starts and stops prefetching, steers it, reports it, and gives the base up at its end.

Everything is called in the loop's thread, while guests wait, so nothing here may block. Files are the exception, and have ways around it:
`find_profile` and `profile_writer` may be called, and what the latter returns may run, in other threads. Knows neither driver nor server.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from fvd.base import profile
from fvd.base.options import PrefetchOptions
from fvd.base.profile import ReadRange
from fvd.base.steering import Decision, Rng, Steering, sample_between
from fvd.device import names
from fvd.engine._engine import Want
from fvd.errors import FvdError, InvalidArgument
from fvd.units import format_size

log = logging.getLogger(__name__)


PROGRESS_PERCENT = 5
RATE_HALF_LIFE_SECONDS = 10.0
RATE_SECONDS_MIN = 2.0  # of copying, before a rate is worth telling
ETA_SECONDS_MAX = 10 * 365 * 86400.0
AGAIN_NS = 10_000_000_000  # from a pass over the base that copied nothing to the next
SECOND_NS = 1_000_000_000


BaseEventKind = Literal[
    "prefetch_started", "prefetch_progress", "prefetch_stopped", "prefetch_done", "base_released", "base_lost", "base_back"
]


@dataclass(frozen=True)
class BaseEvent:
    """Something about a disk's base that somebody may want to know."""

    kind: BaseEventKind
    message: str
    copied_bytes: int
    total_bytes: int  # of the base
    eta_seconds: float | None


@dataclass(frozen=True)
class FoundProfile:
    """What looking for a profile came to."""

    path: str | None = None  # None: there is none
    extents: tuple[ReadRange, ...] = ()
    refused: str = ""  # why a profile that is there is not used


class CopyingEngine(Protocol):
    """What is needed of the engine."""

    copy_on_read: bool
    prefetch_depth: int
    prefetch_rate_bytes: int
    prefetch_idle_ns: int
    want: int

    def prefetch_plan(self, extents: list[ReadRange], /) -> None: ...
    @property
    def prefetching(self) -> bool: ...
    @property
    def base_remaining_bytes(self) -> int: ...
    @property
    def base_failing(self) -> bool: ...
    @property
    def base_released(self) -> bool: ...
    def copy_counters(self) -> dict[str, int]: ...
    def read_profile(self) -> list[ReadRange]: ...


class Speed:
    """How fast the remaining bytes become fewer, smoothed. The guest's turns count: they will come again."""

    def __init__(self) -> None:
        self._bytes = self._seconds = 0.0  # decayed sums
        self._told_seconds = 0.0
        self._at_ns = 0
        self._remaining_bytes: int | None = None

    def rest(self) -> None:
        """What follows is no copying, until the next `take`."""
        self._remaining_bytes = None

    def take(self, now_ns: int, remaining_bytes: int) -> None:
        """So many are left now."""
        if self._remaining_bytes is not None and now_ns > self._at_ns:
            seconds = (now_ns - self._at_ns) / SECOND_NS
            kept = math.exp2(-seconds / RATE_HALF_LIFE_SECONDS)
            self._bytes = self._bytes * kept + max(0, self._remaining_bytes - remaining_bytes)
            self._seconds = self._seconds * kept + seconds
            self._told_seconds += seconds
        self._at_ns, self._remaining_bytes = now_ns, remaining_bytes

    def bytes_per_second(self) -> float | None:
        """None: not known yet."""
        if self._told_seconds < RATE_SECONDS_MIN:
            return None
        return self._bytes / self._seconds

    def eta_seconds(self, remaining_bytes: int) -> float | None:
        """When it is done, at this speed; None: not known."""
        rate = self.bytes_per_second()
        if not rate or remaining_bytes / rate > ETA_SECONDS_MAX:
            return None
        return remaining_bytes / rate


@dataclass
class _Run:
    """Prefetching from one start to its end."""

    options: PrefetchOptions
    profile: FoundProfile
    steering: Steering
    begin_ns: int  # the end of the start delay
    counters: dict[str, int]  # at the last step
    prefetched_before_bytes: int
    percent_told: int
    profile_bytes: int  # of the blocks that it names
    pass_remaining_bytes: int  # when the pass over the base began
    begun: bool = False
    decision: Decision | None = None
    again_ns: int = 0  # nothing before this: the last pass copied nothing
    speed: Speed = field(default_factory=Speed)


class Copying:
    """The copying of one open writable disk's base. `release` closes the base: nothing will be read from it again."""

    def __init__(
        self,
        engine: CopyingEngine,
        *,
        volume_name: str,
        virtual_size_bytes: int,
        base_size_bytes: int,
        base_locator: str,
        block_size_bytes: int,
        release: Callable[[], None],
        on_event: Callable[[BaseEvent], None] | None = None,
        clock_ns: Callable[[], int],
        random: Rng,
    ) -> None:
        self._engine = engine
        self._name = volume_name
        self._file_bytes = base_size_bytes  # as the profile's header says it
        self._base_bytes = min(base_size_bytes, virtual_size_bytes)  # what of it shows through
        self._locator = base_locator
        self._block_bytes = block_size_bytes
        self._release_base = release
        self._on_event = on_event
        self._clock_ns = clock_ns
        self._random = random
        self._idle_ns = engine.prefetch_idle_ns
        self._run: _Run | None = None  # None: off
        self._failing = False
        self._released = False

    # --- What one may ask for ---------------------------------------------------------------------------------------------------

    def find_profile(self, options: PrefetchOptions) -> FoundProfile:
        """Looks for the profile and reads it: file I/O, in any thread. Raises nothing: a bad profile is no reason not to prefetch."""
        path = options.profile
        try:
            if path is None:
                path = profile.default_path(self._locator)
                if path is None or not names.exists(path):
                    return FoundProfile()
            return FoundProfile(path, tuple(profile.load(path, self._file_bytes)))
        except (FvdError, OSError) as error:
            return FoundProfile(refused=str(error))

    def start(self, options: PrefetchOptions, profile: FoundProfile | None = None) -> None:
        """Begins to prefetch after the delay; while it runs already, begins again with these options. Where it was, the bitmap says.

        `profile`: what `find_profile` found; None: it is called here, which reads a file. That is quick for the usual profile (a
        millisecond for each thousand lines); for larger ones look in another thread. Raises InvalidArgument.
        """
        _check(options, self._name)
        remaining = self._engine.base_remaining_bytes
        if self._released or not remaining:
            return
        profile = self.find_profile(options) if profile is None else profile
        if profile.refused:
            log.warning("%s: prefetching goes without its profile: %s", self._name, profile.refused)
        counters = self._engine.copy_counters()
        self._run = _Run(
            options,
            profile,
            Steering(self._random),
            self._clock_ns() + round(options.delay_s * SECOND_NS),
            counters,
            prefetched_before_bytes=counters["prefetched_bytes"],
            percent_told=self._percent(remaining) // PROGRESS_PERCENT * PROGRESS_PERCENT,
            profile_bytes=self._block_bytes * self._count_blocks(profile.extents),
            pass_remaining_bytes=remaining,
        )
        self._set(0, options.rate_bytes, self._idle_ns)
        self._engine.prefetch_plan([*self._clipped(profile.extents), (0, self._base_bytes)])
        begins = f", beginning in {options.delay_s:g} s" if options.delay_s else ""
        without = f"; without its profile: {profile.refused}" if profile.refused else ""
        self._tell("prefetch_started", f"{self._name}: prefetching the {format_size(remaining)} that are still its base's{begins}{without}")

    def stop(self) -> None:
        """No more is prefetched until `start`. What has been copied stays. Again is fine."""
        if self._run is None:
            return
        self._end()
        left = format_size(self._engine.base_remaining_bytes)
        self._tell("prefetch_stopped", f"{self._name}: prefetching has been stopped; {left} are still its base's")

    def set_copy_on_read(self, on: bool) -> None:
        """Whether what guests read from the base becomes the disk's own."""
        self._engine.copy_on_read = on

    def record_profile(self, path: str | None = None) -> dict[str, Any]:
        """Saves what guests have read from the base so far: {"path", "extents", "bytes"}. `path` None: beside a local base.

        Writes and flushes a file, some ten milliseconds for the usual thousands of reads. Where there may be a million of them, or the
        file system may hang, use `profile_writer`. Raises InvalidArgument, Conflict, NotFound, PermissionDenied, NoSpace, DeviceError.
        """
        return self.profile_writer(path)()

    def profile_writer(self, path: str | None = None) -> Callable[[], dict[str, Any]]:
        """`record_profile` in two halves: this one, in the loop's thread, takes the reads; the call that it returns may run in any."""
        target = profile.default_path(self._locator) if path is None else path
        if target is None:
            raise InvalidArgument(f"{self._name}: its base {self._locator} is no local file to save a profile beside; name a file (--file)")
        reads = self._engine.read_profile()

        def write() -> dict[str, Any]:
            extents = profile.save(target, self._file_bytes, reads)
            return {"path": target, "extents": len(extents), "bytes": sum(length for _, length in extents)}

        return write

    def status(self) -> dict[str, Any]:
        """How far it is, and what holds it up: bytes, bytes a second, seconds. `profile_remaining_bytes` is the most that it can be."""
        run, remaining, now = self._run, self._engine.base_remaining_bytes, self._clock_ns()
        state, reason, resume_ns = self._state(now, remaining)
        moving = run is not None and state in ("running", "yielding")
        profile_bytes = 0
        if run is not None:
            prefetched = self._engine.copy_counters()["prefetched_bytes"] - run.prefetched_before_bytes
            profile_bytes = max(0, run.profile_bytes - prefetched)
        return {
            "state": state,
            "reason": reason,
            "copy_on_read": bool(self._engine.copy_on_read),
            "base_bytes": self._base_bytes,
            "copied_bytes": self._base_bytes - remaining,
            "remaining_bytes": remaining,
            "bytes_per_second": (run.speed.bytes_per_second() or 0.0) if run is not None and moving else 0.0,
            "limit_bytes_per_second": (run.options.rate_bytes or None) if run is not None else None,
            "eta_seconds": run.speed.eta_seconds(remaining) if run is not None and moving else None,
            "resume_seconds": None if resume_ns is None else max(0.0, (resume_ns - now) / SECOND_NS),
            "profile": run.profile.path if run is not None else None,
            "profile_remaining_bytes": min(remaining, profile_bytes),
            "released": self._released,
        }

    def _state(self, now: int, remaining: int) -> tuple[str, str, int | None]:
        run = self._run
        if self._released:
            return "done", "the base is not needed any longer", None
        if not remaining:
            return "done", "everything has been copied; the last changes are being committed", None
        if run is None:
            return "off", "", None
        if self._engine.base_failing:
            return "base-lost", "reading the base fails; it is being tried again", None
        if now < run.begin_ns:
            return "delayed", "the start delay has not passed", run.begin_ns
        if now < run.again_ns:
            return "paused", "what is left could not be copied now; it will be tried again", run.again_ns
        if run.decision is None:
            return "running", "", None
        return run.decision.state, run.decision.reason, run.decision.resume_ns

    # --- What the engine asks for -----------------------------------------------------------------------------------------------

    def on_want(self, wants: int) -> None:
        """Acts on Want.STEER and Want.BASE, and clears them in the engine; other bits are somebody else's."""
        mine = wants & (Want.STEER | Want.BASE)
        if not mine:
            return
        self._engine.want &= ~mine  # first: what is done about them may raise them again
        if self._released:
            return
        if self._engine.base_released:
            self._release()
            return
        self._watch_base()
        if self._run is not None:
            self._prefetch(self._run)

    def _watch_base(self) -> None:
        failing = self._engine.base_failing
        if failing == self._failing:
            return
        self._failing = failing
        if failing:
            self._tell("base_lost", f"{self._name}: reading its base {self._locator} fails; it is tried again")
        else:
            self._tell("base_back", f"{self._name}: its base {self._locator} can be read again")

    def _prefetch(self, run: _Run) -> None:
        now, remaining = self._clock_ns(), self._engine.base_remaining_bytes
        if not remaining:
            self._done()
            return
        if now < run.begin_ns:
            return
        counters = self._engine.copy_counters()
        if not run.begun:  # what happened during the delay says nothing about prefetching
            run.begun, run.counters = True, counters
        sample = sample_between(run.counters, counters, now_ns=now, base_failing=self._engine.base_failing, remaining_bytes=remaining)
        run.counters = counters
        run.speed.take(now, remaining)
        decision = run.decision = run.steering.step(sample)
        if decision.state not in ("running", "yielding"):
            run.speed.rest()
        if not self._engine.prefetching:
            self._pass_again(run, now, remaining)
        limits = [rate for rate in (run.options.rate_bytes, decision.rate_bytes) if rate]
        self._set(0 if now < run.again_ns else decision.slots, min(limits, default=0), 0 if decision.trickle else self._idle_ns)
        self._tell_progress(run, remaining)

    def _pass_again(self, run: _Run, now: int, remaining: int) -> None:
        """The plan has been gone through, and copies of it gave up."""
        if remaining >= run.pass_remaining_bytes:
            run.again_ns = now + AGAIN_NS
        run.pass_remaining_bytes = remaining
        self._engine.prefetch_plan([(0, self._base_bytes)])  # even if it must wait: the engine asks to be steered only while it has a plan

    def _tell_progress(self, run: _Run, remaining: int) -> None:
        percent = self._percent(remaining) // PROGRESS_PERCENT * PROGRESS_PERCENT
        if percent > run.percent_told:
            run.percent_told = percent
            self._tell("prefetch_progress", f"{self._name}: {percent} % of its base have been copied")

    def _done(self) -> None:
        self._end()
        self._tell("prefetch_done", f"{self._name}: everything of its base has been copied")

    def _release(self) -> None:
        self._released = True  # before the call: whatever becomes of it, it is not repeated
        if self._run is not None:
            self._done()
        try:
            self._release_base()
        except Exception:
            log.exception("%s: its base %s could not be closed; it is not used any longer all the same", self._name, self._locator)
        self._tell("base_released", f"{self._name}: its base {self._locator} is not needed any longer")

    # --- Small things -----------------------------------------------------------------------------------------------------------

    def _end(self) -> None:
        self._run = None
        self._engine.prefetch_plan([])
        self._set(0, 0, self._idle_ns)

    def _set(self, slots: int, rate_bytes: int, idle_ns: int) -> None:
        self._engine.prefetch_idle_ns = idle_ns
        self._engine.prefetch_rate_bytes = rate_bytes
        self._engine.prefetch_depth = slots

    def _clipped(self, extents: tuple[ReadRange, ...]) -> list[ReadRange]:
        end = self._base_bytes
        return [(offset, min(length, end - offset)) for offset, length in extents if offset < end]

    def _count_blocks(self, extents: tuple[ReadRange, ...]) -> int:
        """How many blocks the extents lie in, each counted once: copies are of whole blocks."""
        count = counted_to = 0
        for offset, length in sorted(self._clipped(extents)):
            first, end = max(counted_to, offset // self._block_bytes), -(-(offset + length) // self._block_bytes)
            count += max(0, end - first)
            counted_to = max(counted_to, end)
        return count

    def _percent(self, remaining: int) -> int:
        return 100 * (self._base_bytes - remaining) // self._base_bytes if self._base_bytes else 100

    def _tell(self, kind: BaseEventKind, message: str) -> None:
        if self._on_event is None:
            return
        remaining = self._engine.base_remaining_bytes
        eta = self._run.speed.eta_seconds(remaining) if self._run is not None else None
        try:
            self._on_event(BaseEvent(kind, message, self._base_bytes - remaining, self._base_bytes, eta))
        except Exception:
            log.exception("%s: whoever was told of %s failed; the disk goes on", self._name, kind)


def _check(options: PrefetchOptions, volume_name: str) -> None:
    """Raises InvalidArgument for what can never be."""
    if not math.isfinite(options.delay_s) or options.delay_s < 0:
        raise InvalidArgument(f"{volume_name}: a prefetch delay of {options.delay_s} s; give 0 or more seconds")
    if options.rate_bytes < 0:
        raise InvalidArgument(f"{volume_name}: a prefetch rate of {options.rate_bytes} bytes a second; give 0 (no limit) or more")
