# SPDX-License-Identifier: Apache-2.0
"""What may come out when anything goes in: one function for each kind of input from outside.

A target takes any bytes. It returns if what they describe was accepted and makes sense, or was refused with an error of ours; everything
else that it raises, and every fault of memory, is a finding. Time and memory are bounded by whoever calls it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import select
import socket
import struct
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from hostile import ALL_REGIONS, JOURNAL, MAPS, SUPERBLOCKS, TESTS, Cliff, Good, Storage, Take, decode_map, load_golden, spoil, spoil_log

sys.path += [str(TESTS), str(TESTS / "export")]
from hostile_guest import target_front_end, target_ring  # noqa: F401 (they are in TARGETS)
from nbd_client import go, meta_context, option, request

from fvd import _core
from fvd.control import protocol
from fvd.disk.engine_factory import engine_on
from fvd.disk.loading import LoadedDisk, load_disk
from fvd.disk.pending import FoundLog, NotBelieved
from fvd.disk.recovery import recover_disk
from fvd.disk.view import View
from fvd.engine._engine import Engine
from fvd.errors import Corrupt, FvdError, InvalidArgument, NotFound, Unsupported
from fvd.export import _nbd as nbd
from fvd.export import handshake as hs
from fvd.export.server import Limits, NbdServer, Unix
from fvd.format import journal, maps, pending, superblock
from fvd.format.geometry import PAGE_BYTES, Geometry
from fvd.format.maps import EMPTY, MapKind
from fvd.inspect import check as checking
from fvd.inspect.dump import _dump
from fvd.inspect.map import extents
from fvd.volume.name import parse_name

REFUSALS = (NotFound, Corrupt, Unsupported)
"""What a disk may be refused with. DeviceError is none of them: a reader that runs off the storage's end has not looked where it ends."""
NAME = parse_name("file:/storage")
MIB = 1 << 20
ENGINE_REQUESTS = READ, WRITE, FLUSH, TRIM, ZERO, CLOSE = range(6)
OP_READ, OP_WRITE = 0, 1


@cache
def stranger() -> Any:
    """The second reader of the format. Its checksum is too slow here, and tests/golden compares it with ours."""
    module: Any = load_golden("stranger")
    module.crc32c = _core.crc32c
    return module


@cache
def cliffs() -> tuple[Cliff, ...]:
    return tuple(Cliff() for _ in range(3))


# --- What lies on storage ----------------------------------------------------------------------------------------------------


def target_superblock(data: bytes) -> None:
    _, storage = spoil(data, SUPERBLOCKS)
    pages = [storage.page(offset) for offset in superblock.SLOT_OFFSETS_BYTES]
    try:
        found = superblock.choose(pages[0], pages[1])
    except REFUSALS:
        return
    # What was believed is written back as it was, but for the reserved bytes to which a feature may give a meaning.
    again = superblock.encode(found)
    assert superblock.decode(again, found.slot) == found
    assert found.compatible_features | found.autoclear_features or again == pages[found.slot]


def target_maps(data: bytes) -> None:
    """The maps as they lie on storage: cells, then what must be true of them."""
    good, storage = spoil(data, MAPS)
    geometry = good.geometry
    items: list[Any] = [None, None]
    for i, kind in enumerate((MapKind.BITMAP, MapKind.TABLE)):
        empty = maps.empty_bitmap(geometry) if kind is MapKind.BITMAP else maps.empty_table(geometry)
        if empty is not None:
            try:
                items[i] = decode_map(good, storage, kind, cliffs()[i].array(empty))
            except Corrupt:
                return
    look_at_maps(good, items[0], items[1])


