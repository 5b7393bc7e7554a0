# SPDX-License-Identifier: Apache-2.0
"""Aging trims and writes what it says, and leaves every block mapped."""

from __future__ import annotations

import pytest
from bench_running import evaluate

pytestmark = pytest.mark.release_only

MIB = 1 << 20


@pytest.mark.parametrize("peer", ["fvd", "qcow2"])
def test_a_disk_ages(peer: str) -> None:
    found = evaluate("import aging", f"aging.age({peer!r}, {32 * MIB}, 0.1, overwrites=2)")
    assert 0.25 * 32 * MIB * 2 <= found["trimmed_bytes"] <= 0.4 * 32 * MIB * 2
    fresh, trimmed, aged = (found["space"][state]["used_bytes"] for state in ("fresh", "after the first trims", "aged"))
    assert trimmed < fresh and aged >= 32 * MIB
    assert set(found["fresh"]) == set(found["aged"]) and len(found["fresh"]) == 3


def test_the_quick_run_says_why_not() -> None:
    [row] = evaluate("import aging\nfrom suite import PLANS", 'aging.rows(aging.measure(PLANS["quick"]))')
    assert row["value"] == "not measured" and row["note"]


def test_rows_are_ratios_of_aged_to_fresh() -> None:
    seen = {"iops": 100.0, "mb_per_second": 10.0, "cpu_us_per_request": 5.0}
    slow = seen | {"iops": 50.0}
    names = ["4 KiB random read QD32", "4 KiB random write QD32", "1 MiB sequential read QD32"]
    space = {state: {"used_bytes": 2, "end_bytes": 4} for state in ("fresh", "after the first trims", "aged")}
    samples = [
        {"round": 0, "peer": peer, "fresh": dict.fromkeys(names, seen), "aged": dict.fromkeys(names, aged), "space": space}
        for peer, aged in (("fvd", slow), ("qcow2", seen))
    ]
    result = {"mode": "normal", "samples": samples, "not_measured": {}, "size_bytes": 4}
    rows = {row["what"]: row for row in evaluate("import aging", f"aging.rows({result!r})")}
    assert rows["4 KiB random read QD32, fvd: aged / fresh"]["values"] == [0.5]
    assert rows["4 KiB random read QD32, aged: fvd / qcow2"]["values"] == [0.5]
    assert rows["space taken / disk size, qcow2, aged"]["values"] == [0.5]
