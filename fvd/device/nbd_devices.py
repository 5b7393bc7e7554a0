# SPDX-License-Identifier: Apache-2.0
"""The nbd devices of this host that are fvd's: which there are, their links in /dev/fvd, and what the kernel must know of their server.

Nothing is kept beside the kernel's own memory: a device says who is behind it (`backend` in its folder in /sys, since Linux 5.14), and is
ours if that begins with our word. Knows no disks: a UUID and a name are what it is told.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fvd.device.holders import list_folder, read_text
from fvd.errors import Conflict, Unsupported

_BLOCK = Path("/sys/block")
_LINKS = Path("/dev/fvd")
_WORD = "fvd"
_MODPROBE_SECONDS = 30.0
_PROGRAM_PATH = "/usr/sbin:/sbin:/usr/bin:/bin"
_PR_SET_IO_FLUSHER = 57


@dataclass(frozen=True)
class NbdDevice:
    """A connected device of a disk of ours."""

    index: int
    uuid: str
    name: str  # of its link

    @property
    def path(self) -> str:
        return f"/dev/nbd{self.index}"

    @property
    def link(self) -> Path:
        return _LINKS / self.name

    @property
    def backend(self) -> str:
        """As the kernel has it; systemd/60-fvd.rules takes the name out of it."""
        return f"{_WORD}:{self.uuid}:{self.name}"

    @property
    def best_path(self) -> str:
        """The link, if it is there."""
        return str(self.link) if _leads_to(self.link, self.path) else self.path

    @property
    def is_connected(self) -> bool:
        return _backend(_folder(self.index)) == self.backend

    def limit_silence(self, milliseconds: int) -> None:
        """So often the kernel looks at a request that has no answer: one whose connection has been replaced is sent again then."""
        with contextlib.suppress(OSError):  # /sys may be read-only: it looks every 30 s then
            (_folder(self.index) / "queue" / "io_timeout").write_text(str(milliseconds))

    def tell_udev(self) -> None:
        """The kernel told it of a change before it had noted who is behind the device."""
        with contextlib.suppress(OSError):
            (_folder(self.index) / "uevent").write_text("change")

    def make_link(self) -> None:
        """Where udev has our rule it has made it, or will make the same. Raises Conflict: something else has the name."""
        check_name(self.name, self.path)
        _LINKS.mkdir(exist_ok=True)
        with contextlib.suppress(FileExistsError):  # udev's
            self.link.symlink_to(f"../nbd{self.index}")

    def remove_link(self) -> None:
        """Again is fine; what is not this device's stays."""
        with contextlib.suppress(OSError):
            if _leads_to(self.link, self.path):
                self.link.unlink()
            _LINKS.rmdir()


def find(uuid: str) -> NbdDevice | None:
    """The device of the disk with this UUID."""
    return next((device for device in _all() if device.uuid == uuid), None)


def path_of(uuid: str) -> str | None:
    """As what the disk with this UUID is attached; None: it is not."""
    device = find(uuid)
    return None if device is None else device.best_path


def check_name(name: str, may_lead_to: str = "") -> None:
    """Raises Conflict when /dev/fvd/NAME is something else already."""
    link = _LINKS / name
    if os.path.lexists(link) and not (may_lead_to and _leads_to(link, may_lead_to)):
        raise Conflict(f"{link} is there already; choose another name (--name)")


def load_driver() -> None:
    """Raises Unsupported: this kernel has none, or it may not be loaded."""
    import shutil
    import subprocess

    program = shutil.which("modprobe", path=_PROGRAM_PATH)
    if program is None:
        raise Unsupported("this kernel's nbd driver is not loaded, and modprobe is not here; install kmod")
    done = subprocess.run(
        [program, "nbd"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_MODPROBE_SECONDS, check=False
    )
    if done.returncode:
        reason = done.stderr.strip() or f"modprobe ended with {done.returncode}"
        raise Unsupported(f"this kernel has no nbd driver, by which a disk becomes a device of this host ({reason})")


def become_io_flusher() -> str:
    """This thread, and those that it makes, take no memory for which the kernel would first write to a device that they serve.

    Returns why not; empty when it is so.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0) == 0:
        return ""
    return os.strerror(ctypes.get_errno())


def _all() -> Iterator[NbdDevice]:
    for folder in list_folder(_BLOCK):
        if folder.name.startswith("nbd"):
            word, _, rest = _backend(folder).partition(":")
            uuid, _, name = rest.partition(":")
            if word == _WORD and uuid and name:
                yield NbdDevice(int(folder.name.removeprefix("nbd")), uuid, name)


def _folder(index: int) -> Path:
    return _BLOCK / f"nbd{index}"


def _backend(folder: Path) -> str:
    return read_text(folder / "backend").removesuffix("\n")


def _leads_to(link: Path, path: str) -> bool:
    with contextlib.suppress(OSError):
        return link.is_symlink() and os.path.realpath(link) == path
    return False
