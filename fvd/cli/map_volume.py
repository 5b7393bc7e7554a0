# SPDX-License-Identifier: Apache-2.0
"""``fvd-lv map``: which parts of a disk are where; on a terminal, a picture of it. Knows nothing of the format."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING

import fvd
from fvd.cli.options import Subparsers, add_command, add_volume, size
from fvd.cli.output import Output, columns, is_terminal, share, terminal_width
from fvd.units import format_size

if TYPE_CHECKING:
    from fvd import Map

EXAMPLES = """\
  fvd-lv map file:vm1.img
  fvd-lv map file:vm1.img --picture always
  fvd-lv map file:vm1.img --offset 10G --length 1G --output json

Each extent has a start and a length in the virtual disk, a state (data: in this disk, at that place of the storage; base: read from the
base image; zero: reads as zeros, occupies nothing) and, if data, the offset in the storage."""

SHADES = "·░▒▓█"
TENTHS = "0123456789"
LINES_MAX = 10_000


def register(subparsers: Subparsers) -> None:
    parser = add_command(subparsers, "map", "show where the parts of a disk are", run, EXAMPLES)
    add_volume(parser)
    parser.add_argument("--offset", metavar="SIZE", type=size, default=0, help="where in the virtual disk to start")
    parser.add_argument("--length", metavar="SIZE", type=size, help="how much of it (default: to its end)")
    parser.add_argument(
        "--picture", choices=("auto", "always", "never"), default="auto", help="draw the disk (auto: on a terminal; otherwise a table)"
    )


def run(arguments: argparse.Namespace) -> int:
    mapping = fvd.map(arguments.volume, offset=arguments.offset, length=arguments.length)
    output = Output(arguments.output)
    picture = arguments.picture == "always" or (arguments.picture == "auto" and is_terminal())
    lines = [] if output.is_json else draw(mapping, terminal_width()) if picture else table(mapping)
    output.result(asdict(mapping), lines)
    return 0


def table(mapping: Map) -> list[str]:
    rows = [("start", "length", "state", "storage offset")]
    rows += [
        (str(extent.start), str(extent.length), extent.state, "-" if extent.storage_offset is None else str(extent.storage_offset))
        for extent in mapping.extents[:LINES_MAX]
    ]
    left_out = len(mapping.extents) - LINES_MAX
    return columns(rows, right=(0, 1, 3)) + ([f"... and {left_out} more; --output json has them all"] if left_out > 0 else [])


def draw(mapping: Map, width: int) -> list[str]:
    """Two strips: the virtual disk, shaded by how much of each part is in it; the storage, numbered by what part of the disk lies there."""
    cells = max(20, min(100, width - 4))
    data = [
        (extent.start - mapping.offset, extent.length, extent.storage_offset)
        for extent in mapping.extents
        if extent.storage_offset is not None
    ]
    mapped = sum(length for _, length, _ in data)
    disk = fill(((start, length) for start, length, _ in data), mapping.length, cells)
    lines = [
        f"{mapping.volume}",
        f"  virtual disk, {format_size(mapping.length)} from {format_size(mapping.offset)}: {format_size(mapped)} mapped "
        f"({share(mapped, mapping.length)}); one mark is {format_size(mapping.length // cells)}",
        "  " + "".join(shade(part) for part in disk),
        "  " + ruler(cells),
        f"  {SHADES[0]} nothing   {SHADES[1]} up to a third   {SHADES[2]} up to two thirds   {SHADES[3]} more   {SHADES[4]} all",
        f"  storage, {format_size(mapping.storage_size)}; one mark is {format_size(mapping.storage_size // cells)}",
        "  " + "".join(storage_marks(data, mapping.length, mapping.data_offset, mapping.storage_size, cells)),
        "  M metadata   0-9 the tenth of the virtual disk that lies there   + several of them   · free",
    ]
    return lines


def fill(ranges: Iterable[tuple[int, int]], total: int, cells: int) -> list[float]:
    """How much of each cell the ranges cover, from 0 to 1."""
    covered = [0.0] * cells
    for start, length in ranges:
        first, last = start * cells // total, (start + length - 1) * cells // total
        for cell in range(max(0, first), min(cells - 1, last) + 1):
            begin, end = cell * total / cells, (cell + 1) * total / cells
            covered[cell] += max(0.0, min(end, start + length) - max(begin, start)) / (end - begin)
    return covered


def ruler(cells: int) -> str:
    """Where each tenth of the disk begins, by the digit that stands for it in the storage."""
    marks = [" "] * cells
    for tenth in range(10):
        marks[-(-tenth * cells // 10)] = TENTHS[tenth]
    return "".join(marks).rstrip()


def shade(part: float) -> str:
    if part <= 0:
        return SHADES[0]
    return SHADES[4] if part > 0.999 else SHADES[1 + min(2, int(part * 3))]


def storage_marks(data: list[tuple[int, int, int]], length: int, data_offset: int, storage_size: int, cells: int) -> list[str]:
    marks = [SHADES[0]] * cells
    for cell in range(cells):
        if cell * storage_size // cells < data_offset:
            marks[cell] = "M"
    for start, extent_length, storage_offset in data:
        first, last = storage_offset * cells // storage_size, (storage_offset + extent_length - 1) * cells // storage_size
        mark = TENTHS[min(9, start * 10 // length)]
        for cell in range(first, min(cells - 1, last) + 1):
            marks[cell] = mark if marks[cell] in (SHADES[0], "M", mark) else "+"
    return marks
