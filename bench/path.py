# SPDX-License-Identifier: Apache-2.0
"""Where a request's microseconds go: the CPU time of one request, stage by stage, over NBD and in process, beside the pass-through server
and qemu-nbd.

Stages come from sampled call chains (perf), and their microseconds add up to the server's CPU time per request. What is not the process's
own, as the kernel worker of a loop device, is not counted. Besides, what can be told without perf: the same loop that only answers, that
passes through, and with the engine; each costs what it adds. Time that a request only waits is no stage.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from machine import fio, loop_device, need, output, server
from path_stages import REST, STAGES, Profile, counted_calls, profiled, refusal
from suite import Plan, Plot, Row, missing, ratio, row

TITLE = "where a request's microseconds go, in process and over NBD"

MIB = 1 << 20
METADATA_BYTES = 64 * MIB
BLOCK_BYTES = 4096
DEPTH = 32
FVD, PASS, ANSWER, QEMU, PROCESS = "fvd", "pass-through", "answer-only", "qemu raw", "fvd in process"
IN_PROCESS = Path(__file__).with_name("inprocess.py")
ENTERS = "io_uring_enter"
STEPS = (("what the engine adds", FVD, PASS), ("what the device adds", PASS, ANSWER), ("what NBD adds", FVD, PROCESS))
# What a stage is, for those who read no kernel code.
MEANINGS = {
    "receive": "requests, and the data of writes, out of the socket",
    "submit: memory pages": "pinning the buffer that the device transfers to",
    "submit: block layer and device": "from the block device's file to the driver's queue",
    "submit: the ring": "taking requests out of io_uring's queue",
    "complete": "taking what the device finished",
    "reply: copy": "the data of reads into the socket",
    "reply: the rest": "the socket's memory, and the call",
    "sleep and wake": "when nothing was to do",
}


@dataclass(frozen=True)
class Running:
    """A server with a filled disk."""

    pid: int
    uri: str
    device: str


def cpu_seconds(pid: int) -> float:
    """Of a process so far, threads that have ended included, to the nanosecond: its own CPU clock."""
    return time.clock_gettime((~pid << 3) | 2)  # CPUCLOCK_SCHED


def fill(uri: str, disk_bytes: int) -> None:
    """Write every block once, so that all is mapped, and flush."""
    words = [
        "--name=fill",
        "--ioengine=nbd",
        f"--uri={uri}",
        "--rw=write",
        "--bs=1M",
        "--iodepth=8",
        f"--size={disk_bytes}",
        "--end_fsync=1",
    ]
    output("fio", *words)


def provision(device: str, disk_bytes: int) -> None:
    command = [sys.executable, "-m", "fvd.cli", "provision", device, "--size", str(disk_bytes), "--force"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


@contextlib.contextmanager
def running(kind: str, folder: Path, disk_bytes: int) -> Iterator[Running]:
    socket = folder / f"{kind.replace(' ', '-')}.sock"
    with loop_device(disk_bytes + METADATA_BYTES) as device:
        plain = [sys.executable, str(Path(__file__).with_name("passthrough.py")), "serve", device, "--socket", str(socket)]
        commands = {
            FVD: [sys.executable, "-m", "fvd.cli", "serve", device, "--socket", str(socket)],
            PASS: plain,
            ANSWER: [*plain, "--answer-only"],
            QEMU: [
                "qemu-nbd",
                "--persistent",
                "--cache=none",
                "--aio=io_uring",
                "--discard=unmap",
                "--format=raw",
                f"--socket={socket}",
                device,
            ],
        }
        if kind == FVD:
            provision(device, disk_bytes)
        with server(commands[kind], socket) as process:
            uri = f"nbd+unix:///?socket={socket}"
            fill(uri, disk_bytes)
            yield Running(process.pid, uri, device)


def load(served: Running, pattern: str, seconds: float, disk_bytes: int) -> tuple[dict[str, float], float]:
    """One run of fio: what it says, and the server's CPU microseconds per request."""
    before = cpu_seconds(served.pid)
    run = fio(served.uri, pattern, block_bytes=BLOCK_BYTES, depth=DEPTH, seconds=seconds, size_bytes=disk_bytes)
    return run, (cpu_seconds(served.pid) - before) / run["operations"] * 1e6


def stages(found: Profile, cpu_us: float) -> dict[str, Any]:
    if not found.samples:
        return {"not_seen": found.reason}
    return {"stages_us": {stage: share * cpu_us for stage, share in found.shares().items()}, "samples": sum(found.samples.values())}


