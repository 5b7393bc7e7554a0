"""Run the benchmarks: ``bench/run.py [--quick] [NAME...]``. Prints a table, and writes every sample to results/NAME.json.

Ratios stand in front and absolute figures behind: this says how fvd compares on one machine in one run, nothing more. What could not
be measured is named with its reason. No test depends on these figures.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]
os.chdir(ROOT)

import copying  # noqa: E402
import growth  # noqa: E402
import kernels  # noqa: E402
import nbd_servers  # noqa: E402
import opening  # noqa: E402
from machine import CannotMeasure, facts  # noqa: E402

SUITES = {"kernels": kernels, "opening": opening, "nbd_servers": nbd_servers, "growth": growth, "copying": copying}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(SUITES)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument("--rounds", type=int, help="how many interleaved rounds")
    parser.add_argument("--seconds", type=float, help="how long one run of a round takes")
    options = parser.parse_args()
    rounds = options.rounds or (3 if options.quick else 7)
    seconds = options.seconds or (2 if options.quick else 4)
    os.environ["PYTHONPATH"] = str(ROOT)
    results = ROOT / "results"
    results.mkdir(exist_ok=True)
    machine = facts()
    changed = " (modified)" if machine["modified"] else ""
    print(f"{machine['cpus']} x {machine['cpu']}, Linux {machine['kernel']}, commit {machine['commit']}{changed}")
    for name in options.names or SUITES:
        began = time.monotonic()
        try:
            result = SUITES[name].measure(rounds, seconds)
        except CannotMeasure as reason:
            print(f"\n{name}: not measured: {reason}")
            continue
        rows = SUITES[name].report(result)
        (results / f"{name}.json").write_text(json.dumps({"machine": machine, "result": result, "rows": rows}, indent=1))
        print(f"\n{name} ({rounds} rounds, {time.monotonic() - began:.0f} s)")
        for row in rows:
            verdict = {True: "reached", False: "MISSED", None: ""}[row["reached"]]
            print(f"  {row['what']:64} {row['value']:24} {row['goal']:8} {verdict}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
