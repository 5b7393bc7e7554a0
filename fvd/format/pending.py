# SPDX-License-Identifier: Apache-2.0
"""The log of pending changes: what lies in memory that outlives a server, so that the next open shows every acknowledged write.

One page of header, then two areas of records (FORMAT.md section 10). Pure: who maps or reads the memory is the caller. What is read may be
anything; reading it raises only Corrupt, and bounds are checked before anything is believed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fvd import _core
from fvd.errors import Corrupt, InvalidArgument
from fvd.format.geometry import PAGE_BYTES, Geometry
from fvd.format.maps import Bitmap, MapKind, Table

MAGIC = b"FVDPEND\n"
VERSION = 1
HEADER_BYTES = PAGE_BYTES
IDENTITY_BYTES = 256
CAPACITY_MAX = 1 << 17
"""Records in an area: 2 MiB, which a host with a thousand disks can spare. Half of it is more than the changes that make a commit due."""
_INDEX_BITS = 56
_STATIC_BYTES = 512
_CHECKSUM_OFFSET = 8

AREA = np.dtype([("base_hash", "<u8"), ("count", "<u8"), ("area_reserved", "V48")])
HEADER = np.dtype(
    [
        ("log_magic", "V8"),
        ("log_checksum", "<u4"),
        ("log_version", "<u4"),
        ("uuid", "V16"),
        ("boot", "V16"),
        ("host", "V16"),
        ("generation", "<u8"),
        ("capacity", "<u8"),
        ("identity", f"V{IDENTITY_BYTES}"),
        ("static_reserved", "V176"),
        ("epoch", "<u8"),
        ("failed_errno", "<u4"),
        ("acknowledged", "<u4"),
        ("failed_ns", "<u8"),
        ("durability_ops", "<u8"),
        ("mutable_reserved", "V32"),
        ("areas", AREA, 2),
        ("page_reserved", f"V{HEADER_BYTES - 704}"),
    ]
)
RECORD = np.dtype([("key", "<u8"), ("value", "<u8")])

Buffer = bytearray | memoryview | npt.NDArray[np.uint8]

if HEADER.itemsize != HEADER_BYTES or HEADER.fields is None or HEADER.fields["epoch"][1] != _STATIC_BYTES:
    raise ImportError(f"the log's header has {HEADER.itemsize} bytes, not {HEADER_BYTES}")


@dataclass(frozen=True, slots=True)
class LogIdentity:
    """Whose log it is: believed only by the disk, in the place, on the boot and in the generation for which it was made."""

    uuid: bytes
    generation: int
    boot: bytes  # 16 bytes
    host: bytes  # 16 bytes
    place: str  # what node the disk lies on, whatever path leads there

    def __post_init__(self) -> None:
        if not all(len(part) == 16 for part in (self.uuid, self.boot, self.host)):
            raise InvalidArgument("the UUID, the boot and the host of a log have 16 bytes each")
        if len(self.place.encode()) > IDENTITY_BYTES:
            raise InvalidArgument(f"the place of a log has at most {IDENTITY_BYTES} bytes")


@dataclass(frozen=True, slots=True)
class Changes:
    """Entries of the maps, each named once, with their values; in no order."""

    keys: npt.NDArray[np.uint64]  # kind << 56 | index
    values: npt.NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.keys)

    def check(self, geometry: Geometry) -> None:
        """Raises Corrupt if an entry does not exist in these maps, or a value does not fit."""
        kinds, indexes = self.keys >> np.uint64(_INDEX_BITS), self.keys & np.uint64((1 << _INDEX_BITS) - 1)
        words, entries = kinds == MapKind.BITMAP, kinds == MapKind.TABLE
        if not np.all(words | entries):
            raise Corrupt("the log of pending changes names a map that does not exist")
        if np.any(indexes[words] >= geometry.bitmap_words) or np.any(indexes[entries] >= geometry.table_entries):
            raise Corrupt("the log of pending changes names an entry that the maps do not have")
        if np.any(self.values[entries] > 0xFFFFFFFF):
            raise Corrupt("the log of pending changes has a slot that cannot be")

    def apply(self, bitmap: Bitmap, table: Table | None) -> None:
        """Into maps, in place; `check` must have been called."""
        kinds, indexes = self.keys >> np.uint64(_INDEX_BITS), self.keys & np.uint64((1 << _INDEX_BITS) - 1)
        words, entries = kinds == MapKind.BITMAP, kinds == MapKind.TABLE
        bitmap[indexes[words].astype(np.int64)] = self.values[words]
        if table is not None:
            table[indexes[entries].astype(np.int64)] = self.values[entries].astype(np.uint32)

    def are_in(self, bitmap: Bitmap, table: Table | None) -> bool:
        """Whether the maps have all these values already."""
        kinds, indexes = self.keys >> np.uint64(_INDEX_BITS), self.keys & np.uint64((1 << _INDEX_BITS) - 1)
        words, entries = kinds == MapKind.BITMAP, kinds == MapKind.TABLE
        if not np.array_equal(bitmap[indexes[words].astype(np.int64)], self.values[words]):
            return False
        return table is None or np.array_equal(table[indexes[entries].astype(np.int64)], self.values[entries].astype(np.uint32))


@dataclass(frozen=True, slots=True)
class PendingLog:
    """A log as it was found."""

    committing: Changes  # of the commit that was under way; they come first
    committing_base_hash: int  # of the maps on which they build
    running: Changes  # of no commit yet
    running_base_hash: int  # of the maps on which they build: with the committing ones, if there are any
    failed_errno: int  # 0, or that of a flush that failed: nothing of this log may be applied
    failed_ns: int  # when, by the monotonic clock
    durability_ops: int  # flushes and durable writes that were under way
    acknowledged: bool  # an administrator has seen what the superblock says of lost writes

    @property
    def empty(self) -> bool:
        return len(self.committing) + len(self.running) == 0

    def latest(self) -> Changes:
        """Every entry with its last value: a running change comes after a committing one."""
        keys, first = np.unique(np.concatenate([self.running.keys, self.committing.keys]), return_index=True)
        return Changes(keys, np.concatenate([self.running.values, self.committing.values])[first])


def capacity_for(geometry: Geometry) -> int:
    """Records in an area: each entry of a full commit changed four times, at most CAPACITY_MAX; never less than a chunk needs."""
    commit_bytes = max(geometry.journal_size_bytes // 4, PAGE_BYTES)
    return max(min(commit_bytes // 8 * 4, CAPACITY_MAX), capacity_min(geometry))


def capacity_min(geometry: Geometry) -> int:
    """The records that an area must have at least, so that the changes of one whole chunk always fit into an empty one."""
    return 16 * (geometry.blocks_per_chunk // 64 + 3)


def size_bytes(capacity: int) -> int:
    """What a log with so many records in each area takes, in bytes."""
    return HEADER_BYTES + 2 * capacity * RECORD.itemsize


def lay_out(buffer: Buffer, capacity: int, identity: LogIdentity, map_hash: int) -> None:
    """An empty log for maps with this hash, in `size_bytes(capacity)` of memory. The records are not touched."""
    if len(buffer) < size_bytes(capacity):
        raise InvalidArgument(f"a log of {capacity} records needs {size_bytes(capacity)} bytes, not {len(buffer)}")
    header = np.zeros(1, HEADER)
    row = header[0]
    row["log_magic"] = np.void(MAGIC)
    row["log_version"] = VERSION
    row["uuid"], row["boot"], row["host"] = np.void(identity.uuid), np.void(identity.boot), np.void(identity.host)
    row["generation"] = identity.generation
    row["capacity"] = capacity
    row["identity"] = np.void(identity.place.encode().ljust(IDENTITY_BYTES, b"\0"))
    row["areas"]["base_hash"] = map_hash
    raw = header.view(np.uint8)
    row["log_checksum"] = _checksum(raw)
    view = np.frombuffer(buffer, np.uint8, HEADER_BYTES)
    view[:] = raw


def read(buffer: Buffer | bytes, geometry: Geometry, identity: LogIdentity) -> PendingLog:
    """The log in this memory, if it is this one. Raises Corrupt: it is another's, or damaged."""
    if len(buffer) < HEADER_BYTES:
        raise Corrupt(f"the log of pending changes has only {len(buffer)} bytes")
    raw = np.frombuffer(buffer, np.uint8)
    row = raw[:HEADER_BYTES].view(HEADER)[0]
    if row["log_magic"].tobytes() != MAGIC or int(row["log_checksum"]) != _checksum(raw[:HEADER_BYTES]):
        raise Corrupt("the log of pending changes is damaged, or none")
    if int(row["log_version"]) != VERSION:
        raise Corrupt(f"the log of pending changes has version {int(row['log_version'])}, which this program does not know")
    made_for = (row["uuid"].tobytes(), int(row["generation"]), row["boot"].tobytes(), row["host"].tobytes())
    if made_for != (identity.uuid, identity.generation, identity.boot, identity.host):
        raise Corrupt("the log of pending changes is another disk's, or of another time")
    if row["identity"].tobytes() != identity.place.encode().ljust(IDENTITY_BYTES, b"\0"):
        raise Corrupt("the log of pending changes was made for a disk in another place: this one may be a copy")
    capacity = int(row["capacity"])
    if capacity < capacity_min(geometry) or len(buffer) < size_bytes(capacity):
        raise Corrupt("the log of pending changes does not have the size that it says")
    now = int(row["epoch"]) & 1
    areas = [_area(raw, row["areas"][i], i, capacity) for i in range(2)]
    for area in areas:
        area.check(geometry)
    return PendingLog(
        committing=areas[1 - now],
        committing_base_hash=int(row["areas"][1 - now]["base_hash"]),
        running=areas[now],
        running_base_hash=int(row["areas"][now]["base_hash"]),
        failed_errno=int(row["failed_errno"]),
        failed_ns=int(row["failed_ns"]),
        durability_ops=int(row["durability_ops"]),
        acknowledged=bool(row["acknowledged"]),
    )


