# SPDX-License-Identifier: Apache-2.0
"""Storage that is there, on a file system that is full: writes wait or fail as `on_full` says, it is told, and nothing is shown as free."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from loops import loop_device, mounted, run, sparse

import fvd
from fvd.device.node import open_node

MIB = 1 << 20
PAGES = 6 * MIB // 4096


def content(page: int) -> bytes:
    return page.to_bytes(4, "little") * 1024


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MiB. Pages are written to it: of a longer piece the loop driver may take a part, and call that all of it."""
    with mounted("tmpfs", tmp_path / "small", "-t", "tmpfs", "-o", "size=6m") as folder:
        yield folder


@pytest.fixture(params=["loop", "file"])
def volume(small: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """A disk of 64 MiB with all its storage, most of which the file system does not have."""
    path = small / "image"
    if request.param == "file":
        fvd.provision(f"file:{path}", "64M", journal_size="64K", block_size="4K", layout="raw")
        yield f"file:{path}"
        return
    with loop_device(sparse(path, 128 * MIB)) as device:
        fvd.provision(device, "64M", journal_size="64K", block_size="4K")
        yield device


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)


def more_space(folder: Path) -> None:
    run("mount", "-o", "remount,size=200m", folder)


def test_writes_wait_for_space_below(small: Path, volume: str) -> None:
    events: list[fvd.Event] = []
    with fvd.open(volume, on_full="wait", on_event=events.append) as disk:
        before = disk.info().free_bytes
        done: list[int] = []

        def write() -> None:
            for page in range(PAGES):
                disk.pwrite(page * 4096, content(page))
                done.append(page)

        thread = threading.Thread(target=write)
        thread.start()
        wait_for(lambda: [event for event in events if event.kind == "storage_full"])
        full = disk.info()
        assert full.no_room_below and full.free_bytes == 0 and full.waiting_writes == 1 and len(done) < PAGES
        assert disk.pread(4096, 4096) == content(1)
        disk.pwrite(0, content(0))  # what has its space needs none
        disk.flush()
        more_space(small)
        thread.join(20)
        assert len(done) == PAGES and not disk.info().no_room_below
        assert [page for page in range(PAGES) if disk.pread(page * 4096, 4096) != content(page)] == []
        assert disk.check().errors == []
    [told] = [event for event in events if event.kind == "storage_full"]
    assert told.free_bytes == 0 and "go on by themselves" in told.message
    assert before <= 6 * MIB, "what the file system does not have is shown as free"


def test_writes_fail_where_that_was_asked_for(small: Path, volume: str) -> None:
    events: list[fvd.Event] = []
    with fvd.open(volume, on_full="error", on_event=events.append) as disk:
        with pytest.raises(fvd.NoSpace):
            for page in range(PAGES):
                disk.pwrite(page * 4096, content(page))
        wait_for(lambda: [event for event in events if event.kind == "storage_full"])
        assert disk.info().free_bytes == 0
        more_space(small)
        disk.pwrite((PAGES - 1) * 4096, content(1))
        assert not disk.info().no_room_below
    assert "fail. Free some space" in next(event.message for event in events if event.kind == "storage_full")


def test_what_a_file_has_no_blocks_for_and_cannot_get(small: Path) -> None:
    """It is longer than what its file system has left."""
    with open_node(sparse(small / "image", 64 * MIB), direct=False) as node:
        assert 58 * MIB <= node.stack().short_bytes < 64 * MIB
        node.pwrite(0, bytes(MIB))
        assert node.stack().short_bytes >= 58 * MIB
    more_space(small)
    with open_node(small / "image", direct=False) as node:
        assert node.stack().short_bytes == 0
