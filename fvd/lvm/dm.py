# SPDX-License-Identifier: Apache-2.0
"""What the kernel says of a device-mapper device: its name, size, tables, whether it is suspended, and for how long. Changes nothing."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# A suspend of a healthy lvextend lasts a millisecond or a few; a step that hangs is not worth thousands of looks a second.
SAMPLE_SECONDS = 0.0005
SLOW_SAMPLE_SECONDS = 0.02
SLOW_AFTER_SECONDS = 10.0
# <linux/dm-ioctl.h>
_CONTROL = "/dev/mapper/control"
_DM_IOCTL = struct.Struct("=3IIIIiIIIQ128s129s7s")
_DM_DEV_STATUS = 0xC138FD07
_DM_TABLE_STATUS = 0xC138FD0C
_DM_TARGET_SPEC = struct.Struct("=QQiI16s")
_SUSPEND_FLAG = 1 << 1
_PERSISTENT_DEV_FLAG = 1 << 3
_STATUS_TABLE_FLAG = 1 << 4
_INACTIVE_PRESENT_FLAG = 1 << 6
_BUFFER_FULL_FLAG = 1 << 8
_SKIP_BDGET_FLAG = 1 << 9
_TABLE_BYTES = 16 << 10  # doubled until the table fits
_TABLE_BYTES_MAX = 64 << 20
_SECTOR_BYTES = 512  # of /sys, whatever the device's own


def device_name(number: int) -> str | None:
    """The device-mapper name of a block device (st_rdev); None: it is none of device-mapper's."""
    return _read(number, "name")


def is_lvm_device(number: int) -> bool:
    """Whether the device is one of lvm's: a logical volume, or a hidden layer of one."""
    return (_read(number, "uuid") or "").startswith("LVM-")


def is_being_moved(number: int) -> bool:
    """Whether the device is lvm's own for a pvmove: what lies there is on its way to another physical volume, and stays what it is."""
    name, uuid = _read(number, "name"), _read(number, "uuid")
    if name is None or uuid is None or not uuid.startswith("LVM-"):
        return False
    parts = split_name(name)
    return len(parts) == 2 and re.fullmatch(r"pvmove\d+", parts[1]) is not None


def logical_volume_of(number: int) -> tuple[str, str] | None:
    """Group and name of the logical volume that a block device is; None: it is none, or one of lvm's hidden layers."""
    name, uuid = _read(number, "name"), _read(number, "uuid")
    if name is None or uuid is None or not uuid.startswith("LVM-"):
        return None
    parts = split_name(name)
    return (parts[0], parts[1]) if len(parts) == 2 else None


def is_volume(number: int, lv_uuid: str) -> bool:
    """Whether a block device is the logical volume with this UUID (as lvm writes it, with hyphens), whatever its node is called."""
    uuid = _read(number, "uuid")
    return uuid is not None and uuid.startswith("LVM-") and uuid.endswith(lv_uuid.replace("-", ""))


def split_name(name: str) -> list[str]:
    """lvm's own joining undone: parts are joined by one hyphen, hyphens inside a part are doubled, and no part begins with one."""
    parts, at = [""], 0
    while at < len(name):
        if name.startswith("--", at):
            parts[-1] += "-"
            at += 2
        elif name[at] == "-":
            parts.append("")
            at += 1
        else:
            parts[-1] += name[at]
            at += 1
    return parts


def number_of(path: str) -> int:
    """The device number behind a node. Raises OSError."""
    return Path(path).stat().st_rdev


