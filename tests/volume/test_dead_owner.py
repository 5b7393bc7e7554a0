# SPDX-License-Identifier: Apache-2.0
"""What a killed process left under way in the kernel: nobody gets the disk before it has ended, and then everybody (rule R35).

On a device that holds single writes back the rule is also taken away: a write of a dead process is seen to land on its successor's.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from held_back import HeldBack, held_back_device
from loops import loop_device, mounted, run, sparse

import fvd
from fvd.device import claim as claim_module
from fvd.device.claim import claim
from fvd.device.holders import is_ending
from fvd.errors import InUse
from fvd.lvm.runner import run_command

pytestmark = pytest.mark.release_only

MIB = 1 << 20
BLOCK = 64 << 10
LONG_SECONDS = 60  # for what takes a moment
STANDING_SECONDS = 2.0  # for so long a device is held; more than the limit below
OLD, NEW = b"o" * BLOCK, b"n" * BLOCK

# Opens the disk, maps a block, and on a line from outside writes it again, or flushes.
OWNER = """
import sys, threading
import fvd, fvd.disk.opening as opening
volume, cache, shares, flushes = sys.argv[1], sys.argv[2], sys.argv[3] == "shares", sys.argv[4] == "flushes"
if not shares:  # the bug: transfers go through an open file of their own
    real = opening.open_node
    opening.open_node = lambda path, *, sharing=None, **options: real(path, **options)
disk = fvd.open(volume, cache=cache)
disk.pwrite(0, b"first" * 100)
disk.flush()
if flushes:
    disk.pwrite(1 << 20, b"new")  # the flush has something to commit
print("ready", flush=True)
sys.stdin.readline()
threading.Thread(target=disk.flush if flushes else lambda: disk.pwrite(0, b"o" * 65536)).start()
print("sent", flush=True)
threading.Event().wait()
"""


@pytest.fixture(autouse=True)
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim_module, "_GHOST_SECONDS", 1.0)
    monkeypatch.setattr(claim_module, "_TELL_SECONDS", 0.2)


@contextlib.contextmanager
def owner(volume: str, cache: str = "none", *, shares: bool = True, flushes: bool = False) -> Iterator[subprocess.Popen[str]]:
    """A process that has the disk open. `write_again` makes it submit."""
    words = [sys.executable, "-c", OWNER, volume, cache, "shares" if shares else "", "flushes" if flushes else ""]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert line_of(process) == "ready\n"
            yield process
        finally:
            process.kill()


def write_again(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    assert line_of(process) == "sent\n"


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], LONG_SECONDS)[0], "it says nothing"
    return process.stdout.readline()


class Successor:
    """Opens the disk in a thread and writes to it."""

    def __init__(self, volume: str, *, read_only: bool = False) -> None:
        self.opened, self.wrote = threading.Event(), threading.Event()
        self.found = b""
        self._volume, self._read_only = volume, read_only
        self._release = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            with fvd.open(self._volume, read_only=self._read_only) as disk:
                self.opened.set()
                if not self._read_only:
                    disk.pwrite(0, NEW)
                    disk.flush()
                self.wrote.set()
                self._release.wait(LONG_SECONDS)
                self.found = disk.pread(0, BLOCK)
        except BaseException as failure:
            self._failure = failure

    def end(self) -> bytes:
        """What the disk shows at last."""
        if self._failure is None:
            self.wrote.wait(LONG_SECONDS)
        self._release.set()
        self._thread.join(LONG_SECONDS)
        assert not self._thread.is_alive()
        if self._failure is not None:
            raise self._failure
        return self.found


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LONG_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def device(tmp_path: Path) -> Iterator[HeldBack]:
    with held_back_device(tmp_path / "below", 64 * MIB) as held:
        fvd.provision(held.device, "32M", journal_size="1M")
        yield held


def succeed(device: HeldBack, *, shares: bool, read_only: bool = False) -> tuple[bool, bytes]:
    """The owner is killed while its last write is held back. Whether its successor comes before that ends, and what it reads."""
    with owner(device.device, shares=shares) as process:
        device.hold()
        write_again(process)
        wait_until(device.held)
        device.let_pass()
        process.kill()
        process.wait(LONG_SECONDS)  # it is gone, and its write is not
        assert device.held()
        successor = Successor(device.device, read_only=read_only)
        early = successor.opened.wait(STANDING_SECONDS)
        if early:
            assert successor.wrote.wait(LONG_SECONDS)
        device.release()
        return early, successor.end()


def test_no_write_of_a_dead_owner_lands_on_its_successors(device: HeldBack, caplog: pytest.LogCaptureFixture) -> None:
    early, found = succeed(device, shares=True)
    assert not early
    assert found == NEW
    assert [record.getMessage() for record in caplog.records if "waiting for" in record.getMessage()] == [
        f"{device.device}: waiting for the operations that a process which is gone left under way"
    ]


def test_a_read_only_open_waits_too(device: HeldBack) -> None:
    early, found = succeed(device, shares=True, read_only=True)
    assert not early
    assert found == OLD


def test_without_the_rule_it_does(device: HeldBack) -> None:
    """The seeded bug of R35: transfers through an open file other than the claim's."""
    early, found = succeed(device, shares=False)
    assert early
    assert found == OLD, "acknowledged and flushed by the successor, and overwritten by a dead process"


