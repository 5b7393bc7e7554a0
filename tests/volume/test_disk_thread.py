# SPDX-License-Identifier: Apache-2.0
"""fvd.disk._disk_thread: a disk used from Python by many threads, growing, full, failing, closed."""

from __future__ import annotations

import array
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from loops import loop_device, mounted, run, sparse

from disks import MIB, driven, make, start, volume
from fvd.disk._disk_thread import DiskThread
from fvd.disk.opening import open_volume
from fvd.errors import DeviceError, InUse, InvalidArgument, NoSpace, ReadOnly
from fvd.inspect.check import check
from fvd.storage.policy import GrowthEvent


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "disk.img"


@pytest.fixture(params=["io_uring", "blocking"])
def blocking(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "blocking")


def until(what: Any, seconds: float = 20.0) -> None:
    """Waits for something that another thread does."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


# --- Reading and writing -----------------------------------------------------------------------------------------


def test_what_is_written_is_read(path: Path, blocking: bool) -> None:
    make(path)
    data = os.urandom(9 * MIB + 77)
    with driven(path, blocking=blocking) as driver:
        assert driver.pread(0, 64 * MIB) == bytes(64 * MIB)
        assert driver.pwrite(12345, data) == len(data)
        assert driver.pread(12345, len(data)) == data
        assert driver.pread(12344, 1) == b"\0"
        assert driver.pread(5, 0) == b"" and driver.pwrite(64 * MIB, b"") == 0
        driver.flush()
        assert driver.queue_kind in ("io_uring", "blocking")
    with driven(path, blocking=blocking) as driver:
        assert driver.pread(12345, len(data)) == data
        assert driver.volume.was_clean


def test_buffers_of_every_kind(path: Path) -> None:
    make(path)
    with driven(path) as driver:
        kinds: list[Any] = [b"bytes", bytearray(b"array"), memoryview(b"views"), array.array("H", [1, 2, 3])]
        for number, data in enumerate(kinds):
            driver.pwrite(number * 512, data)
            assert driver.pread(number * 512, len(bytes(data))) == bytes(data)
        buffer = bytearray(b"-" * 10)
        assert driver.pread_into(0, memoryview(buffer)[2:7]) == 5
        assert buffer == b"--bytes---"
        words = array.array("I", [0] * 4)
        driver.pwrite(8192, array.array("I", [1, 2, 3, 4]))
        driver.pread_into(8192, words)
        assert list(words) == [1, 2, 3, 4]


def test_trim_and_zero(path: Path, blocking: bool) -> None:
    make(path)
    with driven(path, blocking=blocking) as driver:
        driver.pwrite(0, b"x" * 8 * MIB)
        driver.zero(MIB + 1000, 5000)
        driver.zero(2 * MIB, MIB, no_hole=True, fua=True)
        driver.trim(4 * MIB, 2 * MIB)
        expected = bytearray(b"x" * 8 * MIB)
        for first, length in ((MIB + 1000, 5000), (2 * MIB, MIB), (4 * MIB, 2 * MIB)):
            expected[first : first + length] = bytes(length)
        assert driver.pread(0, 8 * MIB) == expected
        driver.trim(0, 64 * MIB)
        assert not any(driver.pread(0, 64 * MIB))


def test_ranges_that_are_not_in_the_disk(path: Path) -> None:
    make(path)
    with driven(path) as driver:
        calls: list[Any] = [
            lambda: driver.pread(64 * MIB - 1, 2),
            lambda: driver.pread(-1, 2),
            lambda: driver.pread(0, -2),
            lambda: driver.pwrite(64 * MIB, b"x"),
            lambda: driver.trim(0, 64 * MIB + 1),
            lambda: driver.zero(1 << 62, 1 << 62),
        ]
        for call in calls:
            with pytest.raises(InvalidArgument):
                call()


def test_read_only(path: Path) -> None:
    make(path)
    with driven(path, read_only=True) as driver:
        assert driver.pread(0, 4096) == bytes(4096)
        driver.flush()
        for call in (lambda: driver.pwrite(0, b"x"), lambda: driver.trim(0, MIB), lambda: driver.zero(0, MIB)):
            with pytest.raises(ReadOnly, match="read-only"):
                call()


def test_many_threads_and_one_truth(path: Path, blocking: bool) -> None:
    """Each thread owns every eighth block; all of them share chunks and metadata."""
    make(path)
    unit, threads = 3000, 8
    errors: list[BaseException] = []

    def work(number: int, driver: DiskThread) -> None:
        rng = random.Random(number)
        truth: dict[int, bytes] = {}
        try:
            for _ in range(150):
                at = (rng.randrange(0, 2000) * threads + number) * unit
                if rng.random() < 0.6:
                    truth[at] = rng.randbytes(unit)
                    driver.pwrite(at, truth[at], fua=rng.random() < 0.05)
                elif rng.random() < 0.1:
                    driver.flush()
                assert driver.pread(at, unit) == truth.get(at, bytes(unit))
            for at, data in truth.items():
                assert driver.pread(at, unit) == data
        except BaseException as error:
            errors.append(error)

    with driven(path, blocking=blocking) as driver:
        running = [threading.Thread(target=work, args=(number, driver)) for number in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        assert not errors
        assert driver.call(lambda: check(driver.volume)).errors == []
        assert driver.call(driver.volume.engine.leaks) == {}
    assert check(volume(path)).errors == []


# --- Growth ------------------------------------------------------------------------------------------------------


def test_a_disk_grows_before_it_is_needed(path: Path) -> None:
    make(path)
    events: list[GrowthEvent] = []
    with driven(path, on_event=events.append) as driver:
        allocator = driver.volume.allocator
        assert allocator is not None
        for chunk in range(64):
            driver.pwrite(chunk * MIB, bytes([chunk + 1]) * MIB)
            # The step is instant here; the guest is given the time that a step would have in the reserve.
            until(lambda: driver.volume.engine.free_slots >= 8 or allocator.storage.size_bytes() == 66 * MIB)
        assert driver.call(driver.volume.engine.statistics)["waited_for_space"] == 0
        for chunk in range(64):
            assert driver.pread(chunk * MIB, MIB) == bytes([chunk + 1]) * MIB
    assert path.stat().st_size == 66 * MIB
    assert [event.target_bytes // MIB for event in events if event.kind == "extend_done"] == [32, 48, 64, 66]


def test_extend_now_while_driven(path: Path) -> None:
    make(path)
    with driven(path) as driver:
        assert driver.volume.allocator is not None
        assert driver.volume.allocator.extend_now(5 * MIB).result(20) == 21 * MIB
        assert driver.volume.engine.free_slots == 19


def fill(driver: DiskThread, chunks: int) -> None:
    for chunk in range(chunks):
        driver.pwrite(chunk * MIB, b"f" * MIB)


@pytest.fixture
def full(path: Path) -> Iterator[str]:
    """A device that holds 8 chunks of a disk of 64."""
    with loop_device(sparse(path, 10 * MIB)) as device:
        make(device)
        yield device


def test_a_full_device_fails_new_chunks_only(full: str) -> None:
    with driven(full, on_full="error") as driver:
        fill(driver, 8)
        for _ in range(2):
            with pytest.raises(NoSpace, match="full"):
                driver.pwrite(20 * MIB, b"x")
        driver.pwrite(3 * MIB, b"old chunks go on")
        driver.flush()
        assert driver.pread(20 * MIB, 1) == b"\0"
        driver.trim(0, MIB)
        driver.flush()
        until(lambda: driver.volume.engine.free_slots)  # the device discards it first
        driver.pwrite(20 * MIB, b"in the place of the trimmed chunk")
    assert check(full).errors == []


def test_writes_wait_for_storage_and_go_on_by_themselves(full: str, path: Path) -> None:
    with driven(full, on_full="wait") as driver:
        fill(driver, 8)
        waiting = [threading.Thread(target=driver.pwrite, args=((20 + number) * MIB, b"waited")) for number in range(4)]
        for thread in waiting:
            thread.start()
        until(lambda: driver.call(lambda: driver.volume.engine.waiting_writes) == 4)
        # Nobody else is stuck behind them.
        driver.pwrite(3 * MIB, b"old chunks go on")
        driver.flush()
        assert driver.pread(3 * MIB, 3) == b"old"
        os.truncate(path, 40 * MIB)
        run("losetup", "--set-capacity", full)
        for thread in waiting:
            thread.join(20)
        assert driver.pread(23 * MIB, 6) == b"waited"
        assert driver.call(driver.volume.engine.leaks) == {}


def test_close_ends_waiting_writes(full: str) -> None:
    driver = start(full)
    fill(driver, 8)
    errors: list[BaseException] = []

    def write() -> None:
        try:
            driver.pwrite(20 * MIB, b"x")
        except DeviceError as error:
            errors.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    until(lambda: driver.call(lambda: driver.volume.engine.waiting_writes) == 1)
    driver.close()
    thread.join(20)
    assert "closed" in str(errors[0])
    with driven(full) as again:
        assert again.volume.was_clean


def test_a_file_system_without_space(tmp_path: Path) -> None:
    with mounted("tmpfs", tmp_path / "small", "-t", "tmpfs", "-o", "size=24m") as folder:
        path = folder / "disk"
        make(path)
        with driven(path, on_full="error") as driver:
            written = 0
            with pytest.raises((NoSpace, DeviceError)):
                for chunk in range(64):
                    driver.pwrite(chunk * MIB, b"f" * MIB)
                    written += 1
            assert written > 8
            driver.pwrite(0, b"old chunks go on")
            assert driver.pread(MIB, MIB) == b"f" * MIB


# --- The thread --------------------------------------------------------------------------------------------------


def test_calls_in_the_loops_thread(path: Path) -> None:
    make(path)
    with driven(path) as driver:
        here = threading.current_thread()
        there = driver.call(threading.current_thread)
        assert there is not here
        assert driver.call(lambda: driver.call(threading.current_thread)) is there
        with pytest.raises(ZeroDivisionError):
            driver.call(lambda: 1 // 0)
        with pytest.raises(RuntimeError, match="wait for itself"):
            driver.call(lambda: driver.pread(0, 1))
        driver.pwrite(0, b"still alive")


def test_a_closed_disk_says_so(path: Path) -> None:
    make(path)
    driver = start(path)
    driver.close()
    driver.close()
    assert driver.closed
    calls: list[Callable[[], object]] = [
        lambda: driver.pread(0, 1),
        lambda: driver.pwrite(0, b"x"),
        driver.flush,
        lambda: driver.call(list),
    ]
    for call in calls:
        with pytest.raises(DeviceError, match="closed"):
            call()
    driver.post(lambda: 1 // 0)
    with open_volume(volume(path)):
        pass


def test_closing_while_others_write(path: Path) -> None:
    make(path)
    driver = start(path)
    ends: list[str] = []

    def write() -> None:
        try:
            while True:
                driver.pwrite(random.randrange(60) * MIB, b"x" * 4096)
        except DeviceError as error:
            ends.append(str(error))

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    closers = [threading.Thread(target=driver.close) for _ in range(2)]
    for thread in closers:
        thread.start()
    for thread in (*threads, *closers):
        thread.join(20)
    assert len(ends) == 4 and all("closed" in end for end in ends)
    with driven(path) as again:
        assert again.volume.was_clean
    assert check(volume(path)).errors == []


def test_a_bug_in_the_loop_ends_every_call_with_an_error(path: Path) -> None:
    make(path)
    driver = start(path)
    driver.pwrite(0, b"x" * 4096, fua=True)
    driver.post(lambda: 1 // 0)
    until(lambda: driver.thread_ended(0.01))
    with pytest.raises(DeviceError, match="ZeroDivisionError"):
        driver.pread(0, 1)
    driver.close()
    with driven(path) as again:
        assert again.pread(0, 4096) == b"x" * 4096


def test_a_disk_that_was_never_closed(path: Path) -> None:
    """The process ends all the same, and what was flushed is there."""
    make(path)
    code = (
        "import sys; from fvd.disk.opening import open_volume; from fvd.disk._disk_thread import drive\n"
        "d = drive(open_volume(sys.argv[1])); d.pwrite(1 << 20, b'flushed'); d.flush(); print('done')"
    )
    done = subprocess.run([sys.executable, "-c", code, volume(path)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    with driven(path) as driver:
        assert driver.pread(MIB, 7) == b"flushed"


INTERRUPTED = """
import sys, threading
from fvd.disk.opening import open_volume
from fvd.disk._disk_thread import drive
driver = drive(open_volume(sys.argv[1]))
for chunk in range(8): driver.pwrite(chunk << 20, b"f" * (1 << 20))
print("full", flush=True)
try:
    driver.pwrite(20 << 20, b"x" * 4096)
