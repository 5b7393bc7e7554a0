# SPDX-License-Identifier: Apache-2.0
"""``fvd-lv acknowledge``: an administrator has seen that acknowledged writes of a disk may be gone."""

from __future__ import annotations

import argparse

import fvd
from fvd.cli.options import Subparsers, add_command, add_volume
from fvd.cli.output import Output

EXAMPLES = """\
  fvd-lv info file:vm1.img
  fvd-lv acknowledge file:vm1.img

First check the guest's data (fsck, the checks of its databases), and restore what is wrong. This command only ends the notice (possible
loss in info, the event possible_loss at each open); it changes no data. Works on a disk that is served or was closed cleanly. Succeeds if
there is nothing to acknowledge."""


def register(subparsers: Subparsers) -> None:
    add_volume(add_command(subparsers, "acknowledge", "confirm that you know that acknowledged writes may be lost", run, EXAMPLES))


def run(arguments: argparse.Namespace) -> int:
    acknowledged = fvd.acknowledge(arguments.volume)
    text = "acknowledged: the possible loss is no longer reported" if acknowledged else "nothing to acknowledge: no loss is known"
    Output(arguments.output).result({"volume": arguments.volume, "acknowledged": acknowledged}, f"{arguments.volume}: {text}")
    return 0
