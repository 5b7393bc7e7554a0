# SPDX-License-Identifier: Apache-2.0
"""Bases that real programs read: qemu-nbd for images, nbdkit for NBD. Where these or libnbd are missing the tests are skipped."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

import pytest
from loops import loop_device, run

from disks import driven
from disks import make as make_disk
from fvd.base import images, vhdx
from fvd.base.base import examine_base, open_base
from fvd.base.images import check_image
from fvd.device.claim import Ownership, claim
from fvd.device.node import Identity, open_node
from fvd.disk.loading import load_disk
from fvd.errors import Conflict, DeviceError, FvdError, InUse, InvalidArgument, NotFound, Unsupported
from fvd.format.geometry import Layout
from fvd.format.locator import BaseFormat
from fvd.format.superblock import BaseReference

pytest.importorskip("fvd.device._remote", reason="libnbd is not installed")
pytestmark = pytest.mark.release_only

MIB = 1 << 20
SIZE = 10 * MIB
NOBODY: Identity = ("file", 0, 0)
KINDS = ("qcow2", "vmdk", "vdi", "vhdx", "vpc", "qed", "parallels")
DATA_AT = 5 * MIB


def needs(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


def make_image(path: Path, kind: str, *options: str) -> Path:
    """10 MiB with 64 KiB of data in the middle."""
    needs("qemu-img", "qemu-nbd", "qemu-io")
    try:
        run("qemu-img", "create", "-q", "-f", kind, *options, path, str(SIZE))
    except AssertionError as error:
        pytest.skip(f"this qemu-img makes no {kind}: {error}")
    try:
        run("qemu-io", "-f", kind, "-c", f"write -q -P 0x41 {DATA_AT} 64k", path)
    except AssertionError as error:
        pytest.skip(f"this QEMU writes no {kind}: {error}")
    return path


def children() -> list[str]:
    """The programs of QEMU's that this process has started and that still run."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                fields = (process / "stat").read_text().rpartition(")")[2].split()
                words = (process / "cmdline").read_text()
            except OSError:
                continue
            if int(fields[1]) == os.getpid() and fields[0] != "Z" and "qemu-nbd" in words:
                found.append(words)
    return found


def gone() -> bool:
    deadline = time.monotonic() + 5
    while children() and time.monotonic() < deadline:
        time.sleep(0.02)
    return not children()


@pytest.mark.parametrize("kind", KINDS)
def test_an_image(tmp_path: Path, kind: str) -> None:
    path = make_image(tmp_path / "a, strange:name", kind)
    reference = examine_base(path, kind)
    assert reference.format is BaseFormat[kind.upper()] and reference.size_bytes >= SIZE and reference.locator == str(path)
    assert gone()
    with open_base(reference, NOBODY) as base:
        assert len(children()) == 1
        assert base.fd == -1 and base.remote is not None
        assert base.remote.pread(DATA_AT - 512, 1024) == bytes(512) + b"A" * 512
        zeros = list(base.zero_extents())
        assert zeros or kind == "vhdx"  # QEMU calls all of a VHDX data
        assert not any(offset < DATA_AT + 65536 and offset + length > DATA_AT for offset, length in zeros)
    assert gone()


def test_a_vhd_of_fixed_size(tmp_path: Path) -> None:
    path = make_image(tmp_path / "image", "vpc", "-o", "subformat=fixed")
    with pytest.raises(InvalidArgument, match="looks like vpc"):
        examine_base(path)
    assert examine_base(path, "vpc").size_bytes >= SIZE


def with_vdi_parent(image: bytearray) -> None:
    """As VirtualBox writes the difference to another image: its kind, and the UUIDs of that one and of its last change."""
    struct.pack_into("<I", image, 76, 4)
    image[424:456] = bytes(range(1, 33))


def with_vhdx_parent(image: bytearray) -> None:
    """As Hyper-V writes it: the bit of the file parameters, and a locator with the parent's path in the table of metadata."""
    regions = [struct.unpack_from("<16sQ", image, (192 << 10) + 16 + 32 * number) for number in range(2)]
    (place,) = [offset for guid, offset in regions if guid == vhdx.METADATA]
    (count,) = struct.unpack_from("<H", image, place + 10)
    for number in range(count):
        guid, offset = struct.unpack_from("<16sI", image, place + 32 + 32 * number)
        if guid == vhdx.FILE_PARAMETERS:
            image[place + offset + 4] |= 2
    locator = 512 << 10
    struct.pack_into("<16sIII", image, place + 32 + 32 * count, vhdx.PARENT_LOCATOR, locator, 20 + 12 + 62, 4)
    struct.pack_into("<H", image, place + 10, count + 1)
    key, value = (text.encode("utf-16-le") for text in ("relative_path", "shadow.vhdx"))
    kind = UUID("b04aefb7-d19e-4a81-b789-25b8e9445913").bytes_le
    struct.pack_into("<16sHHIIHH", image, place + locator, kind, 0, 1, 32, 32 + len(key), len(key), len(value))
    image[place + locator + 32 : place + locator + 32 + len(key + value)] = key + value


