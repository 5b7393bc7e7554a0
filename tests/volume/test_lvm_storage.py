# SPDX-License-Identifier: Apache-2.0
"""fvd.storage.lvm_storage: every way in which an lvextend can end, and what is put right after it. LVM is simulated at its last call."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from loops import run
from lvm_machine import Machine, Volume

from disks import MIB, SMALL
from fvd.device.node import open_node
from fvd.disk._disk_thread import drive
from fvd.disk.opening import open_volume
from fvd.disk.provision import provision
from fvd.disk.removing import remove
from fvd.disk.view import look
from fvd.errors import DeviceError, NoSpace
from fvd.lvm.runner import Finished, Unfinished
from fvd.storage.lvm_provider import LvmProvider
from fvd.storage.lvm_storage import LvmStorage
from fvd.volume.name import parse_name


@pytest.fixture
def name(machine: Machine) -> str:
    name = f"{machine.add_group(64 * MIB)}/vm1"
    provision(name, **SMALL)  # 16 MiB, at most 66
    return name


@contextmanager
def storage_of(name: str) -> Iterator[LvmStorage]:
    volume = parse_name(name)
    with LvmProvider().attach(volume) as place, open_node(place.path) as node:
        storage = place.storage(node)
        assert isinstance(storage, LvmStorage)
        try:
            yield storage
        finally:
            storage.close()


def there(machine: Machine, name: str) -> Volume:
    found = machine.volume(name)
    assert found is not None
    return found


def refreshed(machine: Machine, name: str) -> bool:
    return any(words[1] == "--refresh" and words[-1] == name for words in machine.used("lvchange"))


def instead_of_lvextend(machine: Machine, what: Callable[[], tuple[int, str, str]]) -> None:
    machine._lvextend = lambda words: what()  # type: ignore[method-assign]


def test_it_grows(machine: Machine, name: str) -> None:
    with storage_of(name) as storage:
        machine.commands.clear()
        storage.grow_to(32 * MIB)
        storage.grow_to(20 * MIB)
        assert storage.size_bytes() == 32 * MIB
        assert [words[0] for words in machine.commands] == ["vgs", "lvextend"]
        assert storage.pool().name == name.partition("/")[0] and storage.pool().free_bytes == 32 * MIB


def test_how_long_the_device_stood_still_is_told(machine: Machine, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fvd.lvm.dm.SuspendGauge._sample", lambda gauge: setattr(gauge, "seconds", 0.25))
    with storage_of(name) as storage:
        assert storage.last_suspend_seconds is None
        storage.grow_to(32 * MIB)
        assert storage.last_suspend_seconds == 0.25


@pytest.mark.parametrize("running", [False, True])
def test_who_tells_of_space(machine: Machine, name: str, running: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fvd.storage.lvm_provider.udev_is_running", lambda: running)
    with storage_of(name) as storage:
        assert storage.notifies_space == running


def test_the_rest_of_a_group_is_taken(machine: Machine, name: str) -> None:
    with storage_of(name) as storage:
        with pytest.raises(NoSpace, match=r"is full.*vgextend"):
            storage.grow_to(80 * MIB)
        assert storage.size_bytes() == 64 * MIB
        with pytest.raises(NoSpace, match=r"0 B could be had"):
            storage.grow_to(80 * MIB)


def test_space_that_somebody_makes_between_two_looks_is_used(machine: Machine, name: str) -> None:
    group = machine.groups[name.partition("/")[0]]

    def more(words: list[str]) -> None:
        if words[0] == "vgs":
            group.size = 512 * MIB

    machine.before = more
    with storage_of(name) as storage:
        storage.grow_to(80 * MIB)
        assert storage.size_bytes() == 80 * MIB


def test_extents_that_are_of_no_use(machine: Machine, name: str) -> None:
    """A physical volume that may not be allocated from: free, and yet no space."""
    instead_of_lvextend(machine, lambda: (5, "", "  Insufficient suitable allocatable extents for logical volume vm1: 4 more required\n"))
    with storage_of(name) as storage:
        machine.commands.clear()
        with pytest.raises(NoSpace, match=r"is full \(48.0 MiB are free.*0 B could be had.*Insufficient suitable.*vgextend") as refused:
            storage.grow_to(32 * MIB)
        assert refused.value.left_bytes == 48 * MIB
        # What was wanted, twice, for somebody may have freed space; then half of it, down to an extent.
        assert [words[words.index("--size") + 1] for words in machine.used("lvextend")] == [f"{mib * MIB}b" for mib in (32, 32, 24, 20)]


@pytest.mark.parametrize(("usable", "tried"), [(24, (48, 48, 32, 24, 28)), (28, (48, 48, 32, 24, 28)), (16, (48, 48, 32, 24, 20))])
def test_smaller_steps_find_what_can_be_had(machine: Machine, name: str, usable: int, tried: tuple[int, ...]) -> None:
    """Some of what is free cannot be had: what can is found, and the line that says why is told."""
    real = machine._lvextend

    def some(words: list[str]) -> tuple[int, str, str]:
        if machine._size(words) > usable * MIB:
            return 5, "", "Insufficient suitable allocatable extents for logical volume vm1: 4 more required\n"
        return real(words)

    machine._lvextend = some  # type: ignore[method-assign]
    with storage_of(name) as storage:
        machine.commands.clear()
        with pytest.raises(NoSpace, match=r"Insufficient suitable"):
            storage.grow_to(48 * MIB)
        assert storage.size_bytes() == usable * MIB
        assert [words[words.index("--size") + 1] for words in machine.used("lvextend")] == [f"{mib * MIB}b" for mib in tried]


def test_a_refusal_is_told_in_lvms_words(machine: Machine, name: str) -> None:
    instead_of_lvextend(machine, lambda: (5, "", "  Something unheard of.\n"))
    with storage_of(name) as storage, pytest.raises(DeviceError, match=r"lvextend failed: Something unheard of\."):
        storage.grow_to(32 * MIB)


@pytest.mark.parametrize("how", ["killed", "hangs", "fails"])
@pytest.mark.parametrize("where", ["before", "loaded", "suspended", "committed", "resumed"])
def test_an_lvextend_that_ends_half_way(machine: Machine, name: str, how: str, where: str) -> None:
    """lvextend loads its table, suspends, commits, resumes. Before its commit the old table must go on, and the step has failed; after
    it the new size counts, and the step has not."""
    volume = there(machine, name)
    committed = where in ("committed", "resumed")

    def end() -> tuple[int, str, str]:
        if where in ("loaded", "suspended", "committed"):
            volume.loaded = 32 * MIB
            volume.suspended = where != "loaded"
        if committed:
            machine.commit(volume, 32 * MIB)
        if where == "resumed":
            machine.refresh(volume)
        if how == "hangs":
            raise Unfinished("lvextend did not end within 60 s and was killed")
        return (-9, "", "") if how == "killed" else (5, "", "  Failed to suspend logical volume.\n")

    instead_of_lvextend(machine, end)
    with storage_of(name) as storage:
        machine.commands.clear()
        if committed:
            storage.grow_to(32 * MIB)
        else:
            with pytest.raises((Unfinished, DeviceError)):
                storage.grow_to(32 * MIB)
        assert storage.size_bytes() == volume.device_size == (32 if committed else 16) * MIB
        assert not volume.suspended and not volume.loaded
        if where in ("loaded", "suspended", "committed"):
            # The table that was loaded is dropped before anything goes on: its extents may be another's.
            assert [words[1] for words in machine.used("dmsetup")] == ["clear"] + ["resume"] * (where != "loaded")
        assert len(machine.used("lvextend")) == 1


def test_a_size_is_not_believed_while_the_step_that_made_it_runs(machine: Machine, name: str) -> None:
    """The device may show it before the commit, of which a dead command takes it back."""
    volume = there(machine, name)
    seen: list[int] = []
    with storage_of(name) as storage:

        def slowly() -> tuple[int, str, str]:
            volume.loaded = 32 * MIB
            machine.resume(volume)
            seen.extend((volume.device_size, storage.size_bytes()))
            machine.commit(volume, 32 * MIB)
            return 0, "", "  Loading table for x (7:0).\n  Suspending x (7:0) with device flush\n"

        instead_of_lvextend(machine, slowly)
        storage.grow_to(32 * MIB)
        assert seen == [32 * MIB, 16 * MIB] and storage.size_bytes() == 32 * MIB


def test_a_command_that_dies_while_ours_waits_for_the_lock(machine: Machine, name: str) -> None:
    """Ours ends well, and has put the dead one's table to use."""
    volume = there(machine, name)
    real = machine._lvextend

    def dies_first() -> tuple[int, str, str]:
        volume.loaded = 60 * MIB
        return real(["--size", f"{32 * MIB}b", name])

    instead_of_lvextend(machine, dies_first)
    with storage_of(name) as storage:
        storage.grow_to(32 * MIB)
        assert storage.size_bytes() == volume.device_size == volume.size == 32 * MIB


