"""Random worlds from seeds: requests, faults, growth, crashes and reopens in every order, judged by the oracle.

FVD_SIM_WORLDS sets how many fresh worlds a run plays; a failure prints the one line that plays it again.
"""

from __future__ import annotations

import os
import time

import pytest
from fvd.engine import _engine
from fvd.sim.world import run

# Seeds that once found a fault, in the engine (1181: a write joined a chunk that a trim was about to free) or in the oracle.
FOUND = (133, 182, 213, 235, 1181)


def _play(seed: int) -> int:
    try:
        return run(seed)
    except Exception as error:
        pytest.fail(f"seed {seed}: {type(error).__name__}: {error}\nagain: .venv/bin/python -m fvd.sim {seed}")


@pytest.mark.parametrize("seed", FOUND)
def test_seed_that_once_failed(seed: int) -> None:
    assert _play(seed) > 0


def test_fresh_worlds() -> None:
    worlds = int(os.environ.get("FVD_SIM_WORLDS", "120" if _engine.SEEDED_BUGS else "250"))
    first = int(os.environ.get("FVD_SIM_FIRST", "20000"))
    began = time.monotonic()
    requests = sum(_play(seed) for seed in range(first, first + worlds))
    print(f"{worlds} worlds from seed {first}: {requests} requests, {requests / (time.monotonic() - began):.0f} a second")
    assert requests > worlds
