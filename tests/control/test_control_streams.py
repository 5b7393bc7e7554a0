# SPDX-License-Identifier: Apache-2.0
"""Streaming verbs over real sockets: what a subscriber gets, what one that does not read costs, how each side notices the other's death."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from fvd.control import protocol
from fvd.control.client import ControlClient
from fvd.control.following import Follower
from fvd.control.server import STREAMS_MAX, ControlServer
from fvd.control.watching import SocketWatch
from fvd.errors import FvdError, InvalidArgument

pytestmark = pytest.mark.pure

ANSWER = {"volume": "file:vm1", "server": "s1", "number": 0, "storage_size": 7, "free_bytes": 3}


class FakeStream:
    """Has what a test puts into it."""

    def __init__(self, bell: Callable[[], None], answer: dict[str, Any]) -> None:
        self.answer = answer
        self.items: deque[Any] = deque()
        self.over = False
        self.closed = threading.Event()
        self._bell = bell

    def take(self, limit: int) -> list[Any] | None:
        found = [self.items.popleft() for _ in range(min(limit, len(self.items)))]
        return found or (None if self.over else [])

    def close(self) -> None:
        self.closed.set()

    def put(self, *items: Any, over: bool = False) -> None:
        self.items.extend(items)
        self.over = over
        self._bell()


class Served:
    """A control server whose streams the test holds."""

    def __init__(self, volume: Path, answer: dict[str, Any] | None = None, **times: float) -> None:
        self.streams: list[FakeStream] = []
        self.history: list[dict[str, Any]] = []  # what every later stream begins with
        self.answer = answer or ANSWER
        self._begun = threading.Semaphore(0)
        self.server = ControlServer("file:vm1", volume, {"echo": lambda arguments: arguments}, stream_verbs={"events": self.begin}, **times)
        self.server.start()

    def begin(self, arguments: dict[str, Any], bell: Callable[[], None]) -> FakeStream:
        if arguments.get("history") is None:
            raise InvalidArgument("what about history?")
        self.streams.append(FakeStream(bell, self.answer))
        self.streams[-1].items.extend(self.history)
        self._begun.release()
        return self.streams[-1]

    def stream(self) -> FakeStream:
        """The next one that is begun."""
        assert self._begun.acquire(timeout=60)
        return self.streams[-1]

    @property
    def path(self) -> Path:
        assert self.server.path is not None
        return self.server.path


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    path = tmp_path / "vm1.img"
    path.write_bytes(b"x")
    return path


@pytest.fixture
def served(volume: Path) -> Iterator[Served]:
    served = Served(volume)
    yield served
    served.server.close()


@contextmanager
def subscriber(served: Served) -> Iterator[tuple[socket.socket, Iterator[dict[str, Any]]]]:
    """A connection that has asked, and the lines that it gets."""
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(60)
        raw.connect(str(served.path))
        raw.sendall(b'{"schema_version":1,"verb":"events","arguments":{"history":true}}\n')
        with raw.makefile("rb") as lines:
            yield raw, map(json.loads, lines)


def event(number: int, kind: str = "low_water", **more: Any) -> dict[str, Any]:
    return {"kind": kind, "volume": "file:vm1", "number": number, "time": 1.0, "storage_size": number, "free_bytes": 0, **more}


# --- The server's end --------------------------------------------------------------------------------------------------------------


def test_lines_of_a_stream(served: Served) -> None:
    with subscriber(served) as (raw, lines):
        assert next(lines) == {"schema_version": 1, "result": ANSWER}
        stream = served.stream()
        raw.shutdown(socket.SHUT_WR)  # it has nothing more to say, and still listens
        stream.put({"a": 1}, {"a": 2})
        stream.put({"a": 3}, over=True)
        assert [*lines] == [
            {"schema_version": 1, **line} for line in ({"event": {"a": 1}}, {"event": {"a": 2}}, {"event": {"a": 3}}, {"end": True})
        ]
        assert stream.closed.wait(60)


def test_a_stream_that_is_refused_is_an_answer(served: Served) -> None:
    with ControlClient(served.path) as client:
        with pytest.raises(InvalidArgument, match="what about history"):
            client.ask("events")
        with pytest.raises(InvalidArgument, match="known are: echo, events"):
            client.ask("shell")


def test_a_sign_of_life(volume: Path) -> None:
    served = Served(volume, heartbeat_seconds=0.01)
    with subscriber(served) as (_, lines):
        next(lines)
        assert [next(lines) for _ in range(3)] == [{"schema_version": 1, "heartbeat": True}] * 3
        served.stream().put({"a": 1})
        while (line := next(lines)) == {"schema_version": 1, "heartbeat": True}:
            pass
        assert line["event"] == {"a": 1}
        served.server.close()


def test_a_subscriber_that_goes_is_noticed_at_once(served: Served) -> None:
    with subscriber(served) as (_, lines):
        next(lines)
        stream = served.stream()
    assert stream.closed.wait(10)  # less than a heartbeat


def test_close_ends_streams_with_what_there_is(volume: Path) -> None:
    served = Served(volume)
    with subscriber(served) as (_, lines):
        next(lines)
        stream = served.stream()
        served.server.stop()
        with pytest.raises(FvdError):
            ControlClient(served.path).ask("echo")
        stream.put({"a": 1})
        assert next(lines)["event"] == {"a": 1}
        stream.items.extend({"a": number} for number in range(200))
        served.server.close()
        assert [line["event"]["a"] for line in lines if "event" in line] == list(range(200))
    assert stream.closed.is_set()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fvd-control")]


def fill(stream: FakeStream, count: int = 3000) -> None:
    stream.put(*({"a": "x" * 1000} for _ in range(count)))


def test_who_does_not_read_delays_nobody(volume: Path) -> None:
    """Neither other connections nor, when it has been so for a while, the close; and what waits for it does not grow."""
    served = Served(volume)
    with ExitStack() as held:
        slow = [held.enter_context(subscriber(served)) for _ in range(4)]
        for _, lines in slow:
            next(lines)
        streams = [served.stream() for _ in slow] and list(served.streams)
        for stream in streams:
            fill(stream)
        with subscriber(served) as (_, lines), ControlClient(served.path) as client:
            next(lines)
            served.stream().put({"a": 1})
            assert next(lines)["event"] == {"a": 1}
            assert client.ask("echo", a=1) == {"a": 1}
        assert all(len(stream.items) > 2000 for stream in streams)  # taken only as far as the socket takes it
        begun = time.monotonic()
        served.server.close()
        assert time.monotonic() - begun < 5
        for stream in streams:
            assert stream.closed.wait(10)


def test_who_does_not_read_for_long_is_hung_up_on(volume: Path) -> None:
    served = Served(volume, stalled_seconds=0.05)
    with subscriber(served) as (_, lines):
        next(lines)
        stream = served.stream()
        fill(stream)
        assert stream.closed.wait(60)
        with pytest.raises(json.JSONDecodeError):
            while "end" not in next(lines):
                pass
    served.server.close()


def test_streams_leave_places_for_verbs(served: Served) -> None:
    with ExitStack() as held:
        for _ in range(STREAMS_MAX):
            _, lines = held.enter_context(subscriber(served))
            next(lines)
        with subscriber(served) as (_, lines):
            assert "follow its events already" in next(lines)["error"]["message"]
        with ControlClient(served.path) as client:
            assert client.ask("echo", a=1) == {"a": 1}
    for stream in served.streams:
        assert stream.closed.wait(60)
    with subscriber(served) as (_, lines):
        assert next(lines)["result"] == ANSWER


# --- The follower ------------------------------------------------------------------------------------------------------------------


@contextmanager
def following(volume: Path | None, **options: Any) -> Iterator[Follower]:
    follower = Follower(None if volume is None else [str(volume)], **options)
    follower.open()
    try:
        yield follower
    finally:
        follower.close()


def hear(follower: Follower) -> dict[str, Any]:
    found = follower.next()
    assert found is not None
    return found


def test_a_broken_connection_is_made_up_for_from_the_history(served: Served, volume: Path) -> None:
    """What comes again is passed over, what the history has forgotten is counted."""
    with following(volume) as follower:
        first = served.stream()
        first.put(event(1), event(2))
        assert [hear(follower)["number"] for _ in range(2)] == [1, 2]
        for sender in list(served.server._senders):
            sender._connection.shutdown(socket.SHUT_RDWR)
        heard: list[dict[str, Any]] = []
        listener = threading.Thread(target=lambda: heard.extend([hear(follower), hear(follower)]))
        listener.start()
        second = served.stream()
        second.put(event(2), event(5), event(6))
        listener.join(60)
        assert [(found["kind"], found["number"], found["lost"]) for found in heard] == [("low_water", 5, 2), ("low_water", 6, 0)]


def test_a_silent_server_is_given_up_and_taken_up_again(served: Served, volume: Path) -> None:
    with following(volume, silence_seconds=0.05) as follower:
        served.stream().put(event(1))
        assert hear(follower)["number"] == 1
        served.history = [event(1), event(2)]
        gone = hear(follower)
        assert (gone["kind"], gone["number"], gone["storage_size"]) == ("server_gone", 0, 1)
        assert "has said nothing for 0.05 seconds" in gone["message"]
        while (found := hear(follower))["kind"] == "server_gone":
            pass
        assert (found["number"], found["lost"]) == (2, 0)


def test_a_socket_that_is_replaced_all_the_time_costs_a_few_lines(
    volume: Path, runtime_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whose folder it is decides how often there is a new one."""
    from fvd.control.paths import socket_name

    path = runtime_dir / socket_name(volume)
    with following(None) as follower:
        listening = threading.Thread(target=follower.next)
        listening.start()
        for _ in range(15):
            with socket.socket(socket.AF_UNIX) as listener:
                listener.settimeout(10)
                listener.bind(str(runtime_dir / "new"))
                listener.listen()
                (runtime_dir / "new").rename(path)
                with listener.accept()[0] as connection:
                    connection.sendall(b"nonsense\n")
                    connection.settimeout(10)
                    while connection.recv(4096):
                        pass
        follower.close()
        listening.join(60)
    assert sum("its events are not followed" in line for line in caplog.messages) == 5


