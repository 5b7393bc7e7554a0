# SPDX-License-Identifier: Apache-2.0
"""``fvd-lv events``: lines as they come, in both forms, from servers that begin, end and are killed; how it ends itself."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from fvd_commands import COMMAND, Done, Server

import fvd
from fvd.cli.events import describe_event

pytestmark = pytest.mark.pure

FvdLv = Callable[..., Done]
Serving = Callable[..., AbstractContextManager[Server]]


class Listening:
    """A running ``fvd-lv events``."""

    def __init__(self, *words: str) -> None:
        self.process = subprocess.Popen([*COMMAND, "events", *words], stdout=-1, stderr=-1, text=True)

    def line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate()
        return line

    def event(self) -> dict[str, Any]:
        found = json.loads(self.line())
        assert found.pop("schema_version") == 1
        assert isinstance(found, dict)
        return found

    def waiting_for(self) -> str:
        """The note on stderr, after which it listens."""
        assert self.process.stderr is not None
        return self.process.stderr.readline()

    def ended(self) -> tuple[int, str, str]:
        out, said = self.process.communicate(timeout=60)
        return self.process.returncode, out, said


@contextlib.contextmanager
def listening(*words: str) -> Iterator[Listening]:
    listener = Listening(*words)
    try:
        yield listener
    finally:
        listener.process.kill()
        listener.process.communicate()


@pytest.fixture
def disk(fvd_lv: FvdLv) -> str:
    fvd_lv("provision", "file:a", "--size", "256M", "--grow-step", "16M", "--journal-size", "1M")
    return "file:a"


def test_a_disk_from_before_it_is_served_until_it_is_killed(disk: str, serving: Serving, fvd_lv: FvdLv, workdir: Path) -> None:
    with listening(disk) as listener:
        assert listener.waiting_for() == f"fvd-lv: note: file:{workdir / 'a'} is not served; waiting for it\n"
        with serving(disk) as server:
            served = listener.event()
            assert (served["kind"], served["volume"], served["number"]) == ("served", f"file:{workdir / 'a'}", 1)
            assert served["message"] == server.uri
            fvd_lv("extend", disk)
            assert [listener.event()["kind"] for _ in range(2)] == ["extend_started", "extend_done"]
            server.kill()
        assert listener.event()["kind"] == "server_gone"
        with serving(disk) as server:
            assert listener.event()["kind"] == "served"
            server.terminate()
        assert listener.event()["kind"] == "closed"


def test_history_count_and_text(disk: str, serving: Serving, fvd_lv: FvdLv, workdir: Path) -> None:
    with serving(disk):
        fvd_lv("extend", disk)
        lines = [json.loads(line) for line in fvd_lv("events", "--history", "--count", "3").out.splitlines()]
        assert [line["kind"] for line in lines] == ["served", "extend_started", "extend_done"]
        assert set(lines[0]) == {"schema_version", *fvd.Event.__dataclass_fields__}
        for words in (["events", disk, "--output", "text"], ["--output", "text", "events"]):
            text = fvd_lv(*words, "--history", "--count", "3").out.splitlines()
            assert f"file:{workdir / 'a'}  extend done: storage 32.0 MiB, " in text[2]
        assert fvd_lv("--output", "json", "events", disk, "--history", "--count", "1").json["kind"] == "served"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it(disk: str, number: signal.Signals) -> None:
    with listening(disk) as listener:
        listener.waiting_for()
        listener.process.send_signal(number)
        assert listener.ended() == (0, "", "")


def test_it_ends_when_its_reader_goes(disk: str) -> None:
    """Without an event: it may be long until there is one."""
    with listening(disk) as listener:
        listener.waiting_for()
        assert listener.process.stdout is not None
        listener.process.stdout.close()
        assert listener.process.wait(60) == 141
        assert listener.process.stderr is not None
        assert listener.process.stderr.read() == ""


def test_wrong_words(fvd_lv: FvdLv, workdir: Path) -> None:
    assert "number of events" in fvd_lv("events", "--count", "0", code=2).err
    assert fvd_lv("events", "nonsense", code=2).out == ""


def test_a_line_for_people() -> None:
    event = fvd.Event("extend_done", "vg0/vm1", 7, 0.0, 10 << 30, 5 << 30, 10 << 30, 0.35, 0.012, "vg0", 3 << 30, "odd\nbut true", 2)
    assert describe_event(event).partition("  ")[2] == (
        "vg0/vm1  extend done: storage 10.0 GiB, 5.0 GiB free; 0.350 s; the device was suspended for 12 ms; 3.0 GiB left in vg0; "
        "odd but true; 2 events before this one were lost"
    )
