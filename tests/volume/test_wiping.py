# SPDX-License-Identifier: Apache-2.0
"""remove --wipe: nothing of a disk is left in what is given back, whatever interrupts it. LVM is simulated at its last call."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from loops import loop_device, sparse
from lvm_machine import Killed, Machine

from disks import MIB, SMALL, driven, make, volume
from fvd.device import wiping
from fvd.device.node import Node, open_node
from fvd.disk._disk_thread import drive
from fvd.disk.opening import open_volume
from fvd.disk.provision import provision
from fvd.disk.removing import remove
from fvd.errors import DeviceError, NotFound
from fvd.format.superblock import SLOT_OFFSETS_BYTES
from fvd.storage import lvm_provider
from fvd.volume.name import parse_name
from fvd.volume.superblocks import wipe_superblocks

SECRET = b"a tenant's secret " * 14563  # 256 KiB, and some


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wiping, "PIECE_BYTES", 8 * MIB)
    monkeypatch.setattr(wiping, "LOOK_BYTES", MIB)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "disk.img"


def fill(path: Path | str) -> None:
    make(path)
    with driven(path) as driver:
        for at in (0, 5, 23, 40):
            driver.pwrite(at * MIB, SECRET)


def is_zero(data: bytes) -> bool:
    return data == bytes(len(data))


class Stopped(BaseException):
    """A kill."""


def stop_at(number: int) -> wiping.Progress:
    calls = iter(range(number))

    def progress(done: int, total: int) -> None:
        assert 0 < done <= total
        if next(calls, None) is None:
            raise Stopped

    return progress


# --- Files and devices -----------------------------------------------------------------------------------------------------------


def test_what_a_file_held_is_zeros_and_its_holes_stay(path: Path) -> None:
    for wipe in (False, True):
        fill(path)
        with path.open("r+b") as other:  # what a file system would keep of it
            other.truncate(path.stat().st_size + 1000)
            blocks = os.fstat(other.fileno()).st_blocks
            assert remove(volume(path), wipe=wipe) and not path.exists()
            data = other.read()
            assert (SECRET in data) != wipe and is_zero(data) == wipe
            assert os.fstat(other.fileno()).st_blocks <= blocks


def test_a_file_is_written_to_and_not_only_given_back(path: Path) -> None:
    """What a file system only notes as zeros, the medium keeps."""
    fill(path)
    with path.open("rb") as other:
        remove(volume(path), wipe=True)
        assert os.lseek(other.fileno(), 0, os.SEEK_DATA) == 0
        assert os.fstat(other.fileno()).st_blocks * 512 >= 4 * len(SECRET)


def test_what_a_device_held_is_zeros(path: Path) -> None:
    with loop_device(sparse(path, 40 * MIB)) as device:
        fill(device)
        assert remove(device)
        assert SECRET in path.read_bytes()
        assert remove(device, wipe=True), "removed before, and not wiped"
        assert is_zero(path.read_bytes())
        assert not remove(device, wipe=True)


def test_a_wipe_that_is_stopped_anywhere_goes_on(path: Path) -> None:
    """In between it is no disk any more, and still known for what is left of one."""
    stopped, number = 0, 0
    with loop_device(sparse(path, 40 * MIB)) as device:
        while stopped == number:
            fill(device)
            try:
                remove(device, wipe=True, progress=stop_at(number))
            except Stopped:
                stopped += 1
                with pytest.raises(NotFound):
                    open_volume(device)
                assert is_zero(path.read_bytes()) or remove(device, wipe=True)
            assert is_zero(path.read_bytes())
            number += 1
    assert stopped > 3


def test_what_is_zero_already_is_only_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    zero = Node.zero
    monkeypatch.setattr(Node, "zero", lambda node, at, length: (written.append(length), zero(node, at, length)))
    with loop_device(sparse(path, 40 * MIB)) as device:
        fill(device)
        with pytest.raises(Stopped):
            remove(device, wipe=True, progress=stop_at(4))
        before = sum(written)
        written.clear()
        assert remove(device, wipe=True)
        assert 0 < sum(written) < before


def test_storage_that_keeps_what_it_had_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with loop_device(sparse(path, 40 * MIB)) as device:
        fill(device)
        monkeypatch.setattr(Node, "zero", lambda *_: None)
        with pytest.raises(DeviceError, match=r"still has something at byte \d+ after it was wiped"):
            remove(device, wipe=True)
    fill(path.with_name("file"))
    pwrite = Node.pwrite
    monkeypatch.setattr(Node, "pwrite", lambda node, at, data: None if at > 3 * MIB else pwrite(node, at, data))
    with pytest.raises(DeviceError, match="still has something"):
        remove(volume(path.with_name("file")), wipe=True)
    assert path.with_name("file").exists()


def test_a_damaged_disk_is_wiped_too(path: Path) -> None:
    fill(path)
    with path.open("r+b", buffering=0) as file:
        for offset in SLOT_OFFSETS_BYTES:
            os.pwrite(file.fileno(), b"rot", offset + 200)
        assert remove(volume(path), wipe=True)
        assert is_zero(file.read())


# --- Logical volumes ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def name(machine: Machine) -> str:
    return f"{machine.add_group(1024 * MIB)}/vm1"


def fill_volume(name: str) -> None:
    provision(name, **SMALL)
    with drive(open_volume(name)) as driver:
        for at in (0, 5, 23):
            driver.pwrite(at * MIB, SECRET)


def given_back(machine: Machine) -> bytes:
    assert machine.stale is not None
    return machine.stale.read_bytes()


def test_without_it_the_next_tenant_has_it(machine: Machine, name: str) -> None:
    fill_volume(name)
    remove(name)
    assert SECRET in given_back(machine)


@pytest.mark.parametrize("how", ["asked", "volume", "group"])
def test_wiped_before_the_group_has_it(machine: Machine, name: str, how: str) -> None:
    fill_volume(name)
    found = machine.volume(name)
    assert found is not None
    {"asked": set(), "volume": found.tags, "group": machine.groups[name.partition("/")[0]].tags}[how].add("fvd.wipe")
    assert remove(name, wipe=how == "asked")
    assert is_zero(given_back(machine)) and machine.volume(name) is None
    assert not remove(name, wipe=True)


@pytest.mark.pure
@pytest.mark.parametrize("again", ["remove", "provision"])
def test_a_wipe_that_dies_at_any_command_is_not_forgotten(machine: Machine, name: str, again: str) -> None:
    """Whoever comes next has not been told of it: `remove` without --wipe, or a provision, and then a remove."""
    states, number, died = set(), 0, True
    while died:
        number += 1
        for when in ("before", "after"):
            machine.stale = None
            fill_volume(name)
            machine.kill_at(number, when)
            try:
                remove(name, wipe=True)
                died = False
            except Killed:
                died = True
            machine.revive()
            found = machine.volume(name)
            states.add(None if found is None else frozenset(found.tags & {"fvd.disk", "fvd.unfinished", "fvd.wipe"}))
            whole = found is not None and found.tags >= {"fvd.disk"} and "fvd.wipe" not in found.tags
            if again == "provision" and not whole:
                provision(name, **SMALL)
            remove(name, wipe=whole)
            assert machine.volume(name) is None and SECRET not in given_back(machine), (number, when)
    assert states == {None, frozenset({"fvd.disk"}), frozenset({"fvd.disk", "fvd.wipe"}), frozenset({"fvd.unfinished"})}


@pytest.mark.pure
@pytest.mark.parametrize("again", ["remove", "provision"])
def test_a_wipe_that_dies_between_two_pieces_is_not_forgotten(machine: Machine, name: str, again: str) -> None:
    for number in (0, 1, 2):
        fill_volume(name)
        with pytest.raises(Stopped):
            remove(name, wipe=True, progress=stop_at(number))
        with pytest.raises(NotFound):
            open_volume(name)
        if again == "provision":
            provision(name, **SMALL)
        assert remove(name)
        assert is_zero(given_back(machine))


def test_what_was_never_wiped_is_so_before_a_provision_gives_it_back(machine: Machine, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Removed by halves without a wipe; then the group says that there is to be one."""
    group = machine.groups[name.partition("/")[0]]
    seen: list[bytes] = []
    lvremove = machine._lvremove

    def watched(words: list[str]) -> Any:
        done = lvremove(words)
        seen.append(given_back(machine))
        return done

    monkeypatch.setattr(machine, "_lvremove", watched)
    for verb in ("provision", "remove"):
        fill_volume(name)
        with monkeypatch.context() as patch:
            patch.setattr(lvm_provider.AttachedVolume, "reclaim", lambda _: None)
            remove(name)
        group.tags.add("fvd.wipe")
        assert not seen
        if verb == "provision":
            provision(name, **SMALL)
        else:
            remove(name)
        assert seen and is_zero(seen[0])
        group.tags.clear()
        if verb == "provision":
            remove(name)
        seen.clear()


def test_a_provision_that_fails_over_what_is_to_be_wiped_leaves_it(
    machine: Machine, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from fvd.disk import provision as module

    fill_volume(name)
    with pytest.raises(Stopped):
        remove(name, wipe=True, progress=stop_at(2))
    found = machine.volume(name)
    assert found is not None
    found.tags = {"fvd.unfinished", "fvd.wipe"}
    machine.activate(name, found)  # by hand, so that it is not made anew

    def fail(*_: object, **__: object) -> None:
        raise DeviceError("as the test wished")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_disk", fail)
        with pytest.raises(DeviceError, match="wished"):
            provision(name, **SMALL)
    assert machine.volume(name) is found and "must be wiped first" in caplog.text
    remove(name)
    assert is_zero(given_back(machine)) and machine.volume(name) is None


def test_half_removed_before_is_wiped_when_asked(machine: Machine, name: str) -> None:
    fill_volume(name)
    with lvm_provider.LvmProvider().attach(parse_name(name)) as place, open_node(place.path) as node:
        wipe_superblocks(node)
    assert remove(name, wipe=True)
    assert is_zero(given_back(machine))
