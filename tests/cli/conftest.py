# SPDX-License-Identifier: Apache-2.0
"""Real commands in a folder of their own: ``fvd_lv(...)`` runs one, ``serving(...)`` keeps a server while a test uses it."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from fvd_commands import COMMAND, Done, Server


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def fvd_lv(workdir: Path) -> Callable[..., Done]:
    """Runs ``fvd-lv`` with these words, and fails the test when it ends with another code than ``code``."""

    def run(*words: str, code: int = 0) -> Done:
        ended = subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=120, check=False)
        assert ended.returncode == code, f"fvd-lv {' '.join(words)} ended with {ended.returncode}\n{ended.stdout}\n{ended.stderr}"
        assert "Traceback" not in ended.stderr
        return Done(ended.returncode, ended.stdout, ended.stderr)

    return run


@pytest.fixture
def serving(workdir: Path) -> Callable[..., AbstractContextManager[Server]]:
    """``with serving("file:a") as server``: on the socket vm.sock unless the words say where."""

    @contextlib.contextmanager
    def serve(*words: str, lines: int = 1) -> Iterator[Server]:
        where = [] if {"--socket", "--listen"} & set(words) else ["--socket", "vm.sock"]
        process = subprocess.Popen([*COMMAND, "serve", *words, *where], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        try:
            said = [process.stdout.readline().rstrip("\n") for _ in range(lines)]
            if not said[-1]:
                pytest.fail(f"the server ended with {process.wait(10)}: {process.communicate()[1]}")
            yield Server(process, said)
        finally:
            if process.returncode is None:
                process.terminate()
                try:
                    process.communicate(timeout=30)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.communicate()

    return serve
