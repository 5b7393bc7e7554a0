# SPDX-License-Identifier: Apache-2.0
"""A failure that the kernel tells once is heard, whoever received it: on real devices that refuse some writes (R26 to R30).

The medium is a sparse file on a tmpfs: places that were punched out of it cannot be written while the tmpfs is full. Each case has a
control without the operation that takes the report.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
from loops import loop_device, mounted, run, sparse

from disks import MIB, driven, failure_of, make, place_of, start
from fvd.device import node as node_module
from fvd.device.stack import Stack, stack_of
from fvd.disk._disk_thread import DiskThread
from fvd.errors import DeviceError, FvdError

_PUNCH = 3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
_FIBMAP = 1
BLOCK = 4096
A, B = 0, 8 * MIB  # what is lost, and what is written beside it
PIECE = 65536


class Medium:
    """A loop device, or something on it, whose bytes lie in a sparse file on a small tmpfs."""

    def __init__(self, folder: Path, disk: str, device: str, place: Callable[[int], int], cached: str = "") -> None:
        self.disk = disk  # where the fvd disk is
        self.cached = cached or disk  # what holds in a cache that which has not reached the medium
        self.device = device
        self._backing = folder / "medium"
        self._filler = folder / "filler"
        self._place = place  # where a byte of the disk's storage lies in the medium

    def refuse(self, storage_offset: int, length: int) -> None:
        """What is written there fails from now on, when it reaches the medium."""
        run("sync", "-d", self.disk)
        for path in (self.disk, self.cached, self.device):
            drop_cache(path)
        backing = os.open(self._backing, os.O_RDWR)
        libc = ctypes.CDLL(None, use_errno=True)
        libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong]
        assert libc.fallocate(backing, _PUNCH, self._place(storage_offset), length) == 0
        os.close(backing)
        with self._filler.open("wb", buffering=0) as filler, suppress(OSError):
            while filler.write(bytes(PIECE)):
                pass

    def repair(self) -> None:
        self._filler.unlink(missing_ok=True)

    def write_back(self) -> None:
        """What the kernel does by itself some time: through somebody else's open file, who gets his own report."""
        fd = os.open(self.cached, os.O_RDWR)
        try:
            with pytest.raises(OSError, match=r"Input/output error|No space"):
                os.fdatasync(fd)
        finally:
            os.close(fd)


