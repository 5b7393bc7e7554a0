# SPDX-License-Identifier: Apache-2.0
"""Random requests to an open disk, from one thread or several, against a model in memory. Requests under way at once share blocks, and
never bytes: so every byte that is read is known.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from random import Random

import fvd

SECTOR_BYTES = 512
KINDS = {"read": 10, "write": 7, "durable": 2, "trim": 2, "zero": 3, "flush": 1}
SIZES = (512, 512, 4096, 4096, 8192, 16384, 65536, 131072)
_SHOWN = 16


def first_difference(found: bytes, wanted: bytes) -> int:
    return next((at for at, pair in enumerate(zip(found, wanted, strict=True)) if pair[0] != pair[1]), -1)


class RandomLoad:
    """Plays on one disk, over reopens. `model` is what the disk must show."""

    def __init__(self, seed: int, model: bytes) -> None:
        self.model = bytearray(model)
        self.requests: Counter[str] = Counter()
        self._seed = seed
        self._lock = threading.Lock()
        self._busy: list[tuple[int, int]] = []  # (start, end) of what other threads are at

    def play(self, disk: fvd.Disk, requests: int, *, threads: int, reach_bytes: int) -> None:
        """So many more, in the first `reach_bytes` of the disk. Raises what a thread raised."""
        self._seed += 1

        def work(number: int) -> None:
            rng = Random(self._seed * 1000 + number)
            for _ in range(requests // threads):
                self._one(disk, rng, reach_bytes)

        with ThreadPoolExecutor(threads) as pool:
            for ended in [pool.submit(work, number) for number in range(threads)]:
                ended.result()

    def compare(self, disk: fvd.Disk) -> None:
        """All bytes; nothing may be under way."""
        found = disk.pread(0, disk.size)
        if found != self.model:
            at = first_difference(found, bytes(self.model))
            raise AssertionError(f"byte {at}: {found[at : at + _SHOWN].hex()}, not {self.model[at : at + _SHOWN].hex()}")

    def _one(self, disk: fvd.Disk, rng: Random, reach_bytes: int) -> None:
        [kind] = rng.choices(list(KINDS), list(KINDS.values()))
        self.requests[kind] += 1
        if kind == "flush":
            disk.flush()
            return
        start, end = self._take(rng, reach_bytes)
        try:
            self._do(disk, rng, kind, start, end)
        finally:
            with self._lock:
                self._busy.remove((start, end))

    def _take(self, rng: Random, reach_bytes: int) -> tuple[int, int]:
        """A range that nobody else is at."""
        while True:
            length = min(rng.choice(SIZES), reach_bytes)
            start = rng.randrange(0, reach_bytes - length + 1)
            if rng.random() < 0.8:
                start = start // SECTOR_BYTES * SECTOR_BYTES
            else:
                length -= rng.randrange(SECTOR_BYTES)
            with self._lock:
                if not any(start < there_end and there_start < start + length for there_start, there_end in self._busy):
                    self._busy.append((start, start + length))
                    return start, start + length
            time.sleep(0)

    def _do(self, disk: fvd.Disk, rng: Random, kind: str, start: int, end: int) -> None:
        length = end - start
        if kind in ("write", "durable"):
            data = rng.randbytes(length)
            disk.pwrite(start, data, durable=kind == "durable")
            self.model[start:end] = data
        elif kind == "zero":
            disk.zero(start, length, keep_storage=rng.random() < 0.5)
            self.model[start:end] = bytes(length)
        elif kind == "trim":
            disk.trim(start, length)
            self.model[start:end] = self._after_trim(disk.pread(start, length), start, end)
        else:
            found, wanted = disk.pread(start, length), bytes(self.model[start:end])
            if found != wanted:
                at = first_difference(found, wanted)
                raise AssertionError(
                    f"read of {length} bytes at {start}: byte {at} and on is {found[at : at + _SHOWN].hex()}, "
                    f"not {wanted[at : at + _SHOWN].hex()}"
                )

    def _after_trim(self, found: bytes, start: int, end: int) -> bytes:
        """Each sector as it was, or zeros: never something else."""
        at = start
        while at < end:
            until = min(end, (at // SECTOR_BYTES + 1) * SECTOR_BYTES)
            piece = found[at - start : until - start]
            if any(piece) and piece != self.model[at:until]:
                raise AssertionError(f"after the trim of {end - start} bytes at {start}: sector at {at} is neither old nor zeros")
            at = until
        return found
