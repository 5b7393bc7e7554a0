# SPDX-License-Identifier: Apache-2.0
"""``fvd-lv check``: is the metadata whole? Reads only."""

from __future__ import annotations

import argparse
from dataclasses import asdict

import fvd
from fvd.cli.options import Subparsers, add_base_allow, add_command, add_volumes
from fvd.cli.progress import Progress
from fvd.cli.several import Answer, run_each
from fvd.errors import Corrupt
from fvd.units import format_size

EXAMPLES = """\
  fvd-lv check file:vm1.img && echo whole
  fvd-lv check vg0/vm1 vg0/vm2 vg0/vm3

Exit code 0: whole; 7: damaged, and the output says where. A disk that was not closed cleanly is whole if its journal is."""


def register(subparsers: Subparsers) -> None:
    parser = add_command(subparsers, "check", "check that a disk's metadata is whole; changes nothing", run, EXAMPLES)
    add_volumes(parser)
    add_base_allow(parser)


def run(arguments: argparse.Namespace) -> int:
    return run_each(arguments, lambda volume: check(volume, arguments.base_allow, show_progress=arguments.output != "json"))


def check(volume: str, base_allow: list[str], *, show_progress: bool) -> Answer:
    with Progress("checking", enabled=show_progress) as progress:
        report = fvd.check(volume, progress=progress, base_allow=base_allow)
    state = "in use" if report.served else "clean" if report.clean else "not closed cleanly (the next open replays its journal)"
    lines = [f"{report.volume}: damaged: {problem}" for problem in report.errors] or [
        f"{report.volume}: whole; {state}; {report.mapped_chunks} chunks, {format_size(report.mapped_bytes)} mapped"
    ]
    lines += [f"{report.volume}: note: {warning}" for warning in report.warnings]
    return asdict(report), lines, Corrupt.exit_code if report.errors else 0
