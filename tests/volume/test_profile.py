# SPDX-License-Identifier: Apache-2.0
"""fvd.base.profile: what a guest read of a base, kept in a file that anybody may have written."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fvd.base import profile
from fvd.base.profile import default_path, load, merge, save
from fvd.device.folders import Place, reach
from fvd.errors import Conflict, DeviceError, FvdError, InvalidArgument, NotFound

BASE = 1 << 30
HEADER = b'{"fvd_profile":1,"base_size_bytes":1073741824}\n'


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "gold.img.fvd-profile")


def written(path: str, data: bytes) -> str:
    Path(path).write_bytes(data)
    return path


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def merge_slowly(size: int, reads: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Byte by byte."""
    seen: set[int] = set()
    order = []
    for offset, length in reads:
        for at in range(offset, min(offset + length, size)):
            if at not in seen:
                seen.add(at)
                order.append(at)
    merged: list[tuple[int, int]] = []
    for at in order:
        if merged and sum(merged[-1]) == at:
            merged[-1] = (merged[-1][0], merged[-1][1] + 1)
        else:
            merged.append((at, 1))
    return merged


def test_where_a_profile_is_by_itself() -> None:
    assert default_path("/images/gold.img") == "/images/gold.img.fvd-profile"
    assert [default_path(uri) for uri in ("nbd://host/x", "nbd+unix:///x?socket=/s", "rbd:pool/x", "https://host/x")] == [None] * 4


def test_first_reads_first_and_nothing_twice() -> None:
    assert merge(100, [(40, 10), (50, 10), (0, 5), (45, 10), (90, 20), (0, 50), (200, 5)]) == [(40, 20), (0, 5), (90, 10), (5, 35)]
    assert merge(100, []) == []


@given(st.integers(1, 40), st.lists(st.tuples(st.integers(0, 45), st.integers(1, 20)), max_size=20))
def test_merging_is_as_slow_merging(size: int, reads: list[tuple[int, int]]) -> None:
    assert merge(size, reads) == merge_slowly(size, reads)


@pytest.mark.parametrize("read", [(-1, 5), (0, 0), (0, -4)])
def test_a_read_that_cannot_be(read: tuple[int, int]) -> None:
    with pytest.raises(InvalidArgument):
        merge(100, [read])


def test_many_reads_are_merged_in_time() -> None:
    """A million take seconds, so a hundred thousand must not take more; quadratic would be minutes."""
    reads = [((index * 7919) % 100_000 * 8192, 12288) for index in range(100_000)]
    began = time.monotonic()
    assert sum(length for _, length in merge(1 << 40, reads)) == 99_999 * 8192 + 12288
    assert time.monotonic() - began < 5


def test_saved_and_loaded(path: str) -> None:
    assert save(path, BASE, [(4096, 4096), (8192, 4096), (0, 4096)]) == [(4096, 8192), (0, 4096)]
    assert load(path, BASE) == [(4096, 8192), (0, 4096)]
    assert Path(path).read_bytes() == HEADER + b"[4096,8192]\n[0,4096]\n"
    assert names_in(Path(path).parent) == [Path(path).name]
    assert Path(path).stat().st_mode & 0o077 == 0o044 & ~_umask()


def _umask() -> int:
    old = os.umask(0)
    os.umask(old)
    return old


@given(st.lists(st.tuples(st.integers(0, 1 << 62), st.integers(1, 1 << 40)), max_size=50))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_saved_can_be_loaded(tmp_path: Path, reads: list[tuple[int, int]]) -> None:
    path = str(tmp_path / "p")
    assert save(path, 1 << 62, reads) == load(path, 1 << 62)


def test_a_profile_is_replaced_and_nothing_else_is(path: str, tmp_path: Path) -> None:
    save(path, 4096, [(0, 4096)])
    save(path, BASE, [(4096, 4096)])
    assert load(path, BASE) == [(4096, 4096)]
    for data in (b"", b"important", b'{"name": 1}\n', b"x" * 5000, b"\xff\xfe"):
        other = written(str(tmp_path / "other"), data)
        with pytest.raises(Conflict, match=r"other is there and is no profile.*name another file"):
            save(other, BASE, [(0, 4096)])
        assert Path(other).read_bytes() == data
    with pytest.raises(FvdError):
        save(str(tmp_path), BASE, [])
    assert names_in(tmp_path) == ["gold.img.fvd-profile", "other"]


def test_a_link_stays_a_link(path: str, tmp_path: Path) -> None:
    save(path, BASE, [])
    link = tmp_path / "link"
    link.symlink_to(path)
    save(str(link), BASE, [(0, 4096)])
    assert link.is_symlink() and load(path, BASE) == [(0, 4096)]


