# SPDX-License-Identifier: Apache-2.0
"""``python -m fvd.cli``: the same as ``fvd-lv``."""

import signal
import sys

if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # as fvd-lv: no traceback while the rest is imported
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from fvd.cli.process import run

    sys.exit(run())
