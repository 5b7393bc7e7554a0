# SPDX-License-Identifier: Apache-2.0
"""Memory that outlives a process: only in a tmpfs, only in folders that are the user's alone, by no link."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fvd.device import surviving
from fvd.device.node import open_node
from fvd.errors import NotFound, PermissionDenied, Unsupported


def test_what_is_written_is_there_for_the_next(pending_dir: Path) -> None:
    memory = surviving.make("a.1", 8192)
    memory.buffer[5] = 7
    path = memory.path
    memory.close()
    assert path == pending_dir / "a.1" and path.stat().st_mode & 0o777 == 0o600 and pending_dir.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_blocks * 512 >= 8192, "allocated"
    again = surviving.find(path)
    assert again.buffer[5] == 7 and len(again.buffer) == 8192
    assert surviving.kept("a.") == [path] and surviving.kept("b") == []
    again.remove()
    again.remove()
    again.close()
    with pytest.raises(NotFound):
        surviving.find(path)


def test_only_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FVD_PENDING_DIR", str(tmp_path / "pending"))
    with pytest.raises(Unsupported, match="not in memory"):
        surviving.make("a.1", 4096)
    assert not (tmp_path / "pending").exists() and surviving.kept("a") == []


def test_no_space(pending_dir: Path) -> None:
    with pytest.raises(Unsupported, match="bytes of memory could be had"):
        surviving.make("a.1", 1 << 50)
    assert not list(pending_dir.iterdir())


def test_links_and_foreign_folders_are_not_followed(pending_dir: Path, tmp_path: Path) -> None:
    memory = surviving.make("a.1", 4096)
    memory.close()
    (pending_dir / "b.1").symlink_to(memory.path)
    with pytest.raises(PermissionDenied):
        surviving.find(pending_dir / "b.1")
    secret = tmp_path / "secret"
    secret.write_text("x")
    with pytest.raises(NotFound, match="no memory of fvd's"):
        surviving.find(secret)
    (pending_dir / "c.1").touch(0o666)
    (pending_dir / "c.1").chmod(0o666)
    with pytest.raises(PermissionDenied, match="only its owner"):
        surviving.find(pending_dir / "c.1")
    pending_dir.chmod(0o777)
    with pytest.raises(PermissionDenied, match="nobody else may write"):
        surviving.find(memory.path)
    with pytest.raises(Unsupported, match="nobody else may write"):
        surviving.make("d.1", 4096)
    pending_dir.chmod(0o700)


def test_a_link_in_place_of_the_folder(pending_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    surviving.make("a.1", 4096).close()
    link = pending_dir.parent / "link"
    link.symlink_to(pending_dir)
    monkeypatch.setenv("FVD_PENDING_DIR", str(link))
    with pytest.raises(Unsupported):
        surviving.make("a.2", 4096)


def test_the_place_of_a_file_is_its_inode(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(bytes(4096))
    second.write_bytes(bytes(4096))
    with open_node(first) as node, open_node(second) as other:
        place = surviving.lasting_place(node)
        assert place != surviving.lasting_place(other)
        first.rename(tmp_path / "c")
        with open_node(tmp_path / "c") as moved:
            assert surviving.lasting_place(moved) == place


def test_a_loop_device_is_known_by_the_file_under_it(tmp_path: Path) -> None:
    from loops import loop_device, sparse

    image = sparse(tmp_path / "image", 1 << 20)
    places = set()
    for _ in range(2):
        with loop_device(image) as device, open_node(device) as node:
            places.add(surviving.lasting_place(node))
    assert len(places) == 1 and places.pop().startswith("loop ")


def test_ids() -> None:
    assert len(surviving.boot_id()) == len(surviving.host_id()) == 16
    assert any(surviving.boot_id()) and surviving.host_id() == surviving.host_id()
    assert os.getuid() == os.geteuid()
