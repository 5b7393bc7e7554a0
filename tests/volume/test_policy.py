# SPDX-License-Identifier: Apache-2.0
"""fvd.storage.policy: when storage grows and to what size, decided without threads and without time passing."""

from __future__ import annotations

from typing import TypeVar

import pytest

from fvd.errors import DeviceError, InvalidArgument, NoSpace, Timeout
from fvd.format.geometry import Geometry, Layout
from fvd.storage.policy import (
    Action,
    Answer,
    GrowthEvent,
    GrowthPolicy,
    QueryGroup,
    ReadSize,
    Start,
    UseSize,
    WakeAt,
    WriteRate,
    check_low_water,
    default_low_water_bytes,
    guest_reserve_bytes,
    initial_size_bytes,
    least_size_bytes,
    limit_size_bytes,
    next_size_bytes,
)

pytestmark = pytest.mark.pure

MIB = 1 << 20
GIB = 1 << 30
DISK = Geometry(virtual_size_bytes=GIB, journal_size_bytes=MIB, grow_step_bytes=64 * MIB)  # 3 MiB of metadata
STEP = DISK.grow_step_bytes


def policy(**changes: object) -> GrowthPolicy:
    options = {"storage_size_bytes": STEP, "low_water_bytes": STEP // 2} | changes
    return GrowthPolicy(DISK, **options)  # type: ignore[arg-type]


def kinds(actions: list[Action]) -> list[str]:
    return [action.kind if isinstance(action, GrowthEvent) else type(action).__name__ for action in actions]


A = TypeVar("A", bound=Action)


def only(actions: list[Action], kind: type[A]) -> A:
    (found,) = [action for action in actions if isinstance(action, kind)]
    return found


# --- Sizes -------------------------------------------------------------------------------------------------------


def test_sizes_of_a_usual_disk() -> None:
    disk = Geometry(virtual_size_bytes=100 * GIB)
    assert initial_size_bytes(disk) == 5 * GIB
    assert limit_size_bytes(disk) == 105 * GIB
    assert next_size_bytes(disk, 5 * GIB) == 10 * GIB
    assert next_size_bytes(disk, 7 * GIB + 1) == 10 * GIB
    assert next_size_bytes(disk, 7 * GIB + 1, steps=3) == 20 * GIB
    assert next_size_bytes(disk, 100 * GIB) == next_size_bytes(disk, 7 * GIB, steps=99) == disk.max_storage_size_bytes
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


@pytest.mark.parametrize(("mark_mib", "reserve_mib"), [(1, 0), (1.5, 1), (2, 1), (3, 2), (8, 4), (9, 5)])
def test_the_guests_reserve_is_half_of_the_mark_and_less_than_it(mark_mib: float, reserve_mib: int) -> None:
    assert guest_reserve_bytes(DISK, int(mark_mib * MIB)) == reserve_mib * MIB


# --- A step ------------------------------------------------------------------------------------------------------


def test_nothing_happens_above_the_mark() -> None:
    assert policy().on_free_bytes(0.0, STEP // 2) == []


def test_a_step_begins_below_the_mark_and_only_one() -> None:
    growth = policy()
    actions = growth.on_free_bytes(0.0, STEP // 2 - MIB)
    assert kinds(actions) == ["low_water", "extend_started", "Start", "WakeAt"]
    assert only(actions, Start) == Start(2 * STEP)
    assert growth.on_free_bytes(0.1, STEP // 2 - 2 * MIB) == []


def test_a_step_that_works() -> None:
    growth = policy()
    growth.on_free_bytes(0.0, 31 * MIB)
    actions = growth.on_step_ended(2.0, 2 * STEP, None, 30 * MIB)
    assert kinds(actions) == ["UseSize", "extend_done"]
    done = only(actions, GrowthEvent)
    assert isinstance(done, GrowthEvent)
    assert (done.seconds, done.storage_size_bytes, done.free_bytes) == (2.0, 2 * STEP, 94 * MIB)
    assert (growth.last_extend_seconds, growth.steps_done) == (2.0, 1)
    assert growth.on_free_bytes(2.0, 94 * MIB) == []


def test_the_next_step_begins_when_the_first_was_not_enough() -> None:
    growth = policy(low_water_bytes=3 * STEP)
    growth.on_free_bytes(0.0, 0)
    growth.on_step_ended(1.0, 2 * STEP, None, 0)
    assert only(growth.on_free_bytes(1.0, 64 * MIB), Start) == Start(3 * STEP)


def test_the_last_step_stops_at_what_the_disk_can_use() -> None:
    growth = policy(storage_size_bytes=16 * STEP)
    assert only(growth.on_free_bytes(0.0, 0), Start) == Start(DISK.max_storage_size_bytes)
    growth.on_step_ended(1.0, DISK.max_storage_size_bytes, None, 0)
    assert growth.full
    assert growth.on_free_bytes(2.0, 0) == []


def test_growth_beyond_the_limit_is_a_bug_that_is_caught() -> None:
    growth = policy()
    growth.requested_bytes = limit_size_bytes(DISK) + 1
    with pytest.raises(AssertionError, match="beyond the limit"):
        growth.on_free_bytes(0.0, 0)


# --- What goes wrong ---------------------------------------------------------------------------------------------


def test_a_step_that_fails_is_tried_again_every_second_while_writes_wait() -> None:
    growth = policy()
    growth.on_free_bytes(0.0, 0)
    actions = growth.on_step_ended(0.5, STEP, NoSpace("the group is full"), 0)
    assert kinds(actions) == ["extend_failed", "Exhausted", "WakeAt"]
    assert only(actions, WakeAt) == WakeAt(1.5)
    assert only(growth.tick(1.0, 0), WakeAt) == WakeAt(1.5)
    now = 1.5
    for _ in range(5):
        assert "Start" in kinds(growth.tick(now, 0))
        actions = growth.on_step_ended(now, STEP, NoSpace("the group is full"), 0)
        assert kinds(actions) == ["Exhausted", "WakeAt"]  # said once
        now += 1.0
        assert only(actions, WakeAt) == WakeAt(now)
    assert "extend_failed" in kinds(growth.tick(now, 0) and growth.on_step_ended(now, STEP, NoSpace("something else"), 0))


def test_it_rests_longer_while_the_reserve_holds() -> None:
    growth = policy()
    now, rests = 0.0, []
    for _ in range(7):
        assert "Start" in kinds(growth.tick(now, MIB))
        wake = only(growth.on_step_ended(now, STEP, NoSpace("full"), MIB), WakeAt)
        assert isinstance(wake, WakeAt)
        rests.append(wake.when - now)
        now = wake.when
    assert rests == [1, 2, 4, 8, 16, 30, 30]
    # The reserve runs out: now it is tried every second.
    growth.tick(now, MIB)
    growth.on_step_ended(now, STEP, NoSpace("full"), MIB)
    assert growth.on_free_bytes(now + 0.1, 0) == [WakeAt(now + 1.1)]


def test_a_rest_ends_when_chunks_were_freed() -> None:
    growth = policy()
    growth.on_free_bytes(0.0, 0)
    growth.on_step_ended(0.0, STEP, NoSpace("full"), 0)
    assert growth.tick(1.0, STEP) == []
    assert growth.tick(100.0, STEP) == []


def test_poke_ends_a_rest() -> None:
    growth = policy()
    growth.on_free_bytes(0.0, 0)
    growth.on_step_ended(0.0, STEP, NoSpace("full"), 0)
    assert "Start" in kinds(growth.poke(0.1, 0))


def test_poke_looks_at_storage_that_is_not_low() -> None:
    growth = policy()
    assert kinds(growth.poke(0.0, STEP)) == ["ReadSize"]
    assert kinds(growth.poke(0.0, STEP)) == []  # one look at a time
    assert growth.on_size_read(3 * STEP) == [UseSize(3 * STEP)]


def test_a_step_that_half_succeeds() -> None:
    growth = policy()
    growth.on_free_bytes(0.0, 0)
    half = STEP + STEP // 2
    actions = growth.on_step_ended(1.0, half, NoSpace("no more"), 0)
    assert kinds(actions) == ["UseSize", "extend_failed", "Exhausted", "WakeAt"]
    assert only(actions, UseSize) == UseSize(half)
    assert only(growth.tick(2.0, 0), Start) == Start(2 * STEP)


def test_a_step_that_reports_an_error_and_worked() -> None:
    growth = policy()
    growth.on_free_bytes(0.0, 0)
    actions = growth.on_step_ended(1.0, 2 * STEP, NoSpace("nonsense"), 0)
    assert kinds(actions) == ["UseSize", "extend_done"]
    assert "nonsense" in str(actions[1])


def test_a_step_that_reports_success_and_did_nothing() -> None:
    growth = policy()
    growth.on_free_bytes(0.0, 0)
    actions = growth.on_step_ended(1.0, STEP, None, 0)
    assert kinds(actions) == ["extend_failed", "Exhausted", "WakeAt"]


def test_a_step_that_hangs_is_reported_and_its_late_success_used() -> None:
    growth = policy(extend_timeout_seconds=10.0)
    assert only(growth.on_free_bytes(0.0, 0), WakeAt) == WakeAt(10.0)
    assert growth.tick(5.0, 0) == [WakeAt(10.0)]
    actions = growth.tick(10.0, 0)
    assert kinds(actions) == ["extend_slow", "Exhausted", "ReadSize", "WakeAt"]
    growth.on_size_read(STEP)
    assert kinds(growth.tick(11.0, 0)) == ["ReadSize", "WakeAt"]  # reported once, looked at every second, never begun twice
    assert growth.on_free_bytes(11.0, 0) == []
    assert kinds(growth.on_step_ended(60.0, 2 * STEP, None, 0)) == ["UseSize", "extend_done"]


def test_a_step_that_hangs_and_has_worked_all_the_same() -> None:
    growth = policy(extend_timeout_seconds=10.0)
    growth.on_free_bytes(0.0, 0)
    growth.tick(10.0, 0)
    assert growth.on_size_read(2 * STEP) == [UseSize(2 * STEP)]
    assert kinds(growth.on_step_ended(20.0, 2 * STEP, Timeout("killed"), 64 * MIB)) == ["extend_done"]
    # And where the space that the look brought has been taken meanwhile, its end begins the next one: nobody else would.
    growth = policy(extend_timeout_seconds=10.0, adaptive=False)
    growth.on_free_bytes(0.0, 0)
    growth.tick(10.0, 0)
    growth.on_size_read(2 * STEP)
    assert growth.on_free_bytes(10.1, 0) == []
    assert kinds(growth.on_step_ended(20.0, 2 * STEP, None, 0)) == ["extend_done", "low_water", "extend_started", "Start", "WakeAt"]


def test_a_size_that_cannot_be_read_changes_nothing() -> None:
    growth = policy()
    growth.on_free_bytes(0.0, 0)
    assert kinds(growth.on_step_ended(1.0, None, NoSpace("full"), 0)) == ["extend_failed", "Exhausted", "WakeAt"]
    assert growth.storage_size_bytes == STEP


def test_storage_never_shrinks() -> None:
    growth = policy(storage_size_bytes=4 * STEP)
    assert growth.on_size_read(STEP) == []
    assert growth.storage_size_bytes == 4 * STEP


def test_storage_added_by_hand_counts_and_steps_go_on_from_there() -> None:
    growth = policy()
    growth.on_free_bytes(0.0, 0)
    assert only(growth.on_step_ended(1.0, 5 * STEP + MIB, None, 0), UseSize) == UseSize(5 * STEP + MIB)
    assert only(growth.on_free_bytes(1.0, MIB), Start) == Start(6 * STEP)


def test_fixed_storage_announces_no_step() -> None:
    growth = policy(can_grow=False)
    assert kinds(growth.on_free_bytes(0.0, 0)) == ["low_water", "Start", "WakeAt"]


# --- Where others tell of free space -----------------------------------------------------------------------------------


def refused(free_bytes: int | None = 0) -> GrowthPolicy:
    """A disk whose step was refused at 0.0 s by a group that has this much left."""
    growth = policy(notifies_space=True)
    assert "Start" in kinds(growth.tick(0.0, 0))
    error = NoSpace("full")
    error.left_bytes = free_bytes
    assert only(growth.on_step_ended(0.0, STEP, error, 0), WakeAt) == WakeAt(1.0)
    return growth


def test_a_full_group_is_asked_and_not_tried() -> None:
    """Each failing lvextend is a change of the group, which udev tells every disk that rests: tried again, they would never rest."""
    growth = refused()
    now, rests = 1.0, []
    for _ in range(6):
        assert growth.tick(now, 0) == [QueryGroup(), WakeAt(now + 300.0)]
        assert growth.tick(now, 0) == growth.on_space_freed(now, 0) == [WakeAt(now + 300.0)]  # the answer is on its way
        wake = only(growth.on_query_answered(now + 0.1, "vg0", 0, 0), WakeAt)
        assert isinstance(wake, WakeAt)
        rests.append(round(wake.when - now - 0.1, 6))
        assert growth.on_free_bytes(now + 0.2, 0) == [wake]  # a write that waits shortens nothing
        now = wake.when
    assert rests == [2, 4, 8, 16, 30, 30]


def test_a_group_that_has_space_again_is_tried() -> None:
    growth = refused()
    assert growth.on_space_freed(5.0, 0) == [QueryGroup(), WakeAt(305.0)]
    assert "Start" in kinds(growth.on_query_answered(5.1, "vg0", 1, 0))


def test_extents_that_were_of_no_use_are_not_tried_for_ever() -> None:
    """A physical volume that may not be allocated from: free, and no space. More than that is, and a real try now and then."""
    growth = refused(free_bytes=100)
    growth.tick(1.0, 0)
    assert "Start" not in kinds(growth.on_query_answered(1.0, "vg0", 100, 0))
    growth.tick(3.0, 0)
    assert "Start" in kinds(growth.on_query_answered(3.0, "vg0", 101, 0))
    growth.on_step_ended(4.0, STEP, NoSpace("full"), 0)
    assert "Start" in kinds(growth.tick(304.1, 0))


def test_a_group_that_cannot_be_asked_is_tried() -> None:
    growth = refused()
    growth.tick(1.0, 0)
    assert "Start" in kinds(growth.on_query_answered(1.1, None, None, 0))


def test_space_that_was_freed_in_the_disk_meanwhile_needs_no_step() -> None:
    growth = refused()
    growth.tick(1.0, 0)
    assert "Start" not in kinds(growth.on_query_answered(1.1, "vg0", 10 * STEP, STEP))


def test_space_that_was_made_before_the_group_was_asked() -> None:
    """vgextend between the refusal and the look after it: what that look shows is no measure of what was refused."""
    growth = refused()
    growth.on_group_report("vg0", 10 * STEP)
    growth.tick(1.0, 0)
    assert "Start" in kinds(growth.on_query_answered(1.1, "vg0", 10 * STEP, 0))


def test_a_question_that_is_never_answered_is_not_waited_for_for_ever() -> None:
    """A command that hangs in the kernel."""
    growth = refused()
    assert growth.tick(1.0, 0) == [QueryGroup(), WakeAt(301.0)]
    assert growth.tick(299.0, 0) == [WakeAt(301.0)]
    assert "Start" in kinds(growth.tick(301.0, 0))
    assert "Start" not in kinds(growth.on_query_answered(302.0, "vg0", 10 * STEP, 0))  # the answer, after all: a step is under way


def test_a_step_asked_for_beside_a_question_leaves_the_question_its_alarm() -> None:
    """The question hangs, the step fails and sets the alarm for its own rest: when that has passed somebody must still wake up."""
    growth = refused()
    growth.tick(1.0, 0)
    growth.extend(2.0, STEP)
    rests_until = only(growth.on_step_ended(3.0, STEP, NoSpace("full"), 0), WakeAt).when
    assert growth.tick(rests_until, 0) == [WakeAt(301.0)]
    assert QueryGroup() in growth.tick(301.0, 0)


def test_a_failure_after_a_step_beside_a_question_has_its_start_told() -> None:
    """The step that somebody asked for succeeds before the answer comes, which says that no more is left: the next failure is new."""
    growth = refused()
    growth.tick(1.0, 0)
    growth.extend(2.0, STEP)
    assert "extend_done" in kinds(growth.on_step_ended(3.0, 2 * STEP, None, 0))
    rests_until = only(growth.on_query_answered(3.1, "vg0", 0, 0), WakeAt).when
    assert "extend_started" in kinds(growth.tick(rests_until, 0))
    assert "extend_failed" in kinds(growth.on_step_ended(rests_until, 2 * STEP, NoSpace("full"), 0))
    assert "extend_started" not in kinds(growth.tick(rests_until + 301.0, 0))


def test_a_question_that_hangs_keeps_its_alarm_while_there_is_enough() -> None:
    """Else nobody wakes when there is too little again: the mark is not looked at while the answer is awaited."""
    growth = refused()
    growth.tick(1.0, 0)
    enough = growth.low_water_at(2.0)
    assert only(growth.on_free_bytes(2.0, enough), WakeAt) == WakeAt(301.0)
    assert growth.look_below_bytes < enough  # nothing can begin
    assert "Start" not in kinds(growth.tick(301.0, enough))
    assert growth.look_below_bytes >= growth.low_water_at(301.0)


def test_somebody_who_asks_by_hand_is_not_kept_waiting() -> None:
    growth = refused()
    assert "Start" in kinds(growth.extend(0.5, STEP))
    growth.on_step_ended(0.6, STEP, NoSpace("full"), 0)
    assert growth.poke(0.7, 0) == [QueryGroup(), WakeAt(300.7)]
    assert only(growth.on_query_answered(0.8, "vg0", 0, 0), WakeAt)


def test_changes_without_space_are_asked_about_less_and_less_often() -> None:
    """As many as they like: a hundred disks that wait must not ask a hundred times a second."""
    growth = refused()
    now, asked = 1.0, []
    while now < 60.0:
        if QueryGroup() in growth.on_space_freed(now, 0):
            asked.append(now)
            growth.on_query_answered(now, "vg0", 0, 0)
        now += 0.125
    assert len(asked) < 12 and asked[1] - asked[0] == 2.0 and asked[-1] - asked[-2] == 8.0


def test_other_failures_are_tried_again_by_the_clock_alone() -> None:
    """lvextend fails for another reason: what udev tells then is its own doing."""
    growth = policy(notifies_space=True)
    now, rests = 0.0, []
    for _ in range(7):
        assert "Start" in kinds(growth.tick(now, 0))
        wake = only(growth.on_step_ended(now, STEP, DeviceError("no"), 0), WakeAt)
        assert isinstance(wake, WakeAt)
        rests.append(wake.when - now)
        assert growth.on_space_freed(now + 0.5, 0) == []
        now = wake.when
    assert rests == [1, 2, 4, 8, 16, 30, 30]


def test_space_that_was_made_while_a_step_ran_may_have_come_too_late_for_it() -> None:
    growth = policy(notifies_space=True)
    for now in (0.0, 400.0, 800.0):
        growth.tick(now, 0)
        growth.on_step_ended(now, STEP, NoSpace("full"), 0)
    growth.tick(1200.0, 0)
    assert growth.on_space_freed(1200.1, 0) == []
    assert only(growth.on_step_ended(1201.0, STEP, NoSpace("full"), 0), WakeAt) == WakeAt(1202.0)


def test_space_that_was_made_means_nothing_where_none_is_needed() -> None:
    growth = policy(notifies_space=True)
    assert growth.on_space_freed(0.0, STEP) == []
    growth.on_free_bytes(0.0, 0)
    growth.on_step_ended(0.0, STEP, NoSpace("full"), 0)
    assert growth.on_space_freed(2.0, STEP) == []  # chunks were freed meanwhile
    assert "QueryGroup" not in kinds(growth.tick(3.0, STEP))


def test_a_device_that_was_resized() -> None:
    growth = policy()
    assert growth.on_device_resized() == [ReadSize()]
    assert growth.on_device_resized() == []  # that look may have come before the second change
    assert growth.on_size_read(2 * STEP) == [UseSize(2 * STEP), ReadSize()]
    assert growth.on_size_read(3 * STEP) == [UseSize(3 * STEP)]
    growth.on_free_bytes(0.0, 0)
    assert growth.on_device_resized() == [ReadSize()]  # also during a step: it may take its time to end
    assert kinds(growth.on_size_read(4 * STEP)) == ["UseSize"]


def test_a_device_that_has_gone() -> None:
    (event,) = policy().on_device_removed("gone")
    assert isinstance(event, GrowthEvent) and (event.kind, event.message) == ("storage_error", "gone")


# --- The group ---------------------------------------------------------------------------------------------------


def test_a_group_that_gets_low_is_reported_once() -> None:
    growth = policy()
    assert growth.on_group_report("vg0", 4 * STEP) == []
    (event,) = growth.on_group_report("vg0", 4 * STEP - MIB)
    assert isinstance(event, GrowthEvent)
    assert (event.kind, event.group, event.group_free_bytes) == ("group_low", "vg0", 4 * STEP - MIB)
    assert growth.on_group_report("vg0", STEP) == growth.on_group_report(None, None) == growth.on_group_report("vg0", STEP) == []
    assert growth.on_group_report("vg0", 5 * STEP) == []
    assert kinds(growth.on_group_report("vg0", STEP)) == ["group_low"]


def test_the_group_is_low_where_the_user_says() -> None:
    growth = policy(group_low_bytes=100 * MIB)
    assert growth.on_group_report("vg0", 100 * MIB) == []
    assert kinds(growth.on_group_report("vg0", 99 * MIB)) == ["group_low"]


def test_a_group_with_less_than_a_chunk_is_full() -> None:
    growth = policy()
    assert kinds(growth.on_group_report("vg0", MIB)) == ["group_low"]
    assert kinds(growth.on_group_report("vg0", MIB - 1)) == ["group_full"]
    assert growth.on_group_report("vg0", 0) == []


def test_a_group_that_refused_a_step_is_full_whatever_it_shows() -> None:
    growth = policy(group_low_bytes=0, adaptive=False)
    for now in (0.0, 1.0, 2.0):
        growth.tick(now, 0)
        growth.on_step_ended(now, STEP, NoSpace("no space on two devices at once"), 0)
        assert kinds(growth.on_group_report("vg0", 9 * STEP)) == (["group_full"] if now == 0.0 else [])  # said once
    growth.tick(3.0, 0)
    growth.on_step_ended(3.0, STEP + MIB, NoSpace("the last bit"), 0)
    assert growth.on_group_report("vg0", 0) == []  # still
    growth.tick(4.0, 0)
    growth.on_step_ended(4.0, 2 * STEP, None, 0)
    assert growth.on_group_report("vg0", STEP) == []
    growth.on_free_bytes(5.0, 0)
    growth.on_step_ended(5.0, 2 * STEP, NoSpace("full"), 0)
    assert kinds(growth.on_group_report(None, None)) == ["group_full"]  # there had been space


def test_other_failures_say_nothing_about_the_group() -> None:
    growth = policy()
    growth.on_free_bytes(0.0, 0)
    growth.on_step_ended(0.0, STEP, Timeout("killed"), 0)
    assert growth.on_group_report(None, None) == []


# --- The mark ----------------------------------------------------------------------------------------------------


def seen(rate: float, seconds: float, *, base: int = STEP // 2, at: float = 1000.0) -> GrowthPolicy:
    """A policy that has seen allocating writes of `rate` bytes a second, and a step of `seconds`. Time now: `at`."""
    growth = policy(storage_size_bytes=4 * STEP, low_water_bytes=base)
    growth.extend(at - seconds - 1, STEP)
    growth.on_step_ended(at - 1, 5 * STEP, None, int(rate) + 9 * STEP)
    growth.on_free_bytes(at - 1, int(rate) + 10 * STEP)
    growth.on_free_bytes(at, 10 * STEP)
    assert growth.write_rate(at) == pytest.approx(rate)
    return growth


@pytest.mark.parametrize(
    ("rate_mib", "seconds", "mark_mib", "steps"),
    [
        (0, 1.5, 32, 1),  # an idle disk: the base, half a step of 64 MiB
        (7, 1.5, 32, 1),  # 31.5 MiB are needed: no more than the base
        (10, 1.5, 45, 1),
        (20, 1.5, 90, 2),  # more than a step: two at once
        (20, 3.0, 180, 3),
        (80, 1.5, 360, 6),
        (100, 30.0, 512, 8),  # at most eight steps, for one hang must not take the whole group
        (1000, 0.01, 32, 1),  # steps that take no time need no reserve
    ],
)
def test_the_mark_is_what_is_written_in_three_times_the_time_of_a_step(rate_mib: int, seconds: float, mark_mib: int, steps: int) -> None:
    growth = seen(rate_mib * MIB, seconds)
    assert growth.low_water_at(1000.0) == mark_mib * MIB
    assert growth.on_free_bytes(1000.0, mark_mib * MIB) == []
    actions = growth.on_free_bytes(1000.0, (mark_mib - 1) * MIB)
    assert only(actions, Start) == Start(min((5 + steps) * STEP, DISK.max_storage_size_bytes))


@pytest.mark.parametrize(("free_mib", "steps"), [(179, 3), (100, 5), (0, 6)])
def test_a_step_that_begins_late_leaves_what_the_next_needs(free_mib: int, steps: int) -> None:
    """180 MiB may be written while it is under way, and as much while the next is."""
    growth = seen(20 * MIB, 3.0)
    assert only(growth.on_free_bytes(1000.0, free_mib * MIB), Start) == Start((5 + steps) * STEP)


def test_several_steps_at_once_stop_at_what_the_disk_can_use() -> None:
    growth = policy(storage_size_bytes=15 * STEP)
    growth.extend(0.0, MIB)
    growth.on_step_ended(2.0, 15 * STEP + MIB, None, 0)
    growth.on_free_bytes(2.0, 200 * MIB)
    actions = growth.on_free_bytes(3.0, 0)
    assert growth.steps_at_once(3.0) > 2
    assert only(actions, Start) == Start(DISK.max_storage_size_bytes)


def test_before_a_step_was_seen() -> None:
    growth = policy(storage_size_bytes=8 * STEP)
    growth.on_free_bytes(0.0, 8 * STEP)
    assert growth.low_water_at(0.0) == STEP // 2  # nothing is known of the writes: nothing is assumed
    growth.on_free_bytes(1.0, 8 * STEP - 12 * MIB)
    assert growth.low_water_at(1.0) == 54 * MIB  # 12 MiB/s, for three times 1.5 s
    growth.on_free_bytes(2.0, 4 * STEP)
    assert growth.low_water_at(2.0) == STEP and growth.steps_at_once(2.0) == 1  # no more than one step on a mere guess


def test_a_device_of_fixed_size_has_a_fixed_mark() -> None:
    growth = policy(storage_size_bytes=8 * STEP, can_grow=False)
    growth.on_free_bytes(0.0, 8 * STEP)
    growth.on_free_bytes(1.0, 4 * STEP)
    assert growth.low_water_at(1.0) == STEP // 2


def test_the_mark_can_be_held_fast() -> None:
    growth = seen(100 * MIB, 1.5)
    growth._adaptive = False
    assert (growth.low_water_at(1000.0), growth.steps_at_once(1000.0)) == (STEP // 2, 1)


def test_a_base_above_everything_stays() -> None:
    assert seen(100 * MIB, 30.0, base=9 * STEP).low_water_at(1000.0) == 9 * STEP


def test_the_mark_falls_back_when_the_disk_is_quiet() -> None:
    growth = seen(100 * MIB, 1.5)
    marks = [growth.low_water_at(1000.0 + minutes * 60) // MIB for minutes in (0, 10, 20, 30, 40)]
    assert marks == [450, 225, 112, 56, 32]


def test_slower_writing_does_not_lower_what_is_expected_at_once() -> None:
    growth = seen(100 * MIB, 1.5)
    growth.on_free_bytes(1001.0, 10 * STEP - 10 * MIB)
    assert growth.write_rate(1001.0) == pytest.approx(100 * MIB, rel=0.01)


def test_a_slow_step_is_forgotten_after_eight_others() -> None:
    growth = seen(20 * MIB, 5.0)
    growth._rate.at = lambda now: 20.0 * MIB  # type: ignore[method-assign]
    size = 5 * STEP
    for number in range(8):
        assert growth.low_water_at(1000.0) == 300 * MIB
        growth.extend(1000.0 + number, MIB)
        size += MIB
        growth.on_step_ended(1000.1 + number, size, None, 10 * STEP)
    assert growth.low_water_at(1000.0) == 32 * MIB
    assert growth.longest_extend_seconds == pytest.approx(5.0)  # what `info` tells


def test_a_rate_needs_a_while_to_be_one() -> None:
    rate = WriteRate()
    rate.look(0.0, 100 * MIB)
    rate.look(0.001, 50 * MIB)  # a queue that was let go
    assert rate.at(0.001) == 0.0
    rate.look(0.5, 49 * MIB)
    assert rate.at(0.5) == pytest.approx(102 * MIB)


def test_writes_that_wait_do_not_make_the_rate_seem_slow() -> None:
    rate = WriteRate()
    rate.look(0.0, 10 * MIB)
    rate.look(0.1, 0)  # too short for a window, but there will be no more to see
    assert rate.at(0.1) == pytest.approx(100 * MIB)
    rate.look(5.0, 0)
    rate.added(64 * MIB)
    rate.look(5.0, 32 * MIB)  # those that waited took half of it at once
    rate.look(5.5, 7 * MIB)
    assert rate.at(5.5) == pytest.approx(100 * MIB, rel=0.01)
    rate.look(5.51, 0)
    assert rate.at(5.51) == pytest.approx(100 * MIB, rel=0.01)  # 7 MiB in 10 ms are no measure


def test_space_that_is_added_or_freed_is_no_writing() -> None:
    rate = WriteRate()
    rate.look(0.0, 10 * MIB)
    rate.added(64 * MIB)
    rate.look(0.5, 73 * MIB)
    rate.look(0.7, 500 * MIB)  # trimmed
    rate.look(1.0, 499 * MIB)
    assert rate.at(1.0) == pytest.approx(2 * MIB, rel=0.01)


def test_where_the_next_look_is_due() -> None:
    growth = policy()
    growth.on_free_bytes(0.0, 61 * MIB)
    assert growth.look_below_bytes == 57 * MIB  # a sixteenth of a step further
    growth.on_free_bytes(0.0, 34 * MIB)
    assert growth.look_below_bytes == 32 * MIB  # the mark
    growth.on_free_bytes(0.0, 31 * MIB)
    assert growth.look_below_bytes == 27 * MIB  # a step runs: nothing can begin, but the rate is seen
    growth.on_free_bytes(0.0, 2 * MIB)
    assert growth.look_below_bytes == 0  # a write that finds no slot asks whatever the mark is
    growth.on_step_ended(0.1, 2 * STEP, None, MIB)
    assert growth.look_below_bytes == 61 * MIB
    growth.on_free_bytes(0.1, 31 * MIB)
    growth.on_step_ended(0.2, 2 * STEP, NoSpace("full"), 30 * MIB)
    assert growth.look_below_bytes == 26 * MIB  # it rests


def test_the_device_stood_still() -> None:
    growth = policy()
    growth.on_free_bytes(0.0, 0)
    assert (growth.last_suspend_seconds, growth.longest_suspend_seconds) == (None, None)
    done = growth.on_step_ended(1.0, 2 * STEP, None, 0, suspend_seconds=0.25)[1]
    assert isinstance(done, GrowthEvent) and done.suspend_seconds == 0.25
    growth.on_free_bytes(1.0, 0)
    (_, failed, *_) = growth.on_step_ended(2.0, 2 * STEP + MIB, NoSpace("full"), 0, suspend_seconds=0.125)
    assert isinstance(failed, GrowthEvent) and failed.suspend_seconds == 0.125
    assert (growth.last_suspend_seconds, growth.longest_suspend_seconds) == (0.125, 0.25)


# --- Growth on request -------------------------------------------------------------------------------------------


def test_extend() -> None:
    growth = policy()
    assert only(growth.extend(0.0, 10 * MIB), Start) == Start(STEP + 10 * MIB)
    actions = growth.on_step_ended(1.0, STEP + 10 * MIB, None, STEP)
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
    growth.on_free_bytes(0.0, 0)
    assert growth.extend(0.1, 3 * STEP) == []
    actions = growth.on_step_ended(1.0, 2 * STEP, None, 0)
    assert only(actions, Start) == Start(4 * STEP)
    assert "Answer" not in kinds(actions)
    assert only(growth.on_step_ended(2.0, 4 * STEP, None, 0), Answer) == Answer(None)


def test_extend_that_fails() -> None:
    growth = policy()
    growth.extend(0.0, STEP)
    error = NoSpace("full")
    assert only(growth.on_step_ended(1.0, STEP, error, STEP), Answer) == Answer(error)


def test_extend_that_hangs() -> None:
    growth = policy(extend_timeout_seconds=10.0)
    growth.extend(0.0, STEP)
    answer = only(growth.tick(10.0, STEP), Answer)
    assert isinstance(answer, Answer) and isinstance(answer.error, Timeout)
