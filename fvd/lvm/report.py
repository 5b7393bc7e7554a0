# SPDX-License-Identifier: Apache-2.0
"""What lvm2 reports, as types: its JSON in, logical volumes and groups out. Pure: runs nothing, asks nothing.

Only the fields named here are ever asked for, so a newer lvm2 changes nothing. Sizes are bytes (`--units b --nosuffix`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fvd.errors import Unsupported, quoted

VOLUME_FIELDS = (
    "vg_name,lv_name,lv_uuid,lv_size,lv_tags,lv_layout,lv_role,lv_active,lv_active_remotely,lv_suspended,lv_inactive_table,lv_permissions,"
    "lv_kernel_major,lv_kernel_minor,lv_device_open,lv_health_status,vg_extent_size,vg_permissions,vg_exported,vg_partial,vg_clustered,"
    "vg_shared"
)
# A row for each physical volume.
GROUP_FIELDS = (
    "vg_name,vg_uuid,vg_size,vg_free,vg_extent_size,vg_tags,vg_permissions,vg_exported,vg_partial,vg_clustered,vg_shared,"
    "pv_name,pv_uuid,pv_free,pv_allocatable,pv_missing,pv_duplicate,pv_major,pv_minor"
)
# Of groups that may not be ours to use, too.
ACCESS_FIELDS = "vg_name,vg_systemid,vg_free,vg_clustered,vg_shared"


@dataclass(frozen=True)
class GroupState:
    """What may keep a whole group from being used."""

    writable: bool
    exported: bool
    partial: bool  # physical volumes are missing
    shared: bool  # clustered, or with a lock manager


@dataclass(frozen=True)
class LogicalVolume:
    """One logical volume, as its group's metadata and the kernel have it."""

    group: str
    name: str
    uuid: str
    size_bytes: int  # committed; the device may be smaller until it is refreshed
    tags: frozenset[str]
    layout: frozenset[str]  # {"linear"}, {"striped"}, {"thin", "sparse"}...
    role: frozenset[str]
    active: bool
    active_elsewhere: bool
    open: bool  # by anybody: a process, a mapping above it
    suspended: bool
    inactive_table: bool  # one is loaded and not in use
    writable: bool
    device_number: tuple[int, int] | None  # major and minor; None: not active
    health: str  # "" is good
    extent_bytes: int  # of its group
    group_state: GroupState

    @property
    def full_name(self) -> str:
        return f"{self.group}/{self.name}"


@dataclass(frozen=True)
class PhysicalVolume:
    """A device of a group."""

    device: str  # a path; of a missing one lvm's word for it
    uuid: str
    free_bytes: int
    allocatable: bool  # an administrator may have forbidden it (pvchange -xn)
    missing: bool
    duplicate: bool  # another device says that it is the same
    number: tuple[int, int]  # major and minor; of a missing one nothing


