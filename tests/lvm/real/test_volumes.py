# SPDX-License-Identifier: Apache-2.0
"""Disks in real logical volumes: their life, what another volume left, what is refused, two at once. Real lvm2, device-mapper and udev."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from real_devices import GIB, MIB, Group, Server, fvd_lv, load_module, run, settle

import fvd

SMALL: dict[str, Any] = {"journal_size": "1M", "grow_step": "64M"}
Serving = Callable[..., AbstractContextManager[Server]]
SECRET = b"another tenant's secret. " * 2621 + bytes(11)  # 64 KiB
assert len(SECRET) == 65536


def not_zero(volume: str, length: int) -> dict[int, int]:
    """Every byte that is not zero, by its offset. In pieces: the guest's kernel ends a process of some 60,000 pages where its host's
    vm.max_map_count is the kernel's own (seen on Debian 13's User-Mode Linux)."""
    piece = 8 * MIB
    shown: dict[int, int] = {}
    with fvd.open(volume, read_only=True) as disk:
        for start in range(0, length, piece):
            data = np.frombuffer(disk.pread(start, min(piece, length - start)), np.uint8)
            shown |= {start + int(offset): int(data[offset]) for offset in np.flatnonzero(data)[:1000]}
    return shown


# --- A life ----------------------------------------------------------------------------------------------------------------------


def test_from_provision_to_remove(group: Group, serving: Serving) -> None:
    """The commands of the manual, as an administrator types them, with the default sizes."""
    volume = f"{group.name}/vm1"
    assert "provisioned" in fvd_lv("provision", volume, "--size", "100G").out
    lv = group.volume("vm1", "lv_size,lv_active,lv_tags,lv_autoactivation")
    assert lv is not None
    assert (lv["lv_size"], lv["lv_active"], lv["lv_autoactivation"]) == (str(5 * GIB), "", "")
    assert "fvd.disk" in lv["lv_tags"].split(",") and "fvd.unfinished" not in lv["lv_tags"]
    assert not Path(group.path("vm1")).exists()
    assert "already provisioned" in fvd_lv("provision", group.path("vm1"), "--size", "100G").out
    assert fvd_lv("provision", volume, "--size", "50G", code=4).err.startswith(f"fvd-lv: {volume}")
    with serving(volume) as server:
        assert (group.volume("vm1") or {})["lv_active"] == "active"
        run("qemu-io", "-f", "raw", "-c", "write -P 0x5a 99G 1M", "-c", "flush", server.uri)
        assert fvd_lv("info", volume, "--output", "json").json["uri"] == server.uri
        assert "in use" in fvd_lv("serve", volume, "--socket", "/run/other.sock", code=5).err
        assert "served" in fvd_lv("remove", volume, code=5).err
        assert fvd_lv("extend", volume, "--output", "json").json["storage_size"] == 10 * GIB
        server.stop()
    lv = group.volume("vm1")
    assert lv is not None and (lv["lv_size"], lv["lv_active"]) == (str(10 * GIB), "")
    assert "whole; clean" in fvd_lv("check", volume).out
    with serving(volume) as server:
        run("qemu-io", "-f", "raw", "-c", "read -P 0x5a 99G 1M", "-c", "read -P 0 0 1M", server.uri)
    assert "removed" in fvd_lv("remove", volume).out
    assert group.volume("vm1") is None
    assert "nothing to remove" in fvd_lv("remove", volume).out
    assert f"no logical volume {volume}" in fvd_lv("info", volume, code=3).err


def test_names(group: Group) -> None:
    """Hyphens are doubled by device-mapper; the device of a volume is refused with the volume's name."""
    volume = f"{group.name}/vm-1.a+b_c--d"
    fvd.provision(volume, "1G", **SMALL)
    with fvd.open(volume) as disk:
        disk.pwrite(0, b"hello")
        number = os.stat(f"/dev/{volume}").st_rdev  # noqa: PTH116
        for device in (f"/dev/dm-{os.minor(number)}", f"/dev/mapper/{group.name}-vm--1.a+b_c----d"):
            with pytest.raises(fvd.InvalidArgument, match=f"name it {volume}".replace("+", r"\+")):
                fvd.info(device)
    assert fvd.remove(volume)


def test_a_raw_layout_has_its_full_size(group: Group) -> None:
    fvd.provision(f"{group.name}/raw", "1G", layout="raw", **SMALL)
    info = fvd.info(f"{group.name}/raw")
    assert info.storage_size == size_of(group, "raw") >= info.max_storage_size > GIB
    assert info.storage_size - info.max_storage_size < 4 * MIB


def size_of(group: Group, name: str) -> int:
    return int((group.volume(name) or {"lv_size": "0"})["lv_size"])


# --- Leftovers -------------------------------------------------------------------------------------------------------------------


