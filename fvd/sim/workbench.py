# SPDX-License-Identifier: Apache-2.0
"""A simulated disk that somebody asks for, whose requests and operations have names, and whose sectors and chunks can be looked at.

It may not know the commands that are given to it, nor where they come from.
"""

from __future__ import annotations

import errno
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fvd.errors import FvdError, InvalidArgument
from fvd.format import maps
from fvd.format.geometry import PAGE_BYTES, Layout, Placement
from fvd.inspect.check import check_node
from fvd.modes import CACHE_MODES, ON_FULL
from fvd.sim._base import base_content
from fvd.sim._device import WRITE, ZERO, Operation
from fvd.sim._oracle import SECTOR_BYTES, Violation, unstamp
from fvd.sim.stage import Stage
from fvd.sim.world import FOREIGN, NAME
from fvd.units import format_size, parse_size

LARGEST_BYTES = 256 << 20  # all of the disk is read for a drawing
ERRORS = {"EIO": -errno.EIO, "ENOSPC": -errno.ENOSPC}
_DATA, _BASE = 0, 1  # states of Engine.list_extents
_TORN = -1
_FOREIGN_WORD = int.from_bytes(FOREIGN, "little")
_DONE = re.compile(r"done (\d+): \w+ (-?\d+)")


class BadCommand(InvalidArgument):
    """A line of the console that means nothing, or cannot be done now. Nothing has happened."""


@dataclass(frozen=True, slots=True)
class Option:
    """One `name=value` of `disk`."""

    key: str
    parse: Callable[[str], Any]
    meaning: str
    values: tuple[str, ...] = ()


