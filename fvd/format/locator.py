# SPDX-License-Identifier: Apache-2.0
"""Where a base is, as a superblock may say it: an absolute path or a URI (FORMAT.md section 4). Pure: opens and resolves nothing.

A superblock can come from anybody, and a locator ends up in the hands of other programs. So it is judged by what is allowed, not by what
is known to be harmful.
"""

from __future__ import annotations

import re
from enum import IntEnum

from fvd.errors import InvalidArgument, quoted

LOCATOR_BYTES_MAX = 3072


class BaseFormat(IntEnum):
    """How the bytes of a base are stored, and so who reads them."""

    NONE = 0
    RAW = 1
    NBD = 2
    QCOW2 = 3
    QED = 4
    VMDK = 5
    VDI = 6
    VHDX = 7
    VPC = 8
    PARALLELS = 9
    REMOTE_RAW = 10

    @property
    def is_image(self) -> bool:
        """An image format of QEMU's, wherever the image lies."""
        return self in IMAGE_FORMATS


IMAGE_FORMATS = frozenset(
    {
        BaseFormat.QCOW2,
        BaseFormat.QED,
        BaseFormat.VMDK,
        BaseFormat.VDI,
        BaseFormat.VHDX,
        BaseFormat.VPC,
        BaseFormat.PARALLELS,
    }
)
# They can name other files, which a server far away could have us open here: it may serve another image each time it is asked.
_NAMES_FILES = frozenset({BaseFormat.QCOW2, BaseFormat.QED, BaseFormat.VMDK})
NBD_SCHEMES = ("nbd", "nbds", "nbd+unix", "nbds+unix", "nbd+vsock", "nbds+vsock")
QEMU_SCHEMES = ("rbd", "ssh", "https", "http", "iscsi", "nfs")

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
# What RFC 3986 lets into a URI, but for fragments.
_URI = re.compile(
    r"[a-z+]+://(?P<authority>[A-Za-z0-9._~:@%!$&'()*+,;=\[\]-]*)(?P<path>/[A-Za-z0-9._~:@%!$&'()*+,;=/-]*)?(?P<query>\?[A-Za-z0-9._~:@%!$&'()*+,;=/?-]*)?"
)
_SOCKET = re.compile(r"[?&]socket=(/|%2[Ff])[^&]")
_RBD_NAME = r"[A-Za-z0-9_.+-]+"
_RBD = re.compile(rf"rbd:{_RBD_NAME}(/{_RBD_NAME}){{1,2}}(@{_RBD_NAME})?(:id={_RBD_NAME})?(:conf=/etc/ceph/{_RBD_NAME})?")
# Others would switch checks off, or have files read that nobody meant.
_NBD_OPTIONS = frozenset({"socket", "tls-certificates", "tls-psk-file", "tls-username"})


def scheme_of(locator: str) -> str | None:
    """What stands before a colon, as QEMU would see it: None for a path. ``a/b:c`` is a path, ``b:c`` is not."""
    match = _SCHEME.match(locator)
    return match.group(1) if match else None


