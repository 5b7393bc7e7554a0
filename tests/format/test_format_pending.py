# SPDX-License-Identifier: Apache-2.0
"""The pending log's bytes: what is read may be anything, and only this disk's log of this open is believed."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fvd.errors import Corrupt, InvalidArgument
from fvd.format import pending
from fvd.format.geometry import Geometry
from fvd.format.maps import empty_bitmap, empty_table
from fvd.format.pending import HEADER, HEADER_BYTES, RECORD, LogIdentity

GEOMETRY = Geometry(virtual_size_bytes=64 << 20, journal_size_bytes=65536, grow_step_bytes=1 << 20)
IDENTITY = LogIdentity(bytes(range(16)), 7, b"b" * 16, b"h" * 16, "file 1 2")
CAPACITY = pending.capacity_min(GEOMETRY)
WORD, ENTRY = 1 << 56, 2 << 56


def fresh(map_hash: int = 5) -> bytearray:
    buffer = bytearray(pending.size_bytes(CAPACITY))
    pending.lay_out(buffer, CAPACITY, IDENTITY, map_hash)
    return buffer


def put(buffer: bytearray, area: int, records: list[tuple[int, int]]) -> None:
    header: Any = np.frombuffer(buffer, HEADER, 1)
    place = np.frombuffer(buffer, RECORD, CAPACITY, HEADER_BYTES + area * CAPACITY * RECORD.itemsize)
    for number, (key, value) in enumerate(records):
        place[number] = (key, value)
    header["areas"]["count"][0, area] = len(records)


def test_an_empty_log() -> None:
    log = pending.read(fresh(), GEOMETRY, IDENTITY)
    assert log.empty and log.running_base_hash == 5 and not log.failed_errno and not log.durability_ops and not log.acknowledged


def test_the_last_record_of_an_entry_counts_and_running_changes_come_after_committing_ones() -> None:
    buffer = fresh()
    put(buffer, 0, [(WORD, 1), (ENTRY | 3, 9), (WORD, 3)])
    put(buffer, 1, [(WORD, 8), (WORD | 2, 4)])
    log = pending.read(buffer, GEOMETRY, IDENTITY)
    assert dict(zip(log.running.keys.tolist(), log.running.values.tolist(), strict=True)) == {WORD: 3, ENTRY | 3: 9}
    latest = log.latest()
    assert dict(zip(latest.keys.tolist(), latest.values.tolist(), strict=True)) == {WORD: 3, ENTRY | 3: 9, WORD | 2: 4}
    bitmap, table = empty_bitmap(GEOMETRY), empty_table(GEOMETRY)
    assert not latest.are_in(bitmap, table)
    latest.apply(bitmap, table)
    assert latest.are_in(bitmap, table) and bitmap[:3].tolist() == [3, 0, 4] and table is not None and table[3] == 9


def test_what_was_committed_leaves() -> None:
    buffer = fresh()
    put(buffer, 0, [(WORD, 1)])
    put(buffer, 1, [(WORD, 8)])
    pending.mark_committed(buffer, running_too=False, map_hash=0)
    log = pending.read(buffer, GEOMETRY, IDENTITY)
    assert len(log.committing) == 0 and len(log.running) == 1 and log.running_base_hash == 5
    pending.mark_committed(buffer, running_too=True, map_hash=6)
    log = pending.read(buffer, GEOMETRY, IDENTITY)
    assert log.empty and log.running_base_hash == 6


@pytest.mark.parametrize("field", ["uuid", "generation", "boot", "host", "place"])
def test_a_log_of_another_is_not_believed(field: str) -> None:
    changes: dict[str, Any] = {"generation": 8, "place": "file 1 3"}
    with pytest.raises(Corrupt):
        pending.read(fresh(), GEOMETRY, replace(IDENTITY, **{field: changes.get(field, b"x" * 16)}))


def test_records_that_cannot_be() -> None:
    words, chunks = GEOMETRY.bitmap_words, GEOMETRY.chunks
    for key, value in [(3 << 56, 0), (WORD | words, 0), (ENTRY | chunks, 0), (ENTRY, 1 << 32), (0, 0), ((1 << 64) - 1, 0)]:
        buffer = fresh()
        put(buffer, 0, [(key, value)])
        with pytest.raises(Corrupt):
            pending.read(buffer, GEOMETRY, IDENTITY)
    buffer = fresh()
    header: Any = np.frombuffer(buffer, HEADER, 1)
    header["areas"]["count"][0, 0] = CAPACITY + 1
    with pytest.raises(Corrupt, match="records where"):
        pending.read(buffer, GEOMETRY, IDENTITY)
    for length in (0, 100, HEADER_BYTES, len(buffer) - 1):
        with pytest.raises(Corrupt):
            pending.read(buffer[:length], GEOMETRY, IDENTITY)


def test_damage_is_a_typed_error_or_changes_nothing_that_is_fixed() -> None:
    """Every byte of the header, and bytes of the records at random."""
    sound = fresh()
    put(sound, 0, [(WORD, 1), (ENTRY | 1, 2)])
    rng = random.Random(1)
    for at in [*range(HEADER_BYTES), *(HEADER_BYTES + rng.randrange(64) for _ in range(200))]:
        damaged = bytearray(sound)
        damaged[at] ^= 1 << rng.randrange(8)
        try:
            log = pending.read(damaged, GEOMETRY, IDENTITY)
        except Corrupt:
            continue
        assert at >= 512, "what never changes is under a checksum"
        log.latest().check(GEOMETRY)


def test_what_does_not_fit() -> None:
    with pytest.raises(InvalidArgument):
        pending.lay_out(bytearray(100), CAPACITY, IDENTITY, 0)
    with pytest.raises(InvalidArgument):
        LogIdentity(b"", 1, b"b" * 16, b"h" * 16, "")
    with pytest.raises(InvalidArgument):
        replace(IDENTITY, place="x" * 300)
