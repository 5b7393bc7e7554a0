# SPDX-License-Identifier: Apache-2.0
"""Words that are not used any more, each with the one that is: docs/glossary.md has the meanings.

A row is a regular expression, the replacement, and the files that it is about. To use a word all the same, say why: a line with
`words: REASON` in it is exempt, as are the files below.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = [pytest.mark.pure, pytest.mark.release_only]
ROOT = Path(__file__).resolve().parents[1]
SOURCE_NAMES = re.compile(r"\.(py|pyx|pxd|pxi|pyi|c|h)$|^scripts/|^Makefile$")
CYTHON_NAMES = re.compile(r"\.(pyx|pxd|pxi)$")
PROSE_NAMES = re.compile(r"\.(md|in|1|5)$|^fvd/cli/|^completions/|^systemd/")
TEXT_NAMES = re.compile(rf"{SOURCE_NAMES.pattern}|{PROSE_NAMES.pattern}|\.(fvd|toml|yaml|conf)$")

EXEMPT = {
    "tests/test_words.py": "names the words",
    "docs/benchmarks.md": "results as they were published; a new run is worded anew",
    "docs/demo.md": "what the demos printed",
    "CHANGELOG.md": "what was called so then",
    "docs/glossary.md": "says what a word is not used for",
    "bench/benchmarks.md.in": "words of the published results; worded anew with the next run",
}


@dataclass(frozen=True)
class Word:
    pattern: str
    instead: str
    files: re.Pattern[str] = TEXT_NAMES
    ignore_case: bool = True


def name(pattern: str, instead: str) -> Word:
    """Of identifiers."""
    return Word(pattern, instead, SOURCE_NAMES, ignore_case=False)


WORDS = [
    # Names with more than one meaning, or more than one spelling.
    Word(r"\bdice\b|_dice\b", "rng"),
    Word(r"\bseams?\b", "interface"),
    name(r"\b(MOST|MAXIMUM|LONGEST|GREATEST)_[A-Z_]+\b|\b[A-Z_]+_(MOST|LONGEST|GREATEST)\b", "..._MAX"),
    name(r"\bLEAST_[A-Z_]+\b|\b[A-Z_]+_LEAST\b", "..._MIN"),
    name(r"\b\w+_SECS?\b|\b[A-Z_]+_S\b", "..._SECONDS"),
    Word(r"(?<![a-z])(?!room_below\b)rooms?(?![a-z])", "space, free space, slots, ..._capacity"),
    name(r"\bclass Driver\b", "DiskThread, NbdLoop, ...: what it drives"),
    name(r"\b_natural\b", "_non_negative"),
    name(r"\b_(must_ask|asked_bytes|asked_pool_at|asking|ask_rest|is_asking)\b", "requested_bytes; the state of the policy"),
    name(r"\bBusy\b", "ActiveChunk"),
    name(r"\bDelta\b|\bdelta_(note|bytes)\b", "ChangeSet"),
    name(r"\b(doomed|most_discarding|word_hardened)\b", "cancelled, count_max, a word that is running"),
    Word(r"\b(soft|frozen) changes?\b|\bfrozen area\b|\bsoft set\b", "lazy, committing (jbd2's words)"),
    name(r"\btake_wants\b", "pop_wants"),
    name(r"\bmay_read\b", "admit: what decides and changes nothing"),
    name(r"\bREP_ERR_SHUTDOWN\b", "nothing: it was never sent"),
    name(r"\bfvd\.volume\.(seams|starting|watching|offline|opening|loading)\b|\bseams\.py\b|\bsim/bench\.py\b", "the module's name now"),
    Word(r"<(u?int(8|16|32|64)_t|size_t|double|float|char|void|long|int)( ?\*+)?> (?=[\w(&*])", "<uint64_t>x: no space", CYTHON_NAMES),
    name(r"\b(source_rang|look_at_sources|unspill)\b", "source_ready, poll_sources, drain_overflow"),
    name(r"\b(may_read|take_wants)\b", "admit, pop_wants"),
    name(r"\bfvd\.(disk\._load|export\._passthrough|sim\.sweep)\b|\bfvd/(disk/_load|export/_passthrough|sim/sweep)\b", "devtools"),
    Word(
        r"(?<![.\w])found\b(?= ?(:=|[-+|]?=[ \[(]))|\bfor found in\b",
        "what it is: errors, paths, holders",
        re.compile(r"^(fvd|devtools|scripts)/"),
        False,
    ),
    # Words of daily life, and sentences that were translated.
    Word(r"\b(stood|stands?|standing) still\b", "was suspended"),
    Word(r"\bstorage has ended\b|\bwhen storage ends\b", "storage is exhausted"),
    Word(r"\bnew places?\b", "allocating writes"),
    Word(r"\bmend(s|ed|ing)?\b", "repair, fix"),
    Word(r"\bhung up on\b", "disconnected"),
    Word(r"\bgoes on in\b", "resumes in"),
    Word(r"\bwrite it so\b", "usage"),
    Word(r"\beverything held\b", "all checks passed"),
    Word(r"\bpass over what you\b", "ignore unknown"),
    Word(r"\bno request at all\b", "malformed input"),
    Word(r"\bactivity is no ownership\b", "an active volume is not an owned one"),
    Word(r"\bnever assumed not to be\b", "always assumed"),
    Word(r"\bis told no more\b|\btold no more\b", "no longer reported"),
    Word(r"\bplays the logical volume\b", "in place of a logical volume"),
    Word(r"\bwhat (it|they) holds? is overwritten\b", "overwrites its contents"),
    Word(r"\bso (many|much) (seconds|time|a second|times|events|requests)\b", "N, S seconds, SIZE a second", PROSE_NAMES),
    Word(r"\b(is|are|was|were) tried again\b", "retried", re.compile(r"^fvd/cli/|^completions/|^docs/use/|^README|\.[15]$")),
    Word(r"\bfirst writes?\b", "allocating write", re.compile(r"^fvd/cli/|^completions/|^docs/use/|^README|\.[15]$")),
]


def tracked() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("git tells what is a source, and this is no checkout")
    done = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=True)
    return [path for path in done.stdout.splitlines() if path not in EXEMPT and TEXT_NAMES.search(path) and (ROOT / path).is_file()]


def uses(word: Word, text: str) -> list[tuple[int, str]]:
    """Lines of `text` that use it, also where the phrase goes over the end of a line."""
    pattern = re.compile(
        word.pattern.replace(" ", r"(?:[ \t]|\n[ \t#*]*)") if word.ignore_case else word.pattern, re.IGNORECASE if word.ignore_case else 0
    )
    lines = text.splitlines()
    numbers = sorted({text.count("\n", 0, match.start()) for match in pattern.finditer(text)})
    return [(number + 1, lines[number].strip()) for number in numbers if "words: " not in lines[number]]


def test_words_that_are_gone_stay_gone() -> None:
    texts = {path: (ROOT / path).read_text(errors="replace") for path in tracked()}
    assert len(texts) > 300
    found = [
        f"{path}:{number}: {word.pattern!r}: say {word.instead!r}: {line[:100]}"
        for word in WORDS
        for path, text in texts.items()
        if word.files.search(path)
        for number, line in uses(word, text)
    ]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("path", EXEMPT)
def test_what_is_exempt_is_there(path: str) -> None:
    assert (ROOT / path).exists()


def test_the_table_finds_what_it_names() -> None:
    dice = WORDS[0]
    assert uses(dice, "a\nthrow the Dice here\n") == [(2, "throw the Dice here")]
    assert uses(dice, "dicey; the dice  # words: a game\n") == []
    phrase = Word(r"\bstood still\b", "was suspended")
    assert uses(phrase, "# it stood\n    # still then") == [(1, "# it stood")]
