# SPDX-License-Identifier: Apache-2.0
"""A stranger's process behind a control socket: believed about what is his, and about nothing else; and it keeps nobody waiting."""

from __future__ import annotations

import dataclasses
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest

import fvd
from fvd.api import listing
from fvd.api.remote import NOT_SERVED, ask
from fvd.control import following, paths, protocol, server, watching
from fvd.control.client import ControlClient
from fvd.control.following import Follower
from fvd.control.server import ControlServer
from fvd.control.trust import is_believed, is_believed_about, peer_uid
from fvd.errors import NotFound, PermissionDenied, Timeout
from fvd.volume.name import parse_name

pytestmark = pytest.mark.pure

STRANGER = 65534


@contextmanager
def as_stranger() -> Iterator[None]:
    """The kernel notes who listens when he begins to."""
    if os.geteuid() != 0:
        pytest.skip("only root can listen as somebody else; CI is root")
    os.seteuid(STRANGER)
    try:
        yield
    finally:
        os.seteuid(0)


def listen_at(stack: ExitStack, path: Path, *, strange: bool) -> socket.socket:
    """Somebody listens there, until the test ends."""
    listener = stack.enter_context(socket.socket(socket.AF_UNIX))
    listener.bind(str(path))
    with as_stranger() if strange else nullcontext():
        listener.listen()
    return listener


@contextmanager
def dripping(listener: socket.socket) -> Iterator[None]:
    """One connection is answered by a byte now and then, until the other end has had enough of it."""

    def drip() -> None:
        connection, _ = listener.accept()
        with connection, pytest.raises(OSError):
            while True:
                connection.sendall(b" ")
                time.sleep(0.02)

    thread = threading.Thread(target=drip)
    thread.start()
    yield
    thread.join(5)
    assert not thread.is_alive()


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Root's folder of sockets, and the stranger's."""
    own, his = tmp_path / "own", tmp_path / f"fvd-{STRANGER}"
    for folder in (own, his):
        folder.mkdir(0o700)
    with as_stranger():  # or skip
        pass
    os.chown(his, STRANGER, STRANGER)
    for folder in (tmp_path, *tmp_path.parents):
        if not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)
    monkeypatch.setattr(paths, "runtime_dir", lambda: own)
    monkeypatch.setattr(paths, "search_dirs", lambda: [own, his])
    return own, his


@pytest.fixture
def make_disk(tmp_path: Path) -> Callable[..., str]:
    def make(name: str, owner: int = 0) -> str:
        path = tmp_path / name
        fvd.provision(f"file:{path}", "64M", journal_size="64K", grow_step="8M")
        os.chown(path, owner, owner)
        return f"file:{path}"

    return make


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def says(volume: str, *, uri: str) -> dict[str, Any]:
    """What a server answers to info."""
    return {**dataclasses.asdict(fvd.info(volume)), "volume": volume, "uri": uri}


def serve(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch, folder: Path, path: str, answer: dict[str, Any], *, strange: bool = True
) -> ControlServer:
    """Somebody who listens at the socket of the volume at `path`, and says what he likes."""
    with monkeypatch.context() as patch:
        patch.setattr(server, "make_runtime_dir", lambda: folder)
        patch.setattr(server, "open_runtime_dir", lambda path: os.open(path, os.O_RDONLY | os.O_DIRECTORY))
        served = ControlServer(answer["volume"], path, {"info": lambda arguments: answer})
        if strange:
            with as_stranger():
                served.start()
        else:
            served.start()
    stack.callback(served.close)
    return served


def test_who_listens(folders: tuple[Path, Path], stack: ExitStack) -> None:
    for place, uid in (("a", 0), ("b", STRANGER)):
        listen_at(stack, folders[0] / place, strange=uid == STRANGER)
        client = stack.enter_context(socket.socket(socket.AF_UNIX))
        client.connect(str(folders[0] / place))
        assert peer_uid(client) == uid


def test_the_rule(make_disk: Callable[..., str], tmp_path: Path) -> None:
    ours, his = make_disk("ours"), make_disk("his", STRANGER)
    name = {volume: paths.socket_name(parse_name(volume).path) for volume in (ours, his)}
    assert is_believed(0, tmp_path / "ours") and is_believed(STRANGER, tmp_path / "his") and not is_believed(STRANGER, tmp_path / "ours")
    assert is_believed_about(0, ours, "anything")
    assert is_believed_about(STRANGER, his, name[his])
    assert not is_believed_about(STRANGER, his, name[ours])
    assert not is_believed_about(STRANGER, ours, name[ours])
    for volume in ("", "file:/not/there", "file:\x1b[2J", "file:" + "x" * 9000, "\0"):
        assert not is_believed_about(STRANGER, volume, name[his])


def test_a_stranger_does_not_answer_for_a_volume_of_ours(
    folders: tuple[Path, Path], make_disk: Callable[..., str], stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """attach-info would print a server of his."""
    ours = make_disk("ours")
    path = parse_name(ours).path
    serve(stack, monkeypatch, folders[1], path, says(ours, uri="nbd+unix:///evil?socket=/tmp/evil"))
    assert ask(parse_name(ours), "info") is NOT_SERVED
    assert fvd.info(ours).uri is None
    with pytest.raises(NotFound, match="not served"):
        fvd.attach_info(ours)
    # Nor where all may put sockets.
    folders[0].chmod(0o777)
    monkeypatch.setattr(paths, "search_dirs", lambda: [folders[0]])
    serve(stack, monkeypatch, folders[0], path, says(ours, uri="nbd+unix:///evil?socket=/tmp/evil"))
    assert ask(parse_name(ours), "info") is NOT_SERVED


def test_a_stranger_answers_for_his_own(
    folders: tuple[Path, Path], make_disk: Callable[..., str], stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    his = make_disk("his", STRANGER)
    serve(stack, monkeypatch, folders[1], parse_name(his).path, says(his, uri="nbd+unix:///his?socket=/x\x1b[2J"))
    answer = ask(parse_name(his), "info")
    assert answer["uri"] == "nbd+unix:///his?socket=/x\ufffd[2J"  # and does nothing to a terminal
    assert [listed.volume for listed in fvd.list_volumes()] == [his]


def test_a_list_shows_no_forgery(
    folders: tuple[Path, Path], make_disk: Callable[..., str], stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, his = make_disk("ours"), make_disk("his", STRANGER)
    forged = serve(stack, monkeypatch, folders[1], parse_name(ours).path, says(ours, uri="nbd://evil"))
    other = serve(stack, monkeypatch, folders[1], parse_name(his).path, says(ours, uri="nbd://evil"))  # at a socket that he may have
    (folders[1] / "vm\x1b[2J.sock").touch()
    found = {listed.volume: listed for listed in fvd.list_volumes()}
    assert set(found) == {f"(control socket {forged.path})", f"(control socket {other.path})"}
    for listed in found.values():
        assert listed.state == PermissionDenied.kind and listed.info is None and "not his" in (listed.problem or "")


def test_who_does_not_answer_is_named_and_keeps_nobody_waiting(
    folders: tuple[Path, Path], make_disk: Callable[..., str], stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty that hang, one that drips, and one that answers."""
    monkeypatch.setattr(listing, "ANSWER_TIMEOUT_SECONDS", 0.5)
    stuck, well = make_disk("stuck"), make_disk("well")
    hang = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(server, "make_runtime_dir", lambda: folders[0])
        served = ControlServer(stuck, parse_name(stuck).path, {"info": lambda arguments: hang.wait(30)})
        served.start()
    stack.callback(served.close)
    stack.callback(hang.set)
    serve(stack, monkeypatch, folders[0], parse_name(well).path, says(well, uri="nbd://x"), strange=False)
    for number in range(20):
        listen_at(stack, folders[1] / f"file-1-{number:x}.sock", strange=True)
    with dripping(listen_at(stack, folders[1] / "file-2-0.sock", strange=True)):
        begun = time.monotonic()
        found = {listed.volume: listed for listed in fvd.list_volumes()}
        assert time.monotonic() - begun < 5
    assert found[well].state == "served"
    assert found[stuck].state == Timeout.kind and stuck in found
    assert len(found) == 23


