# SPDX-License-Identifier: Apache-2.0
"""Operation queues: what they answer, on files and on a block device, through io_uring and blocking."""

from __future__ import annotations

import errno
import os
import random
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest
from loops import loop_device, mounted, run, sparse

from devtools._queue_driver import QueueDriver
from fvd.device._queue import UringQueue, open_queue

if TYPE_CHECKING:
    from devtools._queue_driver import Op  # a name of the stub's

KINDS = ["io_uring", "blocking"]
PAGE = 4096


@pytest.fixture(params=KINDS)
def driver(request: pytest.FixtureRequest) -> Iterator[QueueDriver]:
    driver = QueueDriver(force_blocking=request.param == "blocking")
    if driver.queue.kind != request.param:
        pytest.skip(driver.queue.notice)
    yield driver
    driver.close()


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "storage", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 1 << 20)
    yield fd
    os.close(fd)


@pytest.fixture
def device(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[int]:
    if os.geteuid() != 0:
        pytest.skip("a loop device takes root")
    if getattr(request, "param", "disk") == "disk":
        yield from loop_over(tmp_path / "device")
        return
    done = subprocess.run(["mount", "-t", "ramfs", "none", tmp_path], capture_output=True, text=True, check=False, timeout=10)
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr}")
    try:
        yield from loop_over(tmp_path / "device")
    finally:
        subprocess.run(["umount", tmp_path], check=True, timeout=10)


def loop_over(image: Path) -> Iterator[int]:
    image.write_bytes(bytes(1 << 20))
    done = subprocess.run(["losetup", "-f", "--show", image], capture_output=True, text=True, check=False, timeout=10)
    if done.returncode:
        pytest.skip(f"no loop device: {done.stderr}")
    node = done.stdout.strip()
    fd = os.open(node, os.O_RDWR | os.O_DIRECT)
    yield fd
    os.close(fd)
    subprocess.run(["losetup", "-d", node], check=True, timeout=10)


def pattern(number: int, size: int = PAGE) -> bytes:
    return random.Random(number).randbytes(size)


