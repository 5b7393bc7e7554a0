# SPDX-License-Identifier: Apache-2.0
"""``fvd-lv torture`` as people run it: worlds, one world again, scripts, other servers, wrong words, Ctrl-C."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from fvd_commands import COMMAND, Done, Server

from fvd.cli.main import main
from fvd.sim import torture as torture_module
from fvd.sim.torture import FailedWorld, Tally

pytestmark = pytest.mark.release_only


def test_worlds(fvd_lv: Callable[..., Done]) -> None:
    done = fvd_lv("torture", "--seed", "1", "--worlds", "30", "--jobs", "2", "--output", "json").json
    assert done["worlds"] == 30 and done["requests"] > 1000 and done["found"] == []
    assert "nothing found" in fvd_lv("torture", "--seed", "1", "--worlds", "4", "--bytes").out


def test_the_installed_command() -> None:
    """Its worker processes import the script that it is; as `python -m` they would import another."""
    command = Path(sys.executable).parent / "fvd-lv"
    done = subprocess.run([command, "torture", "--seed", "1", "--worlds", "30", "--jobs", "2"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "30 worlds" in done.stdout


def test_one_world_again(fvd_lv: Callable[..., Done]) -> None:
    first = fvd_lv("torture", "--seed", "7", "--trace").out
    assert first == fvd_lv("torture", "--seed", "7", "--trace").out
    assert "round 0" in first and "submit 1: " in first
    some = fvd_lv("torture", "--seed", "7", "--only", "0:0-4", "--output", "json").json
    assert 0 < some["requests"] <= 5 + 1  # and perhaps a close


def test_a_failure_says_how_to_see_it_again(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tally = Tally(first_seed=40, worlds=3, found=[FailedWorld(42, "Violation: sector 1: a read showed zeros")])
    monkeypatch.setattr(torture_module, "torture", lambda *_, **__: tally)
    assert main(["torture"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "seed 42: Violation: sector 1: a read showed zeros",
        "  again: fvd-lv torture --seed 42 --worlds 1",
        "  smaller: fvd-lv torture --seed 42 --shrink",
    ]
    assert main(["torture", "--bytes", "--output", "json"]) == 1
    assert json.loads(capsys.readouterr().out)["found"][0]["seed"] == 42


def test_scripts(fvd_lv: Callable[..., Done], workdir: Path) -> None:
    assert "> crash" in fvd_lv("torture", "--script", "three-writes").out
    (workdir / "mine.fvd").write_text("a: write 0 8\nrun\nexpect sectors 0 8 zeros\n")
    said = fvd_lv("torture", "--script", "mine.fvd", code=1)
    assert "mine.fvd:3" in said.err


def test_another_server(fvd_lv: Callable[..., Done], serving: Callable[..., AbstractContextManager[Server]]) -> None:
    pytest.importorskip("nbd", reason="python3-libnbd is not installed")
    fvd_lv("provision", "file:a", "--size", "16M")
    with serving("file:a") as server:
        assert "nothing found" in fvd_lv("torture", "--nbd", server.uri, "--requests", "500").out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--shrink"], "give its --seed"),
        (["--seed", "7", "--shrink"], "nothing to shrink"),
        (["--seed", "7", "--only", "x"], "does not name requests"),
        (["--console", "--nbd", "nbd://x"], "exclude each other"),
        (["--gentle"], "require --qemu"),
        (["--jobs", "0"], "must be above 0"),
        (["--seed", "-1"], "a seed is between"),
        (["--script", "nothere"], "name a file, or one of"),
        (["--console", "--disk", "size"], "write NAME=VALUE"),
    ],
)
def test_wrong_words(fvd_lv: Callable[..., Done], words: list[str], says: str) -> None:
    assert says in fvd_lv("torture", *words, code=2).err


def test_ctrl_c_is_an_end(workdir: Path) -> None:
    process = subprocess.Popen([*COMMAND, "torture", "--jobs", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not children.read_text():  # its workers: it plays
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    if "nothing played" in out:  # it was that early
        assert process.returncode == 1 and "nothing was played" in err
    else:
        assert process.returncode == 0, err
        assert "nothing found" in out and err == ""
