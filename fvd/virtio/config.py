# SPDX-License-Identifier: Apache-2.0
"""What a virtio block device tells its driver of itself: struct virtio_blk_config (virtio 1.2, 5.2.4). Knows no protocol."""

from __future__ import annotations

import struct
from dataclasses import dataclass

SECTOR_BYTES = 512
SEGMENTS_MAX = 126  # of a request: a ring of 128 entries has one more for the header, one for the status
RANGES_MAX = 64  # of a discard or write-zeroes; blk.pxi refuses more
RANGE_BYTES_MAX = 1 << 32  # of each of them: what Linux can send

# capacity, size_max, seg_max, cylinders, heads, sectors, blk_size, physical_block_exp, alignment_offset, min_io_size, opt_io_size,
# writeback, (reserved), num_queues, max_discard_sectors, max_discard_seg, discard_sector_alignment, max_write_zeroes_sectors,
# max_write_zeroes_seg, write_zeroes_may_unmap
_CONFIG = struct.Struct("<QIIHBBIBBHIBxHIIIIIB3x")


@dataclass(frozen=True)
class GuestDisk:
    """A disk as a guest's driver sees it. `preferred_bytes`: what requests and discards are best aligned to, a power of two."""

    size_bytes: int
    read_only: bool
    preferred_bytes: int
    serial: bytes
    queues: int

    @property
    def sectors(self) -> int:
        return self.size_bytes // SECTOR_BYTES

    def config(self) -> bytes:
        preferred = max(self.preferred_bytes // SECTOR_BYTES, 1)
        range_sectors = RANGE_BYTES_MAX // SECTOR_BYTES - preferred
        return _CONFIG.pack(
            self.sectors,
            0,
            SEGMENTS_MAX,
            0,
            0,
            0,
            SECTOR_BYTES,
            min(preferred, 8).bit_length() - 1,  # at least what a page is: a larger one helps no file system
            0,
            min(preferred, 8),
            preferred,
            1,
            self.queues,
            range_sectors,
            RANGES_MAX,
            preferred,
            range_sectors,
            RANGES_MAX,
            1,
        )
