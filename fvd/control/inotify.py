# SPDX-License-Identifier: Apache-2.0
"""The kernel's inotify: the three calls of it that watching folders needs. Knows no socket, and no folder of ours.

Written here, and not taken from PyPI, because no Debian has a package with it: a package of fvd's would have to carry somebody's copy.
"""

from __future__ import annotations

import ctypes
import os
import struct
from dataclasses import dataclass
from pathlib import Path

# <linux/inotify.h>
MOVED_TO = 0x0080
CREATE = 0x0100
Q_OVERFLOW = 0x4000  # events were lost
IGNORED = 0x8000  # the watch is gone, with what it watched
ONLYDIR = 0x01000000
ISDIR = 0x40000000

_HEADER = struct.Struct("=iIII")  # watch, mask, cookie, bytes of the name that follows, zeros at its end included
_READ_BYTES = 1 << 16  # an event takes 16 + NAME_MAX + 1 at most


@dataclass(frozen=True)
class Event:
    watch: int  # as `add_watch` gave it; -1 with Q_OVERFLOW
    mask: int
    name: str  # of what is in the watched folder; empty: the folder itself


class Inotify:
    """One instance, whose descriptor never blocks. Not safe from threads."""

    def __init__(self) -> None:
        """Raises OSError: EMFILE, this user may have no more of them."""
        self.fd = -1
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.fd = self._called(self._libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK))

    def add_watch(self, folder: Path, mask: int) -> int:
        """The number of the watch: the same for one folder, however often it is added. Raises OSError."""
        return self._called(self._libc.inotify_add_watch(self.fd, os.fsencode(folder), ctypes.c_uint32(mask)))

    def read(self) -> list[Event]:
        """What has happened and was not read yet; part of it, if it is much: then the descriptor stays readable."""
        try:
            data = os.read(self.fd, _READ_BYTES)
        except BlockingIOError:
            return []
        events, at = [], 0
        while at < len(data):
            watch, mask, _, name_bytes = _HEADER.unpack_from(data, at)
            at += _HEADER.size + name_bytes
            events.append(Event(watch, mask, os.fsdecode(data[at - name_bytes : at].rstrip(b"\0"))))
        return events

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        self.close()

    def _called(self, answer: int) -> int:
        if answer < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return answer
