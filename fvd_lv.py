# SPDX-License-Identifier: Apache-2.0
"""The first lines of the command ``fvd-lv``: from here on Ctrl-C ends it without a traceback, also while everything else is imported.

Beside the package and not in it, for what is in it imports the whole library first. Importing this does nothing.
"""

from __future__ import annotations

import signal


def main() -> int:
    """Runs the command line of this process; returns its exit code."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it was begun with SIGINT ignored, as by nohup
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # What starts us may hold SIGINT back while Python itself starts (scripts/setup).
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    from fvd.cli.process import run

    return run()
