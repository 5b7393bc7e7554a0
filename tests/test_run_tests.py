# SPDX-License-Identifier: Apache-2.0
"""`make test` itself: no test falls between its parts, and a part that fails, hangs or dies is told."""

from __future__ import annotations

import ast
import fnmatch
import importlib.machinery
import importlib.util
import itertools
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "run-tests"
# The name conftest is that of other folders' too: it is read, not imported.
[MARKERS] = (
    ast.literal_eval(statement.value)
    for statement in ast.parse((ROOT / "tests" / "conftest.py").read_text()).body
    if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "MARKERS"
)

pytestmark = pytest.mark.release_only


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """scripts/run-tests as a module, with its logs elsewhere: it may be what runs this test."""
    loader = importlib.machinery.SourceFileLoader("run_tests", str(SCRIPT))
    specification = importlib.util.spec_from_loader("run_tests", loader)
    assert specification is not None
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "run_tests", module)  # dataclasses look for it there
    loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(module, "TIMES", tmp_path / "times.json")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return module


# --- Which tests are in which part -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", ["release", "checked"])
def test_every_file_is_in_one_part(script: ModuleType, monkeypatch: pytest.MonkeyPatch, build: str) -> None:
    monkeypatch.setattr(script, "ROOT", ROOT)
    units = list(script.units(build))
    assert len({name for name, _ in units}) == len(units)
    arguments = [argument for _, arguments in units for argument in arguments]
    guests = sorted(argument for argument in arguments if "::" in argument)
    if guests:
        real = sorted(path.name for path in (ROOT / "tests/lvm/real").glob("test_*.py"))
        assert guests == [f"tests/lvm/test_real_lvm.py::test_on_a_real_machine[{name}]" for name in real]
    files = [argument for argument in arguments if "::" not in argument] + (["tests/lvm/test_real_lvm.py"] if guests else [])
    found = (path.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_*.py"))
    assert sorted(files) == sorted(str(path) for path in found if "real" not in path.parts)


def test_every_mark_has_its_run(script: ModuleType) -> None:
    """Whatever marks a test has, the long run has it, and CI's has it if it is not for the long one."""

    def chosen(marks: frozenset[str], long: bool) -> int:
        expressions = [script.MARKED[build, long] for build in ("release", "checked")]
        expressions += [expression.replace("not alone", "alone", 1) for expression in expressions]
        return sum(bool(eval(expression, {}, {name: name in marks for name in MARKERS})) for expression in expressions)

    for count in range(len(MARKERS) + 1):
        for names in itertools.combinations(MARKERS, count):
            marks = frozenset(names)
            nowhere = "checked_once" in marks and marks & {"slow", "release_only", "pure"}  # tests/conftest.py takes no such test
            assert chosen(marks, True)
            assert bool(chosen(marks, False)) == ("long" not in marks and not nowhere), marks
    assert chosen(frozenset(), False) == 2
    assert {name for expression in script.MARKED.values() for name in expression.split()} - {"not", "and"} == set(MARKERS)


def test_the_document_has_every_mark_and_every_figure(script: ModuleType) -> None:
    text = (ROOT / "docs" / "internals" / "testing.md").read_text()
    assert all(f"\n| `{name}` |" in text for name in MARKERS)
    assert all(f"`{name}`" in text for name in script.PLAYS)


# --- Running -----------------------------------------------------------------------------------------------------------------------


def test_a_failure_is_told_and_nothing_is_built_on_it(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [
        script.Part("build", ["sh", "-c", "echo broken; exit 3"]),
        script.Part("tests", ["sh", "-c", "echo not to be seen"], needs=("build",)),
        script.Part("others", ["sh", "-c", "echo fine"]),
    ]
    ended = script.Runner(parts, 2, 60).run()
    assert {each.part.name: each.code for each in ended} == {"build": 3, "tests": 1, "others": 0}
    assert not script.sum_up(ended, 1.0)
    output = capsys.readouterr().out
    assert "broken" in output and "fine" in output and "not to be seen" not in output
    assert "tests: not run, for want of build" in output
    assert output.splitlines()[-1] == "=== 2 failed in 1.00s (0:00:01) ==="


def test_a_part_that_hangs_is_ended_and_says_where(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test_it.py").write_text("import time\n\ndef test_of_patience():\n    time.sleep(1000)\n")
    parts = [script.Part("hangs", [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py"], pytest=True)]
    [ended] = script.Runner(parts, 1, 4).run()
    output = capsys.readouterr().out
    assert ended.code and not ended.good and "FAILED, ended after 4 s" in output
    assert "time.sleep(1000)" in output or "KeyboardInterrupt" in output


def test_what_hears_no_interrupt_is_killed(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "INTERRUPT_SECONDS", 0.5)
    began = time.monotonic()
    [ended] = script.Runner([script.Part("deaf", ["sh", "-c", "trap '' INT; sleep 1000 & wait; sleep 1000"])], 1, 1).run()
    assert ended.code < 0 and time.monotonic() - began < 30


def test_alone_is_alone_and_others_are_beside_each_other(script: ModuleType, tmp_path: Path) -> None:
    def part(name: str, alone: bool) -> object:
        words = f"echo {name} begins >> order; sleep 1; echo {name} ends >> order"
        return script.Part(name, ["sh", "-c", f"cd {tmp_path} && {{ {words}; }}"], alone=alone)

    script.Runner([part("a", True), part("b", False), part("c", False), part("d", True)], 2, 60).run()
    lines = [line.split() for line in (tmp_path / "order").read_text().splitlines()]
    assert [what for _, what in lines] == ["begins", "begins", "ends", "ends", "begins", "ends", "begins", "ends"]
    assert {name for name, _ in lines[:4]} == {"b", "c"}


def test_pytests_are_summed_up(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test_one.py").write_text("import pytest\n\ndef test_a(tmp_path): pass\n\ndef test_b(): pytest.skip('why not')\n")
    (tmp_path / "test_two.py").write_text("def test_c(): assert 1 == 2\n")
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    good = script.Part("good", [*words, "test_one.py"], pytest=True)
    none = script.Part("none", [*words, "-k", "nothing", "test_one.py"], pytest=True)
    bad = script.Part("bad", [*words, "test_two.py"], pytest=True)
    assert script.sum_up(script.Runner([good, none], 2, 60).run(), 75.5)
    assert capsys.readouterr().out.splitlines()[-1] == "=== 1 passed, 1 skipped in 75.50s (0:01:15) ==="
    assert not script.sum_up(script.Runner([good, none, bad], 2, 60).run(), 3.0)
    output = capsys.readouterr().out
    assert output.splitlines()[-1] == "=== 1 failed, 1 passed, 1 skipped in 3.00s (0:00:03) ==="
    assert "FAILED test_two.py::test_c" in output.partition("=== What failed")[2]
    assert not script.sum_up(script.Runner([none], 1, 60).run(), 1.0), "a run without a test is no success"


def test_what_was_asked_for_must_be_there() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--only", "no such *"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no part is called no such *" in done.stderr
    listed = subprocess.run([sys.executable, str(SCRIPT), "--list"], capture_output=True, text=True, check=True).stdout
    assert "checked engine" in listed and "release alone" in listed and "build fuzz" in listed


def test_a_quick_run_has_the_folders_and_nothing_slow(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "ROOT", ROOT)
    parts = {part.name: part for part in script.quick_parts([])}
    assert {"release engine", "release volume", "release cli", "release export"} <= parts.keys()
    assert not [name for name in parts if "/" in name or fnmatch.fnmatch(name, "*lvm*") or name in script.GUESTS]
    for part in parts.values():
        marked = part.words[part.words.index("-m", 2) + 1]
        assert "not slow" in marked and "not long" in marked and "not alone" in marked
