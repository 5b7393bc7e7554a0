# SPDX-License-Identifier: Apache-2.0
"""A disk whose storage is shrunk or remapped stops (R39): nothing is answered, read or written any more. Its own steps are no reason."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import nbd
import pytest
from loops import loop_device, run
from lvm_machine import Machine, Volume

import fvd
from disks import MIB, SMALL, make, start
from fvd.disk._disk_thread import DiskThread, drive
from fvd.disk.opening import OpenVolume, open_volume
from fvd.disk.provision import provision
from fvd.errors import DeviceError
from fvd.lvm import dm
from fvd.lvm.placement import Placement
from fvd.storage.policy import GrowthEvent
from fvd.storage.sized import Ends

SECTOR = 512


@pytest.fixture
def name(machine: Machine) -> str:
    name = f"{machine.add_group(64 * MIB)}/vm1"
    provision(name, **SMALL)
    return name


def there(machine: Machine, name: str) -> Volume:
    found = machine.volume(name)
    assert found is not None
    return found


def content(volume: Volume) -> str:
    return hashlib.sha256(volume.backing.read_bytes()).hexdigest()


def not_driven(name: str, events: list[GrowthEvent], stopped: threading.Event, **options: object) -> OpenVolume:
    def tell(event: object) -> None:
        assert isinstance(event, GrowthEvent)
        events.append(event)
        if event.kind == "storage_error":
            stopped.set()

    return open_volume(name, on_event=tell, **options)  # type: ignore[arg-type]


def opened(name: str, events: list[GrowthEvent], stopped: threading.Event, **options: object) -> DiskThread:
    return drive(not_driven(name, events, stopped, **options))


def check_stopped(driver: DiskThread, why: str) -> None:
    for call in (lambda: driver.pread(0, 4096), lambda: driver.pwrite(0, b"x"), driver.flush, lambda: driver.trim(0, MIB)):
        with pytest.raises(DeviceError, match=f"{why}.*The disk has stopped"):
            call()


@pytest.mark.parametrize("read_only", [False, True])
def test_a_volume_that_is_shrunk(machine: Machine, name: str, read_only: bool) -> None:
    """lvreduce: told by the kernel, and not a byte of the volume is changed from then on, by the close neither."""
    with drive(open_volume(name)) as driver:
        driver.pwrite(0, b"guest" * 1000)
    events: list[GrowthEvent] = []
    stopped = threading.Event()
    driver = opened(name, events, stopped, read_only=read_only)
    volume = there(machine, name)
    if not read_only:
        driver.pwrite(MIB, b"pending")
    machine.shrink(volume, 8 * MIB)
    assert stopped.wait(10), "nobody has told"
    before = content(volume)
    check_stopped(driver, "vm1 has been changed by somebody else.*it has 8.0 MiB, and had 16.0 MiB")
    assert [event.kind for event in events if event.kind == "storage_error"] == ["storage_error"]
    with pytest.raises(DeviceError, match="The disk has stopped"):
        driver.close()
    assert content(volume) == before


def test_what_is_seen_before_anybody_drives_the_disk_stops_it_then(machine: Machine, name: str) -> None:
    events: list[GrowthEvent] = []
    stopped = threading.Event()
    disk = not_driven(name, events, stopped)
    machine.shrink(there(machine, name), 8 * MIB)
    assert disk.holding is not None
    disk.holding.look()
    assert events == [] and not disk.stopped
    driver = drive(disk)
    assert stopped.wait(10), "nobody has told"
    check_stopped(driver, "it has 8.0 MiB, and had 16.0 MiB")
    with pytest.raises(DeviceError, match="The disk has stopped"):
        driver.close()


def test_also_when_it_has_its_size_again(machine: Machine, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """lvreduce, another's lvcreate, lvextend: only the table shows it, and nobody but the next step has looked meanwhile."""
    volume = there(machine, name)
    extents = [dm.Target(0, 16 * MIB // SECTOR, "linear", "8:0 2048")]
    monkeypatch.setattr(dm, "table", lambda number: tuple(extents) if volume.device and number == volume.number else None)
    events: list[GrowthEvent] = []
    stopped = threading.Event()
    driver = opened(name, events, stopped)
    extents[:] = [
        dm.Target(0, 8 * MIB // SECTOR, "linear", "8:0 2048"),
        dm.Target(8 * MIB // SECTOR, 8 * MIB // SECTOR, "linear", "8:0 999424"),
    ]
    assert driver.volume.allocator is not None
    machine.commands.clear()
    driver.volume.allocator.extend_now().exception(20)
    assert stopped.wait(10) and machine.used("lvextend") == [], "it has been grown though it is another's"
    check_stopped(driver, "bytes 8388608 to 16777216 of it lie elsewhere")
    with pytest.raises(DeviceError):
        driver.close()


def test_steps_of_its_own_are_no_reason(machine: Machine, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger; smaller, where the table of a dead command was in use; and the same again."""
    volume = there(machine, name)
    monkeypatch.setattr(
        dm,
        "table",
        lambda number: (
            (dm.Target(0, volume.device_size // SECTOR, "linear", "8:0 2048"),) if volume.device and number == volume.number else None
        ),
    )
    events: list[GrowthEvent] = []
    stopped = threading.Event()
    with opened(name, events, stopped) as driver:
        allocator = driver.volume.allocator
        assert allocator is not None and driver.volume.holding is not None
        assert allocator.extend_now().result(20) == 32 * MIB
        volume.loaded = 60 * MIB
        machine.resume(volume)  # a dead command's table
        driver.volume.holding.look()
        allocator.poke()
        assert allocator.extend_now().result(20) == 48 * MIB and volume.device_size == 48 * MIB
        machine.refresh(volume)
        driver.volume.holding.look()
        driver.pwrite(0, b"x")
        assert not stopped.is_set() and not driver.volume.stopped


# --- Where it lies -----------------------------------------------------------------------------------------------------------------


class Tables:
    """Device-mapper's, in a dict."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tables: dict[int, tuple[dm.Target, ...]] = {}
        self.moving: set[int] = set()
        monkeypatch.setattr(dm, "table", self.tables.get)
        monkeypatch.setattr(dm, "is_being_moved", self.moving.__contains__)

    def load(self, *lines: tuple[int, int, str, str], number: int = os.makedev(253, 0)) -> None:
        self.tables[number] = tuple(dm.Target(*line) for line in lines)


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Tables:
    found = Tables(monkeypatch)
    found.load((0, 100, "linear", "8:0 2048"))
    return found


def followed(tables: Tables) -> Placement:
    placement = Placement(os.makedev(253, 0))
    assert placement.follow(100 * SECTOR) is None
    return placement


GOOD = {
    "the same": [(0, 100, "linear", "8:0 2048")],
    "longer": [(0, 300, "linear", "8:0 2048")],
    "in two lines": [(0, 40, "linear", "8:0 2048"), (40, 60, "linear", "8:0 2088"), (100, 9, "linear", "8:16 0")],
}
BAD = {
    "shorter": ([(0, 99, "linear", "8:0 2048")], "it ends at 50688 bytes"),
    "elsewhere": ([(0, 100, "linear", "8:0 2049")], "bytes 0 to 51200"),
    "on another device": ([(0, 100, "linear", "8:16 2048")], "bytes 0 to 51200"),
    "a part elsewhere": ([(0, 40, "linear", "8:0 2048"), (40, 60, "linear", "8:0 9000")], "bytes 20480 to 51200"),
    "errors": ([(0, 100, "error", "")], "bytes 0 to 51200"),
    "a gap": ([], "it ends at 0 bytes"),
}


@pytest.mark.parametrize("lines", GOOD.values(), ids=GOOD)
def test_the_same_place(tables: Tables, lines: list[tuple[int, int, str, str]]) -> None:
    placement = followed(tables)
    tables.load(*lines)
    assert placement.follow(100 * SECTOR) is None


@pytest.mark.parametrize(("lines", "why"), BAD.values(), ids=BAD)
def test_another_place(tables: Tables, lines: list[tuple[int, int, str, str]], why: str) -> None:
    placement = followed(tables)
    tables.load(*lines)
    assert why in (placement.follow(100 * SECTOR) or "")
    tables.load((0, 100, "linear", "8:0 2048"))
    assert placement.follow(100 * SECTOR) is None, "what was not as it was remembered has been remembered"


def test_only_what_is_held_counts(tables: Tables) -> None:
    """Beyond it there may be the table of a dead command."""
    placement = Placement(os.makedev(253, 0))
    assert placement.follow(50 * SECTOR) is None
    tables.load((0, 50, "linear", "8:0 2048"), (50, 50, "linear", "8:0 7"))
    assert placement.follow(50 * SECTOR) is None and placement.follow(100 * SECTOR) is None
    tables.load((0, 50, "linear", "8:0 2048"), (50, 50, "linear", "8:0 8"))
    assert placement.follow(50 * SECTOR) is not None


def test_a_pvmove(tables: Tables) -> None:
    """What goes through lvm's own device for moves may come out elsewhere, and no more than that."""
    placement = followed(tables)
    tables.moving.add(os.makedev(253, 7))
    tables.load((0, 40, "linear", "8:0 2048"), (40, 60, "linear", "253:7 0"))
    assert placement.follow(100 * SECTOR) is None
    tables.load((0, 40, "linear", "8:0 2048"), (40, 60, "linear", "8:16 2048"))
    assert placement.follow(100 * SECTOR) is None
    tables.load((0, 40, "linear", "8:16 3000"), (40, 60, "linear", "8:16 2048"))
    assert placement.follow(100 * SECTOR) is not None


def test_a_snapshot_of_it(tables: Tables) -> None:
    placement = followed(tables)
    tables.load((0, 100, "linear", "8:0 2048"), number=os.makedev(253, 8))
    tables.load((0, 100, "snapshot-origin", "253:8"))
    assert placement.follow(100 * SECTOR) is None
    tables.load((0, 100, "linear", "8:0 4096"), number=os.makedev(253, 8))
    assert placement.follow(100 * SECTOR) is not None


def test_stripes(tables: Tables) -> None:
    tables.load((0, 100, "striped", "2 128 8:0 2048 8:16 2048"))
    placement = followed(tables)
    tables.load((0, 200, "striped", "2 128 8:0 2048 8:16 2048"))
    assert placement.follow(200 * SECTOR) is None
    tables.load((0, 200, "striped", "2 128 8:0 2048 8:16 4096"))
    assert placement.follow(100 * SECTOR) is not None


# --- Storage of other kinds --------------------------------------------------------------------------------------------------------


def test_a_device_that_is_made_smaller(tmp_path: Path) -> None:
    """Served: its clients are disconnected before it is told, and no one is let in again."""
    image = tmp_path / "image"
    with image.open("xb") as file:
        file.truncate(64 * MIB)
    with loop_device(image) as device:
        fvd.provision(device, "64M", journal_size="64K")
        told = threading.Event()
        seen: list[fvd.Event] = []

        def tell(event: fvd.Event) -> None:
            if event.kind == "storage_error":
                seen.append(event)
                told.set()

        served = fvd.serve(device, socket=tmp_path / "s", on_event=tell)
        client = nbd.NBD()
        client.connect_uri(served.uri)
        client.pwrite(b"x" * 4096, 0)
        os.truncate(image, 8 * MIB)
        run("losetup", "--set-capacity", device)
        assert told.wait(10)
        with pytest.raises(nbd.Error):
            client.pread(4096, 0)
        with pytest.raises(nbd.Error):
            nbd.NBD().connect_uri(served.uri)
        assert "made smaller by somebody else" in served.info().stopped and served.info().failed
        [error] = [line for line in fvd.check(device).errors if "stopped" in line]
        assert error == seen[0].message == served.info().stopped
        with pytest.raises(fvd.DeviceError, match="made smaller"):
            served.close()


def test_a_file_that_is_cut_off(tmp_path: Path) -> None:
    """Nobody tells of a file: it is seen at the next step."""
    path = tmp_path / "disk.img"
    make(path)
    driver = start(path)
    os.truncate(path, 4 * MIB)
    assert driver.volume.allocator is not None
    driver.volume.allocator.extend_now().exception(20)
    check_stopped(driver, "made smaller by somebody else")
    with pytest.raises(DeviceError):
        driver.close()
    assert path.stat().st_size == 4 * MIB, "it has been made longer all the same"


# --- Sizes that were read a moment ago ---------------------------------------------------------------------------------------------


def test_a_size_read_before_a_step_of_its_own_ended_is_no_reason(machine: Machine, name: str) -> None:
    """Whoever looks at the device may be overtaken by a step between reading its size and comparing it."""
    with drive(open_volume(name)) as driver:
        allocator = driver.volume.allocator
        assert allocator is not None
        storage = allocator.storage
        before = storage.size_bytes()
        assert allocator.extend_now().result(20) > before
        storage._follow(before)  # type: ignore[attr-defined]
        driver.pwrite(0, bytes(4096))
        assert not driver.volume.stopped


def test_the_same_of_what_has_nothing_but_a_size() -> None:
    told: list[str] = []
    size = [16]
    ends = Ends(lambda: size[0], "it")
    ends.hold(16, 100, told.append)
    size[0] = 32
    ends.seen(32)
    ends.seen(16)
    assert told == []
    size[0] = 16
    ends.seen(16)
    assert len(told) == 1 and "made smaller" in told[0]
