# SPDX-License-Identifier: Apache-2.0
"""fvd.base.rights: with whose rights a base is opened, with a real other user, and what a stranger's image gets to see of root's."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from another_user import STRANGER, forge_base, give, needs_root, open_folder
from loops import loop_device, run
from lvm_machine import Machine

from disks import MIB, SMALL, driven, make, volume
from fvd.base import rights as base_rights
from fvd.base.rights import mark_of
from fvd.device import as_user
from fvd.device.as_user import User, open_as, user_of
from fvd.disk.opening import open_volume
from fvd.disk.provision import provision
from fvd.errors import DeviceError, FvdError, NotFound, PermissionDenied, Timeout, Unsupported
from fvd.format.locator import BaseFormat
from fvd.inspect.check import check

pytestmark = [needs_root, pytest.mark.pure]

SECRET = b"root's secret ".ljust(4096, b"!")


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with open_folder() as found:
        monkeypatch.setattr(base_rights, "LIST_PATH", str(found / "bases"))  # not this machine's own
        yield found


@pytest.fixture
def base(folder: Path) -> Path:
    path = folder / "golden.raw"
    path.write_bytes(b"golden".ljust(4096, b"."))
    path.chmod(0o644)
    return path


@pytest.fixture
def secret(folder: Path) -> Path:
    path = folder / "shadow"
    path.write_bytes(SECRET)
    path.chmod(0o600)
    return path


@pytest.fixture
def image(folder: Path, base: Path) -> Path:
    """A stranger's image over what he may read."""
    path = folder / "vm1.img"
    make(path, base=base)
    return give(path)


def refused(path: Path | str, *words: str, **options: Any) -> str:
    with pytest.raises(PermissionDenied) as caught:
        open_volume(volume(path), **options)
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)


# --- Files -----------------------------------------------------------------------------------------------------------------------------


def test_a_strangers_image_over_what_he_may_read(image: Path) -> None:
    with driven(image) as driver:
        assert driver.pread(0, 6) == b"golden"
    assert check(volume(image)).errors == []


def test_a_strangers_image_does_not_show_what_he_may_not_read(image: Path, secret: Path, folder: Path) -> None:
    forge_base(image, str(secret))
    line = refused(image, str(STRANGER), "may not read it", f"--base-allow {secret}", str(folder / "bases"))
    assert "secret" not in line
    (error,) = check(volume(image)).errors
    assert f"--base-allow {secret}" in error
    refused(image, "may not read it", read_only=True)
    # The administrator's word is enough, for this base.
    with driven(image, base_allow=[str(secret)]) as driver:
        assert driver.pread(0, 4096) == SECRET
    refused(image, base_allow=[f"{secret}.old", "/"])
    assert check(volume(image), base_allow=[str(secret)]).errors == []


def test_roots_own_image_over_roots_secret(folder: Path, secret: Path) -> None:
    path = folder / "vm2.img"
    make(path, base=secret)
    with driven(path) as driver:
        assert driver.pread(0, 4096) == SECRET
    # What others than root may write to is nobody's word.
    for mode, group in ((0o602, 0), (0o620, STRANGER)):
        os.chown(path, 0, group)
        path.chmod(mode)
        refused(path, "others than root may write to")
    os.chown(path, 0, 0)
    open_volume(volume(path)).close()