def test_a_reused_volume_shows_nothing_of_another_tenants(make_group: Callable[..., Group]) -> None:
    """A whole fvd disk full of secrets, removed by hand; the next one of the same shape gets the same extents."""
    group = make_group(size=140 * MIB)
    volume = f"{group.name}/vm1"
    fvd.provision(volume, "96M", layout="raw", **SMALL)
    with fvd.open(volume) as disk:
        for offset in range(0, 96 * MIB, len(SECRET)):
            disk.pwrite(offset, SECRET)
    run("lvremove", "--yes", volume)
    with Path(group.devices[0]).open("rb") as device:
        assert b"secret" in device.read(64 * MIB)
    run("lvcreate", "--yes", "-an", "-Zn", "-Wn", "-L", "64M", "-n", "vm1", group.name)
    with pytest.raises(fvd.NotFound, match="no tag"):
        fvd.open(volume)
    run("lvremove", "--yes", volume)
    # A provision that is interrupted right after lvcreate leaves a whole old disk in an unfinished volume.
    run("lvcreate", "--yes", "-an", "-Zn", "-Wn", "--addtag", "fvd.unfinished", "-L", "104M", "-n", "vm1", group.name)
    with pytest.raises(fvd.NotFound, match="interrupted"):
        fvd.open(volume)
    for layout in ("raw", "compact"):
        assert fvd.provision(volume, "96M", layout=layout, **SMALL).created
        assert not_zero(volume, 96 * MIB) == {}
        with fvd.open(volume) as disk:
            # One byte of a block: what lies beside it in the block must not show either.
            for offset in range(0, 50 * MIB, 5 * MIB):
                disk.pwrite(offset, b"\1")
        assert not_zero(volume, 96 * MIB) == dict.fromkeys(range(0, 50 * MIB, 5 * MIB), 1)
        assert fvd.remove(volume)


def test_foreign_contents_are_refused(group: Group) -> None:
    volume = f"{group.name}/theirs"
    run("lvcreate", "--yes", "-L", "64M", "-n", "theirs", group.name)
    run("mkfs.ext4", "-q", "-L", "precious", f"/dev/{volume}")
    settle()
    with pytest.raises(fvd.Conflict, match="ext4"):
        fvd.provision(volume, "1G", **SMALL)
    assert size_of(group, "theirs") == 64 * MIB and (group.volume("theirs") or {})["lv_active"] == "active"
    mount = Path("/run/fvd-test-mount")
    mount.mkdir(exist_ok=True)
    run("mount", f"/dev/{volume}", mount)
    try:
        with pytest.raises(fvd.InUse, match="mounted on"):
            fvd.provision(volume, "1G", force=True, **SMALL)
    finally:
        run("umount", mount)
    run("dmsetup", "create", "fvdholder", "--table", f"0 1000 linear /dev/{volume} 0")
    try:
        with pytest.raises(fvd.InUse, match="held by"):
            fvd.provision(volume, "1G", force=True, **SMALL)
    finally:
        run("dmsetup", "remove", "--retry", "fvdholder")
    run("e2fsck", "-fn", f"/dev/{volume}")
    with pytest.raises(fvd.NotFound):
        fvd.remove(volume)
    assert fvd.provision(volume, "1G", force=True, **SMALL).created
    assert not_zero(volume, 64 * MIB) == {}


def test_other_kinds_of_volumes_are_refused(group: Group) -> None:
    run("lvcreate", "--yes", "-L", "64M", "-n", "origin", group.name)
    load_module("dm-snapshot")
    run("lvcreate", "--yes", "-s", "-L", "32M", "-n", "snap", f"{group.name}/origin")
    for name in ("origin", "snap"):
        with pytest.raises(fvd.Conflict, match="another kind"):
            fvd.provision(f"{group.name}/{name}", "1G", force=True, **SMALL)


def test_groups_of_others(group: Group, make_group: Callable[..., Group]) -> None:
    volume = f"{group.name}/vm1"
    fvd.provision(volume, "1G", **SMALL)
    run("vgexport", group.name)
    try:
        for verb in (fvd.info, fvd.open, fvd.extend, fvd.remove):
            with pytest.raises(fvd.FvdError, match="export"):
                verb(volume)
    finally:
        run("vgimport", group.name)
    run("vgchange", "--yes", "--systemid", "anotherhost", group.name)
    try:
        for verb in (fvd.info, fvd.open, fvd.remove):
            with pytest.raises(fvd.InUse, match="another host"):
                verb(volume)
        with pytest.raises(fvd.InUse, match="another host"):
            fvd.provision(volume, "1G", **SMALL)
    finally:
        as_the_other = 'global{system_id_source="lvmlocal"} local{system_id="anotherhost"}'
        run("vgchange", "--yes", "--config", as_the_other, "--systemid", "", group.name)
    assert fvd.info(volume).virtual_size == GIB


# --- Two at once -----------------------------------------------------------------------------------------------------------------


