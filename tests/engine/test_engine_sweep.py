"""Power fails after every device operation of a few short scenarios, and every subset of what was not yet durable survives.

Random play (test_engine_random.py) meets more situations; in these few nothing is left to chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from math import prod
from typing import Any

import pytest

from fvd.sim._device import Operation
from fvd.sim.stage import Stage

COMBINATIONS = 64  # of surviving blocks: tried all up to here
SAMPLES = 20  # and so many random ones where there are more
BLOCK = 8  # sectors
CHUNK = 16 * BLOCK


class PowerFailure(Exception):
    """Enough operations have taken effect."""


class Sweep(Stage):
    """Blocks of one logical block, in chunks of 16. Power fails when `budget` operations have taken effect, the last not yet complete."""

    def __init__(self, **changes: Any) -> None:
        sizes = {"virtual_size_bytes": 1 << 18, "block_size_bytes": 4096, "chunk_size_bytes": 1 << 16, "logical_block_bytes": 4096}
        super().__init__(**(sizes | changes))
        self.budget = 1 << 60

    def finish(self, *operations: Operation) -> None:
        for operation in operations:
            self.effect(operation)
            self.budget -= 1
            if self.budget == 0:
                raise PowerFailure
            self.player.deliver(self.device.finish(operation))

    def crash_in_every_way(self) -> int:
        """Every image that a crash now may leave is opened and judged. Returns how many."""
        image = bytearray(self.image)
        blocks = self.device.volatile()
        total = prod(len(contents) for _, contents in blocks)
        self.player.abandon()
        for chosen in product(*(contents for _, contents in blocks)) if total <= COMBINATIONS else self._some(blocks):
            for (offset, _), content in zip(blocks, chosen, strict=True):
                image[offset : offset + len(content)] = content
            self.device.put_back(image)
            self.open()
            self.check()
            self.oracle.check_after_crash(self.read_all())
        return total if total <= COMBINATIONS else SAMPLES

    def _some(self, blocks: list[tuple[int, list[bytes]]]) -> Iterator[tuple[bytes, ...]]:
        for _ in range(SAMPLES):
            yield tuple(self.dice.choice(contents) for _, contents in blocks)


def allocate(stage: Sweep) -> None:
    stage.submit("write", 0, BLOCK)
    stage.submit("write", CHUNK + 3, 2 * BLOCK)
    stage.submit("flush", 0, 0)
    stage.finish_all()
    stage.now("write", 2 * BLOCK, BLOCK, fua=True)


def overwrite(stage: Sweep) -> None:
    stage.now("write", 0, 2 * BLOCK)
    stage.now("flush")
    stage.now("write", 0, 2 * BLOCK, fua=True)
    stage.submit("write", 3, 2)
    stage.submit("write", BLOCK, BLOCK)
    stage.submit("flush", 0, 0)
    stage.finish_all()


def partial_blocks_over_a_base(stage: Sweep) -> None:
    stage.submit("write", 3, 2)
    stage.submit("write", 5 * BLOCK + 1, 2 * BLOCK)
    stage.finish_all()
    stage.now("flush")
    stage.now("zero", CHUNK + BLOCK, 3 * BLOCK)
    stage.now("write", CHUNK + 5 * BLOCK + 1, 1, fua=True)
    stage.now("trim", 0, CHUNK)
    stage.now("write", 2 * BLOCK, 1)
    stage.now("flush")


def trim_then_reuse(stage: Sweep) -> None:
    stage.now("write", 0, 3 * BLOCK)
    stage.now("flush")
    stage.submit("trim", 0, CHUNK)
    stage.submit("write", CHUNK, 2 * BLOCK)
    stage.finish_all()
    stage.now("flush")
    stage.submit("trim", CHUNK, BLOCK)
    stage.submit("write", CHUNK, 4)
    stage.submit("flush", 0, 0)
    stage.finish_all()


def journal_wrap_and_checkpoints(stage: Sweep) -> None:
    for number in range(22):
        stage.submit("trim" if number % 3 == 2 else "write", number % 5 * CHUNK // 2, CHUNK // 2 if number % 3 == 2 else BLOCK)
        stage.submit("flush", 0, 0)
        stage.submit("write", 3 * CHUNK + number % 4 * BLOCK, BLOCK)
        stage.finish_all()


def close(stage: Sweep) -> None:
    stage.submit("write", 0, BLOCK)
    stage.submit("write", CHUNK, BLOCK)
    stage.begin_close()
    stage.finish_all()


SCENARIOS: dict[Callable[[Sweep], None], dict[str, Any]] = {
    allocate: {},
    overwrite: {},
    partial_blocks_over_a_base: {"base_bytes": 150_001},
    trim_then_reuse: {"storage_chunks": 1},
    journal_wrap_and_checkpoints: {"discard": True},
    close: {},
}


@pytest.mark.parametrize("logical_block_bytes", [4096, 512])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_power_fails_everywhere(scenario: Callable[[Sweep], None], logical_block_bytes: int) -> None:
    images = 0
    for budget in range(1, 1000):
        stage = Sweep(logical_block_bytes=logical_block_bytes, **SCENARIOS[scenario])
        stage.budget = budget
        try:
            scenario(stage)
        except PowerFailure:
            images += stage.crash_in_every_way()
        else:
            images += stage.crash_in_every_way()
            break
    print(f"{scenario.__name__}: {images} images after {budget - 1} operations")
    assert budget > 5
