# SPDX-License-Identifier: Apache-2.0
"""`fvd-lv attach` and `detach` with the kernel's nbd driver: a file system on a disk whose server is killed, refusals."""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from real_devices import GIB, MIB, SECTOR, Group, Server, fvd_lv, run, settle

import fvd
from fvd.device.nbd_netlink import NbdNetlink

ROOT = Path(__file__).resolve().parents[3]
RULES = Path("/run/udev/rules.d/60-fvd.rules")
PAUSE_SECONDS = 15.0  # at most, from the next server's first moment; the kernel looks after 5 s at what was under way
Serving = Callable[..., AbstractContextManager[Server]]


@pytest.fixture(autouse=True)
def control_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FVD_RUNTIME_DIR", str(tmp_path / "run"))


@pytest.fixture
def nothing_attached() -> Iterator[None]:
    """At the end. Named last, so that it ends first: a device whose server has gone would keep lvm2 waiting."""
    yield
    for mount in reversed(Path("/proc/mounts").read_text().splitlines()):
        if mount.startswith("/dev/nbd"):
            subprocess.run(["umount", "--lazy", mount.split()[1]], check=False)
    for backend in Path("/sys/block").glob("nbd*/backend"):
        with NbdNetlink() as netlink:
            netlink.disconnect(int(backend.parent.name.removeprefix("nbd")))


@pytest.fixture
def udev_rules() -> Iterator[None]:
    """As a package has installed them."""
    RULES.parent.mkdir(exist_ok=True)
    shutil.copy(ROOT / "systemd" / RULES.name, RULES)
    run("udevadm", "control", "--reload")
    yield
    RULES.unlink()
    run("udevadm", "control", "--reload")


@pytest.fixture
def volume(group: Group) -> str:
    name = f"{group.name}/vm1"
    fvd.provision(name, GIB)
    return name