def size_bytes(number: int) -> int | None:
    """The device's size as the kernel has it; None: no such device."""
    with contextlib.suppress(OSError, ValueError):
        return int(Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/size").read_text()) * _SECTOR_BYTES
    return None


def logical_block_bytes(number: int) -> int:
    """The least that the device reads or writes at once; 0: no such device."""
    with contextlib.suppress(OSError, ValueError):
        folder = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
        folder = folder.parent if (folder / "partition").exists() else folder
        return int((folder / "queue" / "logical_block_size").read_text())
    return 0


def stripes(number: int) -> int:
    """Over how many devices the end of a logical volume is spread, and so will be what it grows by; 1: over one."""
    last = (table(number) or (None,))[-1]
    return int(last.arguments.split()[0]) if last is not None and last.kind == "striped" else 1


@dataclass(frozen=True)
class State:
    """Of a device, beside its table in use."""

    suspended: bool  # every request to it waits
    inactive_table: bool  # one is loaded, and would be used at the next resume, whoever does that and whatever it says

    @property
    def at_rest(self) -> bool:
        """Nobody is at work on it, and nobody has left work undone."""
        return not self.suspended and not self.inactive_table


def state(number: int) -> State | None:
    """As device-mapper has it now; None: it is none of its devices, or may not be asked."""
    answer = _ask(number, _DM_DEV_STATUS, 0, 0)
    if answer is None:
        return None
    flags = _DM_IOCTL.unpack_from(answer)[7]
    return State(bool(flags & _SUSPEND_FLAG), bool(flags & _INACTIVE_PRESENT_FLAG))


@dataclass(frozen=True)
class Target:
    """A line of a table in use. Sectors of 512 bytes."""

    start: int
    length: int
    kind: str  # "linear", "striped"...
    arguments: str


def table(number: int) -> tuple[Target, ...] | None:
    """The table that a device uses now, in order, also while it is suspended; None: it is none of device-mapper's, or may not be asked."""
    capacity_bytes = _TABLE_BYTES
    while capacity_bytes <= _TABLE_BYTES_MAX:
        answer = _ask(number, _DM_TABLE_STATUS, _STATUS_TABLE_FLAG, capacity_bytes)
        if answer is None:
            return None
        header = _DM_IOCTL.unpack_from(answer)
        if not header[7] & _BUFFER_FULL_FLAG:
            return tuple(_targets(answer, header[4], header[5]))
        capacity_bytes *= 2
    return None


def _targets(answer: bytes, data_at: int, count: int) -> Iterator[Target]:
    at = data_at
    for _ in range(count):
        start, length, _status, following, kind = _DM_TARGET_SPEC.unpack_from(answer, at)
        arguments = answer[at + _DM_TARGET_SPEC.size : answer.index(b"\0", at + _DM_TARGET_SPEC.size)]
        yield Target(start, length, kind.partition(b"\0")[0].decode(errors="replace"), arguments.decode(errors="replace").strip())
        at = data_at + following


def _ask(number: int, command: int, flags: int, capacity_bytes: int) -> bytes | None:
    """What device-mapper answers about a device; `capacity_bytes`: for what follows the header."""
    size = _DM_IOCTL.size
    flags |= _PERSISTENT_DEV_FLAG | _SKIP_BDGET_FLAG
    request = bytearray(
        _DM_IOCTL.pack(4, 0, 0, size + capacity_bytes, size, 0, 0, flags, 0, 0, number, b"", b"", b"") + bytes(capacity_bytes)
    )
    try:
        control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.ioctl(control, command, request)
    except OSError:
        return None
    finally:
        os.close(control)
    return bytes(request)


def _read(number: int, name: str) -> str | None:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/dm/{name}").read_text().strip()
    return None


class SuspendGauge:
    """Measures, in a thread of its own while it is entered, for how long a device is suspended.

    The kernel tells nobody when it suspends, so the flag is sampled: `seconds` is right to about a millisecond, and 0.0 means that no
    sample met it. None: the kernel could not be asked.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self.seconds: float | None = None

    def __enter__(self) -> SuspendGauge:
        self._thread = threading.Thread(target=self._sample, name="fvd-suspend-gauge", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _sample(self) -> None:
        try:
            fd = os.open(f"/sys/dev/block/{os.major(self._number)}:{os.minor(self._number)}/dm/suspended", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return
        try:
            self.seconds = 0.0
            begun = before = time.monotonic()
            was_suspended = False
            while True:
                ended = self._ended.wait(SAMPLE_SECONDS if before - begun < SLOW_AFTER_SECONDS else SLOW_SAMPLE_SECONDS)
                suspended = os.pread(fd, 2, 0)[:1] == b"1"
                now = time.monotonic()
                if was_suspended:
                    self.seconds += now - before
                before, was_suspended = now, suspended
                if ended:
                    return
        except OSError:
            return  # the device has gone
        finally:
            os.close(fd)
