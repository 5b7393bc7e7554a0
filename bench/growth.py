"""Does a write ever wait for growth? New places are written as fast as the device takes them, while each step takes a second and a half.

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

from machine import CannotMeasure, median, need, output, spread

from fvd.lvm import runner
from fvd.lvm.commands import Lvm
from fvd.lvm.report import GROUP_FIELDS, GroupState, LogicalVolume
from fvd.lvm.runner import Finished
from fvd.volume._driver import drive
from fvd.volume.allocator import Allocator
from fvd.volume.lvm_storage import LvmStorage
from fvd.volume.opening import open_volume
from fvd.volume.policy import GrowthEvent, default_low_water_bytes
from fvd.volume.provision import provision

MIB = 1 << 20
GIB = 1 << 30
STEP_SECONDS = 1.5  # what a slow lvextend takes
WRITE_BYTES = MIB
THREADS = 8
BEHIND_BYTES = 64 * MIB  # kept behind the write front
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
    """Stands in for `fvd.lvm.runner.run_command`: a group with one volume, the loop device, and an `lvextend` that takes its time."""

    NAME, VOLUME = "vg0", "vm1"

    EXTENT_BYTES = 4 * MIB

    def __init__(self, backing: Backing, step_seconds: float) -> None:
        self._backing = backing
        self._step_seconds = step_seconds
        self.free_bytes = 1 << 40

    def run_command(self, words: Sequence[str], timeout_seconds: float) -> Finished:
        begun = time.monotonic()
        if words[0] == "lvextend":
            size_bytes = -(-int(words[words.index("--size") + 1].removesuffix("b")) // self.EXTENT_BYTES) * self.EXTENT_BYTES
            time.sleep(self._step_seconds)
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
    """What writing new places as fast as possible was like."""

    bytes_written: int = 0
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)  # of each write, in seconds

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
    found, front, errors = Written(), [0] * threads, []

    def work(number: int) -> None:
        latencies = []
        try:
            while (place := next(places)) + WRITE_BYTES <= most_bytes and go_on(place):
                front[number] = place
                begun = time.perf_counter()
                write(place)
                latencies.append(time.perf_counter() - begun)
        except BaseException as error:
            errors.append(error)
        found.latencies += latencies

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
    step_seconds: float = STEP_SECONDS,
    low_water_bytes: int | None = None,
    adaptive: bool = True,
    threads: int = THREADS,
) -> Grown:
    """A new disk is written, never the same place twice, until its storage has grown `steps` times and as many grow steps are written."""
    virtual_bytes = (steps + 12) * step_bytes
    grown = Grown(step_bytes=step_bytes)
    with contextlib.ExitStack() as stack:
        backing = stack.enter_context(sparse_loop_device(step_bytes))
        group = SlowGroup(backing, step_seconds)
        stack.enter_context(group.played())
        provision(backing.device, virtual_size_bytes=virtual_bytes, grow_step_bytes=step_bytes)
        volume = open_volume(backing.device)
        events: list[GrowthEvent] = []
        waited: list[int] = []  # so far, when each step had ended

        def on_event(event: GrowthEvent) -> None:
            events.append(event)
            if event.kind == "extend_done":
                waited.append(volume.engine.statistics()["waited_for_space"])

        assert volume.allocator is not None
        volume.allocator.close()
        # To everybody else the device is one of fixed size: only this allocator takes it for a logical volume.
        volume.allocator = Allocator(
            LvmStorage(volume.node, group.volume(step_bytes), Lvm(), tells_of_room=True),
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

            written = write_everywhere(lambda place: driver.pwrite(place, data), backing, first, virtual_bytes, go_on, threads)
            grown.waited = driver.call(volume.engine.statistics)["waited_for_space"]
            figures = allocator.figures()
            grown.group_free_bytes = figures["group_free_bytes"]
    grown.bytes_written, grown.seconds, grown.latencies = written.bytes_written, written.seconds, written.latencies
    grown.steps, grown.longest_step_seconds = figures["extend_steps"], figures["longest_extend_seconds"] or 0.0
    grown.low_water_bytes = figures["low_water"]
    grown.waited_by_step = waited
    grown.begun_with_bytes = [event.free_bytes for event in events if event.kind == "extend_started"]
    grown.asked_bytes = [event.target_bytes - event.storage_size_bytes for event in events if event.kind == "extend_started"]
    return grown


def measure(rounds: int, seconds: float) -> dict[str, Any]:
    samples = []
    for _ in range(max(1, rounds // 3)):
        alone = device_alone(8 * GIB)
        grown = grow_under_load(5)
        samples.append(
            {
                "device_bytes_per_second": alone.bytes_per_second,
                "bytes_per_second": grown.bytes_per_second,
                "bytes_written": grown.bytes_written,
                "waited": grown.waited,
                "longest_write_seconds": grown.longest_write_seconds,
                "device_longest_write_seconds": alone.longest_write_seconds,
                "p99_write_seconds": grown.p99_write_seconds,
                "longest_step_seconds": grown.longest_step_seconds,
                "begun_with_bytes": grown.begun_with_bytes,
                "low_water_bytes": grown.low_water_bytes,
            }
        )
    return {"samples": samples, "step_seconds": STEP_SECONDS, "threads": THREADS}


def report(result: dict[str, Any]) -> list[dict[str, Any]]:
    samples = result["samples"]
    waited = sum(sample["waited"] for sample in samples)

    def row(what: str, values: list[float], goal: str = "", reached: bool | None = None) -> dict[str, Any]:
        return {"what": what, "value": spread(values), "goal": goal, "reached": reached}

    return [
        row("writes that waited in five growth steps of 1.5 s", [sample["waited"] for sample in samples], "0", waited == 0),
        row("new places written meanwhile, GB/s", [sample["bytes_per_second"] / 1e9 for sample in samples]),
        row("the device alone, GB/s", [sample["device_bytes_per_second"] / 1e9 for sample in samples]),
        row("new places / the device alone", [sample["bytes_per_second"] / sample["device_bytes_per_second"] for sample in samples]),
        row("longest write, ms", [sample["longest_write_seconds"] * 1000 for sample in samples]),
        row("longest write to the device alone, ms", [sample["device_longest_write_seconds"] * 1000 for sample in samples]),
        row("longest step, s", [sample["longest_step_seconds"] for sample in samples]),
        row("least that was free when a step began, GiB", [min(sample["begun_with_bytes"]) / GIB for sample in samples]),
        row("low-water mark in the end, GiB", [median([sample["low_water_bytes"]]) / GIB for sample in samples]),
    ]
