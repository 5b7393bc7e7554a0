# SPDX-License-Identifier: Apache-2.0
"""A guest's driver of a virtio block device in Python: its memory (a memfd in regions), a split ring in it, and chains of any shape.

It knows the ring as virtio 1.2 (2.7) lays it out, and nothing of who serves it.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Sequence

GUEST_ADDRESS = 1 << 32
USER_ADDRESS = 1 << 44
REGION_BYTES = 256 << 10
NEXT, WRITABLE, INDIRECT = 1, 2, 4
IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
SECTOR_BYTES = 512

Buffer = tuple[int, int]  # address, length


class Memory:
    """Regions that lie side by side for the guest, and apart for everybody else. Addresses here are the guest's."""

    def __init__(self, regions: int = 4, region_bytes: int = REGION_BYTES) -> None:
        self.region_bytes = region_bytes
        self.size_bytes = regions * region_bytes
        self.fd = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, self.size_bytes)
        self._map = mmap.mmap(self.fd, self.size_bytes)
        self._carved = 0

    @property
    def regions(self) -> list[tuple[int, int, int, int]]:
        """(guest's address, the front end's, size, offset in the file): in the file they lie in the other order."""
        count = self.size_bytes // self.region_bytes
        return [
            (
                GUEST_ADDRESS + place * self.region_bytes,
                USER_ADDRESS + place * self.region_bytes,
                self.region_bytes,
                (count - 1 - place) * self.region_bytes,
            )
            for place in range(count)
        ]

    def _runs(self, address: int, length: int) -> list[tuple[int, int]]:
        """(offset in the file, length) of each piece."""
        runs, inside = [], address - GUEST_ADDRESS
        assert inside >= 0 and inside + length <= self.size_bytes
        while length:
            place, within = divmod(inside, self.region_bytes)
            part = min(length, self.region_bytes - within)
            runs.append((self.size_bytes - (place + 1) * self.region_bytes + within, part))
            inside, length = inside + part, length - part
        return runs

    def read(self, address: int, length: int) -> bytes:
        return b"".join(self._map[at : at + part] for at, part in self._runs(address, length))

    def write(self, address: int, data: bytes) -> None:
        for at, part in self._runs(address, len(data)):
            self._map[at : at + part] = data[:part]
            data = data[part:]

    def carve(self, length: int, alignment: int = 1) -> int:
        """The address of bytes that nobody has yet."""
        begin = (self._carved + alignment - 1) // alignment * alignment
        self._carved = begin + length
        assert self._carved <= self.size_bytes, "the guest's memory is full"
        return GUEST_ADDRESS + begin

    @property
    def carved(self) -> int:
        return self._carved

    def carve_again_from(self, carved: int) -> None:
        self._carved = carved

    def close(self) -> None:
        """Again is fine."""
        if self.fd >= 0:
            self._map.close()
            os.close(self.fd)
            self.fd = -1


class Ring:
    """The driver's side of one ring of `size` entries; both its indexes begin at `index`."""

    def __init__(self, memory: Memory, size: int, index: int = 0) -> None:
        self.memory, self.size = memory, size
        self.descriptors = memory.carve(16 * size, 16)
        self.available = memory.carve(6 + 2 * size, 2)
        self.used = memory.carve(6 + 8 * size, 4)
        self.available_index = self.taken = index
        self.free = list(range(size))
        self._of_head: dict[int, list[int]] = {}
        memory.write(self.available, struct.pack("<HH", 0, index))
        memory.write(self.used, struct.pack("<HH", 0, index))

    # --- Entries ------------------------------------------------------------------------------------------------

    def put_entry(self, table: int, place: int, address: int, length: int, flags: int, following: int = 0) -> None:
        self.memory.write(table + 16 * place, struct.pack("<QIHH", address, length, flags, following))

    def chain(self, out: Sequence[Buffer], into: Sequence[Buffer], *, indirect: bool = False) -> int:
        """A chain of these buffers to read and to fill. Returns its head, which is not available yet."""
        buffers = [(*buffer, 0) for buffer in out] + [(*buffer, WRITABLE) for buffer in into]
        if indirect:
            table = self.memory.carve(16 * len(buffers), 16)
            places = list(range(len(buffers)))
            head = self.free.pop(0)
            self._of_head[head] = [head]
            self.put_entry(self.descriptors, head, table, 16 * len(buffers), INDIRECT)
        else:
            table = self.descriptors
            places = [self.free.pop(0) for _ in buffers]
            head = places[0]
            self._of_head[head] = places
        for number, (address, length, flags) in enumerate(buffers):
            last = number + 1 == len(buffers)
            self.put_entry(table, places[number], address, length, flags | (0 if last else NEXT), 0 if last else places[number + 1])
        return head

    # --- Indexes ------------------------------------------------------------------------------------------------

    def make_available(self, head: int) -> None:
        self.memory.write(self.available + 4 + 2 * (self.available_index % self.size), struct.pack("<H", head))
        self.jump(1)

    def jump(self, count: int) -> None:
        self.available_index = (self.available_index + count) % 2**16
        self.memory.write(self.available + 2, struct.pack("<H", self.available_index))

    def want_calls(self, wanted: bool) -> None:
        self.memory.write(self.available, struct.pack("<H", 0 if wanted else 1))

    def want_call_after(self, index: int) -> None:
        """EVENT_IDX: when the entry with this index has been used."""
        self.memory.write(self.available + 4 + 2 * self.size, struct.pack("<H", index % 2**16))

    @property
    def kick_wanted_at(self) -> int:
        """EVENT_IDX: the index whose entry the device wants to be kicked for."""
        return self._word(self.used + 4 + 8 * self.size)

    @property
    def used_index(self) -> int:
        return self._word(self.used + 2)

    def _word(self, address: int) -> int:
        (word,) = struct.unpack("<H", self.memory.read(address, 2))
        return int(word)

    def take_used(self) -> list[tuple[int, int]]:
        """(head, bytes written) of what has been answered since the last time; its entries are free again."""
        answered = []
        while self.taken != self.used_index:
            head, written = struct.unpack("<II", self.memory.read(self.used + 4 + 8 * (self.taken % self.size), 8))
            self.free += self._of_head.pop(head)
            self.taken = (self.taken + 1) % 2**16
            answered.append((head, written))
        return answered


def header(kind: int, sector: int = 0) -> bytes:
    return struct.pack("<IIQ", kind, 0, sector)


def ranges(*pieces: tuple[int, int, int]) -> bytes:
    """(sector, sectors, flags) of a discard or write-zeroes."""
    return b"".join(struct.pack("<QII", *piece) for piece in pieces)


def user_address(guest_address: int) -> int:
    return guest_address - GUEST_ADDRESS + USER_ADDRESS
