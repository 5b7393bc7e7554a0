# SPDX-License-Identifier: Apache-2.0
"""An engine over a disk that was loaded: the one place where what a disk is becomes what an engine is given."""

from __future__ import annotations

from typing import Any

from fvd.disk.loading import LoadedDisk
from fvd.engine._engine import Engine
from fvd.volume.memory import enough_memory


def engine_on(disk: LoadedDisk, **options: Any) -> Engine:
    """Takes the disk's arrays. `options` are those of Engine that say how it is used, not what it is. Raises as Engine, and OutOfMemory."""
    with enough_memory(disk.geometry):
        return _engine(disk, options)


def _engine(disk: LoadedDisk, options: dict[str, Any]) -> Engine:
    return Engine(
        disk.geometry,
        uuid=disk.superblock.uuid,
        bitmap=disk.bitmap,
        table=disk.table,
        used_slots=disk.used_slots,
        journal_state=disk.journal_state,
        dirty_bitmap_pages=disk.dirty_bitmap_pages,
        dirty_table_pages=disk.dirty_table_pages,
        storage_size_bytes=disk.storage_size_bytes,
        **options,
    )
