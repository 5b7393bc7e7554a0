# SPDX-License-Identifier: Apache-2.0
"""Makes a disk in a volume, so that at every moment there is either no disk or a whole one (FORMAT.md section 8). Idempotent by name.

What happens to the name (a hidden file, a device) is the provider's; what a superblock or map page looks like is the format's.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fvd._lifetime import checkpoint
from fvd.base.base import examine_base, open_base
from fvd.base.rights import ROOT, mark_of, rights_for
from fvd.base.sparse import Punch, punch_places, zero_blocks
from fvd.device import names
from fvd.device.holes import punch_hole
from fvd.device.node import Identity, Node, open_node
from fvd.device.signature import find_signatures, wipe_signatures
from fvd.device.udev import known_content, udev_is_running
from fvd.disk.view import View, view_of
from fvd.errors import Conflict, Corrupt, FvdError, InvalidArgument, NoSpace, NotFound
from fvd.format.geometry import PAGE_BYTES, SECTOR_BYTES, VIRTUAL_SIZE_BYTES_MIN, Geometry, Layout, Placement
from fvd.format.journal import first_page, page_offset_bytes
from fvd.format.maps import Bitmap, MapKind, Table, empty_bitmap, empty_table, encode_pages, map_hash, map_offset_bytes, map_pages
from fvd.format.superblock import COPY_ON_READ, PREFETCH, BaseReference, Superblock
from fvd.storage.interfaces import Building, Contents, Plan, Presence
from fvd.storage.overcommit import parse_limit
from fvd.storage.policy import initial_size_bytes, least_size_bytes
from fvd.storage.provider import provider_for
from fvd.units import GIB, KIB, MIB, format_size
from fvd.volume.memory import enough_memory
from fvd.volume.name import VolumeKind, VolumeName, parse_name
from fvd.volume.superblocks import Pages, holds_remains, state_of, write_superblock
from fvd.volume.tags import TAG_DISK

HEADER_BYTES = MIB  # both superblock slots lie in it; a reader ignores the rest
BATCH_BYTES = 4 * MIB

Progress = Callable[[int, int], None]  # (bytes written, bytes in all)


@dataclass(frozen=True)
class ProvisionedDisk:
    """The disk that a provision made or found."""

    name: VolumeName
    superblock: Superblock
    created: bool  # False: it was there before, with the same parameters
    storage_size_bytes: int
    view: View | None = None  # of a disk that was made


def provision(
    name: str | VolumeName,
    *,
    virtual_size_bytes: int | None,
    block_size_bytes: int = 64 * KIB,
    chunk_size_bytes: int = MIB,
    journal_size_bytes: int = 16 * MIB,
    grow_step_bytes: int = 5 * GIB,
    layout: Layout = Layout.COMPACT,
    placement: Placement = Placement.APPEND,
    base: str | os.PathLike[str] | None = None,
    base_format: str | None = None,
    copy_on_read: bool = False,
    prefetch: bool = False,
    truncate_base: bool = False,
    max_overcommit: float | None = None,
    base_allow: Sequence[str] = (),
    force: bool = False,
    progress: Progress | None = None,
    new_uuid: Callable[[], bytes] = lambda: uuid.uuid4().bytes,
    clock: Callable[[], float] = time.time,
) -> ProvisionedDisk:
    """Makes the disk, or finds that it is there already with these parameters. Can be run again whenever it was interrupted.

    `force` overwrites foreign signatures and contents and a damaged superblock; never a volume in use, never a valid fvd disk.
    `max_overcommit` refuses a disk that would take its volume group beyond that ratio (`overcommit.py`).
    `base`: a path or URI, `base_format`: see `examine_base`; what the base is known to have no data in becomes zeros of the disk's own.
    `base_allow`: bases that root opens with his own rights though their names are a user's to change (`rights.py`).
    `virtual_size_bytes` None: the base's, rounded up to a sector. `truncate_base`: a new disk may be smaller than its base.
    `copy_on_read` and `prefetch` are what opens of this disk do by default.
    Raises InvalidArgument, Conflict (naming what differs, or what is there), Corrupt, InUse, NoSpace, NotFound, PermissionDenied,
    Unsupported (a base that cannot be one), Timeout (its server does not answer), DeviceError.
    """
    volume = parse_name(name)
    if virtual_size_bytes is None:
        virtual_size_bytes = _size_over(volume, base, base_format, base_allow)
    geometry = Geometry(
        virtual_size_bytes=virtual_size_bytes,
        block_size_bytes=block_size_bytes,
        chunk_size_bytes=chunk_size_bytes,
        journal_size_bytes=journal_size_bytes,
        grow_step_bytes=grow_step_bytes,
        layout=layout,
        placement=placement,
    )
    plan = _plan_of(volume, geometry, parse_limit(max_overcommit))
    if base is None and (base_format is not None or copy_on_read or prefetch):
        raise InvalidArgument(f"{volume}: a base format, copy-on-read and prefetching need a base; name one, or leave them out")

    def examine(place: Identity | None) -> BaseReference | None:
        return None if base is None else examine_base(base, base_format, place, allow=base_allow)

    there = _look_at_place(volume, force, examine)
    features = COPY_ON_READ * copy_on_read | PREFETCH * prefetch
    wanted = _Wanted(volume, geometry, there.reference, features, base_allow, force)
    if there.superblock is not None:
        return _same_disk(wanted, there.superblock, there.size_bytes)
    if there.reference is not None:
        _check_size(volume, virtual_size_bytes, there.reference, truncate_base)
        plan = replace(plan, base_mark=mark_of(there.reference))
    superblock = Superblock(geometry, new_uuid(), 2, wanted.base, int(clock()), compatible_features=features)
    return _build(superblock, plan, wanted, replaces=there.replaces, progress=progress)


@dataclass(frozen=True)
class _Wanted:
    """The disk that is asked for."""

    volume: VolumeName
    geometry: Geometry
    base: BaseReference | None
    features: int  # compatible ones
    base_allow: Sequence[str]
    force: bool


@dataclass(frozen=True)
class _Place:
    """What the volume's place held before anything was built there."""

    reference: BaseReference | None  # the base that is asked for, as it is now
    superblock: Superblock | None = None  # of the disk that is there
    size_bytes: int = 0  # of the same
    replaces: bool = False  # something is there that gives way to the new disk


