# SPDX-License-Identifier: Apache-2.0
"""``fvd-lv copy-on-read``: whether a served disk keeps what its guest reads from the base."""

from __future__ import annotations

import argparse
from dataclasses import asdict

import fvd
from fvd.cli.options import ON_OFF, VOLUME_HELP, Subparsers, add_command
from fvd.cli.output import Output
from fvd.units import format_size

EXAMPLES = """\
  fvd-lv copy-on-read on vg0/vm1
  fvd-lv copy-on-read off vg0/vm1

The disk must be served. The setting lasts until its server ends. For later servers use provision or serve --copy-on-read."""


def register(subparsers: Subparsers) -> None:
    parser = add_command(subparsers, "copy-on-read", "make a served disk keep what its guest reads from the base", run, EXAMPLES)
    parser.add_argument("switch", choices=ON_OFF, help="switch copy-on-read on or off")
    parser.add_argument("volume", metavar="VOLUME", help=VOLUME_HELP)


def run(arguments: argparse.Namespace) -> int:
    status = fvd.set_copy_on_read(arguments.volume, arguments.switch == "on")
    now = "on" if status.copy_on_read else "off"
    left = f"{format_size(status.remaining_bytes)} still come" if status.remaining_bytes else "nothing comes"
    Output(arguments.output).result(asdict(status), f"{status.volume}: copy-on-read is {now}; {left} from a base")
    return 0
