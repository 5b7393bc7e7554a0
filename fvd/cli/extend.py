# SPDX-License-Identifier: Apache-2.0
"""``fvd-lv extend``: more storage under a disk, served or not."""

from __future__ import annotations

import argparse
from dataclasses import asdict

import fvd
from fvd.cli.options import Subparsers, add_command, add_volume, size
from fvd.cli.output import Output, sizes

EXAMPLES = """\
  fvd-lv extend file:vm1.img
  fvd-lv extend file:vm1.img --by 20G

A served disk grows by itself before it runs out; this command grows it earlier. The virtual size does not change."""


def register(subparsers: Subparsers) -> None:
    parser = add_command(subparsers, "extend", "add storage to a disk, served or not", run, EXAMPLES)
    add_volume(parser)
    parser.add_argument("--by", metavar="SIZE", type=size, help="how much (default: the disk's grow step)")


def run(arguments: argparse.Namespace) -> int:
    grown = fvd.extend(arguments.volume, arguments.by)
    Output(arguments.output).result(
        asdict(grown),
        f"{grown.volume}: storage is now {sizes(grown.storage_size)}, {sizes(grown.added_bytes)} more than before",
    )
    return 0
