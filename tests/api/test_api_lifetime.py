# SPDX-License-Identifier: Apache-2.0
"""Disks that are forgotten, and work that is interrupted: the claim is given up, and what a signal met is wholly done or wholly undone."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import fvd
import fvd.aio
from fvd._lifetime import Interrupted, Work, checkpoint, in_caller, whole
from fvd.disk.opening import OpenVolume
from fvd.errors import NoSpace
from fvd.lvm.runner import Unfinished, run_command
from fvd.storage.sized import FileStorage

MIB = 1 << 20
WORKERS = ("fvd-open", "fvd-close", "fvd-work")
WAIT_SECONDS = 20


class Alarm(BaseException):
    """What the handlers of these tests raise."""


@pytest.fixture
def volume(tmp_path: Path) -> str:
    name = f"file:{tmp_path / 'vm1.img'}"
    fvd.provision(name, "64M", grow_step="16M", journal_size="1M")
    return name


def held(tmp_path: Path) -> list[str]:
    """The files of this test that are open."""
    links = []
    for fd in Path("/proc/self/fd").iterdir():
        try:
            links.append(str(fd.readlink()))
        except OSError:
            continue
    return [link for link in links if link.startswith(str(tmp_path))]


# --- Forgotten -----------------------------------------------------------------------------------------------------------------------


def test_a_forgotten_disk_is_closed_and_told(volume: str, tmp_path: Path) -> None:
    disk = fvd.open(volume)
    disk.pwrite(0, b"kept")
    with pytest.warns(ResourceWarning, match=r"vm1\.img was not closed"):
        del disk
    assert held(tmp_path) == []
    assert fvd.info(volume).clean
    circle: list[Any] = [fvd.open(volume)]
    circle.append(circle)
    with pytest.warns(ResourceWarning, match="not closed"):
        del circle
        gc.collect()
    with fvd.open(volume) as disk:
        assert disk.pread(0, 4) == b"kept"


def test_a_forgotten_server_ends(volume: str, tmp_path: Path) -> None:
    served = fvd.serve(volume, socket=tmp_path / "vm.sock")
    assert served.info().uri
    with pytest.warns(ResourceWarning, match="not closed"):
        del served
    assert not (tmp_path / "vm.sock").exists()
    with fvd.open(volume):
        pass


def test_a_forgotten_asynchronous_disk_is_closed(volume: str) -> None:
    async def work() -> None:
        disk = await fvd.aio.open(volume)
        await disk.pwrite(0, b"kept")
        with pytest.warns(ResourceWarning, match="not closed"):
            del disk
        async with fvd.aio.open(volume) as disk:
            assert await disk.pread(0, 4) == b"kept"

    asyncio.run(work())


def test_a_closed_disk_is_not_told(volume: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        disk = fvd.open(volume)
        disk.close()
        del disk
        with fvd.serve(volume, socket=f"{volume.removeprefix('file:')}.sock") as served:
            pass
        del served
        with pytest.raises(fvd.InUse), fvd.open(volume):
            fvd.open(volume)


def test_a_disk_that_is_forgotten_beside_an_error(volume: str) -> None:
    def fail() -> None:
        disk = fvd.open(volume)
        raise LookupError(disk.volume)

    with pytest.warns(ResourceWarning, match="not closed"):
        try:
            fail()
        except LookupError as error:
            told = str(error)
        gc.collect()
    assert told == volume
    with fvd.open(volume):
        pass


def test_a_disk_that_is_collected_in_the_thread_of_another(volume: str, tmp_path: Path) -> None:
    """A disk's own thread waits for nothing, not even for another disk to be closed."""
    other = f"file:{tmp_path / 'other.img'}"
    fvd.provision(other, "64M", journal_size="1M")
    last = [fvd.open(volume)]
    with fvd.open(other) as disk, warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        disk._thread.call(last.clear)
        disk.pwrite(0, b"goes on")
        end = time.monotonic() + WAIT_SECONDS
        while held(tmp_path) != [link for link in held(tmp_path) if "other" in link]:
            assert time.monotonic() < end
            time.sleep(0.01)
        with fvd.open(volume):
            pass


