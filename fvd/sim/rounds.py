# SPDX-License-Identifier: Apache-2.0
"""A world from beginning to end: rounds of random requests, each with an end of its own; and which of the requests are played."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field, fields

from fvd.sim._device import CATEGORIES
from fvd.sim._oracle import SECTOR_BYTES
from fvd.sim._rng import Rng
from fvd.sim.damage import rot
from fvd.sim.shape import STICKY
from fvd.sim.world import ENDING, REQUESTS, ROUNDS, TAKEN, World

ROUNDS_OF_A_WORLD = 6
UNTIL_REQUESTS = 60
TAKEN_SHARE = 0.03  # of rounds end with a disk whose storage somebody else has taken


@dataclass(slots=True)
class Counts:
    """What was done, in one world or in many."""

    requests: int = 0
    crashes: int = 0
    kills: int = 0
    closes: int = 0
    damages: int = 0

    def add(self, other: Counts) -> None:
        for each in fields(Counts):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


@dataclass(slots=True)
class Outcome(Counts):
    """What one world did."""

    played: dict[int, int] = field(default_factory=dict)
    """Round -> requests that it was to play."""


UNTIL = 1 << 16  # from here on: the requests of a round that wait for the moment of its crash

Kept = Mapping[int, Container[int]]
"""Round -> those of its requests that are played; a round that is not named is left out whole."""


class _Others:
    """Everything that is not kept, counted from `start`."""

    def __init__(self, kept: Container[int], start: int = 0) -> None:
        self._kept, self._start = kept, start

    def __contains__(self, index: object) -> bool:
        return isinstance(index, int) and index + self._start not in self._kept


def run(seed: int, *, only: Kept | None = None, events: int = 0, log: list[str] | None = None, outcome: Outcome | None = None) -> Outcome:
    """One world from its seed. Raises Violation, or whatever the engine raises; `outcome` then says how far it came."""
    outcome = Outcome() if outcome is None else outcome
    world = World(seed, events=events, log=log)
    try:
        for number in range(ROUNDS_OF_A_WORLD):
            if only is not None and number not in only:
                continue
            play_round(world, number, outcome, None if only is None else only[number])
    finally:
        outcome.requests = world.requests_done
    return outcome


def play_round(world: World, number: int, outcome: Outcome, kept: Container[int] | None = None) -> None:
    """One round and its end."""
    rng = Rng(world.seed, ROUNDS, number)
    shape = world.shape
    world.say(f"round {number}")
    if world.place is not None:
        world.place.begin_round()
    if shape.faulty and rng.random() < 0.7:
        world.start_faults(shape.faults, one=shape.fail_one)
    # What a kill left is in danger only until the next flush.
    requests = rng.randint(1, min(shape.longest_round, 12) if world.killed and rng.random() < 0.5 else shape.longest_round)
    world.killed = False
    outcome.played[number] = requests
    _aim(world, rng)
    skip = None if kept is None else _Others(kept)
    world.player.play(requests, seed=world.seed, stream=REQUESTS << 32 | number, skip=skip, on_side=world.on_side)
    world.check_lost_slots()
    if shape.settle_share and Rng(world.seed, ENDING, number).random() < shape.settle_share:
        world.settle()
    taken = Rng(world.seed, TAKEN, number)
    if taken.random() < TAKEN_SHARE:
        outcome.kills += 1
        world.stop_disk(taken)
        return
    ending = rng.random()
    if (shape.impatient and world.engine.failed_errno) or (shape.deadly and ending < 0.35):
        ending = 0.65
    if ending < 0.5:
        outcome.crashes += 1
        if shape.crash_at:
            _play_until(world, shape.crash_at, number, kept)
        if shape.rot and rng.random() < 0.5:
            outcome.damages += rot(world)
        else:
            world.crash()
    elif ending < 0.6:
        outcome.crashes += 1
        world.crash_while_closing()
    elif ending < 0.7:
        outcome.kills += 1
        if shape.crash_at:
            _play_until(world, shape.crash_at, number, kept)
        world.kill()
    elif ending < 0.82:
        outcome.closes += 1
        world.close()
    elif ending < 0.89:
        outcome.closes += 1
        world.close(at_once=True)
    else:
        world.settle()
        if world.engine.failed_errno:
            outcome.crashes += 1
            world.crash()


def _aim(world: World, rng: Rng, **changes: float) -> None:
    """The load of a round: some kinds of requests are switched off, so that the others meet more often."""
    shape = world.shape
    weights = {kind: weight for kind, weight in shape.kinds.items() if rng.random() < 0.8 or kind == "write"}
    world.player.aim(
        weights=weights | changes,
        areas=shape.areas,
        largest_sectors=shape.largest_sectors,
        depth=shape.depth,
        least_depth=shape.least_depth,
        unit_sectors=shape.logical_block_bytes // SECTOR_BYTES,
        skew_share=shape.skew_share,
        side_share=0.12,
        verify_share=shape.verify_share,
    )


def _play_until(world: World, category: str, number: int, kept: Container[int] | None) -> None:
    """Play until such an operation has taken effect and not completed: the moment when a crash asks most."""
    # A flush brings a commit about, and a checkpoint; but what waits for neither may meet a crash that nothing went before.
    _aim(world, Rng(world.seed, ROUNDS, number), **({"flush": 3.0} if category in STICKY else {}))
    stream = REQUESTS << 32 | 1 << 16 | number
    skip = None if kept is None else _Others(kept, UNTIL)
    world.player.play(UNTIL_REQUESTS, seed=world.seed, stream=stream, skip=skip, on_side=world.on_side, awaited=CATEGORIES.index(category))
