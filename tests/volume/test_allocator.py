# SPDX-License-Identifier: Apache-2.0
"""fvd.storage.allocator: what the policy decides is carried out in the loop's thread; threads, timers and the clock are the test's own."""

from __future__ import annotations

import errno
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from disks import make
from fvd.disk.opening import open_volume
from fvd.engine._engine import Want
from fvd.errors import DeviceError, NoSpace, Timeout, Unsupported
from fvd.format.geometry import Geometry
from fvd.storage.allocator import Allocator, call_later, run_in_thread
from fvd.storage.interfaces import Pool
from fvd.storage.policy import GrowthEvent

MIB = 1 << 20
DISK = Geometry(virtual_size_bytes=1 << 30, journal_size_bytes=MIB, grow_step_bytes=64 * MIB)
STEP = DISK.grow_step_bytes


class FakeEngine:
    def __init__(self) -> None:
        self.size = STEP
        self.used = 0
        self.want = 0
        self.storage_below_full = False
        self.starved_count = 0
        self.exhausted = False
        self.wake_below_bytes = 0

    @property
    def free_slots(self) -> int:
        return DISK.slots_in(self.size) - self.used

    def take(self, slots: int) -> None:
        """Allocating writes come."""
        self.used += slots
        if self.free_slots * MIB < self.wake_below_bytes:
            self.want |= Want.GROWTH

    def set_storage_size(self, size_bytes: int) -> None:
        self.size = size_bytes
        self.exhausted = False

    def set_exhausted(self, exhausted: bool) -> None:
        self.exhausted = exhausted


class FakeStorage:
    can_grow = True
    notifies_space = False
    last_suspend_seconds: float | None = None

    def __init__(self) -> None:
        self.free: int | Exception | None = None
        self.asked_pool = 0
        self.size = STEP
        self.failure: Exception | None = None
        self.closed = False
        self.asked: list[int] = []

    def size_bytes(self) -> int:
        return self.size

    def grow_to(self, size_bytes: int) -> None:
        self.asked.append(size_bytes)
        if self.failure is not None:
            raise self.failure
        self.size = max(self.size, size_bytes)

    def pool(self) -> Pool | None:
        self.asked_pool += 1
        if isinstance(self.free, Exception):
            raise self.free
        return None if self.free is None else Pool("vg0", self.free)

    def close(self) -> None:
        self.closed = True


class FakeTimer:
    def __init__(self, seconds: float, call: Callable[[], None]) -> None:
        self.seconds, self.call, self.cancelled = seconds, call, False

    def cancel(self) -> None:
        self.cancelled = True


class World:
    """An allocator with everything around it in the hand of the test."""

    def __init__(self, low_water_bytes: int = STEP // 2, *, attached: bool = True, notifies_space: bool = False, **options: Any) -> None:
        self.now = 100.0
        self.engine = FakeEngine()
        self.storage = FakeStorage()
        self.storage.notifies_space = notifies_space
        self.work: deque[Callable[[], None]] = deque()
        self.posted: deque[Callable[[], None]] = deque()
        self.timers: list[FakeTimer] = []
        self.events: list[GrowthEvent] = []
        self.allocator = Allocator(
            self.storage,
            DISK,
            storage_size_bytes=STEP,
            low_water_bytes=low_water_bytes,
            on_event=self.events.append,
            clock=lambda: self.now,
            executor=self.work.append,
            timer=self.timer,
            extend_timeout_seconds=10.0,
            **options,
        )
        if attached:
            self.attach()

    def attach(self) -> None:
        self.allocator.attach(self.engine, self.posted.append)

    def timer(self, seconds: float, call: Callable[[], None]) -> FakeTimer:
        self.timers.append(FakeTimer(seconds, call))
        return self.timers[-1]

    def fill(self, leave_slots: int) -> None:
        self.engine.used = DISK.slots_in(self.engine.size) - leave_slots
        self.engine.want |= Want.GROWTH
        self.allocator.on_want(self.engine)

    def loop(self) -> None:
        while self.posted:
            self.posted.popleft()()

    def step(self) -> None:
        """The step under way runs, and the loop learns of it."""
        self.work.popleft()()
        self.loop()

    def ring(self) -> None:
        """The newest timer goes off at its time."""
        timer = self.timers[-1]
        assert not timer.cancelled
        self.now += timer.seconds
        timer.call()
        self.loop()

    @property
    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]


