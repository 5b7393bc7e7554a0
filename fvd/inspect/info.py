# SPDX-License-Identifier: Apache-2.0
"""What a disk is and how full: plain values with stable keys, for JSON as for people. Only ever added to within a schema version."""

from __future__ import annotations

from typing import Any

from fvd.disk.loading import covers_base
from fvd.disk.opening import OpenVolume
from fvd.disk.pending import LOSSES
from fvd.disk.view import Target, View, look
from fvd.format.locator import BaseFormat
from fvd.storage.policy import default_low_water_bytes, limit_size_bytes
from fvd.volume.name import VolumeKind
from fvd.volume.superblocks import uuid_text

SCHEMA_VERSION = 1


def info(target: Target | View, short_bytes: int = 0) -> dict[str, Any]:
    """Sizes in bytes. Of an open volume: call it in its loop's thread, with `short_bytes` as its node's stack has them, which was asked
    elsewhere: a file system may take its time. Raises as `look`.

    ``mapped_bytes``: storage taken by chunks (compact: slots in use; raw, where every chunk has its slot: present blocks).
    ``base``: ``path`` is its path or URI, ``uri`` is the latter or None; ``copy_on_read`` and ``prefetch`` are what opens do by default;
    ``released``: all of it is in the disk, and it is not opened any more.
    ``left_open``: of a closed disk: its last server did not close it; ``pending_changes``: what that one's log holds, if it can be read.
    ``present_bytes``: what does not come from the base. ``free_bytes``: slots that the storage has and no chunk has taken.
    """
    view = target if isinstance(target, View) else look(target)
    geometry, superblock = view.geometry, view.superblock
    present_bytes = min(view.present_blocks * geometry.block_size_bytes, geometry.virtual_size_bytes)
    slots = geometry.slots_in(view.storage_size_bytes)
    if view.table is None:
        mapped_bytes, free_bytes, low_water_bytes = present_bytes, 0, 0
    else:
        mapped_bytes = view.mapped_chunks * geometry.chunk_size_bytes
        # Storage that its file system has no room for is not free, whatever its size says.
        free_bytes = max(0, slots * geometry.chunk_size_bytes - mapped_bytes - max(short_bytes, view.short_bytes))
        # Where every chunk has its place nothing will ever be asked for.
        low_water_bytes = 0 if slots >= geometry.chunks else min(default_low_water_bytes(geometry), geometry.max_storage_size_bytes)
    found: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "volume": str(view.name),
        "uuid": uuid_text(superblock.uuid),
        "generation": superblock.generation,
        "created_seconds": superblock.created_seconds,
        "virtual_size": geometry.virtual_size_bytes,
        "mapped_bytes": mapped_bytes,
        "present_bytes": present_bytes,
        "storage_size": view.storage_size_bytes,
        "metadata_size": geometry.metadata_size_bytes,
        "max_storage_size": geometry.max_storage_size_bytes,
        "storage_limit": limit_size_bytes(geometry),
        "free_bytes": free_bytes,
        "low_water_bytes": low_water_bytes,
        "can_grow": view.name.kind is not VolumeKind.DEVICE,
        "block_size": geometry.block_size_bytes,
        "chunk_size": geometry.chunk_size_bytes,
        "journal_size": geometry.journal_size_bytes,
        "grow_step": geometry.grow_step_bytes,
        "layout": geometry.layout.name.lower(),
        "placement": geometry.placement.name.lower(),
        "base": None,
        "clean": view.clean,
        "open": view.open,
        "possible_loss": None
        if view.loss is None
        else {"seconds": view.loss.seconds, "reason": view.loss.reason.name.lower(), "message": LOSSES[view.loss.reason]},
        "left_open": view.left_open,
        "pending_changes": view.pending_changes,
        "pending_log": None,
        "notices": list(view.notices),
    }
    if superblock.base is not None:
        base = superblock.base
        remote = not base.locator.startswith("/")
        found["base"] = {
            "path": base.locator,
            "uri": base.locator if remote else None,
            "size": base.size_bytes,
            # Contents that are read as they are, by whatever protocol, are raw to a user.
            "format": "raw" if base.format is BaseFormat.REMOTE_RAW else base.format.name.lower(),
            "copy_on_read": superblock.copy_on_read,
            "prefetch": superblock.prefetch,
            "released": target.base_released if isinstance(target, OpenVolume) else covers_base(superblock, view.bitmap),
        }
    if isinstance(target, OpenVolume):
        found |= _open_info(target, low_water_bytes)
    return found


def _open_info(volume: OpenVolume, low_water_bytes: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "read_only": volume.read_only,
        "cache": volume.cache,
        "on_full": volume.on_full,
        "notices": list(volume.notices),
        "pending_log": volume.log.record.path if volume.log is not None and volume.log.record.path else None,
        "failed_errno": volume.engine.failed_errno,
        "stopped": volume.stopped,
        "waiting_writes": volume.engine.waiting_writes + volume.engine.starved_count,
        "no_room_below": volume.engine.no_room,
        "statistics": volume.engine.statistics(),
    }
    if volume.engine.no_room:
        found["free_bytes"] = 0
    if volume.allocator is not None:
        found["growth"] = volume.allocator.figures()
        found["low_water_bytes"] = volume.allocator.figures()["low_water"] if low_water_bytes else 0
    return found
