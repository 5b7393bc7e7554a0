# SPDX-License-Identifier: Apache-2.0
"""What one open disk does about failed flushes: its own are told to all disks of this process on the same device, and theirs to it (R30).

Knows the engine and the devices below the disk; what moves it through its loop is told by whoever drives it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from fvd.device.failures import FAILURES, Failures, FlushFailure
from fvd.engine._engine import Engine

Post = Callable[[Callable[[], None]], None]


class FailureWatch:
    """Of one disk that is open for writing, on `devices()`, whatever those are when something fails. `close` ends it."""

    def __init__(
        self,
        name: str,
        engine: Engine,
        devices: Callable[[], frozenset[int]],
        *,
        failures: Failures = FAILURES,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.failure: FlushFailure | None = None  # the one that is sticky; set in the loop's thread
        self._name = name
        self._engine = engine
        self._devices = devices
        self._failures = failures
        self._clock = clock
        self._reported = False  # to the others
        self._told = False  # to whoever drives the disk
        self._lock = threading.Lock()  # of the two below
        self._post: Post | None = None
        self._early: list[FlushFailure] = []
        self._listener = failures.listen(devices, self._hear)

    def attach(self, post: Post) -> None:
        """The loop runs: `post(work)` has its thread do `work` soon, and does not wait. In that thread."""
        with self._lock:
            self._post = post
            early, self._early = self._early, []
        for failure in early:
            self._take(failure)

    def noticed(self) -> bool:
        """The engine says that something has failed. Whether that is news. In the loop's thread."""
        engine = self._engine
        own: FlushFailure | None = None
        if engine.flush_failed_errno and not self._reported:
            self._reported = True
            own = self._failures.report(self._devices(), engine.flush_failed_errno, self._name, but=self._listener)
        if self._told or not engine.failed_errno:
            return False
        self._told = True
        # A map that could not be written is nobody else's business.
        self.failure = self.failure or own or FlushFailure(engine.failed_errno, self._clock(), self._name)
        return True

    def close(self) -> None:
        """Hears no more. Again is fine."""
        self._listener.close()

    def _hear(self, failure: FlushFailure) -> None:
        """From any thread."""
        with self._lock:
            post = self._post
            if post is None:
                self._early.append(failure)
        if post is not None:
            post(lambda: self._take(failure))

    def _take(self, failure: FlushFailure) -> None:
        if self.failure is None and not self._engine.failed_errno:
            self.failure = failure
        self._engine.note_failed_flush(failure.errno)