@pytest.mark.alone
def test_a_living_owner_is_named_at_once_whatever_its_device_does(device: HeldBack) -> None:
    with owner(device.device) as process:
        device.hold()
        write_again(process)
        wait_until(device.held)
        began = time.monotonic()
        with pytest.raises(InUse, match=f"process {process.pid}"):
            claim(device.device)
        assert time.monotonic() - began < 0.9
        device.release()


def test_who_looks_at_a_device_that_stands_is_not_its_owner(device: HeldBack) -> None:
    """udev reads what a killed writer has closed, and waits as long as the device stands."""
    with owner(device.device) as process:
        device.hold()
        write_again(process)
        wait_until(device.held)
        process.kill()
        process.wait(LONG_SECONDS)
        writes = device.held()
        device.hold_reads()
        with subprocess.Popen(["dd", f"if={device.device}", "of=/dev/null", "bs=4096", "count=1", "iflag=direct", "status=none"]) as prober:
            wait_until(lambda: device.held() > writes)
            threading.Timer(STANDING_SECONDS, lambda: (device.let_pass(), device.release())).start()
            began = time.monotonic()
            with claim(device.device):
                assert time.monotonic() - began > STANDING_SECONDS / 2
            assert prober.wait(LONG_SECONDS) == 0


def test_a_reader_that_goes_on_is_taken_for_the_owner_in_the_end(device: HeldBack) -> None:
    """O_EXCL cannot be seen: whoever has the device open, if only to read, may have it."""
    code = "import os, sys; fd = os.open(sys.argv[1], os.O_RDONLY | os.O_EXCL); print('open', flush=True); sys.stdin.read()"
    words = [sys.executable, "-c", code, device.device]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "open\n"
        with pytest.raises(InUse, match=f"process {process.pid}"):
            claim(device.device)
        process.stdin.close()


def descriptors() -> set[str]:
    gc.collect()  # of what earlier tests have left, nothing is to go meanwhile
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def test_an_interruption_leaves_nothing_behind(device: HeldBack, monkeypatch: pytest.MonkeyPatch) -> None:
    with owner(device.device) as process:
        device.hold()
        write_again(process)
        wait_until(device.held)
        process.kill()
        process.wait(LONG_SECONDS)

        def interrupt(_seconds: float) -> None:
            raise KeyboardInterrupt

        before = descriptors()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(claim_module.time, "sleep", interrupt)
            claim(device.device)
        assert descriptors() == before
        device.let_pass()
        device.release()
        claim(device.device).close()


# --- Processes that cannot end -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of its own, which can be frozen."""
    with loop_device(sparse(tmp_path / "fs", 96 * MIB)) as below:
        run("mkfs.ext4", "-q", below)
        with mounted(below, tmp_path / "mount") as place:
            yield place


@contextlib.contextmanager
def frozen(folder: Path) -> Iterator[Callable[[], None]]:
    """Whoever writes there waits in the kernel, not to be killed, until this is called or the block ends."""
    run("fsfreeze", "--freeze", folder)
    thawed = threading.Event()

    def thaw() -> None:
        if not thawed.is_set():
            thawed.set()
            run("fsfreeze", "--unfreeze", folder)

    try:
        yield thaw
    finally:
        thaw()


def is_blocked(pid: int) -> bool:
    """Whether a thread of the process waits in the kernel."""
    threads = Path(f"/proc/{pid}/task")
    return any((thread / "stat").read_text().rpartition(")")[2].split()[0] == "D" for thread in threads.iterdir())