def test_looking_does_not_disturb_who_comes_to_serve(group: Group) -> None:
    """`info` activates, looks, deactivates, over and over; whoever opens the disk meanwhile gets it, and keeps it."""
    volume = f"{group.name}/vm1"
    fvd.provision(volume, "1G", **SMALL)
    done = threading.Event()
    seen: list[str] = []

    def look() -> None:
        while not done.is_set():
            try:
                seen.append(fvd.info(volume).volume)
            except fvd.InUse:
                seen.append("in use")

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(4):
            for _ in range(50):
                try:
                    disk = fvd.open(volume)
                    break
                except fvd.InUse:
                    continue  # the moment in which the other one reads
            with disk:
                disk.pwrite(0, b"hello")
                disk.flush()
    finally:
        done.set()
        thread.join()
    assert volume in seen
    assert (group.volume("vm1") or {})["lv_active"] == ""


def test_a_killed_servers_volume_is_taken_over(group: Group, serving: Serving) -> None:
    volume = f"{group.name}/vm1"
    fvd.provision(volume, "1G", **SMALL)
    with serving(volume) as server:
        run("qemu-io", "-f", "raw", "-c", "write -P 0x11 0 1M", "-c", "flush", server.uri)
        server.kill()
    assert (group.volume("vm1") or {})["lv_active"] == "active"
    with serving(volume) as server:
        run("qemu-io", "-f", "raw", "-c", "read -P 0x11 0 1M", server.uri)
    assert (group.volume("vm1") or {})["lv_active"] == ""


def test_four_provisions_of_one_name(group: Group) -> None:
    code = f"import fvd, sys\ntry: fvd.provision(sys.argv[1], '1G', **{SMALL!r})\nexcept (fvd.InUse, fvd.Conflict) as e: print(e)"
    words = [sys.executable, "-c", code, f"{group.name}/vm1"]
    processes = [subprocess.Popen(words, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    for process in processes:
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 0, said
    assert not fvd.provision(f"{group.name}/vm1", "1G", **SMALL).created
    assert len(group.report()) == 1


# --- Lists -----------------------------------------------------------------------------------------------------------------------


def test_a_group_is_told_without_being_touched(group: Group, serving: Serving) -> None:
    for name, size in (("vm1", "10G"), ("vm2", "30G"), ("vm3", "1G")):
        fvd.provision(f"{group.name}/{name}", size, **SMALL)
    run("lvcreate", "--yes", "-L", "1G", "-n", "theirs", group.name)
    run("lvcreate", "--yes", "-an", "-Zn", "-Wn", "--addtag", "fvd.unfinished", "-L", "64M", "-n", "half", group.name)
    with fvd.open(f"{group.name}/vm2") as disk:
        for chunk in range(100):
            disk.pwrite(chunk * MIB, b"x")
    with serving(f"{group.name}/vm1") as server:
        found = fvd_lv("list", group.name, "--output", "json").json
        active = [row["lv_name"] for row in group.report("lv_name,lv_active") if row["lv_active"]]
        assert sorted(active) == ["theirs", "vm1"]
        rows = {row["volume"].partition("/")[2]: row for row in found["volumes"]}
        assert {name: row["state"] for name, row in rows.items()} == {
            "vm1": "served",
            "vm2": "closed",
            "vm3": "closed",
            "half": "unfinished",
        }
        assert rows["vm1"]["info"]["uri"] == server.uri
        text = fvd_lv("list", group.name).out
    info = fvd.info(f"{group.name}/vm2")
    assert rows["vm2"]["info"]["mapped_bytes"] == info.mapped_bytes == 100 * MIB
    assert rows["vm2"]["storage_size"] == info.storage_size == size_of(group, "vm2")
    assert rows["vm2"]["info"]["free_bytes"] == info.free_bytes
    assert rows["vm2"]["greatest_size"] == -(-info.max_storage_size // (4 * MIB)) * 4 * MIB
    [figures] = found["groups"]
    assert figures["disks"] == 4 and figures["virtual_bytes"] == 41 * GIB and figures["mapped_bytes"] == 100 * MIB
    assert figures["free_bytes"] == group.free_bytes()
    assert figures["storage_bytes"] == sum(size_of(group, name) for name in ("vm1", "vm2", "vm3", "half"))
    assert figures["overcommit"] == pytest.approx(figures["greatest_bytes"] / (figures["storage_bytes"] + figures["free_bytes"]))
    assert "over-commit 2." in text and "growth reserve" in text and f"{group.name}/vm2" in text and "theirs" not in text


def test_over_commit_is_limited(make_group: Callable[..., Group]) -> None:
    group = make_group(size=GIB)
    fvd.provision(f"{group.name}/vm1", "700M", max_overcommit=1, **SMALL)
    with pytest.raises(fvd.NoSpace, match="over-committed"):
        fvd.provision(f"{group.name}/vm2", "700M", max_overcommit=1, **SMALL)
    run("vgchange", "--addtag", "fvd.max_overcommit=1.2", group.name)
    answer = fvd_lv("provision", f"{group.name}/vm2", "--size", "700M", "--grow-step", "64M", "--output", "json", code=6)
    assert answer.json["error"]["kind"] == "no_space" and "1.2 is the limit" in answer.json["error"]["message"]
    assert group.volume("vm2") is None
    run("vgchange", "--deltag", "fvd.max_overcommit=1.2", group.name)
    fvd.provision(f"{group.name}/vm2", "700M", **SMALL)
