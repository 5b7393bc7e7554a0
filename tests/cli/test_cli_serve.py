# SPDX-License-Identifier: Apache-2.0
"""``fvd-lv serve`` and what the other commands do to a disk that is served: readiness, ends clean and unclean, one owner, growth."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from fvd_commands import COMMAND, Done, Server
from nbd_handle import connect, nbd

from fvd.modes import CACHE_MODES

GIB = 1 << 30
MIB = 1 << 20

FvdLv = Callable[..., Done]
Serving = Callable[..., AbstractContextManager[Server]]


@pytest.fixture
def disk(fvd_lv: FvdLv) -> str:
    fvd_lv("provision", "file:a", "--size", "1G", "--grow-step", "64M")
    return "file:a"


# --- Ready ---------------------------------------------------------------------------------------------------------------------


def test_serve_says_one_line_and_serves(disk: str, serving: Serving, workdir: Path) -> None:
    with serving(disk) as server:
        assert server.uri.startswith("nbd+unix://")
        assert stat.S_IMODE((workdir / "vm.sock").stat().st_mode) == 0o600
        handle = connect(server.uri)
        assert handle.get_size() == GIB
        handle.pwrite(b"x" * 4096, 0)
        handle.flush()
        assert handle.pread(4096, 0) == b"x" * 4096
        handle.shutdown()
        server.terminate()
        assert server.process.stdout is not None
    assert not (workdir / "vm.sock").exists()


def test_serve_json(disk: str, workdir: Path) -> None:
    words = [*COMMAND, "serve", disk, "--socket", "vm.sock", "--output", "json"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = ""
    while not lines.endswith("\n}\n"):
        line = process.stdout.readline()
        assert line, process.communicate()
        lines += line
    answer = json.loads(lines)
    assert answer["schema_version"] == 1
    assert answer["pid"] == process.pid
    [volume] = answer["volumes"]
    assert set(volume) == {"volume", "export", "uri", "vhost_user"} and volume["vhost_user"] is None
    assert volume["volume"] == f"file:{workdir / 'a'}"
    assert connect(volume["uri"]).get_size() == GIB
    process.terminate()
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "")


def test_serve_tcp(disk: str, serving: Serving) -> None:
    with serving(disk, "--listen", "127.0.0.1:0") as server:
        assert server.uri.startswith("nbd://")
        assert ":0/" not in server.uri
        assert connect(server.uri).get_size() == GIB


def test_serve_several(disk: str, fvd_lv: FvdLv, serving: Serving, workdir: Path) -> None:
    fvd_lv("provision", "file:b", "--size", "2G")
    with serving(disk, "file:b", lines=2) as server:
        assert [connect(uri).get_size() for uri in server.lines] == [GIB, 2 * GIB]
        listed = fvd_lv("list", "--served", "--output", "json").json["volumes"]
        assert [(each["volume"], each["state"], each["info"]["uri"]) for each in listed] == [
            (f"file:{workdir / name}", "served", uri) for name, uri in zip("ab", server.lines, strict=True)
        ]


def test_serve_twice_the_same(disk: str, fvd_lv: FvdLv) -> None:
    for same in (disk, "file:./a"):
        assert fvd_lv("serve", disk, same, "--socket", "vm.sock", code=2).out == ""


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told(disk: str, serving: Serving, workdir: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    name = f"fvd-notify-{os.getpid()}" if abstract else str(workdir / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.settimeout(60)
        receiver.bind(f"\0{name}" if abstract else name)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}" if abstract else name)
        with serving(disk) as server:
            assert "READY=1" in receiver.recv(4096).decode().splitlines()
            server.terminate()
        assert receiver.recv(4096) == b"STOPPING=1"


def test_socket_mode(disk: str, serving: Serving, workdir: Path) -> None:
    with serving(disk, "--socket-mode", "0660", "--socket-group", str(os.getgid())):
        assert stat.S_IMODE((workdir / "vm.sock").stat().st_mode) == 0o660


@pytest.mark.parametrize("cache", CACHE_MODES)
def test_every_cache_mode_serves(disk: str, serving: Serving, fvd_lv: FvdLv, cache: str) -> None:
    with serving(disk, "--cache", cache) as server:
        handle = connect(server.uri)
        handle.pwrite(b"y" * MIB, 5 * MIB)
        handle.flush()
        handle.shutdown()
        server.terminate()
    with serving(disk) as server:
        assert connect(server.uri).pread(MIB, 5 * MIB) == b"y" * MIB


# --- Ends ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_closes_cleanly(disk: str, serving: Serving, fvd_lv: FvdLv, number: signal.Signals, runtime_dir: Path) -> None:
    with serving(disk) as server:
        handle = connect(server.uri)
        handle.pwrite(b"x" * MIB, 0)  # not flushed: a clean close keeps it
        assert fvd_lv("info", disk, "--output", "json").json["clean"] is False
        server.process.send_signal(number)
        _, said = server.process.communicate(timeout=60)
        assert server.process.returncode == 0, said
    answer = fvd_lv("info", disk, "--output", "json").json
    assert (answer["clean"], answer["mapped_bytes"], answer["uri"]) == (True, MIB, None)
    assert list(runtime_dir.iterdir()) == []
    with serving(disk) as server:
        assert connect(server.uri).pread(MIB, 0) == b"x" * MIB


def test_kill_and_again(disk: str, serving: Serving, fvd_lv: FvdLv, runtime_dir: Path) -> None:
    """Stale sockets, NBD's and the control socket, are replaced; what was flushed is there."""
    with serving(disk) as server:
        handle = connect(server.uri)
        handle.pwrite(b"x" * MIB, 10 * MIB)
        handle.flush()
        server.kill()
    assert [path for path in runtime_dir.iterdir() if path.suffix == ".sock"]
    answer = fvd_lv("info", disk, "--output", "json").json
    assert (answer["clean"], answer["uri"], answer["mapped_bytes"]) == (False, None, MIB)
    assert fvd_lv("check", disk).code == 0
    assert fvd_lv("list", "--served", "--output", "json").json["volumes"] == []
    with serving(disk) as server:
        assert connect(server.uri).pread(MIB, 10 * MIB) == b"x" * MIB
        assert fvd_lv("info", disk, "--output", "json").json["uri"] == server.uri


