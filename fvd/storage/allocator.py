# SPDX-License-Identifier: Apache-2.0
"""Owns the storage's size while a disk is open: grows it in the background, before it is needed, and tells the engine.

Carries out what `policy.GrowthPolicy` decides. Everything but the steps themselves happens in the thread of the disk's loop, which `post`
leads to: so hardly anything is locked. Knows neither sockets nor the format; how a step is done is the storage's business (`growth.py`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

from fvd.engine._engine import Want
from fvd.errors import DeviceError, FvdError, quoted
from fvd.format.geometry import Geometry
from fvd.storage.interfaces import Pool, Storage
from fvd.storage.policy import (
    EXTEND_TIMEOUT_SECONDS,
    Action,
    Answer,
    Exhausted,
    GrowthEvent,
    GrowthPolicy,
    QueryGroup,
    ReadSize,
    Start,
    UseSize,
    WakeAt,
)

Post = Callable[[Callable[[], None]], None]


class GrowingEngine(Protocol):
    """What the allocator needs of an engine. Touched only in the loop's thread."""

    want: int
    wake_below_bytes: int  # Want.GROWTH is set when fewer bytes than this are in free slots

    @property
    def storage_below_full(self) -> bool:
        """What the storage lies on had none for the last guest's write that needed some."""

    @property
    def starved_count(self) -> int:
        """Writes that wait for that."""

    @property
    def free_slots(self) -> int:
        """Slots that the engine may hand out."""

    def set_storage_size(self, size_bytes: int, /) -> Any:
        """More slots from now on."""

    def set_exhausted(self, exhausted: bool, /) -> Any:
        """Storage cannot grow now: writes that wait for a slot may have to fail."""


class Timer(Protocol):
    """A call that comes later unless it is cancelled: threading.Timer is one."""

    def cancel(self) -> None: ...


def run_in_thread(work: Callable[[], None]) -> None:
    """The executor of real life. A daemon: a step that hangs for ever must not keep the process alive."""
    threading.Thread(target=work, name="fvd-grow", daemon=True).start()


def call_later(seconds: float, call: Callable[[], None]) -> Timer:
    """The timer of real life."""
    timer = threading.Timer(seconds, call)
    timer.daemon = True
    timer.start()
    return timer


