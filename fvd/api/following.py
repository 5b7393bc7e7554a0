# SPDX-License-Identifier: Apache-2.0
"""The events of disks that other processes serve. Knows volume names and events, not how servers are asked."""

from __future__ import annotations

import logging
import threading
from types import TracebackType
from typing import TYPE_CHECKING

from fvd.api.events import EventQueue, EventStream, Waker, event_from_json
from fvd.counted import Counted

if TYPE_CHECKING:
    from fvd.control.following import Follower

log = logging.getLogger("fvd.api")


def events(*volumes: str, history: bool = False) -> FollowedEvents:
    """The events of these volumes as they are served, by whatever process; without any, of every disk of this user (root: of everyone's).

    A volume need not be served yet, nor exist: its events begin when it is served, and go on when it is served again. ``history``: of those
    that are served now, what they remember comes first. Returns when those that are served now are being followed; the iteration waits
    for events, and ends by ``close`` alone. A server that is killed is one event, server_gone.
    Raises InvalidArgument, PermissionDenied (another user's disk), Unsupported (no more inotify instances).
    """
    from fvd.control.following import Follower
    from fvd.volume.name import parse_name

    names = [parse_name(volume) for volume in volumes]
    follower = Follower([name.path for name in names] if names else None, history=history)
    follower.open()
    return FollowedEvents(follower, {name.path: str(name) for name in names})


class FollowedEvents(EventStream):
    """Events from other processes. Made by ``events``. A thread listens: nothing is missed while nobody waits for the next one."""

    def __init__(self, follower: Follower, names: dict[str, str]) -> None:
        waker = Waker()
        waiting = EventQueue(waker.notify)
        super().__init__(waiting, waker)
        self._follower = follower
        self._names = names
        # Without a reference to this object: dropping the last one ends the thread too.
        self._thread = threading.Thread(target=_listen, args=(follower, waiting), name="fvd-follow", daemon=True)
        self._thread.start()

    def unserved(self) -> list[str]:
        """Of the volumes that were named: those that nobody serves now."""
        return [self._names[path] for path in self._follower.unserved()]

    def close(self) -> None:
        if self._here.is_here:
            self._follower.close()
        super().close()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        super().__exit__(kind, error, trace)
        if self._here.is_here and self._thread is not threading.current_thread():
            self._thread.join()


def _listen(follower: Follower, waiting: EventQueue) -> None:
    failure = None
    notes = Counted(log)
    try:
        while (line := follower.next()) is not None:
            try:
                event = event_from_json(line)
            except TypeError as error:  # a part that every event has is missing
                notes.warning("event", f"an event that cannot be understood was passed over: {error}")
                continue
            waiting.put([event])
    except Exception as error:
        failure = error
        follower.close()
    waiting.source_ended(failure)
