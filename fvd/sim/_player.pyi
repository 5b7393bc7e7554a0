# SPDX-License-Identifier: Apache-2.0
"""Requests in flight on one open disk: hands them to the engine, moves the device event by event, asks the oracle what came of it."""

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, Final

from fvd.format.geometry import Geometry
from fvd.sim._device import Operation, SimulatedDevice
from fvd.sim._oracle import Oracle
from fvd.sim._ring_guest import RingGuest
from fvd.sim._rng import Rng

KINDS: Final[tuple[str, ...]]
"""read, write, flush, trim, zero, close; for random play also fua and rewrite."""
READ: Final[int]
WRITE: Final[int]
FLUSH: Final[int]
TRIM: Final[int]
ZERO: Final[int]
CLOSE: Final[int]
"""Kinds of requests as Engine.submit_request has them."""
NEVER: Final[int]

class Player:
    def __init__(
        self,
        engine: Any,
        device: SimulatedDevice,
        oracle: Oracle,
        rng: Rng,
        *,
        geometry: Geometry,
        base_bytes: int | None,
        cache_mode: str,
    ) -> None: ...

    engine: Any
    device: SimulatedDevice
    oracle: Oracle
    rng: Rng
    requests_done: int
    failed_at: int
    """From this moment of the oracle's on no flush may succeed."""
    errors_expected: bool
    """Requests may fail with EIO, or with what the device fails with."""
    exhausted: bool
    """Writes may fail with ENOSPC."""
    fails_when_full: bool
    """The disk is open with on_full=error."""
    stopped: bool
    """The engine has been stopped: nothing may reach the device, and every request fails (R39)."""
    cancelled: bool
    """Requests may fail with ESHUTDOWN."""
    def use_ring(self, ring: RingGuest) -> None:
        """Most requests go through it from now on."""
    def show_answers(self) -> None:
        """The guest of the ring is shown what has ended, as at the end of each turn of the serving loop."""
    def in_ring(self) -> dict[int, tuple[int, int, int, bool, int]]:
        """Requests without an answer that stand in the ring: (kind, first sector, sectors, no hole, the oracle's number), by place."""
    def take_up_ring(self, ring: RingGuest, requests: Mapping[int, tuple[int, int, int, bool, int]]) -> None:
        """A ring whose server has died, and what was in it: whoever serves it now does that without being asked again."""
    log: list[str] | None
    """Is told every event."""
    mapped: Callable[[int, int], None] | None
    """Is told (first sector, sectors) of writes acknowledged as durable, if no trim or write-zeroes was in flight beside them."""
    attend: Callable[[], None] | None
    """Called, as a driver calls its Python side, while the engine wants something of `attended`, and from `due_ns` of the device's clock
    on: one thing at each call."""
    attended: int
    due_ns: int
    discards_max: int
    discard_bytes: int
    """So many discards may be in the device at once, each of so many bytes or one chunk; 0: any number."""
    in_flight_count: int
    depth: int
    @property
    def in_flight(self) -> dict[int, str]:
        """{cookie: kind} of the requests that have not ended."""

    def submit(
        self, kind: str, first_sector: int = 0, sectors: int = 0, *, fua: bool = False, no_hole: bool = False, skew_bytes: int = 0
    ) -> int:
        """Hand one request to the engine. Returns its cookie: in `in_flight` until it ends. `skew_bytes`: how crooked its buffer."""

    def unanswered(self) -> list[tuple[int, int, int, bool, bool, int]]:
        """What has no answer yet: (kind, first sector, sectors, fua, no_hole, the oracle's number of the write or 0)."""

    def send_again(self, requests: Sequence[tuple[int, int, int, bool, bool, int]]) -> None:
        """A client sends again what another life has not answered, the same contents, in any order and among new requests."""

    def exchange(self) -> None:
        """Take what the engine wants done, and what it has done, without an event of the device. Raises Violation."""

    def step(self) -> bool:
        """One event of the device. False when nothing is pending. Raises Violation."""

    def deliver(self, operation: Operation | None) -> None:
        """Hand a completed operation of the device to the engine, and take what comes of it."""

    def end_exhaustion(self) -> None:
        """From now on there is space: only writes that were submitted before may still fail with ENOSPC."""

    def abandon(self) -> None:
        """The disk is gone: nothing in flight will end."""

    def drain(self) -> None:
        """Events until nothing is pending. Raises Violation if that never comes."""

    def read_now(self, first_sector: int, sectors: int) -> bytearray:
        """Reads, without asking the oracle and without copying, while nothing else is under way. Raises Violation when that fails."""

    def aim(
        self,
        *,
        weights: Mapping[str, float],
        areas: Sequence[tuple[int, int]],
        largest_sectors: int,
        depth: int,
        unit_sectors: int,
        skew_share: float,
        side_share: float,
        least_depth: int = 1,
        verify_share: float = 0.0,
    ) -> None:
        """What random requests look like: of which kinds, where (first sector, sectors), how large, how often aligned to units, how often
        with a badly aligned buffer, after which share of them something else happens; how many are in flight, at most, and at least while
        there are more to come; which share of writes is read again at once, with what lies around it."""

    def play(
        self,
        requests: int,
        *,
        seed: int,
        stream: int,
        skip: Container[int] | None = None,
        on_side: Callable[[Rng], None] | None = None,
        awaited: int | None = None,
    ) -> int:
        """Submit `requests` random requests, moving the device in between. Returns how many were submitted.

        Request i follows from (seed, stream, i) alone; `skip` leaves some out. Ends early when an operation of the category with index
        `awaited` has taken effect and not completed. Raises Violation, or whatever the engine raises.
        """
