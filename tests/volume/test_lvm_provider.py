# SPDX-License-Identifier: Apache-2.0
"""fvd.storage.lvm_provider: the states of a volume, a death at every command, what is refused. The last call of LVM is simulated."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from loops import run
from lvm_machine import Killed, Machine

from disks import MIB, SMALL, crash
from fvd.device.claim import claim
from fvd.disk import provision as provision_module
from fvd.disk._disk_thread import drive
from fvd.disk.extending import extend
from fvd.disk.opening import open_volume
from fvd.disk.provision import ProvisionedDisk, provision
from fvd.disk.removing import remove
from fvd.disk.view import look
from fvd.errors import Conflict, DeviceError, FvdError, InUse, InvalidArgument, NoSpace, NotFound, PermissionDenied, Unsupported
from fvd.inspect.check import check
from fvd.inspect.dump import dump
from fvd.storage.lvm_provider import LvmProvider
from fvd.volume.name import parse_name

SECRET = b"another tenant's secret " * 170 + bytes(16)  # 4096 bytes


@pytest.fixture
def name(machine: Machine) -> str:
    return f"{machine.add_group(1024 * MIB)}/vm1"


def make(name: str, **changes: Any) -> ProvisionedDisk:
    return provision(name, **(SMALL | changes))


def contents(name: str) -> bytes:
    driver = drive(open_volume(name))
    with driver:
        return bytes(driver.pread(0, 64 * MIB))


def leave_a_secret(machine: Machine, name: str) -> None:
    """A whole disk of another tenant, full of secrets, whose volume is taken away without being wiped: by hand, as lvremove does it."""
    make(name)
    with drive(open_volume(name)) as driver:
        driver.pwrite(0, SECRET * (8 * MIB // 4096))
    group, _, lv = name.partition("/")
    machine.stale = machine.groups[group].volumes.pop(lv).backing


# --- A life ----------------------------------------------------------------------------------------------------------------------


def test_from_provision_to_remove(machine: Machine, name: str) -> None:
    made = make(name)
    assert made.created and made.storage_size_bytes == 16 * MIB
    volume = machine.volume(name)
    assert volume is not None and volume.device is None and not volume.auto
    assert volume.tags == {
        "fvd.disk",
        "fvd.virtual=67108864",
        f"fvd.most={made.superblock.geometry.max_storage_size_bytes}",
        "fvd.step=16777216",
    }
    assert not make(name).created
    with pytest.raises(Conflict, match="block_size"):
        make(name, block_size_bytes=4096)
    with drive(open_volume(name)) as driver:
        assert volume.device is not None
        driver.pwrite(12345, b"hello")
    assert volume.device is None  # the last one out
    assert contents(name)[12345:12350] == b"hello"
    assert extend(name).storage_size_bytes == 32 * MIB
    assert look(name).storage_size_bytes == 32 * MIB
    assert remove(name) and machine.volume(name) is None
    assert not remove(name)
    for verb in (look, extend, open_volume):
        with pytest.raises(NotFound, match="no logical volume"):
            verb(name)


def test_a_raw_layout_takes_all_of_it(machine: Machine, name: str) -> None:
    from fvd.format.geometry import Layout

    made = make(name, layout=Layout.RAW)
    assert made.storage_size_bytes == -(-made.superblock.geometry.max_storage_size_bytes // (4 * MIB)) * 4 * MIB


def test_one_growth_step_is_one_lvextend(machine: Machine, name: str) -> None:
    """Between the wish and its fulfilment there is one look at the group's devices, and one command. What it has left is looked up when the
    step is over."""
    make(name, virtual_size_bytes=256 * MIB)
    with drive(open_volume(name)) as driver:
        machine.commands.clear()
        at: list[tuple[str, int]] = []
        allocator = driver.volume.allocator
        assert allocator is not None
        allocator.on_event = lambda event: at.append((event.kind, len(machine.used("lvextend"))))
        for chunk in range(100):
            driver.pwrite(chunk * MIB, b"x")
        done, seen = driver.call(lambda: (allocator.figures()["extend_steps"], list(at)))  # one more may end before the close
    steps = [count for kind, count in seen if kind == "extend_done"]
    assert steps == list(range(1, len(steps) + 1)) and done >= len(steps) >= 3
    assert {words[0] for words in machine.commands[:-1]} == {"lvextend", "vgs"}
    assert [words[0] for words in machine.commands[:2]] == ["vgs", "lvextend"]
    assert machine.commands[-1][:3] == [
        "lvchange",
        "--activate",
        "n",
    ]


def test_who_looks_does_not_switch_off_what_is_served(machine: Machine, name: str) -> None:
    make(name)
    volume = machine.volume(name)
    assert volume is not None
    with drive(open_volume(name, read_only=True)):
        look(name)
        assert volume.device is not None
    assert volume.device is None


def test_a_volume_that_a_dead_process_left_active_is_taken_over(machine: Machine, name: str) -> None:
    make(name)
    driver = drive(open_volume(name))
    driver.pwrite(0, b"flushed")
    driver.flush()
    machine.dead = True  # whatever it would still ask of lvm does not happen
    with pytest.raises(Killed):
        crash(driver)
    machine.revive()
    volume = machine.volume(name)
    assert volume is not None and volume.device is not None
    assert contents(name).startswith(b"flushed")
    assert volume.device is None


# --- What another volume left ----------------------------------------------------------------------------------------------------


def test_a_reused_extent_shows_nothing(machine: Machine, name: str) -> None:
    leave_a_secret(machine, name)
    assert machine.stale is not None and b"secret" in machine.stale.read_bytes()
    assert make(name).created
    assert not any(contents(name))


def deaths(machine: Machine, prepare: Callable[[], object], verb: Callable[[], object]) -> Iterator[None]:
    """A turn for each death of `verb`, before and after each of its commands. How many there are no run tells beforehand: a volume that
    udev looks into is switched off at the second try."""
    for number in itertools.count(1):
        for when in ("before", "after"):
            prepare()
            machine.kill_at(number, when)
            try:
                verb()
            except Killed:
                machine.revive()
                yield
            else:
                machine.revive()
                assert number > 1
                return


@pytest.mark.pure
def test_a_provision_that_dies_anywhere(machine: Machine, name: str) -> None:
    """Over the leftovers of a whole disk of the same shape: at no point may anyone see it."""
    leave_a_secret(machine, name)
    stale = machine.stale
    assert stale is not None
    kept = stale.with_suffix(".kept")
    shutil.copyfile(stale, kept)
    states = set()

    def prepare() -> None:
        if machine.volume(name) is not None:
            remove(name)
        machine.stale = kept

    for _ in deaths(machine, prepare, lambda: make(name)):
        volume = machine.volume(name)
        states.add("absent" if volume is None else "unfinished" if "fvd.unfinished" in volume.tags else "disk")
        try:
            assert not any(contents(name))
            assert volume is not None and "fvd.disk" in volume.tags
        except NotFound:
            assert volume is None or "fvd.unfinished" in volume.tags
        finished = volume is not None and "fvd.disk" in volume.tags
        assert make(name).created != finished
        assert not any(contents(name))
    assert states == {"absent", "unfinished", "disk"}


@pytest.mark.pure
def test_a_remove_that_dies_anywhere(machine: Machine, name: str) -> None:
    states = set()
    for _ in deaths(machine, lambda: make(name), lambda: remove(name)):
        states.add(machine.volume(name) is None)
        remove(name)
        assert machine.volume(name) is None
    assert states == {False, True}


def test_a_look_leaves_a_volume_as_it_was(machine: Machine, name: str) -> None:
    """An administrator, or a server that was killed, has left it active."""
    make(name)
    volume = machine.volume(name)
    assert volume is not None
    look(name)
    assert volume.device is None
    machine.activate(name, volume)
    look(name)
    check(name)
    dump(name)
    assert volume.device is not None
    with drive(open_volume(name)):
        pass
    assert volume.device is None


def test_a_look_beside_others_leaves_nothing_active_that_was_not(machine: Machine, name: str) -> None:
    make(name)
    volume, provider, parsed = machine.volume(name), LvmProvider(), parse_name(name)
    assert volume is not None
    server = drive(open_volume(name, read_only=True))
    place = provider.attach(parsed, looking=True)
    server.close()
    assert volume.device is not None
    place.close()
    assert volume.device is None
    first, second = provider.attach(parsed, looking=True), provider.attach(parsed, looking=True)
    first.close()
    second.close()
    assert volume.device is None
    machine.activate(name, volume)
    first, second = provider.attach(parsed, looking=True), provider.attach(parsed, looking=True)
    first.close()
    second.close()
    assert volume.device is not None  # an administrator's


def test_a_server_that_ends_while_a_look_begins_leaves_nothing_active(machine: Machine, name: str) -> None:
    """The look has seen the volume active, and then itself alone: it was the server's activity, not an administrator's."""
    make(name)
    server = drive(open_volume(name))

    def ends(words: list[str]) -> None:
        if words[0] == "lvs":
            machine.after = lambda words: None
            server.close()

    machine.after = ends
    LvmProvider().attach(parse_name(name), looking=True).close()
    volume = machine.volume(name)
    assert volume is not None and volume.device is None


def test_an_unfinished_volume_is_not_activated_with_what_it_holds(machine: Machine, name: str) -> None:
    """udev would look at it, and at what an earlier volume has left there. It is made anew."""
    volume = foreign(machine, name)
    machine.run(["lvchange", "--activate", "n", "--select", f"lv_uuid={volume.uuid}", name], 1.0)
    volume.tags.add("fvd.unfinished")
    assert make(name).created
    assert machine.volume(name) is not volume
    again = machine.volume(name)
    assert again is not None
    again.tags ^= {"fvd.disk", "fvd.unfinished"}
    again.tags.add("theirs")
    assert make(name).created
    assert machine.volume(name) is again and "theirs" in again.tags


def test_a_node_that_leads_to_another_volume_is_refused(machine: Machine, name: str) -> None:
    make(name)
    other = f"{name}-other"
    make(other)
    for volume in (name, other):
        machine.activate(volume, machine.volume(volume))
    Path(f"/dev/{name}").unlink()
    Path(f"/dev/{name}").symlink_to(f"/dev/{other}")
    for verb in (look, open_volume, remove, extend):
        with pytest.raises(DeviceError, match="stale node"):
            verb(name)
    look(other)


def interleave(machine: Machine, command: str, other: Callable[[], object], option: str = "") -> None:
    """Another process does something just before a command of ours reaches lvm."""

    def before(words: list[str]) -> None:
        if words[0] == command and (not option or option in " ".join(words)):
            machine.before = lambda words: None
            other()

    machine.before = before


def test_a_clean_up_that_comes_late_removes_nobodys_finished_disk(machine: Machine, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our format has failed; before our lvremove gets the group's lock, another provision has made the disk."""
    real = provision_module.write_disk

    def fail(*_: object, **__: object) -> None:
        monkeypatch.setattr(provision_module, "write_disk", real)
        raise DeviceError("the device failed, as the test wished")

    monkeypatch.setattr(provision_module, "write_disk", fail)
    interleave(machine, "lvremove", lambda: make(name))
    with pytest.raises(DeviceError, match="wished"):
        make(name)
    assert not make(name).created


