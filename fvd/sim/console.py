# SPDX-License-Identifier: Apache-2.0
"""Events by hand: a console on a simulated disk where a person, or a script, decides what happens next, and looks at what came of it.

A script is the same lines in a file, with expectations: a test. It may not know the terminal, nor how the engine and the
device work inside.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from fvd.errors import FvdError
from fvd.format.geometry import PAGE_BYTES
from fvd.sim._device import CATEGORIES, WRITE
from fvd.sim._oracle import SECTOR_BYTES, Violation
from fvd.sim._rng import Rng
from fvd.sim.workbench import ERRORS, OPTIONS, BadCommand, Tracked, Workbench, span_of, words_of
from fvd.sim.world import EVENTS
from fvd.units import format_size

_NAMED = re.compile(r"([A-Za-z][\w-]*):\s+(.*)")
_BLOCKS = re.compile(r"\d{1,9}(-\d{1,9})?", re.ASCII)


class Unexpected(FvdError):
    """An expectation was not met."""


class ScriptError(FvdError):
    """A line of a script is wrong, or what it expects is not so."""


@dataclass(frozen=True, slots=True)
class Command:
    """How a command is written, and what it does. Lower-case words in `usage` are meant literally, which completion uses."""

    run: Callable[[Console, list[str]], list[str]]
    usage: str
    meaning: str
    changes: bool


COMMANDS: dict[str, Command] = {}
REQUESTS = {
    "write": "write FIRST COUNT [fua]",
    "read": "read FIRST COUNT",
    "zero": "zero FIRST COUNT [fua] [no-hole]",
    "trim": "trim FIRST COUNT [fua]",
    "flush": "flush",
    "close": "close",
}
_MEANINGS = {
    "write": "The guest writes sectors, each stamped with this request's name. Request commands can be named: a: write 0 8",
    "read": "The guest reads sectors; when it is done the oracle judges what it shows.",
    "zero": "The guest zeroes sectors.",
    "trim": "The guest trims sectors.",
    "flush": "The guest asks that everything acknowledged be durable.",
    "close": "The disk is closed. `reopen` opens it again.",
}
_Method = Callable[["Console", list[str]], list[str]]


def _command(usage: str, *, changes: bool = False) -> Callable[[_Method], _Method]:
    """A method of Console is a command. `changes`: it does something to the disk, and belongs to its history."""

    def note(method: _Method) -> _Method:
        COMMANDS[usage.split()[0]] = Command(method, usage, method.__doc__ or "", changes)
        return method

    return note


EXPECTATIONS = {"done", "waiting", "lost", "failed", "pending", "sectors", "volatile", "statistics", "error"}
WHAT = """\
WHAT is a request's name (its operations), an operation's number, all, or a kind of operation: read, base, write, journal, map,
flush, discard."""


class Console:
    """Commands, one line each, on one disk at a time. The same lines always do the same: so a disk can be taken back, or looked into by
    means that would disturb it, by playing its lines again."""

    def __init__(self, options: Mapping[str, str] | None = None) -> None:
        self.given = dict(options or {})
        self._put_on_stage(self.given)
        self._in_script = False

    def _put_on_stage(self, options: Mapping[str, str], lines: Iterable[str] = ()) -> None:
        self.bench = Workbench(options)
        self.options = dict(options)
        self.lines: list[str] = []  # that changed the disk, since it came on stage
        self.broken = ""
        self.marked: int | None = None
        for line in lines:
            self.run_line(line)

    def run_line(self, line: str) -> list[str]:
        """Do one line; returns what it prints. Raises BadCommand, Unexpected, or Violation, after which only looking is possible."""
        text = line.partition("#")[0].strip()
        match = _NAMED.fullmatch(text)
        name, rest = (match[1], match[2]) if match else ("", text)
        words = rest.split()
        if not words:
            return []
        command = COMMANDS.get(words[0])
        if command is None:
            raise BadCommand(f"there is no command {words[0]!r}; 'help' lists them")
        if name and words[0] not in REQUESTS:
            raise BadCommand(f"only requests have names: {', '.join(REQUESTS)}")
        if command.changes and self.broken:
            raise BadCommand(f"the disk is broken ({self.broken}); take it back with 'undo' or 'again'")
        try:
            output = command.run(self, [*words, name] if words[0] in REQUESTS else words[1:])
        except (BadCommand, Unexpected, ScriptError):
            raise
        except Exception as error:  # a violation, a disk that does not open, or something impossible in the engine or the device
            self.broken = str(error)
            raise
        if command.changes:
            self.lines.append(text)
        return output

    def twin(self) -> Console:
        """Another disk to which the same has happened."""
        twin = Console(self.options)
        for line in self.lines:
            twin.run_line(line)
        return twin

    # --- requests ---------------------------------------------------------------------------------------------------------

    def _request(self, words: list[str]) -> list[str]:
        kind, *rest, name = words
        first, count = 0, 0
        usage = REQUESTS[kind]
        if "FIRST" in usage:
            if len(rest) < 2:
                raise BadCommand(f"usage: {usage} (in sectors of {SECTOR_BYTES} bytes)")
            first, count = _number(rest.pop(0), kind), _number(rest.pop(0), kind)
            sectors = self.bench.stage.shape.sectors
            if not 0 < count <= sectors - first:
                raise BadCommand(f"the disk has sectors 0 to {sectors - 1}; {first}+{count} are not among them")
        flags = dict.fromkeys(rest, True)
        if wrong := [flag for flag in rest if f"[{flag}]" not in usage]:
            raise BadCommand(f"{kind} knows no {' '.join(wrong)}; usage: {usage}")
        if name in self.bench.requests:
            raise BadCommand(f"there is a request {name} already ({self.bench.requests[name].text}); choose another name")
        if name in (*CATEGORIES, "all", "zeros", "base", "foreign"):
            raise BadCommand(f"{name} means something else; choose another name")
        if self.bench.closing:
            raise BadCommand("the disk is closed; 'reopen' opens it again")
        name = name or self.bench.free_name(kind)
        return [f"{name}: submitted", *self.bench.submit(name, kind, first, count, **{flag.replace("-", "_"): True for flag in flags})]

    # --- events -----------------------------------------------------------------------------------------------------------

    def _select(self, word: str) -> list[Tracked]:
        """The operations that a word means, those that have completed too, in the order of submission."""
        bench = self.bench
        operations = list(bench.operations.values())
        if word.isdecimal():
            if _number(word, "pending") not in bench.operations:
                raise BadCommand(f"there is no operation {word} since the disk was opened; 'pending' lists them")
            return [bench.operations[int(word)]]
        if word == "all":
            return operations
        if word in CATEGORIES:
            return [tracked for tracked in operations if tracked.category == word]
        if word not in bench.requests:
            raise BadCommand(f"nothing is called {word!r}; 'requests' and 'pending' list what is")
        return [tracked for tracked in operations if bench.requests[word] in tracked.serves]

    def _pending(self, words: Sequence[str], verb: str) -> list[Tracked]:
        """The pending operations that words mean. Raises BadCommand when one of them means none."""
        if not words:
            raise BadCommand(f"{verb} what? 'pending' lists what there is; see 'help {verb}'")
        chosen: dict[Tracked, None] = {}
        for word in words:
            pending = [tracked for tracked in self._select(word) if not tracked.completed]
            if not pending:
                request = self.bench.requests.get(word)
                why = f": it is {request.state}" if request and request.state != "waiting" else ""
                raise BadCommand(f"{word} has no pending operation{why}")
            chosen |= dict.fromkeys(pending)
        return list(chosen)

    @_command("process WHAT...", changes=True)
    def _process(self, words: list[str]) -> list[str]:
        """Operations take effect: a write is seen by reads from now on."""
        chosen = [tracked for tracked in self._pending(words, "process") if not tracked.operation.took_effect]
        if not chosen:
            raise BadCommand(f"{' '.join(words)} has taken effect already")
        for tracked in chosen:
            self.bench.effect(tracked)
        return [f"{tracked} {'fails' if tracked.operation.result else 'takes effect'}" for tracked in chosen]

    @_command("persist WHAT [BLOCK...]", changes=True)
    def _persist(self, words: list[str]) -> list[str]:
        """Blocks of a write that took effect reach the medium by themselves: all, or those with these numbers within it (0, or 0-3)."""
        names = [word for index, word in enumerate(words) if not index or not _BLOCKS.fullmatch(word)]
        spans = [word for index, word in enumerate(words) if index and _BLOCKS.fullmatch(word)]
        if not words or (spans and len(names) > 1):
            raise BadCommand("usage: persist WHAT [BLOCK...]; blocks follow the one write that they belong to")
        size = self.bench.stage.device.logical_block_bytes
        chosen = [
            tracked
            for name in names
            for tracked in self._select(name)
            if tracked.operation.kind == WRITE and (not spans or tracked.operation.length_bytes >= size)
        ]
        if not chosen:
            raise BadCommand(f"{' '.join(names)} has written nothing; only writes persist")
        if waiting := [tracked for tracked in chosen if not tracked.operation.took_effect]:
            raise BadCommand(f"{waiting[0]} has not taken effect; 'process' it first")
        if spans and len(chosen) > 1:
            raise BadCommand(f"{names[0]} has {len(chosen)} writes; name one by its number")
        blocks = _numbers(spans, chosen[0].operation.length_bytes // size) if spans else None
        for tracked in chosen:
            self.bench.stage.device.persist(tracked.operation, blocks)
            tracked.persisted |= blocks is None
        which = f"{len(blocks)} blocks of " if blocks is not None else ""
        return [f"{which}{tracked} {'are' if which else 'is'} on the medium" for tracked in chosen]

    @_command("complete WHAT...", changes=True)
    def _complete(self, words: list[str]) -> list[str]:
        """Operations that took effect call back: the engine is told."""
        chosen = self._pending(words, "complete")
        if waiting := [tracked for tracked in chosen if not tracked.operation.took_effect]:
            raise BadCommand(f"{waiting[0]} has not taken effect; 'process' it first, or 'finish' it")
        return self._finish_all(chosen)

    def _finish_all(self, chosen: Iterable[Tracked]) -> list[str]:
        output = []
        for tracked in chosen:
            text = str(tracked)
            news = self.bench.finish(tracked)
            output += [f"{text} {'fails' if tracked.operation.result else 'completes'}", *news]
        return output

    @_command("finish WHAT...", changes=True)
    def _finish(self, words: list[str]) -> list[str]:
        """Operations take effect and complete; of a request also those that follow, until it has ended or waits for others."""
        self._pending(words, "finish")
        output = []
        for word in words:
            request = self.bench.requests.get(word)
            while chosen := [tracked for tracked in self._select(word) if not tracked.completed]:
                output += self._finish_all(chosen)
                if request is None:
                    break
        return output

    @_command("run", changes=True)
    def _run(self, words: list[str]) -> list[str]:
        """Everything that is not held takes effect and completes, and what follows from it, in the order of submission."""
        _no(words, "run")
        news = self.bench.run()
        held = [f"held: {tracked}" for tracked in self.bench.pending]
        waiting = [request.name for request in self.bench.requests.values() if request.state == "waiting"]
        return [*news, *held, *([f"waiting: {', '.join(waiting)}"] if waiting else [])] or ["nothing was under way"]

    @_command("step [N]", changes=True)
    def _step(self, words: list[str]) -> list[str]:
        """Events of the device by the stage's rng: one, or N."""
        output: list[str] = []
        for _ in range(_number(words[0], "step") if words else 1):
            if all(tracked.held for tracked in self.bench.pending):
                return [*output, "nothing can move" + (": the rest is held" if self.bench.pending else "")]
            output += self.bench.step()
        return output

    @_command("fail WHAT... [EIO|ENOSPC]", changes=True)
    def _fail(self, words: list[str]) -> list[str]:
        """Operations will fail when they take effect; of a write that fails, some blocks may have been written. One that took effect
        already will say that it failed."""
        error = "EIO"
        if words and words[-1] in ERRORS:
            *words, error = words
        chosen = self._pending(words, "fail")
        for tracked in chosen:
            self.bench.fail(tracked, ERRORS[error])
        return [f"{tracked}: {tracked.state}" for tracked in chosen]

    @_command("hold WHAT...", changes=True)
    def _hold(self, words: list[str]) -> list[str]:
        """'run' and 'step' leave these operations alone until they are released, or named."""
        return self._set_held(self._pending(words, "hold"), True)

    @_command("release WHAT...", changes=True)
    def _release(self, words: list[str]) -> list[str]:
        """Undo 'hold'."""
        return self._set_held(self._pending(words, "release"), False)

    def _set_held(self, chosen: list[Tracked], held: bool) -> list[str]:
        for tracked in chosen:
            tracked.held = held
            tracked.operation.held_until = 1 << 62 if held else 0
        return [f"{tracked}: {tracked.state}" for tracked in chosen]

    @_command("seed N", changes=True)
    def _seed(self, words: list[str]) -> list[str]:
        """Other rng for 'step', 'crash rng', 'kill rng' and failed writes."""
        stage = self.bench.stage
        stage.rng = stage.device.rng = Rng(_number(" ".join(words), "seed"), EVENTS)
        return []

    # --- ends of a life, and what lies outside it -------------------------------------------------------------------------

    @_command("crash [keep|drop|rng] [WHAT...]", changes=True)
    def _crash(self, words: list[str]) -> list[str]:
        """Power fails and the disk is opened again; the oracle judges every sector. Each volatile block becomes the newest of its contents
        (keep), the oldest (drop), or any (rng, the default); or the oldest but for the writes that are named (keep a 7)."""
        how, *names = words or ["rng"]
        if how not in ("keep", "drop", "rng") or (names and how != "keep"):
            raise BadCommand("usage: crash [keep|drop|rng], or crash keep WHAT...")
        if how == "rng":
            self.bench.crash_by_rng()
        elif names:
            kept = [tracked for name in names for tracked in self._select(name) if tracked.content]
            if not kept:
                raise BadCommand(f"{' '.join(names)} has written nothing that could be kept")
            self.bench.crash(kept)
        else:
            self.bench.crash(newest=how == "keep")
        return ["power fails; the disk is opened again and shows what it may"]

    @_command("kill [keep|drop|rng]", changes=True)
    def _kill(self, words: list[str]) -> list[str]:
        """The process dies and another opens the disk; the device goes on. Writes that have not taken effect do (keep), do not (drop), or
        as the rng say (rng, the default)."""
        how = " ".join(words) or "rng"
        if how not in ("keep", "drop", "rng"):
            raise BadCommand("usage: kill [keep|drop|rng]")
        self.bench.kill(how)
        return ["the process is killed; another opens the disk, which shows what it may"]

    @_command("reopen", changes=True)
    def _reopen(self, words: list[str]) -> list[str]:
        """Close the disk in peace if it is not closed, let power fail, and open it again."""
        _no(words, "reopen")
        if held := [tracked for tracked in self.bench.pending if tracked.held]:
            raise BadCommand(f"{held[0]} is held, and a close waits for it; 'release' it")
        return [*self.bench.reopen(), "closed and opened again"]

    @_command("check", changes=True)
    def _check(self, words: list[str]) -> list[str]:
        """Is the metadata whole? When nothing is under way, the disk is also read and judged."""
        _no(words, "check")
        return [self.bench.check()]

    @_command("grow", changes=True)
    def _grow(self, words: list[str]) -> list[str]:
        """The storage grows by one step."""
        _no(words, "grow")
        if not self.bench.stage.grow():
            return ["the storage has its greatest size"]
        return [f"the storage has {format_size(self.bench.stage.device.size_bytes)}", *self.bench.look()]

    @_command("exhausted on|off", changes=True)
    def _exhausted(self, words: list[str]) -> list[str]:
        """Whether the storage cannot grow."""
        if words not in (["on"], ["off"]):
            raise BadCommand("usage: exhausted on|off")
        self.bench.stage.set_exhausted(words == ["on"])
        return self.bench.look()

    @_command("clock SECONDS", changes=True)
    def _clock(self, words: list[str]) -> list[str]:
        """Time passes."""
        try:
            (seconds,) = map(float, words)
            self.bench.stage.device.advance(int(seconds * 1e9))
        except (ValueError, OverflowError):
            raise BadCommand("usage: clock SECONDS, for example clock 10") from None
        return self.bench.look()

    # --- other disks, and this one at another time ------------------------------------------------------------------------

    @_command("disk [OPTION=VALUE...]")
    def _disk(self, words: list[str]) -> list[str]:
        """Another disk comes on stage, empty. Without options: say what the present one is."""
        if not words:
            return [" ".join(f"{name}={value}" for name, value in self.options.items()) or "as 'help disk' says by default"]
        if wrong := [word for word in words if "=" not in word]:
            raise BadCommand(f"usage: disk OPTION=VALUE..., for example disk size=1M layout=raw; {wrong[0]!r} is none")
        pairs = (word.partition("=") for word in words)
        self._put_on_stage(self.given | {name: value for name, _, value in pairs})
        return []

    @_command("again")
    def _again(self, words: list[str]) -> list[str]:
        """The same disk as at the beginning, empty."""
        _no(words, "again")
        self._put_on_stage(self.options)
        return []

    @_command("mark")
    def _mark(self, words: list[str]) -> list[str]:
        """Remember this moment, for 'back'."""
        _no(words, "mark")
        self.marked = len(self.lines)
        return []

    @_command("back")
    def _back(self, words: list[str]) -> list[str]:
        """Everything is as it was at 'mark', as often as you like."""
        _no(words, "back")
        if self.marked is None:
            raise BadCommand("no moment is marked; 'mark' one")
        marked = min(self.marked, len(self.lines))
        self._put_on_stage(self.options, self.lines[:marked])
        self.marked = marked
        return []

    @_command("undo [N]")
    def _undo(self, words: list[str]) -> list[str]:
        """As if the last command (or the last N) that changed the disk had not been given."""
        count = _number(words[0], "undo") if words else 1
        if not self.broken and count > len(self.lines):
            raise BadCommand(f"there are {len(self.lines)} commands to take back since the disk came on stage")
        # What broke the disk is not among the lines that it goes through.
        keep = len(self.lines) - count + bool(self.broken)
        undone, marked = self.lines[keep:], self.marked
        self._put_on_stage(self.options, self.lines[: max(0, keep)])
        self.marked = marked
        return [f"undone: {line}" for line in undone]

    @_command("script SCRIPT")
    def _script(self, words: list[str]) -> list[str]:
        """Run the lines of a file, or of a script that comes with fvd, on this console."""
        if self._in_script or len(words) != 1:
            raise BadCommand("usage: script FILE; a script runs no other")
        return self.play(*find_script(words[0]))

    def play(self, name: str, text: str) -> list[str]:
        """The lines of a script, and what they print. Raises ScriptError or Violation that say where."""
        output = []
        self._in_script = True
        try:
            for number, line in enumerate(text.splitlines(), 1):
                output.append(line if line.startswith("#") or not line.strip() else f"> {line}")
                where = f"{name}:{number}: {line.strip()}"
                try:
                    output += self.run_line(line)
                except FvdError as error:
                    raise ScriptError(f"{where}: {error}") from error
                except Violation as error:
                    raise Violation(f"{where}: {error}") from error
                except Exception as error:
                    error.add_note(where)
                    raise
        finally:
            self._in_script = False
        return output

    # --- looking ----------------------------------------------------------------------------------------------------------

    @_command("pending [WHAT...]")
    def _list_pending(self, words: list[str]) -> list[str]:
        """The device's operations under way: number, kind, place, state, and the requests that wait for them if known."""
        chosen = self._pending(words, "pending") if words else self.bench.pending
        rows = [
            [
                str(tracked.operation.number),
                tracked.category + (" (fua)" if tracked.operation.durable and tracked.category == "write" else ""),
                tracked.place,
                tracked.state,
                ", ".join(request.name for request in tracked.serves),
            ]
            for tracked in chosen
        ]
        return _table([["", "kind", "place", "state", "for"], *rows]) if rows else ["nothing is pending"]

    @_command("requests")
    def _list_requests(self, words: list[str]) -> list[str]:
        """The guest's requests since the disk came on stage, and what became of them."""
        _no(words, "requests")
        return _table([[request.name, request.text, request.state] for request in self.bench.requests.values()])

    def volatile(self) -> list[tuple[int, list[bytes]]]:
        """What a crash may leave of each block, as SimulatedDevice.volatile says."""
        # The device can say it only by giving up. What writes under way write lies in buffers of the twin, which must live so long.
        twin = self.twin()
        return twin.bench.stage.device.volatile()

    @_command("volatile")
    def _list_volatile(self, words: list[str]) -> list[str]:
        """The blocks that a crash may change: what the medium holds, and what else it may hold after a crash now. Writes that have not
        taken effect are counted, for they may have reached the medium."""
        _no(words, "volatile")
        bench = self.bench
        size = bench.stage.device.logical_block_bytes
        rows: list[tuple[int, int, list[str]]] = []
        for offset, contents in sorted(self.volatile()):
            if offset >= bench.stage.geometry.data_offset_bytes:
                names = [", ".join(dict.fromkeys(bench.name(int(word)) for word in words_of(content)[:, 0])) for content in contents]
            else:
                names = ["old", *("new" for _ in contents[1:])]
            unit = bench.place(offset, PAGE_BYTES) if offset < bench.stage.geometry.data_offset_bytes else ""
            first = rows[-1] if rows else None
            if first and first[0] + first[1] == offset and first[2] == [unit, *names]:
                rows[-1] = (first[0], first[1] + size, first[2])
            else:
                rows.append((offset, size, [unit, *names]))
        table = [[unit or bench.place(offset, length), names[0], ", ".join(names[1:])] for offset, length, (unit, *names) in rows]
        return _table([["place", "on the medium", "or after a crash"], *table]) if table else ["every block is on the medium"]

    @_command("show")
    def _show(self, words: list[str]) -> list[str]:
        """Draw the disk: which chunks are where, what is volatile, what each sector would show to a read now."""
        _no(words, "show")
        bench = self.bench
        geometry = bench.stage.geometry
        output = [
            f"{format_size(geometry.virtual_size_bytes)}, {bench.stage.shape.sectors} sectors, {geometry.layout.name.lower()}; "
            f"chunks of {geometry.chunk_size_bytes // SECTOR_BYTES} sectors, blocks of {geometry.block_size_bytes // SECTOR_BYTES}",
            *self._maps([]),
        ]
        volatile = len(self.volatile())
        output += [f"volatile: {volatile} blocks, see 'volatile'" if volatile else "volatile: nothing", "sectors"]
        return output + _table([["", span_of(first, count), name] for first, count, name in bench.runs(bench.visible(), 0)])

    @_command("maps")
    def _maps(self, words: list[str]) -> list[str]:
        """Which chunks have a slot of the storage, and which of their blocks are stored there: # stored, b from the base, . zeros."""
        _no(words, "maps")
        bench = self.bench
        stored = bench.stored()
        rest = bench.stage.geometry.chunks - len(stored)
        whole = "zeros" if bench.stage.shape.base_bytes is None else "the base"
        rows = [[f"chunk {chunk}", f"slot {slot}", f"[{blocks}]"] for chunk, (slot, blocks) in stored.items()]
        return _table(rows) + ([f"{rest} chunks without storage show {whole}, or zeros that were asked for"] if rest else [])

    @_command("statistics")
    def _statistics(self, words: list[str]) -> list[str]:
        """What the engine counts since the disk was opened."""
        _no(words, "statistics")
        return _table([[name, str(number)] for name, number in self.bench.numbers().items()])

    @_command("log [N]")
    def _log(self, words: list[str]) -> list[str]:
        """The last 20 events, or N: requests, what the device got and completed, ends of lives."""
        count = _number(words[0], "log") if words else 20
        return self.bench.log[-count:] if count else []

    # --- expectations -------------------------------------------------------------------------------------------------------

    @_command("expect EXPECTATION")
    def _expect(self, words: list[str]) -> list[str]:
        """Fail unless something is so:
        expect done NAME...  expect waiting NAME...  expect lost NAME...  expect failed NAME... [EIO|ENOSPC|ESHUTDOWN]
        expect pending [WHAT] N: so many operations are under way
        expect sectors FIRST COUNT NAME|zeros|base: a read now would show in each of them one of these
        expect volatile N: so many blocks may be changed by a crash
        expect statistics COUNTER N
        expect error COMMAND: the command cannot be done"""
        what, *rest = words or [""]
        if what in ("done", "waiting", "failed", "lost") and rest:
            self._expect_states(what, rest)
        elif what == "pending" and 1 <= len(rest) <= 2:
            *which, number = rest
            chosen = [tracked for tracked in (self._select(which[0]) if which else self.bench.pending) if not tracked.completed]
            _expect_number("operations are pending", _number(number, "expect"), len(chosen), [str(tracked) for tracked in chosen])
        elif what == "sectors" and len(rest) == 3:
            self._expect_sectors(_number(rest[0], "expect"), _number(rest[1], "expect"), rest[2].split("|"))
        elif what == "volatile" and len(rest) == 1:
            _expect_number("blocks are volatile", _number(rest[0], "expect"), len(self.volatile()), [])
        elif what == "statistics" and len(rest) == 2:
            numbers = self.bench.numbers()
            if rest[0] not in numbers:
                raise BadCommand(f"nothing counts {rest[0]!r}; 'statistics' lists what is counted")
            _expect_number(rest[0], _number(rest[1], "expect"), numbers[rest[0]], [])
        elif what == "error" and rest:
            self._expect_error(" ".join(rest))
        else:
            raise BadCommand("there is no such expectation; see 'help expect'")
        return []

    def _expect_states(self, state: str, names: list[str]) -> None:
        if state == "failed" and names[-1] in errno.errorcode.values():
            *names, error = names
            state = f"failed {error}"
        if not names:
            raise BadCommand("which request? usage: expect failed NAME... [EIO|ENOSPC|ESHUTDOWN]")
        for name in names:
            request = self.bench.requests.get(name)
            if request is None:
                raise BadCommand(f"there is no request {name!r}; 'requests' lists them")
            if request.state != state and not (state == "failed" and request.state.startswith(state)):
                raise Unexpected(f"{name} is not {state}, but {request.state}")

    def _expect_sectors(self, first: int, count: int, names: list[str]) -> None:
        if not 0 < count <= self.bench.stage.shape.sectors - first:
            raise BadCommand(f"the disk has {self.bench.stage.shape.sectors} sectors; {first}+{count} are not among them")
        for name in names:
            if name not in ("zeros", "base") and not getattr(self.bench.requests.get(name), "number", 0):
                raise BadCommand(f"{name!r} has written nothing; sectors show zeros, base, or a request that writes")
        shown = self.bench.visible()[first * SECTOR_BYTES : (first + count) * SECTOR_BYTES]
        runs = self.bench.runs(shown, first)
        if wrong := [(start, number, name) for start, number, name in runs if name not in names]:
            shows = ", ".join(f"{span_of(start, number)} {name}" for start, number, name in wrong)
            raise Unexpected(f"sectors {span_of(first, count)} do not show {' or '.join(names)} everywhere: {shows}")

    def _expect_error(self, line: str) -> None:
        try:
            self.run_line(line)
        except BadCommand:
            return
        raise Unexpected(f"{line!r} could be done")

    # --- help -------------------------------------------------------------------------------------------------------------

    @_command("help [COMMAND]")
    def _help(self, words: list[str]) -> list[str]:
        """All commands, or one of them."""
        if not words:
            rows = [[command.usage, _sentences(command.meaning)[0]] for command in COMMANDS.values()]
            return [*_table(rows), "", *WHAT.splitlines(), "# begins a comment."]
        if words[0] not in COMMANDS:
            raise BadCommand(f"there is no command {words[0]!r}; 'help' lists them")
        command = COMMANDS[words[0]]
        more = WHAT.splitlines() if "WHAT" in command.usage else []
        if words[0] == "disk":
            more = _table([[f"  {name}={'|'.join(option.values)}", option.meaning] for name, option in OPTIONS.items()])
        elif words[0] == "script":
            more = [f"With fvd come {', '.join(shipped_scripts())}."]
        return [command.usage, *(line.strip() for line in command.meaning.splitlines()), *more]

    def completions(self, before: str, text: str) -> list[str]:
        """What may stand for the word `text`, which has been begun, after `before` on its line."""
        words = before.split()
        if words and words[0].endswith(":"):
            words = words[1:]
        if not words:
            candidates = [f"{name} " for name in COMMANDS]
        elif words[0] == "disk":
            name = words[-1].removesuffix("=")
            if before.endswith("="):
                candidates = [f"{value} " for value in OPTIONS[name].values] if name in OPTIONS else []
            else:
                candidates = [f"{option}=" for option in OPTIONS]
        else:
            candidates = [f"{word} " for word in self._words_after(words)]
        return sorted(word for word in candidates if word.startswith(text))

    def _words_after(self, words: list[str]) -> Iterable[str]:
        command = COMMANDS.get(words[0])
        if command is None:
            return []
        arguments = command.usage.partition(" ")[2]
        candidates = set(re.findall(r"[a-z][a-z-]+|EIO|ENOSPC", arguments))
        if "WHAT" in arguments:
            pending = self.bench.pending
            candidates |= {"all", *(str(tracked.operation.number) for tracked in pending), *(tracked.category for tracked in pending)}
            kept = self.bench.operations.values() if words[0] in ("persist", "crash") else pending
            candidates |= {request.name for tracked in kept for request in tracked.serves}
        if "EXPECTATION" in arguments and len(words) == 1:
            candidates |= EXPECTATIONS
        elif "EXPECTATION" in arguments:
            kinds = {"statistics": {*self.bench.numbers()}, "error": {*COMMANDS}, "sectors": {"zeros", "base", *self.bench.requests}}
            candidates |= kinds.get(words[1], {*self.bench.requests})
        if "COMMAND" in arguments:
            candidates |= {*COMMANDS}
        if "SCRIPT" in arguments:
            candidates |= {*shipped_scripts()}
        return candidates


