"""The growing end of an open logical volume: one `lvextend` a step, and what a broken one leaves is put right (docs/lvm.md has the table).

Knows neither engine nor format; the device's own size is the truth.
"""

from __future__ import annotations

import contextlib

from fvd.device.lengthen import Lengthener
from fvd.device.node import Node
from fvd.errors import FvdError, NoSpace
from fvd.lvm import dm
from fvd.lvm.commands import Lvm
from fvd.units import format_size
from fvd.volume.growth import Pool


class LvmStorage:
    """Storage in a logical volume."""

    can_grow = True

    def __init__(self, node: Node, group: str, name: str, lvm: Lvm, *, tells_of_room: bool) -> None:
        self.tells_of_room = tells_of_room
        self.last_suspend_seconds: float | None = None
        self._device = Lengthener(node)
        self._number = node.identity[1]
        self._group = group
        self._name = name
        self._lvm = lvm

    def size_bytes(self) -> int:
        return self._device.size_bytes()

    def grow_to(self, size_bytes: int) -> None:
        if self.size_bytes() >= size_bytes:
            return
        gauge = dm.SuspendGauge(self._number)
        try:
            with gauge:
                self._extend(size_bytes)
        finally:
            self.last_suspend_seconds = gauge.seconds

    def pool(self) -> Pool:
        return Pool(self._group, self._lvm.group(self._group).free_bytes)

    def close(self) -> None:
        self._device.close()

    def _extend(self, size_bytes: int) -> None:
        try:
            self._lvm.extend(self._group, self._name, size_bytes)
        except NoSpace:
            self._mend()
            if self.size_bytes() < size_bytes:
                self._take_rest(size_bytes)
            return
        except FvdError:
            # Killed, hung, refused: the size decides whether it has worked.
            self._mend()
            if self.size_bytes() < size_bytes:
                raise
            return
        if self.size_bytes() < size_bytes:
            # lvm's metadata had the size already: an earlier step was killed between its commit and the device.
            self._mend()

    def _mend(self) -> None:
        """The device goes on, and is as large as the metadata says. Its failures are not the step's: that one has its own."""
        with contextlib.suppress(FvdError):
            release_if_suspended(self._lvm, self._group, self._name, self._number)
        with contextlib.suppress(FvdError):
            found = self._lvm.find(self._group, self._name)
            if found is not None and found.size_bytes > self.size_bytes():
                self._lvm.refresh(self._group, self._name)

    def _take_rest(self, size_bytes: int) -> None:
        """Less than was asked for, but all there is. Always raises NoSpace, unless somebody has made room meanwhile."""
        group = self._lvm.group(self._group)
        have = self.size_bytes()
        rest = group.free_bytes // group.extent_bytes * group.extent_bytes
        if rest:
            self._lvm.extend(self._group, self._name, min(size_bytes, have + rest))
        if self.size_bytes() < size_bytes:
            raise NoSpace(
                f"volume group {self._group} is full: {format_size(size_bytes - have)} more were wanted for {self._name}, and "
                f"{format_size(rest)} were left; add a physical volume (vgextend {self._group} DEVICE), and writes go on by themselves"
            )


def release_if_suspended(lvm: Lvm, group: str, name: str, number: int) -> bool:
    """Has a device go on that a dead command left suspended. True: it did.

    `lvs` waits for the group's lock, which a living command holds as long as it has the device suspended: so what it reports is abandoned.
    """
    if not dm.is_suspended(number):
        return False
    found = lvm.find(group, name)
    device = dm.device_name(number)
    if found is None or not found.suspended or device is None:
        return False
    lvm.release_suspended(device)
    return True
