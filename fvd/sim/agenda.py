# SPDX-License-Identifier: Apache-2.0
"""What is to happen at a time of the device's clock, and the threads of production code without threads. Knows nothing of what happens.

Work that would run in a thread is run again from its beginning each time that something it waited for has come: what it was told before it
is told again, and what it posted before is not posted twice. So one seed decides all of it.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from fvd.errors import FvdError

T = TypeVar("T")
NEVER = 1 << 62
SECOND_NS = 1_000_000_000
TIMER_NS_MIN = 1000


class Entry:
    """One thing that is to happen. A timer, for whoever needs one."""

    def __init__(self, when_ns: int, call: Callable[[], None], outside: bool) -> None:
        self.when_ns, self.call, self.outside = when_ns, call, outside
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Agenda:
    """Calls at their times, and before them what was posted, in its order. `changed` is told when the next of them comes."""

    def __init__(self, now_ns: Callable[[], int], changed: Callable[[int], None]) -> None:
        self._now_ns, self._changed = now_ns, changed
        self._heap: list[tuple[int, int, Entry]] = []
        self._number = 0
        self._posted: deque[Callable[[], None]] = deque()

    def later(self, seconds: float, call: Callable[[], None], *, outside: bool = False) -> Entry:
        """`outside`: it happens whether or not the process lives."""
        # Never at once: seconds are no integers, and who asks again a moment too early would ask for ever.
        entry = Entry(self._now_ns() + max(TIMER_NS_MIN, round(seconds * SECOND_NS)), call, outside)
        self._number += 1
        heapq.heappush(self._heap, (entry.when_ns, self._number, entry))
        self._changed(self.next_ns)
        return entry

    def post(self, call: Callable[[], None]) -> None:
        self._posted.append(call)
        self._changed(0)

    @property
    def next_ns(self) -> int:
        """When there is something to do; NEVER: nothing is planned."""
        if self._posted:
            return 0
        while self._heap and self._heap[0][2].cancelled:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else NEVER

    def run_next(self) -> None:
        """The next of what is due, if anything is."""
        if self._posted:
            self._posted.popleft()()
        elif self.next_ns <= self._now_ns():
            heapq.heappop(self._heap)[2].call()
        self._changed(self.next_ns)

    def end_process(self, keep: Callable[[], bool]) -> None:
        """What the process had planned does not happen; of what is outside of it, whatever `keep` says."""
        self._posted.clear()
        kept = [item for item in self._heap if item[2].outside and not item[2].cancelled and keep()]
        self._heap = kept
        heapq.heapify(self._heap)
        self._changed(self.next_ns)


class _Waits(BaseException):
    """Leaves work that must wait. No Exception: whoever catches those would take it for a failure."""


class _Work:
    def __init__(self, call: Callable[[], None]) -> None:
        self.call = call
        self.answers: list[Callable[[], object]] = []
        self.at = 0  # answers that this run has used
        self.posts = 0  # of this run
        self.posted = 0  # that have gone out
        self.waiting: Entry | None = None
        self.outcome: Callable[[], object] | None = None


class Workers:
    """An executor. What its work waits for is said by `wait`, called from within the work."""

    def __init__(self, agenda: Agenda) -> None:
        self._agenda = agenda
        self._running: _Work | None = None
        self._waiting: list[_Work] = []

    def execute(self, call: Callable[[], None]) -> None:
        self._run(_Work(call))

    def post(self, call: Callable[[], None]) -> None:
        """The agenda's, for calls from work and from elsewhere."""
        work = self._running
        if work is not None:
            work.posts += 1
            if work.posts <= work.posted:
                return
            work.posted += 1
        self._agenda.post(call)

    def wait(self, begin: Callable[[], tuple[float | None, Callable[[], T]]]) -> T:
        """Called by what the work calls. `begin()` says after how long the answer comes (None: not before `hurry`), and what it is: a call
        made then, which may raise."""
        work = self._running
        if work is None:
            raise AssertionError("nobody is at work")
        if work.at == len(work.answers):
            seconds, outcome = begin()
            if seconds != 0:
                work.outcome = outcome
                self._waiting.append(work)
                if seconds is not None:
                    work.waiting = self._agenda.later(seconds, lambda: self._come(work))
                raise _Waits
            work.answers.append(_answer(outcome))
        work.at += 1
        return work.answers[work.at - 1]()  # type: ignore[return-value]

    def hurry(self, seconds: Callable[[], float]) -> None:
        """Whatever is waited for comes after so long."""
        for work in self._waiting:
            if work.waiting is not None:
                work.waiting.cancel()
            work.waiting = self._agenda.later(seconds(), lambda work=work: self._come(work))  # type: ignore[misc]

    def finish(self) -> None:
        """All that is waited for comes now, and all work ends."""
        while self._waiting:
            self._come(self._waiting[0])

    def end_process(self) -> None:
        self._waiting.clear()

    def _come(self, work: _Work) -> None:
        self._waiting.remove(work)
        outcome, work.outcome, work.waiting = work.outcome, None, None
        if outcome is None:
            raise AssertionError("work that waits for nothing")
        work.answers.append(_answer(outcome))
        self._run(work)

    def _run(self, work: _Work) -> None:
        before, self._running = self._running, work
        work.at = work.posts = 0
        try:
            work.call()
        except _Waits:
            pass
        finally:
            self._running = before


def _answer(outcome: Callable[[], object]) -> Callable[[], object]:
    """What a call came to, to be told again and again."""
    try:
        value = outcome()
    except FvdError as error:
        failure = error  # the name of the clause ends with it

        def fail() -> object:
            raise failure

        return fail
    return lambda: value
