# SPDX-License-Identifier: Apache-2.0
"""Which disks are there: served ones by their control sockets, closed ones in the folders and volume groups that one names."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fvd._lifetime import whole
from fvd.api.types import Group, Info, Listed, info_from_json
from fvd.api.verbs import closed_info
from fvd.errors import FvdError, InvalidArgument, NotFound, PermissionDenied, Timeout, Unsupported

if TYPE_CHECKING:
    from fvd.lvm.extents import Piece
    from fvd.lvm.report import LogicalVolume, VolumeGroup
    from fvd.volume.name import VolumeName

# Someone who does not answer is left out rather than waited for.
ANSWER_TIMEOUT_SECONDS = 5.0
LISTING_SECONDS = 12.0  # for all of them: one connection that is not taken, and one answer that does not come, after each other
ASKED_AT_ONCE = 64


@dataclass(frozen=True)
class Listing:
    """Disks, and the volume groups that were looked at."""

    volumes: list[Listed]
    groups: list[Group]


def list_volumes(*places: str) -> list[Listed]:
    """The disks that are served (those of this user; root's list has everyone's), then the others in each place.

    A place is a volume group (``"vg0"``) or a folder (``"/srv"``), which is not searched below. Nothing is activated. What is no fvd disk
    is left out, damaged disks are not. Raises NotFound (no such folder or group), PermissionDenied.
    """
    return look_around(*places).volumes


def list_groups(*groups: str) -> list[Group]:
    """Volume groups with what their disks take and have been promised; none named: all that there are. Raises as ``list_volumes``."""
    return _look_at_groups(groups, served={})[1]


def look_around(*places: str, every_group: bool = False) -> Listing:
    """Both at once. ``every_group``: all volume groups too, where there is LVM and one may ask it."""
    served = _served()
    all_listed = list(served)
    groups: list[Group] = []
    named = _named_groups(places)
    if named or every_group:
        try:
            volumes, groups = _look_at_groups(() if every_group else named, {listed.volume: listed for listed in served})
        except (Unsupported, PermissionDenied):
            if named:
                raise
            volumes = []
        # A served logical volume gets what only its group knows.
        known = {listed.volume: listed for listed in volumes}
        all_listed = [known.pop(listed.volume, listed) for listed in all_listed] + list(known.values())
    seen = {listed.volume for listed in all_listed}
    for folder in places:
        if folder in named:
            continue
        for name in whole(partial(_candidates, folder)):
            if str(name) not in seen:
                seen.add(str(name))
                listed = _look(name)
                if listed is not None:
                    all_listed.append(listed)
    return Listing(all_listed, groups)


def _named_groups(places: tuple[str, ...]) -> list[str]:
    """A bare word is a volume group; where none has that name, a folder. Raises what kept LVM from answering if there is none either."""
    from fvd.lvm.commands import Lvm
    from fvd.volume.name import is_group_name

    words = [place for place in places if is_group_name(place)]
    if not words:
        return []
    try:
        there = {group.name for group in Lvm().groups()}
    except FvdError:
        if not all(Path(word).is_dir() for word in words):
            raise
        there = set()
    for word in words:
        if word not in there and not Path(word).exists():
            raise NotFound(f"{word} is neither a volume group nor a folder; vgs lists the groups")
    return [word for word in words if word in there]


# --- Served ones -----------------------------------------------------------------------------------------------------------------


def _served() -> list[Listed]:
    """All asked at once, so that those who do not answer take the time of one."""
    from fvd.control.paths import all_sockets

    paths = all_sockets()
    answered: dict[Path, Listed | None] = {}

    def ask(mine: list[Path]) -> None:
        for path in mine:
            answered[path] = _ask(path)

    deadline = time.monotonic() + LISTING_SECONDS
    lanes = [paths[at::ASKED_AT_ONCE] for at in range(min(ASKED_AT_ONCE, len(paths)))]
    # Daemons: whoever answers drop by drop keeps a thread until its time is over, and nobody waits for it.
    threads = [threading.Thread(target=ask, args=(lane,), name="fvd-list", daemon=True) for lane in lanes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    answers = dict(answered)
    late = [_unasked(path, Timeout(f"{path}: not asked within {LISTING_SECONDS:g} seconds")) for path in paths if path not in answers]
    return sorted([listed for listed in answers.values() if listed is not None] + late, key=lambda listed: listed.volume)


def _ask(path: Path) -> Listed | None:
    """What the server at a socket says of its disk; None: it has died, and the next one replaces it."""
    from fvd.control.client import ControlClient
    from fvd.control.protocol import ServerGone
    from fvd.control.trust import is_believed_about

    uid = -1
    try:
        with ControlClient(path, timeout_seconds=ANSWER_TIMEOUT_SECONDS) as client:
            uid = client.peer_uid
            served = info_from_json(client.ask("info"))
        if not is_believed_about(uid, served.volume, path.name):
            raise PermissionDenied(f"{path}: user {uid} listens there and speaks of a volume that is not his")
    except ServerGone:
        return None
    except FvdError as error:
        return _unasked(path, error, uid)
    return Listed(served.volume, "served", served)


def _unasked(path: Path, error: FvdError, uid: int = -1) -> Listed:
    """By the name that the server has noted, unless that is another user's claim."""
    from fvd.control.paths import noted_volume
    from fvd.control.trust import is_believed_about

    if uid < 0:  # nobody took the connection
        with contextlib.suppress(OSError):
            uid = path.lstat().st_uid
    volume = noted_volume(path)
    if volume is None or not is_believed_about(uid, volume, path.name):
        volume = f"(control socket {path})"
    return Listed(volume, error.kind, None, str(error))


