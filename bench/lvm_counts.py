# SPDX-License-Identifier: Apache-2.0
"""Counts what reaches a physical volume when a guest writes to a volume on it: `lvm_counts.py DEVICE RESULT --writes N [--full]`.

Runs in a User-Mode Linux guest (scripts/uml) with dm-thin-pool and dm-snapshot loaded, and takes DEVICE for itself. Writes JSON to RESULT:
the device's own counters before and after each phase, as differences. They are the same on any machine, up to what the kernel does by its
clock (a thin pool commits once a second); there are no times here, which would say nothing. To the kernel an empty flush is a write too.

Every volume is written in the same way, one write of 4 KiB after the other: each to another MiB, so that each is the first in whatever unit
the volume allocates or copies; then the same places again. Once with one flush at the end; and once, elsewhere, with one after every 32.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

MIB, GIB = 1 << 20, 1 << 30
GROUP = "bench"
DISK_BYTES = 4 * GIB
BLOCK_BYTES = 4096
FLUSH_EVERY = 32
SECTOR_BYTES = 512
# Of /sys/block/*/stat.
FIELDS = {"reads": 0, "read_sectors": 2, "writes": 4, "written_sectors": 6, "discards": 11, "flushes": 15}


class Target(NamedTuple):
    """A volume under test."""

    write: Callable[[int, Any], Any]  # (offset_bytes, data)
    flush: Callable[[], Any]


class Load:
    """The writes: two parts of as many places, each in a MiB of its own."""

    def __init__(self, count: int) -> None:
        rng = random.Random(1)
        found = [mib * MIB + rng.randrange(MIB // BLOCK_BYTES) * BLOCK_BYTES for mib in rng.sample(range(DISK_BYTES // MIB), 2 * count)]
        self.parts = found[:count], found[count:]
        self._data = mmap.mmap(-1, BLOCK_BYTES)  # aligned
        self._data.write(rng.randbytes(BLOCK_BYTES))

    def write(self, target: Target, part: Sequence[int], flush_every: int | None) -> int:
        """Returns how many flushes there were."""
        flushes = 0
        for number, offset in enumerate(part, 1):
            target.write(offset, self._data)
            if flush_every and number % flush_every == 0:
                target.flush()
                flushes += 1
        target.flush()
        return flushes + 1


def run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def lvm(command: str, *words: str) -> None:
    run(command, "--yes", "--config", "activation { monitoring = 0 }", *words)


# --- Volumes -----------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def device(name: str) -> Iterator[Target]:
    """A logical volume's device, past the page cache."""
    fd = os.open(f"/dev/{GROUP}/{name}", os.O_RDWR | os.O_DIRECT)
    try:
        yield Target(lambda offset, data: os.pwrite(fd, data, offset), lambda: os.fsync(fd))
    finally:
        os.close(fd)


@contextlib.contextmanager
def fvd_disk(name: str) -> Iterator[Target]:
    """A disk of ours, open in this process."""
    import fvd

    with fvd.open(f"{GROUP}/{name}") as disk:
        yield Target(disk.pwrite, disk.flush)


@contextlib.contextmanager
def linear() -> Iterator[Target]:
    lvm("lvcreate", "--name", "linear", "--size", f"{DISK_BYTES}b", GROUP)
    with device("linear") as target:
        yield target


def make_pool(chunk_bytes: int, *options: str) -> None:
    size = ["--size", f"{2 * DISK_BYTES}b", "--chunksize", f"{chunk_bytes}b", "--poolmetadatasize", "64m"]
    lvm("lvcreate", "--type", "thin-pool", "--name", "pool", *size, *options, GROUP)
    lvm("lvcreate", "--type", "thin", "--name", "thin", "--virtualsize", f"{DISK_BYTES}b", "--thinpool", "pool", GROUP)


@contextlib.contextmanager
def thin(chunk_bytes: int, *options: str) -> Iterator[Target]:
    make_pool(chunk_bytes, *options)
    with device("thin") as target:
        yield target


