# SPDX-License-Identifier: Apache-2.0
"""Recorded traces, real layouts and what is made of them: small disks, and figures that follow from where the data lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bench_running import ROOT, evaluate

pytestmark = pytest.mark.release_only  # what it runs takes the release build

MIB = 1 << 20
PREAMBLE = """
import json
from pathlib import Path
import numpy as np
import guest_trace, layouts, seeks, seeks_record, suite
from guest_trace import FLUSH, PROVIDE, READ, TRIM, WRITE, ZERO

KIB, MIB = 1 << 10, 1 << 20

def trace(requests, transactions=0, disk_bytes=64 * MIB):
    kinds, offsets, lengths = zip(*requests)
    phases = {"mkfs": 0, "creation": 0, "transactions": transactions}
    about = {"disk_bytes": disk_bytes, "postmark": "played"}
    return guest_trace.Trace(np.array(kinds, np.uint8), np.array(offsets, np.int64), np.array(lengths, np.int64), phases, about)
"""
# Three chunks from the end to the beginning, then read in order; and one that nobody has written.
BACKWARDS = """
played = trace([(WRITE, place * MIB, 4 * KIB) for place in (40, 20, 2)] + [(READ, place * MIB, 4 * KIB) for place in (2, 20, 30, 40)], 3)
"""


def after(statements: str, expression: str) -> Any:
    return evaluate(PREAMBLE + statements, expression)


def test_a_trace_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "trace.xz"
    found = after(
        f"""
there = trace([(WRITE, 8 * MIB, 504 * KIB), (FLUSH, 0, 0), (READ, 0, 512), (TRIM, 512, 60 * MIB), (PROVIDE, 1 * MIB, 512)])
guest_trace.save(there, Path({str(path)!r}))
back = guest_trace.load(Path({str(path)!r}))
columns = [[getattr(one, name).tolist() for name in ("kinds", "offsets", "lengths")] for one in (there, back)]
""",
        "[*columns, back.about, back.phases]",
    )
    assert found[0] == found[1]
    assert found[2]["disk_bytes"] == 64 << 20
    assert set(found[3]) == {"mkfs", "creation", "transactions"}


@pytest.mark.parametrize("name", ["postmark-100g-ext3", "postmark-100g", "postmark-26g"])
def test_the_recorded_traces_are_what_they_are_said_to_be(name: str) -> None:
    found = after(
        f"""
found = guest_trace.load(seeks.TRACES / "{name}.xz")
""",
        """[found.about, found.phases, int((found.offsets + found.lengths).max()), int(found.offsets.min()), len(found.kinds),
    int(found.lengths[found.kinds == WRITE].sum()), np.bincount(found.kinds[found.phase("transactions")], minlength=6).tolist()]""",
    )
    about, phases, end, begin, requests, written, kinds = found
    assert about["used_bytes"] > 20e9
    assert written > about["used_bytes"]
    assert 0 <= begin < end <= about["disk_bytes"]
    assert 0 == phases["mkfs"] < phases["creation"] < phases["transactions"] < requests
    assert kinds[0] > 10000
    assert kinds[1] > 10000
    assert kinds[4] > 0  # flushes
    assert f"{requests:,}" in (ROOT / "bench/traces/README.md").read_text()


def test_nbdkits_log_is_read() -> None:
    log = (
        "2026-11-28 20:40:20.0 connection=1 Read id=1 offset=0x0 count=0x1000 ...\n"
        "2026-11-28 20:40:20.1 connection=1 Write id=2 offset=0x1000 count=0x200 fua=0 ...\n"
        "2026-11-28 20:40:20.2 connection=1 ...Read id=1 return=0\n"
        "2026-11-28 20:40:20.3 connection=1 Zero id=3 offset=0x2000 count=0x1000 trim=0 fua=0 fast=0 ...\n"
        "2026-11-28 20:40:20.4 connection=1 Zero id=4 offset=0x3000 count=0x1000 trim=1 fua=0 fast=0 ...\n"
        "2026-11-28 20:40:20.5 connection=1 Flush id=5 ...\n"
        "2026-11-28 20:40:20.6 connection=1 Trim id=6 offset=0x4000 count=0x1000 fua=0 ...\n"
    )
    found = after(
        f"""
log = {log.encode()!r}
positions = {{"mkfs": 0, "creation": log.index(b"2026-11-28 20:40:20.3"), "after": log.index(b"2026-11-28 20:40:20.6")}}
found = seeks_record.parse(log, positions, {{"disk_bytes": MIB}})
""",
        "[[guest_trace.KINDS[kind] for kind in found.kinds], found.offsets.tolist(), found.lengths.tolist(), found.phases]",
    )
    assert found[0] == ["read", "write", "provide zeros", "zero", "flush"]  # the trim came after the last phase
    assert found[1] == [0, 0x1000, 0x2000, 0x3000, 0x4000]
    assert found[2] == [0x1000, 0x200, 0x1000, 0x1000, 0]
    assert found[3] == {"mkfs": 0, "creation": 2}


def test_appended_chunks_lie_in_the_order_of_their_first_writes() -> None:
    found = after(
        BACKWARDS
        + """