def test_transfers(driver: QueueDriver, storage: int, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.write_bytes(pattern(99))
    base_fd = os.open(base, os.O_RDONLY)
    driver.attach(storage, base_fd)
    writes: list[Op] = [("write" if i % 2 else "write_durable", i * PAGE, pattern(i)) for i in range(16)]
    assert driver.run(writes) == [(0, b"")] * 16
    assert driver.run([("flush",)]) == [(0, b"")]
    reads = driver.run([*(("read", i * PAGE, PAGE) for i in range(16)), ("read_base", 0, PAGE)])
    assert reads == [*((0, pattern(i)) for i in range(16)), (0, pattern(99))]
    assert driver.queue.inflight == 0
    os.close(base_fd)


@pytest.mark.parametrize("kind", KINDS)
def test_more_operations_than_the_ring_holds(kind: str, storage: int) -> None:
    """The submission queue spills and the completion queue overflows; nothing is lost or mixed up."""
    driver = QueueDriver(force_blocking=kind == "blocking", entries=4)
    driver.attach(storage)
    count = 3000
    assert driver.run([("write", i % 256 * PAGE, pattern(i % 256)) for i in range(count)]) == [(0, b"")] * count
    assert driver.run([("read", i % 256 * PAGE, PAGE) for i in range(count)]) == [(0, pattern(i % 256)) for i in range(count)]
    driver.close()


def test_the_end_of_a_file(driver: QueueDriver, storage: int) -> None:
    driver.attach(storage)
    size = os.fstat(storage).st_size
    assert [result for result, _ in driver.run([("read", size - 512, 1024), ("read", size, 512), ("read", size - 512, 512)])] == [
        -errno.EIO,
        -errno.EIO,
        0,
    ]


def test_the_end_of_a_device(driver: QueueDriver, device: int) -> None:
    driver.attach(device)
    size = os.lseek(device, 0, os.SEEK_END)
    batch: list[Op] = [
        ("write", size - PAGE, bytes(2 * PAGE)),
        ("write", size, bytes(PAGE)),
        ("read", size - PAGE, 2 * PAGE),
        ("read", size, PAGE),
    ]
    assert [result for result, _ in driver.run(batch)] == [-errno.ENOSPC, -errno.ENOSPC, -errno.EIO, -errno.EIO]


def test_neighbours_on_the_device_are_one_operation(driver: QueueDriver, storage: int) -> None:
    """Their buffers lie apart. What is short, of another kind, or large goes by itself."""
    driver.attach(storage)
    pages = [bytes([number + 1]) * PAGE for number in range(16)]
    writes: list[Op] = [("write", number * PAGE, page) for number, page in enumerate(pages)]
    assert driver.run(writes) == [(0, b"")] * 16
    assert driver.run([("write_durable", 20 * PAGE, b"d" * PAGE), ("write", 21 * PAGE, b"n" * PAGE)]) == [(0, b"")] * 2
    assert driver.run([("write", 32 * PAGE, b"l" * (64 << 10)), ("write", 48 * PAGE, b"m" * PAGE)]) == [(0, b"")] * 2
    reads: list[Op] = [("read", number * PAGE, PAGE) for number in range(16)]
    assert driver.run([*reads, ("read", 20 * PAGE, PAGE), ("read", 21 * PAGE, PAGE), ("read", 17 * PAGE, PAGE)]) == [
        *((0, page) for page in pages),
        (0, b"d" * PAGE),
        (0, b"n" * PAGE),
        (0, bytes(PAGE)),
    ]
    if isinstance(driver.queue, UringQueue):
        assert driver.queue.joined_total == 15 + 15 + 1


def test_neighbours_of_which_one_ends_short(driver: QueueDriver, storage: int) -> None:
    driver.attach(storage)
    end = (1 << 20) - 2 * PAGE
    answers = driver.run([("read", end, PAGE), ("read", end + PAGE, PAGE), ("read", end + 2 * PAGE, PAGE)])
    assert answers[:2] == [(0, bytes(PAGE))] * 2 and answers[2][0] == -errno.EIO


@pytest.mark.parametrize("how", ["write", "write_durable"])
def test_neighbours_that_fail(driver: QueueDriver, how: Literal["write", "write_durable"], tmp_path: Path) -> None:
    """A failure of durable writes is not asked again of each, which the kernel might answer with success; of others each has its own."""
    (tmp_path / "read-only").write_bytes(bytes(8 * PAGE))
    fd = os.open(tmp_path / "read-only", os.O_RDONLY)
    driver.attach(fd)
    batch: list[Op] = [(how, 0, bytes(PAGE)), (how, PAGE, bytes(PAGE))]
    assert [result for result, _ in driver.run(batch)] == [-errno.EBADF] * 2
    os.close(fd)


def test_errors_are_answers(driver: QueueDriver, tmp_path: Path) -> None:
    (tmp_path / "read-only").write_bytes(bytes(PAGE))
    fd = os.open(tmp_path / "read-only", os.O_RDONLY)
    driver.attach(fd)
    assert driver.run([("write", 0, bytes(512)), ("read", 0, 512)]) == [(-errno.EBADF, b""), (0, bytes(512))]
    os.close(fd)


def test_discard_makes_a_hole_and_keeps_the_size(driver: QueueDriver, storage: int) -> None:
    driver.attach(storage)
    assert driver.run([("write", 0, pattern(1, 64 * PAGE))]) == [(0, b"")]
    assert driver.run([("flush",), ("discard", 16 * PAGE, 32 * PAGE), ("discard", 1 << 30, PAGE)]) == [(0, b"")] * 3
    assert os.fstat(storage).st_size == 1 << 20
    assert os.pread(storage, 64 * PAGE, 0) == pattern(1, 64 * PAGE)[: 16 * PAGE] + bytes(32 * PAGE) + pattern(1, 64 * PAGE)[48 * PAGE :]


def test_discard_on_a_device_is_advisory(driver: QueueDriver, device: int) -> None:
    driver.attach(device)
    assert driver.run([("discard", 0, 16 * PAGE), ("discard", 1, 100), ("discard", 16 * PAGE, PAGE)]) == [(0, b"")] * 3


def test_zeros_of_a_file(driver: QueueDriver, storage: int) -> None:
    driver.attach(storage)
    assert driver.run([("write", 0, pattern(1, 4 * PAGE))]) == [(0, b"")]
    assert driver.run([("zero", PAGE, 2 * PAGE)]) == [(0, b"")]
    assert os.pread(storage, 4 * PAGE, 0) == pattern(1, 4 * PAGE)[:PAGE] + bytes(2 * PAGE) + pattern(1, 4 * PAGE)[3 * PAGE :]


@pytest.mark.parametrize("device", ["disk", "ramfs"], indirect=True)
def test_a_device_zeroes_by_itself_or_says_so_and_changes_nothing(driver: QueueDriver, device: int, request: pytest.FixtureRequest) -> None:
    driver.attach(device)
    assert driver.run([("write", 0, pattern(1, 4 * PAGE))]) == [(0, b"")]
    [(result, _)] = driver.run([("zero", PAGE, 2 * PAGE)])
    [(_, data)] = driver.run([("read", 0, 4 * PAGE)])
    if "ramfs" in request.node.callspec.id or result:  # which cannot punch holes
        assert (result, data) == (-errno.EOPNOTSUPP, pattern(1, 4 * PAGE))
    else:
        assert data == pattern(1, 4 * PAGE)[:PAGE] + bytes(2 * PAGE) + pattern(1, 4 * PAGE)[3 * PAGE :]


def test_zeroings_that_hang_leave_the_flushes_of_other_disks_alone(device: int, tmp_path: Path) -> None:
    """More than the kernel's own limit of threads for all disks together (four for each processor), on a file system that is frozen."""
    count = 6 * (os.cpu_count() or 1)
    number = os.fstat(device).st_rdev
    statistics = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/stat")
    seen: list[int] = []
    driver = QueueDriver()
    with loop_device(sparse(tmp_path / "below", 64 << 20)) as below:
        run("mkfs.ext4", "-q", below)
        with mounted(below, tmp_path / "frozen") as folder:
            (folder / "storage").write_bytes(bytes(8 << 20))
            fd = os.open(folder / "storage", os.O_RDWR)

            def thaw() -> None:
                time.sleep(1)
                seen.append(flushes(statistics))
                run("fsfreeze", "--unfreeze", folder)

            try:
                os.fsync(fd)
                driver.attach(fd, disk=0)
                driver.attach(device, disk=1)
                before = flushes(statistics)
                thawing = threading.Thread(target=thaw)
                run("fsfreeze", "--freeze", folder)
                thawing.start()
                batch: list[Op] = [("zero", at * PAGE, PAGE) for at in range(count)]
                results = driver.run([*batch, ("write", 0, pattern(1, PAGE)), ("flush",)], disks=[0] * count + [1, 1])
                thawing.join()
            finally:
                driver.close()
                os.close(fd)
    assert all(result == 0 for result, _ in results)
    assert seen[0] > before  # while all the others hung


def flushes(statistics: Path) -> int:
    return int(statistics.read_text().split()[15])


def test_readiness_is_an_edge(driver: QueueDriver) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    handle = driver.watch(ours.fileno(), 7)
    assert driver.turn(0) == []
    for _ in range(3):
        theirs.send(b"x")
        events = driver.turn(5)
        assert [(kind, key) for kind, key, _ in events] == [("readable", 7)]
        assert ours.recv(10) == b"x"
    theirs.send(b"y")
    assert driver.turn(5)
    assert driver.turn(0.01) == []  # not read, and not said twice
    theirs.close()
    ((kind, key, mask),) = driver.turn(5)
    assert (kind, key) == ("readable", 7) and mask & (select.POLLRDHUP | select.POLLHUP)
    driver.unwatch(handle)
    ours.close()
    assert driver.turn(0.01) == []


def test_a_watch_that_ended_says_nothing_of_its_successor(driver: QueueDriver) -> None:
    for key in range(50):
        ours, theirs = socket.socketpair()
        handle = driver.watch(ours.fileno(), key)
        theirs.send(b"x")
        theirs.shutdown(socket.SHUT_RDWR)
        events = driver.turn(0 if key % 2 else 5)
        assert {event[1] for event in events} <= {key}
        driver.unwatch(handle)
        ours.close()
        theirs.close()


def test_an_unwatched_socket_is_let_go(driver: QueueDriver) -> None:
    """Even when its poll is firing at that moment: the peer sees the end."""
    for _ in range(20):
        ours, theirs = socket.socketpair()
        handle = driver.watch(ours.fileno(), 1)
        driver.turn(0)
        theirs.send(b"x")
        driver.unwatch(handle)
        ours.close()
        driver.turn(0)
        driver.turn(0)
        theirs.settimeout(5)
        with pytest.raises(ConnectionResetError):  # its byte was never read
            theirs.recv(1)
        theirs.close()


def test_want_write_comes_once(driver: QueueDriver) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    handle = driver.watch(ours.fileno(), 3)
    with pytest.raises(BlockingIOError):
        while True:
            ours.send(bytes(65536))
    driver.want_write(handle)
    driver.want_write(handle)
    assert driver.turn(0.01) == []
    theirs.settimeout(5)
    seen = driver.turn(0)
    while not seen:
        theirs.recv(1 << 20)
        seen = driver.turn(0.01)
    assert [event[:2] for event in seen] == [("writable", 3)]
    while select.select([theirs], [], [], 0)[0]:
        theirs.recv(1 << 20)
    assert driver.turn(0.01) == []
    driver.unwatch(handle)
    ours.close()
    theirs.close()


def test_timeout_and_spin(driver: QueueDriver) -> None:
    for timeout, spin in ((0.05, 0), (0.02, 0.03)):
        for _ in range(10):  # the teardown of an earlier test's ring may interrupt us
            began = time.monotonic()
            assert driver.turn(timeout, spin) == []
            if not driver.queue.interrupted:
                break
        assert 0.045 <= time.monotonic() - began < 2
    ours, theirs = socket.socketpair()
    driver.watch(ours.fileno(), 5)
    driver.turn(0)
    timer = threading.Timer(0.05, theirs.send, [b"x"])
    timer.start()
    assert [event[:2] for event in driver.turn(5, 5)] == [("readable", 5)]
    timer.join()
    ours.close()
    theirs.close()


def test_a_signal_cuts_a_turn_short(driver: QueueDriver) -> None:
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
    try:
        threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGUSR1]).start()
        began = time.monotonic()
        while not seen and time.monotonic() < began + 10:
            assert driver.turn(5) == []
        assert driver.queue.interrupted and time.monotonic() - began < 4
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.alone
def test_close_waits_for_nothing_else(driver: QueueDriver) -> None:
    pairs = [socket.socketpair() for _ in range(10)]
    for ours, theirs in pairs:
        driver.watch(ours.fileno(), 1)
        theirs.send(b"x")
    began = time.monotonic()
    driver.close()
    driver.close()
    assert time.monotonic() - began < 0.5
    for pair in pairs:
        for end in pair:
            end.close()


