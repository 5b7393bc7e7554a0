# SPDX-License-Identifier: Apache-2.0
"""The kernel's nbd driver, told by generic netlink: connect a device, give it another connection, disconnect it. Knows no disks.

Numbers and attributes: linux/nbd-netlink.h, linux/genetlink.h, linux/netlink.h. A message is a header and attributes, each padded to four
bytes; the kernel answers with messages of the same form, and ends with an acknowledgement that carries an errno.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple

from fvd._lifetime import keep
from fvd.errors import DeviceError, InUse, NotFound, PermissionDenied, Timeout, Unsupported

_NETLINK_GENERIC = 16
_REQUEST, _ACK = 1, 4
_ERROR = 2
_CONTROLLER, _GET_FAMILY = 16, 3  # of generic netlink itself
_FAMILY_ID, _FAMILY_NAME = 1, 2
_CONNECT, _DISCONNECT, _RECONFIGURE = 1, 2, 3
_INDEX, _SIZE_BYTES, _BLOCK_SIZE_BYTES, _REQUEST_SECONDS, _SERVER_FLAGS, _SOCKETS, _DEAD_SECONDS, _BACKEND = 1, 2, 3, 4, 5, 7, 8, 10
_SOCKET_ITEM = _SOCKET_FD = 1
_NESTED = 0x8000
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_GENERIC = struct.Struct("=BBH")  # command, version, reserved
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_ANSWER_BYTES = 64 << 10
_ANSWER_SECONDS = 30.0


class Shape(NamedTuple):
    """What a device is to be."""

    size_bytes: int
    block_bytes: int
    flags: int  # NBD's transmission flags
    dead_seconds: int  # for so long requests wait for another connection when the last one is dead
    backend: str  # who is behind it: the kernel takes no connection for another


class NbdNetlink:
    """A conversation with the driver. A context manager, for one thread."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._family = 0
        self._sequence = 0
        keep(self, lambda netlink: (-1 if netlink._socket is None else netlink._socket.fileno(),))

    def __enter__(self) -> NbdNetlink:
        """Raises Unsupported: this kernel has no nbd driver, or has not loaded it."""
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_GENERIC)
        try:
            self._socket.settimeout(_ANSWER_SECONDS)
            _bind(self._socket)
            (answer,) = self._ask(_CONTROLLER, _GET_FAMILY, _attribute(_FAMILY_NAME, b"nbd\0"))
            (self._family,) = struct.unpack("=H", answer[_FAMILY_ID])
        except BaseException as error:
            self.close()
            if isinstance(error, OSError) and error.errno == errno.ENOENT:
                raise Unsupported("this kernel has no nbd driver loaded; run modprobe nbd") from None
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Again is fine."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def connect(self, shape: Shape, connection: int) -> int:
        """A device over this connected socket, which the kernel keeps from here on: its number.

        No request is given up for being slow: one that waits for storage may wait. Raises PermissionDenied, InUse, DeviceError.
        """
        attributes = (
            _attribute(_SIZE_BYTES, struct.pack("=Q", shape.size_bytes)),
            _attribute(_BLOCK_SIZE_BYTES, struct.pack("=Q", shape.block_bytes)),
            _attribute(_REQUEST_SECONDS, struct.pack("=Q", 0)),
            _attribute(_SERVER_FLAGS, struct.pack("=Q", shape.flags)),
            _attribute(_DEAD_SECONDS, struct.pack("=Q", shape.dead_seconds)),
            _attribute(_BACKEND, shape.backend.encode() + b"\0"),
            _socket_list(connection),
        )
        answers = self._tell("connecting a device", _CONNECT, *attributes)
        (index,) = struct.unpack("=I", next(answer[_INDEX] for answer in answers if _INDEX in answer))
        return int(index)

    def reconnect(self, index: int, backend: str, connection: int) -> None:
        """This socket instead of a dead one. The kernel drops it, without a word, if none is dead. Raises NotFound (no such device, or it
        has another backend), PermissionDenied, DeviceError."""
        number = _attribute(_INDEX, struct.pack("=I", index))
        self._tell(
            f"reconnecting /dev/nbd{index}", _RECONFIGURE, number, _attribute(_BACKEND, backend.encode() + b"\0"), _socket_list(connection)
        )

    def disconnect(self, index: int) -> None:
        """What is under way fails. A device that is not connected is fine. Raises PermissionDenied, DeviceError."""
        self._tell(f"disconnecting /dev/nbd{index}", _DISCONNECT, _attribute(_INDEX, struct.pack("=I", index)))

    def _tell(self, doing: str, command: int, *attributes: bytes) -> list[dict[int, bytes]]:
        try:
            return self._ask(self._family, command, *attributes)
        except TimeoutError:
            raise Timeout(f"{doing}: the kernel did not answer within {_ANSWER_SECONDS:g} s") from None
        except OSError as error:
            what = f"{doing}: {error.strerror}"
            if error.errno in (errno.EPERM, errno.EACCES):
                raise PermissionDenied(f"{what}; only root with CAP_SYS_ADMIN may") from None
            if error.errno in (errno.EBUSY, errno.EEXIST, errno.ENOSPC):
                raise InUse(f"{what}; no device of the nbd driver is free (modprobe nbd, nbds_max)") from None
            if command == _RECONFIGURE and error.errno == errno.EINVAL:
                raise NotFound(f"{what}; it is not connected any more, or to something else") from None
            raise DeviceError(what) from error

    def _ask(self, kind: int, command: int, *attributes: bytes) -> list[dict[int, bytes]]:
        """The attributes of each message of the answer. Raises OSError with the kernel's errno."""
        assert self._socket is not None
        self._sequence += 1
        body = _GENERIC.pack(command, 1, 0) + b"".join(attributes)
        self._socket.send(_HEADER.pack(_HEADER.size + len(body), kind, _REQUEST | _ACK, self._sequence, 0) + body)
        answers = []
        while True:
            for message_kind, payload in _messages(self._socket.recv(_ANSWER_BYTES)):
                if message_kind != _ERROR:
                    answers.append(_attributes(payload[_GENERIC.size :]))
                    continue
                (number,) = struct.unpack_from("=i", payload)
                if number:
                    raise OSError(-number, os.strerror(-number))
                return answers


def _bind(netlink: socket.socket) -> None:
    netlink.bind((0, 0))


def _attribute(kind: int, value: bytes) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)


def _socket_list(connection: int) -> bytes:
    item = _attribute(_SOCKET_ITEM | _NESTED, _attribute(_SOCKET_FD, struct.pack("=I", connection)))
    return _attribute(_SOCKETS | _NESTED, item)


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _HEADER.size:
        length, kind, _flags, _sequence, _port = _HEADER.unpack_from(data)
        yield kind, data[_HEADER.size : length]
        data = data[max(_HEADER.size, length + 3 & ~3) :]


def _attributes(data: bytes) -> dict[int, bytes]:
    values = {}
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        values[kind & 0x3FFF] = data[_ATTRIBUTE.size : length]
        data = data[max(_ATTRIBUTE.size, length + 3 & ~3) :]
    return values
