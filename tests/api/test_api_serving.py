# SPDX-License-Identifier: Apache-2.0
"""``fvd.serve``: disks over NBD from this process, and the verbs on them by way of their control sockets."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from nbd_handle import connect

import fvd
from fvd.api import serving, verbs
from fvd.volume.name import parse_name

GIB = 1 << 30
MIB = 1 << 20


@pytest.fixture
def volume(tmp_path: Path) -> str:
    name = f"file:{tmp_path / 'vm1.img'}"
    fvd.provision(name, "1G", grow_step="64M")
    return name


def test_serve(volume: str, tmp_path: Path) -> None:
    with fvd.serve(volume, socket=tmp_path / "vm.sock") as served:
        assert served.exports == [fvd.Export(volume, "vm1.img", served.uri)]
        handle = connect(served.uri)
        handle.pwrite(b"x" * MIB, 10 * MIB)
        found = fvd.info(volume)  # from the same process: through the control socket all the same
        assert found == served.info() or found.statistics != served.info().statistics
        assert (found.uri, found.mapped_bytes, found.clean) == (served.uri, MIB, False)
        assert [extent.state for extent in fvd.map(volume).extents] == ["zero", "data", "zero"]
        report = fvd.check(volume)
        assert (report.errors, report.served) == ([], True)
        grown = fvd.extend(volume, "64M")
        assert grown.storage_size == served.info(volume).storage_size
        assert served.extend("64M").added_bytes == 64 * MIB
        assert [(listed.volume, listed.state) for listed in fvd.list_volumes()] == [(volume, "served")]
        for action in (lambda: fvd.remove(volume), lambda: fvd.dump(volume), lambda: fvd.open(volume)):
            with pytest.raises(fvd.InUse):
                action()
    served.close()
    assert fvd.info(volume).clean
    assert fvd.list_volumes() == []
    assert not (tmp_path / "vm.sock").exists()


def test_nothing_is_left_running(volume: str, tmp_path: Path, runtime_dir: Path) -> None:
    before = set(threading.enumerate())
    with fvd.serve(volume, socket=tmp_path / "vm.sock") as served:
        connect(served.uri)
        fvd.info(volume)
    assert set(threading.enumerate()) <= before
    assert list(runtime_dir.iterdir()) == []


def test_tcp(volume: str) -> None:
    ended = threading.Event()
    with fvd.serve(volume, listen="127.0.0.1:0", on_end=ended.set) as served:
        assert connect(served.uri).get_size() == GIB
        assert not ended.is_set()
    assert ended.is_set()


def test_several(volume: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    another = f"file:{tmp_path}/other/vm1.img"
    fvd.provision(another, "2G")
    with fvd.serve(volume, another, socket=tmp_path / "vm.sock") as served:
        assert [export.name for export in served.exports] == [volume, another]  # the last part alone would not tell them apart
        assert [connect(export.uri).get_size() for export in served.exports] == [GIB, 2 * GIB]
        assert served.info(another).virtual_size == fvd.info(another).virtual_size == 2 * GIB
        with pytest.raises(fvd.InvalidArgument, match="several"):
            served.info()
        with pytest.raises(fvd.InvalidArgument, match="several"):
            assert served.uri
        with pytest.raises(fvd.NotFound):
            served.info("file:/elsewhere")


def test_all_or_none(volume: str, tmp_path: Path, runtime_dir: Path) -> None:
    with pytest.raises(fvd.NotFound):
        fvd.serve(volume, f"file:{tmp_path}/absent", socket=tmp_path / "vm.sock")
    with fvd.open(volume):  # nobody else has it
        pass
    assert list(runtime_dir.iterdir()) == []
    assert not (tmp_path / "vm.sock").exists()


def test_two_may_serve_it_read_only(volume: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with fvd.serve(volume, socket=tmp_path / "one.sock", read_only=True) as one:
        with fvd.serve(volume, socket=tmp_path / "two.sock", read_only=True) as two:
            assert "another process serves it read-only too" in caplog.text
            assert connect(one.uri).pread(4096, 0) == connect(two.uri).pread(4096, 0)
            assert fvd.info(volume).uri == one.uri
        assert fvd.info(volume).uri == one.uri
        with pytest.raises(fvd.InUse):
            fvd.serve(volume, socket=tmp_path / "two.sock")


def test_what_cannot_be_served(volume: str, tmp_path: Path) -> None:
    for arguments in ({}, {"socket": "a", "listen": "b"}, {"listen": "nowhere"}):
        with pytest.raises(fvd.InvalidArgument):
            fvd.serve(volume, **arguments)  # type: ignore[arg-type]
    with pytest.raises(fvd.InvalidArgument, match="at least one"):
        fvd.serve(socket="a")
    with pytest.raises(fvd.InvalidArgument, match="named twice"):
        fvd.serve(volume, volume, socket="a")
    (tmp_path / "vm.sock").write_text("not a socket")
    with pytest.raises(fvd.FvdError):
        fvd.serve(volume, socket=tmp_path / "vm.sock")
    assert fvd.info(volume).clean


def test_a_long_map_comes_in_pieces(volume: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fvd.serve(volume, socket=tmp_path / "vm.sock") as served:
        handle = connect(served.uri)
        for number in (9, 3, 4, 7, 1):
            handle.pwrite(b"x" * MIB, 2 * number * MIB)
        whole = fvd.map(volume)
        part = fvd.map(volume, offset="3M", length="12M")
        monkeypatch.setattr(serving.OpenedVerbs.map, "__defaults__", (0, None, 2))
        assert fvd.map(volume) == whole
        assert fvd.map(volume, offset="3M", length="12M") == part
    assert fvd.map(volume) == whole
    assert (part.offset, part.length, part.extents[0].start) == (3 * MIB, 12 * MIB, 3 * MIB)
    assert sum(extent.length for extent in part.extents) == 12 * MIB


def test_export_names() -> None:
    def names(*volumes: str) -> list[str]:
        return serving.export_names([parse_name(volume) for volume in volumes])

    assert names("file:/a/x", "file:/a/y") == ["x", "y"]
    assert names("file:/a/x", "file:/b/x", "file:/b/y") == ["file:/a/x", "file:/b/x", "y"]


def test_pieces_are_of_a_sane_size() -> None:
    assert 1000 <= verbs.MAP_PIECE_EXTENTS <= 200_000
