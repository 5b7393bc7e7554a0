# SPDX-License-Identifier: Apache-2.0
"""The control socket of one served disk: takes connections, hands each request to the verb's handler, sends the answer.

Knows sockets and messages; what a verb does is the handlers' business. Handlers run in threads of their own, one request of a
connection after the other: what they touch must be safe from threads. A streaming verb has its connection, and that thread, to itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fvd._lifetime import between_forks, keep
from fvd.control import protocol
from fvd.control.paths import LOCK_SUFFIX, SUFFIX, make_runtime_dir, open_runtime_dir, socket_name
from fvd.control.protocol import Request
from fvd.control.streaming import HEARTBEAT_SECONDS, LAST_WORDS_SECONDS, STALLED_SECONDS, Sender, StreamVerb
from fvd.errors import FvdError, InUse, InvalidArgument, quoted

Handler = Callable[[dict[str, Any]], Any]

CONNECTIONS_MAX = 64
STREAMS_MAX = 48  # the others stay free for verbs that end
IDLE_TIMEOUT_SECONDS = 60.0
# At close a handler that hangs (storage that does not answer) is left behind rather than waited for for ever.
STUCK_HANDLER_SECONDS = 10.0
SOCKET_MODE = 0o600


class ControlServer:
    """Serves the verbs of one disk. ``start`` claims the volume's socket, ``close`` gives it up; both may be called once.

    ``stop`` is the first half of ``close``: nobody is answered any more, and streams go on, so that they can tell how the disk was closed.
    """

    def __init__(
        self,
        volume: str,
        volume_path: str | os.PathLike[str],
        handlers: Mapping[str, Handler],
        idle_timeout_seconds: float = IDLE_TIMEOUT_SECONDS,
        *,
        stream_verbs: Mapping[str, StreamVerb] | None = None,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
        stalled_seconds: float = STALLED_SECONDS,
    ) -> None:
        self._volume = volume
        self._volume_path = volume_path
        self._handlers = dict(handlers)
        self._stream_verbs = dict(stream_verbs or {})
        self._idle_timeout_seconds = idle_timeout_seconds
        self._heartbeat_seconds = heartbeat_seconds
        self._stalled_seconds = stalled_seconds
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._streaming: set[socket.socket] = set()  # those of them that a stream has to itself
        self._senders: dict[Sender, threading.Thread] = {}
        self._threads: set[threading.Thread] = set()
        self._listener: socket.socket | None = None
        self._lock_fd = -1
        self._folder = -1  # where its names are, whatever leads there by now
        self._closing = False
        self._closed = threading.Event()
        self.path: Path | None = None
        keep(self, ControlServer._descriptors)

    def _descriptors(self) -> list[int]:
        listener = [] if self._listener is None else [self._listener]
        return [self._folder, self._lock_fd, *(end.fileno() for end in (*listener, *list(self._connections)))]

    def start(self) -> None:
        """Raises InUse when a living process serves this volume; a dead one's socket is replaced."""
        path = make_runtime_dir() / socket_name(self._volume_path)
        folder = open_runtime_dir(path.parent)
        try:
            self._lock_fd = _claim(folder, path.with_suffix(LOCK_SUFFIX).name, self._volume)
            try:
                _refuse_live(folder, path, self._volume)
                self._listener = _listen(folder, path.name)
            except BaseException:
                fd, self._lock_fd = self._lock_fd, -1
                os.close(fd)
                raise
        except BaseException:
            os.close(folder)
            raise
        self._folder = folder
        self.path = path
        self._start_thread(self._accept_all, "fvd-control")

    def close(self) -> None:
        """Ends every connection and gives the socket up. Waits for a handler that is at work."""
        self.stop()
        with self._lock:
            senders = dict(self._senders)
        for sender in senders:
            sender.finish()
        deadline = time.monotonic() + LAST_WORDS_SECONDS
        for thread in senders.values():
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def stop(self) -> None:
        """Gives the socket up and answers nobody any more; streams go on until `close`. Waits for a handler that is at work."""
        if self._listener is None:
            return
        assert self.path is not None
        with self._lock:
            self._closing = True
            self._closed.set()
            connections = self._connections - self._streaming
            threads = self._threads - set(self._senders.values())
        # The name goes first: who looks from now on sees that nobody serves.
        _unlink(self._folder, self.path.name)
        for end in (self._listener, *connections):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RD)
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(STUCK_HANDLER_SECONDS)
        self._listener.close()
        self._listener = None
        folder, self._folder = self._folder, -1
        _unlink(folder, self.path.with_suffix(LOCK_SUFFIX).name)
        os.close(folder)
        fd, self._lock_fd = self._lock_fd, -1
        os.close(fd)

    def _start_thread(self, target: Callable[..., None], name: str, *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments, name=name, daemon=True)
        with self._lock:
            self._threads.add(thread)
            thread.start()  # before anybody can see it: what has not been started cannot be joined

    def _accept_all(self) -> None:
        assert self._listener is not None
        poller = select.poll()
        poller.register(self._listener, select.POLLIN)
        while True:
            poller.poll()
            try:
                with between_forks:
                    connection, _ = self._listener.accept()
                    with self._lock:
                        refused = self._closing or len(self._connections) >= CONNECTIONS_MAX
                        if not refused:
                            self._connections.add(connection)
            except OSError as error:
                if self._closing:
                    return
                if not isinstance(error, BlockingIOError):  # which is: the client has gone again
                    self._closed.wait(0.1)  # out of descriptors, say: it passes
                continue
            if refused:
                connection.close()
            else:
                self._start_thread(self._converse, "fvd-control-client", connection)

    def _converse(self, connection: socket.socket) -> None:
        try:
            connection.settimeout(self._idle_timeout_seconds)
            lines = protocol.Lines(protocol.REQUEST_BYTES_MAX)
            while data := connection.recv(1 << 16):
                try:
                    requests = lines.feed(data)
                except protocol.ProtocolError as error:
                    # The rest of an endless line cannot be told from a request.
                    connection.sendall(protocol.encode_error(error))
                    return
                for line in requests:
                    answer = self._answer(line)
                    if isinstance(answer, Request):
                        if self._stream(connection, answer):
                            return
                        continue
                    connection.sendall(answer)
        except OSError:
            pass  # the asker went away, or said nothing for too long
        finally:
            connection.close()
            with self._lock:
                self._connections.discard(connection)
                self._threads.discard(threading.current_thread())

    def _answer(self, line: bytes) -> bytes | Request:
        """The line that answers; the request itself where a stream answers it."""
        try:
            request = protocol.decode_request(line)
            if request.verb in self._stream_verbs:
                return request
            handler = self._handlers.get(request.verb)
            if handler is None:
                raise InvalidArgument(f"{self._volume}: unknown verb {quoted(request.verb)}; known are: {self._known()}")
            return protocol.encode_result(handler(request.arguments))
        except Exception as error:  # whatever a handler raises is the asker's answer, never the server's end
            return protocol.encode_error(error)

    def _stream(self, connection: socket.socket, request: Request) -> bool:
        """Sends the stream to its end; False: it was refused, and the conversation goes on."""
        sender = Sender(connection, self._heartbeat_seconds, self._stalled_seconds)
        try:
            try:
                self._enlist(sender, connection)
                stream = self._stream_verbs[request.verb](request.arguments, sender.wakeup.notify)
            except Exception as error:  # as in _answer
                connection.sendall(protocol.encode_error(error))
                return False
            try:
                sender.run(stream)
            finally:
                stream.close()
            return True
        finally:
            with self._lock:
                self._senders.pop(sender, None)
                self._streaming.discard(connection)

    def _enlist(self, sender: Sender, connection: socket.socket) -> None:
        with self._lock:
            if self._closing:
                raise protocol.ServerGone(f"{self._volume}: its server is stopping")
            if len(self._senders) >= STREAMS_MAX:
                raise FvdError(f"{self._volume}: {STREAMS_MAX} connections follow its events already; end one of them")
            self._senders[sender] = threading.current_thread()
            self._streaming.add(connection)

    def _known(self) -> str:
        return ", ".join(sorted({*self._handlers, *self._stream_verbs}))


