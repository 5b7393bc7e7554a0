# SPDX-License-Identifier: Apache-2.0
"""The verbs on a disk that this process has open, whoever drives it: the in-process driver or the NBD server's loop.

Answers are plain values, for a control socket as for this process. What looks at the engine runs in the loop's thread.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fvd.api import copying
from fvd.api.types import PrefetchOptions
from fvd.api.verbs import MAP_PIECE_EXTENTS, map_of, map_to_json
from fvd.errors import DeviceError, InvalidArgument, ReadOnly

if TYPE_CHECKING:
    from fvd.disk.opening import OpenVolume

# call(function): function() as called in the loop's thread, between two requests.
Call = Callable[[Callable[[], Any]], Any]


class OpenedVerbs:
    """info, map, check, extend, acknowledge, and copies from the base, of one open disk. Safe from threads."""

    def __init__(self, disk: OpenVolume, call: Call) -> None:
        self._disk = disk
        self._call = call

    def info(self, uri: str | None = None) -> dict[str, Any]:
        from fvd.device.nbd_devices import path_of
        from fvd.inspect.info import info

        short_bytes = 0
        with contextlib.suppress(DeviceError):  # closed meanwhile
            short_bytes = self._disk.node.stack().short_bytes
        disk = self._disk
        answer: dict[str, Any] = self._call(lambda: info(disk, short_bytes) | copying.info_of_open(disk) | failure_details(disk))
        failed_errno = answer.get("failed_errno") or 0
        failed_reason = os.strerror(failed_errno) if failed_errno else ""
        attached = path_of(answer["uuid"])
        return {**answer, "uri": uri, "attached": attached, "failed": bool(failed_errno), "failed_reason": failed_reason}

    def map(self, offset: int = 0, length: int | None = None, limit: int | None = MAP_PIECE_EXTENTS) -> dict[str, Any]:
        """The map, or its beginning: ``more`` says which."""
        from fvd.disk.view import look

        # The snapshot is taken between two requests; what is made of it takes no time from them.
        view = self._call(lambda: look(self._disk))
        mapped = map_of(view, offset, length, limit)
        end = view.geometry.virtual_size_bytes if length is None else offset + length
        return map_to_json(mapped, more=offset + mapped.length < end)

    def check(self) -> dict[str, Any]:
        from fvd.inspect.check import check

        return {**asdict(self._call(lambda: check(self._disk))), "served": True}

    def extend(self, by_bytes: int | None = None) -> dict[str, Any]:
        disk = self._disk
        if disk.allocator is None:
            raise ReadOnly(f"{disk.name} is open read-only; open it for writing to extend it")
        if by_bytes is not None and by_bytes <= 0:
            raise InvalidArgument(f"{disk.name}: cannot extend by {by_bytes} bytes; name a size above 0")
        before_bytes = disk.engine.storage_size_bytes
        size_bytes = disk.allocator.extend_now(by_bytes).result()
        return {"volume": str(disk.name), "storage_size": size_bytes, "added_bytes": size_bytes - before_bytes}

    def acknowledge(self) -> dict[str, Any]:
        disk = self._disk
        if disk.read_only and disk.loss is not None:
            raise ReadOnly(f"{disk.name} is open read-only; that its writes may be gone can be acknowledged when it is open for writing")
        return {"volume": str(disk.name), "acknowledged": self._call(disk.acknowledge_loss)}

    def prefetch_start(self, delay_s: float = 0.0, rate_bytes: int = 0, profile: str | None = None) -> dict[str, Any]:
        options = copying.checked_options(PrefetchOptions(delay_s, rate_bytes, profile))
        # A profile may be large, and its file system slow: guests do not wait for it.
        recorded = copying.find_profile(self._disk, options)
        return self._plain(lambda: copying.start(self._disk, options, recorded))

    def prefetch_stop(self) -> dict[str, Any]:
        return self._plain(lambda: copying.stop(self._disk))

    def prefetch_status(self) -> dict[str, Any]:
        return self._plain(lambda: copying.status(self._disk))

    def copy_on_read(self, on: bool) -> dict[str, Any]:
        return self._plain(lambda: copying.set_copy_on_read(self._disk, on))

    def profile_record(self, path: str | None = None) -> dict[str, Any]:
        write: Callable[[], dict[str, Any]] = self._call(lambda: copying.profile_writer(self._disk, path))
        return write()

    def _plain(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        answer: dict[str, Any] = self._call(work)
        return answer


def storage_failure(disk: OpenVolume) -> str:
    """What there is to say once a flush or metadata write has failed; empty: none has. In the loop's thread."""
    failure = None if disk.failing is None else disk.failing.failure
    if failure is None:
        return ""
    import datetime

    when = datetime.datetime.fromtimestamp(failure.seconds).astimezone().isoformat(" ", "milliseconds")
    whose = "" if failure.source == str(disk.name) else f", of {failure.source}, which lies on the same device"
    return (
        f"a flush failed at {when}{whose}: {failure.reason}. What was written since the last one that succeeded may be lost; "
        "writes that must be durable are refused until the disk is closed and opened again"
    )


def failure_details(disk: OpenVolume) -> dict[str, Any]:
    """The same as plain values, for `info` and events. In the loop's thread."""
    failure = None if disk.failing is None else disk.failing.failure
    if failure is None:
        return {}
    return {"failed_errno": failure.errno, "failed_seconds": failure.seconds, "failed_source": failure.source}
