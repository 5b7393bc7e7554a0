# SPDX-License-Identifier: Apache-2.0
"""The commands of lvm2 that fvd uses, each with explicit fields, units and configuration, retried where a failure is known to pass.

What came of a command is read from its exit status and from what is reported afterwards; a failure becomes a typed error that quotes lvm's
own line (`failures.py`). Knows volumes and groups by name; what lies in them is not its business. docs/lvm.md says why each setting is.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

from fvd.errors import DeviceError, FvdError, InvalidArgument, NotFound
from fvd.lvm import failures, members, runner
from fvd.lvm.extents import PHYSICAL_FIELDS, SEGMENT_FIELDS, Piece, parse_pieces
from fvd.lvm.failures import failure, passes
from fvd.lvm.report import (
    ACCESS_FIELDS,
    GROUP_FIELDS,
    VOLUME_FIELDS,
    LogicalVolume,
    VolumeGroup,
    parse_access,
    parse_groups,
    parse_volumes,
)
from fvd.lvm.runner import Finished

TIMEOUT_SECONDS = 60.0
TRIES = 3
RETRY_SECONDS = 0.5
SECTOR_BYTES = 512

_SETTINGS = {
    "devices": (
        "scan_lvs=0",
        'hints="none"',
        "obtain_device_list_from_udev=0",
        'external_device_info_source="none"',
        "ignore_suspended_devices=1",
    ),
    "activation": ("monitoring=0", "verify_udev_operations=1"),
    "global": ("wait_for_locks=1", "suffix=0"),
    "log": ("silent=0", "level=0", "verbose=0", "indent=1", 'prefix=""', "command_names=0", "report_command_log=0"),
    "report": (
        'output_format="basic"',
        "buffered=1",
        "compact_output=0",
        'compact_output_cols=""',
        "prefixes=0",
        "columns_as_rows=0",
        "quoted=1",
        "binary_values_as_numeric=0",
        'list_item_separator=","',
    ),
}
_NO_DEVICE = "/dev/null"  # a list that lvm finds nothing in; without a list it would read everything
_LOOKS = 3  # at a group, until all its devices are in the list
# The devices of each group, as its metadata had them at the last look. Of the process: each look at a group is a look for all.
_devices_of: dict[str, tuple[str, ...]] = {}
_REPORT = ("--reportformat", "json", "--units", "b", "--nosuffix")
# lvm tells them by --verbose when it does so itself; no field of a report has it.
_LOADED = re.compile(r"^\s*Loading table for \S+", re.MULTILINE)
_SUSPENDED = re.compile(r"^\s*Suspending \S+", re.MULTILINE)


class Lvm:
    """lvm2 on this machine. Stateless; safe from threads."""

    def __init__(self, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        self._timeout_seconds = timeout_seconds

    @staticmethod
    def forget() -> None:
        """What was learnt of groups and their devices is looked up anew."""
        _devices_of.clear()

    # --- What is there ---------------------------------------------------------------------------------------------------------------

    def volumes(self, *groups: str) -> list[LogicalVolume]:
        """The visible logical volumes of these groups (none named: of all). Raises NotFound, Unsupported, PermissionDenied, Timeout."""
        return self._volumes(groups, "")

    def find(self, group: str, name: str) -> LogicalVolume | None:
        """One volume; None: neither it nor perhaps its group exists. Waits while another command changes the group."""
        try:
            # Selected, not named: that it is absent is an answer then, not a failure.
            volumes = self._volumes([group], _named(name))
        except NotFound:
            return None
        return volumes[0] if volumes else None

    def _volumes(self, groups: Sequence[str], select: str) -> list[LogicalVolume]:
        volumes = parse_volumes(self._report("lvs", VOLUME_FIELDS, groups, select=select))
        learnt = [self._learns(group) for group in sorted({volume.group for volume in volumes if volume.group_state.partial})]
        if any(learnt):
            volumes = parse_volumes(self._report("lvs", VOLUME_FIELDS, groups, select=select))
        return volumes

    def groups(self, *groups: str) -> list[VolumeGroup]:
        """These groups (none named: all), each with all its devices, wherever they are by now. Raises NotFound."""
        for last in (*[False] * (_LOOKS - 1), True):
            try:
                reported = parse_groups(self._report("vgs", GROUP_FIELDS, groups))
            except NotFound:
                # Perhaps for it is not on the devices where it was.
                forgotten = [_devices_of.pop(group, ()) for group in groups]
                if last or not any(forgotten):
                    raise
                continue
            learnt = [_learned(group) for group in reported]
            if last or not groups or not any(learnt):
                break
        return [_with_duplicates(group) for group in reported]

    def _learns(self, group: str) -> bool:
        """Looks at a group some of whose devices were not in the list. Whether the list has changed."""
        before = _devices_of.get(group)
        self.groups(group)
        return _devices_of.get(group) != before

    def whole(self, name: str, seen: VolumeGroup | None = None) -> VolumeGroup:
        """A group of which every device is there, and in the list of the next command: without one, a command would make the group believe
        that the device is lost. `seen`: it was looked at just now. Raises NotFound, DeviceError."""
        group = seen or self.group(name)
        if group.missing:
            which = ", ".join(f"{each.uuid} (last seen as {each.device})" for each in group.missing)
            raise DeviceError(
                f"volume group {name} lacks physical volume {which}: nothing can be changed in it until it is back, or given up "
                f"(vgreduce --removemissing {name})"
            )
        return group

    def pieces(self, *groups: str) -> dict[str, list[Piece]]:
        """Where the linear volumes of these groups lie, by UUID."""
        segments = self._report("lvs", SEGMENT_FIELDS, groups, "--segments")
        return parse_pieces(segments, self._report("pvs", PHYSICAL_FIELDS, [], of=groups))

    def group(self, name: str) -> VolumeGroup:
        """One group. Raises NotFound."""
        try:
            return self.groups(name)[0]
        except (NotFound, IndexError):
            raise NotFound(f"there is no volume group {name}; vgs lists those there are") from None

    # --- What is done ----------------------------------------------------------------------------------------------------------------

    def create(self, group: str, name: str, size_bytes: int, tags: Iterable[str]) -> None:
        """A linear volume, active, tagged from its first moment, never activated by itself; known signatures in it are wiped before udev
        may look at them. Raises Conflict (it exists), NoSpace, NotFound."""
        self.whole(group)
        added = [word for tag in tags for word in ("--addtag", tag)]
        done = self._tried(
            ["lvcreate", "--yes", "--type", "linear", "--wipesignatures", "y", "--zero", "y", "--activate", "y"],
            ["--setautoactivation", "n", *added, "--size", _size(size_bytes), "--name", name, group],
            [group],
        )
        if done.exit_code:
            # That there is a volume of this name is no field that tells whose it is: a command that stopped half-way leaves one too.
            raise self._why(done, [group], size_bytes)

    def extend(self, group: str, name: str, size_bytes: int, devices: Sequence[str] = (), *, whole: VolumeGroup | None = None) -> bool:
        """The volume has at least `size_bytes` afterwards, in whole extents. False: its device may be something else all the same.

        So it is where the metadata had the size before, and where lvm does not say that it loaded a table of its own: over one that a dead
        command has left libdm loads none, and puts that one to use. One command, never repeated here.
        `devices`: from these alone. `whole`: the group as it was looked at just now; None: it is looked at.
        Raises NoSpace, NotFound, Unfinished, DeviceError (killed)...
        """
        words = ["lvextend", "--verbose", "--size", _size(size_bytes), f"{group}/{name}", *devices]
        if whole is None:
            self.whole(group)
        done = self._once(words, {"activation": ("udev_sync=0",)}, [group])
        if done.exit_code == 0:
            return bool(_LOADED.search(done.stderr) and _SUSPENDED.search(done.stderr))
        if done.killed or done.crashed:
            raise failure(done)
        state = self._look(group, name)
        if isinstance(state, LogicalVolume) and state.size_bytes >= size_bytes:
            return False  # so it was before, or the command failed after it had committed
        wanted_bytes = size_bytes - state.size_bytes if isinstance(state, LogicalVolume) else 0
        raise self._why(done, [group], wanted_bytes, missing=state is None)

    def activate(self, volume: LogicalVolume) -> None:
        """Its device is there afterwards, for this host only. Fine if it is active."""
        self._change(volume, "--activate", "ey", "--yes")

    def deactivate(self, volume: LogicalVolume) -> None:
        """Its device is gone. Fine if it is, or the volume too. Raises InUse."""
        try:
            self._change(volume, "--activate", "n", "--yes")
        except NotFound:
            return

    def refresh(self, volume: LogicalVolume) -> None:
        """The device is what the metadata says, and resumed."""
        self._change(volume, "--refresh")

    def retag(self, volume: LogicalVolume, *, remove: Iterable[str] = (), add: Iterable[str] = ()) -> None:
        """Exchanges tags in one commit. Others stay."""
        words = [word for tag in remove for word in ("--deltag", tag)] + [word for tag in add for word in ("--addtag", tag)]
        self.whole(volume.group)
        self._change(volume, *words)

    def stay_inactive(self, volume: LogicalVolume) -> None:
        """It is not activated by the host at its start."""
        self.whole(volume.group)
        self._change(volume, "--setautoactivation", "n")

    def _change(self, volume: LogicalVolume, *words: str) -> None:
        """Of this volume, whatever has its name by now: where that is another, nothing happens."""
        self._on(volume, ["lvchange", *words], f"lv_uuid={volume.uuid}")

    def remove(self, volume: LogicalVolume, tag: str) -> None:
        """Gives its extents back to the group, if it still is the volume that was looked at, and has this tag: what somebody has finished
        meanwhile stays. Absent is fine. Raises InUse."""
        try:
            self.whole(volume.group)
            self._on(volume, ["lvremove", "--yes"], f"lv_uuid={volume.uuid} && lv_tags={{{tag}}}")
        except NotFound:
            return

    def _on(self, volume: LogicalVolume, words: list[str], select: str) -> None:
        done = self._tried(words, ["--select", select, volume.full_name], [volume.group])
        if done.exit_code == 0:
            return
        state = self._look(volume.group, volume.name)
        gives_up = words[0] == "lvremove" or words[1:3] == ["--activate", "n"]
        if gives_up and isinstance(state, LogicalVolume) and state.open and not done.killed:
            raise failure(done, failures.IN_USE)
        raise self._why(done, [volume.group], missing=state is None)

    def drop_loaded_table(self, device_name: str) -> None:
        """The device keeps the table it has: one that was loaded and not yet used is forgotten. Its extents may be another's."""
        _raise_for(runner.run_command(["dmsetup", "clear", "--noudevsync", device_name], self._timeout_seconds))

    def resume(self, device_name: str) -> None:
        """A suspended device goes on."""
        _raise_for(runner.run_command(["dmsetup", "resume", "--noudevsync", device_name], self._timeout_seconds))

    # --- Running ---------------------------------------------------------------------------------------------------------------------

    def _report(
        self, command: str, fields: str, what: Sequence[str], *words: str, select: str = "", of: Sequence[str] | None = None
    ) -> str:
        """What a reporting command prints. `of`: the groups whose devices it reads, where they are not what is named."""
        done = self._tried(_reporting(command, fields, *words, select=select), list(what), what if of is None else of)
        if done.exit_code:
            raise self._why(done, what)
        return done.stdout

    def _look(self, group: str, name: str) -> LogicalVolume | FvdError | None:
        """After a failure, of which this must not hide the reason. None: it is not there; an error: lvm does not say."""
        try:
            done = self._once([*_reporting("lvs", VOLUME_FIELDS, select=_named(name)), group], {}, [group])
            volumes = parse_volumes(done.stdout)
        except FvdError as error:
            return error
        return failure(done) if done.exit_code else volumes[0] if volumes else None

    def _why(self, done: Finished, groups: Sequence[str], wanted_bytes: int = 0, *, missing: bool = False) -> FvdError:
        """The error of a failed command on these groups: by what is reported of them where that tells it, otherwise by its words.

        `missing`: the volume that it was for is not there.
        """
        if done.killed or done.crashed or not groups:
            return failure(done)
        select = " || ".join(f'vg_name="{group}"' for group in groups)
        try:
            # A group of another host, or one with a lock manager, is hidden from an ordinary look.
            seen = self._once(_reporting("vgs", ACCESS_FIELDS, "--foreign", "--shared", select=select), {}, groups)
            ours = seen
            if any(group.system_id for group in parse_access(seen.stdout).values()):
                ours = self._once(_reporting("vgs", ACCESS_FIELDS, select=select), {}, groups)
            there, here = parse_access(seen.stdout), parse_access(ours.stdout)
        except FvdError:
            return failure(done)
        if seen.exit_code or ours.exit_code:
            return failure(done)
        meaning = None
        if set(groups) - there.keys():
            meaning = failures.NOT_FOUND
        elif any(group.shared for group in there.values()):
            meaning = failures.SHARED
        elif there.keys() - here.keys():
            meaning = failures.ELSEWHERE
        elif missing:
            meaning = failures.NOT_FOUND
        elif wanted_bytes > sum(group.free_bytes for group in here.values()):
            meaning = failures.NO_SPACE
        return failure(done, meaning)

    def _tried(self, words: list[str], what: list[str], groups: Sequence[str]) -> Finished:
        """Again where it is worth it: everything here is fine to be done twice."""
        for last in (*[False] * (TRIES - 1), True):
            done = self._once([*words, *what], {}, groups)
            if last or not passes(done):
                break
            time.sleep(RETRY_SECONDS)
        return done

    def _once(self, words: list[str], settings: dict[str, tuple[str, ...]], groups: Sequence[str]) -> Finished:
        config = " ".join(f"{section}{{{' '.join((*values, *settings.get(section, ())))}}}" for section, values in _SETTINGS.items())
        devices = _devices(groups)
        only = ["--devices", ",".join(devices)] if devices else []
        return runner.run_command([words[0], "--config", config, *only, *words[1:]], self._timeout_seconds)


