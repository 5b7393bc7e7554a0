# SPDX-License-Identifier: Apache-2.0
"""What the log of pending changes costs: fvd with it and without, in process, on the same device in alternating runs.

First writes of 4 KiB on a disk with blocks of 4 KiB, so that each changes metadata and is logged; and overwrites of mapped data, which
log nothing.
Without a log: the folder for it is named where there is no memory, so that the disk works without, as it says.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import fvd
from loads import KIB, MIB
from machine import CannotMeasure, loop_device, need
from suite import Plan, Plot, Row, missing, ratio, row

TITLE = "what a log costs that outlives the server"
IN_PROCESS = Path(__file__).with_name("inprocess.py")
MEMORY = Path("/dev/shm")
DISK_BYTES = 1024 * MIB
BLOCK_BYTES, DEPTH = 4 * KIB, 32
FIRST, MAPPED = "4 KiB first writes, QD32", "4 KiB random writes on mapped data, QD32"
GOALS = {"iops": ">= 0.97", "cpu_us_per_request": "<= 1.03"}
FIELDS = {"iops": ("operations a second", "more"), "cpu_us_per_request": ("CPU per request", "less")}
WITH, WITHOUT = "with the log", "without"


def run(device: str, folder: Path, *, mapped: bool, requests: int, seed: int) -> dict[str, Any]:
    """One run on a fresh disk."""
    # Blocks of 4 KiB: each first write is one write of 4 KiB, and the log is the most of what metadata cost.
    fvd.provision(device, size=DISK_BYTES, block_size=BLOCK_BYTES, grow_step=DISK_BYTES + 64 * MIB, force=True)
    environment = os.environ | {"FVD_PENDING_DIR": str(folder)}

    def load(pattern: str, block_bytes: int, count: int) -> dict[str, Any]:
        words = [sys.executable, str(IN_PROCESS), device, pattern, "--block-bytes", str(block_bytes), "--depth", str(DEPTH)]
        done = subprocess.run([*words, "--requests", str(count), "--seed", str(seed)], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise CannotMeasure(f"the load failed: {done.stderr[-300:]}")
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    if mapped:
        load("write", MIB, DISK_BYTES // MIB)
    try:
        return load("randwrite" if mapped else "write", BLOCK_BYTES, requests)
    finally:
        fvd.remove(device)


def measure(plan: Plan) -> dict[str, Any]:
    need("losetup")
    if not MEMORY.is_dir():
        raise CannotMeasure(f"{MEMORY} is not there")
    samples: list[dict[str, Any]] = []
    requests = plan.of(20_000, 100_000, 200_000)
    with (
        loop_device(DISK_BYTES + 128 * MIB) as device,
        tempfile.TemporaryDirectory(dir=MEMORY) as memory,
        tempfile.TemporaryDirectory() as storage,
    ):
        Path(memory).chmod(0o700)
        folders = {WITH: Path(memory) / "pending", WITHOUT: Path(storage) / "pending"}
        for number in range(max(7, plan.rounds)):
            for workload in (FIRST, MAPPED):
                for name in (WITH, WITHOUT) if number % 2 == 0 else (WITHOUT, WITH):
                    found = run(device, folders[name], mapped=workload == MAPPED, requests=requests, seed=number)
                    samples.append({"round": number, "peer": name, "workload": workload, **found})
    return {"samples": samples}


def rows(result: dict[str, Any]) -> list[Row]:
    samples = result["samples"]
    found: list[Row] = []
    for workload in (FIRST, MAPPED):
        for field, (words, better) in FIELDS.items():
            what = f"{workload}, {words}: {WITH} / {WITHOUT}"
            values = ratio(samples, field, {"peer": WITH, "workload": workload}, {"peer": WITHOUT, "workload": workload})
            if not values:
                found.append(missing(what, "no round", GOALS[field]))
                continue
            unit, scale = ("k/s", 1000) if field == "iops" else ("us", 1)
            by_name = {name: [s[field] for s in samples if (s["peer"], s["workload"]) == (name, workload)] for name in (WITH, WITHOUT)}
            middles = [statistics.median(by_name[name]) / scale for name in (WITH, WITHOUT)]
            note = " and ".join(f"{middle:.2f}" for middle in middles) + f" {unit}"
            found.append(row(what, values, goal=GOALS[field], note=note, better="more" if better == "more" else "less"))
    return found


def plots(result: dict[str, Any]) -> list[Plot]:
    return []