# --- Volume groups ---------------------------------------------------------------------------------------------------------------


def _look_at_groups(groups: tuple[str, ...] | list[str], served: dict[str, Listed]) -> tuple[list[Listed], list[Group]]:
    from fvd.lvm.commands import Lvm
    from fvd.volume.tags import is_ours

    lvm = Lvm()
    there = lvm.groups(*groups)
    ours = [volume for volume in lvm.volumes(*groups) if is_ours(volume)]
    # Where inactive ones lie is asked only if there are any.
    pieces = lvm.pieces(*groups) if any(not volume.active for volume in ours) else {}
    extent_bytes = {group.name: group.extent_bytes for group in there}
    served = served or {listed.volume: listed for listed in _served()}
    volumes = []
    for volume in sorted(ours, key=lambda volume: (volume.group, volume.name)):
        listed = served.get(volume.full_name) or whole(partial(_look_at_volume, volume, pieces))
        volumes.append(_with_facts(listed, volume, extent_bytes[volume.group]))
    return volumes, [_group(group, ours, volumes) for group in sorted(there, key=lambda group: group.name)]


def _look_at_volume(volume: LogicalVolume, pieces: dict[str, list[Piece]]) -> Listed:
    from fvd.disk.view import view_of
    from fvd.storage.inactive_lv import OfflineVolume
    from fvd.volume.name import parse_name
    from fvd.volume.tags import is_disk

    if not is_disk(volume):
        return Listed(volume.full_name, "unfinished", None, "its provision was interrupted; run it again, or fvd-lv remove")
    name = parse_name(volume.full_name)
    try:
        if not volume.active:
            if volume.uuid not in pieces:
                return Listed(volume.full_name, "closed", None, "it is not linear, so it is read only when it is active")
            with OfflineVolume(name.path, pieces[volume.uuid]) as node:
                return Listed(volume.full_name, "closed", closed_info(view_of(name, node)))
        return _look(name) or Listed(volume.full_name, "not_found", None, "it holds no disk: removed half-way; fvd-lv remove ends that")
    except FvdError as error:
        return Listed(volume.full_name, error.kind, None, str(error))


def _with_facts(listed: Listed, volume: LogicalVolume, extent_bytes: int) -> Listed:
    from fvd.storage.overcommit import greatest_bytes
    from fvd.volume.tags import facts_of

    facts = facts_of(volume)
    return replace(
        listed,
        group=volume.group,
        storage_size=volume.size_bytes,
        virtual_size=listed.info.virtual_size if listed.info else None if facts is None else facts.virtual_size_bytes,
        greatest_size=greatest_bytes(volume, extent_bytes),
    )


def _group(group: VolumeGroup, ours: list[LogicalVolume], volumes: list[Listed]) -> Group:
    from fvd.storage.overcommit import commitment
    from fvd.volume.tags import facts_of

    promised = commitment(group, ours)
    infos = [listed.info for listed in volumes if listed.group == group.name]
    return Group(
        group=promised.group,
        size=promised.size_bytes,
        free_bytes=promised.free_bytes,
        disks=promised.disks,
        storage_bytes=promised.storage_bytes,
        mapped_bytes=sum(info.mapped_bytes for info in infos if info),
        unread_disks=sum(info is None for info in infos),
        virtual_bytes=promised.virtual_bytes,
        greatest_bytes=promised.most_bytes,
        available_bytes=promised.available_bytes,
        overcommit=promised.ratio,
        max_overcommit=promised.limit,
        largest_step_bytes=max(
            (facts.grow_step_bytes for volume in ours if volume.group == group.name and (facts := facts_of(volume))), default=0
        ),
        unusable_bytes=group.free_bytes - group.obtainable_bytes(),
    )


# --- Folders ---------------------------------------------------------------------------------------------------------------------


def _candidates(folder: str) -> list[VolumeName]:
    """The files and block devices of a folder that begin like an fvd disk, in order."""
    from fvd.device.node import open_node
    from fvd.volume.name import VolumeKind, VolumeName
    from fvd.volume.superblocks import has_magic

    path = Path(folder)
    try:
        entries = sorted(entry for entry in path.iterdir() if entry.is_file() or entry.is_block_device())
    except FileNotFoundError:
        raise NotFound(f"{folder} does not exist; name a folder") from None
    except NotADirectoryError:
        raise InvalidArgument(f"{folder} is no folder; fvd-lv info shows a single volume") from None
    except PermissionError:
        raise PermissionDenied(f"{folder} may not be read by you") from None
    names = []
    for entry in entries:
        try:
            with open_node(entry, read_only=True, direct=False) as node:
                if not has_magic(node):
                    continue
                kind = VolumeKind.DEVICE if node.is_block else VolumeKind.FILE
        except FvdError:
            continue  # not readable by this user, no medium...: not something to list
        names.append(VolumeName(kind, str(entry.absolute())))
    return names


def _look(name: VolumeName) -> Listed | None:
    from fvd.api.verbs import info

    try:
        known: Info = info(str(name))
        return Listed(str(name), "closed" if known.uri is None else "served", known)
    except NotFound:
        return None  # removed meanwhile
    except FvdError as error:
        return Listed(str(name), error.kind, None, str(error))
