# SPDX-License-Identifier: Apache-2.0
"""Copy-on-read, prefetching and profiles of one open disk as plain values, whether it has something to copy or not.

The disk's `copying` does the work where there is one; without it (no base, read-only, nothing left) these functions say so in its place.
All of them run in the loop's thread, but for `find_profile` and what `profile_writer` returns, which deal with files. They may not know
how a disk is driven.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fvd.base.options import PrefetchOptions
from fvd.errors import InvalidArgument, ReadOnly
from fvd.units import parse_size

if TYPE_CHECKING:
    from fvd.base.copying import FoundProfile
    from fvd.disk.opening import OpenVolume
    from fvd.disk.view import View

# --- What is asked for ------------------------------------------------------------------------------------------------------------


def prefetch_options(rate: int | str = 0, delay_s: float = 0.0, profile: str | os.PathLike[str] | None = None) -> PrefetchOptions:
    """Options whose profile has an absolute path, for another process may have to read it. Raises InvalidArgument."""
    return checked_options(PrefetchOptions(delay_s, parse_size(rate), absolute(profile)))


# As far as the engine's integers go, with much to spare.
DELAY_SECONDS_MAX = 10 * 365 * 86400.0
RATE_BYTES_MAX = 1 << 60


def checked_options(options: PrefetchOptions) -> PrefetchOptions:
    """The options, if they can work. Raises InvalidArgument."""
    if not math.isfinite(options.delay_s) or options.delay_s < 0:
        raise InvalidArgument(f"prefetching cannot begin after {options.delay_s} seconds; name a time of 0 or more")
    if options.delay_s > DELAY_SECONDS_MAX:
        raise InvalidArgument(f"prefetching cannot begin after {options.delay_s:g} seconds; at most {DELAY_SECONDS_MAX:g} (ten years)")
    if not 0 <= options.rate_bytes <= RATE_BYTES_MAX:
        raise InvalidArgument(f"prefetching cannot copy {options.rate_bytes} bytes a second; name a rate above 0, or 0 for no limit")
    if options.profile is not None and "\0" in str(options.profile):
        raise InvalidArgument("the name of a profile has a zero byte in it")
    return options


def volume_options(options: PrefetchOptions | bool | None) -> PrefetchOptions | bool | None:
    """As the layer below takes them. Raises InvalidArgument."""
    return options if options is None or isinstance(options, bool) else _for_volume(options)


def _for_volume(options: PrefetchOptions) -> PrefetchOptions:
    checked = checked_options(options)
    return replace(checked, profile=absolute(checked.profile))


def allowed_bases(allow: Sequence[str]) -> tuple[str, ...]:
    """Raises InvalidArgument: one text is a list of letters too, and would allow nothing that was meant."""
    if isinstance(allow, str | bytes) or not all(isinstance(one, str) for one in allow):
        raise InvalidArgument("base_allow is a list of bases, each a path or a URI as text")
    return tuple(allow)


def absolute(path: str | os.PathLike[str] | None) -> str | None:
    """For a process that has another working directory."""
    return None if path is None else os.path.abspath(os.fspath(path))  # noqa: PTH100 - links stay as the user named them


# --- What an open disk does -------------------------------------------------------------------------------------------------------


def status(disk: OpenVolume) -> dict[str, Any]:
    """The keys of `PrefetchStatus`; answers for every disk."""
    if disk.copying is not None:
        return {"volume": str(disk.name), **disk.copying.status()}
    base = disk.superblock.base
    base_bytes = 0 if base is None else min(base.size_bytes, disk.geometry.virtual_size_bytes)
    if base is None:
        state, reason, remaining_bytes = "off", "the disk has no base", 0
    elif _released(disk):
        state, reason, remaining_bytes = "done", "everything is in the disk", 0
    else:
        state, reason, remaining_bytes = "off", "the disk is open read-only", disk.engine.base_remaining_bytes
    return {
        "volume": str(disk.name),
        "state": state,
        "reason": reason,
        "copy_on_read": False,
        "base_bytes": base_bytes,
        "copied_bytes": base_bytes - remaining_bytes,
        "remaining_bytes": remaining_bytes,
        "released": _released(disk),
    }


def find_profile(disk: OpenVolume, options: PrefetchOptions) -> FoundProfile | None:
    """The profile that `start` will use: reads a file, so not in the loop's thread. None: nothing will be prefetched."""
    return None if disk.copying is None else disk.copying.find_profile(_for_volume(options))


