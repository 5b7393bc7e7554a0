# SPDX-License-Identifier: Apache-2.0
"""How a disk is opened, as users say it: each option once, for `open_volume`, `fvd.open` and `fvd.serve`.

Light to import, for `import fvd` does it. What an option changes is in `opening.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fvd.base.options import TIMEOUT_SECONDS, PrefetchOptions
from fvd.errors import InvalidArgument, quoted
from fvd.modes import CACHE_MODES, ON_FULL, CacheMode, OnFull

TIMEOUT_SECONDS_MAX = 1e9


@dataclass(frozen=True, kw_only=True)
class OpenOptions:
    """Read-only nothing at all is written; what an option says of copies, growth and trims means nothing then."""

    read_only: bool = False
    cache: CacheMode = "none"
    on_full: OnFull = "wait"  # what an allocating write does when storage is exhausted
    low_water_bytes: int | None = None  # growth begins when less than this is free; None: half a grow step
    discard: bool = True  # pass trims on to the storage
    zero_chunks: bool = False  # let the device zero a new chunk as a whole, where it can, and write of its blocks only what guests write
    copy_on_read: bool | None = None  # keep what is read from the base; None: as the disk was made
    prefetch: PrefetchOptions | bool | None = None  # copy all of the base in the background; None: as the disk was made
    base_timeout_s: float = TIMEOUT_SECONDS  # how long the base may not answer before a request that needs it fails
    discard_pending: bool = False  # open even if the log of writes that a dead server acknowledged is missing, and do without them
    base_allow: Sequence[str] = ()  # bases that are opened whoever has named them (`rights.py`)

    def check(self) -> None:
        """Raises InvalidArgument."""
        if self.cache not in CACHE_MODES:
            raise InvalidArgument(f"cache mode {quoted(self.cache)}: choose one of {', '.join(CACHE_MODES)}")
        if self.on_full not in ON_FULL:
            raise InvalidArgument(f"on_full {quoted(self.on_full)}: choose one of {', '.join(ON_FULL)}")
        if not (0 < self.base_timeout_s <= TIMEOUT_SECONDS_MAX):
            raise InvalidArgument(
                f"base timeout {self.base_timeout_s} s: it must be more than 0 and at most {TIMEOUT_SECONDS_MAX:g} seconds"
            )
