# SPDX-License-Identifier: Apache-2.0
"""Ends a disk: its superblocks are wiped, all of its storage if that is wanted, and the place is given back.

Idempotent; an interrupted remove can be run again. Superblocks go first: a disk of which some is zeros by now is no disk any more.
"""

from __future__ import annotations

from functools import partial

from fvd.device.claim import Ownership, claim
from fvd.device.node import open_node
from fvd.device.wiping import Progress
from fvd.disk import pending
from fvd.errors import Conflict, NotFound, Unsupported
from fvd.format.superblock import Superblock
from fvd.storage.interfaces import Presence
from fvd.storage.provider import provider_for
from fvd.volume.name import VolumeName, parse_name
from fvd.volume.superblocks import holds_remains, is_blank, state_of, wipe_storage, wipe_superblocks


def remove(name: str | VolumeName, *, wipe: bool = False, progress: Progress | None = None) -> bool:
    """Removes the disk in a volume: a file is deleted, a device is left without a disk. False: there was none.

    `wipe`: all that it stored is made zeros and read back before; so it is without where the volume or its group says so (tag fvd.wipe).
    A damaged disk is removed like a whole one. Raises InUse, Conflict (the volume holds something that is not ours), Unsupported (a newer
    format), PermissionDenied, DeviceError.
    """
    volume = parse_name(name)
    provider = provider_for(volume)
    zero = partial(wipe_storage, progress=progress)
    provider.forget_unfinished(volume, zero if wipe else None)
    if provider.presence(volume) is Presence.ABSENT:
        return False
    with provider.attach(volume) as place:
        with claim(place.path, Ownership.WRITER) as held, open_node(place.path, sharing=held.descriptor) as node:
            held.check_covers(node)
            state = state_of(node)
            if isinstance(state, Unsupported):
                raise state
            if isinstance(state, NotFound) and not holds_remains(node) and not (place.ours and is_blank(node)):
                if provider.fixed_size and is_blank(node):
                    return False
                raise Conflict(f"{volume} is not an fvd disk, so it is not removed")
            place.check_retirable()
            wiped = wipe or place.is_wiped()
            if wiped:
                place.begin_wipe()
            wipe_superblocks(node)
            if isinstance(state, Superblock):
                # After that, durably: a disk that is still there is never without the log that it names.
                pending.remove_others(state, node, None)
            if wiped:
                # A file by the page cache: its last block need not be whole.
                with open_node(place.path, direct=node.is_block, sharing=held.descriptor) as storage:
                    zero(storage)
            place.retire(held.identity)
        place.reclaim()
    return isinstance(state, Superblock) or wiped or not provider.fixed_size