def test_blocking_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FVD_QUEUE", "blocking")
    queue = open_queue()
    assert queue.kind == "blocking" and "asked for" in queue.notice
    queue.close()


# A filter that refuses io_uring_setup as seccomp profiles of containers do. x86-64 and arm64 number it alike.
REFUSE = """
import ctypes, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
rules = [(0x20, 0, 0, 0), (0x15, 0, 1, 425), (0x06, 0, 0, 0x00050000 | {error}), (0x06, 0, 0, 0x7FFF0000)]
code = b"".join(struct.pack("HBBI", *rule) for rule in rules)
buffer = ctypes.create_string_buffer(code)
program = struct.pack("HxxxxxxP", len(rules), ctypes.addressof(buffer))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.c_char_p(program), 0, 0) == 0, ctypes.get_errno()
from fvd.device._queue import open_queue
queue = open_queue()
print(queue.kind, queue.notice)
"""


@pytest.mark.parametrize(
    ("error", "words"), [(errno.EPERM, "io_uring_disabled"), (errno.ENOSYS, "older than Linux"), (errno.ENOMEM, "ulimit -l")]
)
def test_falls_back_where_the_kernel_refuses(error: int, words: str) -> None:
    code = REFUSE.replace("{error}", str(error))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("blocking ") and words in done.stdout


