"""Ends a disk: its superblocks are wiped, and the place is given back. Idempotent; an interrupted remove can be run again."""

from __future__ import annotations

from fvd.device.claim import Ownership, claim
from fvd.device.node import open_node
from fvd.errors import Conflict, NotFound, Unsupported
from fvd.format.superblock import Superblock
from fvd.volume import pending
from fvd.volume.name import VolumeName, parse_name
from fvd.volume.provider import provider_for
from fvd.volume.seams import Presence
from fvd.volume.superblocks import holds_remains, is_blank, state_of, wipe_superblocks


def remove(name: str | VolumeName) -> bool:
    """Removes the disk in a volume: a file is deleted, a device is left without a disk. False: there was none.

    A damaged disk is removed like a whole one. Raises InUse, Conflict (the volume holds something that is not ours), Unsupported (a newer
    format), PermissionDenied, DeviceError.
    """
    volume = parse_name(name)
    provider = provider_for(volume)
    provider.forget_unfinished(volume)
    if provider.presence(volume) is Presence.ABSENT:
        return False
    with provider.attach(volume) as place:
        with claim(place.path, Ownership.WRITER) as held, open_node(place.path, sharing=held.descriptor) as node:
            held.check_covers(node)
            found = state_of(node)
            if isinstance(found, Unsupported):
                raise found
            if isinstance(found, NotFound) and not holds_remains(node) and not (place.ours and is_blank(node)):
                if provider.fixed_size and is_blank(node):
                    return False
                raise Conflict(f"{volume} is not an fvd disk, so it is not removed")
            wipe_superblocks(node)
            if isinstance(found, Superblock):
                # After that, durably: a disk that is still there is never without the log that it names.
                pending.remove_others(found, node, None)
            place.retire(held.identity)
        place.reclaim()
    return isinstance(found, Superblock) or not provider.fixed_size
