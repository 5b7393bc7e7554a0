# SPDX-License-Identifier: Apache-2.0
"""Disks over a slow base, served side by side: an fvd disk, and a qcow2 overlay in qemu-storage-daemon. Both answer the same questions.

The base is nbdkit's pattern plugin, which holds no zeros and takes no space, behind its delay and rate filters. Each disk lies on a loop
device over tmpfs. Knows nothing of what guests do to the disks.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fvd
from machine import CannotMeasure, cpu_seconds, loop_device, need, server

MIB = 1 << 20
READ_DELAY = "5ms"
RATE_BYTES = 50_000_000  # a second
BURST_SECONDS = 0.1  # what the base's rate limit lets through at once after a rest: small, so that it is no part of the result
METADATA_BYTES = 64 * MIB  # of a device, besides the disk's own size


@contextlib.contextmanager
def slow_base(folder: Path, size_bytes: int) -> Iterator[Path]:
    """A server of a base; its socket."""
    need("nbdkit")
    path = folder / "base.sock"
    command = ["nbdkit", "--foreground", "--exit-with-parent", "--unix", str(path), "--filter=delay", "--filter=rate", "pattern"]
    command += [f"size={size_bytes}", f"rdelay={READ_DELAY}", f"rate={RATE_BYTES * 8}", f"burstiness={BURST_SECONDS}"]
    with server(command, path):
        yield path


class Disk:
    """A served disk over a base. `device`: what it lies on."""

    def __init__(self, socket_path: Path, pid: int, device: str) -> None:
        self.socket = socket_path
        self._pid = pid
        self._sectors = Path("/sys/block") / Path(device).name / "stat"

    def cpu_seconds(self) -> float:
        """Of the serving process, so far."""
        return cpu_seconds(self._pid)

    def written_bytes(self) -> int:
        """To the storage, data and metadata, so far."""
        return int(self._sectors.read_text().split()[6]) * 512

    def metadata_writes(self) -> int | None:
        """So far; None: it does not tell."""
        return None

    def fill_begins(self) -> None:
        """From now on the base is copied in the background."""
        raise NotImplementedError

    def copied_bytes(self, own_bytes: int) -> int:
        """Of the base beyond its first `own_bytes`, in the background, so far."""
        raise NotImplementedError


class FvdDisk(Disk):
    def __init__(self, socket_path: Path, pid: int, device: str) -> None:
        super().__init__(socket_path, pid, device)
        self._volume = device

    def metadata_writes(self) -> int | None:
        statistics = fvd.info(self._volume).statistics
        assert statistics is not None
        return statistics["journal_writes"] + statistics["map_writes"] + statistics["checkpoints"]

    def fill_begins(self) -> None:
        fvd.prefetch_start(self._volume)

    def copied_bytes(self, own_bytes: int) -> int:
        return fvd.prefetch_status(self._volume).copied_bytes - own_bytes


class QemuDisk(Disk):
    def __init__(self, socket_path: Path, pid: int, device: str, monitor: Path) -> None:
        super().__init__(socket_path, pid, device)
        self._monitor = socket.socket(socket.AF_UNIX)
        self._monitor.connect(str(monitor))
        self._lines = self._monitor.makefile("r")
        self._lines.readline()
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: Any) -> Any:
        self._monitor.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while True:
            answer = json.loads(self._lines.readline())
            if "error" in answer:
                raise CannotMeasure(f"qemu-storage-daemon: {command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def fill_begins(self) -> None:
        self.ask("block-stream", **{"job-id": "stream", "device": "disk"})

    def copied_bytes(self, own_bytes: int) -> int:
        """Its job counts places that it has passed, copied or not: the guest's own, at the disk's begin, are none."""
        jobs = self.ask("query-block-jobs")
        if not jobs:
            raise CannotMeasure("qemu-storage-daemon: block-stream has ended before its guest has")
        return max(0, int(jobs[0]["offset"]) - own_bytes)

    def close(self) -> None:
        self._lines.close()
        self._monitor.close()


@contextlib.contextmanager
def fvd_disk(folder: Path, base: Path, size_bytes: int, copy_on_read: bool) -> Iterator[FvdDisk]:
    path = folder / "disk.sock"
    with loop_device(size_bytes + METADATA_BYTES) as device:
        fvd.provision(device, size=size_bytes, base=f"nbd+unix:///?socket={base}", copy_on_read=copy_on_read, force=True)
        with server([sys.executable, "-m", "fvd.cli", "serve", device, "--socket", str(path)], path) as process:
            yield FvdDisk(path, process.pid, device)


@contextlib.contextmanager
def qemu_disk(folder: Path, base: Path, size_bytes: int, copy_on_read: bool) -> Iterator[QemuDisk]:
    need("qemu-storage-daemon", "qemu-img")
    path, monitor = folder / "qemu.sock", folder / "qmp.sock"
    with loop_device(size_bytes + METADATA_BYTES) as device:
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", device, str(size_bytes)], check=True)
        command = ["qemu-storage-daemon"]
        nodes = [
            f"driver=nbd,node-name=base,read-only=on,server.type=unix,server.path={base}",
            f"driver=host_device,node-name=file,filename={device},cache.direct=on,aio=io_uring,discard=unmap",
            "driver=qcow2,node-name=disk,file=file,backing=base,cache.direct=on",
        ]
        if copy_on_read:
            nodes.append("driver=copy-on-read,node-name=top,file=disk")
        for node in nodes:
            command += ["--blockdev", node]
        command += ["--nbd-server", f"addr.type=unix,addr.path={path}"]
        command += ["--export", f"type=nbd,id=export,node-name={'top' if copy_on_read else 'disk'},name=,writable=on"]
        command += ["--chardev", f"socket,id=monitor,path={monitor},server=on,wait=off", "--monitor", "chardev=monitor"]
        with server(command, path) as process:
            disk = QemuDisk(path, process.pid, device, monitor)
            try:
                yield disk
            finally:
                disk.close()


MAKERS = {"fvd": fvd_disk, "qemu": qemu_disk}


@contextlib.contextmanager
def served_disk(kind: str, base_bytes: int, copy_on_read: bool = False) -> Iterator[Disk]:
    """A fresh disk of a kind over a fresh base of the same size, served."""
    with tempfile.TemporaryDirectory(prefix="fvd-bench-") as name:
        folder = Path(name)
        with slow_base(folder, base_bytes) as base, MAKERS[kind](folder, base, base_bytes, copy_on_read) as disk:
            yield disk