def test_growth_in_the_background() -> None:
    world = World()
    assert not world.work
    world.fill(leave_slots=31)
    assert world.engine.want == 0
    assert world.storage.asked == [] and len(world.work) == 1  # not in the loop's thread
    world.work.popleft()()
    assert world.engine.size == STEP  # the engine is touched in the loop's thread only
    world.loop()
    assert world.engine.size == 2 * STEP
    assert world.kinds == ["low_water", "extend_started", "extend_done"]


def test_wishes_while_a_step_runs_cost_nothing() -> None:
    world = World()
    world.fill(31)
    timers = len(world.timers)
    for left in range(30, 0, -1):
        world.fill(left)
    assert len(world.work) == 1 and len(world.timers) == timers


def test_wishes_while_it_rests_cost_no_timers() -> None:
    world = World()
    world.storage.failure = NoSpace("full")
    world.fill(0)
    world.step()
    timers = len(world.timers)
    for _ in range(10):
        world.fill(0)
    assert len(world.timers) == timers and not world.work


def test_another_step_at_once_when_one_is_not_enough() -> None:
    world = World(low_water_bytes=3 * STEP)
    while world.work:
        world.step()
    assert world.engine.size == 4 * STEP
    assert world.storage.asked == [2 * STEP, 3 * STEP, 4 * STEP]


def test_writes_that_wait_go_on_when_there_is_space_again() -> None:
    world = World()
    world.storage.failure = NoSpace("the group is full")
    world.fill(0)
    world.step()
    assert world.engine.exhausted
    for _ in range(3):
        world.ring()
        world.step()
    assert world.kinds == ["low_water", "extend_started", "extend_failed", "group_full"]  # the retries are not news
    world.storage.failure = None
    world.ring()
    world.step()
    assert world.engine.size == 2 * STEP and not world.engine.exhausted
    assert world.allocator.figures()["last_failure"] is None


def test_a_storage_with_a_bug_does_not_end_growth() -> None:
    world = World()
    world.storage.failure = ZeroDivisionError("oops")
    world.fill(0)
    world.step()
    assert "ZeroDivisionError" in world.events[-1].message
    world.storage.failure = None
    world.ring()
    world.step()
    assert world.engine.size == 2 * STEP


def test_a_step_that_hangs() -> None:
    world = World()
    world.fill(0)
    hanging = world.work.popleft()
    world.ring()
    assert world.kinds[-1] == "extend_slow" and world.engine.exhausted
    world.step()  # the look
    assert world.engine.size == STEP
    world.storage.size = 2 * STEP  # it had worked after all
    world.ring()
    world.step()
    assert world.engine.size == 2 * STEP and not world.engine.exhausted
    hanging()
    world.loop()
    assert "extend_done" in world.kinds


def test_storage_added_by_hand() -> None:
    world = World()
    world.storage.failure = NoSpace("full")
    world.fill(0)
    world.step()
    world.storage.size = 10 * STEP
    world.allocator.poke()
    world.loop()
    world.step()
    assert world.engine.size == 10 * STEP


def test_extend_now() -> None:
    world = World()
    future = world.allocator.extend_now(5 * MIB)
    assert not future.done()
    world.loop()
    world.step()
    assert future.result(0) == STEP + 5 * MIB == world.engine.size
    future = world.allocator.extend_now()
    world.loop()
    world.step()
    assert future.result(0) == 2 * STEP + 5 * MIB


