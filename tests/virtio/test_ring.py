# SPDX-License-Identifier: Apache-2.0
"""A ring against a model of a guest's driver: what is read is what was written, and everything is answered once, with the length, status
and calls that virtio 1.2 asks for. Chains have any shape, parts end in any order, and indexes go round at 2**16."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from random import Random

import pytest
from guest_model import DISCARD, FLUSH, GET_ID, IN, IOERR, OK, OUT, SECTOR_BYTES, UNSUPP, WRITE_ZEROES, Buffer, header, ranges
from hypothesis import given, settings
from hypothesis import strategies as st
from ring_running import SECTORS, SERIAL, Running, ring_running

KINDS = (IN, OUT, OUT, IN, FLUSH, DISCARD, WRITE_ZEROES, GET_ID, 99)


@dataclass
class Sent:
    """What the guest has asked, and must get."""

    kind: int
    sector: int
    sectors: int
    data: bytes
    into: list[Buffer]  # the status is the last byte
    failed: bool = False
    unanswered: bool = True


class Play:
    """One guest's life, decided by a seed."""

    def __init__(self, running: Running, seed: int, event_index: bool, indirect: bool) -> None:
        self.running, self.rng = running, Random(seed)
        self.event_index, self.indirect = event_index, indirect
        self.expected = bytearray(len(running.disk))
        self.sent: dict[int, Sent] = {}
        self.answers = 0
        self.under_way: set[int] = set()  # sectors: what a guest sends together may end in either order
        self.carved = running.memory.carved
        self.wanted_after = 0
        self.calls_wanted = True
        self.first_call = True

    # --- What the guest does ----------------------------------------------------------------------------------

    def cut(self, length: int, most: int) -> list[Buffer]:
        """A buffer of that length in pieces at any places, some of them empty."""
        count = self.rng.randint(1, max(1, most))
        marks = sorted(self.rng.randint(0, length) for _ in range(count - 1))
        pieces = [second - first for first, second in zip([0, *marks], [*marks, length], strict=True)]
        return [(self.running.memory.carve(piece, self.rng.choice((1, 1, 2, 512))), piece) for piece in pieces]

    def ask(self) -> None:
        guest, rng = self.running.guest, self.rng
        indirect = self.indirect and rng.random() < 0.5
        entries = len(guest.free)
        if entries < (1 if indirect else 2) or self.running.memory.size_bytes - self.running.memory.carved < 200_000:
            return
        kind = rng.choice(KINDS)
        sector, sectors = rng.randrange(SECTORS), rng.randint(0, 12)
        sectors = min(sectors, SECTORS - sector)
        touched = set(range(sector, sector + sectors))
        if touched & self.under_way:
            return
        data = b""
        if kind == OUT:
            data = rng.randbytes(sectors * SECTOR_BYTES)
        elif kind in (DISCARD, WRITE_ZEROES):
            half = sectors // 2
            data = ranges((sector, half, 0), (sector + half, sectors - half, 0))
        capacity = 40 if indirect else entries
        into_most = rng.randint(1, capacity - 1)
        into_length = {IN: sectors * SECTOR_BYTES, GET_ID: 20}.get(kind, 0) + 1
        out = self.cut(16 + len(data), min(capacity - into_most, 6))
        into = self.cut(into_length, min(into_most, 6))
        content = header(kind, sector) + data
        for address, length in out:
            self.running.memory.write(address, content[:length])
            content = content[length:]
        for address, length in into:
            self.running.memory.write(address, b"\xee" * length)
        head = guest.chain(out, into, indirect=indirect)
        self.sent[head] = Sent(kind, sector, sectors, data, into)
        if kind in (IN, OUT, DISCARD, WRITE_ZEROES):
            self.under_way |= touched
        guest.make_available(head)

    def want(self) -> None:
        if self.event_index:
            self.wanted_after = (self.running.guest.taken + self.rng.randint(-2, 6)) % 2**16
            self.running.guest.want_call_after(self.wanted_after)
        else:
            self.calls_wanted = self.rng.random() < 0.5
            self.running.guest.want_calls(self.calls_wanted)

    # --- What the device does ---------------------------------------------------------------------------------

    def take(self) -> None:
        left = self.running.driver.take(self.rng.choice((1, 2, 64)), self.rng.choice((1, 8192, 1 << 20)))
        assert left in ("all", "some") and self.running.ring.why is None
        if left == "all":
            assert self.running.ring.next_available == self.running.guest.available_index
            assert not self.running.driver.ask_for_kick()
            if self.event_index:
                assert self.running.guest.kick_wanted_at == self.running.guest.available_index

    def end(self) -> None:
        waiting = self.running.driver.waiting
        if waiting:
            place = self.rng.randrange(len(waiting))
            kind, _, _, offset, length = waiting[place]
            fails = self.rng.random() < 0.1
            if fails:
                for sent in self.sent.values():
                    at = offset // SECTOR_BYTES
                    if kind == "flush" and sent.kind == FLUSH:
                        sent.failed = True  # which of several is not known
                    elif kind != "flush" and length and sent.sector <= at < sent.sector + sent.sectors and sent.kind in (
                        IN, OUT, DISCARD, WRITE_ZEROES
                    ):  # fmt: skip
                        sent.failed = True
            self.running.driver.end(place, -errno.EIO if fails else 0)

    def publish(self) -> None:
        guest, ring = self.running.guest, self.running.ring
        before, after = guest.used_index, ring.next_used
        called = self.running.driver.publish()
        assert guest.used_index == after
        if self.first_call:
            wanted, self.first_call = True, False
        elif before == after:
            wanted = False
        elif self.event_index:  # virtio 1.2, 2.7.7.1: the entry at that index is among those used since
            wanted = self.wanted_after in {index % 2**16 for index in range(before, before + (after - before) % 2**16)}
        else:
            wanted = self.calls_wanted
        assert called == wanted
        for head, written in guest.take_used():
            self.judge(self.sent.pop(head), written)
        if not self.sent:
            self.running.memory.carve_again_from(self.carved)

    def judge(self, sent: Sent, written: int) -> None:
        memory = self.running.memory
        content = b"".join(memory.read(address, length) for address, length in sent.into)
        begin, end = sent.sector * SECTOR_BYTES, (sent.sector + sent.sectors) * SECTOR_BYTES
        status = content[-1]
        self.answers += 1
        if sent.kind in (IN, OUT, DISCARD, WRITE_ZEROES):
            self.under_way -= set(range(sent.sector, sent.sector + sent.sectors))
        if sent.kind == 99:
            assert (status, written) == (UNSUPP, 1)
        elif sent.kind == GET_ID:
            assert (status, content[:-1], written) == (OK, SERIAL.ljust(20, b"\0"), 21)
        elif sent.failed and sent.kind != FLUSH:
            assert status == IOERR
            self.expected[begin:end] = self.running.disk[begin:end]  # some of its parts were done
        else:
            assert status == OK or sent.failed
            assert written == len(content) if sent.kind == IN else written == 1
            if sent.kind == IN:
                assert content[:-1] == self.expected[begin:end]
            elif sent.kind == OUT:
                self.expected[begin:end] = sent.data
            elif sent.kind in (DISCARD, WRITE_ZEROES):
                self.expected[begin:end] = bytes(end - begin)

    # --- A life -------------------------------------------------------------------------------------------------

    def run(self, steps: int) -> None:
        acts = (self.ask, self.ask, self.ask, self.take, self.take, self.end, self.end, self.end, self.publish, self.want)
        for _ in range(steps):
            self.rng.choice(acts)()
        while self.sent:
            self.running.driver.take()
            self.end()
            self.publish()
        assert self.running.disk == self.expected
        assert self.running.ring.busy == 0


