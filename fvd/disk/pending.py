# SPDX-License-Identifier: Apache-2.0
"""The log of pending changes in a disk's life: found and believed at open, committed before the first answer, made anew, ended at close.

docs/internals/durability.md, "When the server dies", says what must hold and what a death at each point leaves. The bytes are
`fvd.format.pending`'s, the memory is `fvd.device.surviving`'s. Knows neither engine nor who drives it.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fvd.device import surviving
from fvd.device.node import Node
from fvd.device.surviving import SurvivingMemory
from fvd.digest import sha256
from fvd.errors import Corrupt, FvdError
from fvd.format import pending
from fvd.format.geometry import Geometry
from fvd.format.maps import Bitmap, Table, check_maps, map_hash
from fvd.format.pending import Buffer, Changes, LogIdentity, PendingLog
from fvd.format.superblock import LogRecord, LossReason, Superblock


class LogMemory(Protocol):
    """Memory with a log in it; the simulator has its own."""

    @property
    def buffer(self) -> Buffer: ...

    def close(self) -> None: ...


class NotBelieved(Corrupt):
    """The log does not build on what the disk holds."""


@dataclass
class FoundLog:
    """A log that is this disk's, as its dead server left it."""

    memory: LogMemory
    log: PendingLog

    def close(self) -> None:
        """Lets go of the memory, which stays."""
        self.memory.close()

    def mark_failed(self, errno_value: int, now_ns: int) -> None:
        """R24: a flush has failed; nothing of the log will ever be applied."""
        pending.mark_failed(self.memory.buffer, errno_value, now_ns)


class Left(enum.Enum):
    """What an open finds of the one before."""

    NOTHING = "nothing"  # it ended well, or had no log
    LOG = "log"
    MISSING = "missing"  # there was a log, on this host and boot, and it is not there or not to be believed
    GONE = "gone"  # the host has been restarted: its memory went with it, as at any crash
    ELSEWHERE = "elsewhere"  # it is, or was, on another host
    NONE_MADE = "none made"  # the open before could not make one


@dataclass
class Leftover:
    """What the open before has left of a log, and why it cannot be used if it cannot."""

    kind: Left
    pending_log: FoundLog | None = None
    problem: str = ""
    path: str = ""


def find(superblock: Superblock, place: str, host: bytes, boot: bytes) -> Leftover:
    """What the superblock's open left. Writes nothing."""
    record = superblock.log
    if record is None:
        return Leftover(Left.NOTHING)
    if record.host != host:
        return Leftover(Left.ELSEWHERE, path=record.path)
    if record.boot != boot:
        return Leftover(Left.GONE, path=record.path)
    if not record.path:
        return Leftover(Left.NONE_MADE)
    identity = LogIdentity(superblock.uuid, superblock.generation, boot, host, place)
    try:
        memory = surviving.find(record.path)
        try:
            return Leftover(Left.LOG, FoundLog(memory, pending.read(memory.buffer, superblock.geometry, identity)), path=record.path)
        except BaseException:
            memory.close()
            raise
    except FvdError as error:
        return Leftover(Left.MISSING, problem=str(error), path=record.path)


def parts_to_apply(log: PendingLog, geometry: Geometry, uuid: bytes, bitmap: Bitmap, table: Table | None) -> Sequence[Changes]:
    """The changes that the maps on storage do not have yet, in the order in which they must be committed (FORMAT.md section 10).

    Raises NotBelieved: the log does not build on these maps; Corrupt: what it says cannot be."""
    now = map_hash(uuid, bitmap, table)
    parts = [part for part in (log.committing, log.running) if len(part)]
    if not parts:
        return ()
    for part in parts:
        part.check(geometry)
    if len(log.committing) and now == log.committing_base_hash:
        after_bitmap, after_table = bitmap.copy(), None if table is None else table.copy()
        log.committing.apply(after_bitmap, after_table)
        if map_hash(uuid, after_bitmap, after_table) != log.running_base_hash:
            raise NotBelieved("the log of pending changes contradicts itself")
        return parts
    if now == log.running_base_hash:
        return [log.running] if len(log.running) else ()
    if log.latest().are_in(bitmap, table):
        return ()
    raise NotBelieved("the log of pending changes does not build on what the disk holds: another program may have opened the disk since")


