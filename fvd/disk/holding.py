# SPDX-License-Identifier: Apache-2.0
"""What one open disk does when what it lies on is not its own any more: somebody has shrunk or remapped it. The disk stops, at once (R39).

Knows the engine and that there is ground below it; whoever drives the disk says how its clients are let go.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from fvd.engine._engine import Engine
from fvd.storage.interfaces import Ground
from fvd.storage.policy import GrowthEvent

log = logging.getLogger(__name__)

Post = Callable[[Callable[[], None]], None]


class Holding:
    """Of one open disk, on `ground`. `look` may be called from any thread; the rest happens in the loop's."""

    def __init__(self, name: str, engine: Engine, ground: Ground, on_event: Callable[[GrowthEvent], None] | None) -> None:
        self.stopped = ""  # why; empty: it has not
        self.look = ground.look
        self._name = name
        self._engine = engine
        self._on_event = on_event
        self._let_go: Callable[[], None] = lambda: None
        self._lock = threading.Lock()  # of the two below
        self._post: Post | None = None
        self._early: str = ""

    def attach(self, post: Post, let_go: Callable[[], None] = lambda: None) -> None:
        """The loop runs: `post(work)` has its thread do `work` soon. `let_go()` ends every conversation about the disk, before it is told
        that it has stopped. In the loop's thread."""
        with self._lock:
            self._post, self._let_go = post, let_go
            early = self._early
        if early:
            self._stop(early)

    def moved(self, why: str) -> None:
        """From any thread: what the disk lies on is not what it was."""
        with self._lock:
            post = self._post
            self._early = self._early or why
        if post is not None:
            post(lambda: self._stop(why))

    def _stop(self, why: str) -> None:
        if self.stopped:
            return
        self.stopped = (
            f"{why}. The disk has stopped: nothing of it is read, written or answered any more. Close it, and restore it from a backup, or "
            "put the volume back as it was and check the guest's data"
        )
        log.error("%s: %s", self._name, self.stopped)
        self._engine.stop()
        self._let_go()
        if self._on_event is not None:
            self._on_event(GrowthEvent("storage_error", self._engine.storage_size_bytes, 0, message=self.stopped))
