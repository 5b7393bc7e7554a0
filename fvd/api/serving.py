"""Disks served over NBD by a thread of this process, each with its control socket. Composes volumes, the NBD server and control sockets."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from fvd.api.address import parse_listen
from fvd.api.copying import absolute, allowed_bases, prefetch_options, volume_options
from fvd.api.events import Deliveries, Event, EventStream, Hub, HubStream, LocalEvents
from fvd.api.opened import OpenedVerbs, failure_details, storage_failure
from fvd.api.types import (
    CacheMode,
    Export,
    Extended,
    Info,
    OnFull,
    PrefetchOptions,
    PrefetchStatus,
    SavedProfile,
    from_json,
    info_from_json,
)
from fvd.errors import Conflict, DeviceError, FvdError, InUse, InvalidArgument, NotFound
from fvd.units import parse_size

if TYPE_CHECKING:
    from fvd.control.server import ControlServer
    from fvd.control.streaming import Stream
    from fvd.export.listening import Listen, Socket
    from fvd.export.server import NbdServer
    from fvd.volume.name import VolumeName
    from fvd.volume.opening import OpenVolume

log = logging.getLogger("fvd.api")
READY_SECONDS = 60.0
# The engine's Want bits (fvd/engine/_engine.pxd).
_WANT_GROWTH, _WANT_EVENT, _WANT_STEER, _WANT_BASE = 1, 2, 4, 8


def serve(
    *volumes: str,
    socket: str | os.PathLike[str] | None = None,
    listen: str | tuple[str, int] | None = None,
    listeners: Sequence[Socket] | None = None,
    cache: CacheMode = "none",
    read_only: bool = False,
    on_full: OnFull = "wait",
    zero_chunks: bool = False,
    socket_mode: int = 0o600,
    socket_group: str | int | None = None,
    copy_on_read: bool | None = None,
    prefetch: PrefetchOptions | bool | None = None,
    base_timeout_s: float = 30.0,
    discard_pending: bool = False,
    base_allow: Sequence[str] = (),
    on_end: Callable[[], None] | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> Served:
    """Serve disks over NBD until ``close``, on a unix socket or (``listen="localhost:10809"``, ``":0"``) on TCP, or on ``listeners``:
    stream sockets that listen already, a service manager's, say, which are closed at the end, and whose names stay.

    ``zero_chunks``: let the device zero a new chunk as a whole, where it can, so that a first write writes only what the guest wrote.
    ``copy_on_read``, ``prefetch``: copy what guests read from the base; copy all of it in the background, out of their way (None: as each
    disk was provisioned). A read of a base that does not answer is tried again for ``base_timeout_s`` seconds, then the guest's request
    fails. ``discard_pending``: open a disk whose server died even if the log of what that one had acknowledged is missing, without those
    writes; a log that is there is used all the same. ``base_allow``: bases that root opens with his own rights, whoever has named them
    (docs/base.md). ``on_end`` is called, in the serving thread, when serving has ended for whatever
    reason. ``on_event`` is called with each event of these disks (docs/events.md), in a thread of its own; what it raises is logged and
    ends nothing. Notices (no io_uring here, no O_DIRECT...) and failed growth steps are logged as warnings of the logger "fvd".
    Raises NotFound, InUse (a volume or the address), Corrupt, Unsupported, Conflict (the base has changed, or such a log is missing),
    PermissionDenied.
    """
    served = Served(
        volumes,
        socket=socket,
        listen=listen,
        listeners=listeners,
        cache=cache,
        read_only=read_only,
        on_full=on_full,
        zero_chunks=zero_chunks,
        socket_mode=socket_mode,
        socket_group=socket_group,
        copy_on_read=copy_on_read,
        prefetch=prefetch,
        base_timeout_s=base_timeout_s,
        discard_pending=discard_pending,
        base_allow=base_allow,
        on_end=on_end,
        on_event=on_event,
    )
    served.open()
    return served


class Served:
    """Disks that are being served: a context manager, safe from threads. Made by ``serve``."""

    def __init__(
        self,
        volumes: tuple[str, ...],
        *,
        socket: str | os.PathLike[str] | None,
        listen: str | tuple[str, int] | None,
        listeners: Sequence[Socket] | None,
        cache: CacheMode,
        read_only: bool,
        on_full: OnFull,
        zero_chunks: bool,
        socket_mode: int,
        socket_group: str | int | None,
        copy_on_read: bool | None,
        prefetch: PrefetchOptions | bool | None,
        base_timeout_s: float,
        discard_pending: bool,
        base_allow: Sequence[str] = (),
        on_end: Callable[[], None] | None,
        on_event: Callable[[Event], None] | None,
    ) -> None:
        if not volumes:
            raise InvalidArgument("name at least one volume to serve")
        if [socket, listen, listeners].count(None) != 2:
            raise InvalidArgument("say where to serve: either socket=PATH or listen=HOST:PORT, or listeners that are there already")
        self._names = volumes
        self._socket = socket
        self._listen = listen
        self._listeners = listeners
        self._cache = cache
        self._read_only = read_only
        self._on_full = on_full
        self._zero_chunks = zero_chunks
        self._socket_mode = socket_mode
        self._socket_group = socket_group
        self._copy_on_read = copy_on_read
        self._prefetch = volume_options(prefetch)
        self._base_timeout_s = base_timeout_s
        self._discard_pending = discard_pending
        self._base_allow = allowed_bases(base_allow)
        self._on_end = on_end
        self._on_event = on_event
        self._server: NbdServer | None = None
        self._disks: dict[str, OpenVolume] = {}  # by export name
        self._verbs: dict[str, OpenedVerbs] = {}  # of the same
        self._hubs: dict[str, Hub] = {}
        self._controls: list[ControlServer] = []
        self._deliveries: Deliveries | None = None
        self._begun: set[str] = set()  # whose `served` is told and whose allocators are at work
        self._failing_bases: set[str] = set()  # of disks without a `copying`: whose base_lost is told
        self._problems: dict[str, str] = {}  # of those that could not be closed cleanly: why
        self._resources = ExitStack()
        self._ready = threading.Event()
        self._close_lock = threading.Lock()
        self._closed = False
        self.exports: list[Export] = []

    # --- What a user calls -----------------------------------------------------------------------------------------------------

    @property
    def uri(self) -> str:
        """The NBD URI of the only volume. Raises InvalidArgument when there are several: see ``exports``."""
        if len(self.exports) != 1:
            raise InvalidArgument("several volumes are served here; take the URI from exports")
        return self.exports[0].uri

    def info(self, volume: str | None = None) -> Info:
        """What a served disk is and how full. ``volume`` may be left out where there is only one. Raises NotFound: not served here."""
        return info_from_json(self._info(self._export(volume)))

    def extend(self, by: int | str | None = None, volume: str | None = None) -> Extended:
        """More storage now (default: a grow step). Raises NoSpace, Unsupported (a device of fixed size), ReadOnly, Timeout, NotFound."""
        return from_json(Extended, self._verbs[self._export(volume)].extend(None if by is None else parse_size(by)))

    def acknowledge(self, volume: str | None = None) -> bool:
        """An administrator has seen that acknowledged writes may be gone: it is told no more. False: there was nothing to see. As
        `Disk.acknowledge`; raises NotFound too."""
        return bool(self._verbs[self._export(volume)].acknowledge()["acknowledged"])

    def prefetch_start(
        self,
        volume: str | None = None,
        *,
        rate: int | str = 0,
        delay_s: float = 0.0,
        profile: str | os.PathLike[str] | None = None,
    ) -> PrefetchStatus:
        """Copy the rest of the base in the background, out of the guest's way. As `Disk.prefetch_start`; raises NotFound too."""
        options = prefetch_options(rate, delay_s, profile)
        return from_json(PrefetchStatus, self._verbs[self._export(volume)].prefetch_start(**vars(options)))

    def prefetch_stop(self, volume: str | None = None) -> PrefetchStatus:
        """Copy nothing more in the background; what was copied stays. Again is fine. Raises NotFound: not served here."""
        return from_json(PrefetchStatus, self._verbs[self._export(volume)].prefetch_stop())

    def prefetch_status(self, volume: str | None = None) -> PrefetchStatus:
        """How far a disk is on its way from its base; answers for every disk. Raises NotFound: not served here."""
        return from_json(PrefetchStatus, self._verbs[self._export(volume)].prefetch_status())

    def set_copy_on_read(self, on: bool, volume: str | None = None) -> PrefetchStatus:
        """Whether what a guest reads from the base is copied until serving ends. As `Disk.set_copy_on_read`; raises NotFound too."""
        return from_json(PrefetchStatus, self._verbs[self._export(volume)].copy_on_read(on))

    def record_profile(self, path: str | os.PathLike[str] | None = None, volume: str | None = None) -> SavedProfile:
        """Save what was read from the base since serving began, in order. As `Disk.record_profile`; raises NotFound too."""
        return from_json(SavedProfile, self._verbs[self._export(volume)].profile_record(absolute(path)))

    def events(self, history: bool = False, volume: str | None = None) -> EventStream:
        """What happens to the disks that are served here, or to one of them, from now on or (``history``) since a while ago, until they
        are closed. See docs/events.md. Raises NotFound: not served here."""
        hubs = list(self._hubs.values()) if volume is None else [self._hubs[self._export(volume)]]
        return LocalEvents(hubs, history)

    def close(self) -> None:
        """Answer what is under way, hang up, commit and close each disk; again is fine. Raises DeviceError when a disk could not be closed
        cleanly: what was flushed is safe even then."""
        try:
            with self._close_lock:
                if not self._closed:
                    self._closed = True
                    self._resources.close()
        finally:  # without the lock: a callback that is still at work may want to close too
            if self._deliveries is not None:
                self._deliveries.wait()

    def __enter__(self) -> Served:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # --- From start to end -----------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Claim and recover every disk, then serve them. All or none."""
        from fvd.control.server import ControlServer
        from fvd.export.server import NbdServer
        from fvd.volume.name import parse_name
        from fvd.volume.opening import open_volume

        on_end = self._on_end

        class Server(NbdServer):
            """Tells when serving has ended, also by a failure."""

            def run(self) -> None:
                try:
                    super().run()
                finally:
                    if on_end is not None:
                        on_end()

        names = [parse_name(volume) for volume in self._names]
        with ExitStack() as undo:
            # At the very end, when the disks are given up: whoever hears that one is closed may open it.
            undo.callback(self._end_events)
            server = self._server = Server(self._address(), on_stop=self._close_exports)
            for export_name, name in zip(export_names(names), names, strict=True):
                hub = Hub(str(name))
                disk = open_volume(
                    name,
                    read_only=self._read_only,
                    cache=self._cache,
                    on_full=self._on_full,
                    zero_chunks=self._zero_chunks,
                    copy_on_read=self._copy_on_read,
                    prefetch=self._prefetch,
                    base_timeout_s=self._base_timeout_s,
                    discard_pending=self._discard_pending,
                    base_allow=self._base_allow,
                    on_event=hub.tell,
                )
                undo.callback(disk.close)
                for notice in disk.notices:
                    log.warning("%s", notice)
                self._disks[export_name] = disk
                self._hubs[export_name] = hub
                self._verbs[export_name] = OpenedVerbs(disk, self._call)
                server.add_export(
                    export_name,
                    disk.engine,
                    storage_fd=disk.node.fd,
                    sampler_fd=disk.node.sampler_fd,
                    base_fd=-1 if disk.base is None else disk.base.fd,
                    remote=None if disk.base is None else disk.base.remote,
                    size_bytes=disk.geometry.virtual_size_bytes,
                    read_only=self._read_only,
                    block_size_bytes=disk.geometry.block_size_bytes,
                    description=str(name),
                    on_want=partial(self._act_on_want, export_name),
                )
                disk.detach_base = partial(server.release_base, export_name)
            self._deliveries = Deliveries(list(self._hubs.values()), self._on_event)
            undo.callback(server.stop)
            for export_name, disk in self._disks.items():
                streams = {"events": partial(self._stream_events, export_name)}
                control = ControlServer(str(disk.name), disk.node.path, self._handlers(export_name), stream_verbs=streams)
                try:
                    control.start()
                except InUse:
                    if not self._read_only:
                        raise
                    log.warning("%s: another process serves it read-only too; fvd-lv info, map and check ask that one", disk.name)
                    continue
                self._controls.append(control)
                undo.callback(control.stop)
            undo.callback(self._ready.set)  # whoever asks while it fails to start is not kept waiting
            server.start()
            server.call(self._begin_all)
            self.exports = [Export(str(disk.name), export_name, server.uri(export_name)) for export_name, disk in self._disks.items()]
            self._ready.set()
            self._resources = undo.pop_all()

    def _address(self) -> Listen:
        from fvd.export.listening import Given, Tcp, Unix

        if self._listeners is not None:
            return Given(tuple(self._listeners))
        if self._listen is not None:
            host, port = parse_listen(self._listen) if isinstance(self._listen, str) else self._listen
            return Tcp(host, port)
        group = self._socket_group
        if isinstance(group, str) and group.isascii() and group.isdigit():
            group = int(group)
        return Unix(os.fspath(self._socket or ""), self._socket_mode, group)

    def _begin_all(self) -> None:
        for export_name in self._disks:
            self._begin(export_name)

    def _begin(self, export_name: str) -> bool:
        """In the serving thread, once for each disk: an engine may want room before ``open`` comes to it. False: it was done before."""
        if export_name in self._begun:
            return False
        assert self._server is not None
        self._begun.add(export_name)
        disk = self._disks[export_name]
        self._hubs[export_name].publish("served", disk, self._server.uri(export_name))
        self._hubs[export_name].tell_loss(disk)
        self._hubs[export_name].attach(disk)
        if disk.allocator is not None:
            disk.allocator.attach(disk.engine, self._post)
        if disk.failing is not None:
            disk.failing.attach(self._server.post)
        if disk.holding is not None:
            disk.holding.attach(self._server.post, partial(self._server.abandon_export, export_name))
        return True

    def _act_on_want(self, export_name: str, wants: int) -> None:
        """In the serving thread: what an engine asks of its Python side."""
        disk = self._disks[export_name]
        if wants & _WANT_GROWTH:
            if disk.allocator is None:
                disk.engine.want &= ~_WANT_GROWTH
            elif not self._begin(export_name):
                disk.allocator.on_want(disk.engine)
        if wants & _WANT_EVENT:
            disk.engine.want &= ~_WANT_EVENT
            if disk.failing is not None and disk.failing.noticed():
                self._hubs[export_name].publish("storage_error", disk, storage_failure(disk), **failure_details(disk))
        if wants & (_WANT_STEER | _WANT_BASE):
            disk.engine.want &= ~(_WANT_STEER | _WANT_BASE)
            self._begin(export_name)
            self._act_on_base(export_name, wants & (_WANT_STEER | _WANT_BASE))

    def _act_on_base(self, export_name: str, wants: int) -> None:
        """In the serving thread: prefetching is to be steered, or the base has failed, is back, or is not needed any more."""
        disk = self._disks[export_name]
        if disk.copying is not None:
            disk.copying.on_want(wants)
        elif wants & _WANT_BASE:
            self._tell_of_base(export_name)

    def _tell_of_base(self, export_name: str) -> None:
        """Of a disk that is only read: where there are no copies, nobody else tells how its base does."""
        disk = self._disks[export_name]
        failing = disk.engine.base_failing
        if failing == (export_name in self._failing_bases) or disk.superblock.base is None:
            return
        locator = disk.superblock.base.locator
        if failing:
            self._failing_bases.add(export_name)
            message = f"{locator} cannot be read; guests' reads of it are tried again for {self._base_timeout_s:g} s, then they fail"
        else:
            self._failing_bases.discard(export_name)
            message = f"{locator} can be read again"
        self._hubs[export_name].publish("base_lost" if failing else "base_back", disk, message)

    def _post(self, work: Callable[[], None]) -> None:
        """Have the serving thread call ``work``; nothing happens when it has ended."""
        try:
            self._call(work)
        except Conflict:
            log.debug("the serving thread has ended; a growth step's result is left for the next open")

    def _call(self, work: Callable[[], Any]) -> Any:
        assert self._server is not None
        return self._server.call(work)

    def _close_exports(self) -> None:
        """In the serving thread, after the last request. Every disk is tried before the first failure is told."""
        assert self._server is not None
        failures = []
        for export_name in self._disks:
            try:
                self._server.close_export(export_name)
            except FvdError as failure:
                stopped = self._disks[export_name].stopped
                error = DeviceError(f"{self._disks[export_name].name}: {stopped}") if stopped else failure
                failures.append(error)
                self._problems[export_name] = str(error)
                log.error("%s", error)
        if failures:
            raise failures[0]

    def _end_events(self) -> None:
        for export_name, hub in self._hubs.items():
            if export_name in self._begun:
                hub.publish("closed", self._disks[export_name], self._problems.get(export_name, ""))
            hub.end()
        for control in self._controls:
            control.close()

    # --- Verbs, for this process and for the control socket --------------------------------------------------------------------

    def _export(self, volume: str | None) -> str:
        from fvd.volume.name import parse_name

        if volume is None:
            if len(self._disks) != 1:
                raise InvalidArgument("several volumes are served here; name one")
            return next(iter(self._disks))
        name = parse_name(volume)
        for export_name, disk in self._disks.items():
            if disk.name == name:
                return export_name
        raise NotFound(f"{name} is not served here")

    def _handlers(self, export_name: str) -> dict[str, Callable[[dict[str, Any]], Any]]:
        from fvd.control.protocol import check_arguments

        def handler(allowed: dict[str, type], verb: Callable[..., Any]) -> Callable[[dict[str, Any]], Any]:
            def answer(arguments: dict[str, Any]) -> Any:
                check_arguments(arguments, allowed)
                self._ready.wait(READY_SECONDS)
                return verb(**arguments)

            return answer

        verbs = self._verbs[export_name]
        return {
            "info": handler({}, lambda: self._info(export_name)),
            "map": handler({"offset": int, "length": int}, verbs.map),
            "check": handler({}, verbs.check),
            "extend": handler({"by_bytes": int}, verbs.extend),
            "acknowledge": handler({}, verbs.acknowledge),
            "prefetch_start": handler({"delay_s": float, "rate_bytes": int, "profile": str}, verbs.prefetch_start),
            "prefetch_stop": handler({}, verbs.prefetch_stop),
            "prefetch_status": handler({}, verbs.prefetch_status),
            "copy_on_read": handler({"on": bool}, verbs.copy_on_read),
            "profile_record": handler({"path": str}, verbs.profile_record),
        }

    def _stream_events(self, export_name: str, arguments: dict[str, Any], bell: Callable[[], None]) -> Stream:
        from fvd.control.protocol import check_arguments

        return HubStream(self._hubs[export_name], bell, **check_arguments(arguments, {"history": bool}))

    def _info(self, export_name: str) -> dict[str, Any]:
        uri = next((export.uri for export in self.exports if export.name == export_name), None)
        return self._verbs[export_name].info(uri)


def export_names(names: list[VolumeName]) -> list[str]:
    """The last part of each volume's path; the whole name where that would not tell two apart. Raises InvalidArgument: one named twice."""
    if len(set(names)) < len(names):
        raise InvalidArgument(f"{next(name for name in names if names.count(name) > 1)} is named twice")
    shorts = [name.short for name in names]
    return [short if shorts.count(short) == 1 else str(name) for short, name in zip(shorts, names, strict=True)]
