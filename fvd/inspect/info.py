# SPDX-License-Identifier: Apache-2.0
"""What a disk is and how full: plain values with stable keys, for JSON as for people. Only ever added to within a schema version."""

from __future__ import annotations

from typing import Any

from fvd.disk.loading import covers_base
from fvd.disk.opening import OpenVolume
from fvd.disk.pending import LOSSES
from fvd.disk.view import Target, View, look
from fvd.format.locator import BaseFormat
from fvd.format.superblock import BaseReference, Superblock
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
    low_water_bytes = _low_water_bytes(view)
    answer = {
        "schema_version": SCHEMA_VERSION,
        **_identity(view),
        **_sizes(view, short_bytes),
        "low_water_bytes": low_water_bytes,
        **_shape(view),
        "base": None,
        **_how_left(view),
    }
    base = view.superblock.base
    if base is not None:
        released = target.base_released if isinstance(target, OpenVolume) else covers_base(view.superblock, view.bitmap)
        answer["base"] = _base(view.superblock, base, released)
    if isinstance(target, OpenVolume):
        answer |= _open_info(target, low_water_bytes)
    return answer


def _low_water_bytes(view: View) -> int:
    """0 where every chunk has its place: nothing will ever be asked for."""
    geometry = view.geometry
    if view.table is None or geometry.slots_in(view.storage_size_bytes) >= geometry.chunks:
        return 0
    return min(default_low_water_bytes(geometry), geometry.max_storage_size_bytes)


def _identity(view: View) -> dict[str, Any]:
    superblock = view.superblock
    return {
        "volume": str(view.name),
        "uuid": uuid_text(superblock.uuid),
        "generation": superblock.generation,
        "created_seconds": superblock.created_seconds,
    }


def _sizes(view: View, short_bytes: int) -> dict[str, Any]:
    geometry = view.geometry
    present_bytes = min(view.present_blocks * geometry.block_size_bytes, geometry.virtual_size_bytes)
    if view.table is None:
        mapped_bytes, free_bytes = present_bytes, 0
    else:
        slots_bytes = geometry.slots_in(view.storage_size_bytes) * geometry.chunk_size_bytes
        mapped_bytes = view.mapped_chunks * geometry.chunk_size_bytes
        # Storage that its file system has no space for is not free, whatever its size says.
        free_bytes = max(0, slots_bytes - mapped_bytes - max(short_bytes, view.short_bytes))
    return {
        "virtual_size": geometry.virtual_size_bytes,
        "mapped_bytes": mapped_bytes,
        "present_bytes": present_bytes,
        "storage_size": view.storage_size_bytes,
        "metadata_size": geometry.metadata_size_bytes,
        "max_storage_size": geometry.max_storage_size_bytes,
        "storage_limit": limit_size_bytes(geometry),
        "free_bytes": free_bytes,
    }


def _shape(view: View) -> dict[str, Any]:
    geometry = view.geometry
    return {
        "can_grow": view.name.kind is not VolumeKind.DEVICE,
        "block_size": geometry.block_size_bytes,
        "chunk_size": geometry.chunk_size_bytes,
        "journal_size": geometry.journal_size_bytes,
        "grow_step": geometry.grow_step_bytes,
        "layout": geometry.layout.name.lower(),
        "placement": geometry.placement.name.lower(),
    }


def _base(superblock: Superblock, base: BaseReference, released: bool) -> dict[str, Any]:
    remote = not base.locator.startswith("/")
    return {
        "path": base.locator,
        "uri": base.locator if remote else None,
        "size": base.size_bytes,
        # Contents that are read as they are, by whatever protocol, are raw to a user.
        "format": "raw" if base.format is BaseFormat.REMOTE_RAW else base.format.name.lower(),
        "copy_on_read": superblock.copy_on_read,
        "prefetch": superblock.prefetch,
        "released": released,
    }


def _how_left(view: View) -> dict[str, Any]:
    """How the disk was closed, by whoever had it last."""
    loss = view.loss
    return {
        "clean": view.clean,
        "open": view.open,
        "possible_loss": None
        if loss is None
        else {"seconds": loss.seconds, "reason": loss.reason.name.lower(), "message": LOSSES[loss.reason]},
        "left_open": view.left_open,
        "pending_changes": view.pending_changes,
        "pending_log": None,
        "notices": list(view.notices),
    }


def _open_info(volume: OpenVolume, low_water_bytes: int) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "read_only": volume.read_only,
        "cache": volume.cache,
        "on_full": volume.on_full,
        "notices": list(volume.notices),
        "pending_log": volume.log.record.path if volume.log is not None and volume.log.record.path else None,
        "failed_errno": volume.engine.failed_errno,
        "stopped": volume.stopped,
        "waiting_writes": volume.engine.waiting_writes + volume.engine.starved_count,
        "no_room_below": volume.engine.storage_below_full,
        "statistics": volume.engine.statistics(),
    }
    if volume.engine.storage_below_full:
        answer["free_bytes"] = 0
    if volume.allocator is not None:
        answer["growth"] = volume.allocator.figures()
        answer["low_water_bytes"] = volume.allocator.figures()["low_water"] if low_water_bytes else 0
    return answer
