# SPDX-License-Identifier: Apache-2.0
"""The verbs on a served disk's copies from its base, by the volume's name: whoever serves it is asked through its control socket.

Each raises NotFound for a volume that is not there or that nobody serves, PermissionDenied (another user's) and Timeout. A disk that this
process has open has the same as methods.
"""

from __future__ import annotations

import os
from typing import Any, TypeVar

from fvd.api import remote
from fvd.api.copying import absolute, prefetch_options
from fvd.api.hints import how_to_serve
from fvd.api.types import PrefetchStatus, SavedProfile, from_json
from fvd.api.verbs import info
from fvd.errors import NotFound

T = TypeVar("T")


def prefetch_start(
    volume: str, *, rate: int | str = 0, delay_s: float = 0.0, profile: str | os.PathLike[str] | None = None
) -> PrefetchStatus:
    """Have a served disk copy the rest of its base in the background, at most ``rate`` bytes a second (0: no limit), what ``profile`` (a
    file) names first. Under way already, it goes on with these options. Raises InvalidArgument (no base, no such options), ReadOnly."""
    options = {name: value for name, value in vars(prefetch_options(rate, delay_s, profile)).items() if value is not None}
    return _ask(PrefetchStatus, volume, "prefetch_start", **options)


def prefetch_stop(volume: str) -> PrefetchStatus:
    """Have it copy nothing more in the background; what was copied stays. Again is fine."""
    return _ask(PrefetchStatus, volume, "prefetch_stop")


def prefetch_status(volume: str) -> PrefetchStatus:
    """How far a served disk is on its way from its base; answers for every disk that is served."""
    return _ask(PrefetchStatus, volume, "prefetch_status")


def set_copy_on_read(volume: str, on: bool) -> PrefetchStatus:
    """Whether what its guest reads from the base is copied from now on, until serving ends. Raises InvalidArgument (no base), ReadOnly."""
    return _ask(PrefetchStatus, volume, "copy_on_read", on=on)


def record_profile(volume: str, path: str | os.PathLike[str] | None = None) -> SavedProfile:
    """Save what its guest has read from the base since serving began, in order, for later disks to prefetch first (default:
    IMAGE.fvd-profile beside the base). Raises InvalidArgument (no base, or one that is no file, without a path), ReadOnly."""
    place = absolute(path)
    return _ask(SavedProfile, volume, "profile_record", **({} if place is None else {"path": place}))


def _ask(kind: type[T], volume: str, verb: str, **arguments: Any) -> T:
    """The answer of whoever serves the volume. Raises NotFound: no such volume, or nobody serves it."""
    from fvd.volume.name import parse_name

    name = parse_name(volume)
    answer = remote.ask(name, verb, **arguments)
    if answer is remote.NOT_SERVED:
        info(str(name))  # raises what is worse than not being served
        raise NotFound(f"{name} is not served; {how_to_serve(str(name))}")
    return from_json(kind, answer)
