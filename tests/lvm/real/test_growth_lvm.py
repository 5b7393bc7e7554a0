# SPDX-License-Identifier: Apache-2.0
"""Growth of real logical volumes: steps under verified load, a full group, lvextend killed half-way, storage added by hand, no udev."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbd
import numpy as np
import pytest
from real_devices import GIB, KIB, MIB, SECTOR, Group, Pool, linear, load_module, mapped, run, settle, size_bytes, volume_group

import fvd
from fvd.lvm import dm, runner
from fvd.lvm.commands import Lvm

SMALL: dict[str, Any] = {"journal_size": "1M", "grow_step": "64M"}


def content(chunk: int, length: int = 64 * KIB) -> bytes:
    return np.random.default_rng(chunk).bytes(length)


def suspended(number: int) -> bool:
    state = dm.state(number)
    assert state is not None
    return state.suspended


def wait_for(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """Every command that leaves this process, and how long it took."""
    seen: list[tuple[str, float]] = []
    real = runner.run_command

    def record(words: list[str], timeout_seconds: float) -> runner.Finished:
        done = real(words, timeout_seconds)
        seen.append((words[0], done.seconds))
        return done

    monkeypatch.setattr(runner, "run_command", record)
    return seen


def test_five_default_steps_under_a_verified_load(make_group: Callable[..., Group], commands: list[tuple[str, float]]) -> None:
    """100 GiB in steps of 5: every MiB of 26 GiB gets a block, so the volume grows five times and more; all is read back, twice."""
    # Space for the largest step, of eight: one that is refused is looked into, by an lvs, and made smaller.
    group = make_group(size=60 * GIB, disks=2)
    volume = f"{group.name}/vm1"
    fvd.provision(volume, "100G")
    chunks = list(np.random.default_rng(1).permutation(100 * 1024)[: 26 * 1024])
    events: list[fvd.Event] = []
    with fvd.open(volume, on_event=events.append) as disk:
        commands.clear()
        for number, chunk in enumerate(chunks):
            disk.pwrite(int(chunk) * MIB, int(chunk).to_bytes(8, "little") * 512)
            if number % 1000 == 999:
                disk.flush()
        size = disk.info().storage_size
        during = [name for name, _ in commands if name != "vgs"]
    steps = [event for event in events if event.kind == "extend_done"]
    # A fast load asks for several at once.
    assert size >= 30 * GIB and len(steps) >= 2 and all(event.suspend_seconds is not None for event in steps)
    assert set(during) == {"lvextend"} and len(during) in (len(steps), len(steps) + 1)  # one may be under way
    print(
        f"steps: {[round(event.seconds, 2) for event in steps]} s; suspended: {[round(event.suspend_seconds or 0, 4) for event in steps]} s"
    )
    with fvd.open(volume, read_only=True) as disk:
        for chunk in chunks:
            assert disk.pread(int(chunk) * MIB, 4096) == int(chunk).to_bytes(8, "little") * 512
    assert fvd.check(volume).errors == []


def test_the_time_of_suspension_is_measured(pool: Pool, make_group: Callable[..., Group]) -> None:
    """A physical volume that takes 60 ms for a write: between suspend and resume lvm writes its metadata there."""
    with pool.disk() as device, mapped(delayed(device, 60)) as slow, volume_group(slow.path) as group:
        fvd.provision(f"{group.name}/vm1", "1G", **SMALL)
        events: list[fvd.Event] = []
        with fvd.open(f"{group.name}/vm1", on_event=events.append) as disk:
            disk.extend()
            growth = disk.info().growth
            wait_for(lambda: [event for event in events if event.kind == "extend_done"])
        [done] = [event for event in events if event.kind == "extend_done"]
        assert done.suspend_seconds is not None and 0.05 < done.suspend_seconds < done.seconds
        assert growth is not None and growth["longest_suspend_seconds"] == pytest.approx(done.suspend_seconds)


def test_the_gauge_is_right(group: Group) -> None:
    run("lvcreate", "--yes", "-L", "64M", "-n", "lv", group.name)
    number = dm.number_of(group.path("lv"))
    name = dm.device_name(number)
    with dm.SuspendGauge(number) as gauge:
        run("dmsetup", "suspend", name)
        begun = time.monotonic()
        assert suspended(number)
        time.sleep(0.3)
        least = time.monotonic() - begun
        run("dmsetup", "resume", name)
        most = time.monotonic() - begun + 0.1
    assert gauge.seconds is not None and least - 0.02 <= gauge.seconds <= most
    with dm.SuspendGauge(number) as gauge:
        time.sleep(0.05)
    assert gauge.seconds == 0.0


def test_a_full_group_and_vgextend(make_group: Callable[..., Group], spare_device: str) -> None:
    """Writes wait, overwrites, reads and flushes go on; after vgextend udev tells, and the writes go on by themselves."""
    group = make_group(size=200 * MIB)
    volume = f"{group.name}/vm1"
    fvd.provision(volume, "1G", **SMALL)
    events: list[fvd.Event] = []
    with fvd.open(volume, on_full="wait", on_event=events.append) as disk:
        written: list[int] = []

        def write() -> None:
            for chunk in range(400):
                disk.pwrite(chunk * MIB, content(chunk))
                written.append(chunk)

        thread = threading.Thread(target=write)
        thread.start()
        wait_for(lambda: disk.info().waiting_writes)
        # Long enough for the rests between retries to be many seconds: what ends the wait below is not a retry.
        wait_for(lambda: len([event for event in events if event.kind == "group_full"]) == 1)
        time.sleep(8)
        stuck = len(written)
        assert group.free_bytes() == 0
        disk.pwrite(0, content(0))
        disk.flush()
        assert disk.pread(5 * MIB, 64 * KIB) == content(5)
        assert len(written) == stuck and disk.info().waiting_writes
        begun = time.monotonic()
        group.extend(spare_device, 2 * GIB)
        wait_for(lambda: len(written) > stuck, 20)
        print(f"went on {time.monotonic() - begun:.1f} s after vgextend was begun")
        thread.join(60)
        assert len(written) == 400
        for chunk in range(400):
            assert disk.pread(chunk * MIB, 64 * KIB) == content(chunk)
        assert disk.check().errors == []
    kinds = [event.kind for event in events]
    assert kinds.index("group_full") < len(kinds) - 1 - kinds[::-1].index("extend_done")
    assert next(event for event in events if event.kind == "group_full").group == group.name


def test_enospc_instead_of_waiting(make_group: Callable[..., Group]) -> None:
    group = make_group(size=136 * MIB)
    volume = f"{group.name}/vm1"
    fvd.provision(volume, "1G", **SMALL)
    with fvd.open(volume, on_full="error") as disk:
        with pytest.raises(fvd.NoSpace):
            for chunk in range(400):
                disk.pwrite(chunk * MIB, content(chunk))
        disk.pwrite(0, content(0))
        disk.flush()
        with pytest.raises(fvd.NoSpace, match=f"volume group {group.name} is full"):
            disk.extend("1G")
    with pytest.raises(fvd.NoSpace, match="vgextend"):
        fvd.extend(volume, "1G")
    with pytest.raises(fvd.NoSpace, match="vgextend"):
        fvd.provision(f"{group.name}/vm2", "1G", **SMALL)


def test_storage_that_is_added_by_hand_is_used(group: Group, commands: list[tuple[str, float]]) -> None:
    """Seen through udev's event of the device, with nobody asking."""
    volume = f"{group.name}/vm1"
    fvd.provision(volume, "1G", **SMALL)
    with fvd.open(volume) as disk:
        commands.clear()
        run("lvextend", "-L", "512M", volume)
        wait_for(lambda: disk.info().storage_size == 512 * MIB)
        for chunk in range(300):
            disk.pwrite(chunk * MIB, b"x")
        assert {name for name, _ in commands} == {"lvs"}  # what the device shows is believed when the metadata has it


