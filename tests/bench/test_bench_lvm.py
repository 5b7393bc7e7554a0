# SPDX-License-Identifier: Apache-2.0
"""The benchmark of LVM's own formats: real counts of a small run in the guest."""

from __future__ import annotations

import json
from typing import Any

import pytest
from bench_running import evaluate

pytestmark = pytest.mark.release_only  # what it runs takes the release build

BLOCK_BYTES = 4096


@pytest.mark.slow
def test_what_overwrites_write_is_known() -> None:
    found = evaluate("import lvm", "lvm.count(40, timeout_seconds=200, kinds=('linear', 'fvd'))", timeout_seconds=300)
    assert found["not_finished"] == ""
    samples = {(s["kind"], s["phase"], s["flush_every"]): s for s in found["samples"]}
    assert len(samples) == len(found["samples"]) == 8
    for key, sample in samples.items():
        assert sample["guest_writes"] == 40
        assert sample["guest_flushes"] == (2 if sample["flush_every"] else 1)
        assert sample["flushes"] >= sample["guest_flushes"]
        if key[0] == "linear" or key[1] == "again":
            assert sample["written_bytes"] == 40 * BLOCK_BYTES
            assert sample["flushes"] == sample["guest_flushes"]
        else:
            assert sample["written_bytes"] > 40 * BLOCK_BYTES  # a block for each, and the journal


def test_the_table_compares_first_writes() -> None:
    def sample(kind: str, phase: str, writes: int) -> dict[str, Any]:
        counts = {"reads": 0, "read_bytes": 0, "writes": writes, "written_bytes": writes * BLOCK_BYTES, "flushes": 4, "discards": 0}
        return {"kind": kind, "phase": phase, "flush_every": 32, "guest_writes": 10, "guest_flushes": 2, **counts}

    result = {"not_finished": "ended", "samples": [sample("fvd", "first", 10), sample("thin", "first", 20), sample("thin", "again", 10)]}
    rows, plots = evaluate("import json, lvm", f"[f(json.loads({json.dumps(result)!r})) for f in (lvm.rows, lvm.plots)]")
    values = {row["what"]: row.get("values") for row in rows}
    assert values["first write, a flush every 32, device writes: fvd / thin"] == [0.5]
    assert values["first write, a flush every 32, device flushes: fvd / thin"] == [1.0]
    assert values["copy-on-write, a flush every 32, device writes: fvd over a base / thin snapshot"] is None
    assert values["thin, overwrite, a flush every 32: device writes for each write"] == [1.0]
    assert all(len(series["points"]) == len(plot["x"]) for plot in plots for series in plot["series"])
