# SPDX-License-Identifier: Apache-2.0
"""Many disks behind one server's vhost-user sockets, and what a server of an idle disk holds in memory. Parts of the suite `guest`."""

from __future__ import annotations

import contextlib
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fronts import ask
from large_disks import MEMORY, loop_over, need_memory
from machine import CannotMeasure, server
from peers import run as prepared
from peers_guest import FVD_COMMAND, QEMU, qemu_command, vhost_command
from scale import DISK_METADATA_BYTES, full_disk

MIB, GIB = 1 << 20, 1 << 30
TOTAL_DEPTH = 64  # of all disks together
IDLE_DISK_BYTES, IDLE_DEVICE_BYTES = 100 * GIB, 6 * GIB
IDLE_SECONDS = 3.0  # what a server does after its start is done by then


# --- Many disks ------------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def served_together(devices: Sequence[str], folder: Path) -> Iterator[tuple[list[Path], int]]:
    """One process that serves these disks: their sockets, and its number."""
    folder.mkdir()
    sockets = [folder / f"{Path(device).name}.sock" for device in devices]
    with server(vhost_command(list(devices), folder if len(devices) > 1 else sockets[0]), sockets[-1]) as process:
        if missing := [path.name for path in sockets if not path.exists()]:
            raise CannotMeasure(f"fvd does not serve {', '.join(missing)} in {folder}")
        yield sockets, process.pid


def many_disks(numbers: Sequence[int], total_bytes: int, sides: Sequence[str], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Groups of disks that hold as much together, under as many requests."""
    need_memory(len(numbers) * total_bytes + sum(numbers) * DISK_METADATA_BYTES)
    samples: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fvd-bench-", dir=MEMORY)))
        groups = []
        for count in numbers:
            devices = [stack.enter_context(full_disk(folder / f"{count}-{at}", total_bytes // count)) for at in range(count)]
            groups.append((count, *stack.enter_context(served_together(devices, folder / f"{count}"))))
        for number in range(rounds):
            for side in sides:
                for count, sockets, pid in groups if number % 2 == 0 else reversed(groups):
                    seen = ask(sockets, [pid], seconds=seconds, depth=TOTAL_DEPTH // count, **{side: 1})
                    samples.append({"round": number, "disks": count, "side": side, **seen})
    return samples


# --- An idle disk ----------------------------------------------------------------------------------------------------------------------


def session_of(leader: int) -> list[int]:
    """The processes that a server, which leads a session, has begun; and itself."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rsplit(")", 1)[1].split()[3]) == leader:
                found.append(int(path.parent.name))
    return found


def pss_bytes(pid: int) -> int:
    """A process's memory, with its part of what it shares."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) << 10


def idle_commands(device: str, socket: Path) -> dict[str, list[list[str]]]:
    """By what is measured: what prepares it, and what serves it."""
    size = str(IDLE_DISK_BYTES)
    provision = [*FVD_COMMAND, "provision", device, "--size", size, "--force"]
    create = ["qemu-img", "create", "-q", "-f", "qcow2", device, size]
    nodes = (f"driver=host_device,filename={device},cache.direct=on,aio=io_uring,node-name=file", "driver=qcow2,node-name=disk,file=file")
    return {
        "fvd, vhost-user": [provision, vhost_command([device], socket)],
        "fvd, NBD": [provision, [*FVD_COMMAND, "serve", device, "--socket", str(socket)]],
        "qcow2, NBD (qemu-nbd)": [create, ["qemu-nbd", "--persistent", "--cache=none", "--format=qcow2", f"--socket={socket}", device]],
        "qcow2, vhost-user": [create, qemu_command(socket, *nodes)],
    }


def idle_memory(rounds: int) -> list[dict[str, Any]]:
    """Nobody asks for anything, and nobody ever has."""
    samples: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="fvd-bench-", dir=MEMORY) as name:
        storage = Path(name) / "storage"
        for number in range(rounds):
            for what in idle_commands("", storage):
                with storage.open("wb") as file:
                    file.truncate(IDLE_DEVICE_BYTES)
                socket = Path(name) / "idle.sock"
                socket.unlink(missing_ok=True)
                with loop_over(storage) as device:
                    prepare, serve = idle_commands(device, socket)[what]
                    prepared(*prepare)
                    with server(serve, socket, signal.SIGKILL if serve[0] == QEMU else signal.SIGTERM) as process:
                        time.sleep(IDLE_SECONDS)
                        pids = session_of(process.pid)
                        samples.append({"round": number, "server": what, "processes": len(pids), "pss_bytes": sum(map(pss_bytes, pids))})
    return samples
