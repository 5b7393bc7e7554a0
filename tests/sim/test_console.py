# SPDX-License-Identifier: Apache-2.0
"""The console: scripts that come with fvd, what commands do and refuse, what drawings show, and a session on a real terminal."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fvd.sim._oracle import Violation
from fvd.sim._rng import Rng
from fvd.sim.console import COMMANDS, OPTIONS, BadCommand, Console, ScriptError, Unexpected, find_script, run_script, shipped_scripts

SESSION_SECONDS = 60


def play(*lines: str, **options: str) -> Console:
    console = Console(options)
    for line in lines:
        console.run_line(line)
    return console


def text(console: Console, line: str) -> str:
    return "\n".join(console.run_line(line))


# --- scripts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", shipped_scripts())
def test_shipped_script(script: str) -> None:
    output = run_script(script).output
    assert sum(line.startswith("> expect ") for line in output) >= 5
    assert output[0].startswith("# "), "a script begins by saying what it shows"


@pytest.mark.parametrize("script", shipped_scripts())
def test_every_expectation_of_a_shipped_script_can_fail(script: str) -> None:
    """Each is turned into one that is wrong, by itself: a script that would pass whatever happens is no test."""
    name, content = find_script(script)
    lines = content.splitlines()
    opposite = {"done": "lost", "waiting": "done", "lost": "done", "failed": "done"}
    tried = 0
    for index, line in enumerate(lines):
        words = line.split()
        if not words or words[0] != "expect" or words[1] == "error":
            continue
        if words[1] in opposite:
            words = ["expect", opposite[words[1]], words[2]]
        elif words[1] == "sectors":
            words[-1] = "base"  # none of these disks has one
        else:
            words[-1] = str(int(words[-1]) + 1)
        with pytest.raises(ScriptError, match=rf"{name}:{index + 1}: expect "):
            Console().play(name, "\n".join([*lines[:index], " ".join(words)]))
        tried += 1
    assert tried


def test_a_wrong_script_fails_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "wrong.fvd"
    path.write_text("# two lines of preparation\na: write 0 8\n\nexpect done a\n")
    with pytest.raises(ScriptError, match=rf"{path}:4: expect done a: a is not done, but waiting") as caught:
        run_script(str(path))
    assert isinstance(caught.value.__cause__, Unexpected)
    path.write_text("a: write 0 8\nb: wirte 0 8\n")
    with pytest.raises(ScriptError, match=rf"{path}:2: b: wirte 0 8: there is no command 'wirte'"):
        run_script(str(path))


def test_a_script_that_is_not_there() -> None:
    with pytest.raises(BadCommand, match=r"no-such-script: No such file or directory; name a file, or one of .*three-writes"):
        run_script("no-such-script")


def test_a_script_runs_on_the_disk_that_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "base.fvd"
    path.write_text("expect sectors 0 8 base\nexpect sectors 8 8 zeros\na: write 0 1\nrun\nexpect sectors 0 8 base|a\nreopen\ncheck\n")
    run_script(str(path), {"base": "4K", "layout": "raw"})
    with pytest.raises(ScriptError):
        run_script(str(path))


def test_a_violation_names_the_line_and_ends_the_disk() -> None:
    console = play("a: write 0 8", "run", "f: flush", "run")
    geometry = console.bench.stage.geometry
    console.bench.stage.image[geometry.data_offset_bytes + 600] ^= 1
    with pytest.raises(Violation, match=r"hurt\.fvd:2: run: sector 1: a read showed a mixture"):
        console.play("hurt.fvd", "read 0 8\nrun")
    with pytest.raises(BadCommand, match=r"the disk is broken .*'undo'"):
        console.run_line("flush")
    assert "a mixture" in text(console, "show")
    console.run_line("undo")  # the harm was done behind the console's back: what it plays again is whole
    console.run_line("check")
    assert console.lines[-1] == "check"


# --- names and events ---------------------------------------------------------------------------------------------------


def test_operations_know_what_they_serve() -> None:
    console = play("a: write 0 8", "b: write 64 8", "c: write 130 4")
    table = text(console, "pending")
    assert "1  write  sectors 0-127" in table
    assert [[request.name for request in tracked.serves] for tracked in console.bench.pending] == [["a"], ["c"]]
    output = text(console, "finish a")
    assert "write sectors 64-71 for b" in output or "write sectors 0-127 for b" in output  # b waited for the block that a wrote
    console.run_line("finish b c")
    console.run_line("expect done a b c")
    output = text(console, "f: flush") + text(console, "finish f")
    assert "flush for f" in output and "journal page 2 for f" in output and output.endswith("f: done")
    assert play("write 0 8", "flush").bench.requests.keys() == {"write1", "flush2"}


def test_what_is_held_does_not_move() -> None:
    console = play("a: write 0 8", "b: write 128 8", "hold a", "run", "expect done b", "expect waiting a", "step 5", "expect waiting a")
    assert "submitted, held" in text(console, "pending")
    assert text(console, "step") == "nothing can move: the rest is held"
    with pytest.raises(BadCommand, match="is held, and a close waits for it"):
        console.run_line("reopen")
    for line in ("release a", "step 2", "expect done a"):
        console.run_line(line)


def test_faults() -> None:
    console = play("a: write 0 8", "fail a", "expect pending a 1", **{"on-full": "error"})
    assert "submitted, will fail with EIO" in text(console, "pending")
    for line in ("run", "expect failed a", "expect failed a EIO", "expect sectors 0 8 zeros", "b: write 0 8", "process b", "fail b ENOSPC"):
        console.run_line(line)
    # One that took effect says that it failed: the block is written, and no map may name it.
    for line in ("complete b", "expect failed b ENOSPC", "expect sectors 0 128 zeros", "check", "crash", "check"):
        console.run_line(line)


def test_storage_that_ends_and_grows() -> None:
    console = play("a: write 0 8", "b: write 512 8", "run", "expect done a", "expect waiting b", storage="1")
    assert console.run_line("grow")[-1] == "  2 write sectors 512-639 for b"
    for line in ("run", "expect done b", "c: write 1024 8", "exhausted on", "expect waiting c", "reopen", "expect failed c ESHUTDOWN"):
        console.run_line(line)
    console = play(
        "a: write 0 8", "run", "exhausted on", "b: write 512 8", "run", "expect failed b ENOSPC", storage="1", **{"on-full": "error"}
    )
    console.run_line("check")


def test_a_commit_comes_with_time() -> None:
    play("a: write 0 8", "run", "expect pending 0", "clock 10", "run", "expect statistics commits 1", "crash drop", "expect sectors 0 8 a")


def test_close_by_hand() -> None:
    console = play("a: write 0 8", "run", "c: close", "expect waiting c")
    with pytest.raises(BadCommand, match="the disk is closed; 'reopen' opens it"):
        console.run_line("read 0 8")
    for line in ("run", "expect done c", "reopen", "expect sectors 0 8 a", "b: write 0 8", "run", "check"):
        console.run_line(line)


# --- time ---------------------------------------------------------------------------------------------------------------


def test_undo_and_back() -> None:
    console = play("a: write 0 8", "mark", "run", "crash", "undo", "expect done a", "undo", "expect waiting a")
    assert console.lines == ["a: write 0 8"]
    for _ in range(2):
        for line in ("finish a", "crash drop", "expect sectors 0 8 zeros", "back", "expect waiting a"):
            console.run_line(line)
    console.run_line("undo 1")
    console.run_line("back")
    assert not console.lines
    with pytest.raises(BadCommand, match="there are 0 commands"):
        console.run_line("undo")
    console.run_line("again")
    with pytest.raises(BadCommand, match="no moment is marked"):
        console.run_line("back")


def random_line(rng: Rng, sectors: int) -> str:
    first = rng.randint(0, sectors - 1)
    place = f"{first} {rng.randint(1, min(sectors - first, 200))}"
    placed = [f"{kind} {place}" for kind in ("write", "write", "trim", "zero", "read")]
    ends = ["crash", "crash keep", "crash drop", "kill", "reopen"]
    return rng.choice([*placed, f"write {place} fua", "flush", "step 3", "step 9", "run", "process all", "grow", "clock 6", "check", *ends])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"base": "512K"},
        {"base": "300001", "layout": "raw"},
        {"base": "700K", "lbs": "4096", "storage": "1"},
        {"block": "4K", "chunk": "64K"},
    ],
    ids=str,
)
def test_drawings_and_twins_are_exact(options: dict[str, str]) -> None:
    """What is drawn is what a read shows; and the same lines lead to the same disk, to the byte."""
    for seed in range(6):
        rng = Rng(seed)
        console = Console(options)
        for _ in range(40):
            line = random_line(rng, console.bench.stage.shape.sectors)
            try:
                console.run_line(line)
            except BadCommand as error:
                assert line == "process all", error
        drawing = text(console, "show"), text(console, "pending"), text(console, "volatile"), text(console, "requests")
        assert not [words for words in ("mixture", "unknown", "foreign") if words in drawing[0]]
        twin = console.twin()
        assert drawing == (text(twin, "show"), text(twin, "pending"), text(twin, "volatile"), text(twin, "requests"))
        assert twin.bench.stage.image == console.bench.stage.image
        console.run_line("run")
        while console.bench.stage.in_flight:  # for want of storage
            console.run_line("grow")
            console.run_line("run")
        assert console.bench.visible() == console.bench.stage.read_all()


def test_dice_decide_steps() -> None:
    def order(seed: int) -> list[str]:
        console = play(*(f"write {128 * number} 8" for number in range(8)), f"seed {seed}")
        return console.run_line("step 16")

    assert order(1) == order(1)
    assert len({tuple(order(seed)) for seed in range(5)}) > 1
    assert order(1)[-1].endswith(": done")


# --- lines that are wrong -----------------------------------------------------------------------------------------------

WRONG = """
wirte 0 8
write
write 0
write zero 8
write 0 99999999999999999999
write 0 0
write 2048 1
write 0 8 no-hole
read 0 8 fua
flush 0 8
a: write 0 8
all: write 0 8
journal: write 0 8
x: pending
process
process nobody
process 99
process journal
process flush a 99
process b
complete a
persist a
persist b 8
persist b 5-99
persist f
persist
fail d
fail
hold d
step x
seed
seed -1
crash maybe
crash drop a
crash keep f
kill maybe
reopen now
check all
grow 1
exhausted
exhausted maybe
clock
clock soon
disk 1M
disk size=0
disk size=1G
disk size=lots
disk sise=1M
disk layout=thin
disk lbs=1024
disk block=3K
disk storage=-1
disk layout=raw storage=1
disk storage=99
back
undo x
undo 99
script nothing-of-that-name
pending nobody
expect
expect joy
expect done
expect done nobody
expect failed EIO
expect pending some
expect pending a b 1
expect sectors 0 8
expect sectors 0 8 nobody
expect sectors 0 8 f
expect sectors 2047 2 zeros
expect statistics luck 7
help me
""".strip().splitlines()


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_line_changes_nothing(line: str) -> None:
    # d has ended, b took effect, a and f are under way
    console = play("d: write 0 128", "finish d", "b: write 0 8", "process b", "a: write 128 8", "f: flush")
    before = text(console, "pending"), text(console, "requests"), text(console, "show"), list(console.lines), list(console.bench.log)
    with pytest.raises(BadCommand) as caught:
        console.run_line(line)
    assert len(str(caught.value)) > 15
    assert before == (text(console, "pending"), text(console, "requests"), text(console, "show"), console.lines, console.bench.log)
    assert not console.broken


def test_expect_error() -> None:
    console = play("expect error process a", "a: write 0 8", "expect error complete a")
    with pytest.raises(Unexpected, match="could be done"):
        console.run_line("expect error process a")


# --- looking, help, completion --------------------------------------------------------------------------------------------


def test_drawing() -> None:
    console = play("a: write 0 8", "run", "b: write 640 8", "process b", base="300K")
    shown = text(console, "show")
    assert "chunk 0  slot 0  [#bbb]" in shown
    assert (
        "  0-7       a\n  8-127     base\n  128-255   zeros\n  256-383   base\n  384-415   zeros\n  416-599   base\n  600-2047  zeros"
        in shown
    )
    assert "volatile: 256 blocks" in shown
    volatile = text(console, "volatile")
    assert "sectors 0-7" in volatile and "foreign" in volatile
    console.run_line("run")
    assert "chunk 1  slot 1  [b#..]" in text(console, "show")
    assert "allocations" in text(console, "statistics")
    assert "submit 1: write 0+8" in text(console, "log 99") and len(console.run_line("log 2")) == 2


def test_help() -> None:
    everything = text(Console(), "help")
    for name, command in COMMANDS.items():
        assert command.usage in everything
        assert text(Console(), f"help {name}").startswith(command.usage)
        assert command.meaning, name
    assert all(f"{name}=" in text(Console(), "help disk") for name in OPTIONS)
    assert "three-writes" in text(Console(), "help script")
    assert Console().run_line("  # nothing") == Console().run_line("") == []


def test_completion() -> None:
    console = play("alpha: write 0 8", "beta: write 128 8", "finish beta")
    assert console.completions("", "wr") == ["write "]
    assert console.completions("gamma: ", "tr") == ["trim "]
    assert console.completions("write 0 8 ", "") == ["fua "]
    assert console.completions("process ", "al") == ["all ", "alpha "]
    assert console.completions("process ", "b") == []  # beta has ended
    assert console.completions("persist ", "b") == ["beta "]  # and may persist still
    assert console.completions("process ", "1") == ["1 "]
    assert console.completions("fail alpha ", "E") == ["EIO ", "ENOSPC "]
    assert console.completions("crash ", "k") == ["keep "]
    assert console.completions("disk ", "la") == ["layout="]
    assert console.completions("disk layout=", "") == ["compact ", "raw "]
    assert console.completions("disk size=", "") == console.completions("disk nothing=", "") == []
    assert console.completions("expect ", "do") == ["done "]
    assert console.completions("expect done ", "b") == ["beta "]
    assert console.completions("expect sectors 0 8 ", "z") == ["zeros "]
    assert console.completions("expect statistics ", "journal") == ["journal_writes "]
    assert console.completions("help ", "exh") == ["exhausted "]
    assert console.completions("script ", "three") == ["three-writes "]
    assert console.completions("nonsense ", "") == []


# --- a terminal -----------------------------------------------------------------------------------------------------------

INTERACT = [sys.executable, "-c", "from fvd.sim import terminal; raise SystemExit(terminal.interact())"]


class Session:
    """The console on a terminal of its own."""

    def __init__(self, state: str) -> None:
        self.terminal, inner = pty.openpty()
        environment = os.environ | {"XDG_STATE_HOME": state, "TERM": "xterm", "INPUTRC": "/dev/null"}
        self.process = subprocess.Popen(INTERACT, stdin=inner, stdout=inner, stderr=inner, env=environment, start_new_session=True)
        os.close(inner)
        self.shown = ""
        self.wait("fvd> ")

    def wait(self, wanted: str) -> str:
        """Until the terminal shows this; returns what it showed until then."""
        deadline = time.monotonic() + SESSION_SECONDS
        while wanted not in self.shown:
            ready, _, _ = select.select([self.terminal], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{wanted!r} does not come: {self.shown!r}"
            self.shown += os.read(self.terminal, 4096).decode()
        before, _, self.shown = self.shown.partition(wanted)
        return before + wanted

    def type(self, keys: str, wanted: str) -> str:
        os.write(self.terminal, keys.encode())
        return self.wait(wanted)

    def interrupt(self) -> None:
        """What Ctrl-C does. Python misses a signal just before it waits for a key, so this is repeated as a person would."""
        for _ in range(SESSION_SECONDS // 2):
            self.process.send_signal(signal.SIGINT)
            if select.select([self.terminal], [], [], 2)[0]:
                break
        self.wait("fvd> ")

    def enter(self, keys: str, wanted: str) -> None:
        """A whole line. Waits for the next prompt: keys that come between two lines mean something else to a terminal."""
        self.type(f"{keys}\r", wanted)
        self.wait("fvd> ")

    def end(self, keys: str = "\x04") -> int:
        os.write(self.terminal, keys.encode())
        try:
            return self.process.wait(SESSION_SECONDS)
        finally:
            os.close(self.terminal)


def test_a_session(tmp_path: Path) -> None:
    session = Session(str(tmp_path / "state"))
    session.enter("zulu: wri\t0 8", "zulu: submitted")
    session.enter("proc\tzu\t", "1 write sectors 0-127 for zulu takes effect")
    session.enter("\x1b[A", "has taken effect already")  # the last line again
    session.enter("nonsense", "there is no command 'nonsense'; 'help' lists them")
    session.type("half a li", "half a li")
    session.interrupt()
    session.enter("finish zulu", "zulu: done")
    session.enter("disk la\tra\t", "disk layout=raw")
    session.enter("disk", "layout=raw\r\n")
    session.type("cr\t", "crash ")
    session.type("\t\t", "rng")  # all that may follow
    session.wait("fvd> crash ")
    session.enter("drop", "power fails")
    assert session.end() == 0
    history = (tmp_path / "state" / "fvd" / "torture_history").read_text().splitlines()
    assert history[:2] == ["zulu: write 0 8", "process zulu "]
    session = Session(str(tmp_path / "state"))
    session.type("\x12finish", "finish zulu")  # searched for in the history of the session before
    session.enter("", "nothing is called 'zulu'")
    assert session.end("quit\r") == 0


def test_a_history_that_cannot_be_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    session = Session(str(tmp_path / "file"))
    session.enter("flush", "flush1: submitted")
    assert session.end() == 0


def test_lines_from_a_pipe_are_a_script() -> None:
    done = subprocess.run(
        INTERACT, input="a: write 0 8\nrun\nexpect done a\n", capture_output=True, text=True, timeout=SESSION_SECONDS, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "a: done" in done.stdout and "fvd>" not in done.stdout
    done = subprocess.run(INTERACT, input="expect done a\n", capture_output=True, text=True, timeout=SESSION_SECONDS, check=False)
    assert "standard input:1: expect done a: there is no request 'a'" in done.stderr