def test_the_administrators_list(image: Path, secret: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    forge_base(image, str(secret))
    lines = folder / "bases"
    for text in (f"# what root gives away\n\n  {secret}  \n", f"{folder}/sha*\n", f"{folder}/*\n", f"/a\n{folder.parent}/*/shadow"):
        lines.write_text(text)
        open_volume(volume(image)).close()
    for text in ("", "*\n", f"#{secret}\n", f"{folder.parent}/*\n", f"{secret}x\n", f"{folder}/golden*\n"):
        lines.write_text(text)
        refused(image, "may not read it")
    # It leads nowhere else.
    lines.write_text(f"{folder}/golden/*\n{folder}/*\n")
    forge_base(image, f"{folder}/../{folder.name}/shadow")
    refused(image, "may not read it")
    lines.write_text(f"{folder}/*\n")
    forge_base(image, str(secret))
    caplog.clear()
    for mode, owner in ((0o666, 0), (0o664, 0), (0o644, STRANGER)):
        lines.chmod(mode)
        os.chown(lines, owner, 0)
        refused(image, "may not read it")
    forge_base(image, "nbd://host", BaseFormat.NBD)
    refused(image, "asks no server", "which is ignored: it must be a file that belongs to root")
    assert "is ignored" in caplog.text
    lines.unlink()
    lines.mkdir()
    refused(image, "which is ignored")


def test_servers_are_asked_for_root_only(image: Path, folder: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def ask(locator: str, *_: object) -> None:
        asked.append(locator)
        raise NotFound(locator)

    monkeypatch.setattr("fvd.base.base._ask_server", ask)
    for locator, base_format in (
        ("nbd://localhost:1", BaseFormat.NBD),
        ("nbd+unix:///x?socket=/run/some.sock", BaseFormat.NBD),
        ("ssh://host/image", BaseFormat.REMOTE_RAW),
    ):
        forge_base(image, locator, base_format)
        refused(image, "asks no server", f"--base-allow {locator}")
        assert not asked
        with pytest.raises(NotFound):
            open_volume(volume(image), base_allow=[locator])
        (folder / "bases").write_text(f"{locator}\n")
        with pytest.raises(NotFound):
            open_volume(volume(image))
        (folder / "bases").unlink()
        os.chown(image, 0, 0)
        with pytest.raises(NotFound):
            open_volume(volume(image))
        give(image)
        assert asked == [locator] * 3
        asked.clear()


def test_a_line_begins_no_options(image: Path, folder: Path) -> None:
    forge_base(image, "nbd://host/x?tls-psk-file=x", BaseFormat.NBD)
    (folder / "bases").write_text("nbd://host/*\n")
    refused(image, "asks no server")


# --- Names that are a user's ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["his folder", "his folder above", "a link of his", "everybody's folder", "a folder without owners"])
def test_a_name_that_a_stranger_can_give_to_something_else(folder: Path, secret: Path, how: str) -> None:
    """Root's disk over a base in somebody's folder: he swaps it for a link to what root alone may read."""
    place = folder / "place"
    place.mkdir(0o755)
    inner = place
    if how == "his folder above":
        inner = place / "inner"
        inner.mkdir(0o755)
    named = inner / "base.raw"
    named.write_bytes(b"harmless".ljust(4096, b"."))
    named.chmod(0o644)
    if how in ("his folder", "his folder above"):
        give(place)
    elif how == "a link of his":
        place.chmod(0o1777)
    else:
        place.chmod(0o777 | (stat.S_ISVTX if how == "everybody's folder" else 0))
        if how == "everybody's folder":
            give(named)
    disk = folder / "vm3.img"
    if how == "a folder without owners":
        with pytest.raises(PermissionDenied, match="others than root may write"):
            make(disk, base=named)
    make(disk, base=named, base_allow=[str(named)])
    if how != "a folder without owners":
        with driven(disk) as driver:
            assert driver.pread(0, 8) == b"harmless"
    named.unlink()
    named.symlink_to(secret)
    os.lchown(named, STRANGER, STRANGER)
    refused(disk, f"--base-allow {named}")
    with pytest.raises(PermissionDenied):
        make(folder / "vm4.img", base=named)


# --- Images of QEMU's ------------------------------------------------------------------------------------------------------------------


def readers() -> list[tuple[int, int]]:
    """(process, user) of the qemu-nbd that this process has started."""
    found = []
    for process in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            fields = (process / "stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) == os.getpid() and fields[0] != "Z" and (process / "comm").read_text() == "qemu-nbd\n":
                found.append((int(process.name), process.stat().st_uid))
    return found


def qcow2(path: Path, *options: str) -> Path:
    if shutil.which("qemu-nbd") is None or shutil.which("qemu-io") is None:
        pytest.skip("QEMU's tools are not installed")
    run("qemu-img", "create", "-q", "-f", "qcow2", *options, path, "1M")
    run("qemu-io", "-f", "qcow2", "-c", "write -q -P 0x41 0 64k", path)
    path.chmod(0o644)
    return path


@pytest.mark.release_only
@pytest.mark.parametrize("whose", ["the image's", "the base's", "a group's", "root's"])
def test_who_reads_an_image(folder: Path, whose: str) -> None:
    pytest.importorskip("fvd.device._remote", reason="libnbd is not installed")
    base, disk = qcow2(folder / "base.qcow2"), folder / "vm5.img"
    if whose == "the base's":
        give(base)
    if whose == "a group's":
        os.chown(base, 0, STRANGER)
        base.chmod(0o660)
    make(disk, base=base, base_format="qcow2")
    if whose == "the image's":
        give(disk)
    with driven(disk) as driver:
        assert driver.pread(0, 4) == b"AAAA"
        ((_, uid),) = readers()
        assert uid == {"root's": 0, "a group's": 65534}.get(whose, STRANGER)


@pytest.mark.release_only
def test_a_base_that_is_swapped_while_it_is_served(folder: Path, secret: Path) -> None:
    """Under its name comes an image that names root's file, then its owner writes that into the open one: the reader is started again each
    time, and no guest sees more than was there at the beginning."""
    pytest.importorskip("fvd.device._remote", reason="libnbd is not installed")
    base, disk = give(qcow2(folder / "base.qcow2")), folder / "vm6.img"
    secret.write_bytes(SECRET * 256)
    make(disk, base=base, base_format="qcow2")
    evil = image_that_names(secret, folder)
    with driven(disk, base_timeout_s=3) as driver:
        assert driver.pread(0, 4) == b"AAAA"
        base.rename(folder / "away")
        shutil.copy(evil, base)
        restart_reader()
        assert driver.pread(4096, 4) == b"AAAA"
        (folder / "away").write_bytes(evil.read_bytes())
        restart_reader()
        with pytest.raises(DeviceError):
            driver.pread(8192, 4096)
    for call in (lambda: driven(disk).__enter__(), lambda: make(folder / "vm7.img", base=base, base_format="qcow2")):
        with pytest.raises(Unsupported, match="keeps its data in another file"):
            call()


def image_that_names(secret: Path, folder: Path) -> Path:
    """An image whose data are outside it, in that file."""
    evil = folder / "evil.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={folder}/data,data_file_raw=on", evil, "1M")
    (folder / "data").unlink()
    (folder / "data").symlink_to(secret)
    return evil


def restart_reader() -> None:
    for process, _ in readers():
        os.kill(process, 9)
    deadline = time.monotonic() + 5
    while readers() and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.release_only
def test_what_is_written_into_an_image_at_the_wrong_moment(folder: Path, secret: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its owner has it name root's file between the last look and the program that reads it. That program is he."""
    pytest.importorskip("fvd.device._remote", reason="libnbd is not installed")
    from fvd.base import base as base_module

    base, disk = give(qcow2(folder / "base.qcow2")), folder / "vm8.img"
    secret.write_bytes(SECRET * 256)
    make(disk, base=base, base_format="qcow2")
    evil = image_that_names(secret, folder)
    real = base_module.server_command

    calls: list[int] = []

    def late(*arguments: Any) -> list[str]:
        calls.append(1)
        if len(calls) == 2:  # in the thread that starts it
            was = base.stat()
            base.write_bytes(evil.read_bytes())
            os.utime(base, ns=(was.st_atime_ns, was.st_mtime_ns))
        return real(*arguments)

    monkeypatch.setattr(base_module, "server_command", late)
    with pytest.raises(FvdError), driven(disk, base_timeout_s=3) as driver:
        raise AssertionError(driver.pread(0, 4096))
    assert len(calls) == 2 and not readers()


# --- Devices and logical volumes -------------------------------------------------------------------------------------------------------


def test_a_device(folder: Path, base: Path, secret: Path) -> None:
    backing = folder / "device.img"
    with backing.open("xb") as file:
        file.truncate(64 * MIB)
    with loop_device(backing) as device:
        options = SMALL | {"virtual_size_bytes": 32 * MIB}
        provision(device, base=base, **options)
        forge_base(device, str(secret))
        open_volume(device).close()  # root's device, over root's file
        was = Path(device).stat()
        try:
            os.chown(device, STRANGER, was.st_gid)
            with pytest.raises(PermissionDenied, match=f"user {STRANGER}"):
                open_volume(device)
        finally:
            os.chown(device, was.st_uid, was.st_gid)
        # Root's device over a file that another can write to.
        give(backing)
        with pytest.raises(PermissionDenied, match=f"user {STRANGER}"):
            open_volume(device)
        backing.unlink()
        with pytest.raises(PermissionDenied, match="nobody can tell whose"):
            open_volume(device)


def test_a_logical_volume_and_its_tag(machine: Machine, folder: Path, base: Path, secret: Path) -> None:
    name = f"{machine.add_group(1024 * MIB)}/vm1"
    made = provision(name, base=base, **SMALL)
    lv = machine.volume(name)
    assert lv is not None and made.superblock.base is not None
    mark = mark_of(made.superblock.base)
    assert mark in lv.tags and len(mark) < 128 and set(mark) <= set("abcdef0123456789=.vsd")
    open_volume(name).close()
    # What a guest writes is not the superblock; but whoever had the extents before may have.
    opened = open_volume(name)
    path = opened.node.path
    opened.close()
    with open_volume(name) as opened:
        device = opened.node.path
    assert device == path
    lv.tags.discard(mark)
    refusal = f"lvchange --addtag {mark} {name}"
    with pytest.raises(PermissionDenied, match=refusal):
        open_volume(name)
    assert refusal in check(name).errors[0]
    (folder / "bases").write_text(f"{base}\n")
    open_volume(name).close()
    (folder / "bases").unlink()
    lv.tags.add(mark.replace("fvd.base=", "fvd.base=0")[: len(mark)])
    with pytest.raises(PermissionDenied, match="was not provisioned over it") as caught:
        open_volume(name)
    assert "lvchange" not in str(caught.value)
    lv.tags.add(mark)
    open_volume(name).close()


def test_a_logical_volume_that_is_made_anew_has_one_mark(machine: Machine, base: Path, secret: Path) -> None:
    name = f"{machine.add_group(1024 * MIB)}/vm1"
    made = provision(name, base=base, **SMALL)
    lv = machine.volume(name)
    assert lv is not None and made.superblock.base is not None
    lv.tags -= {"fvd.disk"}
    lv.tags |= {"fvd.unfinished"}
    again = provision(name, base=secret, **SMALL)
    lv = machine.volume(name)
    assert lv is not None and again.superblock.base is not None
    assert [tag for tag in lv.tags if tag.startswith("fvd.base=")] == [mark_of(again.superblock.base)]
    open_volume(name).close()


# --- Opening as another ------------------------------------------------------------------------------------------------------------------


def test_a_user_that_the_host_knows() -> None:
    assert user_of(0).uid == 0 and 0 in user_of(0).groups
    assert user_of(STRANGER) == User(STRANGER, 65534) and str(user_of(STRANGER)) == str(STRANGER)
    assert str(user_of(0)) == "root (0)"


def test_what_a_user_may_open(folder: Path, base: Path, secret: Path) -> None:
    stranger = user_of(STRANGER)
    fd = open_as(str(base), stranger, 10)
    assert os.pread(fd, 6, 0) == b"golden" and not os.get_inheritable(fd)
    os.close(fd)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with pytest.raises(PermissionDenied, match="shadow is not permitted"):
        open_as(str(secret), stranger, 10)
    # By his groups too; not by those that this process has.
    os.chown(secret, 0, 4343)
    secret.chmod(0o640)
    os.close(open_as(str(secret), User(STRANGER, 65534, (4343,)), 10))
    os.chown(secret, 0, 0)
    with pytest.raises(PermissionDenied):
        open_as(str(secret), stranger, 10)
    with pytest.raises(NotFound):
        open_as(str(folder / "none"), stranger, 10)
    os.mkfifo(folder / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(Unsupported, match="neither a regular file nor a block device"):
            open_as(str(folder / name), stranger, 10)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_a_child_that_cannot_answer(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stranger = user_of(STRANGER)
    for child, kind in (("import time; time.sleep(60)", Timeout), ("pass", DeviceError), ("import os; os.abort()", DeviceError)):
        monkeypatch.setattr(as_user, "_CHILD", child)
        with pytest.raises(kind):
            open_as(str(base), stranger, 0.5)


def test_who_is_not_root_opens_with_his_own_rights(image: Path, secret: Path, base: Path) -> None:
    """The kernel judges it, and no list is needed."""
    program = (
        "import os, sys; sys.path[:0] = sys.argv[2].split(':')\n"
        "from fvd.disk.opening import open_volume\n"
        f"os.setgroups([]); os.setgid({STRANGER}); os.setuid({STRANGER})\n"
        "open_volume('file:' + sys.argv[1], read_only=True).close()"
    )

    def opened() -> str:
        words = [sys.executable, "-c", program, str(image), os.environ.get("PYTHONPATH", "")]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        return "" if done.returncode == 0 else done.stderr

    if "Errno 13" in (said := opened()) or "No module" in said:
        pytest.skip("this tree cannot be read by others")
    assert said == ""
    forge_base(image, str(secret))
    assert "PermissionDenied" in opened()