def test_extend_now_that_fails() -> None:
    world = World()
    world.storage.failure = Unsupported("fixed")
    future = world.allocator.extend_now()
    world.loop()
    world.step()
    with pytest.raises(Unsupported, match="fixed"):
        future.result(0)


def test_extend_now_that_hangs() -> None:
    world = World()
    future = world.allocator.extend_now()
    world.loop()
    world.ring()
    with pytest.raises(Timeout):
        future.result(0)


def test_nothing_runs_after_close() -> None:
    world = World()
    world.fill(0)
    waiting = world.allocator.extend_now()
    world.loop()
    hanging = world.work.popleft()
    world.allocator.close()
    assert world.storage.closed
    assert all(timer.cancelled for timer in world.timers)
    with pytest.raises(DeviceError, match="closed"):
        waiting.result(0)
    hanging()
    world.timers[-1].call()
    world.allocator.poke()
    world.allocator.on_want(world.engine)
    with pytest.raises(DeviceError, match="closed"):
        world.allocator.extend_now().result(0)
    assert not world.posted and not world.work
    assert world.engine.size == STEP


def test_what_was_posted_before_close_does_nothing_after_it() -> None:
    world = World()
    world.fill(0)
    future = world.allocator.extend_now()
    world.work.popleft()()
    world.allocator.close()
    world.loop()
    assert world.engine.size == STEP
    with pytest.raises(DeviceError, match="closed"):
        future.result(0)


def test_a_listener_that_fails_stops_nothing() -> None:
    def fails(event: GrowthEvent) -> None:
        raise ZeroDivisionError

    world = World()
    world.allocator.on_event = fails
    world.fill(0)
    world.step()
    assert world.engine.size == 2 * STEP


def test_figures() -> None:
    world = World()
    figures = world.allocator.figures()
    for unknown in ("last_extend_seconds", "longest_suspend_seconds", "reserve_bytes_per_second", "group", "group_free_bytes"):
        assert figures[unknown] is None
    world.now += 1000.0  # so slowly that the mark stays where it is
    world.fill(31)
    world.storage.last_suspend_seconds, world.storage.free = 0.25, 100 * STEP
    world.now += 0.2
    world.step()
    world.storage.last_suspend_seconds = 0.125
    world.now += 1000.0
    world.fill(31)
    world.now += 0.1
    world.step()
    figures = world.allocator.figures()
    assert figures["low_water"] == STEP // 2
    assert (figures["extend_steps"], figures["last_suspend_seconds"], figures["longest_suspend_seconds"]) == (2, 0.125, 0.25)
    assert figures["last_extend_seconds"] == pytest.approx(0.1) and figures["longest_extend_seconds"] == pytest.approx(0.2)
    assert figures["reserve_bytes_per_second"] == pytest.approx(STEP / 2 / 0.2, rel=1e-6)
    assert (figures["group"], figures["group_free_bytes"]) == ("vg0", 100 * STEP)
    assert [event.suspend_seconds for event in world.events if event.kind == "extend_done"] == [0.25, 0.125]


# --- The mark ----------------------------------------------------------------------------------------------------


def test_the_engine_is_told_when_to_want_space() -> None:
    world = World()
    assert world.engine.wake_below_bytes == 57 * MIB  # of 61 that are free: the rate is looked at each sixteenth of a step
    asked = 0
    while not world.work:
        world.now += 1.0
        world.engine.take(1)
        if world.engine.want:
            asked += 1
            world.allocator.on_want(world.engine)
            assert world.engine.free_slots * MIB >= world.engine.wake_below_bytes  # never asked again for the same space
    assert world.engine.free_slots == 31 and asked <= 8


