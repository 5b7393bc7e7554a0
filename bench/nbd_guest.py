# SPDX-License-Identifier: Apache-2.0
"""What a guest does to a disk, over one NBD connection: `nbd_guest.py start|alternate SOCKET ...`. Prints JSON lines.

A program of its own, for it needs libnbd's Python bindings, which a distribution installs for its own Python only. `start` replays a
trace; `alternate` is busy and idle by turns. Knows nothing of who serves the disk; whoever starts it reads the lines as they come.
"""

from __future__ import annotations

import argparse
import json
import random
import select
import time
from collections.abc import Callable
from typing import Any

import nbd

KIB, MIB = 1 << 10, 1 << 20
DEPTH = 4
LENGTHS = (4 * KIB, 8 * KIB, 16 * KIB, 32 * KIB, 64 * KIB)
FLUSH_EVERY = 400  # reads of a start: a system that boots flushes its journal now and then

Request = tuple[str, int, int]  # kind, offset_bytes, length_bytes


class Slots:
    """Requests under way, at most DEPTH at once. `done` gets each one's kind and latency in seconds."""

    def __init__(self, handle: Any, done: Callable[[str, float], None]) -> None:
        self._handle = handle
        self._done = done
        self._pieces = {length: nbd.Buffer.from_bytearray(bytearray(random.Random(length).randbytes(length))) for length in LENGTHS}
        self.busy = 0

    def begin(self, request: Request) -> None:
        kind, offset, length = request
        self.busy += 1
        begun = time.perf_counter()

        def ended(error: Any) -> int:
            self.busy -= 1
            if int(getattr(error, "value", error)):
                raise SystemExit(f"{kind} of {length} at {offset}: error {error}")
            self._done(kind, time.perf_counter() - begun)
            return 1

        if kind == "flush":
            self._handle.aio_flush(completion=ended)
        elif kind == "write":
            self._handle.aio_pwrite(self._pieces[length], offset, completion=ended)
        else:
            self._handle.aio_pread(nbd.Buffer(length), offset, completion=ended)

    def wait(self, seconds: float) -> None:
        """Until something has happened, at most so long."""
        direction = self._handle.aio_get_direction()
        fd = [self._handle.aio_get_fd()]
        reading = direction & nbd.AIO_DIRECTION_READ
        writing = direction & nbd.AIO_DIRECTION_WRITE
        readable, writable, _ = select.select(fd if reading else [], fd if writing else [], [], max(0.0, seconds))
        if readable and self._handle.aio_get_direction() & nbd.AIO_DIRECTION_READ:
            self._handle.aio_notify_read()
        elif writable and self._handle.aio_get_direction() & nbd.AIO_DIRECTION_WRITE:
            self._handle.aio_notify_write()


