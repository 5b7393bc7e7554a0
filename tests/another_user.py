# SPDX-License-Identifier: Apache-2.0
"""Another user of this host, whom no password database knows, and images that say what they like: what tests of strangers' files share."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from fvd.device.node import open_node
from fvd.format.superblock import BaseFormat, BaseReference, Superblock
from fvd.volume.superblocks import read_superblock, write_superblock

STRANGER = 64242

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it becomes another user, and gives files to him")


@contextmanager
def open_folder() -> Iterator[Path]:
    """A folder of root's that everybody may look into, as pytest's own are not."""
    folder = Path(tempfile.mkdtemp(prefix="fvd-strangers-"))
    try:
        folder.chmod(0o755)
        yield folder
    finally:
        shutil.rmtree(folder)


def give(path: Path, uid: int = STRANGER) -> Path:
    os.chown(path, uid, uid)
    return path


def rewrite(path: Path | str, superblock: Superblock) -> None:
    """What the owner of an image can do to it: both slots say this, with checksums that are right."""
    with open_node(path, direct=False) as node:
        for more in (1, 2):
            write_superblock(node, replace(superblock, generation=superblock.generation + more))


def forge_base(path: Path | str, locator: str, base_format: BaseFormat | None = None, size_bytes: int | None = None) -> None:
    """The image names another base."""
    with open_node(path, read_only=True, direct=False) as node:
        found = read_superblock(node)
    assert found.base is not None
    base = BaseReference(
        locator, found.base.size_bytes if size_bytes is None else size_bytes, found.base.format if base_format is None else base_format
    )
    rewrite(path, replace(found, base=base))
