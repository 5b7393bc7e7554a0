# SPDX-License-Identifier: Apache-2.0
"""Which devices lvm's commands read, and what a volume can get of its group. LVM is simulated at its last call, udev at its database."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from lvm_machine import Machine, Physical
from test_lvm_commands import GROUP, PHYSICAL, group_row

from disks import MIB, SMALL
from fvd.api.listing import list_groups
from fvd.disk._disk_thread import drive
from fvd.disk.opening import open_volume
from fvd.disk.provision import provision
from fvd.disk.removing import remove
from fvd.errors import DeviceError, NoSpace
from fvd.lvm import members
from fvd.lvm.commands import Lvm
from fvd.lvm.members import Labelled
from fvd.lvm.report import LogicalVolume, VolumeGroup, parse_groups
from fvd.storage.lvm_storage import LvmStorage

STRANGER = "/dev/nbd0"


@dataclass
class Udev:
    """Its database: what carries the label of a physical volume. And the kernel's tables."""

    machine: Machine
    group: str
    devices: dict[str, str] = field(default_factory=dict)
    used: dict[tuple[int, int], str] = field(default_factory=dict)

    def labelled(self) -> list[Labelled]:
        return [Labelled(path, uuid) for path, uuid in sorted(self.devices.items())]

    def extend(self, device: str, free: int, *, known: bool = True, uuid: str = "") -> None:
        """vgextend."""
        group = self.machine.groups[self.group]
        group.size += free
        group.physical[device] = Physical(free, uuid=uuid)
        if known:
            self.devices[device] = uuid or f"uuid of {device}"


