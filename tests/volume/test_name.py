# SPDX-License-Identifier: Apache-2.0
"""fvd.volume.name: what is a volume and what is not."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fvd.errors import InvalidArgument
from fvd.volume.name import VolumeKind, VolumeName, parse_name

pytestmark = pytest.mark.pure


@pytest.mark.parametrize(
    ("text", "canonical", "kind"),
    [
        ("file:/a/b.img", "file:/a/b.img", VolumeKind.FILE),
        ("file://a/../b.img", "file:/b.img", VolumeKind.FILE),
        ("file:/a/./b", "file:/a/b", VolumeKind.FILE),
        ("file:/with blank and ü", "file:/with blank and ü", VolumeKind.FILE),
        ("file:/a:b", "file:/a:b", VolumeKind.FILE),
        ("/dev/sdb", "/dev/sdb", VolumeKind.DEVICE),
        ("/dev/mapper/vg0-vm1", "/dev/mapper/vg0-vm1", VolumeKind.DEVICE),
        ("/dev/disk/by-id/wwn-1", "/dev/disk/by-id/wwn-1", VolumeKind.DEVICE),
        ("vg0/vm1", "vg0/vm1", VolumeKind.LVM),
        ("/dev/vg0/vm1", "vg0/vm1", VolumeKind.LVM),
        ("/dev//vg0/./vm1", "vg0/vm1", VolumeKind.LVM),
        ("vg_0/a+b.c-d", "vg_0/a+b.c-d", VolumeKind.LVM),
        ("vg/.hidden", "vg/.hidden", VolumeKind.LVM),
        ("//dev//loop0", "/dev/loop0", VolumeKind.DEVICE),
        ("/dev/shm/../sdb", "/dev/sdb", VolumeKind.DEVICE),
    ],
)
def test_names(text: str, canonical: str, kind: VolumeKind) -> None:
    name = parse_name(text)
    assert (str(name), name.kind) == (canonical, kind)
    assert name.short == canonical.rpartition("/")[2]
    assert parse_name(canonical) == name
    assert parse_name(name) is name


def test_a_relative_path_counts_from_the_working_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(parse_name("file:vm.img")) == f"file:{tmp_path}/vm.img"


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("", "needs a name"),
        ("file:", "names no file"),
        ("file:/a/", "names no file"),
        ("file:..", "names no file"),
        ("/tmp/a.img", "write file:/tmp/a.img"),
        ("/dev", "write file:/dev"),
        ("/dev/../etc/passwd", "not below /dev"),
        ("vm.img", "write VG/LV, file:PATH"),
        ("a/b/c", "write VG/LV, file:PATH"),
        ("nbd://host/x", "write VG/LV, file:PATH"),
        ("-vg/lv", "file:PATH"),
        ("vg/-lv", "file:PATH"),
        ("vg/..", "file:PATH"),
        ("../lv", "file:PATH"),
        ("vg/", "file:PATH"),
        ("vg/a b", "file:PATH"),
        ("vg/a;reboot", "file:PATH"),
        ("vg/$(reboot)", "file:PATH"),
        ("vg/--yes", "file:PATH"),
        ("vg/@tag", "file:PATH"),
        ("vg/ü", "file:PATH"),
        ("mapper/vg-lv", "no volume group can be called mapper"),
        ("vg/x_tdata", "names for volumes of its own"),
        ("vg/snapshot0", "names for volumes of its own"),
        ("/dev/vg/pvmove0", "names for volumes of its own"),
        ("vg/" + "a" * 128, "file:PATH"),
        ("g" * 64 + "/" + "a" * 64, "too long"),
        ("vg/" + "-a" * 50, "file:PATH"),
        ("file:/a\nb", "control characters"),
        ("file:/a\0b", "control characters"),
        ("file:/\udc80", "UTF-8"),
    ],
)
def test_what_is_no_volume(text: str, hint: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_name(text)
    assert hint in str(caught.value)


def test_a_logical_volume_has_its_parts() -> None:
    name = parse_name("/dev/vg-0/vm--1")
    assert (name.group, name.lv, name.path, name.short) == ("vg-0", "vm--1", "/dev/vg-0/vm--1", "vm--1")


@given(st.text())
def test_any_text_is_a_volume_or_a_typed_error(text: str) -> None:
    for candidate in (text, f"file:{text}", f"/dev/{text}"):
        try:
            name = parse_name(candidate)
        except InvalidArgument:
            continue
        assert isinstance(name, VolumeName)
        assert parse_name(str(name)) == name
        assert name.path.startswith("/dev/" if name.kind is VolumeKind.DEVICE else "/")
        assert "/../" not in name.path and "//" not in name.path