# --- One owner -----------------------------------------------------------------------------------------------------------------


def test_a_second_owner_is_refused(disk: str, serving: Serving, fvd_lv: FvdLv) -> None:
    with serving(disk) as server:
        for words in (["serve", disk, "--socket", "other.sock"], ["remove", disk]):
            done = fvd_lv(*words, code=5)
            assert done.err.startswith("fvd-lv: ") and done.err.count("\n") == 1
        assert json.loads(fvd_lv("remove", disk, "--output", "json", code=5).out)["error"]["kind"] == "in_use"
        assert connect(server.uri).get_size() == GIB


def test_a_second_server_on_one_address_is_refused(disk: str, serving: Serving, fvd_lv: FvdLv) -> None:
    fvd_lv("provision", "file:b", "--size", "2G")
    with serving(disk) as server:
        fvd_lv("serve", "file:b", "--socket", "vm.sock", code=5)
        assert connect(server.uri).get_size() == GIB
        assert fvd_lv("check", "file:b").code == 0


# --- The other commands on a served disk -----------------------------------------------------------------------------------------


def test_info_map_check_of_a_served_disk(disk: str, serving: Serving, fvd_lv: FvdLv, workdir: Path) -> None:
    with serving(disk) as server:
        handle = connect(server.uri)
        handle.pwrite(b"x" * MIB, 100 * MIB)
        info = fvd_lv("info", disk, "--output", "json").json
        assert info["mapped_bytes"] == MIB
        assert info["uri"] == server.uri
        assert info["volume"] == f"file:{workdir / 'a'}"
        extents = fvd_lv("map", disk, "--output", "json").json["extents"]
        assert [(extent["start"], extent["length"], extent["state"]) for extent in extents] == [
            (0, 100 * MIB, "zero"),
            (100 * MIB, MIB, "data"),
            (101 * MIB, 923 * MIB, "zero"),
        ]
        report = fvd_lv("check", disk, "--output", "json").json
        assert (report["errors"], report["mapped_chunks"], report["mapped_bytes"]) == ([], 1, MIB)
        assert server.uri in fvd_lv("info", disk).out
        assert fvd_lv("provision", disk, "--size", "1G", "--grow-step", "64M", "--output", "json").json["created"] is False
        server.terminate()
    closed = fvd_lv("info", disk, "--output", "json").json
    open_only = dict.fromkeys(("uri", "cache", "on_full", "growth", "statistics", "pending_log"))
    assert closed == info | open_only | {"clean": True}


def test_extend_of_a_served_disk(disk: str, serving: Serving, fvd_lv: FvdLv) -> None:
    with serving(disk):
        before = fvd_lv("info", disk, "--output", "json").json["storage_size"]
        answer = fvd_lv("extend", disk, "--by", "256M", "--output", "json").json
        assert answer["added_bytes"] == 256 * MIB
        after = fvd_lv("info", disk, "--output", "json").json
        assert after["storage_size"] == answer["storage_size"] == before + 256 * MIB
        fvd_lv("extend", disk, "--by", "0", code=2)


def test_it_grows_under_load(disk: str, serving: Serving, fvd_lv: FvdLv) -> None:
    with serving(disk) as server:
        handle = connect(server.uri)
        for offset in range(0, 512 * MIB, MIB):
            handle.pwrite(bytes([1 + offset // MIB % 251]) * MIB, offset)
        answer = fvd_lv("info", disk, "--output", "json").json
        assert answer["mapped_bytes"] == 512 * MIB
        assert answer["storage_size"] >= 512 * MIB + answer["metadata_size"]
        for offset in range(0, 512 * MIB, 64 * MIB):
            assert handle.pread(MIB, offset) == bytes([1 + offset // MIB % 251]) * MIB


def test_read_only(disk: str, serving: Serving, fvd_lv: FvdLv, workdir: Path) -> None:
    before = (workdir / "a").read_bytes()
    with serving(disk, "--read-only") as server:
        handle = connect(server.uri)
        assert handle.is_read_only()
        with pytest.raises(nbd.Error):
            handle.pwrite(b"x" * 4096, 0)
        assert fvd_lv("info", disk, "--output", "json").json["read_only"] is True
        fvd_lv("extend", disk, code=10)
    assert (workdir / "a").read_bytes() == before


def test_commands_from_another_folder(disk: str, serving: Serving, workdir: Path) -> None:
    """The control socket is found by what the volume is, not by how it is named."""
    with serving(disk) as server:
        (workdir / "elsewhere").mkdir()
        (workdir / "elsewhere" / "link").symlink_to(workdir / "a")
        words = [sys.executable, "-m", "fvd.cli", "info", "file:link", "--output", "json"]
        done = subprocess.run(words, cwd=workdir / "elsewhere", capture_output=True, text=True, check=True)
        assert json.loads(done.stdout)["uri"] == server.uri
