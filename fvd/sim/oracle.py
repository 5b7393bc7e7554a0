"""What the durability contract allows each sector of the guest's disk to hold, computed by none of the engine's code.

Every write stamps every sector with its own number, and the base holds another value in every sector, so a wrong offset, a lost write and a
resurrected one are all seen. It may not know the engine, the format or the device.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

SECTOR_BYTES = 512
ZERO = 0
_BASE_STAMP = 0xBA5E << 44
NEVER = 1 << 62
_TORN, _ODD = -1, -2

Values = npt.NDArray[np.int64]


@dataclass(slots=True, eq=False)
class Write:
    """What one request gives each of its sectors. Times are the oracle's own counter."""

    value: int
    began: int
    stamped: bool = False  # a sector's value is `value` plus its number
    ended: int = NEVER  # acknowledged, or failed
    succeeded: bool = False
    durable: bool = False
    advisory: bool = False  # a trim that may be ignored: allowed, but supersedes nothing
    outdated: dict[int, int] = field(default_factory=dict)  # sector: since when a read has shown, for good, that something came after

    def shows(self, sector: int, value: int) -> bool:
        return value == (self.value + sector if self.stamped else self.value)


def stamped(number: int, first_sector: int, sectors: int) -> bytes:
    """The content of a guest write: every sector filled with its number and place."""
    values = np.uint64(number << 24) + np.arange(first_sector, first_sector + sectors, dtype=np.uint64) + np.uint64(1)
    return np.repeat(values, SECTOR_BYTES // 8).tobytes()


def base_image(size_bytes: int) -> bytes:
    """A base that is different in every sector (and cut off anywhere)."""
    sectors = -(-size_bytes // SECTOR_BYTES)
    values = np.uint64(_BASE_STAMP) + np.arange(sectors, dtype=np.uint64) + np.uint64(1)
    return np.repeat(values, SECTOR_BYTES // 8).tobytes()[:size_bytes]


class Violation(AssertionError):
    """The disk showed something that the contract does not allow."""


class Oracle:
    def __init__(self, virtual_size_bytes: int, base: bytes | None) -> None:
        self.sectors = virtual_size_bytes // SECTOR_BYTES
        self.clock = 0
        self.numbers = 0
        reach = (base or b"")[:virtual_size_bytes]
        whole = len(reach) // SECTOR_BYTES * SECTOR_BYTES
        # A base that ends inside a sector: that sector has a value of its own.
        self._odd = reach[whole:] + bytes(-len(reach) % SECTOR_BYTES)
        self._settled: Values = self._values(reach + bytes(virtual_size_bytes - len(reach)))
        self._history: dict[int, list[Write]] = {}  # of the sectors written since everything was last settled
        self._volatile: list[Write] = []

    def _values(self, data: bytes) -> Values:
        """The value of each sector; _TORN where a sector is not uniform (torn, or mixed from two writes)."""
        words = np.frombuffer(data, np.int64).reshape(-1, SECTOR_BYTES // 8)
        values = words[:, 0].copy()
        for sector in np.flatnonzero((words != words[:, :1]).any(axis=1)).tolist():
            values[sector] = _ODD if self._odd == data[sector * SECTOR_BYTES : (sector + 1) * SECTOR_BYTES] else _TORN
        return values

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    # --- what the guest does --------------------------------------------------------------------------------------

    def begin_write(self, first_sector: int, sectors: int, *, zero: bool = False, advisory: bool = False) -> tuple[int, Write]:
        """A write (or zeroing) of whole sectors is submitted. Returns its number and its record."""
        self.numbers += 1
        write = Write(ZERO if zero else (self.numbers << 24) + 1, self.tick(), stamped=not zero, advisory=advisory)
        history = self._history
        for sector in range(first_sector, first_sector + sectors):
            records = history.get(sector)
            if records is None:
                history[sector] = [Write(int(self._settled[sector]), 0, ended=0, succeeded=True, durable=True), write]
            else:
                records.append(write)
        return self.numbers, write

    def end_write(self, write: Write, succeeded: bool, durable: bool) -> None:
        write.ended = self.tick()
        write.succeeded = succeeded
        write.durable = durable and succeeded
        if succeeded and not durable:
            self._volatile.append(write)

    def begin_flush(self) -> int:
        return self.tick()

    def end_flush(self, began: int, succeeded: bool) -> None:
        if not succeeded:
            return
        for write in self._volatile:
            write.durable = write.ended < began
        self._volatile = [write for write in self._volatile if not write.durable]

    # --- what it may see ------------------------------------------------------------------------------------------

    def check_read(self, first_sector: int, began: int, data: bytes) -> None:
        """A read that began at `began` and ends now returned this."""
        now = self.tick()
        values = self._values(data)
        changed = values != self._settled[first_sector : first_sector + len(values)]
        for sector, (value, differs) in enumerate(zip(values.tolist(), changed.tolist(), strict=True), first_sector):
            records = self._history.get(sector)
            if records is None:
                if differs:
                    raise Violation(f"sector {sector}: a read showed {value:#x}; unchanged since {int(self._settled[sector]):#x}")
                continue
            floor = max((w.began for w in records if w.succeeded and w.ended < began and not w.advisory), default=0)
            shown = [w for w in records if w.ended >= floor and w.shows(sector, value) and w.outdated.get(sector, NEVER) >= began]
            if not shown:
                raise Violation(f"sector {sector}: a read showed {value:#x}; allowed: {self._describe(sector, floor)}")
            if len(shown) == 1:
                # What had ended before this read and was not shown came before what was: no later read may show it again.
                for w in records:
                    if w is not shown[0] and w.ended < began:
                        w.outdated.setdefault(sector, now)

    def settle_after_crash(self, data: bytes) -> None:
        """The whole disk after a crash and reopen: each sector must hold an allowed value, and holds that one from now on."""
        self._settled = self.check_after_crash(data)
        self._history.clear()
        self._volatile.clear()
        self.clock += 1

    def check_after_crash(self, data: bytes) -> Values:
        values = self._values(data)
        for sector in np.flatnonzero(values != self._settled).tolist():
            if sector not in self._history:
                value, before = int(values[sector]), int(self._settled[sector])
                raise Violation(f"sector {sector}: after the crash {value:#x}; unchanged since {before:#x}")
        for sector, records in self._history.items():
            value = int(values[sector])
            floor = max((w.began for w in records if w.durable and not w.advisory), default=0)
            if not any(w.ended >= floor and w.shows(sector, value) for w in records):
                raise Violation(f"sector {sector}: after the crash {value:#x}; allowed: {self._describe(sector, floor)}")
        return values

    def _describe(self, sector: int, floor: int) -> str:
        return ", ".join(
            f"{w.value + sector * w.stamped:#x}[{w.began}-{w.ended}{' durable' if w.durable else ''}]"
            for w in self._history[sector]
            if w.ended >= floor
        )
