# SPDX-License-Identifier: Apache-2.0
"""``fvd-lv prefetch``: copying what a served disk has not yet from its base, and how far that is. Knows how to say it, no more."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict

import fvd
from fvd.cli.options import VOLUME_HELP, Subparsers, add_command, refuse_options, seconds, size
from fvd.cli.output import SCHEMA_VERSION, Output, drawn_bar, duration, is_terminal, share, terminal_width
from fvd.errors import FvdError
from fvd.units import format_size

EXAMPLES = """\
  fvd-lv prefetch start vg0/vm1 --rate 50M
  fvd-lv prefetch status vg0/vm1
  fvd-lv prefetch status vg0/vm1 --follow
  fvd-lv prefetch status vg0/vm1 --wait && echo the base is not needed any more
  fvd-lv prefetch stop vg0/vm1

The disk must be served. Prefetching yields to the guest. Blocks that were copied stay when it is stopped or the server restarts.
--follow and --wait exit with code 0 when everything is in the disk, and with 1 if prefetching is off before that."""

ACTIONS = ("start", "stop", "status")
POLL_SECONDS = 1.0
LINE_SHARE = 0.05  # where lines are printed: one for so much progress at least
LINE_POLLS = 30  # ... or for so many looks
ENDED = ("done", "off")


def register(subparsers: Subparsers) -> None:
    parser = add_command(subparsers, "prefetch", "copy the rest of a served disk's base in the background", run, EXAMPLES)
    parser.add_argument("action", choices=ACTIONS, help="start or stop prefetching, or show its progress")
    parser.add_argument("volume", metavar="VOLUME", help=VOLUME_HELP)
    parser.add_argument("--rate", metavar="SIZE", type=size, help="start: copy at most SIZE a second (default: no limit)")
    parser.add_argument("--delay", metavar="S", type=seconds, help="start: begin after S seconds (default 0)")
    parser.add_argument("--profile", metavar="FILE", help="start: profile whose extents are copied first (default: beside the base)")
    parser.add_argument(
        "--follow", action="store_true", help="status: show progress until it is done: a bar on a terminal, otherwise lines"
    )
    parser.add_argument("--wait", action="store_true", help="status: print nothing until it is done")


def run(arguments: argparse.Namespace) -> int:
    action, volume, output = arguments.action, arguments.volume, Output(arguments.output)
    refuse_options(arguments, action != "start", ("rate", "delay", "profile"), "prefetch start")
    refuse_options(arguments, action != "status", ("follow", "wait"), "prefetch status")
    if action == "start":
        status = fvd.prefetch_start(volume, rate=arguments.rate or 0, delay_s=arguments.delay or 0.0, profile=arguments.profile)
    elif action == "stop":
        status = fvd.prefetch_stop(volume)
    elif arguments.follow or arguments.wait:
        return _follow_to_the_end(arguments, output)
    else:
        status = fvd.prefetch_status(volume)
    output.result(asdict(status), describe_status(status, terminal_width()))
    return 0


# --- Following it -----------------------------------------------------------------------------------------------------------------


def _follow_to_the_end(arguments: argparse.Namespace, output: Output) -> int:
    def ask() -> fvd.PrefetchStatus:
        return fvd.prefetch_status(arguments.volume)

    if arguments.wait:
        last = follow(ask, lambda status: None)
        output.result(asdict(last), describe_status(last, terminal_width()))
    elif output.is_json or not is_terminal():
        last = follow(ask, Lines(_write_json if output.is_json else _write_line))
    else:
        bar = TerminalBar()
        try:
            last = follow(ask, bar)
        finally:
            bar.clear()
        output.result({}, describe_status(last, terminal_width()))
    if last.state == "off" and last.remaining_bytes:
        raise FvdError(
            f"{last.volume}: prefetching is off ({last.reason}) with {format_size(last.remaining_bytes)} still to copy; "
            f"fvd-lv prefetch start {arguments.volume} resumes it"
        )
    return 0


def follow(
    ask: Callable[[], fvd.PrefetchStatus], show: Callable[[fvd.PrefetchStatus], None], sleep: Callable[[float], None] = time.sleep
) -> fvd.PrefetchStatus:
    """Asks and shows until nothing more will happen by itself; returns the last answer. A full disk and a lost base are waited for."""
    while True:
        status = ask()
        show(status)
        if status.state in ENDED:
            return status
        sleep(POLL_SECONDS)


class Lines:
    """Writes what is new: another state, some progress, or a sign of life now and then."""

    def __init__(self, write: Callable[[fvd.PrefetchStatus], None]) -> None:
        self._write = write
        self._last: fvd.PrefetchStatus | None = None
        self._passed_over = 0

    def __call__(self, status: fvd.PrefetchStatus) -> None:
        last = self._last
        if last is not None and last.state == status.state:
            little = status.copied_bytes - last.copied_bytes < LINE_SHARE * status.base_bytes
            if little and self._passed_over + 1 < LINE_POLLS:
                self._passed_over += 1
                return
        self._last, self._passed_over = status, 0
        self._write(status)


class TerminalBar:
    """One line, drawn again and again."""

    def __call__(self, status: fvd.PrefetchStatus) -> None:
        sys.stdout.write("\r" + status_line(status, terminal_width()) + "\x1b[K")
        sys.stdout.flush()

    def clear(self) -> None:
        sys.stdout.write("\r\x1b[K")
        sys.stdout.flush()


def _write_line(status: fvd.PrefetchStatus) -> None:
    sys.stdout.write(f"{status.volume}: {progress_text(status)}\n")
    sys.stdout.flush()


def _write_json(status: fvd.PrefetchStatus) -> None:
    sys.stdout.write(json.dumps({"schema_version": SCHEMA_VERSION, **asdict(status)}) + "\n")
    sys.stdout.flush()


# --- In words and pictures --------------------------------------------------------------------------------------------------------


def describe_status(status: fvd.PrefetchStatus, width: int) -> list[str]:
    """The lines of ``prefetch status``."""
    lines = [f"{status.volume}: prefetching: {state_text(status)}"]
    if status.base_bytes == 0:
        return lines
    tail = f" {share(status.copied_bytes, status.base_bytes)}"
    bar_width = max(8, min(60, width - len(tail) - 5))
    lines.append(f"  {drawn_bar(_ratio(status), bar_width)}{tail}")
    copied = f"{format_size(status.copied_bytes)} of {format_size(status.base_bytes)} no longer come from the base"
    lines.append(f"  {'; '.join([copied, *_rate_texts(status)])}")
    if status.profile is not None:
        left = f"{format_size(status.profile_remaining_bytes)} of it left" if status.profile_remaining_bytes else "all of it copied"
        lines.append(f"  profile: {status.profile}, {left}")
    lines.append(f"  copy-on-read: {'on' if status.copy_on_read else 'off'}")
    if status.released:
        lines.append("  base: released; the disk no longer needs it")
    return lines


def state_text(status: fvd.PrefetchStatus) -> str:
    """``paused, the disk is slow; resumes in 12 s``."""
    text = f"{status.state}, {status.reason}" if status.reason else status.state
    if status.resume_seconds is not None and status.state not in ENDED:
        text += f"; {'starts' if status.state == 'delayed' else 'resumes'} in {duration(status.resume_seconds)}"
    return text


def progress_text(status: fvd.PrefetchStatus) -> str:
    """All that matters, on one line."""
    parts = [f"{share(status.copied_bytes, status.base_bytes)} of {format_size(status.base_bytes)}", state_text(status)]
    return "; ".join([*parts, *_rate_texts(status)])


def status_line(status: fvd.PrefetchStatus, width: int) -> str:
    """A bar and what matters, in less than `width` characters."""
    ratio = _ratio(status)
    texts = _rate_texts(status) if status.state == "running" else [state_text(status)]
    tail = "  ".join([f" {100 * ratio:3.0f} %", *texts])
    bar_width = width - len(tail) - 3
    if bar_width < 8:
        return tail.strip()[: max(0, width - 1)]
    return drawn_bar(ratio, min(60, bar_width)) + tail


def _rate_texts(status: fvd.PrefetchStatus) -> list[str]:
    texts = []
    if status.bytes_per_second or status.state == "running":
        texts.append(f"{format_size(round(status.bytes_per_second))}/s")
    if status.limit_bytes_per_second:
        texts.append(f"limit {format_size(status.limit_bytes_per_second)}/s")
    if status.eta_seconds is not None and status.remaining_bytes:
        texts.append(f"{duration(status.eta_seconds)} left")
    return texts


def _ratio(status: fvd.PrefetchStatus) -> float:
    return min(1.0, status.copied_bytes / status.base_bytes) if status.base_bytes else 1.0
