# SPDX-License-Identifier: Apache-2.0
"""``fvd-lv profile``: what a guest reads from the base, saved for later disks to prefetch first; and a picture of it."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict

import fvd
from fvd.cli.map_volume import SHADES, fill, ruler, shade
from fvd.cli.options import Subparsers, add_command, refuse_options, seconds
from fvd.cli.output import Output, share, terminal_width
from fvd.units import format_size

EXAMPLES = """\
  fvd-lv profile record vg0/vm1
  fvd-lv profile record vg0/vm1 --seconds 120 --file /srv/debian-12.fvd-profile
  fvd-lv profile show /srv/debian-12.raw.fvd-profile

record saves which extents the guest has read from the base since the disk was served, in order: serve it, let the guest boot, record.
Later disks over the same base copy these first when they are prefetched."""


def register(subparsers: Subparsers) -> None:
    parser = add_command(subparsers, "profile", "save what a guest reads from its base, for prefetching", run, EXAMPLES)
    parser.add_argument("action", choices=("record", "show"), help="save what a served disk has read, or show a profile")
    parser.add_argument("target", metavar="VOLUME|FILE", help="record: a disk that is served; show: a profile")
    parser.add_argument("--file", metavar="FILE", help="record: output file (default: IMAGE.fvd-profile beside the base)")
    parser.add_argument("--seconds", metavar="S", type=seconds, help="record: wait S seconds first, for example while the guest boots")


def run(arguments: argparse.Namespace) -> int:
    refuse_options(arguments, arguments.action != "record", ("file", "seconds"), "profile record")
    output = Output(arguments.output)
    if arguments.action == "show":
        profile = fvd.read_profile(arguments.target)
        output.result(asdict(profile), [] if output.is_json else draw(profile, terminal_width()))
        return 0
    if arguments.seconds:
        fvd.prefetch_status(arguments.target)  # nobody waits for a disk that is not served
        time.sleep(arguments.seconds)
    saved = fvd.record_profile(arguments.target, arguments.file)
    output.result(asdict(saved), f"{saved.volume}: {saved.extents} reads, {format_size(saved.bytes)}, saved in {saved.path}")
    return 0


def draw(profile: fvd.Profile, width: int) -> list[str]:
    """What there is in it, and a strip of the base, shaded by how much of each part is read."""
    cells = max(20, min(100, width - 4))
    mark_bytes = profile.base_size // cells
    base = fill(merged(profile.extents), profile.base_size, cells)
    return [
        profile.path,
        f"  {len(profile.extents)} reads, {format_size(profile.bytes)}, of a base of {format_size(profile.base_size)} "
        f"({share(profile.bytes, profile.base_size)}); one mark is {format_size(mark_bytes)}",
        "  " + "".join(shade(part) for part in base),
        "  " + ruler(cells),
        f"  {SHADES[0]} nothing   {SHADES[1]} up to a third   {SHADES[2]} up to two thirds   {SHADES[3]} more   {SHADES[4]} all",
    ]


def merged(extents: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """In order of place, overlaps counted once."""
    runs: list[tuple[int, int]] = []
    for offset, length in sorted(extents):
        if runs and offset <= sum(runs[-1]):
            start = runs[-1][0]
            runs[-1] = (start, max(sum(runs[-1]), offset + length) - start)
        else:
            runs.append((offset, length))
    return runs
