# SPDX-License-Identifier: Apache-2.0
"""The parts of the command line that need no disk: argument types, errors, drawing, progress, notify."""

from __future__ import annotations

import argparse
import errno
import os
import socket
import stat
from pathlib import Path

import pytest

from fvd import Extent, Map
from fvd.cli import failure, map_volume, notify, options, output, progress
from fvd.errors import Conflict, FvdError, InUse, NotFound

pytestmark = pytest.mark.pure

GIB = 1 << 30
MIB = 1 << 20


# --- Arguments -----------------------------------------------------------------------------------------------------------------


def test_sizes() -> None:
    assert options.size("1.5G") == 3 * GIB // 2
    with pytest.raises(argparse.ArgumentTypeError, match="'many' is not a size"):
        options.size("many")


def test_modes() -> None:
    assert options.mode("0660") == stat.S_IRUSR | stat.S_IWUSR | stat.S_IRGRP | stat.S_IWGRP
    for wrong in ("u+w", "1777", "888", "-1", ""):
        with pytest.raises(argparse.ArgumentTypeError):
            options.mode(wrong)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("localhost:10809", ("localhost", 10809)), (":0", ("127.0.0.1", 0)), ("[::1]:10809", ("::1", 10809)), ("0.0.0.0:1", ("0.0.0.0", 1))],
)
def test_host_and_port(text: str, expected: tuple[str, int]) -> None:
    assert options.host_and_port(text) == expected


@pytest.mark.parametrize("text", ["localhost", "localhost:", "localhost:nbd", "localhost:65536", "::1:10809", "x:٣", ""])
def test_wrong_host_and_port(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        options.host_and_port(text)


# --- Errors --------------------------------------------------------------------------------------------------------------------


def test_an_error_names_its_volume_once() -> None:
    assert failure.error_line(InUse("somebody has it; wait"), "file:a") == "fvd-lv: file:a: somebody has it; wait"
    assert failure.error_line(InUse("file:a: somebody has it; wait"), "file:a") == "fvd-lv: file:a: somebody has it; wait"
    assert failure.error_line(NotFound("/x/a does not exist; check the name"), "file:/x/a") == "fvd-lv: /x/a does not exist; check the name"


def test_an_error_is_one_line() -> None:
    assert "\n" not in failure.error_line(Conflict("a\n  b"), None)
    assert failure.error_line(OSError(errno.ENOENT, "No such file", "/x"), None) == "fvd-lv: /x: No such file"
    assert "please report" in failure.error_line(ZeroDivisionError("x"), None)


def test_an_error_object() -> None:
    assert failure.error_object(Conflict("differs"), "file:a") == {
        "kind": "conflict",
        "message": "differs",
        "exit_code": 4,
        "volume": "file:a",
    }
    assert failure.error_object(KeyboardInterrupt(), None)["exit_code"] == 130
    assert failure.error_object(ValueError(), None)["exit_code"] == FvdError.exit_code


def test_exit_codes_are_distinct() -> None:
    errors = failure._subclasses(FvdError)
    stated = {error.exit_code for error in errors if "exit_code" in vars(error)}
    assert len(stated) == len([error for error in errors if "exit_code" in vars(error)])
    assert failure.EXIT_INTERRUPTED not in stated


# --- Output --------------------------------------------------------------------------------------------------------------------


def test_shares() -> None:
    assert [output.share(part, 1000_000) for part in (0, 1, 1000, 500_000, 1000_000)] == ["0 %", "< 0.1 %", "0.1 %", "50.0 %", "100.0 %"]
    assert output.share(0, 0) == "0 %"


def test_columns() -> None:
    assert output.columns([("a", "1"), ("bbb", "22")], right=[1]) == ["a     1", "bbb  22"]
    assert output.columns([]) == []


def example_map() -> Map:
    extents = [
        Extent(0, 10 * GIB, "base", None),
        Extent(10 * GIB, 10 * GIB, "data", 20 * MIB),
        Extent(20 * GIB, 79 * GIB, "zero", None),
        Extent(99 * GIB, MIB, "data", 20 * MIB + 10 * GIB),
        Extent(99 * GIB + MIB, GIB - MIB, "zero", None),
    ]
    return Map("file:a", 0, 100 * GIB, MIB, 20 * MIB, 15 * GIB, extents)


def test_a_map_is_drawn() -> None:
    lines = map_volume.draw(example_map(), 104)
    assert lines[2] == "  " + "·" * 10 + "█" * 10 + "·" * 79 + "░"
    assert lines[3] == "  " + "         ".join("0123456789")
    # 10 of 15 GiB, from the second tenth of the disk; at its end one chunk of the last tenth.
    assert lines[6] == "  " + "1" * 66 + "+" + "·" * 33
    assert all(len(line) <= 104 for line in lines)


def test_a_map_of_an_empty_disk_is_drawn() -> None:
    lines = map_volume.draw(Map("file:a", 0, 4096, MIB, 20 * MIB, 21 * MIB, [Extent(0, 4096, "zero", None)]), 10)
    assert lines[2] == "  " + "·" * 20


def test_a_map_as_a_table() -> None:
    assert map_volume.table(example_map())[:3] == [
        "       start       length  state  storage offset",
        "           0  10737418240  base                -",
        " 10737418240  10737418240  data         20971520",
    ]


def test_fill_counts_parts_of_cells() -> None:
    assert map_volume.fill([(0, 25), (50, 50)], 100, 2) == [0.5, 1.0]


def test_progress_bar() -> None:
    assert progress.bar("checking", GIB, 4 * GIB, 3.0, 80) == (
        "checking [#######........................]  25 %  1.0 GiB of 4.0 GiB, 9 s left"
    )
    for width in (1, 10, 40, 200):
        assert len(progress.bar("checking", 1, 3, 1.0, width)) <= width
    assert "100 %" in progress.bar("x", 0, 0, 0.0, 80)


def test_no_progress_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Progress("x") as bar:
        for done in range(100):
            bar(done, 100)
    assert capsys.readouterr().err == ""


# --- systemd -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("abstract", [False, True])
def test_notify(abstract: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"fvd-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.settimeout(10)
        receiver.bind(f"\0{name}" if abstract else name)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}" if abstract else name)
        assert notify.notify("READY=1")
        assert receiver.recv(100) == b"READY=1"


def test_notify_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not notify.notify("READY=1")
    for broken in (str(tmp_path / "absent"), "relative", "@nobody-listens-here", ""):
        monkeypatch.setenv("NOTIFY_SOCKET", broken)
        assert not notify.notify("READY=1")
