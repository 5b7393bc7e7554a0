# SPDX-License-Identifier: Apache-2.0
"""A real ``fvd-lv serve --vhost-user`` in a process of its own, that tests kill and start again. It may be handed its listening socket,
as a socket unit of systemd does it. Knows no machine."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

START_SECONDS = 60
# Becomes the command, whose first descriptor beyond the usual three is the socket.
HANDING_OVER = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execv(sys.executable, [sys.executable, "-m", "fvd.cli", *sys.argv[2:]])
"""


class GuestServer:
    """The server of a new volume in a folder."""

    def __init__(self, folder: Path, size: int, *, queues: int = 1) -> None:
        self.volume = f"file:{folder / 'disk'}"
        self.socket = folder / "vhost.sock"
        self._own = Path(tempfile.mkdtemp(prefix="fvd-test-", dir="/dev/shm"))  # a test's own, which it may outlive
        self._environment = {**os.environ, "FVD_RUNTIME_DIR": str(self._own), "FVD_PENDING_DIR": str(self._own / "pending")}
        self._fvd_lv("provision", self.volume, "--size", str(size))
        self._words = ["serve", self.volume, "--vhost-user", str(self.socket), "--queues", str(queues), "--output", "json"]
        self._process: subprocess.Popen[str] | None = None
        self._kept: socket.socket | None = None

    def __enter__(self) -> GuestServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        if self._kept is not None:
            self._kept.close()
        shutil.rmtree(self._own)

    def keep_socket(self) -> None:
        """From now on this process listens, and hands that to each server. Between two servers."""
        self.socket.unlink()
        self._kept = socket.socket(socket.AF_UNIX)
        self._kept.bind(str(self.socket))
        self._kept.listen()

    def start(self) -> None:
        """Back when it serves."""
        command, passed = [sys.executable, "-m", "fvd.cli"], []
        if self._kept is not None:
            passed = [self._kept.fileno()]
            command = [sys.executable, "-c", HANDING_OVER, str(passed[0])]
        words = [*command, *self._words]
        self._process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, pass_fds=passed, env=self._environment)
        assert self._process.stdout is not None
        said = ""
        while not said.endswith("\n}\n"):
            line = self._process.stdout.readline()
            assert line, f"the server ended as it began: {said}"
            said += line
        assert json.loads(said)["volumes"][0]["vhost_user"] == str(self.socket)

    def kill(self) -> None:
        """kill -9, and its end; again is fine."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate(timeout=START_SECONDS)
            self._process = None

    def stop(self) -> None:
        """As an administrator stops it. Fails unless the disk is whole."""
        assert self._process is not None
        self._process.terminate()
        self._process.communicate(timeout=START_SECONDS)
        assert self._process.returncode == 0
        self._process = None
        self._fvd_lv("check", self.volume)

    def _fvd_lv(self, *words: str) -> Any:
        command = [sys.executable, "-m", "fvd.cli", *words, "--output", "json"]
        done = subprocess.run(command, capture_output=True, text=True, env=self._environment, check=False)
        assert done.returncode == 0, (words, done.stderr, done.stdout)
        return json.loads(done.stdout)

    @property
    def mapped_bytes(self) -> int:
        mapped: int = self._fvd_lv("info", self.volume)["mapped_bytes"]
        return mapped
