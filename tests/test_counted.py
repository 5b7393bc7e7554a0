# SPDX-License-Identifier: Apache-2.0
"""Messages whose rate somebody else decides: a handful of lines, then a count."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

from fvd import counted
from fvd.counted import Counted

pytestmark = pytest.mark.pure


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def notes(clock: Clock) -> Iterator[Counted]:
    yield Counted(logging.getLogger("counted"), first=3, every_seconds=60, clock=clock)


def test_the_first_are_told_and_the_rest_counted(notes: Counted, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    for i in range(10_000):
        notes.warning("refused", f"refused %s {i}")
    assert caplog.messages == ["refused %s 0", "refused %s 1", "refused %s 2"]
    notes.say_due()
    assert len(caplog.messages) == 3
    clock.now += 60
    counted.say_due()  # of all there are
    assert caplog.messages[3:] == ["refused %s 9999 (one of 9,997 more like it in 60 s)"]
    assert caplog.records[-1].levelname == "WARNING"


def test_a_flood_that_goes_on_is_one_line_a_minute(notes: Counted, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    for second in range(600):
        clock.now = 1000.0 + second
        for _ in range(100):
            notes.error("io", "it failed")
    assert len(caplog.messages) == 3 + 9
    assert caplog.messages[-1] == "it failed (one of 6,000 more like it in 60 s)"


def test_after_a_quiet_while_lines_are_told_again(notes: Counted, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(5):
        notes.warning("a", "one")
    clock.now += 61
    notes.say_due()
    clock.now += 61
    notes.warning("a", "two")
    assert caplog.messages == ["one", "one", "one", "one (one of 2 more like it in 61 s)", "two"]


def test_what_comes_seldom_is_always_told(notes: Counted, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    for i in range(20):
        notes.warning("a", f"{i}")
        clock.now += 30
    assert caplog.messages == [str(i) for i in range(20)]


def test_kinds_do_not_hide_each_other(notes: Counted, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(100):
        notes.warning("a", "a")
    notes.warning("b", "b")
    assert caplog.messages == ["a", "a", "a", "b"]


def test_several_at_once_and_none(notes: Counted, caplog: pytest.LogCaptureFixture) -> None:
    notes.warning("a", "a", times=0)
    assert not caplog.messages
    notes.warning("a", "a", times=50)
    notes.say_due(all_of_it=True)
    assert caplog.messages == ["a", "a (one of 49 more like it in 0 s)"]


def test_what_nobody_listens_to_is_not_counted(notes: Counted, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("counted").setLevel(logging.WARNING)
    try:
        for _ in range(100):
            notes.info("a", "a")
        clock.now += 100
        notes.say_due()
    finally:
        logging.getLogger("counted").setLevel(logging.NOTSET)
    assert not caplog.messages


def test_a_child_tells_nothing(notes: Counted, caplog: pytest.LogCaptureFixture) -> None:
    """What was counted is its parent's to tell. Another thread may have held the lock when it forked."""
    for _ in range(10):
        notes.warning("a", "a")
    with notes._lock:
        child = os.fork()
        if child == 0:
            counted._say_all()
            os._exit(len(caplog.messages))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
