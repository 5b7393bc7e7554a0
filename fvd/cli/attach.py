# SPDX-License-Identifier: Apache-2.0
"""``fvd-lv attach``: a served disk as a block device of this host."""

from __future__ import annotations

import argparse
from dataclasses import asdict

import fvd
from fvd.cli.options import Subparsers, add_command, add_volume
from fvd.cli.output import Output
from fvd.units import format_size

EXAMPLES = """\
  fvd-lv attach vg0/vm1                    then mount /dev/fvd/vm1 /mnt
  fvd-lv attach file:vm1.img --name old    as /dev/fvd/old

The disk must be served by root on this host (systemctl start fvd@NAME). It stays attached until fvd-lv detach: a server that is killed,
or restarted, is a pause for whoever uses the device."""


def register(subparsers: Subparsers) -> None:
    parser = add_command(subparsers, "attach", "make a served disk a block device of this host", run, EXAMPLES)
    add_volume(parser)
    parser.add_argument("--name", metavar="NAME", help="of its link in /dev/fvd (default: the last part of the volume's)")


def run(arguments: argparse.Namespace) -> int:
    attached = fvd.attach(arguments.volume, name=arguments.name)
    rights = ", read-only" if attached.read_only else ""
    Output(arguments.output).result(asdict(attached), f"{attached.link} ({attached.device}), {format_size(attached.size)}{rights}")
    return 0
