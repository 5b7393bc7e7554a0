# SPDX-License-Identifier: Apache-2.0
"""Wakes a thread that waits in poll(). Knows nothing of what it is woken for."""

from __future__ import annotations

import contextlib
import os

from fvd._lifetime import between_forks, keep


class Wakeup:
    """An eventfd. ``notify`` may be called from any thread and from a signal handler, and never waits.

    The descriptor lives as long as the object: a late call can never reach another file that got its number.
    """

    def __init__(self) -> None:
        with between_forks:
            self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            keep(self, lambda wakeup: (wakeup.fd,))

    def notify(self) -> None:
        with contextlib.suppress(BlockingIOError):  # the counter is at its end: the descriptor is readable
            os.eventfd_write(self.fd, 1)

    def clear(self) -> None:
        """To be called before looking at what it may have been woken for."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)
