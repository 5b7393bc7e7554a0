# SPDX-License-Identifier: Apache-2.0
"""A steady load on served disks, and what their server does in a window of it: requests counted at the disks' devices, CPU by process.

The window begins when every connection is at work, so that neither handshakes nor the client's start are counted. One request of a mapped
block is one I/O of its device: these counts need no word of client or server. Knows nothing of what serves.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypedDict

from machine import CannotMeasure, cpu_seconds, need

Pattern = Literal["randread", "randwrite"]
START_SECONDS = 30.0
SETTLE_SECONDS = 0.3
AT_WORK = 20  # requests of a device that say that its client is at work: whoever looks at a device reads a little too
FIRST_FIELD = {"randread": 0, "randwrite": 4}  # of /sys/block/*/stat: I/Os; merged ones stand behind


class Window(TypedDict):
    """What was seen."""

    iops: float
    requests: int
    seconds: float
    cpu_us_per_request: float  # of the server
    client_cpu_us_per_request: float


def resident_bytes(pid: int | Literal["self"]) -> int:
    """A process's own memory; what it maps of files is left out."""
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")


def counts(devices: Sequence[str], pattern: Pattern) -> list[int]:
    """I/Os of each device so far, as they were asked for: merged ones count."""
    first = FIRST_FIELD[pattern]
    stats = [Path(f"/sys/block/{Path(device).name}/stat").read_text().split() for device in devices]
    return [int(fields[first]) + int(fields[first + 1]) for fields in stats]


def fio_command(uri: str, pattern: Pattern, *, depth: int, size_bytes: int, connections: int = 1, block_bytes: int = 4096) -> list[str]:
    """Connections to one disk, each in a thread of its own, until it is ended."""
    need("fio")
    command = ["fio", "--name=bench", "--ioengine=nbd", f"--uri={uri}", f"--rw={pattern}", f"--bs={block_bytes}", f"--iodepth={depth}"]
    command += [f"--size={size_bytes}", f"--numjobs={connections}", "--thread", "--group_reporting", "--output-format=json"]
    return [*command, "--time_based", "--runtime=3600", "--randrepeat=0", "--norandommap"]


def under_load(command: list[str], devices: Sequence[str], server_pid: int, pattern: Pattern, seconds: float) -> Window:
    """A window of what the client `command` does, which goes on until it is ended, to the disks on `devices`."""
    before = counts(devices, pattern)
    said = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the client)
    client = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True)

    def failure(what: str) -> CannotMeasure:
        said.seek(0)
        ended = "" if client.poll() is None else f", ended with status {client.poll()}"
        return CannotMeasure(f"{what}{ended}: {' '.join(command)[:200]}: {said.read().decode(errors='replace').strip()[-300:]}")

    try:
        deadline = time.monotonic() + START_SECONDS
        while any(now < then + AT_WORK for now, then in zip(counts(devices, pattern), before, strict=True)):
            if client.poll() is not None or time.monotonic() > deadline:
                raise failure("the client does not begin")
            time.sleep(0.05)
        time.sleep(SETTLE_SECONDS)
        begun, first = time.perf_counter(), sum(counts(devices, pattern))
        cpu, client_cpu = cpu_seconds(server_pid), cpu_seconds(client.pid)
        time.sleep(seconds)
        requests = sum(counts(devices, pattern)) - first
        taken = time.perf_counter() - begun
        cpu, client_cpu = cpu_seconds(server_pid) - cpu, cpu_seconds(client.pid) - client_cpu
        if client.poll() is not None or not requests:
            raise failure(f"{requests} requests in {taken:.1f} s")
    finally:
        client.terminate()
        try:
            client.wait(10)
        except subprocess.TimeoutExpired:
            client.kill()
            client.wait()
    return {
        "iops": requests / taken,
        "requests": requests,
        "seconds": taken,
        "cpu_us_per_request": cpu / requests * 1e6,
        "client_cpu_us_per_request": client_cpu / requests * 1e6,
    }