@pytest.mark.parametrize(("kind", "give_parent"), [("vdi", with_vdi_parent), ("vhdx", with_vhdx_parent)])
def test_an_image_that_is_the_difference_to_another(
    tmp_path: Path, kind: str, give_parent: Callable[[bytearray], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before a program of QEMU's sees it, at provision, at open and before its reader is started again; and by qemu-img."""
    path = make_image(tmp_path / "image", kind)
    reference = examine_base(path, kind)
    data = bytearray(path.read_bytes())
    give_parent(data)
    assert gone()
    with open_base(reference, NOBODY) as base:
        assert base.remote is not None and base.remote.pread(DATA_AT, 512) == b"A" * 512
    path.write_bytes(data)
    with pytest.raises((Unsupported, InvalidArgument)):
        check_image(str(path), BaseFormat[kind.upper()], timeout_seconds=20)

    def no_program(*arguments: object) -> str:
        raise AssertionError("a program of QEMU's is asked for")

    monkeypatch.setattr(images, "_program", no_program)
    for call in (lambda: examine_base(path, kind), lambda: open_base(reference, NOBODY)):
        with pytest.raises(Unsupported, match="has a parent"):
            call()


def test_an_image_on_a_device(tmp_path: Path) -> None:
    with loop_device(make_image(tmp_path / "image", "qcow2")) as device:
        with open_base(examine_base(device, "qcow2"), NOBODY) as base:
            assert base.remote is not None and base.remote.pread(DATA_AT, 512) == b"A" * 512
        assert gone()


def test_readers_share_an_image_and_a_writer_is_refused(tmp_path: Path) -> None:
    path = make_image(tmp_path / "image", "qcow2")
    reference = examine_base(path, "qcow2")
    with open_base(reference, NOBODY) as one, open_base(reference, NOBODY) as two:
        assert examine_base(path, "qcow2") == reference
        for base in (one, two):
            assert base.remote is not None and base.remote.pread(DATA_AT, 512) == b"A" * 512
        with pytest.raises(AssertionError, match="lock"):
            run("qemu-io", "-f", "qcow2", "-c", "write 0 64k", path)
        with pytest.raises(InUse):
            claim(path, Ownership.WRITER)
        run("qemu-io", "-r", "-f", "qcow2", "-c", "read 0 64k", path)
    assert gone()
    run("qemu-io", "-f", "qcow2", "-c", "write -q 0 64k", path)


def test_an_image_that_somebody_writes_to_is_refused(tmp_path: Path) -> None:
    path = make_image(tmp_path / "image", "qcow2")
    reference = examine_base(path, "qcow2")
    command = ["qemu-io", "-f", "qcow2", str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as writer:
        try:
            assert writer.stdin is not None and writer.stdout is not None
            writer.stdin.write("length\n")
            assert writer.stdout.readline()  # it has the image open
            for call in (lambda: examine_base(path, "qcow2"), lambda: open_base(reference, NOBODY)):
                with pytest.raises(InUse, match="another program writes to it"):
                    call()
        finally:
            writer.communicate("quit\n", timeout=10)
    open_base(reference, NOBODY).close()


@pytest.mark.parametrize("how", ["backing", "data", "extents"])
def test_images_that_need_other_files(tmp_path: Path, how: str) -> None:
    needs("qemu-img")
    whole = make_image(tmp_path / "whole", "qcow2")
    path, kind = tmp_path / "image", "qcow2"
    if how == "backing":
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", whole, "-F", "qcow2", path)
    elif how == "data":
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path}/data", path, "10M")
    else:
        kind = "vmdk"
        run("qemu-img", "create", "-q", "-f", "vmdk", "-o", "subformat=twoGbMaxExtentSparse", path, "10M")
    with pytest.raises(Unsupported, match="which could be any file of this host"):
        examine_base(path, kind)
    assert gone()


def test_an_image_that_got_a_backing_file_or_another_size_later(tmp_path: Path) -> None:
    path = make_image(tmp_path / "image", "qcow2")
    reference = examine_base(path, "qcow2")
    run("qemu-img", "resize", "-q", "-f", "qcow2", path, "20M")
    with pytest.raises(Conflict, match=f"has {2 * SIZE} bytes, but had {SIZE}"):
        open_base(reference, NOBODY)
    assert gone()
    run("qemu-img", "rebase", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", make_image(tmp_path / "other", "qcow2"), path)
    with pytest.raises(Unsupported, match="backing file"):
        open_base(reference, NOBODY)


def test_an_image_that_is_damaged(tmp_path: Path) -> None:
    needs("qemu-img", "qemu-nbd")
    path = tmp_path / "image"
    path.write_bytes(b"QFI\xfb".ljust(4096, b"\xee")[:8] + bytes(8) + b"\xee" * 4000)
    with pytest.raises(FvdError, match=str(path)):
        examine_base(path, "qcow2")
    assert gone()


def test_a_scheme_that_this_qemu_does_not_have_or_no_server(tmp_path: Path) -> None:
    needs("qemu-img", "qemu-nbd")
    with pytest.raises((Unsupported, DeviceError), match=re.escape("http://127.0.0.1:1/x")):
        examine_base("http://127.0.0.1:1/x", "raw", timeout_seconds=20)


# --- NBD ---------------------------------------------------------------------------------------------------------------


@contextmanager
def nbdkit(folder: Path, *words: str) -> Iterator[str]:
    """The URI of a server that ends with the block."""
    needs("nbdkit")
    socket = folder / "nbd.sock"
    with subprocess.Popen(["nbdkit", "--foreground", "--read-only", "--unix", str(socket), *words], stderr=subprocess.PIPE) as server:
        try:
            deadline = time.monotonic() + 10
            while not socket.exists():
                if server.poll() is not None or time.monotonic() > deadline:
                    pytest.skip(f"nbdkit does not start with {' '.join(words)}")
                time.sleep(0.02)
            yield f"nbd+unix:///?socket={socket}"
        finally:
            server.terminate()
            server.communicate(timeout=10)


def test_an_nbd_server(tmp_path: Path) -> None:
    with nbdkit(tmp_path, "data", f"@{DATA_AT} 0x41*65536", f"size={SIZE}") as uri:
        reference = examine_base(uri)
        assert reference == BaseReference(uri, SIZE, BaseFormat.NBD)
        with open_base(reference, NOBODY) as base:
            assert base.remote is not None and base.remote.pread(DATA_AT - 2, 4) == bytes(2) + b"AA"
            assert sum(length for _, length in base.zero_extents()) == SIZE - 65536
    with pytest.raises((NotFound, DeviceError), match=r"base is missing|start its server"):
        open_base(reference, NOBODY)


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("kind", ["nbd", "qcow2"])
def test_a_disk_over_it_begins_with_its_zeros(tmp_path: Path, kind: str, layout: Layout) -> None:
    path = tmp_path / "disk"

    def judge(base: str | Path, base_format: str | None) -> None:
        options = {"base": base, "base_format": base_format, "layout": layout}
        assert make_disk(path, **options).created and not make_disk(path, **options).created
        with open_node(path, read_only=True) as node:
            disk = load_disk(node)
        absent = [block for block in range(SIZE // 65536) if not int(disk.bitmap[block // 64]) >> block % 64 & 1]
        assert absent == [DATA_AT // 65536]
        with pytest.raises(Conflict, match=r"base is .*, asked for"):
            make_disk(path, layout=layout, base=other)

    other = tmp_path / "other"
    other.write_bytes(b"x" * MIB)
    if kind == "nbd":
        with nbdkit(tmp_path, "data", f"@{DATA_AT} 0x41*65536", f"size={SIZE}") as uri:
            judge(uri, None)
    else:
        judge(make_image(tmp_path / "image", "qcow2"), "qcow2")
    assert gone()


def test_a_remote_base_without_data_is_never_needed_again(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    with nbdkit(tmp_path, "memory", str(SIZE)) as uri:
        make_disk(path, base=uri)
    with driven(path) as driver:
        assert driver.pread(0, SIZE + MIB) == bytes(SIZE + MIB)
        assert driver.volume.base is None and driver.volume.base_released
