# SPDX-License-Identifier: Apache-2.0
"""A guest, its ring and a disk in memory, without a server: what the tests of rings begin with."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from guest_model import Memory, Ring, header, user_address

from devtools._ring_driver import RingDriver
from fvd.virtio._blk_ring import BlkRing, inflight_bytes
from fvd.virtio._guest_memory import GuestMemory, Shared

SECTORS = 256
SERIAL = b"disk-of-the-tests"


@dataclass
class Running:
    """One guest and one ring of it. `driver`: the device's side."""

    memory: Memory
    mapped: GuestMemory
    guest: Ring
    driver: RingDriver
    disk: bytearray

    @property
    def ring(self) -> BlkRing:
        return self.driver.ring

    def begin(self, *, index: int = 0, inflight: Shared | None = None, **options: bool) -> None:
        begin(self.ring, self.mapped, self.guest, index=index, inflight=inflight, **options)

    def request(self, kind: int, sector: int = 0, out: bytes = b"", into: int = 0, *, indirect: bool = False) -> tuple[int, int, int]:
        """Makes one available, in the plainest shape. (head, where its data is, where its status is)."""
        at = self.memory.carve(16 + len(out), 16)
        self.memory.write(at, header(kind, sector) + out)
        data, status = self.memory.carve(into, 16), self.memory.carve(1)
        self.memory.write(status, b"\xff")
        head = self.guest.chain(
            [(at, 16), *([(at + 16, len(out))] if out else [])], [*([(data, into)] if into else []), (status, 1)], indirect=indirect
        )
        self.guest.make_available(head)
        return head, data, status

    def status(self, at: int) -> int:
        return self.memory.read(at, 1)[0]

    def finish(self) -> list[tuple[int, int]]:
        """Takes what is there, has all of it end, and returns what has been answered."""
        self.driver.take()
        self.driver.end_all()
        self.driver.publish()
        return self.guest.take_used()


def map_memory(memory: Memory) -> GuestMemory:
    mapped = GuestMemory()
    for guest_address, user, size_bytes, offset_bytes in memory.regions:
        mapped.add(memory.fd, guest_address, user, size_bytes, offset_bytes)
    return mapped


def begin(
    ring: BlkRing, mapped: GuestMemory, guest: Ring, *, index: int = 0, inflight: Shared | None = None, event_index: bool = False,
    indirect: bool = True, durable: bool = False, log_used_at: int | None = None
) -> None:  # fmt: skip
    ring.begin(
        mapped,
        user_address(guest.descriptors),
        user_address(guest.available),
        user_address(guest.used),
        next_available=index,
        used_guest_address=log_used_at,
        has_event_index=event_index,
        has_indirect=indirect,
        is_durable=durable,
        inflight=inflight,
    )


def new_ring(size: int, *, read_only: bool = False) -> BlkRing:
    return BlkRing(size, sectors=SECTORS, is_read_only=read_only, serial=SERIAL)


@contextlib.contextmanager
def ring_running(
    size: int = 8, *, index: int = 0, read_only: bool = False, memory: Memory | None = None, inflight: Shared | None = None, **options: bool
) -> Iterator[Running]:
    own = memory or Memory()
    mapped = map_memory(own)
    guest = Ring(own, size, index)
    disk = bytearray(512 * SECTORS)
    running = Running(own, mapped, guest, RingDriver(new_ring(size, read_only=read_only), disk), disk)
    running.begin(index=index, inflight=inflight, **options)
    try:
        yield running
        running.driver.end_all()  # a ring is let go when nothing is under way
    finally:
        mapped.close()
        if memory is None:
            own.close()


def inflight_of(size: int) -> tuple[int, Shared]:
    """(descriptor, as the server has it) of memory for one ring's requests in flight."""
    fd = os.memfd_create("in-flight", os.MFD_CLOEXEC)
    os.ftruncate(fd, inflight_bytes(size))
    return fd, Shared(fd, inflight_bytes(size))
