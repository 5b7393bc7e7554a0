# SPDX-License-Identifier: Apache-2.0
"""``fvd.aio``: verbs awaited, disks in ``async with``, events in ``async for``, and what cancelling leaves behind: nothing."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

import fvd
import fvd.aio
import fvd.disk.opening

MIB = 1 << 20
WAIT_SECONDS = 60


@pytest.fixture
def volume(tmp_path: Path) -> str:
    name = f"file:{tmp_path / 'vm1.img'}"
    fvd.provision(name, "256M", grow_step="16M", journal_size="1M")
    return name


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Runs to its end, and leaves no thread."""
    before = set(threading.enumerate())
    asyncio.run(asyncio.wait_for(work(), WAIT_SECONDS))
    for thread in set(threading.enumerate()) - before:
        thread.join(WAIT_SECONDS)
    assert set(threading.enumerate()) <= before


def test_import_fvd_leaves_asyncio_alone() -> None:
    code = "import fvd, sys\nassert 'asyncio' not in sys.modules\nimport fvd.aio\nassert fvd.aio.info"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_long_verb_is_there() -> None:
    assert set(fvd.aio.__all__) >= {"provision", "serve", "open", "extend", "info", "map", "check", "dump", "remove", "list_volumes"}
    for name in fvd.aio.__all__:
        assert (getattr(fvd.aio, name).__doc__ or "").strip(), name


def test_verbs(tmp_path: Path) -> None:
    name = f"file:{tmp_path / 'vm1.img'}"

    async def work() -> None:
        made = await fvd.aio.provision(name, "256M", grow_step="16M", journal_size="1M")
        assert made.created
        assert (await fvd.aio.extend(name)).added_bytes == 16 * MIB
        found, mapped, report, dumped = await asyncio.gather(
            *(verb(name) for verb in (fvd.aio.info, fvd.aio.map, fvd.aio.check, fvd.aio.dump))
        )
        assert (found, mapped, report) == (fvd.info(name), fvd.map(name), fvd.check(name))
        assert dumped == fvd.dump(name)
        assert [listed.volume for listed in await fvd.aio.list_volumes(str(tmp_path))] == [name]
        assert await fvd.aio.remove(name)
        with pytest.raises(fvd.NotFound):
            await fvd.aio.info(name)

    run(work)


