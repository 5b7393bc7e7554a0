"""Requests of any offset, length and buffer alignment, judged byte by byte.

Requests under way at one moment never overlap, though they meet inside sectors and blocks, so one array of bytes says what the disk must
hold. Crashes come when everything is flushed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random

from fvd.format.geometry import Layout
from fvd.sim.oracle import Violation
from fvd.sim.world import FUA, NO_HOLE, REQUEST_FLUSH, REQUEST_READ, REQUEST_TRIM, REQUEST_WRITE, REQUEST_ZERO, Guest, Memory, Shape, World


@dataclass(slots=True)
class ByteGuest(Guest):
    start: int = 0
    expected: bytes = b""


class ByteWorld(World):
    def __init__(self, seed: int) -> None:
        shape = replace(Shape.draw(Random(seed)), fault_rate=0.0, on_full="wait")
        super().__init__(seed, shape)
        size = self.geometry.virtual_size_bytes
        self.model = bytearray((self.base or b"")[:size].ljust(size, b"\0"))

    def _finished(self, guest: Guest, error: int) -> None:
        self.requests_done += 1
        if error:
            raise Violation(f"{guest.kind} failed with {error}")
        if isinstance(guest, ByteGuest) and guest.kind == "read" and guest.memory is not None:
            self._compare(guest.memory.content(), guest.expected, guest.start)

    def _reopen(self) -> None:
        self.open()
        self.check_storage()
        self._compare(self.read_all(), bytes(self.model), 0)

    def _compare(self, shown: bytes, expected: bytes, start: int) -> None:
        if shown != expected:
            at = next(i for i, (mine, wanted) in enumerate(zip(shown, expected, strict=True)) if mine != wanted)
            raise Violation(f"byte {start + at}: {shown[at]:#x} instead of {expected[at]:#x}")

    def send(self, kind: str, start: int, end: int) -> None:
        dice = self.dice
        size = end - start
        number, flags, memory = REQUEST_FLUSH, FUA if dice.random() < 0.1 else 0, None
        guest = ByteGuest(kind, None, start=start)
        if kind == "read":
            number = REQUEST_READ
            guest.expected = bytes(self.model[start:end])
            memory = guest.memory = Memory(size, b"\xee" * size, dice.choice((0, 0, 1, 512)))
        elif kind == "write":
            number = REQUEST_WRITE
            content = dice.randbytes(size)
            self.model[start:end] = content
            memory = guest.memory = Memory(size, content, dice.choice((0, 0, start % 4096, 1, 512)))
        elif kind == "zero":
            number = REQUEST_ZERO
            flags |= NO_HOLE if dice.random() < 0.3 else 0
            self.model[start:end] = bytes(size)
        elif kind == "trim":
            number = REQUEST_TRIM
            self._model_trim(start, end)
        self._cookies += 1
        self.in_flight[self._cookies] = guest
        self.engine.submit_request(number, start, size, memory.address if memory else 0, self._cookies, flags)

    def _model_trim(self, start: int, end: int) -> None:
        """Whole blocks, or over a base whole chunks, read as zeros; the rest keeps its data."""
        geometry = self.geometry
        if self.base is not None and geometry.layout is Layout.RAW:
            return
        unit = geometry.block_size_bytes if self.base is None else geometry.chunk_size_bytes
        low = -(-start // unit) * unit
        high = end if end == geometry.virtual_size_bytes else end // unit * unit
        if low < high:
            self.model[low:high] = bytes(high - low)

    def play_bytes(self, batches: int) -> None:
        """Batches of neighbouring requests, each batch at once."""
        dice = self.dice
        size = self.geometry.virtual_size_bytes
        for _ in range(batches):
            window = min(size, dice.choice((600, 5000, 70_000, 1 << 20, size)))
            low = dice.randint(0, size - window)
            if dice.random() < 0.3:
                low = size - window
            places = [dice.randint(low, low + window) for _ in range(dice.randint(2, 9))]
            cuts = sorted({place if dice.random() < 0.5 else self._round(place) for place in places})
            for start, end in pairwise(cuts):
                self.send(dice.choice(("read", "write", "write", "zero", "trim", "flush")), start, end)
                for _ in range(dice.choice((0, 0, 3))):
                    self.step()
            self.settle()

    def _round(self, place: int) -> int:
        unit = self.dice.choice((512, 4096, self.geometry.block_size_bytes, self.geometry.chunk_size_bytes))
        return min(place // unit * unit, self.geometry.virtual_size_bytes)


def run(seed: int, rounds: int = 4) -> int:
    """One world from its seed. Returns the number of requests; raises Violation, or whatever the engine raises."""
    world = ByteWorld(seed)
    for _ in range(rounds):
        world.play_bytes(world.dice.randint(1, 20))
        if world.dice.random() < 0.5:
            world.close()
        else:
            world.engine.submit_request(REQUEST_FLUSH, 0, 0, 0, 0)
            world.in_flight[0] = Guest("flush", None)
            world.settle()
            if world.shape.cache_mode != "unsafe":
                world.crash()
    return world.requests_done
