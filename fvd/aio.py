# SPDX-License-Identifier: Apache-2.0
"""The long verbs of `fvd` for asyncio: the same functions and values, awaited instead of waited for. Knows no more than `import fvd` does.

    import fvd.aio

    async with fvd.aio.serve("file:vm1.img", socket="vm1.sock", on_full="wait") as served:
        async with served.events() as events:
            async for event in events:
                if event.kind == "group_low":
                    await free_space()

Each verb runs in a thread, as `asyncio.to_thread` runs it. Cancelling the task that awaits one asks the verb to stop where it can be
undone or left, and CancelledError is raised when it has ended: nothing of it comes later. A write has then been written or not, a disk that
`open` or `serve` had made has been closed again, and a request that waited for storage or a base waits no longer. `close` runs to its end.
What hangs in a device keeps its task waiting, not the event loop. Errors are those of the verbs.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Protocol, Self, TypeVar

import fvd
from fvd._lifetime import Here, Work
from fvd.api.disk import Disk
from fvd.api.events import QUEUE_EVENTS, Event, EventStream
from fvd.api.served import Served
from fvd.api.types import CheckReport, Export, Extended, Info, Map, PrefetchStatus, SavedProfile

if TYPE_CHECKING:
    from typing_extensions import Buffer  # collections.abc has it from Python 3.12 on

__all__ = [
    "AsyncDisk",
    "AsyncEvents",
    "AsyncServed",
    "acknowledge",
    "attach",
    "check",
    "detach",
    "dump",
    "events",
    "extend",
    "info",
    "list_volumes",
    "map",
    "open",
    "prefetch_start",
    "prefetch_status",
    "prefetch_stop",
    "provision",
    "read_profile",
    "record_profile",
    "remove",
    "serve",
    "set_copy_on_read",
]

P = ParamSpec("P")
T = TypeVar("T")

# Requests of one disk that may be under way at once. Writes have threads of their own: however many of them wait for storage, what is read
# and flushed does not wait behind them, nor does the growth step that would end their wait.
_THREADS = 16


def _in_thread(verb: Callable[P, T]) -> Callable[P, Coroutine[Any, Any, T]]:
    @functools.wraps(verb)
    async def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return await _to_its_end(functools.partial(verb, *args, **kwargs))

    return call


async def _to_its_end(function: Callable[[], T], pool: ThreadPoolExecutor | None = None, undo: Callable[[T], None] | None = None) -> T:
    """The function's result, from a thread. Cancelled, it is asked to stop, and what it has made is undone; when it has ended, and not
    before, that is raised."""
    work = Work(function)
    context = contextvars.copy_context()
    begun: Future[T] = Future()

    def run() -> None:
        if begun.set_running_or_notify_cancel():
            try:
                begun.set_result(context.run(work.run))
            except BaseException as error:
                begun.set_exception(error)

    loop = asyncio.get_running_loop()
    loop.run_in_executor(pool, run)
    ended = asyncio.wrap_future(begun)
    try:
        return await asyncio.shield(ended)
    except asyncio.CancelledError:
        if not begun.cancel():  # else no thread had come to it yet
            work.ask()
            if await _outcome(ended) and undo is not None:
                await _outcome(loop.run_in_executor(None, undo, ended.result()))
        raise


async def _outcome(ended: asyncio.Future[Any]) -> bool:
    """When it has ended, however often one is cancelled meanwhile: whether well. A failure is nobody's any more."""
    while not ended.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([ended])
    return not ended.cancelled() and ended.exception() is None


# Arguments and results are those of the functions of the same name in `fvd`; a `progress` is called in the verb's thread.
provision = _in_thread(fvd.provision)
extend = _in_thread(fvd.extend)
acknowledge = _in_thread(fvd.acknowledge)
attach = _in_thread(fvd.attach)
detach = _in_thread(fvd.detach)
info = _in_thread(fvd.info)
map = _in_thread(fvd.map)
check = _in_thread(fvd.check)
dump = _in_thread(fvd.dump)
remove = _in_thread(fvd.remove)
list_volumes = _in_thread(fvd.list_volumes)
prefetch_start = _in_thread(fvd.prefetch_start)
prefetch_stop = _in_thread(fvd.prefetch_stop)
prefetch_status = _in_thread(fvd.prefetch_status)
set_copy_on_read = _in_thread(fvd.set_copy_on_read)
record_profile = _in_thread(fvd.record_profile)
read_profile = _in_thread(fvd.read_profile)


