# SPDX-License-Identifier: Apache-2.0
"""The engine's edges: bad requests, bad completions, full storage, cancelling, read-only, close."""

from __future__ import annotations

from errno import EINVAL, EIO, ENOSPC, EROFS, ESHUTDOWN

import numpy as np
import pytest

from fvd.disk.recovery import recover_disk
from fvd.engine._engine import Engine, Want
from fvd.errors import Corrupt, InvalidArgument
from fvd.sim._player import CLOSE as REQUEST_CLOSE
from fvd.sim._player import FLUSH as REQUEST_FLUSH
from fvd.sim._player import READ as REQUEST_READ
from fvd.sim._player import TRIM as REQUEST_TRIM
from fvd.sim._player import WRITE as REQUEST_WRITE
from fvd.sim.bytewise import Memory
from fvd.sim.stage import SECTORS_PER_CHUNK, Stage


def answer(engine: Engine, kind: int, offset: int = 0, length: int = 0, flags: int = 0) -> int:
    memory = Memory(max(length, 1) if length < 1 << 30 else 1)
    engine.submit_request(kind, offset, length, memory.address, 7, flags)
    ((cookie, error),) = engine.take_done()
    assert cookie == 7
    return -error


def opened(stage: Stage, **changes: object) -> Engine:
    disk = recover_disk(stage.node(), read_only=True)
    arguments: dict[str, object] = {
        "uuid": disk.superblock.uuid,
        "bitmap": disk.bitmap,
        "table": disk.table,
        "used_slots": disk.used_slots,
        "journal_state": disk.journal_state,
        "dirty_bitmap_pages": disk.dirty_bitmap_pages,
        "dirty_table_pages": disk.dirty_table_pages,
        "storage_size_bytes": len(stage.image),
    }
    return Engine(stage.geometry, **(arguments | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "offset", "length", "error"),
    [
        (REQUEST_READ, 1 << 20, 512, EINVAL),
        (REQUEST_READ, (1 << 20) - 512, 1024, EINVAL),
        (REQUEST_READ, (1 << 64) - 512, 1024, EINVAL),
        (REQUEST_WRITE, 1 << 20, 512, ENOSPC),
        (REQUEST_TRIM, 1 << 63, 512, EINVAL),
        (99, 0, 512, EINVAL),
        (REQUEST_READ, 0, 0, 0),
        (REQUEST_WRITE, 1 << 20, 0, 0),
    ],
)
def test_bounds(kind: int, offset: int, length: int, error: int) -> None:
    stage = Stage()
    assert answer(stage.engine, kind, offset, length) == error
    assert stage.engine.leaks() == {}


@pytest.mark.parametrize(("kind", "error"), [(REQUEST_READ, EINVAL), (REQUEST_WRITE, EINVAL), (REQUEST_TRIM, 0)])
def test_data_without_a_buffer(kind: int, error: int) -> None:
    engine = Stage().engine
    engine.submit_request(kind, 0, 512, 0, 7)
    assert engine.take_done() == [(7, -error)]


def test_completion_of_nothing_stops_the_engine() -> None:
    stage = Stage()
    with pytest.raises(RuntimeError, match="invariant"):
        stage.engine.complete_operation(12345, 0)
    stage.submit("write", 0, 8)
    (op,) = stage.pending()
    stage.finish(op)
    with pytest.raises(RuntimeError, match="not in flight"):
        stage.engine.complete_operation(op.token, 0)


def test_read_only_writes_nothing() -> None:
    stage = Stage()
    stage.now("write", 0, 8)
    stage.now("flush")
    stage.crash()
    engine = opened(stage, read_only=True)
    assert answer(engine, REQUEST_WRITE, 0, 512) == EROFS
    assert answer(engine, REQUEST_TRIM, 0, 1 << 18) == EROFS
    assert answer(engine, REQUEST_FLUSH) == 0
    assert answer(engine, REQUEST_CLOSE) == 0
    assert engine.take_operations() == []


