# SPDX-License-Identifier: Apache-2.0
"""A guest's disk as its virtio-blk driver sees it, over vhost-user: fvd, what a guest uses today, QEMU's raw and qcow2, and the limit.

The front end is one for all (front.c). Each server has a loop device of its own with direct I/O over memory. QEMU's get the way of asking
the kernel that is the fastest in each case: a round before the first tells. CPU time is that of all server processes.

The ring server has no mapping. A ratio to it counts only if it reaches `LIMIT_OVER_RAW` times QEMU's raw in the same run: else it is not
the server that was measured.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fronts import ask, fill
from guest_cases import FIRST, FIRST_ZEROED, OVER_BASE, READ_1, READ_32, SEQUENTIAL_1M, WRITE_1, WRITE_32, Case, cases_of
from guest_many import TOTAL_DEPTH, idle_memory, many_disks
from loads import MIB
from machine import CannotMeasure, loop_device, need, zeroing_device
from matrix import base_image, order
from peers import Peer, Served
from peers_guest import FVD, LIMIT, QCOW2, RAW, TODAY, WAYS, guest_peers, qemu_name
from suite import Headline, Plan, Plot, Row, missing, ratio, row

TITLE = "a guest's own path: virtio-blk over vhost-user, by one front end"

COLUMNS = (FVD, TODAY, RAW, QCOW2, LIMIT)
MANY = (1, 64)
LIMIT_OVER_RAW = 1.9
TRY_SECONDS = 0.3  # of a way of QEMU in a case
FIELDS: dict[str, tuple[str, Literal["more", "less"]]] = {"iops": ("operations a second", "more"), "cpu_us_per_request": ("CPU", "less")}


@dataclass(frozen=True)
class Goal:
    case: Case
    peer: str
    iops: str
    cpu: str


GOALS = (
    *(
        goal
        for case in (READ_32, WRITE_32)
        for goal in (
            Goal(case, QCOW2, ">= 1.9", "<= 0.33"),
            Goal(case, RAW, ">= 1.7", "<= 0.37"),
            Goal(case, TODAY, ">= 2.5", "<= 0.25"),
            Goal(case, LIMIT, ">= 0.93", ""),
        )
    ),
    *(Goal(case, QCOW2, ">= 1.05", "<= 0.8") for case in (READ_1, WRITE_1)),
    Goal(FIRST, QCOW2, ">= 1.5", "<= 0.6"),
    *(Goal(case, RAW, ">= 1.0", "") for case in SEQUENTIAL_1M),
)
MANY_GOALS = {"iops": ">= 0.7", "cpu_us_per_request": "<= 1.5"}
IDLE_GOAL = "<= 16"  # MiB


# --- Measuring -------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    mapped_bytes: int
    fresh_bytes: int  # of a disk that is written once
    many_bytes: int  # of all of many disks


def ways_of(name: str) -> list[str]:
    """The peers that are one column."""
    return [qemu_name(name, way) for way in WAYS] if name in (RAW, QCOW2) else [name]


def run_mapped(served: Served, case: Case, seconds: float) -> dict[str, Any]:
    return ask([served.socket], served.pids, seconds=seconds, **case.options)


def run_fresh(peer: Peer, case: Case, size_bytes: int, base: str | None) -> dict[str, Any]:
    """On a disk that is made for it; each place once, and the flush in the end counts."""
    make_device = zeroing_device if case.kind == FIRST_ZEROED.kind else loop_device
    with peer.served(size_bytes, base if case.kind == OVER_BASE.kind else None, make_device) as served:
        return ask([served.socket], served.pids, **case.options)


class Guests:
    """All servers, each with a mapped disk, and what was learned of them."""

    def __init__(self, stack: contextlib.ExitStack, sizes: Sizes, ways: Sequence[str]) -> None:
        self.peers = {
            name: peer for name, peer in guest_peers().items() if not any(f"aio={way}" in name for way in WAYS if way not in ways)
        }
        self.sizes = sizes
        self.served: dict[str, Served] = {}
        self.failed: dict[str, str] = {}
        self.base: str | None = None
        self.chosen: dict[str, dict[str, str]] = {}  # by case and column: which of QEMU's ways
        for name, peer in self.peers.items():
            try:
                self.served[name] = stack.enter_context(peer.served(sizes.mapped_bytes))
                fill([self.served[name].socket])
            except CannotMeasure as reason:
                self.served.pop(name, None)
                self.failed[name] = str(reason)

    def run(self, name: str, case: Case, seconds: float) -> dict[str, Any] | None:
        """None: it cannot be measured, and `failed` says why."""
        if name in self.failed or name not in self.peers or self.key(name, case) in self.failed:
            return None
        try:
            if case.kind == "mapped":
                return run_mapped(self.served[name], case, seconds)
            return run_fresh(self.peers[name], case, self.sizes.fresh_bytes, self.base)
        except CannotMeasure as reason:
            self.failed[self.key(name, case)] = str(reason)
            return None

    @staticmethod
    def key(name: str, case: Case) -> str:
        return f"{name}: {case.name}"

    def able(self, case: Case) -> list[str]:
        """Whole columns. What lies at once where it is has no first write; who knows no base has no copy."""
        names = COLUMNS if case.kind == "mapped" else (FVD, TODAY, QCOW2)
        return [name for name in names if any(way in self.served for way in ways_of(name))]

    def choose(self, case: Case) -> None:
        """One run of each of QEMU's ways; the one with the most operations a second stands for them."""
        self.chosen[case.name] = {}
        for name in self.able(case):
            tried = {way: found["iops"] for way in ways_of(name) if (found := self.run(way, case, TRY_SECONDS))}
            if tried:
                self.chosen[case.name][name] = max(tried, key=tried.__getitem__)


