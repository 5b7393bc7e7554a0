# SPDX-License-Identifier: Apache-2.0
"""fvd.device._remote: bases over NBD in the operation queue's loop, with real servers that are slow, fail, stop, vanish and return."""

from __future__ import annotations

import errno
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from nbd_base import MIB, Nbdkit, OddServer, children, command_of, is_running, sparse_image, until

from devtools._queue_driver import QueueDriver
from fvd.device._remote import Remote
from fvd.errors import DeviceError, FvdError, InvalidArgument, NotFound, Timeout

if TYPE_CHECKING:
    from devtools._queue_driver import Op  # a name of the stub's

KINDS = ["io_uring", "blocking"]
SIZE = 24 * MIB
DATA = random.Random(7).randbytes(SIZE)

needs_qemu = pytest.mark.skipif(shutil.which("qemu-nbd") is None, reason="no qemu-nbd")


class Workbench:
    """A queue, remotes and servers, which end with the test."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder
        self.driver = QueueDriver(force_blocking=kind == "blocking")
        if self.driver.queue.kind != kind:
            pytest.skip(self.driver.queue.notice)
        self.storage = os.open(folder / "storage", os.O_RDWR | os.O_CREAT)
        os.ftruncate(self.storage, MIB)
        self.image = folder / "image"
        self.image.write_bytes(DATA)
        self.remotes: list[Remote] = []
        self.servers: list[Nbdkit | OddServer] = []

    def nbdkit(self, *arguments: str | Path, tls: bool = False) -> Nbdkit:
        folder = self.folder / f"server{len(self.servers)}"
        folder.mkdir()
        server = Nbdkit(folder, *arguments, tls=tls)
        self.servers.append(server)
        return server

    def odd(self, oddity: str) -> OddServer:
        server = OddServer(self.folder, oddity)
        self.servers.append(server)
        return server

    def open(self, uri: str | None = None, **options: Any) -> Remote:
        remote = Remote(uri=uri, name="vol", **options)
        self.remotes.append(remote)
        remote.open()
        return remote

    def attach(self, uri: str | None = None, disk: int = 0, **options: Any) -> Remote:
        remote = self.open(uri, **options)
        self.driver.attach(self.storage, -1, remote, disk)
        return remote

    def read(self, offset: int = 0, length: int = 4096) -> int:
        """One read of disk 0's base; its result. What it read is right."""
        [(result, data)] = self.driver.run([("read_base", offset, length)])
        assert result or data == DATA[offset : offset + length]
        return result

    def back(self) -> bool:
        self.driver.turn(0.02)
        return self.read() == 0

    def close(self) -> None:
        self.driver.close()
        for remote in self.remotes:
            remote.close()
        for server in self.servers:
            server.kill() if isinstance(server, Nbdkit) else server.close()
        os.close(self.storage)


@pytest.fixture(params=KINDS)
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Workbench]:
    bench = Workbench(tmp_path, request.param)
    yield bench
    bench.close()


def reads(seed: int, count: int = 64) -> list[Op]:
    rng = random.Random(seed)
    lengths = [rng.choice([1, 512, 777, 4096, 65536, 100_001, 4 * MIB]) for _ in range(count)]
    return [("read_base", rng.randrange(SIZE - length), length) for length in lengths]


def check(results: list[tuple[int, bytes]], ops: list[Op], image: bytes = DATA) -> None:
    for (result, data), op in zip(results, ops, strict=True):
        assert len(op) == 3 and isinstance(op[2], int)
        assert result == 0 and data == image[op[1] : op[1] + op[2]]


# --- Reading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("server", ["nbdkit", pytest.param("qemu-nbd", marks=needs_qemu)])
def test_reads_at_depth(bench: Workbench, server: str) -> None:
    if server == "nbdkit":
        bench.attach(bench.nbdkit("file", bench.image).uri)
    else:
        bench.attach(command=["qemu-nbd", "-r", "-f", "raw", str(bench.image)])
    for seed in range(3):
        check(bench.driver.run(reads(seed)), reads(seed))
    assert bench.driver.queue.inflight == 0
    mixed: list[Op] = [("write", 0, DATA[:4096]), ("read_base", 5, 100), ("read_base", 9, 0), ("flush",)]
    assert bench.driver.run(mixed) == [(0, b""), (0, DATA[5:105]), (0, b""), (0, b"")]


