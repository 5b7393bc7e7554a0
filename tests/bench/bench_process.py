"""Runs an expression with the benchmarks' modules in a process of its own: they have names that others have too."""

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
from pathlib import Path
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "bench")!r}]
import %s
from machine import CannotMeasure
from suite import PLANS
try:
    print(json.dumps(%s))
except CannotMeasure as reason:
    print(reason)
    sys.exit({CANNOT})
"""


def evaluate(modules: str, expression: str, timeout_seconds: float = 120) -> Any:
    """What the expression gives, through JSON. Skips, with the reason, where it cannot be measured."""
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE % (modules, expression)],
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
    return json.loads(done.stdout)
