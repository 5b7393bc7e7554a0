# SPDX-License-Identifier: Apache-2.0
"""``fvd-lv list``: which disks are there, and what their volume groups have promised them."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

from fvd.api.listing import Listing, look_around
from fvd.cli.options import Subparsers, add_command
from fvd.cli.output import Output, columns, terminal_width
from fvd.units import format_size

if TYPE_CHECKING:
    from fvd import Group, Listed

EXAMPLES = """\
  fvd-lv list                        disks that are served, those in the working directory, those in volume groups
  fvd-lv list vg0                    disks in that volume group, and what it has promised them
  fvd-lv list /var/lib/disks         disks that are served, and those in that folder
  fvd-lv list /dev                   ... and those on block devices
  fvd-lv list --served               only disks that are served

Looks at the files in a folder, not in its subfolders. A bare word is a volume group, or a folder if no group has that name.
Activates nothing: inactive volumes are read from the physical volumes. A user sees the disks that he serves; root sees everyone's.

For a volume group, the growth reserve is its free space that fvd's volumes can get. Over-commit is the sum of the disks' maximum sizes,
over their volumes + the growth reserve."""


def register(subparsers: Subparsers) -> None:
    parser = add_command(subparsers, "list", "list disks: those being served, and those in a folder or volume group", run, EXAMPLES)
    parser.add_argument(
        "places",
        metavar="FOLDER|VG",
        nargs="*",
        help="where to look for closed disks (default: the working directory and all volume groups)",
    )
    parser.add_argument("--served", action="store_true", help="only served disks")


def run(arguments: argparse.Namespace) -> int:
    everywhere = not arguments.places and not arguments.served
    listing = look_around(*([] if arguments.served else arguments.places or ["."]), every_group=everywhere)
    if arguments.places and all(any(group.group == place for group in listing.groups) for place in arguments.places):
        # A group was asked for: disks that are served from elsewhere do not belong to the answer.
        listing = Listing([listed for listed in listing.volumes if listed.group in arguments.places], listing.groups)
    payload = {"volumes": [asdict(listed) for listed in listing.volumes], "groups": [asdict(group) for group in listing.groups]}
    Output(arguments.output).result(payload, [*describe(listing.volumes), *describe_groups(listing.groups, terminal_width())])
    return 0


def describe(volumes: list[Listed]) -> list[str]:
    if not volumes:
        return ["no disks here; fvd-lv list FOLDER or VG looks elsewhere, fvd-lv provision makes one"]
    rows = [("VOLUME", "VIRTUAL", "MAPPED", "STORAGE", "FREE", "AT MOST", "STATE")]
    for listed in volumes:
        disk = listed.info
        storage, most = listed.storage_size, listed.greatest_size  # of the logical volume, where it is one
        if disk is None:
            rows.append(
                (listed.volume, _size(listed.virtual_size), "-", _size(storage), "-", _size(most), f"{listed.state}: {listed.problem}")
            )
            continue
        sizes = (
            disk.virtual_size,
            disk.mapped_bytes,
            disk.storage_size if storage is None else storage,
            disk.free_bytes,
            disk.max_storage_size if most is None else most,
        )
        attached = f", attached as {disk.attached}" if disk.attached else ""
        loss = "" if disk.possible_loss is None else "; writes may be lost: fvd-lv info"
        where = disk.uri or disk.vhost_user or listed.state
        rows.append((listed.volume, *map(_size, sizes), f"{where}{attached}{loss}"))  # type: ignore[arg-type]
    return columns(rows, right=(1, 2, 3, 4, 5))


def describe_groups(groups: list[Group], width: int) -> list[str]:
    """For each group its figures, and a bar of its whole size."""
    lines = []
    for group in groups:
        limit = f", limit {group.max_overcommit:g}" if group.max_overcommit is not None else ""
        steps = f", {group.free_bytes // group.largest_step_bytes} growth steps" if group.largest_step_bytes else ""
        unread = f" (without {group.unread_disks} that could not be read)" if group.unread_disks else ""
        lines += [
            "",
            f"volume group {group.group}, {format_size(group.size)}, {group.disks} disk{'' if group.disks == 1 else 's'}",
            f"  {bar(group, max(20, min(100, width - 4)))}",
            f"  █ mapped {format_size(group.mapped_bytes)}{unread}   ▒ more in disks' volumes "
            f"{format_size(max(0, group.storage_bytes - group.mapped_bytes))}   ░ other volumes "
            f"{format_size(max(0, group.size - group.free_bytes - group.unusable_bytes - group.storage_bytes))}   · free",
            f"  virtual {format_size(group.virtual_bytes)}; growth reserve {format_size(group.free_bytes)}{steps}; "
            f"over-commit {group.overcommit:.2f} ({format_size(group.greatest_bytes)} promised, {format_size(group.available_bytes)} "
            f"can be had{limit})",
        ]
    return lines


def bar(group: Group, cells: int) -> str:
    """The group's whole size, from what is mapped to what is free; something that is there has a mark."""
    other = max(0, group.size - group.free_bytes - group.unusable_bytes - group.storage_bytes)
    parts = ((group.mapped_bytes, "█"), (max(0, group.storage_bytes - group.mapped_bytes), "▒"), (other, "░"))
    marks = "".join(sign * max(1 if part else 0, round(part * cells / max(1, group.size))) for part, sign in parts)
    return marks[:cells].ljust(cells, "·")


def _size(size_bytes: int | None) -> str:
    return "-" if size_bytes is None else format_size(size_bytes)
