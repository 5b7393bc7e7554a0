# SPDX-License-Identifier: Apache-2.0
"""The benchmark of growth: one small run. What it says of waiting is held by tests/volume/test_growth_figure.py."""

from __future__ import annotations

import json

import pytest
from bench_running import evaluate

pytestmark = pytest.mark.release_only  # what it runs takes the release build

MIB = 1 << 20


def test_a_growing_disk_and_the_device_alone_make_a_table_and_pictures() -> None:
    steps = "growth.grow_under_load(2, step_bytes=128 << 20, step_seconds=(0.1, 0.2))"
    device, grown, late = evaluate(
        "import growth",
        f"[growth.figures_of(run) for run in (growth.device_alone(64 << 20), {steps}, growth.too_late(1, 128 << 20, (0.3,)))]",
    )
    assert device["bytes_written"] == 64 * MIB
    assert grown["bytes_written"] >= 256 * MIB
    assert grown["longest_step_seconds"] >= 0.2
    assert len(grown["step_times"]) >= 2 and all(begin < end for begin, end in grown["step_times"])
    assert late["waited"] >= 1
    for run in (device, grown, late):
        assert 0 <= sum(run["mb_per_bucket"]) * 0.1 <= run["bytes_written"] / 1e6
        assert run["latencies_ms"] == sorted(run["latencies_ms"])
        assert abs(run["latencies_ms"][-1] - run["longest_write_seconds"] * 1000) < 0.001
    result = {
        "mode": "quick",
        "delays_seconds": [0.1, 0.2],
        "samples": [{"round": 0, "step_bytes": 128 * MIB, "device": device, "fvd": grown, "late": late}],
    }
    rows, plots = evaluate("import json, growth", f"[f(json.loads({json.dumps(result)!r})) for f in (growth.rows, growth.plots)]")
    [waited] = [row for row in rows if row["goal"]]
    assert waited["reached"] == (grown["waited"] == 0)
    lines, distribution = plots
    assert all(len(series["points"]) == len(lines["x"]) for series in lines["series"])
    assert [len(series["points"]) for series in distribution["series"]] == [1, 1, 1]


def test_steps_are_as_long_as_the_device_is_fast() -> None:
    slow, fast, faster = evaluate("import json, growth", "[growth.step_of(rate * 1e6, 4) for rate in (10, 500, 5000)]")
    assert slow == 512 * MIB
    assert abs(fast - 4 * 500e6) < 64 * MIB and fast % (64 * MIB) == 0
    assert faster == 5 << 30
