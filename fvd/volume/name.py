"""How people name a volume: `file:PATH`, `/dev/X`, and from the LVM provider on `VG/LV`. Pure text: asks no file system and no LVM."""

from __future__ import annotations

import enum
import os
import re
from dataclasses import dataclass

from fvd.errors import InvalidArgument, Unsupported

# lvm(8): letters, digits, + _ . -, not starting with a hyphen; "." and ".." are no names.
_LVM_NAME = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9+_.][A-Za-z0-9+_.-]{0,126}", re.ASCII)
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

    def __str__(self) -> str:
        return f"file:{self.path}" if self.kind is VolumeKind.FILE else self.path

    @property
    def short(self) -> str:
        """The last part of the path: a readable export name."""
        return self.path.rpartition("/")[2]


def parse_name(text: str | VolumeName) -> VolumeName:
    """Reads VOLUME as an administrator writes it. A relative PATH counts from the working directory.

    Raises InvalidArgument for what can never be a volume; Unsupported for VG/LV, which comes with the LVM provider.
    """
    if isinstance(text, VolumeName):
        return text
    if not text:
        raise InvalidArgument("a volume needs a name: file:PATH or /dev/X")
    if _CONTROL.search(text):
        raise InvalidArgument(f"{text!r} is no volume name: it contains control characters")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument(f"{text!r} is no volume name: it is not valid UTF-8") from error
    if text.startswith("file:"):
        return VolumeName(VolumeKind.FILE, _file_path(text))
    if text.startswith("/"):
        path = _plain(text)
        if not path.startswith("/dev/"):
            raise InvalidArgument(f"{text!r} is not below /dev; for a file write file:{text}")
        return VolumeName(VolumeKind.DEVICE, path)
    group, slash, volume = text.partition("/")
    if slash and _LVM_NAME.fullmatch(group) and _LVM_NAME.fullmatch(volume):
        raise Unsupported(f"{text}: logical volumes by VG/LV come with the LVM provider; use /dev/{text} (fixed size) or file:PATH for now")
    raise InvalidArgument(f"{text!r} is no volume name; write file:PATH or /dev/X")


def _file_path(text: str) -> str:
    path = text.removeprefix("file:")
    if not path or path.endswith(("/", "/.", "/..")) or path in (".", ".."):
        raise InvalidArgument(f"{text!r} names no file; write file:PATH")
    return _plain(path)


def _plain(path: str) -> str:
    """Absolute, without `.`, `..` and doubled slashes. Two leading slashes (implementation-defined in POSIX) become one."""
    plain = os.path.abspath(path)  # noqa: PTH100 - Path.resolve would follow symbolic links: the name is the user's
    return "/" + plain.lstrip("/")
