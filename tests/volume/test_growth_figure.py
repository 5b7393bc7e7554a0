# SPDX-License-Identifier: Apache-2.0
"""No write waits for growth: allocating writes come as fast as a real device takes them, while each `lvextend` takes a second and a half.

The harness is the benchmark's, `bench/growth.py`. What is asserted is who waited; how fast it went is printed and not judged.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

import growth
from machine import CannotMeasure

pytestmark = [pytest.mark.slow, pytest.mark.release_only, pytest.mark.alone]

MIB = 1 << 20
GIB = 1 << 30


def measured(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    try:
        return call(*args, **options)
    except CannotMeasure as reason:
        pytest.skip(str(reason))


def told(grown: growth.Grown) -> str:
    begun = ", ".join(f"{size / GIB:.2f}" for size in grown.begun_with_bytes)
    return (
        f"{grown.bytes_written / GIB:.1f} GiB at {grown.bytes_per_second / 1e9:.2f} GB/s, "
        f"longest write {grown.longest_write_seconds * 1000:.0f} ms, longest step {grown.longest_step_seconds:.2f} s, "
        f"begun with {begun} GiB free, {grown.waited} writes waited"
    )


def test_no_write_waits_during_five_growth_steps_at_the_devices_full_speed(capsys: pytest.CaptureFixture[str]) -> None:
    alone = measured(growth.device_alone, 4 * GIB)
    grown = measured(growth.grow_under_load, 5)
    with capsys.disabled():
        print(f"\n  {told(grown)}; the device alone: {alone.bytes_per_second / 1e9:.2f} GB/s")
    assert grown.steps >= 5 and grown.bytes_written >= 25 * GIB
    assert grown.longest_step_seconds >= growth.STEP_SECONDS
    assert grown.waited == 0
    assert grown.longest_write_seconds < growth.STEP_SECONDS
    assert grown.group_free_bytes is not None and grown.group_free_bytes < 1 << 40


def test_and_with_growth_begun_too_late_writes_do_wait() -> None:
    """Otherwise the test above would prove nothing."""
    grown = measured(growth.grow_under_load, 2, step_bytes=GIB, low_water_bytes=MIB, adaptive=False)
    assert grown.waited >= grown.steps == 2, told(grown)
    assert grown.longest_write_seconds > growth.STEP_SECONDS / 2


def test_steps_that_are_outrun_become_larger_until_no_write_waits() -> None:
    """A grow step of 512 MiB is written in less time than growing by it takes: nothing can help the first two."""
    grown = measured(growth.grow_under_load, 4, step_bytes=GIB // 2, step_seconds=1.0)
    # The last may be what is left of the disk.
    assert grown.asked_bytes[0] == GIB // 2 < min(grown.asked_bytes[1:3]), told(grown)
    assert grown.begun_with_bytes[-1] > GIB // 2
    assert grown.waited == grown.waited_by_step[1], told(grown)
