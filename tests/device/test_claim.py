# SPDX-License-Identifier: Apache-2.0
"""fvd.device.claim: one owner, whatever path leads to the volume, and whoever it is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from loops import loop_device, mounted, run, sparse

from fvd.device import claim as claim_module
from fvd.device.claim import Ownership, claim
from fvd.device.holders import Holders
from fvd.device.node import open_node
from fvd.errors import InUse, NotFound, Unsupported

MIB = 1 << 20
WRITER, READER, BASE = Ownership.WRITER, Ownership.READER, Ownership.BASE


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return sparse(tmp_path / "file", 16 * MIB)


@contextmanager
def other_process(path: str | Path, ownership: Ownership) -> Iterator[subprocess.Popen[str]]:
    """A second process that holds a claim until the end of the block."""
    code = (
        "import sys; from fvd.device.claim import *; c = claim(sys.argv[1], Ownership[sys.argv[2]]);"
        "print('claimed', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(path), ownership.name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "claimed\n"
            yield process
        finally:
            process.kill()


def refused(path: str | Path, ownership: Ownership = WRITER) -> str:
    with pytest.raises(InUse) as caught:
        claim(path, ownership)
    assert str(path) in str(caught.value)
    return str(caught.value)


# --- Files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "fine"),
    [
        (WRITER, WRITER, False),
        (WRITER, READER, False),
        (READER, WRITER, False),
        (READER, READER, True),
        (WRITER, BASE, False),
        (BASE, WRITER, False),
        (BASE, BASE, True),
        (BASE, READER, True),
    ],
)
@pytest.mark.parametrize("device", [False, True])
def test_who_may_beside_whom(file: Path, first: Ownership, second: Ownership, fine: bool, device: bool) -> None:
    @contextmanager
    def thing() -> Iterator[str]:
        if device:
            with loop_device(file) as path:
                yield path
        else:
            yield str(file)

    with thing() as path:
        with claim(path, first):
            if fine:
                claim(path, second).close()
            else:
                refused(path, second)
        claim(path, second).close()


def test_links_are_the_same_volume(file: Path) -> None:
    link, hard = file.with_name("link"), file.with_name("hard")
    link.symlink_to(file)
    hard.hardlink_to(file)
    with claim(file):
        refused(link)
        refused(hard, READER)


def test_another_process_is_refused_and_named(file: Path) -> None:
    with other_process(file, WRITER) as process:
        message = refused(file, READER)
        assert f"process {process.pid} (python" in message
    claim(file).close()


def test_a_killed_process_holds_nothing(file: Path) -> None:
    with other_process(file, WRITER) as process:
        process.kill()
        process.wait()
        claim(file).close()


def test_closing_another_descriptor_of_the_file_keeps_the_claim(file: Path) -> None:
    """POSIX locks would be lost here; OFD locks are not."""
    with claim(file):
        os.close(os.open(file, os.O_RDWR))
        with other_descriptor_in_child(file) as code:
            assert code == 5


@contextmanager
def other_descriptor_in_child(path: Path) -> Iterator[int]:
    code = "import sys; from fvd.device.claim import *\ntry: claim(sys.argv[1])\nexcept Exception as error: sys.exit(error.exit_code)"
    yield subprocess.run([sys.executable, "-c", code, str(path)], check=False, timeout=30).returncode


def test_qemu_is_refused_too(file: Path) -> None:
    try:
        command = ["qemu-io", "-f", "raw", "-c", "write 0 4096", str(file)]
        with claim(file):
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except FileNotFoundError:
        pytest.skip("qemu-io is not installed")
    assert done.returncode != 0 and "lock" in done.stderr


def test_a_volume_that_was_replaced_while_it_was_opened(file: Path) -> None:
    with claim(file) as held:
        file.rename(file.with_name("old"))
        sparse(file, MIB)
        with open_node(file) as node, pytest.raises(InUse, match="replaced"):
            held.check_covers(node)


def test_what_cannot_be_claimed(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        claim(tmp_path / "absent")
    for path in (tmp_path, Path("/dev/null")):
        with pytest.raises(Unsupported):
            claim(path)


# --- Devices, and what the kernel does with them -----------------------------------------------------------------


def test_two_processes_and_one_device(file: Path) -> None:
    with loop_device(file) as device, other_process(device, WRITER) as process:
        assert str(process.pid) in refused(device)
        assert str(process.pid) in refused(device, READER)


def test_a_second_device_node(file: Path, tmp_path: Path) -> None:
    """The lock is on another inode; the kernel's O_EXCL is on the device."""
    with loop_device(file) as device:
        node = tmp_path / "node"
        try:
            os.mknod(node, 0o600 | 0o060000, Path(device).stat().st_rdev)
            os.close(os.open(node, os.O_RDONLY))
        except PermissionError:
            pytest.skip("no device nodes can be made in the folder of the tests")
        with claim(device):
            refused(node)
            refused(node, READER)


def test_a_mounted_device(file: Path, tmp_path: Path) -> None:
    with loop_device(file) as device:
        run("mkfs.ext4", "-q", device)
        with mounted(device, tmp_path / "mounted here"):
            assert f"mounted on {tmp_path}/mounted here" in refused(device)
            refused(device, READER)
            assert "mounted writable" in refused(device, BASE)
            assert "mounted writable" in refused(file, BASE)
        with mounted(device, tmp_path / "mounted here", "-o", "ro"):
            refused(device)
            claim(device, BASE).close()
            claim(file, BASE).close()
        claim(device).close()


def test_a_file_and_the_loop_device_over_it(file: Path) -> None:
    with loop_device(file) as device:
        assert f"attached to {device}" in refused(file)
        refused(file, READER)
        with claim(device), loop_device(file) as second:
            assert f"{file}, the file behind {second}," in refused(second)
    with claim(file), loop_device(file) as device:
        refused(device)


def test_swap(file: Path) -> None:
    with loop_device(file) as device:
        run("mkswap", device)
        try:
            run("swapon", device)
        except AssertionError as error:
            pytest.skip(f"no swap here: {error}")
        try:
            assert "swap" in refused(device)
        finally:
            run("swapoff", device)
        claim(device).close()


def test_many_readers_at_once(file: Path) -> None:
    """Each asks for O_EXCL for a moment; they must not refuse each other."""
    code = "import sys; from fvd.device.claim import *\nfor _ in range(50): claim(sys.argv[1], Ownership.READER).close()"
    with loop_device(file) as device:
        processes = [subprocess.Popen([sys.executable, "-c", code, device]) for _ in range(3)]
        assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]


def test_transfers_keep_the_claim(tmp_path: Path) -> None:
    """The open file that holds the claim is the one that transfers use: what the kernel still does for a killed owner keeps it."""
    path = tmp_path / "disk"
    sparse(path, MIB)
    ours = claim(path)
    node = open_node(path, sharing=ours.descriptor)
    ours.close()
    node.pwrite(0, b"x" * 4096)
    with pytest.raises(InUse, match="this process"):
        claim(path)
    node.close()
    claim(path).close()


def test_a_ghost_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locked and held by no process that can be seen, as after a kill -9 with operations under way."""
    path = tmp_path / "disk"
    sparse(path, MIB)
    ghost = claim(path)
    monkeypatch.setattr(claim_module, "holders_of", lambda identity, ours: Holders([], complete=False))
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            ghost.close()

    monkeypatch.setattr(claim_module.time, "sleep", sleep)
    claim(path).close()
    assert len(waited) == 3
    with claim(path):
        monkeypatch.setattr(claim_module, "_GHOST_SECONDS", 0.0)
        with pytest.raises(InUse, match="only root can name"):
            claim(path)
