"""The base under a disk: a raw file or block device that shows through where the disk has no block of its own. Read, never written.

Its format and size are stated once, at provision, and only compared afterwards: nothing is ever concluded from a base's contents later on,
for a guest can write there what it likes. Knows no engine.
"""

from __future__ import annotations

import os

from fvd.device.claim import Claim, Ownership, claim
from fvd.device.node import Identity, Node, open_node
from fvd.errors import Conflict, InvalidArgument, NotFound, Unsupported
from fvd.format.superblock import MAGIC, SLOT_OFFSETS_BYTES, BaseFormat, BaseReference

# Images that are not raw: (offset, magic, what qemu-img calls it).
_IMAGE_MAGICS = (
    (0, b"QFI\xfb", "qcow2"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (0, b"QED\0", "qed"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
)
_HEAD_BYTES = SLOT_OFFSETS_BYTES[1] + len(MAGIC)


class OpenBase:
    """A base in use: open read-only through the page cache, for golden images are shared by many disks; and claimed like that."""

    def __init__(self, node: Node, held: Claim) -> None:
        self.node = node
        self._claim = held

    def close(self) -> None:
        self.node.close()
        self._claim.close()


def examine_base(path: str | os.PathLike[str], volume: Identity | None = None) -> BaseReference:
    """What a provision records of a base. `volume`: the disk's own storage, if it exists already.

    Raises NotFound, InUse (mounted writable, or open for writing), InvalidArgument (empty, or the volume itself), Unsupported (not raw).
    """
    name = os.path.abspath(os.fspath(path))  # noqa: PTH100 - links stay as the user named them
    base = _open(name)
    try:
        if volume is not None and base.node.identity == volume:
            raise InvalidArgument(f"{name} cannot be its own base")
        size_bytes = base.node.size_bytes()
        if size_bytes == 0:
            raise InvalidArgument(f"the base {name} is empty; leave it out, or name an image")
        kind = _image_kind(base.node, size_bytes)
        if kind == "fvd":
            raise Unsupported(f"the base {name} is an fvd disk, and fvd disks cannot be a base yet; export it to raw first")
        if kind is not None:
            raise Unsupported(f"the base {name} looks like {kind}, not raw; convert it (qemu-img convert -f {kind} -O raw {name} NEW)")
        return BaseReference(name, size_bytes, BaseFormat.RAW)
    finally:
        base.close()


def open_base(reference: BaseReference, volume: Identity) -> OpenBase:
    """Opens the base that a superblock names. Raises NotFound, Conflict (its size has changed), InUse, DeviceError."""
    try:
        base = _open(reference.locator)
    except NotFound as error:
        raise NotFound(f"the disk's base is missing: {error}") from error
    try:
        if base.node.identity == volume:
            raise Conflict(f"the base {reference.locator} leads to the disk itself")
        size_bytes = base.node.size_bytes()
        if size_bytes != reference.size_bytes:
            raise Conflict(
                f"the base {reference.locator} has {size_bytes} bytes, but had {reference.size_bytes} when the disk was made: "
                "it has been changed or replaced; put the original back"
            )
    except BaseException:
        base.close()
        raise
    return base


def _open(name: str) -> OpenBase:
    held = claim(name, Ownership.BASE)
    try:
        node = open_node(name, read_only=True, direct=False)
        try:
            held.check_covers(node)
        except BaseException:
            node.close()
            raise
    except BaseException:
        held.close()
        raise
    return OpenBase(node, held)


def _image_kind(node: Node, size_bytes: int) -> str | None:
    head = node.pread(0, min(size_bytes, _HEAD_BYTES)).tobytes()
    if any(head[offset:].startswith(MAGIC) for offset in SLOT_OFFSETS_BYTES):
        return "fvd"
    return next((kind for offset, magic, kind in _IMAGE_MAGICS if head[offset:].startswith(magic)), None)