def apply_in_memory(parts: Sequence[Changes], geometry: Geometry, bitmap: Bitmap, table: Table | None, has_base: bool) -> Bitmap:
    """The maps become what the dead server had, in place. Returns the slots in use. Raises Corrupt: they could not have been that."""
    for part in parts:
        part.apply(bitmap, table)
    return check_maps(geometry, bitmap, table, has_base)


# --- The log of this open -----------------------------------------------------------------------------------------------------------


@dataclass
class OpenLog:
    """The log that an open disk writes, or that none could be made."""

    memory: SurvivingMemory | None
    record: LogRecord
    problem: str = ""  # why there is none

    def close(self) -> None:
        """Lets go of the memory, which stays unless it was removed."""
        if self.memory is not None:
            self.memory.close()


def make(superblock: Superblock, generation: int, node: Node, hash_of_maps: int) -> OpenLog:
    """A log for the generation that is about to begin. Never raises for want of memory: then the disk works without."""
    boot, host, place = surviving.boot_id(), surviving.host_id(), surviving.lasting_place(node)
    try:
        name = f"{_prefix(superblock, place)}{generation}"
        capacity = pending.capacity_for(superblock.geometry)
        memory = surviving.make(name, pending.size_bytes(capacity))
        try:
            identity = LogIdentity(superblock.uuid, generation, boot, host, place)
            pending.lay_out(memory.buffer, capacity, identity, hash_of_maps)
            return OpenLog(memory, LogRecord(boot, host, str(memory.path)))
        except BaseException:
            memory.remove()
            raise
    except (FvdError, ValueError) as error:
        return OpenLog(None, LogRecord(boot, host, ""), str(error))


def remove_others(superblock: Superblock, node: Node, keep: SurvivingMemory | None) -> None:
    """What earlier opens of the disk in this place have left goes, when nothing of it is needed any more."""
    prefix = _prefix(superblock, surviving.lasting_place(node))
    paths = surviving.kept(prefix)
    if superblock.log is not None and Path(superblock.log.path).name.startswith(prefix):
        paths.append(Path(superblock.log.path))  # perhaps another user's server made it, where this one's are not kept
    for path in paths:
        if keep is None or path != keep.path:
            try:
                memory = surviving.find(path)
            except FvdError:
                continue
            memory.remove()
            memory.close()


def _prefix(superblock: Superblock, place: str) -> str:
    """Of the names of this disk's logs here. A copy of the disk in another place has other names."""
    return f"{superblock.uuid.hex()}-{sha256(place.encode()).hex()[:16]}."


# --- In words -----------------------------------------------------------------------------------------------------------------------

LOSSES = {
    LossReason.FLUSH_FAILED: "a flush or journal write had failed when its last server ended: what was acknowledged after the last good "
    "flush may be gone",
    LossReason.FLUSH_UNHEARD: "a flush was under way when its last server died, and nobody heard how it ended: if the device failed it, "
    "acknowledged writes are gone",
    LossReason.LOG_MISSING: "the log of what a server that died had acknowledged and not committed is missing, or not to be believed: "
    "those writes may be gone",
}
MEANINGS = {
    Left.GONE: "its host was restarted while the disk was open: what was flushed is there, other writes may be gone, as after any "
    "power failure",
    Left.ELSEWHERE: "it was open on another host and not closed there: what was flushed is there; other writes that were acknowledged "
    "there may be missing here, and are in {path} on that host if it has not been restarted",
    Left.NONE_MADE: "its last server died and had no log of pending changes: what was flushed is there, other writes may be gone",
}
REFUSAL = (
    "its last server died, and the log of the writes that it had acknowledged and not committed cannot be used ({problem}). It should be "
    "{path}; if it is in another mount namespace or container, open the disk there; --discard-pending opens it here without those writes"
)
NO_LOG = (
    "there is no log of pending changes ({problem}): if this server is killed, writes that were acknowledged and not flushed may be lost; "
    "with the cache modes writethrough and directsync none are"
)