@dataclass(frozen=True)
class VolumeGroup:
    """One volume group."""

    name: str
    uuid: str
    size_bytes: int
    free_bytes: int  # that no volume has; what can be had of it is less, perhaps: `obtainable_bytes`
    extent_bytes: int
    tags: frozenset[str]
    state: GroupState
    physical: tuple[PhysicalVolume, ...]

    @property
    def missing(self) -> list[PhysicalVolume]:
        """Those without which lvm changes nothing in the group that takes or gives extents."""
        return [each for each in self.physical if each.missing]

    def usable(self) -> list[PhysicalVolume]:
        """Those that extents can be had of."""
        if self.missing or any(each.duplicate for each in self.physical):
            return []
        return [each for each in self.physical if each.allocatable]

    def obtainable_bytes(self, stripes: int = 1, among: Sequence[PhysicalVolume] | None = None) -> int:
        """What a volume of so many stripes can get: each takes as much, from a device of its own. `among`: of these devices."""
        extents = [each.free_bytes // self.extent_bytes for each in (self.usable() if among is None else among)]
        if stripes <= 1:
            return sum(extents) * self.extent_bytes
        low, high = 0, sum(extents) // stripes
        while low < high:
            each = (low + high + 1) // 2
            if sum(min(have, each) for have in extents) >= stripes * each:
                low = each
            else:
                high = each - 1
        return low * stripes * self.extent_bytes


@dataclass(frozen=True)
class Access:
    """What may keep a group from this host."""

    system_id: str  # of the host that has it; "": anybody's
    free_bytes: int
    shared: bool


def parse_volumes(answer: str) -> list[LogicalVolume]:
    """The rows of `lvs -o VOLUME_FIELDS`. Raises Unsupported for an answer in another form."""
    return [_checked(_volume, row) for row in _rows(answer, "lv")]


def parse_groups(answer: str) -> list[VolumeGroup]:
    """The rows of `vgs -o GROUP_FIELDS`. Raises Unsupported."""
    by_uuid: dict[str, VolumeGroup] = {}
    for row in _rows(answer, "vg"):
        group = _checked(_group, row)
        before = by_uuid.get(group.uuid)
        by_uuid[group.uuid] = group if before is None else replace(group, physical=(*before.physical, *group.physical))
    return list(by_uuid.values())


def parse_access(answer: str) -> dict[str, Access]:
    """The rows of `vgs -o ACCESS_FIELDS`, by group. Raises Unsupported."""
    return dict(_checked(_access, row) for row in _rows(answer, "vg"))


def _rows(answer: str, kind: str) -> Iterator[dict[str, Any]]:
    try:
        for part in json.loads(answer)["report"]:
            yield from part.get(kind, [])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unsupported(f"lvm2 answered in a form that fvd does not know ({error}); lvm2 2.03.12 or later is needed") from error


def _checked(parse: Any, row: dict[str, Any]) -> Any:
    try:
        return parse(row)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise Unsupported(f"lvm2 reports a field in a form unknown to fvd ({quoted(error)}); lvm2 2.03.12 or later is needed") from error


def _volume(row: dict[str, Any]) -> LogicalVolume:
    major, minor = int(row["lv_kernel_major"]), int(row["lv_kernel_minor"])
    return LogicalVolume(
        group=row["vg_name"],
        name=row["lv_name"],
        uuid=row["lv_uuid"],
        size_bytes=int(row["lv_size"]),
        tags=_set(row["lv_tags"]),
        layout=_set(row["lv_layout"]),
        role=_set(row["lv_role"]),
        active=bool(row["lv_active"]),
        active_elsewhere=row["lv_active_remotely"] in ("1", "active remotely", "remotely active"),
        open=row["lv_device_open"] in ("1", "open"),
        suspended=row["lv_suspended"] in ("1", "suspended"),
        inactive_table=row["lv_inactive_table"] in ("1", "inactive table present"),
        writable=not row["lv_permissions"].startswith("read-only"),  # "unknown" while it is not active
        device_number=None if major < 0 or minor < 0 else (major, minor),
        health=row["lv_health_status"],
        extent_bytes=int(row["vg_extent_size"]),
        group_state=_group_state(row),
    )


def _group(row: dict[str, Any]) -> VolumeGroup:
    return VolumeGroup(
        name=row["vg_name"],
        uuid=row["vg_uuid"],
        size_bytes=int(row["vg_size"]),
        free_bytes=int(row["vg_free"]),
        extent_bytes=int(row["vg_extent_size"]),
        tags=_set(row["vg_tags"]),
        state=_group_state(row),
        physical=(
            PhysicalVolume(
                device=row["pv_name"],
                uuid=row["pv_uuid"],
                free_bytes=int(row["pv_free"]),
                allocatable=row["pv_allocatable"] in ("1", "allocatable"),
                missing=row["pv_missing"] in ("1", "missing"),
                duplicate=row["pv_duplicate"] in ("1", "duplicate"),
                number=(int(row["pv_major"]), int(row["pv_minor"])),
            ),
        ),
    )


def _access(row: dict[str, Any]) -> tuple[str, Access]:
    return row["vg_name"], Access(row["vg_systemid"], int(row["vg_free"]), _shared(row))


def _shared(row: dict[str, Any]) -> bool:
    return bool(row["vg_shared"] in ("1", "shared") or row["vg_clustered"] in ("1", "clustered"))


def _group_state(row: dict[str, Any]) -> GroupState:
    return GroupState(
        writable=row["vg_permissions"] == "writeable",
        exported=row["vg_exported"] in ("1", "exported"),
        partial=row["vg_partial"] in ("1", "partial"),
        shared=_shared(row),
    )


def _set(text: str) -> frozenset[str]:
    return frozenset(filter(None, text.split(",")))
