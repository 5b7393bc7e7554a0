# SPDX-License-Identifier: Apache-2.0
"""Options and argument types that several commands share. Knows argparse and sizes, not what the commands do."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from typing import Any

from fvd.api.address import parse_listen
from fvd.errors import InvalidArgument, quoted
from fvd.units import parse_size

VOLUME_HELP = "VG/LV, file:PATH (a sparse file in place of a logical volume) or a block device such as /dev/sdb"

ON_OFF = ("on", "off")

# How a command is registered: its parser, and what runs it.
Run = Callable[[argparse.Namespace], int]
Subparsers = Any  # argparse does not name the type that add_subparsers returns


def size(text: str) -> int:
    """An argparse type: a size as people write them."""
    try:
        return parse_size(text)
    except InvalidArgument as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def seconds(text: str) -> float:
    """An argparse type: a time in seconds."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not a time; write seconds, for example 30")
    return value


def number(text: str) -> float:
    """An argparse type: any number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not a number; write for example 1.5")
    return value


def whole_number(text: str) -> int:
    """An argparse type: a whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not a whole number; write for example 10") from None


def mode(text: str) -> int:
    """An argparse type: permission bits in octal."""
    try:
        value = int(text, 8)
    except ValueError:
        value = -1
    if not 0 <= value <= 0o777:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not a file mode; write for example 0600")
    return value


def host_and_port(text: str) -> tuple[str, int]:
    """An argparse type: where to listen."""
    try:
        return parse_listen(text)
    except InvalidArgument as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def refuse_options(arguments: argparse.Namespace, refused: bool, names: Iterable[str], belongs_to: str) -> None:
    """Options that would mean nothing here are a mistake. Raises InvalidArgument."""
    for name in names:
        value = getattr(arguments, name)
        if refused and value is not None and value is not False:  # 0 was said too
            raise InvalidArgument(f"--{name.replace('_', '-')} belongs to {belongs_to}")


def add_command(subparsers: Subparsers, name: str, help_text: str, run: Run, examples: str) -> argparse.ArgumentParser:
    """A command's parser, with the options that every command has."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=help_text,
        description=f"{help_text[0].upper()}{help_text[1:]}.",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    add_common(parser, default=False)
    return parser


def add_common(parser: argparse.ArgumentParser, default: bool) -> None:
    """--output and --verbose, which may stand before or after the command's name."""
    parser.add_argument(
        "--output",
        choices=("text", "json"),
        default="text" if default else argparse.SUPPRESS,
        help="text for people (default), or one JSON object with stable keys and sizes in bytes",
    )
    parser.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        default=False if default else argparse.SUPPRESS,
        help="more messages on stderr, and a traceback for an internal error",
    )


def add_base_allow(parser: argparse.ArgumentParser) -> None:
    """--base-allow, wherever a base is opened."""
    parser.add_argument(
        "--base-allow",
        metavar="LOCATOR",
        action="append",
        default=[],
        help="as root: open this base with root's rights, whoever named it; may be repeated; permanently: a line in /etc/fvd/bases",
    )


def add_volume(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("volume", metavar="VOLUME", help=VOLUME_HELP)


def add_volumes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("volumes", metavar="VOLUME", nargs="+", help=f"{VOLUME_HELP}; several, one after the other")
