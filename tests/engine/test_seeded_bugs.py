"""Each rule of docs/durability.md, taken away: the tester must notice. A tester that misses one is broken.

The bugs exist in the checked build only, which `make test` builds and tests too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from scenarios import DIRECTED

from fvd.engine import _engine
from fvd.sim.world import run

BUGS = range(1, 18)
WORLDS = 300

needs_bugs = pytest.mark.skipif(not _engine.SEEDED_BUGS, reason="a release build contains no seeded bugs; the checked build runs this")


@pytest.fixture
def seeded() -> Iterator[None]:
    yield
    _engine.seed_bug(0)


@needs_bugs
@pytest.mark.parametrize("bug", BUGS)
def test_bug_is_found(bug: int, seeded: None) -> None:
    _engine.seed_bug(bug)
    if bug in DIRECTED:
        with pytest.raises(Exception, match=r"sector|journal|maps|flush"):
            DIRECTED[bug]()
        return
    for seed in range(10_000, 10_000 + WORLDS):
        try:
            run(seed)
        except Exception:
            return
    pytest.fail(f"seeded bug {bug} went unnoticed in {WORLDS} worlds")


@needs_bugs
def test_without_a_bug_nothing_is_found(seeded: None) -> None:
    _engine.seed_bug(0)
    for seed in range(10_000, 10_030):
        run(seed)


def test_every_rule_names_its_bugs() -> None:
    text = (Path(__file__).parents[2] / "docs/durability.md").read_text()
    rows = re.findall(r"^\| R\d+ \|.*\| ([\d, ]+) \|$", text, re.MULTILINE)
    named = sorted(int(number) for row in rows for number in row.split(","))
    assert named == list(BUGS)


def test_release_has_no_bugs() -> None:
    if _engine.SEEDED_BUGS:
        _engine.seed_bug(0)
    else:
        with pytest.raises(RuntimeError, match="no seeded bugs"):
            _engine.seed_bug(1)
