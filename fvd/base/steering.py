# SPDX-License-Identifier: Apache-2.0
"""How fast a disk may be prefetched: pure decisions. Knows no clock (times come as arguments), no I/O, no engine.

`Steering.step` is told every quarter of a second what happened since the last time and answers with how many copies may read at once.

What is measured of the base and of the disk is their *service time*: latency divided by how many copies were under way, which is how
long one copy keeps them busy, so that copies of our own do not count as somebody else's load. It is held against the best of the last
minute. More copies at once, or smaller ones, may rightly be served faster each; `Reading.allows` allows for both.

Three times worse has one innocent reason: a base with a rate limit is fast after a rest, until its burst is used up. A short rest tells the
two apart. A limit is fast again at once, for its bucket has filled; somebody else's load is still there. What is slow again after a rest
that helped is taken for the limit, for a minute. Everything else pauses prefetching for a random time, so that the disks of one base, which
all see the same, do not come back together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal, Protocol

SECOND_NS = 1_000_000_000
MILLISECOND_NS = 1_000_000

# How many copies are under way at once.
SLOTS_MAX = 8
USEFUL_SLOTS = 2  # one that is transferred while the next is on its way
DEEP_TIMES = 2.0  # copies that take this much longer than the quickest only wait in line, and whoever comes after them does too
DEEP_NS_MIN = 50 * MILLISECOND_NS  # a line that is shorter is none
QUICKEST_WINDOW_NS = 600 * SECOND_NS  # remembered for longer than the best: a line that lasts must not become what is usual

# When a base or a disk is slow because others use it too.
CONTENDED_TIMES = 3.0  # this much worse than the best is contention
WORSE_NS_MIN = 3 * MILLISECOND_NS  # but never less than this: jitter, and reads that come from a cache or not
BATCH_COPIES = 4  # fewer prove nothing
BATCH_NS_MAX = 2 * SECOND_NS  # unless this is how long they take
BAD_IN_ROW = 2  # batches or steps: one may be chance
WINDOW_NS = 60 * SECOND_NS  # the best of the last one, or two, is what is compared with
CONTENTION_NS_MAX = 300 * SECOND_NS  # what has been slow for this long is not going to be as it was

# Whether it is a limit (a bucket of tokens, which fills while prefetching rests) or contention (which does not care).
REST_SECONDS = (0.25, 0.5)  # drawn between these, so that disks do not rest in step
REST_COPIES = 16  # a rest lasts at least as long as so many copies took: a bucket fills no faster than it is emptied
REST_SECONDS_MAX = 4.0
REST_HELPED_TIMES = 2.0  # this much quicker after the rest than before it
RELAPSE_NS = 30 * SECOND_NS  # slow again this soon after a rest that helped: a limit
LIMIT_KNOWN_NS = 60 * SECOND_NS  # then it is found out anew: it may have gone

# Pauses: twice as long with each in a row.
BACKOFF_FIRST_SECONDS = 1.0
BACKOFF_SECONDS_MAX = 30.0
LOST_BACKOFF_SECONDS_MAX = 4.0  # a read that is tried on a base that fails costs nobody anything

# When the guest suffers: its requests beside copies, compared with those without any.
GUEST_TIMES = 1.25  # this much slower is suffering
GUEST_WORSE_NS_MIN = 250_000  # but never less than this
GUEST_REQUESTS_MIN = 8  # of either kind: fewer prove nothing
GUEST_HALF_LIFE_NS = 30 * SECOND_NS  # of what was seen
GUEST_HOLD_NS = 5 * SECOND_NS  # no more slots for so long after they were made fewer for the guest's sake

# When the guest is idle, and what is copied though it never is.
IDLE_NS = 20 * MILLISECOND_NS  # without a request
DRAINED_NS = 2 * SECOND_NS  # after a change for fewer slots: copies that were allowed before have ended
STARVED_NS = 60 * SECOND_NS  # never idle for so long: from then on a trickle is copied all the same
TRICKLE_NS = SECOND_NS  # between two copies of it
TRICKLE_RATE_BYTES = 1 << 20

State = Literal["running", "yielding", "paused", "full", "base-lost"]
Cause = Literal["", "base", "disk", "guest", "full", "lost"]


class Rng(Protocol):
    """What is needed of random.Random."""

    def uniform(self, a: float, b: float, /) -> float: ...


@dataclass(frozen=True)
class Sample:
    """What happened since the last step. Counts are differences; times are nanoseconds."""

    now_ns: int
    base_reads: int = 0
    base_read_bytes: int = 0
    base_service_ns: int = 0
    base_latency_ns: int = 0  # undivided; 0: not told, then every slot is taken to have been in use
    copy_writes: int = 0
    copy_write_bytes: int = 0
    copy_service_ns: int = 0
    copy_latency_ns: int = 0
    zero_bytes: int = 0
    no_slot_copies: int = 0
    guest_quiet_requests: int = 0
    guest_quiet_latency_ns: int = 0
    guest_busy_requests: int = 0
    guest_busy_latency_ns: int = 0
    guest_idle_ns: int = SECOND_NS  # since the guest's last request began or ended
    base_failing: bool = False
    remaining_bytes: int = 1


_STATES = ("now_ns", "guest_idle_ns", "base_failing", "remaining_bytes")
_DIFFERENCES = tuple(field.name for field in fields(Sample) if field.name not in _STATES)


def sample_between(before: Mapping[str, int], after: Mapping[str, int], *, now_ns: int, base_failing: bool, remaining_bytes: int) -> Sample:
    """The sample between two readings of `Engine.copy_counters()`, whose own clock tells how long the guest has been idle."""
    return Sample(
        now_ns=now_ns,
        guest_idle_ns=max(0, after["now_ns"] - after["guest_last_ns"]),
        base_failing=base_failing,
        remaining_bytes=remaining_bytes,
        **{name: max(0, after.get(name, 0) - before.get(name, 0)) for name in _DIFFERENCES},
    )


@dataclass(frozen=True)
class Decision:
    """What holds until the next step."""

    slots: int
    state: State
    reason: str  # a sentence for people; empty: nothing is in the way
    cause: Cause = ""
    trickle: bool = False  # one copy may begin although the guest is active: the idle gate is open for this step
    rate_bytes: int = 0  # per second, besides the user's own limit; 0: none
    resume_ns: int | None = None  # when prefetching tries again


@dataclass(frozen=True)
class EndedCopies:
    """Copies that have ended since the last step, as one side of them saw it: their reads of the base, or their writes to the disk."""

    copies: int
    size_bytes: int
    service_ns: int
    latency_ns: int  # see `Sample`
    zero_bytes: int


@dataclass(frozen=True)
class Reading:
    """The mean of a batch of copies: service time, size, and how many were under way."""

    service_ns: float
    size_bytes: float
    slots: float

    @property
    def latency_ns(self) -> float:
        return self.service_ns * self.slots

    def quicker_than(self, before: Reading, times: float) -> bool:
        """Whether things have become better since `before`, when at least as many were under way."""
        return self.service_ns * times < before.service_ns * min(1.0, self.size_bytes / before.size_bytes)

    def allows(self, slots: float, size_bytes: float) -> float:
        """The service time that copies of this size, so many at once, may have if nothing has become worse since this reading.

        Fewer at once do not take longer each, only less of it is shared; more cannot make one keep the base busy for longer. A smaller one
        takes no longer than a larger one, and a larger one at most as much longer as it is larger.
        """
        return self.service_ns * max(1.0, self.slots / slots) * max(1.0, size_bytes / self.size_bytes)


class Gauge:
    """How long one copy keeps the base (or the disk) busy, against the best of the last minute."""

    def __init__(self) -> None:
        self.last: Reading | None = None
        self.last_expected_ns = 0.0
        self._before_rest: Reading | None = None  # how it was, and no longer is if the rest helped
        self.limit: Reading | None = None  # what is known to be a limit, and no contention
        self._limit_until_ns = 0
        self._rest_helped_until_ns = 0
        self._contended_since_ns: int | None = None
        self._bad_in_row = 0
        # Two windows, for "the last minute" without remembering every batch. By slots and size: see `Reading.allows`.
        self._best: dict[tuple[int, int], Reading] = {}
        self._older: dict[tuple[int, int], Reading] = {}
        self._window_began_ns: int | None = None
        self._quickest_ns = (math.inf, math.inf)  # the latency, in two windows as well
        self._quickest_began_ns = 0
        self.forget_batch()

    def forget_batch(self) -> None:
        """What has been counted so far belongs to other circumstances."""
        self._copies = self._bytes = self._service_ns = self._latency_ns = self._zero_bytes = 0
        self._batch_began_ns: int | None = None
        self._bad_in_row = 0

    def take(
        self,
        now_ns: int,
        ended: EndedCopies,
        *,
        slots: int,
        widest: int,
        probing: bool,
    ) -> Literal["", "good", "suspect", "bad"]:
        """Counts copies that have ended, `slots` of which are allowed at once, and `widest` were; judges when there are enough (else "").

        `probing`: the first after a rest or a pause. One batch is enough then, for there was reason before, and a known limit is no excuse.
        """
        self._turn(now_ns)
        if ended.copies:
            self._batch_began_ns = now_ns if self._batch_began_ns is None else self._batch_began_ns
            self._copies += ended.copies
            self._bytes += ended.size_bytes
            self._service_ns += ended.service_ns
            self._latency_ns += ended.latency_ns
            self._zero_bytes += ended.zero_bytes
        if self._batch_began_ns is None or (self._copies < BATCH_COPIES and now_ns - self._batch_began_ns < BATCH_NS_MAX):
            return ""
        told = self._latency_ns > 0 and self._service_ns > 0
        at_once = self._latency_ns / self._service_ns if told else slots
        reading = Reading(self._service_ns / self._copies, max(1.0, self._bytes / self._copies), min(max(at_once, 1.0), float(SLOTS_MAX)))
        mostly_zeros = self._zero_bytes * 2 > self._bytes
        row = self._bad_in_row
        self.forget_batch()
        self.last = reading
        best_ns = self.expected_ns(reading)
        self.last_expected_ns = reading.service_ns if best_ns is None else best_ns
        if best_ns is None or not _much_worse(reading.service_ns, best_ns):
            if not mostly_zeros:  # a hole is read in no time, which says nothing of what the rest may take
                # Where it is not told how many there were, the benefit of the doubt is the copies' now, and not of those that follow.
                self._remember(reading if told else replace(reading, slots=float(widest)))
            self._contended_since_ns = None
            return "good"
        if self.limit is not None and not probing:
            if now_ns >= self._limit_until_ns:
                self.limit = None
            elif not _much_worse(reading.service_ns, self.limit.allows(reading.slots, reading.size_bytes)):
                return "good"
        before, self._before_rest = self._before_rest, None
        if probing and before is not None and reading.quicker_than(before, REST_HELPED_TIMES):
            return "good"  # a small bucket is empty again before the batch has ended
        self._bad_in_row = row + 1
        return "bad" if probing or self._bad_in_row >= BAD_IN_ROW else "suspect"

    def expected_ns(self, reading: Reading) -> float | None:
        """What the best of the last minute lets expect of such copies; None: nothing is known."""
        known = [*self._best.values(), *self._older.values()]
        return min((best.allows(reading.slots, reading.size_bytes) for best in known), default=None)

    def too_deep(self) -> bool:
        """Whether the last batch waited in a line that is mostly our own making: fewer at once would be as fast together."""
        return self.last is not None and self.last.latency_ns > max(DEEP_TIMES * min(self._quickest_ns), DEEP_NS_MIN)

    def is_limit(self, now_ns: int) -> bool:
        """To be asked when it is bad. True: a rest helped a moment ago, so this is what it allows us, and is taken as such from now on."""
        if now_ns >= self._rest_helped_until_ns or self.last is None:
            return False
        self.limit, self._limit_until_ns = self.last, now_ns + LIMIT_KNOWN_NS
        self._rest_helped_until_ns = 0
        return True

    def rest_begins(self) -> float:
        """Prefetching rests, to see whether that helps. Returns the service time that is the reason for it."""
        self._before_rest = self.last
        return self.last.service_ns if self.last else 0.0

    def rest_helped(self, now_ns: int) -> None:
        self._rest_helped_until_ns = now_ns + RELAPSE_NS

    def contended(self, now_ns: int) -> None:
        """A pause begins for its sake. The best is not forgotten meanwhile, but not for ever either."""
        if self._contended_since_ns is None:
            self._contended_since_ns = now_ns

    def _turn(self, now_ns: int) -> None:
        if now_ns - self._quickest_began_ns >= QUICKEST_WINDOW_NS:
            self._quickest_ns, self._quickest_began_ns = (math.inf, self._quickest_ns[0]), now_ns
        if self._window_began_ns is None:
            self._window_began_ns = now_ns
        elif self._contended_since_ns is not None:
            if now_ns - self._contended_since_ns >= CONTENTION_NS_MAX:
                self._best, self._older, self._window_began_ns, self._contended_since_ns = {}, {}, now_ns, None
        elif now_ns - self._window_began_ns >= WINDOW_NS:
            self._older, self._best, self._window_began_ns = self._best, {}, now_ns

    def _remember(self, reading: Reading) -> None:
        self._quickest_ns = (min(self._quickest_ns[0], reading.latency_ns), self._quickest_ns[1])
        key = (round(reading.slots), int(reading.size_bytes).bit_length())
        known = self._best.get(key)
        if known is None or reading.service_ns < known.service_ns:
            self._best[key] = reading


def _much_worse(service_ns: float, expected_ns: float) -> bool:
    return service_ns > max(CONTENDED_TIMES * expected_ns, expected_ns + WORSE_NS_MIN)


class GuestGauge:
    """How long the guest's requests take while copies are under way, against those without."""

    def __init__(self) -> None:
        self.times = 1.0  # as long as without
        self._quiet_requests = self._quiet_ns = 0.0
        self._busy_requests = self._busy_ns = 0.0
        self._bad_in_row = 0
        self._at_ns: int | None = None

    def take(self, sample: Sample) -> bool:
        """Counts; whether the guest suffers. The fewer requests there are to judge by, the clearer it must be."""
        if self._at_ns is not None:
            kept = math.exp2(-max(0, sample.now_ns - self._at_ns) / GUEST_HALF_LIFE_NS)
            self._quiet_requests, self._quiet_ns = self._quiet_requests * kept, self._quiet_ns * kept
            self._busy_requests, self._busy_ns = self._busy_requests * kept, self._busy_ns * kept
        self._at_ns = sample.now_ns
        self._quiet_requests += sample.guest_quiet_requests
        self._quiet_ns += sample.guest_quiet_latency_ns
        self._busy_requests += sample.guest_busy_requests
        self._busy_ns += sample.guest_busy_latency_ns
        if not sample.guest_busy_requests or min(self._quiet_requests, self._busy_requests) < GUEST_REQUESTS_MIN:
            return False
        quiet_ns = self._quiet_ns / self._quiet_requests
        busy_ns = self._busy_ns / self._busy_requests
        # Two standard deviations of a mean whose values scatter as much as they are large, as latencies do.
        noise = 2 / math.sqrt(min(self._quiet_requests, self._busy_requests))
        if busy_ns <= max(quiet_ns * (GUEST_TIMES + noise), quiet_ns + GUEST_WORSE_NS_MIN):
            self._bad_in_row = 0
            return False
        self._bad_in_row += 1
        if self._bad_in_row < BAD_IN_ROW:
            return False
        self.times = busy_ns / quiet_ns if quiet_ns else math.inf
        self.forget_busy()
        return True

    def forget_busy(self) -> None:
        """From here on other circumstances hold."""
        self._busy_requests = self._busy_ns = 0.0
        self._bad_in_row = 0


