# SPDX-License-Identifier: Apache-2.0
"""Who is at the other end of a connection, as far as the kernel knows, and how the socket is set for it. Knows no NBD.

A peer is a user of this host (Unix sockets: SO_PEERCRED) or an address (TCP): what is counted by peer cannot be had again by connecting
again. Of IPv6, the 64 bits that a host or site has to itself as many addresses as it likes are one peer.
"""

from __future__ import annotations

import contextlib
import pwd
import socket
import struct
from typing import NamedTuple

_UCRED = struct.Struct("3i")  # pid, uid, gid
_SEND_BUFFER_BYTES = 1 << 20
_LARGE_SEND_BUFFERS = 32  # of the first connections; the others' stay at the system's default: what the kernel holds is bounded too
_SO_SNDBUFFORCE = 32
_TCP_NOTSENT_LOWAT = 25

# A client that has vanished without a word (its host, or what lies between) is noticed in two minutes, whether it was idle or owed answers.
_KEEPALIVE_IDLE_SECONDS = 60
_KEEPALIVE_INTERVAL_SECONDS = 15
_KEEPALIVE_COUNT = 4
_USER_TIMEOUT_MS = 1000 * (_KEEPALIVE_IDLE_SECONDS + _KEEPALIVE_INTERVAL_SECONDS * _KEEPALIVE_COUNT)

USER, IPV4, IPV6, LINK_LOCAL = range(4)


class Peer(NamedTuple):
    """`kind` and `value`, two numbers, say who it is; `value` has 64 bits."""

    kind: int
    value: int

    @property
    def key(self) -> tuple[int, int]:
        return self.kind, self.value

    def __str__(self) -> str:
        import ipaddress  # here, for a server on a Unix socket does not need it

        match self.kind:
            case 0:
                return f"user {_user_name(self.value)}"
            case 1:
                return str(ipaddress.IPv4Address(self.value))
            case 2:
                return f"{ipaddress.IPv6Address(self.value << 64)}/64"
        return str(ipaddress.IPv6Address(0xFE80 << 112 | self.value))


def is_privileged(key: tuple[int, int], owner_uid: int) -> bool:
    """Root and the owner of the server."""
    return key[0] == USER and key[1] in (0, owner_uid)


def peer_of(client: socket.socket) -> Peer:
    """Raises OSError when the client has gone already."""
    if client.family == socket.AF_UNIX:
        _pid, uid, _gid = _UCRED.unpack(client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        return Peer(USER, uid & 0xFFFFFFFF)
    return peer_of_address(client.getpeername()[0])


def peer_of_address(text: str) -> Peer:
    import ipaddress

    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is None:
            if address.is_link_local:  # the whole link would be one
                return Peer(LINK_LOCAL, int(address) & (1 << 64) - 1)
            return Peer(IPV6, int(address) >> 64)
        address = address.ipv4_mapped
    return Peer(IPV4, int(address))


def tune(client: socket.socket, connections: int) -> None:
    """Buffers, and how long silence is borne; `connections` are there already. Raises OSError when the client has gone already."""
    if client.family == socket.AF_UNIX:
        if connections >= _LARGE_SEND_BUFFERS:
            return
        for option in (_SO_SNDBUFFORCE, socket.SO_SNDBUF):  # the first ignores the system's limit, where we may
            with contextlib.suppress(OSError):
                client.setsockopt(socket.SOL_SOCKET, option, _SEND_BUFFER_BYTES)
                return
        return
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, _SEND_BUFFER_BYTES)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE_SECONDS)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_INTERVAL_SECONDS)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_COUNT)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS)


def _user_name(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name} ({uid})"
    except KeyError:
        return str(uid)
