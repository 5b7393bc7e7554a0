# SPDX-License-Identifier: Apache-2.0
"""Where a format puts what a guest writes: a real image is made and written in the order of a trace, then its map is read.

What matters is which unit of allocation is touched when, so only that is written: for fvd a page in each new chunk, for QEMU's formats
zeros in whole new units, which its detect-zeroes turns into holes. So an image of a disk of 100 GiB takes some MiB of memory. vhdx is not
among them: qemu-img does not tell where one has its data. Knows nothing of what is made of a layout.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

import fvd
from fvd.modes import PLACEMENTS, Placement
from guest_trace import PROVIDE, WRITE, Trace
from machine import CannotMeasure, need, output

KIB, MIB = 1 << 10, 1 << 20
NEVER = np.iinfo(np.int64).max
PAGE = bytes(4 * KIB)
PUNCH_EVERY_CHUNKS = 2048  # of fvd's file: each holds a block of what was written
Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """`places`: for each unit of the disk its offset in the storage, -1: nowhere. `since`: from which request of the trace on."""

    unit_bytes: int
    places: Numbers
    since: Numbers


@dataclass(frozen=True)
class Touches:
    """Which units a trace touches, each once: `runs` of adjacent ones (first unit, how many) in order; `since`: by which request."""

    runs: list[tuple[int, int]]
    since: Numbers


def touches(trace: Trace, unit_bytes: int, kinds: tuple[int, ...]) -> Touches:
    """By the first request of one of these kinds."""
    since = np.full(-(-trace.disk_bytes // unit_bytes), NEVER)
    runs: list[tuple[int, int]] = []
    chosen = np.flatnonzero(np.isin(trace.kinds, kinds) & (trace.lengths > 0))
    first = trace.offsets[chosen] // unit_bytes
    last = (trace.offsets[chosen] + trace.lengths[chosen] - 1) // unit_bytes
    for request, begin, end in zip(chosen.tolist(), first.tolist(), (last + 1).tolist(), strict=True):
        new = np.flatnonzero(since[begin:end] == NEVER) + begin
        if not len(new):
            continue
        since[new] = request
        for run in np.split(new, np.flatnonzero(np.diff(new) > 1) + 1):
            runs.append((int(run[0]), len(run)))
    return Touches(runs, since)


def raw_layout(trace: Trace) -> Layout:
    """Everything has its place from the beginning, in order."""
    count = -(-trace.disk_bytes // MIB)
    return Layout(MIB, np.arange(count, dtype=np.int64) * MIB, np.full(count, -1, np.int64))


def fvd_layout(trace: Trace, placement: Placement, layout: Literal["compact", "raw"] = "compact") -> Layout:
    """On a sparse file, which grows by 5 GiB at a time. Zeros to be kept take a place like any data."""
    with tempfile.TemporaryDirectory(prefix="fvd-bench-", dir="/dev/shm") as folder:
        path = Path(folder) / "disk.img"
        volume = f"file:{path}"
        made = fvd.provision(volume, trace.disk_bytes, placement=placement, layout=layout)
        touched = touches(trace, made.chunk_size, (WRITE, PROVIDE))
        written = 0
        with fvd.open(volume, on_full="wait") as disk:
            for first, count in touched.runs:
                for chunk in range(first, first + count):
                    disk.pwrite(chunk * made.chunk_size, PAGE)
                    written += 1
                    if written % PUNCH_EVERY_CHUNKS == 0:
                        forget(path, made.metadata_size)
            extents = disk.map().extents
        places = np.full(len(touched.since), -1, np.int64)
        for extent in extents:
            if extent.storage_offset is not None:
                first, within = divmod(extent.start, made.chunk_size)
                count = -(-(within + extent.length) // made.chunk_size)
                places[first : first + count] = extent.storage_offset - within + np.arange(count) * made.chunk_size
    return checked(made.chunk_size, places, touched.since)


def forget(path: Path, begin: int) -> None:
    """Gives back the memory of a file's rest, whose bytes nobody will ask for."""
    output("fallocate", "--punch-hole", "--offset", str(begin), "--length", str(path.stat().st_size - begin), str(path))


