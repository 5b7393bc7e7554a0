# SPDX-License-Identifier: Apache-2.0
"""How much the disks of a volume group have been promised, and how much there is: pure figures from what lvm reports. Runs nothing.

The facts about a disk stand in the tags of its logical volume, so that a group is judged by one look and nothing need be activated.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fvd.errors import Conflict, InvalidArgument, NoSpace, quoted
from fvd.lvm.report import LogicalVolume, VolumeGroup
from fvd.units import format_size
from fvd.volume.tags import facts_of, is_ours

_LIMIT_TAG = "fvd.max_overcommit="


@dataclass(frozen=True)
class Commitment:
    """What a group has and what it has promised, in bytes."""

    group: str
    size_bytes: int
    free_bytes: int  # the growth reserve: what no volume has and a linear one can get
    disks: int
    storage_bytes: int  # the logical volumes of our disks
    virtual_bytes: int
    most_bytes: int  # the sum of the greatest sizes: what is promised
    unknown: int  # disks whose tags do not say what they may need; they count with the size they have
    limit: float | None  # the strictest fvd.max_overcommit of the group

    @property
    def available_bytes(self) -> int:
        """What disks have or can still get."""
        return self.storage_bytes + self.free_bytes

    @property
    def ratio(self) -> float:
        """Promised over available: above 1, not every disk can become as large as it may."""
        return self.most_bytes / self.available_bytes if self.available_bytes else 0.0


def commitment(group: VolumeGroup, volumes: Iterable[LogicalVolume]) -> Commitment:
    """The figures of one group; of `volumes` only ours in it count."""
    ours = [volume for volume in volumes if volume.group == group.name and is_ours(volume)]
    facts = [(volume, facts_of(volume)) for volume in ours]
    return Commitment(
        group=group.name,
        size_bytes=group.size_bytes,
        free_bytes=group.obtainable_bytes(),
        disks=len(ours),
        storage_bytes=sum(volume.size_bytes for volume in ours),
        virtual_bytes=sum(fact.virtual_size_bytes for _, fact in facts if fact),
        most_bytes=sum(greatest_bytes(volume, group.extent_bytes) for volume in ours),
        unknown=sum(fact is None for _, fact in facts),
        limit=_limit_of(group),
    )


def is_limited(group: VolumeGroup, asked: float | None) -> bool:
    """Whether anybody limits over-commit. Raises Conflict for a limit of the group that cannot be read."""
    return asked is not None or _limit_of(group) is not None


def _limit_of(group: VolumeGroup) -> float | None:
    """The strictest of the group's tags. One that cannot be read is refused rather than passed over."""
    limits = []
    for tag in group.tags:
        if tag.startswith(_LIMIT_TAG):
            try:
                limits.append(parse_limit(tag.removeprefix(_LIMIT_TAG)))
            except InvalidArgument as error:
                raise Conflict(
                    f"volume group {group.name} has the tag {tag}, which is no ratio; vgchange --deltag {tag} {group.name}"
                ) from error
    return min((limit for limit in limits if limit is not None), default=None)


def greatest_bytes(volume: LogicalVolume, extent_bytes: int) -> int:
    """The size that a volume can reach, in whole extents; what it has, where the tags do not say or it is larger by hand."""
    facts = facts_of(volume)
    return max(volume.size_bytes, 0 if facts is None else -(-facts.most_bytes // extent_bytes) * extent_bytes)


def check_limit(group: VolumeGroup, volumes: Iterable[LogicalVolume], name: str, most_bytes: int, asked: float | None) -> None:
    """Raises NoSpace if the group's disks, with one of at most `most_bytes` in the volume `name` (which may exist), could become more than
    the stricter of the limit asked for and the group's own allows."""
    limits = [limit for limit in (asked, _limit_of(group)) if limit is not None]
    if not limits:
        return
    strictest = min(limits)
    volumes = [volume for volume in volumes if volume.group == group.name]
    own = next((volume for volume in volumes if volume.name == name), None)
    others = commitment(group, [volume for volume in volumes if volume is not own])
    own_bytes = 0 if own is None else own.size_bytes
    own_most_bytes = max(-(-most_bytes // group.extent_bytes) * group.extent_bytes, own_bytes)
    promised = others.most_bytes + own_most_bytes
    available = others.available_bytes + own_bytes
    if promised > strictest * available:
        ratio = f"{promised / available:.2f}" if available else "infinity"
        raise NoSpace(
            f"volume group {group.name} would be over-committed {ratio} times, and {strictest:g} is the limit: disks could grow to "
            f"{format_size(promised)} in all, where {format_size(available)} can be had; add a physical volume (vgextend), make the disk "
            "smaller, or raise the limit (--max-overcommit, tag fvd.max_overcommit of the group)"
        )


def parse_limit(value: float | str | None) -> float | None:
    """A ratio above 0. Raises InvalidArgument."""
    if value is None:
        return None
    try:
        ratio = float(value)
    except ValueError:
        ratio = 0.0
    if not 0 < ratio < 1e6:
        raise InvalidArgument(f"{quoted(value)} is no over-commit ratio; write for example 1.5, and 1 for none at all")
    return ratio


def refuse_unusable(volume: LogicalVolume) -> None:
    """Raises Conflict for a layout that fvd does not drive."""
    if not volume.layout & {"linear", "striped"} or volume.layout - {"linear", "striped"} or volume.role - {"public"}:
        kinds = ", ".join(sorted(volume.layout | (volume.role - {"public"})))
        raise Conflict(f"{volume.full_name} is a logical volume of another kind ({kinds}); fvd uses linear and striped ones")
