# SPDX-License-Identifier: Apache-2.0
"""fvd.base.steering: how many copies may read at once, decided on a virtual clock, against models of bases, disks and guests."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prefetch_model import COUNTERS, MIB, MS, SECOND, Copier, Medium, Timeline, fast_disk

from fvd.base.steering import (
    BACKOFF_SECONDS_MAX,
    CONTENTION_NS_MAX,
    LOST_BACKOFF_SECONDS_MAX,
    SLOTS_MAX,
    STARVED_NS,
    TRICKLE_RATE_BYTES,
    USEFUL_SLOTS,
    Decision,
    Reading,
    Sample,
    Steering,
    sample_between,
)

pytestmark = pytest.mark.pure

STEP_NS = 250 * MS
RESUMED_WITHIN_SECONDS = 1.5 * BACKOFF_SECONDS_MAX + 1


class Steps:
    """Steps of a quarter of a second, with samples made by hand."""

    def __init__(self, seed: int = 1) -> None:
        self.steering = Steering(random.Random(seed))
        self.now_ns = 0
        self.last = self.steering.step(Sample(0))

    def __call__(self, count: int = 1, **sample: int | bool) -> Decision:
        for _ in range(count):
            self.now_ns += STEP_NS
            self.last = self.steering.step(Sample(self.now_ns, **sample))  # type: ignore[arg-type]
        return self.last

    def reading(self, count: int = 1, *, read_ms: float = 2, write_ms: float = 1, copies: int = 20, **sample: int | bool) -> Decision:
        """Steps in each of which copies ended, if there were any under way."""
        for _ in range(count):
            if self.last.slots:
                self(
                    **{
                        "base_reads": copies,
                        "base_read_bytes": copies * MIB,
                        "base_service_ns": round(copies * read_ms * MS),
                        "copy_writes": copies,
                        "copy_write_bytes": copies * MIB,
                        "copy_service_ns": round(copies * write_ms * MS),
                    }
                    | sample
                )
            else:
                self(**sample)
        return self.last

    def until(self, state: str, most: int = 400, **reading: float) -> None:
        """Steps until this is the state."""
        while self.reading(**reading).state != state:  # type: ignore[arg-type]
            most -= 1
            assert most

    def until_slots(self, most_seconds: float, **reading: float) -> float:
        """Steps until there is a slot; how long it took."""
        began = self.now_ns
        while not self.last.slots:
            assert (self.now_ns - began) / SECOND <= most_seconds
            self.reading(**reading)  # type: ignore[arg-type]
        return (self.now_ns - began) / SECOND


def model(base: Medium, disk: Medium | None = None, **options: object) -> tuple[Timeline, Copier]:
    timeline = Timeline()
    return timeline, Copier(timeline, base, disk or fast_disk(), **options)  # type: ignore[arg-type]


def every_other_ten_seconds(seconds: float) -> bool:
    return int(seconds / 10) % 2 == 0


# --- Depth -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delay_ms", [0.2, 5, 100, 500])
def test_a_fresh_start_is_deep_soon(delay_ms: float) -> None:
    timeline, copier = model(Medium(round(delay_ms * MS), 1e9))
    timeline.run(5)
    assert copier.history[0][1].slots == 1
    assert max(decision.slots for decision in copier.between(0, 2 + 2 * delay_ms / 1000)) == SLOTS_MAX


def test_after_contention_one_more_for_each_good_interval() -> None:
    steps = Steps()
    assert steps.reading(8).slots == SLOTS_MAX
    steps.until("paused", read_ms=100)
    steps.until_slots(3)
    assert [steps.reading().slots for _ in range(5)] == [2, 3, 4, 5, 6]


@pytest.mark.parametrize("limit_bytes_per_second", [10e6, 100e6])
def test_no_deeper_than_is_of_use(limit_bytes_per_second: float) -> None:
    """Who comes after the copies, a guest above all, waits for all of them."""
    base = Medium(5 * MS, limit_bytes_per_second)
    timeline, copier = model(base)
    timeline.run(60)
    depth = [decision.slots for decision in copier.between(30, 60)]
    assert max(depth) < SLOTS_MAX and min(depth) >= USEFUL_SLOTS
    assert copier.read_bytes(10, 60) >= 0.95 * 50 * limit_bytes_per_second


def test_nothing_is_allowed_when_nothing_is_left() -> None:
    assert Steps()(remaining_bytes=0).slots == 0


# --- Contention --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tells_latency", [False, True])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("which", ["base", "disk"])
def test_somebody_elses_load_pauses_and_its_end_resumes(which: str, seed: int, tells_latency: bool) -> None:
    base, disk = Medium(5 * MS, 100e6), Medium(2 * MS, 400e6)
    loaded = base if which == "base" else disk
    timeline, copier = model(base, disk, seed=seed, tells_latency=tells_latency)
    # The disk was not busy before: it must become more than three times slower before the copies that it gets take three times as long.
    timeline.at(20 * SECOND, lambda: setattr(loaded, "slowness", 5.0 if which == "base" else 20.0))
    timeline.at(100 * SECOND, lambda: setattr(loaded, "slowness", 1.0))
    timeline.run(200)
    assert copier.read_bytes(5, 20) >= 0.95 * 15 * 100e6
    assert all(decision.state == "running" and decision.slots for decision in copier.between(1, 20))
    loaded_steps = copier.between(23, 100)
    assert sum(decision.slots for decision in loaded_steps) / len(loaded_steps) < 0.15
    assert {decision.cause for decision in loaded_steps} == {which}
    paused = next(decision for decision in loaded_steps if decision.state == "paused")
    assert which in paused.reason and "ms" in paused.reason and paused.resume_ns is not None
    assert max(decision.slots for decision in copier.between(100, 100 + RESUMED_WITHIN_SECONDS + 1)) >= 3
    assert copier.read_bytes(150, 200) >= 0.9 * 50 * 100e6


def test_pauses_double_up_to_half_a_minute_and_are_random() -> None:
    def pauses(seed: int) -> list[float]:
        steps = Steps(seed)
        steps.reading(8)
        found: list[float] = []
        while len(found) < 8:
            state = steps.reading(read_ms=100).state
            if state == "paused":
                found.append(steps.until_slots(46, read_ms=100))
        return found

    every = [pauses(seed) for seed in range(20)]
    for number in range(8):
        backoff_seconds = min(2**number, BACKOFF_SECONDS_MAX)
        lengths = [each[number] for each in every]
        assert 0.5 * backoff_seconds <= min(lengths) and max(lengths) <= 1.5 * backoff_seconds + STEP_NS / SECOND
        assert max(lengths) > 1.2 * backoff_seconds and min(lengths) < 0.8 * backoff_seconds


def test_good_intervals_make_the_next_pause_short_again() -> None:
    steps = Steps()
    steps.reading(8)
    for _ in range(40):
        steps.reading(20, read_ms=100)
    steps.until_slots(46)
    steps.reading(10)
    steps.reading(200)  # no rest is remembered for a limit
    steps.until("paused", read_ms=100)
    assert steps.until_slots(46) <= 1.5 + STEP_NS / SECOND


def test_what_lasts_is_not_waited_for_for_ever() -> None:
    steps = Steps()
    steps.reading(8)
    steps.reading(round(CONTENTION_NS_MAX / STEP_NS), read_ms=100)
    assert steps.reading(50, read_ms=100).slots == 0
    steps.reading(200, read_ms=100)
    assert steps.reading(8, read_ms=100).slots >= 1
    assert steps.last.state == "running" and steps.last.cause == ""


def test_a_minute_ago_counts_and_ten_do_not() -> None:
    slow = Steps()
    slow.reading(8)
    slow(230, guest_idle_ns=0)  # the guest is active for a minute
    slow.reading(2, read_ms=100)
    assert slow.last.slots == 0
    known = Steps()
    known.reading(8)
    known(2400, guest_idle_ns=0)
    known.reading(20, read_ms=100)
    assert known.last.slots > 0 and known.last.cause == ""


@pytest.mark.parametrize("read_ms", [0.01, 2.5])
def test_small_differences_are_no_contention(read_ms: float) -> None:
    steps = Steps()
    steps.reading(8, read_ms=0.001, write_ms=0.001)
    for _ in range(40):
        assert steps.reading(read_ms=read_ms, write_ms=read_ms).slots > 0


def test_one_bad_batch_or_few_copies_prove_nothing() -> None:
    steps = Steps()
    steps.reading(8)
    for _ in range(10):
        assert steps.reading(read_ms=1000).slots
        assert steps.reading().slots
    for _ in range(7):
        assert steps.reading(read_ms=1000, copies=1).slots  # not four in two batches


@pytest.mark.parametrize("seed", range(10))
def test_noise_is_no_contention(seed: int) -> None:
    """Latencies that vary threefold, of copies of all sizes."""
    timeline, copier = model(
        Medium(5 * MS, 200e6), seed=seed, jitter=2.0, copy_bytes=lambda rng: 1 << rng.randrange(12, 21), guest_active=lambda _: False
    )
    timeline.run(300)
    assert all(decision.state == "running" for _, decision in copier.history)
    assert sum(decision.slots == 0 for _, decision in copier.history) <= 12


def test_own_copies_are_no_contention() -> None:
    """Eight at once take eight times as long as one."""
    timeline, copier = model(Medium(0, 20e6))
    timeline.run(60)
    assert all(decision.slots for _, decision in copier.history)


def test_fewer_at_once_may_keep_a_distant_base_longer() -> None:
    """The delay is shared by eight, and then not: back at one slot nothing is wrong."""
    timeline, copier = model(Medium(200 * MS, 1e9))
    timeline.run(20)
    assert copier.slots == SLOTS_MAX
    copier.steering._wanted = 1
    copier.steering._hold_until_ns = 60 * SECOND
    timeline.run(60)
    assert all(decision.slots for _, decision in copier.history)


def test_copies_that_began_when_more_were_allowed_are_no_best_of_fewer() -> None:
    steps = Steps()
    for _ in range(8):
        steps.reading(read_ms=40 / max(1, steps.last.slots))
    steps.steering._wanted, steps.steering._hold_until_ns = 1, 100 * SECOND
    steps.reading(2, read_ms=5)
    assert steps.last.slots == 1
    for _ in range(40):
        assert steps.reading(read_ms=40).slots == 1  # the delay is shared no longer


@given(
    delay=st.floats(0, 1e9),
    per_byte=st.floats(0.01, 1e4),
    sizes=st.tuples(st.integers(512, MIB), st.integers(512, MIB)),
    slots=st.tuples(st.integers(1, 8), st.integers(1, 8)),
)
def test_what_a_reading_allows_others_is_never_less_than_an_unchanged_base_takes(
    delay: float, per_byte: float, sizes: tuple[int, int], slots: tuple[int, int]
) -> None:
    def takes(size: int, at_once: int) -> float:
        return max((delay + size * per_byte) / at_once, size * per_byte)

    seen = Reading(takes(sizes[0], slots[0]), sizes[0], slots[0])
    assert takes(sizes[1], slots[1]) <= seen.allows(slots[1], sizes[1]) * (1 + 1e-9)


def test_holes_are_not_the_best() -> None:
    steps = Steps()
    steps.reading(8, read_ms=0.05, write_ms=0.05, zero_bytes=20 * MIB)
    assert steps.reading(20, read_ms=5, write_ms=1).slots > 0
    assert steps.last.cause == ""


def test_zeros_that_are_not_written_do_not_keep_a_disk_on_probation() -> None:
    steps = Steps()
    steps.reading(8)
    steps.until("paused", write_ms=50)
    steps.until_slots(3)
    steps.reading(20, copy_writes=0, copy_write_bytes=0, copy_service_ns=0)
    assert steps.last.slots > 2


# --- A limit is no contention ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tells_latency", [False, True])
@pytest.mark.parametrize("burst_mb", [0, 1, 10, 50, 100, 300, 1000])
def test_a_limited_base_is_used_in_the_guests_idle_times(burst_mb: int, tells_latency: bool) -> None:
    limit_bytes_per_second = 100e6
    base = Medium(5 * MS, 1e9, limit_bytes_per_second, burst_mb * 1e6)
    timeline, copier = model(base, guest_active=every_other_ten_seconds, tells_latency=tells_latency)
    timeline.run(200)
    windows = [copier.read_bytes(begin, begin + 10) for begin in range(10, 200, 20)]
    assert min(windows) >= 0.8 * (10 * limit_bytes_per_second + min(burst_mb * 1e6, 1e9)) * (1 if burst_mb < 1000 else 0.9)
    assert {decision.state for _, decision in copier.history} == {"running", "yielding"}
    for begin in range(1, 200, 20):
        assert copier.read_bytes(begin, begin + 8) == 0  # the guest was active
        assert {decision.state for decision in copier.between(begin, begin + 8)} == {"yielding"}


@pytest.mark.parametrize("limit_mb", [10, 30, 100, 500])
@pytest.mark.parametrize("burst_mb", [50, 200, 1000])
def test_a_limited_base_is_used_without_end(limit_mb: int, burst_mb: int) -> None:
    timeline, copier = model(Medium(5 * MS, 1e9, limit_mb * 1e6, burst_mb * 1e6))
    timeline.run(200)
    assert copier.read_bytes(0, 200) >= 0.97 * (burst_mb * 1e6 + 200 * limit_mb * 1e6)
    assert {decision.state for _, decision in copier.history} == {"running"}


def test_a_limit_does_not_hide_somebody_elses_load() -> None:
    base = Medium(5 * MS, 1e9, 100e6, 100e6)
    timeline, copier = model(base)
    timeline.at(50 * SECOND, lambda: setattr(base, "slowness", 5.0))
    timeline.at(110 * SECOND, lambda: setattr(base, "slowness", 1.0))
    timeline.run(200)
    loaded = copier.between(52, 110)
    assert sum(decision.slots for decision in loaded) / len(loaded) < 0.15
    assert copier.read_bytes(160, 200) >= 0.9 * 40 * 100e6


def test_a_limit_is_looked_at_again_every_minute() -> None:
    timeline, copier = model(Medium(5 * MS, 1e9, 100e6, 100e6))
    timeline.run(300)
    rests = [
        when
        for (when, decision), (_, before) in zip(copier.history[1:], copier.history, strict=False)
        if not decision.slots and before.slots
    ]
    assert 2 <= len(rests) <= 5


# --- Many disks of one base -------------------------------------------------------------------------------------------------------


def spread(copiers: list[Copier], begin_seconds: float, end_seconds: float, seconds: float = 1.0) -> Counter[int]:
    """How many disks resumed, by time."""
    found: Counter[int] = Counter()
    for copier in copiers:
        slots = 1
        for when, decision in copier.history:
            if begin_seconds <= when < end_seconds and decision.slots and not slots:
                found[int(when / seconds)] += 1
            slots = decision.slots
    return found


@pytest.mark.parametrize("start_within_seconds", [0.25, 20])
def test_a_hundred_disks_of_one_base_do_not_pulse_together(start_within_seconds: float) -> None:
    timeline, base = Timeline(), Medium(2 * MS, 1e9)
    copiers = [
        Copier(timeline, base, fast_disk(), seed=seed, phase_ns=round(seed * 37 % 100 / 100 * start_within_seconds * SECOND))
        for seed in range(100)
    ]
    timeline.run(120)
    by_second = [sum(copier.read_bytes(second, second + 1) for copier in copiers) / 1e9 for second in range(30, 120)]
    assert min(by_second) >= 0.8  # a pulse would leave gaps
    assert max(spread(copiers, 30, 120).values(), default=0) <= 20
    assert all(copier.read_bytes(0, 120) for copier in copiers)


def test_a_hundred_disks_come_back_one_by_one() -> None:
    """Somebody loads their base for half a minute, which all of them see at the same time."""
    timeline, base = Timeline(), Medium(2 * MS, 10e9)
    copiers = [Copier(timeline, base, fast_disk(), seed=seed, phase_ns=seed * 37 % 250 * MS) for seed in range(100)]
    timeline.at(20 * SECOND, lambda: setattr(base, "slowness", 40.0))
    timeline.at(50 * SECOND, lambda: setattr(base, "slowness", 1.0))
    timeline.run(110)
    stopped = sum(all(decision.slots <= 1 for decision in copier.between(40, 49)) for copier in copiers)
    assert stopped >= 75
    resumed = spread(copiers, 50, 110)
    assert sum(resumed.values()) >= 80
    assert max(resumed.values()) <= 20 and len(resumed) >= 15
    assert sum(copier.slots > 0 for copier in copiers) >= 30
    assert sum(copier.read_bytes(100, 110) for copier in copiers) >= 0.8 * 10 * 10e9


# --- The guest --------------------------------------------------------------------------------------------------------------------


def test_a_guest_that_suffers_gets_fewer_copies_and_then_none() -> None:
    steps = Steps()
    steps.reading(8, guest_quiet_requests=50, guest_quiet_latency_ns=50 * MS)
    seen = [steps.last.slots]
    while steps.last.state != "paused":
        steps.reading(guest_busy_requests=50, guest_busy_latency_ns=100 * MS)
        if steps.last.slots != seen[-1]:
            seen.append(steps.last.slots)
        assert len(seen) < 10
    assert seen == [8, 4, 2, 1, 0]
    assert steps.last.cause == "guest" and "guest" in steps.last.reason and "2.0 times" in steps.last.reason
    assert 0 < steps.until_slots(2) <= 1.75
    assert steps.reading(40, guest_busy_requests=50, guest_busy_latency_ns=50 * MS).slots == SLOTS_MAX


def test_fewer_for_the_guest_stay_so_for_a_while() -> None:
    steps = Steps()
    steps.reading(8, guest_quiet_requests=50, guest_quiet_latency_ns=50 * MS)
    while steps.last.slots == SLOTS_MAX:
        steps.reading(guest_busy_requests=50, guest_busy_latency_ns=100 * MS)
    assert steps.reading(19).slots == 4 and steps.last.cause == "guest"
    assert steps.reading(5).slots > 4


@pytest.mark.parametrize(
    ("quiet_us", "busy_us", "suffers"), [(1000, 1200, False), (1000, 1400, True), (50, 250, False), (10, 400, True), (10_000, 13_000, True)]
)
def test_when_a_guest_suffers(quiet_us: int, busy_us: int, suffers: bool) -> None:
    steps = Steps()
    steps.reading(8)
    for _ in range(40):
        steps.reading(
            guest_quiet_requests=200,
            guest_quiet_latency_ns=200_000 * quiet_us,
            guest_busy_requests=200,
            guest_busy_latency_ns=200_000 * busy_us,
        )
    assert (steps.last.slots < SLOTS_MAX) == suffers


@pytest.mark.parametrize("seed", range(8))
def test_latencies_that_scatter_are_no_suffering(seed: int) -> None:
    steps, rng = Steps(), random.Random(seed)
    steps.reading(8)
    changes = 0
    for _ in range(1200):
        before = steps.last.slots
        quiet, busy = rng.randrange(40), rng.randrange(4)
        steps.reading(
            guest_quiet_requests=quiet,
            guest_quiet_latency_ns=round(sum(rng.expovariate(1 / MS) for _ in range(quiet))),
            guest_busy_requests=busy,
            guest_busy_latency_ns=round(sum(rng.expovariate(1 / MS) for _ in range(busy))),
        )
        changes += steps.last.slots < before
    assert changes == 0


# --- A guest that is never idle ---------------------------------------------------------------------------------------------------


def test_a_guest_that_is_never_idle_lets_one_copy_a_second_through() -> None:
    timeline, copier = model(Medium(5 * MS, 100e6), guest_active=lambda seconds: 10 <= seconds < 200)
    timeline.run(230)
    assert copier.read_bytes(11, 69) == 0
    copies = copier.read_bytes(75, 195) / MIB
    assert 110 <= copies <= 130
    trickling = copier.between(75, 195)
    assert 0.2 <= sum(decision.trickle for decision in trickling) / len(trickling) <= 0.3
    assert all(decision.slots == 1 and decision.rate_bytes == TRICKLE_RATE_BYTES for decision in trickling)
    assert all(decision.state == "yielding" for decision in trickling)
    assert not any(decision.trickle or decision.rate_bytes for decision in copier.between(200.5, 230))
    assert copier.read_bytes(205, 225) >= 0.9 * 20 * 100e6


def test_copies_between_two_steps_are_idle_times() -> None:
    steps = Steps()
    steps(guest_idle_ns=0)
    for _ in range(3 * STARVED_NS // STEP_NS // 10):
        steps(9, guest_idle_ns=0)
        assert not steps.reading(guest_idle_ns=0).trickle
    assert steps(STARVED_NS // STEP_NS - 1, guest_idle_ns=0).trickle is False
    assert steps(guest_idle_ns=0).trickle


def test_a_trickle_is_paused_by_contention_too() -> None:
    base = Medium(5 * MS, 100e6)
    timeline, copier = model(base, guest_active=lambda seconds: seconds >= 10)
    timeline.at(60 * SECOND, lambda: setattr(base, "slowness", 20.0))
    timeline.run(120)
    assert copier.between(119, 120)[-1].slots == 0 or any(decision.state == "paused" for decision in copier.between(70, 120))


# --- A full disk, a lost base -------------------------------------------------------------------------------------------------------


def test_full_storage_waits_and_tries_again() -> None:
    steps = Steps()
    steps.reading(8)
    full = steps.reading(no_slot_copies=3)
    assert (full.slots, full.state, full.cause) == (0, "full", "full") and "space" in full.reason and full.resume_ns
    steps.until_slots(2)
    assert steps.reading(no_slot_copies=1).state == "full"
    assert steps.until_slots(4) > 0
    assert steps.reading(10).state == "running" and steps.last.slots > 4 and steps.last.cause == ""


def test_a_base_that_fails_is_tried_now_and_then_and_its_return_is_not_rushed() -> None:
    steps = Steps()
    steps.reading(8)
    assert steps(base_failing=True).state == "base-lost" and steps.last.slots == 0
    tries = []
    for _ in range(240):
        if steps(base_failing=True).slots:
            tries.append(steps.now_ns)
        assert steps.last.state == "base-lost" and steps.last.slots <= 1
    gaps = [(after - before) / SECOND for before, after in itertools.pairwise(tries)]
    assert max(gaps) <= 1.5 * LOST_BACKOFF_SECONDS_MAX + 1 and len(tries) >= 8
    back = []
    for seed in range(30):
        other = Steps(seed)
        other.reading(8)
        other(20, base_failing=True)
        assert other().slots == 0
        back.append(other.until_slots(1.75))
    assert len(set(back)) >= 4


# --- Samples ------------------------------------------------------------------------------------------------------------------------


def test_a_sample_is_the_difference_of_two_readings() -> None:
    before = dict.fromkeys(COUNTERS.split(), 100)
    after = {name: 100 + number for number, name in enumerate(COUNTERS.split(), 1)} | {"now_ns": 900, "guest_last_ns": 700}
    sample = sample_between(before, after, now_ns=5, base_failing=True, remaining_bytes=7)
    assert (sample.now_ns, sample.base_failing, sample.remaining_bytes, sample.guest_idle_ns) == (5, True, 7, 200)
    assert sample.base_reads == after["base_reads"] - 100 and sample.no_slot_copies == after["no_slot_copies"] - 100
    assert sample_between(after, before, now_ns=5, base_failing=False, remaining_bytes=7).base_reads == 0
    without = {name: value for name, value in after.items() if not name.endswith("_latency_ns") or name.startswith("guest")}
    assert sample_between(without, without, now_ns=5, base_failing=False, remaining_bytes=7).base_latency_ns == 0


NATURAL = st.one_of(st.just(0), st.integers(0, 100), st.integers(0, 1 << 63))


@settings(max_examples=200)
@given(
    st.integers(0, 1000),
    st.lists(
        st.builds(
            Sample,
            now_ns=st.integers(0, 10 * SECOND),
            base_reads=NATURAL,
            base_read_bytes=NATURAL,
            base_service_ns=NATURAL,
            base_latency_ns=NATURAL,
            copy_writes=NATURAL,
            copy_write_bytes=NATURAL,
            copy_service_ns=NATURAL,
            zero_bytes=NATURAL,
            no_slot_copies=st.sampled_from([0, 0, 0, 0, 1]),
            guest_quiet_requests=NATURAL,
            guest_quiet_latency_ns=NATURAL,
            guest_busy_requests=NATURAL,
            guest_busy_latency_ns=NATURAL,
            guest_idle_ns=NATURAL,
            base_failing=st.sampled_from([False, False, False, True]),
            remaining_bytes=NATURAL,
        ),
        max_size=60,
    ),
)
def test_whatever_is_told_the_answer_makes_sense(seed: int, samples: list[Sample]) -> None:
    steering, now = Steering(random.Random(seed)), 0
    for sample in samples:
        now += sample.now_ns
        decision = steering.step(replace(sample, now_ns=now))
        assert 0 <= decision.slots <= SLOTS_MAX
        assert not (decision.trickle and decision.slots != 1)
        assert decision.state in ("running", "yielding", "paused", "full", "base-lost")
        assert (decision.state in ("paused", "full")) <= (decision.slots == 0)
        if decision.state in ("paused", "full"):
            assert decision.reason and decision.cause and decision.resume_ns is not None
            assert now < decision.resume_ns <= now + 1.5 * BACKOFF_SECONDS_MAX * SECOND