def delayed(device: str, milliseconds: int) -> str:
    """The table of a part of a device whose writes take that long. Not from its beginning: lvm would see one physical volume twice."""
    return f"0 {4 * GIB // SECTOR} delay {device} {MIB // SECTOR} 0 {device} {MIB // SECTOR} {milliseconds}"


@contextlib.contextmanager
def slow_group(pool: Pool, milliseconds: int = 400) -> Iterator[Group]:
    """A group whose metadata takes so long to write that its commands can be caught half-way."""
    with pool.disk() as device, mapped(linear(device, 4 * GIB, MIB)) as slow, volume_group(slow.path) as group:
        group.slow_down = lambda: slow.replace(delayed(device, milliseconds))  # type: ignore[attr-defined]
        group.speed_up = lambda: slow.replace(linear(device, 4 * GIB, MIB))  # type: ignore[attr-defined]
        yield group


def kill_lvextend_when_suspended(number: int, killed: list[int]) -> None:
    """SIGKILL to the lvextend that has the device suspended."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if suspended(number):
            for process in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    if (process / "comm").read_text().strip() == "lvextend":
                        os.kill(int(process.name), signal.SIGKILL)
                        killed.append(int(process.name))
            return
        time.sleep(0.001)


def test_an_lvextend_that_is_killed_with_the_device_suspended(pool: Pool) -> None:
    """The guest's writes are suspended; the device resumes with what is committed, and the step is done again."""
    with slow_group(pool) as group:
        volume = f"{group.name}/vm1"
        fvd.provision(volume, "1G", **SMALL)
        events: list[fvd.Event] = []
        with fvd.open(volume, on_event=events.append) as disk:
            disk.pwrite(0, content(0))
            killed: list[int] = []
            group.slow_down()  # type: ignore[attr-defined]
            thread = threading.Thread(target=kill_lvextend_when_suspended, args=(dm.number_of(group.path("vm1")), killed))
            thread.start()
            with contextlib.suppress(fvd.FvdError):
                disk.extend()
            thread.join()
            assert killed
            group.speed_up()  # type: ignore[attr-defined]
            assert not suspended(dm.number_of(group.path("vm1")))
            for chunk in range(200):
                disk.pwrite(chunk * MIB, content(chunk))
            disk.flush()
            for chunk in range(200):
                assert disk.pread(chunk * MIB, 64 * KIB) == content(chunk)
        # A step that was under way at the close may still end.
        wait_for(lambda: int((group.volume("vm1") or {})["lv_size"]) == fvd.info(volume).storage_size)
        # No extent belongs to two: lvm's own check of its metadata, and another volume in all the rest.
        run("vgck", group.name)
        run("lvcreate", "--yes", "-l", "100%FREE", "-n", "rest", group.name)
        run("dd", "if=/dev/zero", f"of={group.path('rest')}", "bs=1M", "count=256", "oflag=direct")
        with fvd.open(volume, read_only=True) as disk:
            for chunk in range(200):
                assert disk.pread(chunk * MIB, 64 * KIB) == content(chunk)