def _plan_of(volume: VolumeName, geometry: Geometry, max_overcommit: float | None) -> Plan:
    if max_overcommit is not None and volume.kind is not VolumeKind.LVM:
        raise InvalidArgument(f"{volume} is in no volume group, so there is no over-commit to limit")
    return Plan(
        size_bytes=initial_size_bytes(geometry),
        virtual_size_bytes=geometry.virtual_size_bytes,
        most_bytes=geometry.max_storage_size_bytes,
        grow_step_bytes=geometry.grow_step_bytes,
        max_overcommit=max_overcommit,
    )


def _look_at_place(volume: VolumeName, force: bool, examine: Callable[[Identity | None], BaseReference | None]) -> _Place:
    """Also examines the base, which must not be what the volume lies on. Raises if what is there may not be overwritten."""
    provider = provider_for(volume)
    if provider.presence(volume) is not Presence.PRESENT:
        if provider.fixed_size:
            raise NotFound(f"{volume} does not exist; check the name")
        return _Place(examine(None))
    with provider.attach(volume) as place, open_node(place.path, read_only=True) as node:
        # Not claimed: a superblock may be read while the disk is served, for it changes in one page at a time.
        reference = examine(node.identity)
        state = state_of(node)
        if isinstance(state, Superblock):
            return _Place(reference, state, node.size_bytes())
        if provider.in_place:  # looked at again when it is claimed
            return _Place(reference)
        _refuse_contents(node, volume, state, force)
        return _Place(reference, replaces=True)


def _check_size(volume: VolumeName, virtual_size_bytes: int, reference: BaseReference, truncate_base: bool) -> None:
    if virtual_size_bytes < reference.size_bytes and not truncate_base:
        raise InvalidArgument(
            f"{volume}: a disk of {virtual_size_bytes} bytes is smaller than its base ({reference.size_bytes} bytes), whose end the guest "
            "would not see; leave out --size to take the base's, or say --truncate-base"
        )


def _build(superblock: Superblock, plan: Plan, wanted: _Wanted, *, replaces: bool, progress: Progress | None) -> ProvisionedDisk:
    building = provider_for(wanted.volume).build(wanted.volume, plan)
    try:
        if (disk := _found_in(building, wanted)) is not None:
            return disk
        _make_ready(building, plan, wanted)
        view = _write_and_read_back(building.node, superblock, wanted, progress)
        building.publish(replace=replaces)
        return ProvisionedDisk(wanted.volume, superblock, True, building.node.size_bytes(), view)
    finally:
        building.close()


def _found_in(building: Building, wanted: _Wanted) -> ProvisionedDisk | None:
    """Looks again now that nobody else can change it. Raises if what is there may not be overwritten."""
    if building.contents not in (Contents.OURS, Contents.FOREIGN):
        return None
    volume, state = wanted.volume, state_of(building.node)
    if not isinstance(state, Superblock):
        _refuse_contents(building.node, volume, state, wanted.force)
        return None
    if building.contents is Contents.OURS:
        return _same_disk(wanted, state, building.node.size_bytes())
    raise Conflict(
        f"{volume} holds an fvd disk, but is not marked as one; if it is yours, lvchange --addtag {TAG_DISK} {volume} takes it "
        "back; if it is not, choose another name"
    )