def test_growth_begins_earlier_where_it_is_slow() -> None:
    world = World()
    begun: list[int] = []
    for _ in range(4):
        while not world.work:
            world.now += 0.1  # 10 MiB/s
            world.engine.take(1)
            if world.engine.want:
                world.allocator.on_want(world.engine)
        begun.append(world.engine.free_slots)
        for _ in range(24):  # 2.4 s
            world.now += 0.1
            world.engine.take(1)
        world.step()
    assert begun[0] == 44 and begun[-1] in range(66, 78)  # 2.4 s x 10 MiB/s x 3 = 72 MiB
    assert world.allocator.figures()["low_water"] in range(66 * MIB, 80 * MIB)
    assert world.allocator.figures()["write_bytes_per_second"] == pytest.approx(10 * MIB, rel=0.1)


def test_a_real_engine_wants_space_below_the_mark_that_it_was_given(tmp_path: Path) -> None:
    make(tmp_path / "disk")
    with open_volume(f"file:{tmp_path / 'disk'}") as opened:
        engine = opened.engine
        assert (engine.free_slots, engine.wake_below_bytes, engine.want) == (14, 8 * MIB, 0)
        engine.wake_below_bytes = 14 * MIB
        assert (engine.wake_below_bytes, engine.want) == (14 * MIB, 0)
        engine.wake_below_bytes = 14 * MIB + 1  # slots are whole: rounded up
        assert (engine.wake_below_bytes, engine.want) == (15 * MIB, Want.GROWTH)  # at once, for it is below the mark already
        engine.want = engine.wake_below_bytes = 0
        engine.set_storage_size(16 * MIB)
        assert engine.want == 0


# --- The group ---------------------------------------------------------------------------------------------------


def test_the_group_is_asked_after_the_size_is_on_its_way() -> None:
    world = World()
    world.storage.free = STEP
    seen: list[int] = []
    pool = world.storage.pool

    def asked() -> Pool | None:
        seen.append(len(world.posted))
        return pool()

    world.storage.pool = asked  # type: ignore[method-assign]
    world.fill(31)
    world.step()
    assert seen == [1]
    assert world.kinds == ["low_water", "extend_started", "extend_done", "group_low"]
    assert (world.events[-1].group, world.events[-1].group_free_bytes) == ("vg0", STEP)


def test_a_group_that_hangs_delays_nothing_and_is_not_asked_twice() -> None:
    world = World()
    asking, go_on = threading.Event(), threading.Event()

    def hang() -> Pool | None:
        world.storage.asked_pool += 1
        asking.set()
        assert go_on.wait(10)
        return Pool("vg0", 0)

    world.storage.pool = hang  # type: ignore[method-assign]
    world.fill(0)
    thread = threading.Thread(target=world.work.popleft())
    thread.start()
    assert asking.wait(10)
    world.loop()
    assert world.engine.size == 2 * STEP
    world.fill(0)
    world.step()
    assert world.engine.size == 3 * STEP and world.storage.asked_pool == 1
    go_on.set()
    thread.join()
    world.loop()
    assert world.kinds[-2:] == ["group_low", "group_full"]


def test_a_group_that_cannot_be_told_harms_nothing() -> None:
    world = World()
    for failure in (DeviceError("vgs failed"), ZeroDivisionError("oops")):
        world.storage.free = failure
        world.fill(0)
        world.step()
    assert world.engine.size == 3 * STEP and world.allocator.figures()["group"] is None


def test_the_group_is_asked_after_a_failure_too() -> None:
    world = World(group_low_bytes=MIB)
    world.storage.failure, world.storage.free = NoSpace("full"), 3 * MIB
    world.fill(0)
    world.step()
    assert world.kinds == ["low_water", "extend_started", "extend_failed", "group_full"]
    assert world.events[-1].group_free_bytes == 3 * MIB


# --- What the outside tells --------------------------------------------------------------------------------------


