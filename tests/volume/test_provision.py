# SPDX-License-Identifier: Apache-2.0
"""fvd.disk.provision: idempotent by name, in the order of FORMAT.md section 8, and overwriting nothing that it was not told to."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faulty import FaultyStorage, PowerCut
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import loop_device, mounted, run, sparse

from disks import driven
from fvd.base.sparse import zero_blocks
from fvd.device.claim import Ownership, claim
from fvd.device.node import open_node
from fvd.device.signature import find_signatures
from fvd.disk import provision as provision_module
from fvd.disk.loading import load_disk
from fvd.disk.provision import ProvisionedDisk, provision, write_disk
from fvd.disk.removing import remove
from fvd.errors import Conflict, Corrupt, DeviceError, InUse, InvalidArgument, NoSpace, NotFound, Unsupported
from fvd.format.geometry import Geometry, Layout
from fvd.format.maps import EMPTY, map_hash
from fvd.format.superblock import MAGIC, SLOT_OFFSETS_BYTES, BaseReference, Superblock
from fvd.inspect.check import check
from fvd.inspect.dump import dump
from fvd.inspect.info import info
from fvd.inspect.map import map_volume

MIB = 1 << 20
GIB = 1 << 30
SMALL: dict[str, Any] = {"virtual_size_bytes": 64 * MIB, "journal_size_bytes": 64 * 1024, "grow_step_bytes": 16 * MIB}


def make(path: Path | str, **changes: Any) -> ProvisionedDisk:
    name = str(path) if str(path).startswith("/dev/") else f"file:{path}"
    return provision(name, **(SMALL | changes))


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "disk.img"


# --- A new disk --------------------------------------------------------------------------------------------------


def test_a_new_file(path: Path) -> None:
    made = provision(f"file:{path}", virtual_size_bytes=100 * GIB)
    assert made.created and made.storage_size_bytes == path.stat().st_size == 5 * GIB
    # Metadata has its space for good, data takes it as it comes.
    assert 17 * MIB <= path.stat().st_blocks * 512 < 20 * MIB
    assert path.stat().st_mode & 0o777 == 0o600
    with open_node(path, read_only=True) as node:
        disk = load_disk(node)
    assert disk.superblock == made.superblock
    assert disk.superblock.generation == 2
    assert disk.journal_state.clean and not any(disk.bitmap) and not any(disk.used_slots)
    assert leftovers(path.parent) == []


def test_both_superblocks_are_written(path: Path) -> None:
    make(path)
    data = path.read_bytes()
    assert all(data[offset:].startswith(MAGIC) for offset in SLOT_OFFSETS_BYTES)


def test_raw_has_its_full_size_at_once(path: Path) -> None:
    made = make(path, layout=Layout.RAW)
    assert path.stat().st_size == made.superblock.geometry.max_storage_size_bytes
    assert path.stat().st_blocks * 512 < 2 * MIB


def test_progress_reaches_the_end(path: Path) -> None:
    told: list[tuple[int, int]] = []
    provision(f"file:{path}", virtual_size_bytes=2 << 40, progress=lambda done, total: told.append((done, total)))
    assert len(told) > 2 and told == sorted(told)
    assert told[-1][0] == told[-1][1]


def test_uuids_differ(path: Path) -> None:
    one = make(path)
    two = make(path.with_name("other"))
    assert one.superblock.uuid != two.superblock.uuid


def test_the_clock_and_the_dice_can_be_given(path: Path) -> None:
    made = make(path, clock=lambda: 1234.5, new_uuid=lambda: b"0123456789abcdef")
    assert (made.superblock.created_seconds, made.superblock.uuid) == (1234, b"0123456789abcdef")


@pytest.mark.parametrize(
    "changes", [{"block_size_bytes": 5000}, {"chunk_size_bytes": 4096}, {"grow_step_bytes": 65536}, {"virtual_size_bytes": 100}]
)
def test_sizes_that_can_never_work(path: Path, changes: dict[str, int]) -> None:
    with pytest.raises(InvalidArgument):
        make(path, **changes)
    assert not path.exists() and leftovers(path.parent) == []


def test_where_there_is_no_directory(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="make it first"):
        make(tmp_path / "absent" / "disk")


def test_a_name_as_long_as_names_can_be(tmp_path: Path) -> None:
    assert make(tmp_path / ("x" * 255)).created


def test_a_symbolic_link_to_where_the_disk_shall_be(path: Path) -> None:
    path.symlink_to(path.with_name("real"))
    assert make(path).created
    assert path.is_symlink() and path.with_name("real").is_file()
    assert not make(path).created


# --- The same again, and something else --------------------------------------------------------------------------


def test_the_same_again_changes_nothing(path: Path) -> None:
    made = make(path)
    before = path.read_bytes()
    again = make(path)
    assert not again.created and again.superblock == made.superblock
    assert path.read_bytes() == before


def test_the_same_again_while_it_is_in_use_is_fine_too(path: Path) -> None:
    make(path)
    with claim(path):
        assert not make(path).created
        with pytest.raises(Conflict):
            make(path, virtual_size_bytes=MIB)


@pytest.mark.parametrize("force", [False, True])
def test_other_parameters_are_a_conflict_that_names_them(path: Path, force: bool) -> None:
    make(path)
    before = path.read_bytes()
    with pytest.raises(Conflict) as caught:
        make(path, virtual_size_bytes=32 * MIB, block_size_bytes=4096, layout=Layout.RAW, force=force)
    message = str(caught.value)
    for part in ("virtual_size is 67108864, asked for 33554432", "block_size is 65536, asked for 4096", "layout is compact, asked for raw"):
        assert part in message
    assert "chunk_size" not in message
    assert path.read_bytes() == before


def test_another_base_is_a_conflict(path: Path, tmp_path: Path) -> None:
    one, two = sparse(tmp_path / "one", MIB), sparse(tmp_path / "two", MIB)
    make(path, base=one)
    assert not make(path, base=one).created
    with pytest.raises(Conflict, match=r"base is .*/one, asked for .*/two"):
        make(path, base=two)
    with pytest.raises(Conflict, match=r"base is .*/one, asked for none"):
        make(path)
    os.truncate(one, 2 * MIB)
    with pytest.raises(Conflict, match="base_size is 1048576, asked for 2097152"):
        make(path, base=one)


# --- What is in the way ------------------------------------------------------------------------------------------


def test_an_empty_file_is_taken(path: Path) -> None:
    path.touch()
    assert make(path).created


def test_a_file_of_something_else(path: Path) -> None:
    path.write_text("my diary")
    with pytest.raises(Conflict, match=r"holds something else.*--force"):
        make(path)
    assert path.read_text() == "my diary"
    assert make(path, force=True).created


def test_a_file_system_in_a_file(path: Path) -> None:
    run("mkfs.ext4", "-q", "-L", "precious", sparse(path, 16 * MIB))
    with pytest.raises(Conflict, match="ext4 'precious'"):
        make(path)


@pytest.mark.parametrize("force", [False, True])
def test_a_file_in_use_is_not_replaced(path: Path, force: bool) -> None:
    path.write_text("busy")
    with claim(path), pytest.raises(InUse if force else Conflict):
        make(path, force=force)
    assert path.read_text() == "busy" and leftovers(path.parent) == []


def test_a_damaged_disk_needs_force(path: Path) -> None:
    make(path)
    with path.open("r+b") as file:
        for offset in SLOT_OFFSETS_BYTES:
            file.seek(offset + 100)
            file.write(b"damage")
    with pytest.raises(Corrupt, match="--force"):
        make(path)
    assert make(path, force=True).created


def test_the_wrong_kind_of_name(path: Path) -> None:
    with loop_device(sparse(path, 32 * MIB)) as device, pytest.raises(InvalidArgument, match=f"name it {device}"):
        provision(f"file:{device}", **SMALL)
    shm = Path(f"/dev/shm/fvd-test-kind-{os.getpid()}")
    shm.write_text("x")
    try:
        with pytest.raises(InvalidArgument, match="name it file:"):
            provision(str(shm), **SMALL)
    finally:
        shm.unlink()
    with pytest.raises(NotFound):
        provision("/dev/there-is-no-such-device", **SMALL)


# --- Devices -----------------------------------------------------------------------------------------------------


def test_a_device(path: Path) -> None:
    with loop_device(sparse(path, 32 * MIB)) as device:
        assert make(device).created
        assert not make(device).created
        with open_node(device) as node:
            assert load_disk(node).storage_size_bytes == 32 * MIB


def test_a_device_of_4096_byte_blocks(path: Path) -> None:
    with loop_device(sparse(path, 32 * MIB), "--sector-size", "4096") as device:
        assert make(device).created


@pytest.mark.parametrize(("layout", "least"), [(Layout.COMPACT, 3 * MIB), (Layout.RAW, 66 * MIB)])
def test_a_device_that_is_too_small(path: Path, layout: Layout, least: int) -> None:
    sparse(path, least - 512)
    with loop_device(path) as device, pytest.raises(NoSpace, match=f"{least} bytes"):
        make(device, layout=layout)
    os.truncate(path, least)
    with loop_device(path) as device:
        assert make(device, layout=layout).created


def test_what_udev_knows_of_a_device_counts_too(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provision_module, "known_content", lambda path: "zfs_member")
    with loop_device(sparse(path, 32 * MIB)) as device:
        monkeypatch.setattr(provision_module, "udev_is_running", lambda: True)
        with pytest.raises(Conflict, match="zfs_member, as udev's database says"):
            make(device)
        monkeypatch.setattr(provision_module, "udev_is_running", lambda: False)  # then its database may be anything
        assert make(device).created


def test_foreign_signatures_on_a_device(path: Path) -> None:
    with loop_device(sparse(path, 32 * MIB)) as device:
        run("mkfs.ext4", "-q", device)
        with pytest.raises(Conflict, match=r"ext4.*--force"):
            make(device)
        assert find_signatures(device)
        assert make(device, force=True).created
        assert find_signatures(device) == []


def test_a_mark_far_from_our_metadata_is_wiped_too(path: Path) -> None:
    """Some RAID members are marked at the device's end, where no superblock of ours ever comes."""
    with loop_device(sparse(path, 32 * MIB)) as device:
        with open_node(device) as node:
            node.pwrite(32 * MIB - 63 * 512, b"Promise Technology, Inc.".ljust(512, b"\0"))
        with pytest.raises(Conflict, match="promise_fasttrack_raid_member"):
            make(device)
        assert make(device, force=True).created
        assert find_signatures(device) == []


