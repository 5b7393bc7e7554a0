# SPDX-License-Identifier: Apache-2.0
"""A model of what prefetching meets: bases with bursts and other tenants, an engine's copies and idle gate, on a virtual clock."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from fvd.base.steering import Decision, Steering, sample_between

MIB = 1 << 20
MS = 1_000_000
SECOND = 1_000_000_000
STEP_NS = 250 * MS
IDLE_NS = 20 * MS
BUFFERS = 8  # copies that are under way, in whatever phase


class Timeline:
    """Runs callbacks in the order of their times."""

    def __init__(self) -> None:
        self.now_ns = 0
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def at(self, when_ns: int, call: Callable[[], None]) -> None:
        heapq.heappush(self._events, (max(when_ns, self.now_ns), next(self._order), call))

    def run(self, until_seconds: float) -> None:
        while self._events and self._events[0][0] <= until_seconds * SECOND:
            self.now_ns, _, call = heapq.heappop(self._events)
            call()
        self.now_ns = round(until_seconds * SECOND)


@dataclass
class Medium:
    """A base or a disk: one queue at line speed behind a token bucket, then a delay. `slowness` is what others do to it."""

    delay_ns: int
    line_bytes_per_second: float
    limit_bytes_per_second: float = 0.0  # 0: none
    burst_bytes: float = 0.0
    slowness: float = 1.0
    served_bytes: int = 0
    _line_free_ns: float = 0.0
    _bucket_ns: float = field(default=-1e18)

    def serve(self, now_ns: int, size_bytes: int) -> int:
        """When a transfer that comes now will have ended."""
        self.served_bytes += size_bytes
        self._line_free_ns = max(now_ns, self._line_free_ns) + size_bytes / self.line_bytes_per_second * SECOND * self.slowness
        ready_ns = self._line_free_ns
        if self.limit_bytes_per_second:
            full_ns = now_ns - self.burst_bytes / self.limit_bytes_per_second * SECOND
            self._bucket_ns = max(self._bucket_ns, full_ns) + size_bytes / self.limit_bytes_per_second * SECOND * self.slowness
            ready_ns = max(ready_ns, self._bucket_ns)
        return round(ready_ns + self.delay_ns * self.slowness)


COUNTERS = (
    "guest_quiet_requests guest_quiet_latency_ns guest_busy_requests guest_busy_latency_ns guest_last_ns now_ns base_reads base_read_bytes "
    "base_service_ns base_latency_ns copy_writes copy_write_bytes copy_service_ns copy_latency_ns prefetched_bytes copied_bytes zero_bytes "
    "dropped_bytes no_slot_copies lazy_changes"
)


class Copier:
    """One disk: the engine's prefetching as its interface says it, steered every quarter of a second."""

    def __init__(
        self,
        timeline: Timeline,
        base: Medium,
        disk: Medium,
        *,
        seed: int = 1,
        phase_ns: int = 0,
        guest_active: Callable[[float], bool] = lambda _: False,
        jitter: float = 0.1,
        tells_latency: bool = False,
        copy_bytes: Callable[[random.Random], int] = lambda _: MIB,
    ) -> None:
        self.timeline, self.base, self.disk = timeline, base, disk
        self.rng = random.Random(seed)
        self.steering = Steering(random.Random(seed + 1_000_000))
        self.counters = dict.fromkeys(COUNTERS.split(), 0)
        self.counters["guest_last_ns"] = -SECOND
        self.before = dict(self.counters)
        self.guest_active, self.jitter, self.tells_latency, self.copy_bytes = guest_active, jitter, tells_latency, copy_bytes
        self.slots = 0
        self.idle_ns = IDLE_NS
        self.rate_bytes_per_second = 0
        self.next_by_rate_ns = 0
        self.reading = self.writing = 0
        self.failing = False
        self.history: list[tuple[float, Decision]] = []
        self.read_bytes_by_second: dict[int, int] = {}
        timeline.at(phase_ns, self.step)

    def step(self) -> None:
        now = self.timeline.now_ns
        self.look_at_guest()
        self.counters["now_ns"] = now
        counters = dict(self.counters)
        sample = sample_between(self.before, counters, now_ns=now, base_failing=self.failing, remaining_bytes=1 << 50)
        self.before = counters
        decision = self.steering.step(sample)
        self.history.append((now / SECOND, decision))
        self.slots, self.rate_bytes_per_second = decision.slots, decision.rate_bytes
        self.idle_ns = 0 if decision.trickle else IDLE_NS
        self.begin()
        self.timeline.at(now + STEP_NS, self.step)
        for moment in range(1, 12):  # the gate opens between two steps
            self.timeline.at(now + moment * IDLE_NS, self.begin)

    def look_at_guest(self) -> None:
        if self.guest_active(self.timeline.now_ns / SECOND):
            self.counters["guest_last_ns"] = self.timeline.now_ns

    def begin(self) -> None:
        self.look_at_guest()
        now = self.timeline.now_ns
        while (
            self.reading < self.slots
            and self.reading + self.writing < BUFFERS
            and now - self.counters["guest_last_ns"] >= self.idle_ns
            and now >= self.next_by_rate_ns
        ):
            size_bytes = self.copy_bytes(self.rng)
            if self.rate_bytes_per_second:
                self.next_by_rate_ns = now + size_bytes * SECOND // self.rate_bytes_per_second
            self.reading += 1
            end_ns = self.base.serve(now, size_bytes)
            end_ns += round((end_ns - now) * self.jitter * self.rng.random())
            self.timeline.at(end_ns, partial(self.read_ended, now, size_bytes))

    def read_ended(self, begin_ns: int, size_bytes: int) -> None:
        now, counters = self.timeline.now_ns, self.counters
        counters["base_reads"] += 1
        counters["base_read_bytes"] += size_bytes
        counters["base_service_ns"] += (now - begin_ns) // self.reading
        counters["base_latency_ns"] += (now - begin_ns) * self.tells_latency
        self.reading -= 1
        second = now // SECOND
        self.read_bytes_by_second[second] = self.read_bytes_by_second.get(second, 0) + size_bytes
        self.writing += 1
        self.timeline.at(self.disk.serve(now, size_bytes), lambda: self.write_ended(now, size_bytes))
        self.begin()

    def write_ended(self, begin_ns: int, size_bytes: int) -> None:
        now, counters = self.timeline.now_ns, self.counters
        counters["copy_writes"] += 1
        counters["copy_write_bytes"] += size_bytes
        counters["copy_service_ns"] += (now - begin_ns) // self.writing
        counters["copy_latency_ns"] += (now - begin_ns) * self.tells_latency
        self.writing -= 1
        counters["prefetched_bytes"] += size_bytes
        self.begin()

    def between(self, begin_seconds: float, end_seconds: float) -> list[Decision]:
        return [decision for when, decision in self.history if begin_seconds <= when < end_seconds]

    def read_bytes(self, begin_seconds: int, end_seconds: int) -> int:
        return sum(self.read_bytes_by_second.get(second, 0) for second in range(begin_seconds, end_seconds))


def fast_disk() -> Medium:
    return Medium(delay_ns=200_000, line_bytes_per_second=2e9)