def test_after_close_nothing_is_accepted() -> None:
    stage = Stage()
    engine = opened(stage)
    engine.submit_request(REQUEST_CLOSE, 0, 0, 0, 1)
    (flush,) = engine.take_operations()
    assert answer(engine, REQUEST_READ, 0, 512) == ESHUTDOWN
    engine.complete_operation(flush[0], 0)
    assert engine.take_done() == [(1, 0)]
    assert answer(engine, REQUEST_FLUSH) == ESHUTDOWN


def test_full_storage_stops_only_those_that_need_it() -> None:
    stage = Stage(storage_chunks=1)
    stage.now("write", 0, SECTORS_PER_CHUNK)
    waiting = stage.submit("write", SECTORS_PER_CHUNK, 8)
    stage.now("write", 0, 8)
    stage.now("flush")
    stage.now("read", SECTORS_PER_CHUNK, 8)
    assert waiting in stage.in_flight and stage.engine.waiting_writes == 1 and stage.engine.want & Want.GROWTH
    stage.grow()
    stage.finish_all()
    assert waiting not in stage.in_flight


def test_full_storage_as_an_error() -> None:
    stage = Stage(storage_chunks=1, on_full="error")
    stage.now("write", 0, SECTORS_PER_CHUNK)
    waiting = stage.submit("write", SECTORS_PER_CHUNK, 8)
    assert stage.pending() == [] and waiting in stage.in_flight  # growth may still come
    stage.set_exhausted(True)
    stage.finish_all()
    assert waiting not in stage.in_flight
    assert answer(stage.engine, REQUEST_WRITE, 3 << 18, 4096) == ENOSPC


def test_waiting_writes_can_be_ended() -> None:
    stage = Stage(storage_chunks=1)
    stage.now("write", 0, SECTORS_PER_CHUNK)
    memory = Memory(512)
    stage.engine.submit_request(REQUEST_WRITE, 1 << 18, 512, memory.address, 77)
    assert stage.engine.take_done() == []
    assert stage.engine.cancel_all_waiting(ESHUTDOWN) == 1
    assert stage.engine.take_done() == [(77, -ESHUTDOWN)]


def test_a_trimmed_slot_serves_the_waiting_write_after_a_commit() -> None:
    stage = Stage(storage_chunks=1)
    stage.now("write", 0, SECTORS_PER_CHUNK)
    waiting = stage.submit("write", SECTORS_PER_CHUNK, 8)
    stage.now("trim", 0, SECTORS_PER_CHUNK)
    assert waiting not in stage.in_flight
    stage.crash()


def test_storage_smaller_than_what_is_mapped_is_refused() -> None:
    stage = Stage()
    stage.now("write", 0, 3 * SECTORS_PER_CHUNK)
    stage.close()
    with pytest.raises(Corrupt, match="smaller"):
        opened(stage, storage_size_bytes=stage.geometry.data_offset_bytes + (1 << 18))


@pytest.mark.parametrize("change", [{"cache_mode": "fast"}, {"on_full": "hope"}, {"align_bytes": 1024}, {"uuid": b"short"}])
def test_bad_arguments(change: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument):
        opened(Stage(), **change)


def test_maps_of_the_wrong_size_are_refused() -> None:
    with pytest.raises(InvalidArgument):
        opened(Stage(), bitmap=np.zeros(9, np.uint64))


def test_failed_guest_write_fails_alone() -> None:
    stage = Stage()
    stage.player.errors_expected = True
    stage.device.fault = None
    stage.now("write", 0, 8)
    stage.device.fault = lambda op: -EIO
    stage.submit("write", 0, 8)
    stage.submit("write", SECTORS_PER_CHUNK, 8)
    stage.finish_all()
    stage.device.fault = None
    stage.now("flush")
    assert stage.engine.failed_errno == 0 and stage.engine.leaks() == {}
    assert stage.engine.used_slots_count == 1
    stage.crash()
