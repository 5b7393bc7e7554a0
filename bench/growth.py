# SPDX-License-Identifier: Apache-2.0
"""Does a write ever wait for growth? Allocating writes come as fast as the device takes them, while steps take from 0.2 to 6 seconds.

That is what users of others report of `lvextend`. Beside it stand the same writes to the device itself, and growth that begins too late:
when storage is exhausted, as where a guest is stopped until somebody has extended its disk.

The device is a loop device over tmpfs, and plays a logical volume: everything is real but the commands of lvm2, which are played by
`SlowGroup` at the place where they would leave the process. Its `lvextend` sleeps, then makes the device larger. The data are never read
back, so the memory behind the write front is given back at once: tens of GiB are written within a few hundred MiB.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import mmap
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fvd.disk._disk_thread import drive
from fvd.disk.opening import open_volume
from fvd.disk.provision import provision
from fvd.lvm import runner
from fvd.lvm.commands import Lvm
from fvd.lvm.report import GROUP_FIELDS, GroupState, LogicalVolume
from fvd.lvm.runner import Finished
from fvd.storage.allocator import Allocator
from fvd.storage.lvm_storage import LvmStorage
from fvd.storage.policy import GrowthEvent, default_low_water_bytes
from machine import CannotMeasure, need, output
from suite import Plan, Plot, Row, Series, missing, row

TITLE = "What a writer sees while storage grows five times"
MIB = 1 << 20
GIB = 1 << 30
STEP_SECONDS = 1.5  # what a slow lvextend takes
DELAYS_SECONDS = (0.2, 0.8, 1.5, 3.0, 6.0)  # what lvextend takes on busy hosts
WRITE_BYTES = MIB
THREADS = 8
BEHIND_BYTES = 64 * MIB  # kept behind the write front
STEP_UNIT_BYTES = 64 * MIB
BUCKET_SECONDS = 0.1
KEPT_LATENCIES = 1000
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2


class Backing:
    """The file behind a loop device."""

    def __init__(self, path: str, device: str) -> None:
        self.path = path
        self.device = device
        self._fd = os.open(path, os.O_RDWR)
        self._fallocate = ctypes.CDLL(None, use_errno=True).fallocate
        self._fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

    def enlarge(self, size_bytes: int) -> None:
        os.truncate(self._fd, size_bytes)
        output("losetup", "--set-capacity", self.device)

    def forget(self, offset_bytes: int, length_bytes: int) -> None:
        """Gives the memory of a range back."""
        if self._fallocate(self._fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset_bytes, length_bytes):
            raise OSError(ctypes.get_errno(), "punching a hole")

    def close(self) -> None:
        os.close(self._fd)


@contextlib.contextmanager
def sparse_loop_device(size_bytes: int) -> Iterator[Backing]:
    """A loop device with direct I/O over a sparse file in tmpfs."""
    need("losetup")
    if os.geteuid() != 0:
        raise CannotMeasure("loop devices need root")
    if not os.access("/dev/shm", os.W_OK):
        raise CannotMeasure("/dev/shm is not there")
    with tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="fvd-growth-") as file:
        file.truncate(size_bytes)
        try:
            device = output("losetup", "--find", "--show", "--direct-io=on", file.name)
        except subprocess.CalledProcessError as error:
            raise CannotMeasure(f"losetup: {error.stderr.strip()}") from error
        backing = Backing(file.name, device)
        try:
            yield backing
        finally:
            backing.close()
            subprocess.run(["losetup", "--detach", device], check=False, capture_output=True)


class SlowGroup:
    """Stands in for `fvd.lvm.runner.run_command`: a group with one volume, the loop device, and an `lvextend` that takes its time.

    `step_seconds`: of each step; after the last of them each takes as long as that."""

    NAME, VOLUME = "vg0", "vm1"

    EXTENT_BYTES = 4 * MIB

    def __init__(self, backing: Backing, step_seconds: Sequence[float]) -> None:
        self._backing = backing
        self._step_seconds = itertools.chain(step_seconds, itertools.repeat(step_seconds[-1]))
        self.free_bytes = 1 << 40

    def run_command(self, words: Sequence[str], timeout_seconds: float) -> Finished:
        begun = time.monotonic()
        if words[0] == "lvextend":
            size_bytes = -(-int(words[words.index("--size") + 1].removesuffix("b")) // self.EXTENT_BYTES) * self.EXTENT_BYTES
            time.sleep(next(self._step_seconds))
            self.free_bytes -= size_bytes - os.path.getsize(self._backing.path)  # noqa: PTH202
            self._backing.enlarge(size_bytes)
            printed, said = "", "  Loading table for x (7:0).\n  Suspending x (7:0) with device flush\n"  # without it nothing is believed
        elif words[0] == "vgs":
            row = dict.fromkeys(GROUP_FIELDS.split(","), "") | {
                "vg_name": self.NAME,
                "vg_size": str(1 << 40),
                "vg_free": str(self.free_bytes),
                "vg_extent_size": str(self.EXTENT_BYTES),
                "vg_permissions": "writeable",
                "pv_name": "/dev/played",
                "pv_uuid": "played",
                "pv_free": str(self.free_bytes),
                "pv_allocatable": "allocatable",
                "pv_major": "1",
                "pv_minor": "0",
            }
            printed, said = json.dumps({"report": [{"vg": [row]}]}), ""
        else:
            raise AssertionError(f"nothing else should be run: {' '.join(words)}")
        return Finished(tuple(words), 0, printed, said, time.monotonic() - begun)

    def volume(self, size_bytes: int) -> LogicalVolume:
        """The volume, as `lvs` would tell it."""
        return LogicalVolume(
            group=self.NAME,
            name=self.VOLUME,
            uuid="played",
            size_bytes=size_bytes,
            tags=frozenset({"fvd.disk"}),
            layout=frozenset({"linear"}),
            role=frozenset({"public"}),
            active=True,
            active_elsewhere=False,
            open=True,
            suspended=False,
            inactive_table=False,
            writable=True,
            device_number=None,
            health="",
            extent_bytes=self.EXTENT_BYTES,
            group_state=GroupState(writable=True, exported=False, partial=False, shared=False),
        )

    @contextlib.contextmanager
    def played(self) -> Iterator[None]:
        real, runner.run_command = runner.run_command, self.run_command
        try:
            yield
        finally:
            runner.run_command = real


@dataclass
class Written:
    """What allocating writes as fast as possible were like."""

    bytes_written: int = 0
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)  # of each write, in seconds
    ended_seconds: list[float] = field(default_factory=list)  # when each ended, after the first began

    @property
    def bytes_per_second(self) -> float:
        return self.bytes_written / self.seconds

    @property
    def longest_write_seconds(self) -> float:
        return max(self.latencies)

    @property
    def p99_write_seconds(self) -> float:
        return sorted(self.latencies)[len(self.latencies) * 99 // 100]


@dataclass
class Grown(Written):
    """And what growth was like meanwhile."""

    steps: int = 0
    step_bytes: int = 0
    longest_step_seconds: float = 0.0
    begun_with_bytes: list[int] = field(default_factory=list)  # what was free when each step began
    asked_bytes: list[int] = field(default_factory=list)  # by how much each step was to grow
    step_times: list[tuple[float, float]] = field(default_factory=list)  # when each began and ended, after the first write began
    waited: int = 0  # writes that had to wait for growth
    waited_by_step: list[int] = field(default_factory=list)  # of those, until the end of each step
    low_water_bytes: int = 0  # in the end
    group_free_bytes: int | None = None  # as `info` would tell it


def write_everywhere(
    write: Callable[[int], Any], backing: Backing, first_bytes: int, most_bytes: int, go_on: Callable[[int], bool], threads: int = THREADS
) -> Written:
    """`write(offset)` for one place after the other, from `threads` threads, until `go_on(offset)` is false or `most_bytes` are written.

    `first_bytes`: where the first place lies on the device; those behind the front are forgotten.
    """
    places = itertools.count(0, WRITE_BYTES)  # next() of it is atomic
    found, front = Written(), [0] * threads
    errors: list[BaseException] = []

    def work(number: int) -> None:
        latencies, ended = [], []
        try:
            while (place := next(places)) + WRITE_BYTES <= most_bytes and go_on(place):
                front[number] = place
                asked = time.perf_counter()
                write(place)
                answered = time.perf_counter()
                latencies.append(answered - asked)
                ended.append(answered - begun)
        except BaseException as error:
            errors.append(error)
        found.latencies += latencies
        found.ended_seconds += ended

    running = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    begun = time.perf_counter()
    for thread in running:
        thread.start()
    forgotten = 0
    while any(thread.is_alive() for thread in running):
        running[0].join(0.01)
        behind = (min(front) - BEHIND_BYTES) // BEHIND_BYTES * BEHIND_BYTES
        if behind > forgotten:
            backing.forget(first_bytes + forgotten, behind - forgotten)
            forgotten = behind
    found.seconds = time.perf_counter() - begun
    found.bytes_written = len(found.latencies) * WRITE_BYTES
    if errors:
        raise errors[0]
    return found


def device_alone(total_bytes: int, threads: int = THREADS) -> Written:
    """The same writes to the device itself, without fvd."""
    with sparse_loop_device(total_bytes) as backing, mmap.mmap(-1, WRITE_BYTES) as data:
        data.write(b"x" * WRITE_BYTES)
        fd = os.open(backing.device, os.O_RDWR | os.O_DIRECT)
        try:
            return write_everywhere(lambda place: os.pwrite(fd, data, place), backing, 0, total_bytes, lambda _: True, threads)
        finally:
            os.close(fd)


def grow_under_load(
    steps: int,
    *,
    step_bytes: int = 5 * GIB,
    step_seconds: float | Sequence[float] = STEP_SECONDS,
    low_water_bytes: int | None = None,
    adaptive: bool = True,
    threads: int = THREADS,
) -> Grown:
    """A new disk is written, never the same place twice, until its storage has grown `steps` times and as many grow steps are written."""
    virtual_bytes = (steps + 12) * step_bytes
    grown = Grown(step_bytes=step_bytes)
    with contextlib.ExitStack() as stack:
        backing = stack.enter_context(sparse_loop_device(step_bytes))
        group = SlowGroup(backing, (step_seconds,) if isinstance(step_seconds, int | float) else step_seconds)
        stack.enter_context(group.played())
        provision(backing.device, virtual_size_bytes=virtual_bytes, grow_step_bytes=step_bytes)
        volume = open_volume(backing.device)
        events: list[tuple[float, GrowthEvent]] = []  # with the time
        waited: list[int] = []  # so far, when each step had ended

        def on_event(event: GrowthEvent) -> None:
            events.append((time.perf_counter(), event))
            if event.kind == "extend_done":
                waited.append(volume.engine.statistics()["waited_for_space"])

        assert volume.allocator is not None
        volume.allocator.close()
        # To everybody else the device is one of fixed size: only this allocator takes it for a logical volume.
        volume.allocator = Allocator(
            LvmStorage(volume.node, group.volume(step_bytes), Lvm(), notifies_space=True),
            volume.geometry,
            storage_size_bytes=step_bytes,
            low_water_bytes=default_low_water_bytes(volume.geometry) if low_water_bytes is None else low_water_bytes,
            adaptive=adaptive,
            on_event=on_event,
        )
        allocator, first = volume.allocator, volume.geometry.data_offset_bytes
        data = bytes(b"x" * WRITE_BYTES)
        with drive(volume) as driver:

            def go_on(place: int) -> bool:
                return place < steps * step_bytes or len(waited) < steps

            begun = time.perf_counter()
            written = write_everywhere(lambda place: driver.pwrite(place, data), backing, first, virtual_bytes, go_on, threads)
            grown.waited = driver.call(volume.engine.statistics)["waited_for_space"]
            figures = allocator.figures()
            grown.group_free_bytes = figures["group_free_bytes"]
    grown.bytes_written, grown.seconds = written.bytes_written, written.seconds
    grown.latencies, grown.ended_seconds = written.latencies, written.ended_seconds
    grown.steps, grown.longest_step_seconds = figures["extend_steps"], figures["longest_extend_seconds"] or 0.0
    grown.low_water_bytes = figures["low_water"]
    grown.waited_by_step = waited
    started = [(at - begun, event) for at, event in events if event.kind == "extend_started"]
    grown.begun_with_bytes = [event.free_bytes for _, event in started]
    grown.asked_bytes = [event.target_bytes - event.storage_size_bytes for _, event in started]
    ended = [at - begun for at, event in events if event.kind == "extend_done"]
    grown.step_times = [(at, end) for (at, _), end in zip(started, ended, strict=False)]  # the last may be under way
    return grown


# --- The suite ---------------------------------------------------------------------------------------------------------------------


def measure(plan: Plan) -> dict[str, Any]:
    delays = plan.of((0.3, 0.8), DELAYS_SECONDS, DELAYS_SECONDS)
    samples = []
    for number in range(plan.of(1, 1, max(1, plan.rounds // 3))):
        sample: dict[str, Any] = {"round": number}
        alone = device_alone(plan.of(GIB, 2 * GIB, 8 * GIB))
        sample["device"] = figures_of(alone)
        step_bytes = 5 * GIB if plan.mode == "full" else step_of(alone.bytes_per_second, plan.of(1, 4, 4))
        sample["step_bytes"] = step_bytes
        sample["fvd"] = figures_of(grow_under_load(len(delays), step_bytes=step_bytes, step_seconds=delays))
        if plan.mode != "quick":
            sample["late"] = figures_of(too_late(2, GIB, (0.8, 1.5)))
        if plan.mode == "full":
            sample["steady"] = figures_of(grow_under_load(5))
        samples.append(sample)
    return {"mode": plan.mode, "samples": samples, "delays_seconds": delays, "threads": THREADS}


def step_of(bytes_per_second: float, seconds: float) -> int:
    """A grow step that the device takes so long to be written to, so that slower machines do not take longer; the usual one at most."""
    return max(GIB // 2, min(5 * GIB, int(bytes_per_second * seconds) // STEP_UNIT_BYTES * STEP_UNIT_BYTES))


def too_late(steps: int, step_bytes: int, step_seconds: Sequence[float]) -> Grown:
    """Growth that begins when storage is exhausted, and learns nothing from that."""
    return grow_under_load(steps, step_bytes=step_bytes, step_seconds=step_seconds, low_water_bytes=MIB, adaptive=False)


def figures_of(written: Written) -> dict[str, Any]:
    """What is kept of a run."""
    latencies = sorted(written.latencies)
    most = min(KEPT_LATENCIES, len(latencies)) - 1
    found: dict[str, Any] = {
        "bytes_written": written.bytes_written,
        "bytes_per_second": written.bytes_per_second,
        "longest_write_seconds": written.longest_write_seconds,
        "p99_write_seconds": written.p99_write_seconds,
        "latencies_ms": [round(latencies[(len(latencies) - 1) * at // most] * 1000, 3) for at in range(most + 1)] if most else [],
        "mb_per_bucket": rate_over_time(written.ended_seconds),
    }
    if isinstance(written, Grown):
        found |= {
            "waited": written.waited,
            "longest_step_seconds": written.longest_step_seconds,
            "begun_with_bytes": written.begun_with_bytes,
            "asked_bytes": written.asked_bytes,
            "low_water_bytes": written.low_water_bytes,
            "step_times": written.step_times,
        }
    return found


def rate_over_time(ended_seconds: Sequence[float]) -> list[float]:
    """Megabytes a second in each whole bucket of time."""
    buckets = [0] * int(max(ended_seconds) / BUCKET_SECONDS)
    for at in ended_seconds:
        if (number := int(at / BUCKET_SECONDS)) < len(buckets):
            buckets[number] += WRITE_BYTES
    return [count / 1e6 / BUCKET_SECONDS for count in buckets]


def rows(result: dict[str, Any]) -> list[Row]:
    samples = result["samples"]

    def of(run: str, field: str, factor: float = 1.0) -> list[float]:
        return [sample[run][field] * factor for sample in samples if run in sample]

    def pairs(one: str, other: str, field: str) -> list[float]:
        return [sample[one][field] / sample[other][field] for sample in samples if one in sample and other in sample]

    delays = ", ".join(f"{seconds:g}" for seconds in result["delays_seconds"])
    steps = f"steps of {samples[0]['step_bytes'] / GIB:.1f} GiB that take {delays} s"
    made = [
        row("writes that waited for storage", of("fvd", "waited"), goal="<= 0", note=steps, digits=0),
        row(
            "rate of allocating writes: fvd while growing / the device alone",
            pairs("fvd", "device", "bytes_per_second"),
            against="the device alone",
            better="more",
        ),
        row(
            "p99 of these writes: fvd while growing / the device alone",
            pairs("fvd", "device", "p99_write_seconds"),
            against="the device alone",
            better="less",
        ),
        row("longest write", of("fvd", "longest_write_seconds", 1000), unit="ms", digits=0),
        row("longest write to the device alone", of("device", "longest_write_seconds", 1000), unit="ms", digits=0),
    ]
    if of("late", "waited"):
        made += [
            row("writes that waited, growth begun too late", of("late", "waited"), digits=0, note="two steps, 0.8 and 1.5 s"),
            row("longest write, growth begun too late", of("late", "longest_write_seconds", 1000), unit="ms", digits=0),
        ]
    else:
        made.append(missing("writes that waited, growth begun too late", f"not in the {result['mode']} mode"))
    if of("steady", "waited"):
        made.append(row(f"writes that waited in five steps of {STEP_SECONDS} s", of("steady", "waited"), goal="<= 0", digits=0))
    made.append(
        missing(
            "how long a step holds the device still",
            "a loop device cannot be suspended; of a logical volume each step tells it (events: extend_done, suspend_seconds)",
        )
    )
    made += [
        row("allocating writes while growing", of("fvd", "bytes_per_second", 1e-9), unit="GB/s"),
        row("written to the device alone", of("device", "bytes_per_second", 1e-9), unit="GB/s"),
        row("longest step", of("fvd", "longest_step_seconds"), unit="s"),
        row(
            "least that was free when a step began",
            [min(sample["fvd"]["begun_with_bytes"]) / GIB for sample in samples],
            unit="GiB",
        ),
        row("low-water mark in the end", of("fvd", "low_water_bytes", 1 / GIB), unit="GiB"),
    ]
    return made


NAMES = {"fvd": "fvd while growing", "device": "the device alone", "late": "growth begun too late"}


def plots(result: dict[str, Any]) -> list[Plot]:
    first = result["samples"][0]
    runs = [run for run in NAMES if run in first]
    buckets = max(len(first[run]["mb_per_bucket"]) for run in runs)
    lines: list[Series] = []
    for run in runs:
        rates = first[run]["mb_per_bucket"]
        lines.append({"name": NAMES[run], "points": [[rate] for rate in rates] + [[]] * (buckets - len(rates))})
    steps = ", ".join(f"{begin:.1f}-{end:.1f}" for begin, end in first["fvd"]["step_times"])
    latencies: list[Series] = [
        {"name": NAMES[run], "points": [[value for sample in result["samples"] for value in sample[run]["latencies_ms"]]]} for run in runs
    ]
    return [
        {
            "name": "growth-rate",
            "title": "Allocating writes while storage grows",
            "kind": "lines",
            "unit": "MB/s",
            "x": [round(number * BUCKET_SECONDS, 1) for number in range(buckets)],
            "x_unit": "s",
            "series": lines,
            "better": "more",
            "caption": f"Steps were under way from second to second: {steps}.",
        },
        {
            "name": "growth-latency",
            "title": "Allocating writes of 1 MiB",
            "kind": "distribution",
            "unit": "ms",
            "x": [],
            "series": latencies,
            "logarithmic": True,
            "better": "less",
        },
    ]
