# SPDX-License-Identifier: Apache-2.0
"""The verbs on a volume, by its name. On a served volume they go to the process that serves it, through its control socket.

A volume is ``VG/LV``, ``file:PATH`` or a block device. Sizes are bytes, or text such as "100G" (GiB). Every verb raises InvalidArgument for
a name or value that can never work, PermissionDenied, DeviceError (an I/O error), Corrupt (a damaged disk) and Unsupported (one of a later
version). A verb that is interrupted (KeyboardInterrupt, or whatever a signal handler raises) leaves no claim behind: what changes something
is wholly done, or undone, or was left between two steps where running it again goes on; what only looks is left at once. Nothing
of a verb comes after its end.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from fvd._lifetime import in_caller, whole
from fvd.api.copying import allowed_bases
from fvd.api.types import CheckReport, Extended, Extent, Info, Map, Provisioned, from_json, info_from_json
from fvd.errors import InUse, InvalidArgument, quoted
from fvd.modes import BaseFormat, Layout, Placement
from fvd.units import parse_size

if TYPE_CHECKING:
    from fvd.disk.view import View
    from fvd.inspect.map import MapExtent

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)
# A served disk answers a map in pieces, so that no answer grows without bounds.
MAP_PIECE_EXTENTS = 100_000


def provision(
    volume: str,
    size: int | str | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    base_format: BaseFormat | None = None,
    copy_on_read: bool = False,
    prefetch: bool = False,
    truncate_base: bool = False,
    layout: Layout = "compact",
    block_size: int | str = "64K",
    chunk_size: int | str = "1M",
    journal_size: int | str = "16M",
    grow_step: int | str = "5G",
    placement: Placement = "append",
    max_overcommit: float | None = None,
    base_allow: Sequence[str] = (),
    force: bool = False,
    progress: Progress | None = None,
) -> Provisioned:
    """Make a virtual disk of ``size`` in a volume. The same again is fine (``created`` is False then), interrupted or not.

    ``size``: None takes the base's, rounded up to 512 bytes; a disk smaller than its base is refused unless ``truncate_base``.
    ``base``: what shows through where the disk has nothing of its own: the path of a raw file or block device, an NBD URI, or, with
    ``base_format``, an image or URI that QEMU reads. ``copy_on_read`` and ``prefetch`` are what each open does that does not say otherwise:
    copy what is read from the base; copy all of it in the background. ``placement``: where new chunks go; ``append``: after the others;
    ``spread``: as in a raw disk, as far as the present storage allows (the raw layout has no choice). ``max_overcommit``: refuse a disk
    with which the disks of its volume group, grown as far as they may, would need more than so many times what the group can give.
    ``base_allow``: bases that root opens with his own rights, though their names are a user's to change (docs/base.md).
    ``force`` overwrites foreign signatures and contents, never a disk or a volume in use. Raises Conflict (other parameters, or something
    else is there), InUse, NoSpace, NotFound (no such group, device or base).
    """
    from fvd.disk.provision import provision as make
    from fvd.format.geometry import Layout as LayoutCode
    from fvd.format.geometry import Placement as PlacementCode

    work = partial(
        make,
        volume,
        virtual_size_bytes=None if size is None else parse_size(size),
        truncate_base=truncate_base,
        block_size_bytes=parse_size(block_size),
        chunk_size_bytes=parse_size(chunk_size),
        journal_size_bytes=parse_size(journal_size),
        grow_step_bytes=parse_size(grow_step),
        layout=_choice("layout", layout, LayoutCode),
        placement=_choice("placement", placement, PlacementCode),
        base=base,
        base_format=base_format,
        copy_on_read=copy_on_read,
        prefetch=prefetch,
        max_overcommit=max_overcommit,
        base_allow=allowed_bases(base_allow),
        force=force,
        progress=None if progress is None else in_caller(progress),
    )
    made = whole(work)
    known = info(str(made.name)) if made.view is None else closed_info(made.view)
    return Provisioned(**{**vars(known), "created": made.created})


def extend(volume: str, by: int | str | None = None) -> Extended:
    """Put more storage under a disk (default: its grow step), at most what it can ever use. The virtual size stays as it is.

    Raises NotFound, InUse, NoSpace, Unsupported (a device of fixed size), ReadOnly (served read-only), Timeout.
    """
    from fvd.api import remote
    from fvd.disk.extending import extend as extend_closed
    from fvd.volume.name import parse_name

    name = parse_name(volume)
    by_bytes = None if by is None else parse_size(by)
    if by_bytes == 0:
        raise InvalidArgument(f"{name}: cannot extend by nothing; name a size above 0")
    answer = remote.ask(name, "extend", **({} if by_bytes is None else {"by_bytes": by_bytes}))
    if answer is not remote.NOT_SERVED:
        return from_json(Extended, answer)
    grown = whole(lambda: extend_closed(name, by_bytes))
    return Extended(str(grown.name), grown.storage_size_bytes, grown.added_bytes)


def acknowledge(volume: str) -> bool:
    """An administrator has seen that acknowledged writes of a disk may be gone (``info(volume).possible_loss``): it is no longer reported.

    False: there was nothing to see, which is fine. Raises NotFound, InUse, ReadOnly (served read-only), Conflict (its last server did not
    close it: serve it first).
    """
    from fvd.api import remote
    from fvd.disk.acknowledging import acknowledge as acknowledge_closed
    from fvd.volume.name import parse_name

    name = parse_name(volume)
    answer = remote.ask(name, "acknowledge")
    return whole(lambda: acknowledge_closed(name)) if answer is remote.NOT_SERVED else bool(answer["acknowledged"])


def info(volume: str) -> Info:
    """What a disk is and how full. Raises NotFound, InUse (someone has it open without serving it)."""
    from fvd.api import remote
    from fvd.disk.view import look
    from fvd.volume.name import parse_name

    name = parse_name(volume)
    answer = remote.ask(name, "info")
    return closed_info(whole(lambda: look(name))) if answer is remote.NOT_SERVED else info_from_json(answer)


def closed_info(view: View) -> Info:
    """What a closed disk is and how full."""
    from fvd.api.copying import info_of_closed
    from fvd.device.nbd_devices import path_of
    from fvd.inspect.info import info as info_of

    known = info_of(view) | info_of_closed(view)
    return info_from_json({**known, "attached": path_of(known["uuid"])})


def map(volume: str, *, offset: int | str = 0, length: int | str | None = None) -> Map:
    """Which part of the disk is where. Of a served disk that is being written, parts of the answer may be of different moments.

    Raises NotFound, InUse, InvalidArgument (a part that is not in the disk).
    """
    from fvd.api import remote
    from fvd.disk.view import look
    from fvd.volume.name import parse_name

    name = parse_name(volume)
    start, length_bytes = parse_size(offset), None if length is None else parse_size(length)
    pieces: list[Map] = []
    while True:
        at = pieces[-1].offset + pieces[-1].length if pieces else start
        arguments = {"offset": at} | ({} if length_bytes is None else {"length": start + length_bytes - at})
        answer = remote.ask(name, "map", **arguments)
        if answer is remote.NOT_SERVED:
            return map_of(whole(lambda: look(name)), start, length_bytes)
        pieces.append(map_from_json(answer))
        if not answer["more"]:
            break
    last = pieces[-1]
    return Map(
        last.volume,
        start,
        last.offset + last.length - start,
        last.chunk_size,
        last.data_offset,
        last.storage_size,
        _joined([extent for piece in pieces for extent in piece.extents]),
    )


def check(volume: str, *, progress: Progress | None = None, base_allow: Sequence[str] = ()) -> CheckReport:
    """Is the metadata whole? Changes nothing; damage is in the report, not raised. Raises NotFound, InUse.

    ``base_allow``: bases that root opens with his own rights, whoever has named them (docs/base.md).
    """
    from fvd.api import remote
    from fvd.inspect.check import check as check_closed
    from fvd.volume.name import parse_name

    name = parse_name(volume)
    allow = allowed_bases(base_allow)
    answer = remote.ask(name, "check")
    if answer is not remote.NOT_SERVED:
        return from_json(CheckReport, answer)
    told = None if progress is None else in_caller(progress)
    return from_json(CheckReport, asdict(whole(lambda: check_closed(name, progress=told, base_allow=allow))))


def dump(volume: str) -> dict[str, Any]:
    """The metadata as it lies on the storage, damaged or not, as plain values. Raises NotFound, InUse (of a disk that is served, the
    storage is behind the memory)."""
    from fvd.inspect.dump import dump as dump_closed

    return whole(lambda: dump_closed(volume))


def remove(volume: str, *, wipe: bool = False, progress: Progress | None = None) -> bool:
    """End a disk: a file is deleted, on a block device the superblocks are wiped. False: there was none, which is fine.

    `wipe`: everything that it stored is made zeros and read back before its storage is given back, which takes as long as that takes; with
    the tag fvd.wipe on the volume group always. Interrupted, it can be run again. `progress` is called with bytes done and bytes in all.
    Raises InUse, Conflict (the volume holds something that is not an fvd disk).
    """
    from fvd.api import remote
    from fvd.disk.removing import remove as remove_closed
    from fvd.volume.name import parse_name

    name = parse_name(volume)
    try:
        told = None if progress is None else in_caller(progress)
        return whole(lambda: remove_closed(name, wipe=wipe, progress=told))
    except InUse as error:
        served = remote.ask(name, "info")
        if served is remote.NOT_SERVED:
            raise
        raise InUse(f"{name} is being served at {served['uri'] or served.get('vhost_user')}; stop that first") from error


# --- Plain values of maps, for both ends of a control socket ---------------------------------------------------------------------


def map_of(view: View, offset: int, length: int | None, limit: int | None = None) -> Map:
    """The map of a part of a disk; with a limit, of its beginning only."""
    from fvd.inspect.map import extents

    pieces: list[Extent] = []
    for extent in extents(view, offset, length):
        if limit is not None and len(pieces) >= limit:
            break
        pieces.append(_extent(extent))
    end = pieces[-1].start + pieces[-1].length if pieces else offset
    geometry = view.geometry
    return Map(str(view.name), offset, end - offset, geometry.chunk_size_bytes, geometry.data_offset_bytes, view.storage_size_bytes, pieces)


def map_to_json(part: Map, more: bool) -> dict[str, Any]:
    """Extents as rows: a large map has many."""
    rows = [[extent.start, extent.length, extent.state, extent.storage_offset] for extent in part.extents]
    return {**vars(part), "extents": rows, "more": more}


def map_from_json(answer: dict[str, Any]) -> Map:
    return from_json(Map, {**answer, "extents": [Extent(*row) for row in answer["extents"]]})


def _extent(extent: MapExtent) -> Extent:
    return Extent(extent.start, extent.length, extent.state, extent.storage_offset)


def _joined(pieces: list[Extent]) -> list[Extent]:
    """Extents that were cut only because an answer ended there, put together."""
    joined: list[Extent] = []
    for extent in pieces:
        before = joined[-1] if joined else None
        if before is not None and before.state == extent.state:
            continues = before.storage_offset is None or before.storage_offset + before.length == extent.storage_offset
            if continues:
                joined[-1] = Extent(before.start, before.length + extent.length, before.state, before.storage_offset)
                continue
        joined.append(extent)
    return joined


def _choice(what: str, name: str, codes: Any) -> Any:
    try:
        return codes[name.upper()]
    except KeyError:
        raise InvalidArgument(f"{what} {quoted(name)}: choose {' or '.join(code.name.lower() for code in codes)}") from None
