# SPDX-License-Identifier: Apache-2.0
"""A disk's metadata as it lies on storage, for whoever must understand it. Interprets as little as it can and shows damaged things too.

Field names are those of FORMAT.md. Never modifies. Only for closed disks: of an open one the storage is behind the memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fvd.device import surviving
from fvd.device.claim import Ownership, claim
from fvd.device.node import Node, open_node
from fvd.disk import pending
from fvd.errors import Corrupt, DeviceError, FvdError
from fvd.format.geometry import CELL_BYTES, CELLS_PER_PAGE, ENTRIES_PER_CELL, PAGE_BYTES, WORDS_PER_CELL
from fvd.format.journal import iter_commits
from fvd.format.maps import CELL, EMPTY, MapKind, decode_pages, empty_bitmap, empty_table, map_offset_bytes, map_pages
from fvd.format.pending import HEADER, HEADER_BYTES
from fvd.format.pending import MAGIC as LOG_MAGIC
from fvd.format.superblock import MAGIC, SUPERBLOCK, Superblock, decode
from fvd.storage.provider import provider_for
from fvd.volume.name import VolumeName, parse_name
from fvd.volume.superblocks import read_superblock, read_superblock_slots, uuid_text

SCHEMA_VERSION = 1
LISTED_PAGES = 20  # that are damaged, of each map


def dump(name: str | VolumeName, *, cells: bool = True) -> dict[str, Any]:
    """Superblocks, journal commits, and the cells of the maps that have content or are damaged, as plain values for JSON.

    Raises NotFound (no such volume, or nothing of fvd in it), InUse, Unsupported, PermissionDenied, DeviceError.
    """
    volume = parse_name(name)
    provider = provider_for(volume)
    with (
        provider.attach(volume, looking=True) as place,
        claim(place.path, Ownership.READER) as held,
        open_node(place.path, read_only=True) as node,
    ):
        held.check_covers(node)
        return _dump(volume, node, cells)


def _dump(volume: VolumeName, node: Node, cells: bool) -> dict[str, Any]:
    answer: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "volume": str(volume), "storage_size": node.size_bytes()}
    slots = read_superblock_slots(node)
    answer["superblocks"] = [] if slots is None else [_superblock(page, slot) for slot, page in enumerate(slots)]
    try:
        superblock = read_superblock(node)
    except Corrupt as error:
        return answer | {"error": str(error)}
    answer["pending_log"] = _log(node, superblock)
    geometry = superblock.geometry
    try:
        ring = node.pread(geometry.journal_offset_bytes, geometry.journal_size_bytes)
        answer["journal"] = [
            {
                "sequence": commit.sequence,
                "parts": commit.parts,
                "previous": commit.previous,
                "tail": commit.tail,
                "map_hash": f"{commit.map_hash:#018x}",
                "clean": commit.clean,
                "complete": commit.complete,
                "words": [[int(index), f"{int(value):#018x}"] for index, value in commit.words.tolist()],
                "entries": [[int(index), None if value == EMPTY else int(value)] for index, value in commit.entries.tolist()],
            }
            for commit in iter_commits(geometry, superblock.uuid, ring)
        ]
        if cells:
            answer["bitmap_cells"] = _cells(node, superblock, MapKind.BITMAP)
            answer["table_cells"] = _cells(node, superblock, MapKind.TABLE)
    except DeviceError as error:
        answer["error"] = str(error)
    return answer


def _superblock(page: bytes, slot: int) -> dict[str, Any]:
    """Every field of a slot, and whether it decodes."""
    values: dict[str, Any] = {"slot": slot}
    try:
        decode(page, slot)
        values["valid"] = True
    except FvdError as error:
        values |= {"valid": False, "problem": str(error)}
    if not page.startswith(MAGIC):
        return values
    row = np.frombuffer(page, SUPERBLOCK)[0]
    for name in SUPERBLOCK.names or ():
        value = row[name]
        if name == "uuid":
            values[name] = uuid_text(value.tobytes())
        elif name == "checksum" or name.endswith("_features"):
            values[name] = f"{int(value):#x}"
        elif name in ("base_locator", "log_path"):
            size = min(int(row[f"{name}_size"]), len(value.tobytes()))
            values[name] = value.tobytes()[:size].decode(errors="replace")
        elif name in ("log_boot", "log_host"):
            values[name] = value.tobytes().hex()
        elif name == "magic":
            values[name] = value.tobytes().decode("latin-1")
        elif not name.startswith("reserved"):
            values[name] = int(value)
    return values


def _log(node: Node, superblock: Superblock) -> dict[str, Any] | None:
    """The log that the superblock names: whether it is believed, and its header, believed or not. None: it names none."""
    record = superblock.log
    if record is None:
        return None
    answer: dict[str, Any] = {"path": record.path}
    if isinstance(node, Node):  # of anything else nobody knows what place it is
        left = pending.find(superblock, surviving.lasting_place(node), surviving.host_id(), surviving.boot_id())
        answer["state"] = left.kind.value
        if left.problem:
            answer["problem"] = left.problem
        if left.pending_log is not None:
            left.pending_log.close()
    try:
        memory = surviving.find(record.path)
    except FvdError as error:
        return answer | {"valid": False, "problem": str(error)}
    try:
        return answer | _log_header(bytes(memory.buffer[:HEADER_BYTES]))
    finally:
        memory.close()


def _log_header(page: bytes) -> dict[str, Any]:
    if len(page) < HEADER_BYTES or not page.startswith(LOG_MAGIC):
        return {"valid": False}
    row = np.frombuffer(page, HEADER)[0]
    values: dict[str, Any] = {}
    for name in HEADER.names or ():
        value = row[name]
        if name == "areas":
            values[name] = [{"base_hash": f"{int(area['base_hash']):#018x}", "count": int(area["count"])} for area in value]
        elif name == "uuid":
            values[name] = uuid_text(value.tobytes())
        elif name in ("boot", "host"):
            values[name] = value.tobytes().hex()
        elif name in ("log_magic", "identity"):
            values[name] = value.tobytes().rstrip(b"\0").decode(errors="replace")
        elif name == "log_checksum":
            values[name] = f"{int(value):#x}"
        elif not name.endswith("reserved"):
            values[name] = int(value)
    return values


def _cells(node: Node, superblock: Superblock, kind: MapKind) -> list[dict[str, Any]]:
    """Cells with content, and damaged ones, a page at a time: what one page says must not hide another.

    Of damaged pages only the first are listed: a volume whose maps are full of something else must not fill the memory.
    """
    geometry = superblock.geometry
    whole = empty_bitmap(geometry) if kind is MapKind.BITMAP else empty_table(geometry)
    if whole is None:
        return []
    listed: list[dict[str, Any]] = []
    damaged = 0
    initial = 0 if kind is MapKind.BITMAP else EMPTY
    per_cell = WORDS_PER_CELL if kind is MapKind.BITMAP else ENTRIES_PER_CELL
    for page in range(map_pages(geometry, kind)):
        offset = map_offset_bytes(geometry, kind) + page * PAGE_BYTES
        raw = node.pread(offset, PAGE_BYTES)
        try:
            decode_pages(geometry, kind, raw, superblock.uuid, whole, page)
            problem = None
        except Corrupt as error:
            problem = str(error)
            damaged += 1
            if damaged > LISTED_PAGES:
                continue
        for row, number in zip(np.frombuffer(raw, CELL), range(page * CELLS_PER_PAGE, (page + 1) * CELLS_PER_PAGE), strict=True):
            payload = np.frombuffer(row["cell_payload"].tobytes(), np.uint64 if kind is MapKind.BITMAP else np.uint32)[:per_cell]
            filled = np.flatnonzero(payload != initial)
            if filled.size == 0 and problem is None:
                continue
            cell: dict[str, Any] = {
                "offset": map_offset_bytes(geometry, kind) + number * CELL_BYTES,
                "cell_index": int(row["cell_index"]),
                "cell_kind": int(row["cell_kind"]),
                "cell_checksum": f"{int(row['cell_checksum']):#010x}",
                "items": [[number * per_cell + int(index), _item(kind, int(payload[index]))] for index in filled.tolist()],
            }
            if problem is not None:
                cell["problem"] = problem
            listed.append(cell)
    if damaged > LISTED_PAGES:
        listed.append({"problem": f"{damaged - LISTED_PAGES} more pages have damaged cells"})
    return listed


def _item(kind: MapKind, value: int) -> int | str:
    return f"{value:#018x}" if kind is MapKind.BITMAP else value
