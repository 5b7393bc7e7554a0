# SPDX-License-Identifier: Apache-2.0
"""A storage in memory that fails at a chosen write or flush, and forgets what was not flushed: for what happens before an engine runs.

Unflushed logical blocks each survive or not, by seed; that is all that a device promises (the simulator has more, for running disks).
"""

from __future__ import annotations

import numpy as np

from fvd.device.node import Bytes, Data, aligned_buffer

BLOCK_BYTES = 512


class PowerCut(Exception):
    """The machine has stopped."""


class FaultyStorage:
    """Shaped like fvd.device.node.Node. `stop_after`: the operation with this number (counted from 0) does not happen any more."""

    path = "memory"

    def __init__(self, size_bytes: int, *, fill: bytes = b"\0", stop_after: int | None = None) -> None:
        self.durable = np.frombuffer((fill * (size_bytes // len(fill) + 1))[:size_bytes], np.uint8).copy()
        self.volatile = self.durable.copy()
        self.dirty: list[tuple[int, int]] = []
        self.stop_after = stop_after
        self.operations = 0

    def _operate(self) -> None:
        if self.stop_after is not None and self.operations >= self.stop_after:
            raise PowerCut
        self.operations += 1

    def size_bytes(self) -> int:
        return self.durable.size

    def pread(self, offset_bytes: int, length_bytes: int, /) -> Bytes:
        data = aligned_buffer(length_bytes)
        self.pread_into(offset_bytes, data)
        return data

    def pread_into(self, offset_bytes: int, buffer: Bytes, /) -> None:
        assert offset_bytes + len(buffer) <= self.size_bytes()
        np.frombuffer(buffer, np.uint8)[:] = self.volatile[offset_bytes : offset_bytes + len(buffer)]

    def pwrite(self, offset_bytes: int, data: Data, /) -> None:
        self._operate()
        source = np.frombuffer(memoryview(data), np.uint8)
        assert offset_bytes % BLOCK_BYTES == source.size % BLOCK_BYTES == 0
        assert offset_bytes + source.size <= self.size_bytes()
        self.volatile[offset_bytes : offset_bytes + source.size] = source
        self.dirty.append((offset_bytes, source.size))

    def zero(self, offset_bytes: int, length_bytes: int, /) -> None:
        self.pwrite(offset_bytes, bytes(length_bytes))

    def flush(self) -> None:
        self._operate()
        self.durable[:] = self.volatile
        self.dirty = []

    def after_power_cut(self, seed: int) -> FaultyStorage:
        """What is there when the machine comes back. Seed 0: nothing that was not flushed; seed 1: all of it."""
        rng = np.random.default_rng(seed)
        found = FaultyStorage(0)
        found.durable = self.durable.copy()
        for offset, length in self.dirty:
            blocks = slice(offset, offset + length)
            survives = np.full(length // BLOCK_BYTES, seed == 1) if seed < 2 else rng.random(length // BLOCK_BYTES) < 0.5
            kept = np.repeat(survives, BLOCK_BYTES)
            found.durable[blocks][kept] = self.volatile[blocks][kept]
        found.volatile = found.durable.copy()
        return found