def start_trace(disk_bytes: int, reads: int, seed: int) -> list[tuple[int, int]]:
    """Reads of a start, as a kernel's page cache lets them through: files here and there, most of them small, each read from its beginning
    with growing read-ahead, some of them in part; and single blocks of metadata, which lie together."""
    rng = random.Random(seed)
    groups = [rng.randrange(disk_bytes // (128 * MIB)) * 128 * MIB for _ in range(3)]  # where the metadata lie
    trace: list[tuple[int, int]] = []
    while len(trace) < reads:
        for _ in range(rng.randrange(3)):
            trace.append((rng.choice(groups) + rng.randrange(MIB // (4 * KIB)) * 4 * KIB, 4 * KIB))
        at = rng.randrange((disk_bytes - 4 * MIB) // (4 * KIB)) * 4 * KIB
        left = int(min(2 * MIB, 4 * KIB * (1 + rng.paretovariate(0.9))) * rng.choice((0.5, 1, 1)))
        length = rng.choice(LENGTHS[:3])
        while left > 0:
            trace.append((at, length))
            at, left, length = at + length, left - length, min(2 * length, 64 * KIB)
    return trace[:reads]


def start(handle: Any, disk_bytes: int, reads: int, seed: int) -> None:
    """The trace once, with flushes; how long it took."""
    requests: list[Request] = []
    for number, (offset, length) in enumerate(start_trace(disk_bytes, reads, seed), 1):
        requests.append(("read", offset, length))
        if number % FLUSH_EVERY == 0:
            requests.append(("flush", 0, 0))
    latencies: list[float] = []
    slots = Slots(handle, lambda kind, seconds: latencies.append(seconds) if kind == "read" else None)
    begun = time.perf_counter()
    for request in requests:
        while slots.busy >= DEPTH:
            slots.wait(30)
        slots.begin(request)
    while slots.busy:
        slots.wait(30)
    taken = time.perf_counter() - begun
    read = sum(length for kind, _, length in requests if kind == "read")
    print(json.dumps({"seconds": taken, "reads": len(latencies), "bytes": read, "p99_seconds": percentile(latencies, 99)}))


def percentile(values: list[float], percent: float) -> float:
    return sorted(values)[int(len(values) * percent / 100)]


def alternate(handle: Any, base_bytes: int, own_bytes: int, turns: int, seconds: float, pauses: bool, seed: int) -> None:
    """`turns` times busy and then idle, each for `seconds`. Lines say when a turn begins, and what the busy one was like.

    The disk's first `own_bytes` are the guest's own: written before the first turn. Of its requests in a turn 55 % read and 30 % write
    there; 15 % read anywhere else, from the base unless it has been copied. Each of DEPTH slots thinks for 2 ms (exponentially) between its
    requests. `pauses`: instead all of them rest after each 32 requests, for 40 ms (exponentially).
    """
    rng = random.Random(seed)
    latencies: dict[str, list[float]] = {"own": [], "base": []}
    kinds = {"read": "own", "write": "own", "base": "base"}
    due: list[float] = []

    def done(kind: str, taken: float) -> None:
        if kind in kinds:
            latencies[kinds[kind]].append(taken)
        due.append(time.perf_counter() + (0 if pauses else rng.expovariate(1 / 0.002)))

    slots = Slots(handle, done)

    def drain() -> None:
        while slots.busy:
            slots.wait(30)

    for offset in range(0, own_bytes, 64 * KIB):
        while slots.busy >= DEPTH:
            slots.wait(30)
        slots.begin(("write", offset, 64 * KIB))
    drain()
    slots.begin(("flush", 0, 0))
    drain()
    for turn in range(turns):
        latencies["own"], latencies["base"] = [], []
        print(json.dumps({"turn": turn, "state": "busy"}), flush=True)
        begun = time.perf_counter()
        due[:] = [begun + rng.expovariate(1 / 0.002) for _ in range(DEPTH)]
        requests = 0
        while (now := time.perf_counter()) < begun + seconds:
            if pauses and requests and requests % 32 == 0:
                drain()
                due[:] = [time.perf_counter() + rng.expovariate(1 / 0.04)] * DEPTH
                requests += 1
            due.sort()
            while due and due[0] <= now:
                due.pop(0)
                requests += 1
                slots.begin(one_request(rng, base_bytes, own_bytes))
                if pauses and requests % 32 == 0:
                    break
            slots.wait((min(due[0], begun + seconds) if due else begun + seconds) - time.perf_counter())
        drain()
        result = {name: {"requests": len(v), "p50": percentile(v, 50), "p99": percentile(v, 99)} for name, v in latencies.items() if v}
        both = latencies["own"] + latencies["base"]
        result["all"] = {"requests": len(both), "p50": percentile(both, 50), "p99": percentile(both, 99)}
        print(json.dumps({"turn": turn, "state": "idle", "latencies": result}), flush=True)
        time.sleep(seconds)
    print(json.dumps({"turn": turns, "state": "end"}), flush=True)


def one_request(rng: random.Random, base_bytes: int, own_bytes: int) -> Request:
    length = rng.choice(LENGTHS)
    kind = rng.random()
    if kind < 0.15:
        return "base", rng.randrange(own_bytes, base_bytes - length) // length * length, length
    return "write" if kind < 0.45 else "read", rng.randrange(own_bytes // length) * length, length


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["start", "alternate"])
    parser.add_argument("socket")
    parser.add_argument("--base-bytes", type=int, required=True)
    parser.add_argument("--own-bytes", type=int, default=64 * MIB)
    parser.add_argument("--reads", type=int, default=3000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--pauses", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    handle = nbd.NBD()
    handle.connect_uri(f"nbd+unix:///?socket={options.socket}")
    if options.what == "start":
        start(handle, options.base_bytes, options.reads, options.seed)
    else:
        alternate(handle, options.base_bytes, options.own_bytes, options.turns, options.seconds, options.pauses, options.seed)
    handle.shutdown()


if __name__ == "__main__":
    main()
