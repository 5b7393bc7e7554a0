# SPDX-License-Identifier: Apache-2.0
"""One life of a machine that `test_power_cut.py` switches off: verify what the life before has promised, then load until the end.

    python power_cut_load.py FOLDER SEED [verify]

FOLDER is shared with the machine outside. `promised-SEED` gets a line when a batch has been acknowledged whole, and is on the outer
machine's file system before the next batch begins: so when the power is cut at most one batch beyond it is under way.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from real_devices import run
from verified_load import BLOCK_BYTES, IN_FLIGHT, VIRTUAL_BYTES, Expected, Values, batches, carry_out, values

import fvd

DISK = "/dev/ubda"
GROUP = "fvdpowercut"
VOLUME = f"{GROUP}/vm1"  # it grows under the first life's load
NUMBERS_OF_A_LIFE = 1 << 32  # operations of different lives are told apart


def expected_after(folder: Path, seed: int) -> Expected:
    """What may be there after the life with this seed: replays its load as far as it was acknowledged, and one batch more."""
    before = np.load(folder / f"seen-{seed}.npy")
    expected = Expected.of(before)
    acknowledged = len((folder / f"promised-{seed}").read_text().splitlines())
    for index, batch in enumerate(batches(seed, VIRTUAL_BYTES, BLOCK_BYTES, seed * NUMBERS_OF_A_LIFE)):
        expected.issue(batch)
        if index == acknowledged:
            break
        expected.acknowledge(batch)
    changed = np.count_nonzero(expected.durable != before)
    print(f"life {seed}: {acknowledged} batches were acknowledged, {changed} sectors changed", flush=True)
    return expected


def read_all(disk: fvd.Disk) -> Values:
    return values(disk.pread(0, VIRTUAL_BYTES))


def main() -> None:
    folder, seed, only_verify = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:] == ["verify"]
    if seed == 1:
        run("vgcreate", "--yes", "--physicalextentsize", "1m", GROUP, DISK)
        fvd.provision(VOLUME, VIRTUAL_BYTES, block_size=BLOCK_BYTES, chunk_size="256K", journal_size="64K", grow_step="4M")
    report = fvd.check(VOLUME)
    assert not report.errors, report
    with fvd.open(VOLUME, on_full="wait") as disk, ThreadPoolExecutor(IN_FLIGHT) as threads:
        seen = read_all(disk)
        if seed > 1:
            assert not report.clean, "the disk was closed: the power was cut too late"
            expected_after(folder, seed - 1).verify(seen, f"after life {seed - 1}")
        print(f"life {seed} begins with {disk.info().storage_size} bytes of storage", flush=True)
        if only_verify:
            return
        np.save(folder / f"seen-{seed}.npy", seen)
        with (folder / f"promised-{seed}").open("w") as promised:
            for index, batch in enumerate(batches(seed, VIRTUAL_BYTES, BLOCK_BYTES, seed * NUMBERS_OF_A_LIFE), 1):
                carry_out(batch, disk, threads)
                promised.write(f"{index}\n")
                promised.flush()
                os.fsync(promised.fileno())


if __name__ == "__main__":
    main()
