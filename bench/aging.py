# SPDX-License-Identifier: Apache-2.0
"""The same disk fresh and aged: after ten times 30 % of it trimmed in random pieces and all of it written again in random order.

Fresh means written once from its beginning to its end. In both states every block is mapped, so that what differs is where things lie and
what the metadata have become. The pass-through server is the control: it is tried out twice, with nothing between, and shows how
much two runs differ anyway.
"""

from __future__ import annotations

import json
import random
import statistics
from dataclasses import dataclass
from typing import Any

from loads import KIB, MIB, client, fill, flush, for_seconds, over_nbd, run_fio
from machine import CannotMeasure, need, output
from peers import Served, all_peers
from suite import Plan, Plot, Row, missing, row

TITLE = "the same disk after ten full overwrites with trims"

CONTROL = "pass-through"  # has nothing that can age: it is tried out twice
PEERS = ("fvd", "fvd, spread", "qcow2", CONTROL)
OVERWRITES = 10
TRIM_SHARE = 0.3
PAGE_BYTES = 4 * KIB
PIECE_BYTES = 32 * KIB  # of an overwrite: half a block of fvd, half a cluster of qcow2
RUN_SHARE = 0.2  # of plan.seconds, for one run
ROUNDS_MAX = 2  # in normal mode


@dataclass(frozen=True)
class Work:
    name: str
    pattern: str
    block_bytes: int


WORK = (
    Work("4 KiB random read QD32", "randread", 4 * KIB),
    Work("4 KiB random write QD32", "randwrite", 4 * KIB),
    Work("1 MiB sequential read QD32", "read", MIB),
)


