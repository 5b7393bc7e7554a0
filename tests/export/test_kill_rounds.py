# SPDX-License-Identifier: Apache-2.0
"""kill -9 of a real server, hundreds of times, under a load of which it is known what must be there.

Each round: ``check`` finds nothing wrong with the disk as the last kill left it, a new server opens it, the whole disk is read and judged,
overlapping requests are played, and the server is killed at any moment: under load, while it closes, or while it opens. A kill is no power
cut: the host lives on, so in every cache mode everything that was acknowledged is there, flushed or not. What was not answered is there or
not: never a mixture, never another sector's data.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import pytest
from fvd_server import FvdServer
from killed_disks import provision

import fvd
from fvd.sim._oracle import Violation
from fvd.sim.foreign import ForeignPlayer

pytest.importorskip("nbd", reason="python3-libnbd is not installed")
pytestmark = [pytest.mark.release_only, pytest.mark.slow]

KIB, MIB = 1 << 10, 1 << 20
SIZE = 8 * MIB
REQUESTS_MAX = 300  # of a round
SHARE = float(os.environ.get("FVD_KILL_SHARE", "1"))  # of the rounds below
FIRST = int(os.environ.get("FVD_SIM_FIRST", time.time_ns() // 1000 % (1 << 40)))


@dataclass(frozen=True)
class Case:
    """A disk, and how often its server is killed."""

    name: str
    rounds: int
    cache: str = "none"
    block: int = 64 * KIB
    chunk: int = MIB
    base_bytes: int = 0
    layout: str = "compact"
    serving: tuple[str, ...] = ()


CASES = (
    Case("none-64K", 110),
    Case("none-4K-base", 110, block=4 * KIB, chunk=64 * KIB, base_bytes=SIZE),
    Case("none-raw-16K", 55, block=16 * KIB, layout="raw"),
    Case("none-1M-short-base", 55, block=MIB, base_bytes=3 * MIB + 12345),
    Case("writeback-16K", 55, cache="writeback", block=16 * KIB, chunk=256 * KIB),
    Case("writethrough-4K-base", 55, cache="writethrough", block=4 * KIB, chunk=64 * KIB, base_bytes=SIZE // 2),
    Case("directsync-64K", 55, cache="directsync"),
    Case("unsafe-16K-base", 35, cache="unsafe", block=16 * KIB, chunk=64 * KIB, base_bytes=SIZE),
    Case("none-64K-zeroed", 55, serving=("--zero-chunks",)),
    Case("writeback-1M-zeroed", 35, cache="writeback", block=MIB, serving=("--zero-chunks",)),
)


def player(seed: int) -> ForeignPlayer:
    """Believes that whatever was acknowledged survives."""
    return ForeignPlayer(seed, depth=256, every_write_durable=True)


def kill_rounds(case: Case, seed: int, folder: Path, player: ForeignPlayer, between: Callable[[], None] = lambda: None) -> str:
    """Returns what was done, for people. `between`: called after each kill, before the next server."""
    rng = Random(seed)
    volume = provision(case, folder, SIZE)
    began = time.monotonic()
    opening = closing = 0
    with FvdServer(folder, volume, "--cache", case.cache, *case.serving) as server, player:
        for number in range(case.rounds):
            if number and rng.random() < 0.2:
                server.begin()
                time.sleep(rng.random() * 0.05)  # a moment, at random: it reads the disk, recovers it, or serves
                server.kill()
                between()
                opening += 1
            report = fvd.check(volume)
            assert not report.errors, f"seed {seed}, round {number}: {report.errors}"
            player.connect(server.start())
            if number:
                player.judge_after_crash()
            player.play(rng.randint(1, REQUESTS_MAX))
            player.wait(rng.random() * 0.004)
            if rng.random() < 0.1:
                server.terminate()
                player.shutting_down()
                player.wait(rng.random() * 0.01)
                closing += 1
            server.kill()
            between()
            player.take_last_answers()
            player.report.rounds += 1
        player.connect(server.start())
        player.judge_after_crash()
        player.hang_up()
        server.stop()
    assert fvd.info(volume).clean
    seconds = time.monotonic() - began
    return f"{case.name}: {player.report}; kills while closing {closing}, while opening {opening}; {seconds:.1f} s"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kill_rounds(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each run plays seeds that nobody has played; which moment a kill meets is decided by the machine too."""
    seed = FIRST + CASES.index(case)
    fewer = replace(case, rounds=max(10, round(case.rounds * SHARE)))
    told = kill_rounds(fewer, seed, tmp_path, player(seed))
    with capsys.disabled():
        print(f"\n  {told}")


def test_it_can_fail(tmp_path: Path, pending_dir: Path) -> None:
    """If the log of what a killed server had acknowledged is thrown away, the judge sees that it is gone."""
    case = Case("none-4K", 40, block=4 * KIB, chunk=64 * KIB, serving=("--discard-pending",))
    with pytest.raises(Violation, match="after the crash"):
        kill_rounds(case, 99, tmp_path, player(99), between=lambda: shutil.rmtree(pending_dir))