def look_at_maps(good: Good, bitmap: Any, table: Any) -> None:
    geometry = good.geometry
    assert isinstance(_core.map_hash(good.uuid, bitmap, table), int)
    lookup = _core.Lookup(bitmap, table, geometry.block_size_bytes, geometry.chunk_size_bytes)
    place = 0
    while place < geometry.virtual_size_bytes:
        run, _, _ = lookup.find(place, min(64 * MIB, geometry.virtual_size_bytes - place))
        assert 0 < run <= geometry.virtual_size_bytes - place
        place += run
    bounds, _ = _core.bitmap_runs(bitmap, 0, geometry.blocks)
    assert bounds[-1] == geometry.blocks and np.all(np.diff(bounds.astype(np.int64)) > 0)
    try:
        used = maps.check_maps(geometry, bitmap, table, good.has_base)
    except Corrupt:
        return
    if table is not None:
        slots = table[table != EMPTY]
        assert len(np.unique(slots)) == len(slots) == _core.bitmap_count(used, 0, len(used) * 64)
        assert not len(slots) or int(slots.max()) < geometry.chunks


def target_journal(data: bytes) -> None:
    good, storage = spoil(data, JOURNAL)
    geometry = good.geometry
    ring = storage.pread(geometry.journal_offset_bytes, geometry.journal_size_bytes)
    commits = list(journal.iter_commits(geometry, good.uuid, ring))
    assert len(commits) <= geometry.journal_pages
    bitmap, table = (good_map(good, kind) for kind in (MapKind.BITMAP, MapKind.TABLE))
    bitmap = cliffs()[0].array(bitmap)
    table = None if table is None else cliffs()[1].array(table)
    try:
        state, dirty_bitmap, dirty_table = journal.replay(geometry, good.uuid, cliffs()[2].array(ring), bitmap, table)
    except Corrupt:
        return
    assert 1 <= state.tail <= state.previous < state.next_sequence <= 1 << 63
    assert state.next_sequence - state.tail <= geometry.journal_pages and state.commits_replayed <= geometry.journal_pages
    assert _core.map_hash(good.uuid, bitmap, table) == state.map_hash
    # Only pages that are called dirty have changed, and a second replay changes nothing.
    for now, before, dirty, per_page in (
        (bitmap, good_map(good, MapKind.BITMAP), dirty_bitmap, maps.WORDS_PER_CELL * maps.CELLS_PER_PAGE),
        (table, good_map(good, MapKind.TABLE), dirty_table, maps.ENTRIES_PER_CELL * maps.CELLS_PER_PAGE),
    ):
        if now is not None:
            assert all(dirty[int(i) // per_page] for i in np.flatnonzero(now != before))
    assert journal.replay(geometry, good.uuid, ring, bitmap.copy(), None if table is None else table.copy())[0] == state


def good_map(good: Good, kind: MapKind) -> Any:
    key = good.uuid, kind
    if key not in _good_maps:
        _good_maps[key] = decode_map(good, good.fresh(), kind)
    return _good_maps[key]


_good_maps: dict[Any, Any] = {}


def target_image(data: bytes) -> None:
    """A whole disk: opened, checked, dumped, mapped, compared with the second reader, and if it was accepted, used and closed."""
    _, storage = spoil(data, ALL_REGIONS)
    disk: LoadedDisk | None = None
    with contextlib.suppress(*REFUSALS):
        disk = load_disk(storage)
    assert storage.read_bytes <= 2 * storage.size_bytes() + 4 * PAGE_BYTES and not storage.writes
    with contextlib.suppress(NotFound, Unsupported):
        json.dumps(_dump(NAME, storage, True))  # type: ignore[arg-type]
    judge_check(storage, disk)
    if disk is not None:
        compare_with_stranger(storage, disk)
        view = View(NAME, disk.superblock, disk.storage_size_bytes, disk.bitmap, disk.table, disk.journal_state.clean, open=False)
        assert sum(extent.length for extent in extents(view)) == disk.geometry.virtual_size_bytes
        use(storage, disk)


def judge_check(storage: Storage, disk: LoadedDisk | None) -> None:
    """What opens has no errors, and what has none opens."""
    with mock.patch.object(checking, "open_base", side_effect=NotFound("no base here")):
        try:
            report = checking.check_node(storage, NAME)
        except (NotFound, Unsupported):
            assert disk is None
            return
    errors = [error for error in report.errors if error != "no base here"]
    assert (disk is None) == bool(errors), errors


def compare_with_stranger(storage: Storage, disk: LoadedDisk) -> None:
    geometry = disk.geometry
    content = storage.content(geometry.data_offset_bytes)
    if int.from_bytes(stranger().read_superblock(content)[16:24], "little") != disk.superblock.generation:
        return  # a superblock that is sealed and impossible counts as lost; the stranger knows seals only
    other = stranger().open_disk(content)
    assert other.words == disk.bitmap.tolist()
    assert other.table == (list(range(geometry.chunks)) if disk.table is None else disk.table.tolist())
    state = disk.journal_state
    assert (other.clean, other.dropped) == (state.clean, state.dropped_commit)
    assert (other.last_commit, other.next_sequence) == (state.previous, state.next_sequence)


def use(storage: Storage, disk: LoadedDisk) -> None:
    """Reads and writes an accepted disk through the engine, closes it, and opens it again."""
    geometry = disk.geometry
    base = disk.superblock.base
    if geometry.virtual_size_bytes > 1 << 40:
        return  # only the extents' arithmetic is of interest there
    # The real base is compared with the file that is found, whose size fits in 63 bits.
    engine = engine_on(disk, base_size_bytes=None if base is None else min(base.size_bytes, (1 << 63) - 1), on_full="error")
    buffer = ctypes.create_string_buffer(MIB)
    size = min(MIB, geometry.virtual_size_bytes)
    last = geometry.virtual_size_bytes - size
    engine.set_exhausted(True)
    for cookie, (kind, offset, length) in enumerate(
        (
            *((READ, 0, size), (READ, last, size), (WRITE, 0, 512), (WRITE, last, 4096), (FLUSH, 0, 0), (TRIM, 0, size), (READ, 0, size)),
            *((ZERO, last, size), (WRITE, geometry.virtual_size_bytes // 2 // 512 * 512, 512), (CLOSE, 0, 0)),
        )
    ):
        engine.submit_request(kind, offset, length, ctypes.addressof(buffer) if length else 0, cookie)
        done: list[tuple[int, int]] = []
        for _ in range(100_000):
            for token, op, target, at, count, address, _durable in engine.take_operations():
                engine.complete_operation(token, operate(storage, op, target, at, count, address, geometry))
            done = engine.take_done()
            if done:
                break
        assert [number for number, _ in done] == [cookie], f"request {kind} never ends"
        assert done[0][1] in (0, -errno.ENOSPC), done
    assert not engine.leaks() and not engine.failed_errno
    try:
        assert load_disk(storage).journal_state.clean
    except Corrupt as error:
        # Counted to its end, which takes a disk 2^63 pages: then refused, never misread.
        assert disk.journal_state.next_sequence > (1 << 63) - 1000 and "cannot have been reached" in str(error), error


def operate(storage: Storage, op: int, target: int, at: int, count: int, address: int, geometry: Geometry) -> int:
    if op == OP_READ and target == 1:
        ctypes.memset(address, 0x5A, count)
    elif op == OP_READ:
        assert at + count <= storage.size_bytes(), "a read past the end"
        if at >= geometry.data_offset_bytes:
            ctypes.memset(address, 0xA5, count)
        else:
            ctypes.memmove(address, storage.pread(at, count).tobytes(), count)
    elif op == OP_WRITE:
        assert at + count <= storage.size_bytes() and at >= geometry.journal_offset_bytes and target == 0, "a write outside"
        if at < geometry.data_offset_bytes:
            assert at + count <= geometry.data_offset_bytes
            storage.pwrite(at, ctypes.string_at(address, count))
    return 0


class Recoverable(Storage):
    """Whose cache can be mistrusted: it is the medium."""

    direct = False

    def forget_cache(self) -> None:
        pass


@dataclass
class Memory:
    """A log's."""

    buffer: bytearray

    def close(self) -> None:
        pass


def target_pending(data: bytes) -> None:
    """A log of pending changes beside a good disk: recovered in memory, and for writing."""
    hostile = spoil_log(data)
    good, before = hostile.good, hostile.disk
    storage = Recoverable(good.storage, good.size_bytes)

    def found() -> FoundLog:
        return FoundLog(Memory(hostile.buffer), pending.read(hostile.buffer, good.geometry, hostile.identity))

    try:
        log = found().log
    except Corrupt:
        return
    looked: LoadedDisk | None = None
    kept = bytes(hostile.buffer)
    with contextlib.suppress(NotBelieved):
        looked = recover_disk(storage, read_only=True, pending_log=found())
    assert not storage.writes and kept == hostile.buffer, "a read-only open writes nothing"
    try:
        disk = recover_disk(storage, read_only=False, pending_log=found())
    except NotBelieved:
        assert looked is None and not storage.writes, "what is not believed is not written"
        return
    assert looked is not None
    for shown, wanted in ((disk.bitmap, looked.bitmap), (disk.table, looked.table)):
        assert np.array_equal(shown, wanted) if wanted is not None else shown is None  # type: ignore[arg-type]
    if log.failed_errno:
        assert not storage.writes and np.array_equal(disk.bitmap, before.bitmap), "R24: never applied"
    else:
        # The committing ones too, unless the maps were what the running ones build on already: then it is for the log to say what it was.
        assert (log.running if log.running_base_hash == before.journal_state.map_hash else log.latest()).are_in(disk.bitmap, disk.table)
    judge_check(storage, disk)
    # Killed after that, before the superblock names another log.
    writes = storage.writes
    again = recover_disk(storage, read_only=False, pending_log=found())
    assert storage.writes == writes and again.journal_state.map_hash == disk.journal_state.map_hash
    use(storage, again)


# --- NBD ---------------------------------------------------------------------------------------------------------------------

EXPORTS: tuple[dict[str, hs.Export], ...] = (
    {"disk": hs.Export("disk", 0, 1 << 30, description="a disk")},
    {"a": hs.Export("a", 0, 1 << 20), "b": hs.Export("b", 1, 1 << 21, read_only=True, minimum_block_bytes=512)},
    {},
)
NAMES = ("", "disk", "a", "b", "none", "\xe9" * 300)
QUERIES = ("base:", hs.ALLOCATION, "base:x", "x:y", "")
OFFSETS = (0, 1, 512, 4096, 65535, 65536, MIB - 512, MIB, 2 * MIB - 1, 2 * MIB, 1 << 31, 1 << 63, (1 << 64) - 512, (1 << 64) - 1)
LENGTHS = (0, 1, 511, 512, 4096, 65536, 65537, MIB, 2 * MIB, 32 * MIB, 32 * MIB + 1, (1 << 32) - 1, (1 << 32) - 512, 1 << 31)
TRANSMISSION_BYTES = 2 * MIB
HANG_SECONDS = 20


def conversation(take: Take) -> list[bytes]:
    """What a client says in a handshake: whole options, good or not, and anything in between."""
    said: list[bytes] = []
    while take:
        what = take.byte() % 8
        if what == 0:
            said.append(take.take(take.byte()))
        elif what == 1:
            said.append(struct.pack(">I", take.byte() & 3))
        elif what == 2:
            said.append(option(take.byte() & 15, take.take(take.byte())))
        elif what == 3:
            infos = tuple(take.byte() & 7 for _ in range(take.byte() & 7))
            said.append(go(take.choice(NAMES), infos, take.choice((hs.OPT_GO, hs.OPT_INFO))))
        elif what == 4:
            queries = [take.choice(QUERIES) for _ in range(take.byte() & 7)]
            said.append(meta_context(take.choice((9, 10)), take.choice(NAMES[:5]), queries))
        elif what == 5:
            said.append(option(hs.OPT_STRUCTURED_REPLY))
        elif what == 6:  # the length that it says is not the one that it has
            said.append(struct.pack(">QII", hs.OPTION_MAGIC, take.byte() & 15, take.choice(LENGTHS)) + bytes(take.byte() * 100))
        else:
            said.append(option(take.byte() & 15, struct.pack(">I", take.choice(LENGTHS)) + take.take(take.byte())))
    return said


def target_handshake(data: bytes) -> None:
    take = Take(data)
    exports, step = take.choice(EXPORTS), take.byte()
    said = b"".join(conversation(take))
    handshake = hs.Handshake(exports)
    fed = answered = 0
    step = max(step, len(said) // 500) if step else len(said) or 1
    for piece in [said[i : i + step] for i in range(0, len(said), step)]:
        handshake.receive_data(piece)
        fed += len(piece)
        while not isinstance(event := handshake.next_event(), hs.NeedData):
            if isinstance(event, hs.Send):
                answered += len(event.data)
                assert len(event.data) <= 4 * PAGE_BYTES, "one option makes us say too much"
            elif isinstance(event, hs.Start):
                assert event.export in exports.values()
                return
            else:
                assert isinstance(event, hs.Rejected)
                return
        assert len(handshake._buffer) <= hs.OPTION_BYTES_MAX + 16 + len(piece), "holds more than an option"
        assert answered <= 20 * (fed + 100)
    handshake.receive_data(b"")
    assert isinstance(handshake.next_event(), hs.Rejected)


def requests(take: Take) -> list[bytes]:
    """What a client says after the handshake. A write's data may be too few or too many."""
    said: list[bytes] = []
    while take and len(said) < 64:
        what = take.byte()
        if what & 7 == 0:
            said.append(take.take(take.byte()))
            continue
        offset = take.choice(OFFSETS) if what & 8 else take.number(3)
        length = take.choice(LENGTHS) if what & 16 else take.number(2)
        command = what >> 5 if what & 7 < 7 else take.number(2)
        flags = take.number(2) if what & 7 == 6 else take.byte() & 0x0F if what & 7 == 5 else 0
        data = b""
        if command == nbd.COMMAND_WRITE:
            data = bytes([take.byte()]) * min(length, 4 * MIB)
            if what & 7 == 4:
                data = data[: take.number(2)]
        said.append(request(command, offset, length, flags=flags, cookie=len(said), data=data))
    return said


def target_transmission(data: bytes) -> None:
    """The parser alone: what it lets through lies inside the disk, and how its input was cut does not matter."""
    take = Take(data)
    kind, step = take.byte(), 1 + take.byte() * 7
    limits: dict[str, Any] = {"size_bytes": take.choice((0, 4096, MIB, (1 << 63) - 512)), "minimum_block_bytes": 512 if kind & 1 else 1}
    limits |= {"read_only": bool(kind & 2), "structured": bool(kind & 4), "allocation": bool(kind & 8)}
    said = b"".join(requests(take))[: 8 * MIB]
    events: list[list[Any]] = []
    for size in (len(said) or 1, max(step, len(said) // 2000)):
        transmission = nbd.Transmission(**limits)
        found: list[Any] = []
        for piece in [said[i : i + size] for i in range(0, len(said), size)]:
            transmission.receive_data(piece)
            while not isinstance(event := transmission.next_event(), nbd.NeedData):
                found.append(event)
                if isinstance(event, nbd.Closed):
                    break
        events.append([event for event in found if not isinstance(event, nbd.Closed)])
    assert events[0] == events[1]
    for event in events[0]:
        if not event.error:
            assert event.command in range(8) and event.offset_bytes + event.length_bytes <= limits["size_bytes"]
            assert event.length_bytes <= nbd.PAYLOAD_BYTES_MAX or event.command not in (nbd.COMMAND_READ, nbd.COMMAND_WRITE)
            assert not (limits["read_only"] and event.command in (nbd.COMMAND_WRITE, nbd.COMMAND_TRIM, nbd.COMMAND_WRITE_ZEROES))


class Served:
    """A new small disk behind the production server, on a socket of its own."""

    def __init__(self, folder: Path) -> None:
        geometry = Geometry(TRANSMISSION_BYTES, 4096, 65536, 65536, 65536)
        self.geometry, self.uuid = geometry, bytes(range(16))
        size = geometry.data_offset_bytes + 24 * geometry.chunk_size_bytes  # eight chunks fewer than the guest could fill
        self.storage = os.memfd_create("storage")
        os.ftruncate(self.storage, size)
        bitmap, table = maps.empty_bitmap(geometry), maps.empty_table(geometry)
        os.pwrite(self.storage, journal.first_page(geometry, self.uuid), journal.page_offset_bytes(geometry, 1))
        for kind, items in ((MapKind.BITMAP, bitmap), (MapKind.TABLE, table)):
            assert items is not None
            pages = maps.encode_pages(geometry, kind, items, self.uuid, 0, maps.map_pages(geometry, kind))
            os.pwrite(self.storage, pages.tobytes(), maps.map_offset_bytes(geometry, kind))
        ring = os.pread(self.storage, geometry.journal_size_bytes, geometry.journal_offset_bytes)
        state, dirty_bitmap, dirty_table = journal.replay(geometry, self.uuid, ring, bitmap, table)
        self.engine = Engine(
            geometry,
            uuid=self.uuid,
            bitmap=bitmap,
            table=table,
            used_slots=maps.check_maps(geometry, bitmap, table, False),
            journal_state=state,
            dirty_bitmap_pages=dirty_bitmap,
            dirty_table_pages=dirty_table,
            storage_size_bytes=size,
            on_full="error",
        )
        self.engine.set_exhausted(True)
        limits = Limits(connection_inflight_bytes=4 * MIB, total_inflight_bytes=8 * MIB, drain_seconds=5)
        self.server = NbdServer(Unix(str(folder / "s")), limits=limits, force_blocking=True)
        self.server.add_export("", self.engine, storage_fd=self.storage, size_bytes=geometry.virtual_size_bytes)
        self.server.start()

    def talk(self, address: str, said: bytes) -> bytes:
        """Everything that the server answers to what a client says before it stops talking."""
        heard, unsent = bytearray(), memoryview(said)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client, contextlib.suppress(ConnectionResetError):
            client.connect(address)
            client.setblocking(False)
            while True:
                readable, writable, _ = select.select([client], [client] if unsent else [], [], HANG_SECONDS)
                assert readable or writable, "the server says nothing more and does not hang up"
                if writable:
                    try:
                        unsent = unsent[client.send(unsent) :]
                    except (BrokenPipeError, ConnectionResetError):
                        unsent = unsent[:0]  # it hung up, and said something before
                    else:
                        if not unsent:
                            client.shutdown(socket.SHUT_WR)
                if readable:
                    piece = client.recv(1 << 20)
                    if not piece:
                        break
                    heard += piece
        return bytes(heard)

    def close(self) -> None:
        """Closes the disk, which must be whole and clean, with what the clients left of it."""
        self.server.close_export("")
        self.server.stop(HANG_SECONDS)
        geometry = self.geometry
        assert self.engine.clean and not self.engine.leaks()
        bitmap = maps.decode_bitmap(geometry, self._region(geometry.bitmap_offset_bytes, geometry.bitmap_size_bytes), self.uuid)
        table = maps.decode_table(geometry, self._region(geometry.table_offset_bytes, geometry.table_size_bytes), self.uuid)
        ring = self._region(geometry.journal_offset_bytes, geometry.journal_size_bytes)
        assert journal.replay(geometry, self.uuid, ring, bitmap, table)[0].clean
        maps.check_maps(geometry, bitmap, table, False)
        os.close(self.storage)

    def _region(self, offset_bytes: int, length_bytes: int) -> bytes:
        return os.pread(self.storage, length_bytes, offset_bytes)


def target_server(data: bytes) -> None:
    """Clients that say anything to the production server, over a real engine; the disk is whole afterwards."""
    take = Take(data)
    kind = take.byte()
    said = [b"\0\0\0\3"]
    if kind & 1:
        said += conversation(take)
    else:
        said += [option(hs.OPT_STRUCTURED_REPLY)] if kind & 2 else []
        said += [meta_context(hs.OPT_SET_META_CONTEXT, "", [hs.ALLOCATION])] if kind & 4 else []
        said += [go(""), *requests(take)]
    with tempfile.TemporaryDirectory(prefix="fvd-fuzz-") as folder, contextlib.closing(Served(Path(folder))) as served:
        address = str(Path(folder) / "s")
        heard = served.talk(address, b"".join(said)[: 16 * MIB])
        assert heard.startswith(hs.Handshake.greeting()), "no greeting"
        # One that never spoke before is served as if nothing had happened.
        calm = b"".join([b"\0\0\0\3", go(""), request(nbd.COMMAND_READ, 0, 4096, cookie=7), request(nbd.COMMAND_DISCONNECT)])
        assert len(served.talk(address, calm)) >= 4096


# --- Words -------------------------------------------------------------------------------------------------------------------


def target_name(data: bytes) -> None:
    text = data.decode(errors="surrogateescape")
    try:
        name = parse_name(text)
    except InvalidArgument:
        return
    assert parse_name(str(name)) == name and name.path.startswith("/")


KEYS = ("schema_version", "verb", "arguments", "result", "error", "event", "end", "heartbeat", "kind", "message", "size_bytes", "volume")
VALUES = (
    b"1",
    b"1.0",
    b"true",
    b"null",
    b"-1",
    b"1e999",
    b"NaN",
    b'"info"',
    b'"no_space"',
    b'"\\ud800"',
    b'"',
    b"9" * 5000,
    b"[" * 2000,
    b"{}",
)


def json_text(take: Take, depth: int = 0) -> bytes:
    """Something like JSON, about what the protocol speaks of."""
    what = take.byte() % 8
    if what == 0:
        return take.take(take.byte() % 16)
    if what <= 3 and depth < 4:
        items = [b'"%s":%s' % (take.choice(KEYS).encode(), json_text(take, depth + 1)) for _ in range(take.byte() % 4)]
        return b"{" + b",".join(items if depth else [b'"schema_version":1', *items]) + b"}"
    if what == 4:
        return b"[" + b",".join(json_text(take, depth + 1) for _ in range(take.byte() % 3 if depth < 4 else 0)) + b"]"
    if what == 5:
        return b"[" * (take.byte() * 8) + b"]" * (take.byte() * 8)
    return bytes(take.choice(VALUES))


def target_control(data: bytes) -> None:
    """Lines at a control socket, in both directions."""
    take = Take(data)
    step = 1 + take.byte()
    said: list[bytes] = []
    while take:
        said.append(json_text(take) + b"\n" * (take.byte() & 1))
    text = b"".join(said)[: 64 << 10]
    lines = protocol.Lines(4096)
    whole: list[bytes] = []
    with contextlib.suppress(protocol.ProtocolError):
        for i in range(0, len(text), step):
            whole += lines.feed(text[i : i + step])
            assert len(lines._held) <= 4096
    for line in (*whole, *said):
        for decode in (protocol.decode_request, protocol.decode_answer, protocol.decode_streamed):
            try:
                found = decode(line)
            except FvdError as error:
                assert protocol.encode_error(error).endswith(b"\n")
                continue
            if isinstance(found, protocol.Request):
                assert protocol.decode_request(protocol.encode_request(found)).verb == found.verb
                with contextlib.suppress(InvalidArgument):
                    protocol.check_arguments(found.arguments, {"size_bytes": int, "volume": str, "end": bool})


TARGETS: dict[str, Callable[[bytes], None]] = {
    name.removeprefix("target_"): function for name, function in sorted(globals().items()) if name.startswith("target_")
}
