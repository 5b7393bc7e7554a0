# SPDX-License-Identifier: Apache-2.0
"""A disk in each format on a loop device of its own, as a guest gets it; and where on the device the guest's data lie.

fvd is served by `fvd-lv serve`; qemu-storage-daemon is its client. "raw" goes the same way, through a pass-through server of the same shape
without a mapping; "qemu raw" and qcow2 are qemu-storage-daemon's own, on the device. qed cannot lie on a device: it is a file on XFS, whose
own I/Os are told apart. Knows nothing of what the guest does.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fvd
from fvd.modes import PLACEMENTS, Placement
from machine import CannotMeasure, loop_device, need, output, server
from uml_guest import NODE, nbd_node

MIB = 1 << 20
METADATA_BYTES = 64 * MIB  # of a format; XFS needs more
XFS_METADATA_BYTES = 512 * MIB
Ranges = list[tuple[int, int]]  # (offset, length) on the device


@dataclass(frozen=True)
class FormatDisk:
    """`data` and `own` are asked when the disk is no longer exported."""

    device: str
    nodes: list[str]  # of qemu-storage-daemon
    data: Callable[[], Ranges]  # where the guest's data lie
    own: Callable[[], Ranges] | None = None  # all that is the format's; None: the whole device


def placements() -> list[str]:
    """fvd's, those that it has."""
    return list(PLACEMENTS)


def fvd_name(placement: str) -> str:
    return "fvd" if placement == "append" else f"fvd {placement}"


@contextlib.contextmanager
def fvd_disk(folder: Path, size_bytes: int, placement: Placement) -> Iterator[FormatDisk]:
    path = folder / "disk.sock"
    with loop_device(size_bytes + METADATA_BYTES) as device:
        fvd.provision(device, size=size_bytes, placement=placement, force=True)
        begin = fvd.info(device).metadata_size
        with server([sys.executable, "-m", "fvd.cli", "serve", device, "--socket", str(path)], path):
            yield FormatDisk(device, [nbd_node(path)], lambda: [(begin, size_bytes + METADATA_BYTES - begin)])


@contextlib.contextmanager
def pass_through_disk(folder: Path, size_bytes: int) -> Iterator[FormatDisk]:
    path = folder / "disk.sock"
    program = str(Path(__file__).resolve().parent / "passthrough.py")
    with (
        loop_device(size_bytes) as device,
        server([sys.executable, program, "serve", device, "--socket", str(path)], path),
    ):
        yield FormatDisk(device, [nbd_node(path)], lambda: [(0, size_bytes)])


def qemu_nodes(driver: str, storage: str, filename: str | Path) -> list[str]:
    file = f"driver={storage},node-name=file,filename={filename},discard=unmap,cache.direct=on,aio=io_uring"
    return [file, f"driver={driver},node-name={NODE},file=file,discard=unmap,cache.direct=on"]


@contextlib.contextmanager
def qemu_raw_disk(_: Path, size_bytes: int) -> Iterator[FormatDisk]:
    with loop_device(size_bytes) as device:
        yield FormatDisk(device, qemu_nodes("raw", "host_device", device), lambda: [(0, size_bytes)])


@contextlib.contextmanager
def qcow2_disk(_: Path, size_bytes: int, options: str = "") -> Iterator[FormatDisk]:
    need("qemu-img")
    with loop_device(size_bytes + METADATA_BYTES) as device:
        words = ["-o", options] if options else []
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *words, device, str(size_bytes)], check=True)
        yield FormatDisk(device, qemu_nodes("qcow2", "host_device", device), lambda: mapped("qcow2", device))


@contextlib.contextmanager
def qed_disk(folder: Path, size_bytes: int) -> Iterator[FormatDisk]:
    need("qemu-img", "mkfs.xfs", "mount", "umount", "filefrag")
    place = folder / "xfs"
    place.mkdir(exist_ok=True)
    with loop_device(size_bytes + XFS_METADATA_BYTES) as device:
        output("mkfs.xfs", "-q", "-f", device)
        done = subprocess.run(["mount", device, place], capture_output=True, text=True, check=False)
        if done.returncode:
            raise CannotMeasure(f"an XFS for qed cannot be mounted: {done.stderr.strip()}")
        image = place / "disk.qed"
        try:
            output("qemu-img", "create", "-q", "-f", "qed", str(image), str(size_bytes))

            def own() -> Ranges:
                return [(on_device, length) for _, on_device, length in file_extents(image)]

            def data() -> Ranges:
                return on_device(mapped("qed", image), file_extents(image))

            yield FormatDisk(device, qemu_nodes("qed", "file", image), data, own)
        finally:
            subprocess.run(["umount", place], check=True)


def mapped(image_format: str, image: str | Path) -> Ranges:
    """Where an image has its guest's data, in ascending order."""
    listed: list[dict[str, Any]] = json.loads(output("qemu-img", "map", "-f", image_format, "--output=json", str(image)))
    return sorted((extent["offset"], extent["length"]) for extent in listed if "offset" in extent)


def file_extents(path: Path) -> list[tuple[int, int, int]]:
    """A file's extents: (offset in it, offset on the device, length)."""
    listed = re.findall(r"^ *\d+: *(\d+)\.\. *\d+: *(\d+)\.\. *\d+: *(\d+):", output("filefrag", "-v", "-b512", str(path)), re.MULTILINE)
    return [(int(begin) * 512, int(place) * 512, int(length) * 512) for begin, place, length in listed]


def on_device(ranges: Ranges, extents: list[tuple[int, int, int]]) -> Ranges:
    """Where ranges of a file lie on the device."""
    found = []
    for offset, length in ranges:
        for begin, place, extent_length in extents:
            first, last = max(offset, begin), min(offset + length, begin + extent_length)
            if first < last:
                found.append((place + first - begin, last - first))
    return sorted(found)


def makers() -> dict[str, Callable[[Path, int], contextlib.AbstractContextManager[FormatDisk]]]:
    """What there is, by its name."""
    found: dict[str, Callable[[Path, int], contextlib.AbstractContextManager[FormatDisk]]] = {}
    for placement in placements():
        found[fvd_name(placement)] = lambda folder, size, placement=placement: fvd_disk(folder, size, placement)  # type: ignore[misc]
    found |= {"raw": pass_through_disk, "qemu raw": qemu_raw_disk, "qcow2": qcow2_disk, "qed": qed_disk}
    return found
