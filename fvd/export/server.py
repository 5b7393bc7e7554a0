# SPDX-License-Identifier: Apache-2.0
"""The server as Python sees it: listening sockets, NBD handshakes, guests (guests.py), control calls, start and stop.

Requests never come here: `_server.NbdLoop` moves them in the same thread, and returns to this module for everything else. May not know
the command line, the format, or how a disk was opened.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

from fvd._lifetime import between_forks, keep, never_wait
from fvd.counted import Counted, say_due
from fvd.device._queue import Source
from fvd.engine._backend import Backend
from fvd.engine._engine import Engine
from fvd.engine._engine_backend import EngineBackend
from fvd.errors import Conflict, DeviceError, InUse, InvalidArgument, NotFound, Timeout, quoted
from fvd.export import handshake
from fvd.export._nbd import PAYLOAD_BYTES_MAX
from fvd.export._server import NbdLoop
from fvd.export.guests import Guests
from fvd.export.listening import BoundName, Given, Listen, Nowhere, Tcp, Unix, check_given, open_listener
from fvd.export.peers import Peer, is_privileged, peer_of, tune
from fvd.units import MIB
from fvd.virtio.config import GuestDisk

Result = TypeVar("Result")
log = logging.getLogger(__name__)

_RECEIVE_BYTES = 4096
# Clients are let in, or turned away, a few at a time, and then rested from for as many times as long as that took: whoever comes and
# goes as fast as he can leaves the requests of others their time.
_ACCEPTS_PER_STEP = 16
_REST = 4
_AFTER_FAILURE_SECONDS = 0.25
_EVENTS_PER_SHAKE = 16
_EVENTS_PER_STEP = 64  # of all handshakes: requests go in between


@dataclass(frozen=True)
class Limits:
    """What clients may cost."""

    connections: int = 256  # more are turned away
    kept_connections: int = 8  # of those, for root and the owner of this process
    peer_connections: int = 64  # of one user (Unix), neither root nor the owner, or of one address (TCP)
    connection_inflight_bytes: int = 64 * MIB  # of requests under way; beyond it their socket is not read
    total_inflight_bytes: int = 512 * MIB  # of requests under way and that wait, and of buffers kept for the next
    connection_waiting_bytes: int = 64 * MIB  # of writes that wait for storage; beyond it they end with ENOSPC
    handshake_seconds: float = 10.0
    stall_seconds: float = 60.0  # for each MiB of a request half sent, or of replies not taken; being idle is no stalling
    drain_seconds: float = 10.0  # at the end: for clients to take the replies of what is under way


@dataclass
class _Client:
    """A connection whose handshake is under way."""

    socket: socket.socket
    handshake: handshake.Handshake
    peer: Peer
    deadline: float
    unsent: bytes


class Refusal(NamedTuple):
    kind: str  # one of a few
    reason: str


@dataclass
class _Call:
    function: Callable[[], Any]
    future: Future[Any] = field(default_factory=Future)


def _logged(function: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        try:
            function()
        except Exception:
            log.exception("what was to be done in the serving thread failed")

    return run


class NbdServer:
    """Serves any number of exports on one address, in one thread.

    run() serves in the calling thread; start() in one of its own. Everything else is thread-safe.
    """

    def __init__(
        self,
        listen: Listen,
        *,
        limits: Limits | None = None,
        busy_poll_us: int = 0,
        force_blocking: bool = False,
        on_stop: Callable[[], None] | None = None,
        on_end: Callable[[], None] | None = None,
    ) -> None:
        """`on_stop` runs in the serving thread after the last request has been answered, before the device queue goes: the place to
        close_export() each disk. `on_end` is the last that happens in it, also where serving has failed."""
        if not 0 <= busy_poll_us <= 10_000:
            raise InvalidArgument(f"busy_poll_us={busy_poll_us}: choose 0 to 10000 microseconds")
        self._listen = listen
        self._limits = limits or Limits()
        self._on_stop = on_stop
        self._on_end = on_end
        self._loop = NbdLoop(
            connection_bytes=self._limits.connection_inflight_bytes,
            total_bytes=self._limits.total_inflight_bytes,
            waiting_bytes=self._limits.connection_waiting_bytes,
            connections=self._limits.connections,
            stall_ns=int(self._limits.stall_seconds * 1e9),
            busy_poll_us=busy_poll_us,
            force_blocking=force_blocking,
        )
        self._exports: dict[str, handshake.Export] = {}
        self._abandoned: dict[str, handshake.Export] = {}  # that are not closed yet, and not served any more
        self._on_want: dict[int, Callable[[int], None]] = {}
        self._clients: dict[int, _Client] = {}
        self._calls: deque[_Call] = deque()
        self._postponed: list[Callable[[], None]] = []  # to do when the loop is there
        self._again: dict[int, None] = {}  # handshakes that used up their share of a step, the longest first
        self._lock = threading.RLock()  # of _calls, _wake and _serving; a signal handler may come in between
        self._wake = -1
        self._thread: threading.Thread | None = None
        self._serving: int | None = None  # the serving thread's ident
        self._ready: Future[None] = Future()
        self._failure: BaseException | None = None
        self._stopping = False
        self._accept_later: set[int] = set()  # of listeners: their queue may hold more
        self._notes = Counted(log)  # whatever clients can have us say as often as they like
        self._accept_at = 0.0  # not before
        self._turned_away = 0
        self._owner_uid = 0
        self._listeners: dict[int, socket.socket] = {}
        self._arriving: socket.socket | None = None  # accepted last
        self._bound: BoundName | None = None  # of our Unix socket
        self._guests = Guests(self._loop, self._notes)
        keep(self, NbdServer._descriptors)

    def _descriptors(self) -> list[int]:
        """For a child after fork."""
        handshakes = [client.socket.fileno() for client in list(self._clients.values())]
        arriving = [] if self._arriving is None else [self._arriving.fileno()]  # -1 once it belongs to the loop or is closed
        return [self._wake, *self._listeners, *arriving, *handshakes, *self._loop.descriptors()]

    # --- Exports ------------------------------------------------------------------------------------------------

    def add_export(
        self,
        name: str,
        engine: Engine | Backend,
        *,
        storage_fd: int,
        base_fd: int = -1,
        remote: Source | None = None,
        sampler_fd: int = -1,
        size_bytes: int,
        read_only: bool = False,
        block_size_bytes: int = 4096,
        minimum_block_bytes: int = 1,
        description: str = "",
        on_want: Callable[[int], None] | None = None,
    ) -> None:
        """Offer a disk. The descriptors, and `remote` (an open fvd.device._remote.Remote instead of `base_fd`), stay the caller's and
        must outlive close_export(); those of the base, release_base(). `sampler_fd`: another open file of the storage, asked whether it has
        heard of a lost page before a flush counts. `block_size_bytes` is what requests are
        preferably aligned to. `on_want` is called in the serving thread with the engine's Want bits, once until they are cleared."""
        for text in (name, description):
            if len(text.encode()) > handshake.NAME_BYTES_MAX or "\0" in text:
                raise InvalidArgument(f"the name or description of export {quoted(name[:64])} is too long for NBD, or contains NUL")
        if not 1 <= minimum_block_bytes <= 65536 or minimum_block_bytes & (minimum_block_bytes - 1):
            raise InvalidArgument(f"the minimum block of {minimum_block_bytes} bytes is no power of two up to 64 KiB")
        if block_size_bytes < max(512, minimum_block_bytes) or block_size_bytes & (block_size_bytes - 1):
            raise InvalidArgument(f"the block size of {block_size_bytes} bytes is no power of two from {max(512, minimum_block_bytes)}")
        if not 0 <= size_bytes < 1 << 63 or size_bytes % minimum_block_bytes:
            raise InvalidArgument(f"the size of {size_bytes} bytes is no multiple of the minimum block of {minimum_block_bytes}")
        backend = engine if isinstance(engine, Backend) else EngineBackend(engine)

        def attach() -> None:
            if name in self._exports:
                raise Conflict(f"an export named {quoted(name)} is already served")
            number = self._loop.add_export(backend, storage_fd, base_fd, remote, sampler_fd)
            preferred = min(block_size_bytes, PAYLOAD_BYTES_MAX)
            export = handshake.Export(name, number, size_bytes, read_only, minimum_block_bytes, preferred, description)
            self._exports[name] = export
            if on_want is not None:
                self._on_want[number] = on_want

        self._call_or_postpone(attach)

    def add_guest_port(self, name: str, listen: Listen, queues: int) -> None:
        """Has guests of an export come in by vhost-user, at a Unix socket, each with so many queues at most. Raises as
        fvd.export.guests.Guests.add_port."""

        def attach() -> None:
            export = self._exports[name]
            disk = GuestDisk(export.size_bytes, export.read_only, export.preferred_block_bytes, name.encode(), queues)
            self._guests.add_port(name, export.number, disk, listen)

        self._call_or_postpone(attach)

    def guest_count(self, name: str) -> int:
        """How many front ends are connected to an export. From any thread."""
        return self._guests.count_of(name)

    def close_export(self, name: str) -> None:
        """Stop serving a disk: answer what is under way, hang up on its clients, have its engine close. Raises what that failed with."""
        self.call(lambda: self._close_export(name))

    def abandon_export(self, name: str) -> None:
        """Hang up on a disk's clients at once, whatever they wait for, and take no more: nothing of it is answered afterwards. It is still
        to be closed. Again is fine."""

        def abandon() -> None:
            export = self._exports.pop(name, None)
            if export is not None:
                self._abandoned[name] = export
                self._loop.drop_all(export.number)
                self._guests.close_ports(name)
                self._guests.end(name)

        self.call(abandon)

    def _close_export(self, name: str) -> None:
        export = self._exports.pop(name, None) or self._abandoned.pop(name, None)
        if export is None:
            raise NotFound(f"no export named {quoted(name)} is served")
        self._guests.close_ports(name)
        self._loop.drain(int(self._limits.drain_seconds * 1e9), export.number)
        self._see_guests_off(name, export.number)
        result = self._loop.request(export.number, close=True)
        self._loop.remove_export(export.number)
        self._on_want.pop(export.number, None)
        if result:
            raise DeviceError(f"closing {quoted(name)}: {os.strerror(-result)}; what was not flushed may be lost")

    def _see_guests_off(self, name: str, number: int) -> None:
        """Their rings have been drained: what they were still to be told has been told."""
        self._guests.take_rings(self._loop.pop_rings(), reading=False)
        self._guests.end(name)
        self._loop.drain(int(self._limits.drain_seconds * 1e9), number)  # of what a message that waited has begun again
        self._guests.take_rings(self._loop.pop_rings(), reading=False)

    def release_base(self, name: str) -> None:
        """A disk needs its base no longer: the caller may close it. Raises Conflict while something is still read from it."""

        def release() -> None:
            export = self._exports.get(name)
            if export is None:
                raise NotFound(f"no export named {quoted(name)} is served")
            try:
                self._loop.release_base(export.number)
            except RuntimeError as error:
                raise Conflict(f"the base of {quoted(name)} is in use: {error}") from error

        self.call(release)

    def shape(self, name: str) -> tuple[int, int]:
        """Size and transmission flags of an export, for a client that makes no handshake. Raises NotFound."""
        export = self._find(name)
        return export.size_bytes, export.flags(structured=False)

    def take_connection(self, name: str, connection: socket.socket) -> None:
        """Serve this socket of ours, at whose other end somebody sends requests without a handshake. Raises NotFound, InUse: there are as
        many connections as may be. It is the server's from here on, or closed."""

        def take() -> None:
            try:
                export, peer = self._find(name), peer_of(connection)
                if refusal := self._refusal(peer):
                    raise InUse(f"{quoted(name)}: {refusal.reason}")
                connection.setblocking(False)
                tune(connection, self._connection_count())
                self._adopt(connection, handshake.Start(export, structured=False, allocation=False, received=b""), peer)
            except BaseException:
                connection.close()
                raise

        self.call(take)

    def _find(self, name: str) -> handshake.Export:
        export = self._exports.get(name)
        if export is None:
            raise NotFound(f"no export named {quoted(name)} is served")
        return export

    def uri(self, name: str = "") -> str:
        """The NBD URI of an export, empty where there is no NBD. For TCP with port 0, once the server runs."""
        match self._listen:
            case Nowhere():
                return ""
            case Unix(path):
                return _unix_uri(path, name)
            case Tcp(host, port):
                taken = next((listener.getsockname()[1] for listener in self._listeners.values()), port)
                return _tcp_uri(host, taken, name)
            case Given((first, *_)):
                address = first.getsockname()
                return _unix_uri(os.fsdecode(address), name) if first.family == socket.AF_UNIX else _tcp_uri(address[0], address[1], name)
        raise InvalidArgument("no socket was given to listen on")

    @property
    def notice(self) -> str:
        """Why the device queue is not io_uring; empty when it is, or before the server runs."""
        return self._loop.queue.notice if self._loop.queue is not None else ""

    # --- Running ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve in this thread until stop(); once."""
        if self._ready.done() or self._serving is not None:
            raise Conflict("an NBD server runs once: make another")
        try:
            never_wait()
            self._open()
            self._ready.set_result(None)
            while not self._stopping:
                self._step()
            self._shut_down()
        except BaseException as error:
            if not self._ready.done():
                self._ready.set_exception(error)
            raise
        finally:
            try:
                self._close()
            finally:
                if self._on_end is not None:
                    self._on_end()

    def start(self) -> None:
        """Serve in a thread of our own; returns when clients can connect."""
        if self._thread is not None:
            raise Conflict("the server was started before")
        self._thread = threading.Thread(target=self._run_thread, name="fvd-nbd", daemon=True)
        try:
            self._thread.start()
        except BaseException:  # no memory for a thread: stop() has nothing to wait for
            self._thread = None
            raise
        self._ready.result()

    def stop(self, timeout_seconds: float | None = None) -> None:
        """Answer what is under way, flush, hang up. May be called from a signal handler. Waits for a thread that start() made, and
        raises what ended it."""
        with self._lock:
            self._stopping = True
            self._wake_up()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout_seconds)
            if thread.is_alive():
                raise Timeout(f"the NBD server did not stop within {timeout_seconds} s")
            failure, self._failure = self._failure, None
            if failure is not None:
                raise failure

    def call(self, function: Callable[[], Result], timeout_seconds: float | None = None) -> Result:
        """Run `function` in the serving thread, between two turns; its result or exception."""
        if threading.get_ident() == self._serving:
            return function()
        call = _Call(function)
        with self._lock:
            if self._serving is None:
                raise Conflict("the NBD server does not run")
            self._calls.append(call)
            self._wake_up()
        try:
            result: Result = call.future.result(timeout_seconds)
        except FutureTimeout:
            if call.future.cancel() or not call.future.done():
                raise Timeout(f"the serving thread did not answer within {timeout_seconds} s") from None
            raise
        return result

    def post(self, function: Callable[[], object]) -> None:
        """As `call`, without waiting for it; nothing happens when the server does not run. What it raises is logged."""
        with self._lock:
            if self._serving is not None:
                self._calls.append(_Call(_logged(function)))
                self._wake_up()

    def counters(self) -> dict[str, Any]:
        """Requests, bytes and connections, in total and by export."""

        def collect() -> dict[str, Any]:
            counters = self._loop.counters()
            by_number = counters.pop("exports")
            counters["exports"] = {name: by_number[export.number] for name, export in self._exports.items()}
            counters["handshakes"] = len(self._clients)
            counters["guests"] = self._guests.count
            counters["turned_away"] = self._turned_away
            return counters

        return self.call(collect)

    def _call_or_postpone(self, function: Callable[[], None]) -> None:
        with self._lock:
            if self._serving is None:
                self._postponed.append(function)
                return
        self.call(function)

    def _wake_up(self) -> None:
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)

    def _run_thread(self) -> None:
        try:
            self.run()
        except BaseException as error:
            if self._ready.exception() is not error:  # else start() raises it
                self._failure = error
                log.exception("the NBD server failed")

    def _open(self) -> None:
        self._loop.open()
        self._owner_uid = os.geteuid()
        for attach in self._postponed:
            attach()
        self._postponed.clear()
        if isinstance(self._listen, Given):
            check_given(self._listen)
            listeners = self._listen.sockets
        elif isinstance(self._listen, Nowhere):
            listeners = ()
        else:
            listener, self._bound = open_listener(self._listen)
            listeners = (listener,)
        self._listeners = {listener.fileno(): listener for listener in listeners}
        for fd in self._listeners:
            self._loop.watch(fd)
        with self._lock, between_forks:
            self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._serving = threading.get_ident()
        self._loop.watch(self._wake)
        self._guests.open()
        if self.notice:
            log.warning("%s", self.notice)

    def _step(self) -> None:
        ready = self._loop.turns(self._until_accepting_ns())
        if self._wake in ready:  # first: what follows may ring it again
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake)
        events_left = _EVENTS_PER_STEP
        began = time.monotonic()
        for fd in dict.fromkeys([*self._again, *self._accept_later, *ready]):  # who has waited comes first
            if fd in self._listeners:
                if began >= self._accept_at:
                    self._accept(self._listeners[fd])
                else:
                    self._accept_later.add(fd)
            elif fd in self._clients:
                events_left -= self._shake(fd, self._clients[fd], min(_EVENTS_PER_SHAKE, events_left))
        self._guests.take_rings(self._loop.pop_rings())
        self._guests.take_ready(ready)
        if self._guests.has_more:
            self._wake_up()
        now = time.monotonic()
        self._accept_at = max(self._accept_at, now + _REST * (now - began))
        self._run_calls()
        for number, wants in self._loop.pop_wants():
            if number in self._on_want:
                try:
                    self._on_want[number](wants)
                except Exception:
                    log.exception("what an engine wanted (%#x) could not be done", wants)
        now = time.monotonic()
        for fd in [fd for fd, client in self._clients.items() if now > client.deadline]:
            self._reject(fd, f"no handshake within {self._limits.handshake_seconds:g} s")
        self._tell_endings()
        say_due()

    def _tell_endings(self) -> None:
        garbage, half_sent, not_taken = self._loop.take_endings()
        within = f"for {self._limits.stall_seconds:g} s"
        self._notes.warning("garbage", "disconnected a client that sent what is no request", times=garbage)
        self._notes.warning("half sent", f"disconnected a client that had sent half a request, {within}", times=half_sent)
        self._notes.warning("not taken", f"disconnected a client that had not taken its replies, {within}", times=not_taken)

    def _run_calls(self) -> None:
        while self._calls:
            call = self._calls.popleft()
            if not call.future.set_running_or_notify_cancel():
                continue
            try:
                call.future.set_result(call.function())
            except BaseException as error:
                call.future.set_exception(error)

    def _shut_down(self) -> None:
        self._close_listeners()
        self._guests.close_ports()
        for fd in list(self._clients):
            self._reject(fd, "the server stops")
        self._loop.drain(int(self._limits.drain_seconds * 1e9))
        for name, export in self._exports.items():
            self._see_guests_off(name, export.number)
        self._run_calls()
        for name, export in self._exports.items():
            if result := self._loop.request(export.number):
                log.error("the last flush of %r failed: %s", name, os.strerror(-result))
        if self._on_stop is not None:
            self._on_stop()

    def _close(self) -> None:
        with self._lock:
            self._serving = None
            wake, self._wake = self._wake, -1
            calls, self._calls = self._calls, deque()
        self._close_listeners()
        self._guests.close_ports()
        for client in self._clients.values():
            client.socket.close()
        self._clients.clear()
        self._loop.close()
        self._notes.say_due(all_of_it=True)
        if wake >= 0:
            os.close(wake)
        for call in calls:
            if call.future.set_running_or_notify_cancel():
                call.future.set_exception(Conflict("the NBD server has stopped"))

    def _close_listeners(self) -> None:
        bound, self._bound = self._bound, None
        if bound is not None:
            bound.remove()
        listeners, self._listeners = self._listeners, {}
        self._accept_later.clear()
        for fd, listener in listeners.items():
            with contextlib.suppress(KeyError):
                self._loop.unwatch(fd)
            listener.close()

    # --- Handshakes ---------------------------------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        self._accept_later.discard(listener.fileno())
        for _ in range(_ACCEPTS_PER_STEP):
            try:
                with between_forks:
                    client, _address = listener.accept()
                    self._arriving = client
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.ECONNABORTED, errno.EINTR):
                    continue
                self._notes.error("accept", f"accept: {error.strerror}")  # out of descriptors or memory: it passes
                self._accept_at = time.monotonic() + _AFTER_FAILURE_SECONDS
                break
            try:
                self._take_in(client)
            except OSError as error:  # it has gone already, say
                client.close()
                self._notes.info("handshake", f"a client's handshake ended: {error.strerror}")
        self._accept_later.add(listener.fileno())  # there may be more, and the queue does not ring again for them

    def _until_accepting_ns(self) -> int:
        """How long the loop may turn without us; negative: as long as it likes."""
        if not self._accept_later:
            return -1
        return max(0, int((self._accept_at - time.monotonic()) * 1e9))

    def _take_in(self, client: socket.socket) -> None:
        peer = peer_of(client)
        refusal = self._refusal(peer)
        if refusal:
            self._turned_away += 1
            self._notes.warning(("turned away", refusal.kind), f"turned a client away: {refusal.reason}")
            client.close()
            return
        client.setblocking(False)
        tune(client, self._connection_count())
        deadline = time.monotonic() + self._limits.handshake_seconds
        entry = _Client(client, handshake.Handshake(self._exports), peer, deadline, handshake.Handshake.greeting())
        self._clients[client.fileno()] = entry
        self._loop.watch(client.fileno())
        self._shake(client.fileno(), entry, _EVENTS_PER_SHAKE)

    def _connection_count(self) -> int:
        return len(self._clients) + self._loop.connection_count

    def _refusal(self, peer: Peer) -> Refusal | None:
        """Why there is no place for another client of this peer."""
        limits = self._limits
        by_peer = Counter(client.peer.key for client in self._clients.values()) + Counter(self._loop.peer_connections())
        total = by_peer.total()
        if total >= limits.connections:
            return Refusal("all", f"{total} are connected, which is all that may be")
        if is_privileged(peer.key, self._owner_uid):
            return None
        kept = min(limits.kept_connections, limits.connections - 1)
        if sum(count for key, count in by_peer.items() if not is_privileged(key, self._owner_uid)) >= limits.connections - kept:
            return Refusal("others", f"{total} are connected, and {kept} places are kept for root and this server's owner")
        if by_peer[peer.key] >= limits.peer_connections:
            return Refusal("peer", f"{peer} has {by_peer[peer.key]} connections, which is all that one may have")
        return None

    def _shake(self, fd: int, client: _Client, events: int) -> int:
        """Take a handshake as far as it goes now, through so many events. Returns how many there were."""
        if events <= 0:
            self._again.setdefault(fd)  # it keeps its place
            self._wake_up()
            return 0
        self._again.pop(fd, None)
        done = 0
        try:
            while done < events:
                done += 1
                while client.unsent:
                    client.unsent = client.unsent[client.socket.send(client.unsent) :]
                match client.handshake.next_event():
                    case handshake.Send(data):
                        client.unsent = data
                    case handshake.NeedData():
                        client.handshake.receive_data(client.socket.recv(_RECEIVE_BYTES))
                    case handshake.Start() as start:
                        self._begin(fd, client, start)
                        return done
                    case handshake.Rejected(reason):
                        self._reject(fd, reason)
                        return done
        except BlockingIOError:
            if client.unsent:
                self._loop.want_write(fd)
            return done
        except OSError as error:
            self._reject(fd, error.strerror or str(error))
            return done
        self._again[fd] = None
        self._wake_up()
        return done

    def _begin(self, fd: int, client: _Client, start: handshake.Start) -> None:
        export = start.export
        if self._exports.get(export.name) is not export:
            self._reject(fd, "its export was closed")
            return
        self._forget(fd)
        try:
            self._adopt(client.socket, start, client.peer)
        except BaseException:
            client.socket.close()
            raise

    def _adopt(self, connection: socket.socket, start: handshake.Start, peer: Peer) -> None:
        export = start.export
        self._loop.adopt(
            connection.fileno(),
            export.number,
            export.size_bytes,
            export.minimum_block_bytes,
            export.read_only,
            start.structured,
            start.allocation,
            start.received,
            *peer.key,
        )
        connection.detach()

    def _reject(self, fd: int, reason: str) -> None:
        self._notes.info("handshake", f"a client's handshake ended: {reason}")
        self._forget(fd).socket.close()

    def _forget(self, fd: int) -> _Client:
        self._loop.unwatch(fd)
        self._again.pop(fd, None)
        return self._clients.pop(fd)


def _unix_uri(path: str, name: str) -> str:
    return f"nbd+unix:///{quote(name, safe='')}?socket={quote(str(Path(path).absolute()), safe='/')}"


def _tcp_uri(host: str, port: int, name: str) -> str:
    return f"nbd://{f'[{host}]' if ':' in host else host}:{port}/{quote(name, safe='')}"