def test_a_loser_of_a_race_removes_nobodys_finished_disk(machine: Machine, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """We have made the volume; before we have the claim, another provision has it, and finishes."""
    from fvd.storage import lvm_provider

    real = lvm_provider.claim

    def late(*arguments: object, **options: object) -> object:
        monkeypatch.setattr(lvm_provider, "claim", real)
        make(name)
        raise InUse("somebody else has it")

    monkeypatch.setattr(lvm_provider, "claim", late)
    with pytest.raises(InUse):
        make(name)
    assert not make(name).created


def test_a_remove_that_comes_late_removes_nobodys_new_disk(machine: Machine, name: str) -> None:
    make(name)
    interleave(machine, "lvremove", lambda: make(name))
    remove(name)
    assert not make(name).created


def test_a_rename_in_the_middle_of_a_remove_harms_nobody(machine: Machine, name: str) -> None:
    """lvrename a old; lvrename b a, between the claim and the tags: tenant b's disk has the name now."""
    group, _, lv = name.partition("/")
    make(f"{name}b")
    make(name)
    volumes = machine.groups[group].volumes

    def rename() -> None:
        volumes["old"], volumes[lv] = volumes[lv], volumes.pop(f"{lv}b")

    interleave(machine, "lvchange", rename, "--deltag fvd.disk")
    remove(name)
    assert "fvd.disk" in volumes[lv].tags and "fvd.unfinished" not in volumes[lv].tags
    volumes[f"{lv}b"], volumes[lv] = volumes[lv], volumes.pop("old")
    assert not make(f"{name}b").created


def test_half_removed_can_be_provisioned(machine: Machine, name: str) -> None:
    make(name)
    machine.before = lambda words: (_ for _ in ()).throw(Killed()) if words[0] == "lvremove" else None
    with pytest.raises(Killed):
        remove(name)
    machine.revive()
    with pytest.raises(NotFound):
        look(name)
    assert make(name).created


def test_wiped_and_not_yet_marked_can_be_removed_and_provisioned(machine: Machine, name: str) -> None:
    for verb in (make, remove):
        make(name)
        interleave(machine, "lvchange", lambda: (_ for _ in ()).throw(Killed()), "--deltag fvd.disk")
        with pytest.raises(Killed):
            remove(name)
        machine.revive()
        verb(name)


def test_a_failed_provision_leaves_nothing(machine: Machine, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise DeviceError("the device failed, as the test wished")

    monkeypatch.setattr("fvd.disk.provision.write_disk", fail)
    with pytest.raises(DeviceError, match="wished"):
        make(name)
    assert machine.volume(name) is None


def test_what_does_not_read_back_is_no_disk(machine: Machine, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fvd.disk.provision.write_disk", lambda *_, **__: None)
    with pytest.raises(FvdError):
        make(name)
    assert machine.volume(name) is None


# --- Volumes that are not ours ---------------------------------------------------------------------------------------------------


def foreign(machine: Machine, name: str, size: int = 64 * MIB) -> Any:
    """A volume that an administrator made, and left active."""
    group, _, lv = name.partition("/")
    machine.run(["lvcreate", "--size", f"{size}b", "--name", lv, group], 1.0)
    return machine.volume(name)


def test_an_empty_volume_is_adopted(machine: Machine, name: str) -> None:
    volume = foreign(machine, name, 4 * MIB)
    volume.tags.add("theirs")
    for verb in (look, extend, open_volume, remove):
        with pytest.raises(NotFound, match="no tag"):
            verb(name)
    assert make(name).created
    assert "theirs" in volume.tags and "fvd.disk" in volume.tags and volume.size == 16 * MIB and not volume.auto
    assert not any(contents(name))


def test_a_volume_with_a_file_system_is_refused_and_left_as_it_was(machine: Machine, name: str) -> None:
    volume = foreign(machine, name)
    run("mkfs.ext4", "-q", volume.device)
    before = volume.backing.read_bytes()
    with pytest.raises(Conflict, match="ext4"):
        make(name)
    assert volume.device is not None and volume.tags == set() and volume.size == 64 * MIB and volume.backing.read_bytes() == before
    with pytest.raises(NotFound):
        remove(name)
    assert make(name, force=True).created
    assert not any(contents(name))


def test_an_untagged_volume_that_holds_an_fvd_disk_is_not_believed(machine: Machine, name: str) -> None:
    make(name)
    volume = machine.volume(name)
    assert volume is not None
    volume.tags.clear()
    for options in ({}, {"force": True}):
        with pytest.raises(Conflict, match=r"addtag fvd\.disk"):
            make(name, **options)
    volume.tags.add("fvd.disk")
    assert not make(name).created


@pytest.mark.pure
def test_an_adoption_that_dies_anywhere(machine: Machine, name: str) -> None:
    def prepare() -> None:
        if machine.volume(name) is not None:
            remove(name)
        machine.stale = None
        foreign(machine, name, 4 * MIB)

    for _ in deaths(machine, prepare, lambda: make(name)):
        make(name)
        assert not any(contents(name))


def test_a_volume_in_use_is_refused(machine: Machine, name: str, tmp_path: Path) -> None:
    volume = foreign(machine, name)
    with claim(volume.device):
        for options in ({}, {"force": True}):
            with pytest.raises(InUse):
                make(name, **options)
    make(name)
    with drive(open_volume(name)):
        for verb in (open_volume, extend, remove):
            with pytest.raises(InUse):
                verb(name)
        assert not make(name).created
    make(name)


def test_an_unfinished_volume_that_somebody_is_at_work_on_stays(machine: Machine, name: str) -> None:
    volume = foreign(machine, name)
    volume.tags.add("fvd.unfinished")
    with claim(volume.device):
        with pytest.raises(InUse):
            remove(name)
        with pytest.raises(InUse):
            make(name)
    assert machine.volume(name) is volume
    machine.groups[name.partition("/")[0]].state = {"vg_exported": "exported"}
    with pytest.raises(InUse, match="vgimport"):
        remove(name)
    machine.groups[name.partition("/")[0]].state = {}
    assert not remove(name)
    assert machine.volume(name) is None


def test_a_build_that_finds_its_volume_in_use_leaves_it(machine: Machine, name: str) -> None:
    """Made by us or not: whoever has it may be at work on it."""
    volume = foreign(machine, name)
    with claim(volume.device), pytest.raises(InUse):
        make(name, force=True)
    assert machine.volume(name) is volume


def test_a_volume_that_was_swapped_while_it_was_being_claimed(machine: Machine, name: str) -> None:
    volume = foreign(machine, name)

    def swap(words: list[str]) -> None:
        try:
            os.close(os.open(volume.device, os.O_RDONLY | os.O_EXCL))
        except OSError:
            volume.uuid = "another"  # the first look after the claim

    machine.before = swap
    with pytest.raises(Conflict, match="meanwhile"):
        make(name)


def test_tags_of_an_earlier_disk_are_replaced(machine: Machine, name: str) -> None:
    volume = foreign(machine, name, 4 * MIB)
    volume.tags |= {"fvd.unfinished", "fvd.most=1", "fvd.virtual=2", "fvd.step=3"}
    made = make(name)
    facts = {f"fvd.most={made.superblock.geometry.max_storage_size_bytes}", "fvd.virtual=67108864", "fvd.step=16777216"}
    assert volume.tags == {"fvd.disk"} | facts


@pytest.mark.parametrize(
    ("field", "value", "error", "hint"),
    [
        ("lv_active_remotely", "active remotely", InUse, "another host"),
        ("lv_permissions", "read-only", PermissionDenied, "lvchange --permission rw"),
        ("lv_role", "private,thin,pool,data", Conflict, "another kind"),
    ],
)
def test_volumes_that_must_not_be_used(machine: Machine, name: str, field: str, value: str, error: type[FvdError], hint: str) -> None:
    make(name)
    real = machine._lv_row
    machine._lv_row = lambda *place: real(*place) | {field: value}  # type: ignore[method-assign]
    for verb in (look, extend, open_volume, remove):
        with pytest.raises(error, match=hint):
            verb(name)
    volume = machine.volume(name)
    assert volume is not None and volume.device is None


@pytest.mark.parametrize("layout", ["thin,sparse", "snapshot,linear", "raid,raid1", "cache", "thin,pool"])
def test_other_layouts_are_refused(machine: Machine, name: str, layout: str) -> None:
    foreign(machine, name).layout = layout
    with pytest.raises(Conflict, match="another kind"):
        make(name, force=True)


@pytest.mark.parametrize(
    ("state", "error", "hint"),
    [
        ({"vg_shared": "shared"}, Unsupported, "shared"),
        ({"vg_clustered": "clustered"}, Unsupported, "clustered"),
        ({"vg_exported": "exported"}, InUse, "vgimport"),
        ({"vg_permissions": "read-only"}, PermissionDenied, "read-only"),
    ],
)
def test_groups_that_must_not_be_used(machine: Machine, name: str, state: dict[str, str], error: type[FvdError], hint: str) -> None:
    make(name)
    group = machine.groups[name.partition("/")[0]]
    group.state = state
    machine.commands.clear()
    for verb in (look, extend, open_volume, remove, make):
        with pytest.raises(error, match=hint):
            verb(name)
    with pytest.raises(error, match=hint):
        make(f"{name}-new")
    assert {words[0] for words in machine.commands} <= {"lvs", "vgs"}


def test_a_group_or_space_that_is_not_there(machine: Machine, name: str) -> None:
    with pytest.raises(NotFound, match="no volume group"):
        make("fvd-no-such-group/vm1")
    with pytest.raises(NoSpace, match="vgextend"):
        make(name, grow_step_bytes=2048 * MIB, virtual_size_bytes=4096 * MIB)
    assert machine.volume(name) is None


def test_the_device_of_a_logical_volume_is_named_by_its_volume(machine: Machine, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make(name)
    with drive(open_volume(name)):
        volume = machine.volume(name)
        assert volume is not None and volume.device is not None
        monkeypatch.setattr("fvd.lvm.dm.logical_volume_of", lambda number: ("vg0", "vm1"))
        for verb in (look, make, remove):
            with pytest.raises(InvalidArgument, match="name it vg0/vm1"):
                verb(volume.device)


def test_a_disk_cannot_be_its_own_base(machine: Machine, name: str) -> None:
    volume = foreign(machine, name)
    machine.groups[name.partition("/")[0]].volumes[name.partition("/")[2]].backing.write_bytes(SECRET * 16 * 1024)
    run("losetup", "--set-capacity", volume.device)
    with pytest.raises((InvalidArgument, InUse, Conflict)):
        make(name, base=f"/dev/{name}", force=True)
    assert volume.backing.read_bytes().startswith(SECRET)


# --- Over-commit -----------------------------------------------------------------------------------------------------------------


def test_over_commit_is_limited(machine: Machine, name: str) -> None:
    """The group has 1 GiB; a disk of 400 MiB may become 404 MiB, in whole extents."""
    size = {"virtual_size_bytes": 400 * MIB}
    make(name, **size, max_overcommit=1.0)
    make(f"{name}b", **size, max_overcommit="1")
    with pytest.raises(NoSpace, match=r"over-committed 1\.18 times, and 1 is the limit"):
        make(f"{name}c", **size, max_overcommit=1)
    machine.groups[name.partition("/")[0]].tags.add("fvd.max_overcommit=1.1")
    for asked in (None, 5.0):
        with pytest.raises(NoSpace, match=r"1\.1 is the limit"):
            make(f"{name}c", **size, max_overcommit=asked)
    assert machine.volume(f"{name}c") is None
    machine.groups[name.partition("/")[0]].tags = {"fvd.max_overcommit=1.2"}
    assert make(f"{name}c", **size).created
    for wrong in (0, -1, "x", float("nan"), float("inf")):
        with pytest.raises(InvalidArgument, match="no over-commit ratio"):
            make(f"{name}d", max_overcommit=wrong)


def test_over_commit_is_limited_whatever_is_in_the_way(machine: Machine, name: str) -> None:
    """An unfinished volume that is made anew, and one that is adopted, promise as much as a new one."""
    size = {"virtual_size_bytes": 2048 * MIB}
    volume = foreign(machine, name, 16 * MIB)
    with pytest.raises(NoSpace, match="is the limit"):
        make(name, **size, max_overcommit=1)
    volume.tags |= {"fvd.unfinished", "fvd.virtual=1", "fvd.most=1", "fvd.step=1"}
    with pytest.raises(NoSpace, match="is the limit"):
        make(name, **size, max_overcommit=1)
    assert make(name, **size, max_overcommit=2.1).created


@pytest.mark.parametrize("tag", ["fvd.max_overcommit=", "fvd.max_overcommit=x", "fvd.max_overcommit=0", "fvd.max_overcommit=-1"])
def test_a_limit_that_cannot_be_read_is_not_passed_over(machine: Machine, name: str, tag: str) -> None:
    machine.groups[name.partition("/")[0]].tags.add(tag)
    with pytest.raises(Conflict, match="vgchange --deltag"):
        make(name)


@pytest.mark.parametrize(
    "tag", ["fvd.max_overcommit=1.", "fvd.max_overcommit=.9", "fvd.max_overcommit=+1", "fvd.max_overcommit=1.00000000"]
)
def test_limits_as_people_write_them(machine: Machine, name: str, tag: str) -> None:
    machine.groups[name.partition("/")[0]].tags.add(tag)
    with pytest.raises(NoSpace, match="is the limit"):
        make(name, virtual_size_bytes=2048 * MIB)


def test_of_two_facts_the_one_counts_that_promises_more(machine: Machine, name: str) -> None:
    make(name)
    volume = machine.volume(name)
    assert volume is not None
    volume.tags |= {"fvd.most=3000000000", "fvd.most=99999999999999999999999"}
    with pytest.raises(NoSpace, match="is the limit"):
        make(f"{name}b", max_overcommit=1)


def test_two_provisions_at_once_do_not_both_pass(machine: Machine, name: str) -> None:
    """Another one passes the same check while ours has not yet made its volume."""
    size = {"virtual_size_bytes": 600 * MIB}

    def meanwhile(words: list[str]) -> None:
        if words[0] == "lvcreate":
            machine.before = lambda words: None
            make(f"{name}b", **size)

    machine.before = meanwhile
    with pytest.raises(NoSpace, match="over-committed"):
        make(name, **size, max_overcommit=1)
    assert machine.volume(name) is None and machine.volume(f"{name}b") is not None
