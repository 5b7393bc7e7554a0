# SPDX-License-Identifier: Apache-2.0
"""Clients that stay while their server is killed and comes again: QEMU's, which reconnects by itself, and libnbd's, whose user does it.

What a client must do is to send again what was not answered, and nothing else. What was answered is there, after SIGTERM and after
SIGKILL, in every cache mode, flushed or not.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest
from fvd_server import FvdServer
from qemu_running import export, storage_daemon

import fvd
from fvd.modes import CACHE_MODES
from fvd.sim._oracle import Violation
from fvd.sim.foreign import ForeignPlayer

pytest.importorskip("nbd", reason="python3-libnbd is not installed")
pytestmark = [pytest.mark.release_only, pytest.mark.slow]

KIB, MIB = 1 << 10, 1 << 20
SIZE = 8 * MIB
CACHES = CACHE_MODES
RECONNECT_SECONDS = 60  # longer than any start of a server
QEMU_RESTARTS = 12
LIBNBD_RESTARTS = 25


def provision(folder: Path) -> str:
    name = f"file:{folder / 'disk'}"
    fvd.provision(name, SIZE, block_size=4 * KIB, chunk_size=64 * KIB, journal_size=64 * KIB, grow_step=64 * KIB)
    return name


def qemu_rounds(
    volume: str,
    folder: Path,
    player: ForeignPlayer,
    cache: str,
    restarts: int,
    *,
    cleanly: bool = False,
    between: Callable[[], None] = lambda: None,
    words: tuple[str, ...] = (),
) -> str:
    """The load goes to QEMU's NBD server, over QEMU's block layer and NBD client, to fvd's server, which is killed and started again.

    `between`: called after each kill, before the next server. `words`: more options of the servers.
    """
    rng = Random(player.report.seed)
    began = time.monotonic()
    with FvdServer(folder, volume, "--cache", cache, *words) as server, player:
        server.start()
        with storage_daemon(folder) as qmp:
            address = {"type": "unix", "path": str(server.socket)}
            options = {"node-name": "disk", "server": address, "reconnect-delay": RECONNECT_SECONDS, "discard": "unmap"}
            qmp.do("blockdev-add", driver="nbd", **options)
            player.connect(export(qmp, "disk", folder / "qemu.sock"))
            for _ in range(restarts):
                player.play(rng.randint(1, 300))
                player.wait(rng.random() * 0.004)
                player.outage()
                if cleanly:
                    server.stop()
                else:
                    server.kill()
                between()
                for _ in range(min(20, player.free_depth)):  # while nobody is there: they wait in QEMU
                    player.send_next()
                server.start()
                player.play(50)
                player.drain()
                player.judge_after_crash()
                player.report.rounds += 1
            player.hang_up()
            qmp.do("block-export-del", id="out")
            qmp.do("blockdev-del", **{"node-name": "disk"})
        server.stop()
    report = fvd.check(volume)
    assert not report.errors
    return f"QEMU, cache {cache}: {player.report}; {time.monotonic() - began:.1f} s"


def test_qemu_reconnects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All caches at once: QEMU waits for a second before it tries again."""

    def play(number: int, cache: str) -> str:
        folder = tmp_path / cache
        folder.mkdir()
        player = ForeignPlayer(21 + number, depth=64, every_write_durable=True)
        return qemu_rounds(provision(folder), folder, player, cache, QEMU_RESTARTS)

    with ThreadPoolExecutor() as threads:
        for told in threads.map(play, range(len(CACHES)), CACHES):
            with capsys.disabled():
                print(f"\n  {told}")


def test_a_restart_loses_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SIGTERM, as systemctl restart sends it: everything acknowledged is there again, flushed or not, in every cache mode."""
    player = ForeignPlayer(27, depth=64, every_write_durable=True)
    told = qemu_rounds(provision(tmp_path), tmp_path, player, "none", QEMU_RESTARTS, cleanly=True)
    with capsys.disabled():
        print(f"\n  {told}")


def test_qemu_does_not_send_again_what_was_acknowledged(tmp_path: Path, pending_dir: Path) -> None:
    """Without the log of what a killed server had acknowledged the guest loses: QEMU does not make up for it. The judge can fail."""
    player = ForeignPlayer(24, depth=64, every_write_durable=True)
    with pytest.raises(Violation, match="after the crash"):
        qemu_rounds(
            provision(tmp_path),
            tmp_path,
            player,
            "none",
            40,
            between=lambda: shutil.rmtree(pending_dir),
            words=("--discard-pending",),
        )


@pytest.mark.parametrize("cache", CACHES)
def test_libnbd_connects_again(tmp_path: Path, capsys: pytest.CaptureFixture[str], cache: str) -> None:
    """A handle of libnbd that has lost its server is dead; its user makes another one, and sends again what has no answer."""
    seed = 31 + CACHES.index(cache)
    rng = Random(seed)
    volume = provision(tmp_path)
    player = ForeignPlayer(seed, depth=64, every_write_durable=True)
    began = time.monotonic()
    with FvdServer(tmp_path, volume, "--cache", cache) as server, player:
        player.connect(server.start())
        for _ in range(LIBNBD_RESTARTS):
            player.play(rng.randint(1, 300))
            player.wait(rng.random() * 0.004)
            server.kill()
            unanswered = player.take_last_answers()
            player.connect(server.start())
            player.judge_after_crash()
            for request in unanswered:
                player.send(request)  # with a stamp of its own, so that the first time and the second are told apart
            player.report.rounds += 1
        player.drain()
        player.verify()
        player.hang_up()
        server.stop()
    report = fvd.check(volume)
    assert not report.errors
    with capsys.disabled():
        print(f"\n  libnbd, cache {cache}: {player.report}, all sent again; {time.monotonic() - began:.1f} s")