class Allocator:
    """Growth of one open disk.

    A driver calls `attach` once, in its loop's thread, and `on_want` there whenever the engine's `want` has Want.GROWTH. `extend_now`,
    `poke`, `on_space_freed`, `resized`, `removed`, `figures` and `close` may be called from any thread, and before `attach` too: then they
    take effect with it.
    """

    def __init__(
        self,
        storage: Storage,
        geometry: Geometry,
        *,
        storage_size_bytes: int,
        low_water_bytes: int,
        on_event: Callable[[GrowthEvent], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        executor: Callable[[Callable[[], None]], None] = run_in_thread,
        timer: Callable[[float, Callable[[], None]], Timer] = call_later,
        extend_timeout_seconds: float = EXTEND_TIMEOUT_SECONDS,
        group_low_bytes: int | None = None,
        adaptive: bool = True,
    ) -> None:
        """`low_water_bytes`, `group_low_bytes`, `adaptive`: see `GrowthPolicy`. The other options are the tests'."""
        self.storage = storage
        self.on_event = on_event
        self.before_use: Callable[[], bool] = lambda: True  # storage has grown: whether it may be used
        self._geometry = geometry
        self._policy = GrowthPolicy(
            geometry,
            storage_size_bytes=storage_size_bytes,
            low_water_bytes=low_water_bytes,
            can_grow=storage.can_grow,
            notifies_space=storage.notifies_space,
            adaptive=adaptive,
            group_low_bytes=group_low_bytes,
            extend_timeout_seconds=extend_timeout_seconds,
        )
        self._clock = clock
        self._executor = executor
        self._timer = timer
        self._engine: GrowingEngine | None = None
        self._attaching = threading.Lock()  # guards the next two
        self._post: Post | None = None
        self._early: list[Callable[[], None]] = []  # what was asked before there was a loop
        self._reporting_group = threading.Lock()  # held by the step's thread that asks
        self._alarm: Timer | None = None
        self._alarm_at = 0.0
        self._queued: list[Future[int]] = []  # on their way to the loop's thread
        self._waiting: list[Future[int]] = []  # for an Answer of the policy
        self._closed = False

    # --- In the loop's thread --------------------------------------------------------------------------------------------------------

    def attach(self, engine: GrowingEngine, post: Post) -> None:
        """Begins work. `post(fn)` makes the loop's thread call fn soon; it may be called from any thread."""
        self._engine = engine
        with self._attaching:
            self._post = post
            early, self._early = self._early, []
        self.on_want(engine)
        for work in early:
            if not self._closed:
                work()

    def on_want(self, engine: GrowingEngine) -> None:
        """The engine wants space: takes the wish back and begins a step, unless one runs or rests after a failure."""
        engine.want &= ~Want.GROWTH
        # Before `attach` the result of a step would have nowhere to go, and no other would ever begin. `attach` looks for itself.
        if not self._closed and self._post is not None:
            self._do(self._policy.on_free_bytes(self._clock(), self._free_bytes()))

    def on_space(self, engine: GrowingEngine) -> None:
        """What the storage lies on has no space for a guest's write, or has some again."""
        if not self._closed:
            self._policy.free_bytes = self._free_bytes()
            self._do(self._policy.on_space_below(self._clock(), engine.storage_below_full, engine.starved_count > 0))

    # --- From any thread -------------------------------------------------------------------------------------------------------------

    def extend_now(self, by_bytes: int | None = None) -> Future[int]:
        """Asks for more storage (default: a grow step), at most what the disk can use. The future's result is the size then, in bytes;
        its errors are those of `Storage.grow_to`, and Timeout for a step that hangs."""
        future: Future[int] = Future()

        def begin() -> None:
            self._queued.remove(future)
            self._waiting.append(future)
            self._do(self._policy.extend(self._clock(), self._geometry.grow_step_bytes if by_bytes is None else by_bytes))

        self._queued.append(future)
        self._in_loop(begin)
        if self._closed:
            self._give_up()
        return future

    def poke(self) -> None:
        """Somebody says that something has changed outside (space was freed, storage was added): look now instead of resting."""
        self._in_loop(lambda: self._do(self._policy.poke(self._clock(), self._free_bytes())))

    def on_space_freed(self) -> None:
        """The storage's group has changed, and may have space: a step that rests after a failure is tried, at most once a second."""
        self._in_loop(lambda: self._do(self._policy.on_space_freed(self._clock(), self._free_bytes())))

    def resized(self) -> None:
        """The device has changed its size: it is read and used."""
        self._in_loop(lambda: self._do(self._policy.on_device_resized()))

    def removed(self, message: str) -> None:
        """The device has gone: emits `storage_error`."""
        self._in_loop(lambda: self._do(self._policy.on_device_removed(message)))

    def close(self) -> None:
        """Nothing runs afterwards. A step that hangs is left behind: it can do no harm, and the next open reads what it did."""
        self._closed = True
        self._set_alarm(None)
        self.storage.close()
        self._give_up()

    def figures(self) -> dict[str, Any]:
        """What `info` tells about growth. Sizes in bytes; None: not known (yet)."""
        policy, now = self._policy, self._clock()
        return {
            "low_water": policy.low_water_at(now),
            "extending": policy.extending,
            "extend_steps": policy.steps_done,
            "last_extend_seconds": policy.last_extend_seconds,
            "longest_extend_seconds": policy.longest_extend_seconds,
            "last_suspend_seconds": policy.last_suspend_seconds,
            "longest_suspend_seconds": policy.longest_suspend_seconds,
            "write_bytes_per_second": int(policy.write_rate(now)),
            "reserve_bytes_per_second": policy.reserve_bytes_per_second(now),
            "group": policy.group or None,
            "group_free_bytes": policy.group_free_bytes,
            "last_failure": policy.last_failure,
        }

    # --- Carrying out ----------------------------------------------------------------------------------------------------------------

    def _free_bytes(self) -> int:
        engine = self._engine
        return 0 if engine is None else engine.free_slots * self._geometry.chunk_size_bytes

    def _in_loop(self, work: Callable[[], None]) -> None:
        with self._attaching:
            post = self._post
            if post is None:
                self._early.append(work)
        if post is not None and not self._closed:
            post(lambda: None if self._closed else work())

    def _do(self, actions: list[Action]) -> None:
        resized = False
        failures: list[Callable[[], list[Action]]] = []  # of what could not even begin: told when the rest has been done
        for action in actions:
            if isinstance(action, UseSize):
                if self._engine is not None and self.before_use():
                    self._engine.set_storage_size(action.size_bytes)
                resized = True
            elif isinstance(action, Start):
                self._start(action.target_bytes, failures)
            elif isinstance(action, ReadSize):
                self._run(self._read_and_tell, failures, lambda error: self._policy.on_size_read(None))
            elif isinstance(action, QueryGroup):
                self._run(self._query_group, failures, lambda error: self._on_query_answered(None, None))
            elif isinstance(action, WakeAt):
                self._set_alarm(action.when)
            elif isinstance(action, Exhausted):
                if self._engine is not None:
                    self._engine.set_exhausted(True)
            elif isinstance(action, Answer):
                self._answer(action.error)
            else:
                self._tell(action)
        if resized:
            self._do(self._policy.on_free_bytes(self._clock(), self._free_bytes()))
        elif self._engine is not None:
            self._engine.wake_below_bytes = self._policy.look_below_bytes
        for failure in failures:
            self._do(failure())

    def _tell(self, event: GrowthEvent) -> None:
        if self.on_event is None:
            return
        try:
            self.on_event(event)
        except Exception:  # a listener's bug must not stop the disk
            logging.getLogger(__name__).exception("a listener failed at %s", event)

    def _run(
        self, work: Callable[[], None], failures: list[Callable[[], list[Action]]], failed: Callable[[FvdError], list[Action]]
    ) -> None:
        """Has the work done in a thread. Where there can be none the policy is told at once: it must not wait for what has not begun."""
        try:
            self._executor(work)
        except Exception as failure:
            logging.getLogger(__name__).warning("no thread for growth: %s", failure)
            error = DeviceError(f"growing failed: {failure}; the limit of threads is reached")
            failures.append(lambda: failed(error))

    def _start(self, target_bytes: int, failures: list[Callable[[], list[Action]]]) -> None:
        def work() -> None:
            error: FvdError | None = None
            try:
                self.storage.grow_to(target_bytes)
            except FvdError as failure:
                error = failure
            except Exception as failure:  # a storage's own bug must not end growth for ever
                error = DeviceError(f"growing failed: internal error: {type(failure).__name__}: {quoted(failure)}")
            size_bytes, suspend_seconds = self._read_size(), self.storage.last_suspend_seconds
            self._in_loop(lambda: self._do(self._on_step_ended(size_bytes, error, suspend_seconds)))
            self._report_group()  # the size is on its way: this delays nobody, and the next step may run beside it

        self._run(work, failures, lambda error: self._on_step_ended(None, error, None))

    def _on_step_ended(self, size_bytes: int | None, error: FvdError | None, suspend_seconds: float | None) -> list[Action]:
        return self._policy.on_step_ended(self._clock(), size_bytes, error, self._free_bytes(), suspend_seconds)

    def _report_group(self) -> None:
        """In the thread of a step that has ended. One question at a time: where it hangs, later ones are not asked."""
        if not self._reporting_group.acquire(blocking=False):
            return
        try:
            name, free_bytes = self._pool()
        finally:
            self._reporting_group.release()
        self._in_loop(lambda: self._do(self._policy.on_group_report(name, free_bytes)))

    def _query_group(self) -> None:
        name, free_bytes = self._pool()
        self._in_loop(lambda: self._do(self._on_query_answered(name, free_bytes)))

    def _on_query_answered(self, group: str | None, group_free_bytes: int | None) -> list[Action]:
        return self._policy.on_query_answered(self._clock(), group, group_free_bytes, self._free_bytes())

    def _pool(self) -> tuple[str | None, int | None]:
        pool: Pool | None = None
        if not self._closed:
            try:
                pool = self.storage.pool()
            except Exception:  # a figure is missing, and no more
                logging.getLogger(__name__).debug("what the storage has left to grow could not be told", exc_info=True)
        return (None, None) if pool is None else (pool.name, pool.free_bytes)

    def _read_and_tell(self) -> None:
        size_bytes = self._read_size()
        self._in_loop(lambda: self._do(self._policy.on_size_read(size_bytes)))

    def _read_size(self) -> int | None:
        try:
            return self.storage.size_bytes()
        except Exception:  # whatever it was: the step or the look has ended, and the policy must hear of that
            logging.getLogger(__name__).debug("the storage's size could not be read", exc_info=True)
            return None

    def _set_alarm(self, when: float | None) -> None:
        if when is not None and when == self._alarm_at and self._alarm is not None:
            return  # asked for again with every write that finds the storage low
        alarm, self._alarm = self._alarm, None
        if alarm is not None:
            alarm.cancel()
        if when is not None and not self._closed:
            self._alarm_at = when
            try:
                self._alarm = self._timer(max(0.0, when - self._clock()), self._ring)
            except RuntimeError as failure:  # no more threads; the next write that finds the storage low asks again
                logging.getLogger(__name__).warning("no timer for growth: %s", failure)

    def _ring(self) -> None:
        def tick() -> None:
            self._alarm = None
            self._do(self._policy.tick(self._clock(), self._free_bytes()))

        self._in_loop(tick)

    def _give_up(self) -> None:
        for futures in (self._queued, self._waiting):
            while futures:
                future = futures.pop()
                if future.set_running_or_notify_cancel():
                    future.set_exception(DeviceError("the disk has been closed; open it again"))

    def _answer(self, error: FvdError | None) -> None:
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if future.set_running_or_notify_cancel():
                if error is None:
                    future.set_result(self._policy.storage_size_bytes)
                else:
                    future.set_exception(error)
