# SPDX-License-Identifier: Apache-2.0
"""A terminal for the console: lines in and out, history, completion. It may not know what the lines mean."""

from __future__ import annotations

import cmd
import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from fvd.errors import FvdError
from fvd.sim._oracle import Violation
from fvd.sim.console import Console

WELCOME = "A simulated disk; nothing happens until you say so. 'help' lists the commands, TAB completes, Ctrl-D ends."
HISTORY_LINES = 1000


class _Shell(cmd.Cmd):
    """Lines from a terminal to a console, and back."""

    prompt = "fvd> "

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self._found: list[str] = []

    def onecmd(self, line: str) -> bool:
        if line.strip() in ("quit", "exit", "EOF"):
            if line == "EOF":
                print()
            return True
        try:
            output = self._console.run_line(line)
        except FvdError as error:
            output = [str(error)]
        except Violation as error:
            output = [f"VIOLATION: {error}", "'undo' takes the disk back."]
        except Exception as error:  # the engine or the device found something impossible: the console goes on
            output = [f"{type(error).__name__}: {error}", "'undo' takes the disk back."]
        print("\n".join(output), end="\n" if output else "")
        return False

    def emptyline(self) -> bool:
        return False

    def complete(self, text: str, state: int) -> str | None:  # type: ignore[override]
        import readline

        if state == 0:
            before = readline.get_line_buffer()[: readline.get_begidx()]
            self._found = self._console.completions(before, text)
        return self._found[state] if state < len(self._found) else None


def interact(options: Mapping[str, str] | None = None) -> int:
    """The console on this terminal; without one, what comes in is a script. Returns the exit code. Raises as `run_script` does."""
    console = Console(options)
    if not sys.stdin.isatty():
        print("\n".join(console.play("standard input", sys.stdin.read())))
        return 0
    shell = _Shell(console)
    with _history():
        print(WELCOME)
        while True:
            try:
                shell.cmdloop()
                return 0
            except KeyboardInterrupt:
                print()


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Lines of earlier sessions, if Python has readline; those of this one are kept if there is a place for them."""
    try:
        import readline
    except ImportError:
        yield
        return
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")  # noqa: PTH111 - ~ stays when there is no home
    path = Path(state) / "fvd" / "torture_history"
    readline.set_completer_delims(" \t=|")
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        readline.set_history_length(HISTORY_LINES)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)
