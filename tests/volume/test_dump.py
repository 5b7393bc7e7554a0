# SPDX-License-Identifier: Apache-2.0
"""What `dump` shows of maps that are full of something else: enough to see it, not all of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from disks import crash, make, start, volume
from fvd.device import surviving
from fvd.device.node import open_node
from fvd.disk.provision import provision
from fvd.format.geometry import Geometry
from fvd.format.pending import HEADER
from fvd.inspect.dump import LISTED_PAGES, dump
from fvd.volume.superblocks import read_superblock

KIB, MIB = 1 << 10, 1 << 20


def test_maps_full_of_foreign_bytes_are_listed_in_part(tmp_path: Path) -> None:
    """A hostile volume must not fill the memory of whoever looks at it."""
    path = tmp_path / "disk"
    sizes: dict[str, Any] = {
        "virtual_size_bytes": 4 << 30,
        "block_size_bytes": 4 * KIB,
        "chunk_size_bytes": 64 * KIB,
        "journal_size_bytes": 64 * KIB,
    }
    provision(f"file:{path}", grow_step_bytes=MIB, **sizes)
    geometry = Geometry(grow_step_bytes=MIB, **sizes)
    with path.open("r+b") as file:
        file.seek(geometry.bitmap_offset_bytes)
        file.write(np.random.default_rng(1).bytes(geometry.bitmap_size_bytes))
    found = dump(f"file:{path}")
    assert len(found["bitmap_cells"]) == LISTED_PAGES * 8 + 1
    assert found["bitmap_cells"][-1]["problem"] == f"{geometry.bitmap_pages - LISTED_PAGES} more pages have damaged cells"
    assert found["table_cells"] == []


def test_the_log_of_a_dead_server(tmp_path: Path, pending_dir: Path) -> None:
    path = tmp_path / "disk"
    make(path)
    assert dump(volume(path))["pending_log"] is None
    driver = start(path)
    driver.pwrite(0, b"A" * 4096)
    crash(driver)
    with open_node(path, read_only=True) as node:
        superblock = read_superblock(node)
        place = surviving.lasting_place(node)
    [log] = pending_dir.iterdir()
    found = dump(volume(path))["pending_log"]
    assert json.loads(json.dumps(found)) == found
    assert (found["path"], found["state"], found["identity"]) == (str(log), "log", place)
    assert (found["generation"], found["failed_errno"], found["acknowledged"]) == (superblock.generation, 0, 0)
    assert sorted(area["count"] for area in found["areas"]) == [0, 2], "a word of the bitmap and an entry of the table"

    memory = surviving.find(log)
    header: Any = np.frombuffer(memory.buffer, HEADER, 1)
    header["generation"] += np.uint64(1)
    found = dump(volume(path))["pending_log"]
    assert found["state"] == "missing" and "damaged" in found["problem"], "not believed, and shown all the same"
    assert found["generation"] == superblock.generation + 1
    header["log_magic"] = np.void(b"nonsense")
    assert dump(volume(path))["pending_log"]["valid"] is False
    del header
    memory.remove()
    memory.close()
    found = dump(volume(path))["pending_log"]
    assert "is not there" in found["problem"] and "areas" not in found
