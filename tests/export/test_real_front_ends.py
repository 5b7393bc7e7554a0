# SPDX-License-Identifier: Apache-2.0
"""What QEMU and User-Mode Linux were seen to say, in tests that need neither: tests/guests has them both."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

import pytest
from guest_model import OUT
from nbd_running import Disks
from vhost_client import PROTOCOL, FrontEnd, Refused

from fvd.export.server import Unix
from fvd.virtio.messages import Ask, Protocol

pytestmark = pytest.mark.release_only


@pytest.fixture
def guest(disks: Disks) -> Iterator[FrontEnd]:
    """Of a disk of its own, ready for requests."""
    path = disks.folder / "guest.sock"
    disks.serve().server.add_guest_port("", Unix(str(path)), 1)
    front_end = FrontEnd(path).begin(protocol=PROTOCOL | Protocol.STATUS)
    yield front_end
    front_end.close()


def test_a_ring_is_asked_where_it_stands_after_a_reset(guest: FrontEnd) -> None:
    """QEMU 7.2 stops a device in this order. Where it moves to another host, that number is where the ring goes on there."""
    for sector in range(3):
        guest.do(OUT, sector, bytes(512))
    assert guest.tell(Ask.SET_STATUS, struct.pack("<Q", 0)) == 0
    assert guest.tell(Ask.SET_VRING_ENABLE, struct.pack("<II", 0, 0)) == 0
    assert struct.unpack("<II", guest.ask(Ask.GET_VRING_BASE, struct.pack("<II", 0, 0))) == (0, 3)


def test_a_guest_may_be_called_through_a_socket(guest: FrontEnd) -> None:
    """As User-Mode Linux is."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(20)
        assert guest.tell(Ask.SET_VRING_CALL, struct.pack("<Q", 0), [theirs.fileno()]) == 0
        guest.request(OUT, 0, bytes(512))
        assert ours.recv(8) == struct.pack("<Q", 1)


def test_a_guest_may_not_kick_through_a_socket(guest: FrontEnd) -> None:
    """What is only written to waits for nobody; what is watched could wake the loop for ever."""
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(Refused):
        guest.tell(Ask.SET_VRING_KICK, struct.pack("<Q", 0), [theirs.fileno()])
