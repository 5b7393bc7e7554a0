"""What `dump` shows of maps that are full of something else: enough to see it, not all of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fvd.format.geometry import Geometry
from fvd.volume.dump import LISTED_PAGES, dump
from fvd.volume.provision import provision

KIB, MIB = 1 << 10, 1 << 20


def test_maps_full_of_foreign_bytes_are_listed_in_part(tmp_path: Path) -> None:
    """A hostile volume must not fill the memory of whoever looks at it."""
    path = tmp_path / "disk"
    sizes = {"virtual_size_bytes": 4 << 30, "block_size_bytes": 4 * KIB, "chunk_size_bytes": 64 * KIB, "journal_size_bytes": 64 * KIB}
    provision(f"file:{path}", grow_step_bytes=MIB, **sizes)
    geometry = Geometry(grow_step_bytes=MIB, **sizes)
    with path.open("r+b") as file:
        file.seek(geometry.bitmap_offset_bytes)
        file.write(np.random.default_rng(1).bytes(geometry.bitmap_size_bytes))
    found = dump(f"file:{path}")
    assert len(found["bitmap_cells"]) == LISTED_PAGES * 8 + 1
    assert found["bitmap_cells"][-1]["problem"] == f"{geometry.bitmap_pages - LISTED_PAGES} more pages have damaged cells"
    assert found["table_cells"] == []
