# SPDX-License-Identifier: Apache-2.0
"""Opens a disk for use: ownership, recovery, base, engine, allocator. What drives the engine afterwards is not known here.

Order: claim, read and check everything, and only then (and only for a writable open) the first write: a damaged disk is not touched.
A base that nothing will be read from any more is not opened: it may be gone.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fvd.base.base import TIMEOUT_SECONDS, OpenBase, open_base
from fvd.base.copying import BaseEvent, Copying, PrefetchOptions
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
from fvd.disk.recovery import recover_disk
from fvd.disk.regrown import Regrown
from fvd.engine._engine import Engine
from fvd.errors import Conflict, Corrupt, DeviceError, InvalidArgument, NotFound, quoted
from fvd.format.geometry import Geometry
from fvd.format.journal import JournalState
from fvd.format.pending import mark_acknowledged
from fvd.format.superblock import LossReason, PossibleLoss, Superblock, decode
from fvd.modes import CACHE_MODES, DIRECT_CACHE_MODES, ON_FULL
from fvd.storage.allocator import Allocator
from fvd.storage.policy import GrowthEvent, check_low_water, default_low_water_bytes, guest_reserve_bytes
from fvd.storage.provider import provider_for
from fvd.volume.name import VolumeName, parse_name
from fvd.volume.superblocks import Pages, read_superblock, read_superblock_slots, write_superblock

SECTOR_BYTES = 512
TIMEOUT_SECONDS_MAX = 1e9


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
    loss: PossibleLoss | None = None  # acknowledged writes may be gone, and no administrator has said yet that it was seen
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
    def base_node(self) -> Node | None:
        """A base that is read here; None: there is none, or it is remote."""
        return self.base.node if self.base else None

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
        """An administrator has seen that writes may be gone: it is told no more. Lasting once the disk is closed, or its server killed.
        Returns whether there was anything to see. In the loop's thread."""
        seen, self.loss = self.loss is not None, None
        if self.log is not None and self.log.memory is not None:
            mark_acknowledged(self.log.memory.buffer)
        return seen

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
    zero_chunks: bool = False,
    copy_on_read: bool | None = None,
    base_timeout_s: float = TIMEOUT_SECONDS,
    prefetch: PrefetchOptions | bool | None = None,
    on_event: Callable[[GrowthEvent | BaseEvent], None] | None = None,
    discard_pending: bool = False,
    base_allow: Sequence[str] = (),
    allocator_options: dict[str, Any] | None = None,
) -> OpenVolume:
    """Opens the disk in a volume. Read-only it writes nothing at all: a dirty disk is replayed in memory.

    `discard_pending`: open even if the log of writes that a dead server acknowledged is missing, and do without them.
    `low_water_bytes`: growth begins when less than this is free (default: half a grow step). `on_event` is called in the loop's thread.
    `zero_chunks`: let the device zero a new chunk as a whole, where it can, and write of its blocks only what guests write.
    `copy_on_read`: keep what is read from the base; `prefetch`: copy all of it in the background; None: as the disk was made. A read-only
    open does neither. `base_timeout_s`: how long the base may not answer before a request that needs it fails. `base_allow`: bases that are
    opened whoever has named them (`rights.py`).
    Raises NotFound, InUse, Corrupt, Unsupported, Conflict (the base has changed), PermissionDenied, InvalidArgument, Timeout, DeviceError.
    """
    volume = parse_name(name)
    if cache not in CACHE_MODES:
        raise InvalidArgument(f"cache mode {quoted(cache)}: choose one of {', '.join(CACHE_MODES)}")
    if on_full not in ON_FULL:
        raise InvalidArgument(f"on_full {quoted(on_full)}: choose one of {', '.join(ON_FULL)}")
    if not (0 < base_timeout_s <= TIMEOUT_SECONDS_MAX):
        raise InvalidArgument(f"base timeout {base_timeout_s} s: it must be more than 0 and at most {TIMEOUT_SECONDS_MAX:g} seconds")
    with ExitStack() as undo:
        place = undo.enter_context(provider_for(volume).attach(volume))
        path = place.path
        held = claim(path, Ownership.READER if read_only else Ownership.WRITER)
        undo.callback(held.close)
        # R35: transfers go through the open file that holds the claim, which a killed process's last operation keeps open.
        node = open_node(path, read_only=read_only, direct=cache in DIRECT_CACHE_MODES, sharing=None if read_only else held.descriptor)
        undo.callback(node.close)
        held.check_covers(node)
        notices = [node.notice] if node.notice else []
        stack = node.stack()
        with naming(str(volume)):
            disk, left = recover(node, str(volume), read_only=read_only, discard_pending=discard_pending, notices=notices)
        if place.size_bytes is not None:
            # A device may show more than it has: the table of a growth step that died (lvm_storage.py).
            disk.storage_size_bytes = min(disk.storage_size_bytes, place.size_bytes)
        low_water = check_low_water(disk.geometry, default_low_water_bytes(disk.geometry) if low_water_bytes is None else low_water_bytes)
        reference = disk.superblock.base
        base = None
        released = covers_base(disk.superblock, disk.bitmap)
        if reference is not None and not released:
            with naming(str(volume)):
                user = rights_for(reference.locator, namer_of(str(volume), node, place.base_marks, reference), base_allow)
                base = open_base(reference, node.identity, base_timeout_s, user)
            undo.callback(base.close)
        copies = base is not None and not read_only
        loss = loss_after(left, disk.superblock)
        log = None
        if not read_only:
            disk.superblock, log = begin_generation(node, disk, loss, notices)
            undo.callback(log.close)
        with naming(str(volume)):
            engine = engine_on(
                disk,
                # Also of a base that is not open: blocks that are trimmed must not show it again.
                base_size_bytes=None if reference is None else reference.size_bytes,
                copy_on_read=copies and (disk.superblock.copy_on_read if copy_on_read is None else copy_on_read),
                base_timeout_ns=int(base_timeout_s * 1e9),
                # Through the page cache any offset would do; sectors keep requests whole.
                align_bytes=node.logical_block_bytes if node.direct else SECTOR_BYTES,
                read_only=read_only,
                cache_mode=cache,
                on_full=on_full,
                wake_below_bytes=low_water,
                guest_reserve_bytes=guest_reserve_bytes(disk.geometry, low_water),
                discard=discard,
                zero_chunks=zero_chunks,
                pending_log=None if log is None or log.memory is None else log.memory.buffer,
                durable_writes=not stack.may_fill,
            )
        undo.callback(engine.forget_log)
        allocator = failing = None
        storage = place.storage(node)
        undo.callback(storage.close)
        holding = Holding(str(volume), engine, storage, on_event)
        storage.hold(disk.storage_size_bytes, disk.geometry.max_storage_size_bytes, holding.moved)
        if not read_only:
            failing = FailureWatch(str(volume), engine, partial(_devices_of, node, stack.devices))
            undo.callback(failing.close)
            allocator = Allocator(
                storage,
                disk.geometry,
                storage_size_bytes=disk.storage_size_bytes,
                low_water_bytes=low_water,
                on_event=on_event,
                **(allocator_options or {}),
            )
            undo.callback(allocator.close)
            allocator.before_use = Regrown(str(volume), node, engine, holding.moved).look
        undo.callback(watch_device(node, holding, allocator).close)
        opened = OpenVolume(
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
            _resources=undo,
            base_released=released,
            loss=loss,
            log=log,
            failing=failing,
            holding=holding,
        )
        if not read_only:
            undo.callback(lambda: end_generation(opened))
        if copies:
            opened.copying = _copying(opened, on_event)
            options = _prefetch_options(disk.superblock, prefetch)
            if options is not None:
                opened.copying.start(options)
        opened._resources = undo.pop_all()
        return opened