for _kind, _usage in REQUESTS.items():
    COMMANDS[_kind] = Command(Console._request, _usage, _MEANINGS[_kind], True)
# Requests first: `help` lists them in this order.
COMMANDS = {name: COMMANDS[name] for name in (*REQUESTS, *(name for name in COMMANDS if name not in REQUESTS))}


# --- pieces -------------------------------------------------------------------------------------------------------------


def _sentences(text: str) -> list[str]:
    """Its lines as one, cut where the first sentence or clause ends."""
    return re.split(r"(?<=\.)\s|:\s|;\s", " ".join(text.split()))


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _no(words: list[str], command: str) -> None:
    if words:
        raise BadCommand(f"{command} takes no more arguments: {' '.join(words)!r}")


def _number(text: str, command: str) -> int:
    if not text.isdecimal() or len(text) > 18:
        raise BadCommand(f"{command}: {text!r} is not a valid number; see 'help {command}'")
    return int(text)


def _numbers(spans: Iterable[str], count: int) -> list[int]:
    """Blocks 0-3 7, below `count`."""
    numbers: list[int] = []
    for span in spans:
        first, _, last = span.partition("-")
        numbers += range(int(first), int(last or first) + 1)
        if not numbers or numbers[-1] >= count:
            raise BadCommand(f"blocks {span}: the write has blocks 0 to {count - 1}")
    return numbers


