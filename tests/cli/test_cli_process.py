# SPDX-License-Identifier: Apache-2.0
"""The command as a process: closed and full streams, Ctrl-C at any moment, memory that is refused. One clear line, or silence."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fvd_commands import COMMAND

from fvd.format.geometry import Geometry
from fvd.units import TIB, format_size
from fvd.volume.memory import memory_bytes

pytestmark = pytest.mark.pure

# As scripts/setup installs it: SIGINT is held back until the command's own first line.
INSTALLED = ["env", "--block-signal=INT", sys.executable, "-c", "import sys; from fvd_lv import main; sys.exit(main())"]


@pytest.fixture
def disk(workdir: Path) -> str:
    run("provision file:vm1.img --size 1G")
    return "file:vm1.img"


def run(words: str, *, code: int = 0) -> str:
    """What a shell's command line says on stderr."""
    command = " ".join([*COMMAND, words])
    done = subprocess.run(["bash", "-c", command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    assert done.returncode == code, (words, done.returncode, done.stderr)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    return done.stderr


@pytest.mark.parametrize("words", ["--help", "--version", "info file:vm1.img", "info file:vm1.img --output json", "check file:vm1.img"])
def test_output_that_cannot_be_written_is_one_line(disk: str, words: str) -> None:
    assert run(f"{words} >&-", code=1) == "fvd-lv: standard output cannot be written: Bad file descriptor\n"
    assert run(f"{words} >/dev/full", code=1) == "fvd-lv: standard output cannot be written: No space left on device\n"


def test_an_error_is_told_where_the_output_cannot_be(disk: str) -> None:
    for stream in (">&-", ">/dev/full"):
        assert "nothing.img does not exist" in run(f"info file:nothing.img --output json {stream}", code=3)
        assert "vm2.img" in run(f"serve file:vm2.img --socket vm.sock {stream}", code=3)


def test_a_server_that_cannot_say_where_it_is_ends_cleanly(disk: str) -> None:
    for stream in (">&-", ">/dev/full"):
        assert "standard output cannot be written" in run(f"serve {disk} --socket vm.sock {stream}", code=1)
        assert not Path("vm.sock").exists()
    assert "clean" in subprocess.run([*COMMAND, "check", disk], capture_output=True, text=True, check=True).stdout


def test_closed_streams_keep_the_exit_code(disk: str) -> None:
    for streams in ("2>&-", "2>/dev/full", "<&- >&- 2>&-"):
        assert run(f"info file:nothing.img {streams}", code=3) == ""
    assert run(f"info {disk} <&-") == ""
    assert run("torture --console --disk size=1M <&-") == ""


def test_a_reader_that_leaves_is_no_error(disk: str) -> None:
    words = "torture --script three-writes"
    ended = subprocess.run(
        ["bash", "-c", f"set -o pipefail; ({' '.join(COMMAND)} {words}) | true"], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.stderr == "" and ended.returncode in (0, 141)


# --- Ctrl-C --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["provision", "file:vm2.img", "--size", "4T"], ["torture", "--seconds", "5"]])
def test_an_interrupt_at_any_moment_has_no_traceback(disk: str, words: list[str]) -> None:
    """Each next one comes later, until the command ends before it."""
    codes = []
    for round_ in range(10):
        process = subprocess.Popen([*INSTALLED, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        time.sleep(round_ * 0.06)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        unplayed = process.returncode == 1 and "nothing was played" in err  # torture, which ends well and has nothing to tell yet
        assert process.returncode in (-signal.SIGINT, 130, 0) or unplayed, err
        assert "Traceback" not in err and "Exception ignored" not in err, (round_, err)
        assert err.count("\n") <= 1
        codes.append(process.returncode)
    assert codes[0] == -signal.SIGINT


def test_a_command_that_was_begun_without_interrupts_has_none(disk: str) -> None:
    command = f"trap '' INT; {' '.join(COMMAND)} info {disk} >/dev/null; echo $?"
    process = subprocess.Popen(["bash", "-c", command], stdout=subprocess.PIPE, process_group=0)
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=60)[0] == b"0\n"


# --- Memory --------------------------------------------------------------------------------------------------------------------


def test_memory_that_is_refused_is_one_line_with_what_the_disk_needs(workdir: Path) -> None:
    run("provision file:huge.img --size 20T")
    needed = format_size(memory_bytes(Geometry(20 * TIB)))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (240 << 20, 240 << 20))

    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    for words in (["check"], ["serve", "--socket", "vm.sock"]):
        ended = subprocess.run(
            [*COMMAND, words[0], "file:huge.img", *words[1:]],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            preexec_fn=limit,
            env=environment,
        )
        assert ended.returncode == 1
        assert ended.stderr.count("\n") == 1, ended.stderr
        assert f"not enough memory: the maps and the journal of this disk of 20.0 TiB take {needed}" in ended.stderr
