# SPDX-License-Identifier: Apache-2.0
"""Every I/O that reaches a block device, as the kernel's own trace tells it. Knows nothing of who made it.

Two events are traced: block:block_bio_queue, what was submitted, before anything is split or merged; and block:block_rq_issue, what the
kernel made of it and gave to the driver. The trace has an instance of its own, so that nobody else's is disturbed.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from machine import CannotMeasure

SECTOR = 512
BUFFER_KB = 16384  # for each CPU: a few hundred thousand events
EVENTS = ("block_bio_queue", "block_rq_issue")
#   "       worker-123   [001] .....  12.345678: block_bio_queue: 7,0 WS 2048 + 8 [worker]"
#   "       worker-123   [001] .....  12.345678: block_rq_issue: 7,0 WS 4096 () 2048 + 8 none,0,0 [worker]"
EVENT = re.compile(r"(?P<event>block_\w+): \d+,\d+ (?P<flags>\S+) (?:\d+ \(.*?\) )?(?P<sector>\d+) \+ (?P<sectors>\d+) ")
Kind = Literal["read", "write", "flush", "discard", "zero"]


@dataclass(frozen=True)
class DeviceIo:
    kind: Kind
    offset: int  # bytes
    length: int


@dataclass(frozen=True)
class Taken:
    """What reached a device."""

    submitted: list[DeviceIo]
    issued: list[DeviceIo]  # after the kernel has merged what was adjacent, and split what was too large


class BlockTrace:
    """What reaches a device while it is open."""

    def __init__(self, instance: Path) -> None:
        self._instance = instance

    def take(self) -> Taken:
        """All since the last time, or since the beginning. Raises CannotMeasure if any was lost."""
        for statistics in self._instance.glob("per_cpu/cpu*/stats"):
            text = statistics.read_text()
            for lost in re.findall(r"(?:overrun|dropped events): (\d+)", text):
                if int(lost):
                    raise CannotMeasure(f"{lost} device I/Os did not fit into the trace's buffer")
        text = (self._instance / "trace").read_text()
        (self._instance / "trace").write_text("")  # empties it
        found: dict[str, list[DeviceIo]] = {event: [] for event in EVENTS}
        for match in EVENT.finditer(text):
            found[match["event"]].append(device_io(match["flags"], int(match["sector"]), int(match["sectors"])))
        return Taken(*(found[event] for event in EVENTS))


def device_io(flags: str, sector: int, sectors: int) -> DeviceIo:
    """`flags` as the kernel writes them: F before the operation is a flush, then the operation, then what is known of it."""
    operation = flags[1:] if flags.startswith("F") and len(flags) > 1 else flags
    kinds: dict[str, Kind] = {"R": "read", "W": "write", "D": "discard", "F": "flush", "N": "zero"}
    kind = "flush" if flags.startswith("F") and not sectors else kinds.get(operation[0], "write")
    return DeviceIo(kind, sector * SECTOR, sectors * SECTOR)


@contextlib.contextmanager
def tracefs() -> Iterator[Path]:
    """Where the trace is to be had: as it is mounted, or mounted for as long as it is needed."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        if kind == "tracefs":
            yield Path(place)
            return
    folder = Path(tempfile.mkdtemp(prefix="fvd-trace-"))
    try:
        done = subprocess.run(["mount", "-t", "tracefs", "tracefs", folder], capture_output=True, text=True, check=False)
        if done.returncode:
            raise CannotMeasure(f"the kernel's trace cannot be had: {done.stderr.strip()}")
        try:
            yield folder
        finally:
            subprocess.run(["umount", folder], check=False)
    finally:
        folder.rmdir()


@contextlib.contextmanager
def traced(device: str) -> Iterator[BlockTrace]:
    """All that reaches `device` from now on."""
    number = os.stat(device).st_rdev  # noqa: PTH116 (a device's number, not a file's)
    with tracefs() as root:
        events = [Path("events/block") / event for event in EVENTS]
        for event in events:
            if not (root / event).exists():
                raise CannotMeasure(f"this kernel has no event block:{event.name}")
        instance = Path(tempfile.mkdtemp(prefix="fvd-bench-", dir=root / "instances"))
        try:
            (instance / "tracing_on").write_text("1")
            (instance / "buffer_size_kb").write_text(str(BUFFER_KB))
            for event in events:
                (instance / event / "filter").write_text(f"dev == {os.major(number) << 20 | os.minor(number)}")
                (instance / event / "enable").write_text("1")
            yield BlockTrace(instance)
        finally:
            for event in events:
                (instance / event / "enable").write_text("0")
            instance.rmdir()
