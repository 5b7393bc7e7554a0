# SPDX-License-Identifier: Apache-2.0
"""A small disk on the simulated device whose events somebody decides one by one: a scenario, the sweep, or a person at the console."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fvd.format.geometry import Geometry, Layout, Placement
from fvd.sim._device import Operation
from fvd.sim._oracle import Violation
from fvd.sim.shape import Shape
from fvd.sim.world import World

SECTORS_PER_BLOCK = 128
SECTORS_PER_CHUNK = 512


def shape(**changes: Any) -> Shape:
    """1 MiB of 64 KiB blocks in 256 KiB chunks on a 64 KiB journal; no base, no faults, all storage there. `changes`: fields of
    Geometry and Shape."""
    geometry = Geometry(
        virtual_size_bytes=changes.pop("virtual_size_bytes", 1 << 20),
        block_size_bytes=changes.pop("block_size_bytes", 1 << 16),
        chunk_size_bytes=changes.pop("chunk_size_bytes", 1 << 18),
        journal_size_bytes=changes.pop("journal_size_bytes", 1 << 16),
        grow_step_bytes=changes.pop("grow_step_bytes", 1 << 18),
        layout=changes.pop("layout", Layout.COMPACT),
        placement=changes.pop("placement", Placement.APPEND),
    )
    values: dict[str, Any] = {"geometry": geometry, "storage_chunks": geometry.chunks}
    return Shape(**(values | changes))


class Stage(World):
    def __init__(self, *, log: list[str] | None = None, **changes: Any) -> None:
        super().__init__(1, shape(**changes), log=log)

    def pending(self, which: Callable[[Operation], bool] = lambda op: True) -> list[Operation]:
        """The device's operations under way, oldest first."""
        self.player.exchange()
        return [op for op in self.device.pending if which(op)]

    def effect(self, *operations: Operation) -> None:
        """They take effect, if they have not."""
        for operation in operations:
            if not operation.took_effect:
                self.device.take_effect(operation)

    def finish(self, *operations: Operation) -> None:
        """They take effect if they have not, and complete."""
        for operation in operations:
            self.effect(operation)
            self.player.deliver(self.device.finish(operation))

    def finish_all(self, but: Callable[[Operation], bool] = lambda op: False) -> None:
        """Complete everything, and what follows from it, except what `but` names."""
        while ready := self.pending(lambda op: not but(op)):
            self.finish(ready[0])

    def now(self, kind: str, first_sector: int = 0, sectors: int = 0, **flags: bool) -> None:
        """Submit one request and complete everything."""
        cookie = self.submit(kind, first_sector, sectors, **flags)
        self.finish_all()
        if cookie in self.in_flight:
            raise Violation(f"{kind} did not end")

    def counts(self) -> dict[str, int]:
        return dict(self.engine.statistics())