def drop_cache(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def on_the_medium(path: Path) -> Callable[[int], int]:
    """Where the bytes of a file lie on the device of its file system."""

    def place(offset: int) -> int:
        fd = os.open(path, os.O_RDONLY)
        try:
            (block,) = struct.unpack("i", fcntl.ioctl(fd, _FIBMAP, struct.pack("i", offset // BLOCK)))
        finally:
            os.close(fd)
        assert block
        return int(block) * BLOCK

    return place


@contextmanager
def tmpfs(folder: Path, size: int) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("a loop device and a tmpfs take root")
    with mounted("tmpfs", folder / "small", "-t", "tmpfs", "-o", f"size={size}") as small:
        yield small


@contextmanager
def plain_medium(folder: Path) -> Iterator[Medium]:
    """The loop device itself."""
    with tmpfs(folder, 48 * MIB) as small, loop_device(sparse(small / "medium", 40 * MIB)) as device:
        medium = Medium(small, device, device, lambda offset: offset)
        try:
            yield medium
        finally:
            medium.repair()


@contextmanager
def file_system(folder: Path) -> Iterator[tuple[Path, str, Path]]:
    """An ext4 on the medium: the folder of the medium, the device, and where it is mounted."""
    with tmpfs(folder, 96 * MIB) as small, loop_device(sparse(small / "medium", 80 * MIB)) as device:
        run("mkfs.ext4", "-q", "-b", str(BLOCK), "-O", "^has_journal", "-E", "lazy_itable_init=0,nodiscard", device)
        with mounted(device, folder / "mounted") as upper:
            yield small, device, upper


@contextmanager
def cached_medium(folder: Path) -> Iterator[Medium]:
    """A loop device over a file on the medium's file system: direct transfers to it end in a volatile cache, which a flush destages."""
    with file_system(folder) as (small, device, upper):
        image = upper / "image"
        image.write_bytes(os.urandom(24 * MIB))
        run("sync")
        with loop_device(image) as disk:
            medium = Medium(small, disk, device, on_the_medium(image), str(image))
            try:
                yield medium
            finally:
                medium.repair()


def durable_writes_are_one_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device that does not run out of space: RWF_DSYNC, whose failure cannot be told from another write's."""
    monkeypatch.setattr(node_module, "stack_of", lambda status, **about: Stack(stack_of(status, **about).devices, False))


@contextmanager
def failing(disk: Path | str, **options: Any) -> Iterator[DiskThread]:
    """The disk, open and driven; its close is the test's, but nothing is left open when that fails before."""
    driver = start(disk, **options)
    try:
        yield driver
    finally:
        with suppress(FvdError):
            driver.close()


def fill(driver: DiskThread) -> int:
    """A and B are mapped and durable. Returns where A lies."""
    driver.pwrite(A, b"a" * (4 * MIB))
    driver.pwrite(B, b"b" * MIB)
    driver.flush()
    return place_of(driver, 0)


def assert_heard(driver: DiskThread, medium: Medium) -> None:
    """Every flush fails, the close does, and the next open shows what the medium holds, also through the page cache."""
    for _ in range(2):
        with pytest.raises(DeviceError):
            driver.flush()
    assert driver.volume.engine.failed_errno in (errno.EIO, errno.ENOSPC)
    with pytest.raises(DeviceError):
        driver.close()
    if medium.cached != medium.disk:
        drop_cache(medium.cached)  # this one plays the device's own
    for cache in ("writeback", "none"):
        with driven(medium.disk, cache=cache) as again:
            assert again.pread(A, 8) != b"N" * 8


ONE_OR_TWO = pytest.mark.parametrize("one_operation", [True, False], ids=["one operation", "write and flush"])


@ONE_OR_TWO
@pytest.mark.parametrize("taken", [True, False], ids=["FUA between", "control"])
def test_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: bool, one_operation: bool) -> None:
    """A page of A is lost in the background; a FUA write of B fails, and has the only report."""
    if one_operation:
        durable_writes_are_one_operation(monkeypatch)
    with plain_medium(tmp_path) as medium:
        make(medium.disk, virtual_size_bytes=16 * MIB, force=True)
        with failing(medium.disk, cache="writeback") as driver:
            medium.refuse(fill(driver), MIB)
            driver.pwrite(A, b"N" * PIECE)
            medium.write_back()
            medium.repair()
            if taken:
                with pytest.raises(FvdError):
                    driver.pwrite(B, b"c" * BLOCK, fua=True)
            assert_heard(driver, medium)


@ONE_OR_TWO
@pytest.mark.parametrize("taken", [True, False], ids=["FUA between", "control"])
def test_direct(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: bool, one_operation: bool) -> None:
    """A lies in the device's cache, and is lost there."""
    if one_operation:
        durable_writes_are_one_operation(monkeypatch)
    with cached_medium(tmp_path) as medium:
        make(medium.disk, virtual_size_bytes=16 * MIB, force=True)
        with failing(medium.disk, cache="none", discard=False) as driver:
            assert driver.volume.node.direct
            medium.refuse(fill(driver), PIECE)
            driver.pwrite(A, b"N" * PIECE)
            medium.write_back()
            medium.repair()
            if taken:
                with pytest.raises(FvdError):
                    driver.pwrite(B, b"c" * BLOCK, fua=True)
            assert_heard(driver, medium)


@pytest.mark.parametrize("grown", [True, False], ids=["growth between", "control"])
def test_growth(tmp_path: Path, grown: bool) -> None:
    """A page of a file's is lost in the background; then the file grows through a descriptor that shares the disk's open file."""
    with file_system(tmp_path) as (small, device, upper):
        path = upper / "disk"
        make(path, grow_step_bytes=8 * MIB)
        with failing(path, cache="writeback", low_water_bytes=MIB) as driver:
            medium = Medium(small, str(path), device, on_the_medium(path))
            driver.pwrite(A, b"a" * (4 * MIB))
            driver.flush()
            medium.refuse(place_of(driver, 0), PIECE)
            driver.pwrite(A, b"N" * PIECE)
            medium.write_back()
            medium.repair()
            before = path.stat().st_size
            if grown:
                for number in range(12):
                    driver.pwrite((8 + number) * MIB, b"g" * BLOCK)
                deadline = time.monotonic() + 20
                while path.stat().st_size == before and time.monotonic() < deadline:
                    time.sleep(0.02)
                assert path.stat().st_size > before
            assert_heard(driver, medium)


@ONE_OR_TWO
@pytest.mark.parametrize("cache", ["writethrough", "directsync"])
@pytest.mark.parametrize("refused", [True, False], ids=["refusing medium", "control"])
def test_every_write_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str, refused: bool, one_operation: bool) -> None:
    """Some writes cannot reach the medium, beside many that can: nothing acknowledged reads as zeros afterwards."""
    if one_operation:
        durable_writes_are_one_operation(monkeypatch)
    with plain_medium(tmp_path) if cache == "writethrough" else cached_medium(tmp_path) as medium:
        make(medium.disk, virtual_size_bytes=16 * MIB, force=True)
        with failing(medium.disk, cache=cache, discard=False) as driver:
            place = fill(driver)
            if refused:
                medium.refuse(place, 4 * PIECE)
            acknowledged: dict[int, int] = {}
            failed: list[FvdError] = []
            until = time.monotonic() + 1.0

            def write(start_byte: int, count: int) -> None:
                number = 0
                while time.monotonic() < until and not failed:
                    at = start_byte + number % count * BLOCK
                    try:
                        driver.pwrite(at, bytes([65 + number % 20]) * BLOCK)
                        acknowledged[at] = 65 + number % 20
                    except FvdError as error:
                        failed.append(error)
                    number += 1

            writers = [threading.Thread(target=write, args=(A, 64))]
            writers += [threading.Thread(target=write, args=(B + index * PIECE, 16)) for index in range(5)]
            for writer in writers:
                writer.start()
            for writer in writers:
                writer.join()
            medium.repair()
            assert bool(failed) == bool(driver.volume.engine.failed_errno) == refused
            with pytest.raises(DeviceError) if refused else nullcontext():
                driver.close()
            drop_cache(medium.disk)
            with driven(medium.disk) as again:
                assert acknowledged or refused
                for at, value in acknowledged.items():
                    assert 65 <= again.pread(at, 1)[0] < 85, f"{value} was acknowledged as durable at {at}, and is lost"


def test_full_storage_fails_one_write(tmp_path: Path) -> None:
    """Where storage may run out (R29) a durable write that finds no space fails alone, and is made again when there is space."""
    with plain_medium(tmp_path) as medium:
        make(medium.disk, virtual_size_bytes=16 * MIB, force=True)
        with driven(medium.disk, cache="directsync", discard=False, on_full="error") as driver:
            assert driver.volume.node.stack().may_fill
            medium.refuse(fill(driver), MIB)
            with pytest.raises(FvdError, match="full"):
                driver.pwrite(A, b"N" * BLOCK)
            driver.pwrite(B, b"c" * BLOCK)
            assert driver.volume.engine.failed_errno == 0
            medium.repair()
            driver.pwrite(A, b"N" * BLOCK)
            driver.flush()
        with driven(medium.disk) as again:
            assert again.pread(A, 1) == b"N" and again.pread(B, 1) == b"c"


def test_two_disks_of_one_device(tmp_path: Path) -> None:
    """Files of one file system share its device: what one disk's flush hears, the other one must not answer over."""
    with file_system(tmp_path) as (small, device, upper):
        paths = [upper / "one", upper / "other"]
        for path in paths:
            make(path, virtual_size_bytes=16 * MIB)
        with failing(paths[0], cache="writeback") as one, failing(paths[1], cache="writeback") as other:
            other.pwrite(A, b"o" * BLOCK)
            other.flush()
            one.pwrite(A, b"a" * MIB)
            one.flush()
            medium = Medium(small, str(paths[0]), device, on_the_medium(paths[0]))
            medium.refuse(place_of(one, 0), PIECE)
            one.pwrite(A, b"N" * PIECE)
            with pytest.raises(DeviceError):
                one.flush()
            medium.repair()
            with pytest.raises(DeviceError, match=r"Input/output|No space"):
                other.flush()
            failure = failure_of(other)
            assert failure is not None and failure.source == f"file:{paths[0]}" and abs(failure.seconds - time.time()) < 60
            own = failure_of(one)
            assert own is not None and own.source == f"file:{paths[0]}"
            for driver in (one, other):
                with pytest.raises(DeviceError):
                    driver.close()
