# SPDX-License-Identifier: Apache-2.0
"""What is done to a disk: runs of fio over NBD or on a device, bounded by time or by size; writes at given places with flushes between
them, by a client of our own (trace.c); random requests by one that costs little (many.c); and what was seen of each. Knows no server.
"""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from machine import CannotMeasure, compiled, output, process_cpu_seconds

KIB, MIB = 1 << 10, 1 << 20
QUANTILES = 200  # of a distribution, evenly spaced


def uri(socket_path: Path) -> str:
    return f"nbd+unix:///?socket={socket_path}"


def over_nbd(socket_path: Path) -> list[str]:
    """fio's words for a server's export."""
    return ["--ioengine=nbd", f"--uri={uri(socket_path)}"]


def run_fio(where: list[str], pattern: str, *, block_bytes: int, depth: int, size_bytes: int, more: Iterable[str] = ()) -> dict[str, Any]:
    """One run of fio, as it tells it; without any bound of time: each block of `size_bytes` once."""
    command = [
        "fio",
        "--name=bench",
        *where,
        f"--rw={pattern}",
        f"--bs={block_bytes}",
        f"--iodepth={depth}",
        f"--size={size_bytes}",
        "--lat_percentiles=1",
        "--clat_percentiles=0",
        "--slat_percentiles=0",
        "--randrepeat=0",
        "--output-format=json+",
        *more,
    ]
    try:
        printed = output(*command)
    except subprocess.CalledProcessError as error:
        raise CannotMeasure(f"fio: {(error.stderr.strip().splitlines() or ['no reason'])[-1]}") from error
    report = json.loads(printed[printed.index("{") :])  # its nbd engine prints a line before
    job: dict[str, Any] = report["jobs"][0]
    if job["error"]:
        raise CannotMeasure(f"fio has failed with error {job['error']}")
    return job


def quantile(bins: list[tuple[float, int]], total: int, share: float) -> float:
    """The value below which that share of what was counted lies."""
    passed = 0
    for value, count in bins:
        passed += count
        if passed >= share * total:
            return value
    return bins[-1][0]


def latencies(side: dict[str, Any]) -> dict[str, Any]:
    """Percentiles in microseconds, of fio's own bins (a bin is at most 1.6 % wide)."""
    seen = side["lat_ns"]
    bins = sorted((float(value), count) for value, count in seen.get("bins", {}).items())
    total = sum(count for _, count in bins)
    if not total:
        raise CannotMeasure("fio has finished no request")
    return {
        "p50_us": quantile(bins, total, 0.5) / 1000,
        "p99_us": quantile(bins, total, 0.99) / 1000,
        "p999_us": quantile(bins, total, 0.999) / 1000,
        "max_us": seen["max"] / 1000,
        "quantiles_us": [quantile(bins, total, (number + 0.5) / QUANTILES) / 1000 for number in range(QUANTILES)],
    }


