# SPDX-License-Identifier: Apache-2.0
"""What happens to a disk, for programs that wait for it: numbered events, their recent history, and whoever subscribed.

A hub belongs to one open disk. The disk's loop tells it what happened and goes on at once: no code of a listener runs there, nobody is
waited for, and what a slow listener does not fetch is dropped and counted. Knows neither sockets nor how a disk is driven.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from fvd._lifetime import Here
from fvd.api.types import from_json

if TYPE_CHECKING:
    from fvd.base.copying import BaseEvent
    from fvd.disk.opening import OpenVolume
    from fvd.storage.policy import GrowthEvent

log = logging.getLogger("fvd.api")

HISTORY_EVENTS = 64
QUEUE_EVENTS = 256
# What a failing command printed goes into a message; so much of it that memory and lines stay bounded.
MESSAGE_CHARACTERS_MAX = 4000
# At close: a callback that does not return is left behind rather than waited for for ever.
STUCK_CALLBACK_SECONDS = 5.0

EventKind = Literal[
    "served",
    "possible_loss",
    "low_water",
    "extend_started",
    "extend_done",
    "extend_failed",
    "storage_full",
    "extend_slow",
    "group_low",
    "group_full",
    "storage_error",
    "prefetch_started",
    "prefetch_progress",
    "prefetch_stopped",
    "prefetch_done",
    "base_released",
    "base_lost",
    "base_back",
    "closed",
    "server_gone",
]

# How much an administrator is told without asking.
_LEVELS = {
    "possible_loss": logging.WARNING,
    "extend_failed": logging.WARNING,
    "storage_full": logging.WARNING,
    "extend_slow": logging.WARNING,
    "group_low": logging.WARNING,
    "group_full": logging.WARNING,
    "storage_error": logging.ERROR,
    "base_lost": logging.WARNING,
}


@dataclass(frozen=True)
class Event:
    """Something that happened to a disk that is open. Sizes are bytes. docs/events.md says what to do about each kind."""

    kind: EventKind  # of a later version's server: also one that is not known here
    volume: str
    number: int  # of this disk since it was opened, from 1: a gap is seen. server_gone, which no server sends, has 0
    time: float  # Unix time in seconds
    storage_size: int  # what the disk has
    free_bytes: int  # storage that no chunk has taken
    target: int = 0  # what a growth step goes for
    seconds: float = 0.0  # what it has taken so far
    suspend_seconds: float | None = None  # how long the device was suspended in it; None: it never is, or unknown
    group: str = ""  # what growth is taken from: a volume group, a file system
    group_free_bytes: int | None = None
    message: str = ""  # for people
    lost: int = 0  # events that this listener missed before this one, for it was too slow
    copied_bytes: int = 0  # of prefetching and of the base: what no longer comes from it
    total_bytes: int = 0  # ... of so much
    eta_seconds: float | None = None  # ... until the rest has come; None: nobody can tell
    failed_errno: int = 0  # of storage_error after a flush or metadata write that failed: why
    failed_seconds: float | None = None  # ... when: Unix time
    failed_source: str = ""  # ... whose it was: this volume, or another one on the same device, whose flush took the only report


def event_from_json(answer: dict[str, Any]) -> Event:
    """An event from plain values, which may be those of another version."""
    return from_json(Event, answer)


def event_to_json(event: Event) -> dict[str, Any]:
    """Plain values with stable keys."""
    return asdict(event)


class EventStream(Iterator[Event]):
    """Events as they happen: an iterator that waits for the next one, and a context manager. One thread at a time iterates.

    ``close`` ends it, from any thread and from a signal handler; what was waiting for the next event then ends its iteration. In a child
    after ``os.fork`` the iteration raises Forked.
    """

    def __init__(self, waiting: EventQueue, waker: Waker) -> None:
        self._here = Here()
        self._waiting = waiting
        self._waker = waker
        self._closed = False

    def __next__(self) -> Event:
        self._here.check("a stream of events")
        while not self._closed:
            taken = self._waiting.take(1)
            if taken:
                return taken[0]
            if taken is None:
                break
            self._waker.wait()
        raise StopIteration

    def close(self) -> None:
        """No more events; again is fine."""
        self._closed = True
        if self._here.is_here:  # else somebody may hold the locks who is not there
            self._waker.notify()
            self._waiting.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_closed") and not self._closed:
            self.close()


class Waker:
    """Wakes the one thread that waits for it. ``notify`` never waits."""

    def __init__(self) -> None:
        self._rung: queue.SimpleQueue[None] = queue.SimpleQueue()

    def notify(self) -> None:
        if self._rung.empty():  # once is enough, however many events there are
            self._rung.put(None)

    def wait(self) -> None:
        self._rung.get()


class EventQueue:
    """What a listener has not fetched yet, at most QUEUE_EVENTS: then the oldest go, and the next that is fetched tells how many.

    ``notify`` is called, from any thread, when there is something to fetch; it must neither block nor raise.
    """

    def __init__(self, notify: Callable[[], None], sources: int = 1) -> None:
        self._lock = threading.RLock()  # a signal handler may close what its own thread is just reading
        self._events: deque[Event] = deque()
        self._lost = 0
        self._notify = notify
        self._sources = sources
        self._failure: Exception | None = None

    def take(self, limit: int = QUEUE_EVENTS) -> list[Event] | None:
        """What there is now, the oldest first; never waits. None: nothing, and nothing will come. Raises, once, what ended it."""
        with self._lock:
            taken: list[Event] = []
            with contextlib.suppress(IndexError):  # it has been closed in between
                while len(taken) < limit and self._events:
                    taken.append(self._events.popleft())
            if taken:
                if self._lost:
                    taken[0] = replace(taken[0], lost=taken[0].lost + self._lost)
                    self._lost = 0
                return taken
            failure, self._failure = self._failure, None
            if failure is not None:
                raise failure
            return [] if self._sources > 0 else None

    def put(self, events: list[Event]) -> None:
        with self._lock:
            for event in events:
                if len(self._events) >= QUEUE_EVENTS:
                    self._lost += 1 + self._events.popleft().lost
                self._events.append(event)
        self._notify()

    def source_ended(self, failure: Exception | None = None) -> None:
        """After what there is, nothing more comes from one of the sources."""
        with self._lock:
            self._sources -= 1
            self._failure = self._failure or failure
        self._notify()

    def close(self) -> None:
        """No more events, and none of those that wait; again is fine."""
        with self._lock:
            self._sources = 0
            self._failure = None
            self._events.clear()


class Subscription(EventQueue):
    """A queue that hubs fill."""

    def __init__(self, hubs: list[Hub], *, history: bool = False, notify: Callable[[], None]) -> None:
        super().__init__(notify, len(hubs))
        self._hubs = hubs
        # The number of each hub's latest event when this began.
        self.began_at = [hub.add(self, history) for hub in hubs]

    def close(self) -> None:
        """No more events; `notify` is not called any more when this returns."""
        for hub in self._hubs:
            hub.remove(self)
        super().close()


class LocalEvents(EventStream):
    """The events of disks that this process has open."""

    def __init__(self, hubs: list[Hub], history: bool = False) -> None:
        waker = Waker()
        super().__init__(Subscription(hubs, history=history, notify=waker.notify), waker)


class Hub:
    """Numbers the events of one open disk, remembers the last ones, hands them to every subscription. Safe from threads.

    Its locks are held for moments only, so that the disk's loop may call it.
    """

    def __init__(self, volume: str, *, clock: Callable[[], float] = time.time) -> None:
        self.volume = volume
        self._clock = clock
        # Tells one server's numbers from those of the next one on the same volume.
        self.server = f"{os.getpid()}-{clock():.6f}"
        self._lock = threading.RLock()
        self._history: deque[Event] = deque(maxlen=HISTORY_EVENTS)
        self._subscriptions: list[Subscription] = []
        self._number = 0
        self._ended = False
        self._disk: OpenVolume | None = None
        self._early: list[BaseEvent] = []  # told while the disk was being opened

    def sizes(self) -> dict[str, int]:
        """Storage and free bytes at the latest event; 0 before the first."""
        with self._lock:
            latest = self._history[-1] if self._history else None
        return {"storage_size": latest.storage_size, "free_bytes": latest.free_bytes} if latest else {"storage_size": 0, "free_bytes": 0}

    def attach(self, disk: OpenVolume) -> None:
        """The disk is open: what it told of its base until now is published, and what it tells from now on at once. In its loop's thread,
        or before that begins."""
        with self._lock:
            self._disk = disk
            early, self._early = self._early, []
            for event in early:
                self._tell_of_base(event)

    def tell(self, event: GrowthEvent | BaseEvent) -> None:
        """What the allocator reports, and what copies from the base: an `on_event` for `open_volume`."""
        from fvd.storage.policy import GrowthEvent

        if not isinstance(event, GrowthEvent):
            self._tell_of_base(event)
            return
        self._publish(
            event.kind,
            event.storage_size_bytes,
            event.free_bytes,
            target=event.target_bytes,
            seconds=event.seconds,
            suspend_seconds=event.suspend_seconds,
            group=event.group,
            group_free_bytes=event.group_free_bytes,
            message=event.message[:MESSAGE_CHARACTERS_MAX],
        )

    def _tell_of_base(self, event: BaseEvent) -> None:
        with self._lock:
            if self._disk is None:
                self._early.append(event)  # what is first told of a disk is that it is there
                return
            self.publish(
                event.kind,
                self._disk,
                event.message,
                copied_bytes=event.copied_bytes,
                total_bytes=event.total_bytes,
                eta_seconds=event.eta_seconds,
            )

    def tell_loss(self, disk: OpenVolume) -> None:
        """That acknowledged writes may be gone, if that is so and nobody has said yet that it was seen. As `publish`."""
        if disk.loss is not None:
            from fvd.disk.pending import LOSSES

            self.publish("possible_loss", disk, LOSSES[disk.loss.reason])

    def publish(self, kind: EventKind, disk: OpenVolume, message: str = "", **details: Any) -> None:
        """Something about the disk as it is now. In its loop's thread, or when that has ended."""
        free_bytes = disk.engine.free_slots * disk.geometry.chunk_size_bytes
        self._publish(kind, disk.engine.storage_size_bytes, free_bytes, message=message[:MESSAGE_CHARACTERS_MAX], **details)

    def end(self) -> None:
        """Nothing happens any more: every subscription ends after what it has. Again is fine."""
        with self._lock:
            if not self._ended:
                self._ended = True
                for subscription in list(self._subscriptions):
                    subscription.source_ended()
                self._subscriptions.clear()

    def add(self, subscription: Subscription, history: bool) -> int:
        """From now on; with `history`, what is remembered comes first. Returns the number of the latest event."""
        with self._lock:
            if history and self._history:
                subscription.put(list(self._history))
            if self._ended:
                subscription.source_ended()
            else:
                self._subscriptions.append(subscription)
            return self._number

    def remove(self, subscription: Subscription) -> None:
        with self._lock:
            if subscription in self._subscriptions:
                self._subscriptions.remove(subscription)

    def _publish(self, kind: EventKind, storage_size: int, free_bytes: int, **details: Any) -> None:
        with self._lock:
            if self._ended:
                return
            self._number += 1
            event = Event(kind, self.volume, self._number, self._clock(), storage_size, free_bytes, **details)
            self._history.append(event)
            for subscription in list(self._subscriptions):
                subscription.put([event])


