# SPDX-License-Identifier: Apache-2.0
"""An open disk in this process: read and write it without NBD, from any number of threads."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fvd._lifetime import Handle, checkpoint, whole
from fvd.api.copying import absolute, allowed_bases, prefetch_options, volume_options
from fvd.api.events import Deliveries, Event, EventStream, Hub, LocalEvents
from fvd.api.opened import OpenedVerbs, failure_details, storage_failure
from fvd.api.types import (
    CheckReport,
    Extended,
    Info,
    Map,
    PrefetchOptions,
    PrefetchStatus,
    SavedProfile,
    from_json,
    info_from_json,
)
from fvd.api.verbs import map_from_json
from fvd.disk.options import OpenOptions
from fvd.errors import DeviceError
from fvd.modes import CacheMode, OnFull
from fvd.units import parse_size

if TYPE_CHECKING:
    from typing_extensions import Buffer  # collections.abc has it from Python 3.12 on

    from fvd.disk._disk_thread import DiskThread

log = logging.getLogger("fvd.api")


def open(
    volume: str,
    *,
    read_only: bool = False,
    cache: CacheMode = "none",
    on_full: OnFull = "error",
    zero_chunks: bool = False,
    copy_on_read: bool | None = None,
    prefetch: PrefetchOptions | bool | None = None,
    base_timeout_s: float = 30.0,
    discard_pending: bool = False,
    base_allow: Sequence[str] = (),
    on_event: Callable[[Event], None] | None = None,
) -> Disk:
    """Open a disk for use in this process, recovering it if it was not closed cleanly. Read-only, nothing at all is written.

    ``on_full``: when storage is exhausted, an allocating write raises NoSpace ("error") or waits until there is some.
    ``zero_chunks``: let the device zero a new chunk as a whole, where it can, so that a first write writes only what was written.
    ``copy_on_read``, ``prefetch``: copy what is read from the base; copy all of it in the background (None: as the disk was provisioned).
    A read of a base that does not answer is tried again for ``base_timeout_s`` seconds, then it raises DeviceError.
    ``discard_pending``: open a disk whose server died even if the log of what that one had acknowledged is missing, without those writes; a
    log that is there is used all the same. ``base_allow``: bases that root opens with his own rights, whoever has named them
    (docs/base.md). ``on_event`` is called, in a thread of its own, with each event (docs/events.md); what it raises is logged and ends
    nothing.
    Raises NotFound, InUse, Corrupt, Unsupported, Conflict (the base has changed, or such a log is missing), PermissionDenied,
    InvalidArgument, OutOfMemory, DeviceError. Interrupted (KeyboardInterrupt, or whatever a signal handler raises), nothing is left open.
    """
    options = OpenOptions(
        read_only=read_only,
        cache=cache,
        on_full=on_full,
        zero_chunks=zero_chunks,
        copy_on_read=copy_on_read,
        prefetch=volume_options(prefetch),
        base_timeout_s=base_timeout_s,
        discard_pending=discard_pending,
        base_allow=allowed_bases(base_allow),
    )
    return whole(functools.partial(_open, volume, on_event, options), Disk.close, "fvd-open")


def _open(volume: str, on_event: Callable[[Event], None] | None, options: OpenOptions) -> Disk:
    from fvd.disk._disk_thread import drive
    from fvd.disk.opening import open_volume
    from fvd.volume.name import parse_name

    name = parse_name(volume)
    hub = Hub(str(name))
    opened = open_volume(name, options, on_event=hub.tell)
    try:
        checkpoint()
        hub.attach(opened)
        for notice in opened.notices:
            log.warning("%s", notice)
        deliveries = Deliveries([hub], on_event)
        hub.tell_loss(opened)

        def failed() -> None:
            hub.publish("storage_error", opened, storage_failure(opened), **failure_details(opened))

        driver = drive(opened, on_failure=failed)
        return Disk(driver, hub, deliveries)
    except BaseException:
        opened.close()
        hub.end()
        raise


class Disk(Handle):
    """An open disk: a context manager, safe from threads. Made by ``open``. Offsets and lengths are whole numbers of bytes, any of them.

    Every method raises DeviceError once the disk has been closed, and after a flush failed: nothing is promised then until the next open.
    In a child after ``os.fork`` every method raises Forked, and the child holds nothing of the disk. Dropped without ``close`` it is
    closed, with a ResourceWarning. An exception of a signal handler (KeyboardInterrupt) leaves ``open`` and ``close`` wholly done or
    undone, and comes out of what changes the disk when that has ended. docs/api.md says more.
    """

    def __init__(self, driver: DiskThread, hub: Hub, deliveries: Deliveries) -> None:
        self._begin(str(driver.volume.name), _Closing(driver, hub, deliveries))
        self._thread = driver
        self._verbs = OpenedVerbs(driver.volume, driver.call)
        self._hub = hub

    @property
    def volume(self) -> str:
        """The volume's name."""
        return str(self._thread.volume.name)

    @property
    def size(self) -> int:
        """The virtual size in bytes."""
        return self._thread.volume.geometry.virtual_size_bytes

    def pread(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset``. Raises InvalidArgument (not in the disk, no whole numbers), OutOfMemory, DeviceError."""
        return self._thread.pread(offset, length)

    def pread_into(self, offset: int, buffer: Buffer) -> int:
        """Fill a writable buffer, in one piece, from ``offset``; returns its length in bytes. Raises as ``pread``."""
        return self._thread.pread_into(offset, buffer)

    def pwrite(self, offset: int, data: Buffer, *, durable: bool = False) -> int:
        """Write all of ``data`` at ``offset``; with ``durable`` it survives any crash when this returns. Returns its length.

        ``data`` is any memory in one piece. Interrupted, what it wrote may be there or not, and nothing of it comes later.
        Raises InvalidArgument (not in the disk, no whole number, no such memory), NoSpace, ReadOnly, OutOfMemory, DeviceError.
        """
        return self._thread.pwrite(offset, data, fua=durable)

    def flush(self) -> None:
        """What was written before, by any thread, survives any crash when this returns. Raises DeviceError."""
        self._thread.flush()

    def trim(self, offset: int, length: int) -> None:
        """The range is not needed any longer: it reads as its old contents or zeros. Raises InvalidArgument, ReadOnly, DeviceError."""
        self._thread.trim(offset, length)

    def zero(self, offset: int, length: int, *, keep_storage: bool = False) -> None:
        """The range reads as zeros; with ``keep_storage`` later writes there need no more. Raises as ``pwrite``."""
        self._thread.zero(offset, length, no_hole=keep_storage)

    def info(self) -> Info:
        """What the disk is and how full."""
        return info_from_json(self._verbs.info())

    def map(self, offset: int | str = 0, length: int | str | None = None) -> Map:
        """Which part of the disk is where. Raises InvalidArgument (not in the disk)."""
        return map_from_json(self._verbs.map(parse_size(offset), None if length is None else parse_size(length), limit=None))

    def check(self) -> CheckReport:
        """Is the metadata whole? What is damaged is in the report."""
        return from_json(CheckReport, self._verbs.check())

    def extend(self, by: int | str | None = None) -> Extended:
        """More storage now (default: a grow step). Raises NoSpace, Unsupported (a device of fixed size), ReadOnly, Timeout."""
        by_bytes = None if by is None else parse_size(by)
        return from_json(Extended, self._whole(lambda: self._verbs.extend(by_bytes)))

    def acknowledge(self) -> bool:
        """An administrator has seen that acknowledged writes may be gone (``info().possible_loss``): it is no longer reported. False: there
        was nothing to see. Lasting once the disk is closed, and if its process is killed. Raises ReadOnly."""
        return bool(self._whole(self._verbs.acknowledge)["acknowledged"])

    def prefetch_start(self, *, rate: int | str = 0, delay_s: float = 0.0, profile: str | os.PathLike[str] | None = None) -> PrefetchStatus:
        """Copy the rest of the base in the background, at most ``rate`` bytes a second (0: no limit), what ``profile`` (a file) names
        first. Under way already, it goes on with these options. Raises InvalidArgument (no base, no such options), ReadOnly."""
        options = prefetch_options(rate, delay_s, profile)
        return from_json(PrefetchStatus, self._whole(lambda: self._verbs.prefetch_start(**vars(options))))

    def prefetch_stop(self) -> PrefetchStatus:
        """Copy nothing more in the background; what was copied stays. Again is fine."""
        return from_json(PrefetchStatus, self._whole(self._verbs.prefetch_stop))

    def prefetch_status(self) -> PrefetchStatus:
        """How far the disk is on its way from its base; answers for every disk."""
        return from_json(PrefetchStatus, self._verbs.prefetch_status())

    def set_copy_on_read(self, on: bool) -> PrefetchStatus:
        """Whether what is read from the base is copied from now on, until close. Raises InvalidArgument (no base), ReadOnly."""
        return from_json(PrefetchStatus, self._whole(lambda: self._verbs.copy_on_read(on)))

    def record_profile(self, path: str | os.PathLike[str] | None = None) -> SavedProfile:
        """Save what was read from the base since the disk was opened, in order, for later disks to prefetch first (default:
        IMAGE.fvd-profile beside the base). Raises InvalidArgument (no base; no path, and the base is no file), ReadOnly, PermissionDenied,
        NoSpace."""
        place = absolute(path)
        return from_json(SavedProfile, self._whole(lambda: self._verbs.profile_record(place)))

    def events(self, history: bool = False) -> EventStream:
        """What happens to the disk from now on, or (``history``) since a while ago, until it is closed. See docs/events.md."""
        self._check()
        return LocalEvents([self._hub], history)

    def close(self) -> None:
        """Commit everything and close the disk; again is fine. Raises DeviceError when that failed: what was flushed is safe even then.

        Interrupted, it goes on to its end before that is raised; or, if it had not begun, the disk is open as before.
        """
        super().close()

    def _whole(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        self._check()
        return whole(work)


class _Closing:
    """How a disk is closed, by whoever does it. It does not know the `Disk`, so that this can be forgotten."""

    def __init__(self, driver: DiskThread, hub: Hub, deliveries: Deliveries) -> None:
        self._thread = driver
        self._hub = hub
        self._deliveries = deliveries

    def __call__(self) -> None:
        problem = ""
        try:
            self._thread.close()
        except DeviceError as error:
            problem = str(error)
            raise
        finally:
            if self._thread.closed:
                self._hub.publish("closed", self._thread.volume, problem)
                self._hub.end()
                self._deliveries.wait()
