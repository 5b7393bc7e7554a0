# SPDX-License-Identifier: Apache-2.0
"""An administrator has seen that acknowledged writes may be gone, of a disk that nobody has open. Of an open one it is
`OpenVolume.acknowledge_loss`."""

from __future__ import annotations

from fvd.device.claim import Ownership, claim
from fvd.device.node import open_node
from fvd.errors import Conflict
from fvd.storage.provider import provider_for
from fvd.volume.name import VolumeName, parse_name
from fvd.volume.superblocks import read_superblock, write_superblock


def acknowledge(name: str | VolumeName) -> bool:
    """The superblock says no more that writes may be gone, durably. False: it did not say so, and nothing was written.

    Raises NotFound, InUse (it is served: ask its control socket), Conflict (its last server did not close it), Corrupt, Unsupported.
    """
    volume = parse_name(name)
    with (
        provider_for(volume).attach(volume) as place,
        claim(place.path, Ownership.WRITER) as held,
        open_node(place.path, sharing=held.descriptor) as node,
    ):
        held.check_covers(node)
        superblock = read_superblock(node)
        if superblock.log is not None:
            # R21: another generation would end the log that the next open needs; and what is lost only that open can tell.
            raise Conflict(
                f"{volume} was not closed by its last server, so nobody knows yet what it has lost: serve it, and acknowledge then"
            )
        if superblock.loss is None:
            return False
        write_superblock(node, superblock.renewed(log=None, loss=None))
        return True
