# SPDX-License-Identifier: Apache-2.0
"""Opens a disk for use: ownership, recovery, base, engine, allocator. What drives the engine afterwards is not known here.

Order: claim, read and check everything, and only then (and only for a writable open) the first write: a damaged disk is not touched.
A base that nothing will be read from any more is not opened: it may be gone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from fvd.base.base import OpenBase, open_base
from fvd.base.copying import BaseEvent, Copying
from fvd.base.options import PrefetchOptions
from fvd.base.rights import namer_of, rights_for
from fvd.device import surviving
from fvd.device.claim import Ownership, claim
from fvd.device.node import Node, open_node
from fvd.disk import pending
from fvd.disk.device_watch import watch_device
from fvd.disk.engine_factory import engine_on
from fvd.disk.failing import FailureWatch
from fvd.disk.holding import Holding
from fvd.disk.loading import LoadedDisk, covers_base, naming
from fvd.disk.options import OpenOptions
from fvd.disk.recovery import recover_disk
from fvd.disk.regrown import Regrown
from fvd.engine._engine import Engine
from fvd.errors import Conflict, Corrupt, DeviceError, InvalidArgument, NotFound
from fvd.format.geometry import Geometry
from fvd.format.journal import JournalState
from fvd.format.pending import mark_acknowledged
from fvd.format.superblock import LossReason, LossRecord, Superblock, decode
from fvd.modes import DIRECT_CACHE_MODES
from fvd.storage.allocator import Allocator
from fvd.storage.interfaces import Attached, GroundedStorage
from fvd.storage.policy import GrowthEvent, check_low_water, default_low_water_bytes, guest_reserve_bytes
from fvd.storage.provider import provider_for
from fvd.volume.name import VolumeName, parse_name
from fvd.volume.superblocks import Pages, read_superblock, read_superblock_slots, write_superblock

SECTOR_BYTES = 512

OnEvent = Callable[[GrowthEvent | BaseEvent], None]


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
    base_released: bool = False  # nothing will ever be read from the base again, so it is not open
    failing: FailureWatch | None = None  # None: read-only
    holding: Holding | None = None  # that what it lies on stays its own
    copying: Copying | None = None  # None: nothing is ever copied here (read-only, or no base)
    loss: LossRecord | None = None  # acknowledged writes may be gone, and no administrator has said yet that it was seen
    log: pending.OpenLog | None = None  # None: read-only
    # How who drives the engine lets go of the base's descriptor or connection, in the loop's thread.
    detach_base: Callable[[], None] | None = field(default=None, repr=False)

    def __enter__(self) -> OpenVolume:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def geometry(self) -> Geometry:
        return self.superblock.geometry

    @property
    def stopped(self) -> str:
        """Why the disk has stopped: what it lies on is not its own any more; empty: it has not."""
        return "" if self.holding is None else self.holding.stopped

    @property
    def was_clean(self) -> bool:
        """Whether the disk had been closed properly before this open."""
        return self.journal_state.clean

    def release_base(self) -> None:
        """Ends the use of the base, for the engine needs it no more: detached, then closed. In the loop's thread; again is fine."""
        base, self.base = self.base, None
        self.base_released = self.superblock.base is not None
        if base is None:
            return
        try:
            if self.detach_base is not None:
                self.detach_base()
        finally:
            base.close()

    def acknowledge_loss(self) -> bool:
        """An administrator has seen that writes may be gone: it is no longer reported. Lasting once the disk is closed, or its server
        killed. Returns whether there was anything to see. In the loop's thread."""
        seen, self.loss = self.loss is not None, None
        if self.log is not None and self.log.memory is not None:
            mark_acknowledged(self.log.memory.buffer)
        return seen

    def close(self) -> None:
        """Stops growth, closes descriptors, gives the claim up; again is fine. Does not touch the engine: see the class."""
        self._resources.close()


