# SPDX-License-Identifier: Apache-2.0
"""The log of pending changes: what lies in memory that outlives a server, so that the next open shows every acknowledged write.

One page of header, then two areas of records (FORMAT.md section 10). Pure: who maps or reads the memory is the caller. What is read may be
anything; reading it raises only Corrupt, and bounds are checked before anything is believed.
"""

from __future__ import annotations

import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fvd import _core
from fvd.errors import Corrupt, InvalidArgument
from fvd.format.geometry import PAGE_BYTES, Geometry
from fvd.format.maps import Bitmap, MapKind, Table
from fvd.format.records import Record, Row

MAGIC = b"FVDPEND\n"
VERSION = 1
HEADER_BYTES = PAGE_BYTES
IDENTITY_BYTES = 256
CAPACITY_MAX = 1 << 17
"""Records in an area: 2 MiB, which a host with a thousand disks can spare. Half of it is more than the changes that make a commit due."""
_INDEX_BITS = 56
_STATIC_BYTES = 512
_CHECKSUM_OFFSET = 8

AREA = Record(("base_hash", "<u8"), ("count", "<u8"), ("area_reserved", "V48"))
HEADER = Record(
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
    ("areas", "V128"),
    ("page_reserved", f"V{HEADER_BYTES - 704}"),
    inner={"areas": (AREA, 2)},
)
RECORD = Record(("key", "<u8"), ("value", "<u8"))
_AREAS = HEADER.places["areas"][0]

Buffer = Any  # writable memory

if HEADER.itemsize != HEADER_BYTES or HEADER.places["epoch"][0] != _STATIC_BYTES or HEADER.places["areas"][1] != 2 * AREA.itemsize:
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

    keys: Any  # uint64: kind << 56 | index
    values: Any  # uint64

    @classmethod
    def of(cls, last: dict[int, int]) -> Changes:
        return cls(array.array("Q", last), array.array("Q", last.values()))

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """Kind, index and value of each."""
        for key, value in zip(self.keys, self.values, strict=True):
            yield int(key) >> _INDEX_BITS, int(key) & (1 << _INDEX_BITS) - 1, int(value)

    def check(self, geometry: Geometry) -> None:
        """Raises Corrupt if an entry does not exist in these maps, or a value does not fit."""
        limits = {MapKind.BITMAP: geometry.bitmap_words, MapKind.TABLE: geometry.table_entries}
        for kind, index, value in self:
            if kind not in limits:
                raise Corrupt("the log of pending changes names a map that does not exist")
            if index >= limits[MapKind(kind)]:
                raise Corrupt("the log of pending changes names an entry that the maps do not have")
            if kind == MapKind.TABLE and value > 0xFFFFFFFF:
                raise Corrupt("the log of pending changes has a slot that cannot be")

    def apply(self, bitmap: Bitmap, table: Table | None) -> None:
        """Into maps, in place; `check` must have been called."""
        for kind, index, value in self:
            if kind == MapKind.BITMAP:
                bitmap[index] = value
            elif table is not None:
                table[index] = value

    def are_in(self, bitmap: Bitmap, table: Table | None) -> bool:
        """Whether the maps have all these values already."""
        maps = {MapKind.BITMAP: bitmap, MapKind.TABLE: table}
        return all(items is None or items[index] == value for kind, index, value in self for items in (maps[MapKind(kind)],))


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
        last: dict[int, int] = {}
        for part in (self.committing, self.running):
            last |= zip(part.keys, part.values, strict=True)
        return Changes.of(last)


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
    row = HEADER.empty()
    row["log_magic"] = MAGIC
    row["log_version"] = VERSION
    row["uuid"], row["boot"], row["host"] = identity.uuid, identity.boot, identity.host
    row["generation"] = identity.generation
    row["capacity"] = capacity
    row["identity"] = identity.place.encode()
    row["areas"] = AREA.write({**AREA.empty(), "base_hash": map_hash}) * 2
    raw = HEADER.write(row)
    HEADER.put(raw, "log_checksum", _checksum(raw))
    memoryview(buffer).cast("B")[:HEADER_BYTES] = raw


