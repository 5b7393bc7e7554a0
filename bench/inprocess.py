# SPDX-License-Identifier: Apache-2.0
"""A load on a disk inside one process, without NBD: `inprocess.py VOLUME PATTERN ...`. Prints one JSON object, and where the data lie.

A program of its own, so that its CPU time is that of the load and the disk alone. matrix.py compares it with fio on the same device.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from loads import percentiles

TIMES_MAX = 8 << 20  # requests whose times are kept
PATTERNS = {"randread": (False, True), "randwrite": (True, True), "read": (False, False), "write": (True, False)}  # (writes, random)


def run(
    volume_name: str, pattern: str, block_bytes: int, depth: int, seconds: float, requests: int, seed: int, cache: str
) -> dict[str, Any]:
    from devtools._load import load
    from fvd.disk.opening import open_volume

    write, random = PATTERNS[pattern]
    times_ns = np.zeros(TIMES_MAX, np.uint32)
    times_ns.fill(1)  # its pages are there before the load begins
    with load(open_volume(volume_name, cache=cache)) as driver:
        before = time.process_time()
        operations, took = driver.run(
            write=write,
            random=random,
            block_bytes=block_bytes,
            depth=depth,
            seconds=seconds,
            requests=requests,
            seed=seed,
            times_ns=times_ns.data,
        )
        cpu_seconds = time.process_time() - before
        driver.flush()
        geometry, queue = driver.volume.geometry, driver.queue_kind
    seen_us = times_ns[: min(operations, TIMES_MAX)] / 1000
    return {
        "operations": operations,
        "seconds": took,
        "iops": operations / took,
        "mb_per_second": operations * block_bytes / took / 1e6,
        "cpu_us_per_request": cpu_seconds / operations * 1e6,
        **percentiles(seen_us),
        "queue": queue,
        "data_offset_bytes": geometry.data_offset_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("volume")
    parser.add_argument("pattern", choices=PATTERNS)
    parser.add_argument("--block-bytes", type=int, default=4096)
    parser.add_argument("--depth", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--requests", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cache", default="none")
    options = parser.parse_args()
    found = run(
        options.volume,
        options.pattern,
        options.block_bytes,
        options.depth,
        options.seconds,
        options.requests,
        options.seed,
        options.cache,
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
