# SPDX-License-Identifier: Apache-2.0
"""What the drawing of changes to the engine promises, and, in the long run, the hunt for them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from draw import FIRST_NUMBER, KINDS, Mutant, apply, candidates, changes, draw
from equivalent import EQUIVALENT
from hunt import COUNT, ROOT, SEED

from fvd.engine import _engine


def drawn_of(line: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for kind, _, after, _ in changes(line):
        found.setdefault(kind, []).append(after)
    return found


@pytest.mark.pure
def test_a_branch_loses_each_operand_and_is_negated() -> None:
    found = drawn_of("    if a and (b or c) and d < e:")
    assert found == {
        "negated": ["if not (a and (b or c) and d < e):"],
        "operand": ["if (b or c) and d < e:", "if a and d < e:", "if a and (b or c):"],
        "comparison": ["if a and (b or c) and d <= e:"],
    }


@pytest.mark.pure
def test_statements_are_removed_and_numbers_are_off_by_one() -> None:
    assert drawn_of("e.reserved_bytes += need") == {"removed assignment": ["pass"]}
    assert drawn_of("commit_maybe(e)") == {"removed call": ["pass"]}
    assert drawn_of("return wait_for(r, &b.waiters)") == {"removed wait": ["pass"]}
    assert drawn_of("end = min(stop, limit)") == {"off by one": ["end = (min(stop, limit)) + 1"], "swapped": ["end = max(stop, limit)"]}
    assert drawn_of("return True") == {"flipped": ["return False"]}


@pytest.mark.pure
def test_a_line_holds_both_versions() -> None:
    (both,) = [switched for kind, _, _, switched in changes("        if a or b:") if kind == "negated"]
    assert both == "        if (not (a or b)) == BUG({n}):"


@pytest.mark.pure
def test_what_is_drawn_depends_on_no_line_number(tmp_path: Path) -> None:
    copy = tmp_path / "fvd/engine"
    copy.mkdir(parents=True)
    for path in (ROOT / "fvd/engine").glob("*.p[yx][xi]"):
        text = path.read_text()
        # Another line above everything.
        (copy / path.name).write_text("# Moved.\n" + text if path.suffix == ".pxi" else text)
    before, after = draw(ROOT, SEED, COUNT), draw(tmp_path, SEED, COUNT)
    assert [mutant.key for mutant in before] == [mutant.key for mutant in after]
    assert [mutant.number for mutant in before] == list(range(FIRST_NUMBER, FIRST_NUMBER + COUNT))
    assert {mutant.kind for mutant in before} == set(KINDS)


@pytest.mark.pure
def test_only_the_drawn_lines_are_rewritten(tmp_path: Path) -> None:
    (tmp_path / "fvd/engine").mkdir(parents=True)
    path = tmp_path / "fvd/engine/some.pxi"
    path.write_text("cdef int f(Engine e) except -1 nogil:\n    if (a\n            or b):     # why\n        g(e)\n    return 0\n")
    (mutant,) = [mutant for mutant in candidates(tmp_path) if mutant.kind == "negated"]
    assert (mutant.line, mutant.function) == (2, "f")
    apply(tmp_path, [Mutant(1000, mutant.file, 2, "f", "negated", "", "", mutant.switched.replace("{n}", "1000"))])
    lines = path.read_text().split("\n")
    assert lines[1:] == ["    if (not (a or b)) == BUG(1000):", "", "        g(e)", "    return 0", ""]


@pytest.mark.pure
def test_nothing_is_drawn_of_a_seeded_bug(tmp_path: Path) -> None:
    (tmp_path / "fvd/engine").mkdir(parents=True)
    head = "cdef int f(Engine e) except -1 nogil:"
    lines = [head, "    if BUG(Bug.ONE):", "        g(e)", "    if not BUG(Bug.TWO):", "        h(e)", "    k(e)", ""]
    text = "\n".join(lines)
    (tmp_path / "fvd/engine/some.pxi").write_text(text)
    assert [mutant.before for mutant in candidates(tmp_path)] == ["h(e)", "k(e)"]


@pytest.mark.pure
def test_what_is_called_equivalent_is_still_there() -> None:
    """An argument about a line that is gone or was changed is none."""
    assert set(EQUIVALENT) <= {mutant.key for mutant in candidates(ROOT)}


@pytest.mark.long
@pytest.mark.skipif(not _engine.SEEDED_BUGS, reason="the drawn changes are compiled like seeded bugs: the checked build runs this")
def test_every_drawn_change_is_found() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "tests/mutants/hunt.py")], capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