def open_volume(
    name: str | VolumeName,
    options: OpenOptions | None = None,
    *,
    on_event: OnEvent | None = None,
    allocator_options: dict[str, Any] | None = None,
    **named: Any,
) -> OpenVolume:
    """Opens the disk in a volume. Read-only it writes nothing at all: a dirty disk is replayed in memory, and nothing is copied.

    `named`: fields of `OpenOptions`, instead of `options` or over them. `on_event` is called in the loop's thread.
    Raises NotFound, InUse, Corrupt, Unsupported, Conflict (the base has changed), PermissionDenied, InvalidArgument, Timeout, DeviceError.
    """
    volume = parse_name(name)
    options = replace(options or OpenOptions(), **named)
    options.check()
    with ExitStack() as undo:
        place, node = _claimed(volume, options, undo)
        notices = [node.notice] if node.notice else []
        stack = node.stack()
        disk, left = _recovered(volume, place, node, options, notices)
        low_water_bytes = _low_water(disk.geometry, options)
        released = covers_base(disk.superblock, disk.bitmap)
        base = None if released else _opened_base(volume, place, node, disk.superblock, options, undo)
        loss = loss_after(left, disk.superblock)
        log = None
        if not options.read_only:
            disk.superblock, log = begin_generation(node, disk, loss, notices)
            undo.callback(log.close)
        with naming(str(volume)):
            engine = _engine(disk, node, options, low_water_bytes, log, copies=base is not None, durable_writes=not stack.may_fill)
        undo.callback(engine.forget_log)
        opened = OpenVolume(
            name=volume,
            superblock=disk.superblock,
            node=node,
            base=base,
            engine=engine,
            allocator=None,
            journal_state=disk.journal_state,
            read_only=options.read_only,
            cache=options.cache,
            on_full=options.on_full,
            notices=notices,
            _resources=undo,
            base_released=released,
            loss=loss,
            log=log,
        )
        storage, holding = _hold_storage(opened, place, disk.storage_size_bytes, on_event)
        if not options.read_only:
            opened.failing = FailureWatch(str(volume), engine, partial(_devices_of, node, stack.devices))
            undo.callback(opened.failing.close)
            _begin_growth(opened, storage, disk.storage_size_bytes, low_water_bytes, on_event, allocator_options or {})
        undo.callback(watch_device(node, holding, opened.allocator).close)
        if not options.read_only:
            undo.callback(lambda: end_generation(opened))
        if base is not None and not options.read_only:
            _begin_copying(opened, options, on_event)
        opened._resources = undo.pop_all()
        return opened


def _claimed(volume: VolumeName, options: OpenOptions, undo: ExitStack) -> tuple[Attached, Node]:
    """The place, reachable until the end, and its open file: claimed, and the one that the claim covers."""
    place = undo.enter_context(provider_for(volume).attach(volume))
    held = claim(place.path, Ownership.READER if options.read_only else Ownership.WRITER)
    undo.callback(held.close)
    # R35: transfers go through the open file that holds the claim, which a killed process's last operation keeps open.
    node = open_node(
        place.path,
        read_only=options.read_only,
        direct=options.cache in DIRECT_CACHE_MODES,
        sharing=None if options.read_only else held.descriptor,
    )
    undo.callback(node.close)
    held.check_covers(node)
    return place, node


def _recovered(
    volume: VolumeName, place: Attached, node: Node, options: OpenOptions, notices: list[str]
) -> tuple[LoadedDisk, pending.Leftover]:
    with naming(str(volume)):
        disk, left = recover(node, str(volume), read_only=options.read_only, discard_pending=options.discard_pending, notices=notices)
    if place.size_bytes is not None:
        # A device may show more than it has: the table of a growth step that died (lvm_storage.py).
        disk.storage_size_bytes = min(disk.storage_size_bytes, place.size_bytes)
    return disk, left


def _low_water(geometry: Geometry, options: OpenOptions) -> int:
    asked_bytes = options.low_water_bytes
    return check_low_water(geometry, default_low_water_bytes(geometry) if asked_bytes is None else asked_bytes)


def _opened_base(
    volume: VolumeName, place: Attached, node: Node, superblock: Superblock, options: OpenOptions, undo: ExitStack
) -> OpenBase | None:
    """The base, with the rights of whoever named it; None: the disk has none."""
    reference = superblock.base
    if reference is None:
        return None
    with naming(str(volume)):
        user = rights_for(reference.locator, namer_of(str(volume), node, place.base_marks, reference), options.base_allow)
        base = open_base(reference, node.identity, options.base_timeout_s, user)
    undo.callback(base.close)
    return base


