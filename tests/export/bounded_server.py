# SPDX-License-Identifier: Apache-2.0
"""A server in a process of its own, whose memory and log can be looked at: `bounded_server.py SOCKET LIMITS`, the limits as JSON.

Serves 64 MiB of nothing but holes by the pass-through backend; ends with SIGTERM.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
from types import FrameType

from devtools._passthrough import PassThrough
from fvd.export.server import Limits, NbdServer, Unix


def main() -> None:
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    server = NbdServer(Unix(sys.argv[1], 0o666), limits=Limits(**json.loads(sys.argv[2])))

    def on_signal(number: int, frame: FrameType | None) -> None:
        server.stop()

    signal.signal(signal.SIGTERM, on_signal)
    with tempfile.TemporaryFile() as storage:
        os.ftruncate(storage.fileno(), 64 << 20)
        server.add_export("", PassThrough(), storage_fd=storage.fileno(), size_bytes=64 << 20)
        server.post(lambda: None)
        print("ready", flush=True)
        server.run()


if __name__ == "__main__":
    main()
