# SPDX-License-Identifier: Apache-2.0
"""A control socket with real connections: who may have it, what it survives, what it leaves behind."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fvd.control import paths, protocol
from fvd.control.client import ControlClient
from fvd.control.protocol import ServerGone
from fvd.control.server import CONNECTIONS_MAX, ControlServer
from fvd.errors import InUse, InvalidArgument, NoSpace, PermissionDenied, Timeout

pytestmark = pytest.mark.pure


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    path = tmp_path / "vm1.img"
    path.write_bytes(b"x")
    return path


def fail(arguments: dict[str, Any]) -> None:
    raise NoSpace("vm1: full; add storage")


HANDLERS = {"echo": lambda arguments: arguments, "fail": fail, "bug": lambda arguments: 1 / 0}


@pytest.fixture
def server(volume: Path) -> Iterator[ControlServer]:
    server = ControlServer("file:vm1", volume, HANDLERS)
    server.start()
    yield server
    server.close()


def path_of(server: ControlServer) -> Path:
    assert server.path is not None
    return server.path


def test_ask(server: ControlServer) -> None:
    with ControlClient(path_of(server)) as client:
        assert client.ask("echo", a=1, b="ü") == {"a": 1, "b": "ü"}
        with pytest.raises(NoSpace, match="vm1: full; add storage"):
            client.ask("fail")
        with pytest.raises(InvalidArgument, match="unknown verb 'shell'; known are: bug, echo, fail"):
            client.ask("shell")
        with pytest.raises(Exception, match="ZeroDivisionError"):
            client.ask("bug")
        assert client.ask("echo", still="here") == {"still": "here"}


def test_modes(server: ControlServer, runtime_dir: Path) -> None:
    assert stat.S_IMODE(path_of(server).lstat().st_mode) == 0o600
    assert stat.S_IMODE(runtime_dir.stat().st_mode) == 0o700
    assert {path.name for path in runtime_dir.iterdir()} == {path_of(server).name, path_of(server).with_suffix(".lock").name}


def test_the_same_volume_by_any_name(server: ControlServer, volume: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(volume)
    (tmp_path / "hard").hardlink_to(volume)
    monkeypatch.chdir(tmp_path)
    for name in (volume, tmp_path / "link", tmp_path / "hard", "vm1.img"):
        assert paths.find_sockets(name) == [server.path]
    assert paths.find_sockets(tmp_path / "absent") == []
    assert paths.all_sockets() == [server.path]


def test_a_second_server_is_refused(server: ControlServer, volume: Path) -> None:
    with pytest.raises(InUse, match="another process serves it"):
        ControlServer("file:vm1", volume, HANDLERS).start()
    path_of(server).with_suffix(".lock").unlink()
    with pytest.raises(InUse, match="another process answers"):
        ControlServer("file:vm1", volume, HANDLERS).start()
    with ControlClient(path_of(server)) as client:
        assert client.ask("echo") == {}


def test_names_are_taken_away_where_they_were_made(volume: Path, runtime_dir: Path, tmp_path: Path) -> None:
    """Whoever may change the folder above puts another in its place: nothing in that one is touched."""
    server = ControlServer("file:vm1", volume, HANDLERS)
    server.start()
    path = path_of(server)
    other = tmp_path / "other"
    other.mkdir()
    names = [path.name, path.with_suffix(".lock").name]
    for name in names:
        (other / name).write_text("somebody else's")
    moved = runtime_dir.rename(tmp_path / "moved")
    runtime_dir.symlink_to(other)
    server.close()
    assert sorted(each.name for each in other.iterdir()) == sorted(names)
    assert list(moved.iterdir()) == []
    runtime_dir.unlink()
    other.chmod(0o777)
    with pytest.raises(PermissionDenied, match="nobody else may write"):
        paths.open_runtime_dir(other)
    runtime_dir.symlink_to(moved)
    with pytest.raises(PermissionDenied):
        paths.open_runtime_dir(runtime_dir)


def test_close_leaves_nothing(volume: Path, runtime_dir: Path) -> None:
    server = ControlServer("file:vm1", volume, HANDLERS)
    server.start()
    path = path_of(server)
    client = ControlClient(path)
    client.connect()
    server.close()
    assert list(runtime_dir.iterdir()) == []
    with pytest.raises(ServerGone):
        client.ask("echo")
    client.close()
    with pytest.raises(ServerGone, match="nobody serves"):
        ControlClient(path).connect()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fvd-control")]


def test_a_dead_process_is_replaced(volume: Path) -> None:
    code = (
        "import sys, os\nfrom fvd.control.server import ControlServer\n"
        "ControlServer('file:vm1', sys.argv[1], {}).start()\nos.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(volume)], check=False).returncode == -9
    [stale] = paths.find_sockets(volume)
    assert stale is not None
    with pytest.raises(ServerGone):
        ControlClient(stale).connect()
    server = ControlServer("file:vm1", volume, HANDLERS)
    server.start()
    assert server.path == stale
    with ControlClient(stale) as client:
        assert client.ask("echo") == {}
    server.close()


def talk(server: ControlServer, data: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(10)
        raw.connect(str(server.path))
        raw.sendall(data)
        raw.shutdown(socket.SHUT_WR)
        got = b""
        while piece := raw.recv(65536):
            got += piece
        return got


@pytest.mark.parametrize("line", [b"nonsense", b"{}", b'{"schema_version":99,"verb":"echo"}'])
def test_malformed_input_gets_an_error_and_the_connection_goes_on(server: ControlServer, line: bytes) -> None:
    answers = talk(server, line + b'\n{"schema_version":1,"verb":"echo"}\n').splitlines()
    assert b'"kind":"protocol"' in answers[0]
    assert protocol.decode_answer(answers[1]) == {}


def test_an_endless_line_is_cut_off(server: ControlServer) -> None:
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(10)
        raw.connect(str(server.path))
        with pytest.raises(OSError):
            for _ in range(1000):
                raw.sendall(b"x" * 65536)


def test_many_clients_at_once(server: ControlServer) -> None:
    def ask_often() -> None:
        with ControlClient(path_of(server)) as client:
            for number in range(50):
                assert client.ask("echo", number=number) == {"number": number}

    threads = [threading.Thread(target=ask_often) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_connections_are_bounded(server: ControlServer) -> None:
    held = []
    for _ in range(CONNECTIONS_MAX):
        client = ControlClient(path_of(server))
        client.ask("echo")
        held.append(client)
    with pytest.raises(ServerGone):
        ControlClient(path_of(server)).ask("echo")
    held.pop().close()
    for client in held:
        client.ask("echo")
        client.close()


def test_silence_ends_a_connection(volume: Path) -> None:
    server = ControlServer("file:vm1", volume, HANDLERS, idle_timeout_seconds=0.05)
    server.start()
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(10)
        raw.connect(str(server.path))
        assert raw.recv(1) == b""
    server.close()


def test_a_stuck_handler_is_a_timeout(volume: Path) -> None:
    go = threading.Event()
    server = ControlServer("file:vm1", volume, {"hang": lambda arguments: go.wait(30)})
    server.start()
    with pytest.raises(Timeout, match="no answer to hang"):
        ControlClient(path_of(server), timeout_seconds=0.1).ask("hang")
    go.set()
    server.close()


def test_a_long_folder_name(tmp_path: Path, volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket address holds 107 bytes; a path may be longer."""
    monkeypatch.setenv("FVD_RUNTIME_DIR", str(tmp_path / ("x" * 120)))
    server = ControlServer("file:vm1", volume, HANDLERS)
    server.start()
    with ControlClient(path_of(server)) as client:
        assert client.ask("echo") == {}
    server.close()


def test_where_sockets_live(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FVD_RUNTIME_DIR")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    assert paths.runtime_dir() == tmp_path / "fvd"
    assert paths.search_dirs() == [tmp_path / "fvd"]
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert paths.runtime_dir() in (Path("/run/user/1000/fvd"), Path("/tmp/fvd-1000"))
    monkeypatch.setattr(os, "getuid", lambda: 0)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert paths.runtime_dir() == Path("/run/fvd")


def test_a_folder_that_others_may_write_to_is_refused(runtime_dir: Path, volume: Path) -> None:
    runtime_dir.chmod(0o777)
    with pytest.raises(PermissionDenied, match="FVD_RUNTIME_DIR"):
        ControlServer("file:vm1", volume, HANDLERS).start()


def test_a_block_device_is_known_by_its_numbers() -> None:
    for number in range(8):
        if Path(f"/dev/loop{number}").is_block_device():
            assert paths.socket_name(f"/dev/loop{number}") == f"dev-7-{number}.sock"
            return
    pytest.skip("no loop device node here")
