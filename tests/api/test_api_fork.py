# SPDX-License-Identifier: Apache-2.0
"""A child after ``os.fork``: a typed error at once from everything that was open, nothing held of it, and the parent undisturbed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import fvd
import fvd.aio

MIB = 1 << 20
CHILD_SECONDS = 20


class Child:
    """A forked process that does something, says what came of it, and stays until it is let go."""

    def __init__(self, work: Callable[[], Any]) -> None:
        answers, says = os.pipe()
        stays, self._go = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            signal.alarm(CHILD_SECONDS)  # a child that hangs is a failure
            os.close(answers)
            os.close(self._go)
            try:
                found = work()
            except BaseException as error:
                found = f"{type(error).__name__}: {error}"
            os.write(says, json.dumps(found).encode())
            os.close(says)
            os.read(stays, 1)
            os._exit(0)
        os.close(says)
        os.close(stays)
        with os.fdopen(answers, "rb") as file:
            self.said = json.loads(file.read() or b'"nothing"')

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._go)
        os.waitpid(self.pid, 0)


def held(folder: Path) -> list[str]:
    """What this process has open of fvd's: its files and logs, rings, eventfds, pollers, sockets."""
    found = []
    for fd in Path("/proc/self/fd").iterdir():
        try:
            where = str(fd.readlink())
        except OSError:
            continue
        if "/test-logs/" in where:
            continue  # what pytest says goes there
        if str(folder) in where or "fvd" in where or where.startswith(("anon_inode:", "socket:")):
            found.append(where)
    return found


def errors_of(calls: dict[str, Callable[[], Any]]) -> dict[str, str]:
    found = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = "nothing"
        except BaseException as error:
            found[name] = type(error).__name__
    return found


def calls_on(disk: fvd.Disk) -> dict[str, Callable[[], Any]]:
    """Every method."""
    given: dict[str, tuple[Any, ...]] = {
        "pread": (0, 4096),
        "pread_into": (0, bytearray(512)),
        "pwrite": (0, b"child"),
        "trim": (0, 4096),
        "zero": (0, 4096),
        "set_copy_on_read": (True,),
    }
    names = [name for name, member in vars(fvd.Disk).items() if callable(member) and not name.startswith("_")]
    return {name: partial(getattr(disk, name), *given.get(name, ())) for name in names}


@pytest.fixture
def volume(tmp_path: Path) -> str:
    name = f"file:{tmp_path / 'vm1.img'}"
    fvd.provision(name, "64M", grow_step="16M", journal_size="1M")
    return name