def answer(listener: socket.socket, data: bytes) -> None:
    """To one request, which is read: what is closed with something unread resets the connection, and the answer is lost."""
    with suppress(OSError):
        connection, _ = listener.accept()
        with connection:
            connection.recv(1 << 16)
            connection.sendall(data)
            connection.recv(1)


def test_events_of_a_stranger(
    folders: tuple[Path, Path], make_disk: Callable[..., str], stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forged events of a disk of ours, at a socket in his folder, and among those of his own disk."""
    monkeypatch.setattr(watching, "search_dirs", lambda: list(folders))
    monkeypatch.setattr(following, "START_SECONDS", 0.5)
    ours, his = make_disk("ours"), make_disk("his", STRANGER)
    for volume, path in ((ours, parse_name(ours).path), (his, parse_name(his).path)):
        listener = listen_at(stack, folders[1] / paths.socket_name(path), strange=True)
        event = {"kind": "growth", "volume": ours, "number": 1, "time": 0.0, "message": "forged"}
        own = {**event, "volume": his, "message": "his \x1b[2J"}
        lines = [
            protocol.encode_result({"volume": volume, "server": "s", "number": 0, "storage_size": 1, "free_bytes": 1}),
            *([protocol.encode_event(own)] if volume == his else []),
            protocol.encode_event({**event, "number": 2}),
        ]
        threading.Thread(target=answer, args=(listener, b"".join(lines)), daemon=True).start()
    follower = Follower(None, history=True)
    follower.open()
    stack.callback(follower.close)
    ended = threading.Timer(3.0, follower.close)
    ended.start()
    heard = []
    while (found := follower.next()) is not None:
        heard.append(found)
    ended.join()
    assert [(each["volume"], each["message"]) for each in heard if each["kind"] != "server_gone"] == [(his, "his \ufffd[2J")]
    assert all(each["volume"] == his for each in heard)


def test_a_drip_is_a_timeout(tmp_path: Path, stack: ExitStack) -> None:
    """The whole answer within the time, not a byte of it now and then."""
    with dripping(listen_at(stack, tmp_path / "x", strange=False)):
        begun = time.monotonic()
        with pytest.raises(Timeout), ControlClient(tmp_path / "x", timeout_seconds=0.4) as client:
            client.ask("info")
        assert time.monotonic() - begun < 3
