# SPDX-License-Identifier: Apache-2.0
"""A progress bar on a terminal's stderr; nothing at all elsewhere. Knows no command."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from fvd.cli.output import drawn_bar, terminal_width
from fvd.units import format_size

_SILENT_SECONDS = 0.5  # what is done by then needs no bar
_REDRAW_SECONDS = 0.1


class Progress:
    """Called with (done_bytes, total_bytes) as often as one likes; draws ten times a second at most."""

    def __init__(self, label: str, enabled: bool = True) -> None:
        self._label = label
        self._enabled = enabled and sys.stderr.isatty()
        self._start = self._drawn = time.monotonic()
        self._visible = False

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        now = time.monotonic()
        if not self._enabled or now - self._start < _SILENT_SECONDS or now - self._drawn < _REDRAW_SECONDS:
            return
        self._drawn = now
        self._visible = True
        sys.stderr.write("\r" + bar(self._label, done_bytes, total_bytes, now - self._start, terminal_width()) + "\x1b[K")
        sys.stderr.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._visible:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def bar(label: str, done_bytes: int, total_bytes: int, seconds: float, width: int) -> str:
    """One line of at most ``width`` characters: label, bar, share, what is left."""
    ratio = min(1.0, done_bytes / total_bytes) if total_bytes else 1.0
    left = f", {seconds / ratio - seconds:.0f} s left" if ratio > 0 else ""
    tail = f" {100 * ratio:3.0f} %  {format_size(done_bytes)} of {format_size(total_bytes)}{left}"
    bar_width = width - len(label) - len(tail) - 5
    if bar_width < 8:
        return f"{label} {100 * ratio:3.0f} %"[: max(0, width - 1)]
    return f"{label} {drawn_bar(ratio, bar_width)}{tail}"
