"""The Cython kernels against numpy and against memory: one request's lookup, a whole-bitmap scan, CRC32C."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from machine import median, spread

from fvd import _core

CHUNK_BYTES = 1 << 20
BLOCK_BYTES = 1 << 16


def seconds_per_call(call: Callable[[], Any], calls: int) -> float:
    began = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - began) / calls


def numpy_lookup(bitmap: np.ndarray, table: np.ndarray, offset_bytes: int, length_bytes: int) -> tuple[bool, int]:
    """The equivalent in numpy: are all blocks of the range present, and in which slot is its chunk?"""
    blocks = np.arange(offset_bytes // BLOCK_BYTES, -(-(offset_bytes + length_bytes) // BLOCK_BYTES), dtype=np.uint64)
    present = (bitmap[blocks >> np.uint64(6)] >> (blocks & np.uint64(63))) & np.uint64(1)
    return bool(present.all()), int(table[offset_bytes // CHUNK_BYTES])


def measure(rounds: int, seconds: float) -> dict[str, Any]:
    bitmap = np.full((1 << 40) // BLOCK_BYTES // 64, 0xFFFFFFFFFFFFFFFF, np.uint64)
    table = np.arange((1 << 40) // CHUNK_BYTES, dtype=np.uint32)
    lookup = _core.Lookup(bitmap, table, BLOCK_BYTES, CHUNK_BYTES)
    large = np.random.default_rng(1).integers(0, 1 << 63, (256 << 20) // 8, np.uint64)
    samples = []
    for _ in range(rounds):
        ours = seconds_per_call(lambda: lookup.find(123456 * 4096, 4096), 200_000)
        theirs = seconds_per_call(lambda: numpy_lookup(bitmap, table, 123456 * 4096, 4096), 5_000)
        scan = seconds_per_call(lambda: _core.bitmap_count(large, 0, large.size * 64), 3)
        # Memory bandwidth as a read: numpy's fastest pass over the same array.
        memory = seconds_per_call(large.max, 3)
        crc = seconds_per_call(lambda: _core.crc32c(large.view(np.uint8)), 2)
        samples.append(
            {
                "lookup_ns": ours * 1e9,
                "numpy_ns": theirs * 1e9,
                "scan_gbs": large.nbytes / scan / 1e9,
                "memory_gbs": large.nbytes / memory / 1e9,
                "crc_gbs": large.nbytes / crc / 1e9,
            }
        )
    return {"samples": samples}


def report(result: dict[str, Any]) -> list[dict[str, Any]]:
    samples = result["samples"]
    lookup = [s["numpy_ns"] / s["lookup_ns"] for s in samples]
    scan = [s["memory_gbs"] / s["scan_gbs"] for s in samples]
    return [
        {"what": "one request's lookup: numpy / kernel, time", "value": spread(lookup), "goal": ">= 20", "reached": median(lookup) >= 20},
        {"what": "whole-bitmap scan: time / time to read the memory", "value": spread(scan), "goal": "<= 2", "reached": median(scan) <= 2},
        {"what": "CRC32C of 256 MiB", "value": f"{median([s['crc_gbs'] for s in samples]):.1f} GB/s", "goal": "", "reached": None},
    ]
