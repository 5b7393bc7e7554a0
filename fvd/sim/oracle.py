"""What the durability contract allows each sector of the guest's disk to hold, computed by none of the engine's code.

Every write stamps every sector with its own number, and the base holds another value in every sector, so a wrong offset, a lost write and a
resurrected one are all seen. It may not know the engine, the format or the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SECTOR_BYTES = 512
ZERO = 0
_BASE_STAMP = 0xBA5E << 44
NEVER = 1 << 62


@dataclass(slots=True)
class Write:
    """One value that a sector was given. Times are the oracle's own counter."""

    value: int
    began: int
    ended: int = NEVER  # acknowledged, or failed
    succeeded: bool = False
    durable: bool = False
    advisory: bool = False  # a trim that may be ignored: allowed, but supersedes nothing
    outdated: int = NEVER  # since when a read has shown, for good, that something else came after it


def stamped(number: int, first_sector: int, sectors: int) -> bytes:
    """The content of a guest write: every sector filled with its number and place."""
    values = np.uint64(number << 24) + np.arange(first_sector, first_sector + sectors, dtype=np.uint64) + np.uint64(1)
    return np.repeat(values, SECTOR_BYTES // 8).tobytes()


def base_image(size_bytes: int) -> bytes:
    """A base that is different in every sector (and cut off anywhere)."""
    sectors = -(-size_bytes // SECTOR_BYTES)
    values = np.uint64(_BASE_STAMP) + np.arange(sectors, dtype=np.uint64) + np.uint64(1)
    return np.repeat(values, SECTOR_BYTES // 8).tobytes()[:size_bytes]


def sector_values(data: bytes) -> list[int]:
    """The value of each sector; -1 where a sector is not uniform (torn, or mixed from two writes)."""
    words = np.frombuffer(data, np.uint64).reshape(-1, SECTOR_BYTES // 8)
    uniform = (words == words[:, :1]).all(axis=1)
    return [int(v) if ok else -1 for v, ok in zip(words[:, 0].tolist(), uniform.tolist(), strict=True)]


class Violation(AssertionError):
    """The disk showed something that the contract does not allow."""


class Oracle:
    def __init__(self, virtual_size_bytes: int, base: bytes | None) -> None:
        self.sectors = virtual_size_bytes // SECTOR_BYTES
        self.clock = 0
        self.numbers = 0
        initial = [ZERO] * self.sectors
        if base is not None:
            reach = min(len(base), virtual_size_bytes)
            padded = base[:reach] + bytes(-reach % SECTOR_BYTES)
            values = sector_values(padded)
            for sector, value in enumerate(values):
                # A base that ends inside a sector: its last sector is compared byte by byte as a value of its own.
                initial[sector] = value if value >= 0 else self._odd_value(padded[sector * SECTOR_BYTES : (sector + 1) * SECTOR_BYTES])
        self.history: list[list[Write]] = [[Write(value, 0, 0, True, True)] for value in initial]

    @staticmethod
    def _odd_value(sector: bytes) -> int:
        return -2 - int.from_bytes(sector[:8], "little")

    def _observe(self, data: bytes) -> list[int]:
        values = sector_values(data)
        return [
            v if v >= 0 else (self._odd_value(data[i * SECTOR_BYTES : (i + 1) * SECTOR_BYTES]) if data[(i + 1) * SECTOR_BYTES - 8 :][:8] == bytes(8) else -1)
            for i, v in enumerate(values)
        ]

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    # --- what the guest does --------------------------------------------------------------------------------------

    def begin_write(self, first_sector: int, sectors: int, *, zero: bool = False, advisory: bool = False) -> tuple[int, list[Write]]:
        """A write (or zeroing) of whole sectors is submitted. Returns its number and its records."""
        self.numbers += 1
        began = self.tick()
        records = []
        for sector in range(first_sector, first_sector + sectors):
            value = ZERO if zero else (self.numbers << 24) + sector + 1
            record = Write(value, began, advisory=advisory)
            self.history[sector].append(record)
            records.append(record)
        return self.numbers, records

    def end_write(self, records: list[Write], succeeded: bool, durable: bool) -> None:
        now = self.tick()
        for record in records:
            record.ended = now
            record.succeeded = succeeded
            record.durable = durable and succeeded

    def begin_flush(self) -> int:
        return self.tick()

    def end_flush(self, began: int, succeeded: bool) -> None:
        if not succeeded:
            return
        for records in self.history:
            if len(records) > 1:
                for record in records:
                    if record.succeeded and record.ended < began:
                        record.durable = True

    # --- what it may see ------------------------------------------------------------------------------------------

    def check_read(self, first_sector: int, began: int, data: bytes) -> None:
        """A read that began at `began` and ends now returned this."""
        now = self.tick()
        for sector, value in enumerate(self._observe(data), first_sector):
            records = self.history[sector]
            floor = max((w.began for w in records if w.succeeded and w.ended < began and not w.advisory), default=0)
            shown = [w for w in records if w.value == value and w.ended >= floor and w.outdated >= began]
            if not shown:
                raise Violation(f"sector {sector}: a read showed {value:#x}; allowed: {self._describe(records, floor)}")
            if len(shown) == 1 and len(records) > 1:
                # What had ended before this read and was not shown came before what was: no later read may show it again.
                for w in records:
                    if w is not shown[0] and w.ended < began and w.outdated == NEVER:
                        w.outdated = now

    def settle_after_crash(self, data: bytes) -> None:
        """The whole disk after a crash and reopen: each sector must hold an allowed value, and holds that one from now on."""
        for sector, value in enumerate(self._observe(data)):
            records = self.history[sector]
            floor = max((w.began for w in records if w.durable and not w.advisory), default=0)
            if not any(w.value == value and not w.ended < floor for w in records):
                raise Violation(f"sector {sector}: after the crash {value:#x}; allowed: {self._describe(records, floor)}")
            self.history[sector] = [Write(value, 0, 0, True, True)]
        self.clock += 1

    def _describe(self, records: list[Write], floor: int) -> str:
        return ", ".join(f"{w.value:#x}[{w.began}-{w.ended}{' durable' if w.durable else ''}]" for w in records if not w.ended < floor)