def _unlink(folder: int, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)


def _claim(folder: int, name: str, volume: str) -> int:
    """The lock beside the socket, held as long as the process lives; whoever holds it owns the socket's name."""
    while True:
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, SOCKET_MODE, dir_fd=folder)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise InUse(f"{volume}: another process serves it; ask it with fvd-lv info, or stop it first") from None
        try:
            still_there = os.path.samestat(os.fstat(fd), os.stat(name, dir_fd=folder, follow_symlinks=False))
        except FileNotFoundError:
            still_there = False
        if still_there:
            os.ftruncate(fd, 0)
            os.pwrite(fd, volume.encode(), 0)
            return fd
        os.close(fd)  # its owner removed it between our open and our lock


def _refuse_live(folder: int, path: Path, volume: str) -> None:
    """Someone who removed the lock file must not lead to two servers on one name."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(f"/proc/self/fd/{folder}/{path.name}")
        except (FileNotFoundError, ConnectionRefusedError):
            return
        except OSError as error:
            raise InUse(f"{volume}: {path} is in the way ({error.strerror}); if nobody serves this volume, move it away") from None
    raise InUse(f"{volume}: another process answers at {path}; stop it first")


def _listen(folder: int, name: str) -> socket.socket:
    """Bound under another name, given its mode, then moved into place: never seen with the wrong mode, a stale one is replaced."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    fresh = f"{name.removesuffix(SUFFIX)}.{os.getpid()}.new"
    try:
        _unlink(folder, fresh)
        listener.bind(f"/proc/self/fd/{folder}/{fresh}")
        os.chmod(fresh, SOCKET_MODE, dir_fd=folder)
        listener.listen(CONNECTIONS_MAX)
        os.rename(fresh, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        listener.close()
        _unlink(folder, fresh)
        raise
    return listener
