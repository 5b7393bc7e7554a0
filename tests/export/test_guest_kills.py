# SPDX-License-Identifier: Apache-2.0
"""kill -9 of a server under a guest: QEMU's NBD client connects again and sends again what had no answer, and nobody sends anything else.

The guest is `tests/export/guest.c`, a virtio-blk driver, in front of qemu-storage-daemon. It never hears of the kills, and most of it never
flushes. At the end every write, trim and write-zeroes that it was ever told is done must be there, read through yet another server: the
process died, the host lived on.
"""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import pytest
from fvd_server import FvdServer
from killed_disks import provision
from loops import run
from qemu_running import storage_daemon

import fvd
from fvd.sim._base import base_content

pytestmark = pytest.mark.release_only

KIB, MIB = 1 << 10, 1 << 20
SECTOR_BYTES = 512
PROGRAM = Path(__file__).parent / "guest.c"
KILLS = 3  # each is followed by a second in which QEMU waits
RECONNECT_SECONDS = 60  # longer than any start of a server
PATIENCE_SECONDS = 180
ZEROS = 1


@dataclass(frozen=True)
class Case:
    """A disk and what the guest does to it."""

    name: str
    cache: str
    flavour: str
    size: int = 64 * MIB
    block: int = 64 * KIB
    chunk: int = MIB
    base_bytes: int = 0
    layout: str = "compact"
    serving: tuple[str, ...] = ()
    runs: int = 5  # in the long run

    @property
    def requests(self) -> int:
        return 15_000 if self.flavour == "first" else 6_000

    @property
    def trim_bytes(self) -> int:
        return self.chunk if self.base_bytes else self.block


