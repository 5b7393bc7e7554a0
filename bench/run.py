# SPDX-License-Identifier: Apache-2.0
"""Run the benchmarks: ``bench/run.py [--mode quick|normal|full] [SUITE...]``. Prints tables, writes results/NAME.json and a report.

Ratios stand in front and absolute figures behind: this says how fvd compares on one machine in one run, nothing more. What could not
be measured is named with its reason. No test depends on these figures. A suite is looked up by its name when its turn comes: one that
is broken is told, and stops no other.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import report  # noqa: E402
from machine import CannotMeasure, facts  # noqa: E402
from results import Entry, commit, goals, how_long, is_missing, losses, machine_line, read, read_all, unmeasured, verdict  # noqa: E402
from suite import PLANS, Plan, Row  # noqa: E402
from versions import versions  # noqa: E402

SUITES = [
    "guest",
    "matrix",
    "zeroing",
    "pending",
    "flushes",
    "trims",
    "aging",
    "growth",
    "scale",
    "postmark",
    "seeks",
    "lvm",
    "path",
    "kernels",
]
SUITES += ["copying"]
ONLY_IN_FULL = {"copying"}  # if it is not named
ALL_OF_THEM = {"quick": "about 3 min", "normal": "about 20 min", "full": "hours"}
WHAT_WIDTH, VALUE_WIDTH, GOAL_WIDTH = 74, 28, 9


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"which: {', '.join(SUITES)} (default: all that belong to the mode)")
    parser.add_argument("--mode", choices=list(PLANS), default="normal", help="quick: 3 minutes, normal: 20, full: hours")
    parser.add_argument("--quick", action="store_const", dest="mode", const="quick", help="the same as --mode quick")
    parser.add_argument("--rounds", type=int, help="how many interleaved rounds, instead of the mode's")
    parser.add_argument("--seconds", type=float, help="how long one run of a round takes, instead of the mode's")
    parser.add_argument("--report", action="store_true", help="measure nothing: make rows, pictures and report again from the results")
    parser.add_argument("--publish", action="store_true", help="also make docs/benchmarks.md and its pictures from all results")
    parser.add_argument("--results", type=Path, default=ROOT / "results", metavar="FOLDER", help="where results are kept (results)")
    options = parser.parse_args(words)
    for name in options.suites:
        if name not in SUITES:
            parser.error(f"no suite is called {name!r}; there are {', '.join(SUITES)}")
    if (options.rounds is not None and options.rounds < 1) or (options.seconds is not None and options.seconds <= 0):
        parser.error("--rounds and --seconds must be positive")
    return options


def plan_of(options: argparse.Namespace) -> Plan:
    plan = PLANS[options.mode]
    return replace(plan, rounds=options.rounds or plan.rounds, seconds=options.seconds or plan.seconds)


def chosen(options: argparse.Namespace) -> list[str]:
    return [name for name in options.suites or SUITES if options.suites or options.mode == "full" or name not in ONLY_IN_FULL]


def seconds_last_time(path: Path, plan: Plan) -> float | None:
    """What the suite took when it last ran by the same plan."""
    data = read(path).data
    took = data.get("took_seconds")
    return took if data.get("plan") == asdict(plan) and not data.get("not_measured") and isinstance(took, int | float) else None


@contextlib.contextmanager
def suite_progress(words: str, expected_seconds: float | None) -> Iterator[None]:
    """A line that says what is being measured and since when; on a terminal only, and gone at the end."""
    if not sys.stderr.isatty():
        yield
        return
    began, ended = time.monotonic(), threading.Event()
    last_time = f" of about {how_long(expected_seconds)}" if expected_seconds else ""

    def tell() -> None:
        while not ended.wait(0.5):
            sys.stderr.write(f"\r\x1b[K{words}: {how_long(time.monotonic() - began)}{last_time}")
            sys.stderr.flush()

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


def as_json(value: Any) -> Any:
    """numpy's numbers."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"a result holds a {type(value).__name__}, which JSON does not have")


def save(path: Path, data: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(data, indent=1, default=as_json))
    partial.replace(path)


def told(error: Exception) -> str:
    """Shows where the mistake is; what the report says of it."""
    traceback.print_exception(error, file=sys.stdout)
    return f"the suite failed: {type(error).__name__}: {error}"


def computed(module: Any, result: dict[str, Any]) -> dict[str, Any]:
    """What a suite makes of its samples."""
    made = {"rows": module.rows(result), "plots": module.plots(result)}
    return made | {"headline": module.headline(result)} if hasattr(module, "headline") else made