def test_a_server_with_limits(bench: Workbench) -> None:
    """Blocks of 4 KiB, at most 64 KiB: it refuses everything else."""
    policy = ["blocksize-minimum=4096", "blocksize-preferred=4096", "blocksize-maximum=65536", "blocksize-error-policy=error"]
    remote = bench.open(bench.nbdkit("--filter=blocksize-policy", "file", bench.image, *policy).uri)
    assert remote.pread(4095, 200_000) == DATA[4095:204_095]
    bench.driver.attach(bench.storage, -1, remote)
    check(bench.driver.run(reads(5)), reads(5))


def test_an_end_that_is_no_whole_block(bench: Workbench) -> None:
    odd = SIZE - 1234
    os.truncate(bench.image, odd)
    policy = ["blocksize-minimum=4096", "blocksize-preferred=4096", "blocksize-maximum=65536"]
    remote = bench.open(bench.nbdkit("--filter=blocksize-policy", "file", bench.image, *policy).uri)
    assert remote.size_bytes == odd and remote.pread(odd - 5, 5) == DATA[odd - 5 : odd]
    bench.driver.attach(bench.storage, -1, remote)
    check(bench.driver.run([("read_base", odd - 7777, 7777)]), [("read_base", odd - 7777, 7777)])
    results = bench.driver.run([("read_base", odd - 512, 513), ("read_base", odd, 1), ("read_base", 1 << 62, 1 << 10)])
    assert [result for result, _ in results] == [-errno.EIO] * 3


def test_one_read_of_more_than_nbd_allows(bench: Workbench) -> None:
    size = 90 * MIB
    image = sparse_image(bench.image, size, [(at * MIB, DATA[at : at + 5000]) for at in range(1, 89, 3)])
    bench.attach(bench.nbdkit("file", bench.image).uri)
    assert bench.driver.run([("read_base", 100, size - 100)])[0] == (0, image[100:])


@pytest.mark.parametrize("count", [3000, 12000])
def test_more_requests_than_the_socket_takes(bench: Workbench, count: int) -> None:
    """While the server is stopped: they wait in libnbd until the socket can be written to again."""
    server = bench.nbdkit("file", bench.image)
    bench.attach(server.uri)
    server.signal(signal.SIGSTOP)
    ops: list[Op] = [("read_base", i * 512, 512) for i in range(count)]
    check(bench.driver.run(ops, meanwhile=lambda: server.signal(signal.SIGCONT)), ops)


def test_requests_without_replies(bench: Workbench) -> None:
    """A server that answers nothing before it has them all: that the socket can be written to again is all that moves us on."""
    count = OddServer.HOARD
    bench.attach(bench.odd("hoards").uri, timeout_seconds=30)
    results = bench.driver.run([("read_base", i * 512 % MIB, 512) for i in range(count)])
    assert results == [(0, bytes(512))] * count


def test_two_remotes_in_one_queue(bench: Workbench) -> None:
    other = random.Random(8).randbytes(SIZE)
    (bench.folder / "other").write_bytes(other)
    first, second = bench.nbdkit("file", bench.image), bench.nbdkit("file", bench.folder / "other")
    bench.attach(first.uri, disk=0)
    bench.attach(second.uri, disk=5)
    ops = [*reads(1), *reads(2)]
    disks = [5 * (i % 2) for i in range(len(ops))]
    for (result, data), op, disk in zip(bench.driver.run(ops, disks), ops, disks, strict=True):
        assert len(op) == 3 and isinstance(op[2], int)
        assert result == 0 and data == (other if disk else DATA)[op[1] : op[1] + op[2]]
    second.kill()
    results = bench.driver.run([("read_base", 0, 512)] * 4, [0, 5, 0, 5])
    assert [result for result, _ in results] == [0, -errno.ENOTCONN] * 2
    bench.driver.detach(5)
    assert bench.read() == 0


