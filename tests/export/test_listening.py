# SPDX-License-Identifier: Apache-2.0
"""Unix sockets: a name appears when its socket listens and is whose it should be; a living server's is never taken, whatever others do."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fvd.errors import Conflict, FvdError, InUse
from fvd.export import listening
from fvd.export.listening import Given, Tcp, Unix, check_given, open_listener

pytestmark = pytest.mark.pure


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fvd-", dir="/tmp") as folder:  # short: a socket's path is
        yield Path(folder) / "vm1.sock"


def connect(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


@pytest.mark.parametrize("umask", [0o000, 0o077, 0o777])
@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
def test_mode_whatever_the_umask(path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        listener, name = open_listener(Unix(str(path), mode, os.getgid()))
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.lstat().st_mode) == mode
    assert name is not None
    name.remove()
    listener.close()
    assert list(path.parent.iterdir()) == []


def test_a_name_that_is_there_can_be_connected_to(path: Path) -> None:
    refused: list[OSError] = []
    ended = threading.Event()

    def client() -> None:
        while not ended.is_set():
            try:
                connect(path)
            except FileNotFoundError:
                pass
            except OSError as error:
                refused.append(error)  # none, for the name goes before the socket is closed

    watcher = threading.Thread(target=client)
    watcher.start()
    for _ in range(200):
        listener, name = open_listener(Unix(str(path)))
        assert name is not None
        name.remove()  # as a server ends: no name first
        listener.close()
    ended.set()
    watcher.join()
    assert refused == []


@pytest.mark.parametrize("old", ["none", "dead"])
def test_two_servers_on_one_path(path: Path, old: str) -> None:
    """Exactly one of those that begin together has the name."""
    for _ in range(50):
        if old == "dead":
            with socket.socket(socket.AF_UNIX) as dead:
                dead.bind(str(path))
        made: list[tuple[socket.socket, listening.BoundName | None]] = []
        together = threading.Barrier(3)

        def serve(made: list[tuple[socket.socket, listening.BoundName | None]] = made, together: threading.Barrier = together) -> None:
            together.wait()
            try:
                made.append(open_listener(Unix(str(path))))
            except InUse:
                return

        threads = [threading.Thread(target=serve) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(made) == 1
        connect(path)
        [(listener, name)] = made
        assert name is not None
        name.remove()
        listener.close()
    assert list(path.parent.iterdir()) == []


def test_a_file_system_that_cannot_rename_without_replacing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "_RENAME_NOREPLACE", 1 << 20)
    listener, name = open_listener(Unix(str(path)))
    connect(path)
    assert name is not None and list(path.parent.iterdir()) == [path]
    with pytest.raises(InUse):
        open_listener(Unix(str(path)))
    name.remove()
    listener.close()


def test_a_name_that_somebody_takes_last_is_not_replaced(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without a kernel that helps."""
    for flag in (listening._RENAME_NOREPLACE, 1 << 20):
        monkeypatch.setattr(listening, "_RENAME_NOREPLACE", flag)
        chmod = os.chmod

        def late(*words: object, chmod: Callable[..., None] = chmod, **folders: int) -> None:
            path.write_text("mine")
            chmod(*words, **folders)

        with monkeypatch.context() as patch:
            patch.setattr(os, "chmod", late)
            with pytest.raises(InUse, match="just begun"):
                open_listener(Unix(str(path)))
        assert path.read_text() == "mine" and list(path.parent.iterdir()) == [path]
        path.unlink()


def test_a_lock_that_somebody_holds_is_not_waited_for_long(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "_LOCK_SECONDS", 0.1)
    lock = os.open(path.parent, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    listener, name = open_listener(Unix(str(path)))
    os.close(lock)
    connect(path)
    assert name is not None
    name.remove()
    listener.close()


def test_another_servers_name_is_given_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dead socket that was looked at has gone, and a living server has its name, when it is taken away."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    other = socket.socket(socket.AF_UNIX)
    rename = os.rename

    def late(source: str, target: str, **folders: int) -> None:
        if other.fileno() >= 0 and not other.getsockname():
            path.unlink()
            other.bind(str(path))
            other.listen()
        rename(source, target, **folders)

    monkeypatch.setattr(os, "rename", late)
    with pytest.raises(InUse, match="a process listens"):
        open_listener(Unix(str(path)))
    connect(path)
    other.close()


def test_nothing_that_is_no_socket_is_touched(path: Path) -> None:
    path.write_text("mine")
    with pytest.raises(Conflict, match="choose another path") as error:
        open_listener(Unix(str(path)))
    assert "remove" not in str(error.value)
    assert path.read_text() == "mine"
    path.unlink()
    target = path.parent / "target"
    target.write_text("mine")
    path.symlink_to(target)
    with pytest.raises(Conflict):
        open_listener(Unix(str(path), 0o666))
    assert (path.is_symlink(), target.read_text(), sorted(path.parent.iterdir())) == (True, "mine", [target, path])


def test_a_folder_that_is_renamed_meanwhile_changes_nothing_elsewhere(path: Path) -> None:
    """At the end only our own name goes, in the folder where it was made, whatever has that folder's name by then."""
    folder = path.parent / "of"
    folder.mkdir()
    listener, name = open_listener(Unix(str(folder / "s")))
    assert name is not None
    folder.rename(path.parent / "moved")
    folder.mkdir()
    (folder / "s").write_text("somebody else's")
    name.remove()
    name.remove()
    listener.close()
    assert (folder / "s").read_text() == "somebody else's"
    assert list((path.parent / "moved").iterdir()) == []


def test_a_private_folder_that_is_swapped_is_noticed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mkdir = os.mkdir

    def swapped(name: str, mode: int, dir_fd: int) -> None:
        mkdir(name, mode, dir_fd=dir_fd)
        os.rmdir(name, dir_fd=dir_fd)
        os.symlink("/tmp", name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "mkdir", swapped)
    with pytest.raises(FvdError):
        open_listener(Unix(str(path)))
    assert not path.exists()


def test_what_was_given_must_listen() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as wrong, pytest.raises(FvdError, match="no stream socket that listens"):
        check_given(Given((wrong,)))


def test_addresses_read_as_they_are_written() -> None:
    assert [str(address) for address in (Tcp("::", 1), Tcp("localhost", 2), Unix("/a"))] == ["[::]:1", "localhost:2", "/a"]
