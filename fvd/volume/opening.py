"""Opens a disk for use: ownership, recovery, base, engine, allocator. What drives the engine afterwards is not known here.

Order: claim, read and check everything, and only then (and only for a writable open) the first write: a damaged disk is not touched.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from fvd.device.claim import Ownership, claim
from fvd.device.node import Node, open_node
from fvd.engine._engine import Engine
from fvd.errors import Corrupt, InvalidArgument, NotFound
from fvd.format.geometry import Geometry
from fvd.format.journal import JournalState
from fvd.format.superblock import Superblock, decode
from fvd.volume.allocator import Allocator
from fvd.volume.base import OpenBase, open_base
from fvd.volume.loading import naming, recover_disk
from fvd.volume.name import VolumeName, parse_name
from fvd.volume.policy import GrowthEvent, check_low_water, default_low_water_bytes
from fvd.volume.provider import provider_for
from fvd.volume.starting import engine_on
from fvd.volume.superblocks import Pages, read_slots, write_superblock
from fvd.volume.watching import watch_device

CACHE_MODES = ("none", "writeback", "writethrough", "directsync", "unsafe")
DIRECT_CACHE_MODES = ("none", "directsync")
ON_FULL = ("wait", "error")
SECTOR_BYTES = 512
KNOWN_AUTOCLEAR_FEATURES = 0


@dataclass
class OpenVolume:
    """A disk that is claimed, recovered and ready to be driven. Made by `open_volume`.

    Who drives the engine sends it a close request and waits for its end before `close`; without that the next open replays the journal.
    """

    name: VolumeName
    superblock: Superblock
    node: Node
    base: OpenBase | None
    engine: Engine
    allocator: Allocator | None  # None: read-only
    journal_state: JournalState  # as found: what replay had to do
    read_only: bool
    cache: str
    on_full: str
    notices: list[str]  # what is not as it was asked for: lines for the user
    _resources: ExitStack

    def __enter__(self) -> OpenVolume:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def geometry(self) -> Geometry:
        return self.superblock.geometry

    @property
    def base_node(self) -> Node | None:
        return self.base.node if self.base else None

    @property
    def was_clean(self) -> bool:
        """Whether the disk had been closed properly before this open."""
        return self.journal_state.clean

    def close(self) -> None:
        """Stops growth, closes descriptors, gives the claim up; again is fine. Does not touch the engine: see the class."""
        self._resources.close()


def open_volume(
    name: str | VolumeName,
    *,
    read_only: bool = False,
    cache: str = "none",
    on_full: str = "wait",
    low_water_bytes: int | None = None,
    discard: bool = True,
    on_event: Callable[[GrowthEvent], None] | None = None,
    allocator_options: dict[str, Any] | None = None,
) -> OpenVolume:
    """Opens the disk in a volume. Read-only it writes nothing at all: a dirty disk is replayed in memory.

    `low_water_bytes`: growth begins when less than this is free (default: half a grow step). `on_event` is called in the loop's thread.
    Raises NotFound, InUse, Corrupt, Unsupported, Conflict (the base has changed), PermissionDenied, InvalidArgument, DeviceError.
    """
    volume = parse_name(name)
    if cache not in CACHE_MODES:
        raise InvalidArgument(f"cache mode {cache!r}: choose one of {', '.join(CACHE_MODES)}")
    if on_full not in ON_FULL:
        raise InvalidArgument(f"on_full {on_full!r}: choose one of {', '.join(ON_FULL)}")
    with ExitStack() as undo:
        place = undo.enter_context(provider_for(volume).attach(volume))
        path = place.path
        held = claim(path, Ownership.READER if read_only else Ownership.WRITER)
        undo.callback(held.close)
        node = open_node(path, read_only=read_only, direct=cache in DIRECT_CACHE_MODES, sharing=None if read_only else held.descriptor)
        undo.callback(node.close)
        held.check_covers(node)
        disk = recover_disk(node, read_only=read_only)
        if place.size_bytes is not None:
            # A device may show more than it has: the table of a growth step that died (lvm_storage.py).
            disk.storage_size_bytes = min(disk.storage_size_bytes, place.size_bytes)
        low_water = check_low_water(disk.geometry, default_low_water_bytes(disk.geometry) if low_water_bytes is None else low_water_bytes)
        base = None
        if disk.superblock.base is not None:
            with naming(str(volume)):
                base = open_base(disk.superblock.base, node.identity)
            undo.callback(base.close)
        notices = [node.notice] if node.notice else []
        if not read_only:
            disk.superblock = renew_superblock(node, disk.superblock, notices)
        with naming(str(volume)):
            engine = engine_on(
                disk,
                base_size_bytes=None if base is None or disk.superblock.base is None else disk.superblock.base.size_bytes,
                # Through the page cache any offset would do; sectors keep requests whole.
                align_bytes=node.logical_block_bytes if node.direct else SECTOR_BYTES,
                read_only=read_only,
                cache_mode=cache,
                on_full=on_full,
                low_water_bytes=low_water,
                discard=discard,
            )
        allocator = None
        if not read_only:
            allocator = Allocator(
                place.storage(node),
                disk.geometry,
                storage_size_bytes=disk.storage_size_bytes,
                low_water_bytes=low_water,
                on_event=on_event,
                **(allocator_options or {}),
            )
            undo.callback(allocator.close)
            watch = watch_device(node, allocator)
            undo.callback(watch.close)
        return OpenVolume(
            name=volume,
            superblock=disk.superblock,
            node=node,
            base=base,
            engine=engine,
            allocator=allocator,
            journal_state=disk.journal_state,
            read_only=read_only,
            cache=cache,
            on_full=on_full,
            notices=notices,
            _resources=undo.pop_all(),
        )


def renew_superblock(node: Pages, superblock: Superblock, notices: list[str]) -> Superblock:
    """Clears unknown autoclear bits, for what they vouch for is about to change; and replaces a lost copy while the other is good."""
    unknown = superblock.autoclear_features & ~KNOWN_AUTOCLEAR_FEATURES
    lost = _other_copy_is_lost(node, superblock)
    if not unknown and not lost:
        return superblock
    if lost:
        notices.append(f"{node.path}: superblock copy {1 - superblock.slot} was damaged or unfinished; it has been written anew")
    renewed = replace(superblock, generation=superblock.generation + 1, autoclear_features=superblock.autoclear_features & ~unknown)
    write_superblock(node, renewed)
    return renewed


def _other_copy_is_lost(node: Pages, superblock: Superblock) -> bool:
    slots = read_slots(node)
    if slots is None:
        return False
    try:
        return decode(slots[1 - superblock.slot], 1 - superblock.slot).uuid != superblock.uuid
    except (NotFound, Corrupt):
        return True
