# SPDX-License-Identifier: Apache-2.0
"""A machine is switched off under a verified load, at moments that differ. In its next life the disk is whole, with all that was promised.

Its storage keeps what it was given, flushed or not: a missing flush is found by `test_log_writes.py`.
"""

from __future__ import annotations

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from machines import NATIVE, REAL, ROOT, Machine, machine, require_guest

READY_SECONDS = 60
LIVES = 3
BATCHES_MIN = 10

pytestmark = [pytest.mark.release_only, pytest.mark.slow]


def live_until_cut(real: Machine, folder: Path, seed: int, seconds: float) -> None:
    """A life that loads, cut short so long after its load has come going."""
    promised = folder / f"promised-{seed}"
    log = folder / f"life-{seed}.log"
    with log.open("wb") as output:
        words = real.words(REAL / "power_cut_load.py", folder, str(seed))
        process = subprocess.Popen(words, cwd=ROOT, env=real.environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + READY_SECONDS
        while not promised.exists() or promised.read_bytes().count(b"\n") < BATCHES_MIN:
            assert process.poll() is None, f"life {seed} ended by itself:\n{log.read_text(errors='replace')}"
            assert time.monotonic() < deadline, f"life {seed} does not load:\n{log.read_text(errors='replace')}"
            time.sleep(0.01)
        time.sleep(seconds)
    finally:
        process.send_signal(signal.SIGTERM)  # to scripts/uml that is a power cut
        process.wait(30)
    print(log.read_text(errors="replace"))
    assert process.returncode == 128 + signal.SIGTERM


def test_what_was_acknowledged_survives_power_cuts(tmp_path: Path) -> None:
    if NATIVE:
        pytest.skip("this machine itself is not switched off; run without FVD_REAL_LVM_NATIVE=1 and with user-mode-linux")
    require_guest()
    moments = random.Random(7)
    with machine(tmp_path, disks=1) as real:
        for seed in range(1, LIVES + 1):
            live_until_cut(real, tmp_path, seed, moments.uniform(0, 1.5))
        said = real.run(REAL / "power_cut_load.py", tmp_path, str(LIVES + 1), "verify")
    assert f"life {LIVES}:" in said
