# SPDX-License-Identifier: Apache-2.0
"""What is written for users: links that lead somewhere, a README that can be read at once, sentences that can be read once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = [pytest.mark.pure, pytest.mark.release_only]
ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "fvd" / "FORMAT.md"]
PRINTED = {"benchmarks.md", "demo.md"}  # by programs
WRITTEN = [page for page in PAGES if page.name not in PRINTED]
INTERNALS = sorted((ROOT / "docs" / "internals").glob("*.md"))
README_LINES_MAX = 170
SENTENCE_WORDS_MAX = 35


def prose(page: Path) -> str:
    """Without code, tables' bars and links' targets."""
    text = re.sub(r"```.*?```", "\n\n", page.read_text(), flags=re.DOTALL)
    text = re.sub(r"(?m)^    .*$", "", text)
    return re.sub(r"\]\([^)]*\)", "]", text)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES_MAX


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_sentences_are_short(page: Path) -> None:
    parts = re.split(r"(?<=[.:;!?])[\s*]+|\n\s*\n|\n(?=[-|\d])|\|", prose(page))
    assert len(parts) > 5
    long = [" ".join(part.split()) for part in parts if len(part.split()) > SENTENCE_WORDS_MAX]
    assert long == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL))
    lost = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert lost == []


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_headings_lead_to_one(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s#]*\.md|)#([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL))
    lost = [f"{target}#{anchor}" for target, anchor in links if anchor not in anchors(page.parent / target if target else page)]
    assert lost == []


def test_every_page_can_be_found() -> None:
    """From the README, CONTRIBUTING or the page of questions, or from a page that these name."""
    seen: set[Path] = set()
    todo = [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        targets = re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", page.read_text())
        found = [(page.parent / target).resolve() for target in targets if "://" not in target]
        todo += [folder / "README.md" if folder.is_dir() else folder for folder in found if folder.exists()]
    assert len(INTERNALS) >= 5 and not [str(page) for page in PAGES if page not in seen]


def test_what_contributors_are_told_to_open_is_there() -> None:
    names = re.findall(r"`((?:fvd|tests|scripts|bench|devtools)/[\w./-]+)`", (ROOT / "CONTRIBUTING.md").read_text())
    named = [name for name in names if not re.search(r"/(COMMAND|NAME)\.py$", name)]  # of whatever is added
    assert len(named) > 20 and not [name for name in named if not (ROOT / name).exists()]


def test_what_contributors_are_told_to_look_for_is_in_its_file() -> None:
    """`file`, `name` and `name`; `file` (`name`); `name` in `file`."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = [
        (path, name) for path, *names in re.findall(r"`([\w./-]+\.\w+)`,? \(?`(\w+)`(?: and `(\w+)`)?", text) for name in names if name
    ]
    named += [(path, name) for name, path in re.findall(r"`(\w+)` in `([\w./-]+\.\w+)`", text)]
    assert len(named) > 8
    wrong = [f"{name} in {path}" for path, name in named if not re.search(rf"\b{name}\b", (ROOT / path).read_text())]
    assert not wrong, wrong
