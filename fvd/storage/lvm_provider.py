# SPDX-License-Identifier: Apache-2.0
"""Where logical volumes live: made, activated, switched off by the last user, removed. The states of a volume are docs/lvm.md's table.

Third implementation of `provider.Provider`. Knows nothing of what a disk's bytes mean.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from fvd.device.claim import Claim, Ownership, claim
from fvd.device.node import Identity, Node, open_node
from fvd.device.udev import udev_is_running, wait_for_node
from fvd.errors import Conflict, DeviceError, FvdError, InUse, NotFound, PermissionDenied, Unsupported
from fvd.lvm import dm, sharing
from fvd.lvm.commands import Lvm
from fvd.lvm.report import GroupState, LogicalVolume, VolumeGroup
from fvd.storage import overcommit
from fvd.storage.interfaces import Contents, GroundedStorage, Plan, Presence, Wipe
from fvd.storage.lvm_storage import LvmStorage, settle
from fvd.volume import tags
from fvd.volume.name import VolumeName
from fvd.volume.superblocks import wipe_storage
from fvd.volume.tags import TAG_DISK, TAG_UNFINISHED, TAG_WIPE, Facts

log = logging.getLogger(__name__)


class LvmProvider:
    """Logical volumes."""

    fixed_size = False
    in_place = True

    def __init__(self, lvm: Lvm | None = None) -> None:
        self._lvm = lvm or Lvm()

    def presence(self, name: VolumeName) -> Presence:
        volume = self._lvm.find(name.group, name.lv)
        if volume is None:
            return Presence.ABSENT
        if TAG_UNFINISHED in volume.tags:
            return Presence.UNFINISHED
        return Presence.PRESENT if TAG_DISK in volume.tags else Presence.FOREIGN

    def attach(self, name: VolumeName, *, looking: bool = False) -> AttachedVolume:
        share = sharing.take(name.group, name.lv)
        try:
            # Before it is looked at: one that has somebody's use, and is active because of it, may be without it a moment later.
            unused = share.is_alone() or share.is_kept()
            volume = self._find(name)
            if TAG_UNFINISHED in volume.tags:
                raise NotFound(f"{name} holds no fvd disk yet: its provision was interrupted; run it again, or fvd-lv remove {name}")
            if TAG_DISK not in volume.tags:
                raise NotFound(f"{name} is a logical volume, but no fvd disk (it has no tag {TAG_DISK}); fvd-lv provision makes one")
            # A look leaves active what was so before anybody of ours came.
            keeps = looking and volume.active and unused
            volume = _switch_on(self._lvm, volume, name, share)
            number = dm.number_of(name.path)
            if keeps:
                share.keep()
            share.arrived()
        except BaseException:
            share.close()
            raise
        return AttachedVolume(self._lvm, name, volume, share, number, stays_active=keeps)

    def build(self, name: VolumeName, plan: Plan) -> BuiltVolume:
        share = sharing.take(name.group, name.lv)
        try:
            volume, created = self._find_or_create(name, plan, share)
            return BuiltVolume(self._lvm, name, volume, share, plan, created=created)
        except BaseException:
            share.close()
            raise

    def forget_unfinished(self, name: VolumeName, wipe: Wipe | None = None) -> None:
        volume = self._lvm.find(name.group, name.lv)
        if volume is None or TAG_UNFINISHED not in volume.tags:
            return
        share = sharing.take(name.group, name.lv)
        try:
            _refuse_group(volume.group_state, volume.group)
            dirty = _is_wiped(self._lvm, volume)
            if volume.active or dirty or wipe is not None:
                _switch_on(self._lvm, volume, name, share)
                # Whoever is at work on it holds the device.
                with claim(name.path, Ownership.WRITER) as held:
                    if dirty or wipe is not None:
                        _wipe(name, held, wipe)
            self._lvm.remove(volume, TAG_UNFINISHED)
        finally:
            share.close()

    def _find(self, name: VolumeName) -> LogicalVolume:
        volume = self._lvm.find(name.group, name.lv)
        if volume is None:
            raise NotFound(f"there is no logical volume {name}; fvd-lv list {name.group} shows those there are (a file is file:PATH)")
        _refuse_group(volume.group_state, volume.group)
        if "partial" in volume.health:
            raise DeviceError(
                f"{name} lies on a physical volume that is missing; vgs -o +pv_name {volume.group} tells which, and lvs -o +devices what "
                "lay there. Bring it back: what it held is nowhere else"
            )
        if volume.active_elsewhere:
            raise InUse(f"{name} is active on another host; deactivate it there first")
        overcommit.refuse_unusable(volume)
        return volume

    def _find_or_create(self, name: VolumeName, plan: Plan, share: sharing.Share) -> tuple[LogicalVolume, bool]:
        group = self._lvm.group(name.group)
        _refuse_group(group.state, group.name)
        self._lvm.whole(name.group, group)  # here, and not when what the volume held has been overwritten
        volume = self._lvm.find(name.group, name.lv)
        if volume is not None and not volume.active and tags.is_only_unfinished(volume):
            # Made anew by lvcreate, which wipes it before udev may look: activated, it would show what an earlier volume has left.
            if TAG_WIPE in volume.tags | group.tags:
                _switch_on(self._lvm, volume, name, share)
                with claim(name.path, Ownership.WRITER) as held:
                    _wipe(name, held, None)
            self._lvm.remove(volume, TAG_UNFINISHED)
            volume = self._lvm.find(name.group, name.lv)
        if volume is not None:
            volume = self._find(name)
            self._check_limit(name, plan, group)
            return volume, False
        self._check_limit(name, plan, group)
        try:
            self._lvm.create(name.group, name.lv, plan.size_bytes, [TAG_UNFINISHED, *_tags(plan)])
        except Conflict:
            return self._find(name), False  # somebody was faster: the claim tells what comes of it
        volume = self._find(name)
        try:
            # Another provision may have counted before ours was there: now both see both.
            self._check_limit(name, plan, self._lvm.group(name.group) if overcommit.is_limited(group, plan.max_overcommit) else group)
        except BaseException:
            self._lvm.remove(volume, TAG_UNFINISHED)
            raise
        return volume, True

    def _check_limit(self, name: VolumeName, plan: Plan, group: VolumeGroup) -> None:
        """Raises NoSpace if the disk of the plan, in this volume or a new one, promises too much."""
        if overcommit.is_limited(group, plan.max_overcommit):
            overcommit.check_limit(group, self._lvm.volumes(name.group), name.lv, plan.most_bytes, plan.max_overcommit)


class AttachedVolume:
    """A logical volume that is active for us. The last one on this host who closes it switches it off."""

    ours = True

    def __init__(self, lvm: Lvm, name: VolumeName, volume: LogicalVolume, share: sharing.Share, number: int, *, stays_active: bool) -> None:
        self.path = name.path
        self._number = number
        self._stays_active = stays_active  # somebody else's doing, and not for a look to undo
        self._lvm = lvm
        self._name = name
        self._volume = volume
        self._share = share

    def __enter__(self) -> AttachedVolume:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def size_bytes(self) -> int | None:
        return self._volume.size_bytes

    @property
    def base_marks(self) -> frozenset[str] | None:
        return tags.base_tags(self._volume)

    def storage(self, node: Node) -> GroundedStorage:
        return LvmStorage(node, self._volume, self._lvm, notifies_space=udev_is_running())

    def close(self) -> None:
        if self._stays_active:
            self._share.close()
        else:
            _switch_off(self._lvm, self._volume, self._number, self._share)

    def is_wiped(self) -> bool:
        return _is_wiped(self._lvm, self._volume)

    def begin_wipe(self) -> None:
        self._lvm.retag(self._volume, add=[TAG_WIPE])
        self._volume = replace(self._volume, tags=self._volume.tags | {TAG_WIPE})

    def check_retirable(self) -> None:
        self._lvm.whole(self._volume.group)

    def retire(self, identity: Identity) -> None:
        # lvm removes no volume in use: that is for `reclaim`. Whoever comes between the end of the claim and lvremove makes it anew.
        self._lvm.retag(self._volume, remove=[TAG_DISK, *self._volume.tags & {TAG_WIPE}], add=[TAG_UNFINISHED])

    def reclaim(self) -> None:
        self._lvm.remove(self._volume, TAG_UNFINISHED)


class BuiltVolume:
    """A logical volume in the making, claimed."""

    def __init__(self, lvm: Lvm, name: VolumeName, volume: LogicalVolume, share: sharing.Share, plan: Plan, *, created: bool) -> None:
        self._lvm = lvm
        self._name = name
        self._share = share
        self._plan = plan
        self._published = False
        self._volume = volume
        self._was_active = volume.active
        self._created = created  # by us just now: of a disk it holds nothing yet
        self._claim: Claim | None = None
        self.contents = Contents.NOBODYS
        try:
            _switch_on(lvm, volume, name, share)
            share.arrived()
            self._claim = claim(name.path, Ownership.WRITER)
            self.node = open_node(name.path, sharing=self._claim.descriptor)
        except BaseException:
            if self._claim is not None:
                self._claim.close()
            if created:
                lvm.remove(volume, TAG_UNFINISHED)
            raise
        try:
            self._claim.check_covers(self.node)
            self._look_again(volume)
        except BaseException:
            self.close()
            raise

    def _look_again(self, before: LogicalVolume) -> None:
        """What it is now that nobody else can change it."""
        volume = self._lvm.find(self._name.group, self._name.lv)
        if volume is None or volume.uuid != before.uuid:
            raise Conflict(f"{self._name} was removed by somebody else meanwhile; run the command again")
        self._volume = volume
        if TAG_UNFINISHED in volume.tags:
            self.contents = Contents.NOBODYS
        else:
            self.contents = Contents.OURS if TAG_DISK in volume.tags else Contents.FOREIGN

    def ensure_size(self, size_bytes: int) -> None:
        if self.contents is Contents.FOREIGN:
            # From here on it is overwritten: a crash must leave what nobody believes, not half a disk of nobody's.
            self._lvm.retag(self._volume, add=[TAG_UNFINISHED])
        if self._volume.size_bytes < size_bytes:
            self._lvm.extend(self._name.group, self._name.lv, size_bytes)
            self._volume = settle(self._lvm, self._name.group, self._name.lv, self.node.identity[1], refresh=True)

    def publish(self, *, replace: bool) -> None:
        add = [TAG_DISK, *_tags(self._plan)]
        stale = [TAG_UNFINISHED, *tags.fact_tags(self._volume)]
        remove = [tag for tag in stale if tag not in add]
        if self.contents is not Contents.NOBODYS:
            self._lvm.stay_inactive(self._volume)
        self._lvm.retag(self._volume, remove=remove, add=[tag for tag in add if tag not in self._volume.tags])
        volume = self._lvm.find(self._name.group, self._name.lv)
        if volume is None or volume.uuid != self._volume.uuid or not tags.is_disk(volume):
            raise Conflict(f"{self._name} was renamed or removed by somebody else meanwhile; run the command again")
        self._published = True

    def close(self) -> None:
        self.node.close()
        if self._claim is not None:
            self._claim.close()
        if not self._published and self.contents is Contents.NOBODYS:
            try:
                if not self._created and _is_wiped(self._lvm, self._volume):
                    raise InUse("what it held before must be wiped first")
                self._lvm.remove(self._volume, TAG_UNFINISHED)
            except FvdError as error:
                log.warning(
                    "%s: the unfinished volume could not be removed (%s); fvd-lv remove %s tries again", self._name, error, self._name
                )
            finally:
                self._share.close()
            return
        if self._was_active and self.contents is Contents.FOREIGN and not self._published:
            self._share.close()  # somebody else's volume, refused: as it was
            return
        _switch_off(self._lvm, self._volume, self.node.identity[1], self._share)


def _is_wiped(lvm: Lvm, volume: LogicalVolume) -> bool:
    return TAG_WIPE in volume.tags or TAG_WIPE in lvm.group(volume.group).tags


def _wipe(name: VolumeName, held: Claim, wipe: Wipe | None) -> None:
    with open_node(name.path, sharing=held.descriptor) as node:
        held.check_covers(node)
        (wipe or wipe_storage)(node)


def _tags(plan: Plan) -> list[str]:
    """What the group's metadata tells of the disk."""
    facts = Facts(plan.virtual_size_bytes, plan.most_bytes, plan.grow_step_bytes)
    return [*facts.tags(), *([plan.base_mark] if plan.base_mark else [])]


