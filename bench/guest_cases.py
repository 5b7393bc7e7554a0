# SPDX-License-Identifier: Apache-2.0
"""What the suite `guest` asks of disks: cases with front.c's options, and which of them a mode has. Knows no server."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from loads import KIB, MIB
from peers_guest import QUEUES
from suite import Mode

DEPTH = 32  # of all queues together
CLUSTER_BYTES = 64 * KIB  # fvd's block and qcow2's cluster: a write every so many bytes meets a new one each time

Kind = Literal["mapped", "first", "first, zeros by the device", "over a base"]


@dataclass(frozen=True)
class Case:
    """`options`: of front.c, without those that say when to end."""

    name: str
    kind: Kind = "mapped"
    options: dict[str, Any] = field(default_factory=dict, hash=False)


def random_4k(side: Literal["read", "write"], depth: int, queues: int) -> Case:
    each = max(1, depth // queues)
    where = f"QD{depth}" if queues == 1 else f"QD{each} on each of {queues} queues"
    return Case(f"4 KiB random {side}, {where}", options={side: 1, "depth": each, "queues": queues})


def sequential(side: Literal["read", "write"], block_bytes: int, pieces: int) -> Case:
    size = f"{block_bytes // MIB} MiB" if block_bytes >= MIB else f"{block_bytes // KIB} KiB"
    scattered = f" in {pieces} pieces" if pieces > 1 else ""
    depth = 8 if block_bytes >= MIB else 32
    options = {side: 1, "sequential": True, "bytes": block_bytes, "segments": pieces, "depth": depth}
    return Case(f"{size} sequential {side}{scattered}, QD{depth}", options=options)


READ_32, WRITE_32 = random_4k("read", DEPTH, 1), random_4k("write", DEPTH, 1)
READ_1, WRITE_1 = random_4k("read", 1, 1), random_4k("write", 1, 1)
SEQUENTIAL_1M = (sequential("read", MIB, 1), sequential("write", MIB, 1))
FLUSHES = Case("4 KiB random write, QD32, a flush after every 32", options={"write": 1, "depth": DEPTH, "flush_every": 32})
ONCE = {"write": 1, "once": True, "last_flush": True, "depth": DEPTH}
FIRST = Case("4 KiB allocating write, QD32", "first", ONCE)
FIRST_ZEROED = Case("4 KiB allocating write where the device writes zeros, QD32", "first, zeros by the device", ONCE)
OVER_BASE = Case("4 KiB copy-on-write over a base, QD32", "over a base", {**ONCE, "stride": CLUSTER_BYTES})
FOUR_QUEUES = tuple(random_4k(side, depth, QUEUES) for depth in (DEPTH, 1) for side in ("read", "write"))  # type: ignore[arg-type]
# A guest's pages lie anywhere: its requests have many pieces.
IN_PIECES = (*(sequential(side, 64 * KIB, 16) for side in ("read", "write")), *(sequential(side, MIB, 64) for side in ("read", "write")))  # type: ignore[arg-type]

QUICK = (READ_32, WRITE_32, READ_1, FIRST)
NORMAL = (READ_32, WRITE_32, READ_1, WRITE_1, FLUSHES, *SEQUENTIAL_1M, *IN_PIECES[:2], *FOUR_QUEUES[:2], FIRST, OVER_BASE)
FULL = (READ_32, WRITE_32, READ_1, WRITE_1, *FOUR_QUEUES, FLUSHES, *SEQUENTIAL_1M, *IN_PIECES, FIRST, FIRST_ZEROED, OVER_BASE)


def cases_of(mode: Mode) -> tuple[Case, ...]:
    return {"quick": QUICK, "normal": NORMAL, "full": FULL}[mode]
