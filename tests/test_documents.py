# SPDX-License-Identifier: Apache-2.0
"""What is written for users: links that lead somewhere, a README that can be read at once, sentences that can be read once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = [pytest.mark.pure, pytest.mark.release_only]
ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "fvd" / "FORMAT.md"]
FOR_USERS = [ROOT / "README.md", *sorted((ROOT / "docs" / "use").glob("*.md"))]
README_LINES_MAX = 170
SENTENCE_WORDS_MAX = 35


def prose(page: Path) -> str:
    """Without code, tables' bars and links' targets."""
    text = re.sub(r"```.*?```", "\n\n", page.read_text(), flags=re.DOTALL)
    text = re.sub(r"(?m)^    .*$", "", text)
    return re.sub(r"\]\([^)]*\)", "]", text)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES_MAX


@pytest.mark.parametrize("page", FOR_USERS, ids=lambda page: str(page.relative_to(ROOT)))
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
