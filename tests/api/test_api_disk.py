# SPDX-License-Identifier: Apache-2.0
"""``fvd.open``: a disk read and written in this process."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import fvd
from fvd.modes import CACHE_MODES

GIB = 1 << 30
MIB = 1 << 20


@pytest.fixture
def volume(tmp_path: Path) -> str:
    name = f"file:{tmp_path / 'vm1.img'}"
    fvd.provision(name, "1G", grow_step="64M")
    return name


def test_read_and_write(volume: str) -> None:
    with fvd.open(volume) as disk:
        assert (disk.size, disk.volume) == (GIB, volume)
        assert disk.pread(0, 8192) == bytes(8192)
        assert disk.pwrite(12345, b"hello") == 5
        assert disk.pread(12340, 15) == bytes(5) + b"hello" + bytes(5)
        buffer = bytearray(5)
        assert disk.pread_into(12345, buffer) == 5
        assert buffer == b"hello"
        disk.pwrite(MIB, memoryview(b"x" * MIB), durable=True)
        disk.zero(MIB, 4096)
        assert disk.pread(MIB, 8192) == bytes(4096) + b"x" * 4096
        disk.trim(0, GIB)
        disk.flush()
    with fvd.open(volume) as disk:
        assert disk.pread(MIB, 4096) == bytes(4096)


def test_what_was_written_is_there_after_close(volume: str) -> None:
    with fvd.open(volume) as disk:
        disk.pwrite(GIB - 5, b"never")
    assert fvd.info(volume).clean
    with fvd.open(volume, read_only=True) as disk:
        assert disk.pread(GIB - 5, 5) == b"never"


def test_what_was_flushed_is_there_after_a_kill(volume: str) -> None:
    code = (
        "import fvd, os, sys\ndisk = fvd.open(sys.argv[1])\ndisk.pwrite(12345, b'flushed')\ndisk.flush()\n"
        "disk.pwrite(99 << 20, b'not flushed')\nos.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, volume], check=False).returncode == -9
    assert not fvd.info(volume).clean
    with fvd.open(volume, read_only=True) as disk:
        assert disk.pread(12345, 7) == b"flushed"
    with fvd.open(volume) as disk:
        assert disk.pread(12345, 7) == b"flushed"
        assert disk.pread(99 << 20, 11) in (b"not flushed", bytes(11))


def test_info_map_check_extend(volume: str) -> None:
    with fvd.open(volume) as disk:
        disk.pwrite(100 * MIB, b"x" * MIB)
        found = disk.info()
        assert (found.mapped_bytes, found.clean, found.uri, found.read_only) == (MIB, False, None, False)
        assert [extent.state for extent in disk.map().extents] == ["zero", "data", "zero"]
        assert disk.map("100M", MIB).extents == [extent for extent in disk.map().extents if extent.state == "data"]
        assert disk.check().errors == []
        assert disk.extend("64M").added_bytes == 64 * MIB
        assert disk.info().storage_size == found.storage_size + 64 * MIB
        with pytest.raises(fvd.InvalidArgument):
            disk.extend(0)


def test_it_grows(volume: str) -> None:
    with fvd.open(volume) as disk:
        for offset in range(0, GIB, MIB):
            disk.pwrite(offset, bytes([offset >> 20 & 255]) * MIB)
        found = disk.info()
        assert found.mapped_bytes == GIB
        assert found.storage_size == found.max_storage_size
        assert disk.check().errors == []
        for offset in range(0, GIB, 37 * MIB):
            assert disk.pread(offset, MIB) == bytes([offset >> 20 & 255]) * MIB


def test_read_only(volume: str, tmp_path: Path) -> None:
    before = (tmp_path / "vm1.img").stat().st_mtime_ns
    with fvd.open(volume, read_only=True) as disk, fvd.open(volume, read_only=True) as another:
        assert disk.pread(0, 4096) == another.pread(0, 4096)
        for action in (lambda: disk.pwrite(0, b"x"), lambda: disk.zero(0, 512), disk.extend):
            with pytest.raises(fvd.ReadOnly):
                action()
    assert (tmp_path / "vm1.img").stat().st_mtime_ns == before


def test_outside_of_the_disk(volume: str) -> None:
    with fvd.open(volume) as disk:
        for offset, length in ((GIB, 1), (GIB - 1, 2), (-1, 1)):
            with pytest.raises(fvd.InvalidArgument):
                disk.pread(offset, length)
            with pytest.raises(fvd.InvalidArgument):
                disk.pwrite(offset, bytes(length))


def test_closed(volume: str) -> None:
    disk = fvd.open(volume)
    disk.close()
    disk.close()
    with pytest.raises(fvd.DeviceError, match="closed"):
        disk.pread(0, 1)


def test_many_threads(volume: str) -> None:
    """Each thread has its own parts of the disk, in one another's blocks: nobody's writes disturb another's."""
    count, size = 8, 3000

    with fvd.open(volume) as disk:

        def work(number: int) -> None:
            random_places = random.Random(number)
            mine = {}
            for step in range(60):
                place = random_places.randrange(200) * count * size + number * size
                data = bytes([number * 31 + step & 255]) * size
                disk.pwrite(place, data)
                mine[place] = data
                if step % 20 == 0:
                    disk.flush()
            for place, data in mine.items():
                assert disk.pread(place, size) == data

        failures: list[BaseException] = []

        def guarded(number: int) -> None:
            try:
                work(number)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert disk.check().errors == []


@pytest.mark.parametrize("cache", CACHE_MODES)
def test_cache_modes(volume: str, cache: fvd.CacheMode) -> None:
    with fvd.open(volume, cache=cache) as disk:
        disk.pwrite(0, b"x" * 100_000)
        disk.flush()
        assert disk.info().cache == cache
    with fvd.open(volume) as disk:
        assert disk.pread(0, 100_000) == b"x" * 100_000
    with pytest.raises(fvd.InvalidArgument):
        fvd.open(volume, cache="fast")  # type: ignore[arg-type]
