# SPDX-License-Identifier: Apache-2.0
"""Reads the log of device-mapper's log-writes target: a device's writes, flushes and discards, in an order in which they became durable.

The log (Linux, Documentation/admin-guide/device-mapper/log-writes.rst) is a sector with a head, then for each entry a sector with its
description, followed by the data of a write. All numbers are little endian, and count logical blocks of the logged device. A write stands
behind those that completed before it and before the flush that made it durable; writes that no flush followed stand at the end.
"""

from __future__ import annotations

import enum
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_MAGIC = 0x6A736677736872
_VERSION = 1
_HEAD = struct.Struct("<QQQI")  # magic, version, entries, bytes of a sector
_ENTRY = struct.Struct("<QQQQ")  # sector, sectors, flags, bytes of inline data (of a mark: its text)


class Flag(enum.IntFlag):
    FLUSH = 1
    FUA = 2
    DISCARD = 4
    MARK = 8
    METADATA = 16


@dataclass(frozen=True)
class Entry:
    flags: Flag
    offset_bytes: int
    length_bytes: int
    data: bytes  # of a write
    mark: str  # of a mark

    def replay(self, onto: int) -> None:
        """The same on another file, given by its descriptor."""
        if self.flags & Flag.DISCARD:
            os.pwrite(onto, bytes(self.length_bytes), self.offset_bytes)
        elif self.data:
            os.pwrite(onto, self.data, self.offset_bytes)


def entries(log: Path | str) -> Iterator[Entry]:
    """All that a finished log holds. Raises ValueError when it is none."""
    with Path(log).open("rb") as file:
        magic, version, count, sector_bytes = _HEAD.unpack(file.read(_HEAD.size))
        if (magic, version) != (_MAGIC, _VERSION):
            raise ValueError(f"{log} is no log of dm-log-writes: magic {magic:x}, version {version}")
        file.seek(sector_bytes)
        for _ in range(count):
            head = file.read(sector_bytes)
            sector, sectors, flags, text_bytes = _ENTRY.unpack_from(head)
            kind = Flag(flags)
            mark = head[_ENTRY.size : _ENTRY.size + text_bytes].decode() if kind & Flag.MARK else ""
            data = b"" if kind & (Flag.DISCARD | Flag.MARK) else file.read(sectors * sector_bytes)
            yield Entry(kind, sector * sector_bytes, sectors * sector_bytes, data, mark)
