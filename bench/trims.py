# SPDX-License-Identifier: Apache-2.0
"""What a guest's reads wait for while much is trimmed: 4,096 chunks at once, with the discards that follow, and without.

In process, a reader of one 4 KiB block each few milliseconds beside the trim, on a file and on loop devices: over a file of the disk, where
a discard is work for a file system, and over memory. Longest times are single events, which the machine has too: so each round reads as
long without discards as with them, rounds are many, and the figure is the median.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fvd.disk._disk_thread import drive
from fvd.disk.opening import open_volume
from fvd.disk.provision import provision
from loads import KIB, MIB
from machine import CannotMeasure, file_loop_device, loop_device
from suite import Plan, Plot, Row, missing, ratio, row

TITLE = "the longest read while 4,096 chunks are trimmed, with and without discards"
CHUNK_BYTES = 64 * KIB
CHUNKS = 4096
PLACES = ("file", "loop device over a file", "loop device over memory")
EVERY_SECONDS = 0.003  # a read
QUIET_SECONDS = 0.5  # before the trim, and after the last discard
SECONDS_MIN = 2.0  # of reading from the trim on
SECONDS_MAX = 60.0  # that discards may take
GOAL = "<= 5"


@contextlib.contextmanager
def place(name: str) -> Iterator[str]:
    """A volume's name on a new device."""
    size_bytes = CHUNKS * CHUNK_BYTES + 128 * MIB
    if name == "file":
        with tempfile.TemporaryDirectory(prefix="fvd-bench-") as folder:
            yield f"file:{folder}/disk"
    else:
        with (file_loop_device if "file" in name else loop_device)(size_bytes) as device:
            yield device


class Reader(threading.Thread):
    """Reads the disk's last block again and again, and remembers when and for how long."""

    def __init__(self, disk: Any, at: int) -> None:
        super().__init__(daemon=True)
        self.disk, self.at, self.ending = disk, at, False
        self.found: list[tuple[float, float]] = []

    def run(self) -> None:
        while not self.ending:
            began = time.monotonic()
            self.disk.pread(self.at, 4 * KIB)
            self.found.append((began, time.monotonic() - began))
            time.sleep(EVERY_SECONDS)

    def longest_ms(self, since: float, until: float = float("inf")) -> float:
        return 1e3 * max(seconds for began, seconds in self.found if since <= began <= until)


def fill(disk: Any, size_bytes: int) -> None:
    """A block in each chunk."""

    def some(first: int) -> None:
        for chunk in range(first, size_bytes // CHUNK_BYTES, 16):
            disk.pwrite(chunk * CHUNK_BYTES, b"\x5a" * 4 * KIB)

    threads = [threading.Thread(target=some, args=(first,)) for first in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    disk.pwrite(size_bytes - 4 * KIB, b"\xa5" * 4 * KIB)
    disk.flush()


def trim(volume: str, *, discard: bool, least_seconds: float) -> dict[str, float]:
    """A new disk, filled, trimmed but for its last chunk, and read until all is free and at least so long."""
    size_bytes = CHUNKS * CHUNK_BYTES
    if volume.startswith("file:"):
        Path(volume[5:]).unlink(missing_ok=True)
    provision(
        volume,
        virtual_size_bytes=size_bytes,
        chunk_size_bytes=CHUNK_BYTES,
        block_size_bytes=4 * KIB,
        journal_size_bytes=16 * MIB,
        grow_step_bytes=size_bytes + 64 * MIB,
        force=not volume.startswith("file:"),
    )
    with drive(open_volume(volume, discard=discard)) as disk:
        fill(disk, size_bytes)
        os.sync()  # else what the fill left to be written is measured
        reader = Reader(disk, size_bytes - 4 * KIB)
        reader.start()
        time.sleep(QUIET_SECONDS)
        began = time.monotonic()
        disk.trim(0, size_bytes - CHUNK_BYTES)
        trimmed = time.monotonic()
        disk.flush()
        while disk.call(lambda: disk.volume.engine.free_slots) < CHUNKS - 1 and time.monotonic() < began + SECONDS_MAX:
            time.sleep(EVERY_SECONDS)
        freed = time.monotonic()
        time.sleep(max(QUIET_SECONDS, began + least_seconds - freed))
        reading = time.monotonic() - began
        reader.ending = True
        reader.join()
        counts = disk.call(disk.volume.engine.statistics)
    return {
        "before_ms": reader.longest_ms(0, began - 1e-9),
        "longest_ms": reader.longest_ms(began - 0.05),
        "trim_ms": 1e3 * (trimmed - began),
        "all_ms": 1e3 * (freed - began),
        "reading_seconds": reading,
        "discards": counts["discards"],
        "most_discards_in_flight": counts["most_discards_in_flight"],
    }


def measure(plan: Plan) -> dict[str, Any]:
    samples: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for name in PLACES[: plan.of(1, 3, 3)]:
        try:
            with place(name) as volume:
                for number in range(plan.of(3, 7, 15)):
                    seconds = SECONDS_MIN
                    for discard in (True, False):
                        sample = trim(volume, discard=discard, least_seconds=seconds)
                        seconds = sample["reading_seconds"]
                        samples.append({"round": number, "place": name, "discard": discard, **sample})
        except CannotMeasure as reason:
            failed[name] = str(reason)
    return {"mode": plan.mode, "samples": samples, "not_measured": failed}


def rows(result: dict[str, Any]) -> list[Row]:
    found: list[Row] = []
    for name in PLACES:
        what = f"the longest 4 KiB read beside a trim of 4,096 chunks, with discards / without: {name}"
        samples = [s for s in result["samples"] if s["place"] == name]
        if not samples:
            found.append(missing(what, result["not_measured"].get(name, "not in this mode"), GOAL))
            continue

        def middle(field: str, discard: bool, samples: list[dict[str, Any]] = samples) -> float:
            return float(statistics.median(s[field] for s in samples if s["discard"] == discard))

        values = ratio(samples, "longest_ms", {"discard": True}, {"discard": False})
        note = f"{middle('longest_ms', True):.1f} and {middle('longest_ms', False):.1f} ms; all was free after "
        note += f"{middle('all_ms', True):.0f} and {middle('all_ms', False):.0f} ms; {middle('discards', True):.0f} discards"
        found.append(row(what, values, goal=GOAL, note=note))
        most = [float(s["most_discards_in_flight"]) for s in samples if s["discard"]]
        found.append(row(f"discards in flight at once, at most: {name}", most, goal="<= 8", digits=0))
    return found


def plots(result: dict[str, Any]) -> list[Plot]:
    names = [name for name in PLACES if any(s["place"] == name for s in result["samples"])]
    if not names:
        return []
    return [
        {
            "name": "trims",
            "title": "the longest 4 KiB read beside a trim of 4,096 chunks",
            "kind": "bars",
            "unit": "ms",
            "x": list(names),
            "series": [
                {
                    "name": "with discards" if discard else "without",
                    "points": [
                        [s["longest_ms"] for s in result["samples"] if (s["place"], s["discard"]) == (name, discard)] for name in names
                    ],
                }
                for discard in (True, False)
            ],
            "better": "less",
        }
    ]
