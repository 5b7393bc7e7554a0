# SPDX-License-Identifier: Apache-2.0
"""The light vhost-user front end (bench/front.c) for the tests: compiled once, and run with options by their names.

    with front(socket, seconds=2, depth=16, write=1, verify=True, reconnect=True) as running:
        ...                     kill the server meanwhile
    running.told["lost"]        what it said at its end

`run_front` is the same with nothing to do meanwhile.
"""

from __future__ import annotations

import contextlib
import functools
import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "bench" / "front.c"
PATIENCE_SECONDS = 30


@functools.cache
def program() -> tuple[Path, tempfile.TemporaryDirectory[str]]:
    """The compiled program, and the folder that goes with this process."""
    folder = tempfile.TemporaryDirectory(prefix="fvd-front-")
    path = Path(folder.name) / "front"
    try:
        subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", path, SOURCE], check=True)
    except FileNotFoundError:
        pytest.skip("gcc is not installed")
    return path, folder


class Front:
    """A front end at work. `told`: what it said at its end; errors and lost blocks are figures there."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.told: dict[str, Any] = {}
        self.said = ""  # if it could not go on

    def wait(self) -> None:
        """Back when it has ended."""
        if self.told or self.said:
            return
        out, self.said = self.process.communicate(timeout=4 * PATIENCE_SECONDS)
        if out:
            self.told = json.loads(out)


@contextlib.contextmanager
def front(*sockets: Path, patience: float = PATIENCE_SECONDS, fails: bool = False, **options: object) -> Iterator[Front]:
    """`fails`: it is expected to give up, and `said` tells why."""
    words = [f"--{name.replace('_', '-')}={int(value) if isinstance(value, bool) else value}" for name, value in options.items()]
    command = [str(program()[0]), f"--patience={patience}", *words, *map(str, sockets)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        running = Front(process)
        try:
            yield running
            running.wait()
        finally:
            process.kill()
    assert (process.returncode != 0) is fails, running.said


def run_front(*sockets: Path, **options: Any) -> dict[str, Any]:
    with front(*sockets, **options) as running:
        pass
    return running.told
