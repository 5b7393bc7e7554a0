# SPDX-License-Identifier: Apache-2.0
"""Which slot a chunk gets. `spread` imitates a raw layout: tested by what a reader of the map would see, not by how it is found."""

from __future__ import annotations

import random
from typing import Any

import pytest

from fvd.format.geometry import Layout, Placement
from fvd.sim.stage import Stage

CHUNK = 1 << 16
SECTORS_PER_CHUNK = CHUNK // 512


def disk(chunks: int, storage_chunks: int, placement: Placement = Placement.SPREAD, **changes: Any) -> Stage:
    sizes: dict[str, Any] = {"virtual_size_bytes": chunks * CHUNK, "chunk_size_bytes": CHUNK, "grow_step_bytes": 500 * CHUNK}
    return Stage(**sizes, storage_chunks=storage_chunks, placement=placement, **changes)


def touch(stage: Stage, chunk: int) -> None:
    stage.now("write", chunk * SECTORS_PER_CHUNK, 8)


def slots(stage: Stage) -> dict[int, int]:
    """Of each mapped chunk."""
    _, table = stage.engine.snapshot_maps()
    return {chunk: int(slot) for chunk, slot in enumerate(table) if slot != 0xFFFFFFFF}


def test_with_all_storage_there_a_chunk_lies_where_a_raw_layout_has_it() -> None:
    stage = disk(600, 600)
    order = list(range(600))
    random.Random(1).shuffle(order)
    for chunk in order:
        touch(stage, chunk)
    assert slots(stage) == {chunk: chunk for chunk in range(600)}


def test_the_first_chunk_of_a_region_lies_as_far_into_the_storage_as_into_the_disk() -> None:
    stage = disk(2000, 500)
    for chunk in (1000, 0, 1999, 400):
        touch(stage, chunk)
    assert slots(stage) == {0: 0, 400: 100, 1000: 250, 1999: 499}


def test_a_chunk_lies_beside_its_neighbours_as_in_a_raw_layout() -> None:
    stage = disk(2000, 1000)
    for chunk in (1000, 1010, 1001, 1256, 1520, 900):
        touch(stage, chunk)
    assert slots(stage) == {900: 450, 1000: 500, 1001: 501, 1010: 510, 1256: 756, 1520: 760}


def test_chunks_written_in_sequence_lie_in_sequence_with_many_under_way() -> None:
    stage = disk(2000, 500)
    for chunk in range(1000, 1032):
        stage.submit("write", chunk * SECTORS_PER_CHUNK, 8)
    stage.finish_all()
    assert slots(stage) == {chunk: chunk - 750 for chunk in range(1000, 1032)}


@pytest.mark.parametrize("taken", [(250,), (250, 251), (249, 250), (248, 249, 250, 251, 252)])
def test_a_wish_that_is_taken_gets_the_nearest_free_slot(taken: tuple[int, ...]) -> None:
    stage = disk(2000, 500)
    touch(stage, 600)  # in slot 150
    for slot in taken:
        touch(stage, 600 + slot - 150)
    held = set(slots(stage).values())
    assert held == {150, *taken}
    touch(stage, 1000)
    got = slots(stage)[1000]
    free = [slot for slot in range(500) if slot not in held]
    assert got == min(free, key=lambda slot: (abs(slot - 250), -slot))


def test_a_wish_beyond_the_storage_is_its_end() -> None:
    stage = disk(2000, 500)
    for chunk in (1996, 1999, 1997, 1998):
        touch(stage, chunk)
    assert slots(stage) == {1996: 499, 1999: 498, 1997: 497, 1998: 496}


def test_it_goes_on_when_storage_has_grown() -> None:
    stage = disk(2000, 500)
    for chunk in (0, 1000):
        touch(stage, chunk)
    assert stage.grow()
    touch(stage, 1500)
    touch(stage, 1001)
    assert slots(stage) == {0: 0, 1000: 250, 1001: 251, 1500: 750}


def test_nothing_is_refused_while_a_slot_is_free() -> None:
    """Whatever the wishes are: as many chunks as slots, in any order, with some given back in between."""
    for seed in range(20):
        rng = random.Random(seed)
        stage = disk(400, 100, on_full="error", discard=False)
        mapped: set[int] = set()
        while len(mapped) < 100:
            chunk = rng.randrange(400)
            if chunk in mapped and rng.random() < 0.3:
                stage.now("trim", chunk * SECTORS_PER_CHUNK, SECTORS_PER_CHUNK)
                stage.now("flush")
                mapped.discard(chunk)
            else:
                touch(stage, chunk)
                mapped.add(chunk)
        found = slots(stage)
        assert set(found) == mapped and sorted(found.values()) == list(range(100))


def test_append_goes_upwards() -> None:
    stage = disk(2000, 500, Placement.APPEND)
    for chunk in (1000, 0, 1999, 400):
        touch(stage, chunk)
    assert slots(stage) == {1000: 0, 0: 1, 1999: 2, 400: 3}


def test_the_raw_layout_has_no_choice() -> None:
    stage = disk(50, 50, layout=Layout.RAW)
    touch(stage, 7)
    stage.crash()
