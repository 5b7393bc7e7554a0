"""fvd.volume.policy: when storage grows and to what size, decided without threads and without time passing."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fvd.errors import InvalidArgument, NoSpace, Timeout
from fvd.format.geometry import Geometry, Layout
from fvd.volume.policy import (
    Action,
    Answer,
    Exhausted,
    GrowthEvent,
    GrowthPolicy,
    Look,
    Start,
    UseSize,
    WakeAt,
    check_low_water,
    default_low_water_bytes,
    initial_size_bytes,
    least_size_bytes,
    limit_size_bytes,
    next_size_bytes,
)

MIB = 1 << 20
GIB = 1 << 30
DISK = Geometry(virtual_size_bytes=GIB, journal_size_bytes=MIB, grow_step_bytes=64 * MIB)  # 3 MiB of metadata
STEP = DISK.grow_step_bytes


def policy(**changes: object) -> GrowthPolicy:
    options = {"storage_size_bytes": STEP, "low_water_bytes": STEP // 2} | changes
    return GrowthPolicy(DISK, **options)  # type: ignore[arg-type]


def kinds(actions: list[Action]) -> list[str]:
    return [action.kind if isinstance(action, GrowthEvent) else type(action).__name__ for action in actions]


def only(actions: list[Action], kind: type) -> Action:
    (found,) = [action for action in actions if isinstance(action, kind)]
    return found


# --- Sizes -------------------------------------------------------------------------------------------------------


def test_sizes_of_a_usual_disk() -> None:
    disk = Geometry(virtual_size_bytes=100 * GIB)
    assert initial_size_bytes(disk) == 5 * GIB
    assert limit_size_bytes(disk) == 105 * GIB
    assert next_size_bytes(disk, 5 * GIB) == 10 * GIB
    assert next_size_bytes(disk, 7 * GIB + 1) == 10 * GIB
    assert next_size_bytes(disk, 100 * GIB) == disk.max_storage_size_bytes
    assert default_low_water_bytes(disk) == 5 * GIB // 2
    assert least_size_bytes(disk) == disk.data_offset_bytes + MIB


def test_a_small_disk_takes_no_more_than_it_can_use() -> None:
    assert initial_size_bytes(Geometry(virtual_size_bytes=GIB)) == Geometry(virtual_size_bytes=GIB).max_storage_size_bytes


def test_metadata_larger_than_a_step_takes_more_steps() -> None:
    disk = Geometry(virtual_size_bytes=1 << 40, grow_step_bytes=10 * MIB)
    assert disk.data_offset_bytes + MIB <= initial_size_bytes(disk) == 30 * MIB


def test_raw_takes_everything() -> None:
    disk = Geometry(virtual_size_bytes=100 * GIB, layout=Layout.RAW)
    assert initial_size_bytes(disk) == least_size_bytes(disk) == disk.max_storage_size_bytes


def test_low_water() -> None:
    with pytest.raises(InvalidArgument, match="one chunk"):
        check_low_water(DISK, MIB - 1)
    assert check_low_water(DISK, MIB) == MIB
    assert check_low_water(DISK, 1 << 50) == DISK.max_storage_size_bytes
    assert default_low_water_bytes(Geometry(virtual_size_bytes=GIB, grow_step_bytes=MIB)) == MIB


# --- A step ------------------------------------------------------------------------------------------------------


def test_nothing_happens_above_the_mark() -> None:
    assert policy().room(0.0, STEP // 2) == []


def test_a_step_begins_below_the_mark_and_only_one() -> None:
    growth = policy()
    actions = growth.room(0.0, STEP // 2 - MIB)
    assert kinds(actions) == ["low_water", "extend_started", "Start", "WakeAt"]
    assert only(actions, Start) == Start(2 * STEP)
    assert growth.room(0.1, STEP // 2 - 2 * MIB) == []


def test_a_step_that_works() -> None:
    growth = policy()
    growth.room(0.0, 31 * MIB)
    actions = growth.ended(2.0, 2 * STEP, None, 30 * MIB)
    assert kinds(actions) == ["UseSize", "extend_done"]
    done = only(actions, GrowthEvent)
    assert isinstance(done, GrowthEvent)
    assert (done.seconds, done.storage_size_bytes, done.free_bytes) == (2.0, 2 * STEP, 94 * MIB)
    assert (growth.last_extend_seconds, growth.steps_done) == (2.0, 1)
    assert growth.room(2.0, 94 * MIB) == []


def test_the_next_step_begins_when_the_first_was_not_enough() -> None:
    growth = policy(low_water_bytes=3 * STEP)
    growth.room(0.0, 0)
    growth.ended(1.0, 2 * STEP, None, 0)
    assert only(growth.room(1.0, 64 * MIB), Start) == Start(3 * STEP)


def test_the_last_step_stops_at_what_the_disk_can_use() -> None:
    growth = policy(storage_size_bytes=16 * STEP)
    assert only(growth.room(0.0, 0), Start) == Start(DISK.max_storage_size_bytes)
    growth.ended(1.0, DISK.max_storage_size_bytes, None, 0)
    assert growth.full
    assert growth.room(2.0, 0) == []


def test_growth_beyond_the_limit_is_a_bug_that_is_caught() -> None:
    growth = policy()
    growth._asked_bytes = limit_size_bytes(DISK) + 1
    with pytest.raises(AssertionError, match="beyond the limit"):
        growth.room(0.0, 0)


# --- What goes wrong ---------------------------------------------------------------------------------------------


def test_a_step_that_fails_is_tried_again_every_second_while_writes_wait() -> None:
    growth = policy()
    growth.room(0.0, 0)
    actions = growth.ended(0.5, STEP, NoSpace("the group is full"), 0)
    assert kinds(actions) == ["extend_failed", "Exhausted", "WakeAt"]
    assert only(actions, WakeAt) == WakeAt(1.5)
    assert only(growth.tick(1.0, 0), WakeAt) == WakeAt(1.5)
    now = 1.5
    for _ in range(5):
        assert "Start" in kinds(growth.tick(now, 0))
        actions = growth.ended(now, STEP, NoSpace("the group is full"), 0)
        assert kinds(actions) == ["Exhausted", "WakeAt"]  # said once
        now += 1.0
        assert only(actions, WakeAt) == WakeAt(now)
    assert "extend_failed" in kinds(growth.tick(now, 0) and growth.ended(now, STEP, NoSpace("something else"), 0))


def test_it_rests_longer_while_the_reserve_holds() -> None:
    growth = policy()
    now, rests = 0.0, []
    for _ in range(7):
        assert "Start" in kinds(growth.tick(now, MIB))
        wake = only(growth.ended(now, STEP, NoSpace("full"), MIB), WakeAt)
        assert isinstance(wake, WakeAt)
        rests.append(wake.when - now)
        now = wake.when
    assert rests == [1, 2, 4, 8, 16, 30, 30]
    # The reserve runs out: now it is tried every second.
    growth.tick(now, MIB)
    growth.ended(now, STEP, NoSpace("full"), MIB)
    assert growth.room(now + 0.1, 0) == [WakeAt(now + 1.1)]


def test_a_rest_ends_when_chunks_were_freed() -> None:
    growth = policy()
    growth.room(0.0, 0)
    growth.ended(0.0, STEP, NoSpace("full"), 0)
    assert growth.tick(1.0, STEP) == []
    assert growth.tick(100.0, STEP) == []


def test_poke_ends_a_rest() -> None:
    growth = policy()
    growth.room(0.0, 0)
    growth.ended(0.0, STEP, NoSpace("full"), 0)
    assert "Start" in kinds(growth.poke(0.1, 0))


def test_poke_looks_at_storage_that_is_not_low() -> None:
    growth = policy()
    assert kinds(growth.poke(0.0, STEP)) == ["Look"]
    assert kinds(growth.poke(0.0, STEP)) == []  # one look at a time
    assert growth.looked(3 * STEP) == [UseSize(3 * STEP)]


def test_a_step_that_half_succeeds() -> None:
    growth = policy()
    growth.room(0.0, 0)
    half = STEP + STEP // 2
    actions = growth.ended(1.0, half, NoSpace("no more"), 0)
    assert kinds(actions) == ["UseSize", "extend_failed", "Exhausted", "WakeAt"]
    assert only(actions, UseSize) == UseSize(half)
    assert only(growth.tick(2.0, 0), Start) == Start(2 * STEP)


def test_a_step_that_reports_an_error_and_worked() -> None:
    growth = policy()
    growth.room(0.0, 0)
    actions = growth.ended(1.0, 2 * STEP, NoSpace("nonsense"), 0)
    assert kinds(actions) == ["UseSize", "extend_done"]
    assert "nonsense" in str(actions[1])


def test_a_step_that_reports_success_and_did_nothing() -> None:
    growth = policy()
    growth.room(0.0, 0)
    actions = growth.ended(1.0, STEP, None, 0)
    assert kinds(actions) == ["extend_failed", "Exhausted", "WakeAt"]


def test_a_step_that_hangs_is_reported_and_its_late_success_used() -> None:
    growth = policy(extend_timeout_seconds=10.0)
    assert only(growth.room(0.0, 0), WakeAt) == WakeAt(10.0)
    assert growth.tick(5.0, 0) == [WakeAt(10.0)]
    actions = growth.tick(10.0, 0)
    assert kinds(actions) == ["extend_slow", "Exhausted", "Look", "WakeAt"]
    growth.looked(STEP)
    assert kinds(growth.tick(11.0, 0)) == ["Look", "WakeAt"]  # reported once, looked at every second, never begun twice
    assert growth.room(11.0, 0) == []
    assert kinds(growth.ended(60.0, 2 * STEP, None, 0)) == ["UseSize", "extend_done"]


def test_a_step_that_hangs_and_has_worked_all_the_same() -> None:
    growth = policy(extend_timeout_seconds=10.0)
    growth.room(0.0, 0)
    growth.tick(10.0, 0)
    assert growth.looked(2 * STEP) == [UseSize(2 * STEP)]
    assert kinds(growth.ended(20.0, 2 * STEP, Timeout("killed"), 64 * MIB)) == ["extend_done"]


def test_a_size_that_cannot_be_read_changes_nothing() -> None:
    growth = policy()
    growth.room(0.0, 0)
    assert kinds(growth.ended(1.0, None, NoSpace("full"), 0)) == ["extend_failed", "Exhausted", "WakeAt"]
    assert growth.storage_size_bytes == STEP


def test_storage_never_shrinks() -> None:
    growth = policy(storage_size_bytes=4 * STEP)
    assert growth.looked(STEP) == []
    assert growth.storage_size_bytes == 4 * STEP


def test_storage_added_by_hand_counts_and_steps_go_on_from_there() -> None:
    growth = policy()
    growth.room(0.0, 0)
    assert only(growth.ended(1.0, 5 * STEP + MIB, None, 0), UseSize) == UseSize(5 * STEP + MIB)
    assert only(growth.room(1.0, MIB), Start) == Start(6 * STEP)


def test_fixed_storage_announces_no_step() -> None:
    growth = policy(can_grow=False)
    assert kinds(growth.room(0.0, 0)) == ["low_water", "Start", "WakeAt"]


# --- Growth on request -------------------------------------------------------------------------------------------


def test_extend() -> None:
    growth = policy()
    assert only(growth.extend(0.0, 10 * MIB), Start) == Start(STEP + 10 * MIB)
    actions = growth.ended(1.0, STEP + 10 * MIB, None, STEP)
    assert kinds(actions) == ["UseSize", "extend_done", "Answer"]
    assert only(actions, Answer) == Answer(None)


def test_extend_at_most_to_what_the_disk_can_use() -> None:
    growth = policy()
    assert only(growth.extend(0.0, 1 << 50), Start) == Start(DISK.max_storage_size_bytes)


def test_extend_of_a_full_disk_is_fine() -> None:
    growth = policy(storage_size_bytes=DISK.max_storage_size_bytes)
    assert growth.extend(0.0, GIB) == [Answer(None)]


def test_extend_while_a_step_runs() -> None:
    growth = policy()
    growth.room(0.0, 0)
    assert growth.extend(0.1, 3 * STEP) == []
    actions = growth.ended(1.0, 2 * STEP, None, 0)
    assert only(actions, Start) == Start(4 * STEP)
    assert "Answer" not in kinds(actions)
    assert only(growth.ended(2.0, 4 * STEP, None, 0), Answer) == Answer(None)


def test_extend_that_fails() -> None:
    growth = policy()
    growth.extend(0.0, STEP)
    error = NoSpace("full")
    assert only(growth.ended(1.0, STEP, error, STEP), Answer) == Answer(error)


def test_extend_that_hangs() -> None:
    growth = policy(extend_timeout_seconds=10.0)
    growth.extend(0.0, STEP)
    answer = only(growth.tick(10.0, STEP), Answer)
    assert isinstance(answer, Answer) and isinstance(answer.error, Timeout)


# --- Anything at all ---------------------------------------------------------------------------------------------


class Growth(RuleBasedStateMachine):
    """Steps, failures, hands and clocks in any order: one step at a time, never beyond the limit, and growth never forgotten."""

    @initialize(low=st.integers(1, 200), virtual=st.integers(1, 600))
    def begin(self, low: int, virtual: int) -> None:
        self.disk = Geometry(virtual_size_bytes=virtual * MIB, journal_size_bytes=MIB, grow_step_bytes=64 * MIB)
        self.size = self.known = initial_size_bytes(self.disk)
        self.used = 0
        self.now = 0.0
        self.running: int | None = None
        self.wake: float | None = None
        self.looks = 0
        self.policy = GrowthPolicy(self.disk, storage_size_bytes=self.size, low_water_bytes=low * MIB)
        self.settle()

    @property
    def free(self) -> int:
        return (self.disk.slots_in(self.known) - self.used) * MIB

    def settle(self) -> None:
        self.take(self.policy.room(self.now, self.free))

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
            elif isinstance(action, Look):
                self.looks += 1
                assert self.looks == 1
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
        self.take(self.policy.ended(self.now, self.size if readable else None, NoSpace("full") if error else None, self.free))

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
        self.take(self.policy.looked(self.size))

    @rule(by=st.integers(1, 300))
    def by_hand(self, by: int) -> None:
        self.size += by * MIB
        self.take(self.policy.poke(self.now, self.free))

    @rule(by=st.integers(1, 300))
    def on_request(self, by: int) -> None:
        self.take(self.policy.extend(self.now, by * MIB))

    @invariant()
    def growth_is_never_forgotten(self) -> None:
        if hasattr(self, "policy") and self.free < self.policy.low_water_bytes and self.known < self.disk.max_storage_size_bytes:
            self.settle()
            assert self.running is not None or self.wake is not None


TestGrowth = Growth.TestCase
TestGrowth.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
