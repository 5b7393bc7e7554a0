# SPDX-License-Identifier: Apache-2.0
"""How the base of a disk is copied, as users say it: declared once, also for the API. Light to import; knows nothing of how it is done."""

from __future__ import annotations

from dataclasses import dataclass

TIMEOUT_SECONDS = 30.0  # how long a base may not answer


@dataclass(frozen=True)
class PrefetchOptions:
    """How a disk is to copy what it has not yet from its base."""

    delay_s: float = 10.0  # begin so many seconds later: a guest that boots has other worries
    rate_bytes: int = 0  # per second; 0: as fast as it goes without being in the guest's way
    profile: str | None = None  # a file that says what comes first; None: IMAGE.fvd-profile beside a base that is a file, if it is there
