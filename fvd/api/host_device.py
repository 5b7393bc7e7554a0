# SPDX-License-Identifier: Apache-2.0
"""A served disk as a block device of its own host, seen from the process that serves it: connects the kernel's nbd driver to that process,
and does so again when the process is the next one. Knows the server, not the command line.

There is no socket to find and no handshake: of a pair of sockets the kernel gets one, the server the other. That a disk is attached is
written nowhere but in the kernel, which keeps the device, and what waits for an answer, while there is no server. So whoever serves the
disk next looks there, and a server that was killed leaves nothing that could be out of date.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import threading
import time
from typing import TYPE_CHECKING

from fvd.device import nbd_devices
from fvd.device.nbd_netlink import NbdNetlink, Shape
from fvd.errors import FvdError, InUse, NotFound, PermissionDenied

if TYPE_CHECKING:
    from fvd.device.nbd_devices import NbdDevice
    from fvd.export.server import NbdServer

# For so long requests wait for the next server; then they fail. As long as QEMU holds a guest's back (attach-info).
DEAD_SECONDS = 120
# What a guest's virtio disk has too: partition tables count in it.
BLOCK_BYTES = 512
_TRIES = 50
_PAUSE_SECONDS = 0.1

log = logging.getLogger("fvd.api")


class HostDevices:
    """Of the disks of one server."""

    def __init__(self, server: NbdServer) -> None:
        self._server = server
        self._lock = threading.Lock()

    def attach(self, export: str, volume: str, uuid: str, name: str) -> NbdDevice:
        """A new device. Raises InUse (it is attached already), Unsupported, PermissionDenied, DeviceError."""
        with self._lock, NbdNetlink() as netlink:
            if device := nbd_devices.find(uuid):
                raise InUse(f"{volume} is attached already, as {device.best_path}")
            self._flush_io(volume)
            size_bytes, flags = self._server.shape(export)
            wanted = nbd_devices.NbdDevice(-1, uuid, name)
            ours, theirs = socket.socketpair()
            with ours, theirs:
                try:
                    index = netlink.connect(Shape(size_bytes, BLOCK_BYTES, flags, DEAD_SECONDS, wanted.backend), theirs.fileno())
                except PermissionDenied as error:
                    raise PermissionDenied(f"{volume} is served by a process that may not make devices; serve it as root") from error
                try:
                    self._server.take_connection(export, ours)
                except BaseException:
                    netlink.disconnect(index)
                    raise
            return nbd_devices.NbdDevice(index, uuid, name)

    def reconnect(self, export: str, volume: str, uuid: str) -> None:
        """If the disk is attached: what waits for a server since the last one went is answered by this one. Raises nothing."""
        with self._lock:
            device = nbd_devices.find(uuid)
            if device is None:
                return
            try:
                self._flush_io(volume)
                with NbdNetlink() as netlink:
                    self._reconnect(netlink, export, device)
                log.info("%s: %s is connected again", volume, device.best_path)
            except (FvdError, OSError) as error:
                log.warning("%s: %s, which was attached before, cannot be connected again: %s", volume, device.best_path, error)

    def _reconnect(self, netlink: NbdNetlink, export: str, device: NbdDevice) -> None:
        for _ in range(_TRIES):
            ours, theirs = socket.socketpair()
            with ours:
                with theirs:
                    netlink.reconnect(device.index, device.backend, theirs.fileno())
                # The kernel keeps it only in place of one that it has found dead, and says nothing otherwise.
                if not _has_hung_up(ours):
                    self._server.take_connection(export, ours)
                    return
            time.sleep(_PAUSE_SECONDS)
        raise NotFound("the kernel takes no connection for it; it has waited too long, or another server is connected")

    def _flush_io(self, volume: str) -> None:
        """What this process needs memory for must not wait for pages that only it can write."""
        if reason := self._server.call(nbd_devices.become_io_flusher):
            log.warning("%s: attached without PR_SET_IO_FLUSHER (%s): where memory is short, the host may hang", volume, reason)


def _has_hung_up(connection: socket.socket) -> bool:
    poll = select.poll()
    poll.register(connection, 0)
    with contextlib.suppress(OSError):
        return bool(poll.poll(0))
    return True