def qemu_layout(trace: Trace, image_format: str, options: str, unit_bytes: int) -> Layout:
    need("qemu-img", "qemu-io")
    touched = touches(trace, unit_bytes, (WRITE,))
    with tempfile.TemporaryDirectory(prefix="fvd-bench-", dir="/dev/shm") as folder:
        path = Path(folder) / "disk.img"
        words = ["-o", options] if options else []
        output("qemu-img", "create", "-q", "-f", image_format, *words, str(path), str(trace.disk_bytes))
        commands = (Path(folder) / "commands").open("w+")
        with contextlib.closing(commands):
            for line in writes(trace, touched, unit_bytes):
                commands.write(line)
            commands.seek(0)
            image = f"driver={image_format},discard=unmap,file.driver=file,file.filename={path},file.discard=unmap,file.detect-zeroes=unmap"
            done = subprocess.run(
                ["qemu-io", "-t", "unsafe", "--image-opts", image], stdin=commands, capture_output=True, text=True, check=False
            )
        if done.returncode or "rror" in done.stdout + done.stderr:
            raise CannotMeasure(f"qemu-io on {image_format}: {(done.stderr + done.stdout).strip()[-300:]}")
        # Data that became a hole at the file's end did not make it longer; some formats do not believe what lies beyond it.
        with path.open("r+b") as file:
            file.truncate(max(path.stat().st_size, 2 * trace.disk_bytes))
        listed: list[dict[str, Any]] = json.loads(output("qemu-img", "map", "-f", image_format, "--output=json", str(path)))
    places = np.full(len(touched.since), -1, np.int64)
    for extent in listed:
        if "offset" in extent:
            first, within = divmod(extent["start"], unit_bytes)
            count = -(-(within + extent["length"]) // unit_bytes)
            places[first : first + count] = extent["offset"] - within + np.arange(count) * unit_bytes
    if "preallocation" in options:
        return Layout(unit_bytes, places, np.full(len(places), -1, np.int64))
    return checked(unit_bytes, places, touched.since)


def writes(trace: Trace, touched: Touches, unit_bytes: int) -> list[str]:
    """qemu-io's commands, in the order of the trace: zeros for the units that are touched first, and zeros to be kept as such."""
    lines: list[tuple[int, str]] = []
    for first, count in touched.runs:
        begin = first * unit_bytes
        length = min((first + count) * unit_bytes, trace.disk_bytes) - begin
        lines.append((int(touched.since[first]), f"write -q -P 0 {begin} {length}\n"))
    for request in np.flatnonzero(trace.kinds == PROVIDE).tolist():
        lines.append((request, f"write -q -z {trace.offsets[request]} {trace.lengths[request]}\n"))
    return [line for _, line in sorted(lines, key=lambda line: line[0])]


def checked(unit_bytes: int, places: Numbers, since: Numbers) -> Layout:
    """Every unit that was touched has a place of its own."""
    taken = places[since < NEVER]
    if (taken < 0).any() or len(np.unique(taken)) != len(taken):
        raise RuntimeError(f"{int((taken < 0).sum())} units that were written are not in the map, or two of them in one place")
    return Layout(unit_bytes, places, since)


def layouts() -> dict[str, Callable[[Trace], Layout]]:
    """What there is, by its name."""
    made: dict[str, Callable[[Trace], Layout]] = {"raw": raw_layout}
    for placement in PLACEMENTS:
        made[f"fvd {placement}"] = partial(fvd_layout, placement=placement)
    for name, (image_format, options, unit_bytes) in QEMU.items():
        made[name] = partial(qemu_layout, image_format=image_format, options=options, unit_bytes=unit_bytes)
    made["fvd, raw layout"] = partial(fvd_layout, placement="append", layout="raw")
    return made


QEMU = {
    "qcow2": ("qcow2", "", 64 * KIB),
    "qed": ("qed", "", 64 * KIB),
    "qcow2, subclusters": ("qcow2", "extended_l2=on,cluster_size=128k", 128 * KIB),
    "qcow2, metadata preallocated": ("qcow2", "preallocation=metadata", 64 * KIB),
    "vdi": ("vdi", "", MIB),
    "vmdk": ("vmdk", "", 64 * KIB),
}
