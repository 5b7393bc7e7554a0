# SPDX-License-Identifier: Apache-2.0
"""What LVM's own thin volumes and snapshots make of a guest's writes, and what fvd does on a logical volume: counts at the physical volume.

The volumes are real: lvm2 and device-mapper of a User-Mode Linux guest (lvm_counts.py runs in it). It has no useful clock, so nothing is
said of time.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import CannotMeasure, need
from suite import Plan, Plot, Row, Series, missing, row

TITLE = "LVM thin and snapshot in a User-Mode Linux guest: counts, no times"
ROOT = Path(__file__).resolve().parents[1]
DEVICE_SIZE = "64G"  # sparse
# The kind of a volume, and what its first write to a place does.
FIRST = {
    "linear": "first write",
    "thin": "first write",
    "thin, no zeroing": "first write",
    "thin, chunks of 1 MiB": "first write",
    "fvd": "first write",
    "thin snapshot": "copy-on-write",
    "snapshot's origin": "copy-on-write",
    "fvd over a base": "copy-on-write",
}
PAIRS = (("fvd", "thin"), ("fvd", "thin, no zeroing"), ("fvd over a base", "thin snapshot"), ("fvd over a base", "snapshot's origin"))


def measure(plan: Plan) -> dict[str, Any]:
    if plan.mode == "quick":
        raise CannotMeasure("takes longer than the quick mode has: a guest is booted, and lvm2 makes seven volumes in it")
    return count(plan.of(0, 200, 500), timeout_seconds=plan.of(0, 240, 1800), full=plan.mode == "full")


def count(writes: int, *, timeout_seconds: float, full: bool = False, kinds: tuple[str, ...] = ()) -> dict[str, Any]:
    """`kinds`: only these."""
    need("linux.uml")
    for program, package in (("thin_check", "thin-provisioning-tools"), ("lvm", "lvm2")):
        if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
            raise CannotMeasure(f"not installed: {program} ({package})")
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="fvd-bench-", dir=memory) as disks, tempfile.TemporaryDirectory(prefix="fvd-bench-") as folder:
        result = Path(folder) / "counts.json"  # not in /dev/shm, which is the guest's own inside
        command = [sys.executable, str(ROOT / "scripts" / "uml"), "--timeout", f"{timeout_seconds:g}"]
        command += ["--disk", f"{disks}/physical:{DEVICE_SIZE}", "--", "sh", "-c"]
        command += ['modprobe -d /run/uml -a dm-thin-pool dm-snapshot && exec "$@"', "sh"]
        command += [sys.executable, str(ROOT / "bench" / "lvm_counts.py"), "/dev/ubda", str(result), "--writes", str(writes)]
        command += ["--full"] * full
        for kind in kinds:
            command += ["--kind", kind]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=timeout_seconds + 60)
        except subprocess.TimeoutExpired as error:
            raise CannotMeasure(f"the guest did not end within {timeout_seconds + 60:g} s") from error
        said = (done.stdout + done.stderr).strip()[-500:]
        if not result.exists():
            raise CannotMeasure(f"the guest ended with {done.returncode}: {said}")
        found: dict[str, Any] = json.loads(result.read_text())
        found["not_finished"] = said if done.returncode else ""
        return found


def per_write(sample: dict[str, Any]) -> dict[str, float]:
    """What reached the device for each of the guest's writes, and for each of its flushes."""
    written_bytes = sample["guest_writes"] * 4096
    return {
        "writes": sample["writes"] / sample["guest_writes"],
        "bytes": sample["written_bytes"] / written_bytes,
        "reads": sample["reads"] / sample["guest_writes"],
        "read_bytes": sample["read_bytes"] / written_bytes,
        "flushes": sample["flushes"] / sample["guest_flushes"],
    }


def find(result: dict[str, Any], kind: str, phase: str, flush_every: int | None) -> dict[str, float] | None:
    for sample in result["samples"]:
        if (sample["kind"], sample["phase"], sample["flush_every"]) == (kind, phase, flush_every):
            return per_write(sample)
    return None


def rows(result: dict[str, Any]) -> list[Row]:
    return [made for one, other in PAIRS for made in ratio_rows(result, one, other)] + count_rows(result)


def ratio_rows(result: dict[str, Any], one: str, other: str) -> list[Row]:
    made = []
    for flush_every in flush_variants(result):
        ours, theirs = (find(result, kind, "first", flush_every) for kind in (one, other))
        compared = [("writes", "device writes"), ("bytes", "bytes written")]
        if flush_every:  # with one flush in all, most are those that LVM makes by the clock
            compared.append(("flushes", "device flushes"))
        for field, name in compared:
            what = f"{FIRST[one]}, {flushing(flush_every)}, {name}: {one} / {other}"
            if ours is None or theirs is None or not theirs[field]:
                made.append(missing(what, result["not_finished"] or "not counted"))
                continue
            unit = "flush" if field == "flushes" else "write" if field == "writes" else "byte"
            note = f"{ours[field]:.2f} / {theirs[field]:.2f} for each {unit} of the guest"
            made.append(row(what, [ours[field] / theirs[field]], against=f"LVM: {other}", better="less", note=note))
    return made


def count_rows(result: dict[str, Any]) -> list[Row]:
    made = []
    for kind in dict.fromkeys(sample["kind"] for sample in result["samples"]):
        for phase in ("first", "again"):
            for flush_every in flush_variants(result):
                found = find(result, kind, phase, flush_every)
                if found is None:
                    continue
                doing = FIRST[kind] if phase == "first" else "overwrite"
                note = f"{found['bytes']:.2f} bytes written for each byte, {found['flushes']:.2f} device flushes for each flush, "
                note += f"{found['reads']:.2f} device reads ({found['read_bytes']:.2f} bytes) for each write"
                made.append(row(f"{kind}, {doing}, {flushing(flush_every)}: device writes for each write", [found["writes"]], note=note))
    return made


def flush_variants(result: dict[str, Any]) -> list[int | None]:
    return list(dict.fromkeys(sample["flush_every"] for sample in result["samples"]))


def flushing(flush_every: int | None) -> str:
    return f"a flush every {flush_every}" if flush_every else "one flush"


def plots(result: dict[str, Any]) -> list[Plot]:
    kinds = list(dict.fromkeys(sample["kind"] for sample in result["samples"]))
    made: list[Plot] = []
    for field, name, title, unit in (
        ("writes", "lvm-writes", "Random writes of 4 KiB to a logical volume", "device writes for each write"),
        ("bytes", "lvm-bytes", "Random writes of 4 KiB to a logical volume", "bytes written for each byte"),
    ):
        series: list[Series] = []
        for phase, doing in (("first", "first write or copy-on-write"), ("again", "overwrite")):
            for flush_every in flush_variants(result):
                found = [find(result, kind, phase, flush_every) for kind in kinds]
                series.append(
                    {
                        "name": f"{doing}, {flushing(flush_every)}",
                        "points": [[] if counts is None else [counts[field]] for counts in found],
                    }
                )
        made.append(
            {
                "name": name,
                "title": title,
                "kind": "bars",
                "unit": unit,
                "x": kinds,
                "series": series,
                "better": "less",
                "caption": "Counted at the physical volume in a User-Mode Linux guest; empty flushes are writes too.",
            }
        )
    return made
