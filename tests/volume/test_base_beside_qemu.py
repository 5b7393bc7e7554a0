# SPDX-License-Identifier: Apache-2.0
"""A base that QEMU's programs use too: readers never shut each other out, whoever came first; a writer is noticed, and kept out."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from loops import loop_device, run

from fvd.base.base import examine_base, open_base
from fvd.device.claim import Ownership, claim
from fvd.device.node import Identity
from fvd.device.qemu_locks import is_written
from fvd.errors import InUse

pytestmark = pytest.mark.release_only

NOBODY: Identity = ("file", 0, 0)
KINDS = ("raw", "qcow2", "vmdk", "vdi", "vhdx", "vpc", "qed", "parallels")
PROGRAMS = ("qemu-io", "qemu-nbd", "qemu-storage-daemon")


@contextmanager
def image(folder: Path, kind: str, on_device: bool = False) -> Iterator[str]:
    if any(shutil.which(program) is None for program in ("qemu-img", *PROGRAMS)):
        pytest.skip("QEMU's tools are not installed")
    path = folder / "image"
    run("qemu-img", "create", "-q", "-f", kind, path, "1M")
    with ExitStack() as resources:
        yield resources.enter_context(loop_device(path)) if on_device else str(path)


@contextmanager
def used_by(program: str, path: str, kind: str, folder: Path, *, writing: bool) -> Iterator[None]:
    """A program of QEMU's that has the image open. Raises AssertionError when it could not."""
    socket, ready = folder / f"{program}.sock", folder / f"{program}.pid"
    if program == "qemu-io":
        command = [program, *([] if writing else ["-r"]), "-f", kind, path]
    elif program == "qemu-nbd":
        how = [] if writing else ["--read-only"]
        command = [program, *how, f"--format={kind}", "--persistent", f"--socket={socket}", f"--pid-file={ready}", path]
    else:
        node = f"driver={kind},node-name=node,read-only={'off' if writing else 'on'},file.filename={path}"
        node += f",file.driver={'host_device' if path.startswith('/dev/') else 'file'}"
        export = f"nbd,id=export,node-name=node,writable={'on' if writing else 'off'}"
        server = f"addr.type=unix,addr.path={socket}"
        command = [program, "--blockdev", node, "--nbd-server", server, "--export", export, "--pidfile", str(ready)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1) as process:
        try:
            assert process.stdin is not None and process.stdout is not None and process.stderr is not None
            if program == "qemu-io":
                process.stdin.write("length\n")
                if not process.stdout.readline():
                    raise AssertionError(process.stderr.read())
            deadline = time.monotonic() + 10
            while program != "qemu-io" and not ready.exists():
                if process.poll() is not None:
                    raise AssertionError(process.stderr.read())
                assert time.monotonic() < deadline
                time.sleep(0.005)
            yield
        finally:
            process.kill()
            process.communicate(timeout=10)
            socket.unlink(missing_ok=True)
            ready.unlink(missing_ok=True)


@pytest.mark.parametrize("kind", KINDS)
def test_readers(tmp_path: Path, kind: str) -> None:
    """In both orders, and several at once."""
    if kind != "raw":
        pytest.importorskip("fvd.device._remote", reason="libnbd is not installed")
    with image(tmp_path, kind) as path:
        programs = PROGRAMS if kind in ("raw", "qcow2") else PROGRAMS[:1]
        for program in programs:
            with used_by(program, path, kind, tmp_path, writing=False):
                reference = examine_base(path, kind)
                open_base(reference, NOBODY).close()
        with open_base(reference, NOBODY), open_base(reference, NOBODY):
            for program in programs:
                with used_by(program, path, kind, tmp_path, writing=False):
                    open_base(reference, NOBODY).close()
                    assert examine_base(path, kind) == reference


@pytest.mark.parametrize("kind", KINDS)
def test_writers(tmp_path: Path, kind: str) -> None:
    if kind != "raw":
        pytest.importorskip("fvd.device._remote", reason="libnbd is not installed")
    with image(tmp_path, kind) as path:
        reference = examine_base(path, kind)
        for program in PROGRAMS if kind in ("raw", "qcow2") else PROGRAMS[:1]:
            try:
                with used_by(program, path, kind, tmp_path, writing=True):
                    for call in (lambda: examine_base(path, kind), lambda: open_base(reference, NOBODY)):
                        with pytest.raises(InUse, match=f"another program writes to it.*{program[:15]}"):
                            call()
            except AssertionError as error:
                if "does not support writ" in str(error) or "lock" not in str(error):
                    pytest.skip(f"this QEMU writes no {kind}: {error}")
                raise
            with (
                open_base(reference, NOBODY),
                pytest.raises(AssertionError, match=r"lock|another process"),
                used_by(program, path, kind, tmp_path, writing=True),
            ):
                raise RuntimeError(f"{program} writes to a base that is in use")


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_a_device(tmp_path: Path, kind: str) -> None:
    if kind != "raw":
        pytest.importorskip("fvd.device._remote", reason="libnbd is not installed")
    with image(tmp_path, kind, on_device=True) as path:
        with used_by("qemu-io", path, kind, tmp_path, writing=False):
            reference = examine_base(path, kind)
        with open_base(reference, NOBODY), used_by("qemu-io", path, kind, tmp_path, writing=False):
            open_base(reference, NOBODY).close()
        with used_by("qemu-io", path, kind, tmp_path, writing=True), pytest.raises(InUse, match="another program writes to it"):
            open_base(reference, NOBODY)


def test_a_base_keeps_our_own_writers_out_too(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(4096))
    with claim(path, Ownership.BASE), claim(path, Ownership.BASE), path.open("rb") as file:
        assert not is_written(file.fileno())
        with pytest.raises(InUse):
            claim(path, Ownership.WRITER)
    with claim(path, Ownership.WRITER):
        for _ in range(2):
            with pytest.raises(InUse) as caught:
                claim(path, Ownership.BASE)
            assert str(caught.value).count("this process") == 1
