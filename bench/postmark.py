# SPDX-License-Identifier: Apache-2.0
"""PostMark in a real guest kernel, on each format: how many I/Os reach the device, and how many of them are the format's own.

The guest is a User-Mode Linux kernel with an ext4; the device is a loop device, whose I/Os the host's kernel traces. It is counts that are
compared, never times. A guest flushes and writes back by its own clock, so that its I/Os differ from run to run: the ratio that counts is
that of device I/Os for each of the guest's.
"""

from __future__ import annotations

import bisect
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from block_trace import DeviceIo, Taken, traced
from format_disks import FormatDisk, Ranges, makers
from machine import CannotMeasure, need, output
from postmark_guest import PHASES, PROGRAMS, PostMark, counted
from suite import Plan, Plot, Row, missing, row
from uml_guest import PROGRAMS as GUEST_PROGRAMS
from uml_guest import exported, run_guest

TITLE = "A guest's PostMark: how many I/Os reach the device, and how many of them are the format's own"
KIB = 1 << 10
GIB = 1 << 30
MKFS = "-E lazy_itable_init=0,lazy_journal_init=0"  # or the guest would go on with mkfs while PostMark runs
NORMAL = PostMark(2000, 4 * KIB, 64 * KIB, 50, 4000, mkfs=MKFS)
FULL = PostMark(40000, 16 * KIB, 256 * KIB, 200, 40000, mkfs=MKFS)
MEASURED = PHASES[1:]
REFERENCE = "raw"
GOAL = "<= 1.05"


def split(trace: list[DeviceIo], data: Ranges, own: Ranges | None) -> dict[str, int]:
    """How many of each kind. `own`: what of the device is the format's; the rest is that of a file system under it."""
    count = dict.fromkeys(("data_reads", "data_writes", "metadata_reads", "metadata_writes", "below", "flushes"), 0)
    count["data_bytes"] = count["metadata_bytes"] = 0
    for io in trace:
        if io.kind == "flush":
            count["flushes"] += 1
        elif own is not None and not inside(own, io.offset):
            count["below"] += 1
        else:
            where = "data" if inside(data, io.offset) else "metadata"
            count[f"{where}_{'reads' if io.kind == 'read' else 'writes'}"] += 1
            count[f"{where}_bytes"] += io.length
    return count


def inside(ranges: Ranges, offset: int) -> bool:
    """Whether one of the ranges, which ascend, has it."""
    index = bisect.bisect_right(ranges, offset, key=lambda extent: extent[0]) - 1
    return index >= 0 and offset < ranges[index][0] + ranges[index][1]


