# SPDX-License-Identifier: Apache-2.0
"""fvd.disk._disk_thread with a base behind NBD: attached, released; copying is steered."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from nbd_base import Nbdkit, until

from disks import MIB, make, volume
from fvd.device._remote import Remote
from fvd.disk._disk_thread import DiskThread, drive
from fvd.disk.opening import OpenVolume, open_volume
from fvd.engine._engine import Want
from fvd.errors import DeviceError

BASE = random.Random(5).randbytes(16 * MIB)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Nbdkit]:
    (tmp_path / "base.img").write_bytes(BASE)
    server = Nbdkit(tmp_path, "--filter=delay", "file", tmp_path / "base.img", "rdelay=200ms")
    yield server
    server.kill()


@pytest.fixture(params=["io_uring", "blocking"])
def blocking(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "blocking")


class Copying:
    """What the driver knows of it."""

    def __init__(self, driver: list[DiskThread]) -> None:
        self.driver = driver
        self.wants: list[int] = []
        self.threads: set[int] = set()
        self.fails = False

    def on_want(self, wants: int) -> None:
        self.wants.append(wants)
        self.threads.add(threading.get_ident())
        if self.fails:
            raise ValueError("a bug of ours")
        if wants & Want.BASE:
            self.driver[0].release_base()


def open_over(path: Path, remote: Remote) -> OpenVolume:
    """A disk that was made over a local base, with the same contents behind NBD in its place."""
    make(path / "disk.img", base=str(path / "base.img"))
    opened = open_volume(volume(path / "disk.img"), base_timeout_s=2)
    replaced: Any = SimpleNamespace(remote=remote, node=None, fd=-1)
    opened.base = replaced
    return opened


def test_a_remote_base(tmp_path: Path, server: Nbdkit, blocking: bool) -> None:
    remote = Remote(uri=server.uri)
    remote.open()
    read: list[bytes] = []
    with drive(open_over(tmp_path, remote), force_blocking=blocking) as driver:
        assert driver.pread(0, 5 * MIB) == BASE[: 5 * MIB]
        driver.pwrite(MIB + 5, b"mine")
        assert driver.pread(MIB, 4096) == BASE[MIB : MIB + 5] + b"mine" + BASE[MIB + 9 : MIB + 4096]
        reader = threading.Thread(target=lambda: read.append(driver.pread(8 * MIB, 4096)))
        reader.start()
        time.sleep(0.05)
        with pytest.raises(RuntimeError, match="in flight"):
            driver.release_base()
        reader.join()
        assert read == [BASE[8 * MIB : 8 * MIB + 4096]]
        driver.release_base()
        assert driver.pread(MIB + 5, 4) == b"mine"
    remote.close()


def test_copying_is_told(tmp_path: Path, server: Nbdkit, blocking: bool, caplog: pytest.LogCaptureFixture) -> None:
    remote = Remote(uri=server.uri)
    remote.open()
    opened: Any = open_over(tmp_path, remote)
    drivers: list[DiskThread] = []
    copying = opened.copying = Copying(drivers)
    engine = opened.engine

    def want(bits: int) -> None:
        engine.want |= bits

    with drive(opened, force_blocking=blocking) as driver:
        drivers.append(driver)
        assert driver.pread(0, 4096) == BASE[:4096]
        driver.call(lambda: want(1 | 2 | Want.STEER))
        until(lambda: copying.wants == [Want.STEER])
        copying.fails = True
        driver.call(lambda: want(Want.STEER))
        until(lambda: "could not be steered" in caplog.text)
        assert len(copying.wants) == 2
        copying.fails = False
        driver.call(lambda: want(Want.BASE | Want.STEER))
        until(lambda: len(copying.wants) == 3)
        assert copying.wants[2] == Want.BASE | Want.STEER and driver.call(lambda: engine.want) == 0
        assert len(copying.threads) == 1 and threading.get_ident() not in copying.threads
        remote.close()
        with pytest.raises(DeviceError):
            driver.pread(4 * MIB, 4096)  # released
        until(lambda: driver.call(lambda: engine.want) == 0)
        heard = len(copying.wants)  # the engine itself has told that the base fails
        opened.copying = None
        driver.call(lambda: want(Want.STEER))
        until(lambda: driver.call(lambda: engine.want) == 0)
        assert len(copying.wants) == heard


@pytest.mark.parametrize("copying", [False, True])
def test_the_loop_turns_more_often_while_copying(tmp_path: Path, copying: bool) -> None:
    make(tmp_path / "disk.img")
    opened: Any = open_volume(volume(tmp_path / "disk.img"))
    if copying:
        opened.copying = Copying([])
    with drive(opened) as driver:
        thread = Path(f"/proc/self/task/{driver.call(threading.get_native_id)}/status")

        def sleeps() -> int:
            [line] = [line for line in thread.read_text().splitlines() if line.startswith("voluntary_ctxt")]
            return int(line.split()[1])

        time.sleep(0.1)
        before = sleeps()
        time.sleep(2.1)
        assert (7 <= sleeps() - before <= 12) if copying else (sleeps() - before <= 4)