def test_a_disk(volume: str) -> None:
    async def work() -> None:
        async with fvd.aio.open(volume, on_full="wait") as disk:
            assert (disk.volume, disk.size) == (volume, 256 * MIB)
            events = disk.events()
            await asyncio.gather(*(disk.pwrite(offset, bytes([offset // MIB]) * MIB) for offset in range(0, 64 * MIB, MIB)))
            await disk.flush()
            assert await disk.pread(7 * MIB, 2) == b"\7\7"
            await disk.trim(0, MIB)
            await disk.zero(MIB, MIB)
            assert (await disk.extend()).storage_size >= 64 * MIB
            assert (await disk.info()).mapped_bytes >= 60 * MIB
            assert (await disk.map()).volume == volume
            assert (await disk.check()).errors == []
            assert (await anext(events)).kind == "low_water"
        kinds = [event.kind async for event in events]
        assert kinds[-1] == "closed" and "extend_done" in kinds
        with pytest.raises(fvd.DeviceError, match="closed"):
            await disk.pread(0, 1)
        await disk.close()
        another = await fvd.aio.open(volume, read_only=True)
        async with another:
            assert await another.pread(7 * MIB, 1) == b"\7"
        with pytest.raises(fvd.NotFound):
            async with fvd.aio.open(volume + "-absent"):
                pass

    run(work)


def test_writes_that_wait_hold_up_neither_reads_nor_growth(volume: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fvd.errors import NoSpace
    from fvd.storage.sized import FileStorage

    full = threading.Event()
    grow = FileStorage.grow_to

    def refuse(self: FileStorage, size_bytes: int) -> None:
        if not full.is_set():
            raise NoSpace("no space in this test")
        grow(self, size_bytes)

    monkeypatch.setattr(FileStorage, "grow_to", refuse)

    async def work() -> None:
        async with fvd.aio.open(volume, on_full="wait") as disk, disk.events() as events:
            writes = [asyncio.ensure_future(disk.pwrite(offset, b"x" * MIB)) for offset in range(0, 100 * MIB, MIB)]
            while (await anext(events)).kind != "extend_failed":
                pass
            assert len(await asyncio.gather(*(disk.pread(0, 4096) for _ in range(40)))) == 40
            await disk.flush()
            full.set()
            await disk.extend()
            assert await asyncio.gather(*writes) == [MIB] * 100

    run(work)


def test_served(volume: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with fvd.aio.events(volume) as outside:
            async with fvd.aio.serve(volume, socket=tmp_path / "vm.sock") as served:
                assert served.exports[0].uri == served.uri == (await fvd.aio.info(volume)).uri
                inside = served.events(history=True)
                await served.extend()
                assert (await served.info()).uri == served.uri
            found = [event async for event in inside]
            assert [event.kind for event in found] == ["served", "extend_started", "extend_done", "closed"]
            assert [await anext(outside) for _ in found] == found
        with pytest.raises(StopAsyncIteration):
            await anext(outside)
        await outside.aclose()

    run(work)


def test_a_cancelled_wait_loses_nothing(volume: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with fvd.aio.serve(volume, socket=tmp_path / "vm.sock") as served, fvd.aio.events(volume) as events:
            for _ in range(3):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(anext(events), 0.001)
            await served.extend()
            assert [(await anext(events)).kind for _ in range(2)] == ["extend_started", "extend_done"]

    run(work)


def test_a_cancelled_task_and_a_dropped_iterator_leave_no_thread(volume: str, tmp_path: Path) -> None:
    async def listen(events: fvd.aio.AsyncEvents, heard: asyncio.Event) -> None:
        async with events:
            heard.set()
            async for _ in events:
                pass

    async def work() -> None:
        async with fvd.aio.serve(volume, socket=tmp_path / "vm.sock") as served:
            for events in (fvd.aio.events(), served.events()):
                heard = asyncio.Event()
                task = asyncio.ensure_future(listen(events, heard))
                await heard.wait()
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            async for event in served.events(history=True):
                assert event.kind == "served"
                break
            never_begun = fvd.aio.events()
            await never_begun.aclose()
            served.events()

    run(work)


def test_a_failure_to_follow_is_raised() -> None:
    async def work() -> None:
        with pytest.raises(fvd.InvalidArgument):
            async with fvd.aio.events("nonsense"):
                pass
        events = fvd.aio.events("nonsense")
        with pytest.raises(fvd.InvalidArgument):
            await anext(events)
        with pytest.raises(StopAsyncIteration):
            await anext(events)

    run(work)


@pytest.mark.parametrize("moment", ["before it is open", "after it is open"])
def test_a_cancelled_open_leaves_no_disk_open(volume: str, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the task is cancelled while the thread opens the disk or when it has: it is closed when the cancellation is told."""
    opening, go = threading.Event(), threading.Event()
    real = fvd.disk.opening.open_volume

    def slow(*args: Any, **kwargs: Any) -> Any:
        made = None if moment == "before it is open" else real(*args, **kwargs)
        opening.set()
        go.wait(WAIT_SECONDS)
        return made or real(*args, **kwargs)

    monkeypatch.setattr(fvd.disk.opening, "open_volume", slow)

    async def work() -> None:
        task = asyncio.ensure_future(fvd.aio.open(volume).__aenter__())
        await asyncio.to_thread(opening.wait, WAIT_SECONDS)
        task.cancel()
        task.cancel()
        await asyncio.sleep(0.05)
        assert not task.done()
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        monkeypatch.undo()
        async with fvd.aio.open(volume):
            pass

    run(work)
    assert fvd.info(volume).clean
