# SPDX-License-Identifier: Apache-2.0
"""Numbers from a seed: the same ones on every machine and in every version of Python."""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

class Rng:
    """xoshiro256** (Blackman, Vigna), seeded through splitmix64 from up to three integers below 2**64. Same names as random.Random."""

    def __init__(self, first: int, second: int = 0, third: int = 0) -> None: ...
    def random(self) -> float:
        """0 <= x < 1, a multiple of 2**-53."""

    def randint(self, low: int, high: int) -> int:
        """low <= n <= high, each below 2**63. Raises ValueError if there is none."""

    def choice(self, items: Sequence[T]) -> T: ...
    def randbytes(self, count: int) -> bytes: ...
