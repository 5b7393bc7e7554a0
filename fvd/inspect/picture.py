# SPDX-License-Identifier: Apache-2.0
"""Draws where the chunks of a disk lie in its storage, for terminals. Knows only views: no files, no terminal."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fvd.disk.view import View
from fvd.inspect.map import slots_of
from fvd.units import format_size

WIDTH_MIN = 24
ROWS = 12
_SHADES = "·░▒▓█"
_SHADES_ASCII = ".-+*#"
_BRAILLE = 0x2800
# Dot (row, column) of a Braille cell of 4 rows and 2 columns.
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def draw(view: View, width: int = 80, *, ascii_only: bool = False) -> list[str]:
    """Lines of at most `width` characters: a bar of the storage shaded by use, and a chart of guest place (down) by storage place (across).

    A diagonal in the chart is a disk whose neighbours lie side by side; a cloud is a scattered one.
    """
    columns = max(WIDTH_MIN, width) - 2
    chunks, slots = _placed(view)
    return [*_bar(view, slots, columns, ascii_only), "", *_chart(view, chunks, slots, columns, ascii_only)]


def _placed(view: View) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Chunks that hold something, and the slot of each."""
    geometry = view.geometry
    slots = slots_of(view, 0, geometry.chunks)
    if view.table is None:
        per_chunk = geometry.blocks_per_chunk
        present = np.unpackbits(np.asarray(view.bitmap).view(np.uint8), bitorder="little")[: geometry.blocks]
        filled = np.logical_or.reduceat(present, np.arange(0, geometry.blocks, per_chunk))
        slots = np.where(filled, slots, -1)
    chunks = np.flatnonzero(slots >= 0)
    return chunks, slots[chunks]


def _bar(view: View, slots: npt.NDArray[np.int64], columns: int, ascii_only: bool) -> list[str]:
    geometry = view.geometry
    shades = _SHADES_ASCII if ascii_only else _SHADES
    total = max(geometry.max_storage_size_bytes, view.storage_size_bytes)
    cell_bytes = total / columns
    edges = np.clip((np.arange(columns + 1) * cell_bytes - geometry.data_offset_bytes) / geometry.chunk_size_bytes, 0, geometry.chunks)
    slot_counts, used = np.diff(edges), np.diff(_used_before(slots, edges))
    marks = []
    for cell in range(columns):
        part = used[cell] / slot_counts[cell] if slot_counts[cell] > 0 else 0.0
        if part > 0:
            marks.append(shades[4] if part > 0.999 else shades[1 + min(2, int(part * 3))])
        elif cell * cell_bytes < geometry.data_offset_bytes:
            marks.append("M")
        else:
            marks.append(shades[0] if (cell + 0.5) * cell_bytes < view.storage_size_bytes else " ")
    return [
        f"storage: {format_size(view.storage_size_bytes)} of at most {format_size(geometry.max_storage_size_bytes)}; "
        f"one mark is {format_size(int(cell_bytes))}"[: columns + 2],
        "[" + "".join(marks) + "]",
        f"M metadata  {shades[0]} free  {shades[1]}{shades[2]}{shades[3]}{shades[4]} in use  blank: not there yet"[: columns + 2],
    ]


def _used_before(slots: npt.NDArray[np.int64], edges: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """How many slots in use lie before each edge, a slot that an edge divides counted in part."""
    order = np.sort(slots)
    whole = np.floor(edges)
    before = np.searchsorted(order, whole)
    divided = np.searchsorted(order, whole + 1) - before
    return np.asarray(before + (edges - whole) * divided, np.float64)


def _chart(view: View, chunks: npt.NDArray[np.int64], slots: npt.NDArray[np.int64], columns: int, ascii_only: bool) -> list[str]:
    geometry = view.geometry
    fine_rows, fine_columns = (ROWS, columns) if ascii_only else (ROWS * 4, columns * 2)
    last = max(int(np.max(slots)) + 1 if slots.size else 1, geometry.slots_in(view.storage_size_bytes), 1)
    dots = np.zeros((fine_rows, fine_columns), np.bool_)
    dots[chunks * fine_rows // geometry.chunks, slots * fine_columns // last] = True
    if ascii_only:
        body = ["".join("*" if dot else " " for dot in row) for row in dots]
    else:
        cells = np.zeros((ROWS, columns), np.int64)
        for row, bits in enumerate(_DOTS):
            for column, bit in enumerate(bits):
                cells |= dots[row::4, column::2] * bit
        body = ["".join(chr(_BRAILLE + int(cell)) if cell else " " for cell in row) for row in cells]
    side = "|" if ascii_only else "│"
    line = ("-" if ascii_only else "─") * columns
    top, bottom = (f"+{line}+", f"+{line}+") if ascii_only else (f"┌{line}┐", f"└{line}┘")
    title = f"down: the virtual disk, {format_size(geometry.virtual_size_bytes)}; across: the storage's slots, {last}; a dot: a chunk"
    return [title[: columns + 2], top, *(f"{side}{row}{side}" for row in body), bottom]
