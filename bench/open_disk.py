# SPDX-License-Identifier: Apache-2.0
"""How long opening a disk takes and what it holds in memory, in a process that does nothing else: `open_disk.py VOLUME`.

Prints JSON: what open() took, and by how much the process grew. A program of its own, because a process that has opened a disk before has
its memory already. A small disk is opened first, so that no import is measured.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> None:
    import fvd
    from load import resident_bytes

    volume = sys.argv[1]
    with tempfile.TemporaryDirectory(prefix="fvd-bench-", dir=Path(volume.removeprefix("file:")).parent) as folder:
        small = f"file:{Path(folder) / 'small'}"
        fvd.provision(small, size="64M")
        fvd.open(small).close()
    before_bytes, before_cpu, begun = resident_bytes("self"), time.process_time(), time.perf_counter()
    with fvd.open(volume):
        seconds, cpu = time.perf_counter() - begun, time.process_time() - before_cpu
        grown_bytes = resident_bytes("self") - before_bytes
    print(json.dumps({"milliseconds": seconds * 1000, "cpu_ms": cpu * 1000, "memory_bytes": grown_bytes}))


if __name__ == "__main__":
    main()