def check_locator(locator: str, base_format: BaseFormat) -> None:
    """Raises InvalidArgument unless a superblock with this format may name this base."""
    try:
        raw = locator.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument(f"the base {quoted(locator)} is not UTF-8") from error
    if len(raw) > LOCATOR_BYTES_MAX:
        raise InvalidArgument(f"the base's name has {len(raw)} bytes; at most {LOCATOR_BYTES_MAX} fit")
    if base_format is BaseFormat.NONE:
        raise InvalidArgument(f"the base {locator} has no format")
    if any(ord(letter) < 0x20 or 0x7F <= ord(letter) < 0xA0 for letter in locator):
        raise InvalidArgument(f"the base {quoted(locator)} has a control character in its name; use another name for it, a link perhaps")
    if locator.startswith("/"):
        if base_format is BaseFormat.NBD or base_format is BaseFormat.REMOTE_RAW:
            raise InvalidArgument(f"the base {locator} is a path, but its format {_name(base_format)} needs a URI")
        return
    scheme = scheme_of(locator)
    if scheme is None:
        raise InvalidArgument(f"the base {quoted(locator)} must be an absolute path or a URI")
    if scheme in NBD_SCHEMES:
        if base_format is not BaseFormat.NBD:
            raise InvalidArgument(f"the base {locator} is read through NBD, which has no format {_name(base_format)}; leave the format out")
        _check_nbd(locator, scheme)
    elif scheme in QEMU_SCHEMES:
        if base_format is not BaseFormat.REMOTE_RAW and not base_format.is_image:
            raise InvalidArgument(f"the base {locator} is read through QEMU, so its format cannot be {_name(base_format)}")
        if base_format in _NAMES_FILES:
            raise InvalidArgument(
                f"the base {locator}: a {_name(base_format)} image can name other files, which a remote server could have opened on this "
                "host; have qemu-nbd or nbdkit serve it where it lies, and name that as an NBD base"
            )
        _check_qemu(locator, scheme)
    else:
        raise InvalidArgument(
            f"the base {quoted(locator)}: fvd reads no {scheme}: names, only {', '.join((*NBD_SCHEMES, *QEMU_SCHEMES))}, and absolute paths"
        )


def _check_nbd(locator: str, scheme: str) -> None:
    authority, query = _uri(locator)
    unknown = {word.partition("=")[0] for word in query.lstrip("?").split("&") if word} - _NBD_OPTIONS
    if unknown:
        raise InvalidArgument(f"the base {locator} has an option that fvd does not take: {', '.join(sorted(unknown))}")
    if scheme.endswith("+unix"):
        if authority.rpartition("@")[2]:
            raise InvalidArgument(
                f"the base {locator} names a host, but {scheme}: is a socket on this one: {scheme}:///EXPORT?socket=/PATH"
            )
        if not _SOCKET.search(query):
            raise InvalidArgument(f"the base {locator} needs the absolute path of its socket: {scheme}:///EXPORT?socket=/PATH")
    elif not authority.rpartition("@")[2]:
        raise InvalidArgument(f"the base {locator} names no host")


def _check_qemu(locator: str, scheme: str) -> None:
    if scheme == "rbd":
        if not _RBD.fullmatch(locator):
            raise InvalidArgument(
                f"the base {quoted(locator)} must be rbd:POOL/[NAMESPACE/]IMAGE[@SNAPSHOT][:id=USER][:conf=/etc/ceph/FILE]"
            )
        return
    authority, query = _uri(locator)
    if not authority.rpartition("@")[2]:
        raise InvalidArgument(f"the base {locator} names no host")
    if query and scheme not in ("http", "https"):
        raise InvalidArgument(f"the base {locator} has options, which fvd does not take for {scheme}:")
    if locator.endswith(":"):
        raise InvalidArgument(f"the base {locator} ends with a colon, which QEMU takes for an option")


def _uri(locator: str) -> tuple[str, str]:
    """Authority and query."""
    match = _URI.fullmatch(locator)
    if not match:
        raise InvalidArgument(f"the base {quoted(locator)} is no URI of the kind SCHEME://HOST/NAME; other characters are written as %XX")
    authority = match["authority"]
    user = authority.rpartition("@")[0]
    # A superblock is read by everybody who may see the disk, and a program's arguments by everybody on the host.
    if ":" in user or "%" in user:
        raise InvalidArgument(
            f"the base {_without_secret(locator)} has a password in its name; keep it where the server's client looks for it"
        )
    return authority, match["query"] or ""


def _without_secret(locator: str) -> str:
    return re.sub(r"//[^@]*@", "//...@", locator)


def _name(base_format: BaseFormat) -> str:
    return "raw" if base_format is BaseFormat.REMOTE_RAW else base_format.name.lower()