def seen_by(job: dict[str, Any], pattern: str, block_bytes: int, more_seconds: float = 0.0) -> dict[str, Any]:
    """What a run was like."""
    side = job["read" if "read" in pattern else "write"]
    found = latencies(side)
    operations = side["lat_ns"]["N"]
    seconds = side["runtime"] / 1000 + more_seconds
    found |= {
        "operations": operations,
        "seconds": seconds,
        "iops": operations / seconds,
        "mb_per_second": operations * block_bytes / seconds / 1e6,
        "client_cpu_us": (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1000 / operations * 1e6,
    }
    return found


def for_seconds(
    where: list[str], pattern: str, *, block_bytes: int, depth: int, size_bytes: int, seconds: float, more: Iterable[str] = ()
) -> dict[str, Any]:
    """Over and over for so long."""
    bound = ["--time_based", f"--runtime={max(1, round(seconds * 1000))}ms", "--norandommap", *more]
    job = run_fio(where, pattern, block_bytes=block_bytes, depth=depth, size_bytes=size_bytes, more=bound)
    return seen_by(job, pattern, block_bytes)


@contextlib.contextmanager
def client(socket_path: Path) -> Iterator[Any]:
    """A client of its own, of libnbd. What goes wrong with it is a reason not to measure."""
    try:
        import nbd  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except ImportError as error:
        raise CannotMeasure("no libnbd bindings here: apt-get install python3-libnbd") from error

    handle = nbd.NBD()
    try:
        handle.connect_uri(uri(socket_path))
        yield handle
        handle.shutdown()
    except nbd.Error as error:
        raise CannotMeasure(f"a client has failed: {error}") from error


def flush(socket_path: Path) -> float:
    """All is flushed; how long it took."""
    with client(socket_path) as handle:
        began = time.perf_counter()
        handle.flush()
        return time.perf_counter() - began


def each_once(socket_path: Path, *, block_bytes: int, depth: int, size_bytes: int, pattern: str = "randwrite") -> dict[str, Any]:
    """Each block is written once, in random order, then all is flushed: the flush is part of the time."""
    job = run_fio(over_nbd(socket_path), pattern, block_bytes=block_bytes, depth=depth, size_bytes=size_bytes)
    took = flush(socket_path)
    return seen_by(job, pattern, block_bytes, took) | {"flush_seconds": took}


def spread_offsets(size_bytes: int, distance_bytes: int, seed: int) -> list[int]:
    """The multiples of a distance, in random order."""
    offsets = list(range(0, size_bytes, distance_bytes))
    random.Random(seed).shuffle(offsets)
    return offsets


def trace(
    socket_path: Path,
    offsets: Sequence[int],
    *,
    block_bytes: int,
    depth: int,
    flush_every: int = 0,
    seconds: float = 0.0,
    flush_in_the_end: bool = False,
) -> dict[str, Any]:
    """Writes at these offsets in this order; ends with them, or when the time is over. The last flush is part of the time."""
    with tempfile.TemporaryDirectory(prefix="fvd-bench-") as folder:
        places, times = Path(folder) / "offsets", Path(folder) / "times"
        np.asarray(offsets, np.uint64).tofile(places)
        numbers = (depth, block_bytes, flush_every, seconds, int(flush_in_the_end))
        command = [compiled("trace.c", "nbd"), str(socket_path), str(places), *map(str, numbers), str(times)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CannotMeasure(f"writing at given places: {done.stderr.strip()}")
        seen = np.fromfile(times, np.uint64).reshape(-1, 2)
    took, cpu = map(float, done.stdout.split())
    writes_us, flushes_us = (seen[seen[:, 1] == what, 0] / 1000 for what in (0, 1))
    if not len(writes_us):
        raise CannotMeasure("no write has ended")
    found: dict[str, Any] = {
        **percentiles(writes_us),
        "operations": len(writes_us),
        "seconds": took,
        "iops": len(writes_us) / took,
        "mb_per_second": len(writes_us) * block_bytes / took / 1e6,
        "client_cpu_us": cpu / len(writes_us) * 1e6,
        "flushes": len(flushes_us),
    }
    if len(flushes_us):
        found |= {"flush_p50_us": float(np.quantile(flushes_us, 0.5)), "flush_p99_us": float(np.quantile(flushes_us, 0.99))}
    return found


def many_command(
    socket_path: Path, pattern: str, *, depth: int, size_bytes: int, exports: Sequence[str], seconds: float = 0.0, times: str = ""
) -> list[str]:
    """A client of all these exports with `depth` requests of 4 KiB at each; without `seconds` until it is ended."""
    return [compiled("many.c"), str(socket_path), pattern, *map(str, (size_bytes, depth, seconds)), times, *exports]


def lightly(socket_path: Path, pattern: str, *, depth: int, size_bytes: int, seconds: float) -> dict[str, Any]:
    """4 KiB at random places for so long, by a client that leaves the processors to the server."""
    with tempfile.NamedTemporaryFile(prefix="fvd-bench-") as times:
        command = many_command(socket_path, pattern, depth=depth, size_bytes=size_bytes, exports=[""], seconds=seconds, times=times.name)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CannotMeasure(f"the light client: {done.stderr.strip()}")
        times_us = np.fromfile(times.name, np.uint64) / 1000
    took, cpu = map(float, done.stdout.split())
    operations = len(times_us)
    if not operations:
        raise CannotMeasure("no request has ended")
    return {
        **percentiles(times_us),
        "operations": operations,
        "seconds": took,
        "iops": operations / took,
        "mb_per_second": operations * 4 * KIB / took / 1e6,
        "client_cpu_us": cpu / operations * 1e6,
    }


def percentiles(times_us: np.ndarray[Any, Any]) -> dict[str, Any]:
    """As `latencies`, of every single time."""
    return {
        "p50_us": float(np.quantile(times_us, 0.5)),
        "p99_us": float(np.quantile(times_us, 0.99)),
        "p999_us": float(np.quantile(times_us, 0.999)),
        "max_us": float(times_us.max()),
        "quantiles_us": np.quantile(times_us, (np.arange(QUANTILES) + 0.5) / QUANTILES).tolist(),
    }


class CpuClock:
    """CPU time of server processes while something is done to them."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids = tuple(pids)
        self._began = self._now()

    def _now(self) -> float:
        try:
            return sum(process_cpu_seconds(pid) for pid in self._pids)
        except OSError as error:
            raise CannotMeasure("the server has ended") from error

    def us_per_request(self, operations: int) -> float:
        return (self._now() - self._began) / operations * 1e6


def fill(socket_path: Path, size_bytes: int) -> None:
    """Every block is written once, in order, and flushed."""
    run_fio(over_nbd(socket_path), "write", block_bytes=MIB, depth=8, size_bytes=size_bytes)
    flush(socket_path)
