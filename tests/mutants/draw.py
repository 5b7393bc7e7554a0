# SPDX-License-Identifier: Apache-2.0
"""One-line changes to the engine, drawn by a seed over the branches, assignments, calls and waits of its files.

Each change keeps both versions in the line, and a number chooses: `if (not (x)) == BUG(1003):` is `if x:` until bug 1003 is switched on. So
one compilation serves all of them. What is drawn depends on the text of a line and the function it is in, and not on where it stands: a
change elsewhere in a file leaves the others as they are.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FIRST_NUMBER = 1000  # below are the seeded bugs
ENGINE = "fvd/engine"
KINDS = ("negated", "operand", "comparison", "off by one", "removed assignment", "removed call", "removed wait", "swapped", "flipped")
# Counters that are shown and decide nothing, checks of our own invariants, the end of a life, memory that is given back or not had, and
# what exists for the seeded bugs.
LEFT_OUT = re.compile(
    r"\b(e|self)\.count\.|\bensure\(|\bbroken\(|\bfree\(|out_of_memory|MemoryError|raise |== NULL:$|\bBUG\(|calloc|realloc|aligned\("
    r"|grown\b|noted_bytes"
)
LEFT_OUT_FUNCTIONS = {
    "__init__", "set_disk", "set_mode", "set_maps", "set_base", "set_journal", "allocate_memory", "set_bits", "free_memory",
    "free_copies", "free_active_chunks", "free_drains", "free_requests", "zeroed_memory", "aligned_memory", "statistics",
    "copy_counters", "leaks", "lost_slots", "record_base_read", "read_profile",
    "take_operations", "take_done", "waiting_bytes", "waiting_writes", "broken", "ensure", "seed_bug", "ops_grow", "slot_goal",
    "slot_spread", "slot_append", "slot_held",
}  # fmt: skip
WAITS = re.compile(r"\bwait_for\(|\blist_push\(&?(e|c|self)\.|\bdrain_begin\(")
NUMERIC = re.compile(r"^(cdef (uint64_t|uint32_t) )?\w+ = [^\"]*( [-+] |>>|<<|\bmin\(|\bmax\()")


@dataclass(frozen=True, slots=True)
class Mutant:
    """A change that can be switched on."""

    number: int
    file: str
    line: int
    function: str
    kind: str
    before: str
    after: str
    switched: str
    """The line with both versions; {n} is the number."""

    @property
    def key(self) -> str:
        return key_of(self.function, self.kind, self.before, self.after)

    def __str__(self) -> str:
        return f"{self.number} {Path(self.file).name}:{self.line} {self.function}, {self.kind}: `{self.before}` -> `{self.after}`"


def key_of(function: str, kind: str, before: str, after: str) -> str:
    """What names a change in tables, wherever its line stands."""
    return f"{function}, {kind}: `{before}` -> `{after}`"


def logical_lines(path: Path) -> Iterator[tuple[int, str, str, int]]:
    """(number, function, the line without its comment and indentation, physical lines that it takes) of every statement."""
    lines = path.read_text().split("\n")
    function, number, in_text = "", 0, False
    while number < len(lines):
        line, taken = lines[number], 1
        if line.count('"""') % 2:
            in_text = not in_text
        elif not in_text and line.strip() and not line.strip().startswith(("#", '"""')):
            while line.count("(") > line.count(")") and number + taken < len(lines):
                line = f"{_bare(line)} {lines[number + taken].strip()}"
                taken += 1
            if found := re.match(r"\s*(?:cdef|def) [^=]*?(\w+)\(.*\).*:$", _bare(line)):
                function = found[1]
            elif function:
                yield number, function, _bare(line), taken
        number += taken


def _bare(line: str) -> str:
    return re.sub(r"\s+#[^\"]*$", "", line).rstrip()


def split_at(text: str, word: str) -> list[str]:
    """Parts between `word` where it stands in no parentheses."""
    parts, depth, start = [], 0, 0
    for at, letter in enumerate(text):
        depth += (letter in "([") - (letter in ")]")
        if depth == 0 and text.startswith(word, at):
            parts.append(text[start:at])
            start = at + len(word)
    return [*parts, text[start:]]


def changes(line: str) -> Iterator[tuple[str, str, str, str]]:
    """(kind, before, after, the line with both) of each change to a statement."""
    text = line.strip()
    indent = line[: len(line) - len(line.lstrip())]
    if found := re.match(r"(if|elif|return|while) (.*?)(:?)$", text):
        word, condition, colon = found.groups()
        yield from _of_condition(indent, text, word, condition, colon)
        if word == "return" and condition in ("True", "False"):
            other = "False" if condition == "True" else "True"
            yield "flipped", text, f"return {other}", f"{indent}return {condition} != BUG({{n}})"
    if text.startswith("return wait_for(") or (WAITS.search(text) and not text.startswith(("if ", "elif ", "cdef ", "return "))):
        yield "removed wait", text, "pass", f"{indent}if not BUG({{n}}): {text}"
    elif re.match(r"[\w.\[\]]+[.\]][\w.\[\]]* ([-+|&]|<<|>>)?= ", text) or re.match(r"\w+ [-+]= ", text):
        yield "removed assignment", text, "pass", f"{indent}if not BUG({{n}}): {text}"
    elif re.match(r"[a-z_]+\([^=]*\)$", text):
        yield "removed call", text, "pass", f"{indent}if not BUG({{n}}): {text}"
    if NUMERIC.match(text) and not re.search(r"\*>|NULL|&|buffer|data\b| if |<double>", text):
        target, value = text.split(" = ", 1)
        if len(split_at(value, ", ")) == 1:
            yield "off by one", text, f"{target} = ({value}) + 1", f"{indent}{target} = ({value}) + BUG({{n}})"
            for name, other in (("min", "max"), ("max", "min")):
                if re.fullmatch(rf"{name}\(.*\)", value):
                    swapped = f"{other}{value[3:]}"
                    yield "swapped", text, f"{target} = {swapped}", f"{indent}{target} = {swapped} if BUG({{n}}) else {value}"


