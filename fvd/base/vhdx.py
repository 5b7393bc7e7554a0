# SPDX-License-Identifier: Apache-2.0
"""Whether a VHDX is the difference to another image. Knows where the format keeps that, and believes nothing that stands there.

Two region tables, each in a place of its own, say where the metadata are; a table there names items. The item *file parameters* has a bit
for a parent, and the item *parent locator* its names. A reader may take either region table: both are looked at.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from fvd.device.node import Node

_TABLE_BYTES = 64 << 10
_REGION_TABLES_BYTES = (192 << 10, 256 << 10)
_REGION_HEADER_BYTES, _METADATA_HEADER_BYTES = 16, 32
_ENTRY = struct.Struct("<16sQII")  # of a region: GUID, offset, length, required
_ITEM = struct.Struct("<16sIIII")  # of the metadata: GUID, offset, length, flags, reserved
# GUIDs as they stand in a file: the first three parts with their lowest byte first.
METADATA = bytes.fromhex("06a27c8b90479a4bb8fe575f050f886e")
FILE_PARAMETERS = bytes.fromhex("3767a1ca36fa434db3b633f0aa44e76b")
PARENT_LOCATOR = bytes.fromhex("2d5fd3a80bb34d45abf7d3d84834ab0c")
_HAS_PARENT = 2


def has_parent(node: Node) -> bool:
    """By either of its tables. Raises DeviceError."""
    places = {
        offset_bytes
        for table_bytes in _REGION_TABLES_BYTES
        for guid, offset_bytes, _, _ in _rows(node, table_bytes, _REGION_HEADER_BYTES, _ENTRY)
        if guid == METADATA
    }
    for place_bytes in places:
        for guid, offset_bytes, _, _, _ in _rows(node, place_bytes, _METADATA_HEADER_BYTES, _ITEM):
            if guid == PARENT_LOCATOR:
                return True
            if guid == FILE_PARAMETERS and struct.unpack("<II", _read(node, place_bytes + offset_bytes, 8))[1] & _HAS_PARENT:
                return True
    return False


def _rows(node: Node, offset_bytes: int, header_bytes: int, row: struct.Struct) -> Iterator[tuple[Any, ...]]:
    table = _read(node, offset_bytes, _TABLE_BYTES)[header_bytes:]
    yield from row.iter_unpack(table[: len(table) // row.size * row.size])


def _read(node: Node, offset_bytes: int, length_bytes: int) -> bytes:
    """Zeros behind its end."""
    there = max(0, min(length_bytes, node.size_bytes() - offset_bytes))
    return (node.pread(offset_bytes, there).tobytes() if there else b"").ljust(length_bytes, b"\0")
