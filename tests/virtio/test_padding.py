# SPDX-License-Identifier: Apache-2.0
"""Messages whose length front ends disagree about."""

from __future__ import annotations

import struct

import pytest

from fvd.virtio import messages
from fvd.virtio.messages import Ask, InflightArea

pytestmark = pytest.mark.pure


@pytest.mark.parametrize("padding_bytes", [0, 4])
def test_the_area_in_flight_is_told_in_as_many_bytes_as_it_was_asked_for(padding_bytes: int) -> None:
    """QEMU's C structure ends with 4 bytes of padding, which it sends, and wants back; the specification has none."""
    question = struct.pack("<QQHH", 0, 0, 4, 128) + bytes(padding_bytes)
    asked = messages.decode(Ask.GET_INFLIGHT_FD, 1, question, ())
    answer = messages.encode_inflight(InflightArea(8448, 0, 4, 128), asked.value)
    assert struct.unpack_from("<III", answer) == (Ask.GET_INFLIGHT_FD, 5, len(question))
    assert len(answer) == 12 + len(question) and struct.unpack_from("<QQHH", answer, 12) == (8448, 0, 4, 128)
