# SPDX-License-Identifier: Apache-2.0
"""A guest and its front end that mean harm: any bytes become a ring in its memory, chains, indexes and what is in flight; or messages.

Beside what targets.py says of a target: the backend judges that each part lies within the disk, and nothing stays under way.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from functools import cache
from typing import Any

from guest_model import GUEST_ADDRESS, USER_ADDRESS, Memory
from hostile import Take

from devtools._ring_driver import RingDriver
from fvd.errors import FvdError
from fvd.export.front_end import FrontEnd
from fvd.virtio._blk_ring import BlkRing, inflight_bytes
from fvd.virtio._guest_memory import GuestMemory, Shared
from fvd.virtio.config import GuestDisk
from fvd.virtio.messages import Ask

SECTORS = 64
REGION_BYTES = 8192
AVAILABLE, USED, TABLE, HEADS, DATA = 512, 1024, 4096, 2048, 6144
LENGTHS = (0, 1, 15, 16, 17, 32, 64, 511, 512, 513, 1024, 4096, 2**32 - 1)
PLACES = (0, 512, 1024, 2048, 2064, 4096, 4112, 6144, 6145, 8191, 8192, 8704, 16383, 16384, 2**31, 2**64 - GUEST_ADDRESS - 8)
TYPES = (0, 1, 4, 8, 11, 13, 99)
STEPS_MAX = 60
FATES = (0, 0, 0, -5, -28, -108)  # how a part ends


class Table:
    """The memory, mapped once: each input begins with zeros."""

    def __init__(self) -> None:
        self.memory = Memory(2, REGION_BYTES)
        self.mapped = GuestMemory()
        for guest, user, size, offset in self.memory.regions:
            self.mapped.add(self.memory.fd, guest, user, size, offset)
        self.inflight_fd = os.memfd_create("in-flight")
        os.ftruncate(self.inflight_fd, inflight_bytes(8))
        self.inflight = Shared(self.inflight_fd, inflight_bytes(8))
        self.disk = bytearray(512 * SECTORS)

    def clear(self) -> None:
        self.memory.write(GUEST_ADDRESS, bytes(2 * REGION_BYTES))
        os.pwrite(self.inflight_fd, bytes(inflight_bytes(8)), 0)


@cache
def table() -> Table:
    return Table()


def target_ring(data: bytes) -> None:
    take, shared = Take(data), table()
    shared.clear()
    memory, size = shared.memory, take.choice((1, 2, 4, 8))
    options = take.byte()
    index = take.choice((0, 65534))
    memory.write(GUEST_ADDRESS + AVAILABLE + 2, struct.pack("<H", index))
    memory.write(GUEST_ADDRESS + USED + 2, struct.pack("<H", index))
    for place, kind in enumerate(TYPES):
        memory.write(GUEST_ADDRESS + HEADS + 16 * place, struct.pack("<IIQ", kind, 0, place % 3))
    driver = RingDriver(BlkRing(size, sectors=SECTORS, is_read_only=bool(options & 1), serial=b"hostile"), shared.disk)
    if options & 2:
        os.pwrite(shared.inflight_fd, take.take(take.byte() % 64), 0)
    if options & 32:
        shared.mapped.log_to(shared.memory.fd, DATA, 64)
    try:
        driver.ring.begin(
            shared.mapped, USER_ADDRESS, USER_ADDRESS + AVAILABLE, USER_ADDRESS + USED, next_available=index,
            used_guest_address=GUEST_ADDRESS + USED if options & 4 else None, has_event_index=bool(options & 8),
            has_indirect=bool(options & 16), is_durable=False, inflight=shared.inflight if options & 2 else None,
        )  # fmt: skip
        act(take, memory, driver, size)
    except FvdError:
        pass
    driver.end_all()
    shared.mapped.log_nothing()
    assert driver.ring.busy == 0 and not driver.torn


def act(take: Take, memory: Memory, driver: RingDriver, size: int) -> None:
    available = GUEST_ADDRESS + AVAILABLE
    steps = 0
    while take and steps < STEPS_MAX:
        steps += 1
        what = take.byte() % 8
        if what <= 1:
            entry = GUEST_ADDRESS + (TABLE if what else 0) + 16 * (take.byte() % 16)
            address = GUEST_ADDRESS + take.choice(PLACES) + take.byte() % 8 * 16
            memory.write(entry, struct.pack("<QIHH", address % 2**64, take.choice(LENGTHS), take.byte() % 8, take.byte() % 17))
        elif what == 2:
            content = take.take(1 + take.byte() % 32)
            memory.write(GUEST_ADDRESS + take.number(2) % (2 * REGION_BYTES - 32), content)
        elif what == 3:
            (now,) = struct.unpack("<H", memory.read(available + 2, 2))
            memory.write(available + 4 + 2 * (now % size), struct.pack("<H", take.byte() % (size + 1)))
            memory.write(available + 2, struct.pack("<H", (now + 1) % 2**16))
        elif what == 4:
            driver.take(take.byte() % 4, 1 << 20)
        elif what == 5 and driver.waiting:
            driver.end(take.byte() % len(driver.waiting), take.choice(FATES))
        elif what == 6:
            driver.publish()
            driver.ask_for_kick()
        elif what == 7 and take.byte() % 8 == 0:
            driver.stop(silently=bool(take.byte() & 1))


# --- Messages -----------------------------------------------------------------------------------------------------------------


class HostileLoop:
    """The serving loop as a front end sees it. Rings come to rest at once or later, as the input says."""

    def __init__(self, take: Take, disk: bytearray) -> None:
        self.take, self.disk = take, disk
        self.drivers: dict[int, RingDriver] = {}
        self.draining: set[int] = set()

    def add_ring(self, ring: BlkRing, export: int, kick_fd: int, call_fd: int) -> int:
        number = len(self.drivers)
        self.drivers[number] = RingDriver(ring, self.disk)
        self.drivers[number].take()
        os.eventfd_write(kick_fd, 1)
        return number

    def set_call(self, number: int, call_fd: int) -> None:
        assert number in self.drivers and (call_fd == -1 or os.fstat(call_fd))

    def drain_ring(self, number: int, *, silently: bool) -> None:
        self.drivers[number].stop(silently=silently)
        self.draining.add(number)

    def has_rested(self, number: int) -> bool:
        return number in self.draining and self.drivers[number].ring.busy == 0

    def unwatch(self, fd: int) -> None:
        os.fstat(fd)

    def remove_ring(self, number: int) -> None:
        assert self.has_rested(number)

    def turn(self, front_end: FrontEnd) -> None:
        """What is under way ends, and who waits for that goes on."""
        for number in front_end.ring_numbers:
            self.drivers[number].end_all()
            self.drivers[number].publish()
            front_end.on_ring(number)


@cache
def descriptors() -> tuple[int, ...]:
    """What a hostile front end has to hand over."""
    short = os.memfd_create("short")
    os.ftruncate(short, 100)
    return table().memory.fd, os.eventfd(0, os.EFD_NONBLOCK), table().inflight_fd, short, os.open("/dev/null", os.O_RDWR)


def payload(take: Take, ask: int) -> bytes:
    """One that fits the message, mostly."""
    rows = table().memory.regions
    if ask in (Ask.SET_VRING_NUM, Ask.SET_VRING_BASE, Ask.GET_VRING_BASE, Ask.SET_VRING_ENABLE):
        return struct.pack("<II", take.byte() % 3, take.choice((1, 0, 2, 8, 3, 1024, 2048, 2**32 - 1)))
    if ask in (Ask.SET_VRING_KICK, Ask.SET_VRING_CALL, Ask.SET_VRING_ERR):
        return struct.pack("<Q", take.choice((0, 1, 2, 256)))
    if ask == Ask.SET_VRING_ADDR:
        moved = take.choice((0, 8, 4, 2**40, 2**64 - USER_ADDRESS))
        return struct.pack(
            "<IIQQQQ", take.byte() % 3, take.byte() % 2, *((USER_ADDRESS + at + moved) % 2**64 for at in (0, USED, AVAILABLE)), 0
        )
    if ask in (Ask.SET_FEATURES, Ask.SET_PROTOCOL_FEATURES, Ask.SET_STATUS):
        return struct.pack("<Q", take.choice((0x170007644, 0x1B22B, 0, 15, 1 << 63, 0x130007644, 0x174007644)))
    if ask in (Ask.GET_INFLIGHT_FD, Ask.SET_INFLIGHT_FD):
        sizes = take.choice((256, 0, 2**63, 2**64 - 1)), take.choice((0, 64, 4, 2**63, 2**64 - 8))
        return struct.pack("<QQHH", *sizes, take.choice((1, 2, 0, 65535)), take.choice((2, 8, 0, 1024, 65535)))
    if ask == Ask.SET_LOG_BASE:
        return struct.pack("<QQ", take.choice((64, 0, 2**63)), take.choice((0, 64, 2**64 - 1)))
    if ask == Ask.SET_MEM_TABLE:
        return struct.pack("<II", 2, 0) + b"".join(struct.pack("<QQQQ", guest, size, user, at) for guest, user, size, at in rows)
    if ask in (Ask.ADD_MEM_REG, Ask.REM_MEM_REG):
        guest, user, size, at = take.choice(rows)
        return struct.pack("<QQQQQ", 0, guest, size, user, at)
    if ask in (Ask.GET_CONFIG, Ask.SET_CONFIG):
        return struct.pack("<III", take.choice((0, 60, 255, 2**32 - 1)), take.choice((60, 256, 2**32 - 1)), 0)
    return b""


def target_front_end(data: bytes) -> None:
    take, shared = Take(data), table()
    shared.clear()
    for head in range(2):  # a flush in each ring that begins
        shared.memory.write(GUEST_ADDRESS + 32 * head, struct.pack("<QIHH", GUEST_ADDRESS + HEADS + 32, 16, 1, 2 * head + 1))
        shared.memory.write(GUEST_ADDRESS + 32 * head + 16, struct.pack("<QIHH", GUEST_ADDRESS + DATA, 1, 2, 0))
    shared.memory.write(GUEST_ADDRESS + HEADS + 32, struct.pack("<IIQ", 4, 0, 0))
    shared.memory.write(GUEST_ADDRESS + AVAILABLE, struct.pack("<HHH", 0, take.byte() % 2, 0))
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    loop = HostileLoop(take, shared.disk)
    front_end = FrontEnd(ours, GuestDisk(512 * SECTORS, False, 4096, b"hostile", 2), 0, loop)
    asks: list[int] = [*Ask, 0, 200]
    try:
        for _ in range(STEPS_MAX):
            if not take or front_end.is_ending:
                break
            say(take, theirs, take.choice(asks))
            front_end.on_readable()
            if take.byte() % 4:
                loop.turn(front_end)
            with contextlib.suppress(BlockingIOError, ConnectionError):
                theirs.recv(65536)
    finally:
        front_end.end("")
        loop.turn(front_end)
        theirs.close()
    assert front_end.is_gone and not any(driver.ring.busy for driver in loop.drivers.values())


def say(take: Take, theirs: Any, ask: int) -> None:
    how = take.byte()
    content = take.take(take.byte() % 64) if how & 15 == 15 else payload(take, ask)
    message = struct.pack("<III", ask, 9 if how & 16 else 1, len(content)) + content
    fds = [take.choice(descriptors()) for _ in range(how >> 5 if how & 15 == 14 else fitting(ask, content))]
    if how & 15 == 13:
        message = message[: take.byte() % len(message)]
    with contextlib.suppress(BlockingIOError, BrokenPipeError):
        if message:
            socket.send_fds(theirs, [message], fds)


def fitting(ask: int, content: bytes) -> int:
    """How many descriptors such a message has."""
    if ask == Ask.SET_MEM_TABLE:
        return 2
    if ask in (Ask.SET_VRING_KICK, Ask.SET_VRING_CALL, Ask.SET_VRING_ERR):
        return int(content[1:2] != b"\1")
    return int(ask in (Ask.SET_LOG_BASE, Ask.SET_LOG_FD, Ask.SET_BACKEND_REQ_FD, Ask.SET_INFLIGHT_FD, Ask.ADD_MEM_REG))
