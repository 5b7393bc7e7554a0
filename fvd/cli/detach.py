# SPDX-License-Identifier: Apache-2.0
"""``fvd-lv detach``: a disk is no block device of this host any more."""

from __future__ import annotations

import argparse
from dataclasses import asdict

import fvd
from fvd.cli.options import Subparsers, add_command, add_volume
from fvd.cli.output import Output

EXAMPLES = """\
  umount /mnt && fvd-lv detach vg0/vm1
  fvd-lv detach vg0/vm1 --force    though its server is gone for good

What was written to the device is made durable first. A device that is mounted or open is not detached."""


def register(subparsers: Subparsers) -> None:
    parser = add_command(subparsers, "detach", "end an attached disk's being a block device of this host", run, EXAMPLES)
    add_volume(parser)
    parser.add_argument(
        "--force", action="store_true", help="though nobody serves the disk or a flush fails; what has not reached the disk is lost"
    )


def run(arguments: argparse.Namespace) -> int:
    detached = fvd.detach(arguments.volume, force=arguments.force)
    Output(arguments.output).result(asdict(detached), f"{detached.volume} is detached from {detached.device}")
    return 0
