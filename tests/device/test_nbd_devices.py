# SPDX-License-Identifier: Apache-2.0
"""The host's nbd devices in a /sys of our own, netlink's bytes, and what is refused where the kernel has no nbd driver.

tests/lvm/real/test_attach.py has the real driver.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import fvd
from fvd.device import nbd_devices, nbd_netlink
from fvd.device.nbd_devices import NbdDevice
from fvd.device.nbd_netlink import NbdNetlink, Shape
from fvd.errors import Conflict, DeviceError, InUse, NotFound, PermissionDenied, Unsupported

pytestmark = [pytest.mark.pure, pytest.mark.release_only]
UUID = "42db7f96-62ae-4cce-8ebc-094dd536eeeb"
SHAPE = Shape(1 << 20, 512, 5, 120, f"fvd:{UUID}:vm1")


@pytest.fixture
def block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for /sys/block; nbd0 is nobody's, nbd1 a stranger's, nbd2 ours."""
    for name, backend in (("nbd0", None), ("nbd1", "other\n"), ("nbd2", f"fvd:{UUID}:vm1\n"), ("sda", f"fvd:{UUID}:x\n")):
        (tmp_path / name / "queue").mkdir(parents=True)
        if backend is not None:
            (tmp_path / name / "backend").write_text(backend)
    monkeypatch.setattr(nbd_devices, "_BLOCK", tmp_path)
    monkeypatch.setattr(nbd_devices, "_LINKS", tmp_path / "links")
    return tmp_path


def test_a_disk_is_found_by_its_uuid(block: Path) -> None:
    device = nbd_devices.find(UUID)
    assert device == NbdDevice(2, UUID, "vm1") and device.is_connected and device.backend == SHAPE.backend
    assert nbd_devices.path_of(UUID) == "/dev/nbd2"
    assert nbd_devices.find(UUID.replace("4", "5")) is None and nbd_devices.path_of("") is None
    (block / "nbd2" / "backend").unlink()
    assert not device.is_connected and nbd_devices.find(UUID) is None


def test_a_link_is_made_and_only_ours_removed(block: Path) -> None:
    device = NbdDevice(2, UUID, "vm1")
    device.make_link()
    assert device.link.readlink() == Path("../nbd2")
    nbd_devices.check_name("vm2")
    with pytest.raises(Conflict, match="--name"):
        nbd_devices.check_name("vm1")
    with pytest.raises(Conflict):
        NbdDevice(3, UUID, "vm1").make_link()
    NbdDevice(3, UUID, "vm1").remove_link()
    assert device.link.is_symlink()


def test_the_kernel_is_told(block: Path) -> None:
    device = NbdDevice(2, UUID, "vm1")
    device.limit_silence(5000)
    device.tell_udev()
    assert (block / "nbd2" / "queue" / "io_timeout").read_text() == "5000"
    assert (block / "nbd2" / "uevent").read_text() == "change"


class Kernel(threading.Thread):
    """Answers netlink's messages: with the family's number, then with `errors` in turn, 0 for an answer that names device 7."""

    def __init__(self, end: socket.socket, *errors: int) -> None:
        super().__init__(daemon=True)
        self._end = end
        self._errors = [0, *errors]
        self.attributes: list[dict[int, bytes]] = []
        self.start()

    def run(self) -> None:
        for number in self._errors:
            data = self._end.recv(1 << 16)
            (length, kind, flags, sequence, _port) = struct.unpack_from("=IHHII", data)
            assert length == len(data) and flags == 5
            self.attributes.append(nbd_netlink._attributes(data[20:]))
            value = nbd_netlink._attribute(1, struct.pack("=H", 29) if kind == 16 else struct.pack("=I", 7))
            message = struct.pack("=IHHII", 20 + len(value), kind, 0, sequence, 0) + data[16:20] + value
            end = struct.pack("=IHHIIi", 20, 2, 0, sequence, 0, -number)
            self._end.send(end if number else message + end)


@contextlib.contextmanager
def kernel(monkeypatch: pytest.MonkeyPatch, *errors: int) -> Iterator[tuple[NbdNetlink, Kernel]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with monkeypatch.context() as patched, theirs:
        patched.setattr(nbd_netlink.socket, "socket", lambda *_: ours)
        patched.setattr(nbd_netlink, "_bind", lambda _: None)
        thread = Kernel(theirs, *errors)
        with NbdNetlink() as netlink:
            yield netlink, thread
        thread.join()


def test_a_device_is_made_as_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with kernel(monkeypatch, 0, 0, 0) as (netlink, thread):
        assert netlink.connect(SHAPE, 5) == 7
        netlink.reconnect(7, SHAPE.backend, 6)
        netlink.disconnect(7)
    _family, made, again, ended = thread.attributes
    (size, block, slow, flags, dead) = (struct.unpack("=Q", made[kind])[0] for kind in (2, 3, 4, 5, 8))
    assert (size, block, slow, flags, dead) == (1 << 20, 512, 0, 5, 120)
    assert made[10] == again[10] == SHAPE.backend.encode() + b"\0" and 1 not in made
    assert nbd_netlink._attributes(nbd_netlink._attributes(made[7])[1]) == {1: struct.pack("=I", 5)}
    assert again[1] == ended[1] == struct.pack("=I", 7)


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.EPERM, PermissionDenied), (errno.EBUSY, InUse), (errno.ENOSPC, InUse), (errno.EINVAL, NotFound), (errno.EIO, DeviceError)],
)
def test_the_kernel_s_errors_have_types(number: int, kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    with kernel(monkeypatch, number) as (netlink, _thread), pytest.raises(kind, match="reconnecting /dev/nbd7"):
        netlink.reconnect(7, SHAPE.backend, 6)


def test_a_kernel_without_the_driver_is_named() -> None:
    if Path("/sys/module/nbd").exists():
        pytest.skip("this kernel has the driver")
    with pytest.raises(Unsupported, match="no nbd driver loaded; run modprobe nbd"), NbdNetlink():
        pass
    with pytest.raises(Unsupported, match="this kernel has no nbd driver"):
        nbd_devices.load_driver()


def test_only_root_attaches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    for verb in (fvd.attach, fvd.detach):
        with pytest.raises(PermissionDenied, match="only by root"):
            verb("file:/nowhere")
