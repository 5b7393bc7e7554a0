# SPDX-License-Identifier: Apache-2.0
"""Makes results/report.html of results/*.json: one file that needs nothing else, neither a network nor a script.

Nothing in a result is taken for markup. The same results give the same bytes. Knows no suite: what there is to tell is in the rows.
"""

from __future__ import annotations

import html
import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from results import (
    Entry,
    Verdict,
    commit,
    differing,
    finite,
    goals,
    how_long,
    is_missing,
    losses,
    machine_line,
    newest,
    read_all,
    unmeasured,
    verdict,
)
from suite import Plot, Row

HERE = Path(__file__).resolve().parent
WORDS: dict[Verdict, tuple[str, str]] = {"reached": ("✓", "good"), "missed": ("✗", "bad"), "not measured": ("?", "open")}
FEW = 4  # lines of a list that is shown at once
OCTAVE = 30  # of a gauge: how far apart its marks are
LONG_JSON = 100_000  # characters; beyond that it is not indented

STYLE = HERE / "report.css"


def text(value: object) -> str:
    return html.escape(str(value))


def anchor(name: str) -> str:
    return "suite-" + (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "x")


def badge(said: Verdict | None) -> str:
    if said is None:
        return ""
    sign, look = WORDS[said]
    return f'<span class="badge {look}">{sign} {said}</span>'


def gauge(row: Row) -> str:
    """A ratio against a peer on a scale of factors: the middle is equal, to the right fvd is better, a mark is twice."""
    values = [value for value in finite(row.get("values")) if value > 0]
    if not row.get("against") or row.get("better") not in ("more", "less") or not values:
        return ""
    sign = 1 if row["better"] == "more" else -1

    def place(value: float) -> float:
        return 66 + max(-60.0, min(60.0, sign * math.log2(value) * OCTAVE))

    ends = sorted(place(value) for value in values)
    middle = place(statistics.median(values))
    look = "--open" if abs(middle - 66) < 3 else ("--good" if middle > 66 else "--bad")
    parts = [f'<path d="M{66 + step * OCTAVE} 5V13" stroke="var(--line)"/>' for step in (-2, -1, 1, 2)]
    parts.append(f'<rect x="{min(middle, 66):.1f}" y="6" width="{abs(middle - 66):.1f}" height="6" fill="var({look})"/>')
    parts.append(f'<path d="M{ends[0]:.1f} 9H{ends[-1]:.1f}" stroke="currentColor" stroke-width="1.2"/>')
    parts.append('<path d="M66 1V17" stroke="var(--soft)"/>')
    bounds = re.fullmatch(r"[<>]=? (\d+(?:\.\d+)?)", row.get("goal", ""))
    if bounds and float(bounds[1]) > 0:
        at = place(float(bounds[1]))
        parts.append(f'<path d="M{at:.1f} 1V17" stroke="currentColor" stroke-dasharray="2 2"/>')
    return f'<svg class="gauge" viewBox="0 0 132 18" aria-hidden="true">{"".join(parts)}</svg>'


def value_cells(row: Row) -> str:
    """The median strong, the rest of what is written behind it."""
    found = re.fullmatch(r"(\S+) (\([^()]*\))(.*)", row.get("value", ""), flags=re.S)
    if not found:
        return f'<td class="value"><b>{text(row.get("value", ""))}</b></td><td class="range"></td>'
    return f'<td class="value"><b>{text(found[1])}</b>{text(found[3])}</td><td class="range">{text(found[2])}</td>'


def table_row(row: Row) -> str:
    note = f"<small>{text(row['note'])}</small>" if row.get("note") else ""
    goal = f'<td class="goal">{text(row.get("goal", ""))}</td><td>{badge(verdict(row))}</td>'
    return f"<tr><td>{text(row['what'])}{note}</td>{value_cells(row)}<td>{gauge(row)}</td>{goal}</tr>"


HEAD = "<thead><tr><th>what</th><th>median</th><th>smallest-largest</th><th>for fvd: worse | better</th><th>goal</th><th></th></tr></thead>"


def table(rows: str) -> str:
    return f"<table>{HEAD}<tbody>{rows}</tbody></table>"


def grouped(pairs: Sequence[tuple[Entry, Row]]) -> str:
    """Rows of several suites, each suite under its name."""
    parts, last = [], None
    for entry, row in pairs:
        if entry.suite != last:
            parts.append(f'<tr class="group"><td colspan="6"><a href="#{anchor(entry.suite)}">{text(entry.suite)}</a></td></tr>')
            last = entry.suite
        parts.append(table_row(row))
    return table("".join(parts))


