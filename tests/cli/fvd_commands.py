# SPDX-License-Identifier: Apache-2.0
"""What tests of commands share: the command itself, one that has ended, one that serves."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

COMMAND = [sys.executable, "-m", "fvd.cli"]
READY_SECONDS = 60


@dataclass
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        answer = json.loads(self.out)
        assert answer["schema_version"] == 1
        assert isinstance(answer, dict)
        return answer


class Server:
    """A running ``fvd-lv serve``."""

    def __init__(self, process: subprocess.Popen[str], lines: list[str]) -> None:
        self.process = process
        self.lines = lines
        self.uri = lines[0]

    def terminate(self) -> str:
        """A clean end; returns what it said on stderr."""
        self.process.terminate()
        _, said = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, said
        return said

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()