def read(buffer: Buffer | bytes, geometry: Geometry, identity: LogIdentity) -> PendingLog:
    """The log in this memory, if it is this one. Raises Corrupt: it is another's, or damaged."""
    if len(buffer) < HEADER_BYTES:
        raise Corrupt(f"the log of pending changes has only {len(buffer)} bytes")
    raw = memoryview(buffer).cast("B")
    row = HEADER.read(raw)
    if row["log_magic"] != MAGIC or row["log_checksum"] != _checksum(raw[:HEADER_BYTES]):
        raise Corrupt("the log of pending changes is damaged, or none")
    if row["log_version"] != VERSION:
        raise Corrupt(f"the log of pending changes has version {row['log_version']}, which this program does not know")
    made_for = (row["uuid"], row["generation"], row["boot"], row["host"])
    if made_for != (identity.uuid, identity.generation, identity.boot, identity.host):
        raise Corrupt("the log of pending changes is another disk's, or of another time")
    if row["identity"] != identity.place.encode().ljust(IDENTITY_BYTES, b"\0"):
        raise Corrupt("the log of pending changes was made for a disk in another place: this one may be a copy")
    capacity = row["capacity"]
    if capacity < capacity_min(geometry) or len(buffer) < size_bytes(capacity):
        raise Corrupt("the log of pending changes does not have the size that it says")
    now = row["epoch"] & 1
    headers = [AREA.read(row["areas"], number * AREA.itemsize) for number in range(2)]
    areas = [_area(raw, header, number, capacity) for number, header in enumerate(headers)]
    for area in areas:
        area.check(geometry)
    return PendingLog(
        committing=areas[1 - now],
        committing_base_hash=headers[1 - now]["base_hash"],
        running=areas[now],
        running_base_hash=headers[now]["base_hash"],
        failed_errno=row["failed_errno"],
        failed_ns=row["failed_ns"],
        durability_ops=row["durability_ops"],
        acknowledged=bool(row["acknowledged"]),
    )


def mark_failed(buffer: Buffer, errno: int, now_ns: int) -> None:
    """Nothing of the log in this memory will ever be applied."""
    HEADER.put(buffer, "failed_ns", now_ns)
    HEADER.put(buffer, "failed_errno", errno)


def mark_acknowledged(buffer: Buffer) -> None:
    """An administrator has seen what the superblock says of lost writes."""
    HEADER.put(buffer, "acknowledged", 1)


def mark_committed(buffer: Buffer, *, running_too: bool, map_hash: int) -> None:
    """The committing changes, with `running_too` all, are in the maps on storage, which have this hash."""
    now = HEADER.read(buffer)["epoch"] & 1
    AREA.put(buffer, "count", 0, _AREAS + (1 - now) * AREA.itemsize)
    if running_too:
        AREA.put(buffer, "count", 0, _AREAS + now * AREA.itemsize)
        AREA.put(buffer, "base_hash", map_hash, _AREAS + now * AREA.itemsize)


def _checksum(header: Buffer) -> int:
    """Over what never changes while the log is in use."""
    fixed = bytearray(header[:_STATIC_BYTES])
    fixed[_CHECKSUM_OFFSET : _CHECKSUM_OFFSET + 4] = bytes(4)
    return _core.crc32c(fixed)


def _area(raw: memoryview, area: Row, number: int, capacity: int) -> Changes:
    count = area["count"]
    if count > capacity:
        raise Corrupt(f"the log of pending changes says that it has {count} records where {capacity} fit")
    start = HEADER_BYTES + number * capacity * RECORD.itemsize
    # The last record of each key is its value.
    return Changes.of(dict(RECORD.read_all(raw[start : start + count * RECORD.itemsize])))
