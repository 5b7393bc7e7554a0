# SPDX-License-Identifier: Apache-2.0
"""What results/NAME.json holds, read and judged: which goals were reached, where fvd loses, what was not measured.

Whatever is in a file is taken as it is found: half a file, a figure that is no number, a suite that failed. Knows no suite and no format
of a report.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from suite import Plot, Row, loses

Verdict = Literal["reached", "missed", "not measured"]


@dataclass(frozen=True)
class Entry:
    """One suite's results, or why there are none."""

    suite: str
    title: str
    rows: list[Row]
    plots: list[Plot]
    not_measured: str  # "" if it was
    data: dict[str, Any]  # the whole file

    @property
    def machine(self) -> dict[str, Any]:
        found = self.data.get("machine")
        return found if isinstance(found, dict) else {}


def finite(values: object) -> list[float]:
    """The numbers among `values`: neither NaN nor null."""
    if not isinstance(values, list | tuple):
        return []
    return [value for value in values if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)]


def read(path: Path) -> Entry:
    try:
        data = json.loads(path.read_text())
        if not isinstance(data, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        return Entry(path.stem, path.stem, [], [], f"{path.name} cannot be read: {error}", {})
    rows = [row for row in data.get("rows") or [] if isinstance(row, dict) and "what" in row]
    plots = [plot for plot in data.get("plots") or [] if isinstance(plot, dict) and "name" in plot]
    return Entry(path.stem, str(data.get("title") or path.stem), rows, plots, str(data.get("not_measured") or ""), data)  # type: ignore[arg-type]


def read_all(folder: Path, order: Sequence[str]) -> list[Entry]:
    """Every file of the folder; in `order`, and what it does not name behind."""
    paths = {path.stem: path for path in sorted(folder.glob("*.json"))}
    names = [name for name in order if name in paths] + [name for name in paths if name not in order]
    return [read(paths[name]) for name in names]


def verdict(row: Row) -> Verdict | None:
    """None: it has no goal."""
    if not row.get("goal"):
        return None
    values = row.get("values", [0.0])
    if row.get("reached") is None or not values or len(finite(values)) < len(values):
        return "not measured"
    return "reached" if row["reached"] else "missed"


def goals(entries: Iterable[Entry]) -> list[tuple[Entry, Row, Verdict]]:
    return [(entry, row, said) for entry in entries for row in entry.rows if (said := verdict(row)) is not None]


def losses(entries: Iterable[Entry]) -> list[tuple[Entry, Row]]:
    """By the one rule in `suite.loses`: of each suite the worst first."""

    def by_how_much(row: Row) -> float:
        middle = statistics.median(finite(row["values"]))
        return math.inf if middle <= 0 else abs(math.log(middle))

    return [(entry, row) for entry in entries for row in sorted(filter(loses, entry.rows), key=by_how_much, reverse=True)]


def is_missing(row: Row) -> bool:
    return row.get("value") == "not measured"


def unmeasured(entry: Entry) -> dict[str, list[str]]:
    """By the reason: what was not measured for it."""
    found: dict[str, list[str]] = {entry.not_measured: ["the whole suite"]} if entry.not_measured else {}
    for row in entry.rows:
        if is_missing(row):
            found.setdefault(row.get("note") or "no reason is given", []).append(row["what"])
    return found


def newest(entries: Sequence[Entry]) -> Entry | None:
    return max(entries, key=lambda entry: str(entry.data.get("when", "")), default=None)


def differing(entries: Iterable[Entry], field: str) -> list[str]:
    """The different values of a field in the files, in order."""
    return list(dict.fromkeys(str(entry.data[field]) for entry in entries if entry.data.get(field) is not None))


def commit(entry: Entry) -> str:
    machine = entry.machine
    return f"{machine.get('commit', '?')}{' (modified)' if machine.get('modified') else ''}"


def machine_line(machine: dict[str, Any]) -> str:
    return f"{machine.get('cpus', '?')} × {machine.get('cpu', '?')}, Linux {machine.get('kernel', '?')}"


def how_long(seconds: object) -> str:
    if not isinstance(seconds, int | float):
        return "?"
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60:02} s" if whole < 6000 else f"{whole // 3600} h {whole % 3600 // 60:02} min"