def test_before_it_is_attached(bench: Workbench) -> None:
    image = sparse_image(bench.image, 9 * MIB, [(MIB, b"a" * MIB), (5 * MIB + 8192, b"b" * 8192)])
    remote = bench.open(bench.nbdkit("file", bench.image).uri)
    assert remote.pread(MIB - 3, 10) == image[MIB - 3 : MIB + 7] and remote.pread(7, 0) == b""
    extents = list(remote.zero_extents())
    assert extents == [(0, MIB), (2 * MIB, 3 * MIB + 8192), (5 * MIB + 16384, 4 * MIB - 16384)]
    for offset, length in extents:
        assert not any(image[offset : offset + length])
    with pytest.raises(InvalidArgument, match=r"vol.*not in it"):
        remote.pread(9 * MIB - 1, 2)
    bench.driver.attach(bench.storage, -1, remote)
    with pytest.raises(RuntimeError):
        remote.pread(0, 1)
    assert list(bench.open(bench.nbdkit("--no-sr", "file", bench.image).uri).zero_extents()) == []


# --- Servers that fail -------------------------------------------------------------------------------------------


def test_an_error_is_an_answer(bench: Workbench) -> None:
    """It costs the operation, and not the connection."""
    trigger = bench.folder / "fail"
    bench.attach(
        bench.nbdkit("--filter=error", "file", bench.image, "error-pread=ENOMEM", "error-pread-rate=100%", f"error-file={trigger}").uri
    )
    trigger.touch()
    assert [bench.read(at) for at in (0, 512)] == [-errno.ENOMEM] * 2
    trigger.unlink()
    assert bench.read() == 0
    assert bench.remotes[0].connected and bench.remotes[0].trouble == ""


