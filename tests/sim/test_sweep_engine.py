# SPDX-License-Identifier: Apache-2.0
"""Power fails after every device operation of short scenarios of the engine, and every subset of what was volatile survives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from bugs import needs_bugs, seeded

from devtools.sweep import sweep
from fvd._core import Bug
from fvd.errors import FvdError
from fvd.format.geometry import Layout
from fvd.sim._device import FLUSH, WRITE, Operation
from fvd.sim._oracle import Violation
from fvd.sim.device_node import Budget
from fvd.sim.stage import Stage

pytestmark = pytest.mark.checked_once

BLOCK = 8  # sectors
CHUNK = 16 * BLOCK


class Scene(Stage):
    """Blocks of one logical block or eight, in chunks of 16."""

    def __init__(self, **changes: Any) -> None:
        self.budget = Budget()
        sizes = {"virtual_size_bytes": 1 << 18, "block_size_bytes": 4096, "chunk_size_bytes": 1 << 16, "grow_step_bytes": 1 << 16}
        super().__init__(**(sizes | changes))

    def finish(self, *operations: Operation) -> None:
        for operation in operations:
            self.effect(operation)
            self.budget.spend()
            self.player.deliver(self.device.finish(operation))

    def judge(self) -> None:
        self.player.abandon()
        self.log_memory = None  # power has failed, and the host's memory with it
        self.open()
        self.check()
        self.oracle.check_after_crash(self.read_all())


def allocate(scene: Scene) -> None:
    scene.submit("write", 0, BLOCK)
    scene.submit("write", CHUNK + 3, 2 * BLOCK)
    scene.submit("flush")
    scene.finish_all()
    scene.now("write", 2 * BLOCK, BLOCK, fua=True)


def overwrite(scene: Scene) -> None:
    scene.now("write", 0, 2 * BLOCK)
    scene.now("flush")
    scene.now("write", 0, 2 * BLOCK, fua=True)
    scene.submit("write", 3, 2)
    scene.submit("write", BLOCK, BLOCK)
    scene.submit("flush")
    scene.finish_all()


def partial_blocks_over_a_base(scene: Scene) -> None:
    scene.submit("write", 3, 2)
    scene.submit("write", 5 * BLOCK + 1, 2 * BLOCK)
    scene.finish_all()
    scene.now("flush")
    scene.now("zero", CHUNK + BLOCK, 3 * BLOCK)
    scene.now("write", CHUNK + 5 * BLOCK + 1, 1, fua=True)
    scene.now("trim", 0, CHUNK)
    scene.now("write", 2 * BLOCK, 1)
    scene.now("flush")


def trim_then_reuse(scene: Scene) -> None:
    scene.now("write", 0, 3 * BLOCK)
    scene.now("flush")
    scene.submit("trim", 0, CHUNK)
    scene.submit("write", CHUNK, 2 * BLOCK)
    scene.finish_all()
    scene.now("flush")
    scene.submit("trim", CHUNK, BLOCK)
    scene.submit("write", CHUNK, 4)
    scene.submit("flush")
    scene.finish_all()


def journal_wrap(scene: Scene) -> None:
    for number in range(22):
        scene.submit("trim" if number % 3 == 2 else "write", number % 5 * CHUNK // 2, CHUNK // 2 if number % 3 == 2 else BLOCK)
        scene.submit("flush")
        scene.submit("write", 3 * CHUNK + number % 4 * BLOCK, BLOCK)
        scene.finish_all()


def checkpoint(scene: Scene) -> None:
    """Its map writes end while the flush of a commit is under way, which covers none of them, and the commit's record follows at once."""

    def of_maps(op: Operation) -> bool:
        return op.kind == WRITE and scene.device.category(op) == "map"

    for number in range(14):
        scene.submit("write", number * BLOCK * 4 % (4 * CHUNK), BLOCK)
        scene.submit("flush")
        scene.finish_all(but=of_maps)
    if not scene.pending(of_maps):
        raise RuntimeError("no checkpoint: the scenario no longer fits the engine")
    scene.submit("write", 3 * BLOCK, BLOCK)
    scene.finish_all(but=of_maps)
    scene.submit("flush")
    scene.finish_all(but=lambda op: op.kind == FLUSH)
    scene.finish_all()
    scene.now("write", BLOCK, BLOCK, fua=True)