def test_a_mounted_device_is_refused_even_with_force(path: Path, tmp_path: Path) -> None:
    with loop_device(sparse(path, 32 * MIB)) as device:
        run("mkfs.ext4", "-q", device)
        with mounted(device, tmp_path / "here") as folder:
            (folder / "data").write_text("precious")
            with pytest.raises(InUse, match="mounted on"):
                make(device, force=True)
            assert (folder / "data").read_text() == "precious"


def test_contents_of_an_unknown_kind(path: Path) -> None:
    with loop_device(sparse(path, 32 * MIB)) as device:
        with open_node(device) as node:
            node.pwrite(8192, b"somebody's" + bytes(502))
        with pytest.raises(Conflict, match="unknown kind"):
            make(device)
        assert make(device, force=True).created


def test_a_device_is_made_again_after_remove(path: Path) -> None:
    with loop_device(sparse(path, 32 * MIB)) as device:
        first = make(device)
        assert remove(device)
        second = make(device, virtual_size_bytes=32 * MIB)
        assert second.created and first.superblock.uuid != second.superblock.uuid


def test_nothing_of_an_earlier_disk_is_visible(path: Path) -> None:
    """Every byte of the device is somebody's secret, valid maps and journal of an earlier disk included."""
    with loop_device(sparse(path, 32 * MIB)) as device:
        make(device)
        with open_node(device) as node:
            old = np.array(node.pread(0, 32 * MIB))
            old[old == 0] = 0x5A
            old[: 1 << 20] = 0
            node.pwrite(0, old)
        make(device)
        with open_node(device) as node:
            disk = load_disk(node)
        assert not any(disk.bitmap) and not any(disk.used_slots) and disk.journal_state.commits_replayed == 1


