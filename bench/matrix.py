# SPDX-License-Identifier: Apache-2.0
"""fvd and what one would use instead, over NBD, side by side; and fvd in one process against fio on the same device.

Each peer serves a disk of its own on a loop device of its own. On disks whose blocks are all mapped, each run lasts as long as the others;
what allocates is bounded by size, on a fresh disk each time, and the flush in the end is part of its time. Rounds are interleaved, in an
order that turns around; a ratio is made within a round. CPU time is the server process's own.

The client is fio, which most people know, and which takes more of the processors than the servers that are compared: on a small machine
its rates are the client's as much as theirs. So what the goals name is also asked by a client that costs little.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loads import KIB, MIB, each_once, fill, for_seconds, lightly, over_nbd, run_fio, seen_by, spread_offsets, trace
from machine import CannotMeasure, loop_device, need, offloads_zeros
from peers import METADATA_BYTES, MakeDevice, Peer, Served, all_peers
from suite import Plan, Plot, Row, Series, missing, ratio, row

TITLE = "peers x workloads over NBD, and in process against fio: operations, CPU per request, latencies"

QUICK_PEERS = ("fvd", "pass-through", "qcow2")
MAIN_PEERS = ("fvd", "pass-through", "answers only", "qemu raw", "qcow2", "nbdkit file")
LIGHT_SHARE = 0.4  # of a run: this client has no threads to start, and makes many more requests
RUN_SHARE = 0.6  # of plan.seconds, for one run: there are many
BASE_BLOCK_BYTES = 64 * KIB  # fvd's block and qcow2's cluster: a write every so many bytes meets a new one each time
INPROCESS = Path(__file__).resolve().parent / "inprocess.py"
IN_PROCESS, FIO, FIO_TUNED = "fvd in process", "fio io_uring", "fio io_uring, tuned"

Kind = Literal["mapped", "first write", "first touch", "copy-on-write"]


@dataclass(frozen=True)
class Workload:
    pattern: Literal["randread", "randwrite", "read", "write"]
    block_bytes: int
    depth: int
    kind: Kind = "mapped"
    light: bool = False  # asked by the client that costs little

    @property
    def name(self) -> str:
        size = f"{self.block_bytes // MIB} MiB" if self.block_bytes >= MIB else f"{self.block_bytes // KIB} KiB"
        if self.kind != "mapped":
            return f"{size} {self.kind} QD{self.depth}"
        what = {"randread": "random read", "randwrite": "random write", "read": "sequential read", "write": "sequential write"}
        return f"{size} {what[self.pattern]} QD{self.depth}" + (", light client" if self.light else "")

    @property
    def sequential(self) -> bool:
        return not self.pattern.startswith("rand")


READ_32, WRITE_32 = Workload("randread", 4 * KIB, 32), Workload("randwrite", 4 * KIB, 32)
READ_1, WRITE_1 = Workload("randread", 4 * KIB, 1), Workload("randwrite", 4 * KIB, 1)
FIRST_WRITE, FIRST_TOUCH = Workload("randwrite", 4 * KIB, 32, "first write"), Workload("randwrite", 4 * KIB, 32, "first touch")
COPY_ON_WRITE = Workload("randwrite", 4 * KIB, 32, "copy-on-write")
HEADLINE = (READ_32, WRITE_32)
LIGHT = tuple(dataclasses.replace(workload, light=True) for workload in HEADLINE)
LATENCIES = (READ_1, READ_32, WRITE_1, WRITE_32)  # whose distributions are kept
SEQUENTIAL = (Workload("read", MIB, 32), Workload("write", MIB, 32))
QUICK = (*HEADLINE, *LIGHT, FIRST_WRITE)
NORMAL = (*HEADLINE, *LIGHT, READ_1, WRITE_1, *SEQUENTIAL, FIRST_WRITE, COPY_ON_WRITE)
FULL = (
    *(Workload(pattern, 4 * KIB, depth) for depth in (32, 1) for pattern in ("randread", "randwrite")),
    *LIGHT,
    *(Workload(pattern, 64 * KIB, depth) for depth in (32, 1) for pattern in ("randread", "randwrite")),
    *(Workload(pattern, MIB, depth) for depth in (32, 1) for pattern in ("read", "write")),
    FIRST_WRITE,
    dataclasses.replace(FIRST_WRITE, depth=1),
    FIRST_TOUCH,
    dataclasses.replace(FIRST_WRITE, block_bytes=64 * KIB),
    dataclasses.replace(FIRST_WRITE, pattern="write", block_bytes=MIB),
    COPY_ON_WRITE,
    dataclasses.replace(COPY_ON_WRITE, depth=1),
)

# (workload, peer, field, goal). What first writes must reach depends on the device: see `first_write_goal`.
GOALS: tuple[tuple[Workload, str, str, str], ...] = (
    *((workload, "pass-through", "iops", ">= 0.95") for workload in (*HEADLINE, *LIGHT)),
    *((workload, peer, "iops", ">= 1.8") for workload in (*HEADLINE, *LIGHT) for peer in ("qemu raw", "qcow2")),
    *((workload, peer, "cpu_us_per_request", "<= 0.35") for workload in (*HEADLINE, *LIGHT) for peer in ("qemu raw", "qcow2")),
    (FIRST_WRITE, "qcow2", "iops", "first write"),
    (FIRST_WRITE, "qcow2", "cpu_us_per_request", "<= 1"),
)
FIELDS = {"iops": "operations a second", "cpu_us_per_request": "server CPU per request", "p99_us": "p99 latency"}


@dataclass(frozen=True)
class Sizes:
    disk_bytes: int  # all of it mapped
    first_bytes: int  # a fresh disk, written once
    base_bytes: int  # a fresh disk over a base; one write in each block


def sizes(plan: Plan) -> Sizes:
    """All devices of a mode, which are there at the same time, take less than 8 GB of memory."""
    return Sizes(
        plan.of(128 * MIB, 512 * MIB, 192 * MIB), plan.of(64 * MIB, 256 * MIB, 256 * MIB), plan.of(128 * MIB, 512 * MIB, 512 * MIB)
    )


# --- Over NBD -------------------------------------------------------------------------------------------------------------------------


def order(names: list[str], number: int) -> list[str]:
    return names if number % 2 == 0 else names[::-1]


def run_mapped(served: Served, workload: Workload, disk_bytes: int, seconds: float) -> dict[str, Any]:
    clock = served.cpu_clock()
    if workload.light:
        found = lightly(served.socket, workload.pattern, depth=workload.depth, size_bytes=disk_bytes, seconds=seconds * LIGHT_SHARE)
        return found | {"cpu_us_per_request": clock.us_per_request(found["operations"])}
    found = for_seconds(
        over_nbd(served.socket),
        workload.pattern,
        block_bytes=workload.block_bytes,
        depth=workload.depth,
        size_bytes=disk_bytes,
        seconds=seconds,
    )
    return found | {"cpu_us_per_request": clock.us_per_request(found["operations"])}


def run_fresh(
    peer: Peer, workload: Workload, size_bytes: int, seed: int, base: str | None = None, make_device: MakeDevice = loop_device
) -> dict[str, Any]:
    """On a disk that is made for it. First writes: of every block; first touches and copy-on-write: one in each larger block."""
    with peer.served(size_bytes, base, make_device) as served:
        clock = served.cpu_clock()
        if workload.kind == "first write":
            found = each_once(
                served.socket, pattern=workload.pattern, block_bytes=workload.block_bytes, depth=workload.depth, size_bytes=size_bytes
            )
        else:
            found = trace(
                served.socket,
                spread_offsets(size_bytes, BASE_BLOCK_BYTES, seed),
                block_bytes=workload.block_bytes,
                depth=workload.depth,
                flush_in_the_end=True,
            )
        return found | {"cpu_us_per_request": clock.us_per_request(found["operations"])}


@contextlib.contextmanager
def base_image(size_bytes: int) -> Iterator[str]:
    """A device full of data, that shows through."""
    with loop_device(size_bytes) as device:
        piece = os.urandom(MIB)
        with Path(device).open("r+b", buffering=0) as file:
            for _ in range(size_bytes // MIB):
                file.write(piece)
            os.fsync(file.fileno())
        yield device


def kept(found: dict[str, Any], workload: Workload) -> dict[str, Any]:
    """Distributions are large; only those that are drawn are kept."""
    return found if workload in LATENCIES else {key: value for key, value in found.items() if key != "quantiles_us"}


def measure_mapped(
    peers: dict[str, Peer], workloads: list[Workload], disk_bytes: int, rounds: int, seconds: float, headline_only: set[str]
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """All peers serve at the same time, and wait for their turn. Samples, and who could not be measured, with the reason."""
    samples, failed = [], {}
    with contextlib.ExitStack() as stack:
        served: dict[str, Served] = {}
        for name, peer in peers.items():
            try:
                served[name] = stack.enter_context(peer.served(disk_bytes))
                if peer.stores:
                    fill(served[name].socket, disk_bytes)
            except CannotMeasure as reason:
                failed[name] = str(reason)
        for number in range(rounds):
            for workload in workloads:
                for name in order([name for name in served if name not in failed], number):
                    if name in headline_only and workload not in (*HEADLINE, *LIGHT):
                        continue
                    try:
                        found = run_mapped(served[name], workload, disk_bytes, seconds)
                    except CannotMeasure as reason:
                        failed[name] = str(reason)
                        continue
                    samples.append({"round": number, "peer": name, "workload": workload.name, **kept(found, workload)})
    return samples, failed


def measure_fresh(
    peers: dict[str, Peer], workloads: list[Workload], plan_sizes: Sizes, rounds: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    samples, failed = [], {}
    with contextlib.ExitStack() as stack:
        base = None
        if any(workload.kind == "copy-on-write" for workload in workloads):
            base = stack.enter_context(base_image(plan_sizes.base_bytes))
        for number in range(rounds):
            for workload in workloads:
                over_base = workload.kind == "copy-on-write"
                able = [name for name, peer in peers.items() if peer.stores and (peer.over_base or not over_base)]
                for name in order(able, number):
                    if name in failed:
                        continue
                    size_bytes = plan_sizes.first_bytes if workload.kind == "first write" else plan_sizes.base_bytes
                    try:
                        found = run_fresh(peers[name], workload, size_bytes, seed=number, base=base if over_base else None)
                    except CannotMeasure as reason:
                        failed[name] = str(reason)
                        continue
                    samples.append({"round": number, "peer": name, "workload": workload.name, **kept(found, workload)})
    return samples, failed


# --- In process -----------------------------------------------------------------------------------------------------------------------


def in_process(device: str, pattern: str, **options: Any) -> dict[str, Any]:
    """fvd's engine on a device, in a process of its own."""
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    done = subprocess.run([sys.executable, str(INPROCESS), device, pattern, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotMeasure(f"in process: {(done.stderr.strip().splitlines() or ['no reason'])[-1]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def fio_on(device: str, pattern: str, offset_bytes: int, size_bytes: int, seconds: float, more: tuple[str, ...]) -> dict[str, Any]:
    """fio on the same places of the same device: metadata stay whole."""
    where = ["--ioengine=io_uring", "--direct=1", f"--filename={device}", f"--offset={offset_bytes}"]
    bound = ["--time_based", f"--runtime={max(1, round(seconds * 1000))}ms", "--norandommap", *more]
    job = run_fio(where, pattern, block_bytes=4 * KIB, depth=32, size_bytes=size_bytes, more=bound)
    found = seen_by(job, pattern, 4 * KIB)
    return found | {"cpu_us_per_request": found["client_cpu_us"]}


def measure_in_process(disk_bytes: int, rounds: int, seconds: float, tuned: bool) -> list[dict[str, Any]]:
    """4 KiB at QD32, on data that are mapped; by turns on the same device."""
    import fvd

    samples = []
    with loop_device(disk_bytes + METADATA_BYTES) as device:
        fvd.provision(device, size=disk_bytes, force=True)
        filled = in_process(device, "write", block_bytes=MIB, depth=8, requests=disk_bytes // MIB)
        names = [IN_PROCESS, FIO] + ([FIO_TUNED] if tuned else [])
        for number in range(rounds):
            for workload in HEADLINE:
                for name in order(names, number):
                    if name == IN_PROCESS:
                        found = in_process(device, workload.pattern, seconds=seconds, seed=number + 1)
                    else:
                        more = ("--registerfiles", "--fixedbufs") if name == FIO_TUNED else ()
                        found = fio_on(device, workload.pattern, filled["data_offset_bytes"], disk_bytes, seconds, more)
                    samples.append({"round": number, "peer": name, "workload": f"{workload.name}, in process", **found})
    return samples


# --- The suite ------------------------------------------------------------------------------------------------------------------------


def measure(plan: Plan) -> dict[str, Any]:
    need("fio", "losetup")
    found = all_peers()
    names = plan.of(QUICK_PEERS, MAIN_PEERS, tuple(found))
    peers = {name: found[name] for name in names}
    workloads: tuple[Workload, ...] = plan.of(QUICK, NORMAL, FULL)
    seconds = plan.seconds * plan.of(RUN_SHARE, RUN_SHARE, 1)
    plan_sizes = sizes(plan)
    with loop_device(MIB) as device:
        offloads = offloads_zeros(device)
    mapped = [workload for workload in workloads if workload.kind == "mapped"]
    samples, failed = measure_mapped(peers, mapped, plan_sizes.disk_bytes, plan.rounds, seconds, plan.of(set(), {"answers only"}, set()))
    left = {name: peer for name, peer in peers.items() if name not in failed}
    more, failed_later = measure_fresh(left, [workload for workload in workloads if workload.kind != "mapped"], plan_sizes, plan.rounds)
    try:
        more += measure_in_process(plan_sizes.disk_bytes, plan.rounds, seconds * plan.of(0.8, 0.8, 1), tuned=plan.mode != "quick")
    except CannotMeasure as reason:
        failed_later = failed_later | dict.fromkeys((FIO, IN_PROCESS), str(reason))
    return {
        "mode": plan.mode,
        "samples": samples + more,
        "workloads": [dataclasses.asdict(workload) for workload in workloads],
        "peers": {name: {"family": peer.family, "note": peer.note, "over_base": peer.over_base} for name, peer in peers.items()},
        "not_measured": failed | failed_later,
        "offloads_zeros": offloads,
        "sizes": dataclasses.asdict(plan_sizes),
        "seconds": seconds,
    }


def first_write_goal(result: dict[str, Any]) -> str:
    return ">= 2" if result["offloads_zeros"] else ">= 1"


def medians(samples: list[dict[str, Any]], field: str, peer: str, workload: str) -> float | None:
    values = [s[field] for s in samples if s["peer"] == peer and s["workload"] == workload]
    return statistics.median(values) if values else None


def compared(result: dict[str, Any], workload: str, field: str, peer: str, ours: str = "fvd", goal: str = "") -> Row | None:
    """fvd / peer in one field; None: it was not meant to be measured."""
    samples = result["samples"]
    what = f"{workload}, {FIELDS[field]}: {ours} / {peer}"
    values = ratio(samples, field, {"peer": ours, "workload": workload}, {"peer": peer, "workload": workload})
    if not values:
        if not goal:
            return None
        return missing(what, result["not_measured"].get(peer, "not in this mode"), goal)
    one, other = (medians(samples, field, name, workload) for name in (ours, peer))
    assert one is not None and other is not None
    unit, scale = ("k/s", 1000) if field == "iops" else ("us", 1)
    family = result["peers"].get(peer, {}).get("family", "limit")
    note = f"{one / scale:.1f} and {other / scale:.1f} {unit}"
    if field == "cpu_us_per_request" and "page cache" in result["peers"].get(peer, {}).get("note", ""):
        note += f"; {peer} goes through the page cache: what the kernel writes later is not in it"
    if goal and workload == FIRST_WRITE.name and field == "iops":
        note += "; the device writes zeros by itself" if result["offloads_zeros"] else "; the device cannot write zeros by itself"
    against = "" if family == "limit" and not goal else peer
    return row(what, values, goal=goal, note=note, against=against, better="more" if field == "iops" else "less")


def absolute(result: dict[str, Any], workload: Workload, name: str, peer: str) -> Row | None:
    mine = [s for s in result["samples"] if s["peer"] == peer and s["workload"] == name]
    if not mine:
        return None

    def middle(field: str) -> float:
        return float(statistics.median([s[field] for s in mine]))

    note = f"{middle('cpu_us_per_request'):.1f} us CPU a request"
    if peer not in (FIO, FIO_TUNED, IN_PROCESS):
        note += f" (the client {middle('client_cpu_us'):.1f})"
    note += f"; p50 {middle('p50_us'):.0f}, p99 {middle('p99_us'):.0f}, p99.9 {middle('p999_us'):.0f}, longest {middle('max_us'):.0f} us"
    about = result["peers"].get(peer, {}).get("note", "")
    if about:
        note += f"; {about}"
    if workload.sequential:
        return row(f"{name}: {peer}", [s["mb_per_second"] for s in mine], unit="MB/s", digits=0, note=note)
    return row(f"{name}: {peer}", [s["iops"] / 1000 for s in mine], unit="k/s", digits=1, note=note)


def rows(result: dict[str, Any]) -> list[Row]:
    workloads = [Workload(**words) for words in result["workloads"]]
    others = [name for name in result["peers"] if name != "fvd"]
    found: list[Row | None] = []
    goals: set[tuple[str, str, str]] = set()
    for workload, peer, field, goal in GOALS:
        found.append(compared(result, workload.name, field, peer, goal=first_write_goal(result) if goal == "first write" else goal))
        goals.add((workload.name, peer, field))
    for workload in HEADLINE:
        name = f"{workload.name}, in process"
        found.append(compared(result, name, "iops", FIO, IN_PROCESS, ">= 0.95"))
        found += [compared(result, name, "iops", FIO_TUNED, IN_PROCESS), compared(result, name, "cpu_us_per_request", FIO, IN_PROCESS)]
    for workload in workloads:
        for field in FIELDS:
            found += [compared(result, workload.name, field, peer) for peer in others if (workload.name, peer, field) not in goals]
    for workload in workloads:
        found += [absolute(result, workload, workload.name, peer) for peer in result["peers"]]
    for workload in HEADLINE:
        found += [absolute(result, workload, f"{workload.name}, in process", name) for name in (IN_PROCESS, FIO, FIO_TUNED)]
    for peer, reason in result["not_measured"].items():
        found.append(missing(f"{peer}", reason))
    if result["mode"] == "quick":
        found.append(missing("other workloads and peers", "only in a longer run: see bench/README.md"))
    return [one for one in found if one is not None]


def plots(result: dict[str, Any]) -> list[Plot]:
    samples = result["samples"]
    workloads = [Workload(**words) for words in result["workloads"]]
    shown = [name for name in MAIN_PEERS if any(s["peer"] == name for s in samples)]

    def bars(
        name: str, title: str, wanted: list[Workload], field: str, unit: str, scale: float, better: Literal["more", "less"]
    ) -> Plot | None:
        wanted = [workload for workload in wanted if workload in workloads]
        if not wanted:
            return None
        series: list[Series] = []
        for peer in shown:
            points = [[s[field] / scale for s in samples if (s["peer"], s["workload"]) == (peer, w.name)] for w in wanted]
            if any(points):
                series.append({"name": peer, "points": points})
        return {
            "name": name,
            "title": title,
            "kind": "bars",
            "unit": unit,
            "x": [w.name for w in wanted],
            "series": series,
            "better": better,
        }

    def spread_of(workload: Workload) -> Plot | None:
        series: list[Series] = []
        for peer in shown:
            seen = [us for s in samples if (s["peer"], s["workload"]) == (peer, workload.name) for us in s.get("quantiles_us", [])]
            if seen:
                series.append({"name": peer, "points": [seen]})
        if not series:
            return None
        name = f"latency-{workload.pattern}-{workload.depth}"
        title = f"Latency, {workload.name}"
        return {
            "name": name, "title": title, "kind": "distribution", "unit": "us", "x": [workload.name], "series": series,
            "logarithmic": True, "better": "less",
        }  # fmt: skip

    random_small = [workload for workload in workloads if workload.block_bytes == 4 * KIB]
    found = [
        bars("random-4k", "4 KiB random", random_small, "iops", "k/s", 1000, "more"),
        bars("sequential-1m", "1 MiB sequential", [w for w in workloads if w.block_bytes == MIB], "mb_per_second", "MB/s", 1, "more"),
        bars("cpu-per-request", "Server CPU per request, 4 KiB", random_small, "cpu_us_per_request", "us", 1, "less"),
        *(spread_of(workload) for workload in LATENCIES),
        *every_peer(result),
    ]
    return [plot for plot in found if plot is not None and plot["series"]]


def every_peer(result: dict[str, Any]) -> list[Plot]:
    """Where there are many peers, they are the groups."""
    if len(result["peers"]) <= len(MAIN_PEERS):
        return []
    found: list[Plot] = []
    names = [name for name in result["peers"] if name not in result["not_measured"]]
    pairs: tuple[tuple[str, str, tuple[Workload, ...]], ...] = (
        ("every-peer", "4 KiB random QD32, every peer", HEADLINE),
        ("every-peer-first", "4 KiB while allocating, every peer", (FIRST_WRITE, FIRST_TOUCH, COPY_ON_WRITE)),
    )
    for name, title, wanted in pairs:
        series: list[Series] = [
            {
                "name": w.name,
                "points": [[s["iops"] / 1000 for s in result["samples"] if (s["peer"], s["workload"]) == (p, w.name)] for p in names],
            }
            for w in wanted
        ]
        found.append({"name": name, "title": title, "kind": "bars", "unit": "k/s", "x": list(names), "series": series, "better": "more"})
    return found
