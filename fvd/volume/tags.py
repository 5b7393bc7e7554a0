# SPDX-License-Identifier: Apache-2.0
"""What fvd writes into a logical volume's tags: whose it is, what its disk may need, what it lies over. Text only; runs nothing.

No guest can write there, so these are believed where a superblock is not. A group of disks is judged by one look at its tags.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fvd.lvm.report import LogicalVolume

TAG_DISK = "fvd.disk"
TAG_UNFINISHED = "fvd.unfinished"
TAG_WIPE = "fvd.wipe"  # of a volume or a group: nothing of a disk may be left in what is given back
TAG_BASE = "fvd.base="  # and what `base_rights.mark_of` makes of its name
_FACT_TAG = re.compile(r"fvd\.(virtual|most|step)=(\d{1,20})", re.ASCII)


@dataclass(frozen=True)
class Facts:
    """What is known of a disk from outside. Sizes in bytes."""

    virtual_size_bytes: int
    most_bytes: int  # the greatest storage that it can ever need
    grow_step_bytes: int

    def tags(self) -> list[str]:
        """As they stand on the logical volume."""
        return [f"fvd.virtual={self.virtual_size_bytes}", f"fvd.most={self.most_bytes}", f"fvd.step={self.grow_step_bytes}"]


def facts_of(volume: LogicalVolume) -> Facts | None:
    """None: the tags do not say."""
    facts: dict[str, int] = {}
    for tag in volume.tags:
        if match := _FACT_TAG.fullmatch(tag):
            facts[match[1]] = max(int(match[2]), facts.get(match[1], 0))  # of two that contradict each other, the one that promises more
    return Facts(facts["virtual"], facts["most"], facts["step"]) if {"virtual", "most", "step"} <= facts.keys() else None


def fact_tags(volume: LogicalVolume) -> list[str]:
    """The tags that tell facts, right or wrong."""
    return sorted(tag for tag in volume.tags if _FACT_TAG.fullmatch(tag) or tag.startswith(TAG_BASE))


def base_tags(volume: LogicalVolume) -> frozenset[str]:
    """The tags that tell what its disk lies over."""
    return frozenset(tag for tag in volume.tags if tag.startswith(TAG_BASE))


def is_disk(volume: LogicalVolume) -> bool:
    """Whether it is one of ours, finished."""
    return TAG_DISK in volume.tags and TAG_UNFINISHED not in volume.tags


def is_only_unfinished(volume: LogicalVolume) -> bool:
    """Whether it is an interrupted provision's own volume: an adopted one may have tags of somebody else's, who would miss them."""
    return TAG_UNFINISHED in volume.tags and not volume.tags - {TAG_UNFINISHED, TAG_WIPE, *fact_tags(volume)}


def is_ours(volume: LogicalVolume) -> bool:
    """Whether it is one of ours, finished or not."""
    return bool(volume.tags & {TAG_DISK, TAG_UNFINISHED})
