# SPDX-License-Identifier: Apache-2.0
"""Disks served over NBD by a thread of this process, as a program has them in its hand: `serve` and what it returns."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fvd._lifetime import Handle, whole
from fvd.api.copying import absolute, prefetch_options
from fvd.api.events import Event, EventStream
from fvd.api.serving import QUEUES, ServeOptions, Serving
from fvd.api.types import (
    Export,
    Extended,
    Info,
    PrefetchOptions,
    PrefetchStatus,
    SavedProfile,
    from_json,
    info_from_json,
)
from fvd.errors import InvalidArgument
from fvd.modes import CacheMode, OnFull
from fvd.units import parse_size

if TYPE_CHECKING:
    from fvd.api.opened import OpenedVerbs
    from fvd.export.listening import Socket


def serve(
    *volumes: str,
    socket: str | os.PathLike[str] | None = None,
    listen: str | tuple[str, int] | None = None,
    listeners: Sequence[Socket] | None = None,
    vhost_user: str | os.PathLike[str] | None = None,
    queues: int = QUEUES,
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
    """Serve disks until ``close``. Over NBD, on a unix socket or (``listen="localhost:10809"``, ``":0"``) on TCP, or on ``listeners``:
    stream sockets that listen already, a service manager's, say, which are closed at the end, and whose names stay. To guests, by
    vhost-user, on the unix socket ``vhost_user``, for up to ``queues`` queues each; with several volumes that is a folder, with a socket
    NAME.sock for each. Both at once, or one of them. One of the ``listeners`` with that path is the guests'.

    ``zero_chunks``: let the device zero a new chunk as a whole, where it can, so that a first write writes only what the guest wrote.
    ``copy_on_read``, ``prefetch``: copy what guests read from the base; copy all of it in the background, out of their way (None: as each
    disk was provisioned). A read of a base that does not answer is tried again for ``base_timeout_s`` seconds, then the guest's request
    fails. ``discard_pending``: open a disk whose server died even if the log of what that one had acknowledged is missing, without those
    writes; a log that is there is used all the same. ``base_allow``: bases that root opens with his own rights, whoever has named them
    (docs/base.md). ``on_end`` is called, in the serving thread, when serving has ended for whatever
    reason. ``on_event`` is called with each event of these disks (docs/events.md), in a thread of its own; what it raises is logged and
    ends nothing. Notices (no io_uring here, no O_DIRECT...) and failed growth steps are logged as warnings of the logger "fvd".
    Raises NotFound, InUse (a volume or the address), Corrupt, Unsupported, Conflict (the base has changed, or such a log is missing),
    PermissionDenied. Interrupted (KeyboardInterrupt, or whatever a signal handler raises), nothing is served and nothing left open.
    """
    options = ServeOptions(
        socket=socket,
        listen=listen,
        listeners=listeners,
        vhost_user=vhost_user,
        queues=queues,
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
    served = Served(volumes, options)
    served.open()
    return served


class Served(Handle):
    """Disks that are being served: a context manager, safe from threads. Made by ``serve``.

    In a child after ``os.fork`` every method raises Forked, and the child holds nothing of it. Dropped without ``close`` it ends, with a
    ResourceWarning. An exception of a signal handler (KeyboardInterrupt) leaves ``serve`` and ``close`` wholly done or wholly undone.
    """

    def __init__(self, volumes: tuple[str, ...], options: ServeOptions) -> None:
        """As ``serve``, which it does not do before ``open``."""
        self._serving = Serving(volumes, options)
        self._names = ", ".join(volumes)

    def open(self) -> None:
        """Claim and recover every disk, then serve them. All or none. Raises as ``serve``."""
        self._begin(self._names, self._serving.close)
        try:
            whole(self._serving.open, lambda _: self._serving.close(), "fvd-open")
        except BaseException:
            self.close()  # of what it has not undone itself
            raise

    @property
    def exports(self) -> list[Export]:
        """Where each volume is served."""
        return self._serving.exports

    @property
    def uri(self) -> str:
        """The NBD URI of the only volume. Raises InvalidArgument when there are several: see ``exports``."""
        if len(self._serving.exports) != 1:
            raise InvalidArgument("several volumes are served here; take the URI from exports")
        return self._serving.exports[0].uri

    def info(self, volume: str | None = None) -> Info:
        """What a served disk is and how full. ``volume`` may be left out where there is only one. Raises NotFound: not served here."""
        self._check()
        return info_from_json(self._serving.info(volume))

    def extend(self, by: int | str | None = None, volume: str | None = None) -> Extended:
        """More storage now (default: a grow step). Raises NoSpace, Unsupported (a device of fixed size), ReadOnly, Timeout, NotFound."""
        by_bytes = None if by is None else parse_size(by)
        return from_json(Extended, self._whole(volume, lambda verbs: verbs.extend(by_bytes)))

    def acknowledge(self, volume: str | None = None) -> bool:
        """An administrator has seen that acknowledged writes may be gone: it is no longer reported. False: there was nothing to see. As
        `Disk.acknowledge`; raises NotFound too."""
        return bool(self._whole(volume, lambda verbs: verbs.acknowledge())["acknowledged"])

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
        return from_json(PrefetchStatus, self._whole(volume, lambda verbs: verbs.prefetch_start(**vars(options))))

    def prefetch_stop(self, volume: str | None = None) -> PrefetchStatus:
        """Copy nothing more in the background; what was copied stays. Again is fine. Raises NotFound: not served here."""
        return from_json(PrefetchStatus, self._whole(volume, lambda verbs: verbs.prefetch_stop()))

    def prefetch_status(self, volume: str | None = None) -> PrefetchStatus:
        """How far a disk is on its way from its base; answers for every disk. Raises NotFound: not served here."""
        return from_json(PrefetchStatus, self._whole(volume, lambda verbs: verbs.prefetch_status()))

    def set_copy_on_read(self, on: bool, volume: str | None = None) -> PrefetchStatus:
        """Whether what a guest reads from the base is copied until serving ends. As `Disk.set_copy_on_read`; raises NotFound too."""
        return from_json(PrefetchStatus, self._whole(volume, lambda verbs: verbs.copy_on_read(on)))

    def record_profile(self, path: str | os.PathLike[str] | None = None, volume: str | None = None) -> SavedProfile:
        """Save what was read from the base since serving began, in order. As `Disk.record_profile`; raises NotFound too."""
        place = absolute(path)
        return from_json(SavedProfile, self._whole(volume, lambda verbs: verbs.profile_record(place)))

    def events(self, history: bool = False, volume: str | None = None) -> EventStream:
        """What happens to the disks that are served here, or to one of them, from now on or (``history``) since a while ago, until they
        are closed. See docs/events.md. Raises NotFound: not served here."""
        self._check()
        return self._serving.events(history, volume)

    def close(self) -> None:
        """Answer what is under way, hang up, commit and close each disk; again is fine. Raises DeviceError when a disk could not be closed
        cleanly: what was flushed is safe even then. Interrupted, it goes on to its end before that is raised."""
        super().close()

    def _whole(self, volume: str | None, work: Callable[[OpenedVerbs], dict[str, Any]]) -> dict[str, Any]:
        self._check()
        return whole(lambda: work(self._serving.verbs(volume)))
