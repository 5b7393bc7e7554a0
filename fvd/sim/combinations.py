# SPDX-License-Identifier: Apache-2.0
"""Every feature with every other: a small disk of each combination of layout, base, copying, cache mode and sizes, under a mixed load with
crashes, kills and reopens. The features are named as users choose them. Knows neither real bases nor how a cover of them is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fvd.format.geometry import Geometry, Layout, Placement
from fvd.modes import CACHE_MODES, LAYOUTS, ON_FULL, PLACEMENTS
from fvd.sim._rng import Rng
from fvd.sim.rounds import Outcome, play_round
from fvd.sim.shape import SECTOR_BYTES, Shape
from fvd.sim.world import SHAPE, World

KIB = 1024
MIB = 1 << 20
REQUESTS = 2000

AXES: dict[str, tuple[Any, ...]] = {
    "layout": LAYOUTS,
    "base": ("none", "smaller", "equal", "larger"),
    "copy_on_read": (True, False),
    "prefetch": (True, False),
    "cache_mode": CACHE_MODES,
    "block_size_bytes": (4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB),
    "chunk_size_bytes": (64 * KIB, 256 * KIB, MIB, 4 * MIB),
    "placement": PLACEMENTS,
    "discard": (True, False),
    "on_full": ON_FULL,
    "zero_chunks": (True, False),
}


@dataclass(frozen=True)
class Combination:
    """One value of each axis."""

    layout: str
    base: str
    copy_on_read: bool
    prefetch: bool
    cache_mode: str
    block_size_bytes: int
    chunk_size_bytes: int
    placement: str
    discard: bool
    on_full: str
    zero_chunks: bool

    def __str__(self) -> str:
        sizes = f"{self.block_size_bytes // KIB}K/{self.chunk_size_bytes // KIB}K"
        switches = [name for name in ("copy_on_read", "prefetch", "discard", "zero_chunks") if getattr(self, name)]
        return " ".join([self.layout, f"base={self.base}", self.cache_mode, sizes, self.placement, self.on_full, *switches])


def possible(values: dict[str, Any]) -> bool:
    """Whether a disk of these (some of them) can be provisioned: a chunk is at least a block."""
    return bool(values.get("chunk_size_bytes", 1 << 62) >= values.get("block_size_bytes", 0))


def drawn(seed: int) -> Combination:
    """The combination of a seed: each value as likely as the others of its axis."""
    rng = Rng(seed, SHAPE)
    while not possible(values := {name: rng.choice(choices) for name, choices in AXES.items()}):
        pass
    return Combination(**values)


def shape_of(combination: Combination) -> Shape:
    """A disk of two and a half chunks or more, with the storage for some of them at first."""
    chunk = combination.chunk_size_bytes
    virtual = max(2 * MIB, 2 * chunk + chunk // 2) - 3 * SECTOR_BYTES
    geometry = Geometry(
        virtual_size_bytes=virtual,
        block_size_bytes=combination.block_size_bytes,
        chunk_size_bytes=chunk,
        journal_size_bytes=64 * KIB,
        grow_step_bytes=max(chunk, MIB),
        layout=Layout[combination.layout.upper()],
        placement=Placement[combination.placement.upper()],
    )
    chunks = geometry.chunks
    return Shape(
        geometry=geometry,
        base_bytes={"none": None, "smaller": virtual * 5 // 8 + 777, "equal": virtual, "larger": virtual + MIB - 12345}[combination.base],
        copy_on_read=combination.copy_on_read,
        prefetch=combination.prefetch,
        cache_mode=combination.cache_mode,
        on_full=combination.on_full,
        discard=combination.discard,
        zero_chunks=combination.zero_chunks,
        storage_chunks=chunks if geometry.layout is Layout.RAW else max(1, chunks // 2),
        base_timeout_ns=1_000_000_000,
        kinds={"read": 3.0, "write": 2.0, "flush": 0.4, "trim": 0.3, "zero": 0.3, "fua": 0.3},
        largest_sectors=64,
        depth=16,
        longest_round=400,
        slow={"base": 0.3, "write": 0.2, "flush": 0.2},
        torn_share=0.3,
        overtaking_share=0.3,
        faults={"base": 0.05},
    )


def play(combination: Combination, seed: int, requests: int = REQUESTS, outcome: Outcome | None = None) -> Outcome:
    """At least so many requests, in rounds that end as random worlds' do. Raises Violation, or whatever the engine raises; `outcome` then
    says how far it came."""
    outcome = Outcome() if outcome is None else outcome
    world = World(seed, shape_of(combination))
    try:
        number = 0
        while world.requests_done < requests:
            play_round(world, number, outcome)
            number += 1
        world.crash()
    finally:
        outcome.requests = world.requests_done
    return outcome
