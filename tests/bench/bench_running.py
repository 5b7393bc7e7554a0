"""Runs an expression of the benchmarks in a process of its own: their modules have names that others have too."""

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
PREAMBLE = f"""
import json, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "bench")!r}]
from machine import CannotMeasure
try:
    %s
    print(json.dumps(%s))
except CannotMeasure as reason:
    print(reason)
    sys.exit({CANNOT})
"""


def evaluate(statements: str, expression: str) -> Any:
    """The value of the expression, by way of JSON. What this machine cannot measure is skipped, with the reason."""
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE % (statements.strip().replace("\n", "\n    "), expression)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        check=False,
    )
    if done.returncode == CANNOT:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])
