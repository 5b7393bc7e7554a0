# SPDX-License-Identifier: Apache-2.0
"""A machine with LVM, simulated at the last call: `fvd.lvm.runner.run_command`. Its volumes are loop devices: what is written is real.

Extents are used again: a new volume begins with what the last one that was removed held. A command can be slow, fail, or be the last thing
that the process does (`Killed`); from then on nothing happens any more until `revive`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from loops import run

from fvd.errors import Unsupported
from fvd.lvm import dm, members, runner, sharing
from fvd.lvm.runner import Finished

MIB = 1 << 20
EXTENT = 4 * MIB


class Killed(BaseException):
    """The process has been killed."""


@dataclass
class Volume:
    uuid: str
    size: int
    tags: set[str]
    backing: Path
    device: str | None = None  # the loop device while it is active
    device_size: int = 0
    suspended: bool = False
    loaded: int = 0  # the size of a table that is loaded and not in use; 0: none
    layout: str = "linear"
    auto: bool = True

    @property
    def number(self) -> int:
        assert self.device is not None
        return os.stat(self.device).st_rdev  # noqa: PTH116


@dataclass
class Physical:
    """A device of a group, beside the first, which has what is left."""

    free: int
    allocatable: bool = True
    gone: bool = False  # nobody can find it
    uuid: str = ""  # empty: after the device


@dataclass
class Group:
    size: int
    volumes: dict[str, Volume] = field(default_factory=dict)
    tags: set[str] = field(default_factory=set)
    state: dict[str, str] = field(default_factory=dict)
    physical: dict[str, Physical] = field(default_factory=dict)  # by device
    harmed: list[list[str]] = field(default_factory=list)  # commands that changed it with a device missing

    @property
    def free(self) -> int:
        return self.size - sum(volume.size for volume in self.volumes.values())


class Machine:
    """Give its `run` to `runner.run_command`; `simulated_lvm` does."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self.folder = folder
        self.prefix = prefix
        self.groups: dict[str, Group] = {}
        self.commands: list[list[str]] = []
        self.listed: list[str] | None = None  # the devices that the command may read; None: all
        self.lists: list[list[str] | None] = []
        self.dead = False
        self.stale: Path | None = None  # what the last removed volume held
        self.before: Callable[[list[str]], None] = lambda words: None
        self.after: Callable[[list[str]], None] = lambda words: None
        self._count = 0
        self._made = 0
        self._lock = threading.RLock()

    def add_group(self, size: int, name: str = "vg0") -> str:
        """Its whole name: unique on this machine, for its folder in /dev is real."""
        name = f"{self.prefix}{name}"
        self.groups[name] = Group(size)
        return name

    def volume(self, full_name: str) -> Volume | None:
        group, _, name = full_name.partition("/")
        return self.groups[group].volumes.get(name)

    def active(self) -> list[Volume]:
        return [volume for group in self.groups.values() for volume in group.volumes.values() if volume.device is not None]

    def kill_at(self, number: int, when: str) -> None:
        """The process dies before or after its command with this number (from 1)."""
        self._count = 0

        def step(words: list[str], moment: str) -> None:
            if moment == "before":
                self._count += 1
            if self._count == number and moment == when:
                self.dead = True
                raise Killed

        self.before = lambda words: step(words, "before")
        self.after = lambda words: step(words, "after")

    def revive(self) -> None:
        self.dead = False
        self.before = self.after = lambda words: None

    def used(self, program: str) -> list[list[str]]:
        return [words for words in self.commands if words[0] == program]

    EMPTY = json.dumps({"report": [{"lv": []}]})

    # --- The last call ---------------------------------------------------------------------------------------------------------------

    def run(self, words: Sequence[str], timeout_seconds: float) -> Finished:
        if self.dead:
            raise Killed
        plain = self._plain(list(words))
        listed: list[str] | None = None
        if plain[1:2] == ["--devices"]:
            listed = plain[2].split(",")
            del plain[1:3]
        self.lists.append(listed)
        self.commands.append(plain)
        self.before(plain)
        handler = getattr(self, f"_{plain[0]}", None)
        if handler is None:
            raise Unsupported(f"{plain[0]} is not simulated")
        with self._lock:  # as a group's own does
            self.listed = listed
            code, out, err = handler(plain[1:])
        self.after(plain)
        return Finished(tuple(words), code, out, err, 0.0)

    @staticmethod
    def _plain(words: list[str]) -> list[str]:
        """Without the configuration."""
        if "--config" in words:
            at = words.index("--config")
            del words[at : at + 2]
        return words

    def _lvs(self, words: list[str]) -> tuple[int, str, str]:
        groups, error = self._named(words)
        if error:
            return 5, self.EMPTY, error
        rows = [self._lv_row(group, name, volume) for group in groups for name, volume in self.groups[group].volumes.items()]
        if (match := self._selected(words, "lv_name")) is not None:
            rows = [row for row in rows if row["lv_name"] in match]
        if "--segments" in words:
            rows = [
                {
                    "lv_uuid": row["lv_uuid"],
                    "segtype": row["lv_layout"],
                    "seg_start": "0",
                    "seg_size": row["lv_size"],
                    "seg_pe_ranges": f"{self.groups[row['vg_name']].volumes[row['lv_name']].backing}:0-{int(row['lv_size']) // EXTENT - 1}",
                    "vg_extent_size": str(EXTENT),
                }
                for row in rows
            ]
            return 0, json.dumps({"report": [{"seg": rows}]}), ""
        return 0, json.dumps({"report": [{"lv": rows}]}), ""

    def _pvs(self, words: list[str]) -> tuple[int, str, str]:
        rows = [{"pv_name": str(volume.backing), "pe_start": "0"} for group in self.groups.values() for volume in group.volumes.values()]
        return 0, json.dumps({"report": [{"pv": rows}]}), ""

    def _vgs(self, words: list[str]) -> tuple[int, str, str]:
        groups, error = self._named(words)
        if error:
            return 5, self.EMPTY, error
        if (match := self._selected(words, "vg_name")) is not None:
            groups = [name for name in groups if name in match]
        rows = [
            {
                "vg_name": name,
                "vg_systemid": "",
                "vg_uuid": name,
                "vg_size": str(self.groups[name].size),
                "vg_free": str(self.groups[name].free),
                "vg_extent_size": str(EXTENT),
                "vg_tags": ",".join(self.groups[name].tags),
                **self._group_state(name),
                **physical,
            }
            for name in groups
            for physical in self._physical(name)
        ]
        return 0, json.dumps({"report": [{"vg": rows}]}), ""

    def _lvcreate(self, words: list[str]) -> tuple[int, str, str]:
        group, name = words[-1], words[words.index("--name") + 1]
        size = self._size(words)
        if group not in self.groups:
            return 5, "", f'  Volume group "{group}" not found\n  Cannot process volume group {group}'
        if name in self.groups[group].volumes:
            return 5, "", f'  Logical Volume "{name}" already exists in volume group "{group}"'
        if size > self.groups[group].free:
            return 5, "", f'  Volume group "{group}" has insufficient free space (1 extents): 2 required.'
        self._made += 1
        backing = self.folder / f"{group}-{name}-{self._made}.img"
        if self.stale is not None:
            shutil.copyfile(self.stale, backing)  # keeps no holes, which does not matter here
        else:
            backing.touch()
        os.truncate(backing, size)
        with backing.open("r+b") as file:
            file.write(bytes(4096))  # --zero y
        volume = Volume(
            str(uuid.uuid4()), size, set(self._after(words, "--addtag")), backing, auto="n" not in self._after(words, "--setautoactivation")
        )
        self.groups[group].volumes[name] = volume
        self._activate(group, name, volume)
        return 0, f'  Logical volume "{name}" created.', ""

    def _lvextend(self, words: list[str]) -> tuple[int, str, str]:
        group, _, name = next(word for word in words if "/" in word and not word.startswith("/")).partition("/")
        volume = self.groups[group].volumes.get(name)
        if volume is None:
            return 5, "", f'  Failed to find logical volume "{group}/{name}"'
        size = self._size(words)
        if self._is_partial(group):
            return 5, "", f"  Cannot change VG {group} while PVs are missing.\n"
        if size == volume.size:
            return 5, "", "  New size (1 extents) matches existing size (1 extents)."
        if size < volume.size:
            return 5, "", "  New size given (1 extents) not larger than existing size (2 extents)"
        if size - volume.size > self.groups[group].free:
            return 5, "", "  Insufficient free space: 2 extents needed, but only 1 available"
        self.commit(volume, size)
        loads = "" if volume.loaded else "  Loading table for x (7:0).\n"
        suspends = "" if volume.suspended else "  Suspending x (7:0) with device flush\n"
        self.refresh(volume)
        return 0, "  Logical volume successfully resized.", loads + suspends

    def _lvchange(self, words: list[str]) -> tuple[int, str, str]:
        group, _, name = words[-1].partition("/")
        volume = self.groups.get(group, Group(0)).volumes.get(name)
        if volume is None:
            return 5, "", f'  Failed to find logical volume "{words[-1]}"'
        if self._after(words, "--select") != [f"lv_uuid={volume.uuid}"]:
            return 0, "", ""
        if self._is_partial(group) and any(word in words for word in ("--deltag", "--addtag", "--setautoactivation")):
            self.groups[group].harmed.append(words)  # as lvm does
        volume.tags -= set(self._after(words, "--deltag"))
        volume.tags |= set(self._after(words, "--addtag"))
        for value in self._after(words, "--setautoactivation"):
            volume.auto = value == "y"
        if "--refresh" in words:
            self.refresh(volume)
        for value in self._after(words, "--activate"):
            if value == "n":
                if volume.device is not None and not self._deactivate(group, name, volume):
                    return 5, "", f"  Logical volume {group}/{name} in use."
            elif volume.device is None:
                self._activate(group, name, volume)
        return 0, "", ""

    def _lvremove(self, words: list[str]) -> tuple[int, str, str]:
        group, _, name = words[-1].partition("/")
        volume = self.groups.get(group, Group(0)).volumes.get(name)
        if volume is None:
            return 5, "", f'  Failed to find logical volume "{words[-1]}"'
        match = re.fullmatch(r"lv_uuid=(\S+) && lv_tags=\{(\S+)\}", self._after(words, "--select")[0])
        assert match is not None
        if match[1] != volume.uuid or match[2] not in volume.tags:
            return 0, "", ""
        if self._is_partial(group):
            self.groups[group].harmed.append(words)
        if volume.device is not None and not self._deactivate(group, name, volume):
            return 5, "", f"  Logical volume {group}/{name} in use."
        del self.groups[group].volumes[name]
        self.stale = volume.backing
        return 0, "", ""

    def _dmsetup(self, words: list[str]) -> tuple[int, str, str]:
        for group in self.groups.values():
            for volume in group.volumes.values():
                if volume.device == words[-1]:
                    if words[0] == "clear":
                        volume.loaded = 0
                    else:
                        self.resume(volume)
        return 0, "", ""

    # --- What lvextend does, in its parts --------------------------------------------------------------------------------------------

    def commit(self, volume: Volume, size: int) -> None:
        """The metadata has the size."""
        volume.size = -(-size // EXTENT) * EXTENT

    def refresh(self, volume: Volume) -> None:
        """The device has the size of the metadata, and goes on. As libdm does it: over a table that is loaded it loads none."""
        volume.loaded = volume.loaded or volume.size
        self.resume(volume)

    def shrink(self, volume: Volume, size: int) -> None:
        """Somebody's lvreduce --force: the metadata, and the device."""
        self.commit(volume, size)
        self.refresh(volume)

    def resume(self, volume: Volume) -> None:
        """It goes on, with the table that is loaded."""
        volume.suspended = False
        loaded, volume.loaded = volume.loaded, 0
        if loaded and volume.device_size != loaded:
            os.truncate(volume.backing, loaded)
            volume.device_size = loaded
            if volume.device is not None:
                run("losetup", "--set-capacity", volume.device)

    # --- Parts -----------------------------------------------------------------------------------------------------------------------

    def _named(self, words: list[str]) -> tuple[list[str], str]:
        """The groups that are named at the end, or what is wrong."""
        names = words[words.index("--options") + 2 :]
        missing = [name for name in names if name not in self.groups]
        error = "".join(f'Volume group "{name}" not found\nCannot process volume group {name}\n' for name in missing)
        return names or list(self.groups), error

    @staticmethod
    def _selected(words: list[str], field: str) -> list[str] | None:
        """The values of a field that are asked for; None: all."""
        return re.findall(rf'{field}="([^"]*)"', words[words.index("--select") + 1]) if "--select" in words else None

    def first(self, name: str) -> str:
        """The device that each group has."""
        return f"/dev/{name}-pv0"

    def is_missing(self, name: str, device: str) -> bool:
        others = self.groups[name].physical
        return (self.listed is not None and device not in self.listed) or (device in others and others[device].gone)

    def _physical(self, name: str) -> list[dict[str, str]]:
        group = self.groups[name]
        rest = group.free - sum(each.free for each in group.physical.values())
        rows = []
        for device, each in {self.first(name): Physical(rest), **group.physical}.items():
            missing = self.is_missing(name, device)
            rows.append(
                {
                    "pv_name": "[unknown]" if missing else device,
                    "pv_uuid": each.uuid or f"uuid of {device}",
                    "pv_free": str(each.free),
                    "pv_allocatable": "allocatable" if each.allocatable else "",
                    "pv_missing": "missing" if missing else "",
                    "pv_duplicate": "",
                    "pv_major": "0",
                    "pv_minor": "0",
                }
            )
        return rows

    def _is_partial(self, name: str) -> bool:
        return any(self.is_missing(name, device) for device in (self.first(name), *self.groups[name].physical))

    def _group_state(self, name: str) -> dict[str, str]:
        partial = "partial" if self._is_partial(name) else ""
        return {"vg_permissions": "writeable", "vg_exported": "", "vg_partial": partial, "vg_clustered": "", "vg_shared": ""} | self.groups[
            name
        ].state

    def _lv_row(self, group: str, name: str, volume: Volume) -> dict[str, str]:
        number = os.stat(volume.device).st_rdev if volume.device else None  # noqa: PTH116
        return {
            "vg_name": group,
            "lv_name": name,
            "lv_uuid": volume.uuid,
            "lv_size": str(volume.size),
            "lv_tags": ",".join(sorted(volume.tags)),
            "lv_layout": volume.layout,
            "lv_role": "public",
            "lv_active": "active" if volume.device else "",
            "lv_active_remotely": "",
            "lv_suspended": "suspended" if volume.suspended else "",
            "lv_inactive_table": "inactive table present" if volume.loaded else "",
            "vg_extent_size": str(EXTENT),
            "lv_permissions": "writeable" if volume.device else "unknown",
            "lv_kernel_major": "-1" if number is None else str(os.major(number)),
            "lv_kernel_minor": "-1" if number is None else str(os.minor(number)),
            "lv_device_open": "open" if volume.device and self._is_open(volume.device) else "",
            "lv_health_status": "",
            **self._group_state(group),
        }

    def activate(self, full_name: str, volume: Volume | None) -> None:
        """By hand, as an administrator would."""
        assert volume is not None
        group, _, name = full_name.partition("/")
        self._activate(group, name, volume)

    def _activate(self, group: str, name: str, volume: Volume) -> None:
        os.truncate(volume.backing, volume.size)
        volume.device = run("losetup", "--find", "--show", volume.backing)
        volume.device_size = volume.size
        folder = Path("/dev") / group
        folder.mkdir(exist_ok=True)
        (folder / name).symlink_to(volume.device)

    def _deactivate(self, group: str, name: str, volume: Volume) -> bool:
        assert volume.device is not None
        if self._is_open(volume.device):
            return False
        run("losetup", "--detach", volume.device)
        volume.device = None
        (Path("/dev") / group / name).unlink()
        return True

    @staticmethod
    def _is_open(device: str) -> bool:
        try:
            os.close(os.open(device, os.O_RDONLY | os.O_EXCL))
        except OSError:
            return True
        return False

    @staticmethod
    def _after(words: list[str], option: str) -> list[str]:
        return [words[at + 1] for at, word in enumerate(words) if word == option]

    def _size(self, words: list[str]) -> int:
        [text] = self._after(words, "--size")
        match = re.fullmatch(r"(\d+)b", text)
        assert match is not None and int(match[1]) % 512 == 0, text
        return -(-int(match[1]) // EXTENT) * EXTENT

    def close(self) -> None:
        for group_name, group in self.groups.items():
            for name, volume in group.volumes.items():
                if volume.device is not None:
                    with suppress(AssertionError):
                        run("losetup", "--detach", volume.device)
                    (Path("/dev") / group_name / name).unlink(missing_ok=True)
            with suppress(OSError):
                (Path("/dev") / group_name).rmdir()


@contextmanager
def simulated_lvm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """A machine whose volumes are real devices; skips where there are no loop devices."""
    probe = folder / "probe"
    probe.write_bytes(bytes(MIB))
    try:
        run("losetup", "--detach", run("losetup", "--find", "--show", probe))
    except (AssertionError, FileNotFoundError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"no loop devices here: {error}")
    if not os.access("/dev", os.W_OK):
        pytest.skip("the simulated volumes need a folder in /dev: run as root")
    machine = Machine(folder, f"fvdtest{os.getpid()}-{folder.name[-8:].strip('-_.')}-")

    def state(number: int) -> dm.State | None:
        return next((dm.State(volume.suspended, bool(volume.loaded)) for volume in machine.active() if volume.number == number), None)

    def device_name(number: int) -> str | None:
        return next((volume.device for volume in machine.active() if volume.number == number), None)

    def is_volume(number: int, lv_uuid: str) -> bool:
        return any(volume.number == number and volume.uuid == lv_uuid for volume in machine.active())

    monkeypatch.setattr(members, "labelled", lambda: None)  # no udev: what this host's knows is not this machine's
    monkeypatch.setattr(dm, "is_volume", is_volume)
    monkeypatch.setattr(runner, "run_command", machine.run)
    monkeypatch.setattr(sharing, "LOCK_FOLDER", folder / "locks")
    monkeypatch.setattr(dm, "state", state)
    monkeypatch.setattr(dm, "device_name", device_name)
    try:
        yield machine
    finally:
        machine.revive()
        machine.close()