def _refuse_group(state: GroupState, name: str) -> None:
    """Raises Unsupported, InUse, PermissionDenied for a group that must not be used. One that lacks a device is none: what lies on the
    others can be read and served, and what would change the group is refused by itself."""
    if state.shared:
        raise Unsupported(f"volume group {name} is shared or clustered, which fvd does not support yet; use a group of this host alone")
    if state.exported:
        raise InUse(f"volume group {name} is exported for another host; take it back with vgimport {name} if that host has given it up")
    if not state.writable:
        raise PermissionDenied(f"volume group {name} is read-only; vgchange can make it writable")


def _switch_on(lvm: Lvm, volume: LogicalVolume, name: VolumeName, share: sharing.Share) -> LogicalVolume:
    """The volume's device is there, goes on, and is what the metadata says: which is what is returned."""
    if not volume.writable:
        raise PermissionDenied(f"{name} is a read-only logical volume; lvchange --permission rw {name} makes it writable")
    if not volume.active:
        lvm.activate(volume)
    wait_for_node(name.path)
    number = dm.number_of(name.path)
    if not dm.is_volume(number, volume.uuid):
        raise DeviceError(f"{name.path} is not the device of {name} but another's; udev or somebody else has left a stale node (vgmknodes)")
    if not volume.active:
        return volume
    state = dm.state(number)
    alone = share.is_alone()
    if alone or dm.size_bytes(number) != volume.size_bytes or (state is not None and not state.at_rest):
        # Whoever used it last has died, or it is an administrator's. A dead command's table may be in use, of the right size even.
        return settle(lvm, name.group, name.lv, number, refresh=alone)
    return volume


def _switch_off(lvm: Lvm, volume: LogicalVolume, number: int, share: sharing.Share) -> None:
    """Never raises: what was to be done with the volume is done, and the next user takes over an active one."""
    if not share.close_as_last():
        return
    group, name = dm.logical_volume_of(number) or (volume.group, volume.name)  # its name now, if it was renamed
    try:
        lvm.deactivate(replace(volume, group=group, name=name))
    except FvdError as error:
        log.warning("%s stays active: %s", volume.full_name, error)
    finally:
        share.close()