@pytest.mark.parametrize("said", [b"nonsense\n", b'{"schema_version":1,"result":7}\n', b'{"schema_version":9}\n', b"x" * (2 << 20)])
def test_something_else_at_the_socket(volume: Path, runtime_dir: Path, said: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever follows all disks passes it over; whoever named this one is told."""
    from fvd.control.paths import socket_name

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(runtime_dir / socket_name(volume)))
        listener.listen()

        def talk() -> None:
            for _ in range(2):
                with listener.accept()[0] as connection:
                    connection.recv(4096)
                    try:
                        connection.sendall(said)
                        connection.recv(4096)
                    except OSError:
                        pass

        talker = threading.Thread(target=talk)
        talker.start()
        with following(None) as follower:
            assert "its events are not followed" in caplog.text
            follower.close()
            assert follower.next() is None
        with pytest.raises(FvdError):
            Follower([str(volume)]).open()
        talker.join(60)


def test_a_server_that_hangs_up_on_everyone_is_not_asked_as_fast_as_it_can(
    volume: Path, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fvd.control import following as module
    from fvd.control.paths import socket_name

    monkeypatch.setattr(module, "RETRY_SECONDS", 0.2)
    follower = Follower([str(volume)])
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(runtime_dir / socket_name(volume)))
        listener.listen()

        def hang_up() -> None:
            for _ in range(10):
                listener.accept()[0].close()
            follower.close()

        threading.Thread(target=hang_up).start()
        begun = time.monotonic()
        follower.open()
        assert follower.next() is None
        assert time.monotonic() - begun > 0.3


def test_folders_that_are_not_there_yet(tmp_path: Path, volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FVD_RUNTIME_DIR", str(tmp_path / "not" / "yet"))
    with following(volume) as follower:
        served = Served(volume)
        heard: list[int] = []
        listener = threading.Thread(target=lambda: heard.append(hear(follower)["number"]))
        listener.start()
        served.stream().put(event(1))
        listener.join(60)
        assert heard == [1]
        served.server.close()


def test_what_does_not_matter_does_not_wake(runtime_dir: Path) -> None:
    watch = SocketWatch()
    (runtime_dir / "a.lock").write_bytes(b"")
    (runtime_dir / "folder").mkdir()
    assert watch.changed() == set()
    (runtime_dir / "a.sock").write_bytes(b"")
    assert watch.changed() == {runtime_dir / "a.sock"}
    watch.close()


def test_a_killed_server_says_nothing_and_is_noticed(volume: Path) -> None:
    code = (
        "import sys\nfrom fvd.control.server import ControlServer\nclass Stream:\n"
        f"    answer = {ANSWER!r}\n    def take(self, limit): return []\n    def close(self): pass\n"
        "ControlServer('file:vm1', sys.argv[1], {}, stream_verbs={'events': lambda arguments, bell: Stream()}).start()\n"
        "print(flush=True)\nsys.stdin.read()"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(volume)], stdin=-1, stdout=-1)
    assert process.stdout is not None
    process.stdout.readline()
    with following(volume) as follower:
        process.kill()
        process.communicate()
        begun = time.monotonic()
        assert hear(follower)["kind"] == "server_gone"
        assert time.monotonic() - begun < 5  # far from a heartbeat
        assert follower.unserved() == [str(volume)]


def test_a_line_of_a_later_version_is_passed_over(served: Served, volume: Path) -> None:
    assert protocol.decode_streamed(b'{"schema_version":1,"weather":"fine"}') == protocol.Streamed()
    for wrong in (b"{", b'{"schema_version":1,"event":7}'):
        with pytest.raises(protocol.ProtocolError):
            protocol.decode_streamed(wrong)
    with following(volume) as follower:
        served.stream().put(event(1, "of_tomorrow", colour="blue"))
        assert hear(follower)["kind"] == "of_tomorrow"


def test_closing_by_the_thread_that_waits() -> None:
    """As a signal handler does."""
    import signal

    with following(None) as follower:
        before = signal.signal(signal.SIGUSR1, lambda number, frame: follower.close())
        try:
            timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
            timer.start()
            assert follower.next() is None
            timer.join()
        finally:
            signal.signal(signal.SIGUSR1, before)
