# SPDX-License-Identifier: Apache-2.0
"""Copy-on-read and prefetching from a slow base: the second start, a guest that is busy and idle by turns, and an application's start.

The same is done to an fvd disk and to a qcow2 overlay in qemu-storage-daemon (copy-on-read filter, block-stream), in one run, interleaved.
The base has a read delay of 5 ms and a rate limit of 50 MB/s. Ratios are within a round (or within a turn), medians over all of them.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import app_start
from disks import BURST_SECONDS, MAKERS, RATE_BYTES, READ_DELAY, Disk, served_disk
from machine import CannotMeasure, median, output
from suite import Plan, Plot, Row, row

TITLE = "A slow base: what do copy-on-read, prefetching and a profile bring, and what does the guest feel of it?"
MIB = 1 << 20
GUEST = Path(__file__).resolve().parent / "nbd_guest.py"
READS = 3000
OWN_BYTES = 64 * MIB
TURN_SECONDS_PER_SECOND = 2.5  # a turn is as much longer than what other benchmarks do in one run: 10 s instead of 4


def python_with_libnbd() -> str:
    """A Python that has libnbd's bindings: the distribution's, as a rule."""
    for python in (sys.executable, "/usr/bin/python3"):
        if shutil.which(python) and not subprocess.run([python, "-c", "import nbd"], capture_output=True, check=False).returncode:
            return python
    raise CannotMeasure("no Python here has libnbd's bindings: apt-get install python3-libnbd")


@contextlib.contextmanager
def guest(what: str, disk: Disk, base_bytes: int, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A guest at work on a disk; its lines are on its standard output."""
    command = [python_with_libnbd(), str(GUEST), what, str(disk.socket), "--base-bytes", str(base_bytes)]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def start_twice(kind: str, copy_on_read: bool, base_bytes: int, seed: int, reads: int = READS) -> dict[str, Any]:
    """The same start twice on a fresh disk."""
    with served_disk(kind, base_bytes, copy_on_read) as disk:
        metadata, written = disk.metadata_writes(), disk.written_bytes()
        starts = []
        for _ in range(2):
            with guest("start", disk, base_bytes, reads=reads, seed=seed) as process:
                assert process.stdout is not None
                starts.append(json.loads(process.stdout.readline()))
        after = disk.metadata_writes()
        return {
            "seconds": [start["seconds"] for start in starts],
            "p99_seconds": [start["p99_seconds"] for start in starts],
            "bytes": starts[0]["bytes"],
            "metadata_writes": None if metadata is None or after is None else after - metadata,
            "written_bytes": disk.written_bytes() - written,
        }


def take_turns(kind: str, fill: bool, pauses: bool, base_bytes: int, turns: int, seconds: float, seed: int) -> list[dict[str, Any]]:
    """A guest that is busy and idle by turns on a fresh disk, while the base is copied or not; for each turn what it was like."""
    found: list[dict[str, Any]] = []
    options: dict[str, Any] = {"own_bytes": OWN_BYTES, "turns": turns, "seconds": seconds, "seed": seed}
    if pauses:
        options["pauses"] = True
    with served_disk(kind, base_bytes) as disk, guest("alternate", disk, base_bytes, **options) as process:
        assert process.stdout is not None
        before = (0, 0.0)
        for text in process.stdout:
            line = json.loads(text)
            if line["state"] == "busy" and line["turn"] == 0 and fill:
                disk.fill_begins()
            now = (disk.copied_bytes(OWN_BYTES) if fill else 0, disk.cpu_seconds())
            copied, cpu = now[0] - before[0], now[1] - before[1]
            if line["state"] == "idle":
                found.append({"latencies": line["latencies"], "busy_copied_bytes": copied, "busy_cpu_seconds": cpu})
            elif line["turn"]:
                found[-1] |= {"idle_copied_bytes": copied, "idle_cpu_seconds": cpu}
            before = now
    if len(found) != turns:
        raise CannotMeasure("the guest has failed")
    return found


