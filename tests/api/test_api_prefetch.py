# SPDX-License-Identifier: Apache-2.0
"""A disk that becomes independent of its base, through the Python API: opened, served, awaited; until the base is deleted."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from loops import loop_device, sparse
from nbd_handle import connect

import fvd
import fvd.aio

MIB = 1 << 20
WAIT_SECONDS = 60.0
# Not a whole number of blocks: the last one is part base, part zeros.
CONTENT = os.urandom(9 * MIB + 512)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.raw"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def volume(tmp_path: Path) -> str:
    return f"file:{tmp_path / 'vm1.img'}"


def make(volume: str, base: Path, **options: Any) -> fvd.Provisioned:
    return fvd.provision(volume, "32M", base=base, base_format="raw", journal_size="1M", **options)


def until(happened: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not happened():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.05)


def test_open_prefetch_and_delete_the_base(volume: str, base: Path) -> None:
    made = make(volume, base)
    assert (made.copy_on_read, made.prefetch_default, made.base_released) == (False, False, False)
    with fvd.open(volume) as disk, disk.events() as events:
        before = disk.prefetch_status()
        assert (before.state, before.base_bytes, before.released) == ("off", len(CONTENT), False)
        assert disk.prefetch_start().state != "off"
        until(lambda: disk.prefetch_status().released, "the release of the base")
        after = disk.prefetch_status()
        assert (after.state, after.remaining_bytes, after.copied_bytes) == ("done", 0, len(CONTENT))
        assert disk.prefetch_start().state == "done"
        base.unlink()
        assert disk.pread(0, len(CONTENT) + 1024) == CONTENT + bytes(1024)
        disk.close()
        told = [event for event in events if event.kind != "low_water" and not event.kind.startswith("extend")]
    kinds = [event.kind for event in told]
    assert kinds[0] == "prefetch_started" and kinds[-1] == "closed"
    assert kinds.index("prefetch_done") < kinds.index("base_released")
    progress = [event.copied_bytes for event in told if event.kind == "prefetch_progress"]
    assert progress == sorted(progress) and {event.total_bytes for event in told if event.copied_bytes} == {len(CONTENT)}
    assert fvd.info(volume).base_released
    with fvd.open(volume, prefetch=True) as disk:
        assert disk.prefetch_status().state == "done"
        assert disk.pread(0, len(CONTENT)) == CONTENT
    assert fvd.check(volume).errors == []


def test_copies_leave_the_guest_half_of_the_mark_on_a_storage_that_cannot_grow(tmp_path: Path) -> None:
    """A device of 60 MiB for a disk of 256 MiB over a base of 128: prefetching and copy-on-read stop when 8 of the 16 MiB are left, and the
    guest has them for its first writes."""
    base = tmp_path / "large.raw"
    base.write_bytes(os.urandom(MIB) * 128)
    with loop_device(sparse(tmp_path / "device", 60 * MIB)) as device:
        fvd.provision(device, "256M", base=base, base_format="raw", journal_size="1M", grow_step="32M")
        with fvd.open(device, on_full="error", copy_on_read=True) as disk:
            disk.prefetch_start()
            until(lambda: disk.prefetch_status().state == "full", "the end of prefetching")
            for offset in range(0, 128 * MIB, MIB):
                disk.pread(offset, MIB)
            found = disk.info()
            assert found.mapped_bytes > 30 * MIB and found.free_bytes == 8 * MIB and found.low_water_bytes == 16 * MIB
            for chunk in range(8):
                disk.pwrite((200 + chunk) * MIB, b"\x5a" * 65536)
            with pytest.raises(fvd.NoSpace):
                disk.pwrite(250 * MIB, b"\x5a" * 65536)


def test_copy_on_read_alone(volume: str, base: Path) -> None:
    make(volume, base, copy_on_read=True)
    with fvd.open(volume) as disk:
        assert disk.prefetch_status().copy_on_read
        # Again and again: a read that comes while copies have all the buffers they may have is answered without one.
        until(lambda: disk.pread(0, len(CONTENT)) == CONTENT and disk.prefetch_status().remaining_bytes == 0, "the copy of what was read")
    assert fvd.info(volume).base_released
    base.unlink()
    with fvd.open(volume) as disk:
        assert disk.pread(0, len(CONTENT)) == CONTENT


def test_without_both_nothing_is_copied(volume: str, base: Path) -> None:
    make(volume, base)
    with fvd.open(volume) as disk:
        assert disk.pread(0, len(CONTENT)) == CONTENT
        assert disk.info().present_bytes == 0
        assert disk.set_copy_on_read(True).copy_on_read
        until(lambda: disk.pread(0, MIB) == CONTENT[:MIB] and disk.info().present_bytes >= MIB, "the copy of what was read")
        assert not disk.set_copy_on_read(False).copy_on_read
        assert disk.prefetch_status().remaining_bytes > 0


def test_what_a_disk_was_provisioned_for_can_be_overridden(volume: str, base: Path) -> None:
    made = make(volume, base, copy_on_read=True, prefetch=True)
    assert (made.copy_on_read, made.prefetch_default) == (True, True)
    with fvd.open(volume, copy_on_read=False, prefetch=False) as disk:
        status = disk.prefetch_status()
        assert (status.state, status.copy_on_read) == ("off", False)
    with fvd.open(volume) as disk:
        assert (disk.prefetch_status().state, disk.prefetch_status().copy_on_read) == ("delayed", True)


def test_serve_stop_restart_and_delete_the_base(volume: str, base: Path, tmp_path: Path) -> None:
    make(volume, base)
    slow = fvd.PrefetchOptions(delay_s=0, rate_bytes=2 * MIB)
    with fvd.serve(volume, socket=tmp_path / "vm.sock", prefetch=slow) as served, served.events(history=True) as events:
        until(lambda: served.prefetch_status().copied_bytes > 0, "the first copy")
        assert served.prefetch_status().limit_bytes_per_second == 2 * MIB
        stopped = fvd.prefetch_stop(volume)
        assert (stopped.state, stopped.released) == ("off", False)
        saved = served.record_profile(tmp_path / "p")
        assert fvd.read_profile(saved.path).base_size == len(CONTENT)
        served.close()
        kinds = [event.kind for event in events]
        assert kinds[0] == "served" and "prefetch_stopped" in kinds
    copied_bytes = fvd.info(volume).present_bytes
    assert copied_bytes > 0
    with fvd.serve(volume, socket=tmp_path / "vm.sock", prefetch=fvd.PrefetchOptions(delay_s=0)) as served:
        assert served.prefetch_status().copied_bytes > 0  # it goes on where it was
        until(lambda: served.prefetch_status().released, "the release of the base")
        base.unlink()
        assert connect(served.uri).pread(len(CONTENT), 0) == CONTENT
    with fvd.serve(volume, socket=tmp_path / "vm.sock") as served:
        assert connect(served.uri).pread(len(CONTENT), 0) == CONTENT
        assert served.info().base_released


def test_a_reader_copies_nothing(volume: str, base: Path) -> None:
    make(volume, base, copy_on_read=True, prefetch=True)
    with fvd.open(volume, read_only=True) as disk:
        assert disk.pread(0, len(CONTENT)) == CONTENT
        status = disk.prefetch_status()
        assert (status.state, status.remaining_bytes, status.copy_on_read) == ("off", len(CONTENT), False)
        with pytest.raises(fvd.ReadOnly):
            disk.prefetch_start()


def test_awaited(volume: str, base: Path) -> None:
    make(volume, base)

    async def work() -> None:
        async with fvd.aio.open(volume) as disk, disk.events() as events:
            assert (await disk.set_copy_on_read(True)).copy_on_read
            await disk.prefetch_start(rate="1G")
            async for event in events:
                if event.kind == "base_released":
                    break
            assert (await disk.prefetch_status()).state == "done"
            assert (await disk.prefetch_stop()).released

    asyncio.run(asyncio.wait_for(work(), WAIT_SECONDS))
