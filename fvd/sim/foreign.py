# SPDX-License-Identifier: Apache-2.0
"""Random requests against an NBD server, whoever wrote it: many in flight, overlapping, judged by the oracle.

The seed decides the requests, one after the other; what the server makes of them, and when, is its own. So a seed repeats the requests, not
the timing. Pointed at a URI it plays and compares.
Whoever restarts another server drives a `ForeignPlayer`. It may not know the engine, nor any server's insides.

What is expected of a server is what NBD says of the flags it shows, and one thing more: a trimmed sector holds what it held, or zeros.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import select
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fvd.errors import DeviceError, InvalidArgument, ReadOnly, Unsupported
from fvd.sim._base import base_content
from fvd.sim._oracle import SECTOR_BYTES, Oracle, Violation
from fvd.sim._rng import Rng

KIB, MIB = 1 << 10, 1 << 20
REACH_BYTES = 64 * MIB  # so much of an export is played with: the oracle knows every sector of it
CONNECTIONS = 4  # where the server says that they are one disk (CAN_MULTI_CONN)
ANSWER_SECONDS = 60  # a server that says nothing for so long has lost a request
_NUMBERS = 500_000  # writes before the oracle begins again
_WORDS = SECTOR_BYTES // 8
_PIECE_BYTES = MIB  # of a read of everything

Progress = Callable[[int, int], None]  # requests so far, of how many
Words = npt.NDArray[np.uint64]


class HungUp(Violation):
    """The server ended the connection. Whoever killed it expects this."""


@dataclass(slots=True)
class ForeignReport:
    """What was done to a server that did nothing wrong."""

    seed: int
    size_bytes: int = 0
    connections: int = 0
    requests: Counter[str] = field(default_factory=Counter)  # sent, by kind; "fua" are counted among the writes too
    most_in_flight: int = 0
    rounds: int = 0
    kills: int = 0
    unanswered: int = 0  # requests that a kill left without an answer
    compared_bytes: int = 0  # read and judged
    torn_sectors: int = 0  # which reads showed in part while a write of them was in flight; not judged

    @property
    def total_requests(self) -> int:
        return sum(count for kind, count in self.requests.items() if kind != "fua")

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.requests.items()))
        ends = f", {self.rounds} rounds, {self.kills} kills with {self.unanswered} unanswered" if self.rounds else ""
        return (
            f"seed {self.seed}: {self.total_requests} requests ({kinds}), up to {self.most_in_flight} in flight on "
            f"{self.connections} connections{ends}; {self.compared_bytes // MIB} MiB compared"
        )


# --- The requests ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Request:
    """One request of the stream. It is sent when at most `company` others are in flight."""

    kind: str  # read, write, trim, zero, flush
    first_sector: int
    sectors: int
    fua: bool
    no_hole: bool
    company: int
    lane: int  # which connection, of those there are


_KINDS = {"read": 10, "write": 16, "zero": 4, "trim": 3, "flush": 2}
_CLUSTER = 128  # sectors: 64 KiB, what qcow2, qed and fvd allocate unless told otherwise


def stream(seed: int, sectors: int, depth: int, unit: int = 1) -> Iterator[Request]:
    """The endless requests of a seed, on a disk of so many sectors, in multiples of `unit` sectors. Deaf to the server."""
    rng = Rng(seed)
    kinds = [kind for kind, weight in _KINDS.items() for _ in range(weight)]
    slots = sectors // unit
    # Requests meet in a few places, each over the border of two clusters; the others go anywhere, where nothing was written yet.
    spots = [rng.randint(1, max(1, sectors // _CLUSTER - 1)) * _CLUSTER for _ in range(4)]
    company = depth - 1
    while True:
        if rng.random() < 0.02:
            company = int(depth ** rng.random()) - 1 if rng.random() < 0.5 else depth - 1
        kind = rng.choice(kinds)
        length = rng.choice((1, 2, 8, 8, 8, 16, 16, 32, _CLUSTER, rng.randint(1, 2 * _CLUSTER)))
        if rng.random() < 0.01:
            length = 2048
        first = rng.randint(0, sectors - 1)
        if rng.random() < 0.7:
            first = rng.choice(spots) + rng.randint(-64, 64)
        if rng.random() < 0.3 and kind in ("zero", "trim", "write"):
            first, length = first // _CLUSTER * _CLUSTER, _CLUSTER * rng.randint(1, 3)
        count = min(max(1, length // unit), slots)
        start = min(max(0, first // unit), slots - count)
        fua = kind in ("write", "zero", "trim") and rng.random() < 0.1
        no_hole = kind == "zero" and rng.random() < 0.5
        yield Request(kind, start * unit, count * unit, fua, no_hole, company, rng.randint(0, 1 << 16))


def _not_uniform(data: bytes | bytearray) -> npt.NDArray[np.bool_]:
    words: Words = np.frombuffer(data, "<u8").reshape(-1, _WORDS)
    uniform: npt.NDArray[np.bool_] = (words == words[:, :1]).all(axis=1)
    return ~uniform


# --- The judge ---------------------------------------------------------------------------------------------------------------


class _Judge:
    """The oracle, and a dictionary between its values and the bytes on the wire.

    What was on the disk at first is the oracle's base, whatever it was. Stamps go out under a key that is made of it, so nothing that an
    earlier run left looks like a stamp of this one.
    """

    def __init__(self, seed: int, content: bytes) -> None:
        digest = hashlib.blake2b(content + seed.to_bytes(16, "little", signed=True), digest_size=8).digest()
        self._key = np.uint64(int.from_bytes(digest, "little") | 1 << 63)  # stamps are below: none is zero on the wire
        self._factors: Words = np.random.Generator(np.random.PCG64(1)).integers(1, 1 << 63, _WORDS, np.uint64)
        self._first = self._identities(content)
        self._base: Words = np.frombuffer(base_content(len(content), 0, len(content)), "<u8")[::_WORDS]
        self._oracle = Oracle(len(content), len(content))
        # Zeros are one value, whether they were there at first or are written.
        edges = np.flatnonzero(np.diff(self._first == 0, prepend=False, append=False)).tolist()
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            self._oracle.end_write(self._oracle.begin_write(start, end - start, zero=True), True, True)
        self._oracle.settle_after_crash(self._values(0, content))

    @property
    def writes(self) -> int:
        return self._oracle.numbers

    def _identities(self, data: bytes | bytearray) -> Words:
        """A number for each sector: its first word where all are the same, otherwise a sum."""
        words: Words = np.frombuffer(data, "<u8").reshape(-1, _WORDS)
        identities = words[:, 0].copy()
        odd = _not_uniform(data)
        if odd.any():
            identities[odd] = (words[odd] * self._factors).sum(axis=1, dtype=np.uint64)
        return identities

    def _values(self, first_sector: int, data: bytes | bytearray) -> bytes:
        """As the oracle knows it."""
        identities = self._identities(data)
        part = slice(first_sector, first_sector + len(identities))
        values = np.where(identities == 0, identities, np.where(identities == self._first[part], self._base[part], identities ^ self._key))
        return np.repeat(values, _WORDS).tobytes()

    def begin(self, request: Request) -> tuple[int, bytes]:
        """What the end of it needs, and the data of a write."""
        first, sectors = request.first_sector, request.sectors
        if request.kind == "read":
            return self._oracle.begin_read(), b""
        if request.kind == "flush":
            return self._oracle.begin_flush(), b""
        number = self._oracle.begin_write(first, sectors, zero=request.kind != "write", advisory=request.kind == "trim")
        if request.kind != "write":
            return number, b""
        return number, (np.frombuffer(self._oracle.stamp(number, first, sectors), "<u8") ^ self._key).tobytes()

    def end_write(self, begun: int, durable: bool) -> None:
        self._oracle.end_write(begun, True, durable)

    def end_flush(self, begun: int) -> None:
        self._oracle.end_flush(begun, True)

    def end_read(self, first_sector: int, begun: int, data: bytes | bytearray) -> None:
        self._oracle.check_read(first_sector, begun, self._values(first_sector, data))

    def drop_read(self, begun: int) -> None:
        self._oracle.drop_read(begun)

    def compare(self, data: bytes | bytearray) -> None:
        self._oracle.check_read(0, self._oracle.begin_read(), self._values(0, data))

    def after_crash(self, data: bytes | bytearray) -> None:
        self._oracle.settle_after_crash(self._values(0, data))


# --- The player --------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _InFlight:
    request: Request
    begun: Any
    buffer: Any  # libnbd reads from it or writes to it until the end
    judged: bool = True  # False: a crash came between, this answer promises nothing but itself


class ForeignPlayer:
    """Plays a seed's requests on one export, whose server may be restarted meanwhile. One thread.

    `every_write_durable`: the server promises that what it acknowledged survives (a write-through cache). `flush_counts`: False for one
    that says that it ignores flushes, and FUA with them. `gentle`: zeroes and trims are left out.
    """

    def __init__(
        self,
        seed: int,
        *,
        depth: int = 64,
        reach_bytes: int = REACH_BYTES,
        every_write_durable: bool = False,
        flush_counts: bool = True,
        gentle: bool = False,
    ) -> None:
        if depth < 1:
            raise InvalidArgument(f"{depth} requests in flight: name at least 1")
        self.report = ForeignReport(seed)
        self.in_flight: dict[int, _InFlight] = {}
        self._seed = seed
        self._depth = depth
        self._reach_bytes = reach_bytes
        self._every_write_durable = every_write_durable
        self._flush_counts = flush_counts
        self._gentle = gentle
        self._nbd = _libnbd()
        self._uri = ""
        self._handles: list[Any] = []
        self._tokens = 0
        self._ended: list[tuple[int, int]] = []  # tokens and errors, from libnbd's callbacks
        self._judge: _Judge | None = None
        self._shutdown = False  # we asked the server to end
        self._refused: list[Request] = []  # by a server that ends
        self._outage = False  # from a kill behind a client that reconnects, until everything has been judged
        self._image = bytearray()

    def __enter__(self) -> ForeignPlayer:
        return self

    def __exit__(self, *_: object) -> None:
        self.hang_up()

    # --- Connections ---

    def connect(self, uri: str) -> None:
        """The first time it also reads what is there; later, after a restart, the same disk must answer."""
        first = self._open(uri)
        several = first.can_multi_conn() and self._depth > 1
        self._uri = uri
        self._handles = [first, *(self._open(uri) for _ in range(CONNECTIONS - 1 if several else 0))]
        if self._judge is None:
            self._begin(uri)
        elif first.get_size() != self.report.size_bytes:
            raise Violation(f"{uri}: had {self.report.size_bytes} bytes and has {first.get_size()} after the restart")

    def _open(self, uri: str) -> Any:
        handle = self._nbd.NBD()
        try:
            handle.connect_uri(uri)
        except self._nbd.Error as error:
            raise DeviceError(f"{uri}: cannot connect: {error}; is a server listening there, and is this its export?") from None
        return handle

    def _begin(self, uri: str) -> None:
        handle = self._handles[0]
        if handle.is_read_only():
            raise ReadOnly(f"{uri} is read-only; a server is tested by writing to it")
        self._can = {kind: getattr(handle, f"can_{kind}")() for kind in ("flush", "fua", "trim", "zero")}
        unit = max(SECTOR_BYTES, handle.get_block_size(self._nbd.SIZE_MINIMUM))
        self.report.size_bytes = handle.get_size()
        self.report.connections = len(self._handles)
        size = min(self.report.size_bytes, self._reach_bytes) // unit * unit
        if size == 0:
            raise InvalidArgument(f"{uri} has {self.report.size_bytes} bytes: less than one block of {unit}")
        self._image = bytearray(size)
        self._last_end = np.zeros(size // SECTOR_BYTES, np.int64)
        self._stream = stream(self._seed, size // SECTOR_BYTES, self._depth, unit // SECTOR_BYTES)
        self._read_everything()
        self._judge = _Judge(self._seed, bytes(self._image))

    def hang_up(self) -> None:
        """Drops the connections, and what was not answered on them."""
        self._handles.clear()  # libnbd closes them
        self.in_flight.clear()
        self._ended.clear()
        self._refused.clear()
        self._shutdown = False

    # --- Play ---

    def play(self, requests: int, progress: Progress | None = None) -> None:
        """Sends so many more; the last ones are still in flight afterwards."""
        for number in range(requests):
            request = next(self._stream)
            assert self._judge is not None
            if self._judge.writes > _NUMBERS:
                self._begin_again()
            while len(self.in_flight) > request.company:
                self.turn(ANSWER_SECONDS)
            self.send(request)
            if progress is not None:
                progress(number + 1, requests)

    def _begin_again(self) -> None:
        """The oracle has not numbers for ever: everything is settled, and another one begins with what is there."""
        self.drain()
        self.send(Request("flush", 0, 0, False, False, 0, 0))
        self.drain()
        self.verify()
        self._judge = _Judge(self._seed, bytes(self._image))

    @property
    def free_depth(self) -> int:
        """So many more can be sent before an answer must come."""
        return max(0, self._depth - len(self.in_flight))

    def drain(self) -> None:
        """Until everything has been answered."""
        while self.in_flight:
            self.turn(ANSWER_SECONDS)

    def wait(self, seconds: float) -> None:
        """Goes on taking answers for so long: a kill then comes at any moment, not only after something was sent."""
        until = time.monotonic() + seconds
        while self.in_flight and self._handles and (left := until - time.monotonic()) > 0:
            with contextlib.suppress(HungUp) if self._shutdown else contextlib.nullcontext():
                self.turn(left)

    def send_next(self) -> None:
        """Sends the next one of the stream without any wait, whatever is in flight."""
        self.send(next(self._stream))

    def send(self, request: Request) -> None:
        """Sends one request, and is back before it is answered. What the server does not offer is left out."""
        if request.kind in ("flush", "trim", "zero") and not self._can[request.kind]:
            return
        if self._gentle and request.kind in ("trim", "zero"):
            return
        fua = request.fua and self._can["fua"]
        self.report.requests.update((request.kind, "fua") if fua and request.kind == "write" else (request.kind,))
        assert self._judge is not None
        begun, data = self._judge.begin(request)
        self._send(request, begun, data, fua)

    def _send(self, request: Request, begun: Any, data: bytes, fua: bool) -> None:
        offset, length = request.first_sector * SECTOR_BYTES, request.sectors * SECTOR_BYTES
        handle = self._handles[request.lane % len(self._handles)]
        flags = (self._nbd.CMD_FLAG_FUA if fua else 0) | (self._nbd.CMD_FLAG_NO_HOLE if request.no_hole else 0)
        self._tokens += 1
        token = self._tokens
        buffer: Any = None

        def ended(error: Any) -> int:  # an exception in here would be printed and forgotten
            self._ended.append((token, error.value))
            return 1

        if request.kind == "read":
            buffer = self._nbd.Buffer(length)
        elif request.kind == "write":
            buffer = self._nbd.Buffer.from_bytearray(data)
        self.in_flight[token] = _InFlight(request, begun, buffer, not self._outage)
        self.report.most_in_flight = max(self.report.most_in_flight, len(self.in_flight))
        if request.kind == "read":
            lost = self._call(handle, handle.aio_pread, buffer, offset, ended)
        elif request.kind == "write":
            lost = self._call(handle, handle.aio_pwrite, buffer, offset, ended, flags)
        elif request.kind == "trim":
            lost = self._call(handle, handle.aio_trim, length, offset, ended, flags)
        elif request.kind == "zero":
            lost = self._call(handle, handle.aio_zero, length, offset, ended, flags)
        else:
            lost = self._call(handle, handle.aio_flush, ended)
        if lost:
            raise self._hung_up(lost)

    def turn(self, wait_seconds: float) -> None:
        """Takes the answers that are there, having waited for the first. Raises HungUp, and Violation after ANSWER_SECONDS of silence."""
        poll = select.poll()
        handles = {handle.aio_get_fd(): handle for handle in self._handles}
        for descriptor, handle in handles.items():
            direction = handle.aio_get_direction()
            incoming = select.POLLIN if direction & self._nbd.AIO_DIRECTION_READ else 0
            poll.register(descriptor, incoming | (select.POLLOUT if direction & self._nbd.AIO_DIRECTION_WRITE else 0))
        ready = poll.poll(wait_seconds * 1000)
        if not ready and wait_seconds >= ANSWER_SECONDS:
            kinds = Counter(each.request.kind for each in self.in_flight.values())
            raise self._violation(f"no answer for {ANSWER_SECONDS} s; in flight: {dict(kinds)}")
        lost = ""
        for descriptor, events in ready:
            handle = handles[descriptor]
            notify = handle.aio_notify_write if events == select.POLLOUT else handle.aio_notify_read
            lost = self._call(handle, notify) or lost
        ended, self._ended = self._ended, []
        for token, code in ended:
            self._finished(token, code)
        if lost:
            raise self._hung_up(lost)

    def _call(self, handle: Any, function: Callable[..., Any], *arguments: Any) -> str:
        """Has libnbd do something. Returns why the connection has ended, if it has; it is forgotten then."""
        before = len(self._ended)
        reason = "it closed the connection"
        try:
            function(*arguments)
        except self._nbd.Error as error:
            if not (handle.aio_is_dead() or handle.aio_is_closed()):
                raise
            reason = str(error)
        if not (handle.aio_is_dead() or handle.aio_is_closed()):
            return ""
        # What was in flight is ended by libnbd, with an error of its own: that is no answer.
        self._ended[before:] = [(token, code) for token, code in self._ended[before:] if code == 0]
        self._handles.remove(handle)
        return reason

    def _hung_up(self, reason: str) -> HungUp:
        return HungUp(f"{self._where()}: the server hung up with {len(self.in_flight)} requests in flight: {reason}")

    def _finished(self, token: int, error: int) -> None:
        flight = self.in_flight.pop(token)
        request = flight.request
        if error == errno.ESHUTDOWN and self._shutdown:
            self._refused.append(request)
            return
        if error:
            name = errno.errorcode.get(error, str(error))
            raise self._violation(f"{request.kind} of {request.sectors} sectors at {request.first_sector} failed with {name}")
        data = flight.buffer.to_buffer() if request.kind == "read" else b""
        if flight.begun is None:  # a read of everything
            offset = request.first_sector * SECTOR_BYTES
            self._image[offset : offset + len(data)] = data
            return
        assert self._judge is not None
        try:
            if request.kind == "read":
                if flight.judged:
                    self._end_read(token, flight, data)
                else:
                    self._judge.drop_read(flight.begun)
            elif request.kind == "flush":
                if flight.judged and self._flush_counts:
                    self._judge.end_flush(flight.begun)
            else:
                fua = request.fua and self._can["fua"] and self._flush_counts
                self._judge.end_write(flight.begun, fua or self._every_write_durable)
                self._last_end[request.first_sector : request.first_sector + request.sectors] = self._tokens
        except Violation as violation:
            raise self._violation(str(violation)) from None

    def _end_read(self, token: int, flight: _InFlight, data: bytes | bytearray) -> None:
        """Through a page cache a read may show part of a sector that is being written: such a sector is not judged."""
        assert self._judge is not None
        first = flight.request.first_sector
        torn = [sector for sector in np.flatnonzero(_not_uniform(data)).tolist() if self._was_being_written(first + sector, token)]
        self.report.torn_sectors += len(torn)
        start = 0
        for end in (*torn, flight.request.sectors):
            if start < end:
                self._judge.end_read(first + start, flight.begun, data[start * SECTOR_BYTES : end * SECTOR_BYTES])
            start = end + 1
        self.report.compared_bytes += len(data)

    def _was_being_written(self, sector: int, since: int) -> bool:
        """At any time since that token was sent."""
        requests = (flight.request for flight in self.in_flight.values() if flight.request.kind not in ("read", "flush"))
        return bool(self._last_end[sector] >= since) or any(
            request.first_sector <= sector < request.first_sector + request.sectors for request in requests
        )

    # --- Everything at once ---

    def _read_everything(self) -> None:
        """Into `_image`; nothing else may be in flight."""
        sectors, piece = len(self._image) // SECTOR_BYTES, _PIECE_BYTES // SECTOR_BYTES
        for lane, first in enumerate(range(0, sectors, piece)):
            while len(self.in_flight) >= 8:
                self.turn(ANSWER_SECONDS)
            self._send(Request("read", first, min(piece, sectors - first), False, False, 0, lane), None, b"", False)
        self.drain()
        self.report.compared_bytes += len(self._image)

    def verify(self) -> None:
        """Reads the whole disk and judges it; nothing may be in flight."""
        self._read_everything()
        self.compare(bytes(self._image))

    def compare(self, data: bytes) -> None:
        """Judges what another reader has read of the disk."""
        assert self._judge is not None
        try:
            self._judge.compare(data[: len(self._image)])
        except Violation as violation:
            raise self._violation(str(violation)) from None

    # --- Restarts ---

    def shutting_down(self) -> None:
        """The server has been asked to end: from now on it may refuse requests with ESHUTDOWN, and hang up."""
        self._shutdown = True

    def take_last_answers(self) -> list[Request]:
        """After the server was killed: what it still said, and then the requests that it left unanswered."""
        while self._handles:
            with contextlib.suppress(HungUp):  # one of them
                self.turn(ANSWER_SECONDS)
        unanswered = [*self._refused, *(flight.request for flight in self.in_flight.values())]
        self.report.kills += 1
        self.report.unanswered += len(unanswered)
        self.hang_up()
        return unanswered

    def judge_after_crash(self) -> None:
        """Reads the whole disk on the server that was started again: each sector as durable, or something later."""
        assert self._judge is not None
        self._read_everything()
        try:
            self._judge.after_crash(self._image)
        except Violation as violation:
            raise self._violation(str(violation)) from None
        self._outage = False

    def outage(self) -> None:
        """Call it before the kill of a server behind QEMU, say: something that reconnects by itself, asks again, and stays connected to us.

        What was acknowledged before and not flushed may be lost, which neither we nor a flush that the next server answers can know: until
        `judge_after_crash`, no flush counts and no read is judged. FUA counts.
        """
        self._outage = True
        for flight in self.in_flight.values():
            flight.judged = False
        self.report.kills += 1

    def _where(self) -> str:
        return f"{self._uri}, seed {self._seed}, after {self.report.total_requests} requests and {self.report.kills} kills"

    def _violation(self, what: str) -> Violation:
        return Violation(f"{self._where()}: {what}")


def _libnbd() -> Any:
    try:
        return importlib.import_module("nbd")  # not a dependency of fvd: only this module needs it
    except ImportError:
        raise Unsupported("NBD servers are tested through libnbd's Python module, which is missing; install python3-libnbd") from None


def torture_uri(uri: str, *, seed: int, requests: int, depth: int, progress: Progress | None = None) -> ForeignReport:
    """Plays on the export at `uri`, whose content is lost (its first REACH_BYTES), and compares everything at the end.

    Raises Violation, with the seed, when the server showed what it must not, failed a request, hung up or fell silent.
    """
    with ForeignPlayer(seed, depth=depth) as player:
        player.connect(uri)
        player.play(requests, progress)
        player.drain()
        player.verify()
        return player.report
