# SPDX-License-Identifier: Apache-2.0
"""Asks a served disk through its control socket. Knows the messages, not what the verbs mean."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from fvd._lifetime import between_forks, keep
from fvd.control import protocol
from fvd.control.paths import short_address
from fvd.control.protocol import Request, ServerGone
from fvd.control.trust import is_stranger, peer_uid
from fvd.errors import PermissionDenied, Timeout

# Growing a file or checking a large disk takes its time; a server that says nothing for this long is stuck.
ANSWER_TIMEOUT_SECONDS = 120.0
CONNECT_TIMEOUT_SECONDS = 5.0


class ControlClient:
    """One connection to one control socket. A context manager; ``ask`` may be called any number of times, from one thread at a time."""

    def __init__(self, path: Path, timeout_seconds: float = ANSWER_TIMEOUT_SECONDS) -> None:
        self._path = path
        self._timeout_seconds = timeout_seconds
        self._socket: socket.socket | None = None
        keep(self, lambda client: (-1 if client._socket is None else client._socket.fileno(),))
        self.peer_uid = -1
        """Whose process listens there, as soon as it is connected: see fvd.control.trust."""

    def connect(self) -> None:
        """Does nothing when connected. Raises ServerGone, PermissionDenied, Timeout."""
        if self._socket is None:
            with between_forks:
                self._connect()

    def _connect(self) -> None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(CONNECT_TIMEOUT_SECONDS)
        try:
            with short_address(self._path) as address:
                connection.connect(address)
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            raise ServerGone(f"{self._path}: nobody serves this disk any more") from None
        except PermissionError:
            connection.close()
            raise PermissionDenied(f"{self._path}: this disk is served by another user; ask as that user or as root") from None
        except (TimeoutError, BlockingIOError):
            connection.close()
            raise Timeout(f"{self._path}: the server does not take connections") from None
        self.peer_uid = peer_uid(connection)
        self._socket = connection

    def ask(self, verb: str, **arguments: Any) -> Any:
        """The result of a verb; raises the error that the served disk raised, or Timeout: the whole answer must be there by then."""
        if self._socket is None:
            self.connect()
        assert self._socket is not None
        deadline = time.monotonic() + self._timeout_seconds
        try:
            self._socket.settimeout(self._timeout_seconds)
            self._socket.sendall(protocol.encode_request(Request(verb, arguments)))
            lines = protocol.Lines(protocol.ANSWER_BYTES_MAX)
            while True:
                self._socket.settimeout(max(0.001, deadline - time.monotonic()))
                data = self._socket.recv(1 << 18)
                if not data:
                    raise ServerGone(f"{self._path}: the server went away before it answered; ask again")
                if got := lines.feed(data):
                    return protocol.decode_answer(got[0], strange=is_stranger(self.peer_uid))
        except TimeoutError:
            self.close()
            raise Timeout(f"{self._path}: no answer to {verb} in {self._timeout_seconds:g} seconds") from None
        except (BrokenPipeError, ConnectionResetError):
            self.close()
            raise ServerGone(f"{self._path}: the server went away before it answered; ask again") from None

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def __enter__(self) -> ControlClient:
        self.connect()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
