# SPDX-License-Identifier: Apache-2.0
"""Makes docs/benchmarks.md and the pictures that the README shows of results/*.json, wholly: text that is not a figure is in
benchmarks.md.in. In the README only what stands between two marks is made. All pictures are in the report (report.py).

Nothing in a result is taken for markup. Knows no suite.
"""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from string import Template

from results import (
    Entry,
    commit,
    differing,
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

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = ROOT / "bench" / "benchmarks.md.in"
README_BEGIN, README_END = (
    "<!-- The next lines are made by `make bench-publish`. -->",
    "<!-- The lines before are made by `make bench-publish`. -->",
)
SIGNS = {"reached": "✅ reached", "missed": "❌ missed", "not measured": "not measured", None: ""}


def text(value: object) -> str:
    """Neither HTML nor Markdown, in a cell of a table or elsewhere; no path of the machine that measured."""
    words = " ".join(str(value).replace(f"{ROOT}/", "").split())
    return re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", html.escape(words, quote=False))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def what(row: Row) -> str:
    return text(row["what"]) + (f"<br><sub>{text(row['note'])}</sub>" if row.get("note") else "")


def file_name(entry: Entry, plot: Plot, taken: Collection[str]) -> str:
    stem = re.sub(r"[^a-z0-9]+", "-", f"{entry.suite}-{plot['name']}".lower()).strip("-")
    numbered = (f"{stem}{'' if number == 1 else f'-{number}'}.svg" for number in itertools.count(1))
    return next(name for name in numbered if name not in taken)


def shown_by(readme: Path) -> frozenset[str]:
    """File names of the pictures of benchmarks that this page shows."""
    return frozenset(re.findall(r"\]\(docs/benchmarks/([\w-]+\.svg)\)", readme.read_text()))


def pictures(entry: Entry, folder: Path, names: Collection[str] | None) -> list[str]:
    """Draws those of these names (None: all); the lines that show them."""
    import plots

    shown: list[str] = []
    for plot in entry.plots:
        if names is not None and file_name(entry, plot, ()) not in names:
            continue
        try:
            drawn = plots.svg(plot, in_page=False)
        except Exception as error:  # as in the report
            shown.append(f"No picture of {text(plot.get('title') or plot['name'])}: {text(plots.why_not(error))}")
            continue
        name = file_name(entry, plot, {path.name for path in folder.iterdir()})
        (folder / name).write_text(drawn)
        shown.append(f"![{text(plots.described(plot))}]({folder.name}/{name})")
        if plot.get("caption"):
            shown.append(f"<sub>{text(plot['caption'])}</sub>")
    return shown


def section(entry: Entry, folder: Path, names: Collection[str] | None) -> str:
    plan = entry.data.get("plan") or {}
    how = f"Mode {entry.data.get('mode', '?')}, {plan.get('rounds', '?')} rounds of {plan.get('seconds', '?')} s a run"
    how += f", took {how_long(entry.data.get('took_seconds'))}, commit {commit(entry)}."
    parts = [f"## {text(entry.suite)}", text(entry.title), text(how), *pictures(entry, folder, names)]
    measured = [row for row in entry.rows if not is_missing(row)]
    if measured:
        cells = [(what(row), text(row.get("value", "")), text(row.get("goal", "")), SIGNS[verdict(row)]) for row in measured]
        parts.append(table(("what", "median (smallest-largest)", "goal", ""), cells))
    unknown = unmeasured(entry)
    if unknown:
        parts.append("Not measured:\n\n" + "\n".join(f"- {text(why)}: {text('; '.join(names))}" for why, names in unknown.items()))
    return "\n\n".join(parts)


def headlines(entries: Sequence[Entry]) -> str:
    """The tables that some suites put first of all."""
    parts = []
    for entry in entries:
        found = entry.data.get("headline")
        if not isinstance(found, dict) or not found.get("rows"):
            continue
        when = str(entry.data.get("when", ""))[:10]
        how = f"{found['caption']} Medians of {(entry.data.get('plan') or {}).get('rounds', '?')} rounds, {when}, commit {commit(entry)}."
        parts += [table([text(cell) for cell in found["head"]], [[text(cell) for cell in cells] for cells in found["rows"]]), text(how)]
    return "\n\n".join(parts)


def circumstances(entries: Sequence[Entry], last: Entry) -> str:
    facts = [
        ("machine", machine_line(last.machine)),
        ("commit", ", ".join(dict.fromkeys(commit(entry) for entry in entries if entry.machine))),
        ("mode", ", ".join(differing(entries, "mode"))),
        ("measured", ", ".join(sorted({when[:10] for when in differing(entries, "when")}))),
    ]
    versions = last.machine.get("versions")
    if isinstance(versions, dict):
        facts.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return table(("", ""), [(name, text(value)) for name, value in facts])


def document(entries: Sequence[Entry], folder: Path, names: Collection[str] | None) -> str:
    """The page; its pictures are drawn into `folder`, which stands beside it."""
    last = newest(entries)
    if last is None:
        raise ValueError("there are no results to publish")
    found, worse = goals(entries), losses(entries)
    said = [word for _, _, word in found]
    counts = ", ".join(f"{said.count(word)} {word}" for word in ("reached", "missed", "not measured"))
    goal_rows = [(text(e.suite), text(r["what"]), text(r.get("value", "")), text(r["goal"]), SIGNS[word]) for e, r, word in found]
    loss_rows = [(text(e.suite), what(r), text(r.get("value", "")), f"{r.get('better')} is better") for e, r in worse]
    commits = {commit(entry) for entry in entries if entry.machine}
    return (
        Template(TEMPLATE.read_text())
        .substitute(
            circumstances=circumstances(entries, last),
            mixed="The suites come from different runs; each says which." if len(commits) > 1 else "",
            headlines=headlines(entries),
            counts=f"Of {len(said)} goals: {counts}.",
            goals=table(("suite", "what", "measured", "goal", ""), goal_rows) if goal_rows else "No result has a goal.",
            losses=table(("suite", "what", "measured", ""), loss_rows) if loss_rows else "Nowhere in these results.",
            suites="\n\n".join(section(entry, folder, names) for entry in entries),
        )
        .replace("\n\n\n\n", "\n\n")
    )


def write(results: Path, docs: Path, order: Sequence[str], names: Collection[str] | None = None) -> Path:
    """docs/benchmarks.md and docs/benchmarks/: the pictures of these file names (None: all)."""
    folder = docs / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.svg"):
        old.unlink()
    path = docs / "benchmarks.md"
    path.write_text(document(read_all(results, order), folder, names))
    return path


def write_headlines(results: Path, readme: Path, order: Sequence[str]) -> bool:
    """Between its two marks; whether there was anything to write."""
    before, begin, rest = readme.read_text().partition(README_BEGIN)
    _, end, after = rest.partition(README_END)
    made = headlines(read_all(results, order))
    if not (begin and end and made):
        return False
    readme.write_text(f"{before}{begin}\n\n{made}\n\n{end}{after}")
    return True
