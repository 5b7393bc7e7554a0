# SPDX-License-Identifier: Apache-2.0
"""QEMU for the tests: a storage daemon or a whole machine that has not been started, and QMP, its language."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

START_SECONDS = 30


class Qmp:
    """A QMP connection: one command after the other."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(60)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("rwb")
        assert "QMP" in json.loads(self._file.readline())
        self.do("qmp_capabilities")

    def do(self, name: str, /, **arguments: Any) -> Any:
        return self.send({"execute": name, "arguments": arguments})

    def send(self, command: dict[str, Any]) -> Any:
        answer = self._exchange(command)
        assert "error" not in answer, (command, answer)
        return answer["return"]

    def answer(self, name: str, /, **arguments: Any) -> dict[str, Any]:
        """As `do`, of a command that may be refused."""
        return self._exchange({"execute": name, "arguments": arguments})

    def _exchange(self, command: dict[str, Any]) -> dict[str, Any]:
        self._file.write(json.dumps(command).encode() + b"\n")
        self._file.flush()
        while True:
            answer: dict[str, Any] = json.loads(self._file.readline())
            if "return" in answer or "error" in answer:
                return answer

    def close(self) -> None:
        self._file.close()
        self._socket.close()


@contextlib.contextmanager
def running(command: list[str], qmp_path: Path, *, dies: bool = False) -> Iterator[Qmp]:
    """A QEMU program that listens for QMP there; ended by SIGTERM, or if it `dies`, by SIGKILL."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + START_SECONDS
        qmp = None
        while qmp is None:
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                qmp = Qmp(qmp_path)
            if qmp is None:
                if process.poll() is not None or time.monotonic() > deadline:
                    process.kill()
                    pytest.fail(f"{' '.join(command)}: {process.communicate()[1]}")
                time.sleep(0.02)
        yield qmp
        qmp.close()
    finally:
        if process.poll() is None:
            (process.kill if dies else process.terminate)()
        try:
            process.communicate(timeout=10)
        except subprocess.TimeoutExpired:  # it waits for a server that is away, as long as `reconnect-delay` says
            process.kill()
            process.communicate()


@contextlib.contextmanager
def storage_daemon(folder: Path, *words: str, dies: bool = False) -> Iterator[Qmp]:
    """qemu-storage-daemon: a QEMU with no machine."""
    path = folder / "qsd.qmp"
    monitor = ["--chardev", f"socket,id=qmp,path={path},server=on,wait=off", "--monitor", "qmp"]
    with running(["qemu-storage-daemon", *monitor, *words], path, dies=dies) as qmp:
        yield qmp


def export(qmp: Qmp, node: str, path: Path) -> str:
    """Has the daemon offer a node over NBD; returns the URI for the writer."""
    qmp.do("nbd-server-start", addr={"type": "unix", "data": {"path": str(path)}})
    qmp.do("block-export-add", type="nbd", id="out", **{"node-name": node}, name="out", writable=True)
    return f"nbd+unix:///out?socket={path}"
