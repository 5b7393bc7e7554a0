# SPDX-License-Identifier: Apache-2.0
"""Random worlds from seeds, on all processors: what `fvd-lv torture` does, and that the same seed is the same world.

FVD_SIM_SECONDS sets how long fresh worlds are played, FVD_SIM_JOBS on how many processors, FVD_SIM_FIRST from which seed on; a failure
prints the one line that plays it again.
"""

from __future__ import annotations

import os
import time

import pytest
from bugs import needs_bugs, seeded

from fvd._core import Bug
from fvd.engine import _engine
from fvd.errors import InvalidArgument
from fvd.modes import CACHE_MODES
from fvd.sim import torture as torture_module
from fvd.sim._device import CATEGORIES
from fvd.sim._rng import Rng
from fvd.sim.rounds import Outcome, run
from fvd.sim.shrink import format_kept, parse_kept, shrink
from fvd.sim.torture import Kind, play_one, torture
from fvd.sim.world import shape_of

# Seeds that once found a fault, kept though a change of `draw` gives every seed another world; scenarios.py keeps the faults themselves.
FOUND = (2, 11, 523, 1000021557, 1000048086, 1000002325, 60121, 5656022)
JOBS = int(os.environ.get("FVD_SIM_JOBS", os.cpu_count() or 1))
DRAWN = [2090645714713926465, 3990616506021403346, 3178928474216219528]


