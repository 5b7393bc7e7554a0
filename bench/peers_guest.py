# SPDX-License-Identifier: Apache-2.0
"""What a guest's virtio-blk can stand in front of: vhost-user servers, fvd, QEMU's storage daemon and the limit, each with several queues.

QEMU's is given what it is fastest with: an iothread, no page cache, and a choice of how it asks the kernel; each choice is a peer.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from machine import compiled, server
from peers import Peer, Place, Served, disk_device, run

QUEUES = 4
FVD, TODAY, RAW, QCOW2, LIMIT = "fvd", "QEMU's NBD client, fvd", "qemu raw", "qcow2", "ring server"
QEMU = "qemu-storage-daemon"
WAYS = ("io_uring", "native", "threads")  # of QEMU to ask the kernel
FVD_COMMAND = [sys.executable, "-m", "fvd.cli"]

Serve = Callable[[Place], AbstractContextManager[Served]]


def qemu_name(kind: str, way: str) -> str:
    return f"{kind}, aio={way}"


def qemu_command(socket: Path, *nodes: str) -> list[str]:
    """qemu-storage-daemon that serves the node `disk`."""
    command = [QEMU, "--object", "iothread,id=thread"]
    for node in nodes:
        command += ["--blockdev", node]
    export = f"type=vhost-user-blk,id=out,node-name=disk,writable=on,iothread=thread,num-queues={QUEUES}"
    return [*command, "--export", f"{export},addr.type=unix,addr.path={socket}"]


def qemu_server(command: list[str], socket: Path) -> AbstractContextManager[subprocess.Popen[bytes]]:
    """Killed in the end: with an iothread and a front end that has left, version 7.2 does not end at SIGTERM."""
    return server(command, socket, signal.SIGKILL)


def qemu(kind: str, way: str) -> Serve:
    @contextlib.contextmanager
    def serve(place: Place) -> Iterator[Served]:
        with contextlib.ExitStack() as stack:
            device = stack.enter_context(disk_device(place, 0) if kind == RAW else disk_device(place))
            below = f"driver=host_device,filename={device},cache.direct=on,aio={way},discard=unmap"
            if kind == RAW:
                nodes = [f"{below},node-name=disk"]
            else:
                base = ["-b", place.base, "-F", "raw"] if place.base else []
                run("qemu-img", "create", "-q", "-f", "qcow2", *base, device, str(place.disk_bytes))
                nodes = [f"{below},node-name=file", "driver=qcow2,node-name=disk,file=file,cache.direct=on,discard=unmap"]
                if place.base:
                    nodes.insert(0, f"driver=host_device,filename={place.base},cache.direct=on,aio={way},read-only=on,node-name=base")
                    nodes[-1] += ",backing=base"
            process = stack.enter_context(qemu_server(qemu_command(place.socket, *nodes), place.socket))
            yield Served(place.socket, (process.pid,), device)

    return serve


@contextlib.contextmanager
def provisioned(place: Place) -> Iterator[str]:
    with disk_device(place) as device:
        base = ["--base", place.base, "--base-format", "raw"] if place.base else []
        run(*FVD_COMMAND, "provision", device, "--size", str(place.disk_bytes), "--force", *base)
        yield device


def vhost_command(devices: list[str], path: Path) -> list[str]:
    return [*FVD_COMMAND, "serve", *devices, "--vhost-user", str(path), "--queues", str(QUEUES)]


@contextlib.contextmanager
def fvd(place: Place) -> Iterator[Served]:
    with provisioned(place) as device, server(vhost_command([device], place.socket), place.socket) as process:
        yield Served(place.socket, (process.pid,), device)


@contextlib.contextmanager
def today(place: Place) -> Iterator[Served]:
    """QEMU's own NBD client, which is what a guest has in front of an NBD server."""
    nbd = place.folder / "nbd.sock"
    node = f"driver=nbd,node-name=disk,server.type=unix,server.path={nbd},discard=unmap"
    with (
        provisioned(place) as device,
        server([*FVD_COMMAND, "serve", device, "--socket", str(nbd)], nbd) as behind,
        qemu_server(qemu_command(place.socket, node), place.socket) as client,
    ):
        yield Served(place.socket, (client.pid, behind.pid), device)


@contextlib.contextmanager
def limit(place: Place) -> Iterator[Served]:
    program = compiled("ring_server.c", "uring")
    with disk_device(place, 0) as device, server([program, str(place.socket), device, str(QUEUES)], place.socket) as process:
        yield Served(place.socket, (process.pid,), device)


def guest_peers() -> dict[str, Peer]:
    """By name; of QEMU's own one for each way."""
    qemu_programs = (QEMU, "qemu-img")
    peers = [
        Peer(FVD, "fvd", fvd, over_base=True),
        Peer(TODAY, "fvd", today, qemu_programs, over_base=True, note="both processes count"),
        *(
            Peer(qemu_name(kind, way), "qemu", qemu(kind, way), qemu_programs, over_base=kind == QCOW2)
            for kind in (RAW, QCOW2)
            for way in WAYS
        ),
        Peer(LIMIT, "limit", limit, ("gcc",), note="no mapping; each request is one operation of the device, of memory that is registered"),
    ]
    return {peer.name: peer for peer in peers}
