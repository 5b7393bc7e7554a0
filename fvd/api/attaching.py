# SPDX-License-Identifier: Apache-2.0
"""The verbs that make a served disk a block device of this host, and end that. Knows the control socket and the device, not the server."""

from __future__ import annotations

import errno
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fvd._lifetime import checkpoint, whole
from fvd.api.hints import how_to_serve, plain_name
from fvd.errors import DeviceError, InUse, InvalidArgument, NotFound, PermissionDenied, Unsupported, quoted

if TYPE_CHECKING:
    from fvd.api.types import Info
    from fvd.device.nbd_devices import NbdDevice
    from fvd.volume.name import VolumeName

# A request that was under way when its server died is sent to the next one at most so long after that one has begun.
REQUEST_LOOK_MILLISECONDS = 5000
# udev, and whoever else looks at every new device, lets go of it within moments.
HELD_SECONDS = 5.0
GONE_SECONDS = 10.0
_PAUSE_SECONDS = 0.05
NAME_BYTES_MAX = 64


@dataclass(frozen=True)
class Attached:
    """A disk that is a block device of this host."""

    volume: str
    device: str  # /dev/nbd0
    link: str  # /dev/fvd/NAME, which leads there
    size: int
    read_only: bool


def attach(volume: str, *, name: str | None = None) -> Attached:
    """Make a served disk a block device of this host, by the kernel's nbd driver: /dev/fvd/NAME, NAME being the last part of the volume's.

    It stays until ``detach``. While nobody serves the disk, requests wait, 120 s long; whoever serves it next answers them.
    Raises NotFound (no such volume, or nobody serves it), InUse (it is attached already), Conflict (the name is taken), Unsupported (this
    kernel has no nbd driver), PermissionDenied (only root may, and root must serve it).
    """
    from fvd.api.verbs import info
    from fvd.device import nbd_devices
    from fvd.volume.name import parse_name

    parsed = parse_name(volume)
    _check_root(parsed, "attached")
    link_name = _link_name(parsed, name)
    disk = info(str(parsed))
    if disk.uri is None:
        raise NotFound(f"{parsed} is not served; {how_to_serve(str(parsed))}")
    _load_driver()
    if disk.attached is not None:
        raise InUse(f"{parsed} is attached already, as {disk.attached}")
    nbd_devices.check_name(link_name)
    device = whole(lambda: _attach(parsed, disk, link_name), undo=_disconnect)
    return Attached(disk.volume, device.path, str(device.link), disk.virtual_size, disk.read_only)


def detach(volume: str, *, force: bool = False) -> Attached:
    """End a disk's being a block device of this host: what was written to it is made durable first.

    ``force``: though nobody serves the disk, or that flush fails; what has not reached the disk is lost then.
    Raises NotFound (no such volume, it is not attached, or nobody serves it), InUse (mounted, or open: by whom), PermissionDenied,
    DeviceError (the flush failed).
    """
    from fvd.api.verbs import info
    from fvd.device import nbd_devices
    from fvd.volume.name import parse_name

    parsed = parse_name(volume)
    _check_root(parsed, "detached")
    disk = info(str(parsed))
    device = nbd_devices.find(disk.uuid)
    if device is None:
        raise NotFound(f"{parsed} is not attached; fvd-lv list shows which disks are")
    if disk.uri is None and not force:
        raise NotFound(
            f"{parsed} is attached as {device.best_path}, and nobody serves it: {how_to_serve(str(parsed))}; then what was written there "
            "reaches it. detach --force gives that up"
        )
    answer = Attached(disk.volume, device.path, str(device.link), disk.virtual_size, disk.read_only)
    whole(lambda: _detach(parsed, device, force))
    return answer


def _check_root(name: VolumeName, done: str) -> None:
    if os.geteuid() != 0:
        raise PermissionDenied(f"{name} can be {done} only by root: a block device is the whole host's")


def _link_name(name: VolumeName, asked: str | None) -> str:
    if asked is None:
        return plain_name(name.short) or "disk"
    if not asked or plain_name(asked) != asked or len(asked) > NAME_BYTES_MAX:
        raise InvalidArgument(f"{quoted(asked)} is no name for a link in /dev/fvd: up to {NAME_BYTES_MAX} letters, digits and . _ -")
    return asked


def _load_driver() -> None:
    from fvd.device.nbd_devices import load_driver
    from fvd.device.nbd_netlink import NbdNetlink

    try:
        with NbdNetlink():
            return
    except Unsupported:
        load_driver()
    with NbdNetlink():
        return


def _attach(name: VolumeName, disk: Info, link_name: str) -> NbdDevice:
    from fvd.api import remote
    from fvd.device.nbd_devices import NbdDevice

    answer = remote.ask(name, "attach", link=link_name)
    if answer is remote.NOT_SERVED:
        raise NotFound(f"{name} is not served any more; {how_to_serve(str(name))}")
    device = NbdDevice(int(answer["index"]), disk.uuid, link_name)
    try:
        device.limit_silence(REQUEST_LOOK_MILLISECONDS)
        device.make_link()
        device.tell_udev()
    except BaseException:
        _disconnect(device)
        raise
    return device


def _detach(name: VolumeName, device: NbdDevice, force: bool) -> None:
    _refuse_users(name, device)
    if force:
        _disconnect(device)
        return
    try:
        # The kernel lets nobody mount it meanwhile.
        fd = os.open(device.path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EBUSY:
            _refuse_users(name, device)
        raise DeviceError(f"{name}: {device.path} cannot be opened: {error.strerror}; detach --force gives up what is in it") from error
    try:
        os.fsync(fd)
        checkpoint()
        _disconnect(device, wait=False)
    except OSError as error:
        raise DeviceError(
            f"{name}: what was written to {device.best_path} could not be made durable: {error.strerror}; detach --force gives it up"
        ) from error
    finally:
        os.close(fd)
    _forget(device)


def _disconnect(device: NbdDevice, *, wait: bool = True) -> None:
    from fvd.device.nbd_netlink import NbdNetlink

    with NbdNetlink() as netlink:
        netlink.disconnect(device.index)
    if wait:
        _forget(device)


def _forget(device: NbdDevice) -> None:
    """When the last who has it open has closed it, the kernel forgets what was behind it, and udev its link."""
    deadline = time.monotonic() + GONE_SECONDS
    while device.is_connected and time.monotonic() < deadline:
        time.sleep(_PAUSE_SECONDS)
    device.tell_udev()
    device.remove_link()


def _refuse_users(name: VolumeName, device: NbdDevice) -> None:
    """Raises InUse: mounted, swapped to, below another device, or open in a process that does not go away."""
    from fvd.device.claim import users_of

    deadline = time.monotonic() + HELD_SECONDS
    try:
        number = os.stat(device.path).st_rdev  # noqa: PTH116
    except OSError as error:
        raise DeviceError(f"{device.path}: {error.strerror}") from error
    while users := users_of(number):
        if time.monotonic() >= deadline or any(user.startswith(("mounted", "swap", "held")) for user in users):
            raise InUse(f"{name} is attached as {device.best_path}, which is in use: {', '.join(users)}; end that first")
        time.sleep(_PAUSE_SECONDS)
        checkpoint()
