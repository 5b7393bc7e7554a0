"""The simulated device as provision, recovery and check see it, while nothing is under way. It may not know the engine."""

from __future__ import annotations

import numpy as np

from fvd.device.node import Bytes, Data
from fvd.sim._device import SimulatedDevice


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
        return self._bytes[offset_bytes : offset_bytes + length_bytes].copy()

    def pread_into(self, offset_bytes: int, buffer: Bytes, /) -> None:
        buffer[:] = self._bytes[offset_bytes : offset_bytes + buffer.size]

    def pwrite(self, offset_bytes: int, data: Data, /) -> None:
        source = np.frombuffer(data, np.uint8) if not isinstance(data, np.ndarray) else data.reshape(-1).view(np.uint8)
        self._bytes[offset_bytes : offset_bytes + source.size] = source

    def zero(self, offset_bytes: int, length_bytes: int, /) -> None:
        self._bytes[offset_bytes : offset_bytes + length_bytes] = 0

    def flush(self) -> None:
        """Also what the engine before had written and not flushed."""
        self._device.flush_everything()

    def forget_cache(self) -> None:
        """There is no cache above this device."""