def test_a_volume_that_a_dead_command_left_suspended_is_taken_over(pool: Pool) -> None:
    """Host agent and lvextend die together; the next open finds the device suspended and lets it go on."""
    with slow_group(pool) as group:
        volume = f"{group.name}/vm1"
        fvd.provision(volume, "1G", **SMALL)
        with fvd.open(volume) as disk:
            disk.pwrite(0, content(0))
        run("lvchange", "-ay", volume)
        killed: list[int] = []
        number = dm.number_of(group.path("vm1"))
        group.slow_down()  # type: ignore[attr-defined]
        thread = threading.Thread(target=kill_lvextend_when_suspended, args=(number, killed))
        thread.start()
        with contextlib.suppress(AssertionError):
            run("lvextend", "-L", "256M", volume)
        thread.join()
        assert killed and suspended(number)
        group.speed_up()  # type: ignore[attr-defined]
        with fvd.open(volume) as disk:
            assert disk.pread(0, 64 * KIB) == content(0)
            lv = group.volume("vm1")
            assert lv is not None and size_bytes(group.path("vm1")) == int(lv["lv_size"]) == disk.info().storage_size


def test_a_device_behind_its_metadata_is_refreshed(group: Group) -> None:
    """As an lvextend leaves it that dies between its commit and the device."""
    volume = f"{group.name}/vm1"
    fvd.provision(volume, "1G", **SMALL)
    run("lvchange", "-ay", volume)
    name = dm.device_name(dm.number_of(group.path("vm1")))
    table = run("dmsetup", "table", name)
    run("lvextend", "-L", "256M", volume)
    run("dmsetup", "suspend", name)
    run("dmsetup", "load", name, "--table", table)
    run("dmsetup", "resume", name)
    assert size_bytes(group.path("vm1")) == 64 * MIB
    assert fvd.info(volume).storage_size == 256 * MIB