def run_suite(name: str, plan: Plan, machine: dict[str, Any], results: Path) -> bool:
    """Measures, and writes results/NAME.json whatever comes. False: there is a mistake in the suite."""
    data: dict[str, Any] = {
        "suite": name,
        "title": name,
        "machine": machine | {"load_at_start": os.getloadavg()[0]},
        "commit": machine["commit"],
        "mode": plan.mode,
        "plan": asdict(plan),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": [],
        "plots": [],
    }
    began, sound = time.monotonic(), True
    try:
        module = importlib.import_module(name)
        data["title"] = module.TITLE
        # As it will be found in the file: rows must not need more.
        data["result"] = json.loads(json.dumps(module.measure(plan), default=as_json))
        data["took_seconds"] = time.monotonic() - began
        data |= computed(module, data["result"])
    except CannotMeasure as reason:
        data["not_measured"] = str(reason)
    except Exception as error:
        data["not_measured"], sound = told(error), False
    data.setdefault("took_seconds", time.monotonic() - began)
    save(results / f"{name}.json", data)
    return sound


def make_again(name: str, results: Path) -> bool:
    """Rows and plots by the suite as it is now, from the samples as they were; on a mistake the file stays as it is."""
    path = results / f"{name}.json"
    data = read(path).data
    if "result" not in data:
        return True
    try:
        module = importlib.import_module(name)
        renewed = {"title": module.TITLE, **computed(module, data["result"])}
    except Exception as error:
        print(f"{name}: {told(error)}")
        return False
    data.pop("not_measured", None)  # the mistake was in rows() or plots(), and is fixed
    save(path, data | renewed)
    return True


def row_line(row: Row) -> str:
    said = {"reached": "reached", "missed": "MISSED", "not measured": "not measured", None: ""}[verdict(row)]
    return f"{row['what']:{WHAT_WIDTH}} {row['value']:{VALUE_WIDTH}} {row['goal']:{GOAL_WIDTH}} {said}".rstrip()


def print_table(entry: Entry) -> None:
    data = entry.data
    print(f"\n{entry.suite} ({data['plan']['rounds']} rounds, {how_long(data['took_seconds'])}): {entry.title}")
    for row in entry.rows:
        if is_missing(row) and not row.get("goal"):
            continue
        print(f"  {row_line(row)}")
        if row.get("note"):
            print(f"      {row['note']}")
    for why, names in unmeasured(entry).items():
        print(f"  not measured: {why}{f' ({len(names)} figures)' if len(names) > 1 else '' if entry.not_measured else f' ({names[0]})'}")
    sys.stdout.flush()


def print_summary(entries: Sequence[Entry]) -> None:
    found = goals(entries)
    said = [word for _, _, word in found]
    print("\nGoals: " + ", ".join(f"{said.count(word)} {word}" for word in ("reached", "missed", "not measured")))
    for entry, row, _ in found:
        print(f"  {entry.suite:9} {row_line(row)}")
    for entry in entries:
        if entry.not_measured:
            print(f"  {entry.suite:9} not measured: {entry.not_measured}")
    if worse := losses(entries):
        print(f"\nfvd is worse than a peer by more than 10 % in {len(worse)} ratios:")
        for entry, row in worse:
            print(f"  {entry.suite:9} {row['what']:{WHAT_WIDTH}} {row['value']}")


def measure_all(names: Sequence[str], plan: Plan, results: Path) -> bool:
    machine = facts() | {"versions": versions()}
    print(f"{machine_line(machine)}, commit {commit(Entry('', '', [], [], '', {'machine': machine}))}")
    everything = f"all of mode {plan.mode}: {ALL_OF_THEM[plan.mode]}" if len(names) > 1 else f"mode {plan.mode}"
    sound, done = True, []
    try:
        for number, name in enumerate(names, start=1):
            path = results / f"{name}.json"
            with suite_progress(f"{name}, {number} of {len(names)} ({everything})", seconds_last_time(path, plan)):
                sound &= run_suite(name, plan, machine, results)
            done.append(read(path))
            print_table(done[-1])
    finally:
        print_summary(done)
    return sound


def publish(results: Path) -> None:
    from publish import shown_by, write, write_headlines

    readme = ROOT / "README.md"
    print(f"written: {write(results, ROOT / 'docs', SUITES, shown_by(readme)).relative_to(ROOT)}")
    if write_headlines(results, readme, SUITES):
        print(f"written: the first table of {readme.relative_to(ROOT)}")


def main(words: Sequence[str] | None = None) -> int:
    options = arguments(words)
    # Servers and loop devices end with what began them, also when this is ended from outside.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    results = options.results.absolute()
    os.chdir(ROOT)
    os.environ["PYTHONPATH"] = str(ROOT)
    results.mkdir(parents=True, exist_ok=True)
    sound, interrupted = True, False
    try:
        if options.report:
            for name in options.suites or SUITES:
                sound &= make_again(name, results)
            print_summary(read_all(results, SUITES))
        else:
            sound = measure_all(chosen(options), plan_of(options), results)
    except KeyboardInterrupt:
        interrupted = True
        print("\ninterrupted: the report has what was measured before")
    print(f"\nreport: {report.write(results, SUITES)}")
    if options.publish and not interrupted:
        publish(results)
    return 130 if interrupted else 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
