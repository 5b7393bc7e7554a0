# SPDX-License-Identifier: Apache-2.0
"""What a guest notices when the base of its disk fails, with real servers at both ends: what is here goes on, what is not waits, and fails
only when the base has been away for `base_timeout_s`. See docs/base.md, "Faults of the base".
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
from loops import mounted, run
from nbd_base import Nbdkit, children, command_of, until

import fvd

nbd = pytest.importorskip("nbd", reason="python3-libnbd is not installed")
pytest.importorskip("fvd.device._remote", reason="libnbd is not installed")
pytestmark = pytest.mark.release_only

KIB, MIB = 1 << 10, 1 << 20
SIZE = 16 * MIB
DATA = Random(6).randbytes(SIZE)
MINE = 1 * MIB  # where the guest has written before
PATIENCE_SECONDS = 2.0  # base_timeout_s of most tests
QUICK_SECONDS = 1.0  # "at once", on a machine that does other things too: nothing here waits for the base
LOOKS_SECONDS = 0.4  # longer than it takes to see that a read waits


class Guest:
    """A disk that is served in this process, as its guest sees it. Calls may be made from threads."""

    def __init__(self, served: fvd.Served, events: list[fvd.Event]) -> None:
        self.served = served
        self.events = events
        self._pool = ThreadPoolExecutor(8)
        self._local = threading.local()

    def _handle(self) -> Any:
        if not hasattr(self._local, "handle"):
            self._local.handle = nbd.NBD()
            self._local.handle.connect_uri(self.served.uri)
        return self._local.handle

    def read(self, offset: int, length: int = 4 * KIB) -> bytes:
        return bytes(self._handle().pread(length, offset))

    def write(self, offset: int, data: bytes) -> None:
        self._handle().pwrite(data, offset)

    def flush(self) -> None:
        self._handle().flush()

    def later(self, call: Callable[..., Any], *arguments: Any) -> Future[Any]:
        return self._pool.submit(call, *arguments)

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]

    def message(self, kind: str) -> str:
        return next(str(event.message) for event in self.events if event.kind == kind)

    def goes_on(self) -> None:
        """What needs no base is as quick as ever: reads of own blocks, writes of whole blocks, flushes."""
        for number in range(20):
            begun = time.monotonic()
            assert self.read(MINE) == b"m" * 4 * KIB
            self.write(MINE + 64 * KIB * (1 + number), b"w" * 64 * KIB)
            self.flush()
            assert time.monotonic() - begun < QUICK_SECONDS

    def close(self) -> None:
        self._pool.shutdown()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "base.img"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def base(tmp_path: Path, image: Path) -> Iterator[Nbdkit]:
    server = Nbdkit(tmp_path, "file", image)
    yield server
    server.kill()


def provision(folder: Path, uri: str, **more: Any) -> str:
    volume = f"file:{folder / 'disk'}"
    options = {"journal_size": MIB, "grow_step": 8 * MIB, **more}
    fvd.provision(volume, SIZE, base=uri, **options)
    return volume


@contextmanager
def guest(volume: str, folder: Path, **options: Any) -> Iterator[Guest]:
    events: list[fvd.Event] = []
    more: dict[str, Any] = {"base_timeout_s": PATIENCE_SECONDS, **options}
    with fvd.serve(volume, socket=folder / "guest.sock", on_event=events.append, **more) as served:
        one = Guest(served, events)
        try:
            one.write(MINE, b"m" * 64 * KIB)
            one.flush()
            yield one
        finally:
            one.close()


def waits(read: Future[Any]) -> bool:
    time.sleep(LOOKS_SECONDS)
    return not read.done()


def fails_with_eio(read: Future[Any]) -> None:
    with pytest.raises(nbd.Error) as caught:
        read.result(20)
    assert caught.value.errno == "EIO"


# --- It goes, and comes back ---------------------------------------------------------------------------------------------------------


def test_a_server_that_is_killed_and_comes_back(tmp_path: Path, base: Nbdkit) -> None:
    with guest(provision(tmp_path, base.uri), tmp_path, base_timeout_s=20.0) as one:
        assert one.read(4 * MIB) == DATA[4 * MIB :][: 4 * KIB]
        base.kill()
        reads = [one.later(one.read, offset * MIB) for offset in (5, 6)]
        part = one.later(one.write, 7 * MIB + 512, b"p" * 512)  # the rest of its block is the base's
        assert all(map(waits, [*reads, part]))
        until(lambda: "base_lost" in one.kinds())
        one.goes_on()
        assert not any(each.done() for each in [*reads, part])
        base.start()
        for offset, read in zip((5, 6), reads, strict=True):
            assert read.result(20) == DATA[offset * MIB :][: 4 * KIB]
        part.result(20)
        assert one.read(7 * MIB, 1024 + 512) == DATA[7 * MIB :][:512] + b"p" * 512 + DATA[7 * MIB + 1024 :][:512]
        until(lambda: "base_back" in one.kinds())
        assert [kind for kind in one.kinds() if kind.startswith("base_")] == ["base_lost", "base_back"]
        assert base.uri in one.message("base_lost") and base.uri in one.message("base_back")


@pytest.mark.parametrize("copy_on_read", [False, True])
def test_after_the_timeout_only_what_needs_the_base_fails(tmp_path: Path, base: Nbdkit, copy_on_read: bool) -> None:
    with guest(provision(tmp_path, base.uri), tmp_path, copy_on_read=copy_on_read) as one:
        base.kill()
        begun = time.monotonic()
        needy = [one.later(one.read, 5 * MIB), one.later(one.write, 7 * MIB + 512, b"p" * 512)]
        one.goes_on()
        for each in needy:
            fails_with_eio(each)
        assert PATIENCE_SECONDS - 0.1 < time.monotonic() - begun < PATIENCE_SECONDS + 2
        one.goes_on()
        base.start()
        assert one.later(one.read, 5 * MIB).result(20) == DATA[5 * MIB :][: 4 * KIB]
        one.later(one.write, 7 * MIB + 512, b"p" * 512).result(20)
        assert one.read(7 * MIB, 1024) == DATA[7 * MIB :][:512] + b"p" * 512  # what failed left nothing half done
        until(lambda: one.kinds().count("base_back") == one.kinds().count("base_lost") > 0)


def test_a_server_that_is_stopped(tmp_path: Path, base: Nbdkit) -> None:
    """It holds the connection and says nothing. When it goes on, it is the same, or a new connection; nobody notices."""
    with guest(provision(tmp_path, base.uri), tmp_path, base_timeout_s=6.0) as one:
        base.signal(signal.SIGSTOP)
        read = one.later(one.read, 5 * MIB)
        assert waits(read)
        one.goes_on()
        until(lambda: "base_lost" in one.kinds())  # after a third of the timeout
        base.signal(signal.SIGCONT)
        assert read.result(20) == DATA[5 * MIB :][: 4 * KIB]
        until(lambda: "base_back" in one.kinds())


def test_a_server_that_answers_with_errors(tmp_path: Path, image: Path) -> None:
    trigger = tmp_path / "errors"
    server = Nbdkit(tmp_path, "--filter=error", "file", image, "error-pread=EIO", "error-pread-rate=100%", f"error-pread-file={trigger}")
    try:
        with guest(provision(tmp_path, server.uri), tmp_path) as one:
            trigger.touch()
            read = one.later(one.read, 5 * MIB)
            assert waits(read)
            one.goes_on()
            trigger.unlink()
            assert read.result(20) == DATA[5 * MIB :][: 4 * KIB]
            trigger.touch()
            fails_with_eio(one.later(one.read, 6 * MIB))
            one.goes_on()
            trigger.unlink()
            assert one.read(6 * MIB) == DATA[6 * MIB :][: 4 * KIB]
    finally:
        server.kill()


def test_a_slow_server_is_not_a_lost_one_before_a_third_of_the_timeout(tmp_path: Path, image: Path) -> None:
    server = Nbdkit(tmp_path, "--filter=delay", "file", image, "rdelay=800ms")
    try:
        volume = provision(tmp_path, server.uri)
        with guest(volume, tmp_path, base_timeout_s=6.0) as one:
            read = one.later(one.read, 5 * MIB)
            one.goes_on()
            assert read.result(20) == DATA[5 * MIB :][: 4 * KIB]
            assert "base_lost" not in one.kinds()
        with guest(volume, tmp_path, base_timeout_s=1.5) as one:  # now it is
            read = one.later(one.read, 6 * MIB)
            one.goes_on()
            fails_with_eio(read)
            assert "base_lost" in one.kinds()
    finally:
        server.kill()


def test_another_size_is_another_base(tmp_path: Path, base: Nbdkit, image: Path, caplog: pytest.LogCaptureFixture) -> None:
    with guest(provision(tmp_path, base.uri), tmp_path) as one:
        base.kill()
        image.write_bytes(b"x" * (SIZE + MIB))
        base.start()
        fails_with_eio(one.later(one.read, 5 * MIB))
        one.goes_on()
        assert f"{SIZE + MIB} bytes long now and was {SIZE}: it is another one; put the right one back" in caplog.text
        base.kill()
        image.write_bytes(DATA)
        base.start()
        assert one.later(one.read, 5 * MIB).result(20) == DATA[5 * MIB :][: 4 * KIB]


# --- Prefetching ---------------------------------------------------------------------------------------------------------------------


def test_prefetching_waits_for_the_base(tmp_path: Path, base: Nbdkit) -> None:
    options = fvd.PrefetchOptions(delay_s=0, rate_bytes=8 * MIB)
    with guest(provision(tmp_path, base.uri), tmp_path, prefetch=options) as one:
        until(lambda: one.served.prefetch_status().copied_bytes > 3 * MIB)
        base.kill()
        until(lambda: one.served.prefetch_status().state == "base-lost")
        time.sleep(LOOKS_SECONDS)
        copied = one.served.prefetch_status().copied_bytes
        one.goes_on()
        assert "base_lost" in one.kinds() and "prefetch_done" not in one.kinds()
        time.sleep(LOOKS_SECONDS)
        assert one.served.prefetch_status().copied_bytes <= copied + 20 * 64 * KIB  # what the guest wrote, and nothing else
        base.start()
        until(lambda: one.served.info().base_released, 30)
        until(lambda: "base_released" in one.kinds())
        assert one.kinds().index("base_back") < one.kinds().index("prefetch_done")
        base.kill()
        assert one.read(12 * MIB, 4 * MIB) == DATA[12 * MIB :]
        assert one.kinds().count("base_lost") == 1  # nobody misses it now


def test_copies_stop_where_storage_ends(tmp_path: Path, base: Nbdkit) -> None:
    """A file system with free space for some chunks: copies leave the guest its share, and what is mapped goes on."""
    with mounted("tmpfs", tmp_path / "small", "-t", "tmpfs", "-o", "size=9m") as folder:
        volume = provision(folder, base.uri, grow_step=2 * MIB)
        with guest(volume, tmp_path, prefetch=fvd.PrefetchOptions(delay_s=0), on_full="error") as one:
            until(lambda: one.served.prefetch_status().state == "full", 30)
            status = one.served.prefetch_status()
            assert not status.released and status.remaining_bytes > 4 * MIB and "no space" in status.reason
            for number in range(10):
                one.write(MINE + 4 * KIB * number, b"f" * 4 * KIB)  # its chunk is there
                one.flush()
            assert one.read(MINE, 40 * KIB) == b"f" * 40 * KIB
            assert one.read(15 * MIB) == DATA[15 * MIB :][: 4 * KIB]
            assert "storage_error" not in one.kinds()
        assert not fvd.check(volume).errors


# --- The end of the server -----------------------------------------------------------------------------------------------------------


@contextmanager
def process_serving(volume: str, folder: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    socket = folder / "process.sock"
    command = [sys.executable, "-m", "fvd.cli", "serve", volume, "--socket", str(socket), *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            uri = process.stdout.readline().strip()
            assert uri.startswith("nbd+unix:")
            yield process, uri
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_sigterm_while_the_base_is_away(tmp_path: Path, base: Nbdkit, how: str) -> None:
    """A server whose base does not answer, and whose guest waits for it, ends all the same; and what was written is there."""
    volume = provision(tmp_path, base.uri)
    with process_serving(volume, tmp_path, "--base-timeout", "30" if how == "stopped" else "300") as (process, uri):
        handle = nbd.NBD()
        handle.connect_uri(uri)
        handle.pwrite(b"m" * 64 * KIB, MINE)
        if how == "killed":
            base.kill()
        else:
            base.signal(signal.SIGSTOP)
        handle.aio_pread(nbd.Buffer(4 * KIB), 5 * MIB)
        time.sleep(LOOKS_SECONDS)
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
        took = time.monotonic() - begun
    assert code == 0
    assert took < 25  # its clients have ten seconds to take their replies
    base.kill()
    base.start()
    assert fvd.info(volume).clean
    with fvd.open(volume) as disk:
        assert disk.pread(MINE, 64 * KIB) == b"m" * 64 * KIB
        assert disk.pread(5 * MIB, 4 * KIB) == DATA[5 * MIB :][: 4 * KIB]


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_no_child_is_left_behind(tmp_path: Path, image: Path, end: signal.Signals) -> None:
    try:
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", image, tmp_path / "base.qcow2")
    except (AssertionError, FileNotFoundError) as error:
        pytest.skip(f"no qcow2 is made here: {error}")
    volume = provision(tmp_path, str(tmp_path / "base.qcow2"), base_format="qcow2")
    with process_serving(volume, tmp_path) as (process, _uri):
        helpers = [pid for pid in children(process.pid) if "qemu-nbd" in command_of(pid)]
        assert len(helpers) == 1
        process.send_signal(end)
        process.wait(30)
        until(lambda: not any("qemu-nbd" in command_of(pid) for pid in helpers))
    run("qemu-io", "-f", "qcow2", "-c", "write -q 0 64k", tmp_path / "base.qcow2")  # nobody holds its lock


def test_a_killed_qemu_nbd_is_started_again(tmp_path: Path, image: Path) -> None:
    try:
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", image, tmp_path / "base.qcow2")
    except (AssertionError, FileNotFoundError) as error:
        pytest.skip(f"no qcow2 is made here: {error}")
    with guest(provision(tmp_path, str(tmp_path / "base.qcow2"), base_format="qcow2"), tmp_path, base_timeout_s=20.0) as one:
        assert one.read(4 * MIB) == DATA[4 * MIB :][: 4 * KIB]
        [helper] = [pid for pid in children() if "qemu-nbd" in command_of(pid)]
        os.kill(helper, signal.SIGKILL)
        assert one.later(one.read, 5 * MIB).result(20) == DATA[5 * MIB :][: 4 * KIB]
        [another] = [pid for pid in children() if "qemu-nbd" in command_of(pid)]
        assert another != helper
