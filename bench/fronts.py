# SPDX-License-Identifier: Apache-2.0
"""A guest's virtio-blk at vhost-user sockets (front.c): what it asks for, and what it and its servers did. Knows no server."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loads import MIB, CpuClock
from machine import CannotMeasure, compiled

PATIENCE_SECONDS = 30


def ask(sockets: Sequence[Path], pids: Sequence[int], **options: object) -> dict[str, Any]:
    """One run on all these disks. `options` are front.c's; `pids`: whose CPU time it is."""
    words = [f"--{name.replace('_', '-')}={int(value) if isinstance(value, bool) else value}" for name, value in options.items()]
    command = [compiled("front.c"), f"--patience={PATIENCE_SECONDS}", *words, *map(str, sockets)]
    clock = CpuClock(pids)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not done.stdout:
        raise CannotMeasure(f"the front end: {done.stderr.strip()}")
    seen = json.loads(done.stdout)
    operations = seen["operations"]
    if seen["errors"] or not operations:
        raise CannotMeasure(f"the front end: {seen['errors']} of {operations} requests have failed")
    return {
        **{name: seen[name] for name in ("operations", "flushes", "seconds", "p50_us", "p99_us", "max_us")},
        "iops": operations / seen["seconds"],
        "cpu_us_per_request": clock.us_per_request(operations),
        "client_cpu_us": seen["cpu_seconds"] / operations * 1e6,
        "kicks_per_request": seen["kicks"] / operations,
        "sleeps_per_request": seen["sleeps"] / operations,
    }


def fill(sockets: Sequence[Path]) -> None:
    """Every block of these disks is written once, in order, and flushed."""
    ask(sockets, (), write=1, once=True, sequential=True, last_flush=True, bytes=MIB, depth=4)
