"""The base under a disk: an image, of whatever kind, that shows through where the disk has no block of its own. Read, never written.

Its format and size are stated once, at provision, and only compared afterwards: nothing is ever concluded from a base's contents later on,
for a guest can write there what it likes. Knows no engine.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, TypeVar

from fvd.device.claim import Ownership, claim
from fvd.device.holes import find_holes
from fvd.device.image_claim import claim_image
from fvd.device.node import Identity, Node, open_node
from fvd.errors import Conflict, DeviceError, FvdError, InUse, InvalidArgument, NotFound, Unsupported
from fvd.format.locator import BaseFormat
from fvd.format.superblock import BaseReference
from fvd.volume.base_images import Contents, check_image, server_command
from fvd.volume.base_locator import parse_format, parse_locator

if TYPE_CHECKING:
    from fvd.device._remote import Remote

TIMEOUT_S = 30.0
_TRIES = 3
T = TypeVar("T")


class OpenBase:
    """A base in use: a file or device of this host, open read-only through the page cache, for golden images are shared by many disks; or
    a connection to what serves it. Claimed in either case, where it is of this host.

    One of `node` and `remote` is None. Closing it again is fine.
    """

    def __init__(self, resources: ExitStack, *, node: Node | None = None, remote: Remote | None = None) -> None:
        self.node = node
        self.remote = remote
        self._resources = resources

    def __enter__(self) -> OpenBase:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def fd(self) -> int:
        """For reads of a local base; -1: it is remote, or closed."""
        return -1 if self.node is None else self.node.fd

    def size_bytes(self) -> int:
        """Raises DeviceError."""
        if self.remote is not None:
            return int(self.remote.size_bytes)
        if self.node is None:
            raise DeviceError("the base has been closed")
        return self.node.size_bytes()

    def zero_extents(self) -> Iterator[tuple[int, int]]:
        """(offset_bytes, length_bytes) of what is known to be zeros without reading it; perhaps nothing. Raises DeviceError, Timeout."""
        if self.remote is not None:
            yield from self.remote.zero_extents()
        elif self.node is not None:
            yield from find_holes(self.node)

    def close(self) -> None:
        self._resources.close()


def examine_base(
    name: str | os.PathLike[str], base_format: str | None = None, volume: Identity | None = None, *, timeout_s: float = TIMEOUT_S
) -> BaseReference:
    """What a provision records of a base: a path of a file or device, or a URI. `base_format`: one of `base_locator.FORMATS`; it must be
    stated where it could be mistaken. `volume`: the disk's own storage, if it exists already. `timeout_s`: how long servers may take.

    Raises NotFound, InUse (mounted writable, or open for writing), InvalidArgument (empty, the volume itself, or not what its format says),
    Unsupported (an fvd disk; an image that needs other files; a program or driver that is missing), PermissionDenied, Timeout, DeviceError.
    """
    locator, found = parse_locator(name, parse_format(base_format))
    if locator.startswith("/"):
        found = _examine_contents(locator, found, volume)
    if found is None:
        raise InvalidArgument(f"the base {locator} needs its format")
    with _open(locator, found, timeout_s) as base:
        size_bytes = base.size_bytes()
    if size_bytes == 0:
        raise InvalidArgument(f"the base {locator} is empty; leave it out, or name an image")
    return BaseReference(locator, size_bytes, found)


def open_base(reference: BaseReference, volume: Identity, timeout_s: float = TIMEOUT_S) -> OpenBase:
    """Opens the base that a superblock names. `timeout_s`: how long servers may take.

    Raises NotFound, Conflict (its size has changed), InUse, Unsupported, PermissionDenied, Timeout, DeviceError.
    """
    locator = reference.locator
    try:
        base = _open(locator, reference.format, timeout_s, volume)
    except NotFound as error:
        raise NotFound(f"the disk's base is missing: {error}") from error
    try:
        size_bytes = base.size_bytes()
        if size_bytes != reference.size_bytes:
            raise Conflict(
                f"the base {locator} has {size_bytes} bytes, but had {reference.size_bytes} when the disk was made: "
                "it has been changed or replaced; put the original back"
            )
    except BaseException:
        base.close()
        raise
    return base


def _examine_contents(path: str, stated: BaseFormat | None, volume: Identity | None) -> BaseFormat:
    """The format of a local base, if what is there does not contradict it, or leave it open."""
    with ExitStack() as resources:
        node = _open_local(path, resources, image=True)
        if volume is not None and node.identity == volume:
            raise InvalidArgument(f"{path} cannot be its own base")
        contents = Contents(node)
    if contents.is_fvd and (stated is None or stated is BaseFormat.RAW):
        raise Unsupported(f"the base {path} is an fvd disk; serve it read-only (fvd-lv serve) and name its NBD URI as the base")
    if stated is BaseFormat.RAW:
        return stated
    seen = " and ".join(sorted(found.name.lower() for found in contents.marks))
    if stated is not None:
        if stated not in contents.marks:
            name = stated.name.lower()
            raise InvalidArgument(f"the base {path} is said to be {name}, but looks like {seen or 'raw'}; check which image it is")
        return stated
    if seen:
        raise InvalidArgument(
            f"the base {path} looks like {seen}: say which it is (--base-format {min(contents.marks).name.lower()}, "
            "or --base-format raw if a guest is to see these very bytes)"
        )
    return BaseFormat.RAW


def _open(locator: str, base_format: BaseFormat, timeout_s: float, volume: Identity | None = None) -> OpenBase:
    """Opens it, claimed and looked at again. `volume`: what it must not be."""
    with ExitStack() as resources:
        if not locator.startswith("/"):
            if base_format is BaseFormat.NBD:
                return _connect(locator, resources, timeout_s, uri=locator)
            check_image(locator, base_format, timeout_s=timeout_s)
            return _connect(locator, resources, timeout_s, command=server_command(locator, base_format))
        node = _open_local(locator, resources, image=base_format.is_image)
        if volume is not None and node.identity == volume:
            raise Conflict(f"the base {locator} leads to the disk itself")
        if not base_format.is_image:
            return OpenBase(resources.pop_all(), node=node)
        Contents(node).refuse_others(base_format)
        node.close()  # the claim has a descriptor of its own
        _again(lambda: check_image(locator, base_format, timeout_s=timeout_s), InUse)
        command = server_command(locator, base_format, is_block=node.is_block)
        return _again(lambda: _connect(locator, resources, timeout_s, command=command), DeviceError)


def _open_local(path: str, resources: ExitStack, *, image: bool) -> Node:
    held = resources.enter_context(claim_image(path) if image else claim(path, Ownership.BASE))
    node = resources.enter_context(open_node(path, read_only=True, direct=False))
    held.check_covers(node)
    return node


def _connect(locator: str, resources: ExitStack, timeout_s: float, *, uri: str | None = None, command: list[str] | None = None) -> OpenBase:
    # Here, for only who has such a base needs libnbd.
    from fvd.device._remote import Remote

    remote = Remote(uri=uri, command=command, timeout_s=timeout_s, name=locator)
    with ExitStack() as opening:
        opening.callback(remote.close)
        remote.open()
        resources.enter_context(opening.pop_all())
    return OpenBase(resources.pop_all(), remote=remote)


def _again(call: Callable[[], T], passing: type[FvdError]) -> T:
    """The claim of another disk on the same image may stop a program of QEMU's that begins at the same moment: see claim_image."""
    for _ in range(_TRIES - 1):
        with suppress(passing):
            return call()
    return call()
