# SPDX-License-Identifier: Apache-2.0
"""Sizes as people write them. G means GiB. Lowest layer: imports only the errors."""

from __future__ import annotations

import re

from fvd.errors import InvalidArgument, quoted

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

_SUFFIX_BYTES = {"": 1, "B": 1, "K": KIB, "M": MIB, "G": GIB, "T": TIB, "P": 1 << 50}
_DECIMALS = "KMGTP"
_DECIMAL = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGTP])B\s*", re.ASCII | re.IGNORECASE)
_SIZE = re.compile(r"\s*(\d+)(?:\.(\d+))?\s*([BKMGTP]?)(?:IB)?\s*", re.ASCII | re.IGNORECASE)


def parse_size(text: str | int) -> int:
    """``"100G"``, ``"1.5T"``, ``"64k"``, ``"5GiB"`` or a number of bytes, to bytes. Raises InvalidArgument."""
    if isinstance(text, int):
        if text < 0:
            raise InvalidArgument(f"a size cannot be negative: {text}")
        return text
    match = _SIZE.fullmatch(text)
    if match is None and (decimal := _DECIMAL.fullmatch(text)):
        number, suffix = decimal.group(1), decimal.group(2).upper()
        raise InvalidArgument(
            f"{quoted(text)} could be {number} times {1000 ** (_DECIMALS.index(suffix) + 1)} or times {_SUFFIX_BYTES[suffix]} bytes; write "
            f"{number}{suffix} or {number}{suffix}iB, which both are the second"
        )
    if match is None:
        raise InvalidArgument(f"{quoted(text)} is not a size; write for example 100G, 64K or 1048576")
    whole, fraction, suffix = match.groups()
    unit_bytes = _SUFFIX_BYTES[suffix.upper()]
    if not fraction:
        return int(whole) * unit_bytes
    scale: int = 10 ** len(fraction)
    size_bytes, rest = divmod(int(whole + fraction) * unit_bytes, scale)
    if rest:
        raise InvalidArgument(f"{quoted(text)} is not a whole number of bytes")
    return size_bytes


def format_size(size_bytes: int) -> str:
    """Bytes to at most four significant digits with a binary suffix: ``5.0 GiB``; exact below 1 KiB."""
    if size_bytes < KIB:
        return f"{size_bytes} B"
    value = float(size_bytes)
    for suffix in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        value /= 1024
        if value < 1000 or suffix == "PiB":
            break
    return f"{value:.1f} {suffix}" if value < 100 else f"{value:.0f} {suffix}"
