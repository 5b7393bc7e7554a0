# SPDX-License-Identifier: Apache-2.0
"""No dead code: every function, method, class and constant of fvd is named somewhere but where it is defined, and not by tests alone.

By names, not by meaning: two things of one name hide each other. What Python calls by itself
(`__init__`) and what a decorator registers is used.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (".py", ".pyx", ".pxi", ".pxd", ".pyi")
DECLARATIONS = (".pxd", ".pyi")  # of what is defined elsewhere

# Named only by tests, and kept: why.
FOR_TESTS = {
    "crc32c_portable": "what a processor without the instruction does, compared with the other",
    "bitmap_find_last": "a kernel that only Cython calls, as tests reach it",
    "bitmap_none": "as above",
    "Transmission": "the translation of bytes to requests, fed whole and byte by byte; the server calls what it is made of",
    "simple_reply": "bytes of the server's answers, as tests compare them",
    "hole_reply": "as above",
    "error_reply": "as above",
    "status_reply": "as above",
    "data_reply": "as above",
    "error_of_errno": "as above",
    "thread_ended": "that no thread is left behind",
    "waits_for_clock": "what the engine tells its driver in Cython, as tests see it",
    "advance_clock": "time passes for an engine without a driver",
    "seed_bug": "puts a seeded bug in, in the checked build",
    "decode_bitmap": "the second half of what FORMAT.md says of cells, held against the golden images",
    "decode_table": "as above",
    "outage": "of the oracle over a real server: what tests do to that one",
    "shutting_down": "as above",
    "send_next": "as above",
    "free_depth": "as above",
    "SECTORS_PER_BLOCK": "of the stage that tests of the engine play on",
    "SECTORS_PER_CHUNK": "as above",
}
# Called by a class of Python's library that they override.
OVERRIDES = {"_check_value", "emptyline", "onecmd"}

pytestmark = [pytest.mark.release_only, pytest.mark.pure]


def sources() -> dict[str, str]:
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return {
        name: (ROOT / name).read_text()
        for name in names
        if (name.endswith(SOURCES) or name.startswith("scripts/")) and (ROOT / name).is_file() and name != "tests/test_dead_code.py"
    }


def defined_in_python(text: str) -> Iterator[str]:
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            known = {"property", "staticmethod", "classmethod", "contextmanager", "cache"}
            if all(ast.unparse(decorator).rpartition(".")[2] in known for decorator in node.decorator_list):
                yield node.name
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        yield from (target.id for target in targets if isinstance(target, ast.Name))


def defined_in_cython(text: str) -> Iterator[str]:
    pattern = r"^ *(?:cdef|cpdef|def) (?!struct |enum |union |extern |packed )(?:class +(\w+)|(?:[^=(\n]*[ *])?(\w+)\()"
    yield from (found[1] or found[2] for found in re.finditer(pattern, text, re.MULTILINE))


def unused(files: dict[str, str]) -> tuple[set[str], set[str]]:
    """The names that fvd defines and nobody uses, and those that only tests use."""
    named: defaultdict[str, Counter[str]] = defaultdict(Counter)
    definitions: Counter[str] = Counter()
    for path, text in files.items():
        if path.endswith(DECLARATIONS):
            continue
        where = path.partition("/")[0]
        for line in text.splitlines():
            for word in re.findall(r"[A-Za-z_]\w*", line if '"' in line else line.partition("#")[0]):
                named[word]["tests" if where == "tests" else "product"] += 1
        if where == "fvd":
            definitions.update(defined_in_python(text) if path.endswith(".py") else defined_in_cython(text))
    idle = {name for name, count in definitions.items() if not name.startswith("__") and named[name]["product"] <= count} - OVERRIDES
    by_tests = {name for name in idle if named[name]["tests"]}
    return idle - by_tests, by_tests


def test_everything_that_is_defined_is_used() -> None:
    nobodys, _ = unused(sources())
    assert nobodys == set(), "nothing names these but their definition: remove them"


def test_what_only_tests_use_is_there_for_a_reason() -> None:
    _, of_tests = unused(sources())
    assert of_tests - set(FOR_TESTS) == set(), "only tests name these: move them to the tests, or say in FOR_TESTS why they stay"


def test_dead_code_is_found() -> None:
    files = {
        "fvd/a.py": "LIMIT = 1\nUSED = 2\nclass A:\n    def run(self): return USED\n    def gone(self): pass\n",
        "fvd/c.py": "@command\ndef registered(): pass\n",
        "fvd/b.pyx": "from fvd.a import A\ncdef int kernel(int x) nogil:\n    return x\ndef call():\n    return A().run()\n",
        "tests/test_a.py": "from fvd.b import call\ncall()\n",
    }
    assert unused(files) == ({"LIMIT", "gone", "kernel"}, {"call"})
