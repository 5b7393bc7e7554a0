# SPDX-License-Identifier: Apache-2.0
"""Disks of many TiB in sparse files, made at once: their maps are written by the format's own code, and no data at all.

A full disk maps every chunk and every block; the slots are in no order, as after a long life. What it reads are the zeros of its storage's
holes, so it shows what the maps cost, and nothing of a disk. Knows nothing of who opens or serves them.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from fvd.device.folders import reach
from fvd.device.node import Node, create_file, open_node
from fvd.format.geometry import PAGE_BYTES, Geometry
from fvd.format.journal import first_page, page_offset_bytes
from fvd.format.maps import (
    Bitmap,
    MapKind,
    Table,
    empty_bitmap,
    empty_table,
    encode_pages,
    map_hash,
    map_offset_bytes,
    map_pages,
)
from fvd.format.superblock import Superblock
from fvd.volume.superblocks import write_superblock
from machine import CannotMeasure, need, output

MEMORY = Path("/dev/shm")
BATCH_PAGES = 1024
BATCH_CHUNKS = 1 << 22
STRIDE = 1_000_003  # a prime: chunk i lies in slot i * STRIDE modulo their number


def make_disk(path: Path, size_bytes: int, *, full: bool) -> None:
    """A new disk that was closed cleanly, in a new sparse file that is as long as it will ever need."""
    geometry = Geometry(size_bytes)
    superblock = Superblock(geometry, uuid.uuid4().bytes, 2, None, int(time.time()))
    bitmap, table = empty_bitmap(geometry), empty_table(geometry)
    if table is None:
        raise ValueError("only disks with a table are made here")
    if full:
        fill(geometry, np.asarray(bitmap), np.asarray(table))
    with reach(path) as place:
        os.close(create_file(place, path.name, geometry.max_storage_size_bytes))
    with open_node(path) as node:
        _write_map(node, superblock, MapKind.BITMAP, bitmap)
        _write_map(node, superblock, MapKind.TABLE, table)
        node.pwrite(page_offset_bytes(geometry, 1), first_page(geometry, superblock.uuid, map_hash(superblock.uuid, bitmap, table)))
        write_superblock(node, replace(superblock, generation=1))
        write_superblock(node, superblock)


def fill(geometry: Geometry, bitmap: Bitmap, table: Table) -> None:
    """Every block is there, every chunk has a slot."""
    if geometry.chunks % STRIDE == 0:
        raise ValueError(f"{geometry.chunks} chunks: slots would be given twice")
    whole = geometry.blocks // 64
    bitmap[:whole] = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
    if rest := geometry.blocks % 64:
        bitmap[whole] = np.uint64((1 << rest) - 1)
    for first in range(0, geometry.chunks, BATCH_CHUNKS):
        chunks = np.arange(first, min(first + BATCH_CHUNKS, geometry.chunks), dtype=np.uint64)
        table[first : first + len(chunks)] = chunks * np.uint64(STRIDE) % np.uint64(geometry.chunks)


def _write_map(node: Node, superblock: Superblock, kind: MapKind, items: Bitmap | Table) -> None:
    geometry = superblock.geometry
    pages = map_pages(geometry, kind)
    for first in range(0, pages, BATCH_PAGES):
        batch = encode_pages(geometry, kind, items, superblock.uuid, first, min(BATCH_PAGES, pages - first))
        node.pwrite(map_offset_bytes(geometry, kind) + first * PAGE_BYTES, batch)


def need_memory(size_bytes: int) -> None:
    """Raises CannotMeasure unless files in memory may take so much."""
    if not os.access(MEMORY, os.W_OK):
        raise CannotMeasure(f"{MEMORY} is not there")
    memory = os.statvfs(MEMORY)
    available = next(int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in line) << 10
    free = min(memory.f_bavail * memory.f_frsize, available)
    if free < size_bytes:
        raise CannotMeasure(f"needs {size_bytes >> 20} MiB of memory, of which {free >> 20} are free")


@contextlib.contextmanager
def loop_over(path: Path) -> Iterator[str]:
    """A loop device with direct I/O over a file, which stays."""
    need("losetup")
    if os.geteuid() != 0:
        raise CannotMeasure("loop devices need root")
    try:
        device = output("losetup", "--find", "--show", "--direct-io=on", str(path))
    except subprocess.CalledProcessError as error:
        raise CannotMeasure(f"losetup: {error.stderr.strip()}") from error
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=False, capture_output=True)
