# SPDX-License-Identifier: Apache-2.0
"""The base under a disk: an image, of whatever kind, that shows through where the disk has no block of its own. Read, never written.

Its format and size are stated once, at provision, and only compared afterwards: nothing is ever concluded from a base's contents later on,
for a guest can write there what it likes. A base of this host is opened once, by name; from then on its descriptor is what is judged, read,
and handed to the program that reads an image, each time that one is started. Knows no engine.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from fvd._lifetime import Descriptors
from fvd.base.images import Contents, Handle, check_image, server_command
from fvd.base.locator import parse_format, parse_locator
from fvd.base.options import TIMEOUT_SECONDS
from fvd.base.rights import ROOT, refusal, rights_for, writer_of
from fvd.device.as_user import User, open_as
from fvd.device.claim import Ownership, claim
from fvd.device.holes import find_holes
from fvd.device.node import Identity, Node, open_node, typed_errors
from fvd.errors import Conflict, DeviceError, InvalidArgument, NotFound, PermissionDenied, Unsupported
from fvd.format.locator import BaseFormat
from fvd.format.superblock import BaseReference

if TYPE_CHECKING:
    from fvd.device._remote import Remote

_FD_MIN = 64  # above what a program that is started has for itself


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
    name: str | os.PathLike[str],
    base_format: str | None = None,
    volume: Identity | None = None,
    *,
    timeout_seconds: float = TIMEOUT_SECONDS,
    allow: Sequence[str] = (),
) -> BaseReference:
    """What a provision records of a base: a path of a file or device, or a URI. `base_format`: one of `fvd.modes.BASE_FORMATS`; it must be
    stated where it could be mistaken. `volume`: the disk's own storage, if it exists already. `timeout_seconds`: how long servers may take.
    `allow`: what is opened though its name is a user's to change (`rights.py`).

    Raises NotFound, InUse (mounted writable, or open for writing), InvalidArgument (empty, the volume itself, or not what its format says),
    Unsupported (an fvd disk; an image that needs other files; a program or driver that is missing), PermissionDenied, Timeout, DeviceError.
    """
    locator, image_format = parse_locator(name, parse_format(base_format))
    user = rights_for(locator, ROOT, allow)
    with ExitStack() as resources:
        if locator.startswith("/"):
            node = _open_local(locator, resources, user, timeout_seconds)
            image_format = _examine_contents(node, image_format, volume)
            base = _use(node, image_format, resources, timeout_seconds, user)
        elif image_format is None:
            raise InvalidArgument(f"the base {locator} needs its format")
        else:
            base = _ask_server(locator, image_format, resources, timeout_seconds)
        with base:
            size_bytes = base.size_bytes()
    if size_bytes == 0:
        raise InvalidArgument(f"the base {locator} is empty; leave it out, or name an image")
    return BaseReference(locator, size_bytes, image_format)


def open_base(reference: BaseReference, volume: Identity, timeout_seconds: float = TIMEOUT_SECONDS, user: User | None = None) -> OpenBase:
    """Opens the base that a superblock names. `timeout_seconds`: how long servers may take. `user`: with whose rights (`rights.py`).

    Raises NotFound, Conflict (its size has changed), InUse, Unsupported, PermissionDenied, Timeout, DeviceError.
    """
    locator = reference.locator
    try:
        base = _open(reference, timeout_seconds, volume, user)
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


def _examine_contents(node: Node, stated: BaseFormat | None, volume: Identity | None) -> BaseFormat:
    """The format of a local base, if what is there does not contradict it, or leave it open."""
    path = node.path
    if volume is not None and node.identity == volume:
        raise InvalidArgument(f"{path} cannot be its own base")
    contents = Contents(node)
    if contents.is_fvd and (stated is None or stated is BaseFormat.RAW):
        raise Unsupported(f"the base {path} is an fvd disk; serve it read-only (fvd-lv serve) and name its NBD URI as the base")
    if stated is BaseFormat.RAW:
        return stated
    seen = " and ".join(sorted(mark.name.lower() for mark in contents.marks))
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


def _open(reference: BaseReference, timeout_seconds: float, volume: Identity, user: User | None) -> OpenBase:
    """Opens it, claimed and looked at again. `volume`: what it must not be; `user`: with whose rights."""
    with ExitStack() as resources:
        if not reference.locator.startswith("/"):
            return _ask_server(reference.locator, reference.format, resources, timeout_seconds)
        node = _open_local(reference.locator, resources, user, timeout_seconds)
        if node.identity == volume:
            raise Conflict(f"the base {node.path} leads to the disk itself")
        return _use(node, reference.format, resources, timeout_seconds, user)


def _ask_server(locator: str, base_format: BaseFormat, resources: ExitStack, timeout_seconds: float) -> OpenBase:
    if base_format is BaseFormat.NBD:
        return _connect(locator, resources, timeout_seconds, uri=locator)
    check_image(locator, base_format, timeout_seconds=timeout_seconds)
    return _connect(locator, resources, timeout_seconds, command=server_command(locator, base_format))


def _use(node: Node, base_format: BaseFormat, resources: ExitStack, timeout_seconds: float, user: User | None) -> OpenBase:
    """A base of this host that is open: read as it is, or by a program that inherits its descriptor."""
    if not base_format.is_image:
        return OpenBase(resources.pop_all(), node=node)
    Contents(node).refuse_others(base_format)
    passed = Descriptors()
    resources.callback(passed.close)
    passed_fd = fcntl.fcntl(node.fd, fcntl.F_DUPFD_CLOEXEC, _FD_MIN)
    passed.append(passed_fd)
    judged = _state_of(node)

    def handle() -> Handle:
        return Handle(passed_fd, node.is_block, user or writer_of(node))

    def prepare() -> list[str]:
        """Before each start of its reader, in the connection's thread: it still is what was judged."""
        if _state_of(node) != judged:
            raise Conflict(f"the base {node.path} has been changed since it was opened: put the original back, and open the disk again")
        Contents(node).refuse_others(base_format)
        return server_command(node.path, base_format, handle())

    check_image(node.path, base_format, handle(), timeout_seconds=timeout_seconds)
    command = server_command(node.path, base_format, handle())
    return _connect(node.path, resources, timeout_seconds, command=command, inherited=passed_fd, prepare=prepare)