def _engine(
    disk: LoadedDisk,
    node: Node,
    options: OpenOptions,
    low_water_bytes: int,
    log: pending.OpenLog | None,
    *,
    copies: bool,
    durable_writes: bool,
) -> Engine:
    """`copies`: there is a base, of which something may be copied."""
    reference = disk.superblock.base
    copy_on_read = disk.superblock.copy_on_read if options.copy_on_read is None else options.copy_on_read
    return engine_on(
        disk,
        # Also of a base that is not open: blocks that are trimmed must not show it again.
        base_size_bytes=None if reference is None else reference.size_bytes,
        copy_on_read=copies and not options.read_only and copy_on_read,
        base_timeout_ns=int(options.base_timeout_s * 1e9),
        # Through the page cache any offset would do; sectors keep requests whole.
        align_bytes=node.logical_block_bytes if node.direct else SECTOR_BYTES,
        read_only=options.read_only,
        cache_mode=options.cache,
        on_full=options.on_full,
        wake_below_bytes=low_water_bytes,
        guest_reserve_bytes=guest_reserve_bytes(disk.geometry, low_water_bytes),
        discard=options.discard,
        zero_chunks=options.zero_chunks,
        pending_log=None if log is None or log.memory is None else log.memory.buffer,
        durable_writes=durable_writes,
    )


def _hold_storage(opened: OpenVolume, place: Attached, size_bytes: int, on_event: OnEvent | None) -> tuple[GroundedStorage, Holding]:
    """From here on the disk stops where somebody else changes what it lies on."""
    storage = place.storage(opened.node)
    opened._resources.callback(storage.close)
    holding = opened.holding = Holding(str(opened.name), opened.engine, storage, on_event)
    storage.hold(size_bytes, opened.geometry.max_storage_size_bytes, holding.moved)
    return storage, holding


def _begin_growth(
    opened: OpenVolume,
    storage: GroundedStorage,
    size_bytes: int,
    low_water_bytes: int,
    on_event: OnEvent | None,
    allocator_options: dict[str, Any],
) -> None:
    """Storage that grows, and is looked at again whenever it has grown."""
    assert opened.holding is not None
    opened.allocator = Allocator(
        storage,
        opened.geometry,
        storage_size_bytes=size_bytes,
        low_water_bytes=low_water_bytes,
        on_event=on_event,
        **allocator_options,
    )
    opened._resources.callback(opened.allocator.close)
    opened.allocator.before_use = Regrown(str(opened.name), opened.node, opened.engine, opened.holding.moved).look


def _begin_copying(opened: OpenVolume, options: OpenOptions, on_event: OnEvent | None) -> None:
    opened.copying = _copying(opened, on_event)
    prefetch = _prefetch_options(opened.superblock, options.prefetch)
    if prefetch is not None:
        opened.copying.start(prefetch)


def _devices_of(node: Node, at_open: frozenset[int]) -> frozenset[int]:
    """What it lies on now: a volume that grew may have come to lie on one more."""
    try:
        return at_open | node.stack().devices
    except DeviceError:  # closed meanwhile
        return at_open


def _copying(volume: OpenVolume, on_event: OnEvent | None) -> Copying:
    import random  # brings libcrypto

    base = volume.superblock.base
    if base is None:
        raise InvalidArgument(f"{volume.name} has no base to copy from")
    return Copying(
        volume.engine,
        volume_name=str(volume.name),
        virtual_size_bytes=volume.geometry.virtual_size_bytes,
        base_size_bytes=base.size_bytes,
        base_locator=base.locator,
        block_size_bytes=volume.geometry.block_size_bytes,
        release=volume.release_base,
        on_event=on_event,
        clock_ns=time.monotonic_ns,
        random=random.Random(),
    )


