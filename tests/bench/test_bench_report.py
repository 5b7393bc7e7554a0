# SPDX-License-Identifier: Apache-2.0
"""The report of the benchmarks: whatever a result holds, the page is whole, says what was missed, and lets no text become markup."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.release_only  # what it runs takes the release build

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = """<script>alert(1)</script> "'><img src=x onerror=alert(2)> & $x_1$ | `a` ]]> --> **b** \\ é"""
ORDER = ["matrix", "flushes", "scale"]
VOID = {"meta", "br", "img", "link", "hr", "input"}
# In a process of its own: the benchmarks' modules have names that others have too.
MAKE = f"""
import sys
from pathlib import Path
sys.path[:0] = [{str(ROOT / "bench")!r}]
import report, publish
results, docs = map(Path, sys.argv[1:3])
report.write(results, {ORDER!r})
if any(results.glob("*.json")):
    publish.write(results, docs, {ORDER!r}, publish.shown_by(Path(sys.argv[3])) if sys.argv[3:] else None)
"""


class Whole(HTMLParser):
    """Which elements there are; that each is closed where it should be."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def row(what: str, values: list[float | None], **more: Any) -> dict[str, Any]:
    return {"what": what, "value": f"{values[0]} (0.1-9.9) s", "goal": "", "reached": None, "values": values, **more}


def plot(kind: str, x: list[Any], points: list[list[Any]], **more: Any) -> dict[str, Any]:
    series = [{"name": name, "points": points} for name in ("fvd", "qemu raw", HOSTILE)]
    return {"name": f"{kind} {HOSTILE}", "title": HOSTILE, "kind": kind, "unit": HOSTILE, "x": x, "series": series, **more}


def result(suite: str, rows: list[Any], plots: list[Any], **more: Any) -> dict[str, Any]:
    return {
        "suite": suite,
        "title": HOSTILE,
        "machine": {"cpus": 2, "cpu": HOSTILE, "kernel": "6", "commit": "abc", "modified": True, "versions": {"fio": HOSTILE}},
        "mode": "quick",
        "plan": {"mode": "quick", "rounds": 2, "seconds": 1.5},
        "when": "2025-01-02T03:04:05+00:00",
        "took_seconds": 12.5,
        "result": {"samples": [{"name": HOSTILE, "value": math.nan}]},
        "rows": rows,
        "plots": plots,
        **more,
    }


def made(folder: Path, *results: dict[str, Any], files: dict[str, str] | None = None, readme: Path | None = None) -> tuple[str, Path]:
    """The page, and the folder of documents."""
    kept, docs = folder / "results", folder / "docs"
    kept.mkdir(exist_ok=True)
    for one in results:
        (kept / f"{one['suite']}.json").write_text(json.dumps(one))
    for name, content in (files or {}).items():
        (kept / name).write_text(content)
    command = [sys.executable, "-c", MAKE, str(kept), str(docs), *([str(readme)] if readme else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return (kept / "report.html").read_text(), docs


ROWS = [
    row(HOSTILE, [2.0, 2.1], goal=">= 1.8", reached=True, against=HOSTILE, better="more", note=HOSTILE),
    row("fvd / raw, CPU", [1.2], goal="<= 0.4", reached=False, against="raw", better="less"),
    row("fvd / raw, nearly the same", [0.95], against="raw", better="more"),
    row("fvd / raw, no number", [math.nan], goal=">= 1", reached=False, against="raw", better="more"),
    row("fvd / raw, null", [None], goal=">= 1", reached=None, against="raw", better="more"),
    {"what": "no figures at all", "value": "7", "goal": "", "reached": None},
    {"what": "vhdx", "value": "not measured", "goal": "<= 3", "reached": None, "note": HOSTILE},
]
PLOTS = [
    plot("bars", ["one", HOSTILE], [[1.0, 3.0], [2.0]], better="more", goal=1.5, caption=HOSTILE),
    plot("bars", [f"category {number}" for number in range(9)], [[float(number)] for number in range(9)], logarithmic=True),
    plot("bars", ["nothing", "null"], [[], [None, math.nan]]),
    plot("lines", [1, 8, 64], [[1.0, 2.0], [], [math.nan, 4.0]], x_unit="requests"),
    plot("lines", [1, 2], [[0.0], [-1.0]], logarithmic=True),
    plot("distribution", [], [[0.5 + number for number in range(2000)]], better="less"),
    plot("distribution", [], [[0.0, 0.0]]),
]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    files = {"aging.json": "{", "path.json": "[]", "lvm.json": "{}"}
    broken = {"name": "odd", "kind": "pie", "title": HOSTILE, "unit": "", "x": [], "series": [{"name": "a", "points": [[1]]}]}
    return made(
        tmp_path_factory.mktemp("report"),
        result("matrix", ROWS, [*PLOTS, broken]),
        result("flushes", [], [], not_measured=HOSTILE),
        files=files,
    )


def test_the_page_is_whole_and_needs_nothing_else(hostile: tuple[str, Path]) -> None:
    page = Whole(hostile[0])
    assert not {tag for tag, _ in page.elements} & {"script", "img", "link", "iframe", "object", "base"}
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
        links = [value or "" for name, value in attributes.items() if name in ("src", "href", "xlink:href")]
        assert all(link.startswith("#") for link in links), links
    assert not re.search(r"url\((?!#)|@import", hostile[0])
    identifiers = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    targets = {(attributes.get("href") or "")[1:] for tag, attributes in page.elements if tag == "a"}
    assert targets <= set(identifiers)


def test_what_is_hostile_can_be_read(hostile: tuple[str, Path]) -> None:
    page = Whole(hostile[0])
    assert page.texts.count(HOSTILE) >= 5
    samples = [text for text in page.texts if '"samples"' in text]
    assert json.loads(samples[0])["result"]["samples"][0]["name"] == HOSTILE


def test_verdicts_losses_and_what_is_not_there(hostile: tuple[str, Path]) -> None:
    texts = Whole(hostile[0]).texts
    assert [texts[texts.index(words) - 1] for words in ("goals reached", "goals missed", "goals not measured")] == ["1", "1", "3"]
    assert texts[texts.index("ratios where fvd loses") - 1] == "1"
    losses = texts[texts.index("Where fvd loses") : texts.index("Where fvd loses") + 30]
    assert "fvd / raw, CPU" in losses and "fvd / raw, nearly the same" not in losses
    assert "scale: not run" in texts  # it has no results
    assert any(text.startswith("aging.json cannot be read") for text in texts)
    assert "There is no figure in this result." in texts
    assert any("not drawn (KeyError" in text for text in texts)


def test_pictures_are_well_formed(hostile: tuple[str, Path]) -> None:
    pictures = re.findall(r"<svg (?!class=\"gauge\").*?</svg>", hostile[0], flags=re.S)
    assert len(pictures) == len(PLOTS) - 1  # one has nothing to draw
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        title = root.find("{http://www.w3.org/2000/svg}title")
        assert title is not None and title.text is not None and title.text.startswith(HOSTILE)
        assert not list(root.iter("{http://www.w3.org/2000/svg}script"))


def test_what_is_published(hostile: tuple[str, Path]) -> None:
    docs = hostile[1]
    text = (docs / "benchmarks.md").read_text()
    assert text.startswith("<!-- Generated by `make bench-publish`")
    linked = re.findall(r"^!\[.*\]\((benchmarks/[^)]*)\)$", text, flags=re.M)
    assert len(linked) == len(PLOTS) - 1
    assert {docs / link for link in linked} == set((docs / "benchmarks").iterdir())
    for link in linked:
        ElementTree.parse(docs / link)
        assert "currentColor" not in (docs / link).read_text()  # in a picture of its own that is black
    assert "<script" not in text and "<img" not in text
    for line in (line for line in text.splitlines() if line.startswith("|")):
        assert len(re.findall(r"(?<!\\)\|", line)) in (3, 4, 5, 6), line
    assert "Of 5 goals: 1 reached, 1 missed, 3 not measured." in text


def test_only_what_the_readme_shows_is_published(tmp_path: Path) -> None:
    one = result("matrix", ROWS, [PLOTS[0], PLOTS[3], PLOTS[5]])
    _, docs = made(tmp_path, one)
    names = sorted(path.name for path in (docs / "benchmarks").iterdir())
    readme = tmp_path / "README.md"
    readme.write_text(f"![a picture](docs/benchmarks/{names[0]})\n")
    made(tmp_path, one, readme=readme)
    assert len(names) == 3 and [path.name for path in (docs / "benchmarks").iterdir()] == names[:1]
    assert (docs / "benchmarks.md").read_text().count("](benchmarks/") == 1


def test_a_headline_stands_first_and_between_its_marks_in_the_readme(tmp_path: Path) -> None:
    headline = {"head": ["", "fvd", HOSTILE], "rows": [["reads", "2 k/s", HOSTILE]], "caption": "Thousands."}
    _, docs = made(tmp_path, result("matrix", ROWS, [], headline=headline), result("flushes", ROWS, []))
    text = (docs / "benchmarks.md").read_text()
    assert 0 < text.index("| reads | 2 k/s |") < text.index("## Goals") and "<img" not in text
    readme = tmp_path / "README.md"
    command = f"""
