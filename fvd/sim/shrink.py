# SPDX-License-Identifier: Apache-2.0
"""The fewest requests of a failing world that still fail: rounds, then requests are left out, under a few orders of events each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from fvd.errors import InvalidArgument
from fvd.sim.rounds import UNTIL, UNTIL_REQUESTS, Outcome, run

Item = tuple[int, int]  # round, request


@dataclass(frozen=True, slots=True)
class Shrunk:
    """What is left of a failing world: enough to play it again."""

    seed: int
    kept: tuple[Item, ...]
    rounds: tuple[int, ...]
    events: int
    error: str
    runs: int

    @property
    def only(self) -> str:
        """The value of ``--only``."""
        return format_kept(self.rounds, self.kept)


def failure(seed: int, rounds: Iterable[int], kept: Iterable[Item], events: int) -> str | None:
    """How the world fails when only these requests are played; None: it does not."""
    only: dict[int, set[int]] = {number: set() for number in rounds}
    for number, request in kept:
        only[number].add(request)
    try:
        run(seed, only=only, events=events)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def shrink(
    seed: int, *, events: int = 0, most_runs: int = 2000, orders: int = 3, progress: Callable[[int, int], None] | None = None
) -> Shrunk:
    """Shrinks by leaving out ever smaller parts. `orders`: of events, tried for each candidate.

    Raises InvalidArgument if the world does not fail.
    """
    outcome = Outcome()
    try:
        run(seed, events=events, outcome=outcome)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    else:
        raise InvalidArgument(f"the world of seed {seed} finds nothing, so there is nothing to shrink")
    rounds = tuple(outcome.played)
    kept = [(number, index) for number, count in outcome.played.items() for index in (*range(count), *range(UNTIL, UNTIL + UNTIL_REQUESTS))]
    runs = 0
    total = len(kept)

    def fails(some_rounds: tuple[int, ...], some: list[Item]) -> bool:
        nonlocal runs, reason, events
        for order in (events, *range(1, orders)):
            runs += 1
            if progress is not None:
                progress(total - len(kept), total)
            error = failure(seed, some_rounds, some, order)
            if error is not None:
                reason, events = error, order
                return True
        return False

    for number in list(rounds[:-1]):
        fewer = tuple(other for other in rounds if other != number)
        some = [item for item in kept if item[0] != number]
        if fails(fewer, some):
            rounds, kept = fewer, some
    size = max(1, len(kept) // 2)
    while runs < most_runs:
        before = len(kept)
        for part in list(_parts(kept, size)):
            some = [item for item in kept if item not in part]
            if runs >= most_runs:
                break
            if len(some) < len(kept) and fails(rounds, some):
                kept = some
        if size == 1 and len(kept) == before:
            break
        size = max(1, size // 2)
    return Shrunk(seed, tuple(kept), rounds, events, reason, runs)


def _parts(items: list[Item], size: int) -> Iterator[frozenset[Item]]:
    for start in range(0, len(items), size):
        yield frozenset(items[start : start + size])


def format_kept(rounds: Iterable[int], kept: Iterable[Item]) -> str:
    """``0:3,7-9/2:`` - of round 0 four requests, of round 2 none but its end."""
    indexes: dict[int, list[int]] = {number: [] for number in rounds}
    for number, request in kept:
        indexes[number].append(request)
    return "/".join(f"{number}:{','.join(_runs(sorted(requests)))}" for number, requests in indexes.items())


def _runs(numbers: list[int]) -> Iterator[str]:
    start = 0
    for end in range(1, len(numbers) + 1):
        if end == len(numbers) or numbers[end] != numbers[end - 1] + 1:
            yield str(numbers[start]) if end - start == 1 else f"{numbers[start]}-{numbers[end - 1]}"
            start = end


def parse_kept(text: str) -> dict[int, frozenset[int]]:
    """The reverse of `format_kept`. Raises InvalidArgument."""
    only: dict[int, frozenset[int]] = {}
    try:
        for part in text.split("/"):
            number, _, requests = part.partition(":")
            chosen: set[int] = set()
            for piece in filter(None, requests.split(",")):
                first, dash, last = piece.partition("-")
                last = last if dash else first
                if int(last) - int(first) > UNTIL + UNTIL_REQUESTS:
                    raise ValueError
                chosen.update(range(int(first), int(last) + 1))
            only[int(number)] = frozenset(chosen)
    except ValueError:
        raise InvalidArgument(f"{text!r} does not name requests; write ROUND:REQUEST,FIRST-LAST/ROUND:... as --shrink does") from None
    return only