@pytest.mark.alone
def test_killed_and_restarted(bench: Workbench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    server = bench.nbdkit("--filter=delay", "file", bench.image, "rdelay=300ms")
    remote = bench.attach(server.uri)
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        results = bench.driver.run(reads(3), meanwhile=server.kill)
        assert {result for result, _ in results} == {-errno.ENOTCONN} and bench.driver.queue.inflight == 0
        begun = time.monotonic()
        assert bench.read() == -errno.ENOTCONN and time.monotonic() - begun < 0.2
        assert not remote.connected
        until(lambda: remote.trouble)
        server.start()
        until(bench.back)
        check(bench.driver.run(reads(4, 8)), reads(4, 8))
    assert remote.connected and remote.trouble == ""
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
    messages = [record.getMessage() for record in caplog.records]
    assert sum("lost its connection" in message for message in messages) == 3
    assert sum("connected again" in message for message in messages) == 3
    assert all("vol: the base nbd+unix:" in message for message in messages)
    assert sum("tried again" in message for message in messages) <= 6  # once per change


def test_it_is_noticed_without_a_request(bench: Workbench) -> None:
    """An idle connection that ends is made again before it is needed."""
    server = bench.nbdkit("file", bench.image)
    remote = bench.attach(server.uri)
    assert bench.read() == 0
    server.kill()
    bench.driver.turn(1)
    assert not remote.connected
    server.start()
    until(lambda: bench.driver.turn(0.02) == [] and remote.connected)
    assert bench.read() == 0


@pytest.mark.alone
def test_a_server_that_stops_answering(bench: Workbench) -> None:
    server = bench.nbdkit("file", bench.image)
    bench.attach(server.uri, timeout_seconds=1.2)
    server.signal(signal.SIGSTOP)
    begun = time.monotonic()
    results = bench.driver.run(reads(6))
    assert {result for result, _ in results} == {-errno.ETIMEDOUT}
    assert 0.35 < time.monotonic() - begun < 1.0
    assert bench.read() == -errno.ENOTCONN
    server.signal(signal.SIGCONT)
    until(bench.back)
    check(bench.driver.run(reads(6, 8)), reads(6, 8))


@pytest.mark.alone
def test_a_slow_line_is_not_a_dead_one(bench: Workbench) -> None:
    """Together they take longer than one may wait; something comes all the time."""
    server = bench.nbdkit("--filter=noparallel", "--filter=delay", "file", bench.image, "serialize=requests", "rdelay=100ms")
    bench.attach(server.uri, timeout_seconds=3)
    begun = time.monotonic()
    ops: list[Op] = [("read_base", i * MIB, 4096) for i in range(16)]
    check(bench.driver.run(ops), ops)
    assert time.monotonic() - begun > 1.2


@pytest.mark.alone
def test_a_loop_that_was_away(bench: Workbench) -> None:
    """The answers are here: they are looked at before the server is blamed."""
    bench.attach(bench.nbdkit("file", bench.image).uri, timeout_seconds=0.9)
    ops: list[Op] = [("read_base", i * 4096, 4096) for i in range(600)]
    check(bench.driver.run(ops, meanwhile=lambda: time.sleep(0.5)), ops)


def test_a_request_without_an_answer(bench: Workbench) -> None:
    server = bench.odd("skips")
    remote = bench.attach(server.uri, timeout_seconds=3)
    reads: list[Any] = [("read_base", 0, 512), *[("read_base", 4096, 512)] * 5]
    results = bench.driver.run(reads)
    assert [result for result, _ in results] == [-errno.ETIMEDOUT, 0, 0, 0, 0, 0]
    until(lambda: bench.driver.turn(0.02) == [] and server.accepted == 2 and remote.connected)
    assert bench.driver.run([("read_base", 4096, 512)])[0] == (0, bytes(512))


@pytest.mark.alone
def test_an_answer_that_never_ends(bench: Workbench) -> None:
    """Something comes all the time: that is good for so long, and no longer."""
    bench.attach(bench.odd("drips").uri, timeout_seconds=1.2)
    begun = time.monotonic()
    assert bench.driver.run([("read_base", 0, 512)])[0][0] == -errno.ETIMEDOUT
    assert 1.1 < time.monotonic() - begun < 1.8


def test_what_is_no_reply(bench: Workbench) -> None:
    server = bench.odd("babbles")
    remote = bench.attach(server.uri)
    results = bench.driver.run([("read_base", 0, 512)] * 3)
    assert [result for result, _ in results] == [-errno.ENOTCONN] * 3
    until(lambda: bench.driver.turn(0.02) == [] and remote.connected)
    assert bench.driver.run([("read_base", 4096, 512)])[0] == (0, bytes(512))


def test_a_server_that_comes_and_goes_costs_a_few_lines(bench: Workbench, caplog: pytest.LogCaptureFixture) -> None:
    """It answers a read, so that it is tried at once the next time, and breaks off."""
    remote = bench.attach(bench.odd("babbles").uri)
    for _ in range(8):
        until(lambda: bench.driver.turn(0.02) == [] and remote.connected)
        assert bench.driver.run([("read_base", 4096, 512)])[0] == (0, bytes(512))
        assert bench.driver.run([("read_base", 0, 512)])[0][0] == -errno.ENOTCONN
    until(lambda: remote.trouble)
    assert sum("lost its connection" in message for message in caplog.messages) == 5


@pytest.mark.alone
def test_back_off(bench: Workbench) -> None:
    """A server that takes connections and breaks each of them is asked less and less often."""
    server = bench.odd("babbles")
    bench.attach(server.uri)
    end = time.monotonic() + 3
    while time.monotonic() < end:
        bench.driver.run([("read_base", 0, 512)])
        bench.driver.turn(0.01)
    assert 3 <= server.accepted <= 7


def test_another_export_in_its_place(bench: Workbench, caplog: pytest.LogCaptureFixture) -> None:
    server = bench.nbdkit("file", bench.image)
    remote = bench.attach(server.uri)
    server.kill()
    os.truncate(bench.image, SIZE - 512)
    server.start()
    assert bench.read() == -errno.ENOTCONN
    until(lambda: bench.driver.turn(0.02) == [] and "another one" in remote.trouble)
    for _ in range(20):
        assert bench.read() == -errno.ENOTCONN
        bench.driver.turn(0.1)
    [message] = [record.getMessage() for record in caplog.records if "another one" in record.getMessage()]
    assert f"{SIZE - 512} bytes long now and was {SIZE}" in message
    server.kill()
    bench.image.write_bytes(DATA)
    server.start()
    until(bench.back)


# --- The end -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["here", "elsewhere"])
def test_closed_with_operations_in_flight(bench: Workbench, how: str) -> None:
    remote = bench.attach(bench.nbdkit("--filter=delay", "file", bench.image, "rdelay=2").uri)
    helper = threading.Thread(target=remote.close)
    begun = time.monotonic()
    results = bench.driver.run(reads(1), meanwhile=remote.close if how == "here" else helper.start)
    assert {result for result, _ in results} == {-errno.ENOTCONN} and time.monotonic() - begun < 1.5
    if how == "elsewhere":
        helper.join(10)
    assert bench.read() == -errno.ENOTCONN and not remote.connected
    remote.close()


def test_queue_closed_with_operations_in_flight(bench: Workbench) -> None:
    bench.attach(bench.nbdkit("--filter=delay", "file", bench.image, "rdelay=3").uri)
    begun = time.monotonic()

    class Enough(Exception):
        pass

    def enough() -> None:
        bench.driver.close()  # gives the buffers back before they are freed
        raise Enough

    with pytest.raises(Enough):
        bench.driver.run(reads(1), meanwhile=enough)
    assert time.monotonic() - begun < 2


def test_release(bench: Workbench) -> None:
    remote = bench.attach(bench.nbdkit("--filter=delay", "file", bench.image, "rdelay=100ms").uri)
    refused: list[str] = []

    def release() -> None:
        for give in (bench.driver.release_base, bench.driver.detach):
            with pytest.raises(RuntimeError) as error:
                give()
            refused.append(str(error.value))

    check(bench.driver.run(reads(1), meanwhile=release), reads(1))
    assert refused == ["disk 0: 64 operations of its base are in flight"] * 2
    bench.driver.release_base()
    remote.close()
    assert [result for result, _ in bench.driver.run([("read_base", 0, 512), ("read", 0, 512)])] == [-errno.EBADF, 0]
    bench.driver.release_base()


def test_release_of_a_local_base(bench: Workbench) -> None:
    fd = os.open(bench.image, os.O_RDONLY)
    bench.driver.attach(bench.storage, fd)
    assert bench.read() == 0
    bench.driver.release_base()
    os.close(fd)
    assert bench.driver.run([("read_base", 0, 512)])[0][0] == -errno.EBADF


def test_a_remote_has_one_disk(bench: Workbench) -> None:
    remote = bench.attach(bench.nbdkit("file", bench.image).uri)
    with pytest.raises(RuntimeError, match="one disk"):
        bench.driver.attach(bench.storage, -1, remote, 1)
    with pytest.raises(RuntimeError, match="between open"):
        bench.driver.attach(bench.storage, -1, Remote(uri="nbd://x"), 1)
    with pytest.raises(RuntimeError, match="once"):
        remote.open()


# --- A server of our own -----------------------------------------------------------------------------------------


@needs_qemu
@pytest.mark.parametrize("stopped", [False, True])
def test_the_child_ends_with_the_remote(bench: Workbench, stopped: bool) -> None:
    remote = bench.attach(command=["qemu-nbd", "-r", "-f", "raw", str(bench.image)])
    assert bench.read() == 0
    [child] = [pid for pid in children() if "qemu-nbd" in command_of(pid)]
    assert os.getsid(child) == child  # Ctrl-C is not for it
    if stopped:
        os.kill(child, signal.SIGSTOP)
    bench.driver.release_base()
    begun = time.monotonic()
    remote.close()
    assert not is_running(child) and time.monotonic() - begun < 2


@needs_qemu
def test_the_child_is_started_again(bench: Workbench) -> None:
    bench.attach(command=["qemu-nbd", "-r", "-f", "raw", str(bench.image)], timeout_seconds=1.5)
    [child] = [pid for pid in children() if "qemu-nbd" in command_of(pid)]
    os.kill(child, signal.SIGKILL)
    until(bench.back)
    [second] = [pid for pid in children() if "qemu-nbd" in command_of(pid)]
    os.kill(second, signal.SIGSTOP)
    assert bench.read() == -errno.ETIMEDOUT
    until(bench.back)
    assert second not in children() and child != second


@needs_qemu
@pytest.mark.parametrize("stopped", [False, True])
def test_the_child_ends_with_our_process(tmp_path: Path, stopped: bool) -> None:
    (tmp_path / "image").write_bytes(bytes(MIB))
    script = (
        "import sys, time\nfrom fvd.device._remote import Remote\n"
        f"r = Remote(command=['qemu-nbd', '-r', '-f', 'raw', {str(tmp_path / 'image')!r}])\nr.open()\n"
        "print('open', flush=True)\ntime.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as ours:
        assert ours.stdout is not None and ours.stdout.readline() == b"open\n"
        [child] = children(ours.pid)
        if stopped:
            os.kill(child, signal.SIGSTOP)
        ours.kill()
    until(lambda: not is_running(child), 5)


def test_a_command_that_serves_nothing(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"no-such-server, which is not installed"):
        Remote(command=["no-such-server"]).open()
    with pytest.raises(Timeout, match=r"sleep 60 is not to be reached: no answer within 0.5 s"):
        Remote(command=["sleep", "60"], timeout_seconds=0.5).open()
    assert not [pid for pid in children() if "sleep 60" in command_of(pid)]
    with pytest.raises(DeviceError, match="what its server said is on the standard error"):
        Remote(command=["false"], timeout_seconds=5).open()


# --- Opening -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "error", "says"),
    [
        ("nbd://127.0.0.1:{closed}/", DeviceError, "Connection refused; nothing listens there"),
        ("nbd://no.such.host.invalid/", NotFound, "no.such.host.invalid"),
        ("nbd+unix:///?socket={folder}/none", NotFound, "No such file"),
        ("nbd+unix:///?socket={folder}/mute", Timeout, "no answer within 0.5 s"),
        ("http://127.0.0.1/", InvalidArgument, "http"),
        ("nbd+vsock:///", FvdError, "vsock|transport"),
        ("nbd+unix:///", InvalidArgument, "socket"),
    ],
)
def test_what_cannot_be_opened(tmp_path: Path, uri: str, error: type[Exception], says: str) -> None:
    threads = threading.active_count()
    with socket.socket() as closed, socket.socket(socket.AF_UNIX) as mute:
        closed.bind(("127.0.0.1", 0))
        mute.bind(str(tmp_path / "mute"))
        mute.listen()
        remote = Remote(uri=uri.format(closed=closed.getsockname()[1], folder=tmp_path), timeout_seconds=0.5, name="vol")
        begun = time.monotonic()
        with pytest.raises(error, match=f"(?s)^vol: the base nbd.*({says})|^vol: the base http.*({says})"):
            remote.open()
        assert time.monotonic() - begun < 2
    until(lambda: threading.active_count() == threads)
    remote.close()


@needs_qemu
def test_an_export_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(MIB))
    path = tmp_path / "qemu"
    with subprocess.Popen(["qemu-nbd", "-r", "-t", "-f", "raw", "-x", "right", "-k", path, tmp_path / "image"]) as server:
        try:
            until(path.exists)
            with pytest.raises(NotFound, match="wrong"):
                Remote(uri=f"nbd+unix:///wrong?socket={path}").open()
            remote = Remote(uri=f"nbd+unix:///right?socket={path}")
            remote.open()
            assert remote.size_bytes == MIB
            remote.close()
        finally:
            server.kill()


