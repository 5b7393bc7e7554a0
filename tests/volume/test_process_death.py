# SPDX-License-Identifier: Apache-2.0
"""kill -9 of a process that uses a disk through Python: what any of its threads was told is done is there for the next one, flushed or not.

Threads write, trim and zero sectors of their own, and tell through a pipe what they begin and what has returned. They are killed in the
middle; the next process reads everything. What had begun and not returned is there or not, sector by sector: old or new.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt
import pytest
from killed_disks import provision

import fvd
from fvd.modes import CACHE_MODES, CacheMode
from fvd.sim._base import base_content

pytestmark = [pytest.mark.release_only, pytest.mark.slow]

KIB, MIB = 1 << 10, 1 << 20
SECTOR_BYTES, WORDS = 512, 64
THREADS = 4
SIZE = 8 * MIB
ROUNDS, LONG_ROUNDS = 4, 20
CACHES = CACHE_MODES
RECORD = struct.Struct("=BBHIII")  # what happens, kind, thread, first sector, sectors, stamp
BEGUN, RETURNED = 0, 1
WRITE, TRIM, ZERO = 0, 1, 2
ZEROS, AS_AT_FIRST = 0, -1  # beside the stamps

# Children of one process that has imported fvd, one after the other: starting Python takes longer than opening a disk. Each line on stdin
# is one of them, which runs until it is killed; its records go to stdout.
NURSERY = """
import json, os, sys, threading
from random import Random
import numpy as np
import fvd, fvd.disk.opening
from fvd.cli.main import main

def work(disk, thread, threads, seed, stamp, write_record):
    rng = Random(seed * 1000 + thread)
    sectors = disk.size // 512
    share = sectors // threads
    while True:
        kind = rng.choice((0, 0, 0, 0, 0, 1, 2))
        count = rng.randint(1, 40) if rng.random() < 0.8 else rng.randint(1, 1500 if kind else 300)
        first = thread * share + rng.randrange(share - count)
        stamp += threads
        write_record(0, kind, thread, first, count, stamp)
        if kind == 0:
            words = np.arange(first, first + count, dtype=np.uint64) << np.uint64(32) | np.uint64(stamp)
            disk.pwrite(first * 512, np.repeat(words, 64).tobytes(), durable=rng.random() < 0.02)
        elif kind == 1:
            disk.trim(first * 512, count * 512)
        else:
            disk.zero(first * 512, count * 512, keep_storage=rng.random() < 0.3)
        write_record(1, kind, thread, first, count, stamp)
        if rng.random() < 0.01:
            disk.flush()

for line in sys.stdin:
    environment, volume, options, seed, stamp, threads = json.loads(line)
    child = os.fork()
    if child == 0:
        import struct
        record = struct.Struct("=BBHIII")
        print(os.getpid(), file=sys.stderr, flush=True)
        os.environ.update(environment)
        disk = fvd.open(volume, **options)
        for thread in range(threads):
            tell = lambda *fields: os.write(1, record.pack(*fields))
            threading.Thread(target=work, args=(disk, thread, threads, seed, stamp + thread, tell), daemon=True).start()
        threading.Event().wait()
    print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=sys.stderr, flush=True)