def test_the_table_of_a_dead_step_is_never_used(group: Group) -> None:
    """As an lvextend leaves it that dies before its commit: a table with extents that lvm gives to the next who asks. Another command
    puts it to use, the device is larger, and the extents have another owner."""
    volume = f"{group.name}/vm1"
    fvd.provision(volume, "1G", **SMALL)
    with fvd.open(volume) as disk:
        for chunk in range(20):
            disk.pwrite(chunk * MIB, content(chunk))
        name = dm.device_name(dm.number_of(group.path("vm1")))
        live = run("dmsetup", "table", name)
        device, start = live.split()[-2:]
        behind = int(start) + 64 * MIB // SECTOR
        run("dmsetup", "load", name, "--table", f"{live}\n{64 * MIB // SECTOR} {448 * MIB // SECTOR} linear {device} {behind}")
        run("lvchange", "--refresh", volume)
        assert size_bytes(group.path("vm1")) == 512 * MIB, "libdm has used the dead table: what this test is about"
        run("lvcreate", "--yes", "-Wn", "-Zn", "-L", "1G", "-n", "other", group.name)
        for chunk in range(20, 200):
            disk.pwrite(chunk * MIB, content(chunk))
        disk.flush()
        run("dd", "if=/dev/zero", f"of={group.path('other')}", "bs=1M", "oflag=direct", "count=1024")
        for chunk in range(200):
            assert disk.pread(chunk * MIB, 64 * KIB) == content(chunk)
    with open(group.path("other"), "rb") as other:  # noqa: PTH123
        assert not any(other.read(GIB))


