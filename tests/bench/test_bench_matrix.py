# SPDX-License-Identifier: Apache-2.0
"""The matrix measures every cell that it should, and says what it did not. Nothing here says how fast anything is."""

from __future__ import annotations

from typing import Any

import pytest
from bench_running import evaluate

pytestmark = pytest.mark.release_only

QUICK = """
import dataclasses, matrix
from suite import Plan
MIB = 1 << 20
matrix.sizes = lambda plan: matrix.Sizes(16 * MIB, 4 * MIB, 16 * MIB)
matrix.QUICK = (matrix.READ_32, matrix.LIGHT[0], matrix.FIRST_WRITE, matrix.COPY_ON_WRITE)
def all():
    result = matrix.measure(Plan("quick", 1, 0.1))
    return [result, matrix.rows(result), matrix.plots(result)]
"""


def test_a_small_matrix() -> None:
    result, rows, plots = evaluate(QUICK, "all()")
    cells = {(s["workload"], s["peer"]): s for s in result["samples"]}
    assert {peer for workload, peer in cells if workload == "4 KiB random read QD32"} == {"fvd", "pass-through", "qcow2"}
    assert {peer for workload, peer in cells if workload == "4 KiB random read QD32, light client"} == {"fvd", "pass-through", "qcow2"}
    assert {peer for workload, peer in cells if workload == "4 KiB copy-on-write QD32"} == {"fvd", "qcow2"}  # who can have a base
    assert cells["4 KiB first write QD32", "fvd"]["operations"] == 1024  # each block once
    assert {workload for workload, peer in cells if peer == "fvd in process"} == {
        "4 KiB random read QD32, in process",
        "4 KiB random write QD32, in process",
    }
    for sample in cells.values():
        assert sample["operations"] > 0 and sample["cpu_us_per_request"] > 0
        assert sample["p50_us"] <= sample["p99_us"] <= sample["p999_us"]
    assert result["not_measured"] == {}
    by_goal = {row["what"]: row for row in rows if row["goal"]}
    assert len(by_goal) == 24
    assert by_goal["4 KiB random read QD32, operations a second: fvd / qemu raw"]["value"] == "not measured"
    assert by_goal["4 KiB random read QD32, operations a second: fvd / qcow2"]["reached"] in (True, False)
    assert {plot["name"] for plot in plots} == {"random-4k", "cpu-per-request", "latency-randread-32"}


def sample(peer: str, workload: str, iops: float, cpu: float) -> dict[str, Any]:
    times = {"p50_us": 1.0, "p99_us": 2.0, "p999_us": 3.0, "max_us": 4.0, "client_cpu_us": 1.0, "mb_per_second": 1.0}
    return {"round": 0, "peer": peer, "workload": workload, "iops": iops, "cpu_us_per_request": cpu, **times}


@pytest.mark.parametrize("offloads", [True, False])
def test_what_first_writes_must_reach_depends_on_the_device(offloads: bool) -> None:
    result = {
        "mode": "normal",
        "samples": [sample("fvd", "4 KiB first write QD32", 1500.0, 10.0), sample("qcow2", "4 KiB first write QD32", 1000.0, 8.0)],
        "workloads": [{"pattern": "randwrite", "block_bytes": 4096, "depth": 32, "kind": "first write"}],
        "peers": {name: {"family": "qemu", "note": "", "over_base": True} for name in ("fvd", "qcow2")},
        "not_measured": {"qemu raw": "not installed"},
        "offloads_zeros": offloads,
    }
    rows = {row["what"]: row for row in evaluate("import matrix", f"matrix.rows({result!r})")}
    first = rows["4 KiB first write QD32, operations a second: fvd / qcow2"]
    assert (first["goal"], first["reached"], first["values"]) == ((">= 2", False, [1.5]) if offloads else (">= 1", True, [1.5]))
    assert rows["4 KiB first write QD32, server CPU per request: fvd / qcow2"]["reached"] is False
    assert rows["4 KiB random write QD32, operations a second: fvd / qemu raw"]["note"] == "not installed"


def test_modes_have_the_workloads_that_the_goals_name() -> None:
    found = evaluate("import matrix", "[[w.name for w in one] for one in (matrix.QUICK, matrix.NORMAL, matrix.FULL)]")
    names = evaluate("import matrix", "sorted({goal[0].name for goal in matrix.GOALS})")
    for workloads in found:
        assert set(names) <= set(workloads) and len(set(workloads)) == len(workloads)
