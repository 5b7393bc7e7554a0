# SPDX-License-Identifier: Apache-2.0
"""Messages whose rate somebody else decides (a client, another server, whoever can connect): counted, not repeated.

Of each kind the first FIRST are logged as they are. Further ones are counted, and told once in EVERY_SECONDS: the last of them, and how
many there were. So a kind costs a handful of lines and then one a minute, whatever a stranger does. Kinds are the caller's, and few. May
be used from any thread. Nothing here waits: a count is told by the next message of its kind, or by whoever calls say_due() from time to
time; at exit.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from weakref import WeakSet

FIRST = 5
EVERY_SECONDS = 60.0


@dataclass
class _Kind:
    began: float
    left: int  # lines in this period
    level: int = 0
    last: str = ""
    counted: int = 0


class Counted:
    """Stands before a logger. A message is a text with nothing to fill in; `kind` tells what it is, whatever is quoted in it."""

    def __init__(
        self, log: logging.Logger, *, first: int = FIRST, every_seconds: float = EVERY_SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._log = log
        self._first = first
        self._every_seconds = every_seconds
        self._clock = clock
        self._kinds: dict[Hashable, _Kind] = {}
        self._lock = threading.Lock()
        _ALL.add(self)

    def error(self, kind: Hashable, message: str, *, times: int = 1) -> None:
        self._count(logging.ERROR, kind, message, times)

    def warning(self, kind: Hashable, message: str, *, times: int = 1) -> None:
        self._count(logging.WARNING, kind, message, times)

    def info(self, kind: Hashable, message: str, *, times: int = 1) -> None:
        self._count(logging.INFO, kind, message, times)

    def _count(self, level: int, kind: Hashable, message: str, times: int) -> None:
        """It has happened so many times."""
        if times <= 0 or not self._log.isEnabledFor(level):
            return
        now = self._clock()
        lines = []
        with self._lock:
            it = self._kinds.get(kind)
            if it is None:
                it = self._kinds[kind] = _Kind(now, self._first)
            elif now - it.began >= self._every_seconds:
                lines = self._turn(it, now)
            if it.counted == 0 and it.left > 0:
                it.left -= 1
                times -= 1
                lines.append((level, message))
            if times:
                it.level, it.last = level, message
                it.counted += times
        self._write(lines)

    def say_due(self, *, all_of_it: bool = False) -> None:
        """Tell the counts of periods that have ended."""
        if not self._kinds:
            return
        now = self._clock()
        lines = []
        with self._lock:
            for it in self._kinds.values():
                if it.counted and (all_of_it or now - it.began >= self._every_seconds):
                    lines += self._turn(it, now)
        self._write(lines)

    def _turn(self, it: _Kind, now: float) -> list[tuple[int, str]]:
        """A new period. One that follows a flood has no lines of its own but the count at its end."""
        lines = []
        it.left = self._first
        if it.counted:
            lines.append((it.level, f"{it.last} (one of {it.counted:,} more like it in {now - it.began:.0f} s)"))
            it.left = 0
        it.began = now
        it.counted = 0
        return lines

    def _write(self, lines: list[tuple[int, str]]) -> None:
        for level, line in lines:
            self._log.log(level, "%s", line)


_ALL: WeakSet[Counted] = WeakSet()


def say_due() -> None:
    """Of every Counted in this process."""
    for one in list(_ALL):
        one.say_due()


def _say_all() -> None:
    for one in list(_ALL):
        one.say_due(all_of_it=True)


atexit.register(_say_all)
os.register_at_fork(after_in_child=_ALL.clear)  # what was counted is the parent's to tell; a lock may have been held just then
