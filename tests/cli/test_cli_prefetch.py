# SPDX-License-Identifier: Apache-2.0
"""``fvd-lv prefetch``, ``copy-on-read`` and ``profile``: words, pictures, errors; and a disk that leaves its base, to the end."""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fvd_commands import Done, Server

import fvd
from fvd.cli import events, info, output, prefetch, profile, serve
from fvd.cli.main import build_parser

pytestmark = pytest.mark.pure

MIB = 1 << 20
GIB = 1 << 30

FvdLv = Callable[..., Done]
Serving = Callable[..., AbstractContextManager[Server]]


RUNNING = fvd.PrefetchStatus(
    "vg0/vm1",
    "running",
    "",
    copy_on_read=True,
    base_bytes=10 * GIB,
    copied_bytes=4 * GIB,
    remaining_bytes=6 * GIB,
    bytes_per_second=50.0 * MIB,
    limit_bytes_per_second=64 * MIB,
    eta_seconds=123.0,
)
DONE = replace(RUNNING, state="done", copied_bytes=10 * GIB, remaining_bytes=0, bytes_per_second=0, eta_seconds=0, released=True)


# --- In words and pictures -----------------------------------------------------------------------------------------------------


def test_durations() -> None:
    told = [output.duration(seconds) for seconds in (-1, 0.4, 59, 59.6, 185, 3600, 7800, 86400 * 5 + 3 * 3600)]
    assert told == ["0 s", "0 s", "59 s", "1 min 0 s", "3 min 5 s", "1 h 0 min", "2 h 10 min", "5 d 3 h"]


def test_a_bar_is_full_only_at_the_end() -> None:
    assert output.drawn_bar(0.0, 10) == "[..........]"
    assert output.drawn_bar(0.999, 10) == "[#########.]"
    assert output.drawn_bar(1.0, 10) == "[##########]"


def test_describe_status() -> None:
    status = replace(RUNNING, profile="/srv/p", profile_remaining_bytes=MIB)
    head, bar, amounts, used, copying = prefetch.describe_status(status, 60)
    assert head == "vg0/vm1: prefetching: running"
    assert re.fullmatch(r"  \[#+\.+\] 40.0 %", bar) and len(bar) < 60
    assert amounts == "  4.0 GiB of 10.0 GiB no longer come from the base; 50.0 MiB/s; limit 64.0 MiB/s; 2 min 3 s left"
    assert used == "  profile: /srv/p, 1.0 MiB of it left"
    assert copying == "  copy-on-read: on"
    assert prefetch.describe_status(DONE, 60)[-1] == "  base: released; the disk no longer needs it"
    assert prefetch.describe_status(replace(DONE, base_bytes=0, state="off", reason="the disk has no base"), 60) == [
        "vg0/vm1: prefetching: off, the disk has no base"
    ]


def test_states_say_why_and_when_they_end() -> None:
    paused = replace(RUNNING, state="paused", reason="the base is slow", resume_seconds=12.4)
    assert prefetch.state_text(paused) == "paused, the base is slow; resumes in 12 s"
    assert prefetch.state_text(replace(paused, state="delayed", reason="")) == "delayed; starts in 12 s"
    assert prefetch.state_text(DONE) == "done"


@pytest.mark.parametrize("width", [1, 10, 20, 40, 80, 200])
def test_a_line_fits_its_terminal(width: int) -> None:
    paused = replace(RUNNING, state="paused", reason="the storage is slow, and so is the guest", resume_seconds=1000)
    for status in (RUNNING, paused, DONE, replace(DONE, base_bytes=0)):
        assert len(prefetch.status_line(status, width)) < max(width, 1)


def test_info_says_what_becomes_of_the_base() -> None:
    fields: dict[str, Any] = {"base": fvd.Base("nbd://images/debian", GIB, "nbd")}
    found = replace(_info(), **fields)
    assert info.describe_copies(_info()) == []
    assert info.describe_copies(found) == ["copy-on-read off, prefetching off, unless serve says otherwise"]
    assert info.describe_copies(replace(found, copy_on_read=True, prefetch=RUNNING))[1].startswith(
        "prefetching: 40.0 % of 10.0 GiB; running;"
    )
    assert info.describe_copies(replace(found, base_released=True)) == ["base: released; all of its data are in the disk"]
    text = "\n".join(info.describe_info(replace(found, base_released=True)))
    assert "nbd://images/debian (1.0 GiB, nbd)" in text and "base: released" in text


