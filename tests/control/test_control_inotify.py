# SPDX-License-Identifier: Apache-2.0
"""The kernel's inotify as watching uses it: names, folders, loss, and what happens where there is no more of it."""

from __future__ import annotations

import errno
import os
import resource
import select
from pathlib import Path

import pytest

from fvd.control import inotify
from fvd.control.watching import SocketWatch
from fvd.errors import Unsupported

MASK = inotify.MOVED_TO | inotify.CREATE | inotify.ONLYDIR
EVENTS_MAX = Path("/proc/sys/fs/inotify/max_queued_events")

pytestmark = pytest.mark.pure


def test_what_appears_is_told_by_name(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    watcher = inotify.Inotify()
    a, b = watcher.add_watch(first, MASK), watcher.add_watch(second, MASK)
    assert a != b == watcher.add_watch(second, MASK)
    assert watcher.read() == [] and not select.select([watcher.fd], [], [], 0)[0]
    odd = os.fsdecode(b"line\nbreak \xff")
    names = ["a", "sixteen-bytes-15", odd, "n" * 255]
    for name in names:
        (first / name).touch()
    (second / "folder").mkdir()
    (first / "a").rename(second / "b")
    assert select.select([watcher.fd], [], [], 0)[0]
    told = [(event.watch, event.name, event.mask) for event in watcher.read()]
    assert told == [
        *((a, name, inotify.CREATE) for name in names),
        (b, "folder", inotify.CREATE | inotify.ISDIR),
        (b, "b", inotify.MOVED_TO),
    ]
    second.joinpath("b").unlink()
    second.joinpath("folder").rmdir()
    second.rmdir()
    assert [(event.watch, event.mask, event.name) for event in watcher.read()] == [(b, inotify.IGNORED, "")]
    watcher.close()
    watcher.close()


def test_refusals_are_errors_of_the_system(tmp_path: Path) -> None:
    watcher = inotify.Inotify()
    (tmp_path / "file").touch()
    for path, number in ((tmp_path / "none", errno.ENOENT), (tmp_path / "file", errno.ENOTDIR)):
        with pytest.raises(OSError) as caught:
            watcher.add_watch(path, MASK)
        assert caught.value.errno == number
    watcher.close()


def test_lost_events_are_told(tmp_path: Path) -> None:
    limit = int(EVENTS_MAX.read_text())
    if limit > 1 << 16:
        pytest.skip(f"{limit} events may wait here")
    watcher = inotify.Inotify()
    watcher.add_watch(tmp_path, MASK)
    path = tmp_path / "x"
    for _ in range(limit + 1):  # one name after another: equal events in a row are one
        path.symlink_to("nowhere")
        path = path.rename(tmp_path / "y")
        path.unlink()
        path = tmp_path / "x"
    seen = []
    while more := watcher.read():
        seen += more
    assert len(seen) == limit + 1
    assert (seen[-1].watch, seen[-1].mask) == (-1, inotify.Q_OVERFLOW)
    watcher.close()


def test_no_more_descriptors_is_said_in_words() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, before[1]))
    try:
        with pytest.raises(Unsupported, match="cannot watch for disks"):
            SocketWatch()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
