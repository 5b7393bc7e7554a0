# SPDX-License-Identifier: Apache-2.0
"""One front end of vhost-user: a virtual machine that has connected. Acts on its messages: maps its memory, starts and stops its rings.

Requests never come here: the loop takes them from the rings. What is under way in a guest's memory holds whatever would change that: such
a message is answered, and the next one read, when the rings have come to rest. May not know how messages are laid out, or what rings hold.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol as Interface

from fvd._lifetime import Descriptors, keep
from fvd.errors import FvdError
from fvd.virtio import messages
from fvd.virtio._blk_ring import BlkRing, inflight_bytes
from fvd.virtio._guest_memory import GuestMemory, Shared
from fvd.virtio.config import GuestDisk
from fvd.virtio.messages import Ask, Feature, InflightArea, Message, MessageError, Protocol, RingAddresses

log = logging.getLogger(__name__)

_DESCRIPTOR_BYTES = 4
_MESSAGES_PER_STEP = 64
_NO_DESCRIPTOR = -1


class Loop(Interface):
    """What a front end needs of the serving loop."""

    def add_ring(self, ring: BlkRing, export: int, kick_fd: int, call_fd: int) -> int: ...
    def set_call(self, number: int, call_fd: int) -> None: ...
    def drain_ring(self, number: int, *, silently: bool) -> None: ...
    def has_rested(self, number: int) -> bool: ...
    def unwatch(self, fd: int) -> None: ...
    def remove_ring(self, number: int) -> None: ...


class Broken(Exception):
    """The front end has broken the protocol, or asks for what cannot be had: it is given up."""


@dataclass
class _Ring:
    """What a front end has said of one ring. `number`: the loop's, while it serves it."""

    size: int = 0
    addresses: RingAddresses | None = None
    next_available: int = 0
    kick_fd: int = _NO_DESCRIPTOR
    call_fd: int = _NO_DESCRIPTOR
    error_fd: int = _NO_DESCRIPTOR
    enabled: bool = False
    draining: bool = False
    ring: BlkRing | None = None
    number: int | None = None


