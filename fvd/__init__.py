# SPDX-License-Identifier: Apache-2.0
"""fvd: virtual disks that hold what was written and no more, on raw storage, and survive any crash.

    import fvd

    fvd.provision("file:vm1.img", "100G")
    with fvd.open("file:vm1.img") as disk:
        disk.pwrite(0, b"hello")
        disk.flush()
    with fvd.serve("file:vm1.img", socket="vm1.sock") as served:
        print(served.uri, fvd.info("file:vm1.img").mapped_bytes)
    for event in fvd.events():  # what happens to the disks that are served, in whatever process
        print(event.kind, event.volume)

Importing does no work: no file, thread, process or socket. Every function is safe from threads. Sizes are bytes, or text such as
"100G" (GiB). `fvd.aio` has the same for asyncio, and is imported by its name. Errors are the types of `fvd.errors`, all of them `FvdError`.
"""

from typing import TYPE_CHECKING, Any

from fvd.errors import (
    Conflict,
    Corrupt,
    DeviceError,
    Forked,
    FvdError,
    InUse,
    InvalidArgument,
    NoSpace,
    NotFound,
    OutOfMemory,
    PermissionDenied,
    ReadOnly,
    Timeout,
    Unsupported,
)
from fvd.modes import BaseFormat, CacheMode, OnFull

if TYPE_CHECKING:
    from fvd.api.attach import AttachInfo, attach_info
    from fvd.api.attach_vhost_user import AttachVhostUser
    from fvd.api.attaching import Attached, attach, detach
    from fvd.api.disk import Disk, open
    from fvd.api.events import Event, EventStream
    from fvd.api.following import events
    from fvd.api.listing import list_groups, list_volumes
    from fvd.api.prefetching import prefetch_start, prefetch_status, prefetch_stop, record_profile, set_copy_on_read
    from fvd.api.profile import read_profile
    from fvd.api.served import Served, serve
    from fvd.api.types import (
        Base,
        CheckReport,
        Export,
        Extended,
        Extent,
        Group,
        Info,
        Listed,
        Map,
        PossibleLoss,
        PrefetchOptions,
        PrefetchState,
        PrefetchStatus,
        Profile,
        Provisioned,
        SavedProfile,
    )
    from fvd.api.verbs import acknowledge, check, dump, extend, info, map, provision, remove

__version__ = "0.2.0"

__all__ = [
    "AttachInfo",
    "AttachVhostUser",
    "Attached",
    "Base",
    "BaseFormat",
    "CacheMode",
    "CheckReport",
    "Conflict",
    "Corrupt",
    "DeviceError",
    "Disk",
    "Event",
    "EventStream",
    "Export",
    "Extended",
    "Extent",
    "Forked",
    "FvdError",
    "Group",
    "InUse",
    "Info",
    "InvalidArgument",
    "Listed",
    "Map",
    "NoSpace",
    "NotFound",
    "OnFull",
    "OutOfMemory",
    "PermissionDenied",
    "PossibleLoss",
    "PrefetchOptions",
    "PrefetchState",
    "PrefetchStatus",
    "Profile",
    "Provisioned",
    "ReadOnly",
    "SavedProfile",
    "Served",
    "Timeout",
    "Unsupported",
    "acknowledge",
    "attach",
    "attach_info",
    "check",
    "detach",
    "dump",
    "events",
    "extend",
    "info",
    "list_groups",
    "list_volumes",
    "map",
    "open",
    "prefetch_start",
    "prefetch_status",
    "prefetch_stop",
    "provision",
    "read_profile",
    "record_profile",
    "remove",
    "serve",
    "set_copy_on_read",
]

# Each is imported when it is asked for: a server that is idle must not hold what only other verbs need.
_HOME = {
    "fvd.api.attach": "AttachInfo attach_info",
    "fvd.api.attach_vhost_user": "AttachVhostUser",
    "fvd.api.attaching": "Attached attach detach",
    "fvd.api.disk": "Disk open",
    "fvd.api.events": "Event EventStream",
    "fvd.api.following": "events",
    "fvd.api.listing": "list_groups list_volumes",
    "fvd.api.prefetching": "prefetch_start prefetch_status prefetch_stop record_profile set_copy_on_read",
    "fvd.api.profile": "read_profile",
    "fvd.api.served": "Served serve",
    "fvd.api.types": (
        "Base CheckReport Export Extended Extent Group Info Listed Map PossibleLoss PrefetchOptions PrefetchState PrefetchStatus "
        "Profile Provisioned SavedProfile"
    ),
    "fvd.api.verbs": "acknowledge check dump extend info map provision remove",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    from fvd.errors import quoted

    for module, names in _HOME.items():
        if name in names.split():
            value = globals()[name] = getattr(import_module(module), name)
            return value
    raise AttributeError(f"module 'fvd' has no attribute {quoted(name)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
