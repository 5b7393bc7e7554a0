# SPDX-License-Identifier: Apache-2.0
"""``fvd-lv torture``: random disks on a simulated device, until something is found; and the same load against any NBD server."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import tempfile
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from fvd.cli.failure import PROGRAM
from fvd.cli.options import Subparsers, add_command, number, whole_number
from fvd.cli.output import Output, say, terminal_width
from fvd.errors import InvalidArgument

if TYPE_CHECKING:
    from fvd.sim.torture import FailedWorld, Kind, Tally

EXIT_FOUND = 1
EXIT_NOTHING = 1  # was played, so that nothing is known
NOTHING = "nothing was played, which proves nothing; raise --seconds, --requests or --worlds"
DEPTH = 64  # requests in flight to another server
IMAGE_BYTES = 16 << 20

EXAMPLES = """\
  fvd-lv torture                           until something is found, or Ctrl-C
  fvd-lv torture --seconds 60
  fvd-lv torture --seed 4711 --worlds 1 --trace
  fvd-lv torture --seed 4711 --shrink
  fvd-lv torture --nbd nbd+unix:///?socket=vm1.sock
  fvd-lv torture --qemu qcow2 --requests 20000
  fvd-lv torture --console --disk size=1M base=300K
  fvd-lv torture --script three-writes

