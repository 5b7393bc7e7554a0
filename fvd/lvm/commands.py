"""The commands of lvm2 that fvd uses, each with explicit fields, units and configuration, retried where a failure is known to pass.

Failures become typed errors that quote lvm's own line. Knows volumes and groups by name; what lies in them is not its business.
docs/lvm.md says why each setting is there.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence

from fvd.errors import Conflict, DeviceError, FvdError, InUse, InvalidArgument, NoSpace, NotFound, PermissionDenied, Unsupported
from fvd.lvm import runner
from fvd.lvm.extents import PHYSICAL_FIELDS, SEGMENT_FIELDS, Piece, parse_pieces
from fvd.lvm.report import GROUP_FIELDS, VOLUME_FIELDS, LogicalVolume, VolumeGroup, parse_groups, parse_volumes
from fvd.lvm.runner import Finished, last_line

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
    "log": ("silent=0", "level=0", "indent=0", 'prefix=""', "command_names=0"),
    "report": ("compact_output=0", "prefixes=0", "quoted=1", "binary_values_as_numeric=0", 'list_item_separator=","'),
}
_REPORT = ("--reportformat", "json", "--units", "b", "--nosuffix")
# What lvm says when there is no more room, in the versions from 2.02 to 2.03.
_NO_SPACE = re.compile(r"insufficient (free space|suitable|allocatable)|free extents|not enough free|no free extents", re.IGNORECASE)
_NOT_FOUND = re.compile(
    r"failed to find logical volume|volume group \"?\S*\"? not found|not found in volume group|one or more specified logical", re.IGNORECASE
)
_IN_USE = re.compile(
    r"\bin use\b|is used by another device|contains a filesystem in use|can't open|held open|device or resource busy", re.IGNORECASE
)
_ELSEWHERE = re.compile(r"cannot access VG \S+ with system ID|locked by another host|LV locked by other host", re.IGNORECASE)
_SHARED = re.compile(r"lock manager|lvmlockd|clustered volume group|skipping clustered", re.IGNORECASE)
_NO_DM = re.compile(
    r"device-mapper driver missing|failure to communicate with kernel device-mapper|/dev/mapper/control: open failed", re.IGNORECASE
)
_NO_RIGHTS = re.compile(r"permission denied|operation not permitted|must be root|requires root", re.IGNORECASE)
_EXISTS = re.compile(r"already exists in volume group", re.IGNORECASE)
_LOADED = re.compile(r"^\s*Loading table for \S+", re.MULTILINE)
_SUSPENDED = re.compile(r"^\s*Suspending \S+", re.MULTILINE)
# What --verbose tells on the way; the reason of a failure is another line.
_CHATTER = re.compile(
    r"^\s*(Reloading config|Logging initiali|Archiving|Creating|Extending logical|Loading table|Suspending|Resuming|Ignoring|log/|WARNING:)"
    r".*$",
    re.MULTILINE,
)
_NO_CHANGE = re.compile(r"matches existing size|not larger than existing size", re.IGNORECASE)
# They pass by themselves: somebody scans the device, or has the lock file in hand.
_PASSES = re.compile(
    r"resource temporarily unavailable|can't get lock|failed to lock|read locks? failed|device or resource busy", re.IGNORECASE
)


class Lvm:
    """lvm2 on this machine. Stateless; safe from threads."""

    def __init__(self, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        self._timeout_seconds = timeout_seconds

    # --- What is there ---------------------------------------------------------------------------------------------------------------

    def volumes(self, *groups: str) -> list[LogicalVolume]:
        """The visible logical volumes of these groups (none named: of all). Raises NotFound, Unsupported, PermissionDenied, Timeout."""
        return parse_volumes(self._report("lvs", VOLUME_FIELDS, groups).stdout)

    def find(self, group: str, name: str) -> LogicalVolume | None:
        """One volume; None: neither it nor perhaps its group exists. Waits while another command changes the group."""
        try:
            found = parse_volumes(self._report("lvs", VOLUME_FIELDS, [f"{group}/{name}"]).stdout)
        except NotFound:
            return None
        return found[0] if found else None

    def groups(self, *groups: str) -> list[VolumeGroup]:
        """These groups (none named: all). Raises NotFound."""
        return parse_groups(self._report("vgs", GROUP_FIELDS, groups).stdout)

    def pieces(self, *groups: str) -> dict[str, list[Piece]]:
        """Where the linear volumes of these groups lie, by UUID."""
        segments = self._run(["lvs", "--segments", *_REPORT, "--options", SEGMENT_FIELDS], list(groups))
        physical = self._run(["pvs", *_REPORT, "--options", PHYSICAL_FIELDS], [])
        return parse_pieces(segments.stdout, physical.stdout)

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
        added = [word for tag in tags for word in ("--addtag", tag)]
        self._run(
            ["lvcreate", "--yes", "--type", "linear", "--wipesignatures", "y", "--zero", "y", "--activate", "y"],
            ["--setautoactivation", "n", *added, "--size", _size(size_bytes), "--name", name, group],
        )

    def extend(self, group: str, name: str, size_bytes: int) -> bool:
        """The volume has at least `size_bytes` afterwards, in whole extents. False: its device may be something else all the same.

        So it is where the metadata had the size before, and where lvm does not say that it loaded a table of its own: over one that a dead
        command has left libdm loads none, and puts that one to use. One command, never repeated here.
        Raises NoSpace, NotFound, Unfinished, DeviceError (killed)...
        """
        words = ["lvextend", "--verbose", "--size", _size(size_bytes), f"{group}/{name}"]
        done = self._once(words, {"activation": ("udev_sync=0",)})
        if done.exit_code and _NO_CHANGE.search(done.stderr + done.stdout):
            return False
        _raise_for(done)
        return bool(_LOADED.search(done.stderr) and _SUSPENDED.search(done.stderr))

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
        self._change(volume, *words)

    def stay_inactive(self, volume: LogicalVolume) -> None:
        """It is not activated by the host at its start."""
        self._change(volume, "--setautoactivation", "n")

    def _change(self, volume: LogicalVolume, *words: str) -> None:
        """Of this volume, whatever has its name by now: where that is another, nothing happens."""
        self._run(["lvchange", *words], ["--select", f"lv_uuid={volume.uuid}", volume.full_name])

    def remove(self, volume: LogicalVolume, tag: str) -> None:
        """Gives its extents back to the group, if it still is the volume that was looked at, and has this tag: what somebody has finished
        meanwhile stays. Absent is fine. Raises InUse."""
        try:
            self._run(["lvremove", "--yes", "--select", f"lv_uuid={volume.uuid} && lv_tags={{{tag}}}"], [volume.full_name])
        except NotFound:
            return

    def drop_loaded_table(self, device_name: str) -> None:
        """The device keeps the table it has: one that was loaded and not yet used is forgotten. Its extents may be another's."""
        _raise_for(runner.run_command(["dmsetup", "clear", "--noudevsync", device_name], self._timeout_seconds))

    def resume(self, device_name: str) -> None:
        """A suspended device goes on."""
        _raise_for(runner.run_command(["dmsetup", "resume", "--noudevsync", device_name], self._timeout_seconds))

    # --- Running ---------------------------------------------------------------------------------------------------------------------

    def _report(self, command: str, fields: str, what: Sequence[str]) -> Finished:
        return self._run([command, *_REPORT, "--options", fields], list(what))

    def _run(self, words: list[str], what: list[str]) -> Finished:
        """Again where it is worth it: everything here is fine to be done twice."""
        for last in (*[False] * (TRIES - 1), True):
            done = self._once([*words, *what], {})
            passes = done.crashed or (done.exit_code != 0 and _PASSES.search(done.stderr))
            if last or not passes:
                break
            time.sleep(RETRY_SECONDS)
        _raise_for(done)
        return done

    def _once(self, words: list[str], settings: dict[str, tuple[str, ...]]) -> Finished:
        config = " ".join(f"{section}{{{' '.join((*values, *settings.get(section, ())))}}}" for section, values in _SETTINGS.items())
        return runner.run_command([words[0], "--config", config, *words[1:]], self._timeout_seconds)