def _expect_number(what: str, wanted: int, count: int, which: Sequence[str]) -> None:
    if wanted != count:
        raise Unexpected(f"{what}: {count}, not {wanted}{f' ({chr(44).join(which)})' if which else ''}")


# --- scripts ------------------------------------------------------------------------------------------------------------

SUFFIX = ".fvd"


@dataclass(frozen=True, slots=True)
class ScriptResult:
    """What a script that kept all its promises printed."""

    name: str
    output: list[str]


def shipped_scripts() -> list[str]:
    """The names of the scripts that come with fvd."""
    folder = resources.files("fvd.sim") / "scripts"
    return sorted(entry.name.removesuffix(SUFFIX) for entry in folder.iterdir() if entry.name.endswith(SUFFIX))


def find_script(script: str) -> tuple[str, str]:
    """(name, text) of one that comes with fvd, by its name, or of a file. Raises BadCommand."""
    if script in shipped_scripts():
        name = f"{script}{SUFFIX}"
        return name, (resources.files("fvd.sim") / "scripts" / name).read_text("utf-8")
    try:
        return script, Path(script).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise BadCommand(f"{script}: {why}; name a file, or one of {', '.join(shipped_scripts())}") from None


def run_script(script: str, options: Mapping[str, str] | None = None) -> ScriptResult:
    """Run a script on a disk with these options of `disk`, unless it chooses its own. Raises BadCommand, ScriptError or Violation."""
    name, text = find_script(script)
    return ScriptResult(name, Console(options).play(name, text))
