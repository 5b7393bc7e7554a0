# SPDX-License-Identifier: Apache-2.0
"""kill -9 of a server under a guest's own path: the front end gives the next server its memory, its rings and what was in flight, and sends
nothing twice. No request fails, and nothing that was acknowledged is lost."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from front_running import front, run_front
from fvd_server import FvdServer
from killed_disks import provision

import fvd

pytestmark = pytest.mark.release_only

KIB, MIB = 1 << 10, 1 << 20
KILLS = 3
PAUSE_SECONDS = 3.0


@dataclass(frozen=True)
class Case:
    """A disk, and how its guest asks."""

    name: str
    cache: str
    base_bytes: int = 0
    block: int = 16 * KIB
    chunk: int = 64 * KIB
    layout: str = "compact"
    indirect: bool = True
    segments: int = 1


CASES = (
    Case("none", "none"),
    Case("writeback-base", "writeback", base_bytes=20 * MIB + 12345, indirect=False, segments=3),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_guest_never_hears_of_its_servers_deaths(case: Case, tmp_path: Path) -> None:
    volume = provision(case, tmp_path, 32 * MIB)
    socket, state = tmp_path / "guest.sock", tmp_path / "state"
    words = ("--vhost-user", str(socket), "--queues", "2", "--cache", case.cache)
    ways: dict[str, Any] = {"indirect": case.indirect, "segments": case.segments, "bytes": 8192, "state": state}
    with FvdServer(tmp_path, volume, *words) as server:
        server.start()
        load: dict[str, Any] = {
            "queues": 2,
            "depth": 8,
            "read": 2,
            "write": 4,
            "zero": 1,
            "trim": 0 if case.base_bytes else 1,
            "seconds": 4,
        }
        with front(socket, **load, **ways, verify=True, reconnect=True) as running:
            for _ in range(KILLS):
                time.sleep(0.7)
                server.kill()
                server.start()
        told = running.told
        assert (told["errors"], told["lost"], told["reconnects"]) == (0, 0, KILLS)
        assert told["checked"] > 0 and told["writes"] > 100 and told["pause_seconds"] < PAUSE_SECONDS
        server.kill()
        server.start()
        assert run_front(socket, **ways, verify=True)["lost"] == 0  # read again, by another machine
        server.stop()
    assert not fvd.check(volume).errors
