#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A pass-through NBD server of the same shape as fvd's, with no mapping: what the serving loop costs by itself.

    bench/passthrough.py serve STORAGE --socket PATH

One request is one device operation on a file or block device. bench/matrix.py compares it with others. Never serve a disk with it.
With --answer-only not even that: reads return what is in memory by chance.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def serve(storage: str, socket_path: str, busy_poll_us: int, force_blocking: bool, answer_only: bool) -> None:
    from devtools._passthrough import PassThrough
    from fvd.export.server import NbdServer, Unix

    descriptor = os.open(storage, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    size_bytes = os.lseek(descriptor, 0, os.SEEK_END)
    server = NbdServer(Unix(socket_path), busy_poll_us=busy_poll_us, force_blocking=force_blocking)
    server.add_export("", PassThrough(answer_only), storage_fd=descriptor, size_bytes=size_bytes, minimum_block_bytes=512)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    server.run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("serve")
    command.add_argument("storage")
    command.add_argument("--socket", required=True)
    command.add_argument("--busy-poll-us", type=int, default=0)
    command.add_argument("--blocking", action="store_true", help="without io_uring")
    command.add_argument("--answer-only", action="store_true", help="without the device: every request has succeeded at once")
    options = parser.parse_args()
    serve(options.storage, options.socket, options.busy_poll_us, options.blocking, options.answer_only)


if __name__ == "__main__":
    main()