def test_the_old_profile_stays_where_the_new_one_cannot_be_written(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save(path, BASE, [(0, 4096)])

    def fails(*_: object) -> None:
        raise OSError(errno.EIO, "no")

    monkeypatch.setattr(Place, "rename", fails)
    with pytest.raises(DeviceError):
        save(path, BASE, [])
    assert load(path, BASE) == [(0, 4096)] and names_in(Path(path).parent) == [Path(path).name]


def test_data_are_durable_before_the_name_is(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    fsync, replace = os.fsync, Place.rename
    monkeypatch.setattr(os, "fsync", lambda descriptor: (done.append("flush"), fsync(descriptor)))
    monkeypatch.setattr(Place, "rename", lambda *words: (done.append("replace"), replace(*words)))
    save(path, BASE, [])
    assert done[:2] == ["flush", "replace"]


def test_nobody_can_lead_a_new_profile_elsewhere(path: str, tmp_path: Path) -> None:
    """What is made anew is made where nothing is: neither a file nor a link of that name is followed or taken."""
    victim = tmp_path / "victim"
    Path(path).symlink_to(victim)
    with reach(tmp_path / "other") as place, pytest.raises(FileExistsError):
        place.create(Path(path).name, 0o644)
    assert not victim.exists()


def test_no_more_than_a_million_are_saved(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "EXTENTS_MAX", 3)
    assert save(path, BASE, [(at * 8192, 4096) for at in range(5)]) == [(0, 4096), (8192, 4096), (16384, 4096)]
    assert len(load(path, BASE)) == 3
    monkeypatch.setattr(profile, "EXTENTS_MAX", 2)
    with pytest.raises(InvalidArgument, match="more than 2 extents"):
        load(path, BASE)


def test_of_another_base(path: str) -> None:
    save(path, BASE, [(0, 4096)])
    with pytest.raises(Conflict, match=rf"{path} was recorded of a base of {BASE} bytes, and this base has 4096"):
        load(path, 4096)


def test_there_is_none(path: str) -> None:
    with pytest.raises(NotFound, match=path):
        load(path, BASE)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n",
        b"[0,4096]\n",
        b"{}\n",
        b'{"fvd_profile":2,"base_size_bytes":1073741824}\n',
        b'{"fvd_profile":true,"base_size_bytes":1073741824}\n',
        b'{"fvd_profile":1}\n',
        b'{"fvd_profile":1,"base_size_bytes":"1073741824"}\n',
        b'{"fvd_profile":1,"base_size_bytes":1073741824.0}\n',
        b'{"fvd_profile":1,"base_size_bytes":-1}\n',
        b'{"fvd_profile":1,"base_size_bytes":1073741824' + b" " * 2000 + b"}\n",
        b"[" * 1000 + b"\n",
        HEADER.rstrip(),
        HEADER + b"[0,4096",
        HEADER + b"[0,4096]",
        HEADER + b"[0,4096]\n\n[4096,4096]\n",
        HEADER + b"[0,0]\n",
        HEADER + b"[-1,4096]\n",
        HEADER + b"[0,1073741825]\n",
        HEADER + b"[1073741824,1]\n",
        HEADER + b"[9999999999999999999,1]\n",
        HEADER + b"[0,99999999999999999999999999]\n",
        HEADER + b"[0,4096,1]\n",
        HEADER + b"[0]\n",
        HEADER + b"[true,4096]\n",
        HEADER + b"[0.0,4096]\n",
        HEADER + b'["0",4096]\n',
        HEADER + "[٣,4096]\n".encode(),
        HEADER + b"[0,4096]\x00\n",
        HEADER + b"[0,4096]\r\n",
    ],
)
def test_what_is_no_profile(path: str, data: bytes) -> None:
    with pytest.raises(InvalidArgument, match=rf"the profile {path} cannot be used: .*; record it again, or go without"):
        load(written(path, data), BASE)


def test_spaces_and_what_a_later_version_may_add_to_the_header(path: str) -> None:
    data = json.dumps({"fvd_profile": 1, "base_size_bytes": BASE, "seconds": 30}) + "\n" + json.dumps([0, 4096]) + "\n"
    assert load(written(path, data.encode()), BASE) == [(0, 4096)]


def test_a_huge_file_is_not_read(path: str) -> None:
    written(path, HEADER)
    os.truncate(path, profile.BYTES_MAX + 1)
    with pytest.raises(InvalidArgument, match="the most"):
        load(path, BASE)


LINES = st.one_of(
    st.binary(max_size=30),
    st.builds(lambda offset, length: b"[%d,%d]" % (offset, length), st.integers(-2, 1 << 31), st.integers(-2, 1 << 31)),
)


@given(st.one_of(st.binary(max_size=200), st.lists(LINES, max_size=8).map(lambda lines: HEADER + b"".join(line + b"\n" for line in lines))))
@example(HEADER)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
def test_any_file_is_loaded_or_refused(tmp_path: Path, data: bytes) -> None:
    path = written(str(tmp_path / "p"), data)
    try:
        extents = load(path, BASE)
    except InvalidArgument as error:
        assert path in str(error)
    except Conflict as error:
        assert path in str(error)
    else:
        assert all(offset >= 0 and length > 0 and offset + length <= BASE for offset, length in extents)