class HubStream:
    """The events of one disk as plain values, for its control socket. `notify` is called when there are some."""

    def __init__(self, hub: Hub, notify: Callable[[], None], history: bool = False) -> None:
        self._subscription = Subscription([hub], history=history, notify=notify)
        self.answer = {"volume": hub.volume, "server": hub.server, "number": self._subscription.began_at[0], **hub.sizes()}

    def take(self, limit: int) -> list[Any] | None:
        taken = self._subscription.take(limit)
        return None if taken is None else [event_to_json(event) for event in taken]

    def close(self) -> None:
        self._subscription.close()


class Delivery:
    """Calls a function with every event of some disks, one after the other, in a thread of its own. It ends when the disks' hubs do."""

    def __init__(self, hubs: list[Hub], call: Callable[[Event], None]) -> None:
        self._call = call
        self._events = LocalEvents(hubs)
        # A daemon: a callback that never returns must not keep the process alive.
        self._thread = threading.Thread(target=self._run, name="fvd-events", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        for event in self._events:
            try:
                self._call(event)
            except BaseException:  # whatever a listener raises, SystemExit too: the next event finds it listening
                log.exception("%s: a listener failed at event %d, %s", event.volume, event.number, event.kind)

    def wait(self) -> None:
        """After the hubs have ended: until all has been delivered. Does nothing in the delivering thread itself."""
        if self._thread is threading.current_thread():
            return
        self._thread.join(STUCK_CALLBACK_SECONDS)
        if self._thread.is_alive():
            log.warning("a listener of events has not returned for %g seconds; it is left behind", STUCK_CALLBACK_SECONDS)
            self._events.close()


class Deliveries:
    """The log and the user's callback, each with a thread of its own: neither waits for the other."""

    def __init__(self, hubs: list[Hub], on_event: Callable[[Event], None] | None) -> None:
        self._all = [Delivery(hubs, call) for call in (report, on_event) if call is not None]

    def wait(self) -> None:
        for delivery in self._all:
            delivery.wait()


def report(event: Event) -> None:
    """The log's line about an event: what an administrator should look at as a warning or error, the rest as information."""
    detail = event.message or f"storage {event.storage_size} bytes, {event.free_bytes} free"
    log.log(_LEVELS.get(event.kind, logging.INFO), "%s: %s: %s", event.volume, event.kind.replace("_", " "), detail)
