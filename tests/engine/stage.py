"""A small disk on the simulated device whose events a test decides one by one."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from fvd.format.geometry import Geometry, Layout
from fvd.sim.device import Operation
from fvd.sim.world import Shape, World

SECTORS_PER_BLOCK = 128
SECTORS_PER_CHUNK = 512


def shape(**changes: Any) -> Shape:
    """1 MiB of 64 KiB blocks in 256 KiB chunks on a 64 KiB journal; no base, no faults, all storage there."""
    geometry = Geometry(
        virtual_size_bytes=changes.pop("virtual_size_bytes", 1 << 20),
        block_size_bytes=changes.pop("block_size_bytes", 1 << 16),
        chunk_size_bytes=changes.pop("chunk_size_bytes", 1 << 18),
        journal_size_bytes=1 << 16,
        grow_step_bytes=1 << 18,
        layout=changes.pop("layout", Layout.COMPACT),
    )
    values: dict[str, Any] = {
        "geometry": geometry,
        "base_bytes": None,
        "logical_block_bytes": 512,
        "cache_mode": "none",
        "on_full": "wait",
        "storage_chunks": geometry.chunks,
        "kinds": {},
        "largest_sectors": 8,
        "depth": 1,
        "fault_rate": 0.0,
        "faults": (),
        "discard": False,
        "slow_share": 0.0,
        "stuck_share": 0.0,
        "skew_share": 0.0,
        "hot_sectors": 0,
        "longest_round": 1,
        "low_water_chunks": 0,
        "crash_at": "",
    }
    return Shape(**(values | changes))


class Stage(World):
    def __init__(self, **changes: Any) -> None:
        super().__init__(1, shape(**changes))
        self.dice = Random(2)
        self.device.dice = self.dice

    def pending(self, which: Callable[[Operation], bool] = lambda op: True) -> list[Operation]:
        self._pump()
        return [op for op in self.device.pending if which(op)]

    def effect(self, *operations: Operation) -> None:
        for operation in operations:
            if not operation.took_effect:
                self.device.take_effect(operation)

    def finish(self, *operations: Operation) -> None:
        for operation in operations:
            self.effect(operation)
            self.deliver(self.device.finish(operation))

    def finish_all(self, but: Callable[[Operation], bool] = lambda op: False) -> None:
        """Complete everything, and what follows from it, except what `but` names."""
        while ready := self.pending(lambda op: not but(op)):
            self.finish(ready[0])

    def now(self, kind: str, first_sector: int = 0, sectors: int = 0, **flags: bool) -> None:
        """Submit one request and complete everything."""
        cookie = self.submit(kind, first_sector, sectors, **flags)
        self.finish_all()
        if cookie in self.in_flight:
            raise AssertionError(f"{kind} did not end")

    def counts(self) -> dict[str, int]:
        return dict(self.engine.statistics())