def over_nbd(served: Running, pattern: str, seconds: float, disk_bytes: int, samples: bool, counts: bool) -> dict[str, Any]:
    """One run, sampled or not, and perhaps one whose system calls are counted."""
    if not samples:
        run, cpu_us = load(served, pattern, seconds, disk_bytes)
        return {"iops": run["iops"], "cpu_us": cpu_us}
    with profiled(served.pid) as found:
        run, cpu_us = load(served, pattern, seconds, disk_bytes)
    sample = {"iops": run["iops"], "cpu_us": cpu_us, **stages(found, cpu_us)}
    if not counts:
        return sample
    with counted_calls(served.pid) as calls:
        counted, _cpu_us = load(served, pattern, seconds, disk_bytes)
    if calls:
        sample["calls"] = {name: count / counted["operations"] for name, count in calls.items()}
    return sample


def in_process(device: str, pattern: str, seconds: float, has_perf: bool) -> dict[str, Any]:
    """The same load on an open disk inside one process."""
    command = [sys.executable, str(IN_PROCESS), device, pattern]
    command += ["--block-bytes", str(BLOCK_BYTES), "--depth", str(DEPTH), "--seconds", str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        # It opens the disk first, and ends right after the load: its last seconds are the load's.
        with profiled(process.pid, seconds * 0.8) if has_perf else contextlib.nullcontext(Profile()) as found:
            printed, _ = process.communicate(timeout=60 + seconds)
    finally:
        process.kill()
        process.wait()
    said = json.loads(printed)
    sample = {"iops": said["iops"], "cpu_us": said["cpu_us_per_request"]}
    return {**sample, **stages(found, said["cpu_us_per_request"])} if has_perf else sample


def measure(plan: Plan) -> dict[str, Any]:
    need("fio", "qemu-nbd")
    why_no_perf = refusal()
    patterns = plan.of(["randread"], ["randread", "randwrite"], ["randread", "randwrite"])
    disk_bytes = plan.of(64, 128, 512) * MIB
    seconds = plan.of(0.5, 1.0, plan.seconds)
    rounds = plan.of(1, 1, plan.rounds)
    kinds = plan.of((FVD, PASS, QEMU), (FVD, PASS, ANSWER, QEMU), (FVD, PASS, ANSWER, QEMU))
    samples: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fvd-bench-")))
        servers = {kind: stack.enter_context(running(kind, folder, disk_bytes)) for kind in kinds}
        runs: dict[str, Callable[..., dict[str, Any]]] = {}
        for kind, served in servers.items():
            counts = kind in plan.of((FVD,), (FVD, QEMU), kinds)
            samples_it = not why_no_perf and (kind != ANSWER or plan.mode == "full")
            runs[kind] = partial(over_nbd, served, seconds=seconds, disk_bytes=disk_bytes, samples=samples_it, counts=counts)
        if IN_PROCESS.exists():
            device = stack.enter_context(loop_device(disk_bytes + METADATA_BYTES))
            provision(device, disk_bytes)
            in_process(device, "write", seconds, False)  # so that all is mapped, as far as it comes
            runs[PROCESS] = partial(in_process, device, seconds=seconds, has_perf=not why_no_perf)
        for number in range(rounds):
            for pattern in patterns:
                for kind in runs if number % 2 == 0 else reversed(runs):
                    samples.append({"round": number, "pattern": pattern, "server": kind, **runs[kind](pattern=pattern)})
    return {
        "samples": samples,
        "patterns": patterns,
        "depth": DEPTH,
        "block_bytes": BLOCK_BYTES,
        "kinds": list(runs),
        "why_no_perf": why_no_perf,
    }


# --- What a reader wants to know ----------------------------------------------------------------------


def chosen(result: dict[str, Any], pattern: str, kind: str, field: str) -> list[Any]:
    """A field of every sample that has it."""
    return [s[field] for s in result["samples"] if (s["pattern"], s["server"]) == (pattern, kind) and field in s]


def beside(values: dict[str, list[float]]) -> str:
    """The medians of others, for a row's note."""
    return ", ".join(f"{kind} {statistics.median(found):.2f}" for kind, found in values.items() if found)


def stage_rows(result: dict[str, Any], pattern: str, name: str) -> list[Row]:
    if result["why_no_perf"]:
        return [missing(f"{name}: each stage", result["why_no_perf"])]
    by_kind = {kind: chosen(result, pattern, kind, "stages_us") for kind in (FVD, PASS, QEMU, PROCESS)}
    if not by_kind[FVD]:
        return [missing(f"{name}: each stage", next(iter(chosen(result, pattern, FVD, "not_seen")), "perf saw nothing"))]
    rows = []
    for stage in STAGES:
        values = {kind: [one[stage] for one in found] for kind, found in by_kind.items()}
        if not any(value > 0 for found in values.values() for value in found):
            continue
        meaning = MEANINGS.get(stage, "")
        note = beside({kind: found for kind, found in values.items() if kind != FVD})
        rows.append(row(f"{name}, {stage}", values[FVD], unit="us", note="; ".join(filter(None, (meaning, note)))))
    return rows


def call_rows(result: dict[str, Any], pattern: str, name: str) -> list[Row]:
    by_kind = {kind: chosen(result, pattern, kind, "calls") for kind in (FVD, PASS, ANSWER, QEMU)}
    if not by_kind[FVD]:
        return [missing(f"{name}: system calls per request", result["why_no_perf"] or "the kernel lets nobody count them")]
    totals = {kind: [sum(calls.values()) for calls in found] for kind, found in by_kind.items()}
    ours = {call: statistics.median([calls[call] for calls in by_kind[FVD]]) for call in by_kind[FVD][0]}
    note = ", ".join(f"{call} {count:.2f}" for call, count in ours.items() if count >= 0.005 and call != REST)
    turns = {kind: [1 / calls[ENTERS] for calls in found if calls[ENTERS]] for kind, found in by_kind.items() if kind != QEMU}
    others = {kind: found for kind, found in totals.items() if kind != FVD}
    return [
        row(f"{name}: system calls per request", totals[FVD], note=f"{note}; {beside(others)}"),
        row(f"{name}: requests per turn of the loop", turns[FVD], note=beside({kind: turns[kind] for kind in (PASS, ANSWER)})),
    ]


def rows(result: dict[str, Any]) -> list[Row]:
    found: list[Row] = []
    samples = result["samples"]
    for pattern in result["patterns"]:
        name = f"{result['block_bytes'] >> 10} KiB {pattern} QD{result['depth']}"
        cpu = {kind: chosen(result, pattern, kind, "cpu_us") for kind in (FVD, PASS, ANSWER, QEMU, PROCESS)}
        for other in (PASS, QEMU):
            values = ratio(samples, "cpu_us", {"pattern": pattern, "server": FVD}, {"pattern": pattern, "server": other})
            found.append(row(f"{name}, CPU per request: fvd / {other}", values, against=other, better="less"))
        others = {kind: values for kind, values in cpu.items() if kind != FVD}
        found.append(row(f"{name}: CPU per request", cpu[FVD], unit="us", note=beside(others)))
        for what, more, less in STEPS:
            if cpu[more] and cpu[less]:
                added = [one - other for one, other in zip(cpu[more], cpu[less], strict=True)]
                found.append(row(f"{name}: {what}", added, unit="us", note=f"{more} less {less}"))
            else:
                why = "in-process loads are not part of this copy" if PROCESS in (more, less) else "quick runs leave it out"
                found.append(missing(f"{name}: {what}", f"{why} ({more} less {less})"))
        found += stage_rows(result, pattern, name) + call_rows(result, pattern, name)
    return found


def plots(result: dict[str, Any]) -> list[Plot]:
    made: list[Plot] = []
    for pattern in result["patterns"]:
        by_kind = {kind: chosen(result, pattern, kind, "stages_us") for kind in (FVD, PASS, QEMU, PROCESS)}
        by_kind = {kind: found for kind, found in by_kind.items() if found}
        shown = [stage for stage in STAGES if any(one[stage] >= 0.05 for found in by_kind.values() for one in found)]
        if not shown:
            continue
        made.append(
            {
                "name": f"path-{pattern}",
                "title": f"CPU time of one request, {result['block_bytes'] >> 10} KiB {pattern} at queue depth {result['depth']}",
                "kind": "bars",
                "unit": "us",
                "x": shown,
                "series": [{"name": kind, "points": [[one[stage] for one in found] for stage in shown]} for kind, found in by_kind.items()],
                "better": "less",
                "caption": "Sampled call chains of the server process; the bars of one server add up to its CPU time per request.",
            }
        )
    return made
