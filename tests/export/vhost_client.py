# SPDX-License-Identifier: Apache-2.0
"""A front end of vhost-user for the tests, a message at a time: anything, in any order and in pieces. The guest is guest_model's."""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import struct
from collections.abc import Sequence
from pathlib import Path

from guest_model import OK, Memory, Ring, header, user_address

from fvd.virtio.messages import Ask, Feature, Protocol

TIMEOUT_SECONDS = 20
NEED_REPLY = 8
FEATURES = Feature.VERSION_1 | Feature.PROTOCOL_FEATURES | Feature.INDIRECT_DESC | Feature.FLUSH | Feature.DISCARD | Feature.WRITE_ZEROES
PROTOCOL = Protocol.MQ | Protocol.REPLY_ACK | Protocol.CONFIG


class Refused(Exception):
    """The server has hung up."""


class FrontEnd:
    """A connection, and what a virtual machine has for it."""

    def __init__(self, path: Path | str, *, memory: Memory | None = None) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(TIMEOUT_SECONDS)
        self.socket.connect(str(path))
        self.memory = memory or Memory()
        self.rings: list[Ring] = []
        self.kicks: list[int] = []
        self.calls: list[int] = []
        self._mapped = memory is None

    # --- Messages ---------------------------------------------------------------------------------------------------

    def send(self, ask: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 1) -> None:
        message = struct.pack("<III", ask, flags, len(payload)) + payload
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self.socket.sendmsg([message], rights)
        except ConnectionError as error:
            raise Refused from error

    def receive(self) -> tuple[int, bytes, list[int]]:
        """(which message, its payload, descriptors that came with it)."""
        head, fds = b"", array.array("i")
        try:
            while len(head) < 12:
                data, ancillary, _, _ = self.socket.recvmsg(12 - len(head), socket.CMSG_SPACE(32))
                if not data:
                    raise Refused
                for _, _, content in ancillary:
                    fds.frombytes(content)
                head += data
            ask, flags, size = struct.unpack("<III", head)
            assert flags == 5
            payload = self.socket.recv(size, socket.MSG_WAITALL) if size else b""
        except ConnectionError as error:
            raise Refused from error
        return ask, payload, list(fds)

    def ask(self, ask: Ask, payload: bytes = b"") -> bytes:
        self.send(ask, payload)
        answered, content, _ = self.receive()
        assert answered == ask
        return content

    def number(self, ask: Ask) -> int:
        return int.from_bytes(self.ask(ask), "little")

    def tell(self, ask: Ask, payload: bytes = b"", fds: Sequence[int] = ()) -> int:
        """Waits until the server has acted on it. 0: well."""
        self.send(ask, payload, fds, 1 | NEED_REPLY)
        return self.acknowledged(ask)

    def acknowledged(self, ask: Ask) -> int:
        answered, content, _ = self.receive()
        assert answered == ask
        return int.from_bytes(content, "little")

    def is_answered(self, seconds: float) -> bool:
        """Whether something has come within that time."""
        return bool(select.select([self.socket], [], [], seconds)[0])

    def is_gone(self) -> bool:
        """Whether the server has hung up; waits for it."""
        try:
            while self.socket.recv(4096):
                pass
        except ConnectionError:
            pass
        except TimeoutError:
            return False
        return True

    # --- As a virtual machine does ------------------------------------------------------------------------------------

    def agree(self, features: int = FEATURES, protocol: int = PROTOCOL) -> None:
        assert self.number(Ask.GET_FEATURES) & features == features
        assert self.number(Ask.GET_PROTOCOL_FEATURES) & protocol == protocol
        self.send(Ask.SET_PROTOCOL_FEATURES, struct.pack("<Q", protocol))
        self.send(Ask.SET_OWNER)
        self.send(Ask.SET_FEATURES, struct.pack("<Q", features))

    def table(self) -> bytes:
        regions = self.memory.regions
        rows = b"".join(struct.pack("<QQQQ", guest, size, user, offset) for guest, user, size, offset in regions)
        return struct.pack("<II", len(regions), 0) + rows

    def share_memory(self) -> int:
        return self.tell(Ask.SET_MEM_TABLE, self.table(), [self.memory.fd] * len(self.memory.regions))

    def add_ring(self, size: int = 64) -> Ring:
        index = len(self.rings)
        ring = Ring(self.memory, size)
        self.rings.append(ring)
        self.kicks.append(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
        self.calls.append(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
        self.start_ring(index)
        return ring

    def start_ring(self, index: int, base: int | None = None) -> None:
        ring = self.rings[index]
        addresses = [user_address(at) for at in (ring.descriptors, ring.used, ring.available)]
        self.send(Ask.SET_VRING_NUM, struct.pack("<II", index, ring.size))
        self.send(Ask.SET_VRING_BASE, struct.pack("<II", index, ring.used_index if base is None else base))
        self.send(Ask.SET_VRING_ADDR, struct.pack("<IIQQQQ", index, 0, *addresses, 0))
        self.send(Ask.SET_VRING_CALL, struct.pack("<Q", index), [self.calls[index]])
        self.send(Ask.SET_VRING_KICK, struct.pack("<Q", index), [self.kicks[index]])
        assert self.tell(Ask.SET_VRING_ENABLE, struct.pack("<II", index, 1)) == 0

    def begin(self, *, size: int = 64, rings: int = 1, features: int = FEATURES, protocol: int = PROTOCOL) -> FrontEnd:
        """All that a virtual machine says before its guest runs."""
        self.agree(features, protocol)
        assert self.share_memory() == 0
        for _ in range(rings):
            self.add_ring(size)
        return self

    # --- As its guest does ------------------------------------------------------------------------------------------

    def request(self, kind: int, sector: int = 0, out: bytes = b"", into: int = 0, *, ring: int = 0) -> tuple[int, int, int]:
        """Makes one available and kicks. (head, where its data is, where its status is)."""
        memory = self.memory
        at = memory.carve(16 + len(out), 512)
        memory.write(at, header(kind, sector))
        data = memory.carve(max(into, len(out)), 512)
        memory.write(data, out)
        status = memory.carve(1)
        memory.write(status, b"\xff")
        head = self.rings[ring].chain(
            [(at, 16), *([(data, len(out))] if out else [])], [*([(data, into)] if into else []), (status, 1)], indirect=True
        )
        self.rings[ring].make_available(head)
        os.eventfd_write(self.kicks[ring], 1)
        return head, data, status

    def wait_used(self, count: int = 1, *, ring: int = 0) -> list[tuple[int, int]]:
        """What has been answered, when it is so many; woken by calls."""
        answered = self.rings[ring].take_used()
        while len(answered) < count:
            ready, _, _ = select.select([self.calls[ring]], [], [], TIMEOUT_SECONDS)
            assert ready, "the guest is not called"
            os.eventfd_read(self.calls[ring])
            answered += self.rings[ring].take_used()
        return answered

    def do(self, kind: int, sector: int = 0, out: bytes = b"", into: int = 0, *, ring: int = 0) -> bytes:
        """One request, to its good end; what it has read."""
        carved = self.memory.carved
        _, data, status = self.request(kind, sector, out, into, ring=ring)
        self.wait_used(ring=ring)
        assert self.memory.read(status, 1)[0] == OK
        content = self.memory.read(data, into)
        self.memory.carve_again_from(carved)
        return content

    def close(self) -> None:
        self.socket.close()
        for fd in (*self.kicks, *self.calls):
            with contextlib.suppress(OSError):
                os.close(fd)
        self.kicks, self.calls = [], []
        if self._mapped:
            self.memory.close()