layout = layouts.fvd_layout(played, "append")
found = seeks.ios(played, "transactions", layout)
before = seeks.ios(played, "creation", layout)
places = [int(layout.places[chunk]) for chunk in (40, 20, 2, 30)]
""",
        "[before.starts.tolist(), places, found.starts.tolist(), found.ends.tolist(), found.requests]",
    )
    created, places, starts, ends, requests = found
    assert created == places[:3]
    assert [place - places[0] for place in places[:3]] == [0, 1 << 20, 2 << 20]
    assert places[3] == -1
    assert starts == [places[2], places[1], places[0]]  # what was never written is nowhere
    assert [end - start for start, end in zip(starts, ends, strict=True)] == [4096] * 3
    assert requests == 4


def test_raw_is_the_disk_itself_and_so_is_fvds_raw_layout() -> None:
    found = after(
        BACKWARDS
        + """
one, other = layouts.raw_layout(played), layouts.layouts()["fvd, raw layout"](played)
""",
        """[[s["travel_bytes"], s["ios"]] for s in (seeks.sample(played, "transactions", layout) for layout in (one, other))]""",
    )
    page = 4096 / MIB
    assert found[0] == [(18 - page + 10 - page + 10 - page) * MIB, 4]
    assert found[1] == [(18 - page + 20 - page) * MIB, 3]  # it knows that nothing was written at 30 MiB


def test_zeros_to_be_kept_take_a_place_in_fvd() -> None:
    found = after(
        """
played = trace([(PROVIDE, 10 * MIB, 2 * MIB), (ZERO, 20 * MIB, MIB), (TRIM, 30 * MIB, MIB), (WRITE, 0, 512)])
layout = layouts.fvd_layout(played, "append")
""",
        "[int(place) for place in layout.places if place >= 0] + [int(layout.places[0])]",
    )
    assert len(found) == 4
    assert found[-1] == max(found)


@pytest.mark.parametrize("name", ["qcow2", "qed", "qcow2, subclusters", "qcow2, metadata preallocated", "vdi", "vmdk"])
def test_qemus_formats_allocate_in_the_order_of_the_trace(name: str) -> None:
    found = after(
        BACKWARDS
        + f"""
layout = layouts.layouts()[{name!r}](played)
""",
        "[int(layout.places[place * MIB // layout.unit_bytes]) for place in (40, 20, 2, 30)]",
    )
    if "preallocated" in name:
        assert [place - found[2] for place in found] == [38 << 20, 18 << 20, 0, 28 << 20]
    else:
        assert 0 < found[0] < found[1] < found[2]
        assert found[3] == -1


def test_a_request_whose_pieces_are_adjacent_is_one_io() -> None:
    found = after(
        """
played = trace([(WRITE, 0, 3 * MIB), (WRITE, 10 * MIB, MIB), (WRITE, 3 * MIB, MIB), (READ, 2 * MIB, 2 * MIB)], 4)
layout = layouts.fvd_layout(played, "append")
found = seeks.ios(played, "creation", layout)
""",
        "[found.starts.tolist(), found.ends.tolist(), found.distances.tolist()]",
    )
    starts, ends, distances = found
    assert [(end - start) >> 20 for start, end in zip(starts, ends, strict=True)] == [3, 1, 1, 1, 1]
    assert [distance >> 20 for distance in distances] == [0, 0, 3, 1]


def test_rows_and_plots_come_from_the_samples_alone() -> None:
    rows, plots = after(
        BACKWARDS
        + """
samples = [
    {"disk": "ext4 on 26 GiB", "layout": name, "round": 0, **seeks.sample(played, phase, layouts.layouts()[name](played))}
    for name in ("raw", "fvd append") for phase in seeks.PHASES
]
result = {"samples": samples, "not_measured": {"fvd spread": "played"}, "traces": {"ext4 on 26 GiB": played.about}}
result = json.loads(json.dumps(result))
""",
        "[seeks.rows(result), seeks.plots(result)]",
    )
    ratios = [row for row in rows if row["what"].endswith("mean seek, fvd append / raw")]
    assert len(ratios) == 2
    assert all(row["against"] == "raw" and row["values"][0] < 1 for row in ratios)
    assert rows[-1]["value"] == "not measured"
    assert rows[-1]["goal"]
    assert {plot["kind"] for plot in plots} == {"bars", "distribution"}
