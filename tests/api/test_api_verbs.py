# SPDX-License-Identifier: Apache-2.0
"""``import fvd``: the verbs as functions, on closed disks."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import pytest

import fvd

GIB = 1 << 30
MIB = 1 << 20


@pytest.fixture
def volume(tmp_path: Path) -> str:
    return f"file:{tmp_path / 'vm1.img'}"


def test_sizes_as_text_or_numbers(volume: str) -> None:
    made = fvd.provision(volume, "10G", grow_step="64M", block_size=4096)
    assert (made.virtual_size, made.grow_step, made.block_size, made.created) == (10 * GIB, 64 * MIB, 4096, True)
    assert not fvd.provision(volume, 10 * GIB, grow_step=64 * MIB, block_size="4K").created
    with pytest.raises(fvd.InvalidArgument):
        fvd.provision(volume, -1)


def test_errors_are_types(volume: str, tmp_path: Path) -> None:
    with pytest.raises(fvd.NotFound):
        fvd.info(volume)
    fvd.provision(volume, "10G")
    with pytest.raises(fvd.Conflict, match="virtual_size"):
        fvd.provision(volume, "20G")
    with pytest.raises(fvd.InvalidArgument, match="layout"):
        fvd.provision(volume, "10G", layout="qcow2")  # type: ignore[arg-type]
    with pytest.raises(ValueError):  # an InvalidArgument is one
        fvd.info("nonsense")
    with fvd.open(volume), pytest.raises(fvd.InUse):
        fvd.open(volume)
    with (tmp_path / "vm1.img").open("r+b") as file:
        for offset in (100, 524288 + 100):
            file.seek(offset)
            file.write(b"rot")
    with pytest.raises(fvd.Corrupt):
        fvd.open(volume)


def test_the_life_of_a_disk(volume: str, tmp_path: Path) -> None:
    fvd.provision(volume, "10G", grow_step="64M")
    assert fvd.extend(volume, "64M").added_bytes == 64 * MIB
    assert fvd.info(volume).storage_size == 128 * MIB
    assert fvd.check(volume).errors == []
    assert fvd.map(volume).extents == [fvd.Extent(0, 10 * GIB, "zero", None)]
    assert fvd.dump(volume)["superblocks"][0]["valid"]
    [listed] = fvd.list_volumes(str(tmp_path))
    assert (listed.volume, listed.state) == (volume, "closed")
    assert fvd.remove(volume) is True
    assert fvd.remove(volume) is False
    assert fvd.list_volumes(str(tmp_path)) == []


def test_results_cannot_be_changed(volume: str) -> None:
    made = fvd.provision(volume, "10G")
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.virtual_size = 1  # type: ignore[misc]


def test_provision_reports_progress(volume: str) -> None:
    seen: list[tuple[int, int]] = []
    fvd.provision(volume, "1T", progress=lambda done, total: seen.append((done, total)))
    assert seen
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_one_provision_wins(volume: str) -> None:
    """The same provision from many threads at once: one makes the disk, the others find it or are told that it is being made."""
    made: list[bool] = []

    def provision() -> None:
        try:
            made.append(fvd.provision(volume, "10G").created)
        except (fvd.InUse, fvd.Conflict):
            made.append(False)

    threads = [threading.Thread(target=provision) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [False] * 7 + [True]
    assert fvd.check(volume).errors == []


def test_map_joins_what_only_an_answer_cut() -> None:
    from fvd.api.verbs import _joined

    pieces = [
        fvd.Extent(0, 10, "zero", None),
        fvd.Extent(10, 10, "zero", None),
        fvd.Extent(20, 10, "data", 100),
        fvd.Extent(30, 10, "data", 110),
        fvd.Extent(40, 10, "data", 500),
    ]
    assert _joined(pieces) == [fvd.Extent(0, 20, "zero", None), fvd.Extent(20, 20, "data", 100), fvd.Extent(40, 10, "data", 500)]


def test_everything_public_is_documented() -> None:
    for name in fvd.__all__:
        if name not in ("BaseFormat", "CacheMode", "OnFull", "PrefetchState"):
            assert (getattr(fvd, name).__doc__ or "").strip(), name
    for kind in (fvd.Disk, fvd.Served):
        for name, member in vars(kind).items():
            if not name.startswith("_"):
                assert member.__doc__, f"{kind.__name__}.{name}"


def test_it_is_typed() -> None:
    assert (Path(fvd.__file__).parent / "py.typed").exists()
