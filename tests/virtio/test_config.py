# SPDX-License-Identifier: Apache-2.0
"""What a guest's driver reads of its disk, against the structure in the kernel's header."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from fvd.virtio.config import RANGES_MAX, SEGMENTS_MAX, GuestDisk

pytestmark = pytest.mark.release_only

PROGRAM = r"""
#include <linux/virtio_blk.h>
#include <stddef.h>
#include <stdio.h>
static struct virtio_blk_config config;
#define FIELD(name) printf(", \"" #name "\": [%zu, %zu]", offsetof(struct virtio_blk_config, name), sizeof config.name);
int main(void) {
    printf("{\"last\": [%zu, 1]", offsetof(struct virtio_blk_config, unused1) + 2);
    FIELD(capacity) FIELD(size_max) FIELD(seg_max) FIELD(geometry) FIELD(blk_size) FIELD(physical_block_exp) FIELD(alignment_offset)
    FIELD(min_io_size) FIELD(opt_io_size) FIELD(wce) FIELD(num_queues) FIELD(max_discard_sectors) FIELD(max_discard_seg)
    FIELD(discard_sector_alignment) FIELD(max_write_zeroes_sectors) FIELD(max_write_zeroes_seg) FIELD(write_zeroes_may_unmap)
    puts("}");
}
"""


@pytest.fixture(scope="module")
def fields(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, int]]:
    """(offset, size) of each field, as the compiler lays it out."""
    folder: Path = tmp_path_factory.mktemp("config")
    (folder / "layout.c").write_text(PROGRAM)
    try:
        subprocess.run(["gcc", "-o", folder / "layout", folder / "layout.c"], check=True)
    except FileNotFoundError:
        pytest.skip("gcc is not installed")
    told = subprocess.run([folder / "layout"], check=True, capture_output=True, text=True).stdout
    return {name: tuple(place) for name, place in json.loads(told).items()}


@pytest.mark.parametrize("preferred", [512, 4096, 64 << 10])
def test_the_layout_is_the_kernels(fields: dict[str, tuple[int, int]], preferred: int) -> None:
    disk = GuestDisk(10**9 // 512 * 512, False, preferred, b"serial", 4)
    config = disk.config()
    read = {name: int.from_bytes(config[at : at + size], "little") for name, (at, size) in fields.items()}
    sectors = preferred // 512
    assert len(config) == fields["last"][0] + 1
    assert read == {
        "last": 0,
        "capacity": 10**9 // 512,
        "size_max": 0,
        "seg_max": SEGMENTS_MAX,
        "geometry": 0,
        "blk_size": 512,
        "physical_block_exp": min(sectors, 8).bit_length() - 1,
        "alignment_offset": 0,
        "min_io_size": min(sectors, 8),
        "opt_io_size": sectors,
        "wce": 1,
        "num_queues": 4,
        "max_discard_sectors": 2**23 - sectors,
        "max_discard_seg": RANGES_MAX,
        "discard_sector_alignment": sectors,
        "max_write_zeroes_sectors": 2**23 - sectors,
        "max_write_zeroes_seg": RANGES_MAX,
        "write_zeroes_may_unmap": 1,
    }
