# SPDX-License-Identifier: Apache-2.0
"""First writes where the device zeroes by itself: one small run. Nothing here says how fast anything is; bytes are counted."""

from __future__ import annotations

import pytest
from bench_running import evaluate

pytestmark = pytest.mark.release_only

SMALL = """
import zeroing
from suite import Plan
plan = Plan("normal", 1, 0.1)
zeroing.COUNTED_BYTES = 16 << 20
run_fresh = zeroing.run_fresh
zeroing.run_fresh = lambda peer, workload, size_bytes, number, make_device: run_fresh(
    peer, workload, 8 << 20, number, make_device=make_device
)
def all():
    result = zeroing.measure(plan)
    return [result, zeroing.rows(result), zeroing.plots(result)]
"""


def test_first_writes_and_what_they_write() -> None:
    result, rows, plots = evaluate(SMALL, "all()")
    assert (result["not_measured"], result["not_counted"]) == ({}, "")
    assert {s["peer"] for s in result["samples"]} == {"fvd", "fvd, zero chunks", "qcow2", "qemu raw"}
    whole, zeroed = (result["counts"][name] for name in ("fvd", "fvd, zero chunks"))
    # The journal's bytes come on top: one commit.
    assert 16 <= whole["write"] < 17 and whole["zero"] == 0
    assert 1 <= zeroed["write"] < 2 and zeroed["zero"] == 16
    assert [row["reached"] in (True, False) for row in rows if row["goal"]] == [True, True]
    [plot] = plots
    assert all(len(series["points"]) == len(plot["x"]) for series in plot["series"])
