# SPDX-License-Identifier: Apache-2.0
"""Every crash point of a short scenario, and every subset of what was volatile there. It may not know what the scenarios do.

Random play meets more situations; in these few nothing is left to chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Protocol, TypeVar

from fvd.sim._device import SimulatedDevice
from fvd.sim._rng import Rng
from fvd.sim.device_node import Budget, PowerFailure

ALL_SUBSETS_UP_TO = 6  # volatile blocks
ALL_VERSIONS_UP_TO = 3**ALL_SUBSETS_UP_TO  # combinations, where blocks have had more than two contents
RANDOM_SUBSETS = 50
POINTS = 5000  # a scenario that takes more operations is not short

Blocks = Sequence[tuple[int, list[bytes]]]
"""(offset_bytes, contents, oldest first), in the order of submission: SimulatedDevice.volatile()."""


class Scene(Protocol):
    """A disk in the middle of a scenario."""

    device: SimulatedDevice
    budget: Budget

    def judge(self) -> None:
        """Open what the device holds, all of it durable, and raise if anything is wrong with it."""


@dataclass(slots=True)
class Count:
    """What a sweep tried."""

    points: int = 0
    images: int = 0
    most_volatile: int = 0


S = TypeVar("S", bound=Scene)


def subsets(blocks: Blocks, rng: Rng) -> Iterator[list[bytes]]:
    """What a crash may leave of volatile blocks: a content for each.

    Up to 6 blocks: all combinations. Above: every single block dropped, every single one kept, every prefix in the order of submission, and
    50 picks by rng. To drop a block is to leave its oldest content, to keep it is to leave its newest.
    """
    oldest = [contents[0] for _, contents in blocks]
    newest = [contents[-1] for _, contents in blocks]
    if len(blocks) <= ALL_SUBSETS_UP_TO:
        if prod(len(contents) for _, contents in blocks) <= ALL_VERSIONS_UP_TO:
            yield from (list(chosen) for chosen in product(*(contents for _, contents in blocks)))
            return
        yield from (list(chosen) for chosen in product(*zip(oldest, newest, strict=True)))
    else:
        for i in range(len(blocks)):
            yield [*newest[:i], oldest[i], *newest[i + 1 :]]
            yield [*oldest[:i], newest[i], *oldest[i + 1 :]]
        for i in range(len(blocks) + 1):
            yield [*newest[:i], *oldest[i:]]
    for _ in range(RANDOM_SUBSETS):
        yield [rng.choice(contents) for _, contents in blocks]


def sweep(start: Callable[[], S], play: Callable[[S], None]) -> Count:
    """Plays the scenario until device operation 1, 2, 3, ... has taken effect, and judges every image that a crash there may leave; ends
    with the scenario played whole. Raises what `judge` raises."""
    count = Count()
    while True:
        scene = start()
        scene.budget.left = count.points + 1
        try:
            play(scene)
        except PowerFailure:
            whole = False
        else:
            whole = True
        count.images += judge_every_image(scene, Rng(count.points), count)
        if whole:
            return count
        count.points += 1
        if count.points > POINTS:
            raise RuntimeError(f"the scenario takes more than {POINTS} operations")


def judge_every_image(scene: Scene, rng: Rng, count: Count) -> int:
    """Every image that a crash now may leave is opened and judged. Returns how many."""
    device = scene.device
    blocks = device.volatile()
    count.most_volatile = max(count.most_volatile, len(blocks))
    image = bytearray(device.image)
    durable_size_bytes = device.durable_size_bytes
    images = 0
    seen: set[int] = set()
    for chosen in subsets(blocks, rng):
        key = hash(tuple(chosen))
        if key in seen:
            continue
        seen.add(key)
        for (offset, _), content in zip(blocks, chosen, strict=True):
            image[offset : offset + len(content)] = content
        device.put_back(image)
        scene.judge()
        images += 1
    if durable_size_bytes < len(image):
        # The storage is a file whose growth no flush has covered.
        for offset, contents in blocks:
            image[offset : offset + len(contents[0])] = contents[0]
        device.put_back(image)
        device.truncate(durable_size_bytes)
        scene.judge()
        images += 1
    return images
