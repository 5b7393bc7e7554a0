# SPDX-License-Identifier: Apache-2.0
"""Where the bytes of a logical volume lie, by the kernel's table in use, and whether they still lie there. Asks, and changes nothing.

A table is swapped whole: who looks sees the one before or the one after. What lvm does to a volume without changing what its bytes are is
known here (growth, a move to other physical volumes, a snapshot); anything else that changes the table changes what is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from fvd.lvm import dm

_SECTOR_BYTES = 512
_DEEPEST = 4  # an origin over its real volume over a move


@dataclass(frozen=True)
class Stretch:
    """Sectors that lie in one piece: [start, end)."""

    start: int
    end: int
    kind: str
    where: str  # of "linear": the device; else all that the table says
    offset: int  # there, of `start`; of others 0

    def at(self, sector: int) -> tuple[str, str, int]:
        """Where a sector of it lies; of other kinds than linear: by which rule."""
        return self.kind, self.where, self.offset + sector - self.start if self.kind == "linear" else self.start

    @property
    def is_moving(self) -> bool:
        return self.kind == "linear" and dm.is_being_moved(_number(self.where))


class Placement:
    """Where the beginning of a device lies. Not safe from threads."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._known: list[Stretch] = []
        self._known_sectors = 0

    def follow(self, size_bytes: int) -> str | None:
        """Looks, and remembers where the first `size_bytes` lie (or what was remembered, if that is more). Returns what is not as it was
        remembered: then nothing new is. A device that is none of device-mapper's lies where it lies."""
        sectors = max(size_bytes // _SECTOR_BYTES, self._known_sectors)
        table = dm.table(self._number)
        if table is None:
            return None
        pieces = list(stretches(table, sectors))
        end = pieces[-1].end if pieces else 0
        if end < self._known_sectors:
            return f"it ends at {end * _SECTOR_BYTES} bytes, and had {self._known_sectors * _SECTOR_BYTES}"
        for start, stop, before, now in _beside(self._known, pieces):
            if before.at(start) != now.at(start) and not before.is_moving and not now.is_moving:
                return f"bytes {start * _SECTOR_BYTES} to {stop * _SECTOR_BYTES} of it lie elsewhere than they did"
        self._known, self._known_sectors = pieces, min(sectors, end)
        return None


def stretches(table: tuple[dm.Target, ...], sectors: int, depth: int = 0) -> Iterator[Stretch]:
    """The first sectors of a table; the volume that an origin of snapshots hides is looked into."""
    for target in table:
        end = min(target.start + target.length, sectors)
        if target.start >= end:
            return
        below = dm.table(_number(target.arguments)) if target.kind == "snapshot-origin" and depth < _DEEPEST else None
        if below is not None:
            yield from stretches(below, end, depth + 1)
        elif target.kind == "linear":
            device, _, offset = target.arguments.partition(" ")
            yield Stretch(target.start, end, "linear", device, int(offset))
        else:
            yield Stretch(target.start, end, target.kind, target.arguments, 0)


def _beside(before: list[Stretch], now: list[Stretch]) -> Iterator[tuple[int, int, Stretch, Stretch]]:
    """[start, end) in which each of the two has one stretch, as far as both reach."""
    i = j = at = 0
    while i < len(before) and j < len(now):
        end = min(before[i].end, now[j].end)
        if end > at:
            yield at, end, before[i], now[j]
        at = end
        i += before[i].end == at
        j += now[j].end == at


def _number(device: str) -> int:
    """Of "253:7"; 0, which no device has: it is written otherwise."""
    major, _, minor = device.strip().partition(":")
    return os.makedev(int(major), int(minor)) if major.isdigit() and minor.isdigit() else 0
