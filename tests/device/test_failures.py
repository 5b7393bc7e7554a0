# SPDX-License-Identifier: Apache-2.0
"""Who is told of a failed flush."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
from loops import sparse

from fvd.device import failures as failures_module
from fvd.device import folders as folders_module
from fvd.device import node as node_module
from fvd.device.failures import Failures, FlushFailure
from fvd.device.folders import reach
from fvd.device.node import open_node, typed_errors
from fvd.errors import DeviceError


def test_those_on_the_same_device_hear_it() -> None:
    failures = Failures(clock=lambda: 12.5)
    heard: dict[str, list[FlushFailure]] = {name: [] for name in ("first", "second", "elsewhere", "gone")}
    on = {"first": {1, 2}, "second": {2, 3}, "elsewhere": {4}, "gone": {2}}
    listeners = {name: failures.listen(lambda name=name: frozenset(on[name]), heard[name].append) for name in heard}  # type: ignore[misc]
    listeners["gone"].close()
    listeners["gone"].close()
    told = failures.report(frozenset({2, 9}), errno.EIO, "file:first", but=listeners["first"])
    assert told == FlushFailure(errno.EIO, 12.5, "file:first") and told.reason == "Input/output error"
    assert heard == {"first": [], "second": [told], "elsewhere": [], "gone": []}
    on["elsewhere"].add(9)  # it has grown to lie there
    again = failures.report(frozenset({9}), errno.ENOSPC, "/dev/nine")
    assert heard["elsewhere"] == [again] and heard["second"] == [told]


def test_a_listener_that_fails_keeps_it_from_nobody() -> None:
    failures = Failures()
    heard: list[FlushFailure] = []

    def broken(failure: FlushFailure) -> None:
        raise RuntimeError("broken")

    failures.listen(lambda: frozenset({1}), broken)
    failures.listen(lambda: frozenset({1}), heard.append)
    failures.report(frozenset({1}), errno.EIO, "a")
    assert len(heard) == 1


def test_many_threads() -> None:
    """Listeners come and go while failures are told; one that was there throughout hears of all."""
    failures = Failures()
    heard: list[FlushFailure] = []
    failures.listen(lambda: frozenset({1}), heard.append)

    def come_and_go() -> None:
        for _ in range(200):
            failures.listen(lambda: frozenset({1}), lambda failure: None).close()

    def tell() -> None:
        for _ in range(50):
            failures.report(frozenset({1}), errno.EIO, "a")

    threads = [threading.Thread(target=work) for work in (come_and_go, tell, tell, come_and_go)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(heard) == 100


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[FlushFailure]:
    """What is reported of this folder's device."""
    failures = Failures()
    heard: list[FlushFailure] = []
    failures.listen(lambda: frozenset({tmp_path.stat().st_dev}), heard.append)
    monkeypatch.setattr(failures_module, "FAILURES", failures)
    return heard


def fail(fd: int) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_nodes_flush(told: list[FlushFailure], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sparse(tmp_path / "image", 1 << 16)
    with open_node(path) as node:
        node.flush()
        assert not told
        monkeypatch.setattr(node_module.os, "fdatasync", fail)
        with pytest.raises(DeviceError):
            node.flush()
    assert [(failure.errno, failure.source) for failure in told] == [(errno.EIO, str(path))]


def test_a_nodes_sampler(told: list[FlushFailure], tmp_path: Path) -> None:
    """The flush itself ends well, and the sampler says that a page is lost."""
    reader, writer = os.pipe()  # of which such a question is an error
    with open_node(sparse(tmp_path / "image", 1 << 16), direct=False) as node:
        assert node.sampler_fd >= 0
        os.dup2(reader, node.sampler_fd)
        with pytest.raises(DeviceError):
            node.flush()
    os.close(reader)
    os.close(writer)
    assert [failure.errno for failure in told] == [errno.ESPIPE]


def sync_folder(folder: Path) -> None:
    with typed_errors("flushing", str(folder)), reach(folder / "new") as place:
        place.sync()


def test_a_folders_flush(told: list[FlushFailure], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system flushes its device for it."""
    sync_folder(tmp_path)
    monkeypatch.setattr(folders_module.os, "fsync", fail)
    with pytest.raises(DeviceError):
        sync_folder(tmp_path)
    assert [failure.source for failure in told] == [str(tmp_path / "new")]


def test_samplers_are_for_what_is_written_through_the_page_cache(tmp_path: Path) -> None:
    path = sparse(tmp_path / "image", 1 << 16)
    for direct in (True, False):
        with open_node(path, direct=direct) as node:
            assert node.sampler_fd >= 0 and node.sampler_fd != node.fd
    with open_node(path, read_only=True, direct=False) as node:
        assert node.sampler_fd == -1
