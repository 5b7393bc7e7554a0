# SPDX-License-Identifier: Apache-2.0
"""The growing end of an open logical volume: one `lvextend` a step, and what a broken one leaves is put right (docs/lvm.md has the table).

Knows neither engine nor format. A size is believed only when lvm's committed metadata has it: what a device shows may be the table of a
step that died before its commit, and extents that lvm gives to somebody else next.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable

from fvd.device.lengthen import Lengthener
from fvd.device.node import Node
from fvd.errors import DeviceError, FvdError, NoSpace, NotFound
from fvd.lvm import dm
from fvd.lvm.commands import Lvm
from fvd.lvm.placement import Placement
from fvd.lvm.report import LogicalVolume, PhysicalVolume, VolumeGroup
from fvd.storage.interfaces import Pool
from fvd.units import format_size

# A suspended device suspends the guest: resuming it is retried soon, for as long as it takes.
MEND_SECONDS = 1.0


class LvmStorage:
    """Storage in a logical volume. `volume`: as it was when its device was last put right, before the disk was opened."""

    can_grow = True

    def __init__(self, node: Node, volume: LogicalVolume, lvm: Lvm, *, notifies_space: bool) -> None:
        self.notifies_space = notifies_space
        self.last_suspend_seconds: float | None = None
        self._device = Lengthener(node)
        self._number = node.identity[1]
        self._group = volume.group
        self._name = volume.name
        self._extent_bytes = volume.extent_bytes
        self._lvm = lvm
        self._uuid = volume.uuid
        self._closed = threading.Event()
        self._growing = False
        self._committed_bytes = volume.size_bytes
        self._looking = threading.Lock()  # guards the rest
        self._placement = Placement(self._number)
        self._held_bytes = self._most_bytes = 0
        self._on_moved: Callable[[str], None] | None = None
        self._why_moved = ""

    def size_bytes(self) -> int:
        size_bytes = self._device.size_bytes()
        # In this order: a step that ends meanwhile has committed its size before it ends.
        if not self._growing and size_bytes > self._committed_bytes:
            # Not by us. Somebody's lvextend, or the loaded table of a dead one.
            self._settle()
            size_bytes = self._device.size_bytes()
        found_bytes = min(size_bytes, self._committed_bytes)
        self._follow(found_bytes)
        return found_bytes

    def hold(self, size_bytes: int, most_bytes: int, on_moved: Callable[[str], None]) -> None:
        self._most_bytes, self._held_bytes, self._on_moved = most_bytes, min(size_bytes, most_bytes), on_moved
        self._follow(size_bytes)

    def look(self) -> None:
        with contextlib.suppress(DeviceError):  # it is closed, or gone, and that is told otherwise
            self._follow(min(self._device.size_bytes(), self._held_bytes))

    def _follow(self, size_bytes: int) -> None:
        """It has this size, and is used as far as that. What is not of the metadata's size is not looked at, whatever the table has there:
        so the steps of our own, and what is put right after one, larger and smaller, change nothing that is held."""
        with self._looking:
            if self._on_moved is None:
                return
            size_bytes = min(size_bytes, self._most_bytes)
            if size_bytes < self._held_bytes:
                # A step of our own may have ended since it was read.
                size_bytes = min(self._device.size_bytes(), self._held_bytes)
            why: str | None = None
            if size_bytes < self._held_bytes:
                why = f"it has {format_size(size_bytes)}, and had {format_size(self._held_bytes)}"
            else:
                why = self._placement.follow(size_bytes)
                self._held_bytes = size_bytes
            if why is None:
                return
            told, self._on_moved = self._on_moved, None
        self._why_moved = (
            f"logical volume {self._group}/{self._name} has been changed by somebody else while it was in use: {why}. What the disk held "
            "there is lost, and may be another volume's by now"
        )
        told(self._why_moved)

    def grow_to(self, size_bytes: int) -> None:
        have_bytes = self.size_bytes()
        if self._why_moved:
            raise DeviceError(self._why_moved)
        if have_bytes >= size_bytes:
            return
        self._growing = True
        gauge = dm.SuspendGauge(self._number)
        try:
            with gauge:
                self._grow(size_bytes)
        finally:
            self._growing = False
            self.last_suspend_seconds = gauge.seconds

    def pool(self) -> Pool:
        return Pool(self._group, self._obtainable_bytes(self._lvm.group(self._group)))

    def close(self) -> None:
        self._closed.set()
        self._device.close()

    def _grow(self, size_bytes: int) -> None:
        renamed = dm.logical_volume_of(self._number)
        if renamed is not None:
            self._group, self._name = renamed  # lvrename, vgrename: another volume may have the old name by now
        state = dm.state(self._number)
        if state is not None and not state.at_rest:
            # lvm would use the table that is loaded, whatever it says, and call it the new size.
            self._mend()
        # Before every command that changes it: a list of devices without one of the group's would make lvm take that one for lost.
        group = self._lvm.whole(self._group)
        try:
            self._extend(size_bytes, group)
        except NoSpace as error:
            if self._committed_bytes < size_bytes:
                self._take_rest(size_bytes, error)

    def _extend(self, size_bytes: int, group: VolumeGroup) -> None:
        """Raises what lvextend failed with, unless it has worked all the same: what is committed decides."""
        devices = self._fitting(group)
        try:
            # Named only where some must not be taken: lvm chooses among all as it is told to otherwise.
            only = [] if devices == group.usable() else [each.device for each in devices]
            extended = self._lvm.extend(self._group, self._name, size_bytes, only, whole=group)
        except FvdError:
            # Killed, hung, refused: it may have stopped anywhere.
            self._mend()
            if self._committed_bytes < size_bytes:
                raise
            return
        state = dm.state(self._number)
        unit_bytes = self._extent_bytes * dm.stripes(self._number)
        expected_bytes = -(-size_bytes // unit_bytes) * unit_bytes
        if extended and (state is None or state.at_rest) and self._device.size_bytes() == expected_bytes:
            self._committed_bytes = expected_bytes
        else:
            # lvm says that there is nothing to do (an earlier step was killed between its commit and the device), or it has put to use
            # what a command left that died while ours waited for the lock: the same size, perhaps, and extents of somebody else.
            self._mend(refresh=True)

    def _fitting(self, group: VolumeGroup) -> list[PhysicalVolume]:
        """What this volume may grow onto. Where blocks are larger its own would become so, under a guest that uses the smaller ones."""
        block_bytes = dm.logical_block_bytes(self._number)
        return [each for each in group.usable() if dm.logical_block_bytes(os.makedev(*each.number)) <= block_bytes]

    def _obtainable_bytes(self, group: VolumeGroup) -> int:
        """What this volume can get, which may be less than what the group has."""
        return group.obtainable_bytes(dm.stripes(self._number), self._fitting(group))

    def _mend(self, *, refresh: bool = False) -> None:
        """Until the device goes on: while it is suspended nothing is more urgent. Raises what kept the rest from being put right."""
        while True:
            try:
                self._settle(refresh=refresh)
                return
            except FvdError:
                state = dm.state(self._number)
                if state is None or not state.suspended or self._closed.wait(MEND_SECONDS):
                    raise

    def _settle(self, *, refresh: bool = False) -> None:
        volume = settle(self._lvm, self._group, self._name, self._number, refresh=refresh)
        if volume.uuid != self._uuid:
            raise DeviceError(f"{self._group}/{self._name} is another volume now; the one that is open cannot grow")
        self._committed_bytes = max(self._committed_bytes, volume.size_bytes)

    def _take_rest(self, size_bytes: int, refusal: NoSpace) -> None:
        """Less than was asked for, but all there is. Always raises NoSpace, unless somebody has freed space meanwhile.

        What is free may be of no use to this volume: on a physical volume that may not be allocated from, or where only one of two stripes
        finds space. What can be had is known by that, as a rule; and what is refused all the same is halved, down to an extent.
        """
        group = self._lvm.whole(self._group)
        have, unit_bytes = self._committed_bytes, group.extent_bytes * dm.stripes(self._number)
        obtainable_bytes = self._obtainable_bytes(group)
        piece_bytes = min(obtainable_bytes, -(-(size_bytes - have) // unit_bytes) * unit_bytes) // unit_bytes * unit_bytes
        while piece_bytes and self._committed_bytes < size_bytes:
            try:
                self._extend(min(size_bytes, self._committed_bytes + piece_bytes), group)
            except NoSpace as error:
                refusal = error
            left_bytes = max(0, obtainable_bytes - (self._committed_bytes - have))
            piece_bytes = min(piece_bytes // 2, left_bytes) // unit_bytes * unit_bytes
        if self._committed_bytes < size_bytes:
            grown_bytes = self._committed_bytes - have
            unused_bytes = max(0, group.free_bytes - grown_bytes)
            unused = f" ({format_size(unused_bytes)} are free there and cannot be had for it)" if unused_bytes else ""
            full = NoSpace(
                f"volume group {self._group} is full{unused}: {format_size(size_bytes - have)} more were wanted for {self._name}, and "
                f"{format_size(grown_bytes)} could be had; writes go on by themselves when it has more. {refusal}"
            )
            full.left_bytes = max(0, obtainable_bytes - grown_bytes)
            raise full


def settle(lvm: Lvm, group: str, name: str, number: int, *, refresh: bool = False) -> LogicalVolume:
    """Puts an active volume's device right: it goes on, no table of a dead command waits to be used, and it is what the metadata says.

    Returns what is committed. `refresh`: also where nothing seems wrong. Raises NotFound, DeviceError, Timeout...

    `lvs` waits for the group's lock, which a living command holds from before it loads a table until the device goes on: what it reports
    has been abandoned. The loaded table is dropped first: any other command would use it, for libdm loads none over it.
    """
    volume = lvm.find(group, name)
    if volume is None:
        raise NotFound(f"logical volume {group}/{name} is gone, though its device is open")
    if volume.device_number is not None and volume.device_number != (os.major(number), os.minor(number)):
        raise DeviceError(
            f"{group}/{name} is not the device that is open under its name (renamed, or a stale node); look at ls -l /dev/{group}"
        )
    state, device = dm.state(number), dm.device_name(number)
    # Both: what `lvs` saw under the lock, and what is still so. A command that has begun since is alive.
    abandoned = volume.suspended or volume.inactive_table
    if abandoned and state is not None and device is not None and not state.at_rest:
        lvm.drop_loaded_table(device)
        if volume.suspended and state.suspended:
            lvm.resume(device)
        refresh = True
    if refresh or dm.size_bytes(number) != volume.size_bytes:
        lvm.refresh(volume)
        state = dm.state(number)
        uuid, volume = volume.uuid, lvm.find(group, name)
        if (
            volume is None
            or volume.uuid != uuid
            or dm.size_bytes(number) != volume.size_bytes
            or (volume.suspended and state is not None and state.suspended)
        ):
            raise DeviceError(
                f"{group}/{name} cannot be brought into the state that its metadata has; look at dmsetup info and lvchange --refresh"
            )
    return volume