# --- Disks that are served or open -------------------------------------------------------------------------------------------------


class _Closing(Protocol):
    async def close(self) -> None: ...


C = TypeVar("C", bound=_Closing)


class Opening(Generic[C]):
    """A disk on its way: ``await`` it, or write ``async with`` before it, which closes the disk at the end."""

    def __init__(self, start: Callable[[], Coroutine[Any, Any, C]]) -> None:
        self._start = start
        self._made: C | None = None

    def __await__(self) -> Generator[Any, None, C]:
        return self._start().__await__()

    async def __aenter__(self) -> C:
        self._made = await self._start()
        return self._made

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._made is not None:
            await self._made.close()


def _opens(verb: Callable[P, T], wrap: Callable[[T], C], close: Callable[[T], None]) -> Callable[P, Opening[C]]:
    @functools.wraps(verb)
    def call(*args: P.args, **kwargs: P.kwargs) -> Opening[C]:
        async def start() -> C:
            return wrap(await _to_its_end(lambda: verb(*args, **kwargs), undo=close))

        return Opening(start)

    return call


class AsyncServed:
    """Disks that are being served: as `fvd.Served`, for asyncio. Made by ``serve``; an ``async with`` closes it."""

    def __init__(self, served: Served) -> None:
        self._served = served

    @property
    def exports(self) -> list[Export]:
        """Where each volume is served."""
        return self._served.exports

    @property
    def uri(self) -> str:
        """The NBD URI of the only volume. Raises InvalidArgument when there are several."""
        return self._served.uri

    async def info(self, volume: str | None = None) -> Info:
        """What a served disk is and how full. Raises NotFound: not served here."""
        return await _to_its_end(functools.partial(self._served.info, volume))

    async def extend(self, by: int | str | None = None, volume: str | None = None) -> Extended:
        """More storage now (default: a grow step). Raises NoSpace, Unsupported (a device of fixed size), ReadOnly, Timeout, NotFound."""
        return await _to_its_end(functools.partial(self._served.extend, by, volume))

    async def acknowledge(self, volume: str | None = None) -> bool:
        """An administrator has seen that acknowledged writes may be gone. As `fvd.Served.acknowledge`."""
        return await _to_its_end(functools.partial(self._served.acknowledge, volume))

    async def prefetch_start(
        self,
        volume: str | None = None,
        *,
        rate: int | str = 0,
        delay_s: float = 0.0,
        profile: str | os.PathLike[str] | None = None,
    ) -> PrefetchStatus:
        """Copy the rest of the base in the background. As `fvd.Served.prefetch_start`."""
        start = functools.partial(self._served.prefetch_start, volume, rate=rate, delay_s=delay_s, profile=profile)
        return await _to_its_end(start)

    async def prefetch_stop(self, volume: str | None = None) -> PrefetchStatus:
        """Copy nothing more in the background; again is fine. Raises NotFound: not served here."""
        return await _to_its_end(functools.partial(self._served.prefetch_stop, volume))

    async def prefetch_status(self, volume: str | None = None) -> PrefetchStatus:
        """How far a disk is on its way from its base. Raises NotFound: not served here."""
        return await _to_its_end(functools.partial(self._served.prefetch_status, volume))

    async def set_copy_on_read(self, on: bool, volume: str | None = None) -> PrefetchStatus:
        """Whether what a guest reads from the base is copied from now on. As `fvd.Served.set_copy_on_read`."""
        return await _to_its_end(functools.partial(self._served.set_copy_on_read, on, volume))

    async def record_profile(self, path: str | os.PathLike[str] | None = None, volume: str | None = None) -> SavedProfile:
        """Save what was read from the base since serving began. As `fvd.Served.record_profile`."""
        return await _to_its_end(functools.partial(self._served.record_profile, path, volume))

    def events(self, history: bool = False, volume: str | None = None) -> AsyncEvents:
        """What happens to these disks from this call on. As `fvd.Served.events`."""
        stream = self._served.events(history, volume)
        return AsyncEvents(lambda: stream, stream.close)

    async def close(self) -> None:
        """Ends serving and closes each disk; again is fine. Raises DeviceError when a disk could not be closed cleanly."""
        await _to_its_end(self._served.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()


class AsyncDisk:
    """An open disk: as `fvd.Disk`, for asyncio. Made by ``open``; an ``async with`` closes it. Offsets and lengths are bytes."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._over = False
        self._readers = ThreadPoolExecutor(_THREADS, "fvd-aio-read")
        self._writers = ThreadPoolExecutor(_THREADS, "fvd-aio-write")

    @property
    def volume(self) -> str:
        """The volume's name."""
        return self._disk.volume

    @property
    def size(self) -> int:
        """The virtual size in bytes."""
        return self._disk.size

    async def pread(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset``. Raises InvalidArgument (not in the disk), DeviceError."""
        return await self._in(self._readers, self._disk.pread, offset, length)

    async def pwrite(self, offset: int, data: Buffer, *, durable: bool = False) -> int:
        """Write all of ``data``, which must not change before this returns or raises, CancelledError too. As `fvd.Disk.pwrite`."""
        return await self._in(self._writers, functools.partial(self._disk.pwrite, durable=durable), offset, data)

    async def flush(self) -> None:
        """What was written before survives any crash when this returns. Raises DeviceError."""
        await self._in(self._readers, self._disk.flush)

    async def trim(self, offset: int, length: int) -> None:
        """The range is not needed any longer. Raises InvalidArgument, ReadOnly, DeviceError."""
        await self._in(self._writers, self._disk.trim, offset, length)

    async def zero(self, offset: int, length: int, *, keep_storage: bool = False) -> None:
        """The range reads as zeros. Raises as ``pwrite``."""
        await self._in(self._writers, functools.partial(self._disk.zero, keep_storage=keep_storage), offset, length)

    async def info(self) -> Info:
        """What the disk is and how full."""
        return await _to_its_end(self._disk.info)

    async def map(self, offset: int | str = 0, length: int | str | None = None) -> Map:
        """Which part of the disk is where. Raises InvalidArgument (not in the disk)."""
        return await _to_its_end(functools.partial(self._disk.map, offset, length))

    async def check(self) -> CheckReport:
        """Is the metadata whole? What is damaged is in the report."""
        return await _to_its_end(self._disk.check)

    async def extend(self, by: int | str | None = None) -> Extended:
        """More storage now (default: a grow step). Raises NoSpace, Unsupported (a device of fixed size), ReadOnly, Timeout."""
        return await _to_its_end(functools.partial(self._disk.extend, by))

    async def acknowledge(self) -> bool:
        """An administrator has seen that acknowledged writes may be gone. As `fvd.Disk.acknowledge`."""
        return await _to_its_end(self._disk.acknowledge)

    async def prefetch_start(
        self, *, rate: int | str = 0, delay_s: float = 0.0, profile: str | os.PathLike[str] | None = None
    ) -> PrefetchStatus:
        """Copy the rest of the base in the background. As `fvd.Disk.prefetch_start`."""
        return await _to_its_end(functools.partial(self._disk.prefetch_start, rate=rate, delay_s=delay_s, profile=profile))

    async def prefetch_stop(self) -> PrefetchStatus:
        """Copy nothing more in the background; again is fine."""
        return await _to_its_end(self._disk.prefetch_stop)

    async def prefetch_status(self) -> PrefetchStatus:
        """How far the disk is on its way from its base."""
        return await _to_its_end(self._disk.prefetch_status)

    async def set_copy_on_read(self, on: bool) -> PrefetchStatus:
        """Whether what is read from the base is copied from now on. As `fvd.Disk.set_copy_on_read`."""
        return await _to_its_end(functools.partial(self._disk.set_copy_on_read, on))

    async def record_profile(self, path: str | os.PathLike[str] | None = None) -> SavedProfile:
        """Save what was read from the base since the disk was opened. As `fvd.Disk.record_profile`."""
        return await _to_its_end(functools.partial(self._disk.record_profile, path))

    def events(self, history: bool = False) -> AsyncEvents:
        """What happens to the disk from this call on, until it is closed. As `fvd.Disk.events`."""
        stream = self._disk.events(history)
        return AsyncEvents(lambda: stream, stream.close)

    async def close(self) -> None:
        """Commit everything and close the disk; writes that wait for storage end with an error; again is fine. Raises DeviceError when
        that failed: what was flushed is safe even then."""
        await _to_its_end(self._close)

    def _close(self) -> None:
        self._over = True
        try:
            self._disk.close()
        finally:
            self._readers.shutdown()
            self._writers.shutdown()

    async def _in(self, pool: ThreadPoolExecutor, call: Callable[..., T], *arguments: object) -> T:
        self._disk._check()
        work = functools.partial(call, *arguments)
        try:
            return await _to_its_end(work, pool)
        except RuntimeError:
            if not self._over:
                raise
            return work()  # the pool has been shut down, so the disk is closed: it says so in its own words

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()


serve = _opens(fvd.serve, AsyncServed, Served.close)
open = _opens(fvd.open, AsyncDisk, Disk.close)


# --- Events ------------------------------------------------------------------------------------------------------------------------


def events(*volumes: str, history: bool = False) -> AsyncEvents:
    """The events of disks that any process serves: as `fvd.events`. They begin with the first ``anext``, or with ``async with``."""
    return AsyncEvents(lambda: fvd.events(*volumes, history=history), lambda: None)


class AsyncEvents(AsyncIterator[Event]):
    """Events as they happen. ``aclose``, or the end of an ``async with``, ends it and its thread; so does dropping the last reference.

    A cancelled ``anext`` loses nothing: the next one goes on. Who fetches too slowly misses the oldest, and `Event.lost` counts them.
    """

    def __init__(self, make: Callable[[], EventStream], unmake: Callable[[], None]) -> None:
        """`make` may wait, and is called in the thread; `unmake` is called instead if that never begins."""
        self._pump = _Pump(make)
        self._unmake = unmake
        self._over = False
        self._here = Here()

    async def __anext__(self) -> Event:
        self._here.check("a stream of events")
        if self._over:
            raise StopAsyncIteration
        self._pump.start()
        item = await self._pump.queue.get()
        if isinstance(item, Event):
            self._pump.capacity.release()
            return item
        self._over = True
        self._pump.queue.put_nowait(None)  # for whoever else waits here
        if item is not None:
            raise item
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """No more events; again is fine."""
        self._over = True
        self._pump.close()
        self._unmake()
        await self._pump.ended()

    async def __aenter__(self) -> Self:
        """When this returns, what happens is on its way. Raises what ``events`` raises."""
        self._pump.start()
        try:
            await self._pump.begun()
        except BaseException:
            self._pump.close()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if hasattr(self, "_here") and self._here.is_here:
            self._pump.close()
            self._unmake()


class _Pump:
    """The thread that waits for events, and its way into the event loop. It does not know the iterator, so that this can be dropped."""

    def __init__(self, make: Callable[[], EventStream]) -> None:
        self._make = make
        self._lock = threading.RLock()  # the iterator may be collected, and close this, wherever Python code runs
        self._thread: threading.Thread | None = None
        self._source: EventStream | None = None
        self._closed = False
        self._failure: Exception | None = None
        self.capacity = threading.Semaphore(QUEUE_EVENTS)  # the thread stops reading when so many wait in the queue

    def start(self) -> None:
        """In the event loop; again is fine."""
        if self._thread is None:
            self._loop = asyncio.get_running_loop()
            self.queue: asyncio.Queue[Event | Exception | None] = asyncio.Queue()
            self._begun = asyncio.Event()
            self._ended = asyncio.Event()
            self._thread = threading.Thread(target=self._run, name="fvd-aio-events", daemon=True)
            self._thread.start()

    async def begun(self) -> None:
        await self._begun.wait()
        if self._failure is not None:
            raise self._failure

    async def ended(self) -> None:
        if self._thread is not None:
            await self._ended.wait()
            self._thread.join()  # that was the last thing it did

    def close(self) -> None:
        """From any thread, again is fine."""
        with self._lock:
            self._closed = True
            source = self._source
        if source is not None:
            source.close()
        self.capacity.release()

    def _run(self) -> None:
        try:
            source = self._make()
            with self._lock:
                self._source = source
                closed = self._closed
            with source:
                self._in_loop(self._begun.set)
                if not closed:
                    self._pass_on(source)
            self._in_loop(self.queue.put_nowait, None)
        except Exception as error:
            self._failure = error
            self._in_loop(self.queue.put_nowait, error)
        finally:
            self._in_loop(self._begun.set)
            self._in_loop(self._ended.set)

    def _pass_on(self, source: EventStream) -> None:
        for event in source:
            self.capacity.acquire()
            if self._closed:
                return
            if not self._in_loop(self.queue.put_nowait, event):
                return

    def _in_loop(self, call: Callable[..., None], *arguments: object) -> bool:
        try:
            self._loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:  # the loop has been closed: nobody is left to be told
            return False
        return True
