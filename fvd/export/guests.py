# SPDX-License-Identifier: Apache-2.0
"""Where guests come in: vhost-user sockets beside the NBD server's, the front ends that have connected, and their rings' owners.

All of it is called in the serving thread. May not know messages or rings: front_end.py acts on them.
"""

from __future__ import annotations

import errno
import logging
import socket
from dataclasses import dataclass

from fvd._lifetime import between_forks, keep
from fvd.counted import Counted
from fvd.errors import Conflict, InvalidArgument, quoted
from fvd.export._server import NbdLoop
from fvd.export.front_end import FrontEnd
from fvd.export.listening import BoundName, Given, Listen, Unix, check_given, open_listener
from fvd.virtio.config import GuestDisk
from fvd.virtio.messages import QUEUES_MAX

log = logging.getLogger(__name__)

_ACCEPTS_PER_STEP = 16

FRONT_ENDS_MAX = 8
"""Of one disk, with those that have hung up and still have requests under way. A guest that moves to another process on this host has two
for a while."""


@dataclass
class _Port:
    """A socket at which guests of one disk arrive."""

    export_name: str
    export: int
    disk: GuestDisk
    listen: Unix | Given
    listener: socket.socket | None = None
    bound: BoundName | None = None
    accepts_later: bool = False  # at the loop's next tick: there may be more, and the queue does not ring again for them

    @property
    def path(self) -> str:
        return self.listen.path if isinstance(self.listen, Unix) else str(self.listen)


class Guests:
    """The ports of a server, and who has come in through them."""

    def __init__(self, loop: NbdLoop, notes: Counted) -> None:
        self._loop = loop
        self._notes = notes
        self._ports: list[_Port] = []
        self._front_ends: dict[int, tuple[FrontEnd, _Port]] = {}  # by the descriptor of their socket
        self._leaving: list[tuple[FrontEnd, _Port]] = []  # whose rings have something under way
        self._again: set[int] = set()  # descriptors of front ends that may have said more
        self._arriving: socket.socket | None = None
        self._opened = False
        keep(self, Guests._descriptors)

    def _descriptors(self) -> list[int]:
        """For a child after fork; front ends tell of their own."""
        listeners = [port.listener.fileno() for port in self._ports if port.listener is not None]
        return listeners if self._arriving is None else [*listeners, self._arriving.fileno()]

    @property
    def count(self) -> int:
        """Of the front ends that are connected."""
        return len(self._front_ends)

    def count_of(self, export_name: str) -> int:
        return sum(port.export_name == export_name for _, port in list(self._front_ends.values()))

    @property
    def has_more(self) -> bool:
        """Somebody may have said more than was read in one step."""
        return bool(self._again)

    # --- Ports --------------------------------------------------------------------------------------------------------------

    def add_port(self, export_name: str, export: int, disk: GuestDisk, listen: Listen) -> None:
        """Raises InvalidArgument (TCP: descriptors cannot pass there; a number of queues), InUse, PermissionDenied, NotFound."""
        if not isinstance(listen, Unix | Given):
            raise InvalidArgument("vhost-user needs a Unix socket: a guest's memory cannot be handed over by TCP")
        if not 1 <= disk.queues <= QUEUES_MAX:
            raise InvalidArgument(f"{disk.queues} queues: from 1 to {QUEUES_MAX} can be served")
        if any(port.export_name == export_name for port in self._ports):
            raise Conflict(f"guests of {quoted(export_name)} have a socket already")
        port = _Port(export_name, export, disk, listen)
        self._ports.append(port)
        if self._opened:
            self._open_port(port)

    def open(self) -> None:
        """Listens. Raises as `add_port`."""
        self._opened = True
        for port in self._ports:
            self._open_port(port)

    def _open_port(self, port: _Port) -> None:
        if isinstance(port.listen, Given):
            check_given(port.listen)
            port.listener = port.listen.sockets[0]
        else:
            port.listener, port.bound = open_listener(port.listen)
        self._loop.watch(port.listener.fileno())

    def close_ports(self, export_name: str | None = None) -> None:
        """Nobody comes in any more (of one disk, or all). Names that were given stay."""
        for port in [port for port in self._ports if export_name in (None, port.export_name)]:
            self._ports.remove(port)
            if port.listener is not None:
                self._loop.unwatch(port.listener.fileno())
                port.listener.close()
            if port.bound is not None:
                port.bound.remove()

    # --- Front ends -----------------------------------------------------------------------------------------------------------

    def take_ready(self, ready: list[int]) -> None:
        """What the loop has seen of our descriptors."""
        for port in self._ports:
            if port.listener is not None and (port.accepts_later or port.listener.fileno() in ready):
                self._accept(port, port.listener)
        for fd in dict.fromkeys([*self._again, *ready]):
            if fd in self._front_ends:
                self._again.discard(fd)
                self._read(fd)

    def _accept(self, port: _Port, listener: socket.socket) -> None:
        port.accepts_later = True
        for _ in range(_ACCEPTS_PER_STEP):
            try:
                with between_forks:
                    connection, _ = listener.accept()
                    self._arriving = connection
            except BlockingIOError:
                port.accepts_later = False
                return
            except OSError as error:
                if error.errno not in (errno.ECONNABORTED, errno.EINTR):
                    self._notes.error("accept", f"accept: {error.strerror}")
                    return
                continue
            if sum(other is port for _, other in [*self._front_ends.values(), *self._leaving]) >= FRONT_ENDS_MAX:
                self._notes.warning("front ends", f"turned a virtual machine away: {FRONT_ENDS_MAX} use {port.export_name} already")
                connection.close()
                continue
            connection.setblocking(False)
            fd = connection.fileno()
            self._loop.watch(fd)
            self._front_ends[fd] = FrontEnd(connection, port.disk, port.export, self._loop), port
            self._read(fd)

    def _read(self, fd: int) -> None:
        front_end, _ = self._front_ends[fd]
        if front_end.on_readable():
            self._again.add(fd)
        self._settle(fd)

    def take_rings(self, numbers: list[int], *, reading: bool = True) -> None:
        """Of the loop: rings that have come to rest, or have broken. `reading`: their front ends may go on."""
        for number in numbers:
            for fd, (front_end, _) in list(self._front_ends.items()):
                if number in front_end.ring_numbers:
                    front_end.on_ring(number)
                    if reading and front_end.reads:
                        self._read(fd)
                    else:
                        self._settle(fd)
            for front_end, _ in self._leaving:
                if number in front_end.ring_numbers:
                    front_end.on_ring(number)
        self._leaving = [entry for entry in self._leaving if not entry[0].is_gone]

    def _settle(self, fd: int) -> None:
        """A front end that has ended has no socket any more."""
        front_end, port = self._front_ends[fd]
        if not front_end.is_ending:
            return
        del self._front_ends[fd]
        self._again.discard(fd)
        if front_end.reason:
            self._notes.warning("front end", f"{port.export_name}: disconnected a virtual machine: {front_end.reason}")
        if not front_end.is_gone:
            self._leaving.append((front_end, port))

    def end(self, export_name: str | None = None) -> None:
        """Hangs up on the front ends (of one disk, or all)."""
        for fd, (front_end, port) in list(self._front_ends.items()):
            if export_name in (None, port.export_name):
                front_end.end("")
                self._settle(fd)