def trim(served: Served, size_bytes: int, seed: int) -> int:
    """Half of the share in pieces of 1 MiB, half in pieces of any size at any 4 KiB; what was trimmed, in bytes."""
    rng = random.Random(seed)
    each = int(size_bytes * TRIM_SHARE / 2)
    pieces = [(number * MIB, MIB) for number in rng.sample(range(size_bytes // MIB), each // MIB)]
    loose_bytes = 0
    while loose_bytes < each:
        length = rng.randint(1, MIB // PAGE_BYTES) * PAGE_BYTES
        pieces.append((rng.randrange((size_bytes - length) // PAGE_BYTES + 1) * PAGE_BYTES, length))
        loose_bytes += length
    rng.shuffle(pieces)
    with client(served.socket) as handle:
        for offset, length in pieces:
            handle.trim(length, offset)
        handle.flush()
    return sum(length for _, length in pieces)


def overwrite(served: Served, size_bytes: int) -> None:
    """All of it, each piece once, in random order."""
    run_fio(over_nbd(served.socket), "randwrite", block_bytes=PIECE_BYTES, depth=32, size_bytes=size_bytes)
    flush(served.socket)


def space(peer: str, served: Served, size_bytes: int) -> dict[str, int]:
    """What a disk takes of its device: `used_bytes` without holes, `end_bytes` with them; of fvd also in how many
    `pieces` a reader from its beginning to its end finds it. Nothing for one that has no format."""
    flush(served.socket)
    if peer.startswith("fvd"):
        import fvd

        about = fvd.info(served.device)
        ends = [extent.storage_offset + extent.length for extent in fvd.map(served.device).extents if extent.storage_offset is not None]
        used_bytes = about.metadata_size + about.mapped_bytes
        return {"used_bytes": used_bytes, "end_bytes": max([about.metadata_size, *ends]), "pieces": len(ends)}
    if peer.startswith("qcow2"):
        told = json.loads(output("qemu-img", "check", "--force-share", "--output=json", "--format=qcow2", served.device))
        free = (told["total-clusters"] - told.get("allocated-clusters", 0)) * (size_bytes // told["total-clusters"])
        return {"used_bytes": max(0, told["image-end-offset"] - free), "end_bytes": told["image-end-offset"]}
    return {}


def try_out(served: Served, size_bytes: int, seconds: float) -> dict[str, dict[str, float]]:
    found = {}
    for work in WORK:
        clock = served.cpu_clock()
        seen = for_seconds(
            over_nbd(served.socket), work.pattern, block_bytes=work.block_bytes, depth=32, size_bytes=size_bytes, seconds=seconds
        )
        del seen["quantiles_us"]
        found[work.name] = seen | {"cpu_us_per_request": clock.us_per_request(seen["operations"])}
    return found


def age(peer: str, size_bytes: int, seconds: float, overwrites: int = OVERWRITES) -> dict[str, Any]:
    """A fresh disk, tried out, aged, tried out again."""
    with all_peers()[peer].served(size_bytes) as served:
        fill(served.socket, size_bytes)
        fresh, fresh_space = try_out(served, size_bytes, seconds), space(peer, served, size_bytes)
        trimmed_bytes, trimmed_space = 0, fresh_space
        for number in range(0 if peer == CONTROL else overwrites):
            trimmed_bytes += trim(served, size_bytes, number)
            if number == 0:
                trimmed_space = space(peer, served, size_bytes)
            overwrite(served, size_bytes)
        aged_space = space(peer, served, size_bytes)
        aged = try_out(served, size_bytes, seconds)
    return {
        "fresh": fresh,
        "aged": aged,
        "space": {"fresh": fresh_space, "after the first trims": trimmed_space, "aged": aged_space},
        "trimmed_bytes": trimmed_bytes,
    }


def measure(plan: Plan) -> dict[str, Any]:
    need("fio", "losetup")
    if plan.mode == "quick":
        return {"mode": plan.mode, "samples": [], "not_measured": {}, "size_bytes": 0}
    size_bytes = plan.of(0, 256 * MIB, 1024 * MIB)
    seconds = plan.seconds * plan.of(0, RUN_SHARE, 1)
    names = [*PEERS, *plan.of((), (), ("qcow2, extended L2",))]
    names = [name for name in names if name in all_peers()]
    samples, failed = [], {}
    for number in range(min(plan.rounds, plan.of(0, ROUNDS_MAX, plan.rounds))):
        for name in names if number % 2 == 0 else names[::-1]:
            if name in failed:
                continue
            try:
                samples.append({"round": number, "peer": name, **age(name, size_bytes, seconds)})
            except CannotMeasure as reason:
                failed[name] = str(reason)
    return {"mode": plan.mode, "samples": samples, "not_measured": failed, "size_bytes": size_bytes}


def names_of(result: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(sample["peer"] for sample in result["samples"]))


def rows(result: dict[str, Any]) -> list[Row]:
    if result["mode"] == "quick":
        return [missing("aged / fresh", "not in the quick run: it writes a disk ten times")]
    samples = result["samples"]
    found: list[Row] = []
    for work in WORK:
        for peer in names_of(result):
            mine = [s for s in samples if s["peer"] == peer]
            values = [s["aged"][work.name]["iops"] / s["fresh"][work.name]["iops"] for s in mine]
            fresh, aged = (statistics.median(s[state][work.name]["mb_per_second"] for s in mine) for state in ("fresh", "aged"))
            cpu = " and ".join(
                f"{statistics.median(s[state][work.name]['cpu_us_per_request'] for s in mine):.1f}" for state in ("fresh", "aged")
            )
            note = f"{fresh:.0f} and then {aged:.0f} MB/s; {cpu} us CPU a request"
            what = "second / first run, not aged" if peer == CONTROL else "aged / fresh"
            found.append(row(f"{work.name}, {peer}: {what}", values, note=note))
        values = [
            one["aged"][work.name]["iops"] / other["aged"][work.name]["iops"]
            for one in samples
            for other in samples
            if (one["peer"], other["peer"]) == ("fvd", "qcow2") and one["round"] == other["round"]
        ]
        if values:
            found.append(row(f"{work.name}, aged: fvd / qcow2", values, against="qcow2", better="more"))
    for peer in names_of(result):
        mine = [s for s in samples if s["peer"] == peer and s["space"]["fresh"]]
        for state in ("fresh", "after the first trims", "aged"):
            if mine:
                used = [s["space"][state]["used_bytes"] / result["size_bytes"] for s in mine]
                end = statistics.median(s["space"][state]["end_bytes"] / result["size_bytes"] for s in mine)
                found.append(row(f"space taken / disk size, {peer}, {state}", used, note=f"up to {end:.2f} with holes", digits=3))
        pieces = {state: [s["space"][state]["pieces"] for s in mine if "pieces" in s["space"][state]] for state in ("fresh", "aged")}
        if pieces["aged"]:
            note = f"fresh {statistics.median(pieces['fresh']):.0f}; of {result['size_bytes'] // MIB} chunks"
            found.append(row(f"pieces in which the disk lies, {peer}, aged", pieces["aged"], note=note, digits=0))
    return found + [missing(peer, reason) for peer, reason in result["not_measured"].items()]


def plots(result: dict[str, Any]) -> list[Plot]:
    samples = result["samples"]
    if not samples:
        return []
    names = names_of(result)
    return [
        {
            "name": "aging",
            "title": f"Aged against fresh: {OVERWRITES} overwrites, {TRIM_SHARE:.0%} trimmed before each",
            "kind": "bars",
            "unit": "MB/s",
            "x": [f"{work.name}, {peer}" for work in WORK for peer in names],
            "series": [
                {
                    "name": state,
                    "points": [
                        [s[state][work.name]["mb_per_second"] for s in samples if s["peer"] == peer] for work in WORK for peer in names
                    ],
                }
                for state in ("fresh", "aged")
            ],
            "logarithmic": True,
            "better": "more",
        }
    ]
