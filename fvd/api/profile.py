"""Reads a profile to show it: what a guest read from a base, in order. Knows the file, not who prefetches by it.

JSON lines: a header with the base's size (``base_size_bytes``), then ``[offset_bytes, length_bytes]`` each.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fvd.api.types import Profile
from fvd.errors import Corrupt, DeviceError, NotFound, PermissionDenied

# What a recording of the million reads that are remembered can take, and then some.
LIMIT_BYTES = 64 << 20


def read_profile(path: str | os.PathLike[str]) -> Profile:
    """What ``record_profile`` saved. Raises NotFound, PermissionDenied, Corrupt (it is no profile, or damaged), DeviceError."""
    name = os.fspath(path)
    try:
        with Path(path).open("rb") as file:
            data = file.read(LIMIT_BYTES + 1)
    except FileNotFoundError:
        raise NotFound(f"{name} does not exist; fvd-lv profile record makes one") from None
    except PermissionError as error:
        raise PermissionDenied(f"{name}: {error.strerror}") from None
    except OSError as error:
        raise DeviceError(f"{name} cannot be read: {error.strerror}") from error
    if len(data) > LIMIT_BYTES:
        raise Corrupt(f"{name} is larger than any profile; check the name")
    lines = data.splitlines()
    header = _value(name, 1, lines[0]) if lines else None
    base_size: Any = header.get("base_size_bytes") if isinstance(header, dict) else None
    if not _is_size(base_size) or base_size == 0:
        raise Corrupt(f"{name} is no profile: its first line does not say what size the base has; record it again")
    extents = [_extent(name, number, line, base_size) for number, line in enumerate(lines[1:], 2)]
    return Profile(name, base_size, sum(length for _, length in extents), extents)


def _extent(name: str, number: int, line: bytes, base_size: int) -> tuple[int, int]:
    match _value(name, number, line):
        case [offset, length] if _is_size(offset) and _is_size(length) and 0 < length <= base_size - offset:
            return offset, length
    raise Corrupt(f"{name}, line {number}: not an offset and a length in a base of {base_size} bytes; record the profile again")


def _value(name: str, number: int, line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise Corrupt(f"{name}, line {number}: not a line of JSON; record the profile again") from None


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
