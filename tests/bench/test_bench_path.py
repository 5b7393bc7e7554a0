# SPDX-License-Identifier: Apache-2.0
"""The benchmark of a request's path names stages, and what it names adds up. Nothing here says how fast anything is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from bench_running import evaluate

pytestmark = pytest.mark.release_only  # what it runs takes the release build

MODULES = """
import json, path, path_stages, tempfile
from pathlib import Path
"""


def test_a_served_disk_is_sampled_and_counted() -> None:
    reason, sample, stages = evaluate(
        MODULES
        + """
with tempfile.TemporaryDirectory() as name, path.running(path.FVD, Path(name), 16 << 20) as served:
    reason = path_stages.refusal()
    sample = path.over_nbd(served, "randread", 0.5, 16 << 20, not reason, not reason)
""",
        "[reason, sample, path_stages.STAGES]",
    )
    assert sample["iops"] > 0 and sample["cpu_us"] > 0
    if reason:
        pytest.skip(reason)
    assert list(sample["stages_us"]) == stages
    assert sum(sample["stages_us"].values()) == pytest.approx(sample["cpu_us"])
    assert all(sample["stages_us"][stage] > 0 for stage in ("receive", "submit: block layer and device", "own code: protocol and loop"))
    assert sample["stages_us"]["own code: one program"] == 0  # only qemu-nbd's
    if "calls" in sample:  # what came in was received, and what was asked of the device went through the ring
        assert sample["calls"]["io_uring_enter"] > 0 and sample["calls"]["recvfrom"] + sample["calls"]["recvmsg"] > 0
        assert sample["calls"]["read"] == 0 and all(count >= 0 for count in sample["calls"].values())


PRINTED = """\
   12.000001:
\tffffffff81b6ab30 _copy_to_iter ([kernel.kallsyms])
\tffffffff820c99ab unix_stream_recvmsg ([kernel.kallsyms])
\tffffffff81e2c4f7 __sys_recvfrom ([kernel.kallsyms])
\tffffffff821ed511 do_syscall_64 ([kernel.kallsyms])
\t           f82ec recv (/usr/lib/libc.so.6)

   12.000252:
\tffffffff81b6ab30 finish_task_switch.isra.0 ([kernel.kallsyms])
\tffffffff81b6ab31 __schedule ([kernel.kallsyms])
\tffffffff81b6ab32 io_cqring_wait ([kernel.kallsyms])

   12.000503:
\tffffffff81b6ab30 gup_fast_fallback ([kernel.kallsyms])
\tffffffff81b6ab31 blkdev_read_iter ([kernel.kallsyms])
\tffffffff81b6ab32 io_submit_sqes ([kernel.kallsyms])

   12.000754:
\t           14645 Engine_submit (/a folder (1)/fvd/engine/_engine.cpython-311-x86_64-linux-gnu.so)
\t               0 [unknown] ([unknown])

   12.001005:
\tffffffff81b6ab30 unix_stream_sendmsg ([kernel.kallsyms])
\tffffffff81b6ab31 asm_sysvec_apic_timer_interrupt ([kernel.kallsyms])
\tffffffff81b6ab32 __sys_sendmsg ([kernel.kallsyms])

   12.001256:
\tffffffff81b6ab32 do_syscall_64 ([kernel.kallsyms])
"""


def test_call_chains_get_their_stage() -> None:
    stages = f"[[s, path_stages.stage_of(f)] for s, f in path_stages.read_chains({PRINTED!r}.splitlines())]"
    assert evaluate(MODULES, stages) == [
        [12.000001, "receive"],
        [12.000252, "sleep and wake"],
        [12.000503, "submit: memory pages"],
        [12.000754, "own code: engine"],
        [12.001005, "interrupts"],
        [12.001256, "enter and leave the kernel"],
    ]


def sample(kind: str, cpu_us: float, receive_us: float) -> dict[str, Any]:
    stages = {"receive": receive_us, "submit: the ring": cpu_us - receive_us}
    calls = {"io_uring_enter": 0.25, "recvfrom": 0.5, "the others": 0.25}
    return {"round": 0, "pattern": "randread", "server": kind, "iops": 1.0, "cpu_us": cpu_us, "stages_us": stages, "calls": calls}


def rows_and_plots(samples: list[dict[str, Any]], why_no_perf: str) -> Any:
    result = {"samples": samples, "patterns": ["randread"], "depth": 32, "block_bytes": 4096, "why_no_perf": why_no_perf}
    return evaluate(
        MODULES
        + f"""
result = json.loads({json.dumps(result)!r})
for one in result["samples"]:
    if "stages_us" in one:
        one["stages_us"] = dict.fromkeys(path_stages.STAGES, 0.0) | one["stages_us"]
""",
        "[path.rows(result), path.plots(result)]",
    )


def test_rows_and_the_picture() -> None:
    samples = [sample("fvd", 8.0, 2.0), sample("pass-through", 6.0, 2.0), sample("qemu raw", 32.0, 10.0), sample("answer-only", 2.0, 2.0)]
    rows, plots = rows_and_plots(samples, "")
    by_what = {row["what"].removeprefix("4 KiB randread QD32"): row for row in rows}
    assert by_what[", CPU per request: fvd / qemu raw"]["values"] == [0.25]
    assert by_what[": what the engine adds"]["values"] == [2.0] and by_what[": what the device adds"]["values"] == [4.0]
    assert by_what[": what NBD adds"]["value"] == "not measured"
    assert by_what[": system calls per request"]["values"] == [1.0] and by_what[": requests per turn of the loop"]["values"] == [4.0]
    assert by_what[", receive"]["values"][0] + by_what[", submit: the ring"]["values"][0] == by_what[": CPU per request"]["values"][0]
    assert ", complete" not in by_what  # nobody was seen there
    [plot] = plots
    assert plot["x"] == ["receive", "submit: the ring"]
    assert {series["name"]: sum(points[0] for points in series["points"]) for series in plot["series"]} == {
        "fvd": 8.0,
        "pass-through": 6.0,
        "qemu raw": 32.0,
    }


def test_without_perf_the_steps_are_there_and_the_stages_say_why() -> None:
    samples = [sample("fvd", 8.0, 2.0), sample("pass-through", 6.0, 2.0), sample("qemu raw", 32.0, 10.0)]
    for one in samples:
        del one["stages_us"], one["calls"]
    rows, plots = rows_and_plots(samples, "perf is not installed")
    unmeasured = {row["what"].removeprefix("4 KiB randread QD32"): row["note"] for row in rows if row["value"] == "not measured"}
    assert unmeasured[": each stage"] == unmeasured[": system calls per request"] == "perf is not installed"
    assert any(row["what"].endswith("what the engine adds") and row["values"] == [2.0] for row in rows if "values" in row)
    assert plots == []
