# SPDX-License-Identifier: Apache-2.0
"""The superblock survives its own encoding, and nothing else is taken for one."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fvd import _core
from fvd.errors import Corrupt, FvdError, InvalidArgument, NotFound, Unsupported
from fvd.format.geometry import Geometry, Layout
from fvd.format.superblock import (
    COPY_ON_READ,
    KNOWN_AUTOCLEAR_FEATURES,
    MAGIC,
    PREFETCH,
    SLOT_OFFSETS_BYTES,
    SUPERBLOCK,
    BaseFormat,
    BaseReference,
    Superblock,
    choose,
    decode,
    encode,
)

UUID = bytes(range(16))
GEOMETRY = Geometry(100 << 30)
BASE = BaseReference("/images/größe.raw", 12345)
PLAIN = Superblock(GEOMETRY, UUID, 1, BASE, 1_700_000_000)
NO_PAGE = bytes(4096)

ABSOLUTE_PATHS = st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=500).map(lambda t: "/" + t)


def sealed(page: bytes | bytearray, slot: int) -> bytes:
    """As an attacker would: any content, with the right checksum."""
    page = bytearray(page)
    page[8:12] = _core.checksum(bytes(page[24:40]), SLOT_OFFSETS_BYTES[slot], page, 8).to_bytes(4, "little")
    return bytes(page)


def changed(field: str, value: int | bytes, base: Superblock = PLAIN) -> bytes:
    page = bytearray(encode(base))
    offset, size = SUPERBLOCK.fields[field][1], SUPERBLOCK.fields[field][0].itemsize  # type: ignore[index]
    page[offset : offset + size] = value.ljust(size, b"\0") if isinstance(value, bytes) else value.to_bytes(size, "little")
    return sealed(page, base.slot)


@given(
    st.sampled_from(
        [GEOMETRY, Geometry(4096, 4096, 65536, 65536, 65536, Layout.RAW), Geometry((1 << 33) * 4096, 4096, 1 << 28, 1 << 30, 1 << 28)]
    ),
    st.binary(min_size=16, max_size=16),
    st.integers(1, 2**64 - 1),
    st.none() | st.builds(BaseReference, ABSOLUTE_PATHS, st.integers(0, 2**64 - 1), st.just(BaseFormat.RAW)),
    st.tuples(*[st.integers(0, 2**64 - 1)] * 3),
)
def test_round_trip(geometry: Geometry, uuid: bytes, generation: int, base: BaseReference | None, numbers: tuple[int, int, int]) -> None:
    unknown = numbers[2] & ~KNOWN_AUTOCLEAR_FEATURES
    sb = Superblock(geometry, uuid, generation, base, numbers[0], compatible_features=numbers[1], autoclear_features=unknown)
    page = encode(sb)
    assert len(page) == 4096 and decode(page, sb.slot) == sb
    with pytest.raises(FvdError):
        decode(page, 1 - sb.slot)


def test_every_flipped_bit_is_noticed() -> None:
    page = int.from_bytes(encode(PLAIN), "little")
    for bit in range(4096 * 8):
        with pytest.raises(NotFound if bit < 64 else Corrupt):
            decode((page ^ 1 << bit).to_bytes(4096, "little"), 1)


@pytest.mark.parametrize("cut", range(512, 4096, 512))
def test_torn_page(cut: int) -> None:
    """The next generation but one, written over this slot, arrives in part."""
    old, new = encode(PLAIN), encode(dataclasses.replace(PLAIN, generation=3, base=BaseReference("/" + "x" * 3071, 1)))
    for page in (new[:cut] + old[cut:], old[:cut] + new[cut:]):
        if page in (old, new):
            # The last sector is zeros in every superblock.
            assert cut == 3584
            continue
        with pytest.raises(Corrupt):
            decode(page, 1)


@pytest.mark.parametrize(
    "field, value",
    [
        ("generation", 2),
        ("virtual_size_bytes", 4095),
        ("virtual_size_bytes", 2**64 - 512),
        ("virtual_size_bytes", 0),
        ("virtual_size_bytes", 50 << 30),
        ("block_size_bytes", 0),
        ("block_size_bytes", 3 << 14),
        ("chunk_size_bytes", 0),
        ("chunk_size_bytes", 2**32 - 1),
        ("grow_step_bytes", 0),
        ("grow_step_bytes", 1),
        ("journal_offset_bytes", 0),
        ("journal_size_bytes", 0),
        ("journal_size_bytes", 2**64 - 4096),
        ("bitmap_offset_bytes", 0),
        ("bitmap_size_bytes", 2**63),
        ("table_offset_bytes", 0),
        ("table_size_bytes", 4096),
        ("data_offset_bytes", 1 << 20),
        ("max_storage_size_bytes", 2**64 - 1),
        ("layout", 1),
        ("layout", 2),
        ("placement", 2),
        ("base_format", 0),
        ("base_format", 2),
        ("base_format", 10),
        ("base_locator", b"nbd://a/b/c/d/e/f/g"),
        ("base_locator", b'json:{"driver":"x"}'),
        ("base_locator", b"/images/\nhidden.ra"),
        ("base_locator_size", 0),
        ("base_locator_size", 1),
        ("base_locator_size", 3073),
        ("base_locator_size", 2**32 - 1),
        ("base_locator_size", 3072),
        ("base_locator", b"relative/path/to.raw"),
        ("base_locator", b"/images/\0hidden"),
        ("base_locator", b"/images/\xff\xfe\xfd\xfc"),
        ("reserved_a", 1),
        ("reserved_b", b"\0" * 287 + b"\1"),
        ("reserved_c", b"\1"),
    ],
)
def test_contradictions(field: str, value: int | bytes) -> None:
    with pytest.raises(Corrupt):
        decode(changed(field, value), 1)


def test_a_base_size_without_a_base() -> None:
    with pytest.raises(Corrupt):
        decode(changed("base_size_bytes", 1, dataclasses.replace(PLAIN, base=None)), 1)


def test_what_the_future_may_bring() -> None:
    with pytest.raises(Unsupported, match="version 2"):
        decode(changed("version", 2), 1)
    with pytest.raises(Unsupported, match="0x8000"):
        decode(changed("incompatible_features", 0x8000), 1)
    with pytest.raises(Unsupported):
        encode(dataclasses.replace(PLAIN, incompatible_features=1))
    for number in (11, 255):
        with pytest.raises(Unsupported, match=f"unknown base format {number}"):
            decode(changed("base_format", number), 1)
    known = dataclasses.replace(PLAIN, compatible_features=5, autoclear_features=2**63)
    assert decode(encode(known), 1) == known
    assert decode(changed("reserved_b", b"\1", known), 1) == known, "a compatible feature may use reserved bytes"


@pytest.mark.parametrize("features", [0, COPY_ON_READ, PREFETCH, COPY_ON_READ | PREFETCH])
def test_the_features_that_are_known_give_reserved_bytes_no_meaning(features: int) -> None:
    sb = dataclasses.replace(PLAIN, compatible_features=features)
    assert (sb.copy_on_read, sb.prefetch) == (bool(features & 1), bool(features & 2))
    assert decode(encode(sb), 1) == sb
    for field in ("reserved_a", "reserved_b", "reserved_c"):
        with pytest.raises(Corrupt, match=field):
            decode(changed(field, b"\1", sb), 1)
        other = dataclasses.replace(sb, compatible_features=features | 4)
        assert decode(changed(field, b"\1", other), 1) == other


def test_a_newer_base_format_is_the_future_even_where_its_locator_makes_no_sense_here() -> None:
    page = bytearray(changed("base_format", 11))
    page[512:520] = b"\1\2\3\4\5\6\7\0"
    with pytest.raises(Unsupported, match="base format"):
        decode(sealed(page, 1), 1)
    with pytest.raises(Unsupported, match="base format"):
        choose(NO_PAGE, sealed(page, 1))


def test_rot_in_the_version_is_damage_not_the_future() -> None:
    page = bytearray(encode(PLAIN))
    page[12] = 2
    with pytest.raises(Corrupt):
        decode(bytes(page), 1)


def test_nothing_there() -> None:
    for page in (NO_PAGE, b"\xff" * 4096, b"LABELONE".ljust(4096, b"x"), encode(PLAIN)[1:] + b"\0"):
        with pytest.raises(NotFound):
            decode(page, 0)


def generation(number: int, uuid: bytes = UUID) -> bytes:
    return encode(dataclasses.replace(PLAIN, generation=number, uuid=uuid))


def test_choose() -> None:
    first, second, third = generation(1), generation(2), generation(3)
    damaged = bytes([*second[:100], second[100] ^ 1, *second[101:]])
    assert choose(NO_PAGE, first).generation == 1
    assert choose(second, first).generation == 2
    assert choose(second, third).generation == 3
    assert choose(second, NO_PAGE).generation == 2
    assert choose(damaged, first).generation == 1
    with pytest.raises(NotFound):
        choose(NO_PAGE, NO_PAGE)
    with pytest.raises(Corrupt):
        choose(damaged, NO_PAGE)
    with pytest.raises(Corrupt):
        choose(NO_PAGE, damaged)
    with pytest.raises(Corrupt):
        choose(first, second)
    with pytest.raises(Corrupt):
        choose(first, NO_PAGE)


def test_choose_does_not_fall_back_behind_a_newer_program() -> None:
    newer = changed("incompatible_features", 1, dataclasses.replace(PLAIN, generation=4))
    older = changed("version", 2, dataclasses.replace(PLAIN, generation=2))
    broken = NO_PAGE[:-1] + b"\1"
    for other in (NO_PAGE, generation(3), MAGIC + NO_PAGE[8:]):
        with pytest.raises(Unsupported):
            choose(newer, other)
    assert choose(older, generation(3)).generation == 3
    with pytest.raises(Unsupported):
        choose(older, broken)
    with pytest.raises(Unsupported, match="slot 1"):
        choose(older, changed("version", 9, dataclasses.replace(PLAIN, generation=5)))


@pytest.mark.parametrize("locator", ["", "relative", "a/b", "/with\0nul", "/" + "x" * 3072, "/" + "ä" * 1536, "/\udcff"])
def test_locators_that_do_not_fit(locator: str) -> None:
    with pytest.raises(InvalidArgument):
        BaseReference(locator, 1)


def test_values_that_do_not_fit() -> None:
    BaseReference("/" + "x" * 3071, 0)
    for size in (-1, 2**64):
        with pytest.raises(InvalidArgument):
            BaseReference("/x", size)
    for unknown in (0, 1, 2, 11, BaseFormat.NONE):
        with pytest.raises(InvalidArgument):
            BaseReference("/x", 1, unknown)  # type: ignore[arg-type]
    for change in ({"uuid": b"short"}, {"generation": 0}, {"generation": 2**64}, {"created_seconds": -1}, {"compatible_features": 2**64}):
        with pytest.raises(InvalidArgument):
            dataclasses.replace(PLAIN, **change)
    with pytest.raises(InvalidArgument):
        decode(bytes(4095), 0)
    with pytest.raises(InvalidArgument):
        decode(bytes(4096), 2)


PATCHES = st.lists(st.tuples(st.integers(8, 700) | st.integers(8, 4095), st.binary(min_size=1, max_size=16)), max_size=6)


@given(PATCHES, st.booleans(), st.booleans())
@settings(max_examples=400)
@example([(64, b"\0" * 16)], True, True)
@example([(64, b"\xff" * 16)], True, True)
def test_hostile_pages(patches: list[tuple[int, bytes]], seal: bool, with_base: bool) -> None:
    page = bytearray(encode(PLAIN if with_base else dataclasses.replace(PLAIN, base=None)))
    for offset, data in patches:
        page[offset : offset + len(data)] = data
    page = page[:4096]
    try:
        sb = decode(sealed(page, 1) if seal else bytes(page), 1)
    except FvdError:
        return
    assert decode(encode(sb), 1) == sb


@given(st.binary(max_size=4096), st.binary(max_size=4096), st.booleans())
def test_arbitrary_bytes(page0: bytes, page1: bytes, with_magic: bool) -> None:
    pages = [(MAGIC + page if with_magic else page)[:4096].ljust(4096, b"\0") for page in (page0, page1)]
    with pytest.raises((NotFound, Corrupt)):
        choose(pages[0], pages[1])
    for slot, page in enumerate(pages):
        with pytest.raises(FvdError):
            decode(sealed(page, slot), slot)


def test_decode_takes_an_array_as_well() -> None:
    assert decode(np.frombuffer(encode(PLAIN), np.uint8), 1) == PLAIN  # type: ignore[arg-type]
