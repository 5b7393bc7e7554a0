# SPDX-License-Identifier: Apache-2.0
"""fvd.disk.opening: recovery, ownership, fallbacks; and that a read-only or failed open writes nothing at all."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loops import loop_device, run, sparse

from disks import MIB, crash, driven, make, start, volume
from fvd import _core
from fvd.base.options import PrefetchOptions
from fvd.device import node as node_module
from fvd.device import surviving
from fvd.device.claim import claim
from fvd.device.node import open_node
from fvd.disk import opening, recovery
from fvd.disk.opening import open_volume
from fvd.errors import Conflict, Corrupt, FvdError, InUse, InvalidArgument, NotFound, Unsupported
from fvd.format.geometry import Layout
from fvd.format.maps import EMPTY
from fvd.format.superblock import PENDING_LOG, SLOT_OFFSETS_BYTES, SUPERBLOCK_BYTES, Superblock, decode, encode
from fvd.modes import CACHE_MODES, DIRECT_CACHE_MODES


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "disk.img"


def superblocks(path: Path) -> list[Superblock]:
    data = path.read_bytes()
    return [decode(data[offset : offset + SUPERBLOCK_BYTES], slot) for slot, offset in enumerate(SLOT_OFFSETS_BYTES)]


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


# --- What opens --------------------------------------------------------------------------------------------------


def test_a_new_disk(path: Path) -> None:
    made = make(path)
    with open_volume(volume(path)) as disk:
        assert disk.superblock.generation == 3 and disk.superblock.log is not None
        assert disk.superblock.renewed(log=None, loss=None) == replace(made.superblock, generation=4)
        assert disk.was_clean and not disk.read_only and disk.base is None and disk.notices == []
        assert disk.node.direct and disk.allocator is not None
        assert disk.engine.free_slots == 14 and disk.engine.storage_size_bytes == 16 * MIB
        assert disk.engine.wake_below_bytes == 8 * MIB and disk.engine.guest_reserve_bytes == 4 * MIB
        assert [found.generation for found in superblocks(path)] == [2, 3], "an open disk names its log"
    assert [found.generation for found in superblocks(path)] == [4, 3], "nothing was asked of it: that is as good as a clean close"


@pytest.mark.parametrize("cache", CACHE_MODES)
def test_cache_modes(path: Path, cache: str) -> None:
    make(path)
    with driven(path, cache=cache) as driver:
        assert driver.volume.node.direct == (cache in DIRECT_CACHE_MODES)
        driver.pwrite(MIB + 1000, b"hello")
        driver.flush()
    with driven(path) as driver:
        assert driver.volume.was_clean
        assert driver.pread(MIB + 1000, 5) == b"hello"


def test_a_fallback_is_noticed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(path)
    monkeypatch.setattr(node_module, "_statx_direct_alignment", lambda fd: 0)
    with open_volume(volume(path)) as disk:
        assert not disk.node.direct
        assert any("O_DIRECT" in notice for notice in disk.notices)


def test_a_disk_that_was_not_closed_is_replayed(path: Path) -> None:
    make(path)
    with open_volume(volume(path)) as disk:
        pass
    driver = start(path)
    driver.pwrite(0, b"a" * 4096)
    driver.pwrite(40 * MIB, b"b" * 4096, fua=True)
    crash(driver)
    with open_volume(volume(path), read_only=True) as disk:
        assert not disk.was_clean and disk.journal_state.records_replayed > 0
    with driven(path) as driver:
        assert driver.pread(0, 4096) == b"a" * 4096
        assert driver.pread(40 * MIB, 4096) == b"b" * 4096
    with open_volume(volume(path)) as disk:
        assert disk.was_clean


def test_a_disk_that_was_not_closed_is_flushed_before_it_is_used(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule R13; what happens without it is played by tests/engine (a kill, then a power cut)."""
    make(path)
    driver = start(path)
    driver.pwrite(0, b"a" * 4096, fua=True)
    crash(driver)
    flushed: list[str] = []
    flush = node_module.Node.flush
    monkeypatch.setattr(node_module.Node, "flush", lambda node: (flushed.append(node.path), flush(node))[1])
    with open_volume(volume(path), read_only=True):
        assert flushed == []
    with open_volume(volume(path)):
        assert flushed == [str(path)] * 2  # the second: the superblock's
    with driven(path):
        pass
    flushed.clear()
    with open_volume(volume(path)):
        assert flushed == [str(path)]  # a closed disk needs only that


