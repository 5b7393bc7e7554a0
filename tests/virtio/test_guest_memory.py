# SPDX-License-Identifier: Apache-2.0
"""What a front end hands over as memory: taken if it is memory and fits, refused with an error of ours else; and it may go at any time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from guest_model import FLUSH, GET_ID, GUEST_ADDRESS, IN, OUT, REGION_BYTES, Memory, header
from hypothesis import given
from hypothesis import strategies as st
from ring_running import Running, begin, map_memory, ring_running

from fvd.errors import FvdError, InvalidArgument, OutOfMemory
from fvd.virtio._guest_memory import GuestMemory, Shared

PAGE = 4096
TOP = 2**64


def mappings() -> int:
    with Path("/proc/self/maps").open() as maps:
        return sum("memfd:" in line for line in maps)


@pytest.mark.parametrize(
    ("guest", "user", "size", "offset", "why"),
    [
        (0, 0, 0, 0, "is no memory"),
        (TOP - PAGE + 1, 0, PAGE, 0, "is no memory"),
        (0, TOP - PAGE + 1, PAGE, 0, "is no memory"),
        (0, 0, PAGE, TOP - PAGE + 1, "is no memory"),
        (0, 0, TOP - 1, 0, "is no memory"),
        (0, 0, 2**62, 2**62, "is no memory"),
        (0, 0, PAGE + 1, 4 * REGION_BYTES - PAGE, "were named"),
        (0, 0, 4 * REGION_BYTES + 1, 0, "were named"),
    ],
)
def test_regions_that_are_none(memory: Memory, guest: int, user: int, size: int, offset: int, why: str) -> None:
    mapped = GuestMemory()
    before = mappings()
    with pytest.raises(InvalidArgument, match=why):
        mapped.add(memory.fd, guest, user, size, offset)
    assert mappings() == before


@pytest.mark.parametrize(("guest", "user"), [(PAGE - 1, TOP // 2), (0, TOP // 2), (TOP // 2, PAGE - 1), (TOP // 2, 0)])
def test_regions_that_overlap(memory: Memory, guest: int, user: int) -> None:
    mapped = GuestMemory()
    mapped.add(memory.fd, 0, 0, PAGE, 0)
    with pytest.raises(InvalidArgument, match="overlap"):
        mapped.add(memory.fd, guest, user, PAGE, 0)
    mapped.add(memory.fd, PAGE, PAGE, PAGE, 0)
    mapped.add(memory.fd, TOP - 1 - PAGE, TOP - 1 - PAGE, PAGE, 0)


def test_not_more_regions_than_there_are_places(memory: Memory) -> None:
    mapped = GuestMemory()
    for place in range(64):
        mapped.add(memory.fd, place * PAGE, place * PAGE, PAGE, 0)
    with pytest.raises(InvalidArgument, match="more than 64 regions"):
        mapped.add(memory.fd, 64 * PAGE, 64 * PAGE, PAGE, 0)
    mapped.remove(3 * PAGE, 3 * PAGE, PAGE)
    with pytest.raises(InvalidArgument, match="there is no region"):
        mapped.remove(3 * PAGE, 3 * PAGE, PAGE)
    mapped.add(memory.fd, 64 * PAGE, 64 * PAGE, PAGE, 0)
    mapped.close()
    mapped.close()


def test_what_is_no_memory(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(file, PAGE)
    folder = os.open("/dev/shm", os.O_RDONLY)
    fds = [reading, writing, file, folder, os.eventfd(0), os.open("/dev/zero", os.O_RDWR)]
    for fd in fds:
        with pytest.raises(InvalidArgument, match=r"must be a memfd|were named"):
            Shared(fd, PAGE)
        os.close(fd)
    with pytest.raises(InvalidArgument):
        Shared(1 << 20, PAGE)


def test_memory_that_may_not_be_written(memory: Memory) -> None:
    fd = os.open(f"/proc/self/fd/{memory.fd}", os.O_RDONLY)
    with pytest.raises(OutOfMemory, match="cannot be mapped"):
        Shared(fd, PAGE)
    os.close(fd)


def test_nobody_can_have_all_the_addresses_there_are() -> None:
    fd = os.memfd_create("huge", os.MFD_CLOEXEC)
    os.ftruncate(fd, 2**45)
    kept = [Shared(fd, 2**45)]
    before = mappings()
    with pytest.raises(OutOfMemory, match="too much of guests' memory is mapped"):
        kept += [Shared(fd, 2**45), Shared(fd, 2**45)]
    assert mappings() <= before + 1
    kept.clear()
    os.close(fd)


@given(st.integers(0, 2**66), st.integers(0, 2**66))
def test_any_log_and_any_area_is_refused_or_fits(offset: int, size: int) -> None:
    memory = Memory()
    try:
        for take in (lambda: GuestMemory().log_to(memory.fd, offset, size), lambda: Shared(memory.fd, offset + size)):
            try:
                take()
                assert 0 < offset + size <= memory.size_bytes
            except FvdError:
                pass
    finally:
        memory.close()


@pytest.mark.parametrize(
    ("move", "why"),
    [
        ((8, 0, 0), "not aligned"), ((0, 1, 0), "not aligned"), ((0, 0, 2), "not aligned"),
        ((1 << 40, 0, 0), "does not lie"), ((0, 1 << 40, 0), "does not lie"), ((0, 0, 1 << 40), "does not lie"),
        ((REGION_BYTES - 32, 0, 0), "does not lie"), ((0, 0, -(1 << 40)), "does not lie"),
    ],
)  # fmt: skip
def test_rings_that_lie_elsewhere(move: tuple[int, int, int], why: str) -> None:
    with ring_running() as running:
        guest = running.guest
        guest.descriptors, guest.available, guest.used = guest.descriptors + move[0], guest.available + move[1], guest.used + move[2]
        with pytest.raises(InvalidArgument, match=why):
            running.begin()


def test_a_region_at_an_odd_place_of_its_file(memory: Memory) -> None:
    mapped = GuestMemory()
    mapped.add(memory.fd, GUEST_ADDRESS, 1 << 44, REGION_BYTES, 1)
    with ring_running() as running, pytest.raises(InvalidArgument, match="aligned in its file"):
        begin(running.ring, mapped, running.guest)


# --- Memory that is taken away --------------------------------------------------------------------------------------------


def shrink(memory: Memory) -> None:
    os.ftruncate(memory.fd, 0)


def test_memory_shrinks_before_between_and_under_requests() -> None:
    """The loads and stores of a ring, of headers, of data in a buffer of ours, of statuses: each finds that the memory has gone."""
    with ring_running() as other:
        for when in ("before", "taken", "ended"):
            memory = Memory()
            with ring_running(memory=memory) as running:
                odd = memory.carve(16 + 1024, 16)
                memory.write(odd, header(OUT))
                status = memory.carve(1)
                running.guest.make_available(running.guest.chain([(odd, 16), (odd + 16, 100), (odd + 200, 412)], [(status, 1)]))
                running.request(IN, 0, into=1024)
                if when == "before":
                    shrink(memory)
                running.driver.take()
                if when == "taken":
                    shrink(memory)
                running.driver.end_all()
                if when == "ended":
                    shrink(memory)
                running.driver.publish()
                assert running.driver.torn and running.ring.why == "the guest's memory was taken away"
                assert running.mapped.torn and not other.mapped.torn
        other.request(FLUSH)
        assert len(other.finish()) == 1


def test_memory_that_was_torn_is_unmapped_as_any_other() -> None:
    memory = Memory()
    before = mappings()
    mapped = map_memory(memory)
    assert mappings() == before + 4
    shrink(memory)
    with ring_running() as running, pytest.raises(InvalidArgument):
        running.begin()
        begin(running.ring, GuestMemory(), running.guest)
    mapped.close()
    assert mappings() == before
    memory.close()


# --- The log of a migration -------------------------------------------------------------------------------------------------

LOG_FIRST_PAGE = GUEST_ADDRESS // PAGE


def log_of(running: Running) -> int:
    """Has the ring's memory counted from now on, over an odd offset of its file. Returns the log's descriptor."""
    fd = os.memfd_create("log", os.MFD_CLOEXEC)
    pages = LOG_FIRST_PAGE + running.memory.size_bytes // PAGE
    os.ftruncate(fd, 64 + pages // 8)
    running.mapped.log_to(fd, 64, pages // 8)
    begin(running.ring, running.mapped, running.guest, log_used_at=running.guest.used, event_index=False)
    return fd


def marked(fd: int) -> set[int]:
    """The guest's pages in the log, counted from where its memory begins."""
    content = os.pread(fd, 1 << 20, 64)
    return {8 * at + bit - LOG_FIRST_PAGE for at, byte in enumerate(content) if byte for bit in range(8) if byte >> bit & 1}