def growth(scene: Scene) -> None:
    """Storage for one chunk; the second write waits, the storage grows, and grows again while things are under way."""
    scene.now("write", 0, BLOCK)
    scene.submit("write", CHUNK, BLOCK)
    scene.finish_all()
    scene.submit("flush")
    scene.grow()
    scene.finish_all()
    scene.submit("write", 2 * CHUNK, BLOCK)
    scene.grow()
    scene.submit("flush")
    scene.finish_all()
    scene.now("flush")


def close(scene: Scene) -> None:
    scene.submit("write", 0, BLOCK)
    scene.submit("write", CHUNK, BLOCK)
    scene.begin_close()
    scene.finish_all()


RAW = {"layout": Layout.RAW}
BASE = {"base_bytes": 150_001}
SCENARIOS: list[tuple[Callable[[Scene], None], dict[str, Any]]] = [
    *((scenario, changes) for scenario in (allocate, overwrite, journal_wrap, close) for changes in ({}, BASE, RAW)),
    (partial_blocks_over_a_base, BASE),
    (partial_blocks_over_a_base, BASE | RAW),
    (partial_blocks_over_a_base, BASE | {"block_size_bytes": 16384}),
    (trim_then_reuse, {"storage_chunks": 1}),
    (trim_then_reuse, {"storage_chunks": 2, "discard": True}),
    (checkpoint, {}),
    (checkpoint, BASE),
    (growth, {"storage_chunks": 1}),
]


def name(value: object) -> str:
    if isinstance(value, dict):
        return "-".join(f"{key.removesuffix('_bytes')}={getattr(item, 'name', item)}" for key, item in value.items()) or "plain"
    return str(getattr(value, "__name__", value))


@pytest.mark.parametrize("logical_block_bytes", [4096, 512])
@pytest.mark.parametrize(("scenario", "changes"), SCENARIOS, ids=name)
def test_power_fails_everywhere(scenario: Callable[[Scene], None], changes: dict[str, Any], logical_block_bytes: int) -> None:
    count = sweep(lambda: Scene(logical_block_bytes=logical_block_bytes, **changes), scenario)
    print(f"{scenario.__name__}: {count.images} images at {count.points} points, at most {count.most_volatile} volatile blocks")
    assert count.points > 5 and count.images > 2 * count.points


@needs_bugs
@pytest.mark.parametrize(
    ("bug", "scenario"),
    [
        (Bug.JOURNAL_BEFORE_FLUSH, allocate),
        (Bug.CHANGE_BEFORE_ITS_DATA, allocate),
        (Bug.FLUSH_ANSWERED_BEFORE_JOURNAL, allocate),
        (Bug.TAIL_BEFORE_CHECKPOINT_FLUSH, checkpoint),
        (Bug.SLOT_FREED_BEFORE_COMMIT, trim_then_reuse),
        (Bug.JOURNAL_WRITE_NOT_DURABLE, overwrite),
    ],
    ids=lambda value: getattr(value, "name", getattr(value, "__name__", None)),
)
def test_the_sweep_finds_bugs(bug: Bug, scenario: Callable[[Scene], None]) -> None:
    """A sweep that finds nothing where there is something proves nothing."""
    with seeded(bug), pytest.raises((Violation, FvdError, RuntimeError), match=r"sector|journal|maps|flush|slot"):
        sweep(lambda: Scene(logical_block_bytes=512, storage_chunks=1 if scenario is trim_then_reuse else 4), scenario)