def test_info_of_a_disk_that_has_failed() -> None:
    """When, why, and whose flush it was; nothing of it where nothing has failed."""
    found = _info()
    assert not any("failed" in line for line in info.describe_info(found))
    failed = replace(
        found, failed=True, failed_errno=errno.EIO, failed_reason="Input/output error", failed_seconds=0.5, failed_source=found.volume
    )
    (line,) = [line for line in info.describe_info(failed) if "failed" in line]
    assert "Input/output error" in line and "00.500" in line and found.volume not in line
    (line,) = [line for line in info.describe_info(replace(failed, failed_source="file:/other")) if "failed" in line]
    assert "of file:/other" in line


def _info() -> fvd.Info:
    sizes = {"virtual_size": GIB, "mapped_bytes": 0, "present_bytes": 0, "storage_size": GIB, "metadata_size": MIB, "max_storage_size": GIB}
    more = {"free_bytes": 0, "low_water_bytes": 0, "block_size": 65536, "chunk_size": MIB, "journal_size": MIB, "grow_step": GIB}
    words = {"volume": "vg0/vm1", "uuid": "u", "layout": "compact", "placement": "append", "base": None}
    return fvd.Info(**sizes, **more, **words, can_grow=True, clean=True, created_seconds=0)  # type: ignore[arg-type]


def test_an_event_of_the_base_for_people() -> None:
    event = fvd.Event("prefetch_progress", "vg0/vm1", 7, 0.0, 10 * GIB, 5 * GIB, copied_bytes=GIB, total_bytes=4 * GIB, eta_seconds=75.0)
    assert events.describe_event(event).partition("  ")[2] == (
        "vg0/vm1  prefetch progress: storage 10.0 GiB, 5.0 GiB free; 1.0 GiB of 4.0 GiB copied; 1 min 15 s left"
    )


def test_a_profile_is_drawn() -> None:
    found = fvd.Profile("/srv/p", 100 * MIB, 21 * MIB, [(0, 10 * MIB), (5 * MIB, 10 * MIB), (99 * MIB, MIB)])
    head, amounts, strip, *_ = profile.draw(found, 104)
    assert head == "/srv/p"
    assert amounts == "  3 reads, 21.0 MiB, of a base of 100 MiB (21.0 %); one mark is 1.0 MiB"
    assert strip == "  " + "█" * 15 + "·" * 84 + "█"  # what is read twice is no darker
    assert profile.merged([]) == []


# --- Following -----------------------------------------------------------------------------------------------------------------


def test_follow_ends_when_nothing_more_happens() -> None:
    answers = [RUNNING, replace(RUNNING, state="full"), replace(RUNNING, state="base-lost"), DONE]
    shown: list[fvd.PrefetchStatus] = []
    slept: list[float] = []
    waiting = iter(answers)
    assert prefetch.follow(lambda: next(waiting), shown.append, slept.append) == DONE
    assert shown == answers
    assert slept == [prefetch.POLL_SECONDS] * 3
    stopped = replace(RUNNING, state="off")
    assert prefetch.follow(lambda: stopped, shown.append, slept.append) == stopped


def test_lines_tell_what_is_new() -> None:
    told: list[str] = []
    lines = prefetch.Lines(lambda status: told.append(f"{status.state} {status.copied_bytes // MIB}"))
    status = replace(RUNNING, base_bytes=100 * MIB)
    for copied in (0, 1, 4, 5, 6):
        lines(replace(status, copied_bytes=copied * MIB))
    paused = replace(status, copied_bytes=6 * MIB, state="paused")
    lines(paused)
    assert told == ["running 0", "running 5", "paused 6"]
    for _ in range(prefetch.LINE_POLLS):
        lines(paused)
    assert told[3:] == ["paused 6"]  # a sign of life