@pytest.mark.parametrize("flushes", [False, True], ids=["write", "flush"])
@pytest.mark.parametrize("cache", ["none", "writeback"])
def test_a_process_that_is_being_killed_is_waited_for(folder: Path, caplog: pytest.LogCaptureFixture, cache: str, flushes: bool) -> None:
    volume = f"file:{folder / 'disk'}"
    fvd.provision(volume, "16M", journal_size="1M", grow_step="8M")
    with owner(volume, cache, flushes=flushes) as process, frozen(folder) as thaw:
        write_again(process)
        wait_until(lambda: is_blocked(process.pid))
        with pytest.raises(InUse, match=f"process {process.pid}"):
            claim(folder / "disk")  # it lives
        process.kill()
        wait_until(lambda: is_ending(Path(f"/proc/{process.pid}")))
        successor = Successor(volume)
        assert not successor.opened.wait(STANDING_SECONDS)
        assert process.poll() is None
        thaw()
        assert successor.end() == NEW
    told = [record.getMessage() for record in caplog.records if "waiting for" in record.getMessage()]
    assert len(told) == 1 and f"waiting for process {process.pid} (" in told[0]


def test_a_server_that_is_being_killed_is_waited_for(folder: Path, tmp_path: Path) -> None:
    nbd = pytest.importorskip("nbd", reason="python3-libnbd is not installed")
    volume = f"file:{folder / 'disk'}"
    fvd.provision(volume, "16M", journal_size="1M", grow_step="8M")
    words = [sys.executable, "-m", "fvd.cli", "serve", volume, "--socket", str(tmp_path / "s")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        client = nbd.NBD()
        client.connect_uri(process.stdout.readline().strip())
        client.pwrite(b"first" * 1024, 0)
        client.flush()
        with frozen(folder) as thaw:
            client.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(OLD)), 0)
            wait_until(lambda: client.poll(0) >= 0 and is_blocked(process.pid))
            process.send_signal(signal.SIGKILL)
            wait_until(lambda: is_ending(Path(f"/proc/{process.pid}")))
            successor = Successor(volume)
            assert not successor.opened.wait(STANDING_SECONDS)
            thaw()
            assert successor.end() == NEW
        assert process.wait(LONG_SECONDS) == -signal.SIGKILL


def test_a_ghost_on_a_file_is_waited_for(tmp_path: Path) -> None:
    """A process that is gone, whose direct write to a file stands in the device below the file system: its open file stands too."""
    with held_back_device(tmp_path / "below", 96 * MIB) as held:
        run("mkfs.ext4", "-q", "-O", "^has_journal", held.device)
        with mounted(held.device, tmp_path / "mount") as place:
            volume = f"file:{place / 'disk'}"
            fvd.provision(volume, "16M", journal_size="1M", grow_step="8M")
            early, found = succeed_on_file(held, volume)
    assert not early
    assert found == NEW


def succeed_on_file(held: HeldBack, volume: str) -> tuple[bool, bytes]:
    with owner(volume) as process:
        run("sync", "-f", volume.removeprefix("file:"))
        held.hold()
        write_again(process)
        wait_until(held.held)
        held.let_pass()
        process.kill()
        process.wait(LONG_SECONDS)
        successor = Successor(volume)
        early = successor.opened.wait(STANDING_SECONDS)
        held.release()
        return early, successor.end()


# --- Nobody else has the open file -------------------------------------------------------------------------------------------------


def test_whoever_writes_a_volume_writes_through_its_claim() -> None:
    """Every `open_node` in fvd that may write shares the open file of a claim."""
    calls = [
        (path, call)
        for path in (Path(fvd.__file__).parent).rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "open_node"
    ]
    writing = [
        (path.name, {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords})
        for path, call in calls
        if not any(keyword.arg == "read_only" and ast.unparse(keyword.value) == "True" for keyword in call.keywords)
    ]
    assert {name for name, _ in writing} >= {"opening.py", "extending.py", "removing.py", "file_provider.py", "lvm_provider.py"}
    for name, keywords in writing:
        assert "descriptor" in keywords.get("sharing", ""), name


