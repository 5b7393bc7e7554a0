# SPDX-License-Identifier: Apache-2.0
"""Loads a disk on a device that logs what reaches it (dm-log-writes), and leaves the log and what was promised for `test_log_writes.py`.

python log_writes_load.py FOLDER [CACHE SEED BATCHES]...     makes FOLDER/CACHE-SEED/
"""

from __future__ import annotations

import contextlib
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from real_devices import MIB, SECTOR, Pool, linear, mapped, run
from verified_load import BLOCK_BYTES, IN_FLIGHT, STORAGE_BYTES, VIRTUAL_BYTES, Expected, Moments, batches, carry_out

import fvd


def load(pool: Pool, folder: Path, cache: Any, seed: int, length: int) -> None:
    moments = Moments({}, {})
    expected = Expected.of_empty(VIRTUAL_BYTES)
    with pool.disk() as disk, pool.disk() as log, mapped(linear(disk, STORAGE_BYTES)) as below:
        run("blkdiscard", "--force", below.path)  # the replay begins with zeros
        with mapped(f"0 {STORAGE_BYTES // SECTOR} log-writes {below.path} {log}") as device:
            fvd.provision(device.path, VIRTUAL_BYTES, block_size=BLOCK_BYTES, chunk_size="256K", journal_size="64K")
            with fvd.open(device.path, cache=cache) as opened, ThreadPoolExecutor(IN_FLIGHT) as threads:
                device.message("mark", 0)
                moments.promised[0] = expected.copy()
                for index, batch in zip(range(1, length + 1), batches(seed, VIRTUAL_BYTES, BLOCK_BYTES), strict=False):
                    expected.issue(batch)
                    moments.under_way[index - 1] = expected.copy()
                    carry_out(batch, opened, threads)
                    expected.acknowledge(batch)
                    device.message("mark", index)
                    moments.promised[index] = expected.copy()
                moments.under_way[length] = expected.copy()
            sectors = int(run("dmsetup", "status", device.name).split()[4]) + 1
        folder.mkdir()
        # The device's removal has added what was not flushed, and a last mark.
        count = sectors * SECTOR // MIB + 32
        run("dd", f"if={log}", f"of={folder / 'log'}", "bs=1M", f"count={count}", "iflag=direct", "conv=sparse", "status=none")
    (folder / "moments").write_bytes(pickle.dumps(moments))


def main() -> None:
    folder = Path(sys.argv[1])
    with contextlib.closing(Pool(folder)) as pool:
        for cache, seed, length in zip(*[iter(sys.argv[2:])] * 3, strict=True):
            load(pool, folder / f"{cache}-{seed}", cache, int(seed), int(length))


if __name__ == "__main__":
    main()
