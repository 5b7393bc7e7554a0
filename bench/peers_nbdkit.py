# SPDX-License-Identifier: Apache-2.0
"""nbdkit's file plugin. It knows no direct I/O: reads may come from memory, and what it has written the kernel writes later."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from machine import server
from peers import Peer, Place, Served, disk_device

CACHED = "through the page cache: what it writes later is not in its CPU time"


def nbdkit(*options: str) -> Callable[[Place], AbstractContextManager[Served]]:
    """`options`: of the plugin, and of nbdkit."""

    @contextlib.contextmanager
    def serve(place: Place) -> Iterator[Served]:
        with disk_device(place, 0) as device:
            command = ["nbdkit", "--foreground", "--exit-with-parent", "--unix", str(place.socket), "file", device, *options]
            with server(command, place.socket) as process:
                yield Served(place.socket, (process.pid,), device)

    return serve


def peers() -> list[Peer]:
    return [
        Peer("nbdkit file", "nbdkit", nbdkit(), ("nbdkit",), note=CACHED),
        Peer(
            "nbdkit file, tuned",
            "nbdkit",
            nbdkit("fadvise=random", "--threads=4"),
            ("nbdkit",),
            note=f"fadvise=random, 4 threads; {CACHED}",
        ),
        Peer("nbdkit file, cache=none", "nbdkit", nbdkit("fadvise=random", "cache=none"), ("nbdkit",), note="fadvise=random; drops pages"),
    ]
