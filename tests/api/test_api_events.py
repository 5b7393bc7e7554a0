# SPDX-License-Identifier: Apache-2.0
"""Events of disks: numbers, history, listeners that are slow or raise, growth under writes, servers that close, are killed, come again."""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import fvd
from fvd.api import events as hubs
from fvd.api.events import HISTORY_EVENTS, QUEUE_EVENTS, Event, Hub, HubStream, LocalEvents, Subscription
from fvd.storage.policy import GrowthEvent

MIB = 1 << 20
WAIT_SECONDS = 60

SERVE = """
import fvd, sys
served = fvd.serve(sys.argv[1], socket=sys.argv[2])
print("up", flush=True)
for line in sys.stdin:
    if line == "extend\\n":
        served.extend()
    else:
        served.close()
    print("done", flush=True)
"""


class ServerProcess:
    """A disk served by another process, which does as it is told."""

    def __init__(self, volume: str, socket: Path) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", SERVE, volume, str(socket)], stdin=-1, stdout=-1, text=True)
        self._answer("up")

    def do(self, what: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        self._answer("done")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()

    def _answer(self, expected: str) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == f"{expected}\n"


@pytest.fixture
def volume(tmp_path: Path) -> str:
    name = f"file:{tmp_path / 'vm1.img'}"
    fvd.provision(name, "256M", grow_step="16M", journal_size="1M")
    return name


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Callable[[str], ServerProcess]]:
    with ExitStack() as ends:

        def start(volume: str) -> ServerProcess:
            process = ServerProcess(volume, tmp_path / f"{volume.rpartition('/')[2]}.sock")
            ends.callback(process.end)
            return process

        yield start


def low(number: int) -> GrowthEvent:
    return GrowthEvent("low_water", number, 0)


def kinds(found: list[Event]) -> list[str]:
    return [event.kind for event in found]


def all_end_but(before: set[threading.Thread]) -> None:
    """Every thread begun since ends by itself (an allocator's cancelled timer takes a moment)."""
    for thread in set(threading.enumerate()) - before:
        thread.join(WAIT_SECONDS)
        assert not thread.is_alive(), thread


def until_closed(found: Iterator[Event]) -> list[Event]:
    read = []
    for event in found:
        read.append(event)
        if event.kind == "closed":
            break
    return read


# --- The hub ---------------------------------------------------------------------------------------------------------------------


def test_numbers_history_and_end() -> None:
    hub = Hub("vm", clock=lambda: 5.0)
    for number in range(HISTORY_EVENTS + 10):
        hub.tell(low(number))
    late = LocalEvents([hub])
    remembered = LocalEvents([hub], history=True)
    hub.tell(GrowthEvent("extend_done", 7, 8, 9, 0.5, 0.25, "vg0", 11, "m" * 10_000))
    hub.end()
    hub.end()
    hub.tell(low(0))
    found = list(remembered)
    assert [event.number for event in found] == list(range(11, HISTORY_EVENTS + 12))
    assert list(late) == found[-1:]
    message = "m" * hubs.MESSAGE_CHARACTERS_MAX
    assert found[-1] == Event("extend_done", "vm", HISTORY_EVENTS + 11, 5.0, 7, 8, 9, 0.5, 0.25, "vg0", 11, message)
    assert list(late) == []  # again
    assert list(LocalEvents([hub], history=True)) == found[1:] if len(found) > HISTORY_EVENTS else found
    assert list(LocalEvents([hub])) == []


def test_the_slow_lose_the_oldest_and_are_told() -> None:
    hub = Hub("vm")
    slow, quick = LocalEvents([hub]), LocalEvents([hub])
    quickly = []
    for number in range(QUEUE_EVENTS + 44):
        hub.tell(low(number))
        quickly.append(next(quick))
    hub.end()
    found = list(slow)
    assert len(found) == QUEUE_EVENTS
    assert (found[0].number, found[0].lost) == (45, 44)
    assert {event.lost for event in found[1:]} == {0} == {event.lost for event in quickly}
    assert [event.number for event in quickly] == list(range(1, QUEUE_EVENTS + 45))


def test_a_closed_subscription_is_forgotten_and_not_rung() -> None:
    rung: list[int] = []
    hub = Hub("vm")
    subscription = Subscription([hub], notify=lambda: rung.append(1))
    hub.tell(low(0))
    subscription.close()
    subscription.close()
    hub.tell(low(1))
    hub.end()
    assert subscription.take() is None
    assert rung == [1]


