# SPDX-License-Identifier: Apache-2.0
"""Disks for tests that kill whoever has them open: small, over a base whose contents a seed gives, on storage that begins with little."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import fvd
from fvd.sim._base import base_content

KIB = 1 << 10


class Kind(Protocol):
    """What tests vary."""

    @property
    def block(self) -> int: ...
    @property
    def chunk(self) -> int: ...
    @property
    def base_bytes(self) -> int: ...
    @property
    def layout(self) -> str: ...


def provision(kind: Kind, folder: Path, size: int, *, grow_step: int | None = None, journal_size: int = 64 * KIB) -> str:
    """A volume in the folder, which grows chunk by chunk unless told otherwise, with a journal that soon goes round."""
    base = None
    if kind.base_bytes:
        base = folder / "base.raw"
        base.write_bytes(base_content(kind.base_bytes, 0, kind.base_bytes))
    volume = f"file:{folder / 'disk'}"
    fvd.provision(
        volume,
        size,
        base=base,
        layout="raw" if kind.layout == "raw" else "compact",
        block_size=kind.block,
        chunk_size=kind.chunk,
        journal_size=journal_size,
        grow_step=grow_step or kind.chunk,
    )
    return volume