def descendants(pid: int) -> list[int]:
    parents = {}
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError):  # gone meanwhile
                parents[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def who_has_open(path: Path, *pids: int) -> list[int]:
    entries = [(pid, entry) for pid in pids for entry in Path(f"/proc/{pid}/fd").iterdir()]
    return [pid for pid, entry in entries if entry.exists() and entry.samefile(path)]


def test_no_child_of_a_server_has_the_volume_open(tmp_path: Path) -> None:
    """The server of an image that is a base lives as long as the disk is served, and may outlive it."""
    image, disk = tmp_path / "base.qcow2", tmp_path / "disk"
    try:
        run("qemu-img", "create", "-q", "-f", "qcow2", image, "16M")
        run("qemu-io", "-f", "qcow2", "-c", "write -q 1M 64k", image)
    except FileNotFoundError:
        pytest.skip("qemu-img is not installed")
    fvd.provision(f"file:{disk}", "16M", base=image, base_format="qcow2", journal_size="1M", grow_step="8M")
    words = [sys.executable, "-m", "fvd.cli", "serve", f"file:{disk}", "--socket", str(tmp_path / "s")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert line_of(process).startswith("nbd+unix:")
            children = descendants(process.pid)
            assert children, "qemu-nbd"
            assert who_has_open(disk, process.pid)
            assert not who_has_open(disk, *children)
        finally:
            process.kill()


def test_no_command_that_a_process_runs_has_the_volume_open(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    fvd.provision(f"file:{path}", "16M", journal_size="1M", grow_step="8M")
    with fvd.open(f"file:{path}") as disk:
        disk.pwrite(0, b"x" * 4096)
        assert str(path) not in run_command(["ls", "-l", "/proc/self/fd"], LONG_SECONDS).stdout
        told = subprocess.run(["ls", "-l", "/proc/self/fd"], capture_output=True, text=True, check=True, close_fds=False)
        assert str(path) not in told.stdout


def test_a_command_that_writes_for_a_dead_process_has_its_claim(tmp_path: Path) -> None:
    """wipefs, of a provision that was killed meanwhile: nobody gets the device before it has ended."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "wipefs").write_text(f"#!/bin/sh\necho $$ > '{tmp_path}/pid'\nexec sleep 60\n")
    (programs / "wipefs").chmod(0o755)
    code = (
        "import sys, fvd, fvd.device.signature as signature; signature._PROGRAM_PATH = sys.argv[2] + ':' + signature._PROGRAM_PATH;"
        "fvd.provision(sys.argv[1], '16M', journal_size='1M')"
    )
    with loop_device(sparse(tmp_path / "file", 64 * MIB)) as device:
        with subprocess.Popen([sys.executable, "-c", code, device, str(programs)]) as process:
            try:
                wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip())
                wipefs = int((tmp_path / "pid").read_text())
            finally:
                process.kill()
        try:
            with pytest.raises(InUse, match=f"process {wipefs} "):
                claim(device)
        finally:
            os.kill(wipefs, signal.SIGKILL)
        claim(device).close()


# --- Which processes are ending ----------------------------------------------------------------------------------------------------


STATUS = "Name:\tx\nSigPnd:\t{own}\nShdPnd:\t{shared}\nCoreDumping:\t{dumps}\n"
NOTHING, KILL = "0000000000000000", "0000000000000100"


def process_folder(folder: Path, *threads: tuple[str, int, str], shared: str = NOTHING, dumps: int = 0) -> Path:
    """A folder as in /proc. Threads: state, flags, pending signals."""
    folder.mkdir()
    for number, (state, flags, own) in enumerate(threads):
        thread = folder / "task" / str(number)
        thread.mkdir(parents=True)
        (thread / "stat").write_text(f"{number} (a ) name) {state} 1 1 1 0 -1 {flags} 0 0")
        (thread / "status").write_text(STATUS.format(own=own, shared=shared, dumps=dumps))
    (folder / "status").write_text(STATUS.format(own=threads[0][2], shared=shared, dumps=dumps))
    return folder


RUNNING, ZOMBIE, EXITING, BEGINNING = ("S", 0x400040, NOTHING), ("Z", 0x40840C, NOTHING), ("D", 0x400544, NOTHING), ("D", 0x400548, NOTHING)
BLOCKED, STOPPED, KILLED = ("D", 0x400040, NOTHING), ("T", 0x400040, NOTHING), ("D", 0x400040, KILL)
WORKER, KILLED_WORKER = ("D", 0x404050, NOTHING), ("D", 0x404050, KILL)


@pytest.mark.parametrize(
    ("threads", "expected"),
    [
        ((RUNNING,), False),
        ((RUNNING, WORKER), False),
        ((BLOCKED,), False),  # it waits for its device, and lives
        ((STOPPED,), False),
        ((ZOMBIE,), True),
        ((ZOMBIE, RUNNING), False),  # its first thread has ended, the process has not
        ((ZOMBIE, BEGINNING, KILLED_WORKER), True),
        ((ZOMBIE, EXITING), True),
        ((EXITING, WORKER), True),
        ((RUNNING, KILLED_WORKER), True),
        ((KILLED,), True),
    ],
)
def test_which_processes_are_ending(tmp_path: Path, threads: tuple[tuple[str, int, str], ...], expected: bool) -> None:
    assert is_ending(process_folder(tmp_path / "1", *threads)) is expected
    assert is_ending(process_folder(tmp_path / "2", *threads, shared=KILL))
    assert is_ending(process_folder(tmp_path / "3", *threads, dumps=1))


def test_a_process_that_has_gone_is_ending(tmp_path: Path) -> None:
    assert is_ending(tmp_path / "absent")
