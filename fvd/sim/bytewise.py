# SPDX-License-Identifier: Apache-2.0
"""Requests of any offset, length and buffer alignment, judged byte by byte.

Requests under way at one moment never overlap, though they meet inside sectors and blocks, so one array of bytes says what the disk must
hold. Crashes come when everything is flushed.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from itertools import pairwise

from fvd.disk.recovery import recover_disk
from fvd.format.geometry import Layout
from fvd.modes import UNSAFE_CACHE_MODES
from fvd.sim._base import base_content
from fvd.sim._oracle import Violation
from fvd.sim._player import CLOSE, FLUSH, READ, TRIM, WRITE, ZERO
from fvd.sim._rng import Rng
from fvd.sim.shape import draw, draw_zeroing
from fvd.sim.world import SHAPE, ZEROING, World

FUA, NO_HOLE = 1, 2
_PAGE = 4096


class Memory:
    """A page-aligned buffer (but for `skew_bytes`) with an address."""

    def __init__(self, size_bytes: int, content: bytes | None = None, skew_bytes: int = 0) -> None:
        self._memory = bytearray(size_bytes + skew_bytes + _PAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self.address = start + -start % _PAGE + skew_bytes
        self.size_bytes = size_bytes
        if content is not None:
            ctypes.memmove(self.address, content, size_bytes)

    def content(self) -> bytes:
        return ctypes.string_at(self.address, self.size_bytes)


@dataclass(slots=True)
class Sent:
    """A request on its way."""

    kind: int
    start: int
    memory: Memory | None
    expected: bytes = b""


class ByteWorld(World):
    def __init__(self, seed: int) -> None:
        shape = draw(Rng(seed, SHAPE))
        number = 0
        while shape.windows is not None:  # too large for an array of its bytes
            number += 1
            shape = draw(Rng(seed, SHAPE, number))
        draw_zeroing(shape, Rng(seed, ZEROING))
        super().__init__(seed, replace(shape, faults={}, fail_one=False, rot=False, on_full="wait"))
        size = self.geometry.virtual_size_bytes
        base_size = self.shape.base_bytes
        self.model = bytearray((b"" if base_size is None else base_content(base_size, 0, min(size, base_size))).ljust(size, b"\0"))
        self.sent: dict[int, Sent] = {}
        self.count = 0

    def _take(self) -> None:
        self.device.submit(self.engine.take_operations())
        for cookie, error in self.engine.take_done():
            request = self.sent.pop(cookie)
            if error:
                raise Violation(f"request {request.kind} at byte {request.start} failed with {error}")
            if request.kind == READ and request.memory is not None:
                self._compare(request.memory.content(), request.expected, request.start)

    def step(self) -> bool:
        self._take()
        if not self.device.pending:
            return False
        ended = self.device.step()
        if ended is not None:
            self.engine.complete_operation(ended.token, ended.result)
        self._take()
        return True

    def settle(self) -> None:
        while True:
            while self.step():
                pass
            if not self.sent:
                break
            if self.engine.waiting_writes == 0 or not self.grow():
                raise Violation(f"{len(self.sent)} requests never end")
        self._check_leaks()

    def close(self, *, at_once: bool = False) -> None:
        self._send(CLOSE, 0, 0, None)
        self.settle()
        self.device.crash()
        if not recover_disk(self.node(), read_only=True).journal_state.clean:
            raise Violation("a closed disk is not clean")
        self.reopen()

    def reopen(self) -> None:
        self.open()
        self.check()
        shown = self.read_all()
        self._compare(bytes(shown), bytes(self.model), 0)
        self._check_extents(shown)

    def _compare(self, shown: bytes, expected: bytes, start: int) -> None:
        if shown != expected:
            at = next(i for i, (mine, wanted) in enumerate(zip(shown, expected, strict=True)) if mine != wanted)
            raise Violation(f"byte {start + at}: {shown[at]:#x} instead of {expected[at]:#x}")

    def _send(self, kind: int, start: int, size: int, memory: Memory | None, expected: bytes = b"", flags: int = 0) -> None:
        self.count += 1
        self.sent[self.count] = Sent(kind, start, memory, expected)
        self.engine.submit_request(kind, start, size, memory.address if memory else 0, self.count, flags)

    def send(self, kind: int, start: int, end: int) -> None:
        """One request of the kind for [start, end); the model does at once what it must do."""
        rng, size = self.rng, end - start
        flags, memory, expected = FUA if rng.random() < 0.1 else 0, None, b""
        if kind == READ:
            expected = bytes(self.model[start:end])
            memory = Memory(size, b"\xee" * size, rng.choice((0, 0, 1, 512)))
        elif kind == WRITE:
            content = rng.randbytes(size)
            self.model[start:end] = content
            memory = Memory(size, content, rng.choice((0, 0, start % 4096, 1, 512)))
        elif kind == ZERO:
            flags |= NO_HOLE if rng.random() < 0.3 else 0
            self.model[start:end] = bytes(size)
        elif kind == TRIM:
            self._model_trim(start, end)
        self._send(kind, start, size, memory, expected, flags)

    def _model_trim(self, start: int, end: int) -> None:
        """Whole blocks, or over a base whole chunks, read as zeros; the rest keeps its data."""
        geometry = self.geometry
        based = self.shape.base_bytes is not None
        if based and geometry.layout is Layout.RAW:
            return
        unit = geometry.chunk_size_bytes if based else geometry.block_size_bytes
        low = -(-start // unit) * unit
        high = end if end == geometry.virtual_size_bytes else end // unit * unit
        if low < high:
            self.model[low:high] = bytes(high - low)

    def play_bytes(self, batches: int) -> None:
        """Batches of neighbouring requests, each batch at once."""
        rng = self.rng
        size = self.geometry.virtual_size_bytes
        for _ in range(batches):
            window = min(size, rng.choice((600, 5000, 70_000, 1 << 20, size)))
            low = rng.randint(0, size - window)
            if rng.random() < 0.3:
                low = size - window
            places = [rng.randint(low, low + window) for _ in range(rng.randint(2, 9))]
            cuts = sorted({place if rng.random() < 0.5 else self._round(place) for place in places})
            for start, end in pairwise(cuts):
                self.send(rng.choice((READ, WRITE, WRITE, ZERO, TRIM, FLUSH)), start, end)
                for _ in range(rng.choice((0, 0, 3))):
                    self.step()
            self.settle()

    def _round(self, place: int) -> int:
        unit = self.rng.choice((512, 4096, self.geometry.block_size_bytes, self.geometry.chunk_size_bytes))
        return min(place // unit * unit, self.geometry.virtual_size_bytes)


def run(seed: int, rounds: int = 4) -> int:
    """One world from its seed. Returns the number of requests; raises Violation, or whatever the engine raises."""
    world = ByteWorld(seed)
    for _ in range(rounds):
        world.play_bytes(world.rng.randint(1, 20))
        if world.rng.random() < 0.5:
            world.close()
        else:
            world._send(FLUSH, 0, 0, None)
            world.settle()
            if world.shape.cache_mode not in UNSAFE_CACHE_MODES:
                world.crash()
    return world.count