except KeyboardInterrupt:
    print("interrupted", flush=True)
driver.pwrite(0, b"goes on")
driver.close()
print("closed", flush=True)
"""


def test_a_waiting_write_can_be_interrupted(full: str) -> None:
    with subprocess.Popen([sys.executable, "-c", INTERRUPTED, full], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "full\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30)[0] == "interrupted\nclosed\n"
    assert check(full).errors == [] and check(full).clean


def test_another_process_cannot_open_a_driven_disk(path: Path) -> None:
    make(path)
    with driven(path):
        code = (
            "import sys; from fvd.disk.opening import open_volume\n"
            "try: open_volume(sys.argv[1])\n"
            "except Exception as error: sys.exit(error.exit_code)"
        )
        assert subprocess.run([sys.executable, "-c", code, volume(path)], timeout=60, check=False).returncode == InUse.exit_code


def test_a_killed_writer_loses_nothing_that_was_flushed(path: Path) -> None:
    make(path)
    code = (
        "import sys, os; from fvd.disk.opening import open_volume; from fvd.disk._disk_thread import drive\n"
        "d = drive(open_volume(sys.argv[1]))\n"
        "for i in range(10**6):\n"
        "    d.pwrite(i % 60 * (1 << 20) + i % 7 * 4096, i.to_bytes(8, 'little') * 512); d.flush(); print(i, flush=True)\n"
    )
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", code, volume(path)], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            last = 0
            for _ in range(200):
                last = int(process.stdout.readline())
            process.kill()
        report = check(volume(path))
        assert report.errors == []
        with driven(path) as driver:
            for number in range(max(0, last - 59), last + 1):
                found = driver.pread(number % 60 * MIB + number % 7 * 4096, 4096)
                assert int.from_bytes(found[:8], "little") in (number, number + 420, number + 60 * 7), number