def fresh_seed() -> int:
    return int(os.environ.get("FVD_SIM_FIRST", time.time_ns() // 1000 % (1 << 40)))


@pytest.mark.parametrize("seed", FOUND)
def test_seed_that_once_failed(seed: int) -> None:
    outcome, found = play_one(seed)
    assert found is None, found
    assert outcome.requests > 0


@pytest.mark.parametrize("kind", ["worlds", "bytes", "combinations"])
def test_fresh_worlds(kind: Kind) -> None:
    seconds = float(os.environ.get("FVD_SIM_SECONDS", "20" if _engine.SEEDED_BUGS else "75"))
    # Beside other tests the workers alone take seconds to start.
    tally = torture(fresh_seed(), seconds=seconds if kind == "worlds" else max(30.0, seconds / 4), jobs=JOBS, kind=kind)
    rate = tally.requests_per_cpu_second
    print(f"{tally.worlds} worlds from seed {tally.first_seed}: {tally.requests} requests, {rate:.0f} a second on one core")
    option = "" if kind == "worlds" else f" --{kind}"
    again = f"fvd-lv torture --seed {tally.found[0].seed} --worlds 1{option}" if tally.found else ""
    assert not tally.found, f"{tally.found[0]}\nagain: {again}"
    assert tally.worlds > 3 and tally.requests > 300


@pytest.mark.release_only
@pytest.mark.alone
def test_thousands_of_requests_a_second() -> None:
    """Crashes and reopens included, on one core, by its own clock. What it was measured to be: docs/internals/testing.md."""
    tally = torture(1, requests=100_000, jobs=1)
    print(f"{tally.requests_per_cpu_second:.0f} simulated guest requests a second on one core")
    assert tally.requests_per_cpu_second > 2_500


def test_a_seed_is_one_world() -> None:
    logs: list[list[str]] = [[], [], []]
    for log, events in zip(logs, (0, 0, 1), strict=True):
        run(77, log=log, events=events)
    assert logs[0] == logs[1]
    assert logs[0] != logs[2]
    assert len(logs[0]) > 100


def test_the_dice_are_the_same_everywhere() -> None:
    """Numbers of the reference implementation of splitmix64 and xoshiro256**, so that a seed means the same on every machine."""
    rng = Rng(1, 2, 3)
    assert [rng.randint(0, 2**62) for _ in range(3)] == DRAWN
    assert Rng(1).randbytes(5) == Rng(1).randbytes(5)
    assert Rng(1).randbytes(8) != Rng(2).randbytes(8)
    with pytest.raises(ValueError, match="no number"):
        rng.randint(2, 1)


def test_shapes_differ() -> None:
    """Both layouts, all cache modes, with and without a base, faults of every category, sizes that are odd."""
    shapes = [shape_of(seed) for seed in range(3000)]
    assert {shape.geometry.layout.name for shape in shapes} == {"COMPACT", "RAW"}
    assert {shape.cache_mode for shape in shapes} == set(CACHE_MODES)
    assert {shape.base_bytes is None for shape in shapes} == {True, False}
    assert any(shape.base_bytes and shape.base_bytes % 512 for shape in shapes)
    assert any(shape.base_bytes and shape.base_bytes > shape.geometry.virtual_size_bytes for shape in shapes)
    assert any(shape.geometry.virtual_size_bytes % shape.geometry.block_size_bytes for shape in shapes)
    assert {name for shape in shapes for name, rate in shape.faults.items() if rate} == set(CATEGORIES)
    assert max(rate for shape in shapes for rate in shape.faults.values()) >= 0.9
    assert max(shape.depth for shape in shapes) >= 1000
    assert any(shape.windows for shape in shapes)
    assert {shape.copying for shape in shapes} == {True, False}
    assert {shape.logical_block_bytes for shape in shapes} == {512, 4096}


@needs_bugs
def test_a_failure_is_found_and_shrinks() -> None:
    """With a rule taken away: the first failing seed, found by many processes or one, shrinks to a few requests that still fail."""
    with seeded(Bug.CHANGE_BEFORE_ITS_DATA):
        seed = next(seed for seed in range(10_000) if play_one(seed)[1] is not None)
        outcome = Outcome()
        with pytest.raises(Exception):  # noqa: B017 - whatever it finds
            run(seed, outcome=outcome)
        shrunk = shrink(seed)
        assert len(shrunk.kept) < sum(outcome.played.values())
        assert len(shrunk.kept) <= 12, shrunk
        with pytest.raises(Exception):  # noqa: B017
            run(seed, only=parse_kept(shrunk.only), events=shrunk.events)
    with pytest.raises(InvalidArgument, match="nothing to shrink"):
        shrink(seed)


def test_requests_by_name() -> None:
    text = format_kept([0, 2, 5], [(0, 3), (0, 7), (0, 8), (0, 9), (5, 65536)])
    assert text == "0:3,7-9/2:/5:65536"
    assert parse_kept(text) == {0: frozenset({3, 7, 8, 9}), 2: frozenset(), 5: frozenset({65536})}
    for wrong in ("x", "1:2-", "1:5-99999999", ":"):
        with pytest.raises(InvalidArgument, match="does not name requests"):
            parse_kept(wrong)


def test_leaving_a_request_out_changes_no_other() -> None:
    whole: list[str] = []
    some: list[str] = []
    run(12, log=whole)
    outcome = Outcome()
    run(12, outcome=outcome)
    kept = {number: frozenset(range(count)) - {0} for number, count in outcome.played.items()}
    run(12, only=kept, log=some)
    first = next(line for line in whole if line.startswith("submit"))
    requests = [line.partition(": ")[2] for line in whole if line.startswith("submit")]
    fewer = [line.partition(": ")[2] for line in some if line.startswith("submit")]
    assert first.partition(": ")[2] == requests[0]
    assert fewer[:1] == requests[1:2]


def test_a_world_that_kills_its_process_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torture_module, "_play_batch", die_at_seven)
    tally = torture(1, worlds=20, jobs=2)
    assert [found.seed for found in tally.found] == [7]
    assert "ended its process" in tally.found[0].error


def die_at_seven(seeds: range, kind: Kind) -> tuple[list[tuple[Outcome, None]], float]:
    if 7 in seeds:
        os._exit(9)
    return [(Outcome(), None) for seed in seeds], 0.0


def test_a_world_that_never_ends_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torture_module, "_play_batch", sleep_for_ever)
    monkeypatch.setattr(torture_module, "STALL_SECONDS", 1.0)
    tally = torture(1, worlds=20, jobs=1)
    assert "does not end" in tally.found[0].error


def sleep_for_ever(seeds: range, kind: Kind) -> tuple[list[tuple[Outcome, None]], float]:
    time.sleep(1000)
    return [], 0.0
