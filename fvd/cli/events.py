# SPDX-License-Identifier: Apache-2.0
"""``fvd-lv events``: what happens to served disks, a line for each event as it happens, for agents and for people."""

from __future__ import annotations

import argparse
import datetime
import json
import select
import signal
import sys
import threading
from dataclasses import asdict
from types import FrameType

import fvd
from fvd.cli.failure import EXIT_BROKEN_PIPE, PROGRAM
from fvd.cli.options import VOLUME_HELP, Subparsers, add_command
from fvd.cli.output import SCHEMA_VERSION, duration, say
from fvd.errors import printable, quoted
from fvd.units import format_size

EXAMPLES = """\
  fvd-lv events                                all disks, including those that are served later
  fvd-lv events file:vm1.img --history         begin with what its server remembers
  fvd-lv events --output text                  for people
  fvd-lv events file:vm1.img --count 1         wait for one event

Each line is one JSON object, printed at once; docs/events.md names the kinds. Runs until SIGTERM or SIGINT, also after a server ends or is
killed (server_gone). Waits for a volume that is not served yet."""


def register(subparsers: Subparsers) -> None:
    parser = add_command(subparsers, "events", "print what happens to served disks, as it happens", run, EXAMPLES)
    parser.add_argument("volumes", metavar="VOLUME", nargs="*", help=f"{VOLUME_HELP} (default: every served disk)")
    parser.add_argument("--history", action="store_true", help="start with the last 64 events that each server remembers")
    parser.add_argument("--count", metavar="N", type=_count, help="stop after N events")
    for action in parser._actions:
        if action.dest == "output":
            action.help = "json (default): one object a line, with stable keys and sizes in bytes; text for people"


def run(arguments: argparse.Namespace) -> int:
    as_text = arguments.output == "text"
    with fvd.events(*arguments.volumes, history=arguments.history) as events:

        def on_signal(number: int, frame: FrameType | None) -> None:
            signal.signal(number, signal.SIG_DFL)
            events.close()

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, on_signal)
        reader = _Reader(events)
        for volume in events.unserved():
            say(f"{PROGRAM}: note: {volume} is not served; waiting for it")
        left = arguments.count
        for event in events:
            line = describe_event(event) if as_text else json.dumps({"schema_version": SCHEMA_VERSION, **asdict(event)})
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()
            left = None if left is None else left - 1
            if left == 0:
                break
    return EXIT_BROKEN_PIPE if reader.gone else 0


def describe_event(event: fvd.Event) -> str:
    """One line: when, which disk, what, and what there is to know about it."""
    try:
        when = datetime.datetime.fromtimestamp(event.time).isoformat(" ", "milliseconds")
    except (ValueError, OverflowError, OSError):  # another process has told it
        when = f"{event.time:g}"
    details = [f"storage {format_size(event.storage_size)}, {format_size(event.free_bytes)} free"]
    if event.target:
        details.append(f"going for {format_size(event.target)}" if event.kind != "extend_done" else "")
    if event.seconds:
        details.append(f"{event.seconds:.3f} s")
    if event.suspend_seconds is not None:
        details.append(f"the device was suspended for {event.suspend_seconds * 1000:.0f} ms")
    if event.group_free_bytes is not None:
        details.append(f"{format_size(event.group_free_bytes)} left in {event.group or 'its group'}")
    if event.total_bytes:
        details.append(f"{format_size(event.copied_bytes)} of {format_size(event.total_bytes)} copied")
    if event.eta_seconds is not None:
        details.append(f"{duration(event.eta_seconds)} left")
    if event.message:
        details.append(" ".join(event.message.split()))
    if event.lost:
        details.append(f"{event.lost} events before this one were lost")
    return printable(f"{when}  {event.volume}  {event.kind.replace('_', ' ')}: {'; '.join(detail for detail in details if detail)}")


class _Reader:
    """Notices that nobody reads our output any more: the next event, whose line would show it, may be days away."""

    def __init__(self, events: fvd.EventStream) -> None:
        self.gone = False
        self._events = events
        threading.Thread(target=self._wait, name="fvd-reader", daemon=True).start()

    def _wait(self) -> None:
        poller = select.poll()
        poller.register(sys.stdout.fileno(), 0)
        poller.poll()
        self.gone = True
        self._events.close()


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is no number of events; write 1 or more")
    return int(text)