def _make_ready(building: Building, plan: Plan, wanted: _Wanted) -> None:
    """Storage that is there already: large enough, not the base itself, and without other programs' marks."""
    if building.contents is Contents.BLANK:
        return
    node, base = building.node, wanted.base
    if base is not None and names.identity(base.locator) == node.identity:
        raise InvalidArgument(f"{base.locator} cannot be its own base")
    building.ensure_size(plan.size_bytes)
    _check_space(node, wanted.volume, wanted.geometry)
    if wanted.force or building.contents is Contents.NOBODYS:
        wipe_signatures(node)


def _write_and_read_back(node: Node, superblock: Superblock, wanted: _Wanted, progress: Progress | None) -> View:
    """Read back before anyone is told that it is there: what cannot be opened is no disk."""
    volume, geometry, base = wanted.volume, wanted.geometry, wanted.base
    zeros = None if base is None else _zeros_of(base, geometry, node.identity, wanted.base_allow)
    with enough_memory(geometry):
        write_disk(node, superblock, zeros=zeros, punch=lambda *place: punch_hole(node, *place), progress=progress)
    view = view_of(volume, node)
    if view.superblock != superblock:
        raise Corrupt(f"{volume} does not read back what was written to it; the storage is not to be trusted")
    return view


def _size_over(volume: VolumeName, base: str | os.PathLike[str] | None, base_format: str | None, allow: Sequence[str]) -> int:
    """The size of a disk over this base for which none was said."""
    if base is None:
        raise InvalidArgument(f"{volume}: say how large the disk is to be, for example --size 100G; only over a base it can be left out")
    size_bytes = examine_base(base, base_format, allow=allow).size_bytes
    return max(VIRTUAL_SIZE_BYTES_MIN, -(-size_bytes // SECTOR_BYTES) * SECTOR_BYTES)


def _zeros_of(reference: BaseReference, geometry: Geometry, identity: Identity, allow: Sequence[str]) -> Bitmap:
    with open_base(reference, identity, user=rights_for(reference.locator, ROOT, allow)) as base:
        return zero_blocks(geometry, reference.size_bytes, base.zero_extents())


def write_disk(
    node: Pages, superblock: Superblock, *, zeros: Bitmap | None = None, punch: Punch | None = None, progress: Progress | None = None
) -> None:
    """Writes a whole new disk in the order of FORMAT.md section 8; the superblock given is its second generation.

    `zeros`: blocks below the base's end that are zeros, so that the base need not be asked. In the raw layout their places are made zeros
    by `punch`; without it, or where it says that it cannot, they are left to the base.
    Raises DeviceError, NoSpace; then the storage holds no disk, or the whole one.
    """
    geometry = superblock.geometry
    if superblock.generation != 2:
        raise InvalidArgument(f"a new disk's superblock is of generation 2, not {superblock.generation}")
    if zeros is not None and superblock.base is None:
        raise InvalidArgument("a disk without a base has no blocks to begin with")
    # The whole first megabyte: other programs' marks must not survive beside our superblocks and be found by them later.
    node.zero(0, HEADER_BYTES)
    node.flush()
    bitmap = empty_bitmap(geometry) if zeros is None else zeros
    if zeros is not None and geometry.layout is Layout.RAW:
        bitmap = empty_bitmap(geometry) if punch is None else punch_places(geometry, zeros, punch)
    table = empty_table(geometry)
    # In a new file this also takes the space: a journal that hits a full file system later would fail the disk, not one write.
    node.zero(geometry.journal_offset_bytes, geometry.journal_size_bytes)
    _write_maps(node, superblock, bitmap, table, progress)
    page = first_page(geometry, superblock.uuid, map_hash(superblock.uuid, bitmap, table))
    node.pwrite(page_offset_bytes(geometry, 1), page)
    node.flush()
    write_superblock(node, replace(superblock, generation=1))
    write_superblock(node, superblock)


def _write_maps(node: Pages, superblock: Superblock, bitmap: Bitmap, table: Table | None, progress: Progress | None) -> None:
    """Every cell of both maps, valid: no byte of what the storage held before can be taken for a map."""
    geometry = superblock.geometry
    total_bytes = geometry.bitmap_size_bytes + geometry.table_size_bytes
    done_bytes = 0
    maps: tuple[tuple[MapKind, Bitmap | Table | None], ...] = ((MapKind.BITMAP, bitmap), (MapKind.TABLE, table))
    for kind, items in maps:
        if items is None:
            continue
        pages = map_pages(geometry, kind)
        for first in range(0, pages, BATCH_BYTES // PAGE_BYTES):
            checkpoint()
            batch = encode_pages(geometry, kind, items, superblock.uuid, first, min(BATCH_BYTES // PAGE_BYTES, pages - first))
            node.pwrite(map_offset_bytes(geometry, kind) + first * PAGE_BYTES, batch)
            done_bytes += batch.nbytes
            if progress is not None:
                progress(done_bytes, total_bytes)


# --- What is there already ---------------------------------------------------------------------------------------------------------


def _same_disk(wanted: _Wanted, superblock: Superblock, size_bytes: int) -> ProvisionedDisk:
    differing = differences(superblock, wanted.geometry, wanted.base, wanted.features)
    if differing:
        raise Conflict(f"{wanted.volume} is an fvd disk with other parameters: {'; '.join(differing)}. {_what_to_do(differing)}")
    return ProvisionedDisk(wanted.volume, superblock, False, size_bytes)


def _what_to_do(differing: list[str]) -> str:
    """Towards what was asked for, with nothing lost of what is there."""
    if any(one.startswith("virtual_size ") for one in differing):
        return (
            "It was left as it is. For another size provision a new disk over it: serve this one --read-only, give its NBD URI as --base, "
            "and say --prefetch on; then the new one needs it no longer"
        )
    return "It was left as it is, and keeps these; leave the options out, or use another name"


def differences(superblock: Superblock, geometry: Geometry, base: BaseReference | None, features: int = 0) -> list[str]:
    """What a disk has and what was asked for, where they differ: ``block_size is 65536, asked for 4096``. `features`: compatible ones."""
    there, asked = superblock.geometry, geometry
    pairs: list[tuple[str, object, object]] = [
        ("virtual_size", there.virtual_size_bytes, asked.virtual_size_bytes),
        ("block_size", there.block_size_bytes, asked.block_size_bytes),
        ("chunk_size", there.chunk_size_bytes, asked.chunk_size_bytes),
        ("journal_size", there.journal_size_bytes, asked.journal_size_bytes),
        ("grow_step", there.grow_step_bytes, asked.grow_step_bytes),
        ("layout", there.layout.name.lower(), asked.layout.name.lower()),
        ("placement", there.placement.name.lower(), asked.placement.name.lower()),
        ("base", superblock.base and superblock.base.locator, base and base.locator),
    ]
    if superblock.base and base:
        pairs += [
            ("base_size", superblock.base.size_bytes, base.size_bytes),
            ("base_format", superblock.base.format.name.lower(), base.format.name.lower()),
            ("copy_on_read", _on_or_off(superblock.copy_on_read), _on_or_off(features & COPY_ON_READ)),
            ("prefetch", _on_or_off(superblock.prefetch), _on_or_off(features & PREFETCH)),
        ]
    return [f"{name} is {have or 'none'}, asked for {want or 'none'}" for name, have, want in pairs if have != want]


def _on_or_off(feature: int) -> str:
    return "on" if feature else "off"


def _refuse_contents(node: Node, volume: VolumeName, error: FvdError, force: bool) -> None:
    """Raises unless what the volume holds may be overwritten: nothing at all, or anything with `force`."""
    if force:
        return
    if not isinstance(error, NotFound):
        raise Corrupt(
            f"{volume} holds a damaged fvd disk ({error}); fvd-lv check says more. If nobody needs anything of it, --force overwrites it"
        ) from error
    if not node.is_block and (node.size_bytes() == 0 or holds_remains(node)):
        return
    signatures = find_signatures(node)
    if signatures:
        raise Conflict(f"{volume} holds {', '.join(map(str, signatures))}; if nobody needs that, --force overwrites it")
    known = known_content(node.path) if node.is_block and udev_is_running() else None
    if known is not None:
        raise Conflict(
            f"{volume} holds {known}, as udev's database says; if nobody needs that, --force overwrites it, and udevadm trigger "
            f"--action=change {node.path} has udev look again"
        )
    if not node.is_block:
        size = format_size(node.size_bytes())
        raise Conflict(f"{volume} is a file that holds something else ({size}); if nobody needs that, --force overwrites it")
    # Without a known mark only the header can be judged: an unfinished provision and a removed disk leave zeros in it.
    head = min(node.size_bytes(), HEADER_BYTES) // PAGE_BYTES * PAGE_BYTES
    if head and bytes(node.pread(0, head)).strip(b"\0"):
        raise Conflict(f"{volume} holds data of an unknown kind at its beginning; if nobody needs that, --force overwrites it")


def _check_space(node: Node, volume: VolumeName, geometry: Geometry) -> None:
    size_bytes, least_bytes = node.size_bytes(), least_size_bytes(geometry)
    if size_bytes < least_bytes:
        kind = "the raw layout needs all of" if geometry.layout is Layout.RAW else "metadata and the first chunk need"
        raise NoSpace(
            f"{volume} has {format_size(size_bytes)} ({size_bytes} bytes); {kind} {format_size(least_bytes)} ({least_bytes} bytes)"
        )