@pytest.fixture
def udev(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Udev:
    group = machine.add_group(64 * MIB)
    found = Udev(machine, group)
    found.devices = {machine.first(group): f"uuid of {machine.first(group)}", STRANGER: "a guest's"}
    monkeypatch.setattr(members, "labelled", found.labelled)
    monkeypatch.setattr(members, "in_use", lambda name: found.used if name == group else {})
    return found


@pytest.fixture
def name(udev: Udev) -> str:
    name = f"{udev.group}/vm1"
    provision(name, **SMALL)
    return name


def test_only_the_devices_of_the_group_are_read(machine: Machine, udev: Udev, name: str) -> None:
    """A device of somebody else's that does not answer holds nobody up: once the group is known, or its volumes are in use."""
    first = machine.first(udev.group)
    with drive(open_volume(name)) as driver:
        machine.lists.clear()
        assert driver.volume.allocator is not None
        driver.volume.allocator.extend_now().result(20)
    assert machine.lists and all(each == [first] for each in machine.lists)
    Lvm.forget()
    udev.used = {(0, 0): first}
    machine.lists.clear()
    with drive(open_volume(name)):
        pass
    assert machine.lists and all(each == [first] for each in machine.lists)


def test_a_host_without_physical_volumes(machine: Machine, udev: Udev) -> None:
    udev.devices.clear()
    Lvm().groups()
    assert machine.lists == [["/dev/null"]]


def test_without_udev_everything_is_read(machine: Machine) -> None:
    """Nobody could tell of a device that is missing in the list."""
    name = f"{machine.add_group(64 * MIB)}/vm1"
    provision(name, **SMALL)
    remove(name)
    assert set(map(str, machine.lists)) == {"None"}


def test_a_group_that_is_extended_during_a_load(machine: Machine, udev: Udev, name: str) -> None:
    first = machine.first(udev.group)
    with drive(open_volume(name)) as driver:
        assert driver.volume.allocator is not None
        driver.volume.allocator.extend_now().result(20)
        udev.extend("/dev/sdb", 256 * MIB)
        machine.lists.clear()
        driver.volume.allocator.extend_now(48 * MIB).result(20)
        assert [first] in machine.lists and machine.lists[-1] == sorted([first, "/dev/sdb"])
        assert driver.volume.allocator.storage.size_bytes() >= 66 * MIB
    assert machine.groups[udev.group].harmed == []


def test_a_device_that_udev_does_not_know_yet(machine: Machine, udev: Udev, name: str) -> None:
    """No command changes the group without it, growth waits, and goes on when it is known."""
    with drive(open_volume(name)) as driver:
        allocator = driver.volume.allocator
        assert allocator is not None
        udev.extend("/dev/sdb", 256 * MIB, known=False)
        machine.commands.clear()
        with pytest.raises(DeviceError, match=r"lacks physical volume uuid of /dev/sdb .*vgreduce --removemissing"):
            allocator.extend_now().result(20)
        assert machine.used("lvextend") == []
        driver.pwrite(0, b"x")
        udev.devices["/dev/sdb"] = "uuid of /dev/sdb"
        assert allocator.extend_now().result(20) == 32 * MIB
    assert machine.groups[udev.group].harmed == []


def test_a_device_that_has_another_name_now(machine: Machine, udev: Udev, name: str) -> None:
    udev.extend("/dev/sdb", 256 * MIB, uuid="pv-b")
    Lvm().group(udev.group)
    group = machine.groups[udev.group]
    group.physical["/dev/sdq"] = group.physical.pop("/dev/sdb")
    udev.devices["/dev/sdq"] = udev.devices.pop("/dev/sdb")
    with drive(open_volume(name)) as driver:
        assert driver.volume.allocator is not None
        driver.volume.allocator.extend_now().result(20)
    assert "/dev/sdq" in (machine.lists[-1] or []) and group.harmed == []


def test_a_group_that_is_elsewhere_by_now(machine: Machine, udev: Udev, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its only device has another name, and lvm says that there is no such group."""
    Lvm().group(udev.group)
    uuid = udev.devices.pop(machine.first(udev.group))
    real = machine._named

    def named(words: list[str]) -> tuple[list[str], str]:
        if "/dev/sdz" not in (machine.listed or []):
            return [], f'Volume group "{udev.group}" not found\n'
        return real(words)

    monkeypatch.setattr(machine, "_named", named)
    monkeypatch.setattr(machine, "first", lambda name: "/dev/sdz")
    udev.devices["/dev/sdz"] = uuid
    assert Lvm().group(udev.group).name == udev.group


def test_a_missing_device_that_a_disk_does_not_use(machine: Machine, udev: Udev, name: str) -> None:
    """The disk is served, read and written; growth, and whatever else changes the group, says what is wrong and does nothing."""
    udev.extend("/dev/sdb", 256 * MIB)
    machine.groups[udev.group].physical["/dev/sdb"].gone = True
    events: list[tuple[str, str]] = []
    with drive(open_volume(name, on_event=lambda event: events.append((event.kind, event.message)))) as driver:
        driver.pwrite(0, b"guest")
        driver.flush()
        allocator = driver.volume.allocator
        assert allocator is not None
        with pytest.raises(DeviceError, match="lacks physical volume uuid of /dev/sdb"):
            allocator.extend_now().result(20)
        assert any(kind == "extend_failed" and "lacks physical volume" in message for kind, message in events)
        assert allocator.storage.pool().free_bytes == 0  # type: ignore[union-attr]
    with drive(open_volume(name, read_only=True)) as driver:
        assert driver.pread(0, 5) == b"guest"
    for verb in (lambda: provision(f"{name}-new", **SMALL), lambda: remove(name)):
        with pytest.raises(DeviceError, match="lacks physical volume"):
            verb()
    assert machine.groups[udev.group].harmed == []
    with drive(open_volume(name, read_only=True)) as driver:
        assert driver.pread(0, 5) == b"guest", "it has been wiped by a remove that was refused"
    machine.groups[udev.group].physical["/dev/sdb"].gone = False
    assert remove(name)


CHANGES: dict[str, Callable[[LogicalVolume], object]] = {
    "create": lambda volume: Lvm().create(volume.group, "new", 4 * MIB, ["tag"]),
    "extend": lambda volume: Lvm().extend(volume.group, volume.name, 32 * MIB),
    "retag": lambda volume: Lvm().retag(volume, add=["tag"]),
    "stay inactive": lambda volume: Lvm().stay_inactive(volume),
    "remove": lambda volume: Lvm().remove(volume, "fvd.disk"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_no_command_changes_a_group_of_which_a_device_is_not_known(machine: Machine, udev: Udev, name: str, change: str) -> None:
    volume = Lvm().find(udev.group, "vm1")
    assert volume is not None
    udev.extend("/dev/sdb", 256 * MIB, known=False)
    machine.commands.clear()
    with pytest.raises(DeviceError, match="lacks physical volume uuid of /dev/sdb"):
        CHANGES[change](volume)
    assert {words[0] for words in machine.commands} == {"vgs"} and machine.groups[udev.group].harmed == []


def test_what_a_volume_held_is_not_overwritten_for_a_provision_that_is_refused(machine: Machine, udev: Udev, name: str) -> None:
    """With --force over a volume that is somebody's: the group is looked at first."""
    volume = machine.volume(name)
    assert volume is not None
    volume.tags.clear()
    before = volume.backing.read_bytes()
    udev.extend("/dev/sdb", 256 * MIB)
    machine.groups[udev.group].physical["/dev/sdb"].gone = True
    machine.commands.clear()
    with pytest.raises(DeviceError, match="lacks physical volume"):
        provision(name, **SMALL, force=True)
    assert volume.backing.read_bytes() == before and {words[0] for words in machine.commands} <= {"vgs", "lvs"}


def test_a_volume_that_lies_on_a_missing_device(machine: Machine, udev: Udev, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = machine._lv_row
    monkeypatch.setattr(machine, "_lv_row", lambda *what: {**real(*what), "lv_health_status": "partial"})
    with pytest.raises(DeviceError, match=r"lies on a physical volume that is missing"):
        open_volume(name)


@pytest.mark.parametrize("used", [False, True])
def test_two_devices_that_say_they_are_the_same(machine: Machine, udev: Udev, name: str, used: bool) -> None:
    """lvm is to see both, and changes nothing; but where the kernel uses one, that is the one, and a copy somewhere harms nobody."""
    first = machine.first(udev.group)
    udev.devices["/dev/clone"] = f"uuid of {first}"
    udev.used = {(0, 0): first} if used else {}
    Lvm.forget()
    group = Lvm().group(udev.group)
    assert machine.lists[-1] == ([first] if used else ["/dev/clone", first])
    assert (group.obtainable_bytes() > 0) == used and group.free_bytes == 48 * MIB


# --- What the kernel and udev know ------------------------------------------------------------------------------------------------------


def test_what_is_none_of_the_devices_that_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a guest has made on its disk is labelled too: in a logical volume, on an attached disk, in a partition of one."""
    for name, backend in (("sdb", ""), ("dm-7", ""), ("sdc", ""), ("nbd0", "fvd:uuid:vm1"), ("nbd0/nbd0p1", ""), ("nbd1", "another's")):
        (tmp_path / name).mkdir()
        if backend:
            (tmp_path / name / "backend").write_text(backend + "\n")
    devices = [
        SimpleNamespace(
            device_node=f"/dev/{name.split('/')[-1]}",
            device_number=number,
            properties={"ID_FS_UUID": uuid},
            sys_path=str(tmp_path / name),
        )
        for number, (name, uuid) in enumerate(
            {"sdb": "ours", "sdc": None, "dm-7": "the guest's", "nbd0": "a guest's", "nbd0/nbd0p1": "a guest's", "nbd1": "ours"}.items(), 5
        )
    ]
    monkeypatch.setattr(members, "_UDEV_CONTROL", str(tmp_path))
    monkeypatch.setattr("pyudev.Context", lambda: SimpleNamespace(list_devices=lambda **_: devices))
    monkeypatch.setattr("fvd.lvm.dm.is_lvm_device", lambda number: number == 7)
    assert members.labelled() == [Labelled("/dev/nbd1", "ours"), Labelled("/dev/sdb", "ours")]


def test_what_the_volumes_of_a_group_lie_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By the kernel's tables: devices of this group, and no volume of lvm's that lies between."""
    for device, name, uuid, below in (
        ("dm-0", "vg0-vm1", "LVM-a", {"sdb": "8:16", "dm-1": "253:1"}),
        ("dm-1", "vg0-vm1-real", "LVM-b", {"sdc": "8:32"}),
        ("dm-2", "vg1-vm1", "LVM-c", {"sdd": "8:48"}),
        ("dm-3", "vg0-x", "CRYPT-d", {"sde": "8:64"}),
    ):
        folder = tmp_path / device
        (folder / "dm").mkdir(parents=True)
        (folder / "dm" / "name").write_text(f"{name}\n")
        (folder / "dm" / "uuid").write_text(f"{uuid}\n")
        for slave, number in below.items():
            (folder / "slaves" / slave / "dm").mkdir(parents=True)
            (folder / "slaves" / slave / "dev").write_text(f"{number}\n")
            (folder / "slaves" / slave / "dm" / "uuid").write_text("LVM-b\n" if slave == "dm-1" else "")
    monkeypatch.setattr(members, "Path", lambda path: tmp_path if path == "/sys/block" else Path(path))
    assert members.in_use("vg0") == {(8, 16): "/dev/sdb", (8, 32): "/dev/sdc"}


# --- What can be had -----------------------------------------------------------------------------------------------------------------


def of(*free_mib: int, **changes: object) -> VolumeGroup:
    return replace(GROUP, physical=tuple(replace(PHYSICAL, free_bytes=mib * MIB, **changes) for mib in free_mib))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("free_mib", "stripes", "available_mib"),
    [
        ((64, 32), 1, 96),
        ((64, 32), 2, 64),
        ((64, 0), 2, 0),
        ((64, 32, 8), 2, 80),
        ((64, 64, 64), 2, 192),
        ((64, 32, 8), 3, 24),
        ((64,), 2, 0),
        ((66, 34), 2, 64),
    ],
)
def test_what_a_striped_volume_can_get(free_mib: tuple[int, ...], stripes: int, available_mib: int) -> None:
    assert of(*free_mib).obtainable_bytes(stripes) == available_mib * MIB


def test_what_cannot_be_had() -> None:
    assert of(64, allocatable=False).obtainable_bytes() == 0
    assert of(64, duplicate=True).obtainable_bytes() == 0
    group = of(64, 64)
    lost = replace(group, physical=(group.physical[0], replace(PHYSICAL, missing=True)))
    assert lost.obtainable_bytes() == 0 and lost.missing and not group.missing


def test_a_row_for_each_device() -> None:
    rows = [group_row(), group_row("[unknown]", "pv-2", pv_missing="missing"), group_row("/dev/sdb", "pv-3", pv_allocatable="")]
    (group,) = parse_groups(json.dumps({"report": [{"vg": rows}]}))
    assert [each.device for each in group.physical] == ["/dev/sda", "[unknown]", "/dev/sdb"]
    assert [each.missing for each in group.physical] == [False, True, False] and group.usable() == []


def test_figures_and_steps_are_of_what_can_be_had(machine: Machine, udev: Udev, name: str) -> None:
    """A device that may not be allocated from: its extents are in no figure, and no step is tried for them but the one that tells why."""
    udev.extend("/dev/sdb", 256 * MIB)
    machine.groups[udev.group].physical["/dev/sdb"].allocatable = False
    real = machine._lvextend

    def refuse(words: list[str]) -> tuple[int, str, str]:
        if machine._size(words) > 64 * MIB:
            return 5, "", "Insufficient free space: 64 extents needed, but only 4 available\n"
        return real(words)

    machine._lvextend = refuse  # type: ignore[method-assign]
    with drive(open_volume(name)) as driver:
        storage = driver.volume.allocator and driver.volume.allocator.storage
        assert isinstance(storage, LvmStorage)
        assert storage.pool().free_bytes == 48 * MIB
        machine.commands.clear()
        with pytest.raises(NoSpace, match=r"256 MiB are free there and cannot be had.*Insufficient free space: 64 extents") as refused:
            storage.grow_to(66 * MIB)
        assert refused.value.left_bytes == 0 and storage.size_bytes() == 64 * MIB
        assert len(machine.used("lvextend")) == 2
        assert storage.pool().free_bytes == 0


def test_lists_and_limits_are_of_what_can_be_had(machine: Machine, udev: Udev, name: str) -> None:
    udev.extend("/dev/sdb", 256 * MIB)
    machine.groups[udev.group].physical["/dev/sdb"].allocatable = False
    (group,) = list_groups(udev.group)
    assert (group.free_bytes, group.unusable_bytes, group.available_bytes) == (48 * MIB, 256 * MIB, 64 * MIB)
    with pytest.raises(NoSpace, match="over-committed"):
        provision(f"{name}-new", **SMALL, max_overcommit=1)


def test_no_growth_onto_larger_blocks(machine: Machine, udev: Udev, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The volume's own blocks would become larger under its guest."""
    udev.extend("/dev/sdb", 256 * MIB)
    monkeypatch.setattr("fvd.lvm.dm.logical_block_bytes", lambda number: 4096 if number == 1 << 8 | 2 else 512)
    real = machine._physical
    monkeypatch.setattr(
        machine,
        "_physical",
        lambda name: [{**row, "pv_major": "1", "pv_minor": "2"} if row["pv_name"] == "/dev/sdb" else row for row in real(name)],
    )
    with drive(open_volume(name)) as driver:
        storage = driver.volume.allocator and driver.volume.allocator.storage
        assert isinstance(storage, LvmStorage)
        assert storage.pool().free_bytes == 48 * MIB
        machine.commands.clear()
        storage.grow_to(32 * MIB)
        assert machine.used("lvextend")[0][-1] == machine.first(udev.group)
