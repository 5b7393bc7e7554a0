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
    command = [compiled("front.c"), "--wait=1", f"--patience={PATIENCE_SECONDS}", *words, *map(str, sockets)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as front:
        assert front.stdin is not None and front.stdout is not None
        if front.stdout.readline():
            clock = CpuClock(pids)
            front.stdin.write("\n")
            front.stdin.flush()
        told = front.stdout.readline()
        cpu_us = clock.us_per_request(1) if told else 0.0
        _, said = front.communicate()
    if front.returncode or not told:
        raise CannotMeasure(f"the front end: {said.strip()}")
    seen = json.loads(told)
    operations = seen["operations"]
    if seen["errors"] or not operations:
        raise CannotMeasure(f"the front end: {seen['errors']} of {operations} requests have failed")
    return {
        **{name: seen[name] for name in ("operations", "flushes", "seconds", "p50_us", "p99_us", "max_us")},
        "iops": operations / seen["seconds"],
        "cpu_us_per_request": cpu_us / operations,
        "client_cpu_us": seen["cpu_seconds"] / operations * 1e6,
        "kicks_per_request": seen["kicks"] / operations,
        "sleeps_per_request": seen["sleeps"] / operations,
    }


def fill(sockets: Sequence[Path]) -> None:
    """Every block of these disks is written once, in order, and flushed."""
    ask(sockets, (), write=1, once=True, sequential=True, last_flush=True, bytes=MIB, depth=4)
