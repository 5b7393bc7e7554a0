# SPDX-License-Identifier: Apache-2.0
"""More storage under a disk that nobody has open. A served disk's allocator does the same (`Allocator.extend_now`)."""

from __future__ import annotations

from dataclasses import dataclass

from fvd.device.claim import Ownership, claim
from fvd.device.node import open_node
from fvd.errors import InvalidArgument
from fvd.storage.provider import provider_for
from fvd.volume.name import VolumeName, parse_name
from fvd.volume.superblocks import read_superblock


@dataclass(frozen=True)
class Extension:
    """What an extend achieved."""

    name: VolumeName
    storage_size_bytes: int
    added_bytes: int


def extend(name: str | VolumeName, by_bytes: int | None = None) -> Extension:
    """Enlarges the storage (default: by a grow step), at most to what the disk can ever use; the virtual size stays as it is.

    Raises NotFound, InUse (it is served: ask its control socket), NoSpace (what could be had is kept), Unsupported (fixed device), Corrupt.
    """
    if by_bytes is not None and by_bytes <= 0:
        raise InvalidArgument(f"cannot extend by {by_bytes} bytes; name a size above 0")
    volume = parse_name(name)
    provider = provider_for(volume)
    with (
        provider.attach(volume) as place,
        claim(place.path, Ownership.WRITER) as held,
        open_node(place.path, sharing=held.descriptor) as node,
    ):
        held.check_covers(node)
        geometry = read_superblock(node).geometry
        storage = place.storage(node)
        try:
            before_bytes = storage.size_bytes()
            target_bytes = before_bytes + (geometry.grow_step_bytes if by_bytes is None else by_bytes)
            target_bytes = min(target_bytes, geometry.max_storage_size_bytes)
            if target_bytes > before_bytes:
                storage.grow_to(target_bytes)
            after_bytes = storage.size_bytes()
        finally:
            storage.close()
        return Extension(volume, after_bytes, after_bytes - before_bytes)
