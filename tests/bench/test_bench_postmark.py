# SPDX-License-Identifier: Apache-2.0
"""The I/Os of a guest's PostMark are counted and told apart: one real guest with few files, and traces and maps that are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bench_running import evaluate

pytestmark = pytest.mark.release_only  # what it runs takes the release build

MODULES = """
import json, mmap, os, subprocess
import block_trace, format_disks, postmark, suite
from pathlib import Path
from block_trace import DeviceIo
from machine import CannotMeasure, loop_device, need
from postmark_guest import PROGRAMS, PostMark
from uml_guest import PROGRAMS as GUEST_PROGRAMS
"""


def test_a_guest_on_an_fvd_disk() -> None:
    samples = evaluate(
        MODULES
        + """
need(*PROGRAMS, *GUEST_PROGRAMS)
work = PostMark(50, 4096, 65536, 5, 50, mkfs=postmark.MKFS)
""",
        'postmark.one_run("fvd", work, 128 << 20, "96M", 60)',
    )
    assert [sample["phase"] for sample in samples] == ["mkfs", "creation", "transactions"]
    creation = samples[1]
    assert creation["guest"]["writes"] > 0
    assert creation["submitted"]["data_bytes"] >= 50 * 4096
    assert creation["submitted"]["metadata_writes"] > 0  # new chunks, and a flush: a commit of the journal
    assert creation["submitted"]["flushes"] > 0
    assert all(sample["submitted"]["below"] == 0 for sample in samples)
    for sample in samples[1:]:
        assert sample["guest"]["writes"] <= sample["submitted"]["data_writes"]  # each is at least one


def test_everything_that_reaches_a_device_is_traced() -> None:
    submitted, issued, again = evaluate(
        MODULES
        + """
with loop_device(8 << 20) as device, block_trace.traced(device) as trace:
    subprocess.run(["blockdev", "--flushbufs", device], check=True)
    trace.take()
    fd = os.open(device, os.O_RDWR | os.O_DIRECT)
    page = mmap.mmap(-1, 4096)
    for place in (0, 1 << 20, 4 << 20):
        os.pwrite(fd, page, place)
    os.preadv(fd, [page], 2 << 20)
    os.fsync(fd)
    found = trace.take()
    lists = [found.submitted, found.issued, trace.take().submitted]
    os.close(fd)
""",
        "[[[io.kind, io.offset, io.length] for io in ios] for ios in lists]",
    )
    expected = [["write", 0, 4096], ["write", 1 << 20, 4096], ["write", 4 << 20, 4096], ["read", 2 << 20, 4096]]
    assert submitted[:4] == expected
    assert [kind for kind, *_ in submitted[4:]] == ["flush"]
    assert issued[:4] == expected
    assert again == []


def test_the_kernels_flags() -> None:
    expected = {"R": "read", "RS": "read", "WS": "write", "WFS": "write", "FWFS": "write", "DS": "discard", "NS": "zero"}
    without_data = {"FWS": "flush", "FF": "flush"}
    one = f"{{flags: block_trace.device_io(flags, 16, 8).kind for flags in {list(expected)!r}}}"
    other = f"{{flags: block_trace.device_io(flags, 16, 0).kind for flags in {list(without_data)!r}}}"
    assert evaluate(MODULES, f"[{one}, {other}]") == [expected, without_data]


def test_lost_events_are_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "per_cpu/cpu0").mkdir(parents=True)
    (tmp_path / "per_cpu/cpu0/stats").write_text("entries: 5\noverrun: 3\ndropped events: 0\n")
    said = evaluate(
        MODULES
        + f"""
said = "nothing"
try:
    block_trace.BlockTrace(Path({str(tmp_path)!r})).take()
except CannotMeasure as reason:
    said = str(reason)
""",
        "said",
    )
    assert said.startswith("3 ")


def test_what_is_data_and_what_is_the_formats_own() -> None:
    count = evaluate(
        MODULES
        + """
trace = [DeviceIo("write", 0, 512), DeviceIo("read", 4096, 512), DeviceIo("write", 8191, 512), DeviceIo("write", 8192, 1024)]
trace += [DeviceIo("flush", 0, 0), DeviceIo("read", 1 << 20, 4096), DeviceIo("zero", 5000, 512)]
""",
        "postmark.split(trace, [(4096, 4096)], [(0, 65536)])",
    )
    assert count["data_reads"] == 1
    assert count["data_writes"] == 2
    assert count["metadata_writes"] == 2
    assert count["metadata_reads"] == 0
    assert count["below"] == 1
    assert count["flushes"] == 1
    assert count["data_bytes"] == 3 * 512
    assert count["metadata_bytes"] == 512 + 1024


def test_ranges_of_a_file_are_found_on_its_device() -> None:
    found = evaluate(MODULES, "format_disks.on_device([(0, 10), (90, 20)], [(0, 1000, 100), (100, 500, 100)])")
    assert found == [[500, 10], [1000, 10], [1090, 10]]


def test_rows_judge_by_device_ios_for_each_guest_io() -> None:
    def sample(name: str, device_writes: int, guest_writes: int) -> list[dict[str, Any]]:
        device = {"data_reads": 0, "data_writes": device_writes, "metadata_reads": 0, "metadata_writes": 0, "below": 0, "flushes": 0}
        device |= {"data_bytes": 0, "metadata_bytes": 0}
        guest = {"reads": 0, "writes": guest_writes, "flushes": 0}
        phases = ("mkfs", "creation", "transactions")
        return [{"round": 0, "format": name, "phase": phase, "submitted": device, "issued": device, "guest": guest} for phase in phases]

    result = {
        "samples": sample("fvd", 300, 100) + sample("raw", 200, 200) + sample("qcow2", 800, 200),
        "not_measured": {"qed": "played"},
        "postmark": "played",
    }
    rows, plots = evaluate(MODULES, f"[f(json.loads({json.dumps(result)!r})) for f in (postmark.rows, postmark.plots)]")
    by_name = {row["what"]: row for row in rows}
    judged = by_name["device I/Os for each guest I/O: fvd / raw"]
    assert judged["values"] == [3.0]
    assert judged["reached"] is False
    assert by_name["device I/Os for each guest I/O: fvd / qcow2"]["values"] == [0.75]
    assert by_name["PostMark on qed"]["value"] == "not measured"
    assert plots[0]["x"] == ["fvd", "raw", "qcow2"]
    assert [series["name"] for series in plots[0]["series"]] == ["data", "metadata", "flushes"]


def test_the_quick_mode_says_that_it_measures_nothing() -> None:
    [only] = evaluate(MODULES, "postmark.rows(postmark.measure(suite.PLANS['quick']))")
    assert only["reached"] is None
    assert only["note"]