def measure(plan: Plan) -> dict[str, Any]:
    rounds, seconds = plan.rounds, plan.seconds
    python_with_libnbd()
    kinds = [kind for kind in MAKERS if kind != "qemu" or shutil.which("qemu-storage-daemon")]
    starts: list[dict[str, Any]] = []
    for number in range(rounds):
        variants = [("fvd", True), ("fvd", False), *(("qemu", True) for kind in kinds if kind == "qemu")]
        for kind, copy_on_read in variants if number % 2 == 0 else reversed(variants):
            found = start_twice(kind, copy_on_read, 1 << 30, seed=number)
            starts.append({"round": number, "server": kind, "copy_on_read": copy_on_read, **found})
    turn_seconds = seconds * TURN_SECONDS_PER_SECOND
    turn_count = 3
    # More than can be copied, also by who does not pause while the guest is busy.
    base_bytes = OWN_BYTES + (int(turn_seconds * 2 * turn_count * RATE_BYTES * 1.1) // MIB + 64) * MIB
    turns: list[dict[str, Any]] = []
    for number in range(max(1, rounds // 3)):
        runs = [(kind, fill, False) for kind in kinds for fill in (False, True)] + [("fvd", fill, True) for fill in (False, True)]
        for kind, fill, pauses in runs if number % 2 == 0 else reversed(runs):
            for turn, found in enumerate(take_turns(kind, fill, pauses, base_bytes, turn_count, turn_seconds, seed=number)):
                turns.append({"round": number, "turn": turn, "server": kind, "fill": fill, "pauses": pauses, **found})
    try:
        application: dict[str, Any] = app_start.measure(max(1, rounds // 3))
    except CannotMeasure as reason:
        application = {"not_measured": str(reason)}
    versions = {"nbdkit": output("nbdkit", "--version")}
    if "qemu" in kinds:
        versions["qemu-storage-daemon"] = output("qemu-storage-daemon", "--version").splitlines()[0]
    return {
        "starts": starts,
        "turns": turns,
        "turn_seconds": turn_seconds,
        "application": application,
        "versions": versions,
        "base": {"read_delay": READ_DELAY, "rate_bytes": RATE_BYTES, "burst_seconds": BURST_SECONDS},
    }


def rows_of_starts(starts: list[dict[str, Any]]) -> list[Row]:
    def taken(server: str, copy_on_read: bool) -> list[dict[str, Any]]:
        return [start for start in starts if (start["server"], start["copy_on_read"]) == (server, copy_on_read)]

    def faster(found: list[dict[str, Any]]) -> list[float]:
        return [start["seconds"][0] / start["seconds"][1] for start in found]

    def seconds(found: list[dict[str, Any]], start: int) -> list[float]:
        return [one["seconds"][start] for one in found]

    def each(ours: list[float], theirs: list[float]) -> list[float]:
        return [a / b for a, b in zip(ours, theirs, strict=True)]

    fvd, control, qemu = taken("fvd", True), taken("fvd", False), taken("qemu", True)
    rows = [
        row("second start, copy-on-read: times faster than the first", faster(fvd), goal=">= 10"),
        row("second start, without copy-on-read (control)", faster(control)),
        row("first start: with copy-on-read / without, s", each(seconds(fvd, 0), seconds(control, 0))),
        row("metadata writes (journal, maps) by two starts with flushes", [one["metadata_writes"] for one in fvd], goal="<= 0", digits=0),
        row("written to storage / read by the guest", [one["written_bytes"] / one["bytes"] for one in fvd]),
    ]
    if qemu:
        peer: dict[str, Any] = {"against": "qemu", "better": "less"}
        rows += [
            row("qemu: second start, copy-on-read: times faster", faster(qemu)),
            row("first start: fvd / qemu, s", each(seconds(fvd, 0), seconds(qemu, 0)), **peer),
            row("second start: fvd / qemu, s", each(seconds(fvd, 1), seconds(qemu, 1)), **peer),
            row("qemu: written to storage / read by the guest", [one["written_bytes"] / one["bytes"] for one in qemu]),
        ]
    for name, found in (("fvd", fvd), ("fvd without copy-on-read", control), ("qemu", qemu)):
        if found:
            rows += [row(f"{which} start, {name}", seconds(found, index), unit="s") for index, which in enumerate(("first", "second"))]
    return rows


def rows_of_turns(turns: list[dict[str, Any]], turn_seconds: float) -> list[Row]:
    rows: list[Row] = []
    for server, pauses in (("fvd", False), ("fvd", True), ("qemu", False)):
        mine = [turn for turn in turns if (turn["server"], turn["pauses"]) == (server, pauses)]
        quiet, filled = [turn for turn in mine if not turn["fill"]], [turn for turn in mine if turn["fill"]]
        if not mine:
            continue
        name = f"{server}{', bursts and pauses' if pauses else ''}"
        goal = "<= 1.25" if server == "fvd" else ""
        for what, label in (("all", "all requests"), ("own", "of what is local")):
            values = [
                with_fill["latencies"][what]["p99"] / without["latencies"][what]["p99"]
                for without, with_fill in zip(quiet, filled, strict=True)
            ]
            rows.append(row(f"{name}: p99 while busy, prefetching / not, {label}", values, goal=goal))
        share = [turn["idle_copied_bytes"] / (RATE_BYTES * turn_seconds) for turn in filled]
        goal = ">= 0.8" if server == "fvd" else ""
        rows.append(row(f"{name}: prefetched while idle / what the base's rate lets", share, goal=goal))
        rows.append(
            row(f"{name}: prefetched while busy / the same", [turn["busy_copied_bytes"] / (RATE_BYTES * turn_seconds) for turn in filled])
        )
        cost = [turn["idle_cpu_seconds"] * 1000 / (turn["idle_copied_bytes"] / MIB) for turn in filled if turn["idle_copied_bytes"]]
        if cost:
            rows.append(row(f"{name}: server CPU per copied MiB", cost, unit="ms"))
        for label, found in (("", quiet), (", prefetching", filled)):
            local = median([turn["latencies"]["own"]["p99"] * 1000 for turn in found])
            everything = [turn["latencies"]["all"]["p99"] * 1000 for turn in found]
            rows.append(row(f"{name}: p99 while busy{label}", everything, unit="ms", note=f"of what is local: {local:.2f} ms"))
    cpu = {
        server: [turn["idle_cpu_seconds"] / turn["idle_copied_bytes"] for turn in turns if is_fill(turn, server)]
        for server in ("fvd", "qemu")
    }
    if cpu["fvd"] and cpu["qemu"]:
        ratios = [a / b for a, b in zip(cpu["fvd"], cpu["qemu"], strict=True)]
        rows.append(row("server CPU per copied MiB: fvd / qemu", ratios, against="qemu", better="less"))
    return rows


def is_fill(turn: dict[str, Any], server: str) -> bool:
    return bool(turn["server"] == server and turn["fill"] and not turn["pauses"] and turn["idle_copied_bytes"])


def rows(result: dict[str, Any]) -> list[Row]:
    return rows_of_starts(result["starts"]) + rows_of_turns(result["turns"], result["turn_seconds"]) + app_start.rows(result["application"])


def plots(result: dict[str, Any]) -> list[Plot]:
    kinds = {"fvd": ("fvd", True), "fvd without copy-on-read": ("fvd", False), "qemu": ("qemu", True)}

    def starts(wanted: tuple[str, bool], index: int) -> list[float]:
        return [one["seconds"][index] for one in result["starts"] if (one["server"], one["copy_on_read"]) == wanted]

    def p99(server: str, fill: bool) -> list[float]:
        mine = [turn for turn in result["turns"] if (turn["server"], turn["fill"], turn["pauses"]) == (server, fill, False)]
        return [turn["latencies"]["all"]["p99"] * 1000 for turn in mine]

    starting: Plot = {
        "name": "starts",
        "title": "The same start twice, from a slow base",
        "kind": "bars",
        "unit": "s",
        "x": ["first start", "second start"],
        "better": "less",
        "series": [{"name": name, "points": [starts(wanted, index) for index in (0, 1)]} for name, wanted in kinds.items()],
    }
    busy: Plot = {
        "name": "busy",
        "title": "What a busy guest feels of prefetching: 99 of 100 requests are faster than",
        "kind": "bars",
        "unit": "ms",
        "x": ["not prefetching", "prefetching"],
        "better": "less",
        "series": [{"name": name, "points": [p99(name, fill) for fill in (False, True)]} for name in ("fvd", "qemu")],
    }
    return [starting, busy, *app_start.plots(result["application"])]