def test_the_end_of_a_process_waits_for_nobody(volume: str) -> None:
    code = "import sys, fvd\ndisk = fvd.open(sys.argv[1])\ndisk.pwrite(0, b'x')\nserved = [disk]\nserved.append(served)"
    done = subprocess.run([sys.executable, "-c", code, volume], capture_output=True, text=True, timeout=WAIT_SECONDS, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# --- Work that is interrupted --------------------------------------------------------------------------------------------------------


@contextmanager
def handler(act: Callable[[], None]) -> Iterator[None]:
    def handle(number: int, frame: FrameType | None) -> None:
        act()

    before = signal.signal(signal.SIGALRM, handle)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def alarm() -> None:
    raise Alarm


def test_work_ends_before_the_interruption_is_raised() -> None:
    trace = []

    def work() -> str:
        os.kill(os.getpid(), signal.SIGALRM)
        time.sleep(0.05)
        trace.append("ended")
        return "made"

    with handler(alarm), pytest.raises(Alarm):
        whole(work, trace.append)
    assert trace == ["ended", "made"]
    with handler(lambda: trace.append("handled")):
        assert whole(work) == "made"
    assert trace[2:] == ["handled", "ended"]


def test_work_stops_at_its_next_checkpoint_and_is_undone_whole() -> None:
    trace = []

    def work() -> None:
        os.kill(os.getpid(), signal.SIGALRM)
        try:
            for _ in range(10_000):  # until the other thread has seen it
                checkpoint()
                time.sleep(0.001)
            trace.append("went on")
        finally:
            checkpoint()
            trace.append("undone")

    with handler(alarm), pytest.raises(Alarm):
        whole(work)
    assert trace == ["undone"]


def test_errors_and_threads_are_the_callers_own() -> None:
    def fail() -> None:
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        whole(fail)
    assert whole(in_caller(threading.current_thread)) is threading.current_thread()
    assert whole(threading.current_thread) is not threading.current_thread()
    with pytest.raises(LookupError, match="mine"):
        whole(lambda: in_caller(fail)())
    found = []
    thread = threading.Thread(target=lambda: found.append(whole(threading.current_thread)))
    thread.start()
    thread.join()
    assert found == [thread]


def at_step(number: int, work: Callable[[], Any]) -> int:
    """Does it, with a signal at that of its steps; the number of steps. A step is a call in the thread that does the work."""
    count = 0

    def step(frame: FrameType, kind: str, what: object) -> None:
        nonlocal count
        if kind == "call" and "fvd" in frame.f_code.co_filename and threading.current_thread().name in WORKERS:
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGALRM)
                time.sleep(0.01)  # for the other thread to see it

    threading.setprofile(step)
    try:
        work()
    finally:
        threading.setprofile(None)
    return count


