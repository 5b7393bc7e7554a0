# SPDX-License-Identifier: Apache-2.0
"""A simulated block device: an operation is submitted, takes effect and completes in separate events, whose order the rng decide."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from fvd.sim._rng import Rng

READ: Final = 0
WRITE: Final = 1
FLUSH: Final = 2
DISCARD: Final = 3
ZERO: Final = 4
STORAGE: Final = 0
BASE: Final = 1
CATEGORIES: Final[tuple[str, ...]]
"""read, base, write, journal, map, flush, discard, zeroing"""
KIND_NAMES: Final[tuple[str, ...]]

class Operation:
    """One device operation on its way."""

    number: int
    """In the order of submission, from 1."""
    token: int
    kind: int
    target: int
    offset_bytes: int
    length_bytes: int
    durable: bool
    took_effect: bool
    overtook: bool
    """It takes effect before an earlier one in the same place, and is told of after it."""
    took_report: bool
    """It fails because the device had to tell somebody of blocks that it lost, whose ever they were."""
    result: int
    """0, or the negative errno with which it completes; settable until then."""
    held_until: int
    @property
    def content(self) -> bytes:
        """What a write writes; the buffer of a read as it is now."""

class SimulatedDevice:
    def __init__(
        self,
        capacity_bytes: int,
        logical_block_bytes: int,
        rng: Rng,
        *,
        base_bytes: int | None = None,
        regions: tuple[int, int, int] = (0, 0, 0),
    ) -> None:
        """Has no storage until `grow`, at most `capacity_bytes`. `regions`: where journal, maps and data begin, to name faults by."""
    rng: Rng
    pending: list[Operation]
    """In the order of submission."""
    fault: Callable[[Operation], int] | None
    """Asked when an operation takes effect; a negative errno makes it fail, and of a write each block may have been written."""
    announce: Callable[[Operation], None] | None
    """Sees every write of metadata when it is submitted."""
    conclude: Callable[[Operation], None] | None
    """Sees every write of the journal that ends well, before anybody else does."""
    inspect: Callable[[Operation], None] | None
    """Shown every write below the data when it takes effect."""
    stuck_share: float
    """Share of operations that move only when nothing else can."""
    torn_share: float
    """Share of operations some of whose blocks take effect only when they complete."""
    overtaking_share: float
    """Share of operations that overtake those under way in the same place: reads and writes of one place are never all in order."""
    zeroes: bool
    """It writes zeros without being sent any (the default); else it says that it cannot."""
    base_closed: bool
    """Whether the base has been given up: no operation may read it."""
    page_cache: bool
    """Writes go to a page cache, which after a failed flush may hold pages that the medium never gets."""
    told_once: bool
    """Blocks that could not be made durable are told of once: to the first flush or durable write that ends from then on. The others end
    well. Else a flush that fails is told so itself."""
    fua: bool
    """Without a page cache: a durable write makes its own blocks durable and asks nobody (the default); else it is a write and a flush."""
    sampler: bool
    """With a page cache: somebody asks at the end of each flush or durable write whether anything was lost since, whoever was told."""
    report: int
    """The negative errno that the next who asks is told; 0: nothing was lost, or somebody has been told."""
    lost: dict[int, bytes]
    """Block -> what the medium holds, of those that are seen, count as written, and were lost."""
    losses: int
    reverted: int
    """Blocks that were lost and are seen no more."""
    landings: int
    """Blocks of failed operations that came after all."""
    fail_number: int
    """The operation with this number fails."""
    fail_with: int
    """The negative errno of failures by rate or number."""
    size_bytes: int
    durable_size_bytes: int
    """The size that the last flush covered. A crash may leave it, as it may for a file; a logical volume keeps its size."""
    capacity_bytes: int
    now_ns: int
    submitted: int
    logical_block_bytes: int
    base_bytes: int | None
    @property
    def image(self) -> memoryview:
        """What reads see, as a writable memoryview of the present size."""

    @property
    def volatile_blocks(self) -> int:
        """How many blocks a crash now could leave with another content."""

    def grow(self, size_bytes: int, filler: bytes) -> None:
        """More storage at the end, holding what it held before. Raises ValueError beyond the capacity."""

    def keep_size(self) -> None:
        """The present size is durable: whoever made the storage longer has seen to that."""

    def set_faults(self, rates: Mapping[str, float]) -> None:
        """The share of operations of each category (CATEGORIES) that fails; what is not named does not."""

    def set_slow(self, shares: Mapping[str, float]) -> None:
        """The share of events, by category of operation, that are held back for long, so that much else happens meanwhile: an operation may
        take effect late, and may be told of late."""
    workers: int
    def set_workers(self, workers: int) -> None:
        """Flushes, discards and zeroing occupy one each of so many workers until they complete, and queue for them; 0: as many as it takes.
        While all of them discard, everything else takes longer."""

    def set_weather(self, *, writeback: float = 0.0, eviction: float = 0.0, landing: float = 0.0) -> None:
        """What happens by itself, as shares of events: the page cache's own write-back fails and loses blocks; blocks that were lost are
        evicted, so that reads show what the medium holds; blocks of operations that failed reach the storage after all, until something
        else is written there or a flush that began after them has ended."""

    def happen_at_rest(self) -> None:
        """The same, but for write-back, when no event is to come: while a disk is opened."""

    def end_landing(self) -> None:
        """What failed operations have on their way comes now or never."""

    def ask(self) -> int:
        """Somebody else who has the storage open asks what was lost. Returns the negative errno, which nobody else is told then; or 0."""

    def advance(self, by_ns: int) -> None: ...
    def submit(self, operations: Iterable[tuple[int, int, int, int, int, int, bool]]) -> None:
        """(token, kind, target, offset_bytes, length_bytes, buffer_address, durable), as Engine.take_operations gives them."""

    def step(self) -> Operation | None:
        """One event of one pending operation. Returns it when that completes it. Something must be pending."""

    def take_effect(self, operation: Operation) -> None:
        """The first event of an operation. Raises AssertionError when it reaches outside the storage or the base."""

    def finish(self, operation: Operation) -> Operation:
        """Complete an operation that has taken effect."""

    def persist(self, operation: Operation, blocks: Sequence[int] | None = None) -> None:
        """Blocks of a write that took effect reach the medium: all, or those with these indexes within it. Raises RuntimeError."""

    def category(self, operation: Operation) -> str: ...
    def flush_everything(self) -> None:
        """A flush by somebody else than the engine: everything that took effect is durable."""

    def forget_cache(self) -> None:
        """What the page cache holds and the medium never got is seen no more."""

    def truncate(self, size_bytes: int) -> None:
        """The storage ends here now; what lay beyond is gone."""

    def volatile(self) -> list[tuple[int, list[bytes]]]:
        """(offset_bytes, contents, oldest first) of each block of which a crash now may leave any of several contents, by submission.

        Writes that had not taken effect count as if they had. Nothing is pending any more.
        """

    def put_back(self, image: bytes | bytearray | memoryview) -> None:
        """Hold this image (of the present size), all of it durable, with nothing pending: for another try from one crash."""

    def crash(self) -> None:
        """Power fails: every volatile block becomes one of its contents, by rng. Nothing is pending any more."""

    def kill(self) -> None:
        """The process dies, the device goes on: writes and discards under way take effect, wholly, in part or not. All stays volatile."""
