# SPDX-License-Identifier: Apache-2.0
"""Real devices for the tests of this folder: whole disks, device-mapper devices, volume groups, served disks. Each is one that a test made.

Starting a process costs 25 to 70 ms in a guest, importing fvd a second: what is not about processes uses `import fvd` in the test's own.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbd

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
SECTOR = 512
FVD_LV = [sys.executable, "-m", "fvd.cli"]
COMMAND_SECONDS = 120
READY_SECONDS = 60
_numbers = itertools.count()


def run(*words: object, code: int = 0) -> str:
    """Output of a command that is expected to end with `code`."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False, timeout=COMMAND_SECONDS)
    command = " ".join(map(str, words))
    assert done.returncode == code, f"{command} ended with {done.returncode}, not {code}:\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


def settle() -> None:
    """Waits until udev has done all that it has been told of."""
    run("udevadm", "settle", "--timeout=60")


def unique(prefix: str) -> str:
    """A name that no other test of this machine has."""
    return f"{prefix}{os.getpid()}n{next(_numbers)}"


def load_module(name: str) -> None:
    """A kernel module. A guest's lie apart: its root file system is another kernel's."""
    guest = Path("/run/uml")
    run("modprobe", *(["-d", guest] if guest.exists() else []), name)


def size_bytes(device: str) -> int:
    """The size of a block device, as the kernel has it."""
    return int(run("blockdev", "--getsize64", device))


# --- Whole disks -------------------------------------------------------------------------------------------------------------------


class Pool:
    """Disks that the tests may use as they like: those in FVD_REAL_DISKS, or loop devices over sparse files in `folder`."""

    LOOP_BYTES = 64 * GIB

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._free = [path for path in os.environ.get("FVD_REAL_DISKS", "").split(":") if path]
        self._lent = bool(self._free)
        self._loops: list[str] = []

    @contextlib.contextmanager
    def disk(self) -> Iterator[str]:
        """A whole disk, its first 16 MiB zeros; beyond that it has what earlier tests left, as reused storage has."""
        if not self._free:
            assert not self._lent, "all disks of FVD_REAL_DISKS are taken"
            self._free.append(self._make_loop())
        device = self._free.pop()
        try:
            yield device
        finally:
            # Not all of it: a User-Mode Linux disk takes discards in pieces of 32 KiB.
            run("blkdiscard", "--force", "--length", 16 * MIB, device)
            run("udevadm", "trigger", "--action=change", device)  # or udev still knows the group that was on it
            self._free.append(device)

    def close(self) -> None:
        for device in self._loops:
            run("losetup", "--detach", device)

    def _make_loop(self) -> str:
        path = self._folder / f"disk{len(self._loops)}.img"
        with path.open("xb") as file:
            file.truncate(self.LOOP_BYTES)
        device = run("losetup", "--find", "--show", path)
        self._loops.append(device)
        return device


# --- Device-mapper -----------------------------------------------------------------------------------------------------------------


@dataclass
class Mapped:
    """A device-mapper device made by a test: of fixed size for fvd, as long as it is no logical volume."""

    name: str

    @property
    def path(self) -> str:
        return f"/dev/mapper/{self.name}"

    def message(self, *words: object) -> None:
        run("dmsetup", "message", self.name, 0, *words)

    def replace(self, table: str) -> None:
        """Another table for what comes from now on. What is under way ends under the old one."""
        run("dmsetup", "suspend", "--noflush", "--nolockfs", self.name)
        run("dmsetup", "load", self.name, "--table", table)
        run("dmsetup", "resume", self.name)


@contextlib.contextmanager
def mapped(table: str, prefix: str = "fvdtest") -> Iterator[Mapped]:
    """A device-mapper device with this table (dmsetup(8))."""
    device = Mapped(unique(prefix))
    run("dmsetup", "create", device.name, "--table", table)
    try:
        settle()
        yield device
    finally:
        settle()
        run("dmsetup", "remove", "--retry", device.name)


def linear(device: str, length_bytes: int, start_bytes: int = 0) -> str:
    """The table of a part of a device."""
    return f"0 {length_bytes // SECTOR} linear {device} {start_bytes // SECTOR}"


# --- Volume groups -----------------------------------------------------------------------------------------------------------------


@dataclass
class Group:
    """A volume group made by a test. `path` of a volume in it: /dev/GROUP/VOLUME."""

    name: str
    devices: list[str] = field(default_factory=list)

    def path(self, volume: str) -> str:
        return f"/dev/{self.name}/{volume}"

    def report(self, fields: str = "lv_name,lv_size,lv_active,lv_tags", *, select: str | None = None) -> list[dict[str, str]]:
        """The rows of `lvs`, sizes in bytes."""
        words = ["lvs", "--all", "--reportformat", "json", "--units", "b", "--nosuffix", "-o", fields]
        rows = json.loads(run(*words, *([] if select is None else ["-S", select]), self.name))["report"][0]["lv"]
        assert isinstance(rows, list)
        return rows

    def volume(self, name: str, fields: str = "lv_size,lv_active,lv_tags,lv_uuid") -> dict[str, str] | None:
        """One row of `lvs`; None when there is no such volume."""
        return next(iter(self.report(f"lv_name,{fields}", select=f"lv_name={name}")), None)

    def free_bytes(self) -> int:
        return int(run("vgs", "--noheadings", "--units", "b", "--nosuffix", "-o", "vg_free", self.name))

    def extend(self, device: str, size: int | None = None) -> None:
        """One more physical volume."""
        make_physical(device, size)
        run("vgextend", "--yes", self.name, device)
        self.devices.append(device)