def picture(plot: Plot, prefix: str) -> str:
    """A figure; what cannot be drawn says so in its place."""
    title = text(plot.get("title") or plot["name"])
    try:
        import plots
    except ModuleNotFoundError as error:
        return f"<figure><p>{title}: not drawn ({text(error)})</p></figure>"
    try:
        drawn = plots.svg(plot, in_page=True, prefix=prefix)
    except Exception as error:  # the rest of the report is worth having
        drawn = f"<p>{title}: not drawn ({text(plots.why_not(error))})</p>"
    caption = f"<figcaption>{text(plot['caption'])}</figcaption>" if plot.get("caption") else ""
    return f"<figure>{drawn}{caption}</figure>"


def moment(when: object) -> str:
    """An ISO date in UTC, to the minute."""
    return f"{str(when)[:16].replace('T', ' ')} UTC" if when else "?"


def circumstances(entry: Entry) -> str:
    data, plan = entry.data, entry.data.get("plan") or {}
    parts = [f"mode {data.get('mode', '?')}"]
    if isinstance(plan, dict) and "rounds" in plan:
        parts.append(f"{plan['rounds']} rounds, {plan.get('seconds', '?')} s each run")
    parts += [f"took {how_long(data.get('took_seconds'))}", moment(data.get("when")), f"commit {commit(entry)}"]
    if "load_at_start" in entry.machine:
        parts.append(f"load at start {entry.machine['load_at_start']:.2f}" if finite([entry.machine["load_at_start"]]) else "")
    return " · ".join(part for part in parts if part)


def open_item(why: str, names: Sequence[str]) -> str:
    """What was not measured for one reason; a long list is folded."""
    if len(names) == 1:
        return f'<li>{text(names[0])}: <span class="soft">{text(why)}</span></li>'
    items = "".join(f"<li>{text(name)}</li>" for name in names)
    if len(names) <= FEW:
        return f'<li><span class="soft">{text(why)}:</span><ul>{items}</ul></li>'
    summary = f'<summary>{len(names)} figures: <span class="soft">{text(why)}</span></summary>'
    return f'<li><details class="plain">{summary}<ul>{items}</ul></details></li>'


def section(entry: Entry, number: int) -> str:
    parts = [f'<section id="{anchor(entry.suite)}"><h2>{text(entry.suite)}</h2><p>{text(entry.title)}</p>']
    parts.append(f'<p class="facts">{text(circumstances(entry))}</p>')
    if entry.plots:
        pictures = "".join(picture(plot, f"p{number}-{index}-") for index, plot in enumerate(entry.plots))
        parts.append(f'<div class="plots{" one" if len(entry.plots) == 1 else ""}">{pictures}</div>')
    measured = [row for row in entry.rows if not is_missing(row)]
    if measured:
        parts.append(table("".join(table_row(row) for row in measured)))
    unknown = unmeasured(entry)
    if unknown:
        parts.append(f"<h3>Not measured</h3><ul>{''.join(open_item(why, names) for why, names in unknown.items())}</ul>")
    if not entry.rows and not entry.not_measured:
        parts.append("<p class='soft'>There is no figure in this result.</p>")
    return "".join(parts) + "</section>"


def samples(entry: Entry) -> str:
    kept = {key: value for key, value in entry.data.items() if key not in ("rows", "plots")}
    written = json.dumps(kept, indent=1, ensure_ascii=False)
    if len(written) > LONG_JSON:
        written = json.dumps(kept, ensure_ascii=False)
    size = f"{len(written) / 1000:.0f} kB" if len(written) >= 1000 else f"{len(written)} bytes"
    return f"<details><summary>{text(entry.suite)} <small>({size})</small></summary><pre>{text(written)}</pre></details>"


def rules(readme: Path = HERE / "README.md") -> list[str]:
    """How it is measured: the list under "Rules" in the README of the suite."""
    try:
        found = readme.read_text().partition("## Rules\n")[2]
    except OSError:
        return []
    return [line[2:].strip() for line in found.partition("\n## ")[0].splitlines() if line.startswith("- ")]


def with_code(sentence: str) -> str:
    return re.sub("`([^`]*)`", r"<code>\1</code>", text(sentence))


def several(values: Sequence[str]) -> str:
    return ", ".join(values) if values else "?"


