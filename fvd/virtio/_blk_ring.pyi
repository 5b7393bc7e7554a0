# SPDX-License-Identifier: Apache-2.0
"""Types of _blk_ring.pyx."""

from fvd.virtio._guest_memory import GuestMemory, Shared

class BlkRing:
    size: int
    next_available: int
    next_used: int
    busy: int
    parts: int
    def __init__(self, size: int, *, sectors: int, is_read_only: bool, serial: bytes) -> None: ...
    def begin(
        self,
        memory: GuestMemory,
        descriptors_address: int,
        available_address: int,
        used_address: int,
        *,
        next_available: int,
        used_guest_address: int | None = None,
        has_event_index: bool,
        has_indirect: bool,
        is_durable: bool,
        inflight: Shared | None = None,
        inflight_offset_bytes: int = 0,
    ) -> None: ...
    @property
    def why(self) -> str | None: ...

def inflight_bytes(size: int) -> int: ...
