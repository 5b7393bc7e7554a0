# SPDX-License-Identifier: Apache-2.0
"""The kernel's NBD client, page cache and file systems on a served disk: ext4 and XFS, through restarts of the server, clean and killed."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from real_devices import GIB, MIB, Server, linear, mapped, run, settle

import fvd

NBD = "/dev/nbd0"
FILES = 60
MAKE = {"ext4": ["mkfs.ext4", "-q", "-F", "-E", "nodiscard"], "xfs": ["mkfs.xfs", "-q", "-f", "-K"]}
# Both change nothing, and say by their exit status that nothing is wrong.
FSCK = {"ext4": ["e2fsck", "-f", "-n"], "xfs": ["xfs_repair", "-n"]}

Serving = Callable[..., AbstractContextManager[Server]]


@pytest.fixture
def volume(whole_disk: str) -> Iterator[str]:
    """A disk of 1 GiB on a device of fixed size."""
    with mapped(linear(whole_disk, GIB + 64 * MIB)) as device:
        fvd.provision(device.path, GIB, force=True)
        yield device.path


@contextlib.contextmanager
def attached(server: Server) -> Iterator[str]:
    """The served disk as a block device of the kernel."""
    run("nbd-client", "-unix", server.socket, NBD)
    settle()
    try:
        yield NBD
    finally:
        settle()
        run("nbd-client", "-d", NBD)


@contextlib.contextmanager
def mounted(kind: str, device: str, folder: Path) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    run("mount", "-t", kind, device, folder)
    try:
        yield folder
    finally:
        run("umount", folder)


def fill(folder: Path, seed: int) -> dict[str, str]:
    """Files of many sizes, all on the disk when this returns; their checksums."""
    chance = random.Random(seed)
    sums = {}
    for index in range(FILES):
        path = folder / f"{seed}-{index % 7}" / f"file{index}"
        path.parent.mkdir(exist_ok=True)
        data = chance.randbytes(chance.choice([0, 1, 511, 4096, 70_000, MIB, 2 * MIB + 13]))
        path.write_bytes(data)
        sums[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    run("sync", "--file-system", folder)
    return sums


def sums_of(folder: Path, names: dict[str, str]) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def delete_some(folder: Path, sums: dict[str, str]) -> None:
    for name in list(sums)[::3]:
        (folder / name).unlink()
        del sums[name]


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_files_survive_a_restart_of_the_server(kind: str, volume: str, serving: Serving, tmp_path: Path) -> None:
    place = tmp_path / "mnt"
    with serving(volume) as server:
        with attached(server) as device:
            run(*MAKE[kind], device)
            with mounted(kind, device, place):
                sums = fill(place, 1)
                mapped_bytes = fvd.info(volume).mapped_bytes
                delete_some(place, sums)
                # ext4 trims only what its journal has let go of: by itself it commits every five seconds.
                run("sync", "--file-system", place)
                run("fstrim", place)
                trimmed_bytes = mapped_bytes - fvd.info(volume).mapped_bytes
                sums |= fill(place, 2)
            run(*FSCK[kind], device)
        server.stop()
    assert trimmed_bytes > 0, "fstrim gave nothing back"
    report = fvd.check(volume)
    assert report.clean and not report.errors, report
    with serving(volume) as server, attached(server) as device:
        run(*FSCK[kind], device)
        with mounted(kind, device, place):
            assert sums_of(place, sums) == sums


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_files_survive_a_killed_server(kind: str, volume: str, serving: Serving, tmp_path: Path) -> None:
    """What was synced is there after kill -9, the file system's own recovery and a check."""
    place = tmp_path / "mnt"
    with serving(volume) as server:
        with attached(server) as device:
            run(*MAKE[kind], device)
            with mounted(kind, device, place):
                sums = fill(place, 1)
                for index in range(20):  # not synced
                    (place / f"more{index}").write_bytes(random.Random(index).randbytes(MIB))
                server.kill()
        settle()
    report = fvd.check(volume)
    assert not report.errors, report
    with serving(volume) as server, attached(server) as device:
        with mounted(kind, device, place):  # replays the file system's log
            assert sums_of(place, sums) == sums
        run(*FSCK[kind], device)
