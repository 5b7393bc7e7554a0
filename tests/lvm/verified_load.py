# SPDX-License-Identifier: Apache-2.0
"""A random load of which it is known, sector by sector, what may be there after a crash. Shares no code with fvd.

Each 512-byte sector that is written holds its own number and the number of the operation that wrote it, 32 times over: a torn, misplaced
or foreign sector shows. Operations come in batches: those of one batch touch different sectors and run at once, in threads. After each
batch it is known which operations are durable: those before an acknowledged flush, and each acknowledged FUA write. The same seed gives
the same load.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import numpy as np
import numpy.typing as npt

SECTOR = 512
WORDS = SECTOR // 8
UNREADABLE = np.uint64(0xFFFF_FFFF_FFFF_FFFF)  # no sector of ours, and not zeros
IN_FLIGHT = 8
# Small, so that a load overwrites, frees and takes again, and its journal goes round.
KIB, MIB = 1 << 10, 1 << 20
STORAGE_BYTES = 24 * MIB
VIRTUAL_BYTES = 16 * MIB
BLOCK_BYTES = 16 * KIB

Values = npt.NDArray[np.uint64]


class Disk(Protocol):
    """What the load writes to: fvd.Disk, or a client that looks like it."""

    def pread(self, offset: int, length: int) -> bytes: ...
    def pwrite(self, offset: int, data: bytes, *, durable: bool = False) -> int: ...
    def trim(self, offset: int, length: int) -> None: ...
    def flush(self) -> None: ...


class Kind(Enum):
    WRITE = "write"
    FUA = "write with FUA"
    TRIM = "trim"


@dataclass(frozen=True)
class Operation:
    number: int  # from 1 on, in the order of the load
    kind: Kind
    first: int  # sector
    count: int  # sectors

    @property
    def shows(self) -> int:
        """What its sectors read as afterwards."""
        return 0 if self.kind is Kind.TRIM else self.number

    def data(self) -> bytes:
        words = np.empty((self.count, WORDS // 2, 2), dtype="<u8")
        words[:, :, 0] = np.arange(self.first, self.first + self.count, dtype="<u8")[:, None]
        words[:, :, 1] = self.number
        return words.tobytes()


@dataclass(frozen=True)
class Batch:
    operations: list[Operation]
    flush: bool  # after them


def batches(seed: int, size_bytes: int, block_bytes: int, first_number: int = 1) -> Iterator[Batch]:
    """An endless load. Trims are whole blocks: less keeps its data."""
    chance = random.Random(seed)
    block_sectors = block_bytes // SECTOR
    blocks = size_bytes // block_bytes
    number = first_number
    while True:
        # One operation in each of some stretches of blocks, so that they do not meet.
        stretch = max(4, blocks // 64)
        operations = []
        for start in chance.sample(range(0, blocks - stretch + 1, stretch), min(IN_FLIGHT, blocks // stretch)):
            kind = chance.choices([Kind.WRITE, Kind.FUA, Kind.TRIM], [12, 3, 1])[0]
            if kind is Kind.TRIM:
                first, count = start * block_sectors, chance.randint(1, 3) * block_sectors
            else:
                count = chance.choice([1, 2, 8, 8, 16, block_sectors, 2 * block_sectors, chance.randint(1, 3 * block_sectors)])
                first = start * block_sectors + chance.randrange(stretch * block_sectors - count + 1)
            operations.append(Operation(number, kind, first, count))
            number += 1
        yield Batch(operations, chance.random() < 0.5)


@dataclass
class Expected:
    """What may be read after a crash: for each sector what is durable, or what a later operation wrote."""

    durable: Values  # what each sector shows
    since: Values  # the operation that made it so
    later: list[Operation] = field(default_factory=list)  # issued, promised to nobody yet
    failed: list[Operation] = field(default_factory=list)  # answered with an error: each of their sectors stays old or new

    @classmethod
    def of_empty(cls, size_bytes: int) -> Expected:
        return cls.of(np.zeros(size_bytes // SECTOR, dtype=np.uint64))

    @classmethod
    def of(cls, values: Values) -> Expected:
        """Of a disk that was read like this after a crash: it is all durable."""
        return cls(values.copy(), np.zeros(len(values), dtype=np.uint64))

    def copy(self) -> Expected:
        return Expected(self.durable.copy(), self.since.copy(), list(self.later), list(self.failed))

    def issue(self, batch: Batch) -> None:
        self.later += batch.operations

    def acknowledge(self, batch: Batch) -> None:
        """All of it was answered, the flush too."""
        if batch.flush:
            self.flushed()
        else:
            self._promise(operation for operation in batch.operations if operation.kind is Kind.FUA)

    def flushed(self) -> None:
        """Everything so far is durable."""
        self._promise(self.later)
        self.later.clear()

    def _promise(self, operations: Iterable[Operation]) -> None:
        for operation in operations:
            part = slice(operation.first, operation.first + operation.count)
            newer = self.since[part] < operation.number
            self.durable[part][newer] = operation.shows
            self.since[part][newer] = operation.number

    def verify(self, seen: Values, where: str) -> None:
        """Raises AssertionError when a sector shows neither what is durable nor anything later."""
        allowed = seen == self.durable
        for operation in self.later + self.failed:
            part = slice(operation.first, operation.first + operation.count)
            allowed[part] |= (seen[part] == operation.shows) & (self.since[part] < operation.number)
        wrong = np.flatnonzero(~allowed)
        if len(wrong):
            lines = [f"sector {sector}: {_told(seen[sector])}, durable is {_told(self.durable[sector])}" for sector in wrong[:5]]
            raise AssertionError(f"{where}: {len(wrong)} sectors are wrong:\n  " + "\n  ".join(lines))


@dataclass
class Moments:
    """What may be on the disk at and after numbered marks of a load."""

    promised: dict[int, Expected]  # at the mark
    under_way: dict[int, Expected]  # after it: the same, and any of the next batch


def _told(value: np.uint64) -> str:
    return "neither zeros nor whole" if value == UNREADABLE else f"operation {value}" if value else "zeros"


def carry_out(batch: Batch, disk: Disk, threads: ThreadPoolExecutor) -> None:
    """Returns when all of it has been acknowledged."""

    def one(operation: Operation) -> None:
        offset = operation.first * SECTOR
        if operation.kind is Kind.TRIM:
            disk.trim(offset, operation.count * SECTOR)
        else:
            disk.pwrite(offset, operation.data(), durable=operation.kind is Kind.FUA)

    for _ in threads.map(one, batch.operations):
        pass
    if batch.flush:
        disk.flush()


def values(data: bytes, first: int = 0) -> Values:
    """What each sector of `data` shows: the number of an operation, 0 for zeros, UNREADABLE for anything else."""
    words = np.frombuffer(data, dtype="<u8").reshape(-1, WORDS // 2, 2)
    numbers: Values = words[:, 0, 1].copy()
    uniform = (words == words[:, :1, :]).all(axis=(1, 2))
    at_home = words[:, 0, 0] == np.arange(first, first + len(words), dtype="<u8")
    zeros = uniform & (words[:, 0, 0] == 0) & (numbers == 0)
    numbers[~(uniform & at_home & (numbers != 0) | zeros)] = UNREADABLE
    return numbers
