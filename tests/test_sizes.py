# SPDX-License-Identifier: Apache-2.0
"""A ratchet: no source above 800 lines, no function above 70. What is longer still is listed with its length, which may only shrink."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILE_LINES_MAX = 800
FUNCTION_LINES_MAX = 70
CYTHON = (".pyx", ".pxi", ".pxd")

# Longer than allowed, and not split yet: file, or file and function, with its lines. Split one and take its row away; never add one.
STILL_LONGER: dict[str, int] = {}

pytestmark = [pytest.mark.release_only, pytest.mark.pure]


def python_functions(text: str) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


def cython_functions(text: str) -> Iterator[tuple[str, int]]:
    """By indentation: a function ends before the first line that is no deeper than its own, blank ones and those of its head left out."""
    lines = text.splitlines()
    for first, line in enumerate(lines):
        found = re.match(r"( *)(?:cdef|cpdef|def) (?!class |struct |enum |union |extern |packed )(?:[^=(]*[ *])?(\w+)\(", line)
        if found is None:
            continue
        indent, name = len(found[1]), found[2]
        last = end_of_head(lines, first)
        if not lines[last].partition("#")[0].rstrip().endswith(":"):
            continue  # declared here, defined elsewhere
        for number in range(last + 1, len(lines)):
            text_of_line = lines[number].lstrip()
            if text_of_line and len(lines[number]) - len(text_of_line) <= indent:
                break
            if text_of_line:
                last = number
        yield name, last - first + 1


def end_of_head(lines: list[str], first: int) -> int:
    """Where the parentheses of a function's arguments are closed."""
    depth = 0
    for number in range(first, len(lines)):
        depth += lines[number].count("(") - lines[number].count(")")
        if depth <= 0:
            return number
    raise AssertionError(f"no end of {lines[first]!r}")


@functools.cache
def measured() -> dict[str, tuple[int, int]]:
    """Of each source and each function in it: its lines, and how many it may have."""
    sizes: dict[str, tuple[int, int]] = {}
    for name in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        path = ROOT / name
        if not (path.suffix in (".py", *CYTHON) or (name.startswith("scripts/") and path.suffix == "")) or not path.is_file():
            continue
        text = path.read_text()
        sizes[name] = (text.count("\n"), FILE_LINES_MAX)
        if path.suffix in CYTHON:
            functions = cython_functions(text)
        elif path.suffix == ".py" or "python" in text.partition("\n")[0]:
            functions = python_functions(text)
        else:
            continue  # of the shell
        for function, lines in functions:
            key = f"{name} {function}"
            sizes[key] = max(sizes.get(key, (0, 0)), (lines, FUNCTION_LINES_MAX))
    return sizes


def test_sources_and_functions_are_short() -> None:
    sizes = measured()
    assert len(sizes) > 1000
    longer = {key: lines for key, (lines, most) in sizes.items() if lines > max(most, STILL_LONGER.get(key, 0))}
    assert longer == {}, f"files have at most {FILE_LINES_MAX} lines, functions {FUNCTION_LINES_MAX}: split these by what happens in them"


def test_what_has_been_split_is_an_exception_no_longer() -> None:
    sizes = measured()
    done = [key for key in STILL_LONGER if key not in sizes or sizes[key][0] <= sizes[key][1]]
    assert done == [], "take these out of STILL_LONGER"


def test_the_measure_sees_functions_of_cython() -> None:
    text = '''\
cdef class Loop:
    cdef int turn(self, Engine e,
                  int limit) except -1:
        """One turn."""
        if limit:

            return 1

    cdef int declared(self)

cdef inline uint64_t *after(uint64_t x) noexcept nogil: # short
    return x
'''
    assert list(cython_functions(text)) == [("turn", 6), ("after", 2)]