def test_close_ends_who_waits() -> None:
    hub = Hub("vm")
    stream = LocalEvents([hub])
    waiting = threading.Thread(target=lambda: list(stream))
    waiting.start()
    stream.close()
    waiting.join(WAIT_SECONDS)
    assert not waiting.is_alive()
    with LocalEvents([hub]) as another:
        hub.tell(low(1))
    assert list(another) == []


def test_several_disks_in_one_stream() -> None:
    one, two = Hub("one"), Hub("two")
    with LocalEvents([one, two]) as stream:
        one.tell(low(1))
        two.tell(low(2))
        one.end()
        two.tell(low(3))
        two.end()
        assert [(event.volume, event.number) for event in stream] == [("one", 1), ("two", 1), ("two", 2)]


def test_many_tellers_and_listeners() -> None:
    """Each listener sees every number once and in order, whoever tells and whenever it fetches."""
    hub = Hub("vm")
    seen: list[list[int]] = [[] for _ in range(8)]
    streams = [LocalEvents([hub]) for _ in seen]

    def listen(stream: LocalEvents, mine: list[int]) -> None:
        for event in stream:
            mine.extend([0] * event.lost)
            mine.append(event.number)

    listeners = [threading.Thread(target=listen, args=pair) for pair in zip(streams, seen, strict=True)]
    tellers = [threading.Thread(target=lambda: [hub.tell(low(0)) for _ in range(500)]) for _ in range(4)]
    for thread in (*listeners, *tellers):
        thread.start()
    for thread in tellers:
        thread.join()
    hub.end()
    for thread in listeners:
        thread.join(WAIT_SECONDS)
    for mine in seen:
        assert [number or place for place, number in enumerate(mine, 1)] == list(range(1, 2001))


def test_a_stream_for_the_control_socket() -> None:
    rung: list[int] = []
    hub = Hub("vm")
    hub.tell(low(5))
    stream = HubStream(hub, lambda: rung.append(1), history=True)
    assert stream.answer == {"volume": "vm", "server": hub.server, "number": 1, "storage_size": 5, "free_bytes": 0}
    [found] = stream.take(64) or []
    assert hubs.event_from_json({**found, "of_a_later_version": 1}).storage_size == 5
    assert stream.take(64) == []
    hub.end()
    assert stream.take(64) is None
    assert len(rung) == 2


# --- In this process -------------------------------------------------------------------------------------------------------------


def fill(disk: fvd.Disk, to: int = 64 * MIB) -> None:
    for offset in range(0, to, MIB):
        disk.pwrite(offset, b"x" * MIB)


def test_open_tells_of_growth(volume: str, caplog: pytest.LogCaptureFixture) -> None:
    called: list[Event] = []
    caplog.set_level("INFO")
    with fvd.open(volume, on_full="wait", on_event=called.append) as disk, disk.events() as events:
        fill(disk)
        found = [next(events)]
        threading.Thread(target=disk.close).start()
        found += list(events)
        disk.close()
    assert called == found
    assert [event.number for event in found] == list(range(1, len(found) + 1))
    assert kinds(found)[:3] == ["low_water", "extend_started", "extend_done"]
    assert kinds(found)[-1] == "closed" and set(kinds(found)) == {"low_water", "extend_started", "extend_done", "closed"}
    done = next(event for event in found if event.kind == "extend_done")
    assert done.storage_size == done.target and done.seconds > 0
    assert found[-1].storage_size == fvd.info(volume).storage_size
    assert found[-1].free_bytes == fvd.info(volume).free_bytes
    assert all(earlier.time <= later.time for earlier, later in itertools.pairwise(found))
    assert {event.volume for event in found} == {volume}
    assert f"{volume}: extend done: storage {done.storage_size} bytes, {done.free_bytes} free" in caplog.text


