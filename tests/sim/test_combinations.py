# SPDX-License-Identifier: Apache-2.0
"""Every feature with every other: a cover in which each pair of choices meets, on the simulated disk. test_real_combinations.py has real
bases; which combinations are refused, and how, is in docs/base.md."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from itertools import combinations as pairs

import pytest
from allpairspy import AllPairs
from bugs import needs_bugs, seeded

from fvd._core import Bug
from fvd.sim._oracle import Violation
from fvd.sim.combinations import AXES, Combination, drawn, play, possible

pytestmark = pytest.mark.checked_once

LEAST = 150


def cover() -> list[Combination]:
    """Every pair of values of two axes, and more at random up to LEAST."""

    def valid(values: Sequence[object]) -> bool:
        return possible(dict(zip(AXES, values, strict=False)))

    found = [Combination(*values) for values in AllPairs([list(choices) for choices in AXES.values()], filter_func=valid)]
    seed = 0
    while len(found) < LEAST:
        seed += 1
        found.append(drawn(seed))
    return found


COVER = cover()
FIRST = int(os.environ.get("FVD_SIM_FIRST", time.time_ns() // 1000 % (1 << 40)))


def test_the_cover_has_every_possible_pair() -> None:
    met = {(one, getattr(combination, one), other, getattr(combination, other)) for combination in COVER for one, other in pairs(AXES, 2)}
    for one, other in pairs(AXES, 2):
        for value in AXES[one]:
            for partner in AXES[other]:
                if possible({one: value, other: partner}):
                    assert (one, value, other, partner) in met
    assert len(COVER) >= LEAST


@pytest.mark.parametrize("number", range(len(COVER)))
def test_combination(number: int) -> None:
    outcome = play(COVER[number], FIRST + number)
    assert outcome.requests >= 2000 and outcome.crashes + outcome.closes + outcome.kills > 0


# With copies in play and changes that a crash can take: where rules of copies bite.
COPYING = [c for c in COVER if c.base != "none" and (c.copy_on_read or c.prefetch) and c.cache_mode != "unsafe"]
PASSES = 20  # a rare one shows in about one of two hundred plays: one pass would miss it once in two or three runs


@needs_bugs
# Two show so rarely here that looking for them takes minutes; random worlds find them sooner (test_seeded_bugs.py).
@pytest.mark.parametrize(
    "bug",
    [
        Bug.NO_PADDING,
        Bug.COPY_OVER_NEWER_DATA,
        Bug.COPY_BEFORE_ITS_DATA,
        *(pytest.param(rare, marks=pytest.mark.long) for rare in (Bug.COPY_LAZY_UNDER_A_WRITE, Bug.COPY_INTO_A_DIRTY_SLOT)),
    ],
    ids=lambda bug: bug.name,
)
def test_the_cover_is_not_blind(bug: Bug) -> None:
    """Without a rule of copies, one of the combinations fails."""
    with seeded(bug), pytest.raises((Violation, RuntimeError)):
        for number in range(PASSES * len(COPYING)):
            play(COPYING[number % len(COPYING)], FIRST + number)
