# SPDX-License-Identifier: Apache-2.0
"""The command that runs the benchmarks: what it writes, and what it says of suites that cannot measure, or are wrong."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.release_only  # what it runs takes the release build

ROOT = Path(__file__).resolve().parents[2]
GOOD = """
from suite import missing, row
TITLE = "Does it run?"
def measure(plan):
    return {"rounds": plan.rounds, "seconds": plan.seconds, "samples": [2.0] * plan.rounds, 1: "a key that JSON makes a string"}
def rows(result):
    assert "1" in result  # as it is in the file
    return [row("fvd / peer", result["samples"], goal=">= GOAL", against="peer", better="more"), missing("more", "no time")]
def plots(result):
    return []
def headline(result):
    return {"head": ["", "fvd"], "rows": [["goal GOAL", str(len(result["samples"]))]], "caption": "Rounds."}
"""
CANNOT = 'from machine import CannotMeasure\nTITLE = "no"\ndef measure(plan): raise CannotMeasure("there is no tape drive")\n'
WRONG = (
    'TITLE = "wrong"\ndef measure(plan): return {"samples": [1]}\ndef rows(result): return result["sample"]\ndef plots(result): return []\n'
)
BROKEN = "TITLE = \n"


def run(*words: str, suites: Path | None = None, names: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    """In a process of its own, where `names` are the suites, found in `suites`."""
    start = "import sys; sys.path[:0] = sys.argv[1:3]; import run"
    if names is not None:
        start += f"; run.SUITES[:] = {names!r}"
    command = [sys.executable, "-c", f"{start}; sys.exit(run.main(sys.argv[3:]))", str(ROOT / "bench"), str(suites or ROOT / "bench")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([*command, *words], capture_output=True, text=True, timeout=120, env=environment, cwd=ROOT, check=False)


def made(folder: Path, **sources: str) -> list[str]:
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)  # of a source as long, written within the same second
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source.replace("GOAL", "1.8"))
    return list(sources)


def kept(folder: Path, name: str) -> dict[str, Any]:
    data = json.loads((folder / f"{name}.json").read_text())
    assert isinstance(data, dict)
    return data


def test_a_real_suite_in_a_tiny_run(tmp_path: Path) -> None:
    done = run("kernels", "--rounds", "1", "--seconds", "0.01", "--mode", "quick", "--results", str(tmp_path))
    assert done.returncode == 0, done.stderr
    data = kept(tmp_path, "kernels")
    assert data["plan"] == {"mode": "quick", "rounds": 1, "seconds": 0.01}
    assert len(data["result"]["samples"]) == 1
    assert [row["goal"] for row in data["rows"] if row["reached"] is not None] == [">= 20", "<= 2"]
    assert data["machine"]["versions"]["fvd"] and data["when"] and data["took_seconds"] > 0
    page = (tmp_path / "report.html").read_text()
    assert data["title"] in page and page.count('role="img"') == 2
    assert all(row["what"].replace("'", "&#x27;") in page for row in data["rows"])


def test_one_suite_does_not_stop_the_others(tmp_path: Path) -> None:
    names = made(tmp_path, fake_cannot=CANNOT, fake_wrong=WRONG, fake_broken=BROKEN, fake_good=GOOD)
    results = tmp_path / "results"
    done = run("--results", str(results), suites=tmp_path, names=[*names, "fake_absent"])
    assert done.returncode == 1
    assert "not measured: there is no tape drive" in done.stdout
    assert "KeyError: 'sample'" in done.stdout and "Traceback" in done.stdout
    assert "SyntaxError" in done.stdout and "No module named 'fake_absent'" in done.stdout
    assert kept(results, "fake_cannot")["not_measured"] == "there is no tape drive"
    assert kept(results, "fake_wrong")["result"] == {"samples": [1]}  # what was measured is not lost
    good = kept(results, "fake_good")
    assert (good["rows"][0]["value"], good["rows"][0]["reached"]) == ("2.00 (2.00-2.00)", True)
    assert "Goals: 1 reached, 0 missed, 0 not measured" in done.stdout
    page = (results / "report.html").read_text()
    assert "there is no tape drive" in page and "the suite failed: KeyError" in page


def test_what_cannot_be_measured_is_no_failure(tmp_path: Path) -> None:
    done = run("--results", str(tmp_path / "results"), suites=tmp_path, names=made(tmp_path, fake_cannot=CANNOT))
    assert done.returncode == 0
    assert "Traceback" not in done.stdout + done.stderr


def test_rows_are_made_again_from_the_samples(tmp_path: Path) -> None:
    results = ("--results", str(tmp_path / "results"))
    names = made(tmp_path, fake_good=GOOD, fake_wrong=WRONG)
    assert run(*results, "--rounds", "4", suites=tmp_path, names=names).returncode == 1
    made(tmp_path, fake_good=GOOD.replace("GOAL", "2.5"), fake_wrong=WRONG.replace('result["sample"]', "[]"))
    done = run(*results, "--report", suites=tmp_path, names=names)
    assert done.returncode == 0, done.stdout
    good = kept(tmp_path / "results", "fake_good")
    assert good["result"]["samples"] == [2.0] * 4
    assert (good["rows"][0]["goal"], good["rows"][0]["reached"]) == (">= 2.5", False)
    assert good["headline"]["rows"] == [["goal 2.5", "4"]]
    assert "not_measured" not in kept(tmp_path / "results", "fake_wrong")
    assert "Goals: 0 reached, 1 missed" in done.stdout


def test_what_is_wrong_on_the_command_line(tmp_path: Path) -> None:
    for words, said in (
        (["nonsense"], "no suite is called 'nonsense'; there are guest, "),
        (["--rounds", "0"], "must be positive"),
        (["--seconds", "-1"], "must be positive"),
    ):
        done = run(*words, "--results", str(tmp_path / "results"))
        assert done.returncode == 2
        assert said in done.stderr
    assert not (tmp_path / "results").exists()


def test_copying_is_measured_when_it_is_named_or_in_full() -> None:
    expression = "import sys; sys.path[:0] = [sys.argv[1]]; import run; print([run.chosen(run.arguments(w.split())) for w in sys.argv[2:]])"
    command = [sys.executable, "-c", expression, str(ROOT / "bench"), "", "--mode full", "copying", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    by_mode = ast.literal_eval(done.stdout)
    assert ["copying" in names for names in by_mode] == [False, True, True, False]
    assert by_mode[0][0] == "guest" and by_mode[0] == by_mode[3] == by_mode[1][:-1]
