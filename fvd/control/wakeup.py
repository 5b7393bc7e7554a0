# SPDX-License-Identifier: Apache-2.0
"""A bell that wakes a thread which waits in poll(). Knows nothing of what it is rung for."""

from __future__ import annotations

import contextlib
import os

from fvd._lifetime import keep


class Wakeup:
    """An eventfd. ``ring`` may be called from any thread and from a signal handler, and never waits.

    The descriptor lives as long as the object: a late ring can never reach another file that got its number.
    """

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        keep(self, lambda bell: (bell.fd,))

    def ring(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it has been rung 2**64 times: that is loud enough
            os.eventfd_write(self.fd, 1)

    def silence(self) -> None:
        """To be called before looking at what it may have been rung for."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)
