# SPDX-License-Identifier: Apache-2.0
"""The benchmark of flushes flushes as often as it says, and measures every pair."""

from __future__ import annotations

import pytest
from bench_running import evaluate

pytestmark = pytest.mark.release_only

SMALL = """
import flushes
from suite import Plan
flushes.MAPPED_BYTES = 16 << 20
def all():
    result = flushes.measure(Plan("quick", 1, 0.5))
    return [result, flushes.rows(result), flushes.plots(result)]
"""


def test_flushes_of_a_few_peers() -> None:
    result, rows, plots = evaluate(SMALL, "all()")
    assert len(result["samples"]) == 6  # two cases, three peers
    for sample in result["samples"]:
        assert sample["operations"] / 32 - 2 <= sample["flushes"] <= sample["operations"] / 32 + 2
    goals = {row["what"]: row["reached"] for row in rows if row["goal"]}
    assert goals.pop("flush after every write, QD1, mapped, writes a second: fvd / pass-through") is None
    assert goals.pop("flush after every write, QD1, allocating, writes a second: fvd / qcow2") is None
    assert len(goals) == 2 and None not in goals.values()
    assert [series["name"] for series in plots[0]["series"]] == ["fvd", "pass-through", "qcow2"]