# --- Bases -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 511, 512, MIB, 64 * MIB, 100 * MIB + 3])
def test_a_base_of_any_size(path: Path, tmp_path: Path, size: int) -> None:
    base = sparse(tmp_path / "base", size)
    assert make(path, base=base, truncate_base=True).superblock.base == BaseReference(str(base), size)


def test_the_base_is_stored_as_an_absolute_path(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse(tmp_path / "base", MIB)
    monkeypatch.chdir(tmp_path)
    made = make(path, base="base")
    assert made.superblock.base is not None and made.superblock.base.locator == f"{tmp_path}/base"


def test_a_device_as_base(path: Path, tmp_path: Path) -> None:
    with loop_device(sparse(tmp_path / "base", MIB)) as device:
        made = make(path, base=device)
        assert made.superblock.base == BaseReference(device, MIB)


def test_bases_that_are_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        make(path, base=tmp_path / "absent")
    with pytest.raises(InvalidArgument, match="empty"):
        make(path, base=sparse(tmp_path / "empty", 0))
    with claim(sparse(tmp_path / "busy", MIB)), pytest.raises(InUse):
        make(path, base=tmp_path / "busy")
    assert not path.exists()
    with loop_device(sparse(tmp_path / "device", 32 * MIB)) as device, pytest.raises(InvalidArgument, match="its own base"):
        make(device, base=device)
    make(path)
    with pytest.raises(InvalidArgument, match="its own base"):
        make(path, base=path)
    with pytest.raises(Unsupported, match="fvd disk"):
        make(tmp_path / "second", base=path)


def test_a_base_that_could_be_two_things_needs_its_format(path: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.write_bytes(b"QFI\xfb".ljust(MIB, b"x"))
    with pytest.raises(InvalidArgument, match=r"looks like qcow2.*--base-format qcow2, or --base-format raw"):
        make(path, base=base)
    assert not path.exists()
    assert make(path, base=base, base_format="raw").superblock.base == BaseReference(str(base), MIB)
    assert not make(path, base=base, base_format="raw").created


@pytest.mark.parametrize("options", [{"base_format": "raw"}, {"copy_on_read": True}, {"prefetch": True}])
def test_what_needs_a_base(path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match="need a base"):
        make(path, **options)
    assert not path.exists()


@pytest.mark.parametrize("copy_on_read", [False, True])
@pytest.mark.parametrize("prefetch", [False, True])
def test_defaults_of_opens_are_parameters_of_the_disk(path: Path, tmp_path: Path, copy_on_read: bool, prefetch: bool) -> None:
    base = sparse(tmp_path / "base", MIB)
    asked = {"base": base, "copy_on_read": copy_on_read, "prefetch": prefetch}
    made = make(path, **asked)
    assert made.superblock.compatible_features == copy_on_read | prefetch << 1
    assert (made.superblock.copy_on_read, made.superblock.prefetch) == (copy_on_read, prefetch)
    assert not make(path, **asked).created
    words = {False: "off", True: "on"}
    for name, have in (("copy_on_read", copy_on_read), ("prefetch", prefetch)):
        with pytest.raises(Conflict, match=f"{name} is {words[have]}, asked for {words[not have]}"):
            make(path, **asked | {name: not have})


# --- Bases with holes ----------------------------------------------------------------------------------------------


def holey(path: Path) -> Path:
    """3 MiB and a bit: data in the second MiB and at 2.5 MiB, else holes."""
    sparse(path, 3 * MIB + 1000)
    with path.open("r+b") as file:
        file.seek(MIB)
        file.write(b"base" * (MIB // 4))
        file.seek(5 * MIB // 2)
        file.write(b"more")
    return path


def present(path: Path) -> list[int]:
    with open_node(path, read_only=True) as node:
        disk = load_disk(node)
    assert disk.journal_state.map_hash == map_hash(disk.superblock.uuid, disk.bitmap, disk.table)
    assert disk.journal_state.clean and (disk.table is None or set(disk.table) == {EMPTY})
    return [int(block) for block in np.flatnonzero(np.unpackbits(np.asarray(disk.bitmap).view(np.uint8), bitorder="little"))]


@pytest.mark.parametrize("layout", Layout)
def test_holes_of_the_base_are_zeros_of_the_disk(path: Path, tmp_path: Path, layout: Layout) -> None:
    made = make(path, base=holey(tmp_path / "base"), layout=layout)
    assert present(path) == [*range(16), *range(32, 40), *range(41, 49)]  # 64 KiB each; the last ends behind the base
    assert check(f"file:{path}").errors == []
    found = map_volume(f"file:{path}")["extents"]
    assert [(extent["start"], extent["state"]) for extent in found if extent["state"] == "base"] == [(MIB, "base"), (40 * 65536, "base")]
    assert dump(f"file:{path}")["superblocks"][0]["valid"]
    described = info(made.view)["base"] if made.view else {}
    assert described["released"] is False
    assert path.stat().st_blocks * 512 < 3 * MIB, "zeros take no space"


@pytest.mark.parametrize("layout", Layout)
def test_a_base_without_data_is_never_read(path: Path, tmp_path: Path, layout: Layout) -> None:
    base = sparse(tmp_path / "base", 3 * MIB + 1000)
    made = make(path, base=base, layout=layout)
    assert made.view is not None and info(made.view)["base"]["released"]
    base.unlink()
    with driven(path) as driver:
        assert driver.pread(0, 4 * MIB) == bytes(4 * MIB)
        driver.pwrite(MIB + 10, b"mine")
        driver.flush()
        assert driver.pread(MIB, 20) == bytes(10) + b"mine" + bytes(6)
        assert driver.volume.base is None
        assert driver.call(driver.volume.engine.statistics)["base_reads"] == 0
    assert check(f"file:{path}").errors == []


@pytest.mark.parametrize("layout", Layout)
def test_reads_over_holes_see_the_base_and_nothing_else(path: Path, tmp_path: Path, layout: Layout) -> None:
    base = holey(tmp_path / "base")
    contents = bytearray(base.read_bytes().ljust(64 * MIB, b"\0"))
    make(path, base=base, layout=layout)
    for _ in range(2):
        with driven(path) as driver:
            assert driver.pread(0, 4 * MIB) == contents[: 4 * MIB]
            driver.pwrite(2 * MIB - 7, b"across the edge")
            contents[2 * MIB - 7 : 2 * MIB + 8] = b"across the edge"
            assert driver.pread(0, 4 * MIB) == contents[: 4 * MIB]
            driver.zero(0, 4 * MIB)
            contents[: 4 * MIB] = bytes(4 * MIB)
            assert driver.pread(0, 4 * MIB) == contents[: 4 * MIB]


@pytest.mark.parametrize("layout", Layout)
def test_holes_are_read_without_the_base(path: Path, tmp_path: Path, layout: Layout) -> None:
    make(path, base=holey(tmp_path / "base"), layout=layout)
    with driven(path) as driver:
        assert driver.pread(0, MIB) == bytes(MIB)
        assert driver.pread(3 * MIB, MIB) == bytes(MIB)
        assert driver.call(driver.volume.engine.statistics)["base_reads"] == 0
        assert driver.pread(MIB, 4) == b"base"
        assert driver.call(driver.volume.engine.statistics)["base_reads"] == 1


def test_in_the_raw_layout_what_the_device_held_is_not_the_zeros_of_the_base(path: Path, tmp_path: Path) -> None:
    path.write_bytes(b"\xa5" * 80 * MIB)
    with loop_device(path) as device:
        make(device, base=holey(tmp_path / "base"), layout=Layout.RAW, force=True)
        if not present(Path(device)):
            pytest.skip("this kernel's loop devices make no holes")
        with driven(device) as driver:
            assert driver.pread(0, 4 * MIB) == (tmp_path / "base").read_bytes().ljust(4 * MIB, b"\0")


def test_storage_that_makes_no_holes_leaves_zeros_to_the_base(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provision_module, "punch_hole", lambda *_: False)
    base = holey(tmp_path / "base")
    make(path, base=base, layout=Layout.RAW)
    assert present(path) == []
    compact = tmp_path / "compact"
    make(compact, base=base)  # needs none
    assert len(present(compact)) == 32


def test_zeros_without_a_base_are_no_disk() -> None:
    with pytest.raises(InvalidArgument):
        write_disk(FaultyStorage(SIZE), BLUEPRINT, zeros=np.ones(GEOMETRY.bitmap_words, np.uint64))


# --- Interruptions -----------------------------------------------------------------------------------------------

GEOMETRY = Geometry(virtual_size_bytes=64 * MIB, journal_size_bytes=64 * 1024, grow_step_bytes=16 * MIB)
BLUEPRINT = Superblock(GEOMETRY, bytes(range(16)), 2, None, 0)
SIZE = 4 * MIB


def whole_or_nothing(storage: FaultyStorage, old: Superblock | None) -> str:
    """What a reader finds: "none", "old", or "new", and then it must be whole."""
    try:
        disk = load_disk(storage)
    except (NotFound, Corrupt) as error:
        assert isinstance(error, NotFound) or "checksum mismatch" in str(error), error
        return "none"
    found = disk.superblock
    if old is not None and found.uuid == old.uuid:
        return "old"
    assert found.uuid == BLUEPRINT.uuid
    expected = ZEROS if found.base is not None else np.zeros_like(ZEROS)
    assert np.array_equal(disk.bitmap, expected) and disk.journal_state.clean
    return "new"


ZEROS = zero_blocks(GEOMETRY, 3 * MIB, [(0, MIB), (2 * MIB, MIB)])
OVER_HOLES = replace(BLUEPRINT, base=BaseReference("/base", 3 * MIB))


def write_either(storage: FaultyStorage, superblock: Superblock) -> None:
    write_disk(storage, superblock, zeros=None if superblock.base is None else ZEROS.copy())


def count_operations(superblock: Superblock) -> int:
    storage = FaultyStorage(SIZE)
    write_either(storage, superblock)
    return storage.operations


@pytest.mark.parametrize("superblock", [BLUEPRINT, OVER_HOLES], ids=["alone", "over holes"])
@pytest.mark.parametrize("fill", [b"\0", b"\xff", b"FVDISK\r\n"])
def test_a_power_cut_at_any_moment_leaves_nothing_or_a_whole_disk(fill: bytes, superblock: Superblock) -> None:
    total = count_operations(superblock)
    outcomes = []
    for stop in range(total + 1):
        storage = FaultyStorage(SIZE, fill=fill, stop_after=stop)
        try:
            write_either(storage, superblock)
        except PowerCut:
            assert stop < total
        for seed in range(6):
            after = storage.after_power_cut(seed)
            outcomes.append(whole_or_nothing(after, None))
            write_disk(after, replace(BLUEPRINT, uuid=b"again and again!"))
            assert load_disk(after).superblock.uuid == b"again and again!"
    assert outcomes[0] == "none" and outcomes[-1] == "new"


@settings(max_examples=60, deadline=None)
@given(stop=st.integers(0, 12), seed=st.integers(0, 1 << 32))
def test_a_power_cut_over_an_earlier_disk(stop: int, seed: int) -> None:
    """Never a mixture: not the old superblock with new maps, nor the new one with old records."""
    old = replace(BLUEPRINT, uuid=b"an earlier disk.", geometry=replace(GEOMETRY, virtual_size_bytes=32 * MIB))
    storage = FaultyStorage(SIZE)
    write_disk(storage, old)
    storage.operations, storage.stop_after = 0, stop
    with suppress(PowerCut):
        write_disk(storage, BLUEPRINT)
    after = storage.after_power_cut(seed)
    assert whole_or_nothing(after, old) in ("none", "old" if stop < 2 else "none", "new" if stop > 5 else "none")


def test_each_error_of_a_device_leaves_nothing_or_a_whole_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same through the real thing: file and device, every write and flush fails once, and the command is run again."""
    for fixed in (False, True):
        stop = 0
        while True:
            with Volume(path, fixed) as name:
                limit = Limit(stop)
                with monkeypatch.context() as patch:
                    patch.setattr(provision_module, "write_disk", limited(limit))
                    try:
                        provision(name, **SMALL)
                        finished = True
                    except DeviceError:
                        finished = False
                try:
                    provision(name, **(SMALL | {"virtual_size_bytes": 32 * MIB}))
                    assert not finished, "a finished disk was overwritten"
                    whole = False
                except Conflict:
                    whole = True
                if not fixed:
                    assert whole == finished and leftovers(path.parent) == []
                if whole:
                    assert not provision(name, **SMALL).created
            if finished:
                assert stop > 6
                break
            stop += 1


class Volume:
    """A place for a disk, of either kind, new for each attempt."""

    def __init__(self, path: Path, fixed: bool) -> None:
        self.path, self.fixed = path, fixed

    def __enter__(self) -> str:
        if not self.fixed:
            return f"file:{self.path}"
        self.loop = loop_device(sparse(self.path, 32 * MIB))
        return self.loop.__enter__()

    def __exit__(self, *_: object) -> None:
        if self.fixed:
            self.loop.__exit__(None, None, None)
        self.path.unlink(missing_ok=True)


class Limit:
    def __init__(self, left: int) -> None:
        self.left = left

    def count(self) -> None:
        if self.left == 0:
            raise DeviceError("the device failed, as the test wished")
        self.left -= 1


def limited(limit: Limit) -> Any:
    real = write_disk

    class Wrapper:
        def __init__(self, node: Any) -> None:
            self._node = node

        def __getattr__(self, name: str) -> Any:
            if name in ("pwrite", "zero", "flush"):
                limit.count()
            return getattr(self._node, name)

    return lambda node, *rest, **options: real(Wrapper(node), *rest, **options)


KILLED = """
import os, signal, sys
from fvd.storage import file_provider
from fvd.disk import provision
where, name = sys.argv[1:3]
def die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
if where == "before": provision.write_disk = die
if where == "written": file_provider._File.publish = die
if where == "linked":
    link = os.link
    os.link = lambda *a, **k: (link(*a, **k), die())
provision.provision(name, virtual_size_bytes=64 << 20, journal_size_bytes=65536, grow_step_bytes=16 << 20)
"""


@pytest.mark.parametrize(("where", "whole"), [("before", False), ("written", False), ("linked", True)])
def test_a_killed_provision_can_be_run_again(path: Path, where: str, whole: bool) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, where, f"file:{path}"], check=False, timeout=60)
    assert done.returncode == -9
    assert path.exists() == whole
    assert len(leftovers(path.parent)) == 1
    assert make(path).created != whole
    if whole:
        remove(f"file:{path}")
        assert make(path).created
    assert leftovers(path.parent) == []


def test_two_at_once(path: Path) -> None:
    code = f"import sys\nfrom fvd.disk.provision import provision\nprovision(sys.argv[1], **{SMALL!r})"
    processes = [subprocess.Popen([sys.executable, "-c", code, f"file:{path}"], stderr=subprocess.PIPE, text=True) for _ in range(4)]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert all(not error or "InUse" in error or "Conflict" in error for error in errors), errors
    assert not make(path).created and leftovers(path.parent) == []


def test_a_build_at_work_is_not_disturbed(path: Path) -> None:
    hidden = sparse(path.with_name(".disk.img.fvd-provision"), MIB)
    with claim(hidden, Ownership.WRITER), pytest.raises(InUse):
        make(path)
    assert make(path).created


@given(noise=st.binary(min_size=0, max_size=200), where=st.sampled_from([0, 8, 1 << 19, (1 << 20) + 4096]))
@settings(max_examples=25, deadline=None)
def test_whatever_the_storage_held_a_new_disk_is_whole(noise: bytes, where: int) -> None:
    storage = FaultyStorage(SIZE, fill=b"\xa5")
    storage.volatile[where : where + len(noise)] = np.frombuffer(noise, np.uint8)
    write_disk(storage, BLUEPRINT)
    assert load_disk(storage).superblock == BLUEPRINT
