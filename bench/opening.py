"""How long open() takes on large disks: superblock, maps and journal read, checked and replayed, the engine built."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import median, spread

import fvd

SIZES = {"1 TiB": 1 << 40, "10 TiB": 10 << 40}


def measure(rounds: int, seconds: float) -> dict[str, Any]:
    samples = []
    # tmpfs: what is measured is open(), not a disk.
    with tempfile.TemporaryDirectory(prefix="fvd-bench-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        for name, size_bytes in SIZES.items():
            volume = f"file:{Path(folder) / name.replace(' ', '')}"
            fvd.provision(volume, size=size_bytes)
            for _ in range(rounds + 1):
                began = time.perf_counter()
                disk = fvd.open(volume)
                opened = time.perf_counter() - began
                disk.close()
                samples.append({"size": name, "milliseconds": opened * 1000})
    return {"samples": samples}


def report(result: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for name in SIZES:
        values = [s["milliseconds"] for s in result["samples"] if s["size"] == name][1:]
        goal = name == "1 TiB"
        rows.append(
            {
                "what": f"open() of a {name} disk, ms",
                "value": spread(values),
                "goal": "< 50" if goal else "",
                "reached": median(values) < 50 if goal else None,
            }
        )
    return rows
