# SPDX-License-Identifier: Apache-2.0
"""A real ``fvd-lv serve`` in a process of its own, for tests that kill it hundreds of times.

Starting Python takes longer than recovering a disk. So the servers are children of a process that has imported fvd and waits; each runs the
whole command, from its arguments to its end.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

# One server at a time. Says the number of its process; it says its own line; and at its end, "ended" and how.
_NURSERY = """
import json, os, sys
import fvd.api.serving, fvd.export.server, fvd.disk.opening
from fvd.cli.main import main
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.close(0)
        print(os.getpid(), flush=True)
        os._exit(main(json.loads(line)))
    print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class FvdServer:
    """The server of one volume, which is started many times."""

    def __init__(self, folder: Path, volume: str, *words: str) -> None:
        self.socket = folder / "nbd.sock"
        self._words = ["serve", volume, "--socket", str(self.socket), *words]
        self._log = folder / "server.log"
        self._child = 0
        with self._log.open("wb") as log:
            self._nursery = subprocess.Popen(
                [sys.executable, "-c", _NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, bufsize=1
            )

    def __enter__(self) -> FvdServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._nursery.communicate(timeout=60)
        assert self._nursery.returncode == 0, self._log.read_text()

    def _line(self) -> str:
        assert self._nursery.stdout is not None
        return self._nursery.stdout.readline().strip()

    def _end(self) -> int:
        """Waits for it; returns its exit code, negative if a signal was the end."""
        line = self._line()
        while line and not line.startswith("ended "):
            line = self._line()
        self._child = 0
        assert line, self._log.read_text()
        return int(line.split()[1])

    def begin(self) -> None:
        """Starts it, and does not wait."""
        assert self._nursery.stdin is not None
        self._nursery.stdin.write(json.dumps(self._words) + "\n")
        pid = self._line()
        assert pid, self._log.read_text()
        self._child = int(pid)

    def start(self) -> str:
        """Back when it serves; returns the URI."""
        self.begin()
        line = self._line()
        if not line.startswith("nbd+unix:"):
            self._child = 0
        assert self._child, f"{line}: {self._log.read_text()}"
        return line

    def terminate(self) -> None:
        """Asks it to end, and does not wait."""
        os.kill(self._child, signal.SIGTERM)

    def stop(self) -> None:
        self.terminate()
        assert self._end() == 0, self._log.read_text()

    def kill(self) -> None:
        """kill -9, and its end; again is fine."""
        if self._child:
            with contextlib.suppress(ProcessLookupError):  # it had been asked to end, and has
                os.kill(self._child, signal.SIGKILL)
            self._end()
