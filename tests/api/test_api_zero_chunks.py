# SPDX-License-Identifier: Apache-2.0
"""New chunks zeroed by real devices: by one that can, and by one that refuses. What is read is what was written."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from loops import loop_device, mounted, run, sparse

import fvd

MIB = 1 << 20
SIZE_BYTES = 24 * MIB
OTHERS = b"\xee" * MIB  # what the device held before: never seen


def play(device: str, seed: int) -> tuple[bytes, dict[str, int]]:
    """Small writes, trims and whole blocks on a new disk; what it must hold, and its counters."""
    rng = random.Random(seed)
    fvd.provision(device, size=SIZE_BYTES, block_size=64 << 10, force=True)
    model = bytearray(SIZE_BYTES)
    with fvd.open(device, zero_chunks=True) as disk:
        for _ in range(400):
            length = rng.choice((512, 4096, 4096, 65536, 70000))
            offset = rng.randrange(SIZE_BYTES - length) // 512 * 512
            if rng.random() < 0.1:
                first, last = -(-offset // 65536), (offset + 4 * 65536) // 65536
                disk.trim(first * 65536, min(last * 65536, SIZE_BYTES) - first * 65536)
                model[first * 65536 : last * 65536] = bytes(min(last * 65536, SIZE_BYTES) - first * 65536)
                continue
            data = rng.randbytes(length)
            disk.pwrite(offset, data)
            model[offset : offset + length] = data
        disk.flush()
        assert disk.pread(0, SIZE_BYTES) == model
        statistics = disk.info().statistics
    assert statistics is not None
    return bytes(model), statistics


@pytest.fixture(params=["ext4", "ramfs"])
def device(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, bool]]:
    """A loop device, and whether it writes zeros by itself: over a file of ext4 it does, over one of ramfs it cannot."""
    folder = tmp_path / "folder"
    with ExitStack() as stack:
        if request.param == "ext4":
            below = stack.enter_context(loop_device(sparse(tmp_path / "below", 128 * MIB)))
            run("mkfs.ext4", "-q", below)
            stack.enter_context(mounted(below, folder))
        else:
            stack.enter_context(mounted("none", folder, "-t", "ramfs"))
        image = sparse(folder / "image", 64 * MIB)
        image.write_bytes(OTHERS * 64)
        yield stack.enter_context(loop_device(image)), request.param == "ext4"


def test_a_device_zeroes_new_chunks(device: tuple[str, bool]) -> None:
    path, zeroes = device
    model, counters = play(path, 1)
    assert (counters["zeroed_chunks"] > 0) == zeroes
    with fvd.open(path, read_only=True) as disk:
        assert disk.pread(0, SIZE_BYTES) == model
    assert fvd.check(path).errors == []
