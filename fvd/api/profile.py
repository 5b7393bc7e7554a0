# SPDX-License-Identifier: Apache-2.0
"""Reads a profile to show it: what a guest read from a base, in order. Who prefetches by it is not known here."""

from __future__ import annotations

import os

from fvd.api.types import Profile
from fvd.errors import Corrupt, InvalidArgument


def read_profile(path: str | os.PathLike[str]) -> Profile:
    """What ``record_profile`` saved. Raises NotFound, PermissionDenied, Unsupported (a directory), Corrupt (it is no profile, or
    damaged), DeviceError."""
    from fvd.base import profile

    name = os.fspath(path)
    try:
        base_size, extents = profile.read(name)
    except InvalidArgument as error:  # here the file is what was asked for, and not an option of something else
        raise Corrupt(f"{name}: {error}") from error
    return Profile(name, base_size, sum(length for _, length in extents), extents)