def mark_failed(buffer: Buffer, errno: int, now_ns: int) -> None:
    """Nothing of the log in this memory will ever be applied."""
    row: Any = np.frombuffer(buffer, HEADER, 1)
    row["failed_ns"] = now_ns
    row["failed_errno"] = errno


def mark_acknowledged(buffer: Buffer) -> None:
    """An administrator has seen what the superblock says of lost writes."""
    row: Any = np.frombuffer(buffer, HEADER, 1)
    row["acknowledged"] = 1


def mark_committed(buffer: Buffer, *, running_too: bool, map_hash: int) -> None:
    """The committing changes, with `running_too` all, are in the maps on storage, which have this hash."""
    row: Any = np.frombuffer(buffer, HEADER, 1)
    now = int(row["epoch"][0]) & 1
    row["areas"]["count"][0, 1 - now] = 0
    if running_too:
        row["areas"]["count"][0, now] = 0
        row["areas"]["base_hash"][0, now] = map_hash


def _checksum(header: npt.NDArray[np.uint8]) -> int:
    """Over what never changes while the log is in use."""
    fixed = header[:_STATIC_BYTES].copy()
    fixed[_CHECKSUM_OFFSET : _CHECKSUM_OFFSET + 4] = 0
    return _core.crc32c(fixed)


def _area(raw: npt.NDArray[np.uint8], area: np.void, number: int, capacity: int) -> Changes:
    count = int(area["count"])
    if count > capacity:
        raise Corrupt(f"the log of pending changes says that it has {count} records where {capacity} fit")
    start = HEADER_BYTES + number * capacity * RECORD.itemsize
    records = raw[start : start + count * RECORD.itemsize].view(RECORD)
    # The last record of each key is its value: the first in reversed order.
    keys, first = np.unique(records["key"][::-1], return_index=True)
    return Changes(keys, records["value"][::-1][first].copy())
