# SPDX-License-Identifier: Apache-2.0
"""``fvd-lv remove``: end a disk and give its storage back."""

from __future__ import annotations

import argparse
from functools import partial

import fvd
from fvd.cli.options import Subparsers, add_command, add_volumes
from fvd.cli.progress import Progress
from fvd.cli.several import Answer, run_each

EXAMPLES = """\
  fvd-lv remove file:vm1.img
  fvd-lv remove vg0/vm1 vg0/vm2
  fvd-lv remove --wipe vg0/vm1

Deletes a file, removes a logical volume, wipes the superblocks of a block device. It cannot be undone, and asks no question.
Refuses a disk that is served or open (exit code 5), and what is not an fvd disk. Removing an absent disk succeeds.
Without --wipe the disk's data stay in the extents that the group gets back, and their next owner can read them. If that may be another
tenant, vgchange --addtag fvd.wipe vg0 has every disk of the group wiped. After an interruption, repeat the command."""


def register(subparsers: Subparsers) -> None:
    parser = add_command(subparsers, "remove", "remove a disk and free its storage", run, EXAMPLES)
    add_volumes(parser)
    parser.add_argument("--wipe", action="store_true", help="first overwrite all of its storage with zeros, and verify them")


def run(arguments: argparse.Namespace) -> int:
    return run_each(arguments, partial(remove, wipe=arguments.wipe, draws=arguments.output != "json"))


def remove(volume: str, *, wipe: bool, draws: bool) -> Answer:
    with Progress("wiping", enabled=draws) as progress:
        removed = fvd.remove(volume, wipe=wipe, progress=progress)
    text = "removed" if removed else "nothing to remove: there was no disk"
    return {"volume": volume, "removed": removed}, [f"{volume}: {text}"], 0
