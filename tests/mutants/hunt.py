# SPDX-License-Identifier: Apache-2.0
"""Builds the drawn changes, plays each against the engine's tests and fresh random worlds, and reports what found it.

    hunt.py [--seed N] [--count N] [--requests N] [--first WORLD] [--only NUMBER ...] [--list]

The build is a copy of the checked one in build/mutants, in which only the engine is compiled again. Exit status 1: a change went unnoticed
that equivalent.py does not name.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from draw import Mutant, apply, draw
from equivalent import EQUIVALENT

ROOT = Path(__file__).resolve().parents[2]
CHECKED, TREE = ROOT / "build/checked", ROOT / "build/mutants"
SEED = 20261129
COUNT = 60
AT_FIRST = 20_000  # requests before the engine's tests are asked, which take a few seconds; then the rest
WORLD_CPU_SECONDS = 40  # a world takes a tenth of a second: what takes this long never ends
TESTS_CPU_SECONDS = 120
MEMORY_BYTES_MAX = 6 << 30


def build(mutants: list[Mutant]) -> None:
    """Compiles the engine with all of them, beside the other modules as the checked build has them."""
    if not list(CHECKED.glob("fvd/engine/*.so")):
        raise SystemExit("no checked build: make checked")
    shutil.rmtree(TREE, ignore_errors=True)
    shutil.copytree(CHECKED, TREE, ignore=shutil.ignore_patterns("build", "*.c"))
    (TREE / "tests").mkdir()
    shutil.copy(ROOT / "tests/conftest.py", TREE / "tests")
    shutil.copytree(ROOT / "tests/engine", TREE / "tests/engine")
    apply(TREE, mutants)
    environment = os.environ | {"FVD_BUILD": "checked", "FVD_ONLY": "fvd.engine._engine"}
    command = [sys.executable, "-W", "ignore", "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=TREE, env=environment, check=True, stdout=subprocess.DEVNULL)


# --- one change, in a process of its own --------------------------------------------------------------------------------


def play(number: int, first: int, most: int) -> None:
    """Prints what is being done, and last of all what was found."""
    sys.path.insert(0, str(TREE))
    os.environ["FVD_TEST_BUILD"] = "release"  # the tree that the tests lie in
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES_MAX, MEMORY_BYTES_MAX))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from fvd.engine import _engine

    _engine.seed_bug(number)
    gc.freeze()
    requests, seed = worlds(first, 0, min(AT_FIRST, most))
    tests()
    worlds(seed, requests, most)
    print("unnoticed", flush=True)


def worlds(seed: int, requests: int, most: int) -> tuple[int, int]:
    """Plays until so many requests have been played in all: how many, and the next seed. Ends the process when something is found."""
    from fvd.sim.rounds import Outcome, run

    while requests < most:
        print(f"worlds {requests} {seed}", flush=True)
        signal.setitimer(signal.ITIMER_VIRTUAL, WORLD_CPU_SECONDS)  # ends the process
        outcome = Outcome()
        try:
            run(seed, outcome=outcome)
        except Exception as found:
            says = " ".join(str(found).split())[:110]
            print(f"found worlds {requests + outcome.requests} {seed} {type(found).__name__}: {says}", flush=True)
            raise SystemExit(0) from None
        requests += outcome.requests
        seed += 1
        gc.collect()  # a world is a cycle, and may have a gibibyte: what is left is the change's fault
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return requests, seed


def tests() -> None:
    """The engine's own tests. Ends the process when one fails."""
    import pytest

    class FirstFailure:
        name = ""

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed and not self.name:
                self.name = report.nodeid.split("/")[-1]

    print("tests", flush=True)
    signal.setitimer(signal.ITIMER_VIRTUAL, TESTS_CPU_SECONDS)
    failure = FirstFailure()
    if pytest.main(["-q", "-x", "-p", "no:cacheprovider", f"--rootdir={TREE}", str(TREE / "tests/engine")], plugins=[failure]) != 0:
        print(f"\nfound tests {failure.name}", flush=True)
        raise SystemExit(0)
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)


# --- all of them ----------------------------------------------------------------------------------------------------------


def judge(mutant: Mutant, first: int, most: int) -> tuple[str, str]:
    """(by what, how) a change was found: by worlds, tests, or not."""
    command = [sys.executable, __file__, "--play", str(mutant.number), "--first", str(first), "--requests", str(most)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    said = [line.split(" ", 2) for line in done.stdout.splitlines() if line.startswith(("worlds ", "tests", "found ", "unnoticed"))]
    if not said:
        raise SystemExit(f"{mutant}: {done.stdout}{done.stderr}")
    last = said[-1]
    if last[0] == "unnoticed":
        return "", f"unnoticed in {most} requests from seed {first}"
    if last[0] == "found":
        return last[1], last[2]
    # It was ended by a signal, or died: by itself, or because it never ended.
    how = signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit {done.returncode}"
    return last[0], f"{' '.join(last[1:])} never ended" if how == "SIGVTALRM" else f"{' '.join(last[1:])} died: {how}"


def main() -> int:
    arguments = argparse.ArgumentParser(description="one-line changes to the engine, and what finds them")
    arguments.add_argument("--seed", type=int, default=SEED, help="of the drawing")
    arguments.add_argument("--count", type=int, default=COUNT)
    arguments.add_argument("--requests", type=int, default=200_000, help="of fresh random worlds, for each")
    arguments.add_argument("--first", type=int, default=time.time_ns() // 1000 % (1 << 40), help="the first world")
    arguments.add_argument("--only", type=int, nargs="*", default=[], help="numbers of those that are played")
    arguments.add_argument("--list", action="store_true", help="say what is drawn, and do nothing")
    arguments.add_argument("--play", type=int, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.play is not None:
        play(given.play, given.first, given.requests)
        return 0
    mutants = draw(CHECKED if (CHECKED / "fvd").exists() else ROOT, given.seed, given.count)
    if given.list:
        print(*mutants, sep="\n")
        return 0
    build(mutants)
    by, how = judge(NOTHING, given.first, AT_FIRST)
    if by:
        raise SystemExit(f"without any change {by} find something: {how}")
    return report([mutant for mutant in mutants if not given.only or mutant.number in given.only], given.first, given.requests)


NOTHING = Mutant(0, "", 0, "", "", "nothing", "nothing", "")


def report(mutants: list[Mutant], first: int, most: int) -> int:
    counts = {"worlds": 0, "tests": 0, "equivalent": 0, "unnoticed": 0}
    for mutant in mutants:
        reason = EQUIVALENT.get(mutant.key)
        by, how = ("equivalent", reason) if reason else judge(mutant, first, most)
        counts[by or "unnoticed"] += 1
        print(f"{mutant}\n    {by or 'UNNOTICED'}: {how}", flush=True)
    print(f"{len(mutants)} changes: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    return 1 if counts["unnoticed"] else 0


if __name__ == "__main__":
    sys.exit(main())
