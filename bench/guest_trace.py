# SPDX-License-Identifier: Apache-2.0
"""A guest's requests in order, and the file they are kept in. Knows nothing of how they came about or what is done with them.

The file is xz over a line of JSON (what the trace is, how many requests, how they are divided into phases) and three columns: the kinds,
a byte each; the offsets, each as the distance from the end of the request before, 8 bytes; the lengths, 4 bytes. Units are sectors.
"""

from __future__ import annotations

import json
import lzma
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SECTOR = 512
READ, WRITE, ZERO, TRIM, FLUSH, PROVIDE = range(6)
KINDS = ("read", "write", "zero", "trim", "flush", "provide zeros")  # the last: write zeros, and keep the place for them


@dataclass(frozen=True)
class Trace:
    """`phases`: of each its name, and the number of its first request; in order, each goes on to the next."""

    kinds: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]  # bytes
    lengths: npt.NDArray[np.int64]  # bytes
    phases: dict[str, int]
    about: dict[str, Any]  # how it was recorded; disk_bytes is always there

    @property
    def disk_bytes(self) -> int:
        return int(self.about["disk_bytes"])

    def phase(self, name: str) -> slice:
        """Its requests."""
        names = list(self.phases)
        after = names.index(name) + 1
        return slice(self.phases[name], self.phases[names[after]] if after < len(names) else len(self.kinds))


def save(trace: Trace, path: Path) -> None:
    ends = np.concatenate([[0], (trace.offsets + trace.lengths)[:-1]])
    header = {"about": trace.about, "phases": trace.phases, "requests": len(trace.kinds)}
    columns = [
        trace.kinds.tobytes(),
        planes(((trace.offsets - ends) // SECTOR).astype("<i8")),
        planes((trace.lengths // SECTOR).astype("<u4")),
    ]
    path.write_bytes(lzma.compress(json.dumps(header).encode() + b"\n" + b"".join(columns), preset=9 | lzma.PRESET_EXTREME))


def load(path: Path) -> Trace:
    line, columns = lzma.decompress(path.read_bytes()).split(b"\n", 1)
    header = json.loads(line)
    count = header["requests"]
    if len(columns) != count * 13:
        raise ValueError(f"{path}: not a trace of {count} requests")
    kinds = np.frombuffer(columns[:count], np.uint8)
    distances = from_planes(columns[count : count * 9], "<i8") * SECTOR
    lengths = from_planes(columns[count * 9 :], "<u4").astype(np.int64) * SECTOR
    ends = np.cumsum(distances + lengths)
    return Trace(kinds, ends - lengths, lengths, header["phases"], header["about"])


def planes(numbers: npt.NDArray[Any]) -> bytes:
    """The first bytes of all, then the second of all...: like beside like is smaller when it is compressed."""
    return numbers.view(np.uint8).reshape(-1, numbers.itemsize).T.tobytes()


def from_planes(data: bytes, kind: str) -> npt.NDArray[Any]:
    size = np.dtype(kind).itemsize
    return np.ascontiguousarray(np.frombuffer(data, np.uint8).reshape(size, -1).T).view(kind).reshape(-1)