def test_a_living_command_is_not_disturbed(machine: Machine, name: str) -> None:
    """It has begun after `lvs` had the lock, which saw the device at rest."""
    volume = there(machine, name)
    with storage_of(name) as storage:
        machine.commit(volume, 32 * MIB)

        def begins(words: list[str]) -> None:
            if words[0] == "lvs":
                machine.after = lambda words: None
                volume.suspended, volume.loaded = True, 48 * MIB

        def goes_on(words: list[str]) -> None:
            if words[0] == "lvchange":  # which has waited for the lock
                machine.before = lambda words: None
                machine.commit(volume, 48 * MIB)
                machine.resume(volume)

        machine.after, machine.before = begins, goes_on
        storage._settle()
        assert machine.used("dmsetup") == [] and storage.size_bytes() == 48 * MIB


def test_a_dead_ones_table_of_the_very_size_is_not_believed(machine: Machine, name: str) -> None:
    """The size is right and the extents are another's: lvm does not say that it loaded a table, and the device is refreshed."""
    volume = there(machine, name)
    real = machine._lvextend

    def dies_first() -> tuple[int, str, str]:
        volume.loaded = 32 * MIB
        return real(["--size", f"{32 * MIB}b", name])

    instead_of_lvextend(machine, dies_first)
    with storage_of(name) as storage:
        machine.commands.clear()
        storage.grow_to(32 * MIB)
        assert refreshed(machine, name)
        assert storage.size_bytes() == volume.size == 32 * MIB