@pytest.fixture
def quiet() -> Iterator[None]:
    """Python warns of forks in a process with threads: that is what is tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


@pytest.mark.parametrize("how", ["ring", "blocking", "page cache", "remote base"])
def test_a_child_gets_a_typed_error_and_holds_nothing(
    volume: str, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch, quiet: None
) -> None:
    if how == "blocking":
        monkeypatch.setenv("FVD_QUEUE", "blocking")
    with ExitStack() as parent:
        if how == "remote base":
            served = parent.enter_context(fvd.serve(volume, socket=tmp_path / "base.sock", read_only=True))
            volume = f"file:{tmp_path / 'over.img'}"
            fvd.provision(volume, "64M", journal_size="1M", base=served.uri)
        disk = fvd.open(volume, cache="writeback" if how == "page cache" else "none")
        events = disk.events()
        disk.pwrite(0, b"P" * 4096)

        def work() -> Any:
            found = errors_of(calls_on(disk) | {"next event": lambda: next(events), "with": lambda: with_it(disk)})
            events.close()
            return found, held(tmp_path)

        with Child(work) as child:
            found, still = child.said
            assert found.pop("with") == "nothing"  # there is nothing to close, and nobody to tell
            assert set(found.values()) == {"Forked"}, found
            assert still == []
            for place in range(1, 9):
                disk.pwrite(place * MIB, bytes([place]) * 4096)
            disk.flush()
            assert disk.pread(0, 1) == b"P" and disk.check().errors == []
            disk.close()
            with fvd.open(volume) as again:  # the child is still there, and in nobody's way
                assert all(again.pread(place * MIB, 4096) == bytes([place]) * 4096 for place in range(1, 9))


def with_it(disk: fvd.Disk) -> None:
    with disk:
        pass


def test_a_child_can_open_disks_of_its_own(volume: str, tmp_path: Path, quiet: None) -> None:
    other = f"file:{tmp_path / 'other.img'}"
    disk = fvd.open(volume)

    def work() -> Any:
        nonlocal disk
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", ResourceWarning)
            del disk  # is nobody's to close here
        fvd.provision(other, "64M", journal_size="1M")
        with fvd.open(other) as mine:
            mine.pwrite(0, b"mine")
            mine.flush()
        return [str(one.message) for one in told], errors_of({"of the parent": lambda: fvd.open(volume)})

    with Child(work) as child:
        assert child.said == [[], {"of the parent": "InUse"}]
        disk.pwrite(0, b"parent")
    disk.close()
    with fvd.open(other) as theirs, fvd.open(volume) as ours:
        assert (theirs.pread(0, 4), ours.pread(0, 6)) == (b"mine", b"parent")


def test_a_child_of_a_server(volume: str, tmp_path: Path, quiet: None) -> None:
    listening = tmp_path / "vm.sock"
    served = fvd.serve(volume, socket=listening)
    followed = fvd.events(volume)

    def work() -> Any:
        calls: dict[str, Callable[[], Any]] = {
            name: getattr(served, name) for name in ("info", "extend", "acknowledge", "prefetch_status", "events", "close")
        }
        return errors_of(calls | {"next event": lambda: next(followed)}), held(tmp_path)

    with Child(work) as child:
        found, still = child.said
        assert set(found.values()) == {"Forked"}, found
        assert still == []
        assert listening.exists() and fvd.info(volume).uri == served.uri
        followed.close()
        served.close()
        with fvd.serve(volume, socket=listening):
            pass


@pytest.mark.parametrize("what", ["an eventfd", "a connection"])
def test_a_fork_waits_for_what_is_just_being_opened(
    what: str, volume: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: None
) -> None:
    """Another thread has a new descriptor that nothing knows of yet: seen as an eventfd that stayed open in a child."""
    opened = threading.Event()

    def slowly(call: Callable[..., Any]) -> Callable[..., Any]:
        def opens(*arguments: Any) -> Any:
            made = call(*arguments)
            opened.set()
            time.sleep(0.05)
            return made

        return opens

    with fvd.serve(volume, socket=tmp_path / "vm.sock"):
        if what == "an eventfd":
            monkeypatch.setattr(os, "eventfd", slowly(os.eventfd))
        else:
            monkeypatch.setattr(socket.socket, "accept", slowly(socket.socket.accept))
        follower = threading.Thread(target=lambda: fvd.events(volume).close())
        follower.start()
        assert opened.wait(5)
        with Child(lambda: held(tmp_path)) as child:
            assert child.said == []
        follower.join()


def test_a_child_of_a_program_with_asyncio(volume: str, quiet: None) -> None:
    disk = asyncio.run(_opened(volume))

    def work() -> Any:
        async def ask() -> Any:
            return [await _error(call) for call in (disk.pread(0, 1), disk.pwrite(0, b"x"), disk.flush(), disk.info(), disk.close())]

        return asyncio.run(ask())

    with Child(work) as child:
        assert child.said == ["Forked"] * 5
    asyncio.run(disk.close())


async def _opened(volume: str) -> fvd.aio.AsyncDisk:
    return await fvd.aio.open(volume)


async def _error(call: Any) -> str:
    try:
        await call
    except Exception as error:
        return type(error).__name__
    return "nothing"


def test_forks_under_load_disturb_nothing(volume: str, quiet: None) -> None:
    with fvd.open(volume) as disk:
        for number in range(40):
            disk.pwrite(number * MIB, bytes([number + 1]) * MIB)
            child = os.fork()
            if child == 0:
                os._exit(0)
            assert disk.pread(number * MIB, MIB) == bytes([number + 1]) * MIB
            os.waitpid(child, 0)
        disk.flush()
        assert disk.check().errors == []