def test_an_lvextend_that_hangs_is_ended(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody holds the group's lock and does not let go."""
    volume = f"{group.name}/vm1"
    fvd.provision(volume, "1G", **SMALL)
    lock = Path(f"/run/lock/lvm/V_{group.name}")
    with fvd.open(volume) as disk, lock.open("a") as held:
        import fcntl

        monkeypatch.setattr(runner, "TERM_SECONDS", 0.5)
        allocator = disk._thread.volume.allocator
        assert allocator is not None
        storage: Any = allocator.storage
        storage._lvm = Lvm(timeout_seconds=2.0)
        fcntl.flock(held, fcntl.LOCK_EX)
        begun = time.monotonic()
        with pytest.raises(fvd.Timeout, match="did not end within 2 s"):
            disk.extend()
        assert time.monotonic() - begun < 20
        disk.pwrite(0, b"x")  # there is space, and nothing is suspended
        fcntl.flock(held, fcntl.LOCK_UN)
        storage._lvm = Lvm()
        disk.extend()
        assert disk.info().storage_size >= 128 * MIB


@contextlib.contextmanager
def silent_device(folder: Path) -> Iterator[str]:
    """A block device whose server takes requests and answers none."""
    socket = folder / "silent.sock"
    words = ["nbdkit", "--foreground", "--unix", socket, "--filter=delay", "memory", "64M", "rdelay=600"]
    with subprocess.Popen(list(map(str, words))) as server:
        try:
            wait_for(socket.exists)
            run("nbd-client", "-unix", socket, "/dev/nbd0")
            try:
                yield "/dev/nbd0"
            finally:
                run("nbd-client", "-d", "/dev/nbd0")
        finally:
            server.kill()


def test_devices_of_others_and_of_the_group(group: Group, spare_device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of somebody else's that does not answer holds nothing up; one that is added is used; one that is lost is no fault of a disk
    that does not lie on it, and no command makes the group believe that it is gone."""
    volume = f"{group.name}/vm1"
    fvd.provision(volume, "1G", **SMALL)
    settle()
    lists: list[list[str]] = []
    real = runner.run_command

    def record(words: list[str], timeout_seconds: float) -> runner.Finished:
        if words[0] != "dmsetup":
            lists.append(words[words.index("--devices") + 1].split(",") if "--devices" in words else [])
        return real(words, timeout_seconds)

    monkeypatch.setattr(runner, "run_command", record)
    events: list[fvd.Event] = []
    first = group.devices[0]
    with fvd.open(volume, on_event=events.append) as disk:
        with silent_device(tmp_path):
            begun = time.monotonic()
            disk.extend()
            seconds = time.monotonic() - begun
            assert seconds < 20, "it has waited for a device that is not the group's"
            run("pvcreate", "--quiet", "--devices", spare_device, spare_device)
            run("vgextend", "--quiet", "--devices", f"{first},{spare_device}", group.name, spare_device)
            group.devices.append(spare_device)
            disk.extend()
        assert all(each and set(each) <= {first, spare_device} for each in lists) and lists[-1] == sorted([first, spare_device])
        settle()
        with Path(spare_device).open("r+b", buffering=0) as device:
            label = device.read(MIB)
            device.seek(0)
            device.write(bytes(MIB))
            os.fsync(device.fileno())
        run("udevadm", "trigger", "--settle", spare_device)
        disk.pwrite(0, content(0))
        with pytest.raises(fvd.DeviceError, match="lacks physical volume"):
            disk.extend()
        wait_for(lambda: any(event.kind == "extend_failed" and "lacks physical volume" in event.message for event in events))
        seen = next(each for each in fvd.list_groups(group.name))
        assert seen.free_bytes == 0 and seen.unusable_bytes
    with fvd.open(volume) as disk:
        assert disk.pread(0, 64 * KIB) == content(0)
    with pytest.raises(fvd.DeviceError, match="lacks physical volume"):
        fvd.remove(volume)
    with Path(spare_device).open("r+b", buffering=0) as device:
        device.write(label)
        os.fsync(device.fileno())
    run("udevadm", "trigger", "--settle", spare_device)
    assert "missing" not in run("pvs", "-o", "pv_missing", "--noheadings", *group.devices)
    run("pvchange", "--allocatable", "n", first)
    with fvd.open(volume) as disk:
        assert disk.extend("64M").added_bytes == 64 * MIB
        assert spare_device in str(group.report("lv_name,devices", select="lv_name=vm1"))
    assert fvd.remove(volume)


# --- A thin pool below ----------------------------------------------------------------------------------------------------------------

# Of these pools there is nothing to check, and nobody but the test makes them larger.
POOLS_ARE_OURS = ("--config", 'global{thin_check_executable=""} activation{monitoring=0}')


@pytest.mark.parametrize("at_once", [True, False], ids=["errors at once", "waits first"])
def test_writes_wait_for_a_thin_pool_that_is_full(group: Group, at_once: bool) -> None:
    """The device has its size, and the pool that it takes its blocks from has none left: it is told, what is there goes on, and what waits
    ends well when the pool has grown."""
    load_module("dm-thin-pool")
    run("lvcreate", "--yes", *POOLS_ARE_OURS, "--type", "thin-pool", "--poolmetadatasize", "4M", "-L", "16M", "-n", "pool", group.name)
    if at_once:
        run("lvchange", *POOLS_ARE_OURS, "--errorwhenfull", "y", f"{group.name}/pool")
    else:
        Path("/sys/module/dm_thin_pool/parameters/no_space_timeout").write_text("2")  # 60 s as a rule
    run("lvcreate", "--yes", *POOLS_ARE_OURS, "--thin", "-V", "64M", "-n", "thin", f"{group.name}/pool")
    events: list[fvd.Event] = []
    with mapped(linear(group.path("thin"), 64 * MIB)) as device:
        fvd.provision(device.path, "32M", journal_size="1M")
        with fvd.open(device.path, on_full="wait", on_event=events.append) as disk:
            written = 0

            def fill() -> None:
                nonlocal written
                for chunk in range(24):
                    disk.pwrite(chunk * MIB, content(chunk, MIB))
                    written += 1

            writer = threading.Thread(target=fill)
            writer.start()
            wait_for(lambda: any(event.kind == "storage_full" for event in events))
            full = disk.info()
            assert full.no_room_below and full.free_bytes == 0 and full.waiting_writes and 8 < written < 16
            disk.pwrite(0, content(0, MIB))  # what has its blocks needs none
            run("lvextend", *POOLS_ARE_OURS, "-L", "64M", f"{group.name}/pool")
            writer.join(30)
            assert not writer.is_alive() and written == 24 and not disk.info().no_room_below
            disk.flush()
            assert all(disk.pread(chunk * MIB, MIB) == content(chunk, MIB) for chunk in range(24))
        report = fvd.check(device.path)
        assert report.clean and not report.errors and fvd.info(device.path).possible_loss is None


# --- Changed behind the disk ---------------------------------------------------------------------------------------------------------


def test_a_volume_that_is_rewritten_behind_its_server(group: Group, tmp_path: Path) -> None:
    """lvreduce, another tenant's lvcreate, lvextend: the disk stops at the first, and writes nothing to the other's extents."""
    volume = f"{group.name}/vm1"
    fvd.provision(volume, "1G", **SMALL)
    told = threading.Event()
    errors: list[fvd.Event] = []

    def tell(event: fvd.Event) -> None:
        if event.kind == "storage_error":
            errors.append(event)
            told.set()

    served = fvd.serve(volume, socket=tmp_path / "s", on_event=tell)
    client = nbd.NBD()
    client.connect_uri(served.uri)
    for chunk in range(20):
        client.pwrite(content(chunk), chunk * MIB)
    served.extend()  # steps of its own are no reason
    run("lvchange", "--refresh", volume)  # nor is what changes nothing
    assert client.pread(64 * KIB, 10 * MIB) == content(10)
    client.pwrite(content(1), 30 * MIB)  # something is pending
    size = served.info().storage_size
    run("lvreduce", "--yes", "--force", "-L", "16M", volume)
    assert told.wait(1), "it was not told within a second"
    with pytest.raises(nbd.Error):
        client.pread(4096, 0)
    run("lvcreate", "--yes", "-L", f"{size - 16 * MIB}b", "-n", "other", group.name)
    run("lvextend", "-L", f"{size}b", volume)
    before = Path(group.path("other")).read_bytes()
    assert "has been changed by somebody else" in served.info().stopped and fvd.check(volume).errors
    with pytest.raises(nbd.Error):
        nbd.NBD().connect_uri(served.uri)
    with pytest.raises(fvd.DeviceError, match="The disk has stopped"):
        served.close()
    assert Path(group.path("other")).read_bytes() == before
    assert len(errors) == 1 and fvd.info(volume).left_open


def extended(disk: fvd.Disk) -> bool:
    """False: lvm has moved it, and holds it locked for a moment longer."""
    try:
        disk.extend()
    except fvd.DeviceError as error:
        assert "locked" in str(error)
        return False
    return True


def test_a_volume_that_lvm_moves_and_copies(make_group: Callable[..., Group]) -> None:
    """pvmove, and a snapshot taken and dropped, under a disk that is in use: its bytes stay what they are, and so does the disk."""
    load_module("dm-mirror")
    load_module("dm-snapshot")
    group = make_group(size=4 * GIB, disks=2)
    volume = f"{group.name}/vm1"
    fvd.provision(volume, "1G", **SMALL)
    with fvd.open(volume) as disk:
        for chunk in range(50):
            disk.pwrite(chunk * MIB, content(chunk))
        there, other = group.devices if group.devices[0] in str(group.report("lv_name,devices")) else reversed(group.devices)
        run("pvmove", "--config", "global/use_lvmpolld=0", "--interval", "1", "--name", "vm1", there, other)
        wait_for(lambda: "pvmove" not in str(group.report("lv_name")))
        assert other in str(group.report("lv_name,devices"))
        wait_for(lambda: extended(disk))
        run("lvcreate", "--yes", "--snapshot", "-L", "64M", "-n", "snap", volume)
        run("lvremove", "--yes", f"{group.name}/snap")
        for chunk in range(50):
            assert disk.pread(chunk * MIB, 64 * KIB) == content(chunk)
        assert not disk.info().stopped


# --- Without udev ----------------------------------------------------------------------------------------------------------------


def udevd() -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if "udevd" in (process / "comm").read_text():
                found.append(int(process.name))
    return found


def test_udev_that_is_stuck(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening waits for it in vain, and says so in time; a disk that is open grows all the same."""
    volume = f"{group.name}/vm1"
    fvd.provision(volume, "1G", **SMALL)
    settle()
    monkeypatch.setattr("fvd.lvm.commands.TIMEOUT_SECONDS", 3.0)
    monkeypatch.setattr(Lvm.__init__, "__defaults__", (3.0,))
    disk = fvd.open(volume)
    for pid in udevd():
        os.kill(pid, signal.SIGSTOP)
    try:
        for chunk in range(300):
            disk.pwrite(chunk * MIB, content(chunk))
        growth = disk.info().growth
        assert growth is not None and growth["extend_steps"] >= 2
        fvd_other = f"{group.name}/vm2"
        with pytest.raises(fvd.Timeout, match="did not end within 3 s"):
            fvd.provision(fvd_other, "1G", **SMALL)
    finally:
        for pid in udevd():
            os.kill(pid, signal.SIGCONT)
        run("dmsetup", "udevcomplete_all", "--yes")
        settle()
        disk.close()
    assert fvd.provision(f"{group.name}/vm2", "1G", **SMALL).virtual_size == GIB


def test_no_udev_at_all(group: Group) -> None:
    """lvm makes the nodes itself; growth by hand is seen when more space is wanted."""
    settle()
    for pid in udevd():
        os.kill(pid, signal.SIGKILL)
    Path("/run/udev/control").unlink(missing_ok=True)
    try:
        volume = f"{group.name}/vm1"
        fvd.provision(volume, "8G", **SMALL)
        with fvd.open(volume) as disk:
            for chunk in range(300):
                disk.pwrite(chunk * MIB, content(chunk))
            run("lvextend", "-L", "+1G", volume)
            for chunk in range(300, 800):
                disk.pwrite(chunk * MIB, b"x")
            for chunk in range(300):
                assert disk.pread(chunk * MIB, 64 * KIB) == content(chunk)
        assert fvd.info(volume).mapped_bytes == 800 * MIB
        assert fvd.remove(volume)
    finally:
        run("/lib/systemd/systemd-udevd", "--daemon")
        run("udevadm", "trigger", "--subsystem-match=block")
        settle()
