# SPDX-License-Identifier: Apache-2.0
"""Worlds for what the others meet too rarely: each kind brings one corner of the engine about again and again, with few requests."""

from __future__ import annotations

from dataclasses import replace

from fvd.format.geometry import Geometry, Layout
from fvd.modes import WRITE_THROUGH_CACHE_MODES
from fvd.sim._rng import Rng
from fvd.sim.shape import KIB, SECTOR_BYTES, Area, Shape

CORNER_SHARE = 0.35


def draw_corner(rng: Rng) -> Shape | None:
    """The shape of one of them, or None: another world. From rng of its own: the others keep their worlds."""
    if rng.random() >= CORNER_SHARE:
        return None
    twice = (_two_blocks, _little_journal, _two_words)  # short ones
    return rng.choice((*twice, *twice, _full_ring, _zeros_by_their_bits, _far_apart))(rng)


def _two_blocks(rng: Rng) -> Shape:
    """Two or four blocks in a chunk: a trim of one often frees the slot, with a write to another under way. Discards fail."""
    shape = _compact(rng, rng.choice((16, 32, 32, 32)) * KIB, 64 * KIB, chunks=8)  # there is always a free slot
    shape.logical_block_bytes = 512
    shape.discard = True
    shape.advice = {"discard": 0.5}
    shape.areas = [(first, count) for chunk in range(rng.randint(1, 2)) for first, count in _whole_and_halves(chunk * 128)]
    shape.kinds = {"write": 4.0, "trim": 3.0, "read": rng.choice((0.0, 0.5)), "flush": rng.choice((0.2, 0.5)), "zero": 0.3}
    shape.largest_sectors = rng.choice((1, 8))
    shape.depth, shape.longest_round = rng.choice((4, 8, 16)), 100
    shape.slow = {"write": rng.choice((0.3, 0.5))}
    shape.settle_share = 0.5
    return shape


def _little_journal(rng: Rng) -> Shape:
    """Commits are small and slow, so that first writes wait for journal space; some of them fail."""
    shape = _compact(rng, 16 * KIB, 64 * KIB, chunks=rng.randint(20, 60))
    shape.commit_limit_bytes = rng.choice((40, 60, 150))
    shape.kinds = {"write": 4.0, "trim": 1.0, "flush": rng.choice((0.1, 0.5)), "read": 0.5, "fua": rng.choice((0.0, 0.3))}
    shape.largest_sectors = 8
    shape.depth, shape.longest_round = rng.choice((8, 16)), 40
    shape.slow = {rng.choice(("flush", "journal")): 0.9}
    shape.faults = rng.choice(({}, {"flush": 0.2}, {"flush": 0.5}, {"journal": 0.3}))
    shape.settle_share = 0.6
    return shape


def _full_ring(rng: Rng) -> Shape:
    """A checkpoint is slow, and its writes fail; commits of one flush each fill the ring meanwhile, and wait for its end."""
    shape = _compact(rng, 4 * KIB, 64 * KIB, chunks=rng.randint(8, 40))
    shape.kinds = {"write": 3.0, "flush": 3.0, "trim": 1.0}
    shape.largest_sectors = 8
    shape.depth, shape.longest_round = rng.choice((2, 3, 6)), 250
    shape.slow = {"map": rng.choice((0.9, 1.0))}
    shape.faults = rng.choice(({}, {"map": 0.4}, {"map": 0.4}))
    shape.crash_at = rng.choice(("", "map", "journal"))
    return shape


def _zeros_by_their_bits(rng: Rng) -> Shape:
    """Over a base a chunk of several words is zeros by its bits; a write gives it a slot, and others are durable before that is."""
    shape = _over_base(rng, chunks=rng.randint(2, 4))
    shape.kinds = {"write": 1.0, "fua": 4.0, "zero": 2.0, "read": rng.choice((0.0, 0.3))}
    shape.cache_mode = rng.choice(("none", "writeback", *WRITE_THROUGH_CACHE_MODES))
    shape.areas = [(0, shape.sectors)]
    shape.largest_sectors = 8
    shape.depth, shape.longest_round = rng.choice((8, 16, 32)), 60
    shape.slow = {"flush": 0.9, "journal": rng.choice((0.5, 0.9))}
    shape.crash_at = rng.choice(("journal", "flush"))
    shape.copying = rng.random() < 0.3
    return shape


def _two_words(rng: Rng) -> Shape:
    """What was copied is overwritten where two words of the bitmap meet, inside one chunk, and flushed."""
    shape = _over_base(rng, chunks=6)
    unit = shape.geometry.block_size_bytes // SECTOR_BYTES
    words = [word for word in range(1, shape.geometry.bitmap_words) if word * 64 % shape.geometry.blocks_per_chunk]
    shape.areas = [((64 * word - 1) * unit, 2 * unit) for word in words[:8]]
    shape.copying, shape.eager, shape.copy_on_read = True, True, True
    shape.kinds = {"read": 1.0, "write": 2.0, "flush": 0.6}
    shape.largest_sectors = 2 * unit
    shape.depth, shape.longest_round = rng.choice((1, 1, 4)), 25
    shape.crash_at = rng.choice(("", "flush", "journal"))
    return shape


def _far_apart(rng: Rng) -> Shape:
    """Eight places far apart: the maps' dirty pages have no dirty neighbours, a checkpoint takes several turns, and commits go on beside it
    in the same words."""
    shape = _compact(rng, 4 * KIB, 64 * KIB, chunks=64 * KIB)
    window = 4 * shape.geometry.chunk_size_bytes // SECTOR_BYTES
    step = shape.sectors // 8
    shape.windows = shape.areas = [(place * step, window) for place in range(8)]
    shape.storage_chunks = 32
    shape.kinds = {"write": 4.0, "trim": 1.5, "flush": 2.0}
    shape.largest_sectors = 8
    shape.depth, shape.longest_round = rng.choice((4, 8, 16)), 200
    shape.slow = {"flush": rng.choice((0.5, 0.9)), "journal": rng.choice((0.0, 0.5)), "map": rng.choice((0.0, 0.0, 0.5))}
    shape.crash_at = rng.choice(("", "map", "journal"))
    return shape


def _whole_and_halves(first: int) -> list[Area]:
    """Of a chunk of 128 sectors: whatever falls on a half of it, a trim too, stays there."""
    return [(first, 128), (first, 64), (first + 64, 64)]


def _compact(rng: Rng, block_bytes: int, chunk_bytes: int, *, chunks: int) -> Shape:
    geometry = Geometry(
        virtual_size_bytes=chunks * chunk_bytes,
        block_size_bytes=block_bytes,
        chunk_size_bytes=chunk_bytes,
        journal_size_bytes=64 * KIB,
        grow_step_bytes=max(chunk_bytes, 256 * KIB),
        layout=Layout.COMPACT,
    )
    return Shape(
        geometry=geometry,
        logical_block_bytes=rng.choice((512, 4096)),
        cache_mode=rng.choice(("none", "none", "writeback", "writethrough")),
        storage_chunks=chunks,
        torn_share=rng.choice((0.0, 0.3)),
        overtaking_share=rng.choice((0.0, 0.3)),
        verify_share=rng.choice((0.0, 0.3)),
    )


def _over_base(rng: Rng, *, chunks: int) -> Shape:
    """Chunks of several words each, over a base as large as the disk."""
    shape = _compact(rng, 4 * KIB, rng.choice((512, 1024)) * KIB, chunks=chunks)
    shape.base_bytes = shape.geometry.virtual_size_bytes
    shape.geometry = replace(shape.geometry, grow_step_bytes=1 << 20)
    return shape
