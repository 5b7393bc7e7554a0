# SPDX-License-Identifier: Apache-2.0
"""What a guest can break of its ring: each fault that the sources name is reached here, is told, and touches nothing but that ring."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from guest_model import FLUSH, GUEST_ADDRESS, IN, INDIRECT, NEXT, OUT, REGION_BYTES, WRITABLE, Memory, header
from hypothesis import given, settings
from hypothesis import strategies as st
from ring_running import Running, ring_running

import fvd.virtio

SOURCES = sorted(Path(fvd.virtio.__file__).parent.glob("*.p[xy][xi]"))
TABLE = GUEST_ADDRESS + REGION_BYTES  # nothing else lies there
OUTSIDE = GUEST_ADDRESS + (1 << 40)


def offer(running: Running, *entries: tuple[int, int, int, int], table: int = 0) -> None:
    """Entries from 0 on, (address, length, flags, next), and their chain made available."""
    for place, entry in enumerate(entries):
        running.guest.put_entry(table or running.guest.descriptors, place, *entry)
    running.guest.make_available(0)


def head_at(running: Running, kind: int = IN) -> int:
    at = running.memory.carve(16, 16)
    running.memory.write(at, header(kind))
    return at


def outside_of_the_ring(running: Running) -> None:
    running.guest.make_available(running.guest.size)


def circle(running: Running) -> None:
    offer(running, (head_at(running), 16, NEXT, 1), (GUEST_ADDRESS, 0, NEXT, 0))


def circle_in_a_table(running: Running) -> None:
    running.guest.put_entry(running.guest.descriptors, 0, TABLE, 32, INDIRECT)
    offer(running, (head_at(running), 0, NEXT, 1), (GUEST_ADDRESS, 0, NEXT, 0), table=TABLE)


def out_of_its_table(running: Running) -> None:
    offer(running, (head_at(running), 16, NEXT, running.guest.size))


def out_of_its_indirect_table(running: Running) -> None:
    running.guest.put_entry(running.guest.descriptors, 0, TABLE, 16, INDIRECT)
    offer(running, (head_at(running), 16, NEXT, 1), table=TABLE)


def indirect_in_indirect(running: Running) -> None:
    running.guest.put_entry(running.guest.descriptors, 0, TABLE, 16, INDIRECT)
    offer(running, (TABLE, 16, INDIRECT, 0), table=TABLE)


def indirect_to_itself(running: Running) -> None:
    """Its table is the ring's own: without a word for it, this one never ends."""
    offer(running, (running.guest.descriptors, 16, INDIRECT, 0))


def indirect_and_more(running: Running) -> None:
    offer(running, (TABLE, 16, INDIRECT | NEXT, 1))


def indirect_of(length: int) -> Callable[[Running], None]:
    return lambda running: offer(running, (TABLE, length, INDIRECT, 0))


def indirect_across_regions(running: Running) -> None:
    offer(running, (TABLE + REGION_BYTES - 16, 32, INDIRECT, 0))


def indirect_outside(running: Running) -> None:
    offer(running, (OUTSIDE, 32, INDIRECT, 0))


def read_behind_write(running: Running) -> None:
    offer(running, (head_at(running), 16, NEXT, 1), (TABLE, 1, NEXT | WRITABLE, 2), (TABLE, 1, 0, 0))


def beyond_all_addresses(running: Running) -> None:
    offer(running, (2**64 - 8, 16, 0, 0))


def not_in_memory(running: Running) -> None:
    offer(running, (OUTSIDE, 16, 0, 0))


def half_in_memory(running: Running) -> None:
    offer(running, (head_at(running), 16, NEXT, 1), (GUEST_ADDRESS + running.memory.size_bytes - 1, 2, WRITABLE, 0))


def four_gigabytes(running: Running) -> None:
    offer(running, (head_at(running), 16, NEXT, 1), (TABLE, 2**32 - 1, WRITABLE, 0))


def too_many_pieces(running: Running) -> None:
    """Of a table that is as long as one may be: each entry crosses from one region into the next."""
    table = GUEST_ADDRESS + 2 * REGION_BYTES
    for place in range(2048):
        running.guest.put_entry(table, place, GUEST_ADDRESS + REGION_BYTES - 1, 2, NEXT | WRITABLE, place + 1)
    running.guest.put_entry(running.guest.descriptors, 0, table, 16 * 2048, INDIRECT)
    running.guest.make_available(0)


def half_a_header(running: Running) -> None:
    offer(running, (head_at(running), 15, NEXT, 1), (TABLE, 1, WRITABLE, 0))


def nothing_at_all(running: Running) -> None:
    offer(running, (OUTSIDE, 0, 0, 0))


def no_status(running: Running) -> None:
    offer(running, (head_at(running), 16, 0, 0))


def empty_status(running: Running) -> None:
    offer(running, (head_at(running), 16, NEXT, 1), (TABLE, 0, WRITABLE, 0))


def same_head_twice(running: Running) -> None:
    head, _, _ = running.request(FLUSH)
    running.guest.make_available(head)