def pages_of(*buffers: tuple[int, int]) -> set[int]:
    return {page - LOG_FIRST_PAGE for at, length in buffers for page in range(at // PAGE, (at + length - 1) // PAGE + 1)}


@pytest.mark.parametrize("odd", [False, True])
def test_what_a_read_writes_is_marked_when_it_is_there(odd: bool) -> None:
    with ring_running(16) as running:
        fd = log_of(running)
        memory, guest = running.memory, running.guest
        running.disk[:] = os.urandom(len(running.disk))
        at, status = memory.carve(16, 16), memory.carve(1, 8 * PAGE)
        memory.write(at, header(IN))
        # The second crosses from one region into the next; the third begins where that lies in the file, before the region before it.
        buffers = [(GUEST_ADDRESS + 30 * PAGE + (3 if odd else 0), 1000 if odd else 1024), (GUEST_ADDRESS + REGION_BYTES - 1024, 2048)]
        buffers.append((GUEST_ADDRESS + 40 * PAGE, 536 if odd else 512))
        guest.make_available(guest.chain([(at, 16)], [*buffers, (status, 1)]))
        running.driver.take()
        assert marked(fd) == set()
        running.driver.end_all()
        assert marked(fd) == pages_of(*buffers, (status, 1))
        running.driver.publish()
        assert marked(fd) == pages_of(*buffers, (status, 1), (guest.used, 4 + 8 * guest.size))
        data = b"".join(memory.read(*buffer) for buffer in buffers)
        assert data == running.disk[: len(data)]
        os.close(fd)


def test_pieces_that_lie_side_by_side_here_are_marked_where_the_guest_has_them() -> None:
    """Two regions whose mappings touch become one piece of a chain: in one order or the other, if the kernel maps them so."""
    with ring_running() as running:
        memory, others = running.memory, [Memory(1), Memory(1)]
        places = [GUEST_ADDRESS + (2 << 30), GUEST_ADDRESS + (1 << 30)]
        for other, place in zip(others, places, strict=True):
            running.mapped.add(other.fd, place, place, REGION_BYTES, 0)
        fd = os.memfd_create("log", os.MFD_CLOEXEC)
        size_bytes = (places[0] + REGION_BYTES) // PAGE // 8
        os.ftruncate(fd, size_bytes)
        running.mapped.log_to(fd, 0, size_bytes)
        begin(running.ring, running.mapped, running.guest)
        at, status = memory.carve(16, 16), memory.carve(1)
        memory.write(at, header(IN))
        for first, second in (places, places[::-1]):
            running.guest.make_available(running.guest.chain([(at, 16)], [(first + REGION_BYTES - 512, 512), (second, 512), (status, 1)]))
        running.driver.take()
        running.driver.end_all()
        content = os.pread(fd, size_bytes, 0)
        wanted = {page // PAGE for place in places for page in (place, place + REGION_BYTES - 1)} | {status // PAGE}
        assert {8 * byte + bit for byte in range(size_bytes) if content[byte] for bit in range(8) if content[byte] >> bit & 1} == wanted
        os.close(fd)
        for other in others:
            other.close()


def test_the_serial_number_is_marked() -> None:
    with ring_running() as running:
        fd = log_of(running)
        memory, guest = running.memory, running.guest
        at, status = memory.carve(16, 16), memory.carve(1)
        memory.write(at, header(GET_ID))
        data = GUEST_ADDRESS + 50 * PAGE - 10
        guest.make_available(guest.chain([(at, 16)], [(data, 20), (status, 1)]))
        running.driver.take()
        assert marked(fd) == pages_of((data, 20), (status, 1))
        os.close(fd)


def test_pages_beyond_the_log_are_not_marked() -> None:
    with ring_running() as running:
        fd = os.memfd_create("log", os.MFD_CLOEXEC)
        os.ftruncate(fd, PAGE)
        running.mapped.log_to(fd, 0, 8)
        begin(running.ring, running.mapped, running.guest, log_used_at=2**64 - 8)
        running.request(IN, 0, into=512)
        running.finish()
        assert os.pread(fd, PAGE, 0) == bytes(PAGE)
        os.close(fd)


def test_another_table_goes_on_with_the_log(memory: Memory) -> None:
    with ring_running(memory=memory) as running:
        fd = log_of(running)
        fresh = map_memory(memory)
        fresh.take_log_of(running.mapped)
        begin(running.ring, fresh, running.guest)
        _, data, status = running.request(IN, 0, into=512)
        running.finish()
        assert marked(fd) == pages_of((data, 512), (status, 1))
        fresh.log_nothing()
        fresh.close()
        os.close(fd)
