# SPDX-License-Identifier: Apache-2.0
"""fvd.base.copying: what a disk does about its base, over an engine that only says it copies, on a virtual clock."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from fvd.base import profile
from fvd.base.copying import AGAIN_NS, BaseEvent, Copying
from fvd.base.options import PrefetchOptions
from fvd.engine._engine import Want
from fvd.errors import Conflict, InvalidArgument

MIB = 1 << 20
MS = 1_000_000
SECOND = 1_000_000_000
BASE = 1024 * MIB
BLOCK = 64 << 10
STATUS_KEYS = {
    "state",
    "reason",
    "copy_on_read",
    "base_bytes",
    "copied_bytes",
    "remaining_bytes",
    "bytes_per_second",
    "limit_bytes_per_second",
    "eta_seconds",
    "resume_seconds",
    "profile",
    "profile_remaining_bytes",
    "released",
}


class FakeEngine:
    """What the engine promises. Copies `bytes_per_step` with each step in which it may, one MiB each 10 ms."""

    def __init__(self) -> None:
        self.copy_on_read = False
        self.prefetch_depth = 0
        self.prefetch_rate_bytes = 0
        self.prefetch_idle_ns = 20 * MS
        self.want = 0
        self.base_remaining_bytes = BASE
        self.base_failing = False
        self.base_released = False
        self.plans: list[list[tuple[int, int]]] = []
        self.prefetching = False
        self.gives_up = False
        self.bytes_per_step = 10 * MIB
        self.guest_idle_ns = SECOND
        self.reads: list[tuple[int, int]] = []
        names = "guest_quiet_requests guest_quiet_latency_ns guest_busy_requests guest_busy_latency_ns guest_last_ns now_ns base_reads "
        names += "base_read_bytes base_service_ns copy_writes copy_write_bytes copy_service_ns prefetched_bytes copied_bytes zero_bytes "
        self.counters = dict.fromkeys((names + "dropped_bytes no_slot_copies lazy_changes").split(), 0)

    def prefetch_plan(self, extents: list[tuple[int, int]]) -> None:
        self.plans.append(extents)
        self.prefetching = bool(extents)

    def copy_counters(self) -> dict[str, int]:
        return dict(self.counters)

    def read_profile(self) -> list[tuple[int, int]]:
        return self.reads

    def step(self, now_ns: int) -> None:
        self.counters["now_ns"] = now_ns
        self.counters["guest_last_ns"] = now_ns - self.guest_idle_ns
        if not self.prefetching or not self.prefetch_depth or self.base_failing:
            return
        if self.guest_idle_ns < self.prefetch_idle_ns:
            return
        size = min(self.bytes_per_step, self.base_remaining_bytes) // MIB * MIB
        if self.gives_up:
            self.prefetching = False
            return
        for name in ("base_read_bytes", "copy_write_bytes", "prefetched_bytes"):
            self.counters[name] += size
        for name in ("base_reads", "copy_writes"):
            self.counters[name] += size // MIB
        self.counters["base_service_ns"] += size // MIB * 2 * MS
        self.counters["copy_service_ns"] += size // MIB * MS
        self.base_remaining_bytes -= size
        if not self.base_remaining_bytes:
            self.prefetching = False


class Disk:
    """A Copying and its surroundings."""

    def __init__(self, locator: str = "nbd://host/gold", virtual_size_bytes: int = 4 * BASE, **options: Any) -> None:
        self.engine = FakeEngine()
        self.now_ns = 1000 * SECOND
        self.events: list[BaseEvent] = []
        self.releases = 0
        self.release_error: Exception | None = None
        self.copying = Copying(
            self.engine,
            volume_name="vg0/guest",
            virtual_size_bytes=virtual_size_bytes,
            base_size_bytes=BASE,
            base_locator=locator,
            block_size_bytes=BLOCK,
            release=self.release,
            clock_ns=lambda: self.now_ns,
            random=random.Random(1),
            **{"on_event": self.events.append} | options,
        )

    def release(self) -> None:
        self.releases += 1
        if self.release_error:
            raise self.release_error

    def run(self, seconds: float) -> None:
        """Quarters of a second, with a request to steer whenever there is a plan."""
        for _ in range(round(seconds * 4)):
            self.now_ns += SECOND // 4
            self.engine.step(self.now_ns)
            self.engine.want |= Want.STEER
            self.copying.on_want(self.engine.want)

    def base(self, **changes: bool) -> None:
        for name, value in changes.items():
            setattr(self.engine, name, value)
        self.engine.want |= Want.BASE
        self.copying.on_want(self.engine.want)

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]

    @property
    def status(self) -> dict[str, Any]:
        return self.copying.status()

    def state(self) -> str:
        return str(self.status["state"])


@pytest.fixture
def disk() -> Disk:
    return Disk()


def save_profile(path: Path, extents: list[tuple[int, int]], size: int = BASE) -> str:
    profile.save(str(path), size, extents)
    return str(path)


# --- From start to end ----------------------------------------------------------------------------------------------------------


def test_off(disk: Disk) -> None:
    disk.run(5)
    status = disk.status
    assert set(status) == STATUS_KEYS
    assert status["state"] == "off" and status["remaining_bytes"] == status["base_bytes"] == BASE and status["copied_bytes"] == 0
    assert not disk.engine.plans and not disk.events and status["eta_seconds"] is None and status["resume_seconds"] is None


def test_delay_copying_done_released(disk: Disk) -> None:
    disk.copying.start(PrefetchOptions(delay_s=10))
    assert disk.engine.plans == [[(0, BASE)]] and disk.engine.prefetch_depth == 0
    assert disk.state() == "delayed" and disk.status["resume_seconds"] == 10
    disk.run(9.75)
    assert disk.state() == "delayed" and disk.engine.prefetch_depth == 0 and disk.status["resume_seconds"] == pytest.approx(0.25)
    disk.run(0.25)
    assert disk.state() == "running" and disk.engine.prefetch_depth == 1
    disk.run(2)
    assert disk.engine.prefetch_depth == 8
    disk.run(30)
    assert disk.state() == "done" and not disk.status["released"] and disk.engine.prefetch_depth == 0
    assert disk.releases == 0 and disk.engine.plans[-1] == []
    disk.base(base_released=True)
    assert disk.releases == 1 and disk.status["released"] and disk.state() == "done"
    kinds = disk.kinds()
    assert kinds[0] == "prefetch_started" and kinds[-2:] == ["prefetch_done", "base_released"]
    assert kinds[1:-2] == ["prefetch_progress"] * 19
    for number, event in enumerate(disk.events[1:-2], 1):
        assert event.copied_bytes * 100 // BASE // 5 == number and event.total_bytes == BASE and f"{5 * number} %" in event.message
    assert all("vg0/guest" in event.message for event in disk.events)
    assert disk.events[10].eta_seconds is not None and disk.events[0].eta_seconds is None


def test_no_delay(disk: Disk) -> None:
    disk.copying.start(PrefetchOptions(delay_s=0))
    disk.run(0.25)
    assert disk.state() == "running" and disk.engine.prefetch_depth == 1


def test_progress_is_told_in_steps_from_where_it_began(disk: Disk) -> None:
    disk.engine.base_remaining_bytes = BASE * 57 // 100
    disk.copying.start(PrefetchOptions(delay_s=0))
    disk.run(0.25)
    disk.engine.base_remaining_bytes = BASE * 39 // 100  # guests write too
    disk.run(0.25)
    assert disk.kinds() == ["prefetch_started", "prefetch_progress"] and "60 %" in disk.events[-1].message


def test_stop_and_start_again(disk: Disk) -> None:
    disk.copying.stop()
    disk.copying.start(PrefetchOptions(delay_s=0))
    disk.run(3)
    disk.copying.stop()
    disk.copying.stop()
    assert disk.engine.plans[-1] == [] and disk.engine.prefetch_depth == 0 and disk.state() == "off"
    copied = disk.status["copied_bytes"]
    disk.run(3)
    assert disk.status["copied_bytes"] == copied > 0
    disk.copying.start(PrefetchOptions(delay_s=0))
    disk.run(60)
    assert disk.state() == "done"
    assert [kind for kind in disk.kinds() if kind != "prefetch_progress"] == [
        "prefetch_started",
        "prefetch_stopped",
        "prefetch_started",
        "prefetch_done",
    ]


def test_starting_while_it_runs_changes_the_options(disk: Disk) -> None:
    disk.copying.start(PrefetchOptions(delay_s=100))
    disk.copying.start(PrefetchOptions(delay_s=0, rate_bytes=MIB))
    disk.run(1)
    assert disk.state() == "running" and disk.engine.prefetch_rate_bytes == MIB and disk.status["limit_bytes_per_second"] == MIB
    disk.copying.start(PrefetchOptions(delay_s=0))
    assert disk.engine.prefetch_rate_bytes == 0 and disk.status["limit_bytes_per_second"] is None


@pytest.mark.parametrize(
    "options",
    [
        PrefetchOptions(delay_s=-1),
        PrefetchOptions(delay_s=float("nan")),
        PrefetchOptions(delay_s=float("inf")),
        PrefetchOptions(rate_bytes=-1),
    ],
)
def test_options_that_cannot_be(disk: Disk, options: PrefetchOptions) -> None:
    with pytest.raises(InvalidArgument, match="vg0/guest"):
        disk.copying.start(options)
    assert disk.state() == "off" and not disk.engine.plans


def test_a_base_that_is_larger_than_the_disk() -> None:
    disk = Disk(virtual_size_bytes=BASE // 2)
    disk.engine.base_remaining_bytes = BASE // 2
    disk.copying.start(PrefetchOptions(), disk.copying.find_profile(PrefetchOptions()))
    assert disk.engine.plans == [[(0, BASE // 2)]] and disk.status["base_bytes"] == BASE // 2


def test_nothing_left_or_released_is_not_started(disk: Disk) -> None:
    disk.engine.base_remaining_bytes = 0
    disk.copying.start(PrefetchOptions())
    assert not disk.engine.plans and disk.state() == "done"
    disk.base(base_released=True)
    disk.copying.start(PrefetchOptions())
    assert not disk.engine.plans and disk.kinds() == ["base_released"]


def test_what_a_pass_left_is_gone_through_again(disk: Disk) -> None:
    """Copies give up where a slot or space is missing: the plan ends, and something is left."""
    disk.copying.start(PrefetchOptions(delay_s=0))
    disk.run(2)
    disk.engine.gives_up = True
    disk.run(0.5)
    assert disk.engine.plans[1:] == [[(0, BASE)]] * 2 and disk.engine.prefetching  # the first pass copied something, the next did not
    assert disk.state() == "paused" and disk.status["resume_seconds"] > 9 and disk.engine.prefetch_depth == 0
    disk.run(AGAIN_NS / SECOND - 1)
    assert len(disk.engine.plans) == 3
    disk.engine.gives_up = False
    disk.run(60)
    assert disk.state() == "done"


# --- Wants ------------------------------------------------------------------------------------------------------------------------


def test_only_the_bits_that_were_acted_on_are_cleared(disk: Disk) -> None:
    disk.engine.want = Want.GROWTH | Want.EVENT | Want.STEER | Want.BASE
    disk.copying.on_want(disk.engine.want)
    assert disk.engine.want == 3
    disk.engine.want |= Want.BASE  # raised after it had been looked at
    disk.copying.on_want(Want.STEER)
    assert disk.engine.want == Want.GROWTH | Want.EVENT | Want.BASE
    disk.copying.on_want(3)
    assert disk.engine.want == Want.GROWTH | Want.EVENT | Want.BASE


def test_a_want_that_acting_raises_is_not_lost(disk: Disk) -> None:
    disk.copying.start(PrefetchOptions(delay_s=0))
    plan = disk.engine.prefetch_plan
    disk.engine.prefetch_plan = lambda extents: (plan(extents), setattr(disk.engine, "want", disk.engine.want | Want.STEER))  # type: ignore
    disk.engine.base_remaining_bytes = 0
    disk.engine.want = Want.STEER
    disk.copying.on_want(Want.STEER)
    assert disk.engine.want == Want.STEER


# --- The base -----------------------------------------------------------------------------------------------------------------------


def test_lost_and_back_are_told_once(disk: Disk) -> None:
    disk.copying.start(PrefetchOptions(delay_s=0))
    disk.run(3)
    disk.base(base_failing=True)
    disk.base(base_failing=True)
    disk.run(3)
    assert disk.state() == "base-lost" and disk.status["eta_seconds"] is None and disk.status["bytes_per_second"] == 0
    disk.base(base_failing=False)
    disk.run(10)
    assert [kind for kind in disk.kinds() if kind.startswith("base")] == ["base_lost", "base_back"]
    assert disk.state() == "running"
    assert "nbd://host/gold" in next(event for event in disk.events if event.kind == "base_lost").message


def test_lost_without_prefetching(disk: Disk) -> None:
    disk.base(base_failing=True)
    assert disk.kinds() == ["base_lost"] and disk.state() == "off"


def test_released_by_copies_on_read_alone(disk: Disk) -> None:
    disk.engine.base_remaining_bytes = 0
    disk.base(base_released=True)
    disk.base(base_released=True)
    assert disk.releases == 1 and disk.kinds() == ["base_released"]


def test_a_release_that_fails_is_not_repeated(disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    disk.release_error = OSError("stuck")
    disk.engine.base_remaining_bytes = 0
    for _ in range(5):
        disk.base(base_released=True)
    assert disk.releases == 1 and disk.status["released"] and disk.kinds() == ["base_released"]
    assert "stuck" in caplog.text and "vg0/guest" in caplog.text


def test_a_listener_that_fails_disturbs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def fails(event: BaseEvent) -> None:
        raise ValueError("deaf")

    disk = Disk(on_event=fails)
    disk.copying.start(PrefetchOptions(delay_s=0))
    disk.run(60)
    disk.base(base_released=True)
    assert disk.releases == 1 and "deaf" in caplog.text
    silent = Disk(on_event=None)
    silent.copying.start(PrefetchOptions(delay_s=0))
    silent.run(60)
    assert silent.state() == "done"


def test_copy_on_read(disk: Disk) -> None:
    disk.copying.set_copy_on_read(True)
    assert disk.engine.copy_on_read and disk.status["copy_on_read"] is True
    disk.copying.set_copy_on_read(False)
    assert not disk.engine.copy_on_read and disk.status["copy_on_read"] is False


# --- Speed --------------------------------------------------------------------------------------------------------------------------


def test_speed_and_eta(disk: Disk) -> None:
    disk.engine.bytes_per_step = MIB
    disk.copying.start(PrefetchOptions(delay_s=0))
    disk.run(1)
    assert disk.status["eta_seconds"] is None
    disk.run(19)
    status = disk.status
    assert status["bytes_per_second"] == pytest.approx(4 * MIB, rel=0.05)
    assert status["eta_seconds"] == pytest.approx(status["remaining_bytes"] / (4 * MIB), rel=0.05)
    disk.engine.bytes_per_step = 2 * MIB
    disk.run(40)
    assert disk.status["bytes_per_second"] == pytest.approx(8 * MIB, rel=0.1)


def test_pauses_do_not_count_and_the_guests_turns_do(disk: Disk) -> None:
    disk.engine.bytes_per_step = MIB
    disk.copying.start(PrefetchOptions(delay_s=0))
    disk.run(20)
    disk.base(base_failing=True)
    disk.run(20)
    assert disk.status["eta_seconds"] is None
    disk.base(base_failing=False)
    disk.run(3)
    assert disk.status["bytes_per_second"] == pytest.approx(4 * MIB, rel=0.3)
    disk.engine.guest_idle_ns = 0
    disk.run(20)
    assert disk.state() == "yielding" and 0 < disk.status["bytes_per_second"] < 2 * MIB


def test_a_guest_that_is_never_idle(disk: Disk) -> None:
    disk.engine.bytes_per_step = MIB
    disk.engine.guest_idle_ns = 0
    disk.copying.start(PrefetchOptions(delay_s=0, rate_bytes=MIB // 2))
    disk.run(60)
    assert disk.status["copied_bytes"] == 0 and disk.engine.prefetch_idle_ns == 20 * MS
    gates = []
    for _ in range(40):
        disk.run(0.25)
        gates.append(disk.engine.prefetch_idle_ns)
        assert disk.engine.prefetch_depth == 1 and disk.engine.prefetch_rate_bytes == MIB // 2
    assert gates.count(0) in (9, 10, 11) and set(gates) == {0, 20 * MS}
    assert disk.status["copied_bytes"] // MIB in (9, 10, 11)
    disk.engine.guest_idle_ns = SECOND
    disk.run(0.25)
    assert disk.engine.prefetch_idle_ns == 20 * MS
    disk.copying.stop()
    assert disk.engine.prefetch_rate_bytes == 0


def test_full(disk: Disk) -> None:
    disk.copying.start(PrefetchOptions(delay_s=0))
    disk.run(2)
    disk.engine.counters["no_slot_copies"] += 1
    disk.run(0.25)
    assert disk.state() == "full" and "space" in disk.status["reason"] and 0 < disk.status["resume_seconds"] <= 1.5
    assert disk.engine.prefetch_depth == 0
    disk.run(3)
    assert disk.state() == "running"


def test_what_happened_during_the_delay_says_nothing(disk: Disk) -> None:
    disk.copying.start(PrefetchOptions(delay_s=5))
    disk.engine.counters["no_slot_copies"] += 10  # copies on read
    disk.run(5.25)
    assert disk.state() == "running"


# --- Profiles -----------------------------------------------------------------------------------------------------------------------


def test_the_profile_beside_a_local_base_comes_first(tmp_path: Path) -> None:
    disk = Disk(str(tmp_path / "gold.img"))
    path = save_profile(tmp_path / "gold.img.fvd-profile", [(64 * MIB, MIB), (0, 4 * MIB)])
    disk.copying.start(PrefetchOptions(delay_s=0))
    assert disk.engine.plans == [[(64 * MIB, MIB), (0, 4 * MIB), (0, BASE)]]
    assert disk.status["profile"] == path and disk.status["profile_remaining_bytes"] == 5 * MIB
    disk.engine.bytes_per_step = 2 * MIB
    disk.run(0.5)
    assert disk.status["profile_remaining_bytes"] == 3 * MIB
    disk.run(2)
    assert disk.status["profile_remaining_bytes"] == 0


def test_a_named_profile_is_clipped_to_the_disk(tmp_path: Path) -> None:
    disk = Disk(virtual_size_bytes=10 * MIB)
    path = save_profile(tmp_path / "p", [(9 * MIB, 4 * MIB), (20 * MIB, MIB), (10 * MIB - 512, 1024)])
    disk.copying.start(PrefetchOptions(profile=path))
    assert disk.engine.plans == [[(9 * MIB, MIB), (0, 10 * MIB)]]


@pytest.mark.parametrize("what", ["damaged", "other base", "absent"])
def test_a_bad_profile_is_told_of_and_changes_nothing(tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture) -> None:
    disk, path = Disk(), tmp_path / "p"
    if what == "damaged":
        path.write_bytes(b"rubbish\n")
    elif what == "other base":
        save_profile(path, [(0, 4096)], size=4096)
    disk.copying.start(PrefetchOptions(profile=str(path)))
    assert disk.engine.plans == [[(0, BASE)]] and disk.status["profile"] is None
    assert str(path) in caplog.text and str(path) in disk.events[0].message


def test_a_profile_that_was_found_elsewhere_is_not_looked_for_again(tmp_path: Path) -> None:
    disk = Disk(str(tmp_path / "gold.img"))
    path = tmp_path / "gold.img.fvd-profile"
    save_profile(path, [(0, MIB)])
    found = disk.copying.find_profile(PrefetchOptions())
    path.unlink()
    disk.copying.start(PrefetchOptions(), found)
    assert disk.engine.plans == [[(0, MIB), (0, BASE)]]
    assert disk.copying.find_profile(PrefetchOptions()).path is None


def test_recording(tmp_path: Path) -> None:
    disk = Disk(str(tmp_path / "gold.img"), virtual_size_bytes=BASE // 2)
    disk.engine.reads = [(0, MIB), (MIB, MIB), (8 * MIB, MIB), (0, MIB)]
    path = str(tmp_path / "gold.img.fvd-profile")
    assert disk.copying.record_profile(None) == {"path": path, "extents": 2, "bytes": 3 * MIB}
    assert profile.load(path, BASE) == [(0, 2 * MIB), (8 * MIB, MIB)]
    other = str(tmp_path / "other")
    write = disk.copying.profile_writer(other)
    disk.engine.reads = []
    assert write()["extents"] == 2  # what was read when it was asked for
    (tmp_path / "letter").write_text("dear")
    with pytest.raises(Conflict, match="letter"):
        disk.copying.record_profile(str(tmp_path / "letter"))


def test_a_remote_base_has_no_place_of_its_own(disk: Disk, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"vg0/guest.*name a file"):
        disk.copying.record_profile()
    assert disk.copying.record_profile(str(tmp_path / "p"))["extents"] == 0


def test_a_profile_costs_whole_blocks(tmp_path: Path) -> None:
    """Of reads of 4 KiB here and there as much remains as must be copied for them, blocks that two of them share once."""
    path = str(tmp_path / "p")
    profile.save(path, BASE, [(10 * BLOCK, 4096), (10 * BLOCK + 8192, 4096), (3 * BLOCK - 4096, 8192), (0, 1)])
    disk = Disk()
    disk.copying.start(PrefetchOptions(delay_s=0, profile=path))
    assert disk.status["profile_remaining_bytes"] == 4 * BLOCK
