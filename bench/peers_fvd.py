# SPDX-License-Identifier: Apache-2.0
"""fvd as a peer: as it is, with chunks placed over the device, with chunks that the device zeroes, with all storage allocated at first."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from machine import server
from peers import Peer, Place, Served, disk_device, run


def fvd(*options: str, serving: tuple[str, ...] = ()) -> Callable[[Place], AbstractContextManager[Served]]:
    """`options`: of `fvd-lv provision`; `serving`: of `fvd-lv serve`."""

    @contextlib.contextmanager
    def serve(place: Place) -> Iterator[Served]:
        command = [sys.executable, "-m", "fvd.cli"]
        with disk_device(place) as device:
            base = ["--base", place.base] if place.base else []
            run(*command, "provision", device, "--size", str(place.disk_bytes), "--force", *base, *options)
            with server([*command, "serve", device, "--socket", str(place.socket), *serving], place.socket) as process:
                yield Served(place.socket, (process.pid,), device)

    return serve


def has_placement(name: str) -> bool:
    """Whether this fvd can be told to place new chunks so."""
    done = subprocess.run([sys.executable, "-m", "fvd.cli", "provision", "--help"], capture_output=True, text=True, check=False)
    choices = done.stdout.partition("--placement {")[2].partition("}")[0]
    return name in "".join(choices.split()).split(",")


def peers() -> list[Peer]:
    found = [Peer("fvd", "fvd", fvd(), over_base=True)]
    if has_placement("spread"):
        found.append(Peer("fvd, spread", "fvd", fvd("--placement", "spread"), over_base=True, note="new chunks spread over the device"))
    zeroing = fvd(serving=("--zero-chunks",))
    found.append(Peer("fvd, zero chunks", "fvd", zeroing, note="new chunks are zeroed by a device that can"))
    found.append(Peer("fvd, layout raw", "fvd", fvd("--layout", "raw"), over_base=True, note="all storage is allocated at first"))
    return found
