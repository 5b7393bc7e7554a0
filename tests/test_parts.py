# SPDX-License-Identifier: Apache-2.0
"""A compiled module of many parts: the head of each .pxi says what it offers to the others and what it needs of them.

Held to the source: a function that another part calls and no head lists fails here, and so does one that is listed and not called.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

pytestmark = [pytest.mark.pure, pytest.mark.release_only]
ROOT = Path(__file__).resolve().parent.parent
MODULES = {name: ROOT / f"fvd/{name}.pyx" for name in ("engine/_engine", "export/_server")}  # whose parts are functions
# A function that begins in the first column: `cdef inline Change *change_find(ChangeSet *changed, ...`.
DEFINED = re.compile(r"^cdef (?:inline )?[\w ]+?[ *]+(\w+)\(", re.MULTILINE)


def parts_of(module: str) -> list[str]:
    return re.findall(r'^include "(\w+)\.pxi"$', MODULES[module].read_text(), re.MULTILINE)


EACH = [(module, part) for module in MODULES for part in parts_of(module)]
each_part = pytest.mark.parametrize(("module", "part"), EACH, ids=[f"{module}:{part}" for module, part in EACH])


@cache
def source(module: str, part: str) -> str:
    return (MODULES[module] if part == MODULES[module].stem else MODULES[module].with_name(f"{part}.pxi")).read_text()


def code(module: str, part: str) -> str:
    """Without what is between three quotes, and without comments."""
    text = re.sub(r'"""(?:.|\n)*?"""', "", source(module, part))
    return re.sub(r"#.*", "", text)


@cache
def defined(module: str, part: str) -> frozenset[str]:
    return frozenset(DEFINED.findall(code(module, part)))


@cache
def owners(module: str) -> dict[str, str]:
    return {name: part for part in parts_of(module) for name in defined(module, part)}


@cache
def needed(module: str, part: str) -> dict[str, set[str]]:
    """The functions that a part calls of others, by the part that has them."""
    calls: dict[str, set[str]] = {}
    for name in re.findall(r"(?<![\w.])(\w+)\(", code(module, part)):
        owner = owners(module).get(name, part)
        if owner != part:
            calls.setdefault(owner, set()).add(name)
    return calls


def offered(module: str, part: str) -> set[str]:
    """The functions of a part that others call."""
    return set().union(*(needed(module, other).get(part, set()) for other in (MODULES[module].stem, *parts_of(module))))


def head(text: str, word: str) -> str:
    """What follows `# Offers:` or `# Needs:`, up to the next line that goes on with nothing."""
    match = re.search(rf"^# {word}: (.*\n(?:#   .*\n)*)", text, re.MULTILINE)
    assert match, f"no line says what it {word.lower()}"
    return " ".join(match[1].replace("#   ", "").split())


@pytest.mark.parametrize("module", MODULES)
def test_all_parts_are_here(module: str) -> None:
    parts = parts_of(module)
    assert len(parts) > 5 and set(parts) == {path.stem for path in MODULES[module].parent.glob("*.pxi")}
    assert sum(len(defined(module, part)) for part in parts) == len(owners(module)) > 30, "two parts have a function of one name"


@each_part
def test_a_part_offers_what_its_head_says(module: str, part: str) -> None:
    assert head(source(module, part), "Offers").split(", ") == sorted(offered(module, part))


@each_part
def test_a_part_needs_what_its_head_says(module: str, part: str) -> None:
    calls = "; ".join(f"{other}: {', '.join(sorted(names))}" for other, names in sorted(needed(module, part).items()))
    assert head(source(module, part), "Needs") == (calls or "nothing")


def test_a_part_of_any_module_has_a_head() -> None:
    """Of modules with a part or two: what it offers is there, and the module that includes it names it."""
    for path in sorted((ROOT / "fvd").rglob("*.pxi")):
        if any(path.parent == module.parent for module in MODULES.values()):
            continue
        text = path.read_text()
        assert head(text, "Needs"), path
        whole = "".join(other.read_text() for other in path.parent.iterdir() if other != path and other.suffix in (".pyx", ".pxi", ".pxd"))
        for name in head(text, "Offers").split(", "):
            assert re.search(rf"^(?:cdef|cpdef|def|    [a-z]\w+) .*\b{name}\b", text, re.MULTILINE), (path, name)
            assert re.search(rf"\b{name}\b", whole), (path, name)


def test_a_call_is_seen_and_a_word_in_a_comment_is_not() -> None:
    engine = "engine/_engine"
    assert "out_of_memory" in needed(engine, "changes")["memory"]
    assert "note_change" in defined(engine, "changes") and "change_find" in defined(engine, "changes")
    assert "this" not in defined(engine, "memory")