def make_physical(device: str, size: int | None = None) -> None:
    """A physical volume, as if the device had only `size` bytes."""
    limit = [] if size is None else ["--setphysicalvolumesize", f"{size}b"]
    run("pvcreate", "--yes", "--quiet", *limit, device)


@contextlib.contextmanager
def volume_group(*devices: str, size: int | None = None, options: tuple[str, ...] = ()) -> Iterator[Group]:
    """A group over these devices (each as if it had `size` bytes). It and all in it are removed at the end, whatever the test has left."""
    group = Group(unique("fvdvg"), list(devices))
    for device in devices:
        make_physical(device, size)
    run("vgcreate", "--yes", *options, group.name, *devices)
    try:
        yield group
    finally:
        settle()
        # A test may have left devices suspended, and no lvm command ends on those.
        words = ["dmsetup", "info", "--columns", "--noheadings", "-o", "name", "-S", f"suspended=1 && vg_name={group.name}"]
        for name in run(*words).splitlines():
            if name.strip() != "No devices found":
                run("dmsetup", "resume", name.strip())
        run("vgremove", "--yes", "--force", "--force", group.name)
        run("pvremove", "--yes", "--force", "--force", *group.devices)
        settle()


# --- fvd as a process --------------------------------------------------------------------------------------------------------------


@dataclass
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        answer = json.loads(self.out)
        assert isinstance(answer, dict)
        return answer


def fvd_lv(*words: object, code: int = 0) -> Done:
    """Runs the command, which is expected to end with `code`."""
    ended = subprocess.run([*FVD_LV, *map(str, words)], capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False)
    what = f"fvd-lv {' '.join(map(str, words))}"
    assert ended.returncode == code, f"{what} ended with {ended.returncode}, not {code}:\n{ended.stdout}\n{ended.stderr}"
    assert "Traceback" not in ended.stderr, ended.stderr
    return Done(ended.returncode, ended.stdout, ended.stderr)


@dataclass
class Server:
    """A running `fvd-lv serve`. `said()` is what it has put on stderr."""

    process: subprocess.Popen[str]
    uri: str
    socket: Path
    log: Path

    def said(self) -> str:
        return self.log.read_text()

    def stop(self) -> None:
        """A clean end."""
        self.process.terminate()
        code = self.process.wait(READY_SECONDS)
        assert code == 0, f"the server ended with {code}: {self.said()}"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(READY_SECONDS)


@contextlib.contextmanager
def served(volume: str, *options: str, folder: Path) -> Iterator[Server]:
    """`fvd-lv serve` of a volume as a process of its own, ready for clients; ended at the latest with the block."""
    name = unique("serve")
    socket, log = folder / f"{name}.sock", folder / f"{name}.log"
    with log.open("w") as stderr:
        words = [*FVD_LV, "serve", volume, "--socket", str(socket), *options]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=stderr, text=True)
    assert process.stdout is not None
    with process.stdout:
        uri = process.stdout.readline().strip()
    if not uri:
        raise AssertionError(f"the server ended with {process.wait(READY_SECONDS)}: {log.read_text()}")
    server = Server(process, uri, socket, log)
    try:
        yield server
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(READY_SECONDS)
            except subprocess.TimeoutExpired:
                server.kill()


class NbdDisk:
    """A client's view of a served disk, with the methods of fvd.Disk. Errors are libnbd's."""

    PIECE_BYTES = 8 * MIB

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._free: queue.SimpleQueue[nbd.NBD] = queue.SimpleQueue()

    def pread(self, offset: int, length: int) -> bytes:
        with self._connection() as nbd_handle:
            pieces = range(offset, offset + length, self.PIECE_BYTES)
            return b"".join(nbd_handle.pread(min(self.PIECE_BYTES, offset + length - at), at) for at in pieces)

    def pwrite(self, offset: int, data: bytes, *, durable: bool = False) -> int:
        with self._connection() as nbd_handle:
            nbd_handle.pwrite(data, offset, nbd.CMD_FLAG_FUA if durable else 0)
        return len(data)

    def trim(self, offset: int, length: int) -> None:
        with self._connection() as nbd_handle:
            nbd_handle.trim(length, offset)

    def flush(self) -> None:
        with self._connection() as nbd_handle:
            nbd_handle.flush()

    def close(self) -> None:
        """Hangs up without a word: the server may be dead."""
        while not self._free.empty():
            self._free.get()

    @contextlib.contextmanager
    def _connection(self) -> Iterator[nbd.NBD]:
        """One that no other thread uses: a handle does one thing at a time."""
        try:
            nbd_handle = self._free.get_nowait()
        except queue.Empty:
            nbd_handle = nbd.NBD()
            nbd_handle.connect_uri(self._uri)
        try:
            yield nbd_handle
        finally:
            self._free.put(nbd_handle)
