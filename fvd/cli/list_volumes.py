"""``fvd-lv list``: which disks are there. Served ones by their control sockets, closed ones by looking where one says."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

import fvd
from fvd.cli.options import Subparsers, add_command
from fvd.cli.output import Output, columns
from fvd.units import format_size

if TYPE_CHECKING:
    from fvd import Listed

EXAMPLES = """\
  fvd-lv list                        disks that are served, and those in the working directory
  fvd-lv list /var/lib/disks         disks that are served, and those in that folder
  fvd-lv list /dev                   ... and those on block devices
  fvd-lv list --served               only disks that are served

Looks at the beginning of each file in a folder, not below it. Served disks are those of this user; root sees everyone's."""


def register(subparsers: Subparsers) -> None:
    parser = add_command(subparsers, "list", "list disks: those being served, and those in a folder", run, EXAMPLES)
    parser.add_argument("folders", metavar="FOLDER", nargs="*", help="where to look for closed disks; default: the working directory")
    parser.add_argument("--served", action="store_true", help="only disks that are being served")


def run(arguments: argparse.Namespace) -> int:
    folders = [] if arguments.served else arguments.folders or ["."]
    found = fvd.list_volumes(*folders)
    Output(arguments.output).result({"volumes": [asdict(listed) for listed in found]}, describe(found))
    return 0


def describe(found: list[Listed]) -> list[str]:
    if not found:
        return ["no disks here; fvd-lv list FOLDER looks elsewhere, fvd-lv provision makes one"]
    rows = [("VOLUME", "VIRTUAL", "MAPPED", "STORAGE", "AT MOST", "STATE")]
    for listed in found:
        disk = listed.info
        if disk is None:
            rows.append((listed.volume, "-", "-", "-", "-", f"{listed.state}: {listed.problem}"))
            continue
        figures = (format_size(number) for number in (disk.virtual_size, disk.mapped_bytes, disk.storage_size, disk.max_storage_size))
        rows.append((listed.volume, *figures, disk.uri or listed.state))  # type: ignore[arg-type]
    return columns(rows, right=(1, 2, 3, 4))