@pytest.mark.parametrize("what", ["open", "close", "serve", "provision", "remove", "info", "extend"])
def test_an_interruption_at_any_step(volume: str, tmp_path: Path, what: str) -> None:
    other = f"file:{tmp_path / 'other.img'}"

    def provision() -> None:
        fvd.provision(other, "64M", journal_size="1M")

    def opened() -> None:
        fvd.open(volume).close()

    def prepare() -> Callable[[], Any]:
        if what == "open":
            return opened
        if what == "close":
            return fvd.open(volume).close
        if what == "serve":
            return fvd.serve(volume, socket=tmp_path / "vm.sock").close
        if what == "provision":
            fvd.remove(other)
            return provision
        if what == "remove":
            provision()
            return lambda: fvd.remove(other)
        return (lambda: fvd.info(volume)) if what == "info" else (lambda: fvd.extend(volume))

    def after() -> None:
        assert held(tmp_path) == [] and not (tmp_path / "vm.sock").exists()
        with fvd.open(volume) as disk:
            assert disk.check().errors == []
        if what in ("provision", "remove"):
            provision()
            assert fvd.check(other).errors == []

    steps = at_step(0, prepare())
    assert steps > 10
    with handler(alarm), warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        for number in range(1, steps + 1, max(1, steps // 12)):
            work = prepare()
            try:
                at_step(number, work)
            except Alarm:
                pass
            except fvd.FvdError as error:
                pytest.fail(f"step {number} of {steps}: {error}")
            del work
            after()


def test_interruptions_at_any_time(volume: str, tmp_path: Path) -> None:
    """By the clock: also between two steps of the main thread's."""
    rng = random.Random(13)
    outcomes = {"interrupted": 0, "done": 0}
    armed: set[str] = set()
    disk: fvd.Disk | None = None

    def act() -> None:
        if armed:
            armed.clear()
            raise Alarm

    def opened() -> None:
        nonlocal disk
        with fvd.open(volume) as disk:
            disk.pwrite(0, b"x" * 512)

    def served() -> None:
        with fvd.serve(volume, socket=tmp_path / "vm.sock") as served:
            served.info()

    with warnings.catch_warnings(), handler(act):
        warnings.simplefilter("ignore", ResourceWarning)
        for work in (opened, served):
            begun = time.monotonic()
            work()
            seconds = time.monotonic() - begun
            for number in range(30):
                try:
                    armed.add("yes")
                    signal.setitimer(signal.ITIMER_REAL, 0.0001 + rng.random() * 1.3 * seconds)
                    work()
                    armed.clear()
                    outcomes["done"] += 1
                except Alarm:
                    outcomes["interrupted"] += 1
                signal.setitimer(signal.ITIMER_REAL, 0)
                assert disk is None or disk._thread.closed, number  # after the end of its with
                assert held(tmp_path) == [], number
    assert outcomes["interrupted"] > 10, outcomes


def test_a_long_provision_stops_between_two_steps(tmp_path: Path) -> None:
    main = threading.current_thread()
    reported = []

    def progress(done: int, total: int) -> None:
        reported.append((done, total))
        assert threading.current_thread() is main  # whose toolkit may want that
        if len(reported) == 2:
            raise Alarm

    name = f"file:{tmp_path / 'large.img'}"
    with pytest.raises(Alarm):
        fvd.provision(name, "512G", block_size="4K", progress=progress)
    assert len(reported) == 2 and list(tmp_path.iterdir()) == []


def test_a_command_of_lvm_ends_by_itself_unless_one_asks_twice() -> None:
    def outcome(times: int, seconds: str) -> tuple[object, float]:
        work = Work(lambda: run_command(["sleep", seconds], 60))
        ask = threading.Timer(0.2, lambda: [work.ask() for _ in range(times)])
        ask.start()
        begun = time.monotonic()
        try:
            work.run()
        except BaseException as error:
            return type(error), time.monotonic() - begun
        return None, 0

    kind, seconds = outcome(1, "0.6")
    assert kind is Interrupted and seconds > 0.5
    kind, seconds = outcome(2, "30")
    assert kind in (Interrupted, Unfinished) and seconds < 10


# --- Requests that are interrupted ---------------------------------------------------------------------------------------------------


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Storage that does not grow before this is set."""
    freed = threading.Event()
    grow = FileStorage.grow_to

    def refuse(self: FileStorage, size_bytes: int) -> None:
        if not freed.is_set():
            raise NoSpace("no space in this test")
        grow(self, size_bytes)

    monkeypatch.setattr(FileStorage, "grow_to", refuse)
    logging.getLogger("fvd.api").disabled = True
    yield freed
    logging.getLogger("fvd.api").disabled = False


def test_an_interrupted_write_waits_for_storage_no_longer_and_never_lands(volume: str, full: threading.Event) -> None:
    with fvd.open(volume, on_full="wait") as disk, handler(alarm):
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        last = 0
        with pytest.raises(Alarm):
            for last in range(0, 64 * MIB, MIB):
                disk.pwrite(last, b"A" * MIB)
        assert last < 63 * MIB
        full.set()
        disk.extend("32M")
        disk.pwrite(last, b"B" * MIB)
        disk.flush()
        assert disk.pread(last, MIB) == b"B" * MIB


def test_a_cancelled_write_waits_for_storage_no_longer(volume: str, full: threading.Event) -> None:
    async def work() -> None:
        async with fvd.aio.open(volume, on_full="wait") as disk:
            # More than there are threads: the last ones wait for one of these, not for storage.
            writes = [asyncio.ensure_future(disk.pwrite(offset, b"A" * MIB)) for offset in range(0, 48 * MIB, MIB)]
            await asyncio.sleep(0.4)
            waiting = [write for write in writes if not write.done()]
            assert len(waiting) > 20
            for write in waiting:
                write.cancel()
            done = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), WAIT_SECONDS)
            assert {type(error) for error in done} == {asyncio.CancelledError}
            full.set()
            await disk.extend("32M")
            assert await disk.pwrite(47 * MIB, b"B" * MIB) == MIB
            assert await disk.pread(47 * MIB, MIB) == b"B" * MIB

    asyncio.run(work())


def test_nothing_of_a_cancelled_write_lands_after_it(volume: str) -> None:
    size = 8 * MIB

    async def work() -> None:
        async with fvd.aio.open(volume) as disk:
            await disk.pwrite(0, b"0" * size)
            for number in range(12):
                buffer = bytearray(b"A" * size)
                task = asyncio.ensure_future(disk.pwrite(0, buffer))
                await asyncio.sleep(0.0003 * (number % 6))
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                buffer[:] = b"B" * size  # the caller's again
                await disk.pwrite(0, b"N" * size)
                await asyncio.sleep(0.01)
                assert await disk.pread(0, size) == b"N" * size

    asyncio.run(work())


def test_a_close_that_is_interrupted_again_and_again_goes_on(volume: str) -> None:
    disk = fvd.open(volume)
    disk.pwrite(0, b"kept")
    real = OpenVolume.close

    def close(self: OpenVolume) -> None:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGALRM)
            time.sleep(0.02)
        real(self)

    with pytest.MonkeyPatch.context() as patch, handler(alarm):
        patch.setattr(OpenVolume, "close", close)
        with pytest.raises(Alarm):
            disk.close()
    assert fvd.info(volume).clean
    with fvd.open(volume) as again:
        assert again.pread(0, 4) == b"kept"