def test_following_what_is_off(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 0 means: the base is not needed any more."""
    status = replace(RUNNING, state="off", reason="stopped")
    monkeypatch.setattr(fvd, "prefetch_status", lambda volume: status)
    with pytest.raises(
        fvd.FvdError, match=r"prefetching is off \(stopped\) with 6\.0 GiB still to copy; fvd-lv prefetch start x resumes it"
    ):
        prefetch.run(build_parser().parse_args(["prefetch", "status", "x", "--follow"]))
    assert capsys.readouterr().out.startswith("vg0/vm1: 40.0 % of 10.0 GiB; off, stopped")
    status = replace(DONE, state="off", base_bytes=0, copied_bytes=0)
    assert prefetch.run(build_parser().parse_args(["prefetch", "status", "x", "--wait"])) == 0


def test_following_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    waiting = iter([RUNNING, DONE])
    monkeypatch.setattr(fvd, "prefetch_status", lambda volume: next(waiting))
    monkeypatch.setattr(prefetch, "is_terminal", lambda: True)
    monkeypatch.setattr(prefetch, "POLL_SECONDS", 0.0)
    assert prefetch.run(build_parser().parse_args(["prefetch", "status", "x", "--follow"])) == 0
    bar, full, cleared = capsys.readouterr().out.split("\r")[1:]
    assert "2 min 3 s left" in bar and bar.endswith("\x1b[K")
    assert "100 %" in full
    assert cleared.startswith("\x1b[Kvg0/vm1: prefetching: done\n")


def test_following_in_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    waiting = iter([RUNNING, DONE])
    monkeypatch.setattr(fvd, "prefetch_status", lambda volume: next(waiting))
    monkeypatch.setattr(prefetch, "POLL_SECONDS", 0.0)
    arguments = argparse.Namespace(**vars(build_parser().parse_args(["prefetch", "status", "x", "--follow", "--output", "json"])))
    assert prefetch.run(arguments) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["schema_version"], line["state"]) for line in lines] == [(1, "running"), (1, "done")]


# --- Words that mean nothing together ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["prefetch", "stop", "file:a", "--rate", "1M"], "--rate belongs to prefetch start"),
        (["prefetch", "start", "file:a", "--follow"], "--follow belongs to prefetch status"),
        (["prefetch", "status", "file:a", "--delay", "0"], "--delay belongs to prefetch start"),
        (["prefetch", "start", "file:a", "--delay", "-1"], "'-1' is not a time"),
        (["prefetch", "start", "file:a", "--delay", "nan"], "'nan' is not a time"),
        (["prefetch", "begin", "file:a"], "is none of"),
        (["copy-on-read", "file:a"], "is none of"),
        (["profile", "show", "p", "--file", "q"], "--file belongs to profile record"),
        (["serve", "file:a", "--socket", "s", "--prefetch-rate", "1M"], "--prefetch-rate belongs to --prefetch on"),
        (["serve", "file:a", "--socket", "s", "--prefetch", "off", "--profile", "p"], "--profile belongs to --prefetch on"),
        (["provision", "file:a", "--size", "1G", "--base", "b", "--base-format", "iso"], "is none of"),
    ],
)
def test_usage_errors(fvd_lv: FvdLv, words: list[str], text: str) -> None:
    done = fvd_lv(*words, code=2)
    assert text in done.err and done.out == ""


def test_what_serve_is_told_about_prefetching() -> None:
    def told(*words: str) -> fvd.PrefetchOptions | bool | None:
        return serve.prefetch_of(build_parser().parse_args(["serve", "file:a", "--socket", "s", *words]))

    assert told() is None
    assert told("--prefetch", "off") is False
    assert told("--prefetch", "on") == fvd.PrefetchOptions()
    options = ["--prefetch", "on", "--prefetch-delay", "0", "--prefetch-rate", "50M", "--profile", "p"]
    assert told(*options) == fvd.PrefetchOptions(0.0, 50 * MIB, "p")


# --- On disks ------------------------------------------------------------------------------------------------------------------


def test_a_disk_that_is_not_served(fvd_lv: FvdLv) -> None:
    words = (["prefetch", "start"], ["prefetch", "stop"], ["prefetch", "status"], ["copy-on-read", "on"], ["profile", "record"])
    for before in words:
        assert "does not exist" in fvd_lv(*before, "file:a", code=3).err
    fvd_lv("provision", "file:a", "--size", "64M")
    for before in words:
        done = fvd_lv(*before, "file:a", code=3)
        assert "is not served; run fvd-lv serve" in done.err and done.out == ""
    assert "is not served" in fvd_lv("profile", "record", "file:a", "--seconds", "600", code=3).err  # at once
    assert fvd_lv("prefetch", "status", "file:a", "--output", "json", code=3).json["error"]["kind"] == "not_found"


def test_a_disk_without_a_base(fvd_lv: FvdLv, serving: Serving) -> None:
    fvd_lv("provision", "file:a", "--size", "64M")
    with serving("file:a"):
        assert fvd_lv("prefetch", "status", "file:a", "--output", "json").json["state"] == "off"
        assert "the disk has no base" in fvd_lv("prefetch", "status", "file:a", "--follow").out
        assert fvd_lv("prefetch", "stop", "file:a").code == 0
        assert "copy-on-read is off" in fvd_lv("copy-on-read", "off", "file:a").out
        for words in (["prefetch", "start"], ["copy-on-read", "on"], ["profile", "record"]):
            assert "has no base" in fvd_lv(*words, "file:a", code=2).err
        answer = fvd_lv("info", "file:a", "--output", "json").json
        assert (answer["prefetch"], answer["copy_on_read"], answer["base_released"]) == (None, False, False)


def test_show_a_profile(fvd_lv: FvdLv, workdir: Path) -> None:
    (workdir / "p").write_text('{"fvd_profile": 1, "base_size_bytes": 1048576}\n[0, 4096]\n')
    assert "1 reads, 4.0 KiB, of a base of 1.0 MiB" in fvd_lv("profile", "show", "p").out
    assert fvd_lv("profile", "show", "p", "--output", "json").json["extents"] == [[0, 4096]]
    assert fvd_lv("profile", "show", "absent", code=3).out == ""
    (workdir / "p").write_text("rubbish\n")
    assert "record it again" in fvd_lv("profile", "show", "p", code=7).err


def test_a_disk_leaves_its_base(fvd_lv: FvdLv, serving: Serving, workdir: Path) -> None:
    """Provisioned over a base, served, read, prefetched to the end; then the base is gone, and nobody notices."""
    nbd = pytest.importorskip("nbd", reason="python3-libnbd is not installed")
    content = os.urandom(9 * MIB + 512)
    (workdir / "base.raw").write_bytes(content)
    fvd_lv("provision", "file:a", "--size", "32M", "--base", "base.raw", "--base-format", "raw", "--copy-on-read", "on")
    answer = fvd_lv("info", "file:a", "--output", "json").json
    assert (answer["copy_on_read"], answer["prefetch_default"], answer["base_released"]) == (True, False, False)

    with serving("file:a") as server:
        handle = nbd.NBD()
        handle.connect_uri(server.uri)
        assert handle.pread(MIB, 4 * MIB) == content[4 * MIB : 5 * MIB]
        saved = fvd_lv("profile", "record", "file:a", "--output", "json").json
        assert saved["path"] == str(workdir / "base.raw.fvd-profile") and saved["extents"] >= 1
        assert "of a base of 9.0 MiB" in fvd_lv("profile", "show", saved["path"]).out
        status = fvd_lv("prefetch", "status", "file:a", "--output", "json").json
        assert (status["state"], status["base_bytes"], status["copy_on_read"]) == ("off", len(content), True)
        assert "copy-on-read is off" in fvd_lv("copy-on-read", "off", "file:a").out
        assert "copy-on-read is on" in fvd_lv("copy-on-read", "on", "file:a").out
        fvd_lv("prefetch", "status", "file:a", "--wait", code=1)
        fvd_lv("prefetch", "start", "file:a")
        lines = fvd_lv("prefetch", "status", "file:a", "--follow", "--output", "json").out.splitlines()
        assert json.loads(lines[-1])["state"] == "done"
        until = time.monotonic() + 60
        while not fvd_lv("info", "file:a", "--output", "json").json["base_released"]:
            assert time.monotonic() < until, "everything is copied, and the base is not released"
            time.sleep(0.5)
        assert "base: released" in fvd_lv("prefetch", "status", "file:a").out
        told = fvd_lv("events", "file:a", "--history", "--count", "2").out.splitlines()
        assert [json.loads(line)["kind"] for line in told] == ["served", "prefetch_started"]
        server.terminate()

    (workdir / "base.raw").unlink()
    assert fvd_lv("info", "file:a", "--output", "json").json["base_released"]
    assert "base: released" in fvd_lv("info", "file:a").out
    with serving("file:a", "--prefetch", "on", "--prefetch-delay", "0") as server:
        handle = nbd.NBD()
        handle.connect_uri(server.uri)
        assert handle.pread(len(content), 0) == content
        assert fvd_lv("prefetch", "status", "file:a", "--wait", "--output", "json").json["state"] == "done"
        assert fvd_lv("prefetch", "start", "file:a").code == 0
        server.terminate()