class Steering:
    """One disk's prefetching, from its start to its end. `rng` makes the pauses differ from those of other disks."""

    def __init__(self, rng: Rng) -> None:
        self._rng = rng
        self._base = Gauge()
        self._disk = Gauge()
        self._guest = GuestGauge()
        self._slots = 0  # what the last decision allowed
        self._label = 0  # how many may be under way: after a change for fewer, for a while still as many as before
        self._label_until_ns = 0
        self._wanted = 1
        self._doubling = True  # nothing has been in the way yet: find the depth that is useful quickly
        self._hold_until_ns = 0
        self._backoff_seconds = BACKOFF_FIRST_SECONDS
        self._resume_ns: int | None = None  # not None: a rest or a pause
        self._resting: Gauge | None = None
        self._probing: Gauge | None = None  # the gauge whose next batch decides
        self._probing_after_rest = False
        self._resumed_ns = 0
        self._pause_state: State = "paused"
        self._cause: Cause = ""
        self._reason = ""
        self._failing = False
        self._guest_idle_at_ns: int | None = None
        self._trickled_ns: int | None = None  # not None: the guest is never idle

    def step(self, sample: Sample) -> Decision:
        """The answer to a sample. Called about every 250 ms; longer and shorter intervals do no harm."""
        decision = self._decide(sample)
        if decision.slots < self._slots:
            self._label_until_ns = sample.now_ns + DRAINED_NS
        self._slots = decision.slots
        self._label = max(self._label, decision.slots)
        return decision

    def _decide(self, sample: Sample) -> Decision:
        now = sample.now_ns
        self._watch_idle(sample)
        if sample.remaining_bytes == 0:
            return Decision(0, "running", "everything has been copied")
        if sample.base_failing != self._failing:
            self._failing = sample.base_failing
            if sample.base_failing:
                self._pause(now, "base-lost", "lost", "reading the base fails; it is being tried again")
            elif self._cause == "lost":
                # Every disk of this base sees it come back at the same moment.
                self._backoff_seconds = BACKOFF_FIRST_SECONDS
                self._pause(now, "paused", "base", "the base has come back; a random wait keeps its disks from resuming together")
        if self._resume_ns is not None:
            if now < self._resume_ns:
                return self._waiting()
            self._resume(now)
        else:
            if sample.base_failing and self._slots:  # whatever was let through to find out has found out
                self._pause(now, "base-lost", "lost", "reading the base fails; it is being tried again")
                return self._waiting()
            self._judge(sample)
            if self._resume_ns is not None:
                return self._waiting()
        return self._running(sample)

    # --- What is seen -----------------------------------------------------------------------------------------------------------

    def _watch_idle(self, sample: Sample) -> None:
        now = sample.now_ns
        # A step sees only its own moment; copies that were made say that there were idle ones. Unless they were let through.
        idle = sample.guest_idle_ns >= IDLE_NS or (sample.base_reads > 0 and self._trickled_ns is None)
        if idle or self._guest_idle_at_ns is None:
            self._guest_idle_at_ns, self._trickled_ns = now, None

    def _judge(self, sample: Sample) -> None:
        now = sample.now_ns
        if self._slots < self._label and now >= self._label_until_ns:
            self._label = self._slots
        slots, widest = max(1, self._slots), max(1, self._label)
        if sample.no_slot_copies:
            self._pause(now, "full", "full", "the storage has no space left for copies; the guest's writes have the rest")
            return
        reads = EndedCopies(sample.base_reads, sample.base_read_bytes, sample.base_service_ns, sample.base_latency_ns, sample.zero_bytes)
        writes = EndedCopies(sample.copy_writes, sample.copy_write_bytes, sample.copy_service_ns, sample.copy_latency_ns, 0)
        base = self._base.take(now, reads, slots=slots, widest=widest, probing=self._probing is self._base)
        disk = self._disk.take(now, writes, slots=slots, widest=widest, probing=self._probing is self._disk)
        looked: tuple[tuple[Gauge, str, Literal["base", "disk"]], ...] = ((self._base, base, "base"), (self._disk, disk, "disk"))
        for gauge, verdict, cause in looked:
            if verdict == "bad" and self._slow(now, gauge, cause):
                return
            if verdict == "good" and self._probing is gauge:
                if self._probing_after_rest:
                    gauge.rest_helped(now)
                self._probing = None
        if self._probing is self._disk and base == "good" and not sample.copy_writes and now - self._resumed_ns >= BATCH_NS_MAX:
            self._probing = None  # zeros, which are not written: there is nothing to judge the disk by
        if self._trickled_ns is None and self._guest.take(sample):
            self._guest_suffers(now)
            return
        if base == "suspect" or disk == "suspect" or "bad" in (base, disk):
            return
        if base == "good" and self._probing is None:
            self._backoff_seconds = max(BACKOFF_FIRST_SECONDS, self._backoff_seconds / 2)
        if self._probing is None and now >= self._hold_until_ns:
            if base == "good" and self._base.too_deep():
                self._wanted, self._doubling = max(USEFUL_SLOTS, self._wanted - 1), False
            elif self._doubling and sample.base_reads:
                self._wanted = min(SLOTS_MAX, self._wanted * 2)
            elif base == "good":
                self._wanted = min(SLOTS_MAX, self._wanted + 1)

    def _slow(self, now: int, gauge: Gauge, cause: Literal["base", "disk"]) -> bool:
        """It is slow. Returns whether prefetching stops for it."""
        if self._probing is not gauge:
            if gauge.is_limit(now):
                return False
            self._resting = gauge
            self._cause = cause
            self._reason = f"{self._comparison(gauge, cause)}; a short rest will show whether somebody else is the reason"
            seconds = min(REST_SECONDS_MAX, REST_COPIES * gauge.rest_begins() / SECOND_NS)
            self._resume_ns = now + round(max(seconds, self._rng.uniform(*REST_SECONDS)) * SECOND_NS)
            return True
        gauge.contended(now)
        self._pause(now, "paused", cause, f"somebody else needs the {cause}: {self._comparison(gauge, cause)}", gauge)
        return True

    @staticmethod
    def _comparison(gauge: Gauge, cause: Literal["base", "disk"]) -> str:
        seen_ms = gauge.last.service_ns / MILLISECOND_NS if gauge.last else 0.0
        what = "a read from the base" if cause == "base" else "a write to the disk"
        return f"{what} takes {seen_ms:.3g} ms, where {gauge.last_expected_ns / MILLISECOND_NS:.3g} ms were enough"

    def _guest_suffers(self, now: int) -> None:
        words = f"the guest's requests take {self._guest.times:.1f} times as long beside copies as without"
        self._doubling = False
        if self._wanted > 1:
            self._wanted //= 2
            self._hold_until_ns = now + GUEST_HOLD_NS
            self._cause, self._reason = "guest", f"{words}: fewer copies at once"
        else:
            self._pause(now, "paused", "guest", words)

    # --- What follows -----------------------------------------------------------------------------------------------------------

    def _pause(self, now: int, state: State, cause: Cause, reason: str, gauge: Gauge | None = None) -> None:
        if cause == "lost":
            self._backoff_seconds = min(self._backoff_seconds, LOST_BACKOFF_SECONDS_MAX)
        self._resume_ns = now + round(self._backoff_seconds * self._rng.uniform(0.5, 1.5) * SECOND_NS)
        self._backoff_seconds = min(BACKOFF_SECONDS_MAX, self._backoff_seconds * 2)
        self._pause_state, self._cause, self._reason = state, cause, reason
        self._resting, self._probing = None, gauge
        self._doubling = False
        self._wanted = 1

    def _resume(self, now: int) -> None:
        self._resume_ns, self._resumed_ns = None, now
        self._label = 0
        self._probing_after_rest = self._resting is not None
        if self._resting is not None:
            self._probing, self._resting, self._wanted, self._doubling = self._resting, None, 1, True
        for gauge in (self._base, self._disk):
            gauge.forget_batch()
        self._guest.forget_busy()

    def _waiting(self) -> Decision:
        if self._resting is not None:
            return Decision(0, "running", self._reason, self._cause, resume_ns=self._resume_ns)
        return Decision(0, self._pause_state, self._reason, self._cause, resume_ns=self._resume_ns)

    def _running(self, sample: Sample) -> Decision:
        now = sample.now_ns
        if self._probing is None and now >= self._hold_until_ns and not sample.base_failing:
            self._cause, self._reason = "", ""
        if sample.base_failing:
            return Decision(1, "base-lost", self._reason, "lost")
        if sample.guest_idle_ns >= IDLE_NS or (sample.base_reads and self._trickled_ns is None):
            return Decision(self._wanted, "running", self._reason, self._cause)
        if self._guest_idle_at_ns is None or now - self._guest_idle_at_ns < STARVED_NS:
            return Decision(self._wanted, "yielding", "the guest is active", "guest")
        due = self._trickled_ns is None or now - self._trickled_ns >= TRICKLE_NS
        if due:
            self._trickled_ns = now
        reason = "the guest has not been idle for a minute: one small copy a second is let through"
        return Decision(1, "yielding", reason, "guest", trickle=due, rate_bytes=TRICKLE_RATE_BYTES)