@contextlib.contextmanager
def thin_snapshot(chunk_bytes: int, load: Load) -> Iterator[Target]:
    """A snapshot, writable, of a thin volume that holds data in every place that will be written."""
    make_pool(chunk_bytes)
    with device("thin") as origin:
        for part in load.parts:
            load.write(origin, part, None)
    lvm("lvcreate", "--snapshot", "--setactivationskip", "n", "--name", "copy", f"{GROUP}/thin")
    with device("copy") as target:
        yield target


@contextlib.contextmanager
def snapshot_origin() -> Iterator[Target]:
    """A linear volume that has a snapshot: each first write copies what was there."""
    lvm("lvcreate", "--name", "linear", "--size", f"{DISK_BYTES}b", GROUP)
    lvm("lvcreate", "--snapshot", "--name", "kept", "--size", "256m", f"{GROUP}/linear")
    with device("linear") as target:
        yield target


@contextlib.contextmanager
def ours() -> Iterator[Target]:
    import fvd

    fvd.provision(f"{GROUP}/disk", size=DISK_BYTES)
    with fvd_disk("disk") as target:
        yield target


@contextlib.contextmanager
def ours_over_base() -> Iterator[Target]:
    """A disk over a base that is a linear volume: each first write of a block copies what is left of it."""
    import fvd

    lvm("lvcreate", "--name", "linear", "--size", f"{DISK_BYTES}b", GROUP)
    fvd.provision(f"{GROUP}/disk", size=DISK_BYTES, base=f"/dev/{GROUP}/linear")
    with fvd_disk("disk") as target:
        yield target


def kinds(load: Load, full: bool) -> dict[str, Callable[[], contextlib.AbstractContextManager[Target]]]:
    found: dict[str, Callable[[], contextlib.AbstractContextManager[Target]]] = {
        "linear": linear,
        "thin": lambda: thin(64 << 10),
        "thin, no zeroing": lambda: thin(64 << 10, "--zero", "n"),  # shows what lay there before
        "fvd": ours,
        "thin snapshot": lambda: thin_snapshot(64 << 10, load),
        "snapshot's origin": snapshot_origin,
        "fvd over a base": ours_over_base,
    }
    if full:
        found["thin, chunks of 1 MiB"] = lambda: thin(MIB)
    return found


# --- Counts ------------------------------------------------------------------------------------------------------------------------


def counters(name: str) -> dict[str, int]:
    fields = Path(f"/sys/block/{name}/stat").read_text().split()
    return {key: int(fields[at]) for key, at in FIELDS.items()}


def measure(target: Target, load: Load, physical: str) -> list[dict[str, Any]]:
    samples = []
    for part, flush_every in zip(load.parts, (None, FLUSH_EVERY), strict=True):
        for phase in ("first", "again"):
            before = counters(physical)
            guest_flushes = load.write(target, part, flush_every)
            after = counters(physical)
            found = {key: after[key] - before[key] for key in after}
            found["read_bytes"] = found.pop("read_sectors") * SECTOR_BYTES
            found["written_bytes"] = found.pop("written_sectors") * SECTOR_BYTES
            what: dict[str, Any] = {"phase": phase, "flush_every": flush_every}
            samples.append({**what, "guest_writes": len(part), "guest_flushes": guest_flushes, **found})
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("device")
    parser.add_argument("result", type=Path)
    parser.add_argument("--writes", type=int, default=500)
    parser.add_argument("--full", action="store_true", help="more kinds of volumes")
    parser.add_argument("--kind", action="append", help="only this; may be given several times")
    options = parser.parse_args()
    load = Load(options.writes)
    run("pvcreate", "--yes", options.device)
    samples: list[dict[str, Any]] = []
    for kind, make in kinds(load, options.full).items():
        if options.kind and kind not in options.kind:
            continue
        run("vgcreate", "--yes", GROUP, options.device)
        with make() as target:
            samples += [{"kind": kind, **sample} for sample in measure(target, load, Path(options.device).name)]
        lvm("vgremove", "--force", GROUP)
        # After each: should the guest be ended, what there is counts.
        options.result.write_text(json.dumps({"kernel": os.uname().release, "samples": samples}))


if __name__ == "__main__":
    main()
