# SPDX-License-Identifier: Apache-2.0
"""CRC32C: known vectors, both kernels against each other and against the definition."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fvd import _core

KERNELS = [_core.crc32c, _core.crc32c_portable]


def naive(data: bytes, crc: int = 0) -> int:
    crc ^= 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "data, crc",
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        # RFC 3720, B.4
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_known_vectors(kernel, data: bytes, crc: int) -> None:  # type: ignore[no-untyped-def]
    assert kernel(data) == crc == naive(data)


def test_every_length_around_the_interleaved_strides() -> None:
    data = random.Random(1).randbytes(13_000)
    lengths = [*range(0, 1100), *range(4070, 4110), *range(8160, 8200), *range(12_250, 12_290)]
    for length in lengths:
        assert _core.crc32c(data[:length]) == _core.crc32c_portable(data[:length]), length
    assert _core.crc32c(data[3:4099]) == naive(data[3:4099])


@given(st.binary(max_size=700), st.integers(0, 700))
def test_composable(data: bytes, cut: int) -> None:
    for kernel in KERNELS:
        assert kernel(data[cut:], kernel(data[:cut])) == naive(data)


@given(st.binary(min_size=16, max_size=16), st.integers(0, 2**64 - 1), st.binary(min_size=4, max_size=600), st.data())
def test_checksum(uuid: bytes, position: int, data: bytes, draw: st.DataObject) -> None:
    field = draw.draw(st.integers(0, len(data) - 4))
    zeroed = data[:field] + bytes(4) + data[field + 4 :]
    assert _core.checksum(uuid, position, data, field) == naive(uuid + position.to_bytes(8, "little") + zeroed)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError):
        _core.checksum(bytes(15), 0, bytes(512), 0)
    with pytest.raises(ValueError):
        _core.checksum(bytes(16), 0, bytes(512), 509)
    with pytest.raises(ValueError):
        _core.checksum(bytes(16), 0, b"abc", 0)
    with pytest.raises(OverflowError):
        _core.checksum(bytes(16), -1, bytes(512), 0)
