# SPDX-License-Identifier: Apache-2.0
"""A raw file on a host file system on the device: what a file system costs where fvd has none. Served as the raw device is."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Literal

from machine import server
from peers import Peer, Place, Served, mounted
from peers_limits import pass_through_command
from peers_qemu import PROGRAMS, TUNED, qemu_nbd

KINDS: tuple[Literal["ext4", "xfs"], ...] = ("ext4", "xfs")
NAMES = {"ext4": "ext4", "xfs": "XFS"}


def raw_file(kind: Literal["ext4", "xfs"], preallocated: bool, by_qemu: bool = False) -> Callable[[Place], AbstractContextManager[Served]]:
    @contextlib.contextmanager
    def serve(place: Place) -> Iterator[Served]:
        with mounted(place, kind) as (device, folder):
            path = str(folder / "disk.raw")
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                if preallocated:
                    os.posix_fallocate(descriptor, 0, place.disk_bytes)
                else:
                    os.ftruncate(descriptor, place.disk_bytes)
            finally:
                os.close(descriptor)
            command = qemu_nbd(place, path, "--format=raw", *TUNED) if by_qemu else pass_through_command(path, place)
            with server(command, place.socket) as process:
                yield Served(place.socket, (process.pid,), device)

    return serve


def peers() -> list[Peer]:
    found = []
    for kind in KINDS:
        for preallocated in (False, True):
            name = f"raw on {NAMES[kind]}, {'preallocated' if preallocated else 'sparse'}"
            note = "served by the pass-through server"
            found.append(Peer(name, "file system", raw_file(kind, preallocated), (f"mkfs.{kind}", "mount"), note=note))
        name = f"qemu raw on {NAMES[kind]}, preallocated"
        programs = (f"mkfs.{kind}", "mount", *PROGRAMS)
        found.append(Peer(name, "file system", raw_file(kind, True, by_qemu=True), programs, note="cache=none, aio=io_uring"))
    return found