@pytest.mark.parametrize("bench", ["io_uring"], indirect=True)
def test_tls(bench: Workbench) -> None:
    keys = bench.folder / "keys.psk"
    keys.write_text(f"alice:{os.urandom(32).hex()}\n")
    keys.chmod(0o600)
    server = bench.nbdkit("--tls=require", f"--tls-psk={keys}", "file", bench.image, tls=True)
    with pytest.raises(FvdError, match=r"(?i)tls"):
        bench.open(f"nbd+unix:///?socket={server.socket}")
    bench.attach(f"nbds+unix://alice@/?socket={server.socket}&tls-psk-file={keys}")
    for seed in range(3):
        check(bench.driver.run(reads(seed)), reads(seed))
    server.kill()
    assert bench.read() == -errno.ENOTCONN
    server.start()
    until(bench.back)


def test_arguments() -> None:
    mistakes: list[dict[str, Any]] = [
        {},
        {"uri": "nbd://x", "command": ["x"]},
        {"command": []},
        {"command": ["a\0b"]},
        {"uri": "nbd://x\0y"},
    ]
    for wrong in mistakes:
        with pytest.raises(InvalidArgument):
            Remote(**wrong)
    for timeout_seconds in (0, -1, float("nan"), float("inf")):
        with pytest.raises(InvalidArgument, match="timeout_seconds"):
            Remote(uri="nbd://x", timeout_seconds=timeout_seconds)
    remote = Remote(uri="nbd://x")
    with pytest.raises(DeviceError, match="not connected"):
        remote.pread(0, 1)
    remote.close()
    remote.close()
