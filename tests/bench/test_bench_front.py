# SPDX-License-Identifier: Apache-2.0
"""The light vhost-user front end in front of QEMU's own server: it speaks the protocol, and its judge sees what is lost."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from front_running import SOURCE, front, run_front
from loops import run
from qemu_running import storage_daemon

pytestmark = pytest.mark.release_only

MIB = 1 << 20
DISK_BYTES = 32 * MIB
RING_SERVER = SOURCE.with_name("ring_server.c")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    with path.open("xb") as file:
        file.truncate(DISK_BYTES)
    return path


@contextlib.contextmanager
def qemu(image: Path, *, read_only: bool = False, dies: bool = False) -> Iterator[Path]:
    """The socket of a vhost-user export with four queues."""
    path = image.with_name("vhost.sock")
    path.unlink(missing_ok=True)
    writable = "off" if read_only else "on"
    node = f"driver=file,node-name=disk,filename={image},discard=unmap,read-only={'on' if read_only else 'off'}"
    export = f"type=vhost-user-blk,id=out,node-name=disk,writable={writable},num-queues=4,addr.type=unix,addr.path={path}"
    with storage_daemon(image.parent, "--blockdev", node, "--export", export, dies=dies):
        yield path


@contextlib.contextmanager
def limit(image: Path) -> Iterator[Path]:
    """The socket of the ring server without a mapping, with four queues."""
    path, program = image.with_name("vhost.sock"), image.with_name("ring_server")
    try:
        run("gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", program, RING_SERVER, "-luring")
    except (AssertionError, FileNotFoundError) as error:
        pytest.skip(f"the ring server cannot be built: {error}")
    with subprocess.Popen([program, path, image, "4"]) as process:
        try:
            deadline = time.monotonic() + 20
            while not path.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            yield path
            assert process.poll() is None
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("indirect", "event_index", "mem_slots", "segments", "shift"), [(True, True, False, 1, 0), (False, False, True, 5, 512)]
)
def test_what_is_written_is_judged(image: Path, indirect: bool, event_index: bool, mem_slots: bool, segments: int, shift: int) -> None:
    ways = {"indirect": indirect, "event_index": event_index, "mem_slots": mem_slots, "segments": segments, "shift": shift}
    with qemu(image) as path:
        told = run_front(
            path, queues=2, depth=8, count=4000, read=2, write=4, zero=1, trim=1, flush_every=32, verify=True, bytes=8192, **ways
        )
    assert (told["errors"], told["lost"]) == (0, 0)
    assert told["operations"] + told["flushes"] == 4000
    assert min(told[kind] for kind in ("reads", "writes", "zeroes", "trims", "flushes")) > 0
    assert told["checked"] >= told["writes"] // 2
    assert told["capacity_bytes"] == DISK_BYTES


def test_each_place_is_written_once_and_another_run_sees_what_is_gone(image: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with qemu(image) as path:
        told = run_front(path, depth=16, once=True, write=1, last_flush=True, verify=True, state=state)
        assert (told["writes"], told["checked"], told["lost"]) == (DISK_BYTES // 4096, DISK_BYTES // 4096, 0)
        assert told["flushes"] == 1
        with image.open("r+b") as file:
            first = file.read(4096)
            file.seek(MIB)
            file.write(first)  # of another place
            file.seek(2 * MIB + 512)
            file.write(bytes(512))  # in part
        told = run_front(path, depth=16, verify=True, state=state)
    assert told["lost"] == 2


def test_a_server_that_dies_is_waited_for(image: Path) -> None:
    with contextlib.ExitStack() as last:
        with qemu(image, dies=True) as path:
            running = last.enter_context(front(path, depth=8, seconds=1.5, read=1, write=2, verify=True, reconnect=True))
            time.sleep(0.5)
        last.enter_context(qemu(image))
        running.wait()
    assert (running.told["errors"], running.told["lost"], running.told["reconnects"]) == (0, 0, 1)


def test_without_being_told_to_wait_it_ends_with_its_server(image: Path) -> None:
    with contextlib.ExitStack() as last, qemu(image, dies=True) as path:
        running = last.enter_context(front(path, fails=True, seconds=20))
        time.sleep(0.3)
    assert "Connection reset" in running.said


def test_a_request_that_fails_is_counted(image: Path) -> None:
    with qemu(image, read_only=True) as path:
        told = run_front(path, depth=4, count=100, read=1, write=1)
    assert told["errors"] == told["writes"] > 0


def test_the_ring_server_keeps_what_it_is_given(image: Path) -> None:
    """Whole pages in pieces that lie apart, one front end after the other."""
    with limit(image) as path:
        for indirect in (True, False):
            ways = {"indirect": indirect, "event_index": indirect, "segments": 4}
            told = run_front(
                path, queues=2, depth=8, count=4000, read=2, write=4, zero=1, trim=1, flush_every=32, verify=True, bytes=16384, **ways
            )
            assert (told["errors"], told["lost"]) == (0, 0)
            assert told["operations"] + told["flushes"] == 4000
            assert min(told[kind] for kind in ("reads", "writes", "zeroes", "trims", "flushes")) > 0
            assert told["checked"] >= told["writes"] // 2
