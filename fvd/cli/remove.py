"""``fvd-lv remove``: end a disk and give its storage back."""

from __future__ import annotations

import argparse

import fvd
from fvd.cli.options import Subparsers, add_command, add_volumes
from fvd.cli.several import Answer, run_each

EXAMPLES = """\
  fvd-lv remove file:vm1.img
  fvd-lv remove vg0/vm1 vg0/vm2

A file is deleted; on a block device the disk's superblocks are wiped. There is no way back, and no question is asked.
A disk that is served or open is refused (exit code 5), what is not an fvd disk too. Removing what is absent is fine."""


def register(subparsers: Subparsers) -> None:
    add_volumes(add_command(subparsers, "remove", "end a disk and give its storage back", run, EXAMPLES))


def run(arguments: argparse.Namespace) -> int:
    return run_each(arguments, remove)


def remove(volume: str) -> Answer:
    removed = fvd.remove(volume)
    text = "removed" if removed else "nothing to remove: there was no disk"
    return {"volume": volume, "removed": removed}, [f"{volume}: {text}"], 0
