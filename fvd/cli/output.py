# SPDX-License-Identifier: Apache-2.0
"""What a command prints: text for people, or one JSON object with a schema version for programs. Knows no command."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

from fvd.errors import FvdError, printable
from fvd.units import format_size

SCHEMA_VERSION = 1


class OutputFailed(FvdError, OSError):
    """What a command has to say cannot be written."""


class Output:
    """Where a command's result goes."""

    def __init__(self, form: str) -> None:
        self.is_json = form == "json"

    def result(self, payload: dict[str, Any], text: str | Iterable[str]) -> None:
        """Print the payload or the text, at once."""
        if self.is_json:
            sys.stdout.write(json.dumps({"schema_version": SCHEMA_VERSION, **payload}, indent=2) + "\n")
        else:
            for part in [text] if isinstance(text, str) else text:
                sys.stdout.write(f"{without_orders(part)}\n")
        sys.stdout.flush()


def is_terminal() -> bool:
    return sys.stdout.isatty()


def terminal_width() -> int:
    import shutil

    return shutil.get_terminal_size().columns


def columns(rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> list[str]:
    """Rows as aligned columns; ``right`` names the columns that hold numbers."""
    if not rows:
        return []
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    aligned = set(right)
    lines = []
    for row in rows:
        cells = [row[column].rjust(width) if column in aligned else row[column].ljust(width) for column, width in enumerate(widths)]
        lines.append("  ".join(cells).rstrip())
    return lines


def sizes(size_bytes: int) -> str:
    """``5.0 GiB (5368709120 bytes)``."""
    return f"{format_size(size_bytes)} ({size_bytes} bytes)"


def share(part: int, whole: int) -> str:
    """``3.2 %``; something that is not nothing is never shown as 0."""
    if part == 0 or whole == 0:
        return "0 %"
    percent = 100 * part / whole
    return "< 0.1 %" if percent < 0.1 else f"{percent:.1f} %"


def drawn_bar(ratio: float, width: int) -> str:
    """``[####....]`` with so many marks; full only when nothing is left."""
    filled = int(ratio * width)
    return f"[{'#' * filled}{'.' * (width - filled)}]"


def duration(seconds: float) -> str:
    """``42 s``, ``3 min 5 s``, ``2 h 10 min``, ``5 d 3 h``."""
    whole = max(0, round(seconds))
    for unit, unit_seconds, part, part_seconds in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= unit_seconds:
            return f"{whole // unit_seconds} {unit} {whole % unit_seconds // part_seconds} {part}"
    return f"{whole} s"


def moment(seconds: float, timespec: str = "auto") -> str:
    """A time as people read it; a number of seconds that is none, as it is."""
    import datetime

    try:
        return datetime.datetime.fromtimestamp(seconds).astimezone().isoformat(" ", timespec)
    except (ValueError, OverflowError, OSError):
        return f"{seconds} seconds after 1970, which is no time"


def without_orders(text: str) -> str:
    """Lines with nothing in them that a terminal would obey: an image, a server or another user may have chosen words of theirs."""
    return "\n".join(map(printable, text.split("\n")))


class PlainLines(logging.Formatter):
    """Log records that a terminal shows and does not obey."""

    def format(self, record: logging.LogRecord) -> str:
        return without_orders(super().format(record))


def say(line: str) -> None:
    """A line on stderr. If that cannot be written there is nobody to tell, and what is under way goes on."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"{without_orders(line)}\n")
        sys.stderr.flush()


def silence(stream: TextIO) -> None:
    """Nobody reads it, or it is full: what is still buffered goes nowhere, and is not complained about at exit."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, stream.fileno())
        finally:
            os.close(null)
        stream.flush()