def _devices(groups: Sequence[str]) -> list[str]:
    """What a command on these groups (none: on all) has to read; none: nobody knows, so it reads what there is."""
    there = members.labelled()
    if there is None:
        return []
    known = [_devices_of.get(group) or tuple(members.in_use(group).values()) for group in groups]
    if groups and all(known):
        return sorted({device for devices in known for device in devices})
    return [each.path for each in there] or [_NO_DEVICE]


def _learned(group: VolumeGroup) -> bool:
    """Notes the devices of a group that was looked at. Whether there are more to be looked at: of a physical volume that no device of the
    list had. All that say that they are it, unless the kernel uses one: lvm itself is to refuse what is not clear."""
    there = {each.device for each in group.physical if not each.missing}
    known = members.labelled()
    if known is None:
        return False
    lacking = {each.uuid for each in group.missing}
    used = members.in_use(group.name)
    unclear = {each.uuid for each in group.physical if each.number not in used} | lacking
    devices = tuple(sorted(there | {each.path for each in known if each.uuid in unclear}))
    before, _devices_of[group.name] = _devices_of.get(group.name), devices
    return before != devices and bool(set(devices) - there)


def _with_duplicates(group: VolumeGroup) -> VolumeGroup:
    """lvm reports the device that it prefers as if it were the only one, and changes nothing in the group all the same."""
    listed = set(_devices_of.get(group.name, ()))
    uuids = [each.uuid for each in members.labelled() or [] if each.path in listed]
    physical = tuple(replace(each, duplicate=each.duplicate or uuids.count(each.uuid) > 1) for each in group.physical)
    return replace(group, physical=physical)


def _reporting(command: str, fields: str, *words: str, select: str = "") -> list[str]:
    selected = ["--select", select] if select else []
    return [command, *words, *_REPORT, *selected, "--options", fields]


def _named(name: str) -> str:
    return f'lv_name="{name}"'


def _size(size_bytes: int) -> str:
    """lvm takes whole sectors, and rounds up to extents itself."""
    if size_bytes <= 0 or size_bytes % SECTOR_BYTES:
        raise InvalidArgument(f"{size_bytes} bytes are no size of a logical volume: whole sectors of {SECTOR_BYTES} bytes, at least one")
    return f"{size_bytes}b"


def _raise_for(done: Finished) -> None:
    """The typed error of a command that failed; nothing for one that did not."""
    if done.exit_code != 0:
        raise failure(done)
