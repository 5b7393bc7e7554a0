# SPDX-License-Identifier: Apache-2.0
"""The engine is one extension of many parts: the head of each .pxi says what it offers to the others and what it needs of them.

Held to the source: a function that another part calls and no head lists fails here, and so does one that is listed and not called.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

pytestmark = [pytest.mark.pure, pytest.mark.release_only]
ENGINE = Path(__file__).resolve().parents[2] / "fvd/engine"
MODULE = (ENGINE / "_engine.pyx").read_text()
PARTS = re.findall(r'^include "(\w+)\.pxi"$', MODULE, re.MULTILINE)
# A function that begins in the first column: `cdef inline Change *change_find(ChangeSet *changed, ...`.
DEFINED = re.compile(r"^cdef (?:inline )?[\w ]+?[ *]+(\w+)\(", re.MULTILINE)


@cache
def source(part: str) -> str:
    return MODULE if part == "_engine" else (ENGINE / f"{part}.pxi").read_text()


def code(part: str) -> str:
    """Without what is between three quotes, and without comments."""
    text = re.sub(r'"""(?:.|\n)*?"""', "", source(part))
    return re.sub(r"#.*", "", text)


@cache
def defined(part: str) -> frozenset[str]:
    return frozenset(DEFINED.findall(code(part)))


@cache
def owners() -> dict[str, str]:
    return {name: part for part in PARTS for name in defined(part)}


def needed(part: str) -> dict[str, set[str]]:
    """The functions that a part calls of others, by the part that has them."""
    found: dict[str, set[str]] = {}
    for name in re.findall(r"(?<![\w.])(\w+)\(", code(part)):
        owner = owners().get(name, part)
        if owner != part:
            found.setdefault(owner, set()).add(name)
    return found


def offered(part: str) -> set[str]:
    """The functions of a part that others call."""
    return set().union(*(needed(other).get(part, set()) for other in ("_engine", *PARTS)))


def head(part: str, word: str) -> str:
    """What follows `# Offers:` or `# Needs:`, up to the next line that goes on with nothing."""
    match = re.search(rf"^# {word}: (.*\n(?:#   .*\n)*)", source(part), re.MULTILINE)
    assert match, f"{part}.pxi does not say what it {word.lower()}"
    return " ".join(match[1].replace("#   ", "").split())


def test_all_parts_are_here() -> None:
    assert len(PARTS) > 10 and set(PARTS) == {path.stem for path in ENGINE.glob("*.pxi")}
    assert sum(len(defined(part)) for part in PARTS) == len(owners()) > 100, "two parts have a function of one name"


@pytest.mark.parametrize("part", PARTS)
def test_a_part_offers_what_its_head_says(part: str) -> None:
    said = head(part, "Offers").split(", ")
    assert said == sorted(offered(part))


@pytest.mark.parametrize("part", PARTS)
def test_a_part_needs_what_its_head_says(part: str) -> None:
    said = head(part, "Needs")
    found = "; ".join(f"{other}: {', '.join(sorted(names))}" for other, names in sorted(needed(part).items()))
    assert said == (found or "nothing")


def test_a_call_is_seen_and_a_word_in_a_comment_is_not() -> None:
    assert "out_of_memory" in needed("changes")["memory"]
    assert "note_change" in defined("changes") and "change_find" in defined("changes")
    assert "this" not in defined("memory")
