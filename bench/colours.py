# SPDX-License-Identifier: Apache-2.0
"""Which colour a peer has, the same in every picture: fvd strong, everything else muted. Can be told apart by who sees few colours.

Every colour is readable on white and on near-black. Knows nothing of drawing.
"""

from __future__ import annotations

from collections.abc import Iterable

FVD = ("#d55e00", "#e69f00", "#a8501c", "#cc7a4a")  # fvd itself, then its variants
MUTED = ("#4a7fb5", "#3f9187", "#8a74b8", "#8f8437", "#b3688a", "#7d838c", "#5a9bc9", "#8a6a52", "#6a9a4d", "#97887a")

# The first that is part of the name decides; an index into MUTED. What is not here takes the next one that is free in its picture.
PEERS = {
    "pass-through": 5,
    "answer": 9,
    "qcow2": 0,
    "qed": 6,
    "vdi": 4,
    "vmdk": 7,
    "vhdx": 8,
    "vpc": 3,
    "nbdkit": 2,
    "ext4": 3,
    "xfs": 8,
    "snapshot": 4,
    "thin": 2,
    "linear": 5,
    "qemu": 1,
    "raw": 1,
    "device": 5,
    "fio": 5,
    "numpy": 0,
}


def is_fvd(name: str) -> bool:
    return name.lower().startswith("fvd")


def kind(name: str) -> str | None:
    """The muted colour that belongs to a name, whoever stands beside it."""
    return next((MUTED[index] for word, index in PEERS.items() if word in name.lower()), None)


def colours(names: Iterable[str], *, apart: bool) -> dict[str, str]:
    """A colour for each series of a picture. `apart`: nothing but the colour tells them apart, so that none comes twice as long as there
    are enough; otherwise variants of one kind share its colour."""
    names = list(dict.fromkeys(names))
    ours = sorted((name for name in names if is_fvd(name)), key=lambda name: name.lower() != "fvd")
    taken = {name: FVD[index % len(FVD)] for index, name in enumerate(ours)}
    for name in names:
        wanted = kind(name)
        if name not in taken and wanted and (not apart or wanted not in taken.values()):
            taken[name] = wanted
    for name in names:
        if name not in taken:
            free = [colour for colour in MUTED if colour not in taken.values()]
            taken[name] = (free or [MUTED[len(taken) % len(MUTED)]])[0]
    return taken
