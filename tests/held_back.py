# SPDX-License-Identifier: Apache-2.0
"""A loop device whose transfers can be held back one by one, as a failed path holds them: in flight, until it comes again.

Below it lies a file that is served here through FUSE, by a process of its own. The kernel hands it the loop device's transfers as they come
(direct, many at a time), and it answers what is not held at once; so a later write can end before an earlier one, which no loop device over
an ordinary file does. What is held lands when it is released, and not before.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from loops import loop_device

# linux/fuse.h, version 7.31
_IN = struct.Struct("=IIQQIIIHH")  # length, opcode, unique, node, uid, gid, pid, extension, padding
_OUT = struct.Struct("=IiQ")  # length, error, unique
_INIT_IN = struct.Struct("=IIII")  # major, minor, readahead, flags
_INIT_OUT = struct.Struct("=IIIIHHIIHH32x")  # and: background, congestion, most written at once, time granularity, pages, alignment
_ATTR = struct.Struct("=QQQQQQIIIIIIIIII")  # inode, size, blocks, three times and their ns, mode, links, uid, gid, rdev, block size, flags
_ENTRY = struct.Struct("=QQQQII")  # node, generation, entry and attributes valid for s, ns
_ATTR_OUT = struct.Struct("=QII")
_OPEN_OUT = struct.Struct("=QIi")
_IO_IN = struct.Struct("=QQIIQII")  # handle, offset, size, flags, lock owner, flags, padding
_WRITE_OUT = struct.Struct("=II")
LOOKUP, FORGET, GETATTR, SETATTR, OPEN, READ, WRITE, STATFS = 1, 2, 3, 4, 14, 15, 16, 17
RELEASE, FSYNC, FLUSH, INIT, OPENDIR, RELEASEDIR, INTERRUPT, BATCH_FORGET = 18, 20, 25, 26, 27, 29, 36, 42
_ASYNC_READ, _BIG_WRITES, _ASYNC_DIO, _PAGES_MAX = 1 << 0, 1 << 5, 1 << 15, 1 << 22
_DIRECT_IO, _PARALLEL_WRITES = 1 << 0, 1 << 6
_WRITE_BYTES = 1 << 20
_ROOT, _FILE, NAME = 1, 2, "disk"


class _Medium:
    """One file of zeros in memory, and the transfers of it that wait."""

    def __init__(self, size_bytes: int) -> None:
        self._data = bytearray(size_bytes)
        self._held_kinds: tuple[int, ...] = ()
        self._held: list[bytes] = []  # messages
        self._fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)

    def mount(self, folder: str) -> None:
        options = f"fd={self._fuse},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()},allow_other".encode()
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(b"held-back", folder.encode(), b"fuse", 0, options):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def serve(self) -> None:
        """Until it is unmounted or whoever asked for it has gone. Words on stdin: see `HeldBack`. The answer is how many are held."""
        import select

        os.set_blocking(self._fuse, False)
        while True:
            ready, _, _ = select.select([self._fuse, 0], [], [])
            if 0 in ready:
                word = os.read(0, 64).decode().strip()
                if not word:
                    return
                self._obey(word)
                os.write(1, f"{len(self._held)}\n".encode())
            if self._fuse in ready:
                try:
                    message = os.read(self._fuse, _WRITE_BYTES + 4096)
                except (BlockingIOError, InterruptedError, FileNotFoundError):  # taken back before it was read
                    continue
                except OSError as error:
                    if error.errno == errno.ENODEV:
                        return
                    raise
                self._take(message)

    def _obey(self, word: str) -> None:
        self._held_kinds = {"hold": (WRITE,), "hold-reads": (READ,), "pass": ()}.get(word, self._held_kinds)
        if word == "release":
            held, self._held = self._held, []
            for message in held:
                self._transfer(message)

    def _answer(self, unique: int, data: bytes = b"", error: int = 0) -> None:
        with contextlib.suppress(FileNotFoundError):  # whoever asked was interrupted
            os.write(self._fuse, _OUT.pack(_OUT.size + len(data), -error, unique) + data)

    def _attributes(self, node: int) -> bytes:
        mode, size = (0o40755, 0) if node == _ROOT else (0o100600, len(self._data))
        return _ATTR.pack(node, size, size // 512, *[0] * 6, mode, 1, os.getuid(), os.getgid(), 0, 4096, 0)

    def _transfer(self, message: bytes) -> None:
        _, code, unique, *_ = _IN.unpack_from(message)
        _, offset_bytes, size, *_ = _IO_IN.unpack_from(message, _IN.size)
        if code == READ:
            self._answer(unique, bytes(self._data[offset_bytes : offset_bytes + size]))
            return
        begin = _IN.size + _IO_IN.size
        self._data[offset_bytes : offset_bytes + size] = message[begin : begin + size]
        self._answer(unique, _WRITE_OUT.pack(size, 0))

    def _take(self, message: bytes) -> None:
        _, code, unique, node, *_ = _IN.unpack_from(message)
        body = memoryview(message)[_IN.size :]
        if code == INIT:
            major, minor, readahead, offered = _INIT_IN.unpack_from(body)
            flags = offered & (_ASYNC_READ | _BIG_WRITES | _ASYNC_DIO | _PAGES_MAX)
            self._answer(unique, _INIT_OUT.pack(major, min(minor, 31), readahead, flags, 64, 48, _WRITE_BYTES, 1, _WRITE_BYTES // 4096, 0))
        elif code == LOOKUP:
            if bytes(body).rstrip(b"\0").decode() != NAME:
                self._answer(unique, error=errno.ENOENT)
                return
            self._answer(unique, _ENTRY.pack(_FILE, 0, 3600, 3600, 0, 0) + self._attributes(_FILE))
        elif code in (GETATTR, SETATTR):
            self._answer(unique, _ATTR_OUT.pack(3600, 0, 0) + self._attributes(node))
        elif code in (OPEN, OPENDIR):
            self._answer(unique, _OPEN_OUT.pack(0, _DIRECT_IO | _PARALLEL_WRITES if code == OPEN else 0, 0))
        elif code in self._held_kinds:
            self._held.append(message)
        elif code in (READ, WRITE):
            self._transfer(message)
        elif code in (RELEASE, RELEASEDIR, FSYNC, FLUSH):
            self._answer(unique)
        elif code not in (FORGET, BATCH_FORGET, INTERRUPT):  # these have no answer
            self._answer(unique, error=errno.ENOSYS)


class HeldBack:
    """The device, and what is done to its transfers."""

    def __init__(self, device: str, process: subprocess.Popen[str]) -> None:
        self.device = device
        self._process = process

    def _say(self, word: str) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def hold(self) -> None:
        """Writes from here on are held."""
        self._say("hold")

    def hold_reads(self) -> None:
        """Reads from here on are held; writes are not."""
        self._say("hold-reads")

    def let_pass(self) -> None:
        """What comes from here on goes through. What is held stays so."""
        self._say("pass")

    def held(self) -> int:
        """How many are held."""
        return self._say("count")

    def release(self) -> None:
        """What is held lands now."""
        self._say("release")


@contextlib.contextmanager
def held_back_device(folder: Path, size_bytes: int) -> Iterator[HeldBack]:
    """A loop device of `size_bytes` zeros. Skips where FUSE, mounts or loop devices are not to be had."""
    if os.geteuid() != 0 or not Path("/dev/fuse").exists():
        pytest.skip("no root or no FUSE here")
    folder.mkdir()
    command = [sys.executable, __file__, str(folder), str(size_bytes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None and process.stdin is not None
        try:
            if process.stdout.readline() != "mounted\n":
                pytest.skip(f"FUSE cannot be mounted here: {process.stderr.read().strip().splitlines()[-1:]}")
            try:
                with loop_device(folder / NAME, "--direct-io=on") as device:
                    held = HeldBack(device, process)
                    try:
                        yield held
                    finally:
                        held.let_pass()
                        held.release()
            finally:
                subprocess.run(["umount", "--lazy", folder], check=False)
        finally:
            process.stdin.close()


if __name__ == "__main__":
    medium = _Medium(int(sys.argv[2]))
    medium.mount(sys.argv[1])
    print("mounted", flush=True)
    medium.serve()
