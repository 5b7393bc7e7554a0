# SPDX-License-Identifier: Apache-2.0
"""The simulated device as provision, recovery and check see it, while nothing is under way. It may not know the engine."""

from __future__ import annotations

from typing import Any

import numpy as np

from fvd.device.node import Bytes, Data
from fvd.errors import DeviceError
from fvd.sim._device import FLUSH, STORAGE, WRITE, SimulatedDevice


class DeviceNode:
    """What those parts need of a `fvd.device.node.Node`. What is written through it is durable at once."""

    path = "the simulated disk"

    def __init__(self, device: SimulatedDevice, *, direct: bool) -> None:
        self.direct = direct
        self._device = device
        self._bytes = np.frombuffer(device.image, np.uint8)

    def size_bytes(self) -> int:
        return self._device.size_bytes

    def pread(self, offset_bytes: int, length_bytes: int, /) -> Bytes:
        self._device.happen_at_rest()
        return memoryview(bytearray(self._bytes[offset_bytes : offset_bytes + length_bytes]))

    def pread_into(self, offset_bytes: int, buffer: Bytes, /) -> None:
        np.frombuffer(buffer, np.uint8)[:] = self._bytes[offset_bytes : offset_bytes + len(buffer)]

    def pwrite(self, offset_bytes: int, data: Data, /) -> None:
        source = np.frombuffer(memoryview(data), np.uint8)
        self._bytes[offset_bytes : offset_bytes + source.size] = source

    def zero(self, offset_bytes: int, length_bytes: int, /) -> None:
        self._bytes[offset_bytes : offset_bytes + length_bytes] = 0

    def flush(self) -> None:
        """Also what the engine before had written and not flushed. Raises DeviceError when blocks of it were lost and nobody was told."""
        self._device.happen_at_rest()
        if error := self._device.ask():
            raise DeviceError(f"{self.path}: a flush failed with {error}")
        self._device.flush_everything()

    def forget_cache(self) -> None:
        self._device.forget_cache()


class PowerFailure(Exception):
    """Enough operations have taken effect."""


class Budget:
    """Power fails when so many operations have taken effect, the last of them not yet complete."""

    def __init__(self, operations: int = 1 << 60) -> None:
        self.left = operations

    def spend(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise PowerFailure


class VolatileNode(DeviceNode):
    """The same, but every write and flush is an operation of the device: volatile until a flush, and one that power may fail at."""

    def __init__(self, device: SimulatedDevice, budget: Budget, *, direct: bool = True) -> None:
        super().__init__(device, direct=direct)
        self._budget = budget

    def _operate(self, kind: int, offset_bytes: int, data: Any | None) -> None:
        address, length = (0, 0) if data is None else (data.ctypes.data, data.size)
        self._device.submit([(0, kind, STORAGE, offset_bytes, length, address, False)])
        operation = self._device.pending[-1]
        self._device.take_effect(operation)
        self._budget.spend()
        self._device.finish(operation)
        if operation.result:
            raise DeviceError(f"{self.path}: an operation failed with {operation.result}")

    def pwrite(self, offset_bytes: int, data: Data, /) -> None:
        source = np.frombuffer(memoryview(data), np.uint8)
        self._operate(WRITE, offset_bytes, source)

    def zero(self, offset_bytes: int, length_bytes: int, /) -> None:
        self._operate(WRITE, offset_bytes, np.zeros(length_bytes, np.uint8))

    def flush(self) -> None:
        self._operate(FLUSH, 0, None)
