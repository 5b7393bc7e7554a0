# SPDX-License-Identifier: Apache-2.0
"""What can be served side by side: fvd and what one would use instead, each in its default form and in its best one, and the limits.

A peer prepares a fresh disk on a device of its own and serves it on a unix socket:

    with all_peers()["qcow2"].served(disk_bytes) as served:
        served.socket, served.pids, served.device, served.note

How each does it stands in peers_*.py. Knows nothing of what is done to the disks.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loads import CpuClock
from machine import CannotMeasure, loop_device, need, unmount

MakeDevice = Callable[[int], AbstractContextManager[str]]
Family = Literal["fvd", "limit", "qemu", "nbdkit", "file system"]

MIB = 1 << 20
METADATA_BYTES = 64 * MIB  # of a device, besides the disk's own size
FILE_SYSTEM_BYTES = 400 * MIB  # mkfs.xfs makes nothing smaller than 300 MB


@dataclass(frozen=True)
class Place:
    """Where a peer is to serve from. `base`: the path of what shows through, or none. `make_device`: of so many bytes."""

    folder: Path
    disk_bytes: int
    base: str | None = None
    make_device: MakeDevice = loop_device

    @property
    def socket(self) -> Path:
        return self.folder / "disk.sock"


@dataclass(frozen=True)
class Served:
    socket: Path
    pids: tuple[int, ...]  # of the server
    device: str

    def cpu_clock(self) -> CpuClock:
        return CpuClock(self.pids)


@dataclass(frozen=True)
class Peer:
    name: str
    family: Family
    serve: Callable[[Place], AbstractContextManager[Served]]
    programs: tuple[str, ...] = ()
    over_base: bool = False  # it can show a base where nothing was written
    stores: bool = True  # what was written can be read back
    note: str = ""  # what a reader of its figures must know

    @contextlib.contextmanager
    def served(self, disk_bytes: int, base: str | None = None, make_device: MakeDevice = loop_device) -> Iterator[Served]:
        """A fresh disk. Raises CannotMeasure: this machine cannot."""
        need(*self.programs)
        if base is not None and not self.over_base:
            raise CannotMeasure(f"{self.name} has no base")
        with (
            tempfile.TemporaryDirectory(prefix="fvd-bench-") as name,
            self.serve(Place(Path(name), disk_bytes, base, make_device)) as served,
        ):
            yield served


def run(*command: str) -> None:
    """A command that prepares something. What it says when it fails is the reason why the peer cannot be measured."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotMeasure(f"{' '.join(command[:2])}: {(done.stderr or done.stdout).strip()}")


@contextlib.contextmanager
def disk_device(place: Place, metadata_bytes: int = METADATA_BYTES) -> Iterator[str]:
    """`metadata_bytes`: for metadata; none for what is served as it is."""
    with place.make_device(place.disk_bytes + metadata_bytes) as device:
        yield device


@contextlib.contextmanager
def mounted(place: Place, kind: Literal["ext4", "xfs"]) -> Iterator[tuple[str, Path]]:
    """A file system on a loop device: the device, and a folder in the file system."""
    need(f"mkfs.{kind}")
    with loop_device(max(place.disk_bytes + place.disk_bytes // 8 + 2 * METADATA_BYTES, FILE_SYSTEM_BYTES)) as device:
        run(f"mkfs.{kind}", "-q", device)
        folder = place.folder / "mounted"
        folder.mkdir()
        run("mount", device, str(folder))
        try:
            yield device, folder
        finally:
            unmount(folder)


def all_peers() -> dict[str, Peer]:
    """By name, fvd first."""
    # Only here: each of them imports this module.
    import peers_files
    import peers_fvd
    import peers_limits
    import peers_nbdkit
    import peers_qemu

    modules = (peers_fvd, peers_limits, peers_qemu, peers_nbdkit, peers_files)
    return {peer.name: peer for module in modules for peer in module.peers()}
