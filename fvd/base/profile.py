# SPDX-License-Identifier: Apache-2.0
"""Profile files: what a guest read from a base, in order, so that the next disk over the same base is prefetched in that order.

JSON lines: a header with the base's size, then `[offset_bytes, length_bytes]`. A profile is advice from a file that anybody may have
written: every value is checked, and nothing of a bad one is used. Knows neither engine nor disk.
"""

from __future__ import annotations

import heapq
import itertools
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from fvd.device.folders import reach
from fvd.device.node import open_node, typed_errors
from fvd.errors import Conflict, InvalidArgument, quoted
from fvd.units import format_size

VERSION = 1
SUFFIX = ".fvd-profile"
BYTES_MAX = 64 << 20
EXTENTS_MAX = 1_000_000

ReadRange = tuple[int, int]  # offset_bytes, length_bytes

_HEADER_BYTES_MAX = 1024
_MODE = 0o644
_LINE = re.compile(rb"\[ ?([0-9]{1,19}), ?([0-9]{1,19}) ?\]")
_serial = itertools.count()


def default_path(base_locator: str) -> str | None:
    """Where a profile is looked for and saved to if nobody says where: beside a local image. None: the base is not a local path."""
    return base_locator + SUFFIX if base_locator.startswith("/") else None


def merge(base_size_bytes: int, reads: Iterable[ReadRange]) -> list[ReadRange]:
    """The reads without what was read before and what lies beyond the base, in the order of the first read; neighbours are joined.

    Raises InvalidArgument for a negative offset or a length that is not positive.
    """
    known = list(reads)
    if any(offset < 0 or length <= 0 for offset, length in known):
        raise InvalidArgument("a read has a negative offset, or no length")
    # A sweep over the base from its start: of all reads that cover a place, the first owns it.
    by_offset = sorted(range(len(known)), key=lambda index: known[index][0])
    covering: list[tuple[int, int]] = []  # (index, end) of reads that have begun, a heap: the first read is at its top
    pieces: list[tuple[int, int, int]] = []  # index, begin, end
    at = position = 0
    while position < len(by_offset) or covering:
        if not covering:
            at = known[by_offset[position]][0]
        while position < len(by_offset) and known[by_offset[position]][0] <= at:
            index = by_offset[position]
            heapq.heappush(covering, (index, sum(known[index])))
            position += 1
        while covering and covering[0][1] <= at:
            heapq.heappop(covering)
        if at >= base_size_bytes:
            break
        if covering:
            index, end = covering[0]
            following = known[by_offset[position]][0] if position < len(by_offset) else end
            end = min(end, following, base_size_bytes)
            pieces.append((index, at, end))
            at = end
    pieces.sort()
    merged: list[ReadRange] = []
    for _, begin, end in pieces:
        if merged and sum(merged[-1]) == begin:
            merged[-1] = (merged[-1][0], end - merged[-1][0])
        else:
            merged.append((begin, end - begin))
    return merged


def save(path: str, base_size_bytes: int, reads: Iterable[ReadRange]) -> list[ReadRange]:
    """Writes the merged reads in place of what the file held, at once and durably; returns them. At most the first million are kept.

    Raises Conflict if there is a file of that name that is no profile; NotFound, PermissionDenied, NoSpace, DeviceError.
    """
    extents = merge(base_size_bytes, reads)[:EXTENTS_MAX]
    header = json.dumps({"fvd_profile": VERSION, "base_size_bytes": base_size_bytes}, separators=(",", ":"))
    text = "".join([header, "\n", *(f"[{offset},{length}]\n" for offset, length in extents)]).encode()
    with typed_errors("writing", path), reach(path) as place:
        place.check_folder()
        if place.status() is not None:
            _check_replaceable(path)
        # Not the target's name: a crash half-way leaves the old profile, and two that record at once do not write into one file.
        fresh = f"{place.name}.new-{os.getpid()}-{next(_serial)}"
        place.write(text, _MODE, by=fresh)
    return extents


def load(path: str, base_size_bytes: int) -> list[ReadRange]:
    """The extents of a profile of a base of this size. Raises as `read`, and Conflict: it is of a base of another size."""
    recorded_bytes, extents = read(path)
    if recorded_bytes != base_size_bytes:
        raise Conflict(
            f"the profile {path} was recorded of a base of {recorded_bytes} bytes, and this base has {base_size_bytes}; record it again"
        )
    return extents


def read(path: str) -> tuple[int, list[ReadRange]]:
    """The size of the base that a profile is of, and its extents.

    Raises InvalidArgument (no profile, damaged, too large), NotFound, PermissionDenied, DeviceError.
    """
    with open_node(path, read_only=True, direct=False) as node:
        size_bytes = node.size_bytes()
        if node.is_block:
            raise _unusable(path, "it is a device")
        if size_bytes > BYTES_MAX:
            raise _unusable(path, f"it has {format_size(size_bytes)}, and {format_size(BYTES_MAX)} is the most")
        data = node.pread(0, size_bytes).tobytes()
    lines = data.split(b"\n")
    base_size_bytes = _header_size_bytes(path, lines[0])
    if lines[-1]:
        raise _unusable(path, "it ends in the middle of a line")
    if len(lines) - 2 > EXTENTS_MAX:
        raise _unusable(path, f"it has more than {EXTENTS_MAX} extents")
    extents = []
    for number, line in enumerate(lines[1:-1], 2):
        match = _LINE.fullmatch(line)
        if match is None:
            raise _unusable(path, f"line {number} is not [offset,length]")
        offset, length = int(match[1]), int(match[2])
        if length == 0 or offset + length > base_size_bytes:
            raise _unusable(path, f"line {number}: {length} bytes at {offset} are not in the base, which has {base_size_bytes}")
        extents.append((offset, length))
    return base_size_bytes, extents


def _header_size_bytes(path: str, line: bytes) -> int:
    header = None
    if len(line) <= _HEADER_BYTES_MAX:
        try:
            header = json.loads(line)
        except (ValueError, RecursionError):
            header = None
    if not isinstance(header, dict) or "fvd_profile" not in header:
        raise _unusable(path, "it does not begin as a profile does")
    version, size_bytes = header["fvd_profile"], header.get("base_size_bytes")
    if type(version) is not int or version != VERSION:
        raise _unusable(path, f"it is of version {quoted(version)}, and {VERSION} is known")
    if type(size_bytes) is not int or size_bytes <= 0:
        raise _unusable(path, "it does not say how large its base is")
    return size_bytes


def _check_replaceable(path: str) -> None:
    try:
        with open_node(path, read_only=True, direct=False) as node:
            head = b"" if node.is_block else node.pread(0, min(node.size_bytes(), _HEADER_BYTES_MAX + 1)).tobytes()
        _header_size_bytes(path, head.split(b"\n")[0])
    except InvalidArgument as error:
        raise Conflict(f"{path} is there and is no profile ({Path(path).name} is left alone); name another file") from error


def _unusable(path: str, why: str) -> InvalidArgument:
    return InvalidArgument(f"the profile {path} cannot be used: {why}; record it again, or go without")
