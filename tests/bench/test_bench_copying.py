# SPDX-License-Identifier: Apache-2.0
"""The benchmark of copying runs and adds up: short runs on a real slow base. Nothing here says how fast anything is."""

from __future__ import annotations

import json

import pytest
from bench_running import evaluate

pytestmark = pytest.mark.release_only  # what it runs takes the release build

MODULES = "import json, copying"


def test_a_start_twice() -> None:
    found = evaluate(MODULES, 'copying.start_twice("fvd", True, 256 << 20, 1, reads=100)')
    assert len(found["seconds"]) == 2
    assert found["written_bytes"] >= found["bytes"] > 0  # whole blocks
    assert found["metadata_writes"] == 0


@pytest.mark.parametrize("kind", ["fvd", "qemu"])
def test_a_turn_with_the_base_being_copied(kind: str) -> None:
    [turn] = evaluate(MODULES, f'copying.take_turns("{kind}", True, False, 512 << 20, 1, 1.0, 1)')
    assert turn["idle_copied_bytes"] > 0
    assert turn["latencies"]["all"]["requests"] == turn["latencies"]["own"]["requests"] + turn["latencies"]["base"]["requests"]


def test_the_report_says_what_was_missed() -> None:
    starts = [
        {"server": server, "copy_on_read": copy, "seconds": [4.0, 1.0], "metadata_writes": 1, "written_bytes": 20, "bytes": 10}
        for server, copy in (("fvd", True), ("fvd", False), ("qemu", True))
    ]
    slow, quick = ({"all": {"p99": p99}, "own": {"p99": p99}} for p99 in (2.0, 1.0))
    turns = [
        {"server": server, "fill": fill, "pauses": pauses, "latencies": slow if fill else quick}
        | {"idle_copied_bytes": 10 << 20, "busy_copied_bytes": 0, "idle_cpu_seconds": 0.1}
        for server, pauses in (("fvd", False), ("fvd", True), ("qemu", False))
        for fill in (False, True)
    ]
    result = {"starts": starts, "turns": turns, "turn_seconds": 1.0, "application": {"not_measured": "no guest"}}
    rows = evaluate(MODULES, f"copying.rows(json.loads({json.dumps(result)!r}))")
    # Of each kind of goal, and nothing of qemu's; the guest's is open.
    assert [row["reached"] for row in rows if row["goal"]] == [False] * 8 + [None]
    assert (rows[-1]["value"], rows[-1]["note"]) == ("not measured", "no guest")
    assert {row["against"] for row in rows if "against" in row} == {"qemu"}
    plots = evaluate(MODULES, f"copying.plots(json.loads({json.dumps(result)!r}))")
    assert [plot["name"] for plot in plots] == ["starts", "busy"]
    assert plots[1]["series"][0]["points"] == [[1000.0], [2000.0]]
