"""fvd: virtual disks that hold what was written and no more, on raw storage, and survive any crash.

    import fvd

    fvd.provision("file:vm1.img", "100G")
    with fvd.open("file:vm1.img") as disk:
        disk.pwrite(0, b"hello")
        disk.flush()
    with fvd.serve("file:vm1.img", socket="vm1.sock") as served:
        print(served.uri, fvd.info("file:vm1.img").mapped_bytes)

Importing does no work: no file, thread, process or socket. Every function is safe from threads. Sizes are bytes, or text such as
"100G" (GiB). Errors are the types of `fvd.errors`, all of them `FvdError`.
"""

from fvd.api.disk import Disk, open
from fvd.api.listing import list_volumes
from fvd.api.serving import Served, serve
from fvd.api.types import Base, CacheMode, CheckReport, Export, Extended, Extent, Info, Listed, Map, OnFull, Provisioned
from fvd.api.verbs import check, dump, extend, info, map, provision, remove
from fvd.errors import (
    Conflict,
    Corrupt,
    DeviceError,
    FvdError,
    InUse,
    InvalidArgument,
    NoSpace,
    NotFound,
    PermissionDenied,
    ReadOnly,
    Timeout,
    Unsupported,
)

__version__ = "0.1.0"

__all__ = [
    "Base",
    "CacheMode",
    "CheckReport",
    "Conflict",
    "Corrupt",
    "DeviceError",
    "Disk",
    "Export",
    "Extended",
    "Extent",
    "FvdError",
    "InUse",
    "Info",
    "InvalidArgument",
    "Listed",
    "Map",
    "NoSpace",
    "NotFound",
    "OnFull",
    "PermissionDenied",
    "Provisioned",
    "ReadOnly",
    "Served",
    "Timeout",
    "Unsupported",
    "check",
    "dump",
    "extend",
    "info",
    "list_volumes",
    "map",
    "open",
    "provision",
    "remove",
    "serve",
]