import sys
from pathlib import Path
sys.path[:0] = [{str(ROOT / "bench")!r}]
import publish
readme = Path({str(readme)!r})
readme.write_text(f"before\\n{{publish.README_BEGIN}}\\nold\\n{{publish.README_END}}\\nafter\\n")
assert publish.write_headlines(Path({str(tmp_path / "results")!r}), readme, {ORDER!r})
"""
    subprocess.run([sys.executable, "-c", command], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    lines = readme.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after") and "old" not in lines
    assert [line for line in lines if line.startswith("| reads")] == [line for line in text.splitlines() if line.startswith("| reads")]


def test_the_pictures_in_the_tree_are_those_of_the_readme() -> None:
    root = Path(__file__).parents[2]
    shown = re.findall(r"\]\(docs/benchmarks/([^)]*)\)", (root / "README.md").read_text())
    assert shown and set(shown) == {path.name for path in (root / "docs" / "benchmarks").iterdir()}


def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    pages = []
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        page, docs = made(folder, result("matrix", ROWS, [PLOTS[0], PLOTS[3], PLOTS[5]]))
        published = {path.name: path.read_bytes() for path in docs.rglob("*") if path.is_file()}
        pages.append((page, published))
    assert pages[0] == pages[1]


def test_no_results_at_all(tmp_path: Path) -> None:
    page, _ = made(tmp_path)
    assert "There are no results yet" in "".join(Whole(page).texts)