def test_a_full_group_is_asked_until_it_has_space() -> None:
    world = World(notifies_space=True)
    world.storage.failure, world.storage.free = NoSpace("full"), 0
    world.fill(0)
    world.step()
    for rest in (1, 2, 4, 8, 16, 30, 30):  # though writes wait
        assert world.timers[-1].seconds == pytest.approx(rest)
        world.ring()
        world.step()
    assert len(world.storage.asked) == 1  # looked at, never tried
    timers = len(world.timers)
    for _ in range(5):
        world.allocator.on_space_freed()
        world.loop()
    assert not world.work and len(world.timers) == timers + 1  # not dropped: a while after the last question
    world.storage.failure, world.storage.free = None, STEP
    world.ring()
    world.step()  # the question
    world.step()
    assert world.engine.size == 2 * STEP


@pytest.mark.parametrize("what", ["step", "look", "question"])
def test_threads_that_cannot_be_had_end_nothing_for_ever(what: str) -> None:
    """The limit of threads is reached, for a while: the loop goes on, and growth too when there are threads again."""
    world = World(notifies_space=True)
    if what == "question":
        world.storage.failure, world.storage.free = NoSpace("full"), 0
        world.fill(0)
        world.step()
        world.storage.failure = None
    executor = world.allocator._executor

    def none(work: object) -> None:
        raise RuntimeError("can't start new thread")

    world.allocator._executor = none
    if what == "look":
        world.allocator.resized()
        world.loop()
    else:
        world.fill(0)
    world.ring() if world.timers else None
    world.allocator._executor = executor
    world.storage.free = 10 * STEP
    if what == "look":
        world.storage.size = 3 * STEP
        world.allocator.resized()
        world.loop()
        world.step()
        assert world.engine.size == 3 * STEP
        return
    for _ in range(4):
        world.ring()
        while world.work:
            world.step()
    assert world.engine.size == 2 * STEP


def test_whatever_reading_the_size_raises_ends_the_step() -> None:
    world = World()
    world.storage.failure = NoSpace("full")

    def broken() -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    real, world.storage.size_bytes = world.storage.size_bytes, broken  # type: ignore[method-assign]
    world.fill(0)
    world.step()
    world.allocator.resized()
    world.loop()
    world.step()
    world.storage.size_bytes, world.storage.failure = real, None  # type: ignore[method-assign]
    world.ring()
    world.step()
    assert world.engine.size == 2 * STEP


def test_a_device_that_changed_its_size_is_looked_at() -> None:
    world = World()
    world.storage.size = 3 * STEP
    world.allocator.resized()
    world.loop()
    world.step()
    assert world.engine.size == 3 * STEP and world.storage.asked == [] and world.events == []


def test_a_device_that_has_gone() -> None:
    world = World()
    world.allocator.removed("vg0/vm1 has been removed")
    world.loop()
    assert [(event.kind, event.message) for event in world.events] == [("storage_error", "vg0/vm1 has been removed")]


# --- Before there is a loop --------------------------------------------------------------------------------------


def test_what_is_asked_before_attach_is_done_with_it() -> None:
    world = World(attached=False)
    future = world.allocator.extend_now()
    world.fill(0)  # an engine may want space before its driver has come to `attach`
    world.storage.size = STEP + MIB
    world.allocator.resized()
    world.allocator.removed("gone")
    assert not world.work and not world.events and world.engine.want == 0
    world.attach()
    assert world.kinds == ["low_water", "extend_started", "storage_error"]
    while world.work:
        world.step()
    assert world.engine.size == 2 * STEP == future.result(0)


def test_closed_before_it_was_attached() -> None:
    world = World(attached=False)
    future = world.allocator.extend_now()
    world.allocator.close()
    with pytest.raises(DeviceError, match="closed"):
        future.result(0)
    world.attach()
    assert not world.work


def test_real_threads_and_timers() -> None:
    seen = threading.Event()
    run_in_thread(seen.set)
    assert seen.wait(10)
    rang = threading.Event()
    call_later(0.01, rang.set)
    assert rang.wait(10)
    never = threading.Event()
    call_later(0.05, never.set).cancel()
    assert not never.wait(0.1)