def test_a_volume_that_was_renamed_grows_under_its_new_name(machine: Machine, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not the stranger that has its old one."""
    group, _, lv = name.partition("/")
    volume = there(machine, name)
    with storage_of(name) as storage:
        machine.groups[group].volumes["new"] = machine.groups[group].volumes.pop(lv)
        machine.run(["lvcreate", "--size", f"{4 * MIB}b", "--name", f"{lv}-other", group], 1.0)
        machine.groups[group].volumes[lv] = machine.groups[group].volumes.pop(f"{lv}-other")
        monkeypatch.setattr("fvd.lvm.dm.logical_volume_of", lambda number: (group, "new") if number == volume.number else None)
        storage.grow_to(32 * MIB)
        assert storage.size_bytes() == volume.size == 32 * MIB
        assert machine.groups[group].volumes[lv].size == 4 * MIB
        run("losetup", "--detach", str(machine.groups[group].volumes[lv].device))
        machine.groups[group].volumes[f"{lv}-other"] = machine.groups[group].volumes.pop(lv)
        machine.groups[group].volumes[f"{lv}-other"].device = None
        machine.groups[group].volumes[lv] = machine.groups[group].volumes.pop("new")
        Path(f"/dev/{name}-other").unlink()


@pytest.mark.parametrize("suspended", [False, True])
def test_no_step_begins_over_what_a_dead_command_left(machine: Machine, name: str, suspended: bool) -> None:
    """Somebody's lvextend has died on the open disk: ours would put its table to use, and call it a success."""
    volume = there(machine, name)
    with storage_of(name) as storage:
        assert storage.size_bytes() == 16 * MIB
        volume.loaded, volume.suspended = 60 * MIB, suspended
        machine.commands.clear()
        storage.grow_to(32 * MIB)
        assert storage.size_bytes() == volume.device_size == volume.size == 32 * MIB
        assert next(words[:2] for words in machine.commands if words[0] in ("dmsetup", "lvextend")) == ["dmsetup", "clear"]


def test_a_size_that_is_not_committed_is_not_believed(machine: Machine, name: str) -> None:
    """Somebody has resumed the device with the table of a step that died before its commit: those extents are not ours."""
    volume = there(machine, name)
    with storage_of(name) as storage:
        volume.loaded = 40 * MIB
        machine.resume(volume)
        assert storage._device.size_bytes() == 40 * MIB
        assert storage.size_bytes() == volume.device_size == 16 * MIB
        machine.commit(volume, 48 * MIB)
        machine.refresh(volume)  # an honest lvextend by hand
        assert storage.size_bytes() == 48 * MIB


def test_a_device_that_stands_still_is_mended_for_as_long_as_it_takes(machine: Machine, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command that would tell does not get the group's lock, several times."""
    monkeypatch.setattr("fvd.storage.lvm_storage.MEND_SECONDS", 0.01)
    volume = there(machine, name)
    busy = iter(range(4))

    def end() -> tuple[int, str, str]:
        volume.loaded, volume.suspended = 32 * MIB, True
        machine.before = lambda words: fail() if words[0] == "lvs" and next(busy, None) is not None else None
        return -9, "", ""

    def fail() -> None:
        raise Unfinished("lvs did not end within 60 s and was killed")

    instead_of_lvextend(machine, end)
    with storage_of(name) as storage:
        with pytest.raises(DeviceError, match="killed by signal 9"):
            storage.grow_to(32 * MIB)
        assert not volume.suspended and storage.size_bytes() == volume.device_size == 16 * MIB


def test_success_that_changed_nothing_is_mended(machine: Machine, name: str) -> None:
    volume = there(machine, name)

    def pretend() -> tuple[int, str, str]:
        machine.commit(volume, 32 * MIB)
        return 0, "", ""

    instead_of_lvextend(machine, pretend)
    with storage_of(name) as storage:
        storage.grow_to(32 * MIB)
        assert storage.size_bytes() == 32 * MIB


def test_metadata_that_is_ahead_of_the_device(machine: Machine, name: str) -> None:
    """An earlier step was killed between its commit and the device: lvm says that there is nothing to do."""
    with storage_of(name) as storage:
        machine.commit(there(machine, name), 32 * MIB)
        storage.grow_to(32 * MIB)
        assert storage.size_bytes() == 32 * MIB
        assert refreshed(machine, name)


@pytest.mark.parametrize("committed", [False, True])
@pytest.mark.parametrize("left", ["nothing", "loaded", "suspended", "used"])
def test_attaching_mends_what_a_dead_process_left(machine: Machine, name: str, committed: bool, left: str) -> None:
    machine.activate(name, there(machine, name))
    volume = there(machine, name)
    if committed:
        machine.commit(volume, 32 * MIB)
    if left != "nothing":
        volume.loaded = 60 * MIB
        volume.suspended = left == "suspended"
    if left == "used":
        machine.resume(volume)
    machine.commands.clear()
    assert look(name).storage_size_bytes == (32 if committed else 16) * MIB
    assert not volume.suspended and not volume.loaded
    assert [words[1] for words in machine.used("dmsetup")] == {"loaded": ["clear"], "suspended": ["clear", "resume"]}.get(left, [])
    # Also where nothing seems wrong: a dead command's table may be in use, of the right size even.
    assert refreshed(machine, name)


def test_what_somebody_else_uses_is_not_refreshed(machine: Machine, name: str) -> None:
    with storage_of(name):
        machine.commands.clear()
        look(name)
        assert not refreshed(machine, name)


def test_a_device_that_a_living_command_has_in_hand_is_left_alone(machine: Machine, name: str) -> None:
    """`lvs` has waited for the group's lock: the command that held the device still has ended meanwhile."""
    with storage_of(name):
        volume = there(machine, name)
        volume.suspended, volume.loaded = True, 32 * MIB
        looks = []

        def ends(words: list[str]) -> None:
            looks.append(words)
            if len(looks) == 2:  # the first look tells the tags, the second whether the state was abandoned
                machine.commit(volume, 32 * MIB)
                machine.resume(volume)

        machine.before = ends
        look(name)
        assert machine.used("dmsetup") == [] and volume.device_size == 32 * MIB


def test_writes_wait_for_a_full_group_and_go_on_when_it_grows(machine: Machine, name: str) -> None:
    volume = parse_name(name)
    machine.groups[volume.group].size = 20 * MIB
    events: list[str] = []
    with drive(open_volume(name, on_full="wait", on_event=lambda event: events.append(event.kind))) as driver:
        assert driver.volume.allocator is not None

        def ensure_size() -> None:
            # A write may also wait for a step that has space.
            while "group_full" not in events or not driver.call(lambda: driver.volume.engine.waiting_writes):
                time.sleep(0.01)
            machine.groups[volume.group].size = 128 * MIB
            assert driver.volume.allocator is not None
            driver.volume.allocator.on_space_freed()

        thread = threading.Thread(target=ensure_size)
        thread.start()
        for chunk in range(40):
            driver.pwrite(chunk * MIB, bytes([chunk]) * 4096)
        thread.join()
        assert {"group_full", "extend_failed", "extend_done"} <= set(events)
        assert driver.volume.engine.statistics()["waited_for_space"]
        assert all(driver.pread(chunk * MIB, 4096) == bytes([chunk]) * 4096 for chunk in range(40))


def test_a_crash_of_lvm_itself_is_tried_again(machine: Machine, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fvd.lvm.commands.RETRY_SECONDS", 0.0)
    crashes = iter([139, -11])
    real = machine.run

    def crashing(words: list[str], timeout_seconds: float) -> Finished:
        if words[0] == "lvs" and (code := next(crashes, 0)):
            return Finished(tuple(words), code, "", "", 0.0)
        return real(words, timeout_seconds)

    monkeypatch.setattr("fvd.lvm.runner.run_command", crashing)
    assert look(name).storage_size_bytes == 16 * MIB


def test_a_volume_made_anew_under_the_name_is_not_removed_for_the_old_one(machine: Machine, name: str) -> None:
    group, _, lv = name.partition("/")

    def swap(words: list[str]) -> None:
        if words[0] == "lvremove":
            machine.before = lambda words: None
            old = machine.groups[group].volumes.pop(lv)
            run("losetup", "--detach", str(old.device))
            Path(f"/dev/{name}").unlink()
            machine.run(["lvcreate", "--size", "4194304b", "--name", lv, group], 1.0)

    machine.before = swap
    remove(name)
    assert machine.volume(name) is not None