def _size(size_bytes: int) -> str:
    """lvm takes whole sectors, and rounds up to extents itself."""
    if size_bytes <= 0 or size_bytes % SECTOR_BYTES:
        raise InvalidArgument(f"{size_bytes} bytes are no size of a logical volume: whole sectors of {SECTOR_BYTES} bytes, at least one")
    return f"{size_bytes}b"


def _raise_for(done: Finished) -> None:
    """The typed error of a command that failed; nothing for one that did not."""
    if done.exit_code == 0:
        return
    said = last_line(_CHATTER.sub("", done.stderr)) or last_line(done.stdout) or f"exit status {done.exit_code}"
    program = done.words[0]
    if done.killed:
        raise DeviceError(f"{program} was killed by signal {-done.exit_code}")
    for pattern, kind, advice in _MEANINGS:
        for line in done.stderr.splitlines():
            if line.lstrip().startswith("WARNING:"):
                continue  # true, perhaps, and not why it failed
            if pattern.search(line):
                raise kind(f"{program}: {line.strip()}{advice}")
    raise DeviceError(f"{program} failed: {said}")


_MEANINGS: tuple[tuple[re.Pattern[str], type[FvdError], str], ...] = (
    (_NO_DM, Unsupported, "; this kernel has no device-mapper, so no logical volume can be used here (modprobe dm-mod)"),
    (_ELSEWHERE, InUse, "; the group belongs to another host"),
    (_SHARED, Unsupported, "; shared and clustered groups are not supported yet"),
    (_NO_SPACE, NoSpace, "; add a physical volume to the group (vgextend), or remove something"),
    (_EXISTS, Conflict, ""),
    (_NOT_FOUND, NotFound, ""),
    (_NO_RIGHTS, PermissionDenied, "; logical volumes need root"),
    (_IN_USE, InUse, ""),
)
