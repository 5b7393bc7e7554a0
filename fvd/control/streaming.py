# SPDX-License-Identifier: Apache-2.0
"""The server's end of a streaming verb: sends what a stream has, as fast as its subscriber reads and no faster.

One thread for each subscriber, which waits for nothing but its own: whoever reads slowly, or not at all, costs a bounded amount of memory
and delays nobody. Knows sockets and messages, not what is told.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable
from typing import Any, Protocol

from fvd.control import protocol
from fvd.control.wakeup import Wakeup

# So often a line goes out when there is nothing to tell; the other side gives up on a server that is silent for three of them.
HEARTBEAT_SECONDS = 15.0
# A subscriber that has read nothing for so long is disconnected: it can connect again, and hears what is remembered.
STALLED_SECONDS = 60.0
# At close: for subscribers that are just reading to get the last lines.
LAST_WORDS_SECONDS = 1.0
_ITEMS_AT_ONCE = 64


class Stream(Protocol):
    """What a streaming verb sends."""

    @property
    def answer(self) -> Any:
        """The result in the answer line, which comes before everything else."""

    def take(self, limit: int) -> list[Any] | None:
        """At most `limit` things that are there now, as plain values; never waits. None: there will be no more."""

    def close(self) -> None:
        """The subscriber has gone; nobody is woken any more afterwards."""


# Begins a stream: (arguments, notify). `notify` is to be called, from any thread, whenever there is something to take; it never blocks.
StreamVerb = Callable[[dict[str, Any], Callable[[], None]], Stream]


class Sender:
    """Sends one stream over one connection. ``run`` in a thread of its own; ``finish`` from any thread."""

    def __init__(self, connection: socket.socket, heartbeat_seconds: float = HEARTBEAT_SECONDS, stalled_seconds: float = STALLED_SECONDS):
        self._connection = connection
        self._heartbeat_seconds = heartbeat_seconds
        self._stalled_seconds = stalled_seconds
        self._finishing = False
        self._finish_by = 0.0
        self.wakeup = Wakeup()

    def finish(self) -> None:
        """Send what there is and the end; a subscriber that does not take it at once is left."""
        self._finish_by = time.monotonic() + LAST_WORDS_SECONDS
        self._finishing = True
        self.wakeup.notify()

    def run(self, stream: Stream) -> None:
        """Until the stream ends, the subscriber goes, or `finish`. Raises OSError when the subscriber has gone."""
        connection, wakeup = self._connection, self.wakeup
        connection.setblocking(False)
        # Without POLLIN: a subscriber has nothing more to say, and one that only stopped saying it (shutdown) still listens.
        poller = select.poll()
        poller.register(wakeup.fd, select.POLLIN)
        poller.register(connection, 0)
        unsent = protocol.encode_result(stream.answer)
        ended = False
        sent_at = time.monotonic()
        while True:
            wakeup.clear()
            if self._finishing and time.monotonic() > self._finish_by:
                return
            if not unsent and not ended:
                unsent, ended = self._next(stream, time.monotonic() - sent_at)
            if unsent:
                try:
                    unsent = unsent[connection.send(unsent) :]
                    sent_at = time.monotonic()
                    continue
                except BlockingIOError:
                    wait = (LAST_WORDS_SECONDS if self._finishing else self._stalled_seconds) - (time.monotonic() - sent_at)
            elif ended:
                return
            else:
                wait = self._heartbeat_seconds - (time.monotonic() - sent_at)
            if unsent and wait <= 0:
                return
            poller.modify(connection, select.POLLOUT if unsent else 0)
            for fd, happened in poller.poll(max(0.0, wait) * 1000):
                if fd != wakeup.fd and happened & (select.POLLHUP | select.POLLERR):
                    return

    def _next(self, stream: Stream, silent_seconds: float) -> tuple[bytes, bool]:
        """What to send next, and whether that is the end."""
        items = stream.take(_ITEMS_AT_ONCE)
        if items:
            return b"".join(protocol.encode_event(item) for item in items), False
        if items is None or self._finishing:
            return protocol.encode_end(), True
        return (protocol.encode_heartbeat() if silent_seconds >= self._heartbeat_seconds else b""), False
