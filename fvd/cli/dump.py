# SPDX-License-Identifier: Apache-2.0
"""``fvd-lv dump``: a disk's metadata as it lies on the storage, for whoever must understand it. Reads only, interprets nothing."""

from __future__ import annotations

import argparse
import json

import fvd
from fvd.cli.options import Subparsers, add_command, add_volume
from fvd.cli.output import Output

EXAMPLES = """\
  fvd-lv dump file:vm1.img
  fvd-lv dump file:vm1.img --output json > vm1-metadata.json

Shows damaged metadata too: that is what it is for. fvd/FORMAT.md names the fields. Refused while the disk is served."""


def register(subparsers: Subparsers) -> None:
    add_volume(add_command(subparsers, "dump", "show a disk's metadata as it lies on the storage", run, EXAMPLES))


def run(arguments: argparse.Namespace) -> int:
    contents = fvd.dump(arguments.volume)
    output = Output(arguments.output)
    output.result(contents, [] if output.is_json else json.dumps(contents, indent=2))
    return 0