SHORT = (
    Case("none", "none", "first", size=128 * MIB, runs=20),
    Case("writeback-mixed", "writeback", "mixed", block=4 * KIB, chunk=64 * KIB, runs=20),
    Case("none-mixed-base", "none", "mixed", block=16 * KIB, chunk=64 * KIB, base_bytes=40 * MIB + 12345, runs=20),
    Case("writeback-flushes-base", "writeback", "flushes", base_bytes=64 * MIB),
)
LONG = (
    *SHORT,
    Case("writeback", "writeback", "first", size=128 * MIB, runs=20),
    Case("none-base", "none", "first", size=256 * MIB, base_bytes=256 * MIB, block=16 * KIB),
    Case("none-mixed", "none", "mixed", block=4 * KIB, chunk=64 * KIB),
    Case("writeback-mixed-base", "writeback", "mixed", block=16 * KIB, chunk=64 * KIB, base_bytes=40 * MIB + 12345),
    Case("none-flushes", "none", "flushes", block=16 * KIB),
    Case("none-copies-base", "none", "flushes", base_bytes=64 * MIB, serving=("--copy-on-read", "on", "--prefetch", "on")),
    Case("none-zeroed", "none", "mixed", serving=("--zero-chunks",)),
    Case("none-raw", "none", "mixed", layout="raw", block=16 * KIB),
    Case("unsafe-mixed", "unsafe", "mixed", block=4 * KIB, chunk=64 * KIB),
)


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled driver."""
    program = tmp_path_factory.mktemp("guest") / "guest"
    try:
        run("gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", program, PROGRAM)
    except FileNotFoundError:
        pytest.skip("gcc is not installed")
    return program


def lost_sectors(case: Case, folder: Path, image: Path) -> tuple[int, int]:
    """Sectors that the guest wrote, trimmed or zeroed, and how many of all do not hold what they must."""
    state = np.fromfile(folder / "state", "<u4").astype(np.uint64)
    words = np.memmap(image, "<u8", mode="r").reshape(-1, SECTOR_BYTES // 8)
    assert len(state) == len(words) == case.size // SECTOR_BYTES
    expected = np.where(state == ZEROS, 0, (np.arange(len(state), dtype=np.uint64) << np.uint64(32)) | state)
    good = (words == expected[:, None]).all(axis=1)
    untouched = state == 0
    first = np.zeros(case.size, np.uint8)
    if case.base_bytes:
        first[: case.base_bytes] = np.frombuffer(base_content(case.base_bytes, 0, case.base_bytes), np.uint8)
    good[untouched] = (first.view("<u8").reshape(words.shape)[untouched] == words[untouched]).all(axis=1)
    return int((~untouched).sum()), int((~good).sum())


def play(case: Case, guest: Path, folder: Path, seed: int, between: Callable[[], None] = lambda: None) -> str:
    """One disk under one guest, whose server is killed; returns what was done, for people. Fails if anything is lost.

    `between`: called after each kill, before the next server.
    """
    rng = Random(seed)
    volume = provision(case, folder, case.size, grow_step=8 * MIB, journal_size=256 * KIB)
    began = time.monotonic()
    with FvdServer(folder, volume, "--cache", case.cache, *case.serving) as server:
        server.start()
        with storage_daemon(folder, "--object", "iothread,id=thread", dies=True) as qmp:
            address = {"type": "unix", "path": str(server.socket)}
            options = {"node-name": "disk", "server": address, "reconnect-delay": RECONNECT_SECONDS, "discard": "unmap"}
            qmp.do("blockdev-add", driver="nbd", **options)
            place = {"type": "unix", "path": str(folder / "guest.sock")}
            words = {"node-name": "disk", "addr": place, "iothread": "thread"}
            qmp.do("block-export-add", type="vhost-user-blk", id="out", writable=True, **words)
            command = [guest, folder / "guest.sock", case.requests, seed, case.flavour, case.trim_bytes // SECTOR_BYTES, folder / "state"]
            kills = sorted(rng.randrange(case.requests) for _ in range(KILLS))
            with (folder / "said").open("w+") as said:
                with subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=said, text=True) as driver:
                    patience = threading.Timer(PATIENCE_SECONDS, driver.kill)
                    patience.start()
                    assert driver.stdout is not None
                    told = ""
                    for told in driver.stdout:  # to its end
                        if kills and told.endswith("answered\n") and int(told.split()[0]) >= kills[0]:
                            kills.pop(0)
                            server.kill()
                            between()
                            server.start()
                    patience.cancel()
                said.seek(0)
                assert driver.returncode == 0, f"seed {seed}: the guest said: {said.read()}"
            server.kill()  # before QEMU, which flushes at its end
            between()
        server.start()
        run("qemu-img", "convert", "-f", "raw", "-O", "raw", f"nbd+unix:///?socket={server.socket}", folder / "image")
        server.stop()
    touched, lost = lost_sectors(case, folder, folder / "image")
    report = fvd.check(volume)
    assert not report.errors, f"seed {seed}: {report.errors}"
    assert touched > 0
    assert lost == 0, f"seed {seed}: {lost} of {touched} sectors do not hold what the guest was told they do; {told.strip()}"
    (folder / "image").unlink()
    (folder / "disk").unlink()
    return f"{case.name}: seed {seed}: {touched} sectors, none lost; {told.strip()}; {KILLS + 1} kills, {time.monotonic() - began:.1f} s"


@pytest.mark.slow
@pytest.mark.parametrize("case", SHORT, ids=lambda case: case.name)
def test_a_guest_loses_nothing(case: Case, guest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seed = time.time_ns() // 1000 % (1 << 40)
    told = play(case, guest, tmp_path, seed)
    with capsys.disabled():
        print(f"\n  {told}")


@pytest.mark.slow
def test_without_the_log_it_loses(guest: Path, tmp_path: Path, pending_dir: Path) -> None:
    """The judge can fail: if what the dead server's log held is thrown away, acknowledged writes are gone."""
    case = Case("none", "none", "first", size=128 * MIB, serving=("--discard-pending",))
    with pytest.raises(AssertionError, match="sectors do not hold what the guest was told they do"):
        play(case, guest, tmp_path, 1, between=lambda: shutil.rmtree(pending_dir))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("case", LONG, ids=lambda case: case.name)
def test_a_guest_loses_nothing_in_many_runs(case: Case, guest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = time.time_ns() // 1000 % (1 << 40)
    for seed in range(first, first + case.runs):
        folder = tmp_path / str(seed)
        folder.mkdir()
        told = play(case, guest, folder, seed)
        with capsys.disabled():
            print(f"\n  {told}")
