# SPDX-License-Identifier: Apache-2.0
"""A server that is killed, as a person meets it: what info says, what the next server shows, what is refused, what is acknowledged."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from fvd_commands import COMMAND, Done, Server
from nbd_handle import connect

import fvd

MIB = 1 << 20
A, B = b"A" * 4096, b"B" * 4096

FvdLv = Callable[..., Done]
Serving = Callable[..., AbstractContextManager[Server]]


@pytest.fixture
def disk(fvd_lv: FvdLv) -> str:
    fvd_lv("provision", "file:a", "--size", "1G", "--grow-step", "64M", "--journal-size", "1M")
    return "file:a"


def write_and_kill(serving: Serving, disk: str, *options: str) -> None:
    """A: written and flushed; B: written, answered, not flushed; kill -9."""
    with serving(disk, *options) as server:
        handle = connect(server.uri)
        handle.pwrite(A, 0)
        handle.flush()
        handle.pwrite(B, 10 * MIB)
        server.kill()


def logs(pending_dir: Path) -> list[Path]:
    return sorted(pending_dir.iterdir())


def rows(done: Done) -> dict[str, str]:
    """The lines of a text info by their labels."""
    return {line[2:18].strip(): line[18:] for line in done.out.splitlines()[1:] if line[2:18].strip()}


@pytest.mark.parametrize("cache", ["none", "writeback"])
def test_nothing_that_was_answered_is_lost(disk: str, serving: Serving, fvd_lv: FvdLv, pending_dir: Path, cache: str) -> None:
    with serving(disk, "--cache", cache) as server:
        [log] = logs(pending_dir)
        assert fvd.info(disk).pending_log == str(log)
        handle = connect(server.uri)
        handle.pwrite(A, 0)
        handle.flush()
        handle.pwrite(B, 10 * MIB)
        server.kill()
    told = fvd_lv("info", disk, "--output", "json").json
    assert (told["left_open"], told["clean"], told["possible_loss"], told["pending_log"]) == (True, False, None, None)
    assert told["mapped_bytes"] == 2 * MIB and told["pending_changes"] >= 2
    assert "the next open commits what it had acknowledged" in rows(fvd_lv("info", disk))["state"]
    checked = fvd_lv("check", disk)
    assert "whole; not closed cleanly" in checked.out and "the next open commits them" in checked.out
    with serving(disk, "--cache", cache) as server:
        handle = connect(server.uri)
        assert handle.pread(4096, 0) == A and handle.pread(4096, 10 * MIB) == B
        handle.shutdown()
        assert server.terminate() == "", "nothing is wrong, so nothing is said"
    found = fvd.info(disk)
    assert (found.left_open, found.clean, found.pending_changes, found.notices) == (False, True, 0, [])
    assert rows(fvd_lv("info", disk))["state"] == "clean" and logs(pending_dir) == []


def test_a_missing_log_from_the_refusal_to_the_acknowledgement(disk: str, serving: Serving, fvd_lv: FvdLv, pending_dir: Path) -> None:
    write_and_kill(serving, disk)
    [log] = logs(pending_dir)
    log.unlink()
    told = fvd_lv("info", disk)
    assert "did not close it" in rows(told)["state"] and "may be gone" in rows(told)["note"]
    assert "fvd-lv acknowledge" not in told.out, "not yet: nobody has opened it without the log"
    refused = fvd_lv("serve", disk, "--socket", "vm.sock", code=4)
    assert str(log) in refused.err and "--discard-pending" in refused.err
    early = fvd_lv("acknowledge", disk, code=4)
    assert "serve it" in early.err and fvd.info(disk).left_open

    with serving(disk, "--discard-pending") as server:
        handle = connect(server.uri)
        assert handle.pread(4096, 0) == A and handle.pread(4096, 10 * MIB) == bytes(4096), "as it was flushed"
        loss = fvd_lv("info", disk, "--output", "json").json["possible_loss"]
        assert loss["reason"] == "log_missing" and loss["seconds"] > 0
        assert f"fvd-lv acknowledge file:{Path('a').resolve()}" in fvd_lv("info", disk).out
        listed = fvd_lv("events", disk, "--history", "--count", "2").out
        assert [json.loads(line)["kind"] for line in listed.splitlines()] == ["served", "possible_loss"]
        assert json.loads(listed.splitlines()[1])["message"] == loss["message"]
        assert any("acknowledge" in warning for warning in fvd.check(disk).warnings)
        said = server.terminate()
        assert "possible loss" in said
    # It was closed cleanly, and says so still: until somebody says that it was seen, and this once.
    assert loss["message"] in rows(fvd_lv("info", disk))["possible loss"]
    assert any("acknowledge" in warning for warning in fvd.check(disk).warnings)
    assert "acknowledged" in fvd_lv("acknowledge", disk).out
    assert fvd.info(disk).possible_loss is None
    again = fvd_lv("acknowledge", disk, "--output", "json").json
    assert (again["volume"], again["acknowledged"]) == (disk, False)
    assert fvd.check(disk).warnings == []
    with serving(disk) as server:
        assert connect(server.uri).pread(4096, 0) == A
        [event] = fvd_lv("events", disk, "--history", "--count", "1").out.splitlines()
        assert json.loads(event)["kind"] == "served" and server.terminate() == ""


def test_a_served_disk_is_acknowledged_and_stays_so_after_a_kill(disk: str, serving: Serving, fvd_lv: FvdLv, pending_dir: Path) -> None:
    write_and_kill(serving, disk)
    logs(pending_dir)[0].unlink()
    with serving(disk, "--discard-pending") as server:
        assert fvd_lv("acknowledge", disk, "--output", "json").json["acknowledged"] is True
        assert "nothing to acknowledge" in fvd_lv("acknowledge", disk).out
        assert fvd.info(disk).possible_loss is None
        server.kill()
    with serving(disk):
        assert fvd.info(disk).possible_loss is None


def test_a_disk_that_is_served_read_only_cannot_be_acknowledged(disk: str, serving: Serving, fvd_lv: FvdLv, pending_dir: Path) -> None:
    write_and_kill(serving, disk)
    logs(pending_dir)[0].unlink()
    with serving(disk, "--read-only") as server:
        assert connect(server.uri).pread(4096, 10 * MIB) == bytes(4096)
        assert "open for writing" in fvd_lv("acknowledge", disk, code=10).err
    fvd_lv("serve", disk, "--read-only", "--discard-pending", "--socket", "vm.sock", code=2)


def test_there_is_nothing_to_acknowledge(disk: str, fvd_lv: FvdLv) -> None:
    before = Path("a").read_bytes()
    assert fvd_lv("acknowledge", disk).out == "file:a: nothing to acknowledge: no loss is known\n"
    assert Path("a").read_bytes() == before
    assert fvd_lv("acknowledge", "file:absent", code=3).out == ""


def test_a_log_that_is_there_is_used_whatever_is_asked(disk: str, serving: Serving) -> None:
    write_and_kill(serving, disk)
    with serving(disk, "--discard-pending") as server:
        assert connect(server.uri).pread(4096, 10 * MIB) == B
        assert server.terminate() == ""


def test_a_server_without_a_log_says_so_in_one_line(disk: str, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FVD_PENDING_DIR", str(workdir / "on-disk"))
    words = [*COMMAND, "serve", disk, "--socket", "vm.sock"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline()
    found = fvd.info(disk)
    attach = fvd.attach_info(disk).notes
    process.terminate()
    _, said = process.communicate(timeout=60)
    [line] = [line for line in said.splitlines() if "log of pending changes" in line]
    assert "writethrough and directsync" in line
    assert found.pending_log is None and any("writethrough" in notice for notice in found.notices)
    assert any("has no log" in note and "--cache writethrough" in note for note in attach)


def test_who_follows_hears_what_the_next_server_will_show(disk: str, serving: Serving) -> None:
    with serving(disk) as server:
        words = [*COMMAND, "events", disk, "--history", "--count", "2"]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=os.environ) as follower:
            assert follower.stdout is not None
            assert json.loads(follower.stdout.readline())["kind"] == "served"
            server.kill()
            gone = json.loads(follower.stdout.readline())
    assert gone["kind"] == "server_gone" and "shows all that it had acknowledged" in gone["message"]
