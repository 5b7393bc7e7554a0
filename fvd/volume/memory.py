# SPDX-License-Identifier: Apache-2.0
"""What a disk takes of memory, told to whoever is refused it. Knows sizes only."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from fvd.errors import FvdError, OutOfMemory
from fvd.format.geometry import Geometry
from fvd.units import format_size


def memory_bytes(geometry: Geometry) -> int:
    """What an open disk takes whatever it holds: both maps, a bit for each slot, and its journal while that is read."""
    slots_bytes = geometry.table_entries // 8
    return geometry.bitmap_size_bytes + geometry.table_size_bytes + slots_bytes + geometry.journal_size_bytes


@contextmanager
def enough_memory(geometry: Geometry) -> Iterator[None]:
    """Raises OutOfMemory, saying what this disk needs, where the block is refused memory."""
    try:
        yield
    except (MemoryError, OSError) as error:
        if isinstance(error, FvdError) or (isinstance(error, OSError) and error.errno != errno.ENOMEM):
            raise
        raise OutOfMemory(
            f"there is not enough memory: the maps and the journal of this disk of {format_size(geometry.virtual_size_bytes)} take "
            f"{format_size(memory_bytes(geometry))} of it, beside what the program itself needs; give it more (ulimit -v, MemoryMax= of "
            "its unit), or end something else"
        ) from error
