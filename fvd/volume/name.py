# SPDX-License-Identifier: Apache-2.0
"""How people name a volume: `file:PATH`, `VG/LV`, `/dev/VG/LV`, `/dev/X`. Pure text: asks no file system and no LVM."""

from __future__ import annotations

import enum
import os
import re
from dataclasses import dataclass

from fvd.errors import InvalidArgument, quoted

# lvm(8): letters, digits, + _ . -, not starting with a hyphen; "." and ".." are no names.
_LVM_NAME = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9+_.][A-Za-z0-9+_.-]{0,126}", re.ASCII)
# lvm(8), "Valid names": what its own hidden volumes are called. Device-mapper joins both names and doubles hyphens in 127 bytes.
_RESERVED_PREFIXES = ("snapshot", "pvmove")
_RESERVED_PARTS = (
    "_cdata", "_cmeta", "_corig", "_cpool", "_cvol", "_imeta", "_iorig", "_mimage", "_mlog", "_pmspare", "_rimage", "_rmeta", "_tdata",
    "_tmeta", "_vdata", "_vorigin", "_wcorig",
)  # fmt: skip
_DM_NAME_BYTES = 127
# Folders of /dev that are no volume groups; vgcreate refuses a name that /dev has already.
_OTHER_FOLDERS = frozenset({
    "block", "bsg", "bus", "cciss", "char", "cpu", "disk", "dm", "dma_heap", "dri", "fd", "hugepages", "i2o", "ida", "input", "loop",
    "mapper", "md", "mqueue", "nbd", "net", "pts", "raw", "rd", "shm", "snd", "vfio", "vhost", "virtio-ports", "zvol",
})  # fmt: skip
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class VolumeKind(enum.Enum):
    """Which provider holds the volume."""

    FILE = "file"
    DEVICE = "device"
    LVM = "lvm"


@dataclass(frozen=True)
class VolumeName:
    """A valid volume name. `str()` gives the canonical form, which parses to the same name."""

    kind: VolumeKind
    path: str  # absolute: the file or device node
    group: str = ""  # of a logical volume
    lv: str = ""  # its name there

    def __str__(self) -> str:
        if self.kind is VolumeKind.LVM:
            return f"{self.group}/{self.lv}"
        return f"file:{self.path}" if self.kind is VolumeKind.FILE else self.path

    @property
    def short(self) -> str:
        """The last part of the path: a readable export name."""
        return self.path.rpartition("/")[2]


def parse_name(text: str | VolumeName) -> VolumeName:
    """Reads VOLUME as an administrator writes it. A relative PATH counts from the working directory.

    Raises InvalidArgument for what can never be a volume.
    """
    if isinstance(text, VolumeName):
        return text
    if not text:
        raise InvalidArgument("a volume needs a name: VG/LV, file:PATH or /dev/X")
    if _CONTROL.search(text):
        raise InvalidArgument(f"{quoted(text)} is no volume name: it contains control characters")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument(f"{quoted(text)} is no volume name: it is not valid UTF-8") from error
    if text.startswith("file:"):
        return VolumeName(VolumeKind.FILE, _file_path(text))
    if text.startswith("/"):
        path = _plain(text)
        if not path.startswith("/dev/"):
            raise InvalidArgument(f"{quoted(text)} is not below /dev; for a file write file:{text}")
        parts = path.removeprefix("/dev/").split("/")
        if len(parts) == 2 and parts[0] not in _OTHER_FOLDERS:
            return _logical_volume(text, *parts)
        return VolumeName(VolumeKind.DEVICE, path)
    parts = text.split("/")
    if len(parts) != 2:
        guess = f"; did you mean file:{text}?" if text.isprintable() else ""
        raise InvalidArgument(f"{quoted(text)} is no volume name; write VG/LV, file:PATH or /dev/X{guess}")
    return _logical_volume(text, *parts)


def is_group_name(text: str) -> bool:
    """Whether this can be the name of a volume group."""
    return _LVM_NAME.fullmatch(text) is not None and text not in _OTHER_FOLDERS


def _logical_volume(text: str, group: str, lv: str) -> VolumeName:
    """Raises InvalidArgument for what lvm would refuse, before any command is run."""
    if not _LVM_NAME.fullmatch(group) or not _LVM_NAME.fullmatch(lv):
        raise InvalidArgument(
            f"{quoted(text)} is no volume name: in VG/LV both are letters, digits, + _ . - and begin with no hyphen; a file is file:PATH"
        )
    if group in _OTHER_FOLDERS:
        reason = f"no volume group can be called {group}, for /dev/{group} is something else"
        raise InvalidArgument(f"{quoted(text)} is no volume name: {reason}")
    if lv.startswith(_RESERVED_PREFIXES) or any(part in lv for part in _RESERVED_PARTS):
        raise InvalidArgument(f"{quoted(text)} is no volume name: lvm keeps such names for volumes of its own (lvm(8), valid names)")
    if len((group + "-" + lv).replace("-", "--")) - 1 > _DM_NAME_BYTES:
        raise InvalidArgument(f"{quoted(text)} is too long: group and volume together may have about {_DM_NAME_BYTES} bytes")
    return VolumeName(VolumeKind.LVM, f"/dev/{group}/{lv}", group, lv)


def _file_path(text: str) -> str:
    path = text.removeprefix("file:")
    if not path or path.endswith(("/", "/.", "/..")) or path in (".", ".."):
        raise InvalidArgument(f"{quoted(text)} names no file; write file:PATH")
    return _plain(path)


def _plain(path: str) -> str:
    """Absolute, without `.`, `..` and doubled slashes. Two leading slashes (implementation-defined in POSIX) become one."""
    plain = os.path.abspath(path)  # noqa: PTH100 - Path.resolve would follow symbolic links: the name is the user's
    return "/" + plain.lstrip("/")
