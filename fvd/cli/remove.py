"""``fvd-lv remove``: end a disk and give its storage back."""

from __future__ import annotations

import argparse

import fvd
from fvd.cli.options import Subparsers, add_command, add_volume
from fvd.cli.output import Output

EXAMPLES = """\
  fvd-lv remove file:vm1.img

A file is deleted; on a block device the disk's superblocks are wiped. There is no way back, and no question is asked.
A disk that is served or open is refused (exit code 5), what is not an fvd disk too. Removing what is absent is fine."""


def register(subparsers: Subparsers) -> None:
    add_volume(add_command(subparsers, "remove", "end a disk and give its storage back", run, EXAMPLES))


def run(arguments: argparse.Namespace) -> int:
    removed = fvd.remove(arguments.volume)
    text = "removed" if removed else "nothing to remove: there was no disk"
    Output(arguments.output).result({"volume": arguments.volume, "removed": removed}, f"{arguments.volume}: {text}")
    return 0
