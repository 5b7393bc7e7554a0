# SPDX-License-Identifier: Apache-2.0
"""What lies in a structure of the format: its fields in order, each with its type; to and from bytes. Knows no structure.

Types are written as numpy has them: ``<u4`` is an unsigned number of 4 bytes, ``V16`` are 16 bytes. numpy takes a record for the dtype that
it describes, and is imported only then: a server that is idle must not hold it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

_CODES = {"u1": "B", "<u2": "H", "<u4": "I", "<u8": "Q"}

Row = dict[str, Any]  # a number, or bytes, by the field's name


class Record:
    """A packed structure, little-endian."""

    def __init__(self, *fields: tuple[str, str], inner: dict[str, tuple[Record, int]] | None = None) -> None:
        """`inner`: the bytes of this field are so many records of another kind."""
        self._fields = fields
        self._inner = inner or {}
        self.names = tuple(name for name, _ in fields)
        self._struct = struct.Struct("<" + "".join(_CODES.get(kind) or f"{kind[1:]}s" for _, kind in fields))
        self.itemsize = self._struct.size
        self.places: dict[str, tuple[int, int]] = {}  # offset and size of each field
        self._initial: Row = {}
        offset = 0
        for name, kind in fields:
            size = struct.calcsize(f"<{_CODES[kind]}") if kind in _CODES else int(kind[1:])
            self.places[name] = (offset, size)
            self._initial[name] = 0 if kind in _CODES else bytes(size)
            offset += size

    @property
    def dtype(self) -> Any:
        """numpy's."""
        import numpy as np

        inner = {name: (name, record.dtype, count) for name, (record, count) in self._inner.items()}
        return np.dtype([inner.get(name) or (name, kind) for name, kind in self._fields])

    @property
    def fields(self) -> Any:
        """As numpy has them."""
        return self.dtype.fields

    def empty(self) -> Row:
        """All zeros."""
        return dict(self._initial)

    def read(self, data: Any, offset: int = 0) -> Row:
        return dict(zip(self.names, self._struct.unpack_from(data, offset), strict=True))

    def read_all(self, data: Any) -> Iterator[tuple[Any, ...]]:
        """The values of one after the other."""
        return self._struct.iter_unpack(data)

    def write(self, row: Row) -> bytearray:
        """Bytes that are shorter than their field are followed by zeros."""
        return bytearray(self._struct.pack(*(row[name] for name in self.names)))

    def put(self, data: Any, name: str, value: int, offset: int = 0) -> None:
        """One number, written at once."""
        struct.pack_into("<" + _CODES[dict(self._fields)[name]], data, offset + self.places[name][0], value)
