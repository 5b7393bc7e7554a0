# SPDX-License-Identifier: Apache-2.0
"""Who is believed at a control socket. Knows users and the volumes that are theirs, not what is said.

Where a socket lies proves nothing: anyone may put one into a folder of his own, under any name. The kernel tells whose process listens
there. Root and oneself are believed; another user only about a file or device that belongs to him: he could serve it as he likes anyway.
"""

from __future__ import annotations

import os
import socket
import struct

from fvd.control.paths import socket_name
from fvd.errors import FvdError, NotFound
from fvd.volume.name import parse_name

_CREDENTIALS = struct.Struct("3i")  # struct ucred: process, user, group


def peer_uid(connection: socket.socket) -> int:
    """The user whose process listens at the other end, as the kernel noted when it began to (unix(7), SO_PEERCRED)."""
    _, uid, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return int(uid)


def is_stranger(uid: int) -> bool:
    """Neither root nor this process's user."""
    return uid not in (0, os.geteuid())


def is_believed(uid: int, volume_path: str | os.PathLike[str]) -> bool:
    """Whether this user is believed about the volume at that path."""
    return not is_stranger(uid) or owner_uid(volume_path) == uid


def is_believed_about(uid: int, volume: str, at_socket: str) -> bool:
    """Whether this user, listening at a socket of that name, is believed when he says that it is this volume's."""
    if not is_stranger(uid):
        return True
    try:
        path = parse_name(volume).path
        return socket_name(path) == at_socket and owner_uid(path) == uid
    except (FvdError, ValueError):
        return False


def owner_uid(path: str | os.PathLike[str]) -> int:
    """Whose the file or device node is. Raises NotFound."""
    try:
        return os.stat(path).st_uid  # noqa: PTH116
    except OSError as error:
        raise NotFound(f"{os.fspath(path)}: {error.strerror}") from None