@settings(max_examples=400, deadline=None)
@given(
    size=st.sampled_from((2, 4, 8, 16, 64)),
    index=st.one_of(st.just(0), st.integers(2**16 - 40, 2**16 - 1)),
    event_index=st.booleans(),
    indirect=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_everything_is_answered_as_it_must_be(size: int, index: int, event_index: bool, indirect: bool, seed: int) -> None:
    with ring_running(size, index=index, event_index=event_index, indirect=indirect) as running:
        play = Play(running, seed, event_index, indirect)
        play.run(150)
        assert play.answers


def test_a_ring_goes_round_all_its_indexes() -> None:
    """2**16 and more requests on a ring of two entries, with calls by EVENT_IDX."""
    with ring_running(2, event_index=True) as running:
        for number in range(2**16 + 5):
            carved = running.memory.carved
            running.guest.want_call_after(number)
            _, _, status = running.request(FLUSH)
            running.driver.take()
            running.driver.end()
            assert running.driver.publish()
            assert len(running.guest.take_used()) == 1 and running.status(status) == OK
            running.memory.carve_again_from(carved)
        assert running.ring.next_available == running.guest.available_index == 5


def test_a_ring_that_begins_calls_even_if_nothing_ends_any_more() -> None:
    """The server before may have died between the used index and the call: its guest waits for a call, and will not kick."""
    with ring_running() as running:
        assert running.driver.publish()
        assert not running.driver.publish()


@pytest.mark.parametrize("read_only", [False, True])
def test_requests_that_the_disk_cannot_do_fail_alone(read_only: bool) -> None:
    with ring_running(64, read_only=read_only) as running:
        cases = [
            (running.request(IN, SECTORS, into=512), IOERR),
            (running.request(IN, SECTORS - 1, into=1024), IOERR),
            (running.request(IN, 2**64 - 1, into=512), IOERR),
            (running.request(IN, 2**55, into=512), IOERR),  # its offset in bytes would be that of sector 0
            (running.request(IN, 0, into=511), IOERR),
            (running.request(IN, SECTORS, into=0), OK),
            (running.request(OUT, 1, bytes(512)), IOERR if read_only else OK),
            (running.request(DISCARD, 0, ranges((0, SECTORS + 1, 0))), IOERR),
            (running.request(DISCARD, 0, ranges((0, 8, 0))[:-1]), IOERR),
            (running.request(DISCARD, 0, b""), IOERR),
            (running.request(DISCARD, 0, ranges((0, 1, 1))), IOERR if read_only else UNSUPP),
            (running.request(WRITE_ZEROES, 0, ranges((0, 1, 2))), IOERR if read_only else UNSUPP),
            (running.request(WRITE_ZEROES, 0, ranges((SECTORS, 2**32 - 1, 0))), IOERR),
            (running.request(WRITE_ZEROES, 0, ranges(*[(0, 1, 1)] * 65)), IOERR),
            (running.request(7), UNSUPP),
            (running.request(IN, 0, into=512), OK),
        ]
        assert len(running.finish()) == len(cases)
        assert [running.status(status) for (_, _, status), _ in cases] == [wanted for _, wanted in cases]


def test_all_ranges_are_judged_before_the_first_is_begun() -> None:
    with ring_running() as running:
        running.disk[:512] = b"x" * 512
        _, _, status = running.request(WRITE_ZEROES, 0, ranges((0, 1, 0), (SECTORS, 1, 0)))
        running.finish()
        assert running.status(status) == IOERR and running.disk[:512] == b"x" * 512


def test_no_hole_is_made_of_zeros_that_may_not_be_unmapped() -> None:
    with ring_running() as running:
        running.request(WRITE_ZEROES, 0, ranges((0, 1, 0), (1, 1, 1)))
        running.driver.take()
        assert [part[:3] for part in running.driver.waiting] == [("zero", False, True), ("zero", False, False)]


@pytest.mark.parametrize("durable", [False, True])
def test_without_flush_every_part_is_durable(durable: bool) -> None:
    """A driver that has not agreed upon FLUSH takes the cache to write through (5.2.6.2)."""
    with ring_running(32, durable=durable) as running:
        memory = running.memory
        at, status = memory.carve(16 + 4096, 16), memory.carve(1)
        memory.write(at, header(OUT))
        running.guest.make_available(
            running.guest.chain([(at, 16), (at + 16, 512), (at + 1024, 1024), (at + 4000, 64), (at, 448)], [(status, 1)])
        )
        split = memory.carve(16 + 1024, 16)
        memory.write(split, header(OUT, 9))
        running.guest.make_available(running.guest.chain([(split, 16), (split + 16, 512), (split + 16, 512)], [(status, 1)]))
        running.request(WRITE_ZEROES, 0, ranges((0, 1, 0), (1, 1, 1)))
        running.request(DISCARD, 0, ranges((0, 1, 0)))
        running.request(IN, 0, into=512)
        running.driver.take()
        parts = running.driver.waiting
        assert [part[0] for part in parts] == ["write", "write", "write", "zero", "zero", "trim", "read"]
        assert [part[1] for part in parts] == [durable] * 6 + [False]


def test_a_status_waits_for_the_last_part_and_tells_the_first_error() -> None:
    with ring_running(16) as running:
        memory = running.memory
        at, status = memory.carve(4096, 16), memory.carve(1)
        memory.write(at, header(IN))
        memory.write(status, b"\xff")
        running.guest.make_available(running.guest.chain([(at, 16)], [(at + 512, 512), (at + 2048, 512), (at + 3072, 512), (status, 1)]))
        running.driver.take()
        for error in (0, -errno.ENOSPC):
            running.driver.end(1, error)
            running.driver.publish()
            assert not running.guest.take_used() and running.status(status) == 0xFF
        running.driver.end()
        running.driver.publish()
        assert len(running.guest.take_used()) == 1 and running.status(status) == IOERR


def test_a_ring_with_very_many_parts_under_way_takes_no_more() -> None:
    """A guest's chains of small pieces would else cost memory without end."""
    pieces, heads = 254, 128
    with ring_running(heads) as running:
        memory, guest = running.memory, running.guest
        at, status, table = memory.carve(16, 16), memory.carve(1), memory.carve(16 * (pieces + 2), 16)
        data = memory.carve(1024 * pieces, 512)
        memory.write(at, header(IN))
        guest.put_entry(table, 0, at, 16, 1, 1)
        for place in range(pieces):  # every other sector of its memory, so that none joins the one before
            guest.put_entry(table, place + 1, data + 1024 * place, 512, 3, place + 2)
        guest.put_entry(table, pieces + 1, status, 1, 2)
        for head in range(heads):
            guest.put_entry(guest.descriptors, head, table, 16 * (pieces + 2), 4)
            guest.make_available(head)
        assert running.driver.take(heads, 1 << 30) == "no memory"
        taken = len(running.driver.waiting)
        assert 16384 <= taken < 16384 + pieces
        running.driver.end_all()
        assert running.driver.take(heads, 1 << 30) == "all"
        assert running.ring.parts == pieces * heads