def test_a_callback_that_raises_stops_nothing(volume: str, caplog: pytest.LogCaptureFixture) -> None:
    called = []

    def bad(event: Event) -> None:
        called.append(event.kind)
        raise SystemExit if len(called) == 1 else ZeroDivisionError

    with fvd.open(volume, on_event=bad) as disk:
        disk.extend()
        disk.pwrite(0, b"x")
    assert called == ["extend_started", "extend_done", "closed"]
    assert "a listener failed at event 1, extend_started" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_a_callback_that_hangs_holds_nothing_up(volume: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(hubs, "STUCK_CALLBACK_SECONDS", 0.05)
    go = threading.Event()

    def wait(event: fvd.Event) -> None:
        go.wait(WAIT_SECONDS)

    with fvd.open(volume, on_full="wait", on_event=wait) as disk, disk.events() as events:
        fill(disk)
        assert disk.pread(0, 1) == b"x"
        assert next(events).kind == "low_water"
    assert fvd.info(volume).clean
    assert "a listener of events has not returned" in caplog.text
    go.set()


def test_a_callback_may_close_the_disk(volume: str, tmp_path: Path) -> None:
    ended = threading.Event()
    served: fvd.Served

    def on_event(event: Event) -> None:
        if event.kind == "extend_done":
            served.close()
        if event.kind == "closed":
            ended.set()

    served = fvd.serve(volume, socket=tmp_path / "vm.sock", on_event=on_event)
    served.extend()
    assert ended.wait(WAIT_SECONDS)
    served.close()
    assert fvd.info(volume).clean


def break_storage(node_fd: int) -> None:
    """From now on the kernel refuses every write and flush of this open file."""
    broken = os.open("/dev/full", os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(broken, node_fd, inheritable=False)
    os.close(broken)


def test_a_failed_storage_is_told_once(volume: str, caplog: pytest.LogCaptureFixture) -> None:
    called: list[Event] = []
    disk = fvd.open(volume, on_event=called.append)
    disk.pwrite(0, b"x" * MIB)
    break_storage(disk._thread.volume.node.fd)
    for _ in range(2):
        with pytest.raises(fvd.DeviceError):
            disk.flush()
    found = disk.info()
    with pytest.raises(fvd.DeviceError):
        disk.close()
    assert kinds(called) == ["storage_error", "closed"]
    told = called[0]
    assert "are refused until the disk is closed and opened again" in told.message and os.strerror(told.failed_errno) in told.message
    assert told.failed_seconds is not None and 0 <= told.time - told.failed_seconds < 10 and told.failed_source == volume
    assert found.failed and found.failed_reason == os.strerror(found.failed_errno)
    assert (found.failed_errno, found.failed_seconds, found.failed_source) == (told.failed_errno, told.failed_seconds, told.failed_source)
    assert called[1].failed_errno == 0 and called[1].failed_seconds is None
    assert "closing failed" in called[1].message
    assert [record.levelname for record in caplog.records if "storage error" in record.getMessage()] == ["ERROR"]


def test_serve_tells_of_its_life(volume: str, tmp_path: Path) -> None:
    before = set(threading.enumerate())
    called: list[Event] = []
    served = fvd.serve(volume, socket=tmp_path / "vm.sock", on_event=called.append)
    with served.events(history=True) as remembered, served.events() as fresh, served.events(volume=volume) as one:
        served.extend()
        served.close()
        found = list(remembered)
        assert kinds(found) == ["served", "extend_started", "extend_done", "closed"]
        assert found[0].message == served.uri
        assert list(fresh) == list(one) == found[1:]
    assert called == found
    assert list(served.events()) == []
    with pytest.raises(fvd.NotFound):
        served.events(volume="file:/elsewhere")
    all_end_but(before)


def test_a_failed_start_tells_nothing(volume: str, tmp_path: Path) -> None:
    called: list[Event] = []
    before = set(threading.enumerate())
    (tmp_path / "vm.sock").write_text("not a socket")
    with pytest.raises(fvd.FvdError):
        fvd.serve(volume, socket=tmp_path / "vm.sock", on_event=called.append)
    for thread in set(threading.enumerate()) - before:
        thread.join(WAIT_SECONDS)
    assert called == []


def test_a_failed_storage_of_a_served_disk(volume: str, tmp_path: Path) -> None:
    nbd: Any = pytest.importorskip("nbd", reason="python3-libnbd is not installed")
    served = fvd.serve(volume, socket=tmp_path / "vm.sock")
    with fvd.events(volume) as events:
        handle = nbd.NBD()
        handle.connect_uri(served.uri)
        handle.pwrite(b"x" * MIB, 0)
        [disk] = served._serving._disks.values()
        break_storage(disk.node.fd)
        with pytest.raises(nbd.Error):
            handle.flush()
        assert next(events).kind == "storage_error"
        assert served.info().failed
        with pytest.raises(fvd.DeviceError):
            served.close()
        closed = next(events)
        assert closed.kind == "closed" and closed.message


# --- Of other processes ----------------------------------------------------------------------------------------------------------


def test_follow_from_before_it_is_served_to_its_end(volume: str, server: Callable[[str], ServerProcess]) -> None:
    with fvd.events(volume) as events:
        assert events.unserved() == [volume]
        process = server(volume)
        found = [next(events)]  # by now it is followed
        process.do("extend")
        process.do("close")
        found += until_closed(events)
        assert kinds(found) == ["served", "extend_started", "extend_done", "closed"]
        assert [event.number for event in found] == [1, 2, 3, 4]
        assert {event.lost for event in found} == {0}
        with fvd.open(volume):  # whoever hears that it is closed may have it
            pass
        server(volume)
        again = next(events)
        assert (again.kind, again.number) == ("served", 1)


def test_a_volume_that_does_not_exist_yet(tmp_path: Path, server: Callable[[str], ServerProcess]) -> None:
    name = f"file:{tmp_path / 'later.img'}"
    with fvd.events(name) as events:
        fvd.provision(name, "64M", grow_step="16M", journal_size="1M")
        server(name)
        assert next(events).kind == "served"
        assert events.unserved() == []


def test_a_killed_server_is_one_event(volume: str, tmp_path: Path, server: Callable[[str], ServerProcess]) -> None:
    other = f"file:{tmp_path / 'vm2.img'}"
    fvd.provision(other, "64M", grow_step="16M", journal_size="1M")
    first, second = server(volume), server(other)
    with fvd.events() as events:
        first.do("extend")
        assert kinds([next(events), next(events)]) == ["extend_started", "extend_done"]
        first.end()
        gone = next(events)
        assert (gone.kind, gone.volume, gone.number, gone.lost) == ("server_gone", volume, 0, 0)
        assert gone.storage_size == 32 * MIB
        second.do("close")
        assert [(event.kind, event.volume) for event in (next(events),)] == [("closed", other)]
        server(volume)
        assert (found := next(events)).kind == "served" and found.volume == volume


def test_killed_and_served_again_before_anyone_looks(volume: str, server: Callable[[str], ServerProcess]) -> None:
    first = server(volume)
    with fvd.events() as events:
        first.end()
        server(volume).do("extend")
        assert kinds([next(events) for _ in range(4)]) == ["server_gone", "served", "extend_started", "extend_done"]


def test_closed_and_served_again_before_anyone_looks(volume: str, server: Callable[[str], ServerProcess]) -> None:
    first = server(volume)
    with fvd.events(volume) as events:
        first.do("close")
        server(volume)
        assert kinds([next(events) for _ in range(2)]) == ["closed", "served"]


def test_history(volume: str, tmp_path: Path) -> None:
    with fvd.serve(volume, socket=tmp_path / "vm.sock") as served:
        served.extend()
        with fvd.events(history=True) as remembered, fvd.events(volume) as fresh:
            served.extend()
            found = [next(remembered) for _ in range(5)]
            assert kinds(found) == ["served", "extend_started", "extend_done", "extend_started", "extend_done"]
            assert [next(fresh), next(fresh)] == found[3:]


def test_a_slow_follower_loses_events_and_nobody_waits(volume: str, tmp_path: Path) -> None:
    with fvd.serve(volume, socket=tmp_path / "vm.sock") as served, fvd.events(volume) as slow:
        [hub] = served._serving._hubs.values()
        for number in range(20_000):  # more than its queue and its socket hold
            hub.tell(GrowthEvent("low_water", number, 0, message="x" * 100))
        assert fvd.info(volume).volume == volume
        found = [next(slow)]
        while found[-1].number < 20_001:
            found.append(next(slow))
        assert sum(event.lost for event in found) > 0
        assert len(found) + sum(event.lost for event in found) == 20_000


def descriptor_count() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_close_while_iterating(volume: str, tmp_path: Path) -> None:
    """By another thread, and of the server: neither leaves a thread or a descriptor."""
    gc.collect()  # what earlier tests have left to it
    threads, descriptors = set(threading.enumerate()), descriptor_count()
    with fvd.serve(volume, socket=tmp_path / "vm.sock") as served:
        streams = [fvd.events(volume) for _ in range(12)]
        found: list[list[Event]] = [[] for _ in streams]
        listeners = [threading.Thread(target=lambda s=s, f=f: f.extend(s)) for s, f in zip(streams, found, strict=True)]
        for thread in listeners:
            thread.start()
        served.extend()
        streams[0].close()
        listeners[0].join(WAIT_SECONDS)
    with fvd.events() as nobody:
        nobody.close()
        assert list(nobody) == []
    for stream, thread in zip(streams, listeners, strict=True):
        with stream:
            pass
        thread.join(WAIT_SECONDS)
    all_end_but(threads)
    del streams, listeners, stream, thread, nobody
    assert descriptor_count() <= descriptors


def test_what_cannot_be_followed() -> None:
    with pytest.raises(fvd.InvalidArgument):
        fvd.events("nonsense")
    with pytest.raises(fvd.InvalidArgument):
        fvd.events("file:")