def _open_local(path: str, resources: ExitStack, user: User | None = None, timeout_seconds: float = TIMEOUT_SECONDS) -> Node:
    """The node and the claim on it, of one open file."""
    opened = None
    if user is not None:
        try:
            opened = open_as(path, user, timeout_seconds)
        except PermissionDenied as error:
            raise refusal(path, f"user {user}, who may have named it, may not read it") from error
        resources.callback(os.close, opened)
    held = resources.enter_context(claim(path, Ownership.BASE, opened=opened))
    return resources.enter_context(open_node(path, read_only=True, direct=False, sharing=held.descriptor))


def _state_of(node: Node) -> tuple[Identity, int, int]:
    """What does not change of a base. (A device's times say nothing of its contents.)"""
    with typed_errors("looking at", node.path):
        status = os.fstat(node.fd)
    return node.identity, node.size_bytes(), 0 if node.is_block else status.st_mtime_ns


def _connect(
    locator: str,
    resources: ExitStack,
    timeout_seconds: float,
    *,
    uri: str | None = None,
    command: list[str] | None = None,
    inherited: int = -1,
    prepare: Callable[[], list[str]] | None = None,
) -> OpenBase:
    # Here, for only who has such a base needs libnbd.
    try:
        from fvd.device._remote import Remote
    except ImportError as error:
        if "libnbd.so" not in str(error) or "No such file" not in str(error):
            raise
        raise Unsupported(f"the base {locator} is read with libnbd; install it (Debian: apt install libnbd0)") from None

    remote = Remote(uri=uri, command=command, timeout_seconds=timeout_seconds, name=locator, inherited=inherited, prepare=prepare)
    with ExitStack() as opening:
        opening.callback(remote.close)
        remote.open()
        resources.enter_context(opening.pop_all())
    return OpenBase(resources.pop_all(), remote=remote)