def test_what_a_failed_write_back_left_in_the_page_cache_is_not_believed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The maps that are used are those read after the cache was dropped."""
    make(path)
    driver = start(path, cache="writeback")
    driver.pwrite(0, b"a" * 4096, fua=True)
    crash(driver)
    steps: list[str] = []
    forget, load = node_module.Node.forget_cache, recovery.load_disk
    monkeypatch.setattr(node_module.Node, "forget_cache", lambda node: (steps.append("forget"), forget(node))[1])
    monkeypatch.setattr(recovery, "load_disk", lambda node: (steps.append("load"), load(node))[1])
    with open_volume(volume(path), cache="writeback"):
        assert steps == ["load", "forget", "load"]
    steps.clear()
    with open_volume(volume(path)):
        assert steps == ["load", "load"]  # O_DIRECT has no cache to mistrust; but a late write may have come before the flush


def test_read_only_writes_nothing_at_all(path: Path) -> None:
    make(path)
    driver = start(path)
    driver.pwrite(MIB, b"x" * MIB, fua=True)
    crash(driver)
    patch(path, SLOT_OFFSETS_BYTES[1] + 50, b"rot")  # even a lost superblock copy stays lost
    before = path.read_bytes(), path.stat().st_mtime_ns
    path.chmod(0o400)
    with driven(path, read_only=True) as driver:
        assert driver.pread(MIB, MIB) == b"x" * MIB
        driver.flush()
        assert driver.volume.allocator is None
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_several_readers_and_no_writer(path: Path) -> None:
    make(path)
    with open_volume(volume(path), read_only=True), open_volume(volume(path), read_only=True), pytest.raises(InUse):
        open_volume(volume(path))
    with open_volume(volume(path)), pytest.raises(InUse):
        open_volume(volume(path), read_only=True)


@pytest.mark.parametrize("sector", [512, 4096])
def test_a_device(path: Path, sector: int) -> None:
    with loop_device(sparse(path, 40 * MIB), "--direct-io=on", "--sector-size", str(sector)) as device:
        make(device)
        with driven(device) as driver:
            driver.pwrite(12345, b"odd place")
            assert driver.pread(12340, 20) == bytes(5) + b"odd place" + bytes(6)
            with pytest.raises(InUse):
                open_volume(device)
        with driven(device, read_only=True) as driver:
            assert driver.pread(12345, 9) == b"odd place"


def test_a_device_that_was_enlarged_is_used(path: Path) -> None:
    with loop_device(sparse(path, 10 * MIB)) as device:
        make(device)
        with open_volume(device) as disk:
            assert disk.engine.free_slots == 8
        os.truncate(path, 30 * MIB)
        run("losetup", "--set-capacity", device)
        with open_volume(device) as disk:
            assert disk.engine.free_slots == 28


def test_raw_layout(path: Path) -> None:
    make(path, layout=Layout.RAW)
    with driven(path) as driver:
        driver.pwrite(33 * MIB, b"here")
        driver.flush()
    data = path.read_bytes()
    assert data[2 * MIB + 33 * MIB :][:4] == b"here"  # identity-mapped


def test_low_water_mark(path: Path) -> None:
    make(path)
    with open_volume(volume(path), low_water_bytes=3 * MIB) as disk:
        assert disk.engine.wake_below_bytes == 3 * MIB and disk.engine.guest_reserve_bytes == 2 * MIB
    with pytest.raises(InvalidArgument, match="less than one chunk"):
        open_volume(volume(path), low_water_bytes=1)


def test_options_that_do_not_exist(path: Path) -> None:
    make(path)
    for options in ({"cache": "writebak"}, {"on_full": "explode"}):
        with pytest.raises(InvalidArgument, match="choose one of"):
            open_volume(volume(path), **options)  # type: ignore[arg-type]


# --- Superblock copies -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slot", [0, 1])
def test_a_lost_copy_is_written_anew_by_a_writer(path: Path, slot: int) -> None:
    made = make(path)
    patch(path, SLOT_OFFSETS_BYTES[slot], os.urandom(4096))
    with open_volume(volume(path)) as disk:
        assert "written anew" in disk.notices[0]
    found = superblocks(path)
    assert {copy.uuid for copy in found} == {made.superblock.uuid}
    with open_volume(volume(path)) as disk:
        assert disk.notices == []


def test_unknown_autoclear_features_are_cleared_by_the_first_writer(path: Path) -> None:
    made = make(path)
    patch(path, SLOT_OFFSETS_BYTES[1], encode(replace(made.superblock, generation=3, autoclear_features=12)))
    with open_volume(volume(path), read_only=True) as disk:
        assert disk.superblock.autoclear_features == 12
    assert superblocks(path)[1].generation == 3
    with open_volume(volume(path)) as disk:
        assert (disk.superblock.generation, disk.superblock.autoclear_features) == (4, PENDING_LOG)
    assert superblocks(path)[0].generation == 4


def test_unknown_incompatible_features_are_refused(path: Path) -> None:
    make(path)
    data = bytearray(path.read_bytes()[:4096])
    data[48] = 1
    data[8:12] = _core.checksum(bytes(data[24:40]), 0, bytes(data), 8).to_bytes(4, "little")
    patch(path, 0, bytes(data))
    patch(path, SLOT_OFFSETS_BYTES[1], bytes(4096))
    with pytest.raises(Unsupported, match=str(path)):
        open_volume(volume(path))


# --- What does not open, and says why ------------------------------------------------------------------------------


def check_untouched(path: Path, kind: type[FvdError], words: str, **options: Any) -> None:
    before = path.read_bytes()
    for read_only in (True, False):
        with pytest.raises(kind, match=words) as caught:
            open_volume(volume(path), read_only=read_only, **options)
        assert str(path) in str(caught.value)
        assert type(caught.value) is kind
    assert path.read_bytes() == before
    with path.open("r+b"):
        pass


def test_what_is_no_disk(path: Path) -> None:
    with pytest.raises(NotFound):
        open_volume(volume(path))
    sparse(path, 16 * MIB)
    check_untouched(path, NotFound, "no fvd disk")
    os.truncate(path, 100)
    check_untouched(path, NotFound, "no fvd disk")


def test_both_superblocks_damaged(path: Path) -> None:
    make(path)
    for offset in SLOT_OFFSETS_BYTES:
        patch(path, offset + 64, b"\xff")
    check_untouched(path, Corrupt, "checksum")


@pytest.mark.parametrize(("size", "words"), [(MIB, "cut off"), (2 * MIB - 4096, "cut off")])
def test_metadata_cut_off(path: Path, size: int, words: str) -> None:
    make(path)
    os.truncate(path, size)
    check_untouched(path, Corrupt, words)


def test_data_cut_off(path: Path) -> None:
    make(path)
    with driven(path) as driver:
        driver.pwrite(0, b"x" * 5 * MIB)
    os.truncate(path, 7 * MIB)
    with open_volume(volume(path)):
        pass
    os.truncate(path, 7 * MIB - 512)
    check_untouched(path, Corrupt, f"reach to byte {7 * MIB}")


def test_a_raw_disk_cut_off(path: Path) -> None:
    make(path, layout=Layout.RAW)
    os.truncate(path, 66 * MIB - 1)
    check_untouched(path, Corrupt, "cut off")


@pytest.mark.parametrize("place", ["bitmap", "table", "journal"])
def test_damaged_metadata(path: Path, place: str) -> None:
    geometry = make(path).superblock.geometry
    offset = {
        "bitmap": geometry.bitmap_offset_bytes,
        "table": geometry.table_offset_bytes,
        "journal": geometry.journal_offset_bytes + 4096,
    }[place]
    patch(path, offset + 17, b"rot")
    check_untouched(path, Corrupt, place)


def test_a_lost_map_write_is_found(path: Path) -> None:
    """The page is an older, valid one: only the hash of the whole maps can tell."""
    geometry = make(path).superblock.geometry
    old = path.read_bytes()[geometry.table_offset_bytes :][:4096]
    with driven(path) as driver:
        driver.pwrite(0, b"x" * MIB)
    patch(path, geometry.table_offset_bytes, old)
    check_untouched(path, Corrupt, "hash")


def test_records_of_an_earlier_disk_on_the_same_storage(path: Path, tmp_path: Path) -> None:
    """Its journal has higher sequences, and all of its pages are valid, for it."""
    with loop_device(sparse(path, 32 * MIB)) as device:
        make(device)
        with driven(device) as driver:
            for chunk in range(20):
                driver.pwrite(chunk * MIB, b"secret" * 100, fua=True)
        ring = path.read_bytes()[MIB : MIB + 64 * 1024]
        with open_node(device) as node:
            node.zero(0, MIB)
        make(device)
        fresh = path.read_bytes()[MIB : MIB + 64 * 1024]
        with open_node(device) as node:
            mixed = np.frombuffer(ring, np.uint8).copy()
            mixed[4096:8192] = np.frombuffer(fresh, np.uint8)[4096:8192]
            node.pwrite(MIB, mixed)
        with driven(device) as driver:
            assert driver.volume.journal_state.commits_replayed == 1
            assert driver.pread(0, 21 * MIB) == bytes(21 * MIB)


# --- Bases -------------------------------------------------------------------------------------------------------


def full(path: Path, size_bytes: int = MIB) -> Path:
    """A base without holes: one of nothing else is never opened."""
    path.write_bytes(b"base" * (size_bytes // 4))
    return path


def test_a_base_shows_through(path: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.write_bytes(os.urandom(3 * MIB + 777))
    make(path, base=base)
    with driven(path) as driver:
        contents = bytearray(base.read_bytes().ljust(64 * MIB, b"\0"))
        assert driver.pread(0, 4 * MIB) == contents[: 4 * MIB]
        driver.pwrite(3 * MIB + 700, b"over the end of the base" * 10)
        contents[3 * MIB + 700 : 3 * MIB + 940] = b"over the end of the base" * 10
        assert driver.pread(0, 5 * MIB) == contents[: 5 * MIB]
    with driven(path) as driver:
        assert driver.pread(0, 5 * MIB) == contents[: 5 * MIB]
    assert base.stat().st_size == 3 * MIB + 777


def test_a_base_is_shared_by_disks_but_not_with_a_writer(path: Path, tmp_path: Path) -> None:
    base = full(tmp_path / "base")
    make(path, base=base)
    make(tmp_path / "second", base=base)
    with open_volume(volume(path)), open_volume(volume(tmp_path / "second")):
        pass
    with claim(base), pytest.raises(InUse, match="base"):
        open_volume(volume(path))


@pytest.mark.parametrize("size", [MIB - 1, MIB + 1, 0])
def test_a_base_whose_size_has_changed(path: Path, tmp_path: Path, size: int) -> None:
    base = full(tmp_path / "base")
    make(path, base=base)
    os.truncate(base, size)
    check_untouched(path, Conflict, f"has {size} bytes, but had {MIB}")
    os.truncate(base, MIB)
    with open_volume(volume(path)):
        pass


def test_a_base_that_is_gone(path: Path, tmp_path: Path) -> None:
    base = full(tmp_path / "base")
    make(path, base=base)
    base.unlink()
    check_untouched(path, NotFound, "base is missing")


def test_a_base_is_never_probed_again(path: Path, tmp_path: Path) -> None:
    """What a guest wrote there may look like another format with a file name in it; it stays raw."""
    base = full(tmp_path / "base")
    make(path, base=base)
    patch(base, 0, b"QFI\xfb" + bytes(100))
    with driven(path) as driver:
        assert driver.pread(0, 4) == b"QFI\xfb"


def test_nothing_stays_open_when_opening_fails(path: Path, tmp_path: Path) -> None:
    base = full(tmp_path / "base")
    make(path, base=base)
    os.truncate(base, 1)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(3):
        with pytest.raises(Conflict):
            open_volume(volume(path))
    assert len(os.listdir("/proc/self/fd")) <= before  # noqa: PTH208
    os.truncate(base, MIB)
    open_volume(volume(path)).close()
    assert len(os.listdir("/proc/self/fd")) <= before  # noqa: PTH208


def cover(path: Path, base: Path) -> None:
    """Every block that the base reaches is written."""
    make(path, base=base, block_size_bytes=4096)
    with driven(path) as driver:
        driver.pwrite(0, b"mine" * (base.stat().st_size // 4))


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("layout", Layout)
def test_a_base_that_nothing_is_read_from_any_more_may_be_gone(path: Path, tmp_path: Path, layout: Layout, read_only: bool) -> None:
    base = full(tmp_path / "base", MIB + 4)
    make(path, base=base, layout=layout, block_size_bytes=4096)
    with driven(path) as driver:
        driver.pwrite(0, b"mine" * (MIB // 4))
        assert driver.volume.base is not None and not driver.volume.base_released
    base.rename(tmp_path / "away")
    with pytest.raises(NotFound, match="base is missing"):  # its last block still comes from there
        open_volume(volume(path), read_only=read_only)
    (tmp_path / "away").rename(base)
    with driven(path) as driver:
        driver.pwrite(MIB, b"mine")
    base.unlink()
    with driven(path, read_only=read_only) as driver:
        assert driver.volume.base is None
        assert driver.volume.base_released and driver.volume.copying is None
        assert driver.pread(0, MIB + 12) == b"mine" * (MIB // 4 + 1) + b"\0" * 8


def test_a_disk_that_ends_before_its_base_needs_no_more_of_it(path: Path, tmp_path: Path) -> None:
    base = full(tmp_path / "base", 4 * MIB)
    make(path, base=base, virtual_size_bytes=MIB + 512, truncate_base=True)
    with driven(path) as driver:
        driver.pwrite(0, b"mine" * (MIB // 4 + 128))
    base.unlink()
    with open_volume(volume(path)) as disk:
        assert disk.base_released


def test_what_is_trimmed_after_the_base_is_gone_is_zeros_for_good(path: Path, tmp_path: Path) -> None:
    """The engine still knows that there was a base: with its bits gone, the block would be the base's again."""
    base = full(tmp_path / "base")
    cover(path, base)
    base.rename(tmp_path / "away")
    with driven(path) as driver:
        driver.trim(0, MIB)
        driver.flush()
        assert driver.pread(0, MIB) == bytes(MIB)
    (tmp_path / "away").rename(base)
    with driven(path) as driver:
        assert driver.volume.base_released
        assert driver.pread(0, MIB) == bytes(MIB)