def _one_of(values: Mapping[str, Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        if text not in values:
            raise BadCommand(f"{text!r} is none of {', '.join(values)}")
        return values[text]

    return parse


def _choice(key: str, meaning: str, values: Mapping[str, Any]) -> Option:
    return Option(key, _one_of(values), meaning, tuple(values))


def _same(*names: str) -> dict[str, str]:
    return dict(zip(names, names, strict=True))


def _base_size(text: str) -> int | None:
    return None if text == "none" else parse_size(text)


OPTIONS: dict[str, Option] = {
    "size": Option("virtual_size_bytes", parse_size, "what the guest sees (default 1M, at most 256M)"),
    "block": Option("block_size_bytes", parse_size, "unit of the presence map (64K)"),
    "chunk": Option("chunk_size_bytes", parse_size, "unit of allocation (256K)"),
    "journal": Option("journal_size_bytes", parse_size, "the journal's ring (64K)"),
    "step": Option("grow_step_bytes", parse_size, "how much `grow` adds (256K)"),
    "storage": Option("storage_chunks", int, "chunks that there is storage for at the beginning (all)"),
    "base": Option("base_bytes", _base_size, "the size of a base image, or none (none)", ("none",)),
    "layout": _choice("layout", "how a chunk finds its place (compact)", {layout.name.lower(): layout for layout in Layout}),
    "placement": _choice("placement", "where new chunks go (append)", {placement.name.lower(): placement for placement in Placement}),
    "lbs": _choice("logical_block_bytes", "what the device writes whole or not at all (512)", {"512": 512, "4096": 4096}),
    "cache": _choice("cache_mode", "the cache mode (none)", _same(*CACHE_MODES)),
    "on-full": _choice("on_full", "what a write does when storage cannot grow (wait)", _same(*ON_FULL)),
    "discard": _choice("discard", "whether freed chunks are discarded (off)", {"on": True, "off": False}),
    "zero-chunks": _choice("zero_chunks", "whether the device zeroes new chunks (off)", {"on": True, "off": False}),
}


def changes(options: Mapping[str, str]) -> dict[str, Any]:
    """The fields of Geometry and Shape that these options change."""
    changes = {}
    for name, text in options.items():
        option = OPTIONS.get(name)
        if option is None:
            raise BadCommand(f"a disk has no option {name!r}; it has {', '.join(OPTIONS)}")
        try:
            changes[option.key] = option.parse(str(text))
        except ValueError as error:
            raise BadCommand(f"{name}={text}: {error}") from None
    if changes.get("virtual_size_bytes", 0) > LARGEST_BYTES:
        raise BadCommand(f"size={options['size']}: the console draws all of a disk; choose at most {format_size(LARGEST_BYTES)}")
    if changes.get("storage_chunks", 0) < 0:
        raise BadCommand(f"storage={options['storage']}: it cannot be negative")
    return changes


# --- one disk, with names for what is under way -----------------------------------------------------------------------


@dataclass(eq=False, slots=True)
class Request:
    """A guest's request, as long as its disk is on stage."""

    name: str
    text: str
    number: int
    """What the oracle stamps its sectors with; 0: it writes none."""
    state: str = "waiting"
    """waiting, done, failed EIO, lost"""


@dataclass(eq=False, slots=True)
class Tracked:
    """An operation of the device since the disk was last opened."""

    operation: Operation
    category: str
    place: str
    content: bytes
    """What a write writes; kept here, for its buffer goes when it completes."""
    serves: list[Request] = field(default_factory=list)
    fate: int = 0
    held: bool = False
    persisted: bool = False
    completed: bool = False

    def __str__(self) -> str:
        kind = f"{self.category} (fua)" if self.operation.durable and self.category == "write" else self.category
        served = f" for {', '.join(request.name for request in self.serves)}" if self.serves else ""
        return f"{self.operation.number} {kind}{f' {self.place}' if self.place else ''}{served}"

    @property
    def state(self) -> str:
        operation = self.operation
        words = ["completed" if self.completed else "took effect" if operation.took_effect else "submitted"]
        if self.persisted:
            words.append("persisted")
        error = operation.result or self.fate
        if error:
            words.append(f"{'failed' if operation.took_effect else 'will fail'} with {errno.errorcode[-error]}")
        return ", ".join([*words, *(["held"] if self.held else [])])


class Workbench:
    """A disk on stage. What is done to it goes through here, so that it knows which operation serves which request."""

    def __init__(self, options: Mapping[str, str]) -> None:
        self.log: list[str] = []
        try:
            self.stage = Stage(log=self.log, **changes(options))
        except BadCommand:
            raise
        except (FvdError, ValueError) as error:  # sizes that do not fit, or storage that is too little or too much
            raise BadCommand(f"there can be no such disk: {error}") from None
        self.requests: dict[str, Request] = {}
        self.operations: dict[int, Tracked] = {}
        self.closing = False
        self._by_serial: dict[int, Request] = {}
        self._read = 0  # lines of the log
        self._seen = 0  # operations of the device
        self.begin_life()

    def begin_life(self) -> None:
        """The disk was opened again: what was under way is gone."""
        for request in self.requests.values():
            if request.state == "waiting":
                request.state = "lost"
        self.operations.clear()
        self._by_serial.clear()
        self._read, self._seen = len(self.log), self.stage.device.submitted
        self.closing = False

    @property
    def pending(self) -> list[Tracked]:
        return [tracked for tracked in self.operations.values() if not tracked.completed]

    # --- events ---------------------------------------------------------------------------------------------------------

    def submit(self, name: str, kind: str, first: int, count: int, **flags: bool) -> list[str]:
        before = self.stage.oracle.numbers
        cookie = self.stage.submit(kind, first, count, **flags)
        number = self.stage.oracle.numbers
        words = [kind, *([str(first), str(count)] if count else []), *(flag for flag, on in flags.items() if on)]
        request = Request(name, " ".join(words).replace("_", "-"), number if number > before else 0)
        self.requests[name] = request
        self._by_serial[cookie >> 20] = request
        self.closing |= kind == "close"
        return self.look([request])

    def effect(self, tracked: Tracked) -> None:
        if not tracked.operation.took_effect:
            self.stage.effect(tracked.operation)

    def finish(self, tracked: Tracked) -> list[str]:
        self.effect(tracked)
        tracked.completed = True
        self.stage.finish(tracked.operation)
        return self.look(tracked.serves)

    def run(self) -> list[str]:
        """Everything that is not held, and what follows from it, in the order of submission. Returns the requests that ended."""
        news = []
        while ready := [tracked for tracked in self.pending if not tracked.held]:
            news += [line for line in self.finish(ready[0]) if not line.startswith("  ")]
        return news

    def step(self) -> list[str]:
        """One event by the rng."""
        states = {tracked: tracked.operation.took_effect for tracked in self.pending}
        self.stage.step()
        left = self.stage.device.pending
        for tracked, took_effect in states.items():
            if tracked.operation not in left:
                tracked.completed = True
                return [f"{tracked} completes", *self.look(tracked.serves)]
            if tracked.operation.took_effect != took_effect:
                return [f"{tracked} takes effect", *self.look()]
        return self.look()

    def fail(self, tracked: Tracked, error: int) -> None:
        tracked.fate = error
        player, device = self.stage.player, self.stage.device
        player.errors_expected = True
        if error != ERRORS["EIO"]:  # which is always one that a request may show
            device.fail_with = error
        if tracked.operation.took_effect:
            tracked.operation.result = error
        else:
            device.fault = self._fate_of

    def _fate_of(self, operation: Operation) -> int:
        tracked = self.operations.get(operation.number)
        return tracked.fate if tracked else 0  # a read of 'check'

    def look(self, cause: Iterable[Request] = ()) -> list[str]:
        """What is new: requests that ended, operations that the device got. `cause`: whom those serve when nothing else tells."""
        self.stage.player.exchange()
        news = []
        for line in self.log[self._read :]:
            if match := _DONE.match(line):
                request, error = self._by_serial.pop(int(match[1])), int(match[2])
                request.state = f"failed {errno.errorcode[-error]}" if error else "done"
                news.append(f"{request.name}: {request.state}")
        self._read = len(self.log)
        device = self.stage.device
        fresh = [operation for operation in device.pending if operation.number > self._seen]
        self._seen = device.submitted
        busy = {request for tracked in self.pending for request in tracked.serves}
        idle = [request for request in self._by_serial.values() if request not in busy]
        begun = []
        for operation in fresh:
            category = device.category(operation)
            content = operation.content if operation.kind == WRITE else b""
            if operation.kind == ZERO:
                content = bytes(operation.length_bytes)
            begun.append(Tracked(operation, category, self._place(operation, category, content), content))
            begun[-1].serves = self._served(begun[-1])
        certain = {request for tracked in begun for request in tracked.serves}
        likely = [request for request in cause if request.state == "waiting" and request not in certain]
        likely = likely or [request for request in idle if request not in certain]
        for tracked in begun:
            if not tracked.serves and tracked.category != "discard":
                tracked.serves = likely
            self.operations[tracked.operation.number] = tracked
            news.append(f"  {tracked}")
        return news

    def _served(self, tracked: Tracked) -> list[Request]:
        """The requests whose stamps a write of data carries."""
        if tracked.category != "write":
            return []
        numbers = {stamp[0] for word in set(words_of(tracked.content)[:, 0].tolist()) if (stamp := unstamp(word)) is not None}
        return [request for request in self._by_serial.values() if request.number and request.number in numbers]

    # --- ends of a life -------------------------------------------------------------------------------------------------

    def crash(self, keep: Sequence[Tracked] | None = None, *, newest: bool = False) -> None:
        """Power fails with every block as it was last durable; or with the contents that `keep` wrote; or with the newest contents."""
        device = self.stage.device
        image = bytearray(device.image)
        size = device.logical_block_bytes
        for offset, contents in device.volatile():
            if newest:
                continue
            chosen = 0
            for tracked in keep or ():
                at = offset - tracked.operation.offset_bytes
                piece = tracked.content[at : at + size] if at >= 0 else b""
                if piece in contents:
                    chosen = max(chosen, len(contents) - 1 - contents[::-1].index(piece))
            image[offset : offset + size] = contents[chosen]
        device.put_back(image)
        self.crash_by_rng()

    def crash_by_rng(self) -> None:
        self.stage.crash()
        self.begin_life()

    def kill(self, how: str) -> None:
        if how == "keep":
            for tracked in self.pending:
                self.effect(tracked)
        elif how == "drop":
            device = self.stage.device
            device.pending = [operation for operation in device.pending if operation.took_effect]
        self.stage.kill()
        self.begin_life()

    def reopen(self) -> list[str]:
        """Close in peace if nobody has, and open again after power has failed."""
        stage = self.stage
        news = []
        if not self.closing:
            news += self.submit(self.free_name("close"), "close", 0, 0)
        news = [*(line for line in news if not line.startswith("  ")), *self.run()]
        if stage.in_flight:
            raise Violation(f"close never ends: {', '.join(request.name for request in self._by_serial.values())}")
        if leaks := stage.engine.leaks():
            raise Violation(f"leaked: {leaks}")
        if not stage.engine.failed_errno:
            # A closed disk is durable as a whole, whatever the cache mode.
            stage.oracle.end_flush(stage.oracle.begin_flush(), True)
        self.crash_by_rng()
        return news

    def check(self) -> str:
        """Judge the metadata as it is now and, when nothing is under way, what a guest reads."""
        stage = self.stage
        report = check_node(stage.node(), NAME)
        if report.errors:
            raise Violation(f"check: {'; '.join(report.errors)}")
        if stage.device.pending or stage.in_flight or self.closing:
            return "the metadata is whole (the data can be read when nothing is under way)"
        began = stage.oracle.begin_read()
        stage.oracle.check_read(0, began, bytes(stage.read_all()))
        self._seen = stage.device.submitted
        return "the metadata is whole, and every sector shows what it may"

    # --- looking --------------------------------------------------------------------------------------------------------

    def free_name(self, kind: str) -> str:
        number = len(self.requests) + 1
        while f"{kind}{number}" in self.requests:
            number += 1
        return f"{kind}{number}"

    def _place(self, operation: Operation, category: str, content: bytes) -> str:
        """Where an operation goes, as people call it."""
        first, count = operation.offset_bytes // SECTOR_BYTES, operation.length_bytes // SECTOR_BYTES
        if category == "flush":
            return ""
        if category == "base":
            return f"sectors {span_of(first, count)}"
        return self.place(operation.offset_bytes, operation.length_bytes, content).removeprefix("journal ")

    def place(self, offset_bytes: int, length_bytes: int, content: bytes = b"") -> str:
        """A range of the storage: its pages, or whose sectors they are by what is written there, by the table, or else its slot."""
        geometry = self.stage.geometry
        pages = max(1, length_bytes // PAGE_BYTES)
        regions = [("journal", geometry.journal_offset_bytes), ("bitmap", geometry.bitmap_offset_bytes)]
        if geometry.table_entries:
            regions.append(("table", geometry.table_offset_bytes))
        if offset_bytes < geometry.data_offset_bytes:
            name, start = max((region for region in regions if region[1] <= offset_bytes), key=lambda region: region[1])
            at = (offset_bytes - start) // PAGE_BYTES
            return f"{name} page {at}" if pages == 1 else f"{name} pages {span_of(at, pages)}"
        slot, within = divmod(offset_bytes - geometry.data_offset_bytes, geometry.chunk_size_bytes)
        first, count = within // SECTOR_BYTES, length_bytes // SECTOR_BYTES
        chunk: int | None = slot
        _, table = self.stage.engine.snapshot_maps()
        if table is not None:
            chunk = next(iter(np.flatnonzero(np.asarray(table) == slot).tolist()), None)
        for index, word in enumerate(words_of(content)[:, 0].tolist()):
            stamp = unstamp(word)
            if stamp is not None and stamp[0]:
                chunk = (stamp[1] - index - first) * SECTOR_BYTES // geometry.chunk_size_bytes
                break
        if chunk is None:
            return f"slot {slot}, sectors {span_of(first, count)} of it"
        return f"sectors {span_of(chunk * geometry.chunk_size_bytes // SECTOR_BYTES + first, count)}"

    def visible(self) -> bytearray:
        """What a read of the whole disk would show if it was made now, and alone."""
        stage = self.stage
        geometry = stage.geometry
        chunk_bytes = geometry.chunk_size_bytes
        _, table = stage.engine.snapshot_maps()
        shown = bytearray(geometry.virtual_size_bytes)
        at = 0
        for length, state in stage.engine.list_extents(0, geometry.virtual_size_bytes):
            end = at + length
            while at < end:
                piece = min(end - at, chunk_bytes - at % chunk_bytes)
                chunk = at // chunk_bytes
                if state == _DATA:
                    start = geometry.data_offset_bytes + (chunk if table is None else int(table[chunk])) * chunk_bytes + at % chunk_bytes
                    shown[at : at + piece] = stage.image[start : start + piece]
                elif state == _BASE:
                    content = base_content(stage.shape.base_bytes or 0, at, piece)
                    shown[at : at + len(content)] = content
                at += piece
        return shown

    def runs(self, data: bytes | bytearray, first_sector: int) -> list[tuple[int, int, str]]:
        """(first sector, sectors, what they show) of these sectors of the guest."""
        words = words_of(data)
        sectors = np.arange(first_sector, first_sector + len(words), dtype=np.int64)
        # The same number for all sectors of one write, of the base, or of zeros: a stamp without its place.
        keys = np.where(words[:, 0] == 0, 0, words[:, 0].view(np.int64) - sectors)
        keys[(words != words[:, :1]).any(axis=1)] = _TORN
        starts = [0, *(np.flatnonzero(np.diff(keys)) + 1).tolist(), len(keys)]
        runs: list[tuple[int, int, str]] = []
        for start, end in itertools.pairwise(starts):
            at = first_sector + start
            piece = data[start * SECTOR_BYTES : (start + 1) * SECTOR_BYTES]
            name = self.name(int(words[start, 0]), at) if keys[start] != _TORN else self._name_of_mixture(bytes(piece), at)
            if runs and runs[-1][2] == name:
                runs[-1] = (runs[-1][0], runs[-1][1] + end - start, name)
            else:
                runs.append((at, end - start, name))
        return runs

    def _name_of_mixture(self, data: bytes, sector: int) -> str:
        base_bytes = self.stage.shape.base_bytes
        if base_bytes is None or sector != base_bytes // SECTOR_BYTES:
            return "a mixture"
        last = base_content(base_bytes, sector * SECTOR_BYTES, SECTOR_BYTES).ljust(SECTOR_BYTES, b"\0")
        return "base" if data == last else "a mixture"

    def name(self, word: int, sector: int | None = None) -> str:
        """What a sector full of this word is: zeros, base, foreign (what the storage held before), or the request that wrote it."""
        if word in (0, _FOREIGN_WORD):
            return "foreign" if word else "zeros"
        number, place = unstamp(word) or (-1, -1)
        what = "base" if number == 0 else f"unknown {word:#x}"
        if number > 0:
            what = next((request.name for request in self.requests.values() if request.number == number), what)
        return what if sector is None or place == sector else f"{what} of sector {place}"

    def numbers(self) -> dict[str, int]:
        """What is counted: since the disk was opened, and now."""
        engine = self.stage.engine
        now = {"slots_used": engine.used_slots_count, "slots_free": engine.free_slots, "pending_changes": engine.pending_changes}
        return self.stage.counts() | now | {"waiting_writes": engine.waiting_writes, "failed_errno": engine.failed_errno}

    def stored(self) -> dict[int, tuple[str, str]]:
        """Chunk -> (slot, its blocks: # stored, b from the base, . zeros), of chunks that have a slot."""
        stage = self.stage
        geometry = stage.geometry
        _, table = stage.engine.snapshot_maps()
        blocks, at = "", 0
        for length, state in stage.engine.list_extents(0, geometry.virtual_size_bytes):
            at += length
            # A block is what its beginning is: a base may end inside it, and the last one may be short.
            blocks += "#b."[state] * (-(-at // geometry.block_size_bytes) - len(blocks))
        places = {}
        for chunk in range(geometry.chunks):
            own = blocks[chunk * geometry.blocks_per_chunk : (chunk + 1) * geometry.blocks_per_chunk]
            slot = chunk if table is None else int(table[chunk])
            if ("#" in own) if table is None else (slot != maps.EMPTY):
                places[chunk] = (str(slot), own)
        return places


def words_of(data: bytes | bytearray) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Sectors as rows of words."""
    return np.frombuffer(data, np.uint64).reshape(-1, SECTOR_BYTES // 8)


def span_of(first: int, count: int) -> str:
    return str(first) if count == 1 else f"{first}-{first + count - 1}"
