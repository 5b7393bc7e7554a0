# SPDX-License-Identifier: Apache-2.0
"""What requests cost in device operations: promise 4 of docs/internals/durability.md, counted and never timed."""

from __future__ import annotations

import pytest

from fvd.format.geometry import Layout
from fvd.sim._device import FLUSH, READ, WRITE
from fvd.sim.stage import SECTORS_PER_BLOCK, SECTORS_PER_CHUNK, Stage


@pytest.fixture(params=[Layout.COMPACT, Layout.RAW], ids=["compact", "raw"])
def stage(request: pytest.FixtureRequest) -> Stage:
    stage = Stage(layout=request.param)
    stage.now("write", 0, 2 * SECTORS_PER_CHUNK)
    stage.now("flush")
    return stage


def kinds(stage: Stage) -> list[int]:
    return [op.kind for op in stage.pending()]


@pytest.mark.parametrize(("first", "sectors"), [(0, 8), (8, 1), (100, 200), (0, SECTORS_PER_CHUNK)])
def test_aligned_overwrite_is_one_device_write(stage: Stage, first: int, sectors: int) -> None:
    stage.submit("write", first, sectors)
    (only,) = stage.pending()
    assert (only.kind, only.length_bytes) == (WRITE, sectors * 512)
    stage.finish_all()
    before = stage.counts()
    stage.now("flush")
    after = stage.counts()
    assert after["journal_writes"] == before["journal_writes"]
    assert after["device_flushes"] == before["device_flushes"] + 1
    assert after["device_writes"] == before["device_writes"]


def test_neighbouring_chunks_join(stage: Stage) -> None:
    stage.submit("write", 0, 2 * SECTORS_PER_CHUNK)
    stage.submit("read", 0, 2 * SECTORS_PER_CHUNK)
    assert kinds(stage) == [WRITE, READ]
    stage.finish_all()


def test_flush_with_new_mappings_is_one_contiguous_metadata_write(stage: Stage) -> None:
    for block in range(12, 16):
        stage.submit("write", block * SECTORS_PER_BLOCK, 8)
    stage.finish_all()
    before = stage.counts()
    for _ in range(5):
        stage.submit("flush", 0, 0)
    stage.finish_all()
    after = stage.counts()
    assert after["journal_writes"] == before["journal_writes"] + 1
    assert after["device_writes"] == before["device_writes"] + 1
    # The first flush commits; those that came meanwhile share one more device flush.
    assert after["device_flushes"] <= before["device_flushes"] + 2


def test_committed_fua_overwrite_is_one_durable_write(stage: Stage) -> None:
    stage.submit("write", 0, 8, fua=True)
    (only,) = stage.pending()
    assert only.kind == WRITE and only.durable
    stage.finish_all()
    assert not stage.in_flight


def test_fua_into_a_new_block_commits(stage: Stage) -> None:
    cookie = stage.submit("write", 14 * SECTORS_PER_BLOCK, 8, fua=True)
    stage.finish_all(but=lambda op: op.kind == FLUSH)
    assert cookie in stage.in_flight
    stage.finish_all()
    assert cookie not in stage.in_flight


def test_first_write_is_one_block(stage: Stage) -> None:
    stage.submit("write", 14 * SECTORS_PER_BLOCK + 8, 8)
    (only,) = stage.pending()
    assert (only.kind, only.length_bytes) == (WRITE, SECTORS_PER_BLOCK * 512)
    stage.finish_all()


def test_a_short_first_write_across_blocks_is_one_device_write(stage: Stage) -> None:
    stage.submit("write", 12 * SECTORS_PER_BLOCK + 8, 2 * SECTORS_PER_BLOCK)
    (only,) = stage.pending()
    assert (only.kind, only.length_bytes) == (WRITE, 3 * SECTORS_PER_BLOCK * 512)
    stage.finish_all()
    stage.now("read", 12 * SECTORS_PER_BLOCK, 3 * SECTORS_PER_BLOCK)  # the edges are zeros, whatever the storage held


@pytest.mark.parametrize("layout", [Layout.COMPACT, Layout.RAW], ids=["compact", "raw"])
def test_a_long_first_write_is_copied_only_at_its_edges(layout: Layout) -> None:
    stage = Stage(layout=layout, chunk_size_bytes=1 << 19, grow_step_bytes=1 << 19)
    stage.submit("write", 8, 5 * SECTORS_PER_BLOCK)
    assert sorted(op.length_bytes // (SECTORS_PER_BLOCK * 512) for op in stage.pending()) == [1, 1, 4]
    stage.finish_all()
    stage.now("read", 0, 6 * SECTORS_PER_BLOCK)


def test_absent_blocks_are_read_without_the_device(stage: Stage) -> None:
    stage.submit("read", 14 * SECTORS_PER_BLOCK, 8)
    assert stage.pending() == []
    assert not stage.in_flight


def test_metadata_of_one_tebibyte_is_small() -> None:
    """2 MiB of bitmap and 4 MiB of table, kept as they are: the engine adds one bit per slot."""
    from fvd.format import maps
    from fvd.format.geometry import Geometry

    geometry = Geometry(virtual_size_bytes=1 << 40)
    table = maps.empty_table(geometry)
    assert memoryview(maps.empty_bitmap(geometry)).nbytes == 2 << 20
    assert table is not None and memoryview(table).nbytes == 4 << 20