@pytest.fixture
def broken_sampler() -> Iterator[int]:
    """A descriptor of which the sampler's question is an error: a pipe's."""
    reader, writer = os.pipe()
    yield reader
    os.close(reader)
    os.close(writer)


def test_sampler_is_asked_where_durability_is_answered(driver: QueueDriver, storage: int, broken_sampler: int) -> None:
    """R28: it has heard of a lost page, so nothing is durable; everything else is as it is."""
    driver.attach(storage, sampler_fd=broken_sampler)
    operations: list[Op] = [
        ("write", 0, pattern(1)),
        ("write_durable", PAGE, pattern(2)),
        ("flush",),
        ("read", 0, PAGE),
        ("discard", 0, PAGE),
    ]
    results = [result for operation in operations for result, _ in driver.run([operation])]
    assert results == [0, -errno.ESPIPE, -errno.ESPIPE, 0, 0]
    assert [result for result, _ in driver.run([("write_durable", 0, pattern(number)) for number in range(32)])] == [-errno.ESPIPE] * 32


def test_sampler_of_one_disk_only(driver: QueueDriver, storage: int, broken_sampler: int, tmp_path: Path) -> None:
    sampler = os.open(tmp_path / "storage", os.O_RDONLY)
    driver.attach(storage, disk=0, sampler_fd=sampler)
    driver.attach(storage, disk=1, sampler_fd=broken_sampler)
    driver.attach(storage, disk=2)
    results = driver.run([("write_durable", 0, pattern(1)), ("flush",)] * 3, disks=[0, 0, 1, 1, 2, 2])
    assert [result for result, _ in results] == [0, 0, -errno.ESPIPE, -errno.ESPIPE, 0, 0]
    os.close(sampler)