def measure(plan: Plan) -> dict[str, Any]:
    need("losetup", "gcc")
    sizes = Sizes(plan.of(64, 256, 512) * MIB, plan.of(32, 128, 256) * MIB, plan.of(256, 1024, 1024) * MIB)
    seconds = plan.seconds * plan.of(0.1, 0.1, 0.2)
    cases = cases_of(plan.mode)
    samples: list[dict[str, Any]] = []
    result: dict[str, Any] = {"mode": plan.mode, "samples": samples, "cases": [case.name for case in cases], "total_depth": TOTAL_DEPTH}
    with contextlib.ExitStack() as stack:
        guests = Guests(stack, sizes, plan.of(WAYS[:1], WAYS, WAYS))
        if any(case.kind == OVER_BASE.kind for case in cases):
            guests.base = stack.enter_context(base_image(sizes.fresh_bytes))
        for case in cases:
            guests.choose(case)
        for number in range(plan.rounds):
            for case in cases:
                for name in order(list(guests.chosen[case.name]), number):
                    if found := guests.run(guests.chosen[case.name][name], case, seconds):
                        samples.append({"round": number, "peer": name, "case": case.name, **found})
        result |= {"chosen": guests.chosen, "not_measured": guests.failed}
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "many": lambda: many_disks(MANY, sizes.many_bytes, ("read", "write"), plan.rounds, seconds),
        "idle": lambda: idle_memory(plan.of(1, 1, 3)),
    }
    for part, measured in parts.items():
        try:
            if plan.mode == "quick":
                raise CannotMeasure("takes longer than the quick mode has")
            result[part] = measured()
        except CannotMeasure as reason:
            result[part] = []
            result["not_measured"][part] = str(reason)
    return result


# --- What a reader wants to know -------------------------------------------------------------------------------------------------------


def values_of(result: dict[str, Any], peer: str, case: str, field: str) -> list[float]:
    return [s[field] for s in result["samples"] if (s["peer"], s["case"]) == (peer, case)]


def middle(result: dict[str, Any], peer: str, case: str, field: str) -> float:
    return float(statistics.median(values_of(result, peer, case, field)))


def figures(result: dict[str, Any], peer: str, case: str) -> str:
    return f"{middle(result, peer, case, 'iops') / 1000:.1f} k/s, {middle(result, peer, case, 'cpu_us_per_request'):.2f} us"


def why_not(result: dict[str, Any], case: str, *peers: str) -> str:
    names = [name for peer in peers for way in ways_of(peer) for name in (way, f"{way}: {case}")]
    reasons = [result["not_measured"][name] for name in names if name in result["not_measured"]]
    return str(reasons[0]) if reasons else f"not in the {result['mode']} mode"


def limit_counts(result: dict[str, Any], case: str) -> tuple[bool, str]:
    """Whether the ring server was as far from QEMU's raw as it is when all is well."""
    over_raw = ratio(result["samples"], "iops", {"peer": LIMIT, "case": case}, {"peer": RAW, "case": case})
    if not over_raw:
        return False, "the ring server was not compared with QEMU's raw"
    reached = statistics.median(over_raw)
    return reached >= LIMIT_OVER_RAW, f"the ring server reaches {reached:.2f} times QEMU's raw here"


def ratio_row(result: dict[str, Any], case: str, peer: str, field: str, goal: str = "") -> Row:
    words, better = FIELDS[field]
    what = f"{case}, {words}: fvd / {peer}"
    values = ratio(result["samples"], field, {"peer": FVD, "case": case}, {"peer": peer, "case": case})
    if not values:
        return missing(what, why_not(result, case, FVD, peer), goal)
    note = " and ".join(figures(result, name, case) for name in (FVD, peer))
    if peer != LIMIT:
        return row(what, values, goal=goal, note=note, against=peer, better=better)
    counts, why = limit_counts(result, case)
    if goal and not counts:
        return missing(what, f"{why}, so that a ratio to it does not count; it was {statistics.median(values):.2f}", goal)
    return row(what, values, goal=goal, note=f"{note}; {why}")


