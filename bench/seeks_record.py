# SPDX-License-Identifier: Apache-2.0
"""Records a guest's requests as PostMark makes a file system, creates files and does transactions on them.

    bench/seeks_record.py OUTPUT [--disk-gib N] [--files N] [--transactions N] [--folder FOLDER]

The disk is a sparse file that nbdkit serves; its log filter tells each request, in the order in which they came. By default it takes
some 25 GB in FOLDER while it runs. bench/traces/README.md says what the traces there are.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from guest_trace import FLUSH, KINDS, PROVIDE, READ, TRIM, WRITE, ZERO, Trace, save
from machine import need, output, server
from postmark_guest import PHASES, PROGRAMS, PostMark, counted
from uml_guest import PROGRAMS as GUEST_PROGRAMS
from uml_guest import exported, nbd_node, run_guest

GIB = 1 << 30
MEMORY = "512M"
TIMEOUT_SECONDS = 3600
WORK = PostMark(files=20480, smallest=500_000, largest=1_600_000, folders=200, transactions=6000, piece=65536)
#   "2026-11-28 20:40:20.885557 connection=1 Write id=1630 offset=0x1808793000 count=0x1b000 fua=0 ..."
#   "2026-11-28 20:40:21.306415 connection=1 Zero id=6413 offset=0xc89000000 count=0x1000000 trim=0 fua=0 fast=0 ..."
LINE = re.compile(r" (Read|Write|Zero|Trim|Flush) id=\d+ (?:offset=(0x[0-9a-f]+) count=(0x[0-9a-f]+)(?: trim=(\d))?)?")
KIND_OF = {"Read": READ, "Write": WRITE, "Zero": ZERO, "Trim": TRIM, "Flush": FLUSH}
BEGINS = dict(zip(("booted", *PHASES), (*PHASES, "after"), strict=True))  # what begins when the guest pauses


def record(work: PostMark, disk_bytes: int, parent: Path | None = None) -> Trace:
    """Runs PostMark on a sparse file below `parent`, and gives back what the guest asked of its disk."""
    need("nbdkit", *PROGRAMS, *GUEST_PROGRAMS)
    with tempfile.TemporaryDirectory(prefix="fvd-trace-", dir=parent) as place:
        folder = Path(place)
        image, log, path, vhost = (folder / name for name in ("disk.img", "log", "nbd.sock", "vhost.sock"))
        image.touch()
        os.truncate(image, disk_bytes)
        positions: dict[str, int] = {}  # in the log, where each phase begins

        def on_pause(name: str) -> None:
            positions[BEGINS[name]] = log.stat().st_size

        command = ["nbdkit", "--foreground", "--exit-with-parent", "--unix", str(path), "--filter=log"]
        with server([*command, "file", str(image), f"logfile={log}"], path), exported([nbd_node(path)], vhost):
            run_guest(folder, vhost, work.script(), memory=MEMORY, timeout_seconds=TIMEOUT_SECONDS, on_pause=on_pause)
        about = {
            "disk_bytes": disk_bytes,
            "postmark": str(work),
            "used_bytes": counted(folder, "creation").used_bytes,
            "guest_kernel": output("linux.uml", "--version"),
            "guest_memory": MEMORY,
            "file_system": f"mkfs.ext4 {work.mkfs}".strip(),
        }
        return parse(log.read_bytes(), positions, about)


def parse(log: bytes, positions: dict[str, int], about: dict[str, object]) -> Trace:
    """nbdkit's log, until the last phase is over."""
    kinds: list[int] = []
    offsets: list[int] = []
    lengths: list[int] = []
    phases: dict[str, int] = {}
    ordered = sorted(positions, key=lambda name: positions[name])
    end = 0
    for number, name in enumerate(ordered[:-1]):
        phases[name] = len(kinds)
        for match in LINE.finditer(log[positions[name] : positions[ordered[number + 1]]].decode()):
            kinds.append(PROVIDE if match[4] == "0" else KIND_OF[match[1]])
            offsets.append(int(match[2], 16) if match[2] else end)
            lengths.append(int(match[3], 16) if match[3] else 0)
            end = offsets[-1] + lengths[-1]
    return Trace(np.array(kinds, np.uint8), np.array(offsets, np.int64), np.array(lengths, np.int64), phases, about)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--disk-gib", type=int, default=100)
    parser.add_argument("--files", type=int, default=WORK.files)
    parser.add_argument("--transactions", type=int, default=WORK.transactions)
    parser.add_argument("--mkfs", default="", help="options")
    parser.add_argument("--folder", type=Path, help="where the disk's file lies meanwhile")
    options = parser.parse_args()
    work = PostMark(**{**vars(WORK), "files": options.files, "transactions": options.transactions, "mkfs": options.mkfs})
    trace = record(work, options.disk_gib * GIB, options.folder)
    save(trace, options.output)
    for name, begin in trace.phases.items():
        requests = trace.kinds[trace.phase(name)]
        print(name, begin, {kind: int((requests == number).sum()) for number, kind in enumerate(KINDS)})
    print(f"{options.output}: {options.output.stat().st_size} bytes; {trace.about}")


if __name__ == "__main__":
    main()