def test_what_a_crash_takes_back_needs_the_base_again(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = full(tmp_path / "base")
    make(path, base=base)
    driver = start(path, cache="unsafe")
    driver.pwrite(0, b"mine" * (MIB // 4))
    crash(driver)
    monkeypatch.setattr(surviving, "boot_id", lambda: b"after the crash!")
    with open_volume(volume(path)) as disk:
        assert not disk.base_released and disk.base is not None
        assert "restarted" in disk.notices[0]


def test_the_base_is_released(path: Path, tmp_path: Path) -> None:
    make(path, base=full(tmp_path / "base"))
    steps: list[str] = []
    with open_volume(volume(path)) as disk:
        base = disk.base
        assert base is not None and base.fd >= 0
        disk.detach_base = lambda: steps.append(f"detached while open: {base.fd >= 0}")
        disk.release_base()
        assert steps == ["detached while open: True"] and base.fd == -1
        assert disk.base is None and disk.base_released
        disk.release_base()
        assert len(steps) == 1


def test_a_disk_without_a_base_releases_none(path: Path) -> None:
    make(path)
    with open_volume(volume(path)) as disk:
        assert not disk.base_released and disk.copying is None
        disk.release_base()
        assert not disk.base_released


# --- Copying: what the engine and its glue are told ----------------------------------------------------------------


class FakeCopying:
    def __init__(self, engine: Any, **options: Any) -> None:
        self.engine, self.options = engine, options
        self.started: list[Any] = []

    def start(self, options: PrefetchOptions) -> None:
        self.started.append(options)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The options of the latest engine."""
    options: dict[str, Any] = {}
    real = opening.engine_on

    def engine_on(disk: Any, **given: Any) -> Any:
        options.clear()
        options.update(given)
        return real(disk, **given)

    monkeypatch.setattr(opening, "engine_on", engine_on)
    monkeypatch.setattr(opening, "Copying", FakeCopying)
    return options


@pytest.mark.parametrize("default", [False, True])
@pytest.mark.parametrize("asked", [None, False, True])
@pytest.mark.parametrize("read_only", [False, True])
def test_copy_on_read(path: Path, tmp_path: Path, told: dict[str, Any], default: bool, asked: bool | None, read_only: bool) -> None:
    make(path, base=full(tmp_path / "base"), copy_on_read=default)
    with open_volume(volume(path), copy_on_read=asked, read_only=read_only):
        assert told["copy_on_read"] == ((default if asked is None else asked) and not read_only)


SLOWLY = PrefetchOptions(delay_s=0.0, rate_bytes=1 << 20)


@pytest.mark.parametrize("default", [False, True])
@pytest.mark.parametrize(
    ("asked", "wanted"), [(None, None), (False, []), (True, [PrefetchOptions()]), (SLOWLY, [SLOWLY])], ids=["None", "no", "yes", "slowly"]
)
def test_prefetch(path: Path, tmp_path: Path, told: dict[str, Any], default: bool, asked: Any, wanted: Any) -> None:
    base = full(tmp_path / "base")
    make(path, base=base, prefetch=default)
    events: list[Any] = []
    with open_volume(volume(path), prefetch=asked, on_event=events.append) as disk:
        copying: Any = disk.copying
        assert copying.engine is disk.engine
        assert copying.started == ([PrefetchOptions()] * default if wanted is None else wanted)
        given = copying.options
        assert (given["base_size_bytes"], given["virtual_size_bytes"], given["base_locator"]) == (MIB, 64 * MIB, str(base))
        assert given["volume_name"] == volume(path)
        given["on_event"]("something")
        assert events == ["something"]
        given["release"]()
        assert disk.base is None and disk.base_released
    with open_volume(volume(path), prefetch=asked, read_only=True) as disk:
        assert disk.copying is None and disk.base is not None


@pytest.mark.parametrize("timeout_seconds", [0, -1, float("nan"), float("inf")])
def test_a_base_timeout_that_makes_no_sense(path: Path, timeout_seconds: float) -> None:
    make(path)
    with pytest.raises(InvalidArgument, match="base timeout"):
        open_volume(volume(path), base_timeout_s=timeout_seconds)


def test_the_base_timeout_reaches_base_and_engine(
    path: Path, tmp_path: Path, told: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    make(path, base=full(tmp_path / "base"))
    seen: list[float] = []
    real = opening.open_base
    monkeypatch.setattr(
        opening, "open_base", lambda reference, node, timeout_seconds, user: (seen.append(timeout_seconds), real(reference, node))[1]
    )
    with open_volume(volume(path), base_timeout_s=1.5):
        assert seen == [1.5] and told["base_timeout_ns"] == 1_500_000_000


def test_a_copy_of_a_disk_opens(path: Path) -> None:
    make(path)
    with driven(path) as driver:
        driver.pwrite(0, b"x" * MIB)
    shutil.copy(path, path.with_name("copy"))
    with open_volume(volume(path)), driven(path.with_name("copy")) as driver:
        assert driver.pread(0, MIB) == b"x" * MIB
        bitmap, table = driver.call(driver.volume.engine.snapshot_maps)
        assert int(bitmap[0]) == 0xFFFF and table is not None and len(table) - table.count(EMPTY) == 1
