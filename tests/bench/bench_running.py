# SPDX-License-Identifier: Apache-2.0
"""Runs statements with the benchmarks' modules in a process of its own: these modules have names that others have too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CANNOT = 77
PROGRAM = f"""
import json, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "bench")!r}]
from machine import CannotMeasure
names = {{}}
try:
    exec(sys.argv[1], names)
    answer = eval(sys.argv[2], names)
except CannotMeasure as reason:
    print(reason)
    sys.exit({CANNOT})
print(json.dumps(answer))
"""


def evaluate(statements: str, expression: str, timeout_seconds: float = 120) -> Any:
    """What the expression gives after the statements, through JSON. Skips, with the reason, what this machine cannot measure."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, statements, expression],
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        check=False,
    )
    if done.returncode == CANNOT:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
