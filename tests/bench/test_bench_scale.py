# SPDX-License-Identifier: Apache-2.0
"""The benchmark of large and many disks: small ones of both. Nothing here says how fast anything is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bench_running import evaluate

import fvd

MIB, GIB = 1 << 20, 1 << 30


@pytest.mark.parametrize("size_bytes", [3 * GIB, GIB + 5 * 64 * 1024])
def test_a_full_disk_and_an_empty_one_are_whole_disks(tmp_path: Path, size_bytes: int) -> None:
    for full in (False, True):
        path = tmp_path / f"disk-{full}"
        evaluate("import large_disks\nfrom pathlib import Path", f"large_disks.make_disk(Path({str(path)!r}), {size_bytes}, full={full})")
        report = fvd.check(f"file:{path}")
        assert (report.errors, report.clean) == ([], True)
        assert report.mapped_chunks == (-(-size_bytes // MIB) if full else 0)
        with fvd.open(f"file:{path}") as disk:
            assert disk.pread(size_bytes - 4096, 4096) == bytes(4096)
            disk.pwrite(size_bytes - 4096, b"x" * 4096)
            statistics = disk.info().statistics
            assert statistics is not None and statistics["allocations"] == (0 if full else 1)
        assert fvd.check(f"file:{path}").errors == []


def test_opening_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    files = f"scale.LargeFiles(Path({str(tmp_path)!r}))"
    [sample] = evaluate("import scale\nfrom pathlib import Path", f"scale.measure_openings({files}, ('1 TiB',), (True,), 1, 1)")
    assert sample["size"] == "1 TiB" and sample["full"]
    assert sample["milliseconds"] > 0
    assert 6 * MIB < sample["memory_bytes"] < 64 * MIB  # the bitmap, 2 MiB, and the table, 4 MiB, at the least


def test_disks_in_one_process_are_all_asked() -> None:
    samples = evaluate("import scale", "scale.many_disks((1, 9), 36 << 20, ('randread', 'randwrite'), 1, 0.2)")
    assert {(s["disks"], s["connections"], s["pattern"]) for s in samples} == {
        (disks, connections, pattern) for disks, connections in ((1, 1), (1, 9), (9, 9)) for pattern in ("randread", "randwrite")
    }
    assert all(s["requests"] > 0 and s["iops"] > 0 for s in samples)


def test_the_table_has_goals_and_says_what_is_not_there() -> None:
    seen = {"iops": 1000.0, "cpu_us_per_request": 5.0, "client_cpu_us_per_request": 2.0, "memory_bytes": 30 * MIB}
    result: dict[str, Any] = {
        "mode": "quick",
        "depth": 32,
        "total_depth": 64,
        "not_measured": {"requests": "no time"},
        "openings": [{"round": 0, "size": "1 TiB", "full": False, "milliseconds": 60.0, "cpu_ms": 20.0, "memory_bytes": 7 * MIB}],
        "requests": [],
        "disks": [
            {"round": 0, "disks": 1, "connections": 1, "pattern": "randread", **seen},
            {"round": 0, "disks": 64, "connections": 64, "pattern": "randread", **seen, "cpu_us_per_request": 6.0, "iops": 700.0},
        ],
    }
    rows = evaluate("import json, scale", f"scale.rows(json.loads({json.dumps(result)!r}))")
    goals = {row["what"]: row["reached"] for row in rows if row["goal"]}
    assert goals["open() of 1 TiB, empty"] is False
    assert goals["4 KiB randread, 64 in flight, server CPU per request: 64 disks / 1 disk"] is True
    assert goals["4 KiB randread, 64 in flight, IOPS: 64 disks / 1 disk"] is False
    [row] = [row for row in rows if "100 TiB / 1 TiB" in row["what"] and row["goal"]]
    assert (row["value"], row["note"]) == ("not measured", "no time")
    plots = evaluate("import json, scale", f"scale.plots(json.loads({json.dumps(result)!r}))")
    assert all(len(series["points"]) == len(plot["x"]) for plot in plots for series in plot["series"])
