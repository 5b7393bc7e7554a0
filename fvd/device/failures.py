# SPDX-License-Identifier: Apache-2.0
"""Who is told that a flush has failed: everything in this process that lies on the same device (R30).

The kernel tells the failure of a device's flush to one caller in the whole system, whatever it was that did not reach the medium. What this
process hears, all its disks hear. Knows neither engines nor loops: who listens says how it is told, from any thread.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FlushFailure:
    """A flush, or a durable write, that failed."""

    errno: int
    seconds: float  # Unix time
    source: str  # what failed to flush: a volume by its name, or a path

    @property
    def reason(self) -> str:
        return os.strerror(self.errno)


class Listener:
    """Hears of failures on its devices until `close`. Made by `Failures.listen`."""

    def __init__(self, failures: Failures, devices: Callable[[], frozenset[int]], told: Callable[[FlushFailure], None]) -> None:
        self.devices = devices
        self._failures = failures
        self._told = told

    def hear(self, failure: FlushFailure) -> None:
        try:
            self._told(failure)
        except Exception:  # the others must hear of it all the same
            log.exception("a listener failed at a failed flush of %s", failure.source)

    def close(self) -> None:
        """Again is fine."""
        self._failures.forget(self)


class Failures:
    """Listeners and what they lie on. Safe from threads."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._lock = threading.Lock()
        self._listeners: list[Listener] = []
        self._clock = clock

    def listen(self, devices: Callable[[], frozenset[int]], told: Callable[[FlushFailure], None]) -> Listener:
        """`told(failure)` for each failure on one of `devices()`, in whatever thread reports it. Neither may wait."""
        listener = Listener(self, devices, told)
        with self._lock:
            self._listeners.append(listener)
        return listener

    def forget(self, listener: Listener) -> None:
        with self._lock:
            if listener in self._listeners:
                self._listeners.remove(listener)

    def report(self, devices: frozenset[int], errno: int, source: str, *, but: Listener | None = None) -> FlushFailure:
        """A flush of `source`, which lies on these devices, has failed now. Told are all that share one, `but` whoever knows already."""
        failure = FlushFailure(errno, self._clock(), source)
        log.error("%s: a flush failed: %s", source, failure.reason)
        with self._lock:
            listeners = [listener for listener in self._listeners if listener is not but]
        for listener in listeners:
            if listener.devices() & devices:
                listener.hear(failure)
        return failure

    def forget_all(self) -> None:
        """In a child after fork: nothing is open in it, and whoever held the lock is not there."""
        self._lock = threading.Lock()
        self._listeners = []


FAILURES = Failures()
os.register_at_fork(after_in_child=FAILURES.forget_all)


@contextmanager
def reported(devices: Callable[[], frozenset[int]], source: str) -> Iterator[None]:
    """What fails in the block is a flush of `source`, on `devices()`: it is reported, and raised as it is."""
    try:
        yield
    except OSError as error:
        FAILURES.report(devices(), error.errno or 5, source)
        raise