def summary(entries: Sequence[Entry], not_run: Sequence[str]) -> str:
    last = newest(entries)
    if last is None:
        return "<p>There are no results yet: <code>make bench</code> measures.</p>"
    said = [verdict for _, _, verdict in goals(entries)]
    open_goals, worse = said.count("not measured"), len(losses(entries))
    tiles = [
        ("good", said.count("reached"), "goals reached", "#goals"),
        ("bad" if "missed" in said else "", said.count("missed"), "goals missed", "#goals"),
        ("", open_goals, "goals not measured", "#goals"),
        ("bad" if worse else "good", worse, "ratios where fvd loses", "#losses"),
    ]
    shown = "".join(f'<a class="tile {look}" href="{where}"><b>{count}</b>{words}</a>' for look, count, words, where in tiles)
    commits = list(dict.fromkeys(commit(entry) for entry in entries if entry.machine))
    versions = last.machine.get("versions")
    days = sorted({moment(when) for when in differing(entries, "when")})
    facts: list[tuple[str, str]] = [
        ("machine", machine_line(last.machine)),
        ("commit", several(commits)),
        ("mode", several(differing(entries, "mode"))),
        ("measured", days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}" if days else "?"),
    ]
    if isinstance(versions, dict):
        facts.append(("versions", " · ".join(f"{name} {version}" for name, version in versions.items())))
    listed = "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in facts)
    chips = "".join(f'<a href="#{anchor(entry.suite)}">{text(entry.suite)}</a>' for entry in entries)
    chips += "".join(f"<span>{text(name)}: not run</span>" for name in not_run)
    mixed = "<p class='soft'>The suites come from different runs; each says which.</p>" if len(commits) > 1 else ""
    return f'<div class="tiles">{shown}</div><dl>{listed}</dl>{mixed}<nav>{chips}</nav>'


def page(entries: Sequence[Entry], not_run: Sequence[str] = (), how: Sequence[str] = ()) -> str:
    """The whole report. `not_run`: suites that have no results; `how`: the rules of measuring, in one sentence each."""
    found, worse = goals(entries), losses(entries)
    parts = ["<header><h1>fvd benchmarks</h1><p class='soft'>What fvd costs, against what would be used instead, and when it loses. "]
    parts.append("Ratios in front, absolute figures behind: one machine, one run.</p>")
    parts.append(f"{summary(entries, not_run)}</header>")
    parts.append('<section id="goals"><h2>Goals</h2>')
    parts.append("<p class='soft'>Median over the rounds. A bar to the right of the middle is better for fvd, a mark on its scale is ")
    parts.append("a factor of two, the dashed mark is the goal.</p>")
    measured = [(entry, row) for entry, row, said in found if said != "not measured"]
    unknown = [(entry, row) for entry, row, said in found if said == "not measured"]
    parts.append(grouped(measured) if measured else "<p>None was measured.</p>")
    if unknown:
        parts.append(f"<h3>Goals not measured</h3>{grouped(unknown)}")
    whole = [entry for entry in entries if entry.not_measured]
    if whole or not_run:
        items = [f"<li>{text(entry.suite)}: not measured: <span class='soft'>{text(entry.not_measured)}</span></li>" for entry in whole]
        items += [f"<li>{text(name)}: not run</li>" for name in not_run]
        parts.append(f"<h3>Suites without figures</h3><ul>{''.join(items)}</ul>")
    parts.append('</section><section id="losses"><h2>Where fvd loses</h2>')
    parts.append("<p class='soft'>Every ratio against a peer by which fvd is worse by more than 10 %, the worst of each suite first.</p>")
    parts.append(grouped(worse) if worse else "<p>Nowhere in these results.</p>")
    parts.append("</section>")
    parts += [section(entry, number) for number, entry in enumerate(entries)]
    parts.append('<section id="appendix"><h2>Appendix</h2>')
    if how:
        sentences = "".join(f"<li>{with_code(sentence)}</li>" for sentence in how)
        parts.append(f"<h3>How it was measured</h3><ul>{sentences}</ul>")
    parts.append("<h3>Every sample</h3>" + "".join(samples(entry) for entry in entries) + "</section>")
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    head = f"<head>{meta}<title>fvd benchmarks</title><style>{STYLE.read_text()}</style></head>"
    return f'<!doctype html>\n<html lang="en">{head}<body><main>{"".join(parts)}</main></body></html>\n'


def write(results: Path, order: Sequence[str]) -> Path:
    """Makes report.html beside the results. `order`: of the suites."""
    entries = read_all(results, order)
    found = {entry.suite for entry in entries}
    path = results / "report.html"
    path.write_text(page(entries, [name for name in order if name not in found], rules()))
    return path
