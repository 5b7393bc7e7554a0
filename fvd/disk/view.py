# SPDX-License-Identifier: Apache-2.0
"""A disk to look at: the same view of a closed disk, read from its storage, and of an open one, taken from its engine.

Never modifies anything. Of an open volume the snapshot must be taken in the thread of its loop, like everything else of an engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fvd import _core
from fvd.device.claim import Ownership, claim
from fvd.device.node import Node, open_node
from fvd.disk import pending
from fvd.disk.loading import load_disk
from fvd.disk.opening import OpenVolume, loss_after, recover
from fvd.format.geometry import Geometry
from fvd.format.maps import Bitmap, Table
from fvd.format.superblock import LossRecord, Superblock
from fvd.storage.interfaces import Attached
from fvd.storage.provider import provider_for
from fvd.volume.name import VolumeName, parse_name
from fvd.volume.superblocks import Pages

Target = str | VolumeName | OpenVolume


@dataclass(frozen=True)
class View:
    """One moment of a disk. The arrays are copies."""

    name: VolumeName
    superblock: Superblock
    storage_size_bytes: int
    bitmap: Bitmap
    table: Table | None
    clean: bool  # closed properly; always False for one that is open for writing
    open: bool
    loss: LossRecord | None = None  # acknowledged writes may be gone
    left_open: bool = False  # closed, but its last server did not close it: it died, or has it open on another host
    pending_changes: int = 0  # left open: entries of the maps in its log, of which the next open commits what is in no commit yet
    short_bytes: int = 0  # of its storage: what finds no space in the file system that it lies on
    notices: tuple[str, ...] = ()  # what there is to say about how it was left: lines for the user

    @property
    def geometry(self) -> Geometry:
        return self.superblock.geometry

    @property
    def present_blocks(self) -> int:
        """Blocks that do not come from the base."""
        return _core.bitmap_count(self.bitmap, 0, self.geometry.blocks)

    @property
    def mapped_chunks(self) -> int:
        """Chunks that have a slot; in the raw layout those with a present block, for all have one."""
        geometry = self.geometry
        return _core.mapped_chunks(self.bitmap, self.table, geometry.blocks_per_chunk, geometry.blocks)


def look(target: Target) -> View:
    """Raises NotFound, InUse (someone else has it open for writing: ask its control socket), Corrupt, Unsupported, DeviceError."""
    if isinstance(target, OpenVolume):
        bitmap, table = target.engine.snapshot_maps()
        return View(
            name=target.name,
            superblock=target.superblock,
            storage_size_bytes=target.engine.storage_size_bytes,
            bitmap=bitmap,
            table=table,
            clean=target.was_clean and target.read_only,
            open=True,
            loss=target.loss,
        )
    name = parse_name(target)
    with open_to_look(name) as (_, node):
        return view_of(name, node)


@contextmanager
def open_to_look(name: VolumeName) -> Iterator[tuple[Attached, Node]]:
    """A closed volume, attached, claimed as a reader and open; afterwards it is left as it was. Raises NotFound, InUse, DeviceError."""
    with (
        provider_for(name).attach(name, looking=True) as place,
        claim(place.path, Ownership.READER) as held,
        open_node(place.path, read_only=True) as node,
    ):
        held.check_covers(node)
        yield place, node


def view_of(name: VolumeName, node: Pages) -> View:
    """The closed disk in an open node; one whose server died as that one had it, if its log can be found. Raises as `look`."""
    notices: list[str] = []
    pending_changes = short_bytes = 0
    if isinstance(node, Node):
        short_bytes = node.stack().short_bytes
        disk, left = recover(node, str(name), read_only=True, discard_pending=False, notices=notices)
        loss = loss_after(left, disk.superblock)
        left_open = left.kind is not pending.Left.NOTHING
        if left.pending_log is not None and not left.pending_log.log.failed_errno:
            pending_changes = len(left.pending_log.log.latest())
    else:
        # Of a logical volume that is not active only its bytes are known, not what device it would be.
        disk = load_disk(node)
        loss, left_open = disk.superblock.loss, disk.superblock.log is not None
    return View(
        name=name,
        superblock=disk.superblock,
        storage_size_bytes=disk.storage_size_bytes,
        bitmap=disk.bitmap,
        table=disk.table,
        clean=disk.journal_state.clean and not left_open,
        open=False,
        loss=loss,
        left_open=left_open,
        pending_changes=pending_changes,
        short_bytes=short_bytes,
        notices=tuple(notices),
    )