def start(disk: OpenVolume, options: PrefetchOptions, profile: FoundProfile | None) -> dict[str, Any]:
    """Raises InvalidArgument (no base), ReadOnly. A disk that has everything stays as it is."""
    if not _released(disk):
        _refuse_what_cannot_copy(disk, "prefetch")
        assert disk.copying is not None
        disk.copying.start(_for_volume(options), profile)
    return status(disk)


def stop(disk: OpenVolume) -> dict[str, Any]:
    """Where nothing runs nothing is done."""
    if disk.copying is not None:
        disk.copying.stop()
    return status(disk)


def set_copy_on_read(disk: OpenVolume, on: bool) -> dict[str, Any]:
    """Raises, to switch it on, InvalidArgument (no base), ReadOnly. A disk that has everything stays as it is."""
    if on and not _released(disk):
        _refuse_what_cannot_copy(disk, "copy what is read")
    if disk.copying is not None:
        disk.copying.set_copy_on_read(on)
    return status(disk)


def profile_writer(disk: OpenVolume, path: str | None) -> Callable[[], dict[str, Any]]:
    """What writes the profile, outside the loop's thread, and returns the keys of `SavedProfile`.

    Raises InvalidArgument (nothing was ever read from a base), ReadOnly; the call that it returns, what writing raises.
    """
    if path is not None and "\0" in path:
        raise InvalidArgument("the name of a profile has a zero byte in it")
    if disk.copying is None and disk.superblock.base is not None and _released(disk):
        raise InvalidArgument(
            f"{disk.name} did not need its base any more when it was opened, so nothing was read from it: there is no profile to record"
        )
    _refuse_what_cannot_copy(disk, "record a profile")
    assert disk.copying is not None
    write = disk.copying.profile_writer(path)
    return lambda: {"volume": str(disk.name), **write()}


def _released(disk: OpenVolume) -> bool:
    """Whether the base is not needed any more: since before it was opened, or by now."""
    if disk.copying is not None:
        return bool(disk.copying.status()["released"])
    return disk.base_released


def _refuse_what_cannot_copy(disk: OpenVolume, what: str) -> None:
    if disk.superblock.base is None:
        raise InvalidArgument(f"{disk.name} has no base, so it cannot {what}; fvd-lv provision --base makes a disk over one")
    if disk.read_only:
        raise ReadOnly(f"{disk.name} is open read-only, so it cannot {what}; open or serve it for writing")


# --- What info says of it ---------------------------------------------------------------------------------------------------------


def info_of_open(disk: OpenVolume) -> dict[str, Any]:
    """What `Info` says of copies from the base, of an open disk."""
    progress = None if disk.superblock.base is None else status(disk)
    return {
        "copy_on_read": progress is not None and progress["copy_on_read"],
        "prefetch_default": progress is not None and disk.superblock.prefetch,
        "prefetch": progress,
        "base_released": _released(disk),
    }


def info_of_closed(view: View) -> dict[str, Any]:
    """The same, of a closed one: from its maps and its superblock."""
    from fvd import _core

    superblock, geometry = view.superblock, view.geometry
    base = superblock.base
    released = False
    if base is not None:
        blocks = -(-min(base.size_bytes, geometry.virtual_size_bytes) // geometry.block_size_bytes)
        released = _core.bitmap_count(view.bitmap, 0, blocks) == blocks
    return {
        "copy_on_read": base is not None and superblock.copy_on_read,
        "prefetch_default": base is not None and superblock.prefetch,
        "prefetch": None,
        "base_released": released,
    }