def one_run(name: str, work: PostMark, size_bytes: int, memory: str, timeout_seconds: float) -> list[dict[str, Any]]:
    """PostMark on a fresh disk of a format: a sample for each phase."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fvd-bench-") as place:
        folder = Path(place)
        traces: dict[str, Taken] = {}
        with makers()[name](folder, size_bytes) as disk:
            with traced(disk.device) as trace:
                vhost = folder / "vhost.sock"
                with exported(disk.nodes, vhost):

                    def take(phase: str) -> None:
                        traces[phase] = trace.take()

                    run_guest(folder, vhost, work.script(), memory=memory, timeout_seconds=timeout_seconds, on_pause=take)
            return samples(folder, traces, disk, time.monotonic() - begun)


def samples(folder: Path, traces: dict[str, Taken], disk: FormatDisk, seconds: float) -> list[dict[str, Any]]:
    data, own = disk.data(), None if disk.own is None else sorted(disk.own())
    found = []
    before = None
    for phase in PHASES:
        after = counted(folder, phase)
        guest = {name: getattr(after, name) - (getattr(before, name) if before else 0) for name in ("reads", "writes", "flushes")}
        before = after
        found.append(
            {
                "phase": phase,
                "submitted": split(traces[phase].submitted, data, own),
                "issued": split(traces[phase].issued, data, own),
                "guest": guest,
                "used_bytes": after.used_bytes,
                "seconds_of_the_whole_run_as_a_hint": seconds,
            }
        )
    return found


def measure(plan: Plan) -> dict[str, Any]:
    if plan.mode == "quick":
        return {"samples": [], "left_out": "a guest for each format does not fit into the quick mode"}
    need(*PROGRAMS, *GUEST_PROGRAMS)
    work, size_bytes, memory = plan.of(None, (NORMAL, 1 * GIB, "96M"), (FULL, 8 * GIB, "256M"))
    rounds = plan.of(0, 1, 3)
    found: list[dict[str, Any]] = []
    not_measured: dict[str, str] = {}
    for number in range(rounds):
        names = list(makers())
        for name in names if number % 2 == 0 else reversed(names):
            try:
                run = one_run(name, work, size_bytes, memory, plan.of(0, 90, 1800))
            except CannotMeasure as reason:
                not_measured[name] = str(reason)
                continue
            found += [{"round": number, "format": name, **sample} for sample in run]
    return {
        "samples": found,
        "not_measured": not_measured,
        "postmark": str(work),
        "disk_bytes": size_bytes,
        "guest_memory": memory,
        "guest_kernel": output("linux.uml", "--version"),
    }


Run = dict[str, dict[str, int]]  # what was submitted, issued, and the guest's: how many of each kind


def device_ios(run: Run, stage: str = "submitted") -> int:
    return sum(count for name, count in run[stage].items() if not name.endswith("_bytes"))


def guest_ios(run: Run) -> int:
    return sum(run["guest"].values())


def per_guest_io(run: Run, stage: str = "submitted") -> float:
    return device_ios(run, stage) / guest_ios(run)


def issued(run: Run) -> float:
    return per_guest_io(run, "issued")


def metadata_ios(run: Run) -> int:
    counted = run["submitted"]
    return counted["metadata_reads"] + counted["metadata_writes"] + counted["below"]


def together(found: list[dict[str, Any]]) -> Run:
    """The phases of a run as one."""
    return {
        part: {name: sum(sample[part][name] for sample in found) for name in found[0][part]} for part in ("submitted", "issued", "guest")
    }


def runs(result: dict[str, Any]) -> dict[str, dict[int, Run]]:
    """By format and round: creation and transactions together."""
    found: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for sample in result["samples"]:
        if sample["phase"] in MEASURED:
            found.setdefault(sample["format"], {}).setdefault(sample["round"], []).append(sample)
    return {name: {number: together(phases) for number, phases in by_round.items()} for name, by_round in found.items()}


def rows(result: dict[str, Any]) -> list[Row]:
    if "left_out" in result:
        return [missing("PostMark: device I/Os for each guest I/O, fvd / raw", result["left_out"], GOAL)]
    found = runs(result)
    made: list[Row] = []
    for ours in (name for name in found if name.startswith("fvd")):
        others = [name for name in found if not name.startswith("fvd")] if ours == "fvd" else [REFERENCE] * (REFERENCE in found)
        for other in others:
            made += compared(ours, found[ours], other, found[other])
    for name, by_round in found.items():
        values = [metadata_ios(run) / guest_ios(run) * 1000 for run in by_round.values()]
        made.append(row(f"{name}: metadata I/Os for 1000 guest I/Os", values, note=counts(next(iter(by_round.values())))))
    return made + [missing(f"PostMark on {name}", reason) for name, reason in result["not_measured"].items()]


def compared(ours: str, our_runs: dict[int, Run], other: str, other_runs: dict[int, Run]) -> list[Row]:
    pairs = [(our_runs[number], other_runs[number]) for number in sorted(our_runs) if number in other_runs]
    if not pairs:
        return []

    def ratio_row(what: str, count: Callable[[Run], float], goal: str = "") -> Row:
        one, two = count(pairs[0][0]), count(pairs[0][1])
        note = f"{one:.3f} and {two:.3f}" if one < 100 else f"{one:.0f} and {two:.0f}"
        values = [count(a) / count(b) for a, b in pairs]
        return row(f"{what}: {ours} / {other}", values, goal=goal, digits=3, note=note, against=other, better="less")

    goal = GOAL if other == REFERENCE else ""
    made = [ratio_row("device I/Os for each guest I/O", per_guest_io, goal)]
    made.append(ratio_row("device requests for each guest I/O, after the kernel has merged what is adjacent", issued, goal))
    if all(metadata_ios(run) for _, run in pairs):
        made.append(ratio_row("metadata I/Os for each guest I/O", lambda run: metadata_ios(run) / guest_ios(run)))
    if ours == "fvd":
        total = ratio_row("device I/Os in all", device_ios)
        total["note"] = total.get("note", "") + "; the guests' own I/Os differ from run to run"
        del total["against"]  # nobody loses by what its guest did
        made.append(total)
    return made


def counts(run: Run) -> str:
    device, guest = run["submitted"], run["guest"]
    text = f"device: {device['data_reads']} reads and {device['data_writes']} writes of data"
    text += f", {device['metadata_reads']} and {device['metadata_writes']} of metadata, {device['flushes']} flushes"
    if device["below"]:
        text += f", {device['below']} of the file system below"
    return text + f"; guest: {guest['reads']} reads, {guest['writes']} writes, {guest['flushes']} flushes"


def plots(result: dict[str, Any]) -> list[Plot]:
    found = runs(result)
    if not found:
        return []

    def points(count: Callable[[Run], int]) -> list[list[float]]:
        return [[count(run) / guest_ios(run) for run in by_round.values()] for by_round in found.values()]

    kinds: dict[str, Callable[[Run], int]] = {
        "data": lambda run: run["submitted"]["data_reads"] + run["submitted"]["data_writes"],
        "metadata": metadata_ios,
        "flushes": lambda run: run["submitted"]["flushes"],
    }
    return [
        {
            "name": "postmark-device-ios",
            "title": "PostMark in a guest: device I/Os for each of the guest's",
            "kind": "bars",
            "unit": "device I/Os for each guest I/O",
            "x": list(found),
            "series": [{"name": name, "points": points(count)} for name, count in kinds.items()],
            "better": "less",
            "caption": f"{result['postmark']}. Creation and transactions; a guest I/O is a read, a write or a flush of its kernel.",
        }
    ]
