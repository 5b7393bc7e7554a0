# SPDX-License-Identifier: Apache-2.0
"""qemu-nbd with each of its formats. Formats that lie on no block device lie on XFS on one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from machine import server
from peers import Peer, Place, Served, disk_device, mounted, run

PROGRAMS = ("qemu-nbd", "qemu-img")
TUNED = ("--cache=none", "--aio=io_uring", "--discard=unmap")
ON_XFS = "on XFS: the format lies on no block device"


def qemu_nbd(place: Place, image: str, *words: str) -> list[str]:
    return ["qemu-nbd", "--persistent", *words, f"--socket={place.socket}", image]


def qemu(
    kind: str, *options: str, tuned: bool = True, runtime: str = "", on_xfs: bool = False
) -> Callable[..., AbstractContextManager[Served]]:
    """`options`: of qemu-img create. `runtime`: what else the driver is told when the image is opened."""

    @contextlib.contextmanager
    def serve(place: Place) -> Iterator[Served]:
        with contextlib.ExitStack() as stack:
            if on_xfs:
                device, folder = stack.enter_context(mounted(place, "xfs"))
                image = str(folder / f"disk.{kind}")
            else:
                image = device = stack.enter_context(disk_device(place, 0) if kind == "raw" else disk_device(place))
            if kind != "raw":
                base = ["-b", place.base, "-F", "raw"] if place.base else []
                run("qemu-img", "create", "-q", "-f", kind, *base, *(f"-o{option}" for option in options), image, str(place.disk_bytes))
            words = list(TUNED) if tuned else []
            if runtime:
                command = qemu_nbd(place, f"driver={kind},file.filename={image},{runtime}", "--image-opts", *words)
            else:
                command = qemu_nbd(place, image, f"--format={kind}", *words)
            process = stack.enter_context(server(command, place.socket))
            yield Served(place.socket, (process.pid,), device)

    return serve


def peers() -> list[Peer]:
    cached = "through the page cache: what it writes later is not in its CPU time"

    def peer(name: str, serve: Callable[..., AbstractContextManager[Served]], over_base: bool = False, note: str = "") -> Peer:
        return Peer(name, "qemu", serve, PROGRAMS, over_base, note=note)

    tuned = "cache=none, aio=io_uring, discard=unmap"
    return [
        peer("qemu raw", qemu("raw"), note=tuned),
        peer("qemu raw, default", qemu("raw", tuned=False), note=cached),
        peer("qcow2", qemu("qcow2"), over_base=True, note=f"clusters of 64 KiB; {tuned}"),
        peer("qcow2, default", qemu("qcow2", tuned=False), over_base=True, note=cached),
        peer("qcow2, extended L2", qemu("qcow2", "extended_l2=on,cluster_size=128k"), over_base=True, note=f"clusters of 128 KiB; {tuned}"),
        peer("qcow2, preallocated", qemu("qcow2", "preallocation=metadata"), note=f"preallocation=metadata; {tuned}"),
        peer("qcow2, larger L2 cache", qemu("qcow2", runtime="l2-cache-size=128M"), over_base=True, note=f"128 MiB; {tuned}"),
        peer("qed", qemu("qed", on_xfs=True), over_base=True, note=ON_XFS),
        peer("vdi", qemu("vdi"), note=tuned),
        peer("vmdk", qemu("vmdk", on_xfs=True), note=ON_XFS),
        peer("vhdx", qemu("vhdx", on_xfs=True), note=ON_XFS),
    ]
