# SPDX-License-Identifier: Apache-2.0
"""First writes where the device writes zeros without being sent any: fvd with whole blocks and with zeroed chunks, qcow2, raw.

The device is a loop device over a file of ext4: its zeros are holes in that file, and the first write to a hole costs more than one to
written blocks. So of chunks that are zeroed this shows what they cost where zeros are dear, and how many bytes they spare; not what a
device gains whose bytes are scarce. No such device is here.
"""

from __future__ import annotations

import statistics
from typing import Any

from block_trace import traced
from loads import MIB, spread_offsets, trace
from machine import CannotMeasure, need, offloads_zeros, zeroing_device
from matrix import BASE_BLOCK_BYTES, FIRST_TOUCH, FIRST_WRITE, run_fresh
from peers import Peer, all_peers
from suite import Plan, Plot, Row, Series, missing, ratio, row

TITLE = "first writes on a device that writes zeros by itself: time, and bytes"
PEERS = ("fvd", "fvd, zero chunks", "qcow2", "qemu raw")
WORKLOADS = (FIRST_WRITE, FIRST_TOUCH)
COUNTED_BYTES = 64 * MIB
GOALS = {"iops": ">= 2", "cpu_us_per_request": "<= 1"}  # fvd / qcow2, first writes
FIELDS = {"iops": ("operations a second", "more"), "cpu_us_per_request": ("server CPU per request", "less")}


def count(peer: Peer) -> dict[str, float]:
    """Bytes of one write in each 64 KiB, for each byte of the guest."""
    offsets = spread_offsets(COUNTED_BYTES, BASE_BLOCK_BYTES, 1)
    with peer.served(COUNTED_BYTES, make_device=zeroing_device) as served, traced(served.device) as seen:
        seen.take()
        trace(served.socket, offsets, block_bytes=FIRST_TOUCH.block_bytes, depth=FIRST_TOUCH.depth, flush_in_the_end=True)
        ios = seen.take().submitted
    written = len(offsets) * FIRST_TOUCH.block_bytes
    return {kind: sum(io.length for io in ios if io.kind == kind) / written for kind in ("write", "zero")}


def measure(plan: Plan) -> dict[str, Any]:
    if plan.mode == "quick":
        raise CannotMeasure("takes longer than the quick mode has")
    need("fio", "losetup", "mkfs.ext4")
    with zeroing_device(MIB) as device:
        if not offloads_zeros(device):
            raise CannotMeasure("a loop device over ext4 does not write zeros by itself here")
    found = all_peers()
    sizes = {FIRST_WRITE: plan.of(0, 64, 256) * MIB, FIRST_TOUCH: plan.of(0, 256, 512) * MIB}
    samples: list[dict[str, Any]] = []
    counts: dict[str, dict[str, float]] = {}
    failed: dict[str, str] = {}
    for number in range(plan.rounds):
        for workload in WORKLOADS:
            for name in PEERS if number % 2 == 0 else reversed(PEERS):
                if name in failed:
                    continue
                try:
                    sample = run_fresh(found[name], workload, sizes[workload], number, make_device=zeroing_device)
                except CannotMeasure as reason:
                    failed[name] = str(reason)
                    continue
                del sample["quantiles_us"]
                samples.append({"round": number, "peer": name, "workload": workload.name, **sample})
    not_counted = ""
    for name in PEERS:
        if name not in failed:
            try:
                counts[name] = count(found[name])
            except CannotMeasure as reason:
                not_counted = str(reason)
                break
    return {"mode": plan.mode, "samples": samples, "counts": counts, "not_counted": not_counted, "not_measured": failed}


def rows(result: dict[str, Any]) -> list[Row]:
    samples = result["samples"]
    found: list[Row] = []

    def middle(peer: str, workload: str, field: str) -> float:
        return float(statistics.median(s[field] for s in samples if (s["peer"], s["workload"]) == (peer, workload)))

    for ours, other in (("fvd", "qcow2"), ("fvd", "qemu raw"), ("fvd, zero chunks", "qcow2"), ("fvd, zero chunks", "fvd")):
        for workload in WORKLOADS:
            for field, (words, better) in FIELDS.items():
                goal = GOALS[field] if (ours, other, workload) == ("fvd", "qcow2", FIRST_WRITE) else ""
                what = f"{workload.name}, {words}: {ours} / {other}"
                values = ratio(samples, field, {"peer": ours, "workload": workload.name}, {"peer": other, "workload": workload.name})
                if not values:
                    found.append(missing(what, result["not_measured"].get(ours) or result["not_measured"].get(other, "no round"), goal))
                    continue
                unit, scale = ("k/s", 1000) if field == "iops" else ("us", 1)
                note = " and ".join(f"{middle(name, workload.name, field) / scale:.1f}" for name in (ours, other)) + f" {unit}"
                against = "" if other == "fvd" else other
                found.append(row(what, values, goal=goal, note=note, against=against, better="more" if better == "more" else "less"))
    for name in PEERS:
        what = f"{FIRST_TOUCH.name}, bytes written for each byte: {name}"
        if name in result["counts"]:
            counted = result["counts"][name]
            note = f"and {counted['zero']:.2f} zeroed by the device"
            found.append(row(what, [counted["write"]], note=note))
        else:
            found.append(missing(what, result["not_measured"].get(name) or result["not_counted"]))
    return found


def plots(result: dict[str, Any]) -> list[Plot]:
    samples = result["samples"]
    if not samples:
        return []
    series: list[Series] = [
        {
            "name": name,
            "points": [[s["iops"] / 1000 for s in samples if (s["peer"], s["workload"]) == (name, w.name)] for w in WORKLOADS],
        }
        for name in dict.fromkeys(s["peer"] for s in samples)
    ]
    title = "4 KiB first writes where zeros are holes in a file"
    x = [workload.name for workload in WORKLOADS]
    return [{"name": "first-writes", "title": title, "kind": "bars", "unit": "k/s", "x": x, "series": series, "better": "more"}]
