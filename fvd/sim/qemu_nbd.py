# SPDX-License-Identifier: Apache-2.0
"""The tester of other servers against a qemu-nbd of its own, which it stops, kills and starts again over a temporary image."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

from fvd.errors import InvalidArgument, NotFound, Timeout
from fvd.sim._base import base_content
from fvd.sim._oracle import Violation
from fvd.sim._rng import Rng
from fvd.sim.foreign import ANSWER_SECONDS, CONNECTIONS, ForeignPlayer, ForeignReport, Progress, _libnbd

START_SECONDS = 30
_SOCKET_PATH_BYTES = 107

_BACKED = ("qcow2", "qed", "qcow")  # formats that show a base where nothing was written
_CHECK_CLEAN, _CHECK_LEAKS, _CHECK_UNKNOWN = 0, 3, 63  # what `qemu-img check` ends with


class _QemuNbd:
    """A temporary image, and the qemu-nbd that serves it."""

    def __init__(self, image_format: str, size_bytes: int, base: bool, discard: bool, directory: Path) -> None:
        for program in ("qemu-img", "qemu-nbd"):
            if shutil.which(program) is None:
                raise NotFound(f"{program} is not installed; install the package qemu-utils")
        self._format = image_format
        self._killed = False
        self._discard = "unmap" if discard else "ignore"
        self._image = directory / f"image.{image_format}"
        self._socket = directory / "qemu-nbd.sock"
        if len(bytes(self._socket)) > _SOCKET_PATH_BYTES:
            raise InvalidArgument(f"{self._socket}: too long for a unix socket; name a directory with a shorter path")
        self._process: subprocess.Popen[str] | None = None
        self.uri = f"nbd+unix:///?socket={self._socket}"
        backing: list[str] = []
        if base:
            if image_format not in (*_BACKED, "raw"):
                raise InvalidArgument(f"{image_format} images have no base; leave it out, or choose one of {', '.join(_BACKED)}, raw")
            below = directory / "base.raw"
            below.write_bytes(base_content(size_bytes, 0, size_bytes))
            if image_format == "raw":  # no raw image has a base: it starts as a copy
                shutil.copyfile(below, self._image)
                return
            backing = ["-b", str(below), "-F", "raw"]
        self._image.unlink(missing_ok=True)
        self._qemu_img("create", "-q", "-f", image_format, *backing, str(self._image), str(size_bytes))

    def _qemu_img(self, *words: str, codes: tuple[int, ...] = (0,)) -> str:
        done = subprocess.run(["qemu-img", *words], capture_output=True, text=True, check=False)
        if done.returncode not in codes:
            raise Violation(f"qemu-img {' '.join(words)} ended with {done.returncode}: {done.stdout}{done.stderr}".strip())
        return done.stdout

    def start(self) -> None:
        """Back when it accepts connections."""
        words = [
            "-f",
            self._format,
            "--socket",
            str(self._socket),
            "--persistent",
            f"--shared={CONNECTIONS + 1}",
            f"--discard={self._discard}",
        ]
        self._process = subprocess.Popen(["qemu-nbd", *words, str(self._image)], stderr=subprocess.PIPE, text=True)
        nbd = _libnbd()
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                nbd.NBD().connect_uri(self.uri)
                return
            except nbd.Error as error:
                if self._process.poll() is not None:
                    raise Violation(f"qemu-nbd does not open {self._image}: {self._process.communicate()[1].strip()}") from None
                if time.monotonic() > deadline:
                    raise Timeout(f"qemu-nbd on {self._image} does not listen after {START_SECONDS} s: {error}") from None
                time.sleep(0.005)

    def stop(self) -> None:
        """A clean end, and a whole image."""
        assert self._process is not None
        process, self._process = self._process, None
        process.terminate()
        _, said = process.communicate(timeout=ANSWER_SECONDS)
        if process.returncode:
            raise Violation(f"qemu-nbd on {self._image} ended with {process.returncode}: {said.strip()}")
        self.check()

    def kill(self) -> None:
        """Again is fine."""
        if self._process is not None:
            self._killed = True
            self._process.kill()
            self._process.communicate()
            self._process = None

    def check(self) -> None:
        """Clusters that nothing refers to are no damage where a kill has been; the others are."""
        leaks = (_CHECK_LEAKS,) if self._killed else ()
        self._qemu_img("check", "-f", self._format, str(self._image), codes=(_CHECK_CLEAN, _CHECK_UNKNOWN, *leaks))

    def content(self) -> bytes:
        """What the stopped image holds, by another program than the one that wrote it."""
        copy = self._image.with_suffix(".copy")
        self._qemu_img("convert", "-f", self._format, "-O", "raw", str(self._image), str(copy))
        data = copy.read_bytes()
        copy.unlink()
        return data


def torture_qemu(
    image_format: str,
    *,
    seed: int,
    requests: int,
    rounds: int,
    size_bytes: int,
    base: bool,
    directory: str | Path,
    depth: int = 64,
    discard: bool = False,
    gentle: bool = False,
    progress: Progress | None = None,
) -> ForeignReport:
    """A new image of that format in `directory`, served by qemu-nbd; `requests` are shared out to `rounds` of it.

    A round ends with a clean stop (then everything is there, and `qemu-img` reads the same) or with a kill (everything flushed is there).
    `discard`: qemu-nbd passes trims on to the image; it ignores them unless told otherwise. `gentle`: zeroes and trims are left
    out: QEMU 7.2 shows wrong data in qcow2 images, and ends by an assertion over qed ones, when they meet writes in flight.
    """
    if rounds < 1:
        raise InvalidArgument(f"{rounds} rounds: name at least 1")
    rng = Rng(seed, 1)
    server = _QemuNbd(image_format, size_bytes, base, discard, Path(directory))
    with ForeignPlayer(seed, depth=depth, reach_bytes=size_bytes, gentle=gentle) as player:
        killed = False
        try:
            for number in range(rounds):
                server.start()
                player.connect(server.uri)
                if killed:
                    player.judge_after_crash()
                elif number:
                    player.verify()
                player.play(requests // rounds)
                killed = number < rounds - 1 and rng.random() < 0.5
                if killed:
                    player.wait(rng.random() * 0.003)
                    server.kill()
                    player.take_last_answers()
                    server.check()
                else:
                    player.drain()
                    player.hang_up()
                    server.stop()
                    player.compare(server.content())
                player.report.rounds += 1
                if progress is not None:
                    progress(player.report.total_requests, requests)
        finally:
            server.kill()
        return player.report
