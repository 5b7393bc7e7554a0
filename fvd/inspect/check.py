# SPDX-License-Identifier: Apache-2.0
"""Is a disk whole? Reads everything that describes it, lists what is wrong, and changes nothing.

Opening stops at the first fault; this goes on as far as the rest still makes sense.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fvd.base.base import open_base
from fvd.base.rights import namer_of, rights_for
from fvd.device.node import Node, aligned_buffer
from fvd.disk.loading import READ_BYTES, check_metadata_fits, check_slots_fit, covers_base
from fvd.disk.opening import OpenVolume, loss_after, recover
from fvd.disk.pending import LOSSES, Left
from fvd.disk.view import Target, View, look, open_to_look
from fvd.errors import Corrupt, DeviceError, FvdError, NotFound, Unsupported
from fvd.format.geometry import PAGE_BYTES
from fvd.format.journal import replay
from fvd.format.maps import Bitmap, MapKind, Table, check_maps, decode_pages, empty_bitmap, empty_table, map_offset_bytes, map_pages
from fvd.format.superblock import LossRecord, Superblock, decode
from fvd.volume.memory import enough_memory
from fvd.volume.name import VolumeName, parse_name
from fvd.volume.superblocks import Pages, read_superblock, read_superblock_slots, state_of

Progress = Callable[[int, int], None]
LISTED_CELLS = 20  # of each map: a lost region must not fill the screen


@dataclass
class Findings:
    """What a check found. A disk without errors opens; warnings are worth knowing."""

    volume: str
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    clean: bool = False
    mapped_chunks: int = 0
    mapped_bytes: int = 0
    commits_replayed: int = 0
    base_released: bool = False  # all that the base has is in the disk: it may be gone


def check(target: Target, *, progress: Progress | None = None, base_allow: Sequence[str] = ()) -> Findings:
    """Checks a closed disk, or (in its loop's thread) an open one: its maps in memory, and the superblocks on storage. `base_allow`: bases
    that are opened whoever has named them (`rights.py`).

    Raises NotFound (no fvd disk), InUse, Unsupported, PermissionDenied; what is damaged is in the report.
    """
    if isinstance(target, OpenVolume):
        return _check_open(target)
    name = parse_name(target)
    with open_to_look(name) as (place, node):
        report = check_node(node, name, progress=progress)
        _check_log(node, name, report)
        return report if report.base_released else _check_base(node, report, place.base_marks, base_allow)


def _check_open(volume: OpenVolume) -> Findings:
    report = Findings(str(volume.name))
    _check_superblocks(volume.node, volume.superblock, report)
    view = look(volume)
    try:
        used = check_maps(view.geometry, view.bitmap, view.table, view.superblock.base is not None)
        check_slots_fit(view.geometry, used, volume.node.size_bytes())
    except (Corrupt, DeviceError) as error:
        report.errors.append(str(error))
    if volume.stopped:
        report.errors.append(volume.stopped)
    elif volume.engine.failed_errno:
        report.errors.append("a flush or journal write failed: writes are refused until the disk is closed and opened again")
    _tell_loss(volume.loss, report)
    _count(view, report)
    return report


def check_node(node: Pages, name: VolumeName, *, progress: Progress | None = None) -> Findings:
    """Checks all that describes a closed disk in an open node, but not whether its base is there."""
    report = Findings(str(name))
    try:
        superblock = read_superblock(node)
    except Corrupt as error:
        report.errors.append(str(error))
        return report
    geometry = superblock.geometry
    _check_superblocks(node, superblock, report)
    try:
        check_metadata_fits(geometry, node.size_bytes())
    except Corrupt as error:
        report.errors.append(str(error))
        return report
    with enough_memory(geometry):
        _check_maps(node, name, superblock, report, progress)
    return report


def _check_maps(node: Pages, name: VolumeName, superblock: Superblock, report: Findings, progress: Progress | None) -> None:
    geometry = superblock.geometry
    bitmap, table = empty_bitmap(geometry), empty_table(geometry)
    total_bytes = geometry.bitmap_size_bytes + geometry.table_size_bytes + geometry.journal_size_bytes
    meter = _Meter(progress, total_bytes)
    _check_map(node, superblock, MapKind.BITMAP, bitmap, report, meter)
    if table is not None:
        _check_map(node, superblock, MapKind.TABLE, table, report, meter)
    _check_contents(node, superblock, bitmap, table, report)
    meter.add(geometry.journal_size_bytes)
    _count(View(name, superblock, node.size_bytes(), bitmap, table, report.clean, open=False), report)


def _check_log(node: Node, name: VolumeName, report: Findings) -> None:
    """What a server that died has left: a disk that waits for its log is not clean."""
    state = state_of(node)
    if report.errors or not isinstance(state, Superblock):
        return
    if state.log is None:
        _tell_loss(state.loss, report)
        return
    report.clean = False
    try:
        disk, left = recover(node, str(name), read_only=True, discard_pending=False, notices=report.warnings)
    except FvdError as error:
        report.errors.append(str(error))
        return
    if left.pending_log is not None and not left.pending_log.log.failed_errno:
        changes = len(left.pending_log.log.latest())
        if changes:
            report.warnings.append(f"its server died: {changes} changes of the maps are in the log {left.path}; the next open commits them")
    if left.kind is not Left.MISSING:
        _tell_loss(loss_after(left, disk.superblock), report)


def _tell_loss(loss: LossRecord | None, report: Findings) -> None:
    if loss is not None:
        report.warnings.append(f"{LOSSES[loss.reason]}; fvd-lv acknowledge says that you have seen it")


def _check_base(node: Node, report: Findings, marks: frozenset[str] | None, allow: Sequence[str]) -> Findings:
    """Whether the base of a disk that has a readable superblock can be opened."""
    state = state_of(node)
    if isinstance(state, Superblock) and state.base is not None:
        try:
            user = rights_for(state.base.locator, namer_of(report.volume, node, marks, state.base), allow)
            open_base(state.base, node.identity, user=user).close()
        except FvdError as error:
            report.errors.append(str(error))
    return report


class _Meter:
    def __init__(self, progress: Progress | None, total_bytes: int) -> None:
        self._progress, self._total, self._done = progress, total_bytes, 0

    def add(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)


def _check_superblocks(node: Pages, superblock: Superblock, report: Findings) -> None:
    """One good copy is enough to open; that the other is lost is worth a warning."""
    slots = read_superblock_slots(node)
    for slot in (0, 1) if slots is not None else ():
        if slots is None or slot == superblock.slot:
            continue
        try:
            if decode(slots[slot], slot).uuid != superblock.uuid:
                report.warnings.append(f"superblock slot {slot} belongs to another disk; the next open for writing replaces it")
        except (NotFound, Corrupt) as error:
            report.warnings.append(f"{error}; the next open for writing replaces it")
        except Unsupported as error:
            report.warnings.append(str(error))


def _check_map(node: Pages, superblock: Superblock, kind: MapKind, items: Bitmap | Table, report: Findings, meter: _Meter) -> None:
    """Reads a map; of a batch with a bad cell each page is tried by itself, so that every one is named."""
    geometry = superblock.geometry
    pages = map_pages(geometry, kind)
    buffer = aligned_buffer(min(READ_BYTES, pages * PAGE_BYTES))
    bad = 0
    for first in range(0, pages, READ_BYTES // PAGE_BYTES):
        raw = buffer[: (pages - first) * PAGE_BYTES]
        try:
            node.pread_into(map_offset_bytes(geometry, kind) + first * PAGE_BYTES, raw)
            decode_pages(geometry, kind, raw, superblock.uuid, items, first)
        except DeviceError as error:
            report.errors.append(str(error))
        except Corrupt:
            for page in range(len(raw) // PAGE_BYTES):
                try:
                    piece = raw[page * PAGE_BYTES : (page + 1) * PAGE_BYTES]
                    decode_pages(geometry, kind, piece, superblock.uuid, items, first + page)
                except Corrupt as error:
                    bad += 1
                    if bad <= LISTED_CELLS:
                        report.errors.append(str(error))
        meter.add(len(raw))
    if bad > LISTED_CELLS:
        report.errors.append(f"{kind.name.lower()}: {bad - LISTED_CELLS} more pages have damaged cells")


def _check_contents(node: Pages, superblock: Superblock, bitmap: Bitmap, table: Table | None, report: Findings) -> None:
    """The journal, and what must be true of the maps after it. After damage above, only what the journal itself says counts."""
    geometry = superblock.geometry
    damaged = bool(report.errors)
    try:
        ring = node.pread(geometry.journal_offset_bytes, geometry.journal_size_bytes)
        state, _, _ = replay(geometry, superblock.uuid, ring, bitmap, table)
        report.clean = state.clean
        report.commits_replayed = state.commits_replayed
        used = check_maps(geometry, bitmap, table, superblock.base is not None)
        check_slots_fit(geometry, used, node.size_bytes())
    except (Corrupt, DeviceError) as error:
        prefix = "after the damage above: " if damaged else ""
        report.errors.append(f"{prefix}{error}")


def _count(view: View, report: Findings) -> None:
    geometry = view.geometry
    report.clean = view.clean
    report.mapped_chunks = view.mapped_chunks
    # Of damaged maps nothing follows.
    report.base_released = not report.errors and covers_base(view.superblock, view.bitmap)
    if view.table is None:
        report.mapped_bytes = min(view.present_blocks * geometry.block_size_bytes, geometry.virtual_size_bytes)
    else:
        report.mapped_bytes = report.mapped_chunks * geometry.chunk_size_bytes