def _of_condition(indent: str, text: str, word: str, condition: str, colon: str) -> Iterator[tuple[str, str, str, str]]:
    tested = word in ("if", "elif")
    if not tested and not re.search(r" (and|or|[<>=!]=|[<>]) ", condition):
        return
    while condition.startswith("(") and len(split_at(condition, " ")) == 1 and condition.endswith(")"):
        condition = condition[1:-1]
    if " if " in condition or condition.startswith("<"):
        return
    if tested:
        yield "negated", text, f"{word} not ({condition}):", f"{indent}{word} (not ({condition})) == BUG({{n}}){colon}"
    for joint, neutral in ((" or ", "not BUG({n})"), (" and ", "BUG({n})")):
        parts = split_at(condition, joint)
        if len(parts) > 1:
            for at, part in enumerate(parts):
                rest = joint.join(parts[:at] + parts[at + 1 :])
                # An operand of `or` is taken away by `and not BUG`, one of `and` by `or BUG`.
                held = f"(({part}) {'and' if joint == ' or ' else 'or'} {neutral})"
                switched = joint.join([*parts[:at], held, *parts[at + 1 :]])
                yield "operand", text, f"{word} {rest}{colon}", f"{indent}{word} {switched}{colon}"
            break
    else:
        parts = [condition]
        joint = ""
    for at, part in enumerate(parts):
        for sign, other in ((" < ", " <= "), (" <= ", " < "), (" > ", " >= "), (" >= ", " > ")):
            sides = split_at(part, sign)
            if len(sides) == 2 and not re.search(r" (<|>|<=|>=|==|and|or) ", sides[0] + sides[1]):
                changed = f"{sides[0]}{other}{sides[1]}"
                both = f"(({changed}) if BUG({{n}}) else ({part}))"
                yield (
                    "comparison",
                    text,
                    f"{word} {joint.join([*parts[:at], changed, *parts[at + 1 :]])}{colon}",
                    f"{indent}{word} {joint.join([*parts[:at], both, *parts[at + 1 :]])}{colon}",
                )


def candidates(root: Path) -> list[Mutant]:
    """Every change there is; numbers come when they are drawn."""
    found = []
    for path in sorted((root / ENGINE).glob("*.p[yx][xi]")):
        if path.suffix not in (".pyx", ".pxi"):
            continue
        seeded: int | None = None  # the indentation of an `if BUG(...)` whose lines these are
        for number, function, line, _ in logical_lines(path):
            indentation = len(line) - len(line.lstrip())
            if seeded is not None and indentation > seeded:
                continue
            seeded = indentation if re.match(r"\s*if BUG\([\w.]+\):$", line) else None
            if function in LEFT_OUT_FUNCTIONS or LEFT_OUT.search(line):
                continue
            for kind, before, after, switched in changes(line):
                found.append(Mutant(0, f"{ENGINE}/{path.name}", number + 1, function, kind, before, after, switched))
    return found


def draw(root: Path, seed: int, count: int, *, passed_over: frozenset[str] = frozenset()) -> list[Mutant]:
    """So many, of each kind in turn, one of a line at most; of those whose key is not `passed_over`."""
    ordered: dict[str, list[Mutant]] = {kind: [] for kind in KINDS}
    for mutant in sorted(candidates(root), key=lambda mutant: hashlib.sha256(f"{seed} {mutant.key}".encode()).digest()):
        ordered[mutant.kind].append(mutant)
    drawn: list[Mutant] = []
    lines: set[tuple[str, int]] = set()
    while len(drawn) < count and any(ordered.values()):
        for kind in KINDS:
            while ordered[kind] and len(drawn) < count:
                mutant = ordered[kind].pop(0)
                if mutant.key not in passed_over and (mutant.file, mutant.line) not in lines:
                    lines.add((mutant.file, mutant.line))
                    number = FIRST_NUMBER + len(drawn)
                    drawn.append(
                        Mutant(
                            number, mutant.file, mutant.line, mutant.function, kind, mutant.before, mutant.after,
                            mutant.switched.replace("{n}", str(number)),
                        )
                    )  # fmt: skip
                    break
    return drawn


def apply(root: Path, mutants: list[Mutant]) -> None:
    """Rewrites the engine's files below `root`: every line that was drawn holds both versions from now on."""
    for file in {mutant.file for mutant in mutants}:
        path = root / file
        taken = {number: count for number, _, _, count in logical_lines(path)}
        lines = path.read_text().split("\n")
        for mutant in (mutant for mutant in mutants if mutant.file == file):
            at = mutant.line - 1
            lines[at : at + taken[at]] = [mutant.switched] + [""] * (taken[at] - 1)
        path.write_text("\n".join(lines))
