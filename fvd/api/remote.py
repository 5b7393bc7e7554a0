# SPDX-License-Identifier: Apache-2.0
"""Asks the process that serves a volume, if there is one. Knows control sockets, not what the verbs mean."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fvd.volume.name import VolumeName

# How long a verb may take. A server that says nothing for so long is stuck, most likely in storage that does not answer.
TIMEOUT_SECONDS = {"info": 30.0, "map": 300.0, "check": 300.0, "extend": 120.0, "acknowledge": 30.0, "attach": 60.0}
# Verbs that only turn or read something in the loop; and a profile, which is written to a file.
TIMEOUT_SECONDS |= dict.fromkeys(("prefetch_start", "prefetch_stop", "prefetch_status", "copy_on_read", "profile_record"), 30.0)


class NotServed:
    """The answer when nobody serves the volume: any JSON value may be an answer of a server."""


NOT_SERVED = NotServed()


def ask(name: VolumeName, verb: str, **arguments: Any) -> Any:
    """The answer of the process that serves the volume, or NOT_SERVED. Raises what the verb raised there, Timeout, PermissionDenied."""
    from fvd.control.client import ControlClient
    from fvd.control.paths import find_sockets
    from fvd.control.protocol import ServerGone
    from fvd.control.trust import is_believed

    paths = find_sockets(name.path)
    if not paths or not _is_its_device(name):
        return NOT_SERVED
    for path in paths:
        client = ControlClient(path, timeout_seconds=TIMEOUT_SECONDS[verb])
        try:
            client.connect()
        except ServerGone:
            continue  # the socket of a process that has died
        with client:
            if is_believed(client.peer_uid, name.path):
                return client.ask(verb, **arguments)
        logging.getLogger(__name__).warning("%s: user %d listens at %s, to whom it does not belong: not asked", name, client.peer_uid, path)
    return NOT_SERVED


def _is_its_device(name: VolumeName) -> bool:
    """Whether the node of a logical volume leads to that volume: a stale one would lead a verb to somebody else's server."""
    from fvd.lvm import dm
    from fvd.volume.name import VolumeKind

    if name.kind is not VolumeKind.LVM:
        return True
    logical_volume = dm.logical_volume_of(dm.number_of(name.path))
    return logical_volume is None or logical_volume == (name.group, name.lv)
