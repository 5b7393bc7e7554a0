# SPDX-License-Identifier: Apache-2.0
"""Which provider holds a volume, by the kind of its name. The shapes are in `interfaces.py`."""

from __future__ import annotations

from fvd.storage.interfaces import Provider
from fvd.volume.name import VolumeKind, VolumeName


def provider_for(name: VolumeName) -> Provider:
    """The provider of a kind of name. The others are not imported: an idle server must not hold them."""
    if name.kind is VolumeKind.LVM:
        from fvd.storage.lvm_provider import LvmProvider

        return LvmProvider()
    if name.kind is VolumeKind.FILE:
        from fvd.storage.file_provider import FileProvider

        return FileProvider()
    from fvd.storage.device_provider import DeviceProvider

    return DeviceProvider()
