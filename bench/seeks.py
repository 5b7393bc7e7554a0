# SPDX-License-Identifier: Apache-2.0
"""How far a head would travel: a guest's trace with a working set of more than 20 GB, mapped through each format's own layout.

The trace is a real guest's (bench/traces/README.md), the layouts are those of real images that were written in its order. A request
becomes as many I/Os as it has pieces that are not adjacent; the distance of an I/O is that from the end of the one before. What is read
before it was written is nowhere in a compact format, and costs nothing. The formats' own metadata are not in it: `postmark` counts those.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from guest_trace import READ, WRITE, Trace, load
from layouts import Layout, Numbers, layouts
from machine import CannotMeasure
from suite import Plan, Plot, Row, missing, row

TITLE = "How far a head would travel for a guest with a working set of 20 GB"
TRACES = Path(__file__).resolve().parent / "traces"
DISKS = {
    "ext3's layout on 100 GiB": "postmark-100g-ext3.xz",  # metadata take their places first, all over the disk
    "ext4 on 100 GiB": "postmark-100g.xz",  # hardly a quarter of it in use
    "ext4 on 26 GiB": "postmark-26g.xz",  # nearly full
}
PHASES = ("creation", "transactions")
MIB = 1 << 20
GOAL = "<= 1.25"
QUANTILES = 200  # of the distances, kept for the picture
QUICK = ("raw", "fvd append", "fvd spread")
NORMAL = (*QUICK, "qcow2")


@dataclass(frozen=True)
class Ios:
    """What a phase becomes in a layout."""

    starts: Numbers
    ends: Numbers
    requests: int  # the guest's

    @property
    def distances(self) -> Numbers:
        found: Numbers = np.abs(self.starts[1:] - self.ends[:-1])
        return found


def ios(trace: Trace, phase: str, layout: Layout) -> Ios:
    """Reads and writes of a phase: their pieces in the storage, adjacent ones of a request as one."""
    unit = layout.unit_bytes
    numbers = np.arange(len(trace.kinds))[trace.phase(phase)]
    numbers = numbers[np.isin(trace.kinds[numbers], (READ, WRITE)) & (trace.lengths[numbers] > 0)]
    offsets, ends = trace.offsets[numbers], trace.offsets[numbers] + trace.lengths[numbers]
    first = offsets // unit
    counts = (ends - 1) // unit - first + 1
    request = np.repeat(np.arange(len(numbers)), counts)
    units = first[request] + np.arange(len(request)) - np.repeat(np.cumsum(counts) - counts, counts)
    begins = np.maximum(offsets[request], units * unit)
    lengths = np.minimum(ends[request], (units + 1) * unit) - begins
    there = layout.since[units] <= numbers[request]
    request, units, begins, lengths = request[there], units[there], begins[there], lengths[there]
    starts = layout.places[units] + begins - units * unit
    piece_ends = starts + lengths
    parted = (starts[1:] != piece_ends[:-1]) | (request[1:] != request[:-1])
    opens, closes = np.ones(len(starts), bool), np.ones(len(starts), bool)
    opens[1:] = parted
    closes[:-1] = parted
    return Ios(starts[opens], piece_ends[closes], len(numbers))


def sample(trace: Trace, phase: str, layout: Layout) -> dict[str, Any]:
    found = ios(trace, phase, layout)
    distances = found.distances
    return {
        "phase": phase,
        "requests": found.requests,
        "ios": len(found.starts),
        "travel_bytes": int(distances.sum()),
        "sequential": int((distances == 0).sum()),
        "quantiles_bytes": [int(value) for value in np.quantile(distances, np.linspace(0, 1, QUANTILES + 1))],
    }


def measure(plan: Plan) -> dict[str, Any]:
    logging.getLogger("fvd").addHandler(logging.NullHandler())  # that memory's file system is nearly full is no news here
    disks = plan.of(list(DISKS)[:1], list(DISKS), list(DISKS))
    names = plan.of(QUICK, NORMAL, tuple(layouts()))
    also = plan.of((), ("qed",), ())  # on the first disk alone: elsewhere it is hardly another than qcow2
    samples: list[dict[str, Any]] = []
    not_measured: dict[str, str] = {}
    about: dict[str, Any] = {}
    for disk in disks:
        path = TRACES / DISKS[disk]
        if not path.exists():
            raise CannotMeasure(f"{path.name} is not there")
        trace = load(path)
        about[disk] = trace.about
        for name in (*names, *(also if disk == disks[0] else ())):
            try:
                layout = layouts()[name](trace)
            except KeyError:
                not_measured[name] = "this fvd has no such placement"
                continue
            except CannotMeasure as reason:
                not_measured[name] = str(reason)
                continue
            samples += [{"disk": disk, "layout": name, "round": 0, **sample(trace, phase, layout)} for phase in PHASES]
    return {"samples": samples, "not_measured": not_measured, "traces": about}


def travel_mib(found: dict[str, Any]) -> float:
    """For each guest request, so that formats that split them are not called better for it."""
    return float(found["travel_bytes"] / found["requests"] / MIB)


def seek_count(found: dict[str, Any]) -> float:
    """For each guest request: I/Os that do not begin where the one before ended."""
    return float((found["ios"] - 1 - found["sequential"]) / found["requests"])


def rows(result: dict[str, Any]) -> list[Row]:
    made: list[Row] = []
    table = {(s["disk"], s["phase"], s["layout"]): s for s in result["samples"]}
    for disk, phase in reversed(list(dict.fromkeys((disk, phase) for disk, phase, _ in table))):
        here = {name: s for (d, p, name), s in table.items() if (d, p) == (disk, phase)}
        made += [line for name in here if name != "raw" for line in compared(f"{phase}, {disk}", here, name, "raw")]
        made += [
            line
            for name in here
            if name.startswith("fvd") and "qcow2" in here
            for line in compared(f"{phase}, {disk}", here, name, "qcow2")
        ]
    for name, reason in result["not_measured"].items():
        made.append(missing(f"mean seek: {name} / raw", reason, GOAL if name == "fvd spread" else ""))
    return made


def compared(where: str, here: dict[str, dict[str, Any]], name: str, other: str) -> list[Row]:
    one, two = here[name], here[other]
    seeks = f"seeks: {seek_count(one):.3f} and {seek_count(two):.3f}"
    distance = row(
        f"{where}: mean seek, {name} / {other}",
        [travel_mib(one) / travel_mib(two)],
        goal=GOAL if (name, other) == ("fvd spread", "raw") else "",
        note=f"MiB for each guest request: {travel_mib(one):.0f} and {travel_mib(two):.0f}; {seeks}",
        digits=3,
    )
    if not name.startswith("fvd"):
        return [distance]
    number = row(
        f"{where}: seeks, {name} / {other}",
        [seek_count(one) / seek_count(two)],
        note=f"for each guest request {seeks}; sequential {sequential(one)} and {sequential(two)}",
        digits=3,
    )
    for made in (distance, number):
        made["against"], made["better"] = other, "less"
    return [distance, number]


def sequential(found: dict[str, Any]) -> str:
    return f"{found['sequential'] / found['ios']:.0%} of I/Os"


def plots(result: dict[str, Any]) -> list[Plot]:
    made: list[Plot] = []
    for disk in result["traces"]:
        here = [s for s in result["samples"] if s["disk"] == disk]
        names = list(dict.fromkeys(s["layout"] for s in here))
        slug = Path(DISKS[disk]).stem.removeprefix("postmark-")

        def of(name: str, phase: str, samples: list[dict[str, Any]] = here) -> dict[str, Any]:
            return next(s for s in samples if (s["layout"], s["phase"]) == (name, phase))

        made.append(
            {
                "name": f"seeks-{slug}",
                "title": f"Mean seek of a guest with 20 GB of files, against raw: {disk}",
                "kind": "bars",
                "unit": "times raw",
                "x": [name for name in names if name != "raw"],
                "series": [
                    {
                        "name": phase,
                        "points": [[travel_mib(of(name, phase)) / travel_mib(of("raw", phase))] for name in names if name != "raw"],
                    }
                    for phase in PHASES
                ],
                "better": "less",
                "goal": 1.25,
                "caption": f"{result['traces'][disk]['postmark']}; distances for each guest request, zero ones included.",
            }
        )
        made.append(
            {
                "name": f"seek-distances-{slug}",
                "title": f"Seek distances of the transactions: {disk}",
                "kind": "distribution",
                "unit": "MiB",
                "x": [],
                "series": [
                    {"name": name, "points": [[value / MIB for value in of(name, "transactions")["quantiles_bytes"]]]} for name in names
                ],
                "better": "less",
                "caption": "From the end of one I/O to the start of the next; half of a percent of the I/Os lies between two points.",
            }
        )
    return made
