# SPDX-License-Identifier: Apache-2.0
"""Which provider holds a volume, by the kind of its name. The shapes are in `interfaces.py`."""

from __future__ import annotations

from fvd.storage.device_provider import DeviceProvider
from fvd.storage.file_provider import FileProvider
from fvd.storage.interfaces import Provider
from fvd.storage.lvm_provider import LvmProvider
from fvd.volume.name import VolumeKind, VolumeName


def provider_for(name: VolumeName) -> Provider:
    """The provider of a kind of name."""
    if name.kind is VolumeKind.LVM:
        return LvmProvider()
    return FileProvider() if name.kind is VolumeKind.FILE else DeviceProvider()
