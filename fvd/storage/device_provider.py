# SPDX-License-Identifier: Apache-2.0
"""Block devices of fixed size: they are there or not, and nothing but their contents is ours. An `interfaces.Provider`."""

from __future__ import annotations

from fvd.device import names
from fvd.device.claim import Ownership, claim
from fvd.device.node import open_node
from fvd.errors import InvalidArgument
from fvd.lvm import dm
from fvd.storage.interfaces import AttachedPath, Contents, Plan, Presence, Wipe
from fvd.storage.sized import FixedStorage
from fvd.volume.name import VolumeName


class DeviceProvider:
    """Block devices."""

    fixed_size = True
    in_place = True

    def presence(self, name: VolumeName) -> Presence:
        return Presence.PRESENT if names.exists(name.path) else Presence.ABSENT

    def attach(self, name: VolumeName, *, looking: bool = False) -> AttachedPath:
        _refuse_other_kinds(name)
        return AttachedPath(name.path, FixedStorage)

    def build(self, name: VolumeName, plan: Plan) -> _Device:
        _refuse_other_kinds(name)
        return _Device(name.path)

    def forget_unfinished(self, name: VolumeName, wipe: Wipe | None = None) -> None:
        pass


class _Device:
    contents = Contents.OURS

    def __init__(self, path: str) -> None:
        self._claim = claim(path, Ownership.WRITER)
        try:
            self.node = open_node(path, sharing=self._claim.descriptor)
            self._claim.check_covers(self.node)
        except BaseException:
            self._claim.close()
            raise

    def ensure_size(self, size_bytes: int) -> None:
        pass

    def publish(self, *, replace: bool) -> None:
        pass

    def close(self) -> None:
        self.node.close()
        self._claim.close()


def _refuse_other_kinds(name: VolumeName) -> None:
    """One disk, one name: a logical volume knows how to grow, and its device does not."""
    if names.leads_to_file(name.path):
        raise InvalidArgument(f"{name} is a regular file; name it file:{name.path}")
    identity = names.identity(name.path)
    volume = dm.logical_volume_of(identity[1]) if identity is not None and identity[0] == "block" else None
    if volume is not None:
        raise InvalidArgument(f"{name} is a logical volume; name it {volume[0]}/{volume[1]}")