def _devices_of(node: Node, at_open: frozenset[int]) -> frozenset[int]:
    """What it lies on now: a volume that grew may have come to lie on one more."""
    try:
        return at_open | node.stack().devices
    except DeviceError:  # closed meanwhile
        return at_open


def _copying(volume: OpenVolume, on_event: Callable[[GrowthEvent | BaseEvent], None] | None) -> Copying:
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
                disk = recover_disk(node, read_only=read_only, found=left.found)
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
        if left.found is not None:
            left.found.close()


def loss_after(left: pending.Leftover, superblock: Superblock) -> PossibleLoss | None:
    """Whether acknowledged writes may be gone: by what the last server left, or by what nobody has acknowledged since."""
    reason = None
    if left.kind is pending.Left.MISSING:
        reason = LossReason.LOG_MISSING
    elif left.found is not None and left.found.log.failed_errno:
        reason = LossReason.FLUSH_FAILED
    elif left.found is not None and left.found.log.durability_ops:
        reason = LossReason.FLUSH_UNHEARD
    if reason is not None:
        return PossibleLoss(int(time.time()), reason)
    return None if left.found is not None and left.found.log.acknowledged else superblock.loss


def begin_generation(node: Node, disk: LoadedDisk, loss: PossibleLoss | None, notices: list[str]) -> tuple[Superblock, pending.OpenLog]:
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