def partition(device: str, *sizes: int) -> None:
    """An MBR with partitions of these sizes, from 1 MiB on."""
    rows, start = b"", MIB
    for size in sizes:
        rows += struct.pack("<B3xB3xII", 0, 0x83, start // SECTOR, size // SECTOR)
        start += size
    with Path(device).open("r+b") as disk:
        disk.write(bytes(446) + rows.ljust(64, b"\0") + b"\x55\xaa")
    run("blockdev", "--rereadpt", device)


class Writer:
    """Writes a file again and again, each time to the medium, until it is stopped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.rounds = 0
        self.failure: Exception | None = None
        self._thread.start()

    def wait_for(self, rounds: int, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while self.rounds < rounds and self.failure is None:
            assert time.monotonic() < deadline, f"only {self.rounds} rounds"
            time.sleep(0.02)

    def stop(self) -> None:
        self._over.set()
        self._thread.join()
        if self.failure is not None:
            raise self.failure

    def _run(self) -> None:
        try:
            while not self._over.is_set():
                with self._path.open("wb", buffering=0) as file:
                    file.write(self.content(self.rounds))
                    os.fsync(file.fileno())
                self.rounds += 1
        except Exception as error:
            self.failure = error

    @staticmethod
    def content(number: int) -> bytes:
        return hashlib.sha256(b"%d" % number).digest() * (MIB // 32)


def test_a_file_system_outlives_its_server(volume: str, serving: Serving, udev_rules: None, tmp_path: Path, nothing_attached: None) -> None:
    folder = tmp_path / "mnt"
    folder.mkdir()
    with serving(volume) as first:
        made = fvd_lv("attach", volume, "--output", "json").json
        assert (made["device"], made["link"], made["size"], made["read_only"]) == ("/dev/nbd0", "/dev/fvd/vm1", GIB, False)
        settle()
        links = run("udevadm", "info", "--query=property", "--property=DEVLINKS", "--value", "/dev/nbd0").split()
        assert "/dev/fvd/vm1" in links, "the rule did not match"
        assert run("blockdev", "--getss", "--getsize64", "/dev/fvd/vm1").split() == ["512", str(GIB)]
        assert "attached as /dev/fvd/vm1" in fvd_lv("list", "--served").out
        with pytest.raises(fvd.InUse, match="is attached already, as /dev/fvd/vm1"):
            fvd.attach(volume)
        partition("/dev/fvd/vm1", 900 * MIB, 50 * MIB)
        settle()
        run("pvcreate", "--yes", "/dev/fvd/vm1-part2")  # a guest's
        run("mkfs.ext4", "-q", "-E", "nodiscard", "/dev/fvd/vm1-part1")
        run("mount", "/dev/fvd/vm1-part1", folder)
        (folder / "kept").write_bytes(Writer.content(-1))
        writer = Writer(folder / "file")
        writer.wait_for(3)
        first.kill()
    # The next server asks lvm2, which must not read the guest's physical volume: that waits for the server.
    with serving(volume):
        writer.wait_for(writer.rounds + 2, PAUSE_SECONDS)
        writer.stop()
        with pytest.raises(fvd.InUse, match=f"mounted on {folder}"):
            fvd.detach(volume)
        run("umount", folder)
        assert fvd_lv("detach", volume).out.strip() == f"{volume} is detached from /dev/nbd0"
        settle()
        assert not os.path.lexists("/dev/fvd/vm1") and fvd.info(volume).attached is None
        # Once more, when the kernel has forgotten its pages: what was written is there.
        fvd.attach(volume, name="again")
        settle()
        run("e2fsck", "-f", "-n", "/dev/fvd/again-part1")
        run("mount", "/dev/fvd/again-part1", folder)
        assert (folder / "kept").read_bytes() == Writer.content(-1)
        assert (folder / "file").read_bytes() == Writer.content(writer.rounds - 1)
        run("umount", folder)
        fvd.detach(volume)


def test_refusals_and_force(serving: Serving, udev_rules: None, tmp_path: Path, nothing_attached: None) -> None:
    first, second = f"file:{tmp_path}/a.img", f"file:{tmp_path}/b.img"
    for volume in (first, second):
        fvd.provision(volume, 64 * MIB)
    with pytest.raises(fvd.NotFound, match="is not served; run fvd-lv serve"):
        fvd.attach(first)
    with serving(first), serving(second) as server:
        with pytest.raises(fvd.NotFound, match="is not attached"):
            fvd.detach(first)
        with pytest.raises(fvd.InvalidArgument, match="no name for a link"):
            fvd.attach(first, name="../sda")
        fvd.attach(first, name="disk")
        with pytest.raises(fvd.Conflict, match="/dev/fvd/disk is there already"):
            fvd.attach(second, name="disk")
        assert fvd.attach(second).device == "/dev/nbd1", "the kernel makes one more than nbds_max"
        with Path("/dev/fvd/disk").open("rb"), pytest.raises(fvd.InUse, match="open in this process"):
            fvd.detach(first)
        fvd.detach(first)
        server.kill()
    assert fvd.info(second).attached == "/dev/fvd/b.img"
    with pytest.raises(fvd.NotFound, match=r"nobody serves it.*detach --force gives that up"):
        fvd.detach(second)
    fvd.detach(second, force=True)
    settle()
    assert fvd.info(second).attached is None and not Path("/dev/fvd").exists()


def test_read_only_and_without_udev_rules(serving: Serving, tmp_path: Path, nothing_attached: None) -> None:
    volume = f"file:{tmp_path}/a.img"
    fvd.provision(volume, 64 * MIB)
    with serving(volume, "--read-only"):
        assert fvd_lv("attach", volume).out == "/dev/fvd/a.img (/dev/nbd0), 64.0 MiB, read-only\n"
        assert run("blockdev", "--getro", "/dev/fvd/a.img") == "1"
        fvd.detach(volume)
        assert not os.path.lexists("/dev/fvd/a.img")
