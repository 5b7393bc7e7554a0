# SPDX-License-Identifier: Apache-2.0
"""fvd.device.node: whole transfers, direct and not, and errors that say what happened."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loops import loop_device, run, sparse

from fvd.device import node as node_module
from fvd.device.folders import reach
from fvd.device.node import aligned_buffer, create_file, open_node, typed_error
from fvd.errors import DeviceError, FvdError, InvalidArgument, NoSpace, NotFound, PermissionDenied, Unsupported

MIB = 1 << 20


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return sparse(tmp_path / "file", 16 * MIB)


@pytest.mark.parametrize("direct", [True, False])
def test_what_is_written_is_read(file: Path, direct: bool) -> None:
    data = os.urandom(9 * MIB)  # more than one transfer
    with open_node(file, direct=direct) as node:
        assert node.size_bytes() == 16 * MIB
        assert not node.is_block
        node.pwrite(4096, data)
        node.flush()
        assert node.pread(4096, len(data)).tobytes() == data
        assert not np.any(node.pread(0, 4096))
    assert file.read_bytes()[4096 : 4096 + len(data)] == data


@pytest.mark.parametrize(
    "make", [bytes, bytearray, memoryview, lambda data: np.frombuffer(data, np.uint8), lambda data: np.frombuffer(data, "<u8")]
)
def test_any_buffer_can_be_written(file: Path, make: Any) -> None:
    data = os.urandom(8192)
    with open_node(file) as node:
        node.pwrite(0, make(data))
        assert node.pread(0, 8192).tobytes() == data


def test_a_direct_node_refuses_odd_ranges(file: Path) -> None:
    with open_node(file) as node:
        if not node.direct:
            pytest.skip(node.notice or "no O_DIRECT here")
        for offset, length in ((1, 4096), (0, 100), (-4096, 4096)):
            with pytest.raises(InvalidArgument):
                node.pread(offset, length)
        with pytest.raises(InvalidArgument, match="-byte blocks"):
            node.pwrite(0, b"x" * 100)


def test_a_buffered_node_takes_odd_ranges(file: Path) -> None:
    with open_node(file, direct=False) as node:
        node.pwrite(3, b"hello")
        assert node.pread(2, 7).tobytes() == b"\0hello\0"


def test_reading_past_the_end_is_an_error(file: Path) -> None:
    with open_node(file) as node, pytest.raises(DeviceError, match=f"ends at byte {16 * MIB}"):
        node.pread(16 * MIB - 4096, 8192)


def test_pread_into_fills_the_callers_buffer(file: Path) -> None:
    with open_node(file) as node:
        node.pwrite(0, b"a" * 4096)
        buffer = aligned_buffer(8192)
        buffer[:] = b"\7" * 8192
        node.pread_into(0, buffer)
        assert buffer.tobytes() == b"a" * 4096 + bytes(4096)


def test_size_is_asked_anew(file: Path) -> None:
    with open_node(file) as node:
        os.truncate(file, 32 * MIB)
        assert node.size_bytes() == 32 * MIB


def test_zero(file: Path) -> None:
    with open_node(file) as node:
        node.pwrite(0, b"x" * 8 * MIB)
        node.zero(4096, 6 * MIB)
        assert not np.any(node.pread(4096, 6 * MIB))
        assert np.all(node.pread(0, 4096)) and np.all(node.pread(4096 + 6 * MIB, 4096))


def test_zero_beyond_the_end_of_a_file_makes_it_longer(file: Path) -> None:
    with open_node(file) as node:
        node.zero(16 * MIB, MIB)
        assert node.size_bytes() == 17 * MIB


def test_zero_where_the_file_system_cannot(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(node_module, "_fallocate", refuse)
    with open_node(file) as node:
        node.pwrite(0, b"x" * 8 * MIB)
        node.zero(0, 8 * MIB)
        assert not np.any(node.pread(0, 8 * MIB))


def test_transfers_that_stop_half_way_go_on(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, read = os.pwritev, os.preadv
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, offset: write(fd, [buffers[0][:1000]], offset))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: read(fd, [buffers[0][:700]], offset))
    data = os.urandom(5000)
    with open_node(file, direct=False) as node:
        node.pwrite(10, data)
        assert node.pread(10, 5000).tobytes() == data


# --- Refusals ----------------------------------------------------------------------------------------------------


def test_what_is_no_file_or_device(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(Unsupported, match="name a file or a block device"):
            open_node(path)
    with pytest.raises(NotFound):
        open_node(tmp_path / "absent")
    with pytest.raises(NotFound):
        open_node(tmp_path / "pipe" / "below")


def test_read_only(file: Path) -> None:
    with open_node(file, read_only=True) as node:
        writes: list[Callable[[], None]] = [lambda: node.pwrite(0, bytes(4096)), lambda: node.zero(0, 4096)]
        for write in writes:
            with pytest.raises(PermissionDenied, match="read-only"):
                write()


def test_a_closed_node_says_so(file: Path) -> None:
    node = open_node(file)
    node.close()
    node.close()
    with pytest.raises(DeviceError, match="closed"):
        node.pread(0, 4096)


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOENT, NotFound),
        (errno.ENXIO, NotFound),
        (errno.EACCES, PermissionDenied),
        (errno.EPERM, PermissionDenied),
        (errno.EROFS, PermissionDenied),
        (errno.ENOSPC, NoSpace),
        (errno.EDQUOT, NoSpace),
        (errno.EIO, DeviceError),
        (errno.EMFILE, Unsupported),
    ],
)
def test_errors_have_types_and_name_the_path(number: int, kind: type[FvdError]) -> None:
    error = typed_error(OSError(number, os.strerror(number)), "reading", "/dev/thing")
    assert type(error) is kind
    assert "/dev/thing" in str(error)


def test_a_failed_flush_is_a_device_error(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fail)
    with open_node(file) as node, pytest.raises(DeviceError, match="flushing"):
        node.flush()


# --- O_DIRECT that is not to be had ------------------------------------------------------------------------------


def test_a_file_system_that_refuses_direct_is_noticed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def without_direct(path: str, flags: int, *rest: int, **where: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *rest, **where)

    monkeypatch.setattr(os, "open", without_direct)
    with open_node(file) as node:
        assert not node.direct
        assert node.notice is not None and str(file) in node.notice and "O_DIRECT" in node.notice
        node.pwrite(0, b"odd")


@pytest.mark.parametrize(
    ("told", "direct", "block"), [(0, False, 512), (4096, True, 4096), (512, True, 512), (65536, False, 512), (1, True, 512)]
)
def test_what_the_kernel_tells_of_direct(file: Path, monkeypatch: pytest.MonkeyPatch, told: int, direct: bool, block: int) -> None:
    monkeypatch.setattr(node_module, "_statx_direct_alignment", lambda fd: told)
    with open_node(file) as node:
        assert (node.direct, node.logical_block_bytes) == (direct, block)
        assert (node.notice is None) == direct


def test_a_kernel_that_tells_nothing_is_asked_by_reading(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_module, "_statx_direct_alignment", lambda fd: None)
    with open_node(file) as node:
        assert node.direct and node.logical_block_bytes in (512, 4096)
        node.pwrite(0, bytes(node.logical_block_bytes))
    empty = sparse(file.with_name("empty"), 0)
    with open_node(empty) as node:
        assert node.logical_block_bytes == 4096


# --- Devices -----------------------------------------------------------------------------------------------------


def test_a_loop_device(file: Path) -> None:
    with loop_device(file) as device, open_node(device) as node:
        assert node.is_block and node.direct and node.size_bytes() == 16 * MIB
        data = os.urandom(MIB)
        node.pwrite(MIB, data)
        node.flush()
        node.zero(MIB, 512 * 1024)
        assert node.pread(MIB, MIB).tobytes() == bytes(512 * 1024) + data[512 * 1024 :]


def test_a_device_of_4096_byte_blocks(file: Path) -> None:
    with loop_device(file, "--sector-size", "4096") as device, open_node(device) as node:
        assert node.logical_block_bytes == 4096
        with pytest.raises(InvalidArgument, match="4096-byte blocks"):
            node.pread(0, 512)


def test_a_device_that_was_enlarged(file: Path) -> None:
    with loop_device(file) as device, open_node(device) as node:
        os.truncate(file, 20 * MIB)
        run("losetup", "--set-capacity", device)
        assert node.size_bytes() == 20 * MIB


def test_a_read_only_device(file: Path) -> None:
    with loop_device(file, "--read-only") as device:
        with pytest.raises(PermissionDenied):
            open_node(device)
        with open_node(device, read_only=True) as node:
            assert node.size_bytes() == 16 * MIB


def test_paths_to_one_thing_have_one_identity(file: Path) -> None:
    link, hard = file.with_name("link"), file.with_name("hard")
    link.symlink_to(file)
    hard.hardlink_to(file)
    with open_node(file) as one, open_node(link) as two, open_node(hard) as three:
        assert one.identity == two.identity == three.identity


# --- New files ---------------------------------------------------------------------------------------------------


def test_create_file(tmp_path: Path) -> None:
    path = tmp_path / "new"
    with reach(path) as place:
        os.close(create_file(place, path.name, 5 << 30))
    assert path.stat().st_size == 5 << 30
    assert path.stat().st_blocks == 0
    assert path.stat().st_mode & 0o777 == 0o600
    with reach(path) as place, pytest.raises(FileExistsError):
        create_file(place, path.name, 0)
    assert path.stat().st_size == 5 << 30
    with pytest.raises(NotFound):
        open_node(tmp_path / "absent" / "new")
