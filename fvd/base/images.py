# SPDX-License-Identifier: Apache-2.0
"""Images that are not raw: how they are told from raw ones, and the program of QEMU's that reads them. Starts qemu-img; knows no disk.

An image may name other files (a backing file, data kept outside, further extents). Such images are refused: by their headers before a
program of QEMU's sees them, as far as that goes, and by what qemu-img tells of them. An image on this host is given to these programs by
its open descriptor, which they open again by its number: they see what was judged, whatever has its name by now. And they run as the
user whose image it is: whatever he writes into it, while they read it even, they may open nothing for us that he could not.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
from dataclasses import dataclass
from typing import Any

from fvd.base.vhdx import has_parent
from fvd.device.as_user import User
from fvd.device.node import Node
from fvd.errors import Conflict, DeviceError, FvdError, InUse, InvalidArgument, NotFound, PermissionDenied, Timeout, Unsupported, quoted
from fvd.format.locator import BaseFormat
from fvd.format.superblock import MAGIC, SLOT_OFFSETS_BYTES

_SECTOR_BYTES = 512
_HEAD_BYTES = SLOT_OFFSETS_BYTES[1] + len(MAGIC)
_VPC_FOOTER = b"conectix"
_QCOW_MAGIC = b"QFI\xfb"
_VMDK_SPARSE = b"KDMV"
_VMDK_DESCRIPTOR = b"# Disk DescriptorFile"
# (offset, magic, whose)
_MAGICS = (
    (0, _QCOW_MAGIC, BaseFormat.QCOW2),
    (0, _VMDK_SPARSE, BaseFormat.VMDK),
    (0, b"COWD", BaseFormat.VMDK),
    (0, _VMDK_DESCRIPTOR, BaseFormat.VMDK),
    (0, b"vhdxfile", BaseFormat.VHDX),
    (0, _VPC_FOOTER, BaseFormat.VPC),
    (0, b"QED\0", BaseFormat.QED),
    (0, b"WithoutFreeSpace", BaseFormat.PARALLELS),
    (0, b"WithouFreSpacExt", BaseFormat.PARALLELS),
    (64, b"\x7f\x10\xda\xbe", BaseFormat.VDI),
)
_QCOW2_DATA_FILE = 4  # incompatible feature
_QED_BACKING_FILE = 1
_VPC_DIFFERENCING = 4
_VDI_DIFFERENCING = 4
_VDI_PARENT = slice(424, 456)  # the UUIDs of the image below, and of its last change
# /usr/local first: an administrator's own QEMU. An ordinary PATH may hold anything.
_PROGRAM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_SHOWN = 300  # characters of what a program says


class Contents:
    """The first and last bytes of a local base, looked at once."""

    def __init__(self, node: Node) -> None:
        size_bytes = node.size_bytes()
        self.path = node.path
        self._node = node
        self._head = node.pread(0, min(size_bytes, _HEAD_BYTES)).tobytes()
        tail_bytes = min(size_bytes, _SECTOR_BYTES)
        self._tail = node.pread(size_bytes - tail_bytes, tail_bytes).tobytes()

    @property
    def is_fvd(self) -> bool:
        return any(self._head[offset:].startswith(MAGIC) for offset in SLOT_OFFSETS_BYTES)

    @property
    def marks(self) -> set[BaseFormat]:
        """The image formats whose marks are there; none: what it holds could only be raw."""
        formats = {whose for offset, magic, whose in _MAGICS if self._head[offset:].startswith(magic)}
        if self._tail.startswith(_VPC_FOOTER):
            formats.add(BaseFormat.VPC)
        return formats

    def refuse_others(self, base_format: BaseFormat) -> None:
        """Raises Unsupported when the header of an image of this format says that it is a part of something larger."""
        head = self._head
        if base_format is BaseFormat.QCOW2:
            version, backing = _at(head, 4, ">IQ")
            if backing:
                raise _refusal(self.path, "has a backing file")
            if version >= 3 and _at(head, 72, ">Q")[0] & _QCOW2_DATA_FILE:
                raise _refusal(self.path, "keeps its data in another file")
        elif base_format is BaseFormat.QED and _at(head, 16, "<Q")[0] & _QED_BACKING_FILE:
            raise _refusal(self.path, "has a backing file")
        elif base_format is BaseFormat.VMDK:
            # One that is of no size by its header is a list of others too.
            if head.startswith(_VMDK_DESCRIPTOR) or (head.startswith(_VMDK_SPARSE) and _at(head, 12, "<Q")[0] == 0):
                raise _refusal(self.path, "keeps its data in other files")
        elif base_format is BaseFormat.VPC:
            footer = head if head.startswith(_VPC_FOOTER) else self._tail
            if _at(footer, 60, ">I")[0] == _VPC_DIFFERENCING:
                raise _refusal(self.path, "has a parent")
        elif base_format is BaseFormat.VDI:
            if _at(head, 76, "<I")[0] == _VDI_DIFFERENCING or any(head[_VDI_PARENT]):
                raise _refusal(self.path, "has a parent")
        elif base_format is BaseFormat.VHDX and has_parent(self._node):
            raise _refusal(self.path, "has a parent")


def _at(raw: bytes, offset: int, layout: str) -> tuple[int, ...]:
    """Fields of a header; zeros where it is cut off."""
    size = struct.calcsize(layout)
    return struct.unpack(layout, raw[offset : offset + size].ljust(size, b"\0"))


@dataclass(frozen=True)
class Handle:
    """An open image of this host, for programs that inherit the descriptor under the same number."""

    fd: int
    is_block: bool
    user: User | None  # as whom they run; None: as this process

    @property
    def path(self) -> str:
        return f"/proc/self/fd/{self.fd}"


def server_command(locator: str, base_format: BaseFormat, handle: Handle | None = None) -> list[str]:
    """The arguments of a program that serves this base read-only on a socket that it inherits, to one client, and ends with it.
    `handle`: the image, where it is one of this host.

    It keeps QEMU's own locks: other readers are welcome, a writer is refused, and refuses it. Raises Unsupported (no qemu-nbd here).
    """
    driver = _driver(base_format)
    # The page cache, as for raw bases: a golden image is shared by many disks. aio=native would need O_DIRECT.
    words = [_program("qemu-nbd"), "--read-only", "--shared=1", "--cache=writeback", "--aio=threads"]
    if handle is None:
        return [*words, f"--format={driver}", "--", locator]
    # In words: a path is taken for nothing else, and no backing file is opened, though the image may have got one since it was looked at.
    file = {"driver": "host_device" if handle.is_block else "file", "filename": handle.path}
    words += ["--", "json:" + json.dumps({"driver": driver, "read-only": True, "backing": None, "file": file})]
    return words if handle.user is None else [*_becoming(handle.user), *words]


def _becoming(user: User) -> list[str]:
    """Goes before a command that is to run as the user. The signal is asked for again: who becomes somebody else loses it."""
    groups = f"--groups={','.join(map(str, user.groups))}" if user.groups else "--clear-groups"
    who = [f"--reuid={user.uid}", f"--regid={user.gid}", groups]
    return [_program("setpriv", "util-linux"), *who, "--no-new-privs", "--pdeathsig=KILL", "--"]


def check_image(locator: str, base_format: BaseFormat, handle: Handle | None = None, *, timeout_seconds: float) -> None:
    """Whether QEMU can read the image, and it is all there is of it.

    Raises Unsupported (needs other files, encrypted, or no qemu-img here), InUse (another program writes to it), InvalidArgument (not of
    that format), NotFound, PermissionDenied, Timeout, DeviceError.
    """
    driver = _driver(base_format)
    name = locator if handle is None else handle.path
    answer = _run([_program("qemu-img"), "info", "--output=json", f"--format={driver}", "--", name], locator, timeout_seconds, handle)
    try:
        report = json.loads(answer)
        _judge(report, locator, name, driver)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unsupported(f"qemu-img answered in a form that fvd does not know ({quoted(error)}); QEMU 5.2 or later is needed") from error


def _judge(report: dict[str, Any], locator: str, name: str, driver: str) -> None:
    specific = (report.get("format-specific") or {}).get("data") or {}
    if report["format"] != driver:
        raise Conflict(f"the base {locator} is {report['format']}, not {driver}")
    if any(name.endswith("backing-filename") for name in report):
        raise _refusal(locator, "has a backing file")
    if specific.get("data-file"):
        raise _refusal(locator, "keeps its data in another file")
    if any(extent["filename"] != name for extent in specific.get("extents") or ()):
        raise _refusal(locator, "keeps its data in other files")
    if report.get("encrypted"):
        raise Unsupported(
            f"the base {locator} is encrypted, and fvd has no key for it; serve it yourself, and name its NBD URI as the base"
        )


def _refusal(locator: str, why: str) -> Unsupported:
    return Unsupported(
        f"the base {locator} {why}, which could be any file of this host; make it one image first "
        f"(qemu-img convert -O qcow2 {locator} NEW), and name that as the base"
    )


def _driver(base_format: BaseFormat) -> str:
    """What QEMU calls it."""
    return "raw" if base_format is BaseFormat.REMOTE_RAW else base_format.name.lower()


def _program(name: str, package: str = "qemu-utils") -> str:
    path = shutil.which(name, path=_PROGRAM_PATH)
    if path is None:
        raise Unsupported(f"{name} is not installed, and a base of this kind is read with it; install it (Debian: apt install {package})")
    return path


def _run(command: list[str], locator: str, timeout_seconds: float, handle: Handle | None) -> bytes:
    user = None if handle is None else handle.user
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_seconds,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
            pass_fds=() if handle is None else (handle.fd,),
            user=None if user is None else user.uid,
            group=None if user is None else user.gid,
            extra_groups=None if user is None else user.groups,
        )
    except subprocess.TimeoutExpired as error:
        raise Timeout(f"the base {locator}: qemu-img has not answered for {timeout_seconds:g} s; is its server there?") from error
    except OSError as error:
        raise DeviceError(f"the base {locator}: {command[0]} cannot be started: {error.strerror}") from error
    if done.returncode == 0:
        return done.stdout
    text = done.stderr.decode(errors="replace").strip()
    raise _failure(locator, text if handle is None else text.replace(handle.path, locator))


def _failure(locator: str, text: str) -> FvdError:
    """What qemu-img said, as one of ours."""
    # Its last line may be a question.
    line = next((line for line in text.splitlines() if line.startswith("qemu-img:")), text)[-_SHOWN:]
    lower = text.replace(locator, "").lower()  # a name may hold any words
    if "lock" in lower and "another process" in lower:
        return InUse(f"the base {locator} is in use: another program writes to it; it must end first ({line})")
    if "permission denied" in lower:
        return PermissionDenied(f"the base {locator} may not be read: {line}")
    if "unknown protocol" in lower or "unknown driver" in lower:
        return Unsupported(f"this QEMU cannot read the base {locator}; install its driver (Debian: apt install qemu-block-extra) ({line})")
    if "unsupported" in lower or "not supported" in lower:
        return Unsupported(f"QEMU cannot read the base {locator}: {line}")
    if "no such file" in lower or "404" in lower:
        return NotFound(f"the base {locator} does not exist: {line}")
    if "not in" in lower or "invalid" in lower or "magic" in lower:
        return InvalidArgument(f"the base {locator} is not what its format says: {line}")
    return DeviceError(f"the base {locator} cannot be read: {line}")