def _prefetch_options(superblock: Superblock, asked: PrefetchOptions | bool | None) -> PrefetchOptions | None:
    """How to prefetch; None: not at all."""
    if isinstance(asked, PrefetchOptions):
        return asked
    wanted = superblock.prefetch if asked is None else asked
    return PrefetchOptions() if wanted else None


def recover(node: Node, volume: str, *, read_only: bool, discard_pending: bool, notices: list[str]) -> tuple[LoadedDisk, pending.Leftover]:
    """The disk as its last server had it, as far as that can be; and what that one left.

    Raises as `recover_disk`, and Conflict: writes that it had acknowledged would be lost, and nobody has asked for that.
    """
    superblock = read_superblock(node)
    left = pending.find(superblock, surviving.lasting_place(node), surviving.host_id(), surviving.boot_id())
    try:
        if left.kind is not pending.Left.MISSING:
            try:
                disk = recover_disk(node, read_only=read_only, pending_log=left.pending_log)
                if words := pending.MEANINGS.get(left.kind):
                    notices.append(f"{volume}: {words.format(path=left.path)}")
                return disk, left
            except pending.NotBelieved as error:
                left = pending.Leftover(pending.Left.MISSING, problem=str(error), path=left.path)
        if not read_only and not discard_pending:
            raise Conflict(pending.REFUSAL.format(path=left.path, problem=left.problem))
        notices.append(f"{volume}: {pending.LOSSES[LossReason.LOG_MISSING]} ({left.problem})")
        return recover_disk(node, read_only=read_only), left
    finally:
        if left.pending_log is not None:
            left.pending_log.close()


def loss_after(left: pending.Leftover, superblock: Superblock) -> LossRecord | None:
    """Whether acknowledged writes may be gone: by what the last server left, or by what nobody has acknowledged since."""
    reason = None
    if left.kind is pending.Left.MISSING:
        reason = LossReason.LOG_MISSING
    elif left.pending_log is not None and left.pending_log.log.failed_errno:
        reason = LossReason.FLUSH_FAILED
    elif left.pending_log is not None and left.pending_log.log.durability_ops:
        reason = LossReason.FLUSH_UNHEARD
    if reason is not None:
        return LossRecord(int(time.time()), reason)
    return None if left.pending_log is not None and left.pending_log.log.acknowledged else superblock.loss


def begin_generation(node: Node, disk: LoadedDisk, loss: LossRecord | None, notices: list[str]) -> tuple[Superblock, pending.OpenLog]:
    """R21: the superblock's next generation, durably, which says where the log of this open is; what was made for earlier ones is
    believed no more. The log is there before the superblock names it, and the earlier one until then."""
    superblock = disk.superblock
    if _other_copy_is_lost(node, superblock):
        notices.append(f"{node.path}: superblock copy {1 - superblock.slot} was damaged or unfinished; it has been written anew")
    log = pending.make(superblock, superblock.next_generation, node, disk.journal_state.map_hash)
    try:
        if log.memory is None:
            notices.append(f"{node.path}: {pending.NO_LOG.format(problem=log.problem)}")
        renewed = superblock.renewed(log=log.record, loss=loss)
        write_superblock(node, renewed)
    except BaseException:
        log.close()
        raise
    pending.remove_others(superblock, node, log.memory)
    return renewed, log


def end_generation(volume: OpenVolume) -> None:
    """After a clean close the superblock names no log any more, and then the log goes. Else both stay, for the next open. An open that
    failed before anything was asked of its engine (an address in use, say) has left the disk as recovery did, durably: it ends alike."""
    unused = not volume.engine.failed_errno and not any(volume.engine.statistics().values())
    if volume.log is None or not (volume.engine.closed_cleanly or unused):
        return
    volume.superblock = volume.superblock.renewed(log=None, loss=volume.loss)
    write_superblock(volume.node, volume.superblock)
    if volume.log.memory is not None:
        volume.log.memory.remove()


def _other_copy_is_lost(node: Pages, superblock: Superblock) -> bool:
    slots = read_superblock_slots(node)
    if slots is None:
        return False
    try:
        return decode(slots[1 - superblock.slot], 1 - superblock.slot).uuid != superblock.uuid
    except (NotFound, Corrupt):
        return True
