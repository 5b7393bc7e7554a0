# SPDX-License-Identifier: Apache-2.0
"""The commands on a block device of fixed size: a loop device. Needs root and loop devices; skips where there are none."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from fvd_commands import Done, Server

nbd = pytest.importorskip("nbd", reason="python3-libnbd is not installed")

MIB = 1 << 20
GIB = 1 << 30

FvdLv = Callable[..., Done]
Serving = Callable[..., AbstractContextManager[Server]]


@pytest.fixture
def device(tmp_path: Path) -> Iterator[str]:
    if os.getuid() != 0:
        pytest.skip("loop devices need root")
    backing = tmp_path / "backing"
    with backing.open("wb") as file:
        file.truncate(64 * MIB)
    done = subprocess.run(["losetup", "--find", "--show", str(backing)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no loop device here: {done.stderr.strip()}")
    name = done.stdout.strip()
    yield name
    subprocess.run(["losetup", "--detach", name], check=True)


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"


def test_the_life_of_a_disk_on_a_device(device: str, fvd_lv: FvdLv, serving: Serving) -> None:
    made = fvd_lv("provision", device, "--size", "1G", "--output", "json").json
    assert (made["volume"], made["storage_size"], made["can_grow"]) == (device, 64 * MIB, False)
    assert f"{device}: already provisioned" in fvd_lv("provision", device, "--size", "1G").out
    assert "fixed size" in fvd_lv("info", device).out
    fvd_lv("extend", device, code=8)
    listed = [each["volume"] for each in fvd_lv("list", "/dev", "--output", "json").json["volumes"]]
    assert device in listed
    with serving(device) as server:
        assert fvd_lv("list", "--served", "--output", "json").json["volumes"][0]["volume"] == device
        fvd_lv("serve", device, "--socket", "other.sock", code=5)
        fvd_lv("extend", device, code=8)
        handle = nbd.NBD()
        handle.connect_uri(server.uri)
        handle.pwrite(b"x" * MIB, 500 * MIB)
        handle.shutdown()
        server.terminate()
    assert fvd_lv("info", device, "--output", "json").json["mapped_bytes"] == MIB
    assert fvd_lv("check", device).code == 0
    assert fvd_lv("remove", device, "--output", "json").json["removed"] is True
    assert fvd_lv("remove", device, "--output", "json").json["removed"] is False
    fvd_lv("info", device, code=3)


def test_on_full_error(device: str, fvd_lv: FvdLv, serving: Serving) -> None:
    fvd_lv("provision", device, "--size", "1G")
    with serving(device, "--on-full", "error") as server:
        handle = nbd.NBD()
        handle.connect_uri(server.uri)
        written = 0
        with pytest.raises(nbd.Error) as failed:
            for offset in range(0, GIB, MIB):
                handle.pwrite(b"x" * MIB, offset)
                written += 1
        assert failed.value.errno == "ENOSPC"
        assert written >= 40
        handle.pwrite(b"y" * MIB, 0)  # mapped chunks go on
        handle.flush()
        assert handle.pread(MIB, 0) == b"y" * MIB
        assert handle.pread(MIB, (written - 1) * MIB) == b"x" * MIB


def test_on_full_wait_and_storage_added_by_hand(device: str, fvd_lv: FvdLv, serving: Serving, tmp_path: Path) -> None:
    """A write that needs more waits; the device is enlarged; the write resumes by itself."""
    fvd_lv("provision", device, "--size", "1G")
    with serving(device) as server:
        handle = nbd.NBD()
        handle.connect_uri(server.uri)
        pending = [handle.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(b"x" * MIB)), offset) for offset in range(0, 100 * MIB, MIB)]

        def some_wait() -> bool:
            for _ in range(200):  # one poll moves one piece of one request
                handle.poll(10)
            return bool(fvd_lv("info", device, "--output", "json").json["waiting_writes"] > 0)

        wait_until(some_wait)
        os.truncate(tmp_path / "backing", 128 * MIB)
        subprocess.run(["losetup", "--set-capacity", device], check=True)

        def all_done() -> bool:
            handle.poll(100)
            pending[:] = [cookie for cookie in pending if not handle.aio_command_completed(cookie)]
            return not pending

        wait_until(all_done)
        assert handle.pread(MIB, 99 * MIB) == b"x" * MIB
        assert fvd_lv("info", device, "--output", "json").json["storage_size"] == 128 * MIB


def test_another_owner(device: str, fvd_lv: FvdLv, tmp_path: Path) -> None:
    """A mounted device and one with a file system on it are refused; --force overrides only the latter."""
    subprocess.run(["mke2fs", "-q", device], check=True)
    done = fvd_lv("provision", device, "--size", "1G", code=4)
    assert "ext" in done.err and "--force" in done.err
    (tmp_path / "mnt").mkdir()
    mounted = subprocess.run(["mount", device, str(tmp_path / "mnt")], check=False, capture_output=True).returncode == 0
    if mounted:
        try:
            assert "mounted" in fvd_lv("provision", device, "--size", "1G", "--force", code=5).err
        finally:
            subprocess.run(["umount", device], check=True)
    fvd_lv("provision", device, "--size", "1G", "--force")
    assert fvd_lv("check", device).code == 0
