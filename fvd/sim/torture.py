# SPDX-License-Identifier: Apache-2.0
"""Worlds one after another, on all processors, until something is found or enough was played. Knows worlds, not what is in them."""

from __future__ import annotations

import ctypes
import gc
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Literal

from fvd.sim import bytewise, combinations
from fvd.sim.rounds import Counts, Outcome, run

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT_BYTES = 32 << 20

LISTEN_SECONDS = 0.2  # for Ctrl-C
STALL_SECONDS = 300.0  # a world takes milliseconds; what takes this long never ends


@dataclass(frozen=True, slots=True)
class FailedWorld:
    """A world that failed."""

    seed: int
    error: str
    requests: int = 0


@dataclass(slots=True)
class Tally(Counts):
    """What was played so far."""

    first_seed: int = 0
    worlds: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    found: list[FailedWorld] = field(default_factory=list)

    @property
    def requests_per_cpu_second(self) -> float:
        return self.requests / self.cpu_seconds if self.cpu_seconds else 0.0


Progress = Callable[[Tally], None]
Kind = Literal["worlds", "bytes", "combinations"]


def play_one(seed: int, *, kind: Kind = "worlds") -> tuple[Outcome, FailedWorld | None]:
    """One world; a failure is returned, not raised."""
    outcome = Outcome()
    try:
        if kind == "bytes":
            outcome.requests = bytewise.run(seed)
        elif kind == "combinations":
            combinations.play(combinations.drawn(seed), seed, outcome=outcome)
        else:
            run(seed, outcome=outcome)
    except Exception as error:
        return outcome, FailedWorld(seed, f"{type(error).__name__}: {error}", outcome.requests)
    return outcome, None


def _play_batch(seeds: range, kind: Kind) -> tuple[list[tuple[Outcome, FailedWorld | None]], float]:
    began = time.process_time()
    played = []
    for seed in seeds:
        played.append(play_one(seed, kind=kind))
        gc.collect()  # a world is a cycle, and may have a gibibyte
    # Disks of all sizes leave the heap in pieces that nothing fits into: without this a process takes gigabytes in an hour.
    ctypes.CDLL(None).malloc_trim(0)
    return played, time.process_time() - began


def torture(
    first_seed: int,
    *,
    worlds: int | None = None,
    requests: int | None = None,
    seconds: float | None = None,
    jobs: int = 1,
    kind: Kind = "worlds",
    keep_going: bool = False,
    progress: Progress | None = None,
) -> Tally:
    """Plays worlds from `first_seed` on until one of the limits is reached, or something is found (unless `keep_going`).

    A world that kills its process, or never ends, is found too. `kind`: random worlds, those of bytewise, or combinations of features.
    """
    tally = Tally(first_seed=first_seed)
    began = time.monotonic()

    def enough() -> bool:
        tally.seconds = time.monotonic() - began
        return (
            (bool(tally.found) and not keep_going)
            or (requests is not None and tally.requests >= requests)
            or (seconds is not None and tally.seconds >= seconds)
        )

    batches = _batches(first_seed, worlds, jobs, 20 if kind == "worlds" else 4)
    heard = began
    with (
        _interrupts() as interrupted,
        ProcessPoolExecutor(jobs, mp_context=get_context("forkserver"), initializer=_prepare) as pool,
    ):
        running: dict[Future[tuple[list[tuple[Outcome, FailedWorld | None]], float]], range] = {}
        try:
            while not enough():
                while len(running) < jobs * 2 and (seeds := next(batches, None)) is not None:
                    running[pool.submit(_play_batch, seeds, kind)] = seeds
                if not running:
                    break
                done, _ = wait(running, LISTEN_SECONDS, return_when=FIRST_COMPLETED)
                if interrupted():
                    _end(pool)
                    break
                if done:
                    heard = time.monotonic()
                elif time.monotonic() - heard > STALL_SECONDS:
                    seeds = next(iter(running.values()))
                    tally.found.append(FailedWorld(seeds.start, f"one of the seeds {seeds.start} to {seeds.stop - 1} does not end"))
                    _end(pool)
                    break
                for future in done:
                    outcomes, cpu_seconds = future.result()
                    del running[future]
                    tally.cpu_seconds += cpu_seconds
                    for outcome, failed in outcomes:
                        tally.worlds += 1
                        tally.add(outcome)
                        if failed is not None:
                            tally.found.append(failed)
                if progress is not None:
                    progress(tally)
        except BrokenProcessPool:
            tally.found += _who_died(sorted(running.values(), key=lambda seeds: seeds.start), kind)
        finally:
            pool.shutdown(cancel_futures=True)  # those that run end in seconds, and an exit that does not wait trips over the pool's pipes
    tally.found.sort(key=lambda failed: failed.seed)
    tally.seconds = time.monotonic() - began
    return tally


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C asked for an end. It breaks nothing off: a process that is just being started would be left half-made."""
    asked: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: asked.append(number))
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)


def _prepare() -> None:
    """Interrupts are the parent's. Memory is kept from world to world: a sixth of the time went into clearing fresh pages."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
    libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    gc.freeze()  # what is imported is no garbage: a collection takes a millisecond


def _batches(first: int, worlds: int | None, jobs: int, most: int) -> Iterator[range]:
    size = most if worlds is None else max(1, min(most, worlds // (jobs * 4)))
    end = None if worlds is None else first + worlds
    while end is None or first < end:
        last = first + size if end is None else min(first + size, end)
        yield range(first, last)
        first = last


def _end(pool: ProcessPoolExecutor) -> None:
    for process in list(pool._processes.values()):
        process.kill()


def _who_died(lost: list[range], kind: Kind) -> list[FailedWorld]:
    """Plays each world of the batches that were under way in a process of its own: the one that dies again is found."""
    for seeds in lost:
        for seed in seeds:
            with ProcessPoolExecutor(1, mp_context=get_context("forkserver")) as pool:
                try:
                    pool.submit(_play_batch, range(seed, seed + 1), kind).result()
                except BrokenProcessPool:
                    return [FailedWorld(seed, "the world ended its process")]
    where = f"{lost[0].start} to {lost[-1].stop - 1}" if lost else "?"
    return [FailedWorld(lost[0].start if lost else 0, f"a process died while it played one of the seeds {where}; none does so again alone")]
