# SPDX-License-Identifier: Apache-2.0
"""Events of block devices through pyudev: a node appears, a size changes, a device is removed. Waits; never polls. Knows no volumes.

What udev tells it tells when it has looked at the device. The kernel tells at once, and where there is no udev, or it is stuck, too.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvd._lifetime import between_forks, keep
from fvd.errors import DeviceError, Timeout

log = logging.getLogger(__name__)

UDEV_CONTROL = "/run/udev/control"
NODE_SECONDS = 30.0
# A burst of events (a large group changes) must not be lost between two turns.
RECEIVE_BUFFER_BYTES = 1 << 20
_PAUSE_SECONDS = 0.1
_PHYSICAL_VOLUME = "LVM2_member"


@dataclass(frozen=True)
class BlockEvent:
    """Something happened to a block device."""

    action: str  # "add", "change", "remove"...
    number: int  # st_rdev
    name: str  # the kernel's
    is_physical_volume: bool  # of LVM, as udev's probe saw it
    from_kernel: bool = False  # told by the kernel itself, which has looked into nothing


def udev_is_running() -> bool:
    """Whether a udev daemon listens on this machine."""
    return Path(UDEV_CONTROL).exists()


def is_block_node(path: str) -> bool:
    """Whether the path leads to a block device now."""
    try:
        return stat.S_ISBLK(Path(path).stat().st_mode)
    except OSError:
        return False


def wait_for_node(path: str, timeout_seconds: float = NODE_SECONDS) -> None:
    """Returns when the block device's node is there. Raises Timeout (udev has not made it), DeviceError (no udev here, and no node)."""
    if is_block_node(path):
        return
    if not udev_is_running():
        raise DeviceError(f"{path} has no device node, and no udev runs here to make one; start udev, or run vgmknodes")
    monitor = _monitor("udev")
    # The subscription is there before the second look: an event between the two is waiting in it.
    deadline = time.monotonic() + timeout_seconds
    while not is_block_node(path):
        left = deadline - time.monotonic()
        if left <= 0 or not _readable(left, monitor.fileno()):
            if is_block_node(path):
                return
            raise Timeout(f"{path} has no device node {timeout_seconds:g} s after its activation: udev is slow or stuck (udevadm settle)")
        monitor.poll(timeout=0)


def known_content(path: str) -> str | None:
    """What udev's database says a device holds ("ext4", "LVM2_member", a partition table "gpt"); None: nothing, or nobody knows."""
    import pyudev

    with contextlib.suppress(OSError, pyudev.DeviceNotFoundError):
        device = pyudev.Devices.from_device_number(pyudev.Context(), "block", Path(path).stat().st_rdev)
        content = device.properties.get("ID_FS_TYPE") or device.properties.get("ID_PART_TABLE_TYPE")
        return None if content is None else str(content)
    return None


class BlockWatch:
    """Hands every event of a block device to `on_event`, in a thread of its own, from `start` to `close`: udev's of all devices, and the
    kernel's own of the device `number`."""

    def __init__(self, on_event: Callable[[BlockEvent], None], number: int = -1) -> None:
        self._on_event = on_event
        self._number = number
        self._thread: threading.Thread | None = None
        self._wake = -1
        self._monitors: list[Any] = []  # while it is at work

    def start(self) -> bool:
        """False: nobody tells of events here (not permitted)."""
        monitors = {}
        with between_forks:
            for source in ("kernel", "udev") if self._number >= 0 else ("udev",):
                if source == "udev" and not udev_is_running():
                    continue
                with contextlib.suppress(OSError):
                    monitors[source] = _monitor(source)
            if not monitors:
                return False
            self._wake = os.eventfd(0, os.EFD_CLOEXEC)
            self._monitors = list(monitors.values())
            keep(self, lambda watch: (watch._wake, *(monitor.fileno() for monitor in watch._monitors)))
        self._thread = threading.Thread(target=self._run, args=(monitors,), name="fvd-udev", daemon=True)
        self._thread.start()
        return True

    def close(self) -> None:
        """No event is handed on afterwards. Again is fine."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        os.eventfd_write(self._wake, 1)
        if thread is not threading.current_thread():
            thread.join()
        wake, self._wake, self._monitors = self._wake, -1, []
        os.close(wake)

    def _run(self, monitors: dict[str, Any]) -> None:
        wake = self._wake
        while True:
            readable = _readable(None, *(monitor.fileno() for monitor in monitors.values()), wake)
            if wake in readable:
                return
            for source, monitor in monitors.items():
                if monitor.fileno() not in readable:
                    continue
                try:
                    device = monitor.poll(timeout=0)
                    if device is not None and self._is_wanted(source, device):
                        self._on_event(_event(device, source == "kernel"))
                except OSError:
                    # ENOBUFS: some were lost, of the device perhaps. A socket that is dead for good must not keep a core busy.
                    if self._number >= 0:
                        self._on_event(BlockEvent("change", self._number, "", is_physical_volume=False, from_kernel=True))
                    if _readable(_PAUSE_SECONDS, wake):
                        return
                except Exception:  # one event must not be the last
                    log.exception("an event of a block device could not be dealt with")

    def _is_wanted(self, source: str, device: Any) -> bool:
        return source != "kernel" or int(device.device_number) == self._number


def _readable(timeout_seconds: float | None, *fds: int) -> list[int]:
    """Which of the descriptors can be read; none when the time is over. (select() knows none beyond 1023.)"""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return [fd for fd, _ in poll.poll(None if timeout_seconds is None else timeout_seconds * 1000)]


def _monitor(source: str) -> Any:
    """A monitor that receives from now on, what the kernel tells or what udev does."""
    import pyudev

    monitor = pyudev.Monitor.from_netlink(pyudev.Context(), source=source)
    monitor.filter_by("block")
    with contextlib.suppress(OSError):
        monitor.set_receive_buffer_size(RECEIVE_BUFFER_BYTES)
    monitor.start()
    return monitor


def _event(device: Any, from_kernel: bool) -> BlockEvent:
    return BlockEvent(
        action=str(device.action),
        number=int(device.device_number),
        name=str(device.sys_name),
        is_physical_volume=device.properties.get("ID_FS_TYPE") == _PHYSICAL_VOLUME,
        from_kernel=from_kernel,
    )
