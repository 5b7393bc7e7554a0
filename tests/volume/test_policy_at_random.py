# SPDX-License-Identifier: Apache-2.0
"""fvd.storage.policy: steps, failures, hands and clocks in any order, and what holds whatever happens."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fvd.errors import NoSpace
from fvd.format.geometry import Geometry
from fvd.storage.policy import (
    Action,
    Answer,
    Exhausted,
    GrowthEvent,
    GrowthPolicy,
    QueryGroup,
    ReadSize,
    Start,
    UseSize,
    WakeAt,
    initial_size_bytes,
    limit_size_bytes,
)

pytestmark = pytest.mark.pure

MIB = 1 << 20


class Growth(RuleBasedStateMachine):
    """Steps, failures, hands and clocks in any order: one step at a time, never beyond the limit, and growth never forgotten."""

    @initialize(low=st.integers(1, 200), virtual=st.integers(1, 600), tells=st.booleans())
    def begin(self, low: int, virtual: int, tells: bool) -> None:
        self.disk = Geometry(virtual_size_bytes=virtual * MIB, journal_size_bytes=MIB, grow_step_bytes=64 * MIB)
        self.size = self.known = initial_size_bytes(self.disk)
        self.used = 0
        self.now = 0.0
        self.running: int | None = None
        self.wake: float | None = None
        self.looks = 0
        self.asking = False
        self.policy = GrowthPolicy(self.disk, storage_size_bytes=self.size, low_water_bytes=low * MIB, notifies_space=tells)
        self.settle()

    @property
    def free(self) -> int:
        return (self.disk.slots_in(self.known) - self.used) * MIB

    def settle(self) -> None:
        self.take(self.policy.on_free_bytes(self.now, self.free))

    def take(self, actions: list[Action]) -> None:
        resized = False
        for action in actions:
            if isinstance(action, Start):
                assert self.running is None, "two steps at once"
                assert self.known < action.target_bytes <= limit_size_bytes(self.disk)
                self.running = action.target_bytes
            elif isinstance(action, UseSize):
                assert action.size_bytes > self.known
                self.known = action.size_bytes
                resized = True
            elif isinstance(action, WakeAt):
                self.wake = action.when
            elif isinstance(action, ReadSize):
                self.looks += 1
                assert self.looks == 1
            elif isinstance(action, QueryGroup):
                assert self.running is None
                self.asking = True
            else:
                assert isinstance(action, GrowthEvent | Answer | Exhausted)
        if resized:
            self.settle()

    @rule(count=st.integers(1, 50))
    def write(self, count: int) -> None:
        self.used = min(self.used + count, self.disk.slots_in(self.known))
        self.settle()

    @rule(count=st.integers(1, 50))
    def trim(self, count: int) -> None:
        self.used = max(self.used - count, 0)

    @precondition(lambda self: self.running is not None)
    @rule(part=st.sampled_from([0.0, 0.3, 1.0]), error=st.booleans(), readable=st.booleans())
    def end(self, part: float, error: bool, readable: bool) -> None:
        assert self.running is not None
        self.size = max(self.size, int(self.size + part * (self.running - self.size)))
        self.running = None
        self.take(self.policy.on_step_ended(self.now, self.size if readable else None, NoSpace("full") if error else None, self.free))

    @precondition(lambda self: self.wake is not None)
    @rule()
    def clock(self) -> None:
        assert self.wake is not None
        self.now, self.wake = max(self.now, self.wake), None
        self.take(self.policy.tick(self.now, self.free))

    @precondition(lambda self: self.looks)
    @rule()
    def look(self) -> None:
        self.looks = 0
        self.take(self.policy.on_size_read(self.size))

    @rule(by=st.integers(1, 300))
    def by_hand(self, by: int) -> None:
        self.size += by * MIB
        self.take(self.policy.poke(self.now, self.free))

    @rule()
    def on_space_freed(self) -> None:
        self.take(self.policy.on_space_freed(self.now, self.free))

    @rule()
    def resized(self) -> None:
        self.take(self.policy.on_device_resized())

    @rule(seconds=st.floats(0.0, 5.0))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        if self.wake is not None and self.now >= self.wake:
            self.clock()

    @rule(free=st.none() | st.integers(0, 600))
    def pooled(self, free: int | None) -> None:
        self.take(self.policy.on_group_report("vg0" if free is not None else None, None if free is None else free * MIB))

    @precondition(lambda self: self.asking)
    @rule(free=st.none() | st.integers(0, 600))
    def answered(self, free: int | None) -> None:
        self.asking = False
        group, free_bytes = (None, None) if free is None else ("vg0", free * MIB)
        self.take(self.policy.on_query_answered(self.now, group, free_bytes, self.free))

    @rule(by=st.integers(1, 300))
    def on_request(self, by: int) -> None:
        self.take(self.policy.extend(self.now, by * MIB))

    @invariant()
    def growth_is_never_forgotten(self) -> None:
        if not hasattr(self, "policy"):
            return
        if self.free < self.policy.look_below_bytes:  # as the engine would
            self.settle()
            assert self.free >= self.policy.look_below_bytes or self.policy.full
        if self.free < self.policy.low_water_at(self.now) and self.known < self.disk.max_storage_size_bytes:
            assert self.running is not None or self.wake is not None or self.asking

    @invariant()
    def the_mark_stays_in_its_bounds(self) -> None:
        if hasattr(self, "policy"):
            mark = self.policy.low_water_at(self.now)
            assert min(self.policy.base_low_water_bytes, self.disk.max_storage_size_bytes) <= mark <= self.disk.max_storage_size_bytes
            assert mark <= max(self.policy.base_low_water_bytes, 8 * self.disk.grow_step_bytes)


TestGrowth = Growth.TestCase
TestGrowth.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
