"""A simulated block device: an operation is submitted, takes effect and completes in separate events, whose order the caller's dice decide.

A write takes effect (is seen by reads) at some moment before it completes, and stays volatile until a flush that began after its
completion, or until its own completion if it is durable. A crash leaves each volatile logical block as any of the versions it went through
since it was last durable; writes that had not taken effect yet may have reached some of their blocks too. It may not know the engine or the
format.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random

READ, WRITE, FLUSH, DISCARD = range(4)
STORAGE, BASE = range(2)
_DISCARDED = b"\xdd"
_STUCK = 1 << 60


@dataclass(slots=True)
class Operation:
    """One device operation on its way."""

    number: int
    token: int
    kind: int
    target: int
    offset_bytes: int
    length_bytes: int
    address: int
    durable: bool
    covered: set[int] | None = None  # a flush: the writes that had completed when it began
    took_effect: bool = False
    result: int = 0
    held_until: int = 0


class SimulatedDevice:
    """`image` is what the storage holds now; `base` is read only. Offsets and lengths are bytes."""

    def __init__(self, image: bytearray, base: bytes | None, logical_block_bytes: int, dice: Random) -> None:
        self.image = image
        self.base = base
        self.logical_block_bytes = logical_block_bytes
        self.dice = dice
        self.pending: list[Operation] = []
        self.fault: Callable[[Operation], int] | None = None
        """Called when an operation is about to take effect; a negative errno makes it fail (with or without effect, by dice)."""
        self.slow_share = 0.0
        """Share of operations that are held back for long, so that much else happens meanwhile."""
        self.stuck_share = 0.0
        """Share of operations that move only when nothing else can."""
        self._versions: dict[int, list[tuple[int, bytes]]] = {}
        self._completed: set[int] = set()
        self._numbers = 0
        self._steps = 0

    def submit(self, operations: list[tuple[int, int, int, int, int, int, bool]]) -> None:
        for token, kind, target, offset, length, address, durable in operations:
            self._numbers += 1
            operation = Operation(self._numbers, token, kind, target, offset, length, address, durable)
            if self.slow_share and self.dice.random() < self.slow_share:
                operation.held_until = self._steps + self.dice.randint(20, 300)
            if self.stuck_share and self.dice.random() < self.stuck_share:
                operation.held_until = _STUCK
            self.pending.append(operation)

    def grow(self, size_bytes: int, filler: bytes) -> None:
        """More storage at the end, holding what it held before."""
        self.image.extend((filler * ((size_bytes - len(self.image)) // len(filler) + 1))[: size_bytes - len(self.image)])

    # --- events ---------------------------------------------------------------------------------------------------

    def step(self) -> Operation | None:
        """One event of one pending operation. Returns it when that completes it, else None. Something must be pending."""
        self._steps += 1
        operation = self.dice.choice(self.pending)
        if operation.held_until > self._steps:
            ready = [op for op in self.pending if op.held_until <= self._steps]
            operation = self.dice.choice(ready or [op for op in self.pending if op.held_until < _STUCK] or self.pending)
        if not operation.took_effect:
            self.take_effect(operation)
            return None
        return self.finish(operation)

    def finish(self, operation: Operation) -> Operation:
        """Complete an operation that has taken effect."""
        self.pending.remove(operation)
        if operation.result == 0:
            if operation.kind == WRITE:
                self._completed.add(operation.number)
                if operation.durable:
                    self._make_durable({operation.number}, self._blocks(operation))
            elif operation.kind == FLUSH and operation.covered:
                self._make_durable(operation.covered, list(self._versions))
                self._completed -= operation.covered
        return operation

    def _blocks(self, operation: Operation) -> range:
        size = self.logical_block_bytes
        return range(operation.offset_bytes // size, -(-(operation.offset_bytes + operation.length_bytes) // size))

    def take_effect(self, operation: Operation) -> None:
        operation.took_effect = True
        error = self.fault(operation) if self.fault else 0
        operation.result = error
        if operation.kind == FLUSH:
            operation.covered = set(self._completed)
            return
        if operation.kind == READ:
            source: bytes | bytearray = self.image if operation.target == STORAGE else self.base or b""
            end = operation.offset_bytes + operation.length_bytes
            if end > len(source):
                raise AssertionError(f"read past the end: {operation}")
            if error == 0:
                ctypes.memmove(operation.address, bytes(source[operation.offset_bytes : end]), operation.length_bytes)
            return
        if operation.target != STORAGE or operation.offset_bytes + operation.length_bytes > len(self.image):
            raise AssertionError(f"write outside the storage: {operation}")
        if operation.kind == WRITE:
            data = ctypes.string_at(operation.address, operation.length_bytes)
        else:
            data = _DISCARDED * operation.length_bytes
        self._write(operation, data, None if error == 0 else 0.5)

    def _write(self, operation: Operation, data: bytes, share: float | None) -> None:
        """Let the blocks of a write take effect: all, or each with probability `share`."""
        size = self.logical_block_bytes
        image = self.image
        for index, block in enumerate(self._blocks(operation)):
            if share is not None and self.dice.random() >= share:
                continue
            content = data[index * size : (index + 1) * size]
            versions = self._versions.get(block)
            if versions is None:
                self._versions[block] = [(0, bytes(image[block * size : (block + 1) * size])), (operation.number, content)]
            else:
                versions.append((operation.number, content))
            image[block * size : (block + 1) * size] = content

    def _make_durable(self, covered: set[int], blocks: Iterable[int]) -> None:
        for block in blocks:
            versions = self._versions.get(block)
            if versions is None:
                continue
            newest = len(versions) - 1
            while newest > 0 and versions[newest][0] not in covered:
                newest -= 1
            if newest == len(versions) - 1:
                del self._versions[block]
            else:
                del versions[:newest]

    # --- crash ----------------------------------------------------------------------------------------------------

    def volatile(self) -> list[tuple[int, list[bytes]]]:
        """(offset, contents) of each block of which a crash now may leave any of several contents. The device is of no use any more."""
        for operation in self.pending:
            if operation.kind == WRITE and not operation.took_effect:
                self._write(operation, ctypes.string_at(operation.address, operation.length_bytes), None)
        return [(block * self.logical_block_bytes, [content for _, content in versions]) for block, versions in self._versions.items()]

    def flush_everything(self) -> None:
        """A flush by somebody else than the engine, from beginning to end."""
        self._versions.clear()

    def crash(self) -> bytearray:
        """Power is gone: what the storage holds afterwards. The device is of no use any more."""
        for operation in self.pending:
            if operation.kind == WRITE and not operation.took_effect:
                self._write(operation, ctypes.string_at(operation.address, operation.length_bytes), 0.5)
        size = self.logical_block_bytes
        keep = self.dice.choice((0.0, 0.1, 0.5, 0.9, 1.0))
        for block, versions in self._versions.items():
            chosen = versions[-1] if self.dice.random() < keep else self.dice.choice(versions[:-1] or versions)
            self.image[block * size : (block + 1) * size] = chosen[1]
        self._versions.clear()
        self.pending.clear()
        return self.image
