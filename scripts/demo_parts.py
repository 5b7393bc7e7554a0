# SPDX-License-Identifier: Apache-2.0
"""What the demo's two stories share: narration, a client that knows what it wrote, the server, a guest's file system.

`scripts/demo` tells the story on a file, `demo_lvm.py` the one on a volume group.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

try:
    import nbd
except ImportError:
    sys.exit("the demo's client needs libnbd for Python: apt-get install python3-libnbd, and PYTHON=/usr/bin/python3 for the venv")

ROOT = Path(__file__).resolve().parent.parent
FVD_LV = [sys.executable, "-m", "fvd.cli"]
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
PAGE = 4096
CHUNK = MIB
IN_FLIGHT = 16
FLUSH_EVERY_PIECES = 256

TIMES: list[tuple[str, str]] = []
CHECKS: list[str] = []
SERVERS: list[subprocess.Popen[str]] = []


# --- Narration ---------------------------------------------------------------------------------------------------------------


def title(text: str) -> None:
    print(f"\n=== {text}\n", flush=True)


def say(text: str) -> None:
    print(f"    {text}", flush=True)


def holds(condition: bool, claim: str) -> None:
    """A claim that the demo makes: shown as true, or the end."""
    if not condition:
        print(f"\nMISMATCH: not true that {claim}", flush=True)
        sys.exit(1)
    CHECKS.append(claim)
    print(f"  ✓ {claim}", flush=True)


def size(value: float) -> str:
    return f"{value / GIB:.2f} GiB" if value >= GIB else f"{value / MIB:.1f} MiB" if value >= MIB else f"{value / KIB:.0f} KiB"


@contextlib.contextmanager
def timed(what: str, amount: int = 0) -> Iterator[None]:
    begin = time.monotonic()
    yield
    seconds = time.monotonic() - begin
    TIMES.append((what, f"{seconds:.2f} s" + (f", {amount / MIB / seconds:.0f} MiB/s" if amount else "")))


def show_times(heading: str) -> None:
    title(heading)
    width = max(len(what) for what, _ in TIMES)
    for what, value in TIMES:
        say(f"{what:<{width}}  {value}")


def shown(command: list[str]) -> str:
    return shlex.join(command).replace(shlex.join(FVD_LV), "fvd-lv")


def words(command: tuple[str, ...]) -> list[str]:
    return [*FVD_LV, *command[1:]] if command[0] == "fvd-lv" else list(command)


def run(*command: str, quiet: bool = False, expect: int = 0) -> str:
    line = words(command)
    if not quiet:
        print(f"$ {shown(line)}", flush=True)
    with subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            output, _ = process.communicate()
        except BaseException:
            # Not SIGKILL: what it has begun (an lvcreate, say) would go on without it.
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()
            raise
    if not quiet or process.returncode != expect:
        print("".join(f"    {line}\n" for line in output.splitlines()), end="", flush=True)
    if process.returncode != expect:
        print(f"\nMISMATCH: {shown(line)} ended with {process.returncode}, expected {expect}", flush=True)
        sys.exit(1)
    return output


def answer(*command: str) -> Any:
    """The JSON that a command prints; not shown."""
    done = subprocess.run(words(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{shown(words(command))} ended with {done.returncode}")
    return json.loads(done.stdout)


def info(volume: str) -> dict[str, Any]:
    facts: dict[str, Any] = answer("fvd-lv", "info", volume, "--output", "json")
    return facts


# --- The client: every 4 KiB page that it writes says where it belongs -----------------------------------------------------------

NOISE: npt.NDArray[np.uint8] = np.random.default_rng(2011).integers(0, 256, MIB, dtype=np.uint8)
PAGE_OFFSETS = np.arange(MIB // PAGE, dtype=np.uint64) * np.uint64(PAGE)


def fill(memory: npt.NDArray[np.uint8], offset: int) -> None:
    """What belongs into the disk at this offset."""
    memory[:] = NOISE[: memory.size]
    memory.reshape(-1, PAGE)[:, :8].view("<u8")[:, 0] = PAGE_OFFSETS[: memory.size // PAGE] + np.uint64(offset)


class Transfer:
    """One request under way, and its memory, which is used again."""

    def __init__(self, piece: int) -> None:
        memory = bytearray(piece)
        self.bytes: npt.NDArray[np.uint8] = np.frombuffer(memory, np.uint8)
        self.buffer = nbd.Buffer.from_buffer(memory)
        self.cookie = 0
        self.writes = False
        self.offset = 0
        self.begun = 0.0


class Client:
    """Keeps 16 requests in flight, and knows which of its writes a flush has covered, and which were answered since.

    Each request is for ``piece`` bytes. ``rate``: no more requests than that in a second; None: as many as the disk takes.
    """

    UNPACED_BEFORE_KILL = 64

    def __init__(self, uri: str, places: list[int], piece: int = MIB, rate: float | None = None) -> None:
        self.handle = nbd.NBD()
        self.handle.connect_uri(uri)
        self.places = places
        self.piece = piece
        self.rate = rate
        self.flushed: list[int] = []  # durable, whatever happens now
        self.answered: list[int] = []  # since then: there as long as the host lives
        self.acknowledged = 0
        self.slowest = 0.0
        self.free = [Transfer(piece) for _ in range(IN_FLIGHT)]
        self.pending: list[Transfer] = []

    def write(self, pieces: int, kill_after: tuple[int, subprocess.Popen[str]] | None = None) -> None:
        """Writes the next pieces, a flush after every 256. ``kill_after``: kill -9 that server once so many were acknowledged."""
        self.acknowledged = 0
        begin = time.monotonic()
        # The last writes before a kill are not held back, so that it finds as many in flight as there can be.
        paced = pieces if kill_after is None else kill_after[0] - self.UNPACED_BEFORE_KILL
        for number in range(pieces):
            if self.rate is not None and number % IN_FLIGHT == 0 and number < paced:
                self._rest_until(begin + number / self.rate)
            if not self.free:
                self._end_oldest()
            if kill_after is not None and self.acknowledged >= kill_after[0]:
                kill_after[1].kill()
            transfer = self.free.pop()
            transfer.writes, transfer.offset = True, self.places.pop()
            fill(transfer.bytes, transfer.offset)
            transfer.begun = time.monotonic()
            transfer.cookie = self.handle.aio_pwrite(transfer.buffer, transfer.offset)
            self.pending.append(transfer)
            if number % FLUSH_EVERY_PIECES == FLUSH_EVERY_PIECES - 1:
                self._flush()
        self._flush()

    def verify(self, offsets: list[int]) -> None:
        """Everything there reads back as it was written."""
        expected = np.empty(self.piece, np.uint8)
        for offset in [*offsets, None]:
            while self.pending and (offset is None or not self.free):
                transfer = self._end_oldest()
                fill(expected, transfer.offset)
                if not np.array_equal(transfer.bytes, expected):
                    holds(False, f"the acknowledged {size(self.piece)} at offset {transfer.offset} are there")
            if offset is not None:
                transfer = self.free.pop()
                transfer.writes, transfer.offset, transfer.begun = False, offset, time.monotonic()
                transfer.cookie = self.handle.aio_pread(transfer.buffer, offset)
                self.pending.append(transfer)

    def judge(self, offsets: list[int]) -> tuple[int, int]:
        """Of what was written and not answered: how many sectors are new, and how many old (zeros); anything else ends the demo."""
        new = old = 0
        expected = np.empty(self.piece, np.uint8)
        for offset in offsets:
            sectors = np.frombuffer(self.handle.pread(self.piece, offset), np.uint8).reshape(-1, 512)
            fill(expected, offset)
            is_new = (sectors == expected.reshape(-1, 512)).all(axis=1)
            is_old = ~sectors.any(axis=1)
            if not (is_new | is_old).all():
                holds(False, f"the unanswered sectors of the {size(self.piece)} at offset {offset} are old or new, nothing else")
            new, old = new + int(is_new.sum()), old + int(is_old.sum())
        return new, old

    @property
    def unanswered(self) -> list[int]:
        """What was under way when the server died."""
        return [transfer.offset for transfer in self.pending]

    def close(self) -> None:
        self.handle.shutdown()

    def _end_oldest(self) -> Transfer:
        """Waits for the oldest request."""
        transfer = self.pending[0]
        while not self.handle.aio_command_completed(transfer.cookie):
            self.handle.poll(-1)
        self._ended()
        return transfer

    def _ended(self) -> None:
        transfer = self.pending.pop(0)
        if transfer.writes:
            self.answered.append(transfer.offset)
        self.slowest = max(self.slowest, time.monotonic() - transfer.begun)
        self.acknowledged += 1
        self.free.append(transfer)

    def _rest_until(self, due: float) -> None:
        """Answers are taken meanwhile: what is measured is the disk, not the rest."""
        while (left := due - time.monotonic()) > 0:
            if not self.pending:
                time.sleep(left)
            elif self.handle.aio_command_completed(self.pending[0].cookie):
                self._ended()
            else:
                self.handle.poll(int(left * 1000) + 1)

    def _flush(self) -> None:
        while self.pending:
            self._end_oldest()
        self.handle.flush()
        self.flushed += self.answered
        self.answered.clear()


def file_places(step: int) -> list[int]:
    """The places of the pieces, last first: files of some hundred MiB, one after the other, anywhere but at the disk's beginning."""
    slots = list(range(2 * GIB, 99 * GIB - step // 16, step // 16))
    random.Random(2011).shuffle(slots)
    return [place for start in slots for place in range(start, start + step // 16 // CHUNK * CHUNK, CHUNK)][::-1]


# --- The server ----------------------------------------------------------------------------------------------------------------


def start_server(volume: str, socket: Path, log: Path | None = None) -> tuple[subprocess.Popen[str], str]:
    """``log``: where its notes go, if not here."""
    command = [*FVD_LV, "serve", volume, "--socket", str(socket)]
    print(f"$ {shown(command)}{f' 2>> {log}' if log else ''} &", flush=True)
    begin = time.monotonic()
    with log.open("a") if log else contextlib.nullcontext() as notes:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=notes, text=True)
    SERVERS.append(server)
    assert server.stdout is not None
    uri = server.stdout.readline().strip()
    if not uri:
        print(log.read_text() if log else "", end="")
        holds(False, f"the server starts (it ended with {server.wait()})")
    say(uri)
    TIMES.append(("serve, from the command to its URI", f"{time.monotonic() - begin:.2f} s"))
    return server, uri


def stop_server(server: subprocess.Popen[str]) -> None:
    print(f"$ kill -TERM {server.pid}", flush=True)
    begin = time.monotonic()
    server.terminate()
    holds(server.wait(60) == 0, "SIGTERM ends the server cleanly, exit code 0")
    TIMES.append(("clean close", f"{time.monotonic() - begin:.2f} s"))


def end_servers() -> None:
    """Whatever still runs of ours, at the end of a story that went wrong."""
    for server in SERVERS:
        if server.poll() is None:
            server.terminate()
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


# --- A guest's file system -------------------------------------------------------------------------------------------------------


def make_base(folder: Path, length: int) -> tuple[Path, Path]:
    """An ext4 with real files, and what a guest would make of it later: the same with one more file."""
    content_dir = folder / "content"
    shutil.copytree(ROOT / "fvd", content_dir / "fvd", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copytree(Path(os.__file__).parent / "encodings", content_dir / "encodings", ignore=shutil.ignore_patterns("__pycache__"))
    base, guest = folder / "base.img", folder / "guest-view.img"
    run("mke2fs", "-q", "-t", "ext4", "-d", str(content_dir), str(base), f"{length // MIB}M")
    base.chmod(0o444)
    say(f"{base.name}: an ext4 of {size(length)}, read-only, with {sum(path.is_file() for path in content_dir.rglob('*'))} files")
    run("cp", "--sparse=always", str(base), str(guest), quiet=True)
    guest.chmod(0o600)
    (folder / "letter.txt").write_text("Written by the guest, flushed before the crash.\n" * 1000)
    run("debugfs", "-w", "-R", f"write {folder / 'letter.txt'} letter.txt", str(guest), quiet=True)
    return base.relative_to(folder), guest.relative_to(folder)


def guest_writes(uri: str, base: Path, guest: Path) -> None:
    """What a guest's file system does to its disk: small writes in the middle of what shows through from the base, then a flush."""
    print("$ # a guest writes a file into the file system of its disk", flush=True)
    handle = nbd.NBD()
    handle.connect_uri(uri)
    written = 0
    with base.open("rb") as old, guest.open("rb") as new:
        for offset in range(0, base.stat().st_size, MIB):
            before, after = old.read(MIB), new.read(MIB)
            if before == after:
                continue
            for begin in range(0, len(before), PAGE):
                if before[begin : begin + PAGE] != after[begin : begin + PAGE]:
                    handle.pwrite(after[begin : begin + PAGE], offset + begin)
                    written += 1
    handle.flush()
    handle.shutdown()
    say(f"{written} pages of 4 KiB, in the middle of blocks that were still in the base, then a flush")


def export_and_check(socket: Path, guest: Path, show_rate: bool = True) -> None:
    """The guest's file system out of the disk: whole, with its letter, and byte by byte what the guest made of it."""
    out, length = Path("export.img"), guest.stat().st_size
    source = json.dumps({"driver": "raw", "offset": 0, "size": length,
                         "file": {"driver": "nbd", "server": {"type": "unix", "path": str(socket)}}})  # fmt: skip
    with timed("export of the file system (qemu-img convert)", length if show_rate else 0):
        run("qemu-img", "convert", "-O", "raw", f"json:{source}", str(out))
    run("e2fsck", "-f", "-n", str(out))
    holds(True, "e2fsck finds the file system whole")
    run("debugfs", "-R", "dump letter.txt letter-read.txt", str(out))
    holds(
        Path("letter-read.txt").read_bytes() == Path("letter.txt").read_bytes(),
        "the guest's file, flushed before the crash, is in it, byte by byte",
    )
    holds(out.read_bytes() == guest.read_bytes(), "and so is every other byte of that file system")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- Parts of both stories -------------------------------------------------------------------------------------------------------


def kill_in_mid_load(load: Client, server: subprocess.Popen[str], after: int = 600) -> None:
    print(f"$ kill -9 {server.pid}   # after {after} more writes, {IN_FLIGHT} of them in flight", flush=True)
    try:
        load.write(after + 400, kill_after=(after, server))
        holds(False, "the client noticed that its server is gone")
    except nbd.Error as error:
        say(f"the client's next request: {error.string}")
    holds(server.wait() == -signal.SIGKILL, "the server is dead, and closed nothing")


def verify_after_crash(load: Client, uri: str, show_rate: bool = True) -> None:
    """All that was answered is there, flushed or not; of the rest each sector is old or new."""
    acknowledged = load.flushed + load.answered
    amount = len(acknowledged) * load.piece
    reader = Client(uri, [], load.piece)
    with timed("verification of everything acknowledged", amount if show_rate else 0):
        reader.verify(acknowledged)
    new, old = reader.judge(load.unanswered)
    reader.close()
    unflushed = size(len(load.answered) * load.piece)
    holds(True, f"all {size(amount)} that were acknowledged read back as written, {unflushed} of them never flushed")
    unanswered = size(len(load.unanswered) * load.piece)
    holds(True, f"of {unanswered} that were not answered, each sector is new ({new}) or old ({old}), nothing else")
