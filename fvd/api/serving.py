# SPDX-License-Identifier: Apache-2.0
"""Disks served over NBD by a thread of this process, each with its control socket. Composes volumes, the NBD server and control sockets."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from fvd._lifetime import checkpoint
from fvd.api.address import parse_listen
from fvd.api.copying import allowed_bases, volume_options
from fvd.api.events import Deliveries, Event, EventStream, Hub, HubStream, LocalEvents
from fvd.api.opened import OpenedVerbs, failure_details, storage_failure
from fvd.api.types import Export
from fvd.disk.options import OpenOptions
from fvd.errors import Conflict, DeviceError, FvdError, InUse, InvalidArgument, NotFound

if TYPE_CHECKING:
    from fvd.api.host_device import HostDevices
    from fvd.control.server import ControlServer
    from fvd.control.streaming import Stream
    from fvd.disk.opening import OpenVolume
    from fvd.export.listening import Listen, Socket
    from fvd.export.server import NbdServer
    from fvd.volume.name import VolumeName

log = logging.getLogger("fvd.api")
READY_SECONDS = 60.0
QUEUES = 16  # a virtual machine asks for one for each of its processors


@dataclass(frozen=True, kw_only=True)
class ServeOptions(OpenOptions):
    """The options of `serve`: those of each disk, where it is served, and who hears of what happens."""

    socket: str | os.PathLike[str] | None = None
    listen: str | tuple[str, int] | None = None
    listeners: Sequence[Socket] | None = None
    vhost_user: str | os.PathLike[str] | None = None
    queues: int = QUEUES
    socket_mode: int = 0o600
    socket_group: str | int | None = None
    on_end: Callable[[], None] | None = None
    on_event: Callable[[Event], None] | None = None


class Serving:
    """The disks, their server and their control sockets, from `open` to `close`. Whoever made it may be gone: its threads keep it."""

    def __init__(self, volumes: tuple[str, ...], options: ServeOptions) -> None:
        if not volumes:
            raise InvalidArgument("name at least one volume to serve")
        places = [options.socket, options.listen, options.listeners].count(None)
        if places < 2 or (places == 3 and options.vhost_user is None):
            raise InvalidArgument(
                "say where to serve: socket=PATH or listen=HOST:PORT, or listeners that are there already, or vhost_user=PATH for guests"
            )
        self._names = volumes
        self._options = replace(options, prefetch=volume_options(options.prefetch), base_allow=allowed_bases(options.base_allow))
        self._server: NbdServer | None = None
        self._disks: dict[str, OpenVolume] = {}  # by export name
        self._verbs: dict[str, OpenedVerbs] = {}  # of the same
        self._hubs: dict[str, Hub] = {}
        self._devices: HostDevices | None = None
        self._controls: list[ControlServer] = []
        self._deliveries: Deliveries | None = None
        self._begun: set[str] = set()  # whose `served` is told and whose allocators are at work
        self._failing_bases: set[str] = set()  # of disks without a `copying`: whose base_lost is told
        self._guest_paths: dict[str, str] = {}  # by export name: where its guests come in
        self._problems: dict[str, str] = {}  # of those that could not be closed cleanly: why
        self._resources = ExitStack()
        self._ready = threading.Event()
        self._close_lock = threading.Lock()
        self._closed = False
        self.exports: list[Export] = []

    # --- What the handle calls -------------------------------------------------------------------------------------------------

    def verbs(self, volume: str | None) -> OpenedVerbs:
        """Of one disk. Raises NotFound: not served here."""
        return self._verbs[self._export_name(volume)]

    def info(self, volume: str | None) -> dict[str, Any]:
        """What one disk is and how full. Raises NotFound."""
        return self._info(self._export_name(volume))

    def events(self, history: bool, volume: str | None) -> EventStream:
        """Of these disks, or of one of them. Raises NotFound."""
        hubs = list(self._hubs.values()) if volume is None else [self._hubs[self._export_name(volume)]]
        return LocalEvents(hubs, history)

    def close(self) -> None:
        """Answer what is under way, hang up, commit and close each disk; again is fine. Raises DeviceError."""
        try:
            with self._close_lock:
                if not self._closed:
                    self._closed = True
                    self._resources.close()
        finally:  # without the lock: a callback that is still at work may want to close too
            if self._deliveries is not None:
                self._deliveries.wait()

    # --- From start to end -----------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Claim and recover every disk, then serve them. All or none."""
        from fvd.export.server import NbdServer
        from fvd.volume.name import parse_name

        names = [parse_name(volume) for volume in self._names]
        with ExitStack() as undo:
            # At the very end, when the disks are given up: whoever hears that one is closed may open it.
            undo.callback(self._end_events)
            for_guests = self._guest_places(export_names(names))
            server = self._server = NbdServer(self._address(for_guests), on_stop=self._close_exports, on_end=self._options.on_end)
            for export_name, name in zip(export_names(names), names, strict=True):
                self._open_disk(export_name, name, undo)
                self._add_export(export_name, server)
                if export_name in for_guests:
                    server.add_guest_port(export_name, for_guests[export_name], self._options.queues)
            self._deliveries = Deliveries(list(self._hubs.values()), self._options.on_event)
            undo.callback(server.stop)
            for export_name in self._disks:
                self._start_control(export_name, undo)
            undo.callback(self._ready.set)  # whoever asks while it fails to start is not kept waiting
            server.start()
            server.call(self._begin_all)
            self._reconnect_devices()
            self.exports = [
                Export(str(disk.name), export_name, server.uri(export_name), self._guest_paths.get(export_name))
                for export_name, disk in self._disks.items()
            ]
            self._ready.set()
            self._resources = undo.pop_all()

    def _open_disk(self, export_name: str, name: VolumeName, undo: ExitStack) -> None:
        from fvd.disk.opening import open_volume

        hub = Hub(str(name))
        disk = open_volume(name, self._options, on_event=hub.tell)
        undo.callback(disk.close)
        checkpoint()
        for notice in disk.notices:
            log.warning("%s", notice)
        self._disks[export_name] = disk
        self._hubs[export_name] = hub
        self._verbs[export_name] = OpenedVerbs(disk, self._call)

    def _add_export(self, export_name: str, server: NbdServer) -> None:
        disk = self._disks[export_name]
        server.add_export(
            export_name,
            disk.engine,
            storage_fd=disk.node.fd,
            sampler_fd=disk.node.sampler_fd,
            base_fd=-1 if disk.base is None else disk.base.fd,
            remote=None if disk.base is None else disk.base.remote,
            size_bytes=disk.geometry.virtual_size_bytes,
            read_only=disk.read_only,
            block_size_bytes=disk.geometry.block_size_bytes,
            description=str(disk.name),
            on_want=partial(self._act_on_want, export_name),
        )
        disk.detach_base = partial(server.release_base, export_name)

    def _start_control(self, export_name: str, undo: ExitStack) -> None:
        from fvd.control.server import ControlServer

        disk = self._disks[export_name]
        streams = {"events": partial(self._stream_events, export_name)}
        control = ControlServer(str(disk.name), disk.node.path, self._handlers(export_name), stream_verbs=streams)
        try:
            control.start()
        except InUse:
            if not disk.read_only:
                raise
            log.warning("%s: another process serves it read-only too; fvd-lv info, map and check ask that one", disk.name)
            return
        self._controls.append(control)
        undo.callback(control.stop)

    def _reconnect_devices(self) -> None:
        """Of disks that are attached to this host since a server before us."""
        from fvd.device import nbd_devices
        from fvd.volume.superblocks import uuid_text

        for export_name, disk in self._disks.items():
            if nbd_devices.find(uuid := uuid_text(disk.superblock.uuid)):
                self._host_devices().reconnect(export_name, str(disk.name), uuid)

    def _host_devices(self) -> HostDevices:
        from fvd.api.host_device import HostDevices

        assert self._server is not None
        with self._close_lock:
            self._devices = self._devices or HostDevices(self._server)
            return self._devices

    def _attach(self, export_name: str, link: str) -> dict[str, Any]:
        from fvd.volume.superblocks import uuid_text

        disk = self._disks[export_name]
        return {"index": self._host_devices().attach(export_name, str(disk.name), uuid_text(disk.superblock.uuid), link).index}

    def _guest_places(self, names: list[str]) -> dict[str, Listen]:
        """By export name: where its guests come in. Raises as `guest_sockets`."""
        from fvd.export.listening import Given, guest_sockets, unix_path

        if self._options.vhost_user is None:
            return {}
        places: dict[str, Listen] = {}
        for name, place in guest_sockets(self._options.vhost_user, names).items():
            self._guest_paths[name] = place
            given = [one for one in self._options.listeners or () if unix_path(one) == self._guest_paths[name]]
            places[name] = Given(tuple(given)) if given else self._unix(place)
        return places

    def _unix(self, path: str | os.PathLike[str]) -> Listen:
        from fvd.export.listening import Unix

        group = self._options.socket_group
        if isinstance(group, str) and group.isascii() and group.isdigit():
            group = int(group)
        return Unix(os.fspath(path), self._options.socket_mode, group)

    def _address(self, for_guests: dict[str, Listen]) -> Listen:
        """Where NBD is served."""
        from fvd.export.listening import Given, Nowhere, Tcp

        options = self._options
        taken = [one for place in for_guests.values() if isinstance(place, Given) for one in place.sockets]
        others = tuple(one for one in options.listeners or () if one not in taken)
        if others or (options.listeners is not None and not taken):
            return Given(others)
        if options.listen is not None:
            host, port = parse_listen(options.listen) if isinstance(options.listen, str) else options.listen
            return Tcp(host, port)
        return Nowhere() if options.socket is None else self._unix(options.socket)

    def _begin_all(self) -> None:
        for export_name in self._disks:
            self._begin(export_name)

    def _begin(self, export_name: str) -> bool:
        """In the serving thread, once for each disk: an engine may want space before ``open`` comes to it. False: it was done before."""
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
        from fvd.engine._engine import Want

        disk = self._disks[export_name]
        if wants & Want.GROWTH:
            if disk.allocator is None:
                disk.engine.want &= ~Want.GROWTH
            elif not self._begin(export_name):
                disk.allocator.on_want(disk.engine)
        if wants & Want.STORAGE_BELOW:
            disk.engine.want &= ~Want.STORAGE_BELOW
            if disk.allocator is not None:
                self._begin(export_name)
                disk.allocator.on_space(disk.engine)
        if wants & Want.EVENT:
            disk.engine.want &= ~Want.EVENT
            if disk.failing is not None and disk.failing.noticed():
                self._hubs[export_name].publish("storage_error", disk, storage_failure(disk), **failure_details(disk))
        if wants & (Want.STEER | Want.BASE):
            disk.engine.want &= ~(Want.STEER | Want.BASE)
            self._begin(export_name)
            self._act_on_base(export_name, wants & (Want.STEER | Want.BASE))

    def _act_on_base(self, export_name: str, wants: int) -> None:
        """In the serving thread: prefetching is to be steered, or the base has failed, is back, or is not needed any more."""
        from fvd.engine._engine import Want

        disk = self._disks[export_name]
        if disk.copying is not None:
            disk.copying.on_want(wants)
        elif wants & Want.BASE:
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
            seconds = self._options.base_timeout_s
            message = f"{locator} cannot be read; guests' reads of it are tried again for {seconds:g} s, then they fail"
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

    def _export_name(self, volume: str | None) -> str:
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
            "attach": handler({"link": str}, partial(self._attach, export_name)),
        }

    def _stream_events(self, export_name: str, arguments: dict[str, Any], notify: Callable[[], None]) -> Stream:
        from fvd.control.protocol import check_arguments

        return HubStream(self._hubs[export_name], notify, **check_arguments(arguments, {"history": bool}))

    def _info(self, export_name: str) -> dict[str, Any]:
        uri = next((export.uri for export in self.exports if export.name == export_name), None)
        assert self._server is not None
        path = self._guest_paths.get(export_name)
        where = {"vhost_user": path, "queues": self._options.queues if path else 0, "guests": self._server.guest_count(export_name)}
        return self._verbs[export_name].info(uri) | where


def export_names(names: list[VolumeName]) -> list[str]:
    """The last part of each volume's path; the whole name where that would not tell two apart. Raises InvalidArgument: one named twice."""
    if len(set(names)) < len(names):
        raise InvalidArgument(f"{next(name for name in names if names.count(name) > 1)} is named twice")
    shorts = [name.short for name in names]
    return [short if shorts.count(short) == 1 else str(name) for short, name in zip(shorts, names, strict=True)]
