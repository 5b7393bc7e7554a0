# SPDX-License-Identifier: Apache-2.0
"""The Cython kernels against numpy and against memory: one request's lookup, a whole-bitmap scan, CRC32C."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from fvd import _core
from suite import Plan, Plot, Row, row

TITLE = "What do the kernels cost on memory, against numpy and against reading the memory?"
CHUNK_BYTES = 1 << 20
BLOCK_BYTES = 1 << 16
LARGE_BYTES = 256 << 20
SHARE_OF_A_RUN = 0.1  # five kernels are timed in each round, and none needs as long as a server


def seconds_per_call(call: Callable[[], Any], batch: int, seconds: float) -> float:
    """Batches, until the time is over."""
    calls, began = 0, time.perf_counter()
    while True:
        for _ in range(batch):
            call()
        calls += batch
        taken = time.perf_counter() - began
        if taken >= seconds:
            return taken / calls


def numpy_lookup(bitmap: np.ndarray, table: np.ndarray, offset_bytes: int, length_bytes: int) -> tuple[bool, int]:
    """The equivalent in numpy: are all blocks of the range present, and in which slot is its chunk?"""
    blocks = np.arange(offset_bytes // BLOCK_BYTES, -(-(offset_bytes + length_bytes) // BLOCK_BYTES), dtype=np.uint64)
    present = (bitmap[blocks >> np.uint64(6)] >> (blocks & np.uint64(63))) & np.uint64(1)
    return bool(present.all()), int(table[offset_bytes // CHUNK_BYTES])


def measure(plan: Plan) -> dict[str, Any]:
    bitmap = np.full((1 << 40) // BLOCK_BYTES // 64, 0xFFFFFFFFFFFFFFFF, np.uint64)
    table = np.arange((1 << 40) // CHUNK_BYTES, dtype=np.uint32)
    lookup = _core.Lookup(bitmap, table, BLOCK_BYTES, CHUNK_BYTES)
    large = np.random.default_rng(1).integers(0, 1 << 63, LARGE_BYTES // 8, np.uint64)
    kernels: dict[str, tuple[Callable[[], Any], int]] = {
        "lookup": (lambda: lookup.find(123456 * 4096, 4096), 20_000),
        "numpy": (lambda: numpy_lookup(bitmap, table, 123456 * 4096, 4096), 500),
        "scan": (lambda: _core.bitmap_count(large, 0, large.size * 64), 1),
        "memory": (large.max, 1),  # memory bandwidth as a read: numpy's fastest pass over the same array
        "crc": (lambda: _core.crc32c(large.view(np.uint8)), 1),
    }
    samples = []
    for number in range(plan.rounds):
        taken = {}
        for name in kernels if number % 2 == 0 else reversed(kernels):
            call, batch = kernels[name]
            taken[name] = seconds_per_call(call, batch, plan.seconds * SHARE_OF_A_RUN)
        samples.append(
            {
                "round": number,
                "lookup_ns": taken["lookup"] * 1e9,
                "numpy_ns": taken["numpy"] * 1e9,
                "scan_gbs": large.nbytes / taken["scan"] / 1e9,
                "memory_gbs": large.nbytes / taken["memory"] / 1e9,
                "crc_gbs": large.nbytes / taken["crc"] / 1e9,
            }
        )
    return {"samples": samples, "large_bytes": LARGE_BYTES}


def column(result: dict[str, Any], field: str) -> list[float]:
    return [sample[field] for sample in result["samples"]]


def rows(result: dict[str, Any]) -> list[Row]:
    lookup, theirs = column(result, "lookup_ns"), column(result, "numpy_ns")
    scan, memory = column(result, "scan_gbs"), column(result, "memory_gbs")
    times_faster = [other / own for own, other in zip(lookup, theirs, strict=True)]
    of_reading = [limit / own for own, limit in zip(scan, memory, strict=True)]
    return [
        row("one request's lookup: numpy / kernel, time", times_faster, goal=">= 20", digits=1, against="numpy", better="more"),
        row("whole-bitmap scan: time / time to read the memory", of_reading, goal="<= 2"),
        row("one request's lookup", lookup, unit="ns", digits=0, note="one call from Python"),
        row("whole-bitmap scan", scan, unit="GB/s", digits=1),
        row("CRC32C of 256 MiB", column(result, "crc_gbs"), unit="GB/s", digits=1),
    ]


def plots(result: dict[str, Any]) -> list[Plot]:
    throughput = ["bitmap scan", "CRC32C", "reading the memory"]
    return [
        {
            "name": "lookup",
            "title": "One request's lookup",
            "kind": "bars",
            "unit": "ns",
            "x": ["lookup"],
            "better": "less",
            "logarithmic": True,
            "series": [
                {"name": "fvd", "points": [column(result, "lookup_ns")]},
                {"name": "numpy", "points": [column(result, "numpy_ns")]},
            ],
        },
        {
            "name": "throughput",
            "title": "Passes over 256 MiB of memory",
            "kind": "bars",
            "unit": "GB/s",
            "x": throughput,
            "better": "more",
            "series": [{"name": "fvd", "points": [column(result, field) for field in ("scan_gbs", "crc_gbs", "memory_gbs")]}],
            "caption": "Reading the memory is numpy's maximum of the same array: about what one processor can read.",
        },
    ]
