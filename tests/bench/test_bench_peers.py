# SPDX-License-Identifier: Apache-2.0
"""Each peer of the benchmarks serves a disk that holds what was written, and the server that only answers keeps to the protocol."""

from __future__ import annotations

import pytest
from bench_running import evaluate

pytestmark = pytest.mark.release_only

WRITE_AND_READ = """
import os, nbd, loads
from peers import all_peers, run
def keep(name, over_base=False):
    base, size = None, 32 << 20
    if over_base:
        base = "/dev/shm/fvd-bench-base-" + str(os.getpid())
        with open(base, "wb") as file:
            file.write(b"base" * (size // 4))
    try:
        with all_peers()[name].served(size, base) as served:
            handle = nbd.NBD()
            handle.connect_uri(loads.uri(served.socket))
            clock = served.cpu_clock()
            handle.pwrite(b"data" * 1024, 5 << 20)
            handle.flush()
            found = handle.get_size(), bytes(handle.pread(4096, 5 << 20)[:4]).decode(), bytes(handle.pread(512, 9 << 20)[:4]).decode()
            handle.shutdown()
            return [*found, clock.us_per_request(1) > 0]
    finally:
        if base:
            os.unlink(base)
"""
PEERS = ("fvd", "fvd, layout raw", "pass-through", "qemu raw", "qcow2", "qcow2, default", "qcow2, larger L2 cache")
MORE_PEERS = ("vdi", "vmdk", "vhdx", "qed", "nbdkit file", "nbdkit file, tuned", "raw on ext4, sparse", "raw on XFS, preallocated")


@pytest.mark.parametrize("name", [*PEERS, *MORE_PEERS])
def test_what_is_written_is_read(name: str) -> None:
    assert evaluate(WRITE_AND_READ, f"keep({name!r})") == [32 << 20, "data", "\0\0\0\0", True]


@pytest.mark.parametrize("name", ["fvd", "qcow2"])
def test_a_base_shows_through(name: str) -> None:
    assert evaluate(WRITE_AND_READ, f"keep({name!r}, True)") == [32 << 20, "data", "base", True]


def test_who_has_no_base_says_so() -> None:
    statements = """
import peers
from machine import CannotMeasure
def reason():
    try:
        with peers.all_peers()["pass-through"].served(1 << 20, "/nowhere"):
            return "served"
    except CannotMeasure as error:
        return str(error)
"""
    assert evaluate(statements, "reason()") == "pass-through has no base"


ANSWERS = """
import nbd, loads
from peers import all_peers
def ask():
    with all_peers()["answers only"].served(64 << 20) as served:
        handle = nbd.NBD()
        handle.connect_uri(loads.uri(served.socket))
        size, zeros = handle.get_size(), bytes(handle.pread(3 << 20, 512))
        for length in (512, 4096, 5 << 20):  # the last is longer than what the server takes at once
            handle.pwrite(bytes(length), 0)
        handle.flush()
        cookies = [handle.aio_pread(nbd.Buffer(4096), number * 4096) for number in range(40)]
        while handle.aio_in_flight():
            handle.poll(-1)
        done = sum(handle.aio_command_completed(cookie) for cookie in cookies)
        handle.shutdown()
        each = loads.each_once(served.socket, block_bytes=65536, depth=32, size_bytes=8 << 20)
        return [size, zeros.count(0), done, each["operations"]]
"""


def test_the_server_that_only_answers() -> None:
    assert evaluate(ANSWERS, "ask()") == [64 << 20, 3 << 20, 40, 128]


LOADS = """
import fvd, loads
from peers import all_peers
def first_touches():
    with all_peers()["fvd"].served(16 << 20) as served:
        before = fvd.info(served.device).statistics
        offsets = loads.spread_offsets(16 << 20, 65536, seed=1)
        seen = loads.trace(served.socket, offsets, block_bytes=4096, depth=1, flush_every=4)
        after = fvd.info(served.device).statistics
        counted = [after[name] - before[name] for name in ("writes", "flushes", "commits")]
        present = fvd.info(served.device).present_bytes
        return [seen["operations"], *counted, present, len(set(offsets)), seen["p50_us"] <= seen["p99_us"] <= seen["max_us"] * 1.02]
"""


def test_a_trace_touches_each_block_once_and_flushes_where_it_says() -> None:
    assert evaluate(LOADS, "first_touches()") == [256, 256, 64, 64, 16 << 20, 256, True]


def test_asking_for_zeros_writes_them() -> None:
    statements = """
import machine, os
def probe():
    with machine.loop_device(4 << 20) as device, open(device, "r+b", buffering=0) as file:
        file.write(bytes([7]) * (4 << 20))
        os.fsync(file.fileno())
        answer = machine.offloads_zeros(device)
        told = int(open(f"/sys/block/{device[5:]}/queue/write_zeroes_max_bytes").read()) > 0
        file.seek(0)
        return [answer == told, file.read(2 << 20).count(7)]
"""
    assert evaluate(statements, "probe()") == [True, 1 << 20]
