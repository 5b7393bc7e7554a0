# SPDX-License-Identifier: Apache-2.0
"""Brings a disk whose server has died to what that server had acknowledged: flush, mistrust the cache, commit what the log says is pending.

Everything here comes before the first answer of the new open. docs/internals/durability.md, "When the server dies", has the order and
what a death at each step leaves. Knows neither names of volumes nor where a log is kept.
"""

from __future__ import annotations

import ctypes
import errno
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from fvd.disk.engine_factory import engine_on
from fvd.disk.loading import LoadedDisk, check_slots_fit, load_disk
from fvd.disk.pending import FoundLog, NotBelieved, apply_in_memory, parts_to_apply
from fvd.engine._engine import Engine
from fvd.errors import Corrupt, DeviceError, FvdError
from fvd.format import pending as log_format
from fvd.format.maps import map_hash
from fvd.format.pending import Changes
from fvd.volume.superblocks import Pages

_OP_WRITE, _OP_FLUSH, _REQUEST_FLUSH = 1, 2, 2


class RecoverablePages(Pages, Protocol):
    """Storage whose cache can be mistrusted."""

    @property
    def direct(self) -> bool:
        """Reads come from the device, not from a cache."""

    def forget_cache(self) -> None: ...


def recover_disk(node: RecoverablePages, *, read_only: bool, pending_log: FoundLog | None = None) -> LoadedDisk:
    """The disk as an open may use it. `pending_log`: what its dead server left. Read-only it writes nothing: all is done in memory.

    Raises as `load_disk`; NotBelieved: the log does not build on this disk; DeviceError: a flush has failed, and the log says so
    from now on.
    """
    disk = load_disk(node)
    ended = pending_log is None and disk.superblock.log is None  # as far as anybody knows, with a close
    if pending_log is not None and pending_log.log.failed_errno:
        pending_log = None  # R24: never applied
    if read_only:
        return disk if pending_log is None else _in_memory(disk, pending_log)
    if disk.journal_state.clean and node.direct and ended:
        return disk
    try:
        make_durable(node)
    except FvdError:
        if pending_log is not None:
            pending_log.mark_failed(errno.EIO, time.monotonic_ns())
        raise
    if not node.direct:
        # After a write-back that failed the kernel keeps pages that never reached the device, and calls them clean. A disk that was only
        # overwritten before its process was killed has a clean journal too, so it does not tell.
        node.forget_cache()
    # Read anew, direct or not: a write that the dead process was told had failed may land late, but not after this flush.
    disk = load_disk(node)
    return disk if pending_log is None or pending_log.log.empty else _commit_log(node, disk, pending_log)


def make_durable(node: Pages) -> None:
    """R13: what a killed process left may have been read from a cache that power still empties. Were a slot that replay freed used
    again before the commit that freed it is durable, the older table could come back and show another chunk's data."""
    node.flush()


def _in_memory(disk: LoadedDisk, pending_log: FoundLog) -> LoadedDisk:
    if pending_log.log.empty:
        return disk
    with _disbelief():
        parts = parts_to_apply(pending_log.log, disk.geometry, disk.superblock.uuid, disk.bitmap, disk.table)
        for part in parts:
            # Judged one by one, as an open for writing does: what that one refuses is not shown here either.
            disk.used_slots = apply_in_memory([part], disk.geometry, disk.bitmap, disk.table, disk.superblock.base is not None)
            check_slots_fit(disk.geometry, disk.used_slots, disk.storage_size_bytes)
    return disk


@contextmanager
def _disbelief() -> Iterator[None]:
    """What the log says and cannot be is no damage of the disk: the log is not believed."""
    try:
        yield
    except Corrupt as error:
        raise NotBelieved(str(error)) from error


def _commit_log(node: RecoverablePages, disk: LoadedDisk, pending_log: FoundLog) -> LoadedDisk:
    """R23: the committing part first, then the running one, each durable before the next and all before the first answer: so nothing that a
    part frees is used again before that is durable. Killed in between, the next open goes on: a part that is in the maps is recognised."""
    superblock, geometry = disk.superblock, disk.geometry
    with _disbelief():
        parts = parts_to_apply(pending_log.log, geometry, superblock.uuid, disk.bitmap, disk.table)
        trial_bitmap, trial_table = disk.bitmap.copy(), None if disk.table is None else disk.table.copy()
        for part in parts:
            # Judged before anything is written: what these maps would be must be possible.
            used = apply_in_memory([part], geometry, trial_bitmap, trial_table, superblock.base is not None)
            check_slots_fit(geometry, used, disk.storage_size_bytes)
    for part in parts:
        wanted_bitmap, wanted_table = disk.bitmap.copy(), None if disk.table is None else disk.table.copy()
        part.apply(wanted_bitmap, wanted_table)
        wanted = map_hash(superblock.uuid, wanted_bitmap, wanted_table)
        _commit(node, disk, part, pending_log)
        disk = load_disk(node)
        if disk.journal_state.map_hash != wanted:
            raise Corrupt("the log of pending changes was committed, and the disk does not show it")
        log_format.mark_committed(pending_log.memory.buffer, running_too=part is parts[-1], map_hash=wanted)
    return disk


def _commit(node: RecoverablePages, disk: LoadedDisk, changes: Changes, pending_log: FoundLog) -> None:
    """One flush and one commit by an engine that does nothing else. Takes the disk's arrays."""
    engine = engine_on(disk)
    with _disbelief():
        engine.adopt_changes(changes.keys, changes.values)
    engine.submit_request(_REQUEST_FLUSH, 0, 0, 0, 1)
    while True:
        operations = engine.take_operations()
        if not operations:
            break
        run_operations(node, engine, operations)
    if engine.take_done() != [(1, 0)]:
        pending_log.mark_failed(engine.failed_errno or errno.EIO, time.monotonic_ns())
        raise DeviceError("the log of pending changes could not be committed: a flush or a journal write failed; open the disk again")


def run_operations(node: Pages, engine: Engine, operations: Sequence[tuple[int, int, int, int, int, int, bool]]) -> None:
    """Carries operations of the metadata out, one after the other. An error of the device is the engine's to see."""
    for token, kind, _target, offset_bytes, length_bytes, address, durable in operations:
        result = 0
        try:
            if kind == _OP_WRITE:
                node.pwrite(offset_bytes, ctypes.string_at(address, length_bytes))
            elif kind != _OP_FLUSH:
                raise Corrupt(f"recovery does not expect operation {kind}")
            if durable or kind == _OP_FLUSH:
                node.flush()
        except DeviceError:
            result = -errno.EIO
        engine.complete_operation(token, result)
