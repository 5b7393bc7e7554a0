# SPDX-License-Identifier: Apache-2.0
"""What a flush costs: 4 KiB random writes with a flush after every write, and after every 32, on data that are mapped and while allocating.

While allocating, each write is the first to its 64 KiB, so that each changes metadata that the next flush has to make durable. A flush at
depth 32 is sent while other writes are under way, as a guest's is.
"""

from __future__ import annotations

import contextlib
import math
import random
import statistics
from dataclasses import dataclass
from typing import Any

from loads import KIB, MIB, fill, spread_offsets, trace
from machine import CannotMeasure, need
from peers import Peer, Served, all_peers
from suite import Plan, Plot, Row, missing, ratio, row

TITLE = "a flush after every write, and after every 32, mapped and while allocating"

BLOCK_BYTES = 4 * KIB
DISTANCE_BYTES = 64 * KIB  # fvd's block and qcow2's cluster
MAPPED_BYTES = 128 * MIB
RUN_SHARE = 0.2  # of plan.seconds, for one run
WRITES_PER_SECOND_MAX = {1: 30_000, 32: 200_000}  # a trace must not end before its time: by depth
QUICK_PEERS = ("fvd", "pass-through", "qcow2")
NORMAL_PEERS = ("fvd", "pass-through", "qemu raw", "qcow2")


@dataclass(frozen=True)
class Case:
    flush_every: int  # and the depth
    allocating: bool

    @property
    def name(self) -> str:
        every = "every write, QD1" if self.flush_every == 1 else f"every {self.flush_every}, QD{self.flush_every}"
        return f"flush after {every}, {'allocating' if self.allocating else 'mapped'}"


CASES = tuple(Case(every, allocating) for allocating in (False, True) for every in (1, 32))
QUICK_CASES = tuple(case for case in CASES if case.flush_every == 32)
GOALS = {False: ("pass-through", ">= 0.95"), True: ("qcow2", ">= 1.5")}  # by whether it allocates


def random_offsets(count: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(MAPPED_BYTES // BLOCK_BYTES) * BLOCK_BYTES for _ in range(count)]


def run(served: Served, case: Case, offsets: list[int], seconds: float) -> dict[str, Any]:
    clock = served.cpu_clock()
    found = trace(
        served.socket,
        offsets,
        block_bytes=BLOCK_BYTES,
        depth=case.flush_every,
        flush_every=case.flush_every,
        seconds=seconds,
    )
    del found["quantiles_us"]
    return found | {"cpu_us_per_request": clock.us_per_request(found["operations"])}


def allocate(peer: Peer, case: Case, size_bytes: int, seconds: float, seed: int) -> dict[str, Any]:
    """On a fresh disk."""
    with peer.served(size_bytes) as served:
        return run(served, case, spread_offsets(size_bytes, DISTANCE_BYTES, seed), seconds)


def measure(plan: Plan) -> dict[str, Any]:
    need("fio", "losetup")
    found = all_peers()
    names: tuple[str, ...] = plan.of(QUICK_PEERS, NORMAL_PEERS, tuple(name for name, peer in found.items() if peer.stores))
    cases = plan.of(QUICK_CASES, CASES, CASES)
    seconds = plan.seconds * plan.of(2 * RUN_SHARE, RUN_SHARE, 1)
    samples: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        mapped: dict[str, Served] = {}
        for name in names:
            try:
                mapped[name] = stack.enter_context(found[name].served(MAPPED_BYTES))
                fill(mapped[name].socket, MAPPED_BYTES)
            except CannotMeasure as reason:
                failed[name] = str(reason)
        for number in range(plan.rounds):
            for case in cases:
                able = [name for name in names if name not in failed and (not case.allocating or plan.mode == "full" or name != "qemu raw")]
                for name in able if number % 2 == 0 else reversed(able):
                    if name in failed:
                        continue
                    try:
                        if case.allocating:
                            # What a run of this depth gets through is not much more.
                            size_bytes = plan.of(128, 128 if case.flush_every == 1 else 512, 512) * MIB
                            sample = allocate(found[name], case, size_bytes, seconds, number)
                        else:
                            offsets = random_offsets(int(seconds * WRITES_PER_SECOND_MAX[case.flush_every]), number)
                            sample = run(mapped[name], case, offsets, seconds)
                    except CannotMeasure as reason:
                        failed[name] = str(reason)
                        continue
                    samples.append({"round": number, "peer": name, "case": case.name, **sample})
    notes = {name: found[name].note for name in names}
    return {"mode": plan.mode, "samples": samples, "peers": list(names), "notes": notes, "not_measured": failed, "seconds": seconds}


def rows(result: dict[str, Any]) -> list[Row]:
    samples = result["samples"]
    found: list[Row] = []

    def middle(peer: str, case: Case, field: str) -> float:
        values = [s[field] for s in samples if (s["peer"], s["case"]) == (peer, case.name) and field in s]
        return float(statistics.median(values)) if values else math.nan

    for case in CASES:
        for peer in result["peers"]:
            if peer == "fvd":
                continue
            goal = GOALS[case.allocating][1] if peer == GOALS[case.allocating][0] else ""
            what = f"{case.name}, writes a second: fvd / {peer}"
            values = ratio(samples, "iops", {"peer": "fvd", "case": case.name}, {"peer": peer, "case": case.name})
            if values:
                note = f"{middle('fvd', case, 'iops') / 1000:.2f} and {middle(peer, case, 'iops') / 1000:.2f} k/s"
                note += (
                    f"; {middle('fvd', case, 'cpu_us_per_request'):.0f} and {middle(peer, case, 'cpu_us_per_request'):.0f} us CPU a write"
                )
                against = "" if peer == "pass-through" and not goal else peer
                found.append(row(what, values, goal=goal, note=note, against=against, better="more"))
            elif goal:
                found.append(missing(what, result["not_measured"].get(peer, "not in this mode"), goal))
    for case in CASES:
        for peer in result["peers"]:
            values = [s["iops"] / 1000 for s in samples if (s["peer"], s["case"]) == (peer, case.name)]
            if values:
                note = f"a flush: p50 {middle(peer, case, 'flush_p50_us'):.0f}, p99 {middle(peer, case, 'flush_p99_us'):.0f} us; "
                note += f"a write: p50 {middle(peer, case, 'p50_us'):.0f}, p99 {middle(peer, case, 'p99_us'):.0f} us"
                about = result["notes"][peer]
                found.append(row(f"{case.name}: {peer}", values, unit="k/s", note=f"{note}; {about}" if about else note))
    return found + [missing(peer, reason) for peer, reason in result["not_measured"].items()]


def plots(result: dict[str, Any]) -> list[Plot]:
    samples = result["samples"]
    cases = [case.name for case in CASES if any(s["case"] == case.name for s in samples)]
    shown = [peer for peer in NORMAL_PEERS if any(s["peer"] == peer for s in samples)]
    return [
        {
            "name": "flushes",
            "title": "4 KiB random writes with flushes",
            "kind": "bars",
            "unit": "k/s",
            "x": list(cases),
            "series": [
                {
                    "name": peer,
                    "points": [[s["iops"] / 1000 for s in samples if (s["peer"], s["case"]) == (peer, case)] for case in cases],
                }
                for peer in shown
            ],
            "better": "more",
        }
    ]
