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

A file is deleted; on a block device the disk's superblocks are wiped. There is no way back, and no question is asked.
A disk that is served or open is refused (exit code 5), what is not an fvd disk too. Removing what is absent is fine.
Without --wipe what the disk held stays in the extents that the group gets back, for whoever gets them next. Where that is another tenant,
vgchange --addtag fvd.wipe vg0 has every disk of the group wiped. Interrupted, the same command again goes on."""


def register(subparsers: Subparsers) -> None:
    parser = add_command(subparsers, "remove", "end a disk and give its storage back", run, EXAMPLES)
    add_volumes(parser)
    parser.add_argument("--wipe", action="store_true", help="first make zeros of all that it stored, and read them back")


def run(arguments: argparse.Namespace) -> int:
    return run_each(arguments, partial(remove, wipe=arguments.wipe, draws=arguments.output != "json"))


def remove(volume: str, *, wipe: bool, draws: bool) -> Answer:
    with Progress("wiping", enabled=draws) as progress:
        removed = fvd.remove(volume, wipe=wipe, progress=progress)
    text = "removed" if removed else "nothing to remove: there was no disk"
    return {"volume": volume, "removed": removed}, [f"{volume}: {text}"], 0
