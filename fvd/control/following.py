# SPDX-License-Identifier: Apache-2.0
"""Follows the events of served disks through their control sockets, those of disks that begin to be served later too.

One thread, the one that calls ``next``, waits for all sockets at once. A server that is killed is noticed at once, one that is stuck by its
silence; what was missed in between is fetched from the server's history. Events are plain values here: their meaning is the API's business.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fvd._lifetime import between_forks, keep
from fvd.control import protocol
from fvd.control.paths import all_sockets, find_sockets, short_address, socket_name
from fvd.control.protocol import Request
from fvd.control.streaming import HEARTBEAT_SECONDS
from fvd.control.trust import is_believed_about, is_stranger, peer_uid
from fvd.control.wakeup import Wakeup
from fvd.control.watching import SocketWatch
from fvd.counted import Counted
from fvd.errors import FvdError, NotFound, PermissionDenied

log = logging.getLogger(__name__)

VERB = "events"
SILENCE_SECONDS = 3 * HEARTBEAT_SECONDS
GONE = "its server has ended without closing the disk; the next open on this host shows all that it had acknowledged, or says why not"
START_SECONDS = 5.0  # whoever has not answered by then is waited for while others are followed already
# A server that takes a connection and hangs up (it has too many) is asked again, first at once, then at this distance.
RETRY_SECONDS = 1.0
_QUICK_FAILURES = 3
_RECEIVE_BYTES = 1 << 16


@dataclass
class _Peer:
    """One server, as far as it is known; it outlives a connection that breaks."""

    path: Path
    history: bool
    link: socket.socket | None = None
    uid: int = -1  # whose process listens there
    lines: protocol.Lines = field(default_factory=lambda: protocol.Lines(protocol.STREAM_LINE_BYTES_MAX))
    answered: bool = False  # on this connection
    connected_at: float = 0.0
    heard_at: float = 0.0
    retry_at: float | None = None
    failures: int = 0  # in a row
    volume: str = ""  # "": it has never answered
    server: str = ""
    number: int | None = 0  # of the last event; None: any may be the first
    sizes: dict[str, int] = field(default_factory=lambda: {"storage_size": 0, "free_bytes": 0})
    closed: bool = False  # it has said that the disk is closed
    told_gone: bool = False


class Follower:
    """The events of some disks, or of all. ``next`` in one thread at a time; ``close`` from any, and from a signal handler."""

    def __init__(self, volume_paths: Sequence[str] | None, *, history: bool = False, silence_seconds: float = SILENCE_SECONDS) -> None:
        """`volume_paths`: files or device nodes, which need not be there yet; None: every disk that this user may follow."""
        self._volume_paths = volume_paths
        self._history = history
        self._silence_seconds = silence_seconds
        self._peers: dict[Path, _Peer] = {}
        self._ignored: set[Path] = set()  # sockets of something else, until they are replaced
        self._events: deque[dict[str, Any]] = deque()
        self._wakeup = Wakeup()
        self._busy = threading.Lock()  # held by the thread that is in `next`
        self._closing = False
        keep(self, lambda follower: [peer.link.fileno() for peer in list(follower._peers.values()) if peer.link is not None])
        self._watch: SocketWatch | None = None
        self._notes = Counted(log)  # its owner can replace a socket as often as he likes

    def open(self) -> None:
        """Connects to the servers that there are and waits for their answers. Raises PermissionDenied, Unsupported (no inotify), and for
        volumes that were named whatever their servers answer."""
        with self._busy:
            try:
                self._watch = SocketWatch()
                self._look(first=True)
                deadline = time.monotonic() + START_SECONDS
                while (waiting := [peer for peer in self._peers.values() if not peer.answered]) and time.monotonic() < deadline:
                    self._turn(waiting, deadline)
                    if self._closing:
                        break
            except BaseException:
                self._release()
                raise

    def unserved(self) -> list[str]:
        """The paths of those volumes, of the ones that were named, that nobody serves now."""
        served = {path.name for path, peer in list(self._peers.items()) if peer.volume}
        return [path for path in self._volume_paths or () if _socket_names([path]).isdisjoint(served)]

    def next(self) -> dict[str, Any] | None:
        """Waits for the next event. None: it has been closed."""
        try:
            with self._busy:
                while not self._closing and not self._events:
                    self._turn(list(self._peers.values()), None)
                return None if self._closing else self._events.popleft()
        finally:
            if self._closing:
                self.close()

    def close(self) -> None:
        """Ends a `next` that is waiting; again is fine."""
        self._closing = True
        self._wakeup.notify()
        if self._busy.acquire(blocking=False):  # else whoever is in `next` cleans up when it leaves
            try:
                self._release()
            finally:
                self._busy.release()

    def _release(self) -> None:
        for peer in self._peers.values():
            _disconnect(peer)
        self._peers.clear()
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.close()

    # --- Waiting ---------------------------------------------------------------------------------------------------------------------

    def _turn(self, peers: list[_Peer], until: float | None) -> None:
        """Waits for some of the servers, for new ones, for a wake-up or for a time to pass, and does what is to be done then."""
        assert self._watch is not None
        poller = select.poll()
        poller.register(self._wakeup.fd, select.POLLIN)
        poller.register(self._watch.fd, select.POLLIN)
        links = {peer.link.fileno(): peer for peer in peers if peer.link is not None}
        for fd in links:
            poller.register(fd, select.POLLIN)
        times = [when for peer in peers if (when := self._due(peer)) is not None] + ([] if until is None else [until])
        wait_ms = None if not times else max(0.0, min(times) - time.monotonic()) * 1000
        ready = {fd for fd, _ in poller.poll(wait_ms)}
        self._wakeup.clear()
        for fd, peer in links.items():
            if fd in ready:
                self._receive(peer)
        for peer in peers:
            due = self._due(peer)
            if due is not None and due <= time.monotonic():
                self._overdue(peer)
        if self._watch.fd in ready and (changed := self._watch.changed()):
            self._ignored -= changed
            self._look()

    def _due(self, peer: _Peer) -> float | None:
        if peer.retry_at is not None:
            return peer.retry_at
        return peer.heard_at + self._silence_seconds if peer.answered else None

    def _overdue(self, peer: _Peer) -> None:
        if peer.retry_at is not None:
            self._connect(peer)
            return
        self._tell_gone(peer, f"its server has said nothing for {self._silence_seconds:g} seconds; if it is only stuck, its events follow")
        _disconnect(peer)
        self._connect(peer)  # and wait for its answer as long as it takes

    # --- Connections -----------------------------------------------------------------------------------------------------------------

    def _look(self, first: bool = False) -> None:
        """Connects to every server that is wanted and not followed yet. All that one says is new if it was not there at first."""
        assert self._watch is not None
        self._watch.refresh()
        wanted = all_sockets() if self._volume_paths is None else [each for path in self._volume_paths for each in find_sockets(path)]
        for path in wanted:
            if path in self._peers or path in self._ignored:
                continue
            peer = self._peers[path] = _Peer(path, history=self._history or not first)
            if first:
                peer.number = None
            self._connect(peer)

    def _connect(self, peer: _Peer) -> bool:
        with between_forks:
            return self._connect_now(peer)

    def _connect_now(self, peer: _Peer) -> bool:
        peer.retry_at = None
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            with short_address(peer.path) as address:
                link.connect(address)
            peer.uid = peer_uid(link)
            link.sendall(protocol.encode_request(Request(VERB, {"history": peer.history or bool(peer.server)})))
        except (FileNotFoundError, ConnectionRefusedError):
            link.close()
            self._forget(peer)
            self._tell_gone(peer, GONE)
            return False
        except (BlockingIOError, BrokenPipeError, ConnectionResetError):  # it has many to take, or is just ending
            link.close()
            peer.retry_at = time.monotonic() + RETRY_SECONDS
            return False
        except OSError as error:
            link.close()
            self._refuse(peer, PermissionDenied(f"{peer.path}: cannot be asked for events: {error.strerror}"))
            return False
        peer.link = link
        peer.lines = protocol.Lines(protocol.STREAM_LINE_BYTES_MAX)
        peer.connected_at = peer.heard_at = time.monotonic()
        return True

    def _receive(self, peer: _Peer) -> None:
        assert peer.link is not None
        try:
            data = peer.link.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._hung_up(peer)
            return
        peer.heard_at = time.monotonic()
        try:
            for line in peer.lines.feed(data):
                if not peer.answered:
                    self._answered(peer, protocol.decode_answer(line, strange=is_stranger(peer.uid)))
                    continue
                streamed = protocol.decode_streamed(line, strange=is_stranger(peer.uid))
                if streamed.event is not None:
                    self._happened(peer, streamed.event)
                if streamed.end:
                    self._forget(peer)
                    self._look()  # another server may have come in its place already
                    return
        except protocol.ServerGone:  # it is stopping; so it hangs up, and the next connection is refused
            self._hung_up(peer)
        except FvdError as error:
            self._refuse(peer, error)

    def _hung_up(self, peer: _Peer) -> None:
        """Killed, or alive and tired of us: the next connection shows which."""
        lived = peer.answered and time.monotonic() - peer.connected_at >= RETRY_SECONDS
        peer.failures = 0 if lived else peer.failures + 1
        _disconnect(peer)
        if self._connect(peer) and peer.failures > _QUICK_FAILURES:
            _disconnect(peer)
            peer.retry_at = time.monotonic() + RETRY_SECONDS

    def _refuse(self, peer: _Peer, error: FvdError) -> None:
        """Not a server that can be followed. Nothing more is asked of it until another socket takes its place."""
        self._forget(peer)
        self._ignored.add(peer.path)
        if self._volume_paths is not None:
            raise error
        self._notes.warning("not followed", f"{peer.path}: its events are not followed: {error}")

    def _forget(self, peer: _Peer) -> None:
        _disconnect(peer)
        self._peers.pop(peer.path, None)

    # --- What they say ---------------------------------------------------------------------------------------------------------------

    def _answered(self, peer: _Peer, answer: Any) -> None:
        try:
            volume, server, number = str(answer["volume"]), str(answer["server"]), int(answer["number"])
            sizes = {name: int(answer[name]) for name in peer.sizes}
        except (KeyError, TypeError, ValueError):
            raise protocol.ProtocolError(f"{peer.path}: an answer that is none to {VERB}") from None
        if not is_believed_about(peer.uid, volume, peer.path.name):
            raise PermissionDenied(f"{peer.path}: user {peer.uid} listens there and speaks of a volume that is not his")
        if peer.server and server != peer.server:
            self._tell_gone(peer, "its server has ended without closing the disk, and another one serves it now")
            peer.number, peer.closed = 0, False
        peer.answered, peer.told_gone = True, False
        peer.volume, peer.server, peer.sizes = volume, server, sizes
        if peer.number is None and not peer.history:
            peer.number = number

    def _happened(self, peer: _Peer, event: dict[str, Any]) -> None:
        number = event.get("number")
        if event.get("volume") != peer.volume:
            raise protocol.ProtocolError(f"{peer.path}: an event of another volume than the server's")
        if not isinstance(number, int) or isinstance(number, bool):
            raise protocol.ProtocolError(f"{peer.path}: an event without a number")
        if peer.number is not None:
            if number <= peer.number:
                return  # from the history, and known
            event["lost"] = number - peer.number - 1
        peer.number = number
        peer.closed = peer.closed or event.get("kind") == "closed"
        peer.sizes = {name: event.get(name, size) for name, size in peer.sizes.items()}
        self._events.append(event)

    def _tell_gone(self, peer: _Peer, message: str) -> None:
        """Once for each server, and only for one that has answered and not said goodbye."""
        if peer.volume and not peer.closed and not peer.told_gone:
            peer.told_gone = True
            gone = {"kind": "server_gone", "volume": peer.volume, "number": 0, "time": time.time(), **peer.sizes, "message": message}
            self._events.append(gone)


def _disconnect(peer: _Peer) -> None:
    peer.answered = False
    if peer.link is not None:
        peer.link.close()
        peer.link = None


def _socket_names(volume_paths: Sequence[str]) -> set[str]:
    names = set()
    for path in volume_paths:
        with contextlib.suppress(NotFound):  # not there yet, so nobody serves it
            names.add(socket_name(path))
    return names
