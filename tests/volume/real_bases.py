# SPDX-License-Identifier: Apache-2.0
"""Bases as they are in use: a file, a device, images of QEMU's, and NBD servers, each with the same contents. A test may take them away.

What a machine cannot make skips the test, with the reason.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random

import pytest
from loops import loop_device, run
from nbd_base import Nbdkit, until

IMAGES = ("qcow2", "qed", "vmdk", "vdi", "vhdx", "vpc", "parallels")
KINDS = ("raw", "device", "nbdkit", "qemu-nbd", *IMAGES)
_PIECE_BYTES = 48 << 10  # no multiple or part of most block sizes
_OPTIONS = {"vpc": ("-o", "force_size=on")}  # or the size becomes one of cylinders


def contents(seed: int, size_bytes: int) -> bytes:
    """Data, zeros, and data with zeros in it, in turn."""
    rng = Random(seed)
    pieces = []
    for start in range(0, size_bytes, _PIECE_BYTES):
        length = min(_PIECE_BYTES, size_bytes - start)
        kind = rng.random()
        if kind < 0.3:
            pieces.append(bytes(length))
        elif kind < 0.5:
            pieces.append((rng.randbytes(length // 2) + bytes(length))[:length])
        else:
            pieces.append(rng.randbytes(length))
    return b"".join(pieces)


def write_sparse(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        for start in range(0, len(data), 4096):
            if any(data[start : start + 4096]):
                file.seek(start)
                file.write(data[start : start + 4096])
        file.truncate(len(data))


class RealBase:
    """A base of one kind. `name` and `format` are what a provision is told."""

    def __init__(self, name: str | Path, stated_format: str | None, away: ExitStack) -> None:
        self.name = name
        self.format = stated_format
        self._away = away

    def remove(self) -> None:
        """It is gone: file deleted, device detached, server ended. Again is fine."""
        self._away.close()


@contextmanager
def real_base(folder: Path, kind: str, data: bytes) -> Iterator[RealBase]:
    """A base that shows `data`; some kinds show zeros behind it."""
    raw = folder / "base.raw"
    write_sparse(raw, data)
    with ExitStack() as away:
        away.callback(raw.unlink, missing_ok=True)
        if kind == "raw":
            yield RealBase(raw, "raw", away)
        elif kind == "device":
            yield RealBase(away.enter_context(loop_device(raw, "--read-only")), "raw", away)
        elif kind == "nbdkit":
            # Not the quickest: what comes meanwhile is to meet the copies.
            server = Nbdkit(folder, "--filter=delay", "file", raw, "rdelay=5ms")
            away.callback(server.kill)
            yield RealBase(server.uri, None, away)
        elif kind == "qemu-nbd":
            yield RealBase(away.enter_context(_qemu_nbd(folder, raw)), None, away)
        else:
            image = folder / f"base.{kind}"
            try:
                run("qemu-img", "convert", "-f", "raw", "-O", kind, *_OPTIONS.get(kind, ()), raw, image)
            except (AssertionError, FileNotFoundError) as error:
                pytest.skip(f"no {kind} is made here: {error}")
            away.callback(image.unlink, missing_ok=True)
            yield RealBase(image, kind, away)


@contextmanager
def _qemu_nbd(folder: Path, raw: Path) -> Iterator[str]:
    if shutil.which("qemu-nbd") is None:
        pytest.skip("no qemu-nbd")
    socket = folder / "qemu-nbd"
    words = ["qemu-nbd", "--read-only", "--persistent", "--shared=8", "-f", "raw", "-k", str(socket), str(raw)]
    with subprocess.Popen(words) as server:
        try:
            until(socket.exists)
            yield f"nbd+unix:///?socket={socket}"
        finally:
            server.send_signal(signal.SIGKILL)
            server.wait(10)
            socket.unlink(missing_ok=True)
