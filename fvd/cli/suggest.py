# SPDX-License-Identifier: Apache-2.0
"""What somebody may have meant: the nearest of the names that there are. Knows no command; changes nothing, and never fails."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable
from pathlib import Path

from fvd.errors import FvdError
from fvd.volume.name import VolumeKind, parse_name

_LIKENESS_MIN = 0.6
_NAMES_MAX = 10_000


def guess(word: str, known: Iterable[str]) -> str:
    """``; did you mean --size?``, or nothing."""
    import difflib

    near = difflib.get_close_matches(word, [name for name in known if name != word], n=1, cutoff=_LIKENESS_MIN)
    return f"; did you mean {near[0]}?" if near else ""


def guess_volume(volume: str) -> str:
    """The same of a volume that is not there, among the files of its folder or the volumes of its group."""
    with contextlib.suppress(OSError, FvdError):
        name = parse_name(volume)
        path = Path(name.path)
        if name.kind is VolumeKind.FILE:
            names = [entry.name for entry in itertools.islice(path.parent.iterdir(), _NAMES_MAX)]
            return guess(volume, [f"{volume.removesuffix(path.name)}{one}" for one in names if one[0] != "." and one.isprintable()])
        if name.kind is VolumeKind.LVM:
            from fvd.api.listing import look_around

            return guess(str(name), [listed.volume for listed in look_around(name.group).volumes])
    return ""
