# SPDX-License-Identifier: Apache-2.0
"""Hostile bytes with a structure: short inputs that say how a good disk, or a good conversation, is spoilt.

Random bytes never get past a checksum. So an input is a program: byte after byte it changes fields, records and pages of a valid disk,
and what it changed is sealed again with the checksum that belongs there. Every input is a valid program, however it was mutated.
"""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import re
import sys
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from fvd import _core
from fvd.device.node import aligned_buffer
from fvd.disk.loading import LoadedDisk, highest_slot, load_disk
from fvd.errors import Corrupt, DeviceError, InvalidArgument
from fvd.format import journal, maps, pending
from fvd.format.geometry import CELL_BYTES, CELLS_PER_PAGE, PAGE_BYTES, Geometry, Layout
from fvd.format.journal import ENTRY_RECORD, HEADER_BYTES, PAGE_HEADER, RECORDS_BYTES, WORD_RECORD
from fvd.format.maps import CELL, MapKind
from fvd.format.pending import LogIdentity
from fvd.format.records import Record
from fvd.format.superblock import _CHOSEN, _DERIVED, SLOT_OFFSETS_BYTES, SUPERBLOCK

TESTS = Path(__file__).resolve().parent.parent
SUPERBLOCKS, JOURNAL, MAPS = 1, 2, 4
"""Regions that an input may spoil."""
ALL_REGIONS = SUPERBLOCKS | JOURNAL | MAPS
INTERESTING = (
    *(0, 1, 2, 3, 4, 7, 8, 15, 16, 17, 62, 63, 64, 124, 336, 337, 504, 505, 512, 4096, 65535, 65536, 0xFFFFFFFE, 0xFFFFFFFF),
    *(1 << 20, 1 << 28, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, (1 << 64) - 2),
)