def index_jumps(running: Running) -> None:
    running.guest.jump(running.guest.size + 1)


def index_goes_back(running: Running) -> None:
    running.guest.jump(-1)


def taken_away(running: Running) -> None:
    os.ftruncate(running.memory.fd, 0)


FAULTS: list[tuple[str, Callable[[Running], None]]] = [
    ("a chain begins outside of the ring", outside_of_the_ring),
    ("a chain goes in circles", circle),
    ("a chain goes in circles", circle_in_a_table),
    ("a chain leads out of its table", out_of_its_table),
    ("a chain leads out of its table", out_of_its_indirect_table),
    ("an indirect table stands where none may", indirect_in_indirect),
    ("an indirect table stands where none may", indirect_to_itself),
    ("an indirect table stands where none may", indirect_and_more),
    ("an indirect table has no whole entries, or too many", indirect_of(0)),
    ("an indirect table has no whole entries, or too many", indirect_of(17)),
    ("an indirect table has no whole entries, or too many", indirect_of(16 * 2049)),
    ("an indirect table has no whole entries, or too many", indirect_of(2**32 - 16)),
    ("an indirect table is not in one piece of the guest's memory", indirect_across_regions),
    ("an indirect table is not in one piece of the guest's memory", indirect_outside),
    ("a chain has entries to read behind entries to write", read_behind_write),
    ("an entry of a chain reaches beyond all addresses", beyond_all_addresses),
    ("an entry of a chain is not in the guest's memory", not_in_memory),
    ("an entry of a chain is not in the guest's memory", half_in_memory),
    ("an entry of a chain is not in the guest's memory", four_gigabytes),
    ("a chain has too many pieces", too_many_pieces),
    ("a request has no whole header", half_a_header),
    ("a request has no whole header", nothing_at_all),
    ("a request has no place for its status", no_status),
    ("a request has no place for its status", empty_status),
    ("a chain was made available again before it was answered", same_head_twice),
    ("more chains are available than the ring has entries", index_jumps),
    ("more chains are available than the ring has entries", index_goes_back),
    ("the guest's memory was taken away", taken_away),
]


@pytest.mark.parametrize(("why", "break_it"), FAULTS, ids=lambda value: getattr(value, "__name__", None))
def test_what_breaks_a_ring_is_told(why: str, break_it: Callable[[Running], None]) -> None:
    with ring_running() as running:
        running.driver.publish()
        break_it(running)
        parts = running.ring.parts
        running.driver.take()
        assert running.driver.torn is (break_it is taken_away)
        assert running.ring.why == why
        assert running.ring.parts - parts <= 1, "what is broken was begun"
        assert running.driver.take() == "all"  # and nothing more is taken
        if break_it is not taken_away:
            assert running.guest.used_index == 0


def test_each_fault_that_the_sources_name_is_reached_here() -> None:
    named = {
        text for path in SOURCES for text in re.findall(r'(?:break_off\(r|break_off\(self|self\.fault =),? ?b"([^"]+)"', path.read_text())
    }
    assert len(named) > 10 and named == {why for why, _ in FAULTS}


def test_without_indirect_agreed_upon_there_is_none() -> None:
    with ring_running(indirect=False) as running:
        running.request(FLUSH, indirect=True)
        running.driver.take()
        assert running.ring.why == "an indirect table stands where none may"


def test_entries_of_no_length_lie_anywhere() -> None:
    with ring_running() as running:
        status = running.memory.carve(1)
        offer(running, (head_at(running), 16, NEXT, 1), (OUTSIDE, 0, NEXT, 2), (OUTSIDE, 0, WRITABLE | NEXT, 3), (status, 1, WRITABLE, 0))
        running.driver.take()
        running.driver.publish()
        assert running.ring.why is None and running.guest.used_index == 1 and running.status(status) == 0


def test_all_entries_of_a_ring_make_one_chain() -> None:
    with ring_running(8) as running:
        at, status = head_at(running, OUT), running.memory.carve(1)
        data = running.memory.carve(7 * 1024, 16)
        out = [(at, 16)] + [(data + 1024 * place, 512) for place in range(6)]
        running.guest.make_available(running.guest.chain(out, [(status, 1)]))
        assert running.finish() and running.status(status) == 0


@settings(max_examples=150, deadline=None)
@given(image=st.binary(min_size=1, max_size=300), at=st.integers(0, 400), size=st.sampled_from((1, 2, 8)), jump=st.integers(0, 9))
def test_any_bytes_for_a_ring_are_answered_or_told(image: bytes, at: int, size: int, jump: int) -> None:
    """A ring that was whole, with anything written over entries and indexes."""
    memory = Memory()
    try:
        with ring_running(size, memory=memory) as running:
            if size > 1:
                running.request(FLUSH)
            if size > 2:
                running.request(IN, 3, into=512, indirect=True)
            memory.write(GUEST_ADDRESS + at, image)
            running.guest.jump(jump)
            for _ in range(3):
                running.driver.take()
                running.driver.end_all()
                running.driver.publish()
            assert not running.driver.torn and running.ring.busy == 0
    finally:
        memory.close()
