# SPDX-License-Identifier: Apache-2.0
"""What a suite of the benchmark is: how long it may take, what it gives back, and how a figure and a goal are written.

A suite is a module with

    TITLE: str                                  what it asks, in one line
    measure(plan: Plan) -> dict[str, Any]       every sample, as JSON; raises CannotMeasure
    rows(result) -> list[Row]                   what a reader wants to know: ratios in front, absolute figures behind
    plots(result) -> list[Plot]                 what is better seen than read
    headline(result) -> Headline                if it has one: the table that stands first of all

These only compute: results/NAME.json is enough to make the report again. What a suite could not measure it says by a row made with
`missing`, with the reason. Knows no suite and no report.
"""

from __future__ import annotations

import math
import operator
import statistics
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict

Mode = Literal["quick", "normal", "full"]


@dataclass(frozen=True)
class Plan:
    """How much to measure: `quick` all suites in about 3 minutes, `normal` in about 20, `full` everything, for hours."""

    mode: Mode
    rounds: int  # interleaved; a ratio is made within a round
    seconds: float  # one run of a round

    def of(self, quick: Any, normal: Any, full: Any) -> Any:
        """The one of three that belongs to the mode."""
        return {"quick": quick, "normal": normal, "full": full}[self.mode]


PLANS = {"quick": Plan("quick", 2, 1.5), "normal": Plan("normal", 3, 5), "full": Plan("full", 7, 5)}


class Row(TypedDict):
    """One line of a table."""

    what: str
    value: str  # median (smallest-largest), with its unit
    goal: str  # ">= 1.8", "<= 0.35", "> 0", "< 50", or ""
    reached: bool | None  # None: there is no goal, or it was not measured
    values: NotRequired[list[float]]
    note: NotRequired[str]  # the absolute figures behind a ratio, or a cause
    against: NotRequired[str]  # the peer that a ratio compares fvd with: "qemu raw". `loses` judges such rows
    better: NotRequired[Literal["more", "less"]]  # which direction of the value is good for fvd


class Series(TypedDict):
    """What one peer, or one format, showed: for each category or x, all its samples."""

    name: str
    points: list[list[float]]


class Plot(TypedDict):
    """A picture. `bars`: a group for each category, in it a bar (median) and a whisker (smallest, largest) for each series. `lines`: x is
    numeric; drawn with equal steps for equal factors if it spans many. `distribution`: each series has one point, all samples; the share of
    samples below a value is drawn over the value. `logarithmic` says how values are drawn; of a distribution they are so anyway."""

    name: str  # a file name without its ending: "random-4k"
    title: str
    kind: Literal["bars", "lines", "distribution"]
    unit: str  # of y; of the values in a distribution
    x: list[str] | list[float]  # categories, or numbers
    series: list[Series]
    x_unit: NotRequired[str]
    logarithmic: NotRequired[bool]
    better: NotRequired[Literal["more", "less"]]
    goal: NotRequired[float]  # a line across
    caption: NotRequired[str]


class Headline(TypedDict):
    """A small table of absolute figures, for the README and the begin of docs/benchmarks.md."""

    head: list[str]
    rows: list[list[str]]
    caption: str


SIGNS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


def row(
    what: str,
    values: list[float],
    *,
    unit: str = "",
    goal: str = "",
    note: str = "",
    digits: int = 2,
    against: str = "",
    better: Literal["more", "less"] | None = None,
) -> Row:
    """A figure for each round. `goal`: ">= 1.8" or "<= 0.35", compared with the median. `against` and `better`: for a ratio fvd / peer."""
    if not values:
        return missing(what, note or "no round gave this", goal)
    middle = statistics.median(values)
    written = f"{middle:.{digits}f}"
    if len(values) > 1:
        written += f" ({min(values):.{digits}f}-{max(values):.{digits}f})"
    if unit:
        written += f" {unit}"
    reached = None
    if goal:
        sign, bound = goal.split()
        reached = None if math.isnan(middle) else SIGNS[sign](middle, float(bound))
    made: Row = {"what": what, "value": written, "goal": goal, "reached": reached, "values": values, "note": note}
    if against:
        made["against"] = against
    if better:
        made["better"] = better
    return made


def missing(what: str, reason: str, goal: str = "") -> Row:
    """What was not measured, and why."""
    return {"what": what, "value": "not measured", "goal": goal, "reached": None, "note": reason}


LOSS = 0.1  # what fvd must be worse by, before it is called worse


def loses(row: Row) -> bool:
    """Whether this row is a ratio fvd / peer by which fvd is worse, by more than what rounds differ by anyway."""
    values = [value for value in row.get("values", []) if isinstance(value, int | float) and math.isfinite(value)]
    if not row.get("against") or "better" not in row or not values:
        return False
    middle = statistics.median(values)
    return middle < 1 - LOSS if row["better"] == "more" else middle > 1 + LOSS


def ratio(samples: list[dict[str, Any]], field: str, one: dict[str, Any], other: dict[str, Any]) -> list[float]:
    """samples matching `one` / samples matching `other` in `field`, round by round; rounds without both are left out."""

    def by_round(wanted: dict[str, Any]) -> dict[int, float]:
        return {s["round"]: s[field] for s in samples if all(s.get(key) == value for key, value in wanted.items())}

    ours, theirs = by_round(one), by_round(other)
    return [ours[number] / theirs[number] for number in sorted(ours) if theirs.get(number)]