Exit code 0: no failure found; 1: a failure, and the output has the one command that repeats it; or nothing was played."""


def register(subparsers: Subparsers) -> None:
    parser = add_command(subparsers, "torture", "test the engine on a simulated disk that controls the order of every event", run, EXAMPLES)
    parser.add_argument("--seed", type=whole_number, metavar="N", help="seed of the first world (default: a fresh one)")
    parser.add_argument("--worlds", type=whole_number, metavar="N", help="stop after N worlds")
    parser.add_argument("--requests", type=whole_number, metavar="N", help="stop after N guest requests")
    parser.add_argument("--seconds", type=number, metavar="S", help="stop after S seconds")
    parser.add_argument("--jobs", type=whole_number, metavar="N", help="processes (default: one for each processor)")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at the first failure")
    parser.add_argument("--bytes", action="store_true", help="requests at any byte, not only whole sectors, judged byte by byte")
    parser.add_argument("--combinations", action="store_true", help="each world has another combination of features, 2,000 requests")
    one = parser.add_argument_group("one world")
    one.add_argument("--trace", action="store_true", help="print every event of the world of --seed")
    one.add_argument("--only", metavar="REQUESTS", help="play only these requests of it, as --shrink prints them")
    one.add_argument("--events", type=whole_number, default=0, metavar="N", help="another order of events for the same requests")
    one.add_argument("--shrink", action="store_true", help="find the fewest requests of the failing world of --seed that still fail")
    other = parser.add_argument_group("other servers")
    other.add_argument("--nbd", metavar="URI", help="play against this NBD server; overwrites its contents")
    other.add_argument("--qemu", metavar="FORMAT", help="play against qemu-nbd with a new image: qcow2, qed, raw, vmdk, vdi, vhdx")
    other.add_argument("--gentle", action="store_true", help="with --qemu: no zeroes and trims, which QEMU 7.2 gets wrong in qcow2 and qed")
    other.add_argument("--base", action="store_true", help="with --qemu: the image lies over another one")
    hand = parser.add_argument_group("by hand")
    hand.add_argument("--console", action="store_true", help="decide every event yourself")
    hand.add_argument("--disk", metavar="NAME=VALUE", nargs="+", help="parameters of the disk: size=1M block=64K base=300K layout=raw ...")
    hand.add_argument("--script", metavar="NAME", help="run a console script: a file, or one that comes with fvd")


def run(arguments: argparse.Namespace) -> int:
    _check(arguments)
    output = Output(arguments.output)
    if arguments.console or arguments.script:
        return _console(arguments, output)
    if arguments.nbd or arguments.qemu:
        return _foreign(arguments, output)
    if arguments.shrink:
        return _shrink(arguments, output)
    if arguments.trace or arguments.only or arguments.events:
        return _one(arguments, output)
    return _many(arguments, output)


def _check(arguments: argparse.Namespace) -> None:
    chosen = [name for name in ("shrink", "nbd", "qemu", "console", "script") if getattr(arguments, name)]
    if len(chosen) > 1:
        raise InvalidArgument(f"--{chosen[0]} and --{chosen[1]} exclude each other")
    if (arguments.trace or arguments.only or arguments.shrink or arguments.events) and arguments.seed is None:
        raise InvalidArgument("--trace, --only, --events and --shrink apply to one world: give its --seed")
    if arguments.bytes and arguments.combinations:
        raise InvalidArgument("--bytes and --combinations exclude each other")
    if (arguments.bytes or arguments.combinations) and (arguments.trace or arguments.only or arguments.shrink or arguments.events):
        raise InvalidArgument("only random worlds can be traced or shrunk, not those of --bytes or --combinations")
    if (arguments.base or arguments.gentle) and not arguments.qemu:
        raise InvalidArgument("--base and --gentle require --qemu")
    for name in ("worlds", "requests", "seconds", "jobs"):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            raise InvalidArgument(f"--{name} {value}: must be above 0")
    if arguments.seed is not None and not 0 <= arguments.seed < 1 << 63:
        raise InvalidArgument(f"--seed {arguments.seed}: a seed is between 0 and 2**63 - 1")


def fresh_seed() -> int:
    """A seed that nobody has tried. Short enough to be read out."""
    return int.from_bytes(os.urandom(4), "little")


# --- worlds ----------------------------------------------------------------------------------------------------------


def _many(arguments: argparse.Namespace, output: Output) -> int:
    from fvd.sim.torture import torture

    kind: Kind = "bytes" if arguments.bytes else "combinations" if arguments.combinations else "worlds"
    seed = fresh_seed() if arguments.seed is None else arguments.seed
    meter = _Meter(arguments, enabled=not output.is_json)
    tally = torture(
        seed,
        worlds=arguments.worlds,
        requests=arguments.requests,
        seconds=arguments.seconds,
        jobs=arguments.jobs or os.cpu_count() or 1,
        kind=kind,
        keep_going=arguments.keep_going,
        progress=meter,
    )
    meter.clear()
    output.result(asdict(tally) | {"requests_per_cpu_second": round(tally.requests_per_cpu_second)}, _report(tally, kind))
    if not tally.requests and not tally.found:
        say(f"{PROGRAM}: {NOTHING}")
        return EXIT_NOTHING
    return EXIT_FOUND if tally.found else 0


def _report(tally: Tally, kind: Kind) -> list[str]:
    lines = []
    for failure in tally.found:
        lines += [f"seed {failure.seed}: {failure.error}", f"  again: {_again(failure, kind)}"]
        if kind == "worlds":
            lines.append(f"  smaller: {_again(failure, kind, '--shrink')}")
    last = tally.first_seed + max(0, tally.worlds - 1)
    lines.append(
        f"seeds {tally.first_seed} to {last}: {tally.worlds} worlds, {tally.requests} requests, {tally.crashes} crashes, "
        f"{tally.kills} kills, {tally.closes} closes, {tally.damages} times damaged metadata"
    )
    lines.append(
        f"{tally.seconds:.0f} s; {tally.requests_per_cpu_second:.0f} requests a second on one core; "
        + (f"{len(tally.found)} worlds failed" if tally.found else "nothing found" if tally.requests else "nothing played")
    )
    return lines


def _again(failure: FailedWorld, kind: Kind, *more: str) -> str:
    words = [
        PROGRAM,
        "torture",
        "--seed",
        str(failure.seed),
        *(["--worlds", "1"] if not more else []),
        *([f"--{kind}"] if kind != "worlds" else []),
        *more,
    ]
    return shlex.join(words)


class _Meter:
    """A line that says how far it is, on a terminal only."""

    def __init__(self, arguments: argparse.Namespace, enabled: bool) -> None:
        self._limits = arguments.worlds, arguments.requests, arguments.seconds
        self._enabled = enabled and sys.stderr.isatty()
        self._drawn = 0.0

    def __call__(self, tally: Tally) -> None:
        now = time.monotonic()
        if not self._enabled or now - self._drawn < 0.2:
            return
        self._drawn = now
        done = (tally.worlds, tally.requests, tally.seconds)
        shares = [part / limit for part, limit in zip(done, self._limits, strict=True) if limit]
        share = f"{100 * min(1.0, max(shares)):3.0f} %  " if shares else ""
        line = f"{share}{tally.worlds} worlds, {tally.requests} requests, {tally.crashes} crashes, {len(tally.found)} found"
        sys.stderr.write("\r" + line[: terminal_width() - 1] + "\x1b[K")
        sys.stderr.flush()

    def clear(self) -> None:
        if self._enabled and self._drawn:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def _one(arguments: argparse.Namespace, output: Output) -> int:
    from fvd.sim.rounds import Outcome, run
    from fvd.sim.shrink import parse_kept
    from fvd.sim.world import World

    only = parse_kept(arguments.only) if arguments.only else None
    log: list[str] = []
    outcome = Outcome()
    error = None
    try:
        run(arguments.seed, only=only, events=arguments.events, log=log, outcome=outcome)
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    lines = [str(World(arguments.seed).shape), *log] if arguments.trace else []
    lines.append(f"seed {arguments.seed}: {outcome.requests} requests: {error or 'nothing found'}")
    output.result({"seed": arguments.seed} | asdict(outcome) | {"error": error, "log": log if arguments.trace else None}, lines)
    if not outcome.requests and not error:
        say(f"{PROGRAM}: nothing was played, which proves nothing; name other requests with --only")
        return EXIT_NOTHING
    return EXIT_FOUND if error else 0


def _shrink(arguments: argparse.Namespace, output: Output) -> int:
    from fvd.cli.progress import Progress
    from fvd.sim.shrink import shrink

    with Progress("shrinking", enabled=not output.is_json) as progress:
        shrunk = shrink(arguments.seed, events=arguments.events, progress=progress)
    command = shlex.join([PROGRAM, "torture", "--seed", str(shrunk.seed), "--only", shrunk.only, "--events", str(shrunk.events), "--trace"])
    lines = [
        f"seed {shrunk.seed}: {shrunk.error}",
        f"  {len(shrunk.kept)} requests are enough, in {len(shrunk.rounds)} rounds (found in {shrunk.runs} runs)",
        f"  again: {command}",
    ]
    output.result(asdict(shrunk) | {"only": shrunk.only, "command": command}, lines)
    return EXIT_FOUND


# --- others ----------------------------------------------------------------------------------------------------------


def _foreign(arguments: argparse.Namespace, output: Output) -> int:
    from fvd.sim import foreign, qemu_nbd
    from fvd.sim._oracle import Violation

    # qemu-nbd must not outlive us.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    seed = fresh_seed() if arguments.seed is None else arguments.seed
    requests = arguments.requests or 10_000
    target = (
        ["--nbd", arguments.nbd]
        if arguments.nbd
        else ["--qemu", arguments.qemu, *(f"--{name}" for name in ("base", "gentle") if getattr(arguments, name))]
    )
    again = shlex.join([PROGRAM, "torture", *target, "--seed", str(seed), "--requests", str(requests)])
    try:
        if arguments.nbd:
            report = foreign.torture_uri(arguments.nbd, seed=seed, requests=requests, depth=DEPTH)
        else:
            with tempfile.TemporaryDirectory(prefix="fvd-torture-") as folder:
                report = qemu_nbd.torture_qemu(
                    arguments.qemu,
                    seed=seed,
                    requests=requests,
                    rounds=max(2, requests // 1000),
                    size_bytes=IMAGE_BYTES,
                    base=arguments.base,
                    directory=folder,
                    gentle=arguments.gentle,
                    depth=DEPTH,
                )
    except Violation as error:
        output.result(
            {"seed": seed, "error": str(error), "command": again},
            [f"seed {seed}: {error}", f"  again (the same requests; the timing is the server's): {again}"],
        )
        return EXIT_FOUND
    output.result(asdict(report), [f"{report}: nothing found"])
    return 0


def _console(arguments: argparse.Namespace, output: Output) -> int:
    from fvd.sim import console, terminal
    from fvd.sim._oracle import Violation

    options = _disk(arguments.disk or [])
    if not arguments.script:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # each gives up a line, and none ends the session
        return terminal.interact(options)
    try:
        result = console.run_script(arguments.script, options)
    except Violation as error:
        output.result({"script": arguments.script, "error": str(error)}, [f"{arguments.script}: {error}"])
        return EXIT_FOUND
    output.result({"script": arguments.script, "output": result.output}, result.output)
    return 0


def _disk(words: list[str]) -> dict[str, str]:
    """``size=1M base=300K``, as the console's command ``disk`` has them."""
    pairs = [word.partition("=") for word in words]
    for name, equals, value in pairs:
        if not (name and equals and value):
            raise InvalidArgument(f"--disk {name}: write NAME=VALUE, for example size=1M; the console's help disk names them")
    return {name: value for name, _, value in pairs}