def goal_rows(result: dict[str, Any]) -> list[Row]:
    made = []
    for goal in GOALS:
        made.append(ratio_row(result, goal.case.name, goal.peer, "iops", goal.iops))
        if goal.cpu:
            made.append(ratio_row(result, goal.case.name, goal.peer, "cpu_us_per_request", goal.cpu))
    return made


def many_rows(result: dict[str, Any]) -> list[Row]:
    made = []
    few, many = MANY
    for side in ("read", "write"):
        for field, (words, better) in FIELDS.items():
            what = f"4 KiB random {side}, {result['total_depth']} under way in all, {words}: {many} disks / {few} disk"
            values = ratio(result["many"], field, {"side": side, "disks": many}, {"side": side, "disks": few})
            if not values:
                made.append(missing(what, str(result["not_measured"].get("many", "no round")), MANY_GOALS[field]))
                continue
            unit, scale = ("k/s", 1000) if field == "iops" else ("us", 1)
            mine = {n: [s[field] / scale for s in result["many"] if (s["side"], s["disks"]) == (side, n)] for n in MANY}
            note = " and ".join(f"{statistics.median(mine[n]):.1f}" for n in (many, few)) + f" {unit}"
            made.append(row(what, values, goal=MANY_GOALS[field], note=note, better=better))
    return made


def idle_rows(result: dict[str, Any]) -> list[Row]:
    made, ours = [], "fvd, vhost-user"
    servers = list(dict.fromkeys(s["server"] for s in result["idle"]))
    if ours not in servers:
        made.append(
            missing(
                f"memory of an idle disk of 100 GiB: {ours}", str(result["not_measured"].get("idle", why_not(result, "", FVD))), IDLE_GOAL
            )
        )
    for name in servers:
        mine = [s for s in result["idle"] if s["server"] == name]
        note = f"PSS; processes: {mine[0]['processes']}"
        values = [s["pss_bytes"] / MIB for s in mine]
        made.append(
            row(f"memory of an idle disk of 100 GiB: {name}", values, unit="MiB", goal=IDLE_GOAL if name == ours else "", note=note)
        )
    return made


def rows(result: dict[str, Any]) -> list[Row]:
    """The goals; then each case: ratios that are no goal, and each server's figures."""
    made = goal_rows(result) + many_rows(result) + idle_rows(result)
    said = {made_row["what"] for made_row in made}
    for case in result["cases"]:
        for peer in COLUMNS[1:]:
            for field in FIELDS:
                added = ratio_row(result, case, peer, field)
                if added["what"] not in said and "values" in added:
                    made.append(added)
    for case in result["cases"]:
        for peer in COLUMNS:
            values = [value / 1000 for value in values_of(result, peer, case, "iops")]
            if values:
                way = result["chosen"][case].get(peer, "").partition("aio=")[2]
                note = f"{middle(result, peer, case, 'cpu_us_per_request'):.2f} us CPU a request"
                note += f"; p50 {middle(result, peer, case, 'p50_us'):.0f}, p99 {middle(result, peer, case, 'p99_us'):.0f} us"
                made.append(row(f"{case}: {peer}", values, unit="k/s", note=note + (f"; aio={way}, the fastest" if way else "")))
    return made + [missing(name, reason) for name, reason in result["not_measured"].items()]


def headline(result: dict[str, Any]) -> Headline:
    """Each server beside the others, absolutely."""
    shown = [name for name in COLUMNS if any(s["peer"] == name for s in result["samples"])]
    lines = []
    for case in result["cases"]:
        cells = [figures(result, name, case) if values_of(result, name, case, "iops") else "" for name in shown]
        if any(cells):
            lines.append([case, *cells])
    caption = (
        "What a guest's virtio-blk gets over vhost-user: thousands of requests a second, and CPU time of all server processes for each."
    )
    return {"head": ["", *shown], "rows": lines, "caption": caption}


def plots(result: dict[str, Any]) -> list[Plot]:
    shown = [name for name in COLUMNS if any(s["peer"] == name for s in result["samples"])]
    cases = [case for case in result["cases"] if case.startswith("4 KiB random") and any(s["case"] == case for s in result["samples"])]
    if not cases:
        return []
    found: list[Plot] = []
    for field, name, unit, better in (
        ("iops", "random-4k", "k/s", "more"),
        ("cpu_us_per_request", "random-4k-cpu", "us of server CPU", "less"),
    ):
        scale = 1000 if field == "iops" else 1
        found.append(
            {
                "name": name,
                "title": "4 KiB through a guest's virtio-blk",
                "kind": "bars",
                "unit": unit,
                "x": cases,
                "series": [
                    {"name": peer, "points": [[v / scale for v in values_of(result, peer, case, field)] for case in cases]}
                    for peer in shown
                ],
                "better": "more" if better == "more" else "less",
                "caption": "CPU time is that of all server processes; the front end is the same for all.",
            }
        )
    return found