"""


@dataclass(frozen=True)
class Shape:
    """A kind of disk."""

    name: str
    block: int = 64 * KIB
    chunk: int = MIB
    base_bytes: int = 0
    layout: str = "compact"
    options: tuple[tuple[str, object], ...] = ()

    @property
    def trim_sectors(self) -> int:
        """A trim makes zeros of the whole pieces of this size that it covers, and leaves the rest as it was."""
        return (self.chunk if self.base_bytes else self.block) // SECTOR_BYTES


SHAPES = (
    Shape("plain", block=16 * KIB, chunk=64 * KIB),
    Shape("base", block=16 * KIB, chunk=64 * KIB, base_bytes=5 * MIB + 12345),
    Shape("raw", block=16 * KIB, layout="raw"),
    Shape("copying", block=4 * KIB, chunk=64 * KIB, base_bytes=SIZE, options=(("copy_on_read", True), ("prefetch", True))),
    Shape("zeroed", options=(("zero_chunks", True),)),
)
ALWAYS = ("plain", "base", "raw")


class Nursery:
    """Starts one process after the other, collects what they tell, and kills them."""

    def __init__(self) -> None:
        self._parent = subprocess.Popen(
            [sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=False
        )

    def live(self, line: str, seconds: float) -> bytes:
        """What a process told that lived for so long after its first word."""
        assert self._parent.stdin is not None and self._parent.stdout is not None and self._parent.stderr is not None
        self._parent.stdin.write(line.encode() + b"\n")
        self._parent.stdin.flush()
        pid = self._parent.stderr.readline()
        assert pid.strip().isdigit(), pid + self._parent.stderr.read()
        told = bytearray()
        end = None
        os.set_blocking(self._parent.stdout.fileno(), False)
        deadline = time.monotonic() + 60
        while end is None or time.monotonic() < end:
            assert time.monotonic() < deadline, "it tells nothing"
            told += self._parent.stdout.read() or b""
            if told and end is None:
                end = time.monotonic() + seconds
            time.sleep(0.002)
        os.kill(int(pid), signal.SIGKILL)
        said = list(iter(self._parent.stderr.readline, b"ended -9\n"))  # what it logged before
        assert b"" not in said and not any(line.startswith(b"ended ") for line in said), said
        return bytes(told) + (self._parent.stdout.read() or b"")

    def close(self) -> None:
        self._parent.kill()
        self._parent.communicate()


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with contextlib.closing(Nursery()) as made:
        yield made


@dataclass
class Expected:
    """What each sector may hold: a stamp, zeros, or what it held at first. More than one only where an operation had not returned."""

    shape: Shape
    value: npt.NDArray[np.int64] = field(default_factory=lambda: np.full(SIZE // SECTOR_BYTES, AS_AT_FIRST, np.int64))
    perhaps: list[tuple[int, int, int]] = field(default_factory=list)  # first sector, end, value
    touched: int = 0

    def follow(self, told: bytes) -> None:
        """Takes in what one process told until it was killed."""
        begun: dict[int, tuple[int, ...]] = {}
        for record in RECORD.iter_unpack(told[: len(told) // RECORD.size * RECORD.size]):
            what, kind, thread, first, count, stamp = record
            if what == BEGUN:
                begun[thread] = (kind, first, count, stamp)
                continue
            assert begun.pop(thread) == (kind, first, count, stamp)
            start, end, value = self._effect(kind, first, count, stamp)
            self.value[start:end] = value
            self.touched += max(0, end - start)
        self.perhaps = [self._effect(*operation) for operation in begun.values()]

    def _effect(self, kind: int, first: int, count: int, stamp: int) -> tuple[int, int, int]:
        if kind != TRIM:
            return first, first + count, stamp if kind == WRITE else ZEROS
        piece = self.shape.trim_sectors
        return -(-first // piece) * piece, (first + count) // piece * piece, ZEROS

    def judge(self, content: bytes, at_first: bytes) -> None:
        """Compares, and takes what is there for what was undecided."""
        numbers = np.arange(len(self.value), dtype=np.int64)
        words = np.frombuffer(content, "<i8").reshape(-1, WORDS)
        first = np.frombuffer(at_first, "<i8").reshape(-1, WORDS)

        def holds(value: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
            filled = np.where(value == ZEROS, 0, numbers << 32 | value)
            held: npt.NDArray[np.bool_] = np.where((value == AS_AT_FIRST)[:, None], words == first, words == filled[:, None]).all(axis=1)
            return held

        good = holds(self.value)
        for start, end, value in self.perhaps:
            new = self.value.copy()
            new[start:end] = value
            chosen = holds(new) & ~good
            self.value[chosen] = new[chosen]
            good |= chosen
        bad = np.flatnonzero(~good)
        if len(bad):
            sector = int(bad[0])
            found = words[sector, 0]
            lost = int((words[bad] == 0).all(axis=1).sum())
            pytest.fail(
                f"{len(bad)} of {self.touched} sectors are not what was acknowledged ({lost} of them zeros); sector {sector} begins "
                f"with {found:016x}, expected {self.value[sector]}"
            )
        self.perhaps = []


def lives(
    shape: Shape, cache: CacheMode, rounds: int, folder: Path, nursery: Nursery, seed: int, between: Callable[[], None] = lambda: None
) -> str:
    """A disk in the hands of one process after the other, each of them killed; returns what was done, for people.

    `between`: called after each death, before the next process.
    """
    rng = Random(seed)
    at_first = bytearray(SIZE)
    at_first[: shape.base_bytes] = base_content(shape.base_bytes, 0, shape.base_bytes)
    volume = provision(shape, folder, SIZE)
    expected = Expected(shape)
    stamp = 1
    for number in range(rounds):
        options = {"cache": cache, **dict(shape.options)}
        environment = {name: value for name, value in os.environ.items() if name.startswith("FVD_")}  # of this test
        line = json.dumps([environment, volume, options, seed + number, stamp, THREADS])
        expected.follow(nursery.live(line, 0.02 + 0.4 * rng.random()))
        stamp += 1 << 24
        between()
        if number % 2:
            with fvd.open(volume, read_only=True, cache=cache) as disk:  # replays the log in memory and changes nothing
                expected.judge(disk.pread(0, SIZE), bytes(at_first))
        with fvd.open(volume, cache=cache, discard_pending=bool(options.get("discard_pending"))) as disk:
            expected.judge(disk.pread(0, SIZE), bytes(at_first))
    report = fvd.check(volume)
    assert not report.errors
    return f"{shape.name}, {cache}: seed {seed}: {rounds} deaths, {expected.touched} sectors acknowledged, none lost"


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape.name in ALWAYS], ids=lambda shape: shape.name)
def test_nothing_acknowledged_is_lost(
    shape: Shape, cache: CacheMode, tmp_path: Path, nursery: Nursery, capsys: pytest.CaptureFixture[str]
) -> None:
    told = lives(shape, cache, ROUNDS, tmp_path, nursery, time.time_ns() // 1000 % (1 << 40))
    with capsys.disabled():
        print(f"\n  {told}")


def test_without_the_log_it_is(tmp_path: Path, nursery: Nursery, pending_dir: Path) -> None:
    """The judge can fail: if the log is thrown away, acknowledged writes are gone."""
    shape = Shape("plain", options=(("discard_pending", True),))
    with pytest.raises(pytest.fail.Exception, match="sectors are not what was acknowledged"):
        lives(shape, "none", LONG_ROUNDS, tmp_path, nursery, 1, between=lambda: shutil.rmtree(pending_dir))


@pytest.mark.long
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_nothing_is_lost_in_many_deaths(
    shape: Shape, cache: CacheMode, tmp_path: Path, nursery: Nursery, capsys: pytest.CaptureFixture[str]
) -> None:
    told = lives(shape, cache, LONG_ROUNDS, tmp_path, nursery, time.time_ns() // 1000 % (1 << 40))
    with capsys.disabled():
        print(f"\n  {told}")