class FrontEnd:
    """From its connection to `is_gone`."""

    def __init__(self, connection: socket.socket, disk: GuestDisk, export: int, loop: Loop) -> None:
        """`connection`: its own from now on; watched by the loop."""
        self._socket = connection
        self._disk = disk
        self._export = export
        self._loop = loop
        self._memory = GuestMemory()
        self._rings = [_Ring() for _ in range(disk.queues)]
        self._features = Feature(0)
        self._protocol = Protocol(0)
        self._inflight: Shared | None = None
        self._inflight_fd = _NO_DESCRIPTOR  # what we have handed out, while nobody has handed it back
        self._inflight_area: InflightArea | None = None
        self._log_fd = _NO_DESCRIPTOR
        self._backend_fd = _NO_DESCRIPTOR
        self._status = 0
        self._header = b""
        self._received = Descriptors()  # with the message that is being read
        self._taken = Descriptors()  # of those, what waits for rings to come to rest
        self._payload = b""
        self._unsent = b""
        self._then: Callable[[], None] | None = None  # when all that drains has come to rest
        self._ending = False
        self.reason = ""
        """Why it was given up; empty: it went by itself."""
        keep(self, FrontEnd._descriptors)

    def _descriptors(self) -> list[int]:
        """For a child after fork."""
        return [self._socket.fileno(), *self._owned()]

    def _owned(self) -> list[int]:
        of_rings = [fd for ring in self._rings for fd in (ring.kick_fd, ring.call_fd, ring.error_fd)]
        return [self._inflight_fd, self._log_fd, self._backend_fd, *of_rings]

    @property
    def ring_numbers(self) -> list[int]:
        return [ring.number for ring in self._rings if ring.number is not None]

    @property
    def is_gone(self) -> bool:
        """Nothing is left of it."""
        return self._ending and not self.ring_numbers

    @property
    def is_ending(self) -> bool:
        """It has no socket any more."""
        return self._ending

    @property
    def reads(self) -> bool:
        """Whether it takes messages now."""
        return not self._ending and self._then is None

    # --- Messages ---------------------------------------------------------------------------------------------------------

    def on_readable(self) -> bool:
        """Reads what has come and acts on it. True: there may be more than was read in this step."""
        try:
            for _ in range(_MESSAGES_PER_STEP):
                if not self.reads or not self._read_message():
                    return False
        except (MessageError, Broken, FvdError) as error:
            self.end(str(error))
        except OSError as error:
            self.end("" if isinstance(error, ConnectionError) else error.strerror or str(error))
        return self.reads

    def _read_message(self) -> bool:
        """One message, as far as it is there. False: no more of it now."""
        while len(self._header) < messages.HEADER.size:
            if not self._receive(messages.HEADER.size - len(self._header), header=True):
                return False
        number, flags, size = messages.decode_header(self._header)
        while len(self._payload) < size:
            if not self._receive(size - len(self._payload), header=False):
                return False
        payload, self._header, self._payload = self._payload, b"", b""
        try:
            message = messages.decode(number, flags, payload, self._received)
            self._act(message)
        finally:
            # Who wanted one has taken it out.
            self._received.close()
        return True

    def _receive(self, size: int, *, header: bool) -> bool:
        try:
            ancillary_bytes = socket.CMSG_SPACE(messages.DESCRIPTORS_MAX * _DESCRIPTOR_BYTES)
            data, ancillary, flags, _ = self._socket.recvmsg(size, ancillary_bytes, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return False
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                for place in range(0, len(content) - _DESCRIPTOR_BYTES + 1, _DESCRIPTOR_BYTES):
                    self._received.append(int.from_bytes(content[place : place + _DESCRIPTOR_BYTES], "little"))
        if flags & socket.MSG_CTRUNC or len(self._received) > messages.DESCRIPTORS_MAX:
            raise Broken("more descriptors came than a message can have")
        if not data:
            raise ConnectionResetError
        if header:
            self._header += data
        else:
            self._payload += data
        return True

    def _take_descriptor(self, message: Message, place: int = 0) -> int:
        """One that came with the message; the front end's from now on. -1: the message says that there is none."""
        if not message.descriptors:
            return _NO_DESCRIPTOR
        fd = message.descriptors[place]
        self._received.remove(fd)
        self._taken.append(fd)
        return fd

    def _take_event(self, message: Message, *, or_socket: bool = False) -> int:
        """As _take_descriptor, of what wakes somebody up. An eventfd only: to watch another file, or to write to it, may take for ever.

        `or_socket`: it is only written to, which does not wait for a reader; User-Mode Linux is called through a pair of sockets.
        """
        fd = self._take_descriptor(message)
        if fd != _NO_DESCRIPTOR:
            is_socket = or_socket and stat.S_ISSOCK(os.fstat(fd).st_mode)
            if not is_socket and str(Path(f"/proc/self/fd/{fd}").readlink()) != "anon_inode:[eventfd]":
                raise Broken(f"{message.ask.name} came with a descriptor that is no eventfd")
            os.set_blocking(fd, False)
        return fd

    def _replace(self, before: int, after: int) -> int:
        """What has its place now, after a descriptor that is needed no more."""
        if before != _NO_DESCRIPTOR:
            os.close(before)
        if after in self._taken:
            self._taken.remove(after)
        return after

    def _act(self, message: Message) -> None:
        act = _ACTS.get(message.ask)
        if act is None:
            raise Broken(f"{message.ask.name} cannot be done here")
        act(self, message)

    def _reply(self, data: bytes, descriptors: Iterable[int] = ()) -> None:
        """Messages are answered one by one, so that little waits in the socket: a front end that does not read them is given up."""
        try:
            sent = socket.send_fds(self._socket, [data], list(descriptors)) if descriptors else self._socket.send(data)
        except BlockingIOError:
            sent = 0
        if sent != len(data):
            raise Broken("it does not take the replies to its messages")

    def _done(self, message: Message, error: int = 0) -> None:
        """A message without a reply of its own has been acted on."""
        if message.needs_reply and self._protocol & Protocol.REPLY_ACK:
            self._reply(messages.encode_u64(message.ask, error))

    # --- What is agreed upon --------------------------------------------------------------------------------------------------

    def _offered(self) -> Feature:
        return messages.FEATURES | (Feature.READ_ONLY if self._disk.read_only else Feature(0))

    def _get_features(self, message: Message) -> None:
        self._reply(messages.encode_u64(message.ask, int(self._offered())))

    def _set_features(self, message: Message) -> None:
        if message.value & ~int(self._offered()):
            raise Broken(f"features {message.value:#x} were not offered")

        def agree() -> None:
            self._features = Feature(message.value)
            if not self._features & Feature.LOG_ALL:
                self._memory.log_nothing()
            self._start_rings()
            self._done(message)

        self._at_rest(agree)

    def _get_protocol_features(self, message: Message) -> None:
        self._reply(messages.encode_u64(message.ask, int(messages.PROTOCOL_FEATURES)))

    def _set_protocol_features(self, message: Message) -> None:
        if message.value & ~int(messages.PROTOCOL_FEATURES):
            raise Broken(f"features {message.value:#x} of the protocol were not offered")
        self._protocol = Protocol(message.value)
        self._done(message)

    def _get_queue_num(self, message: Message) -> None:
        self._reply(messages.encode_u64(message.ask, self._disk.queues))

    def _get_config(self, message: Message) -> None:
        self._reply(messages.encode_config(self._disk.config(), message.index, message.value))

    def _set_config(self, message: Message) -> None:
        self._done(message, error=1)  # there is nothing that a guest could change

    def _set_status(self, message: Message) -> None:
        if message.value == 0:  # the guest's driver resets the device
            self._at_rest(lambda: self._reset(message))
            return
        self._status = message.value
        self._done(message)

    def _get_status(self, message: Message) -> None:
        self._reply(messages.encode_u64(message.ask, self._status))

    def _reset_device(self, message: Message) -> None:
        self._at_rest(lambda: self._reset(message))

    def _reset(self, message: Message) -> None:
        """Rings keep what they have come to: QEMU 7.2 resets a device that it stops, and asks for that afterwards (GET_VRING_BASE)."""
        self._status = 0
        for ring in self._rings:
            ring.enabled = False
        self._done(message)

    def _nothing(self, message: Message) -> None:
        self._done(message)

    def _set_backend_channel(self, message: Message) -> None:
        self._backend_fd = self._replace(self._backend_fd, self._take_descriptor(message))
        self._done(message)

    # --- Memory -------------------------------------------------------------------------------------------------------------

    def _set_memory(self, message: Message) -> None:
        """another table takes the place of this one when nothing is under way in it."""
        fresh = GuestMemory()
        for place, region in enumerate(message.regions):
            self._map(fresh, region, message.descriptors[place])

        def replace() -> None:
            fresh.take_log_of(self._memory)
            self._memory.close()
            self._memory = fresh
            self._start_rings()
            self._done(message)

        self._at_rest(replace)

    def _add_memory(self, message: Message) -> None:
        try:
            self._map(self._memory, message.regions[0], message.descriptors[0])
        except FvdError as error:
            if not message.needs_reply:
                raise
            log.warning("memory of a virtual machine was refused: %s", error)
            self._done(message, error=1)
            return
        self._start_rings()
        self._done(message)

    @staticmethod
    def _map(memory: GuestMemory, region: messages.Region, fd: int) -> None:
        memory.add(fd, region.guest_address, region.user_address, region.size_bytes, region.file_offset_bytes)

    def _remove_memory(self, message: Message) -> None:
        region = message.regions[0]

        def remove() -> None:
            self._memory.remove(region.guest_address, region.user_address, region.size_bytes)
            self._start_rings()
            self._done(message)

        self._at_rest(remove)

    def _get_memory_slots(self, message: Message) -> None:
        self._reply(messages.encode_u64(message.ask, messages.DESCRIPTORS_MAX * 8))

    def _set_log(self, message: Message) -> None:
        area, fd = message.area, self._take_descriptor(message)
        assert area is not None

        def begin() -> None:
            self._memory.log_to(fd, area.offset_bytes, area.size_bytes)
            self._replace(fd, _NO_DESCRIPTOR)
            self._taken.remove(fd)
            self._start_rings()
            self._reply(messages.encode_u64(message.ask, 0))

        self._at_rest(begin)

    def _set_log_channel(self, message: Message) -> None:
        self._log_fd = self._replace(self._log_fd, self._take_descriptor(message))
        self._done(message)

    # --- Requests in flight -----------------------------------------------------------------------------------------------------

    def _make_inflight(self, message: Message) -> None:
        """Memory that the front end keeps, and hands to whoever serves it next."""
        asked = message.area
        assert asked is not None
        queues, size = asked.queues, asked.ring_size
        if not 0 < queues <= messages.QUEUES_MAX or not 0 < size <= 1024:
            raise Broken(f"memory for {queues} rings of {size} requests in flight")
        area = InflightArea(queues * inflight_bytes(size), 0, queues, size)
        fd = os.memfd_create("fvd-in-flight", os.MFD_CLOEXEC)
        self._inflight_fd = self._replace(self._inflight_fd, fd)
        os.ftruncate(fd, area.size_bytes)
        self._reply(messages.encode_inflight(area, message.value), [fd])

    def _take_inflight(self, message: Message) -> None:
        area = message.area
        assert area is not None
        if area.offset_bytes % 8 or not 0 < area.ring_size <= 1024 or area.queues * inflight_bytes(area.ring_size) > area.size_bytes:
            raise Broken(f"memory for {area.queues} rings of {area.ring_size} requests in flight of {area.size_bytes} bytes")
        inflight = Shared(message.descriptors[0], area.offset_bytes + area.size_bytes)

        def replace() -> None:
            self._inflight = inflight
            self._inflight_area = area
            self._start_rings()
            self._done(message)

        self._at_rest(replace)

    # --- Rings ----------------------------------------------------------------------------------------------------------------

    def _ring(self, message: Message) -> _Ring:
        if message.index >= len(self._rings):
            raise Broken(f"{message.ask.name} is of ring {message.index}, and there are {len(self._rings)}")
        return self._rings[message.index]

    def _set_ring(self, message: Message, change: Callable[[_Ring], None]) -> None:
        """What says where a ring is, or how it goes on, is taken when it is at rest."""
        ring = self._ring(message)

        def set_and_start() -> None:
            change(ring)
            self._start_rings()
            self._done(message)

        self._at_rest(set_and_start, ring)

    def _set_ring_size(self, message: Message) -> None:
        def change(ring: _Ring) -> None:
            if ring.size != message.value:
                ring.size, ring.ring = message.value, None

        self._set_ring(message, change)

    def _set_ring_addresses(self, message: Message) -> None:
        def change(ring: _Ring) -> None:
            ring.addresses = message.addresses

        self._set_ring(message, change)

    def _set_ring_base(self, message: Message) -> None:
        def change(ring: _Ring) -> None:
            ring.next_available = message.value & 0xFFFF

        self._set_ring(message, change)

    def _set_ring_enabled(self, message: Message) -> None:
        def change(ring: _Ring) -> None:
            ring.enabled = message.value == 1

        self._set_ring(message, change)

    def _set_kick(self, message: Message) -> None:
        ring, fd = self._ring(message), self._take_event(message)
        if fd == _NO_DESCRIPTOR:
            raise Broken("a ring without a descriptor to kick it by would have to be polled")

        def change() -> None:
            ring.kick_fd = self._replace(ring.kick_fd, fd)
            self._start_rings()
            self._done(message)

        self._at_rest(change, ring)

    def _set_call(self, message: Message) -> None:
        ring, fd = self._ring(message), self._take_event(message, or_socket=True)
        if ring.number is not None:
            self._loop.set_call(ring.number, fd)
        ring.call_fd = self._replace(ring.call_fd, fd)
        self._done(message)

    def _set_error(self, message: Message) -> None:
        ring = self._ring(message)
        ring.error_fd = self._replace(ring.error_fd, self._take_event(message, or_socket=True))
        self._done(message)

    def _get_ring_base(self, message: Message) -> None:
        """Stops a ring: it is started again by a descriptor to kick it by."""
        ring = self._ring(message)

        def stop() -> None:
            ring.kick_fd = self._replace(ring.kick_fd, _NO_DESCRIPTOR)
            self._reply(messages.encode_base(message.index, ring.next_available))

        self._at_rest(stop, ring)

    def _start_rings(self) -> None:
        """Those of which everything is known."""
        if self._features & Feature.VERSION_1:
            for index, ring in enumerate(self._rings):
                enabled = ring.enabled or not self._features & Feature.PROTOCOL_FEATURES
                if ring.number is None and enabled and ring.kick_fd != _NO_DESCRIPTOR and ring.size and ring.addresses is not None:
                    self._start(index, ring, ring.addresses)

    def _start(self, index: int, ring: _Ring, addresses: RingAddresses) -> None:
        disk = self._disk
        if ring.ring is None:
            ring.ring = BlkRing(ring.size, sectors=disk.sectors, is_read_only=disk.read_only, serial=disk.serial)
        area = self._inflight_area
        offset_bytes = 0
        if area is not None:
            if index >= area.queues or ring.size > area.ring_size:
                raise Broken(f"the memory of requests in flight has no place for ring {index} of {ring.size}")
            offset_bytes = area.offset_bytes + index * inflight_bytes(area.ring_size)
        ring.ring.begin(
            self._memory,
            addresses.descriptors,
            addresses.available,
            addresses.used,
            next_available=ring.next_available,
            used_guest_address=addresses.log_address if self._features & Feature.LOG_ALL else None,
            has_event_index=bool(self._features & Feature.EVENT_IDX),
            has_indirect=bool(self._features & Feature.INDIRECT_DESC),
            is_durable=not self._features & Feature.FLUSH,
            inflight=self._inflight,
            inflight_offset_bytes=offset_bytes,
        )
        ring.number = self._loop.add_ring(ring.ring, self._export, ring.kick_fd, ring.call_fd)

    # --- Rest -----------------------------------------------------------------------------------------------------------------

    def _at_rest(self, then: Callable[[], None], only: _Ring | None = None) -> None:
        """Has the rings (or one) come to rest, and then does `then`. No message is read before."""
        for ring in self._rings if only is None else [only]:
            if ring.number is not None:
                ring.draining = True
                self._loop.drain_ring(ring.number, silently=False)
        self._then = then
        self._go_on()

    def on_ring(self, number: int) -> None:
        """A ring of it has come to rest, or has broken."""
        for ring in self._rings:
            if ring.number == number and ring.ring is not None and ring.ring.why is not None and not self._ending:
                with contextlib.suppress(OSError):
                    if ring.error_fd != _NO_DESCRIPTOR:
                        os.eventfd_write(ring.error_fd, 1)
                self.end(ring.ring.why)
        try:
            self._go_on()
        except (MessageError, Broken, FvdError) as error:
            self.end(str(error))
        except OSError as error:
            self.end(error.strerror or str(error))

    def _go_on(self) -> None:
        waiting = False
        for ring in self._rings:
            if ring.number is None or ring.ring is None:
                continue
            if self._loop.has_rested(ring.number):
                ring.next_available = ring.ring.next_available
                number, ring.number, ring.draining = ring.number, None, False
                self._loop.remove_ring(number)
            elif self._ending or ring.draining:
                waiting = True
        if waiting:
            return
        if self._ending:
            self._let_go()
            return
        then, self._then = self._then, None
        if then is not None:
            then()

    def end(self, reason: str) -> None:
        """Gives it up: nothing more is read or told, and its memory goes when nothing is under way in it. Again is fine."""
        if self._ending:
            return
        self._ending = True
        self.reason = reason
        self._then = None
        self._loop.unwatch(self._socket.fileno())
        self._socket.close()
        for number in self.ring_numbers:
            self._loop.drain_ring(number, silently=True)
        self._go_on()

    def _let_go(self) -> None:
        for fd in self._owned():
            if fd != _NO_DESCRIPTOR:
                os.close(fd)
        self._inflight_fd = self._log_fd = self._backend_fd = _NO_DESCRIPTOR
        for ring in self._rings:
            ring.kick_fd = ring.call_fd = ring.error_fd = _NO_DESCRIPTOR
            ring.ring = None
        self._received.close()
        self._taken.close()
        self._memory.close()
        self._inflight = None


_ACTS: dict[Ask, Callable[[FrontEnd, Message], None]] = {
    Ask.GET_FEATURES: FrontEnd._get_features,
    Ask.SET_FEATURES: FrontEnd._set_features,
    Ask.SET_OWNER: FrontEnd._nothing,
    Ask.RESET_OWNER: FrontEnd._nothing,
    Ask.SET_MEM_TABLE: FrontEnd._set_memory,
    Ask.SET_LOG_BASE: FrontEnd._set_log,
    Ask.SET_LOG_FD: FrontEnd._set_log_channel,
    Ask.SET_VRING_NUM: FrontEnd._set_ring_size,
    Ask.SET_VRING_ADDR: FrontEnd._set_ring_addresses,
    Ask.SET_VRING_BASE: FrontEnd._set_ring_base,
    Ask.GET_VRING_BASE: FrontEnd._get_ring_base,
    Ask.SET_VRING_KICK: FrontEnd._set_kick,
    Ask.SET_VRING_CALL: FrontEnd._set_call,
    Ask.SET_VRING_ERR: FrontEnd._set_error,
    Ask.GET_PROTOCOL_FEATURES: FrontEnd._get_protocol_features,
    Ask.SET_PROTOCOL_FEATURES: FrontEnd._set_protocol_features,
    Ask.GET_QUEUE_NUM: FrontEnd._get_queue_num,
    Ask.SET_VRING_ENABLE: FrontEnd._set_ring_enabled,
    Ask.SET_BACKEND_REQ_FD: FrontEnd._set_backend_channel,
    Ask.GET_CONFIG: FrontEnd._get_config,
    Ask.SET_CONFIG: FrontEnd._set_config,
    Ask.GET_INFLIGHT_FD: FrontEnd._make_inflight,
    Ask.SET_INFLIGHT_FD: FrontEnd._take_inflight,
    Ask.RESET_DEVICE: FrontEnd._reset_device,
    Ask.GET_MAX_MEM_SLOTS: FrontEnd._get_memory_slots,
    Ask.ADD_MEM_REG: FrontEnd._add_memory,
    Ask.REM_MEM_REG: FrontEnd._remove_memory,
    Ask.SET_STATUS: FrontEnd._set_status,
    Ask.GET_STATUS: FrontEnd._get_status,
}
