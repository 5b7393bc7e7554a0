# SPDX-License-Identifier: Apache-2.0
"""What names lead to now, for whoever decides by it what to do; how it is done safely is folders.py's. Knows no disk format."""

from __future__ import annotations

from pathlib import Path

from fvd.device.node import Identity, identity_of


def exists(path: str) -> bool:
    """Whether something has this name; a symbolic link that leads nowhere has not."""
    return Path(path).exists()


def leads_to_device(path: str) -> bool:
    """Whether the name leads to a block device now."""
    return Path(path).is_block_device()


def leads_to_file(path: str) -> bool:
    """Whether the name leads to a regular file now."""
    return Path(path).is_file()


def identity(path: str) -> Identity | None:
    """What the name leads to; None: nothing that can be reached."""
    try:
        return identity_of(Path(path).stat())
    except OSError:
        return None