def load_golden(name: str) -> ModuleType:
    """A script of tests/golden, which is no package."""
    spec = importlib.util.spec_from_file_location(f"golden_{name}", TESTS / "golden" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Take:
    """Reads an input from its front. At its end everything is 0."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def __bool__(self) -> bool:
        return self._position < len(self._data)

    def take(self, size: int) -> bytes:
        self._position += size
        return self._data[self._position - size : self._position]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def byte(self) -> int:
        return self.number(1)

    def rest(self) -> bytes:
        return self.take(len(self._data))

    def choice(self, values: Any) -> Any:
        return values[self.number(1 if len(values) <= 256 else 2) % len(values)]

    def value(self, now: int, how: int) -> int:
        """A number in place of `now`: near it, a bit of it, one that programs trip over, or any."""
        if how == 0:
            return now + self.byte() - 128
        if how == 1:
            return now ^ 1 << self.byte() % 64
        if how == 2:
            return int(self.choice(INTERESTING))
        return self.number((1, 2, 4, 8)[how % 4])


class Storage:
    """A disk's storage in memory: good pages below, spoilt and written ones above them. `volume.superblocks.Pages`.

    Refuses reads past its end as a node does, and counts what is asked of it, for whoever bounds that.
    """

    path = "storage"
    identity = None

    def __init__(self, good: bytes, size_bytes: int) -> None:
        self._good = good
        self._size_bytes = size_bytes
        self._changed: dict[int, bytes] = {}
        self.read_bytes = 0
        self.writes = 0

    def size_bytes(self) -> int:
        return self._size_bytes

    def resize(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes

    def page(self, offset_bytes: int) -> bytes:
        found = self._changed.get(offset_bytes)
        return found if found is not None else self._good[offset_bytes : offset_bytes + PAGE_BYTES].ljust(PAGE_BYTES, b"\0")

    def put(self, offset_bytes: int, page: bytes) -> None:
        self._changed[offset_bytes] = page

    def content(self, end_bytes: int) -> bytes:
        """Everything before `end_bytes`: for a reader that takes a disk as one piece."""
        out = bytearray(self._good[:end_bytes].ljust(end_bytes, b"\0"))
        for offset, page in self._changed.items():
            if offset < end_bytes:
                out[offset : offset + PAGE_BYTES] = page
        return bytes(out[:end_bytes])

    def pread(self, offset_bytes: int, length_bytes: int, /) -> maps.Bytes:
        self._check(offset_bytes, length_bytes)
        data = aligned_buffer(length_bytes)
        self.pread_into(offset_bytes, data)
        return data

    def pread_into(self, offset_bytes: int, buffer: maps.Bytes, /) -> None:
        length = len(buffer)
        self._check(offset_bytes, length)
        self.read_bytes += length
        good = self._good[offset_bytes : offset_bytes + length]
        buffer[:] = bytes(good).ljust(length, b"\0")
        for offset, page in self._changed.items():
            begin, end = max(offset, offset_bytes), min(offset + PAGE_BYTES, offset_bytes + length)
            if begin < end:
                buffer[begin - offset_bytes : end - offset_bytes] = bytes(page[begin - offset : end - offset])

    def _check(self, offset_bytes: int, length_bytes: int) -> None:
        if offset_bytes + length_bytes > self._size_bytes:
            raise DeviceError(f"{self.path} ends at byte {self._size_bytes}, before the {length_bytes} bytes at {offset_bytes}")

    def pwrite(self, offset_bytes: int, data: Any, /) -> None:
        raw = bytes(data)
        self._check(offset_bytes, len(raw))
        self.writes += 1
        for place in range(offset_bytes // PAGE_BYTES * PAGE_BYTES, offset_bytes + len(raw), PAGE_BYTES):
            begin, end = max(place, offset_bytes), min(place + PAGE_BYTES, offset_bytes + len(raw))
            page = self.page(place)
            self.put(place, page[: begin - place] + raw[begin - offset_bytes : end - offset_bytes] + page[end - place :])

    def zero(self, offset_bytes: int, length_bytes: int, /) -> None:
        self.pwrite(offset_bytes, bytes(length_bytes))

    def flush(self) -> None:
        pass


@dataclass
class Good:
    """A valid disk to begin with: its metadata, and where its pages are."""

    geometry: Geometry
    uuid: bytes
    storage: bytes
    size_bytes: int
    has_base: bool
    places: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def pages(self, regions: int) -> tuple[int, ...]:
        if regions not in self.places:
            geometry = self.geometry
            found = list(SLOT_OFFSETS_BYTES) if regions & SUPERBLOCKS else []
            if regions & JOURNAL:
                found += range(geometry.journal_offset_bytes, geometry.bitmap_offset_bytes, PAGE_BYTES)
            if regions & MAPS:
                end = geometry.bitmap_offset_bytes + geometry.bitmap_size_bytes + geometry.table_size_bytes
                found += range(geometry.bitmap_offset_bytes, end, PAGE_BYTES)
            self.places[regions] = tuple(found)
        return self.places[regions]

    def fresh(self) -> Storage:
        return Storage(self.storage, self.size_bytes)


@cache
def good_disks() -> tuple[Good, ...]:
    """Small disks of each kind, with several commits in their rings: the golden ones, and two whose maps end inside a word or cell."""
    make = load_golden("make")
    images = [make.IMAGES[name]() for name in ("mapped", "base", "raw", "dropped", "wrapped")]
    odd = make.Image(90, Geometry(3 << 20, 4096, 65536, 16 * 4096, 65536))
    for block in (0, 20, 40, 767, 300):
        odd.write(block)
        odd.commit()
    tiny = make.Image(91, Geometry(4096, 4096, 65536, 16 * 4096, 65536, Layout.RAW))
    tiny.write(0)
    tiny.commit(clean=True)
    return tuple(
        Good(image.geometry, image.uuid, bytes(image.storage[: image.geometry.data_offset_bytes]), len(image.storage), bool(image.base))
        for image in (*images, odd, tiny)
    )


def seal(good: Good, offset_bytes: int, page: bytearray) -> None:
    """Puts the checksums right that belong at this place."""
    geometry = good.geometry

    def put(at: int, uuid: bytes, position: int, structure: bytes) -> None:
        page[at : at + 4] = _core.checksum(uuid, position, structure, at % CELL_BYTES).to_bytes(4, "little")

    if offset_bytes in SLOT_OFFSETS_BYTES:
        put(8, bytes(page[24:40]), offset_bytes, bytes(page))
    elif offset_bytes < geometry.bitmap_offset_bytes:
        put(4, good.uuid, offset_bytes, bytes(page))
    else:
        for cell in range(0, PAGE_BYTES, CELL_BYTES):
            put(cell, good.uuid, offset_bytes + cell, bytes(page[cell : cell + CELL_BYTES]))


def _layout_of(good: Good, offset_bytes: int) -> Record:
    if offset_bytes in SLOT_OFFSETS_BYTES:
        return SUPERBLOCK
    return PAGE_HEADER if offset_bytes < good.geometry.bitmap_offset_bytes else CELL


def _numbers(layout: Record) -> tuple[tuple[int, int], ...]:
    """(offset, size) of the fields that are numbers."""
    fields: Any = layout.fields
    return tuple((fields[name][1], fields[name][0].itemsize) for name in fields if fields[name][0].kind == "u")


_NUMBERS = {id(layout): _numbers(layout) for layout in (SUPERBLOCK, PAGE_HEADER, CELL)}


def spoil(data: bytes, regions: int) -> tuple[Good, Storage]:
    """The disk that an input describes."""
    take = Take(data)
    good = take.choice(good_disks())
    flags = take.byte()
    storage = good.fresh()
    places = good.pages(regions)
    touched: dict[int, bytearray] = {}
    unsealed: set[int] = set()

    def page_at(place: int) -> bytearray:
        if place not in touched:
            touched[place] = bytearray(storage.page(place))
        return touched[place]

    while take:
        op = take.byte()
        place = take.choice(places)
        page = page_at(place)
        layout = _layout_of(good, place)
        what, how = op & 7, op >> 3 & 7
        if what <= 2:
            begin = take.byte() % CELLS_PER_PAGE * CELL_BYTES if layout is CELL else 0
            at, size = take.choice(_NUMBERS[id(layout)])
            at += begin
            value = take.value(int.from_bytes(page[at : at + size], "little"), how)
            page[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
        elif what == 3 and layout is PAGE_HEADER:
            _add_record(take, page, how)
        elif what <= 4:
            at = take.number(2) % PAGE_BYTES
            raw = take.take(1 + how * 2)[: PAGE_BYTES - at]
            page[at : at + len(raw)] = raw
        elif what == 5:
            page[:] = page_at(take.choice(places))
        elif what == 6 and how < 2 and regions == ALL_REGIONS:
            storage.resize(max(0, good.size_bytes + (take.byte() - 128) * (PAGE_BYTES, good.geometry.chunk_size_bytes)[how]))
        elif what == 6:
            page[:] = bytes(PAGE_BYTES)
        else:
            unsealed.add(place)
    for place, page in touched.items():
        if flags & 1 and place in SLOT_OFFSETS_BYTES:
            _derive(page)
        if place not in unsealed:
            seal(good, place, page)
        storage.put(place, bytes(page))
    if flags & 2:
        _believe(good, storage)
    return good, storage


def _add_record(take: Take, page: bytearray, how: int) -> None:
    """One more record at the end of a journal page, if it has space."""
    words, entries = int.from_bytes(page[44:46], "little"), int.from_bytes(page[46:48], "little")
    record, count_at = (WORD_RECORD, 44) if how & 1 and not entries else (ENTRY_RECORD, 46)
    at = words * WORD_RECORD.itemsize + entries * ENTRY_RECORD.itemsize
    if at + record.itemsize > RECORDS_BYTES:
        return
    index = take.value(0, 2 + (how >> 1))
    value = take.value(0, 2 + (how >> 2) * 5)
    raw = (index % (1 << 32)).to_bytes(4, "little") + (value % (1 << 64)).to_bytes(8, "little")
    page[HEADER_BYTES + at : HEADER_BYTES + at + record.itemsize] = raw[: record.itemsize]
    page[count_at : count_at + 2] = (int.from_bytes(page[count_at : count_at + 2], "little") + 1).to_bytes(2, "little")


def _derive(page: bytearray) -> None:
    """Lets a superblock agree with itself, if its sizes are possible."""
    row = np.frombuffer(page, SUPERBLOCK)[0]
    try:
        sizes: dict[str, Any] = {name: int(row[name]) for name in _CHOSEN}
        geometry = Geometry(**sizes, layout=Layout(int(row["layout"]) & 1))
    except InvalidArgument:
        return
    fields: Any = SUPERBLOCK.fields
    for name in _DERIVED:
        page[fields[name][1] : fields[name][1] + 8] = int(getattr(geometry, name)).to_bytes(8, "little")


def _believe(good: Good, storage: Storage) -> None:
    """Lets the last commit say the hash of the maps that it leads to: what is judged after the hash is reached so."""
    geometry = good.geometry
    pages = [bytearray(storage.page(place)) for place in good.pages(JOURNAL)]
    try:
        items = [decode_map(good, storage, kind) for kind in (MapKind.BITMAP, MapKind.TABLE)]
        journal.replay(geometry, good.uuid, b"".join(pages), items[0], items[1] if geometry.table_entries else None)
    except DeviceError:
        return
    except Corrupt as error:
        # Only the code under test knows the hash of what its replay led to, and it tells it.
        found = re.search(r"the maps have hash (0x[0-9a-f]+) after the commit at (\d+)", str(error))
        if found is None:
            return
        first, right = int(found[2]), int(found[1], 16).to_bytes(8, "little")
        parts = int.from_bytes(pages[first % len(pages)][42:44], "little")
        for position in range(first % len(pages), min(first % len(pages) + parts, len(pages))):
            pages[position][32:40] = right
            place = geometry.journal_offset_bytes + position * PAGE_BYTES
            seal(good, place, pages[position])
            storage.put(place, bytes(pages[position]))


def decode_map(good: Good, storage: Storage, kind: MapKind, target: Any = None) -> Any:
    """A whole map, into `target` if given. Raises Corrupt."""
    geometry = good.geometry
    if kind is MapKind.TABLE and not geometry.table_entries:
        return None
    items: Any = target if target is not None else maps.empty_bitmap(geometry) if kind is MapKind.BITMAP else maps.empty_table(geometry)
    raw = storage.pread(maps.map_offset_bytes(geometry, kind), maps.map_pages(geometry, kind) * PAGE_BYTES)
    maps.decode_pages(geometry, kind, raw, good.uuid, items, 0)
    return items


class Cliff:
    """Arrays that end where memory ends: an index past them, by one or by 2^32, ends the process, in every build."""

    MEMORY_BYTES = 1 << 20
    BEYOND_BYTES = 1 << 36  # the farthest that an index of 32 bits leads, and more

    def __init__(self) -> None:
        library = ctypes.CDLL(None, use_errno=True)
        library.mmap.restype = ctypes.c_void_p
        library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
        no_access, reserve = 0, 0x4000
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserve
        address = library.mmap(None, self.MEMORY_BYTES + self.BEYOND_BYTES, no_access, flags, -1, 0)
        if address in (None, ctypes.c_void_p(-1).value):
            raise OSError(ctypes.get_errno(), "no address space for a cliff")
        if library.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(self.MEMORY_BYTES), mmap.PROT_READ | mmap.PROT_WRITE):
            raise OSError(ctypes.get_errno(), "mprotect")
        self._memory = (ctypes.c_char * self.MEMORY_BYTES).from_address(address)

    def array(self, original: Any) -> npt.NDArray[Any]:
        """A copy of an array at the edge. It lives until the next one."""
        like = np.asarray(original)
        found: npt.NDArray[Any] = np.frombuffer(memoryview(self._memory), like.dtype, like.size, self.MEMORY_BYTES - like.nbytes)
        found[:] = like
        return found


# --- A log of pending changes --------------------------------------------------------------------------------------------------

PLACE = "file 1 2"
SPARE_SLOTS = 4
_LOG_NUMBERS = {name: (offset, kind.itemsize) for name, (kind, offset, *_) in pending.HEADER.fields.items() if kind.kind == "u"}  # type: ignore[union-attr]
_LOG_CHANGEABLE = tuple(_LOG_NUMBERS[name] for name in sorted(_LOG_NUMBERS) if name != "log_checksum") + tuple(
    (pending.HEADER.fields["areas"][1] + number * pending.AREA.itemsize + at, 8)  # type: ignore[index]
    for number in range(2)
    for at in (0, 8)
)


@dataclass
class HostileLog:
    """A log that somebody has spoilt, beside a good disk on which it may build."""

    good: Good
    disk: LoadedDisk  # as the disk's last commit left it
    buffer: bytearray
    identity: LogIdentity  # what it must have been made for


@cache
def spacious_disks() -> tuple[tuple[Good, LoadedDisk], ...]:
    """The good disks with storage for all that they name, and a little more."""
    found = []
    for good in good_disks():
        storage = good.fresh()
        storage.resize(good.geometry.max_storage_size_bytes)
        disk = load_disk(storage)
        slots = min(highest_slot(disk.used_slots) + SPARE_SLOTS, good.geometry.chunks - 1) + 1
        spacious = replace(good, size_bytes=good.geometry.slot_offset_bytes(slots))
        found.append((spacious, load_disk(spacious.fresh())))
    return tuple(found)


class LogWriter:
    """Fills a log as an engine does, over a copy of the disk's maps; or with records that make no sense."""

    def __init__(self, disk: LoadedDisk, good: Good, buffer: bytearray, capacity: int) -> None:
        self.good, self.buffer, self.capacity = good, buffer, capacity
        self.geometry = good.geometry
        self.header: Any = np.frombuffer(buffer, pending.HEADER, 1)
        self.bitmap, self.table = disk.bitmap.copy(), None if disk.table is None else disk.table.copy()
        used = set() if self.table is None else set(self.table.tolist())
        self.free = [slot for slot in range(self.geometry.slots_in(good.size_bytes)) if slot not in used]

    def log(self, kind: int, index: int, value: int) -> None:
        area = int(self.header["epoch"][0]) & 1
        count = int(self.header["areas"]["count"][0, area])
        if count < self.capacity:
            offset = pending.HEADER_BYTES + area * self.capacity * pending.RECORD.itemsize
            records = np.frombuffer(self.buffer, pending.RECORD, self.capacity, offset)
            records[count] = (np.uint64((kind << 56 | index) % (1 << 64)), np.uint64(value % (1 << 64)))
            self.header["areas"]["count"][0, area] = count + 1

    def change(self, chunk: int, blocks: int) -> None:
        """As an engine does it: some blocks of a chunk are written, or with none it is trimmed."""
        per_chunk = self.geometry.blocks_per_chunk
        first = chunk * per_chunk
        word, shift = first // 64, first % 64
        if per_chunk <= 64:
            mask = (1 << min(per_chunk, self.geometry.blocks - first)) - 1
            value = int(self.bitmap[word]) & ~(mask << shift) | (blocks & mask) << shift
            self.bitmap[word] = value
            self.log(MapKind.BITMAP, word, value)
        table = self.table
        if table is not None:
            if blocks and table[chunk] == maps.EMPTY and self.free:
                table[chunk] = self.free.pop()
            elif not blocks and not self.good.has_base and table[chunk] != maps.EMPTY:
                self.free.append(int(table[chunk]))
                table[chunk] = maps.EMPTY
            self.log(MapKind.TABLE, chunk, int(table[chunk]))

    def log_nonsense(self, take: Take, how: int) -> None:
        """An index or a value that no engine would write, or both."""
        items = self.bitmap if how & 1 or self.table is None else self.table
        index = take.value(0, 2 + (how >> 1)) if how & 4 else take.number(2) % len(items)
        kind = MapKind.BITMAP if items is self.bitmap else MapKind.TABLE
        self.log(kind, index, take.value(int(items[index]) if index < len(items) else 0, how))

    def begin_commit(self) -> None:
        """What was running is committing."""
        area = int(self.header["epoch"][0]) & 1
        self.header["epoch"] = self.header["epoch"] + np.uint64(1)
        self.header["areas"]["count"][0, 1 - area] = 0


def spoil_log(data: bytes) -> HostileLog:
    """The log that an input describes: changes that make sense and others, a commit under way, and spoilt bytes of header and records."""
    take = Take(data)
    good, disk = take.choice(spacious_disks())
    flags = take.byte()
    geometry = good.geometry
    capacity = pending.capacity_min(geometry) * (1, 1, 2, 8)[flags >> 1 & 3]
    identity = LogIdentity(good.uuid, disk.superblock.generation, b"B" * 16, b"H" * 16, PLACE)
    buffer = bytearray(pending.size_bytes(capacity))
    pending.lay_out(buffer, capacity, identity, disk.journal_state.map_hash)
    writer = LogWriter(disk, good, buffer, capacity)
    sealed, end, spoilt = True, len(buffer), []
    while take:
        op = take.byte()
        what, how = op & 7, op >> 3 & 7
        if what <= 1:
            writer.change(take.number(2) % geometry.chunks, take.byte() if how else 0)
        elif what == 2:
            writer.log_nonsense(take, how)
        elif what == 3:
            writer.begin_commit()
        elif what == 4:
            for index in range(take.byte()):
                value = int(take.choice(INTERESTING)) if how & 1 else (1 << 64) - 1
                writer.log(MapKind.BITMAP, index % geometry.bitmap_words, value)
        elif what == 5:
            spoilt.append((*take.choice(_LOG_CHANGEABLE), how, take.take(2)))
        elif what == 6:
            spoilt.append((take.number(2) % len(buffer), 1 + how, 7, take.take(1 + how)))
        else:
            sealed, end = sealed and not how & 1, take.number(2) if how & 2 else end
    if not flags & 1:
        _build_on(disk, buffer, identity)
    for at, size, how, raw in spoilt:
        size = min(size, len(buffer) - at)
        now = int.from_bytes(buffer[at : at + size], "little")
        value = int.from_bytes(raw, "little") if how == 7 else Take(raw).value(now, how)
        buffer[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
    if sealed:
        seal_log(buffer)
    return HostileLog(good, disk, buffer[:end], identity)


def seal_log(buffer: bytearray) -> None:
    checksum = pending._checksum(np.frombuffer(buffer, np.uint8, pending.HEADER_BYTES))
    buffer[8:12] = checksum.to_bytes(4, "little")


def _build_on(disk: LoadedDisk, buffer: bytearray, identity: LogIdentity) -> None:
    """The areas say the hashes of the maps on which they build, if they can be had."""
    try:
        found = pending.read(buffer, disk.geometry, identity)
    except Corrupt:
        return
    header: Any = np.frombuffer(buffer, pending.HEADER, 1)
    now = int(header["epoch"][0]) & 1
    bitmap, table = disk.bitmap.copy(), None if disk.table is None else disk.table.copy()
    header["areas"]["base_hash"][0, 1 - now] = maps.map_hash(identity.uuid, bitmap, table)
    found.committing.apply(bitmap, table)
    header["areas"]["base_hash"][0, now] = maps.map_hash(identity.uuid, bitmap, table)
