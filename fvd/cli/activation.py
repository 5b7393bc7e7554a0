# SPDX-License-Identifier: Apache-2.0
"""Sockets that a service manager, or ``nbdinfo [ fvd-lv serve ... ]``, has made and handed over: sd_listen_fds(3). Knows no command."""

from __future__ import annotations

import os
import socket

from fvd.errors import InvalidArgument

_FIRST = 3
_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


def take_sockets() -> list[socket.socket]:
    """The sockets that are for this process, each once: no child of it finds them. Empty: it was started in another way.

    Raises InvalidArgument: what the environment says is not so.
    """
    pid, count, names = (os.environ.pop(name, "") for name in _VARIABLES)
    if pid != str(os.getpid()):  # for a process above us, which forgot to say that it has taken them
        return []
    if not count.isascii() or not count.isdigit() or not 0 < int(count) < 1024:
        raise InvalidArgument(f"LISTEN_FDS={count} is no number of descriptors")
    taken = []
    for index in range(int(count)):
        fd = _FIRST + index
        given = names.split(":")
        called = f" ({given[index]})" if index < len(given) and given[index] else ""
        try:
            os.set_inheritable(fd, False)
            taken.append(socket.socket(fileno=fd))
        except OSError as error:
            raise InvalidArgument(f"descriptor {fd}{called}, handed over by LISTEN_FDS, is no socket: {error.strerror}") from None
    return taken
